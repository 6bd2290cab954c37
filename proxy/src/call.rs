//! One call's record while it runs.
//!
//! Always true: a [`Call`] that was started writes exactly one line, when it is dropped at the
//! latest; then with the flag `cut_off`, so a task that was aborted still leaves its record. The
//! same facts feed the metrics.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use http::{HeaderMap, HeaderName, Method, header, request, response};
use sidegate_mesh::access_log::{self, Direction, Protocol, Record};
use sidegate_mesh::{Decision, SpiffeId, Verdict};

use crate::error::RequestError;
use crate::headers::{Head, Kind};
use crate::metrics::Outcome;
use crate::shared::Shared;
use crate::wire::Spoken;

pub use sidegate_mesh::access_log::timestamp as rfc3339;

/// Longest path in a record, in bytes.
const PATH_BYTES_MAX: usize = 2048;
/// Longest user agent in a record, in bytes.
const USER_AGENT_BYTES_MAX: usize = 256;
/// Longest of the other texts that a peer chooses, in bytes.
const TEXT_BYTES_MAX: usize = 256;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TRACE_PARENT: HeaderName = HeaderName::from_static("traceparent");
/// The code with which a gRPC call ended.
pub const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// Body bytes of a call so far, shared with whatever carries them.
#[derive(Debug, Default)]
pub struct ByteCounters {
    /// From the caller.
    pub request: Arc<AtomicU64>,
    /// To the caller.
    pub response: Arc<AtomicU64>,
}

