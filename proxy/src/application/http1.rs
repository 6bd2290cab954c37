//! HTTP/1 connections to the application: behind the guard, pooled, one request at a time.
//!
//! Always true: a connection goes back into the pool only after both messages on it have ended;
//! in every other case it is closed, with RST, so that an application that was in the middle of a
//! message sees an abort. A request is sent a second time only when nothing of it was sent, or when
//! it is safe, has no body and a kept connection ended without one byte of an answer.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use http::{Method, Request, Response, StatusCode, Version, header};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use sidegate_mesh::fast_map::FastMap;
use tokio::task::AbortHandle;

use super::{Answer, Dialer, Exchange, Interims, Outgoing, informational_head, reset};
use crate::body::Body;
use crate::error::RequestError;
use crate::http1::{ClientGuard, ClientHandle, GuardLimits, Rejection};
use crate::wire::tunnel::Abort;

/// Most unused connections that are kept to one address: calls of hundreds come and go in bursts, and
/// each connection that is not kept is made anew.
const IDLE_CONNECTIONS_MAX: usize = 512;

/// The connections of one worker.
#[derive(Clone)]
pub(super) struct Pool {
    dialer: Dialer,
    limits: GuardLimits,
    idle: Arc<Mutex<FastMap<SocketAddr, Vec<Idle>>>>,
}

struct Idle {
    connection: Connection,
    since: SystemTime,
}

struct Connection {
    sender: SendRequest<Body>,
    guard: ClientHandle,
    abort: Abort,
    driver: AbortHandle,
}

/// A connection while a request is on it.
pub struct InUse {
    connection: Option<Connection>,
    pool: Pool,
    address: SocketAddr,
    reusable: bool,
}

/// What follows a 101: bytes both ways.
pub struct Upgrade {
    /// The connection, with what was read behind the 101 first.
    pub io: TokioIo<hyper::upgrade::Upgraded>,
    /// Decides how it closes.
    pub abort: Abort,
}

impl Pool {
    pub(super) fn new(dialer: Dialer, limits: GuardLimits) -> Self {
        Self {
            dialer,
            limits,
            idle: Arc::default(),
        }
    }

    pub(super) async fn send(
        &self,
        head: Request<()>,
        outgoing: Outgoing<impl Fn() -> Result<Request<()>, RequestError>>,
        interims: &Interims,
    ) -> Result<Answer, RequestError> {
        let upgrade = head.headers().contains_key(header::UPGRADE);
        let harmless = is_harmless(head.method(), &outgoing.body);
        let mut request = watched(head.map(|()| outgoing.body), interims);
        loop {
            let reusable = request.version() == Version::HTTP_11;
            let (mut in_use, reused) = self.checkout(outgoing.address, reusable).await?;
            let Some(connection) = &mut in_use.connection else {
                return Err(reset(None, &"no connection"));
            };
            connection.guard.begin(request.method(), upgrade);
            let mut failed = match connection.sender.try_send_request(request).await {
                Ok(response) => return answer(response, in_use, upgrade),
                Err(failed) => failed,
            };
            let rejection = connection.guard.rejection();
            let unsent = failed.take_message().filter(|_| reused);
            let unanswered = was_closed(failed.error()) && rejection.is_none();
            request = match unsent {
                Some(unsent) => unsent,
                None if reused && harmless && unanswered => {
                    watched((outgoing.head)()?.map(|()| Body::Empty), interims)
                }
                None => return Err(failure(failed.error(), rejection)),
            };
        }
    }

    pub(super) fn close_idle(&self) {
        let now = self.dialer.clock.now();
        self.lock().retain(|_, idle| {
            idle.retain(|idle| idle.is_usable(now, self.dialer.idle_max));
            !idle.is_empty()
        });
    }

    /// A kept connection, or a new one; true when it was kept.
    async fn checkout(
        &self,
        address: SocketAddr,
        reusable: bool,
    ) -> Result<(InUse, bool), RequestError> {
        let kept = self.kept(address);
        let reused = kept.is_some();
        let connection = match kept {
            Some(connection) => connection,
            None => self.open(address).await?,
        };
        let in_use = InUse {
            connection: Some(connection),
            pool: self.clone(),
            address,
            reusable,
        };
        Ok((in_use, reused))
    }

