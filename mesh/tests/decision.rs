//! What the policy decides: the truth table, a slow and obvious reference, and the explanation.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    unreachable_pub,
    reason = "tests"
)]

#[path = "decision/explained.rs"]
mod explained;
#[path = "decision/property.rs"]
mod property;
#[path = "decision/reference.rs"]
mod reference;
#[path = "decision/table.rs"]
mod table;
#[path = "decision/warned.rs"]
mod warned;
#[path = "decision/world.rs"]
mod world;
