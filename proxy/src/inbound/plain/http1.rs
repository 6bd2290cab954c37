//! HTTP/1 of a caller without an identity.
//!
//! Always true: the guard reads it as it reads an application's; a response that is cut off ends in
//! an abort, never in a clean end; a call that the policy no longer allows ends as one.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::header::{CONNECTION, UPGRADE};
use http::{HeaderValue, Request, Response, StatusCode, Version};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use sidegate_mesh::access_log::Protocol;

use super::super::exchange::{LINGER_MAX, of_caller};
use super::super::{Inbound, Target, request};
use crate::application::{Answer, Exchange, Interims, Outgoing, Progress, RequestBody};
use crate::body::{Body, BodyError};
use crate::call::{ByteCounters, Call};
use crate::connections::{Ending, Link, LinkGuard, LiveGuard, Subject};
use crate::detect::Prefixed;
use crate::error::RequestError;
use crate::headers::{self, Head, Kind, Sender, sanitize_response, sanitize_trailers};
use crate::http1::{self, BAD_REQUEST, GuardHandle, Rejection, Serving, UpgradeGate};
use crate::limits::Permit;
use crate::refusal::{self, Form};
use crate::relay::relay;
use crate::wire::tunnel::{Abort, Abortable, TunnelIdle, TunnelIo};
use crate::wire::{self, Spoken};

/// One connection, as its requests see it.
#[derive(Clone)]
struct Caller {
    inbound: Arc<Inbound>,
    link: Arc<Link>,
    target: Target,
    abort: Abort,
}

/// A request that was admitted.
struct Admitted {
    head: Head,
    live: LiveGuard,
    permit: Permit,
}

/// Serves one connection to its end; a drain ends it after the request that runs.
pub(super) async fn serve(
    inbound: &Arc<Inbound>,
    io: Prefixed<Abortable>,
    link: &LinkGuard,
    target: Target,
) {
    let shared = &inbound.shared;
    let caller = Caller {
        inbound: Arc::clone(inbound),
        link: Arc::clone(link.link()),
        target,
        abort: io.get_ref().abort(),
    };
    let serving = Serving {
        limits: inbound.guard,
        idle: shared.config.limits.connection_idle_timeout,
        clock: &shared.clock,
        drain: &shared.drain,
    };
    let answer = |request, handle| {
        let caller = caller.clone();
        async move { caller.answer(request, handle).await }
    };
    if let Some(rejection) = http1::serve(io, &serving, answer).await {
        drop(caller.refuse_head(rejection));
    }
}

impl Caller {
    async fn answer(self, mut request: Request<Incoming>, handle: GuardHandle) -> Response<Body> {
        let gate = match handle.admit(&request) {
            Ok(gate) => gate,
            Err(rejection) => return self.refuse_head(rejection),
        };
        let upgrade = gate.map(|gate| (hyper::upgrade::on(&mut request), gate));
        let mut call = request::begin(&self.inbound.shared, &self.link);
        call.record().protocol = Protocol::Http1;
        let (parts, body) = request.into_parts();
        let form = Form::of(&parts);
        let served = self.serve_request(parts, Body::from(body), upgrade, &mut call);
        let mut response = match served.await {
            Ok(served) => served.respond(call, self).await,
            Err(error) => refusal::respond(call, &http1::cause(error, Some(&handle)), form),
        };
        *response.version_mut() = Version::HTTP_11;
        // Whoever sends what could be read in two ways is not read any further.
        let code = response.headers().get(wire::ERROR);
        if code.is_some_and(|code| code == BAD_REQUEST) {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(CONNECTION, close);
        }
        response
    }

    /// From the head to the head of the answer.
    async fn serve_request(
        &self,
        mut parts: http::request::Parts,
        body: Body,
        upgrade: Option<(OnUpgrade, UpgradeGate)>,
        call: &mut Call,
    ) -> Result<Served, RequestError> {
        let shared = &self.inbound.shared;
        let head = headers::sanitize(&mut parts, Sender::Application, &self.inbound.limits)
            .inspect_err(|_| call.describe_refused(&parts))?;
        call.describe(&head);
        let admitted = self.admit(head, call)?;
        call.record().destination_address = Some(self.target.address.into());
        let is_upgrade = admitted.head.kind == Kind::WebSocket;
        let body = if is_upgrade { Body::Empty } else { body };
        let pause_max = shared.config.limits.request_body_idle_timeout;
        let clock = Arc::clone(&shared.clock);
        let (body, progress) = RequestBody::wrap(body, call.counters(), pause_max, clock);
        progress.watch_pauses(admitted.head.kind == Kind::Http && !admitted.head.expects_continue);
        call.forwarded();
        let answer = tokio::select! {
            answer = self.forward(&admitted.head, body) => {
                answer.map_err(|error| of_caller(error, &progress))?
            }
            ending = admitted.live.live().ended() => {
                return Err(request::ended(shared, call, ending));
            }
        };
        progress.watch_pauses(false);
        Ok(Served {
            answer,
            admitted,
            progress,
            upgrade: upgrade.filter(|_| is_upgrade),
        })
    }

