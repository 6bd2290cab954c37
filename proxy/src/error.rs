//! Why a request was not served, or not to its end.
//!
//! Always true: every failure made by a sidecar is a [`RequestError`], and this file is the only
//! place where one becomes an HTTP status, a gRPC status, a reset reason or the reason code that
//! the log and `sidegate-error` carry. The caller sees a status and a code; the log sees the rest.

use bytes::Bytes;
use h2::Reason;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};

use crate::wire;

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// Why one request was not served, or not to its end.
///
/// More variants than a module's error usually has, because this is the one list of every way in
/// which a call can end in a sidecar's hands; a second level would hide half of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The request's syntax is refused; nothing of it reached an application.
    #[error("bad request: {reason}")]
    BadRequest {
        /// What is wrong, as a word of the log: `path_dot_segment`, `host_mismatch` …
        reason: &'static str,
    },
    /// The header list exceeds its bound in bytes or in fields.
    #[error("the header list is larger than its bound")]
    HeaderListTooLarge,
    /// No policy rule admits the caller.
    #[error("denied by policy")]
    Denied {
        /// What the caller is told, and the log has.
        decision_id: String,
    },
    /// Live while a policy change took the permission away.
    #[error("denied by policy change")]
    PolicyChanged {
        /// What the caller is told, and the log has.
        decision_id: String,
    },
    /// The called side's sidecar refused, as its response says.
    #[error("denied by the called side")]
    DeniedByPeer,
    /// There is no SVID or no complete snapshot yet.
    #[error("not ready")]
    NotReady,
    /// The sidecar drains and takes no new streams.
    #[error("draining")]
    Draining,
    /// The drain's deadline came before the call's end.
    #[error("cut off by the drain's deadline")]
    DrainDeadline,
    /// A configured bound on work in flight is reached.
    #[error("overloaded: {bound}")]
    Overloaded {
        /// The bound's name in the configuration.
        bound: &'static str,
    },
    /// The mesh knows no service of this name.
    #[error("the destination is unknown")]
    DestinationUnknown,
    /// The address is no longer the mesh's; the connection was begun while it was.
    #[error("the destination is no longer in the mesh")]
    DestinationChanged,
    /// Nobody may call this address through a sidecar: loopback, one of its own ports.
    #[error("the destination is refused: {reason}")]
    DestinationRefused {
        /// A word of the log: `loopback`, `own_port` …
        reason: &'static str,
    },
    /// The namespace lets nothing out of the mesh.
    #[error("calls out of the mesh are denied")]
    EgressDenied,
    /// The service has no endpoint that may be tried.
    #[error("no endpoint is available")]
    NoEndpoint,
    /// The upstream could not be reached; nothing of the request was sent.
    #[error("the upstream could not be reached: {detail}")]
    UpstreamConnect {
        /// The system's words.
        detail: String,
    },
    /// The upstream's identity could not be proved; nothing of the request was sent.
    #[error("the upstream's identity was refused: {reason}")]
    UpstreamIdentity {
        /// The handshake's reason code.
        reason: String,
    },
    /// The upstream ended the connection or the stream before its response was complete.
    #[error("the upstream ended the call: {detail}")]
    UpstreamReset {
        /// HTTP/2's reason where there was one.
        reason: Option<Reason>,
        /// The words of the layer that noticed.
        detail: String,
    },
    /// The upstream's response breaks HTTP.
    #[error("the upstream's response is not HTTP: {detail}")]
    UpstreamProtocol {
        /// What is wrong with it.
        detail: String,
    },
    /// The upstream did not answer in time.
    #[error("timed out after {after_ms} ms")]
    Timeout {
        /// The configured or requested limit in milliseconds.
        after_ms: u64,
    },
    /// Neither side moved a byte for the configured time.
    #[error("idle for too long")]
    Idle,
    /// The caller gave up.
    #[error("the caller gave up")]
    PeerReset {
        /// HTTP/2's reason where there was one.
        reason: Option<Reason>,
    },
    /// The certificate of one end ended, or is no longer trusted.
    #[error("the peer's certificate ended: {reason}")]
    CertificateEnded {
        /// `expired` or the verifier's reason code, such as `revoked`.
        reason: &'static str,
    },
    /// A tunnel or an upgrade that this port does not carry.
    #[error("not carried on this port: {reason}")]
    NotCarried {
        /// `connect`, `opaque`, `upgrade` or `plaintext`.
        reason: &'static str,
    },
}

