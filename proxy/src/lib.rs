//! The Sidegate sidecar.

pub mod body;
pub mod wire;
