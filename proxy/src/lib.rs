//! The Sidegate sidecar.

pub mod body;
pub mod config;
pub mod drain;
pub mod error;
pub mod headers;
pub mod limits;
pub mod metrics;
pub mod wire;
