//! The access-log record: one call, as it is written down and read again.
//!
//! Invariant: a field that is unknown is absent, never null. The field names are part of the
//! interface; they change only by adding. A written line is one line of ASCII-controlled JSON: no
//! text that a peer chose can end it, hide it, colour it or turn its direction.

mod escape;
mod line;
mod write;

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::Serialize;

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

impl Direction {
    /// The word of logs and labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

impl Protocol {
    /// The word of logs and labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http1 => "http/1.1",
            Self::Http2 => "h2",
            Self::Grpc => "grpc",
            Self::WebSocket => "websocket",
            Self::Tcp => "tcp",
        }
    }
}

/// Where one end of a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// Of one connection.
    Socket(SocketAddr),
    /// Of the connections of one peer, whose ports differ.
    Host(IpAddr),
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self::Socket(address)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(address) => address.fmt(f),
            Self::Host(address) => address.fmt(f),
        }
    }
}

/// One call. Built while the call runs, written when it ends. A field's name is its member's, but
/// for the two times, which are written as milliseconds: `duration_ms` and `upstream_ms`.
#[derive(Clone, Debug)]
pub struct Record {
    /// The call's start; written as RFC 3339 in UTC with microseconds.
    pub time: SystemTime,
    /// From the call's start to its end.
    pub duration: Duration,
    /// From forwarding to the head of the response.
    pub upstream: Option<Duration>,
    /// Which side wrote this.
    pub direction: Direction,
    /// What the application spoke.
    pub protocol: Protocol,
    /// SPIFFE ID of the caller, from its certificate.
    pub source: Option<Arc<str>>,
    /// SPIFFE ID of the called, from its certificate.
    pub destination: Option<Arc<str>>,
    /// `orders.shop:80`.
    pub destination_service: Option<Arc<str>>,
    /// Address of the peer that connected.
    pub source_address: Option<Address>,
    /// Address of the upstream that served.
    pub destination_address: Option<Address>,
    /// Method as forwarded.
    pub method: Option<Cow<'static, str>>,
    /// Authority as forwarded.
    pub authority: Option<String>,
    /// Path as forwarded, without its query, cut at 2 KiB.
    pub path: Option<String>,
    /// Whether there was a query string; written only when there was.
    pub query: bool,
    /// gRPC service of the path.
    pub grpc_service: Option<String>,
    /// gRPC method of the path.
    pub grpc_method: Option<String>,
    /// gRPC status code, from the trailers.
    pub grpc_status: Option<u32>,
    /// gRPC status message, from the trailers.
    pub grpc_message: Option<String>,
    /// HTTP status that the caller saw.
    pub status: Option<u16>,
    /// What the policy decided; absent outbound unless the peer refused.
    pub decision: Option<Verdict>,
    /// `namespace/name` of the policy that decided.
    pub policy: Option<Arc<str>>,
    /// Name of the rule that decided.
    pub rule: Option<Arc<str>>,
    /// Why it was decided or failed so.
    pub reason: Option<Cow<'static, str>>,
    /// What the caller of a refused call was told.
    pub decision_id: Option<String>,
    /// What policies in mode Audit would have said.
    pub audit: Option<Arc<str>>,
    /// Body bytes from the caller, as transferred.
    pub request_bytes: u64,
    /// Body bytes to the caller, as transferred.
    pub response_bytes: u64,
    /// Reason code of a failure made by the sidecar.
    pub error: Option<&'static str>,
    /// Further facts, such as `retried`.
    pub flags: Vec<&'static str>,
    /// How often the call was tried, when more than once.
    pub attempts: Option<u32>,
    /// `TLSv1.3`.
    pub tls_version: Option<&'static str>,
    /// Number of the snapshot that decided.
    pub snapshot: Option<u64>,
    /// `x-request-id`.
    pub request_id: Option<String>,
    /// Trace ID of `traceparent`.
    pub trace_id: Option<String>,
    /// `user-agent`, cut at 256 bytes.
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
    pub fn write_line(&self, line: &mut Vec<u8>) {
        write::line(self, line);
    }
}

/// RFC 3339 in UTC with microseconds, as a line has it.
pub fn timestamp(time: SystemTime) -> String {
    let mut text = Vec::with_capacity(32);
    write::timestamp(&mut text, time);
    String::from_utf8(text).unwrap_or_default()
}

/// `text` with at most `max` bytes, cut between characters.
pub fn cut(text: &str, max: usize) -> &str {
    text.get(..text.floor_char_boundary(max)).unwrap_or(text)
}

#[cfg(test)]
mod tests;
