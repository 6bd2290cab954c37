//! A rotating SPIFFE workload identity on rustls.
//!
//! [`Verifier`] is the only thing that decides whether a certificate is believed, in both
//! directions and also for the CA's own checks. [`CredentialStore`] holds what this process shows
//! and whom it trusts, as one immutable value that every handshake loads once. [`Acceptor`] and
//! [`Connector`] turn a byte stream into an authenticated one. [`WorkloadIdentity`] keeps the store
//! fresh: it renews the SVID, follows the bundle, and survives restarts and an absent CA. [`Door`] and
//! [`serve_health`] are the two ports of a part of the control plane.
//!
//! Invariants: TLS 1.3 only, no resumption, no process globals (clock, crypto provider and
//! credentials are passed in), and private keys never appear in `Debug`, logs or errors.

pub use bundle::{BundleError, BundleSet, Revocations, Root, Trust, TrustUpdate};
pub use ca_client::{CaClient, CaClientConfig, control_plane_id};
pub use certificate::{Serial, SerialError};
pub use clock::SystemClock;
pub use credentials::{CredentialStore, Credentials, PublishError};
pub use csr::WorkloadKey;
pub use door::{Caller, Connection, Door, DoorLimits, Doorkeeper};
pub use handshake::{
    ALPN, ALPN_H2, Acceptor, Connector, HandshakeError, Hello, HelloReader, Peer, PeerCheck,
    TlsProfile, server_config_open, server_config_optional_client,
};
pub use health::{Health, serve_health};
pub use identity::{
    IdentityConfig, IdentityError, IdentityStatus, RenewalPolicy, StatusSnapshot, WorkloadIdentity,
};
pub use issue::{
    Acknowledgement, BoxFuture, BundleStream, BundleWatch, Evidence, Issue, IssueError,
    IssueRequest, JoinToken,
};
pub use provider::{crypto_provider, warm_up};
pub use state_dir::{StateDir, StateError};
pub use svid::{Svid, SvidError};
pub use verify::{PeerCertificate, Verifier, VerifyError, VerifyLimits};

mod bundle;
mod ca_client;
mod certificate;
mod clock;
mod credentials;
mod csr;
mod door;
mod handshake;
mod health;
mod identity;
mod issue;
mod proven;
mod provider;
mod state_dir;
mod svid;
mod verify;
