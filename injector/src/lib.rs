//! The Sidegate webhooks: injection of sidecars and validation of resources.
//!
//! [`inject()`] turns a pod into a pod with a gate at its side; the webhook and the command line
//! call the same function, so what is seen offline is what a cluster does.

pub use config::{Config, ConfigError, Limits, Webhooks};
pub use inject::{
    NamespaceFacts, Outcome, Quantity, QuantityError, Refusal, Workload, annotations, inject,
    inject_with, system_random, templates, uninject,
};
pub use settings::{Images, LogLevel, PullPolicy, Resources, Settings, SettingsError};

mod config;
mod inject;
pub mod settings;
