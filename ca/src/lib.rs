//! Sidegate's certificate authority: the only process that holds a signing key.
//!
//! [`Ca::start`] turns a [`Config`] into a [`RunningCa`]: it checks the state folder, makes what
//! is to be made once, and serves sidecars (gRPC over TLS), administrators (gRPC over a Unix
//! socket) and Prometheus. One issuance goes through [`issuer`]; what the CA remembers is
//! [`registry`], and all of that comes from [`ledger`]. Keys are behind [`keystore`]: in the state
//! folder, or in a Secret that replicas share, which is one of the things of [`kubernetes`].
//!
//! Invariants: identity comes from attested evidence, never from a request; what leaves is in the
//! ledger, on disk, before it leaves; state is made once and never silently made again; no process
//! globals.

pub use ca::{Ca, RunningCa, StartError};
pub use config::{Config, ConfigError, Limits};
pub use operations::{CreatedToken, OperationError};

mod admin;
pub mod authority;
mod ca;
pub mod config;
pub mod csr;
pub mod digest;
pub mod issuance;
pub mod issued;
pub mod issuer;
pub mod key;
pub mod keystore;
pub mod kubernetes;
pub mod ledger;
pub mod limits;
mod metrics;
pub mod operations;
pub mod registry;
pub mod roots;
mod server;
pub mod state;
pub mod watchers;
