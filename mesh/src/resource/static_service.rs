//! `StaticService`: a service whose endpoints are listed by hand.
//!
//! Invariant: each endpoint has an address that can be connected to and one exact identity that
//! is expected there.

use std::net::SocketAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Metadata, list, name, schema, value};
use crate::spiffe::SpiffeId;

/// A service whose endpoints are listed by hand: standalone, or outside the cluster.
#[derive(Clone, Debug, PartialEq)]
pub struct StaticService {
    /// Its name and namespace: `orders` in `shop` is called as `orders.shop`.
    pub metadata: Metadata,
    /// What it says.
    pub spec: StaticServiceSpec,
}

/// The `spec` of a `StaticService`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct StaticServiceSpec {
    /// The ports that callers name.
    #[serde(deserialize_with = "list::service_ports")]
    #[schemars(length(min = 1, max = 1_000))]
    pub ports: Vec<ServicePort>,
    /// Where it runs. An empty list says that it runs nowhere at the moment.
    #[serde(deserialize_with = "list::endpoints")]
    #[schemars(length(max = 10_000))]
    pub endpoints: Vec<ServiceEndpoint>,
}

/// One port of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ServicePort {
    /// Its name.
    #[serde(
        default,
        deserialize_with = "name::optional_port",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(schema_with = "schema::port_name")]
    pub name: Option<String>,
    /// The number that callers name.
    #[serde(deserialize_with = "value::port")]
    #[schemars(schema_with = "schema::port")]
    pub port: u16,
    /// The called workload's own port; absent: the same as `port`.
    #[serde(
        default,
        deserialize_with = "value::optional_port",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(schema_with = "schema::port")]
    pub target_port: Option<u16>,
    /// What callers speak there.
    #[serde(default)]
    pub protocol: PortProtocol,
}

/// What is spoken on a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PortProtocol {
    /// Found out from the first bytes.
    #[default]
    Auto,
    /// HTTP/1.1 or HTTP/2.
    Http,
    /// gRPC.
    Grpc,
    /// Opaque bytes.
    Tcp,
}

/// One place where a service runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ServiceEndpoint {
    /// The inbound listener of its sidecar, `127.0.0.1:21006` or `[::1]:21006`.
    #[serde(deserialize_with = "value::endpoint_address")]
    #[schemars(with = "String")]
    pub address: SocketAddr,
    /// Who must answer there.
    pub identity: EndpointIdentity,
}

/// The identity of an endpoint: an object with exactly one of these keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(
    deny_unknown_fields,
    rename_all = "camelCase",
    rename_all_fields = "camelCase"
)]
pub enum EndpointIdentity {
    /// A service account of the mesh's own trust domain.
    Workload {
        /// Its name.
        #[serde(deserialize_with = "name::service_account")]
        #[schemars(schema_with = "schema::dns_subdomain")]
        service_account: String,
        /// Its namespace; absent: the service's own.
        #[serde(
            default,
            deserialize_with = "name::optional_namespace",
            skip_serializing_if = "Option::is_none"
        )]
        #[schemars(schema_with = "schema::dns_label")]
        namespace: Option<String>,
    },
    /// One identity, also of another trust domain.
    SpiffeId {
        /// The whole ID.
        #[serde(deserialize_with = "name::workload_id")]
        #[schemars(schema_with = "schema::spiffe_id")]
        id: SpiffeId,
    },
}
