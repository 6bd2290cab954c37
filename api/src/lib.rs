//! The gRPC contracts between Sidegate's processes, generated from `proto/`.
//!
//! Invariant: no logic lives here. A field number, once released, keeps its meaning.

/// Identity: what a workload asks of the CA.
pub mod identity {
    #![allow(
        missing_docs,
        clippy::all,
        clippy::pedantic,
        clippy::clone_on_ref_ptr,
        clippy::allow_attributes_without_reason,
        unused_qualifications,
        reason = "generated code; the contract is documented in the .proto file"
    )]
    tonic::include_proto!("sidegate.identity.v1alpha1");
}

/// CA administration: what an administrator asks of a running CA over its Unix socket.
pub mod ca {
    #![allow(
        missing_docs,
        clippy::all,
        clippy::pedantic,
        clippy::clone_on_ref_ptr,
        clippy::allow_attributes_without_reason,
        unused_qualifications,
        reason = "generated code; the contract is documented in the .proto file"
    )]
    tonic::include_proto!("sidegate.ca.v1alpha1");
}

/// Control: what a sidecar hears from the controller.
pub mod control {
    #![allow(
        missing_docs,
        clippy::all,
        clippy::pedantic,
        clippy::clone_on_ref_ptr,
        clippy::allow_attributes_without_reason,
        unused_qualifications,
        reason = "generated code; the contract is documented in the .proto file"
    )]
    tonic::include_proto!("sidegate.control.v1alpha1");
}