impl RequestError {
    /// The reason code: in the log's `error`, in `sidegate-error`, and in metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::BadRequest { .. } => "bad_request",
            Self::HeaderListTooLarge => "header_list_too_large",
            Self::Denied { .. } | Self::DeniedByPeer => "denied",
            Self::PolicyChanged { .. } => "denied_by_policy_change",
            Self::NotReady => "not_ready",
            Self::Draining => "draining",
            Self::DrainDeadline => "drain_deadline",
            Self::Overloaded { .. } => "overloaded",
            Self::DestinationUnknown => "destination_unknown",
            Self::DestinationChanged => "destination_changed",
            Self::DestinationRefused { .. } => "destination_refused",
            Self::EgressDenied => "egress_denied",
            Self::NoEndpoint => "no_endpoint",
            Self::UpstreamConnect { .. } => "upstream_connect",
            Self::UpstreamIdentity { .. } => "upstream_identity",
            Self::UpstreamReset { .. } => "upstream_reset",
            Self::UpstreamProtocol { .. } => "upstream_protocol",
            Self::Timeout { .. } => "timeout",
            Self::Idle => "idle_timeout",
            Self::PeerReset { .. } => "peer_reset",
            Self::CertificateEnded { .. } => "certificate_ended",
            Self::NotCarried { .. } => "not_carried",
        }
    }

    /// The HTTP status that a caller sees while the head has not been sent.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::BadRequest { .. } => StatusCode::BAD_REQUEST,
            Self::HeaderListTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::Denied { .. }
            | Self::PolicyChanged { .. }
            | Self::DeniedByPeer
            | Self::DestinationRefused { .. }
            | Self::EgressDenied
            | Self::NotCarried { .. } => StatusCode::FORBIDDEN,
            // A refused stream never reached an application: the caller may send it again.
            Self::UpstreamReset {
                reason: Some(Reason::REFUSED_STREAM),
                ..
            }
            | Self::NotReady
            | Self::Draining
            | Self::DrainDeadline
            | Self::Overloaded { .. }
            | Self::DestinationChanged
            | Self::NoEndpoint
            | Self::UpstreamConnect { .. }
            | Self::CertificateEnded { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Self::UpstreamIdentity { .. }
            | Self::UpstreamReset { .. }
            | Self::UpstreamProtocol { .. }
            | Self::DestinationUnknown => StatusCode::BAD_GATEWAY,
            Self::Timeout { .. } => StatusCode::GATEWAY_TIMEOUT,
            Self::Idle | Self::PeerReset { .. } => StatusCode::REQUEST_TIMEOUT,
        }
    }

    /// The gRPC status code of the same failure.
    pub fn grpc_status(&self) -> u32 {
        match self {
            Self::PeerReset { .. } => 1,            // CANCELLED
            Self::Timeout { .. } | Self::Idle => 4, // DEADLINE_EXCEEDED
            Self::Denied { .. }
            | Self::PolicyChanged { .. }
            | Self::DeniedByPeer
            | Self::DestinationRefused { .. }
            | Self::EgressDenied
            | Self::NotCarried { .. } => 7, // PERMISSION_DENIED
            Self::Overloaded { .. } | Self::HeaderListTooLarge => 8, // RESOURCE_EXHAUSTED
            Self::BadRequest { .. } | Self::UpstreamProtocol { .. } => 13, // INTERNAL
            Self::NotReady
            | Self::Draining
            | Self::DrainDeadline
            | Self::DestinationUnknown
            | Self::DestinationChanged
            | Self::NoEndpoint
            | Self::UpstreamConnect { .. }
            | Self::UpstreamIdentity { .. }
            | Self::UpstreamReset { .. }
            | Self::CertificateEnded { .. } => 14, // UNAVAILABLE
        }
    }

    /// How the stream between two sidecars ends when its head has already been sent.
    pub fn reset_reason(&self) -> Reason {
        match self {
            Self::Denied { .. } | Self::PolicyChanged { .. } => wire::policy_denied(),
            Self::CertificateEnded { .. } => wire::certificate_ended(),
            // NO_ERROR would read as a clean end of what was not complete.
            Self::UpstreamReset {
                reason: Some(Reason::NO_ERROR),
                ..
            } => Reason::CANCEL,
            Self::UpstreamReset {
                reason: Some(reason),
                ..
            } => *reason,
            Self::PeerReset { .. } | Self::Timeout { .. } | Self::Idle | Self::DrainDeadline => {
                Reason::CANCEL
            }
            Self::Draining | Self::UpstreamConnect { .. } => Reason::REFUSED_STREAM,
            Self::BadRequest { .. } | Self::HeaderListTooLarge => Reason::PROTOCOL_ERROR,
            Self::DeniedByPeer
            | Self::NotReady
            | Self::Overloaded { .. }
            | Self::DestinationUnknown
            | Self::DestinationChanged
            | Self::DestinationRefused { .. }
            | Self::EgressDenied
            | Self::NoEndpoint
            | Self::UpstreamIdentity { .. }
            | Self::UpstreamReset { reason: None, .. }
            | Self::UpstreamProtocol { .. }
            | Self::NotCarried { .. } => Reason::INTERNAL_ERROR,
        }
    }

    /// The words for the log's `reason`; absent where the code says everything.
    pub fn log_reason(&self) -> Option<String> {
        match self {
            Self::BadRequest { reason }
            | Self::CertificateEnded { reason }
            | Self::DestinationRefused { reason }
            | Self::NotCarried { reason } => Some((*reason).to_owned()),
            Self::Overloaded { bound } => Some((*bound).to_owned()),
            Self::UpstreamConnect { detail }
            | Self::UpstreamReset { detail, .. }
            | Self::UpstreamProtocol { detail } => Some(detail.clone()),
            Self::UpstreamIdentity { reason } => Some(reason.clone()),
            Self::PolicyChanged { .. } => Some("denied by policy change".to_owned()),
            Self::EgressDenied => Some("the namespace lets nothing out of the mesh".to_owned()),
            Self::PeerReset {
                reason: Some(reason),
            } => Some(reason_words(*reason)),
            Self::PeerReset { reason: None }
            | Self::HeaderListTooLarge
            | Self::Denied { .. }
            | Self::DeniedByPeer
            | Self::NotReady
            | Self::Draining
            | Self::DrainDeadline
            | Self::DestinationUnknown
            | Self::DestinationChanged
            | Self::NoEndpoint
            | Self::Timeout { .. }
            | Self::Idle => None,
        }
    }

    /// Whether nobody may make such a call, whoever it is that would be called.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::DestinationRefused { .. } | Self::EgressDenied)
    }

    /// What the caller of a refused call is told, when this is a refusal.
    pub fn decision_id(&self) -> Option<&str> {
        match self {
            Self::Denied { decision_id } | Self::PolicyChanged { decision_id } => Some(decision_id),
            _ => None,
        }
    }

    /// The whole response, with `sidegate-error` and, for a refusal, `sidegate-decision`. For gRPC
    /// it is trailers-only: status 200, an empty body and `grpc-status` among the headers.
    ///
    /// The reason stays in the log: the response says only the code.
    pub fn to_response(&self, grpc: bool) -> Response<Bytes> {
        let body = if grpc { Bytes::new() } else { self.body() };
        let length = body.len();
        let mut response = Response::new(body);
        let headers = response.headers_mut();
        headers.insert(wire::ERROR, HeaderValue::from_static(self.code()));
        if let Some(id) = self
            .decision_id()
            .and_then(|id| HeaderValue::from_str(id).ok())
        {
            headers.insert(wire::DECISION, id);
        }
        if grpc {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            self.write_grpc_status(headers);
        } else {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
            *response.status_mut() = self.status();
        }
        response
    }

    /// The trailers that end a gRPC call whose head has already been sent.
    pub fn grpc_trailers(&self) -> HeaderMap {
        let mut trailers = HeaderMap::with_capacity(4);
        trailers.insert(wire::ERROR, HeaderValue::from_static(self.code()));
        if let Some(id) = self
            .decision_id()
            .and_then(|id| HeaderValue::from_str(id).ok())
        {
            trailers.insert(wire::DECISION, id);
        }
        self.write_grpc_status(&mut trailers);
        trailers
    }

    /// The public message: what the caller may know.
    fn message(&self) -> &'static str {
        match self {
            Self::BadRequest { .. } => "bad request",
            Self::HeaderListTooLarge => "header list too large",
            Self::Denied { .. } | Self::PolicyChanged { .. } | Self::DeniedByPeer => {
                "denied by policy"
            }
            Self::NotReady => "not ready",
            Self::Draining => "draining",
            Self::DrainDeadline => "cut off by a drain",
            Self::Overloaded { .. } => "overloaded",
            Self::DestinationUnknown => "destination unknown",
            Self::DestinationChanged => "destination changed",
            Self::DestinationRefused { .. } => "destination refused",
            Self::EgressDenied => "calls out of the mesh are denied",
            Self::NoEndpoint => "no endpoint available",
            Self::UpstreamConnect { .. } => "upstream could not be reached",
            Self::UpstreamIdentity { .. } => "upstream identity refused",
            Self::UpstreamReset { .. } => "upstream ended the call",
            Self::UpstreamProtocol { .. } => "upstream protocol error",
            Self::Timeout { .. } => "timed out",
            Self::Idle => "idle for too long",
            Self::PeerReset { .. } => "caller gave up",
            Self::CertificateEnded { .. } => "certificate ended",
            Self::NotCarried { .. } => "not carried on this port",
        }
    }

    fn body(&self) -> Bytes {
        let message = self.message();
        // Ids are our own hexadecimal digits and messages our own words: nothing needs escaping.
        match self.decision_id() {
            Some(id) => format!(r#"{{"error":"{message}","decision":"{id}"}}"#).into(),
            None => format!(r#"{{"error":"{message}","code":"{}"}}"#, self.code()).into(),
        }
    }

    fn write_grpc_status(&self, headers: &mut HeaderMap) {
        headers.insert(GRPC_STATUS, HeaderValue::from(self.grpc_status()));
        headers.insert(GRPC_MESSAGE, HeaderValue::from_static(self.message()));
    }
}

/// A reset reason in words, ours included.
pub fn reason_words(reason: Reason) -> String {
    if reason == wire::policy_denied() {
        "denied by policy change".to_owned()
    } else if reason == wire::certificate_ended() {
        "certificate ended".to_owned()
    } else {
        reason.description().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denied() -> RequestError {
        RequestError::Denied {
            decision_id: "00c0ffee".to_owned(),
        }
    }

    #[test]
    fn a_refusal_is_a_403_that_names_its_decision_and_no_reason() {
        let response = denied().to_response(false);
        assert_eq!(response.status(), StatusCode::FORBIDDEN);
        assert_eq!(response.headers()[wire::ERROR], "denied");
        assert_eq!(response.headers()[wire::DECISION], "00c0ffee");
        let body = r#"{"error":"denied by policy","decision":"00c0ffee"}"#;
        assert_eq!(response.body(), body);
        assert_eq!(response.headers()[CONTENT_LENGTH], body.len().to_string());
    }

    #[test]
    fn a_grpc_refusal_is_trailers_only() {
        let response = denied().to_response(true);
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()[GRPC_STATUS], "7");
        assert_eq!(response.headers()[CONTENT_TYPE], "application/grpc");
        assert_eq!(response.headers()[wire::DECISION], "00c0ffee");
        assert!(response.body().is_empty());
    }

    #[test]
    fn the_log_has_the_reason_that_the_response_does_not() {
        let error = RequestError::BadRequest {
            reason: "path_dot_segment",
        };
        assert_eq!(error.log_reason().as_deref(), Some("path_dot_segment"));
        let response = error.to_response(false);
        assert!(!String::from_utf8_lossy(response.body()).contains("segment"));
    }

    /// One of each, whatever it holds.
    fn every() -> Vec<RequestError> {
        let (decision_id, detail) = (String::new(), String::new());
        let (reason, bound) = ("x", "x");
        let refused = RequestError::UpstreamReset {
            reason: Some(Reason::REFUSED_STREAM),
            detail: detail.clone(),
        };
        vec![
            RequestError::BadRequest { reason },
            RequestError::HeaderListTooLarge,
            denied(),
            RequestError::PolicyChanged { decision_id },
            RequestError::DeniedByPeer,
            RequestError::NotReady,
            RequestError::Draining,
            RequestError::DrainDeadline,
            RequestError::Overloaded { bound },
            RequestError::DestinationUnknown,
            RequestError::DestinationChanged,
            RequestError::DestinationRefused { reason },
            RequestError::EgressDenied,
            RequestError::NoEndpoint,
            RequestError::UpstreamConnect {
                detail: detail.clone(),
            },
            RequestError::UpstreamIdentity {
                reason: detail.clone(),
            },
            RequestError::UpstreamReset {
                reason: None,
                detail: detail.clone(),
            },
            refused,
            RequestError::UpstreamProtocol { detail },
            RequestError::Timeout { after_ms: 1 },
            RequestError::Idle,
            RequestError::PeerReset { reason: None },
            RequestError::CertificateEnded { reason },
            RequestError::NotCarried { reason },
        ]
    }

    fn grpc_name(status: u32) -> &'static str {
        match status {
            1 => "CANCELLED",
            4 => "DEADLINE_EXCEEDED",
            7 => "PERMISSION_DENIED",
            8 => "RESOURCE_EXHAUSTED",
            13 => "INTERNAL",
            14 => "UNAVAILABLE",
            other => panic!("{other} has no name here"),
        }
    }

    #[test]
    fn the_page_of_error_codes_has_the_statuses_that_callers_see() {
        // There is nobody to be told.
        const NEVER_TOLD: [&str; 2] = ["destination_refused", "peer_reset"];
        let page = include_str!("../../docs/errors.md");
        for error in every() {
            let code = error.code();
            let mut rows = page.lines();
            let row = rows.find(|row| row.starts_with(&format!("| `{code}` | ")));
            let cells: Vec<&str> = row
                .unwrap_or_else(|| panic!("{code}"))
                .split(" | ")
                .collect();
            let (status, grpc) = (error.status().as_u16(), grpc_name(error.grpc_status()));
            let told = cells[1].split(", ").any(|cell| cell == status.to_string());
            assert!(told || NEVER_TOLD.contains(&code), "{code}: {status}");
            assert!(cells[2] == grpc || cells[2] == "-", "{code}: {grpc}");
        }
    }

    #[test]
    fn nothing_that_reached_an_application_may_be_retried_as_refused() {
        for error in [
            RequestError::UpstreamReset {
                reason: None,
                detail: String::new(),
            },
            RequestError::Timeout { after_ms: 1 },
            RequestError::Idle,
            denied(),
        ] {
            assert_ne!(error.reset_reason(), Reason::REFUSED_STREAM, "{error}");
        }
    }
}
