//! The access-log record: one call, as it is written down and read again.
//!
//! Invariant: a field that is unknown is absent, never null. The field names are part of the
//! interface; they change only by adding. A written line is one line of ASCII-controlled JSON: no
//! text that a peer chose can end it, hide it, colour it or turn its direction.

mod escape;
mod line;

use std::sync::Arc;
use std::time::SystemTime;

use serde::{Serialize, Serializer};

use crate::decision::Verdict;

pub use escape::{escape, is_unsafe};
pub use line::Line;

/// Longest path that is written, in bytes.
pub const PATH_BYTES_MAX: usize = 2048;
/// Longest user agent that is written, in bytes.
pub const USER_AGENT_BYTES_MAX: usize = 256;
/// Longest other text that a peer may have chosen, in bytes.
pub const TEXT_BYTES_MAX: usize = 1024;

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
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "text")]
    pub method: Option<String>,
    /// Authority as forwarded.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "text")]
    pub authority: Option<String>,
    /// Path as forwarded, without its query, cut at 2 KiB.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "path")]
    pub path: Option<String>,
    /// Present and true when there was a query string.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub query: bool,
    /// gRPC service of the path.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "text")]
    pub grpc_service: Option<String>,
    /// gRPC method of the path.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "text")]
    pub grpc_method: Option<String>,
    /// gRPC status code, from the trailers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grpc_status: Option<u32>,
    /// gRPC status message, from the trailers.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "text")]
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
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "text")]
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
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "text")]
    pub request_id: Option<String>,
    /// Trace ID of `traceparent`.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "text")]
    pub trace_id: Option<String>,
    /// `user-agent`, cut at 256 bytes.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "user_agent")]
    pub user_agent: Option<String>,
}

/// Reason codes of calls that were refused by what they are, whoever made them.
const REFUSAL_ERRORS: [&str; 5] = [
    "bad_request",
    "header_list_too_large",
    "not_carried",
    "tls_handshake",
    "upstream_identity",
];

impl Record {
    /// Whether the record tells of a refusal, of one that would have been, or of a peer that was
    /// not let in: what must not be lost behind a flood of allowed calls.
    pub fn is_refusal(&self) -> bool {
        matches!(self.decision, Some(Verdict::Deny | Verdict::WouldDeny))
            || self
                .error
                .is_some_and(|code| REFUSAL_ERRORS.contains(&code))
    }

    /// Appends the record to `line` as one line with its line feed.
    ///
    /// # Errors
    ///
    /// None that a record can cause; serde's signature. `line` is then as it was.
    pub fn write_line(&self, line: &mut Vec<u8>) -> serde_json::Result<()> {
        let before = line.len();
        let formatter = escape::Escaped;
        let mut serializer = serde_json::Serializer::with_formatter(&mut *line, formatter);
        let written = self.serialize(&mut serializer);
        match written {
            Ok(()) => line.push(b'\n'),
            Err(_) => line.truncate(before),
        }
        written
    }
}

/// RFC 3339 in UTC with microseconds, as [`Record::time`] has it.
pub fn timestamp(time: SystemTime) -> String {
    let time = time::OffsetDateTime::from(time);
    let (year, month, day) = time.to_calendar_date();
    let (hour, minute, second, micros) = time.to_hms_micro();
    let month = u8::from(month);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
}

/// `text` with at most `max` bytes, cut between characters.
pub fn cut(text: &str, max: usize) -> &str {
    text.get(..text.floor_char_boundary(max)).unwrap_or(text)
}

#[expect(clippy::ref_option, reason = "serde's signature")]
fn text<S: Serializer>(text: &Option<String>, serializer: S) -> Result<S::Ok, S::Error> {
    bounded(text, TEXT_BYTES_MAX, serializer)
}

#[expect(clippy::ref_option, reason = "serde's signature")]
fn path<S: Serializer>(text: &Option<String>, serializer: S) -> Result<S::Ok, S::Error> {
    bounded(text, PATH_BYTES_MAX, serializer)
}

#[expect(clippy::ref_option, reason = "serde's signature")]
fn user_agent<S: Serializer>(text: &Option<String>, serializer: S) -> Result<S::Ok, S::Error> {
    bounded(text, USER_AGENT_BYTES_MAX, serializer)
}

#[expect(clippy::ref_option, reason = "serde's signature")]
fn bounded<S: Serializer>(
    text: &Option<String>,
    max: usize,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match text {
        Some(text) => serializer.serialize_str(cut(text, max)),
        None => serializer.serialize_none(),
    }
}

#[cfg(test)]
mod tests;
