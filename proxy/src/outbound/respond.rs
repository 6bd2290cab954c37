//! From an answer to the response that the application gets, and to the record of the call.
//!
//! Invariants: a response that is cut off ends in an abort, never in a clean end; a gRPC call whose
//! patience ends after its head gets trailers that say so.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, UPGRADE};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use http_body::{Body as HttpBody, Frame, SizeHint};
use sidegate_mesh::Clock;
use sidegate_mesh::clock::Sleep;

use super::{Caller, Outbound, note_refusal};
use crate::body::{Body, BodyError, RecvBody, Watch, Watched};
use crate::call::{ByteCounters, Call};
use crate::error::RequestError;
use crate::forward::{Answer, Held, Outgoing, caller_error};
use crate::headers::{self, Head, Kind, Sender};
use crate::limits::Permit;
use crate::refusal::{self, Form};
use crate::wire::tunnel::Abort;
use crate::wire::{self, Spoken};

/// A call that has its answer.
pub(super) struct Exchange {
    pub(super) answer: Answer,
    pub(super) outgoing: Arc<Outgoing>,
    pub(super) head: Head,
    pub(super) permit: Permit,
    pub(super) outbound: Arc<Outbound>,
}

impl Exchange {
    /// The response; the record is written when its body has ended.
    pub(super) fn respond(mut self, mut call: Call, caller: Caller) -> Response<Body> {
        headers::sanitize_response(&mut self.answer.head, Sender::Sidecar);
        note_refusal(&mut call, &self.answer.head);
        call.answered(&self.answer.head);
        let success = self.answer.head.status.is_success();
        if self.head.kind == Kind::WebSocket && success && caller.upgrade.is_some() {
            return self.upgrade(call, caller);
        }
        let Answer {
            head,
            recv,
            held,
            send: _,
        } = self.answer;
        let Held { slot, cancel, .. } = held;
        let mut body = RecvBody::new(recv, &head.headers);
        if self.head.method == Method::HEAD || self.head.kind == Kind::WebSocket {
            body = body.of_unknown_length();
        }
        let counters = call.counters();
        let shared = &self.outbound.shared;
        let body = Limited {
            body: Body::H2(
                body.holding((Arc::clone(&slot), self.permit))
                    .cancelling(cancel),
            ),
            grpc: self.head.is_grpc(),
            clock: Arc::clone(&shared.clock),
            deadline: self
                .outgoing
                .deadline
                .map(|deadline| shared.clock.sleep_until(deadline)),
            idle: Idle::new(
                shared.config.limits.stream_idle_timeout,
                Arc::clone(&counters),
            ),
        };
        let recorder = Recorder {
            call: Some(call),
            counters,
            outgoing: self.outgoing,
            slot,
            abort: (self.head.spoken == Spoken::Http10).then_some(caller.abort),
            grpc: self.head.is_grpc(),
        };
        Response::from_parts(head, Body::boxed(Watched::new(body, recorder)))
    }

    /// The 101 to an HTTP/1.1 caller; what follows is bytes.
    fn upgrade(self, call: Call, caller: Caller) -> Response<Body> {
        let Answer {
            mut head,
            recv,
            send,
            held,
        } = self.answer;
        let (Some((upgraded, gate)), Some(send)) = (caller.upgrade, send) else {
            return refusal::respond(
                call,
                &RequestError::NotCarried { reason: "upgrade" },
                Form::default(),
            );
        };
        if let Err(rejection) = gate.accept() {
            let error = RequestError::BadRequest {
                reason: rejection.code(),
            };
            return refusal::respond(call, &error, Form::default());
        }
        head.status = StatusCode::SWITCHING_PROTOCOLS;
        head.headers
            .insert(CONNECTION, HeaderValue::from_static("upgrade"));
        head.headers
            .insert(UPGRADE, HeaderValue::from_static(wire::WEBSOCKET));
        let mut call = call;
        call.told(Some(StatusCode::SWITCHING_PROTOCOLS.as_u16()), None);
        let tunnel = super::tcp::Upgraded {
            io: upgraded,
            abort: caller.abort,
            send,
            recv,
        };
        let held = (held, self.permit);
        let tasks = self.outbound.shared.drain.tasks().clone();
        tasks.spawn(self.outbound.carry_upgraded(tunnel, call, held));
        Response::from_parts(head, Body::Empty)
    }
}

/// The caller's body, with its bytes counted.
pub(super) fn counted(body: Body, counters: Arc<ByteCounters>) -> Body {
    struct Request(Arc<ByteCounters>);
    impl Watch for Request {
        fn data(&mut self, bytes: usize) {
            self.0.add_request(bytes);
        }
        fn trailers(&mut self, trailers: &mut HeaderMap) {
            headers::sanitize_trailers(trailers, Sender::Application);
        }
    }
    if body.is_end_stream() {
        return Body::Empty;
    }
    Body::boxed(Watched::new(body, Request(counters)))
}

