//! The resources that people write: authorization policies, services, traffic policies.
//!
//! One set of types for the YAML files of a folder and for a cluster. Invariant: a resource that
//! exists was read strictly: no unknown field, no default for what decides who may do what, no
//! empty list that could be read as "everything".

use std::collections::BTreeMap;
use std::fmt;

use schemars::JsonSchema;
use serde::ser::SerializeStruct;
use serde::{Deserialize, Serialize, Serializer};

mod authorization;
mod check;
mod decode;
mod document;
mod fault;
mod list;
mod name;
mod pattern;
mod problem;
mod schema;
mod static_service;
mod suggest;
mod traffic;
mod tree;
mod value;

pub use authorization::{
    Action, AuthorizationPolicy, AuthorizationPolicySpec, Mode, Rule, Selector, Source, Target,
    Upgrade,
};
pub use document::{
    DOCUMENTS_PER_FILE_MAX, FILE_BYTES_MAX, Known, Located, as_written, parse_documents,
    parse_known, parse_value,
};
pub(crate) use document::{Document, read as read_documents};
pub use pattern::{PathPattern, PatternError, PatternSegment};
pub use problem::{Problem, Severity};
pub use static_service::{
    EndpointIdentity, PortProtocol, ServiceEndpoint, ServicePort, StaticService, StaticServiceSpec,
};
pub use suggest::{nearest, one_of};
pub use traffic::{
    BalancingPolicy, GrpcRetry, GrpcRetryCode, LoadBalancing, OutlierEjection, Retry,
    RetryCondition, TrafficPolicy, TrafficPolicySpec,
};
pub use tree::NODES_PER_DOCUMENT_MAX;
pub use value::{Percent, PercentError, PortRef};

/// Whether a file of this name holds resources, in capitals or not: a Deny must not be overlooked for
/// how its file is spelt.
pub fn is_resource_file(path: &std::path::Path) -> bool {
    let extension = path.extension().unwrap_or_default();
    ["yaml", "yml", "json"]
        .iter()
        .any(|known| extension.eq_ignore_ascii_case(known))
}

/// `apiVersion` of every resource.
pub const API_VERSION: &str = "sidegate.dev/v1alpha1";

/// The namespace of the control plane, whose policies are mesh-wide.
pub const SYSTEM_NAMESPACE: &str = "sidegate-system";

/// Largest number of rules of one policy.
pub const RULES_PER_POLICY_MAX: usize = 10_000;

/// Which resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Kind {
    /// Who may call what.
    AuthorizationPolicy,
    /// A service whose endpoints are listed by hand.
    StaticService,
    /// How callers call a service.
    TrafficPolicy,
}

impl Kind {
    /// Every kind, in the order of the reference.
    pub const ALL: [Self; 3] = [
        Self::AuthorizationPolicy,
        Self::StaticService,
        Self::TrafficPolicy,
    ];

    /// The word that `kind` holds.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::StaticService => "StaticService",
            Self::TrafficPolicy => "TrafficPolicy",
        }
    }

    /// The kind of that exact name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What no two resources share.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct ResourceKey {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl fmt::Display for ResourceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
    }
}

/// The `metadata` of a resource.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Metadata {
    /// The namespace that it belongs to.
    #[serde(deserialize_with = "name::namespace")]
    #[schemars(schema_with = "schema::dns_label")]
    pub namespace: String,
    /// Its name, once for each kind in a namespace.
    #[serde(deserialize_with = "name::resource")]
    #[schemars(schema_with = "schema::dns_label")]
    pub name: String,
    /// Labels for people and tools; they decide nothing.
    #[serde(
        default,
        deserialize_with = "name::labels",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub labels: BTreeMap<String, String>,
    /// Notes for people and tools; they decide nothing.
    #[serde(
        default,
        deserialize_with = "name::annotations",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub annotations: BTreeMap<String, String>,
}

impl Metadata {
    /// Metadata of a name in a namespace. Nothing is checked: for tests and for trusted callers.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
        }
    }
}

/// One resource of any kind.
#[derive(Clone, Debug, PartialEq)]
pub enum Resource {
    /// Who may call what.
    AuthorizationPolicy(AuthorizationPolicy),
    /// A service whose endpoints are listed by hand.
    StaticService(StaticService),
    /// How callers call a service.
    TrafficPolicy(TrafficPolicy),
}

impl Resource {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::AuthorizationPolicy(_) => Kind::AuthorizationPolicy,
            Self::StaticService(_) => Kind::StaticService,
            Self::TrafficPolicy(_) => Kind::TrafficPolicy,
        }
    }

    /// Its metadata.
    pub fn metadata(&self) -> &Metadata {
        match self {
            Self::AuthorizationPolicy(policy) => &policy.metadata,
            Self::StaticService(service) => &service.metadata,
            Self::TrafficPolicy(traffic) => &traffic.metadata,
        }
    }

    /// What no other resource shares with it.
    pub fn key(&self) -> ResourceKey {
        let metadata = self.metadata();
        ResourceKey {
            kind: self.kind(),
            namespace: metadata.namespace.clone(),
            name: metadata.name.clone(),
        }
    }
}

impl Serialize for Resource {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut document = serializer.serialize_struct("Resource", 4)?;
        document.serialize_field("apiVersion", API_VERSION)?;
        document.serialize_field("kind", self.kind().as_str())?;
        document.serialize_field("metadata", self.metadata())?;
        match self {
            Self::AuthorizationPolicy(policy) => document.serialize_field("spec", &policy.spec)?,
            Self::StaticService(service) => document.serialize_field("spec", &service.spec)?,
            Self::TrafficPolicy(traffic) => document.serialize_field("spec", &traffic.spec)?,
        }
        document.end()
    }
}

/// The JSON Schema of one kind, draft 2020-12, for editors. The strict parser refuses more than
/// a schema can say.
pub fn schema(kind: Kind) -> serde_json::Value {
    schema::of(kind)
}
