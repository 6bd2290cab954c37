//! The inbound half against a peer that speaks the wire by hand, and real applications on sockets.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::pedantic,
    clippy::disallowed_methods,
    missing_docs,
    unreachable_pub,
    reason = "tests"
)]

#[path = "inbound/app.rs"]
mod app;
#[path = "inbound/endings.rs"]
mod endings;
#[path = "inbound/floods.rs"]
mod floods;
#[path = "inbound/grpc.rs"]
mod grpc;
#[path = "inbound/http.rs"]
mod http_calls;
#[path = "inbound/peers.rs"]
mod peers;
#[path = "inbound/refusals.rs"]
mod refusals;
#[path = "inbound/support.rs"]
mod support;
#[path = "inbound/tunnels.rs"]
mod tunnels;
