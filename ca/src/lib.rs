//! Sidegate's certificate authority: the only process that holds a signing key.

pub mod config;
pub mod csr;
pub mod digest;
pub mod key;
pub mod ledger;
pub mod state;
