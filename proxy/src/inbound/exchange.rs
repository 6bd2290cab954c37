//! One admitted request and the application's answer.
//!
//! Always true: the caller sees a clean end only where the application's answer had one; whoever
//! gives up first, caller or application, is passed on to the other at once.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use http::{Response, StatusCode};
use http_body::{Body as HttpBody, Frame, SizeHint};

use super::reply::Reply;
use super::session::Session;
use super::{Target, tunnel};
use crate::application::{Answer, Interims, Outgoing, Progress, RequestBody};
use crate::body::{Body, BodyError, RecvBody};
use crate::call::{ByteCounters, Call};
use crate::error::RequestError;
use crate::headers::{Head, Kind, Sender, sanitize_response, sanitize_trailers};
use crate::wire::send::{SendError, send_body};

/// How long a request's body may go on after its response has ended: an application may answer
/// before it has read everything, and a caller finds out a little later.
pub(super) const LINGER_MAX: Duration = Duration::from_secs(2);

/// One admitted request.
pub(super) struct Exchange<'a> {
    pub(super) session: &'a Arc<Session>,
    pub(super) head: &'a Arc<Head>,
    pub(super) target: Target,
}

impl Exchange<'_> {
    /// Forwards the request and passes the answer on to its end.
    pub(super) async fn run(
        self,
        recv: RecvStream,
        reply: &mut Reply,
        call: &mut Call,
    ) -> Result<(), RequestError> {
        if self.head.kind == Kind::WebSocket {
            // Rare and large: apart, so that it takes no room in every call.
            return Box::pin(self.upgrade(recv, reply, call)).await;
        }
        let (body, progress) = self.request_body(recv, call);
        // A caller that stands still before there is any answer holds the application's attention.
        progress.watch_pauses(self.head.kind == Kind::Http && !self.head.expects_continue);
        let answer = self.forward(body, reply, call).await;
        let answer = answer.map_err(|error| of_caller(error, &progress))?;
        progress.watch_pauses(false);
        let passed = pass_on(answer.response, reply, call).await;
        passed.map_err(|error| of_caller(error, &progress))?;
        if !progress.is_done() {
            self.linger(&progress).await;
        }
        if progress.is_done() && progress.failure().is_none() {
            answer.exchange.finish();
        }
        Ok(())
    }

    fn request_body(&self, recv: RecvStream, call: &Call) -> (Body, Arc<Progress>) {
        let shared = &self.session.inbound.shared;
        let body = if recv.is_end_stream() {
            Body::Empty
        } else {
            Body::H2(RecvBody::new(recv, &self.head.headers))
        };
        let pause_max = shared.config.limits.request_body_idle_timeout;
        RequestBody::wrap(body, call.counters(), pause_max, Arc::clone(&shared.clock))
    }

    /// Sends the request and waits for the head of its answer, informational ones passed on.
    async fn forward(
        &self,
        body: Body,
        reply: &mut Reply,
        call: &mut Call,
    ) -> Result<Answer, RequestError> {
        let caller = self.session.link.peer().map(|peer| &peer.id);
        let outgoing = Outgoing {
            address: self.target.address,
            head: || self.head.to_application(caller),
            body,
        };
        let interims = Interims::default();
        let application = &self.session.inbound.application;
        call.forwarded();
        let mut sent = pin!(application.send(outgoing, &interims));
        loop {
            tokio::select! {
                biased;
                head = interims.next() => reply.informational(clean(head)),
                answer = &mut sent => return answer,
                error = reply.was_reset() => return Err(error),
            }
        }
    }

    /// Waits a little for the end of a request's body behind the end of its response.
    async fn linger(&self, progress: &Progress) {
        tokio::select! {
            () = progress.done() => {}
            () = self.session.inbound.shared.clock.sleep(LINGER_MAX) => {}
        }
    }

    /// A WebSocket: an Upgrade towards the application, whose 101 is a 200 here.
    async fn upgrade(
        self,
        recv: RecvStream,
        reply: &mut Reply,
        call: &mut Call,
    ) -> Result<(), RequestError> {
        let answer = self.forward(Body::Empty, reply, call).await?;
        if answer.response.status() != StatusCode::SWITCHING_PROTOCOLS {
            pass_on(answer.response, reply, call).await?;
            answer.exchange.finish();
            return Ok(());
        }
        let (mut head, body) = answer.response.into_parts();
        // hyper keeps the upgraded connection among the response's extensions.
        let mut upgraded = Response::new(body);
        *upgraded.extensions_mut() = std::mem::take(&mut head.extensions);
        let upgrade = answer.exchange.upgrade(upgraded).await?;
        sanitize_response(&mut head, Sender::Application);
        call.answered(&head);
        head.status = StatusCode::OK;
        tunnel::carry_upgrade(self.session, (upgrade, head), recv, reply, call).await
    }
}

fn clean(head: Response<()>) -> Response<()> {
    let (mut head, ()) = head.into_parts();
    sanitize_response(&mut head, Sender::Application);
    Response::from_parts(head, ())
}

/// Passes the application's answer on to its end.
async fn pass_on(
    response: Response<Body>,
    reply: &mut Reply,
    call: &mut Call,
) -> Result<(), RequestError> {
    let (mut head, body) = response.into_parts();
    if head.status == StatusCode::SWITCHING_PROTOCOLS {
        return Err(RequestError::UpstreamProtocol {
            detail: "101 without a request for it".to_owned(),
        });
    }
    sanitize_response(&mut head, Sender::Application);
    head.extensions.clear();
    call.answered(&head);
    let end = body.is_end_stream();
    let stream = reply.head(head, end)?;
    if end {
        return Ok(());
    }
    let bytes = call.counters();
    let mut body = ResponseBody { body, bytes, call };
    send_body(&mut body, stream)
        .await
        .map_err(|error| match error {
            SendError::Reset(reason) => RequestError::PeerReset {
                reason: Some(reason),
            },
            SendError::Connection(_) => RequestError::PeerReset { reason: None },
            SendError::Body(error) => RequestError::UpstreamReset {
                reason: Some(error.reset_reason()),
                detail: error.to_string(),
            },
        })
}

/// A failure of the application that the caller caused, by giving up or by standing still.
pub(super) fn of_caller(error: RequestError, progress: &Progress) -> RequestError {
    if !matches!(error, RequestError::UpstreamReset { .. }) {
        return error;
    }
    match progress.failure() {
        Some(BodyError::Idle) => RequestError::Idle,
        Some(BodyError::Reset(reason)) => RequestError::PeerReset {
            reason: Some(*reason),
        },
        Some(BodyError::Connection(_)) => RequestError::PeerReset { reason: None },
        Some(BodyError::Ended(_)) | None => error,
    }
}

/// A response's body: counted, its trailers cleaned and read for the record.
struct ResponseBody<'a> {
    body: Body,
    bytes: Arc<ByteCounters>,
    call: &'a mut Call,
}

impl HttpBody for ResponseBody<'_> {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        let polled = Pin::new(&mut this.body).poll_frame(context);
        polled.map_ok(|mut frame| {
            if let Some(data) = frame.data_ref() {
                this.bytes.add_response(data.len());
            } else if let Some(trailers) = frame.trailers_mut() {
                sanitize_trailers(trailers, Sender::Application);
                this.call.grpc_end(trailers);
            }
            frame
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
