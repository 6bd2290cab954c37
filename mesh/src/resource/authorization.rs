//! `AuthorizationPolicy`: who may call what.
//!
//! Invariant: `action`, `selector`, `from`, `to`, `methods` and `paths` have no default, and a
//! choice is an object with exactly one key, so that a misspelt field can never widen a rule.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Metadata, PathPattern, PortRef, list, name, schema, value};
use crate::spiffe::SpiffeId;

/// Who may call what.
#[derive(Clone, Debug, PartialEq)]
pub struct AuthorizationPolicy {
    /// Its name and namespace.
    pub metadata: Metadata,
    /// What it says.
    pub spec: AuthorizationPolicySpec,
}

/// The `spec` of an `AuthorizationPolicy`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct AuthorizationPolicySpec {
    /// In `sidegate-system` only: the namespaces whose workloads it covers; absent: all of them.
    #[serde(
        default,
        deserialize_with = "value::some",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(with = "Selector")]
    pub namespace_selector: Option<Selector>,
    /// The workloads of its namespace that it covers; `{}` is all of them.
    pub selector: Selector,
    /// Names or numbers of the workload's own ports; absent: every port.
    #[serde(
        default,
        deserialize_with = "list::ports",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(schema_with = "schema::optional_list::<PortRef>")]
    pub ports: Option<Vec<PortRef>>,
    /// Whether a match allows or denies. A matching Deny wins.
    pub action: Action,
    /// Whether it counts.
    #[serde(default)]
    pub mode: Mode,
    /// Any of them matches.
    #[serde(deserialize_with = "list::rules")]
    #[schemars(length(min = 1, max = 10_000))]
    pub rules: Vec<Rule>,
}

/// What is covered, by labels.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Selector {
    /// Labels that must all be there with these values.
    #[serde(
        default,
        deserialize_with = "name::match_labels",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    #[schemars(extend("minProperties" = 1))]
    pub match_labels: BTreeMap<String, String>,
}

impl Selector {
    /// Whether all labels that it asks for are among these.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.match_labels
            .iter()
            .all(|(key, value)| labels.get(key) == Some(value))
    }
}

/// What a match does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Action {
    /// It allows.
    Allow,
    /// It denies, whatever allows.
    Deny,
}

/// Whether a policy counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Mode {
    /// It decides.
    #[default]
    Enforce,
    /// It is evaluated beside and logged, never counted.
    Audit,
}

/// Who may call what: any of `from` together with any of `to`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Rule {
    /// What logs call it; absent: its place in the list, counted from 0.
    #[serde(
        default,
        deserialize_with = "name::rule",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(schema_with = "schema::rule_name")]
    pub name: Option<String>,
    /// The callers, any of them.
    #[serde(deserialize_with = "list::sources")]
    #[schemars(length(min = 1, max = 1_000))]
    pub from: Vec<Source>,
    /// The calls, any of them.
    #[serde(deserialize_with = "list::targets")]
    #[schemars(length(min = 1, max = 1_000))]
    pub to: Vec<Target>,
}

/// One kind of caller: an object with exactly one of these keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(
    deny_unknown_fields,
    rename_all = "camelCase",
    rename_all_fields = "camelCase"
)]
pub enum Source {
    /// One service account.
    Workload {
        /// Its name.
        #[serde(deserialize_with = "name::service_account")]
        #[schemars(schema_with = "schema::dns_subdomain")]
        service_account: String,
        /// Its namespace; absent: the policy's own.
        #[serde(
            default,
            deserialize_with = "name::optional_namespace",
            skip_serializing_if = "Option::is_none"
        )]
        #[schemars(schema_with = "schema::dns_label")]
        namespace: Option<String>,
    },
    /// Every service account of one namespace.
    Namespace {
        /// The namespace.
        #[serde(deserialize_with = "name::namespace")]
        #[schemars(schema_with = "schema::dns_label")]
        name: String,
    },
    /// One identity, also of another trust domain.
    SpiffeId {
        /// The whole ID.
        #[serde(deserialize_with = "name::workload_id")]
        #[schemars(schema_with = "schema::spiffe_id")]
        id: SpiffeId,
    },
    /// Any identity of the mesh's own trust domain.
    Anyone {},
    /// Callers without a certificate, on `plaintext-ports` only.
    Unauthenticated {},
}

/// One kind of call: an object with exactly one of these keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(
    deny_unknown_fields,
    rename_all = "camelCase",
    rename_all_fields = "camelCase"
)]
pub enum Target {
    /// HTTP requests.
    Http {
        /// Methods in upper case; `["*"]` is every method.
        #[serde(deserialize_with = "list::http_methods")]
        #[schemars(length(min = 1, max = 1_000))]
        methods: Vec<String>,
        /// Paths: `*` is one segment, `**` any number.
        #[serde(deserialize_with = "list::paths")]
        #[schemars(length(min = 1, max = 1_000))]
        paths: Vec<PathPattern>,
        /// Hosts that the caller may name, any of them, in any name form of a Service; absent: any.
        #[serde(
            default,
            deserialize_with = "list::hosts",
            skip_serializing_if = "Option::is_none"
        )]
        #[schemars(schema_with = "schema::optional_list::<String>")]
        hosts: Option<Vec<String>>,
        /// Protocols that the request may upgrade to; absent: none.
        #[serde(
            default,
            deserialize_with = "list::upgrades",
            skip_serializing_if = "Vec::is_empty"
        )]
        #[schemars(length(min = 1))]
        upgrades: Vec<Upgrade>,
    },
    /// gRPC calls of one service.
    Grpc {
        /// The full name: `shop.v1.Orders`.
        #[serde(deserialize_with = "name::grpc_service")]
        #[schemars(schema_with = "schema::grpc_service")]
        service: String,
        /// Its methods; `["*"]` is every method.
        #[serde(deserialize_with = "list::grpc_methods")]
        #[schemars(length(min = 1, max = 1_000))]
        methods: Vec<String>,
    },
    /// Opaque bytes.
    Tcp {},
    /// Every call and opaque bytes.
    Anything {},
}

/// A protocol that a request may upgrade to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Upgrade {
    /// WebSocket.
    Websocket,
}

impl Upgrade {
    /// The protocol's name as in the `Upgrade` header.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Websocket => "websocket",
        }
    }
}
