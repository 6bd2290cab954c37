//! Sidegate's vocabulary: identities, resources, policy, routes and the access-log record.
//!
//! Invariant: this crate is pure. It opens no socket, reads no real clock and awaits nothing, so
//! that everything a sidecar decides can be tested without one.

pub mod access_log;
pub mod clock;
pub mod config;
pub mod decision;
pub mod diagnostics;
pub mod explain;
pub mod fast_map;
pub mod host;
pub mod path;
pub mod policy;
pub mod resource;
pub mod routes;
pub mod snapshot;
pub mod spiffe;
pub mod store;
pub mod validate;
pub mod workload;
pub mod yaml;

pub use clock::{Clock, ManualClock};
pub use decision::{Decision, Verdict};
pub use explain::Explanation;
pub use host::{Authority, AuthorityError, ServiceName, service_of};
pub use path::{CanonicalPath, PathError};
pub use policy::{Ask, Caller, HttpAsk, Policy};
pub use resource::{Problem, Resource, ResourceKey, Severity};
pub use routes::{Endpoint, Route, Routes, Traffic};
pub use snapshot::Snapshot;
pub use spiffe::{SpiffeId, SpiffeIdError, TrustDomain};
pub use store::{BrokenResource, ResourceSet, ResourceStore};
pub use workload::{Enforcement, Workload, WorkloadPort};