    fn admit(&self, head: Head, call: &mut Call) -> Result<Admitted, RequestError> {
        let shared = &self.inbound.shared;
        let subject = Subject::Request {
            port: self.target.port,
            head: Arc::new(head.clone()),
        };
        // Registered before the first check: a policy change between the two would else be missed.
        let live = request::register(shared, &self.link, subject.clone(), call);
        let permit = request::admit(shared, &self.link, &subject, call)?;
        Ok(Admitted { head, live, permit })
    }

    async fn forward(&self, head: &Head, body: Body) -> Result<Answer, RequestError> {
        // hyper sends its own 100 when the body is first read, and can send no other.
        let outgoing = Outgoing {
            address: self.target.address,
            head: || head.to_application(None),
            body,
        };
        let application = &self.inbound.application;
        application.send(outgoing, &Interims::default()).await
    }

    fn refuse_head(&self, rejection: Rejection) -> Response<Body> {
        let mut call = request::begin(&self.inbound.shared, &self.link);
        call.record().protocol = Protocol::Http1;
        let mut response = refusal::respond(call, &http1::refused(rejection), Form::default());
        *response.status_mut() = rejection.status();
        response
    }
}

/// A call that has its answer.
struct Served {
    answer: Answer,
    admitted: Admitted,
    progress: Arc<Progress>,
    /// Where the caller asked for a WebSocket.
    upgrade: Option<(OnUpgrade, UpgradeGate)>,
}

impl Served {
    /// The response; the record is written when its body has ended.
    async fn respond(self, mut call: Call, caller: Caller) -> Response<Body> {
        if self.answer.response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return match self.switch(&mut call, &caller).await {
                Ok((head, tunnel)) => {
                    let tasks = caller.inbound.shared.drain.tasks().clone();
                    tasks.spawn(tunnel.carry(call, caller));
                    Response::from_parts(head, Body::Empty)
                }
                Err(error) => refusal::respond(call, &error, Form::default()),
            };
        }
        let (mut head, body) = self.answer.response.into_parts();
        sanitize_response(&mut head, Sender::Application);
        head.extensions.clear();
        call.answered(&head);
        let live = Arc::clone(self.admitted.live.live());
        let body = ResponseBody {
            bytes: call.counters(),
            ending: Box::pin(async move { live.ended().await }),
            running: Some(Running {
                call,
                exchange: self.answer.exchange,
                progress: self.progress,
                abort: (self.admitted.head.spoken == Spoken::Http10).then_some(caller.abort),
                inbound: caller.inbound,
                _live: self.admitted.live,
                _permit: self.admitted.permit,
            }),
            body,
        };
        Response::from_parts(head, Body::boxed(body.begun()))
    }

    /// The 101 to the caller, and what follows it.
    async fn switch(
        self,
        call: &mut Call,
        caller: &Caller,
    ) -> Result<(http::response::Parts, Tunnel), RequestError> {
        let (upgraded, gate) = self
            .upgrade
            .ok_or(RequestError::NotCarried { reason: "upgrade" })?;
        let (mut head, body) = self.answer.response.into_parts();
        // hyper keeps the upgraded connection among the response's extensions.
        let mut switched = Response::new(body);
        *switched.extensions_mut() = std::mem::take(&mut head.extensions);
        let upstream = self.answer.exchange.upgrade(switched).await?;
        gate.accept()
            .map_err(|rejection| RequestError::BadRequest {
                reason: rejection.code(),
            })?;
        sanitize_response(&mut head, Sender::Application);
        head.headers
            .insert(CONNECTION, HeaderValue::from_static("upgrade"));
        head.headers
            .insert(UPGRADE, HeaderValue::from_static(wire::WEBSOCKET));
        call.answered(&head);
        let tunnel = Tunnel {
            upgraded,
            upstream: TunnelIo {
                io: upstream.io,
                leading: Bytes::new(),
                abort: upstream.abort,
            },
            abort: caller.abort.clone(),
            live: self.admitted.live,
            _permit: self.admitted.permit,
        };
        Ok((head, tunnel))
    }
}