impl ByteCounters {
    /// Counts bytes from the caller.
    pub fn add_request(&self, bytes: usize) {
        self.request.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Counts bytes to the caller.
    pub fn add_response(&self, bytes: usize) {
        self.response.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Bytes both ways: what an idle limit watches.
    pub fn total(&self) -> u64 {
        self.request.load(Ordering::Relaxed) + self.response.load(Ordering::Relaxed)
    }
}

/// One call while it runs.
pub struct Call {
    shared: Arc<Shared>,
    /// Boxed: a call is handed on several times, and this is most of it.
    record: Box<Record>,
    started: Instant,
    forwarded: Option<Instant>,
    bytes: Arc<ByteCounters>,
    written: bool,
}

impl Call {
    /// Starts the record of a call that begins now.
    pub fn start(shared: &Arc<Shared>, direction: Direction) -> Self {
        shared.metrics.requests_in_flight.inc();
        Self {
            record: Box::new(empty_record(direction, shared.clock.now())),
            shared: Arc::clone(shared),
            started: Instant::now(),
            forwarded: None,
            bytes: Arc::default(),
            written: false,
        }
    }

    /// The record, to be filled in.
    pub fn record(&mut self) -> &mut Record {
        &mut self.record
    }

    /// The body bytes, to be counted.
    pub fn counters(&self) -> Arc<ByteCounters> {
        Arc::clone(&self.bytes)
    }

    /// Who is at the two ends, by their certificates, and where the caller connected from.
    pub fn between(&mut self, source: Option<&SpiffeId>, destination: Option<&SpiffeId>) {
        self.record.source = source.map(|id| Arc::clone(id.text()));
        self.record.destination = destination.map(|id| Arc::clone(id.text()));
    }

    /// Where the caller connected from.
    pub fn from_address(&mut self, address: SocketAddr) {
        self.record.source_address = Some(address.into());
    }

    /// What is asked for, as it is forwarded.
    pub fn describe(&mut self, head: &Head) {
        let record = &mut self.record;
        record.protocol = protocol_of(head);
        record.method = Some(method_text(&head.method));
        record.authority = head.authority.as_ref().map(ToString::to_string);
        record.path = Some(cut(head.path.as_str(), PATH_BYTES_MAX));
        record.query = head.query.is_some();
        if head.is_grpc()
            && let Some((service, method)) = head.path.grpc()
        {
            record.grpc_service = Some(cut(service, TEXT_BYTES_MAX));
            record.grpc_method = Some(cut(method, TEXT_BYTES_MAX));
        }
        self.describe_fields(&head.headers);
    }

    /// What was asked for in a request whose syntax is refused: for whoever looks for the attacker.
    pub fn describe_refused(&mut self, head: &request::Parts) {
        self.record.method = Some(method_text(&head.method));
        self.record.path = Some(cut(head.uri.path(), PATH_BYTES_MAX));
    }

    fn describe_fields(&mut self, headers: &HeaderMap) {
        let text = |name: &HeaderName, max| {
            let value = headers.get(name)?;
            Some(cut(&String::from_utf8_lossy(value.as_bytes()), max))
        };
        self.record.user_agent = text(&header::USER_AGENT, USER_AGENT_BYTES_MAX);
        self.record.request_id = text(&REQUEST_ID, TEXT_BYTES_MAX);
        self.record.trace_id = text(&TRACE_PARENT, TEXT_BYTES_MAX).and_then(|t| trace_id(&t));
    }

    /// What the policy of snapshot `number` decided.
    pub fn decided(&mut self, decision: &Decision, number: u64) {
        let record = &mut self.record;
        record.decision = Some(decision.verdict);
        record.policy.clone_from(&decision.policy);
        record.rule.clone_from(&decision.rule);
        record.reason = Some(decision.reason.into());
        record.audit.clone_from(&decision.audit);
        record.snapshot = Some(number);
    }

    /// The request goes to the upstream now.
    pub fn forwarded(&mut self) {
        self.forwarded = Some(Instant::now());
    }

    /// The head of the response that the caller gets.
    pub fn answered(&mut self, head: &response::Parts) {
        self.record.status = Some(head.status.as_u16());
        self.record.upstream = self.forwarded.map(|since| since.elapsed());
        self.grpc_end(&head.headers);
    }

    /// Reads `grpc-status` and `grpc-message` of trailers, or of a head without any.
    pub fn grpc_end(&mut self, fields: &HeaderMap) {
        let text = |name: &HeaderName| {
            let value = fields.get(name)?;
            Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
        };
        if let Some(status) = text(&GRPC_STATUS) {
            // 2 is UNKNOWN: what a client makes of a status that is no number.
            self.record.grpc_status = Some(status.parse().unwrap_or(2));
        }
        if let Some(message) = text(&GRPC_MESSAGE).filter(|message| !message.is_empty()) {
            self.record.grpc_message = Some(cut(&message, TEXT_BYTES_MAX));
        }
    }

    /// The call failed here; what the caller was told is noted with [`Self::answered`] or
    /// [`Self::told`].
    pub fn fail(&mut self, error: &RequestError) {
        let record = &mut self.record;
        if let Some(id) = error.decision_id() {
            record.decision = Some(Verdict::Deny);
            record.decision_id = Some(id.to_owned());
        }
        if error.is_refusal() {
            record.decision = Some(Verdict::Deny);
        }
        if let Some(reason) = error.log_reason() {
            record.reason = Some(cut(&reason, TEXT_BYTES_MAX).into());
        }
        if !matches!(error, RequestError::Denied { .. }) {
            record.error = Some(error.code());
        }
    }

    /// What the caller of a failed call was told: a status while the head was not sent, a gRPC
    /// status where the call is gRPC.
    pub fn told(&mut self, status: Option<u16>, grpc_status: Option<u32>) {
        self.record.status = status.or(self.record.status);
        self.record.grpc_status = grpc_status.or(self.record.grpc_status);
    }

    /// Writes the record: the call has ended, one way or the other.
    pub fn finish(mut self) {
        self.write();
    }

    fn write(&mut self) {
        if std::mem::replace(&mut self.written, true) {
            return;
        }
        let elapsed = self.started.elapsed();
        let record = &mut self.record;
        record.duration = elapsed;
        record.request_bytes = self.bytes.request.load(Ordering::Relaxed);
        record.response_bytes = self.bytes.response.load(Ordering::Relaxed);
        let metrics = &self.shared.metrics;
        metrics.requests_in_flight.dec();
        let (source, destination) = (record.source.as_ref(), record.destination.as_ref());
        let pair = metrics.requests(record.direction, record.protocol, source, destination);
        pair.finish(&Outcome {
            status: record.status,
            grpc_status: record.grpc_status,
            decision: record.decision,
            duration: elapsed,
        });
        self.shared.log.record(record);
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if !self.written {
            self.record.flags.push("cut_off");
            self.write();
        }
    }
}

/// A record of something that begins at `now`, with nothing known yet.
pub fn empty_record(direction: Direction, now: SystemTime) -> Record {
    Record {
        time: now,
        duration: Duration::ZERO,
        upstream: None,
        direction,
        protocol: Protocol::Http2,
        source: None,
        destination: None,
        destination_service: None,
        source_address: None,
        destination_address: None,
        method: None,
        authority: None,
        path: None,
        query: false,
        grpc_service: None,
        grpc_method: None,
        grpc_status: None,
        grpc_message: None,
        status: None,
        decision: None,
        policy: None,
        rule: None,
        reason: None,
        decision_id: None,
        audit: None,
        request_bytes: 0,
        response_bytes: 0,
        error: None,
        flags: Vec::new(),
        attempts: None,
        tls_version: None,
        snapshot: None,
        request_id: None,
        trace_id: None,
        user_agent: None,
    }
}

fn protocol_of(head: &Head) -> Protocol {
    match (head.kind, head.spoken) {
        (Kind::Grpc, _) => Protocol::Grpc,
        (Kind::WebSocket, _) => Protocol::WebSocket,
        (Kind::Http, Spoken::H2) => Protocol::Http2,
        (Kind::Http, Spoken::Http10 | Spoken::Http11) => Protocol::Http1,
    }
}

fn cut(text: &str, max: usize) -> String {
    access_log::cut(text, max).to_owned()
}

/// The trace ID of a `traceparent`: 32 hexadecimal digits after the version.
fn trace_id(traceparent: &str) -> Option<String> {
    let id = traceparent.split('-').nth(1)?;
    let valid = id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    valid.then(|| id.to_owned())
}

/// A method's name; that of a usual one takes no memory.
fn method_text(method: &Method) -> Cow<'static, str> {
    const USUAL: [(&Method, &str); 7] = [
        (&Method::GET, "GET"),
        (&Method::POST, "POST"),
        (&Method::PUT, "PUT"),
        (&Method::DELETE, "DELETE"),
        (&Method::PATCH, "PATCH"),
        (&Method::HEAD, "HEAD"),
        (&Method::OPTIONS, "OPTIONS"),
    ];
    match USUAL.iter().find(|(usual, _)| *usual == method) {
        Some((_, name)) => Cow::Borrowed(name),
        None => Cow::Owned(cut(method.as_str(), TEXT_BYTES_MAX)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_id_is_taken_only_from_its_own_form() {
        let id = "4bf92f3577b34da6a3ce929d0e0e4736";
        let parent = format!("00-{id}-00f067aa0ba902b7-01");
        assert_eq!(trace_id(&parent).as_deref(), Some(id));
        assert_eq!(trace_id("00-xyz-1-01"), None);
        assert_eq!(trace_id(id), None);
    }
}
