//! The Sidegate webhooks: injection of sidecars and validation of resources.
//!
//! [`inject()`] turns a pod into a pod with a gate at its side; the webhook and the command line
//! call the same function, so what is seen offline is what a cluster does. [`Injector`] serves it
//! to the API server, with a certificate of the mesh that it renews by itself.

pub use config::{Config, ConfigError, Limits, Webhooks};
pub use inject::{
    NamespaceFacts, Outcome, Quantity, QuantityError, Refusal, Visit, Workload, annotations,
    inject, inject_with, system_random, templates, uninject,
};
pub use injector::{Injector, StartError};
pub use settings::{Images, LogLevel, PullPolicy, Resources, Settings, SettingsError};

mod ca_bundle;
mod config;
mod connections;
mod health;
mod inject;
mod injector;
mod metrics;
mod namespaces;
mod review;
mod server;
pub mod settings;
mod validate;
mod webhook;