/// Writes a call's record when its response has ended.
struct Recorder {
    call: Option<Call>,
    counters: Arc<ByteCounters>,
    outgoing: Arc<Outgoing>,
    slot: Arc<crate::pool::Slot>,
    /// Armed where only a reset can tell an abort from an end: HTTP/1.0 ends a body by closing.
    abort: Option<Abort>,
    grpc: bool,
}

impl Watch for Recorder {
    fn data(&mut self, bytes: usize) {
        self.counters.add_response(bytes);
    }

    fn trailers(&mut self, trailers: &mut HeaderMap) {
        headers::sanitize_trailers(trailers, Sender::Sidecar);
        let Some(call) = &mut self.call else { return };
        call.grpc_end(trailers);
        // Trailers that a sidecar made say so.
        if let Some(code) = trailers.get(wire::ERROR).filter(|_| self.grpc) {
            call.record().error = code_of(code);
        }
    }

    fn ended(&mut self) {
        if let Some(call) = self.call.take() {
            call.finish();
        }
    }

    fn failed(&mut self, error: &BodyError) {
        if let Some(abort) = &self.abort {
            abort.arm();
        }
        let Some(mut call) = self.call.take() else {
            return;
        };
        let error = match self.outgoing.caller_failed.get() {
            Some(cause) => caller_error(cause),
            None => self
                .slot
                .cut()
                .cloned()
                .unwrap_or_else(|| response_error(error)),
        };
        call.fail(&error);
        call.finish();
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        // Neither ended nor failed: the application gave the call up.
        if let Some(mut call) = self.call.take() {
            if let Some(abort) = &self.abort {
                abort.arm();
            }
            call.fail(&RequestError::PeerReset { reason: None });
            call.finish();
        }
    }
}

/// The codes that a sidecar may put into trailers, as the log's own words.
fn code_of(value: &HeaderValue) -> Option<&'static str> {
    const CODES: [&str; 5] = [
        "timeout",
        "upstream_reset",
        "denied_by_policy_change",
        "certificate_ended",
        "idle_timeout",
    ];
    CODES.into_iter().find(|code| value == *code)
}

/// What a body of another sidecar that failed means for the call.
fn response_error(error: &BodyError) -> RequestError {
    match error {
        BodyError::Idle => RequestError::Idle,
        BodyError::Reset(reason) | BodyError::Ended(reason) => RequestError::UpstreamReset {
            reason: Some(*reason),
            detail: crate::error::reason_words(*reason),
        },
        BodyError::Connection(detail) => RequestError::UpstreamReset {
            reason: None,
            detail: detail.to_string(),
        },
    }
}

/// A response's body with the limits that hold after its head.
struct Limited {
    body: Body,
    grpc: bool,
    clock: Arc<dyn Clock>,
    /// The caller's own, from `grpc-timeout`.
    deadline: Option<Sleep>,
    idle: Idle,
}

impl Limited {
    /// Ends the upstream's stream; a gRPC caller learns why.
    fn cut(&mut self, error: &RequestError, body: BodyError) -> Result<Frame<Bytes>, BodyError> {
        self.body = Body::Empty;
        if self.grpc {
            Ok(Frame::trailers(error.grpc_trailers()))
        } else {
            Err(body)
        }
    }
}

impl HttpBody for Limited {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        match Pin::new(&mut this.body).poll_frame(cx) {
            Poll::Ready(Some(Err(BodyError::Connection(detail)))) if this.grpc => {
                let error = BodyError::Connection(detail);
                return Poll::Ready(Some(this.cut(&response_error(&error), error)));
            }
            Poll::Ready(frame) => return Poll::Ready(frame),
            Poll::Pending => {}
        }
        if let Some(deadline) = &mut this.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            this.deadline = None;
            let error = RequestError::Timeout { after_ms: 0 };
            return Poll::Ready(Some(this.cut(&error, BodyError::Idle)));
        }
        if this.idle.poll_expired(&*this.clock, cx).is_ready() {
            return Poll::Ready(Some(this.cut(&RequestError::Idle, BodyError::Idle)));
        }
        Poll::Pending
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// How long a stream has been silent, both ways.
struct Idle {
    limit: Duration,
    counters: Arc<ByteCounters>,
    seen: u64,
    timer: Option<Sleep>,
}

impl Idle {
    fn new(limit: Duration, counters: Arc<ByteCounters>) -> Self {
        Self {
            limit,
            counters,
            seen: 0,
            timer: None,
        }
    }

    fn poll_expired(&mut self, clock: &dyn Clock, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if self.timer.is_none() {
                self.seen = self.counters.total();
            }
            let timer = self.timer.get_or_insert_with(|| clock.sleep(self.limit));
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            self.timer = None;
            if self.counters.total() == self.seen {
                return Poll::Ready(());
            }
        }
    }
}
