//! The CA as sidecars and administrators meet it: over its sockets, and as the real binary.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::too_many_lines,
    clippy::unchecked_time_subtraction,
    clippy::indexing_slicing,
    missing_docs,
    reason = "tests"
)]

mod apiserver;
mod binary;
mod bundle;
mod crash;
mod harness;
mod issuance;
mod kubernetes;
mod roots;
mod state;
mod workloads;
