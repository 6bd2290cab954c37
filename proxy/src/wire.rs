//! The wire between two sidecars: names, numbers and HTTP/2 settings, as `docs/wire.md` has them.
//!
//! Invariant: both ends take every constant from here, so that they cannot disagree.

use std::time::Duration;

use h2::Reason;
use http::{HeaderMap, HeaderName, Version};

use crate::config::LimitsConfig;

pub mod flood;
pub mod keepalive;
pub mod send;
pub mod tunnel;

/// What the caller spoke: `http/1.0`, `http/1.1` or `h2`.
pub const PROTOCOL: HeaderName = HeaderName::from_static("sidegate-protocol");

/// The target port's number, where the address does not say it.
pub const PORT: HeaderName = HeaderName::from_static("sidegate-port");

/// Code of a failure that a sidecar made, on the response.
pub const ERROR: HeaderName = HeaderName::from_static("sidegate-error");

/// ID of a refusal, on the response.
pub const DECISION: HeaderName = HeaderName::from_static("sidegate-decision");

/// `:protocol` of a WebSocket.
pub const WEBSOCKET: &str = "websocket";

/// `:protocol` of opaque bytes.
pub const TCP: &str = "sidegate-tcp";

/// Smallest window of a connection, whatever the configuration says.
pub const CONNECTION_WINDOW_MIN: u32 = 16 * 1024 * 1024;

/// How far a header list may exceed its limit and still be answered with a 431 that is logged.
/// Beyond this h2 itself answers 431 and the list is not kept.
const HEADER_LIST_SLACK: u32 = 64 * 1024;

/// Dynamic header table, as the peers of this protocol keep it.
const HEADER_TABLE_SIZE: u32 = 4096;

/// Streams that may be begun before the peer has said how many it takes.
const INITIAL_STREAMS: usize = 100;

/// What HPACK adds to each field when a list is measured (RFC 9113, 6.5.2).
const FIELD_OVERHEAD: usize = 32;

/// Reset reason: a policy change now denies the stream.
pub fn policy_denied() -> Reason {
    Reason::from(0x5347_0001)
}

/// Reset reason: a certificate at one of the two ends has ended.
pub fn certificate_ended() -> Reason {
    Reason::from(0x5347_0002)
}

/// What a caller spoke to its sidecar.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Spoken {
    /// HTTP/1.0.
    Http10,
    /// HTTP/1.1.
    Http11,
    /// HTTP/2.
    H2,
}

impl Spoken {
    /// The value of [`PROTOCOL`].
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http10 => "http/1.0",
            Self::Http11 => "http/1.1",
            Self::H2 => "h2",
        }
    }

    /// Reads the value of [`PROTOCOL`].
    pub fn parse(value: &[u8]) -> Option<Self> {
        match value {
            b"http/1.0" => Some(Self::Http10),
            b"http/1.1" => Some(Self::Http11),
            b"h2" => Some(Self::H2),
            _ => None,
        }
    }

    /// From a request's version.
    pub fn of(version: Version) -> Self {
        match version {
            Version::HTTP_09 | Version::HTTP_10 => Self::Http10,
            Version::HTTP_2 | Version::HTTP_3 => Self::H2,
            _ => Self::Http11,
        }
    }

    /// The version to speak to the called application.
    pub fn version(self) -> Version {
        match self {
            Self::Http10 => Version::HTTP_10,
            Self::Http11 => Version::HTTP_11,
            Self::H2 => Version::HTTP_2,
        }
    }
}

/// The limits of a connection that both sides advertise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WireLimits {
    /// Largest header list, in bytes as HTTP/2 measures it.
    pub header_list_bytes_max: u32,
    /// Largest number of header fields.
    pub headers_max: usize,
    /// Streams that one connection may carry at once.
    pub streams_max: u32,
    /// What one stream's data may fill before it is read.
    pub stream_window_bytes: u32,
    /// What one connection's data may fill before it is read.
    ///
    /// h2 closes a connection whose unread small frames exceed a budget of half this window; with
    /// 16 MiB, thousands of streams may each hold one unread message.
    pub connection_window_bytes: u32,
}

