//! Why the guard refused what it read.
//!
//! Always true: every refusal has a code that is safe to show to the peer and to count, and a
//! sentence for the log that quotes nothing the peer sent.

use std::fmt;
use std::io;

use http::StatusCode;

/// What is wrong with a message. The code is part of the log's interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[expect(
    missing_docs,
    reason = "`facts` says what each one means, for people and for the log"
)]
pub enum Reason {
    RequestLine,
    Method,
    Connect,
    Target,
    TargetForm,
    TargetScheme,
    Userinfo,
    Fragment,
    PercentEncoding,
    Version,
    BareLf,
    BareCr,
    Nul,
    ObsFold,
    SpaceBeforeColon,
    HeaderName,
    HeaderValue,
    HostMissing,
    HostDuplicate,
    HostInvalid,
    HostMismatch,
    ContentLength,
    ContentLengthDuplicate,
    ContentLengthAndTransferEncoding,
    TransferEncoding,
    TransferEncodingDuplicate,
    TransferEncodingHttp10,
    FramingLookalike,
    ChunkSize,
    ChunkExtension,
    ChunkEnd,
    Trailer,
    HeadTooLarge,
    TooManyHeaders,
    HeadTimeout,
    IncompleteHead,
    IncompleteBody,
    UpgradeEarlyData,
    StatusLine,
    StatusCode,
    BodyNotAllowed,
    UnsolicitedResponse,
    UnexpectedSwitch,
    TooManyInformational,
}

impl Reason {
    /// The reason's code, `snake_case`.
    pub fn code(self) -> &'static str {
        self.facts().0
    }

    /// What is wrong, as a sentence without its final stop.
    pub fn detail(self) -> &'static str {
        self.facts().1
    }

    /// The status that a refused request is answered with.
    pub fn status(self) -> StatusCode {
        match self {
            Self::HeadTooLarge | Self::TooManyHeaders => {
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE
            }
            Self::HeadTimeout => StatusCode::REQUEST_TIMEOUT,
            _ => StatusCode::BAD_REQUEST,
        }
    }

    #[expect(clippy::too_many_lines, reason = "a table, one entry for each reason")]
    fn facts(self) -> (&'static str, &'static str) {
        match self {
            Self::RequestLine => (
                "request_line",
                "the request line is not `METHOD TARGET HTTP/1.x`",
            ),
            Self::Method => ("method", "the method is not an upper-case token"),
            Self::Connect => ("connect", "CONNECT is not served"),
            Self::Target => (
                "target",
                "the target has a character that a URI may not have",
            ),
            Self::TargetForm => ("target_form", "the target's form does not fit the method"),
            Self::TargetScheme => (
                "target_scheme",
                "an absolute target must start with `http://`",
            ),
            Self::Userinfo => ("userinfo", "the authority carries user information"),
            Self::Fragment => ("fragment", "the target carries a fragment"),
            Self::PercentEncoding => ("percent_encoding", "`%` without two hexadecimal digits"),
            Self::Version => ("version", "the version is not HTTP/1.0 or HTTP/1.1"),
            Self::BareLf => ("bare_lf", "a line ends without CR"),
            Self::BareCr => ("bare_cr", "CR without LF"),
            Self::Nul => ("nul", "NUL in a header field"),
            Self::ObsFold => ("obs_fold", "a header line starts with white space"),
            Self::SpaceBeforeColon => ("space_before_colon", "white space before a header's colon"),
            Self::HeaderName => ("header_name", "a header's name is not a token"),
            Self::HeaderValue => ("header_value", "a control character in a header's value"),
            Self::HostMissing => ("host_missing", "HTTP/1.1 without Host"),
            Self::HostDuplicate => ("host_duplicate", "more than one Host"),
            Self::HostInvalid => ("host_invalid", "Host or authority is not `host[:port]`"),
            Self::HostMismatch => ("host_mismatch", "Host differs from the target's authority"),
            Self::ContentLength => ("content_length", "Content-Length is not a decimal number"),
            Self::ContentLengthDuplicate => {
                ("content_length_duplicate", "more than one Content-Length")
            }
            Self::ContentLengthAndTransferEncoding => (
                "content_length_and_transfer_encoding",
                "both Content-Length and Transfer-Encoding",
            ),
            Self::TransferEncoding => (
                "transfer_encoding",
                "Transfer-Encoding is not exactly `chunked`",
            ),
            Self::TransferEncodingDuplicate => (
                "transfer_encoding_duplicate",
                "more than one Transfer-Encoding",
            ),
            Self::TransferEncodingHttp10 => {
                ("transfer_encoding_http10", "Transfer-Encoding in HTTP/1.0")
            }
            Self::FramingLookalike => (
                "framing_lookalike",
                "a header's name reads as a framing header to some servers",
            ),
            Self::ChunkSize => (
                "chunk_size",
                "a chunk's size is not a hexadecimal number and CRLF",
            ),
            Self::ChunkExtension => (
                "chunk_extension",
                "a chunk's extension is malformed or too long",
            ),
            Self::ChunkEnd => ("chunk_end", "a chunk's data is not followed by CRLF"),
            Self::Trailer => ("trailer", "a trailer that frames, routes or authenticates"),
            Self::HeadTooLarge => ("head_too_large", "the head exceeds its bound in bytes"),
            Self::TooManyHeaders => ("too_many_headers", "the head exceeds its bound in fields"),
            Self::HeadTimeout => ("head_timeout", "the head did not arrive in time"),
            Self::IncompleteHead => ("incomplete_head", "the connection ended inside a head"),
            Self::IncompleteBody => ("incomplete_body", "the connection ended inside a body"),
            Self::UpgradeEarlyData => (
                "upgrade_early_data",
                "bytes behind an upgrade not yet accepted",
            ),
            Self::StatusLine => (
                "status_line",
                "the status line is not `HTTP/1.x NNN reason`",
            ),
            Self::StatusCode => ("status_code", "the status is not between 100 and 599"),
            Self::BodyNotAllowed => ("body_not_allowed", "a body where the status allows none"),
            Self::UnsolicitedResponse => ("unsolicited_response", "bytes that answer no request"),
            Self::UnexpectedSwitch => ("unexpected_switch", "101 without an upgrade"),
            Self::TooManyInformational => ("too_many_informational", "too many 1xx responses"),
        }
    }
}

