//! The outbound half: from the application beside this sidecar to another sidecar.
//!
//! The application speaks HTTP/1.1, HTTP/2 with prior knowledge, or opaque bytes on a port bound to
//! one service. Where a request goes is said by its authority, by that port, or, where traffic is
//! redirected, by the address that its connection was made to.
//!
//! Invariants: nothing leaves this process but over mutual TLS to an endpoint whose identity its
//! route names, or to an address that the controller says is not the mesh's; one route is a call's;
//! bodies are streamed; each call leaves one record.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::{Request, Response};
use hyper::upgrade::OnUpgrade;
use sidegate_mesh::access_log::{Address, Direction, Protocol};
use sidegate_mesh::host::ServiceName;
use sidegate_mesh::routes::PortProtocol;
use sidegate_mesh::{Clock, Verdict};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

use crate::balance::Target;
use crate::body::Body;
use crate::call::Call;
use crate::config::ServicePort;
use crate::detect::{self, Detected, Expected, Prefixed, SILENCE};
use crate::error::RequestError;
use crate::forward::{self, Answer, Forwarded, Interim, Outgoing, Start};
use crate::grpc_timeout;
use crate::headers::{self, Head, Kind, Sender};
use crate::http1::{self as guarded, GuardHandle, GuardLimits, UpgradeGate};
use crate::inbound::OwnCalls;
use crate::limits::Permit;
use crate::pool::Pool;
use crate::refusal::{self, Form};
use crate::shared::Shared;
use crate::stack::{self, OutboundStack};
use crate::wire::WireLimits;
use crate::wire::tunnel::{Abort, Abortable};

pub mod replay;

mod destination;
mod external;
mod http1;
mod http2;
mod respond;
mod tcp;

use destination::Destined;
use replay::Replay;
use respond::Exchange;

/// Pause after the system could not accept a connection, for example for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// One worker's outbound half.
pub struct Outbound {
    shared: Arc<Shared>,
    pool: Arc<Pool>,
    stack: OutboundStack,
    wire: WireLimits,
    guard: GuardLimits,
}

/// A port that is bound to one service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BoundService {
    /// The service.
    pub name: ServiceName,
    /// Its port.
    pub port: u16,
}

impl From<&ServicePort> for BoundService {
    fn from(service: &ServicePort) -> Self {
        let name = ServiceName {
            namespace: service.namespace.clone(),
            name: service.name.clone(),
        };
        Self {
            name,
            port: service.port,
        }
    }
}

/// Where a request came from, and what its connection can do.
pub(crate) struct Caller {
    address: SocketAddr,
    destined: Destined,
    interim: Option<Arc<dyn Interim>>,
    upgrade: Option<(OnUpgrade, UpgradeGate)>,
    abort: Abort,
    /// What reads the connection where that is HTTP/1.
    guard: Option<GuardHandle>,
}

impl Outbound {
    /// The outbound half of one worker, with no connection yet; `own` takes calls to this pod.
    pub fn new(shared: Arc<Shared>, own: Option<OwnCalls>) -> Arc<Self> {
        let limits = &shared.config.limits;
        let wire = WireLimits::from(limits);
        let guard = GuardLimits::from(limits);
        let pool = Pool::new(Arc::clone(&shared), wire, own);
        let stack = stack::outbound(Arc::clone(&pool), Arc::clone(&shared.clock));
        Arc::new(Self {
            shared,
            pool,
            stack,
            wire,
            guard,
        })
    }

