//! The access-log record: one call, as it is written down.
//!
//! Invariant: a field that is unknown is absent, never null. The field names are part of the
//! interface; they change only by adding.

use std::sync::Arc;

use serde::Serialize;

use crate::decision::Verdict;

/// Which side of a call wrote the record. The called side (`inbound`) is authoritative.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Written by the called side.
    Inbound,
    /// Written by the calling side.
    Outbound,
}

/// What the application spoke.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, serde::Deserialize)]
pub enum Protocol {
    /// HTTP/1.0 or HTTP/1.1.
    #[serde(rename = "http/1.1")]
    Http1,
    /// HTTP/2 that is not gRPC.
    #[serde(rename = "h2")]
    Http2,
    /// gRPC.
    #[serde(rename = "grpc")]
    Grpc,
    /// WebSocket, from its upgrade on.
    #[serde(rename = "websocket")]
    WebSocket,
    /// Opaque bytes.
    #[serde(rename = "tcp")]
    Tcp,
}

/// One call. Built while the call runs, written when it ends.
#[derive(Clone, Debug, Serialize)]
pub struct Record {
    /// Always `access`.
    pub kind: &'static str,
    /// The call's start, RFC 3339 in UTC with microseconds.
    pub time: String,
    /// From the call's start to its end, milliseconds with microseconds.
    pub duration_ms: f64,
    /// From forwarding to the head of the response, milliseconds with microseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upstream_ms: Option<f64>,
    /// Which side wrote this.
    pub direction: Direction,
    /// What the application spoke.
    pub protocol: Protocol,
    /// SPIFFE ID of the caller, from its certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<Arc<str>>,
    /// SPIFFE ID of the called, from its certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination: Option<Arc<str>>,
    /// `orders.shop:80`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination_service: Option<Arc<str>>,
    /// Address of the peer that connected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_address: Option<String>,
    /// Address of the upstream that served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination_address: Option<String>,
    /// Method as forwarded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    /// Authority as forwarded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub authority: Option<String>,
    /// Path as forwarded, without its query, cut at 2 KiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Present and true when there was a query string.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub query: bool,
    /// gRPC service of the path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grpc_service: Option<String>,
    /// gRPC method of the path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grpc_method: Option<String>,
    /// gRPC status code, from the trailers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grpc_status: Option<u32>,
    /// gRPC status message, from the trailers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grpc_message: Option<String>,
    /// HTTP status that the caller saw.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// What the policy decided; absent outbound unless the peer refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decision: Option<Verdict>,
    /// `namespace/name` of the policy that decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<Arc<str>>,
    /// Name of the rule that decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<Arc<str>>,
    /// Why it was decided or failed so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What the caller of a refused call was told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decision_id: Option<String>,
    /// What policies in mode Audit would have said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit: Option<Arc<str>>,
    /// Body bytes from the caller, as transferred.
    pub request_bytes: u64,
    /// Body bytes to the caller, as transferred.
    pub response_bytes: u64,
    /// Reason code of a failure made by the sidecar.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<&'static str>,
    /// Further facts, such as `retried`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub flags: Vec<&'static str>,
    /// How often the call was tried, when more than once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempts: Option<u32>,
    /// `TLSv1.3`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_version: Option<&'static str>,
    /// Number of the snapshot that decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<u64>,
    /// `x-request-id`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// Trace ID of `traceparent`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<String>,
    /// `user-agent`, cut at 256 bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_agent: Option<String>,
}
