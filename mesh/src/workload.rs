//! The workload that a sidecar stands beside.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::spiffe::{SpiffeId, TrustDomain};

/// What a policy selects by, and what its ports refer to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// The identity of its service account.
    pub id: SpiffeId,
    /// The mesh's trust domain, the same as the identity's.
    pub trust_domain: TrustDomain,
    /// Its namespace.
    pub namespace: String,
    /// Its labels, which `selector.matchLabels` compares.
    pub labels: BTreeMap<String, String>,
    /// Its own (container) ports.
    pub ports: Vec<WorkloadPort>,
    /// Whether refusals refuse.
    pub enforcement: Enforcement,
}

/// One port of a workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct WorkloadPort {
    /// The name by which a policy may refer to it.
    #[serde(default)]
    pub name: Option<String>,
    /// The number by which a policy refers to it.
    pub port: u16,
}

/// `sidegate.dev/enforcement`: what a refusal does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Enforcement {
    /// A refused call is refused.
    #[default]
    Enforce,
    /// Every call that parses is served; what would have been refused is logged as `would_deny`.
    Audit,
}