    /// This worker's connections to other sidecars.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Serves the application's connections to `listener` until a drain's grace period has ended and
    /// the accept queue is empty. Calls go on in tasks of the drain.
    pub async fn serve(self: Arc<Self>, listener: TcpListener, bound: Option<BoundService>) {
        let bound = bound.map(Arc::new);
        loop {
            tokio::select! {
                biased;
                accepted = listener.accept() => match accepted {
                    Ok((stream, address)) => self.accept(stream, address, bound.clone()),
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept an outbound connection");
                        self.shared.clock.sleep(ACCEPT_PAUSE).await;
                    }
                },
                // Polled second: what waits in the queue is taken first.
                () = self.shared.drain.accept_until() => return,
            }
        }
    }

    fn accept(
        self: &Arc<Self>,
        stream: TcpStream,
        address: SocketAddr,
        bound: Option<Arc<BoundService>>,
    ) {
        let Some(permit) = self.shared.limits.outbound_connections.try_acquire() else {
            // Closed at once, and counted by the limit.
            return;
        };
        let this = Arc::clone(self);
        let tasks = self.shared.drain.tasks();
        tasks.spawn(async move {
            let open = this.shared.metrics.connections_open(Direction::Outbound);
            open.inc();
            tokio::select! {
                () = this.serve_connection(stream, address, bound) => {}
                () = this.shared.drain.deadline() => {}
            }
            open.dec();
            drop(permit);
        });
    }

    async fn serve_connection(
        self: &Arc<Self>,
        stream: TcpStream,
        address: SocketAddr,
        bound: Option<Arc<BoundService>>,
    ) {
        // Without it small writes wait for acknowledgements; a failure shows at the first write.
        drop(stream.set_nodelay(true));
        let (destined, protocol) = match (bound, &self.shared.destinations) {
            (None, Some(destinations)) => {
                let redirected = self.serve_redirected(stream, address, destinations);
                return Box::pin(redirected).await;
            }
            (None, None) => (Destined::Authority, None),
            (Some(bound), _) => {
                let protocol = self.protocol_of(&bound);
                (Destined::Bound(bound), Some(protocol))
            }
        };
        let stream = Abortable::new(stream);
        let connection = Connection {
            address,
            destined,
            abort: stream.abort(),
            stale: Arc::default(),
        };
        self.serve_spoken(stream, connection, protocol).await;
    }

    /// Serves a connection by what it speaks; `protocol` is known where one destination is meant.
    async fn serve_spoken(
        self: &Arc<Self>,
        stream: Abortable,
        connection: Connection,
        protocol: Option<PortProtocol>,
    ) {
        if protocol == Some(PortProtocol::Tcp) {
            let stream = Prefixed::new(bytes::Bytes::new(), stream);
            return Box::pin(self.serve_tcp(stream, connection)).await;
        }
        let opaque = protocol == Some(PortProtocol::Auto);
        let (patience, expected) = if opaque {
            (SILENCE, Expected::Anything)
        } else {
            (self.guard.head_timeout, Expected::Http)
        };
        let clock = &*self.shared.clock;
        let detected = detect::protocol(stream, clock, patience, expected).await;
        let Ok((detected, stream)) = detected else {
            return;
        };
        // Boxed, so that a connection that is idle takes no room for what it does not speak.
        match detected {
            Detected::Http2 => Box::pin(self.serve_http2(stream, connection)).await,
            Detected::Http1 => Box::pin(self.serve_http1(stream, connection)).await,
            Detected::Tls | Detected::Other if opaque => {
                Box::pin(self.serve_tcp(stream, connection)).await;
            }
            Detected::Silent if opaque => Box::pin(self.serve_silent(stream, connection)).await,
            Detected::Silent | Detected::Closed => {}
            Detected::Tls => self.refuse(&connection, "tls"),
            Detected::Other => self.refuse(&connection, "unknown_protocol"),
        }
    }

    /// A connection on which nobody has spoken yet: the server may be the first. Where the called
    /// side carries no bytes, or the application is the first after all, it may speak HTTP.
    async fn serve_silent(self: &Arc<Self>, stream: Prefixed<Abortable>, connection: Connection) {
        let Some((stream, connection)) = self.try_tcp(stream, connection).await else {
            return;
        };
        let patience = self.guard.head_timeout;
        let clock = &*self.shared.clock;
        match detect::protocol_of(stream, clock, patience, Expected::Http).await {
            Ok((Detected::Http2, stream)) => self.serve_http2(stream, connection).await,
            Ok((Detected::Http1, stream)) => self.serve_http1(stream, connection).await,
            // It was told already, and is on record: it is reset.
            Ok(_) | Err(_) => connection.abort.arm(),
        }
    }

    /// What the service of a bound port speaks; `Auto` while it is not known.
    fn protocol_of(&self, bound: &BoundService) -> PortProtocol {
        let snapshot = self.shared.state.current();
        let route = snapshot
            .as_ref()
            .and_then(|snapshot| snapshot.routes.service(&bound.name, bound.port));
        route.map_or(PortProtocol::Auto, |route| route.protocol)
    }

    /// A connection that speaks nothing that goes anywhere: it is closed, and on record.
    fn refuse(&self, connection: &Connection, reason: &'static str) {
        let mut call = self.begin(connection.address);
        call.record().protocol = Protocol::Tcp;
        call.fail(&RequestError::BadRequest { reason });
        call.finish();
    }

    fn begin(&self, address: SocketAddr) -> Call {
        let mut call = Call::start(&self.shared, Direction::Outbound);
        call.from_address(address);
        call.between(Some(&self.shared.workload.id), None);
        call
    }

    /// One request of the application, from its head to the head of its response.
    pub(crate) async fn handle_request(
        self: &Arc<Self>,
        request: Request<Body>,
        mut caller: Caller,
    ) -> Response<Body> {
        let mut call = self.begin(caller.address);
        let (parts, body) = request.into_parts();
        let form = Form::of(&parts);
        call.record().protocol = match (form.grpc, parts.version) {
            (true, _) => Protocol::Grpc,
            (false, http::Version::HTTP_2) => Protocol::Http2,
            (false, _) => Protocol::Http1,
        };
        match self.forward(&mut call, parts, body, &mut caller).await {
            Ok(exchange) => exchange.respond(call, caller),
            Err(error) => {
                let error = guarded::cause(error, caller.guard.as_ref());
                refusal::respond(call, &error, form)
            }
        }
    }

    async fn forward(
        self: &Arc<Self>,
        call: &mut Call,
        mut parts: http::request::Parts,
        body: Body,
        caller: &mut Caller,
    ) -> Result<Exchange, RequestError> {
        let permit = self.admit()?;
        let mut head = headers::sanitize(&mut parts, Sender::Application, &self.wire)
            .inspect_err(|_| call.describe_refused(&parts))?;
        call.describe(&head);
        if head.kind != Kind::WebSocket {
            // Any other upgrade is ignored, and requests may follow.
            caller.upgrade = None;
        }
        let route = self.select(call, &mut head, &caller.destined).await?;
        call.record().destination_service = Some(Arc::clone(&route.service));
        if !matches!(caller.destined, Destined::Authority) {
            call.record().authority = head.authority.as_ref().map(ToString::to_string);
        }
        let target = self.target(route);
        let body = respond::counted(body, call.counters());
        let outgoing = Arc::new(self.outgoing(&mut head, &target, body, caller)?);
        let answer = self
            .call(call, &outgoing, &target, &caller.destined)
            .await?;
        Ok(Exchange {
            answer,
            outgoing,
            head,
            permit,
            outbound: Arc::clone(self),
        })
    }

    fn admit(&self) -> Result<Permit, RequestError> {
        let permit = self
            .shared
            .limits
            .in_flight(Direction::Outbound)
            .try_acquire();
        permit.ok_or(RequestError::Overloaded {
            bound: "outboundRequestsMax",
        })
    }

    /// What each try sends.
    fn outgoing(
        &self,
        head: &mut Head,
        target: &Target,
        body: Body,
        caller: &Caller,
    ) -> Result<Outgoing, RequestError> {
        let tunnel = head.kind == Kind::WebSocket;
        let has_body = match caller.upgrade {
            // The upgraded connection is carried by a tunnel of its own.
            Some(_) if tunnel => false,
            _ => !http_body::Body::is_end_stream(&body),
        };
        let deadline = grpc_timeout::read(&head.headers)
            .filter(|_| head.is_grpc())
            .map(|patience| self.shared.clock.now() + patience);
        Ok(Outgoing {
            head: head.to_wire(caller.destined.named_port(&target.route))?,
            method: head.method.clone(),
            grpc: head
                .path
                .grpc()
                .filter(|_| head.is_grpc())
                .map(|(service, method)| format!("{service}/{method}")),
            body: has_body.then(|| Replay::new(body)),
            start: if tunnel {
                Start::AfterSuccess
            } else if head.expects_continue {
                Start::AfterContinue
            } else {
                Start::Now
            },
            interim: caller.interim.clone(),
            deadline,
            body_idle: self.shared.config.limits.request_body_idle_timeout,
            caller_failed: std::sync::OnceLock::new(),
        })
    }

    /// Sends it, within the service's timeout and the caller's patience, and notes who answered.
    async fn call(
        &self,
        call: &mut Call,
        outgoing: &Arc<Outgoing>,
        target: &Target,
        destined: &Destined,
    ) -> Result<Answer, RequestError> {
        call.forwarded();
        let clock = &*self.shared.clock;
        let limit = Patience::of(clock, target.route.traffic.timeout, outgoing.deadline);
        let refresh = |target: &Target| self.refreshed(destined, target);
        let tried = forward::with_retry(&self.stack, clock, (outgoing, target), refresh);
        let Forwarded {
            outcome,
            tries,
            endpoint,
        } = tokio::select! {
            forwarded = tried => forwarded,
            error = limit.run_out(clock) => return Err(error),
        };
        let record = call.record();
        record.attempts = (tries > 1).then_some(tries);
        record.destination_address = endpoint.map(Address::Socket);
        let answer = outcome?;
        let peer = answer.held.slot.peer();
        record.tls_version = Some(peer.tls_version);
        record.destination = Some(Arc::clone(peer.id.text()));
        Ok(answer)
    }
}