impl Default for WireLimits {
    fn default() -> Self {
        Self {
            header_list_bytes_max: 64 * 1024,
            headers_max: 100,
            streams_max: 1024,
            stream_window_bytes: 1024 * 1024,
            connection_window_bytes: CONNECTION_WINDOW_MIN,
        }
    }
}

impl From<&LimitsConfig> for WireLimits {
    fn from(limits: &LimitsConfig) -> Self {
        Self {
            header_list_bytes_max: limits.head_bytes_max,
            headers_max: usize::try_from(limits.headers_max).unwrap_or(usize::MAX),
            streams_max: limits.streams_per_connection_max,
            stream_window_bytes: limits.stream_window_bytes,
            connection_window_bytes: limits.connection_window_bytes.max(CONNECTION_WINDOW_MIN),
        }
    }
}

impl WireLimits {
    /// Whether a header list is within the limits; `line` is the length of its request line's parts.
    pub fn admit(&self, headers: &HeaderMap, line: usize) -> bool {
        headers.len() <= self.headers_max
            && header_list_size(headers).saturating_add(line)
                <= usize::try_from(self.header_list_bytes_max).unwrap_or(usize::MAX)
    }

    /// Settings of the side that accepts: a sidecar's inbound, or its outbound towards an
    /// application that speaks HTTP/2.
    pub fn server(&self) -> h2::server::Builder {
        let mut builder = h2::server::Builder::new();
        builder
            .initial_window_size(self.stream_window_bytes)
            .initial_connection_window_size(self.connection_window_bytes)
            .max_header_list_size(self.header_list_bytes_max.saturating_add(HEADER_LIST_SLACK))
            .header_table_size(HEADER_TABLE_SIZE)
            .max_concurrent_streams(self.streams_max)
            .enable_connect_protocol();
        builder
    }

    /// Settings of the side that connects.
    pub fn client(&self) -> h2::client::Builder {
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(self.stream_window_bytes)
            .initial_connection_window_size(self.connection_window_bytes)
            .max_header_list_size(self.header_list_bytes_max.saturating_add(HEADER_LIST_SLACK))
            .header_table_size(HEADER_TABLE_SIZE)
            .enable_push(false)
            // Until its SETTINGS say how many streams the peer takes; h2 would begin any number, and
            // the peer refuse them.
            .initial_max_send_streams(INITIAL_STREAMS)
            // A stream that its caller gave up is remembered for a moment, so that the peer's
            // last frames on it are no error.
            .reset_stream_duration(Duration::from_secs(5));
        builder
    }
}

/// Size of a header list as HTTP/2 measures it.
pub fn header_list_size(headers: &HeaderMap) -> usize {
    headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + FIELD_OVERHEAD)
        .sum()
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn what_a_caller_spoke_survives_the_wire() {
        for spoken in [Spoken::Http10, Spoken::Http11, Spoken::H2] {
            assert_eq!(Spoken::parse(spoken.as_str().as_bytes()), Some(spoken));
            assert_eq!(Spoken::of(spoken.version()), spoken);
        }
        assert_eq!(Spoken::parse(b"HTTP/1.1"), None);
        assert_eq!(Spoken::parse(b""), None);
    }

    #[test]
    fn a_header_list_is_refused_from_one_byte_and_one_field_above_its_limit() {
        let limits = WireLimits {
            header_list_bytes_max: 100,
            headers_max: 2,
            ..WireLimits::default()
        };
        let mut headers = HeaderMap::new();
        headers.insert("a", HeaderValue::from_static("b"));
        assert!(limits.admit(&headers, 100 - 34));
        assert!(!limits.admit(&headers, 100 - 33));
        headers.append("a", HeaderValue::from_static("b"));
        assert!(limits.admit(&headers, 0));
        headers.append("a", HeaderValue::from_static("b"));
        assert!(!limits.admit(&headers, 0));
    }

    #[test]
    fn the_private_reset_reasons_are_told_apart() {
        assert_ne!(policy_denied(), certificate_ended());
        assert_ne!(policy_denied(), Reason::CANCEL);
    }
}
