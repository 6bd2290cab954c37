//! The controller: Kubernetes in, what each sidecar needs out.
//!
//! Watches keep an [`index::Index`] as the cluster is; each sidecar's stream hears the differences
//! between what it has and what it should have; the leader of the replicas writes what became of
//! each resource.
//!
//! Invariant: it decides what sidecars hear, and holds no key that could make an identity.

pub use config::{Ca, Config, ConfigError, Lease, Limits};
pub use controller::{Controller, RunningController, StartError, Surroundings};
pub use crd::crds;

mod config;
mod controller;
pub mod crd;
mod events;
mod health;
mod hub;
pub mod index;
mod lease;
mod metrics;
mod replica;
mod server;
mod session;
mod shared;
mod status;
mod watches;