/// An application's connection.
struct Connection {
    address: SocketAddr,
    destined: Destined,
    abort: Abort,
    /// Told when the connection leads nowhere any more.
    stale: Arc<Notify>,
}

/// Whether an answer made here says that its connection leads nowhere: the next one may, so the
/// application had better make one.
fn leads_nowhere(response: &Response<Body>) -> bool {
    const CODES: [&str; 3] = [
        "destination_unknown",
        "destination_changed",
        "egress_denied",
    ];
    let code = response.headers().get(crate::wire::ERROR);
    code.is_some_and(|code| CODES.iter().any(|known| code == known))
}

/// How long a call may wait for its response's head.
struct Patience {
    until: Option<SystemTime>,
    after_ms: u64,
}

impl Patience {
    /// The shorter of the service's timeout and what the caller's `grpc-timeout` leaves.
    fn of(clock: &dyn Clock, timeout: Option<Duration>, deadline: Option<SystemTime>) -> Self {
        let now = clock.now();
        let until = match (timeout.map(|timeout| now + timeout), deadline) {
            (Some(timeout), Some(deadline)) => Some(timeout.min(deadline)),
            (timeout, deadline) => timeout.or(deadline),
        };
        let after = until
            .and_then(|until| until.duration_since(now).ok())
            .unwrap_or_default();
        let after_ms = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
        Self { until, after_ms }
    }

    async fn run_out(&self, clock: &dyn Clock) -> RequestError {
        match self.until {
            Some(until) => clock.sleep_until(until).await,
            None => std::future::pending().await,
        }
        RequestError::Timeout {
            after_ms: self.after_ms,
        }
    }
}

/// Notes what another sidecar's refusal says.
fn note_refusal(call: &mut Call, head: &http::response::Parts) {
    let text = |name| {
        let value: &http::HeaderValue = head.headers.get(name)?;
        value.to_str().ok().map(str::to_owned)
    };
    if let Some(id) = text(crate::wire::DECISION) {
        call.record().decision = Some(Verdict::Deny);
        call.record().decision_id = Some(id);
    }
    if head.headers.contains_key(crate::wire::ERROR) {
        call.record().flags.push("upstream_sidecar");
    }
}