/// A refusal, as the service and the log hear of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[error("{}: {}", reason.code(), reason.detail())]
pub struct Rejection {
    /// What is wrong.
    pub reason: Reason,
}

impl Rejection {
    /// The reason's code, `snake_case`.
    pub fn code(&self) -> &'static str {
        self.reason.code()
    }

    /// What is wrong, as a sentence without its final stop.
    pub fn detail(&self) -> &'static str {
        self.reason.detail()
    }

    /// The status that a refused request is answered with.
    pub fn status(&self) -> StatusCode {
        self.reason.status()
    }

    /// The rejection inside an error that came out of a guarded connection, however wrapped.
    pub fn of(error: &(dyn std::error::Error + 'static)) -> Option<Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(rejection) = error.downcast_ref::<Self>() {
                return Some(*rejection);
            }
            // An `io::Error` hides what it wraps from `source`.
            let inner = error
                .downcast_ref::<io::Error>()
                .and_then(io::Error::get_ref);
            if let Some(rejection) = inner.and_then(|inner| inner.downcast_ref::<Self>()) {
                return Some(*rejection);
            }
            next = error.source();
        }
        None
    }
}

impl fmt::Debug for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rejection({})", self.code())
    }
}

impl From<Reason> for Rejection {
    fn from(reason: Reason) -> Self {
        Self { reason }
    }
}

impl From<Rejection> for io::Error {
    fn from(rejection: Rejection) -> Self {
        Self::new(io::ErrorKind::InvalidData, rejection)
    }
}
