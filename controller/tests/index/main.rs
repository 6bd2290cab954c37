//! The index: what each kind of object does to what a sidecar hears.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

mod churn;
mod destinations;
mod policies;
mod sidecars;
mod world;
