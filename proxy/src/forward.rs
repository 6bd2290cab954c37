//! Sends one call to an endpoint, and again where [`crate::retry`] allows it.
//!
//! Invariants: a body behind `Expect: 100-continue` is read only after the peer's 100 or its answer,
//! and one behind an upgrade only after the upgrade; whoever gives up a call resets its stream with
//! `CANCEL`; every failure says how far the call had come.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::FutureExt;
use h2::client::ResponseFuture;
use h2::{Reason, RecvStream, SendStream};
use http::{Method, Request, Response, StatusCode};
use http_body::{Frame, SizeHint};
use sidegate_mesh::Clock;
use sidegate_mesh::routes::Endpoint;
use tokio_util::sync::{CancellationToken, DropGuard};
use tower::ServiceExt;

use crate::balance::{Load, Target};
use crate::body::BodyError;
use crate::error::{RequestError, reason_words};
use crate::grpc_timeout;
use crate::outbound::replay::{Reader, Replay};
use crate::pool::{Lease, Pool, Slot};
use crate::retry::{Next, Outcome, Plan, Stage, Subject};
use crate::stack::OutboundStack;
use crate::wire::send::{SendError, send_body};

/// How long a new connection may take where there are other endpoints.
const CONNECT_PATIENCE: Duration = Duration::from_secs(1);

/// When the caller's body may be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// At once.
    Now,
    /// After a 100 or an answer.
    AfterContinue,
    /// After the upgrade or the tunnel was accepted.
    AfterSuccess,
}

/// Takes informational responses to a caller that can read them.
pub trait Interim: Send + Sync {
    /// Passes one on.
    fn send(&self, response: Response<()>);
}

/// What each try of one call sends.
pub struct Outgoing {
    /// The head as it goes to another sidecar.
    pub head: Request<()>,
    /// The method that is asked about: that of a WebSocket is GET.
    pub method: Method,
    /// `pkg.Svc/Method` of a gRPC call.
    pub grpc: Option<String>,
    /// The body; `None` when there is none, or when it is not a message's (an upgraded connection).
    pub body: Option<Replay>,
    /// When the body may be read.
    pub start: Start,
    /// Where informational responses go.
    pub interim: Option<Arc<dyn Interim>>,
    /// When the caller's patience ends.
    pub deadline: Option<SystemTime>,
    /// Longest pause within the body before the answer.
    pub body_idle: Duration,
    /// Why the caller's body could not be read, once it could not.
    pub caller_failed: OnceLock<BodyError>,
}

impl Outgoing {
    fn subject(&self) -> Subject<'_> {
        Subject {
            method: &self.method,
            grpc: self.grpc.as_deref(),
        }
    }

    fn is_whole(&self) -> bool {
        self.body.as_ref().is_none_or(Replay::is_whole) && self.caller_failed.get().is_none()
    }

    /// The head of one try: what is left of the caller's patience changes.
    fn request(&self, now: SystemTime) -> Request<()> {
        let mut request = self.head.clone();
        if let (Some(deadline), Some(_)) = (self.deadline, &self.grpc) {
            let left = deadline.duration_since(now).unwrap_or_default();
            grpc_timeout::write(request.headers_mut(), left);
        }
        request
    }
}

/// One try of one call, on its way through the stack.
#[derive(Clone)]
pub struct Attempt {
    /// What is sent.
    pub call: Arc<Outgoing>,
    /// Where it may go.
    pub target: Target,
    /// Where it has already been.
    pub tried: Vec<usize>,
    /// Where it may go now.
    pub candidates: Vec<usize>,
    /// Where it goes, once that is chosen.
    pub chosen: Arc<OnceLock<usize>>,
    /// How long it may take.
    pub timeout: Option<Duration>,
}

/// The head of a response, and what its body needs.
pub struct Answer {
    /// The head.
    pub head: http::response::Parts,
    /// The body as it arrives.
    pub recv: RecvStream,
    /// The sending half, when an upgrade or tunnel was accepted that has no body of a message.
    pub send: Option<SendStream<Bytes>>,
    /// What the call holds until it ends.
    pub held: Held,
}

