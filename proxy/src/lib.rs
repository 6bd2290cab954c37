//! The Sidegate sidecar.

pub mod access_log;
pub mod application;
pub mod authorize;
pub mod balance;
pub mod body;
pub mod call;
pub mod config;
pub mod connections;
pub mod detect;
pub mod drain;
pub mod error;
pub mod forward;
pub mod headers;
pub mod http1;
pub mod inbound;
pub mod limits;
pub mod metrics;
pub mod outbound;
pub mod pool;
pub mod retry;
pub mod shared;
pub mod stack;
pub mod state;
pub mod wire;