/// A WebSocket whose 101 is on its way to the caller.
struct Tunnel {
    upgraded: OnUpgrade,
    upstream: TunnelIo<TokioIo<Upgraded>>,
    abort: Abort,
    live: LiveGuard,
    _permit: Permit,
}

impl Tunnel {
    async fn carry(self, mut call: Call, caller: Caller) {
        let shared = &caller.inbound.shared;
        let counters = call.counters();
        let idle = TunnelIdle {
            limit: shared.config.limits.stream_idle_timeout,
            clock: Arc::clone(&shared.clock),
        };
        self.upstream.abort.arm();
        let carried = async {
            let Ok(io) = self.upgraded.await else {
                return Err(RequestError::PeerReset { reason: None });
            };
            let caller = TunnelIo {
                io: TokioIo::new(io),
                leading: Bytes::new(),
                abort: self.abort.clone(),
            };
            relay(caller, self.upstream, &counters, &idle)
                .await
                .outcome()
        };
        let carried = tokio::select! {
            carried = carried => carried,
            ending = self.live.live().ended() => Err(request::ended(shared, &mut call, ending)),
        };
        if let Err(error) = carried {
            self.abort.arm();
            call.fail(&error);
        }
        call.finish();
    }
}

/// What a call holds until its response has ended.
struct Running {
    call: Call,
    exchange: Exchange,
    progress: Arc<Progress>,
    /// Armed where only a reset can tell an abort from an end: HTTP/1.0 ends a body by closing.
    abort: Option<Abort>,
    inbound: Arc<Inbound>,
    _live: LiveGuard,
    _permit: Permit,
}

/// A response's body on its way to the caller.
struct ResponseBody {
    body: Body,
    bytes: Arc<ByteCounters>,
    /// Ends when the call must.
    ending: BoxFuture<'static, Ending>,
    running: Option<Running>,
}

impl ResponseBody {
    /// A body that has none ends at once: nobody asks it again.
    fn begun(mut self) -> Self {
        if self.body.is_end_stream() {
            self.end();
        }
        self
    }

    /// The response has ended well.
    fn end(&mut self) {
        let Some(running) = self.running.take() else {
            return;
        };
        let Running {
            call,
            exchange,
            progress,
            inbound,
            ..
        } = running;
        call.finish();
        if progress.is_done() {
            if progress.failure().is_none() {
                exchange.finish();
            }
            return;
        }
        let tasks = inbound.shared.drain.tasks().clone();
        tasks.spawn(async move {
            tokio::select! {
                () = progress.done() => {}
                () = inbound.shared.clock.sleep(LINGER_MAX) => {}
            }
            if progress.is_done() && progress.failure().is_none() {
                exchange.finish();
            }
        });
    }

    /// The response is cut off.
    fn fail(&mut self, error: &RequestError) {
        if let Some(mut running) = self.running.take() {
            if let Some(abort) = &running.abort {
                abort.arm();
            }
            running.call.fail(error);
            running.call.finish();
        }
    }

    /// The policy, or whatever else ends calls, has ended this one.
    fn ended(&mut self, ending: Ending) -> BodyError {
        let Some(running) = &mut self.running else {
            return BodyError::Idle;
        };
        let shared = Arc::clone(&running.inbound.shared);
        let error = request::ended(&shared, &mut running.call, ending);
        self.fail(&error);
        BodyError::Ended(error.reset_reason())
    }

    fn pass(&mut self, frame: &mut Frame<Bytes>) {
        if let Some(data) = frame.data_ref() {
            self.bytes.add_response(data.len());
        } else if let Some(trailers) = frame.trailers_mut() {
            sanitize_trailers(trailers, Sender::Application);
            if let Some(running) = &mut self.running {
                running.call.grpc_end(trailers);
            }
        }
        if frame.is_trailers() || self.body.is_end_stream() {
            self.end();
        }
    }
}

impl HttpBody for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        if this.running.is_none() {
            return Poll::Ready(None);
        }
        if let Poll::Ready(ending) = this.ending.as_mut().poll(context) {
            return Poll::Ready(Some(Err(this.ended(ending))));
        }
        let mut frame = ready!(Pin::new(&mut this.body).poll_frame(context));
        match &mut frame {
            None => this.end(),
            Some(Ok(frame)) => this.pass(frame),
            Some(Err(error)) => {
                let error = RequestError::UpstreamReset {
                    reason: None,
                    detail: error.to_string(),
                };
                this.fail(&error);
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.running.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        // Neither ended nor failed: the caller gave the call up.
        self.fail(&RequestError::PeerReset { reason: None });
    }
}