/// What a call holds until it ends: its place on a connection, its weight at the endpoint, and the
/// task that sends its body.
pub struct Held {
    /// The place on a connection.
    pub slot: Arc<Slot>,
    /// Drops with the call; resets the stream unless the answer ended first.
    pub cancel: Option<DropGuard>,
    _load: Load,
}

/// Why a try has no response.
#[derive(Debug)]
pub struct Failure {
    /// Why.
    pub error: RequestError,
    /// How far it came.
    pub stage: Stage,
}

impl Failure {
    /// It never left.
    pub fn unsent(error: RequestError) -> Self {
        Self {
            error,
            stage: Stage::Unsent,
        }
    }
}

/// What became of a call, and after how many tries.
pub struct Forwarded {
    /// The answer, or the last failure.
    pub outcome: Result<Answer, RequestError>,
    /// How often it was tried.
    pub tries: u32,
    /// The endpoint of the last try.
    pub endpoint: Option<SocketAddr>,
}

/// Tries a call until an outcome is one to settle for. `refresh` says what has become of its target
/// when that has changed since.
pub async fn with_retry(
    stack: &OutboundStack,
    clock: &dyn Clock,
    (call, target): (&Arc<Outgoing>, &Target),
    refresh: impl Fn(&Target) -> Option<Target>,
) -> Forwarded {
    let traffic = Arc::clone(&target.route.traffic);
    let mut plan = Plan::new(&traffic, &target.service.budget, call.subject());
    let mut tried = Vec::new();
    let mut fresh = None;
    loop {
        let now = fresh.as_ref().unwrap_or(target);
        let attempt = Box::new(Attempt {
            call: Arc::clone(call),
            target: now.clone(),
            tried: tried.clone(),
            candidates: Vec::new(),
            chosen: Arc::default(),
            timeout: plan.per_try_timeout(),
        });
        let chosen = Arc::clone(&attempt.chosen);
        let outcome = stack.clone().oneshot(attempt).await;
        let last = chosen.get().copied();
        let endpoint = last.and_then(|index| now.endpoint(index));
        let endpoint = endpoint.map(|endpoint| endpoint.address);
        tried.extend(last);
        if outcome.is_err()
            && let Some(next) = refresh(now)
        {
            tried = next.places_of(now, &tried);
            fresh = Some(next);
        }
        let now = fresh.as_ref().unwrap_or(target);
        let untried = now.route.endpoints.len().saturating_sub(tried.len());
        let Next::Again { pause } = plan.after(seen(&outcome), call.is_whole(), untried) else {
            if let Some(body) = &call.body {
                body.settle();
            }
            let outcome = outcome.map_err(|failure| failure.error);
            return Forwarded {
                outcome,
                tries: plan.tries(),
                endpoint,
            };
        };
        if untried == 0 {
            // Everywhere once: the next round may go anywhere.
            tried.clear();
        }
        // The abandoned try ends before the next one begins.
        drop(outcome);
        if !pause.is_zero() {
            clock.sleep(pause).await;
        }
    }
}

fn seen(outcome: &Result<Answer, Failure>) -> Outcome<'_> {
    match outcome {
        Ok(answer) => Outcome::Answer {
            status: answer.head.status,
            headers: &answer.head.headers,
        },
        Err(failure) => Outcome::Failure {
            stage: failure.stage,
            error: &failure.error,
        },
    }
}

/// One try at the endpoint that was chosen: the innermost service of the stack.
///
/// # Errors
///
/// [`Failure`], which says how far the try came.
pub async fn dispatch(pool: Arc<Pool>, attempt: Box<Attempt>) -> Result<Answer, Failure> {
    let index = attempt.chosen.get().copied();
    let index = index.ok_or_else(|| Failure::unsent(RequestError::NoEndpoint))?;
    let target = &attempt.target;
    let (Some(endpoint), Some(load)) = (target.endpoint(index), target.begin(index)) else {
        return Err(Failure::unsent(RequestError::NoEndpoint));
    };
    let others = attempt.candidates.len() > 1;
    let lease = connect(&pool, endpoint, others).await;
    send(&pool, lease.map_err(Failure::unsent)?, &attempt.call, load).await
}

