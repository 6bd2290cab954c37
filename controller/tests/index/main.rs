//! The index: what each kind of object does to what a sidecar hears.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::too_many_lines,
    clippy::needless_pass_by_value,
    clippy::semicolon_if_nothing_returned,
    clippy::print_stdout,
    unreachable_pub,
    reason = "tests"
)]

mod churn;
mod destinations;
mod policies;
mod sidecars;
mod world;