    fn kept(&self, address: SocketAddr) -> Option<Connection> {
        let now = self.dialer.clock.now();
        let mut idle = self.lock();
        let kept = idle.get_mut(&address)?;
        // The latest first, so that those which a quiet time does not need grow old and go.
        while let Some(idle) = kept.pop() {
            if idle.is_usable(now, self.dialer.idle_max) {
                return Some(idle.connection);
            }
        }
        None
    }

    fn keep(&self, address: SocketAddr, connection: Connection) {
        let since = self.dialer.clock.now();
        let mut idle = self.lock();
        let kept = idle.entry(address).or_default();
        if kept.len() < IDLE_CONNECTIONS_MAX {
            kept.push(Idle { connection, since });
        }
    }

    async fn open(&self, address: SocketAddr) -> Result<Connection, RequestError> {
        let (stream, permit) = self.dialer.dial(address).await?;
        let abort = stream.abort();
        let clock = Arc::clone(&self.dialer.clock);
        let (io, guard) = ClientGuard::new(stream, self.limits, clock);
        let (sender, connection) = crate::http1::client(&self.limits)
            .handshake(TokioIo::new(io))
            .await
            .map_err(|error| failure(&error, None))?;
        let driver = self.dialer.tasks.spawn(async move {
            // Whoever waits for an answer is told of the failure itself.
            drop(connection.with_upgrades().await);
            drop(permit);
        });
        Ok(Connection {
            sender,
            guard,
            abort,
            driver: driver.abort_handle(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, FastMap<SocketAddr, Vec<Idle>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Idle {
    fn is_usable(&self, now: SystemTime, idle_max: Duration) -> bool {
        let young = now
            .duration_since(self.since)
            .is_ok_and(|age| age < idle_max);
        // Not ready and not closed is a connection whose last message is just ending; leaving it
        // out costs one new connection, waiting for it could cost a request.
        young && self.connection.sender.is_ready()
    }
}

impl InUse {
    /// Both messages have ended: the connection may serve another request.
    pub(super) fn release(mut self) {
        if let Some(connection) = self.connection.take()
            && self.reusable
            && !connection.sender.is_closed()
        {
            self.pool.keep(self.address, connection);
        }
    }

    pub(super) async fn upgrade(
        mut self,
        response: Response<Body>,
    ) -> Result<Upgrade, RequestError> {
        let upgraded = hyper::upgrade::on(response)
            .await
            .map_err(|error| failure(&error, None))?;
        let abort = match self.connection.take() {
            Some(connection) => connection.abort,
            None => Abort::default(),
        };
        Ok(Upgrade {
            io: TokioIo::new(upgraded),
            abort,
        })
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            connection.abort.arm();
            connection.driver.abort();
        }
    }
}

fn answer(
    response: Response<Incoming>,
    in_use: InUse,
    upgrade: bool,
) -> Result<Answer, RequestError> {
    if response.status() == StatusCode::SWITCHING_PROTOCOLS && !upgrade {
        return Err(RequestError::UpstreamProtocol {
            detail: "101 without a request for it".to_owned(),
        });
    }
    Ok(Answer {
        response: response.map(Body::from),
        exchange: Exchange::Http1(in_use),
    })
}

/// A request whose informational answers go to `interims`.
fn watched(mut request: Request<Body>, interims: &Interims) -> Request<Body> {
    let interims = interims.clone();
    hyper::ext::on_informational(&mut request, move |response| {
        if let Some(head) = informational_head(response.status(), response.headers()) {
            interims.add(head);
        }
    });
    request
}

/// Whether a second request does no harm: RFC 9110, 9.2.2.
fn is_harmless(method: &Method, body: &Body) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS) && body.is_end_stream()
}

/// Whether a connection ended without an answer.
fn was_closed(error: &hyper::Error) -> bool {
    error.is_incomplete_message() || error.is_canceled() || io_kind(error).is_some()
}

fn io_kind(error: &hyper::Error) -> Option<io::ErrorKind> {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return Some(error.kind());
        }
        source = error.source();
    }
    None
}

fn failure(error: &hyper::Error, rejection: Option<Rejection>) -> RequestError {
    if let Some(rejection) = rejection {
        return RequestError::UpstreamProtocol {
            detail: rejection.code().to_owned(),
        };
    }
    if error.is_parse() {
        return RequestError::UpstreamProtocol {
            detail: error.to_string(),
        };
    }
    match io_kind(error) {
        Some(kind) => reset(None, &kind),
        None => reset(None, error),
    }
}