/// A stream on a connection to `endpoint`. Where there are others to go to, one that has no
/// connection is not waited for as long as one that is the only one: the address of a pod that is
/// gone is often silent.
async fn connect(
    pool: &Arc<Pool>,
    endpoint: &Endpoint,
    others: bool,
) -> Result<Lease, RequestError> {
    let mut lease = pin!(pool.checkout(endpoint));
    if let Poll::Ready(lease) = futures_util::poll!(lease.as_mut()) {
        return lease;
    }
    if !others {
        return lease.await;
    }
    tokio::select! {
        lease = lease.as_mut() => return lease,
        () = pool.shared.clock.sleep(CONNECT_PATIENCE) => {}
    }
    if pool.is_connected(endpoint) {
        return lease.await;
    }
    Err(RequestError::UpstreamConnect {
        detail: "no connection in time, and there are others".to_owned(),
    })
}

async fn send(
    pool: &Arc<Pool>,
    lease: Lease,
    call: &Arc<Outgoing>,
    load: Load,
) -> Result<Answer, Failure> {
    let request = call.request(pool.shared.clock.now());
    let end = call.body.is_none() && call.start != Start::AfterSuccess;
    let begun = lease.begin(request, end).await;
    let (mut response, stream, slot) = begun.map_err(|(error, slot)| not_begun(&error, &slot))?;
    let mut sending = Sending {
        pool,
        call,
        slot: Arc::new(slot),
        stream: Some(stream),
        cancel: None,
    };
    if call.start == Start::Now {
        sending.begin();
    }
    let head = answer(&mut response, |interim| sending.interim(interim)).await;
    load.observe();
    let response = head.map_err(|error| failure(&error, &sending.slot, call))?;
    Ok(sending.answered(response, load))
}

/// The response's head; informational ones go to `interim` as they come.
async fn answer(
    response: &mut ResponseFuture,
    mut interim: impl FnMut(Response<()>),
) -> Result<Response<RecvStream>, h2::Error> {
    poll_fn(|cx| {
        loop {
            match response.poll_informational(cx) {
                Poll::Ready(Some(Ok(response))) => interim(response),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
                Poll::Ready(None) | Poll::Pending => return Pin::new(&mut *response).poll(cx),
            }
        }
    })
    .await
}

/// The sending half of one try.
struct Sending<'a> {
    pool: &'a Arc<Pool>,
    call: &'a Arc<Outgoing>,
    slot: Arc<Slot>,
    stream: Option<SendStream<Bytes>>,
    cancel: Option<DropGuard>,
}

impl Sending<'_> {
    /// Sends the body from now on, what is not here yet in a task of its own: it goes on behind the
    /// answer's head, and ends when the call is given up.
    fn begin(&mut self) {
        let Some(body) = &self.call.body else { return };
        let (Some(stream), Some(reader)) = (self.stream.take(), body.reader()) else {
            return;
        };
        let token = CancellationToken::new();
        self.cancel = Some(token.clone().drop_guard());
        let pump = Pump {
            reader: Patient {
                reader,
                clock: Arc::clone(&self.pool.shared.clock),
                limit: self.call.grpc.is_none().then_some(self.call.body_idle),
                expired: None,
            },
            stream,
            call: Arc::clone(self.call),
            _slot: Arc::clone(&self.slot),
        };
        let mut pump = Box::pin(pump.run(token));
        // What is here of the body leaves with the head, in one write; often that is all of it.
        if pump.as_mut().now_or_never().is_some() {
            self.cancel = None;
            return;
        }
        self.pool.shared.drain.tasks().spawn(pump);
    }

    fn interim(&mut self, response: Response<()>) {
        if response.status() == StatusCode::CONTINUE && self.call.start == Start::AfterContinue {
            self.begin();
        }
        if let Some(interim) = &self.call.interim {
            interim.send(response);
        }
    }

    fn answered(mut self, response: Response<RecvStream>, load: Load) -> Answer {
        let (head, recv) = response.into_parts();
        match self.call.start {
            // A caller that is told so goes on without a 100; after an error it does not.
            Start::AfterContinue if head.status.as_u16() < 400 => self.begin(),
            Start::Now | Start::AfterContinue => {}
            Start::AfterSuccess if head.status.is_success() => self.begin(),
            Start::AfterSuccess => self.stream = None,
        }
        Answer {
            head,
            recv,
            send: self.stream.take(),
            held: Held {
                slot: self.slot,
                cancel: self.cancel,
                _load: load,
            },
        }
    }
}

