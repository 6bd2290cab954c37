//! The whole controller in this process: real TLS and gRPC, an API server of the test's own.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    clippy::too_many_lines,
    clippy::needless_pass_by_value,
    clippy::semicolon_if_nothing_returned,
    clippy::print_stdout,
    unreachable_pub,
    reason = "tests"
)]

use std::time::Duration;

mod cluster;
mod mesh;
mod real;
mod replicas;
mod sidecars;
mod support;

/// How long anything may take before a test gives up; nothing waits for it when all is well.
const PATIENCE: Duration = Duration::from_secs(30);
