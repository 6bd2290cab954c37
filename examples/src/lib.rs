//! The sample shop: real REST, gRPC, WebSocket and TCP servers, and the mesh around them.
//!
//! Invariant: no service knows that it is in a mesh. `web` reaches the others only at the addresses
//! that it is given; nothing here goes round a sidecar.

pub mod ask;
pub mod calls;
pub mod client;
pub mod mesh;
pub mod shop;

/// The shop's gRPC messages, client and server, generated from `proto/shop/v1/inventory.proto`.
pub mod proto {
    #![allow(
        missing_docs,
        clippy::all,
        clippy::pedantic,
        clippy::clone_on_ref_ptr,
        clippy::allow_attributes_without_reason,
        unused_qualifications,
        reason = "generated code; the contract is documented in the .proto file"
    )]
    tonic::include_proto!("shop.v1");

    /// What the kubelet asks for in a gRPC probe, from `proto/grpc/health/v1/health.proto`.
    pub mod health {
        tonic::include_proto!("grpc.health.v1");
    }

    /// The encoded descriptor set that server reflection answers from.
    pub const DESCRIPTOR: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/shop.bin"));
}