/// Sends one try's body.
struct Pump {
    reader: Patient,
    stream: SendStream<Bytes>,
    call: Arc<Outgoing>,
    _slot: Arc<Slot>,
}

impl Pump {
    async fn run(mut self, given_up: CancellationToken) {
        let call = Arc::clone(&self.call);
        tokio::select! {
            biased;
            () = given_up.cancelled() => self.stream.send_reset(Reason::CANCEL),
            sent = send_body(&mut self.reader, &mut self.stream) => {
                if let Err(SendError::Body(error)) = sent {
                    // Whoever waits for the answer must learn whose fault it is.
                    drop(call.caller_failed.set(error));
                }
            }
        }
    }
}

/// A body whose pauses have a limit.
struct Patient {
    reader: Reader,
    clock: Arc<dyn Clock>,
    limit: Option<Duration>,
    expired: Option<sidegate_mesh::clock::Sleep>,
}

impl http_body::Body for Patient {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        if let Poll::Ready(frame) = Pin::new(&mut this.reader).poll_frame(cx) {
            this.expired = None;
            return Poll::Ready(frame);
        }
        let Some(limit) = this.limit else {
            return Poll::Pending;
        };
        let expired = this.expired.get_or_insert_with(|| this.clock.sleep(limit));
        expired
            .as_mut()
            .poll(cx)
            .map(|()| Some(Err(BodyError::Idle)))
    }

    fn is_end_stream(&self) -> bool {
        self.reader.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

/// A connection that took no request.
fn not_begun(error: &h2::Error, slot: &Slot) -> Failure {
    let stage = if error.is_io() || error.is_go_away() {
        // It was going away already, so nothing was sent: another one may do.
        Stage::Refused
    } else {
        Stage::Unsent
    };
    Failure {
        error: slot.cut().cloned().unwrap_or_else(|| upstream_error(error)),
        stage,
    }
}

/// A stream that ended before its answer.
fn failure(error: &h2::Error, slot: &Slot, call: &Outgoing) -> Failure {
    if let Some(cause) = call.caller_failed.get() {
        return Failure {
            error: caller_error(cause),
            stage: Stage::Sent,
        };
    }
    if let Some(cut) = slot.cut() {
        return Failure {
            error: cut.clone(),
            stage: Stage::Sent,
        };
    }
    if error.is_remote() && error.reason() == Some(Reason::REFUSED_STREAM) {
        return Failure {
            error: RequestError::UpstreamConnect {
                detail: "the called side could not reach its application".to_owned(),
            },
            stage: Stage::Refused,
        };
    }
    let refused = error.is_remote() && error.is_go_away();
    let stage = if refused { Stage::Refused } else { Stage::Sent };
    Failure {
        error: upstream_error(error),
        stage,
    }
}

/// What a failure of the caller's body means for the call.
pub fn caller_error(error: &BodyError) -> RequestError {
    match error {
        BodyError::Idle => RequestError::Idle,
        BodyError::Reset(reason) => RequestError::PeerReset {
            reason: Some(*reason),
        },
        BodyError::Connection(_) | BodyError::Ended(_) => RequestError::PeerReset { reason: None },
    }
}

fn upstream_error(error: &h2::Error) -> RequestError {
    match error.reason() {
        Some(reason) if error.is_remote() => RequestError::UpstreamReset {
            reason: Some(reason),
            detail: reason_words(reason),
        },
        Some(reason) => RequestError::UpstreamProtocol {
            detail: reason_words(reason),
        },
        None => RequestError::UpstreamReset {
            reason: None,
            detail: error.to_string(),
        },
    }
}
