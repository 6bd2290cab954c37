//! The Sidegate sidecar.

pub mod body;
pub mod error;
pub mod wire;
