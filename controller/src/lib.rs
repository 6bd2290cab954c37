//! The controller: Kubernetes in, what each sidecar needs out.
//!
//! Invariant: it decides what sidecars hear, and holds no key that could make an identity.

pub use config::{Ca, Config, ConfigError, Lease, Limits};
pub use crd::crds;

mod config;
pub mod crd;
