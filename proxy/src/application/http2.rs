//! HTTP/2 connections to the application, with prior knowledge.
//!
//! Always true: connections are shared by all calls of a worker; a call that is given up resets its
//! own stream and nothing else. The `h2` crate itself, as between sidecars, since it keeps reset
//! reasons and informational answers as they came.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::SystemTime;

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, RecvStream, SendStream};
use http::{Request, Response};
use http_body::Body as _;
use sidegate_mesh::fast_map::FastMap;
use tokio::task::AbortHandle;

use super::{Answer, Dialer, Exchange, Interims, Outgoing, informational_head, reset};
use crate::body::{Body, RecvBody};
use crate::error::RequestError;
use crate::wire::WireLimits;
use crate::wire::send::send_body;

/// Most connections to one address; each carries many calls.
const CONNECTIONS_MAX: usize = 8;
/// How often a request whose connection ended before it was sent is tried on another.
const ATTEMPTS_MAX: usize = 3;

/// The connections of one worker.
#[derive(Clone)]
pub(super) struct Pool {
    dialer: Dialer,
    limits: WireLimits,
    open: Arc<Mutex<FastMap<SocketAddr, Target>>>,
}

#[derive(Default)]
struct Target {
    connections: Vec<Connection>,
    /// Held while a connection is opened, so that a burst opens one and not hundreds.
    opening: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Clone)]
struct Connection {
    sender: SendRequest<Bytes>,
    used: SystemTime,
    /// One more for each call on it.
    calls: Arc<()>,
}

impl Connection {
    fn calls(&self) -> usize {
        Arc::strong_count(&self.calls) - 1
    }
}

/// One call's stream.
pub struct Stream {
    /// Sends the request's body; absent when there is none.
    sending: Option<AbortHandle>,
    _call: Arc<()>,
}

impl Stream {
    /// Both bodies have ended.
    pub(super) fn release(mut self) {
        self.sending = None;
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Without its sending half the stream is reset with CANCEL when the rest of it goes.
        if let Some(sending) = self.sending.take() {
            sending.abort();
        }
    }
}

impl Pool {
    pub(super) fn new(dialer: Dialer, limits: WireLimits) -> Self {
        Self {
            dialer,
            limits,
            open: Arc::default(),
        }
    }

    pub(super) async fn send(
        &self,
        head: Request<()>,
        outgoing: Outgoing<impl Fn() -> Result<Request<()>, RequestError>>,
        interims: &Interims,
    ) -> Result<Answer, RequestError> {
        let Outgoing { address, body, .. } = outgoing;
        let (connection, response, stream) =
            self.begin(address, &head, body.is_end_stream()).await?;
        let stream = Stream {
            sending: self.spawn_sending(body, stream),
            _call: connection.calls,
        };
        let response = head_of(response, interims).await?;
        let (parts, recv) = response.into_parts();
        let body = if recv.is_end_stream() {
            Body::Empty
        } else {
            Body::H2(RecvBody::new(recv, &parts.headers))
        };
        Ok(Answer {
            response: Response::from_parts(parts, body),
            exchange: Exchange::Http2(stream),
        })
    }

    pub(super) fn close_idle(&self) {
        let now = self.dialer.clock.now();
        self.lock().retain(|_, target| {
            target.connections.retain(|connection| {
                let age = now.duration_since(connection.used);
                connection.calls() > 0 || age.is_ok_and(|age| age < self.dialer.idle_max)
            });
            !target.connections.is_empty() || Arc::strong_count(&target.opening) > 1
        });
    }

    async fn begin(
        &self,
        address: SocketAddr,
        head: &Request<()>,
        end: bool,
    ) -> Result<(Connection, ResponseFuture, SendStream<Bytes>), RequestError> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let connection = self.checkout(address).await?;
            let begun = match connection.sender.clone().ready().await {
                Ok(mut sender) => sender.send_request(head.clone(), end),
                Err(error) => Err(error),
            };
            match begun {
                Ok((response, stream)) => return Ok((connection, response, stream)),
                // The connection had ended: nothing was sent, and it is not handed out again.
                Err(_) if attempts < ATTEMPTS_MAX => {}
                Err(error) => return Err(failure(&error)),
            }
        }
    }

    /// A connection with room for one more stream.
    async fn checkout(&self, address: SocketAddr) -> Result<Connection, RequestError> {
        if let Some(connection) = poll_fn(|context| self.with_room(address, context)).await {
            return Ok(connection);
        }
        let opening = Arc::clone(&self.lock().entry(address).or_default().opening);
        let _turn = opening.lock().await;
        // Somebody else may have opened one meanwhile.
        if let Some(sender) = poll_fn(|context| self.with_room(address, context)).await {
            return Ok(sender);
        }
        let connection = Connection {
            sender: self.open(address).await?,
            used: self.dialer.clock.now(),
            calls: Arc::default(),
        };
        let mut open = self.lock();
        let target = open.entry(address).or_default();
        target.connections.push(connection.clone());
        Ok(connection)
    }

    /// An open connection with room, or, when no more may be opened, the least used. Never pending:
    /// the context is only there because `h2` tells of an ended connection when it is polled.
    fn with_room(
        &self,
        address: SocketAddr,
        context: &mut Context<'_>,
    ) -> Poll<Option<Connection>> {
        let mut open = self.lock();
        let Some(target) = open.get_mut(&address) else {
            return Poll::Ready(None);
        };
        target.connections.retain_mut(|connection| {
            !matches!(connection.sender.poll_ready(context), Poll::Ready(Err(_)))
        });
        let full = target.connections.len() >= CONNECTIONS_MAX;
        let connections = target.connections.iter_mut();
        let least = connections.min_by_key(|connection| connection.calls());
        let found = least.filter(|connection| {
            full || connection.calls() < connection.sender.current_max_send_streams()
        });
        Poll::Ready(found.map(|connection| {
            connection.used = self.dialer.clock.now();
            connection.clone()
        }))
    }

    async fn open(&self, address: SocketAddr) -> Result<SendRequest<Bytes>, RequestError> {
        let (stream, permit) = self.dialer.dial(address).await?;
        let handshake = self.limits.client().handshake(stream).await;
        let (sender, connection) = handshake.map_err(|error| failure(&error))?;
        self.dialer.tasks.spawn(async move {
            // Every call on it is told of the failure itself.
            drop(connection.await);
            drop(permit);
        });
        Ok(sender)
    }

    fn spawn_sending(&self, mut body: Body, mut stream: SendStream<Bytes>) -> Option<AbortHandle> {
        if body.is_end_stream() {
            return None;
        }
        let sending = self.dialer.tasks.spawn(async move {
            // A reset by the application ends the answer too, and a failed body has already reset
            // the stream.
            drop(send_body(&mut body, &mut stream).await);
        });
        Some(sending.abort_handle())
    }

    fn lock(&self) -> MutexGuard<'_, FastMap<SocketAddr, Target>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The final head; informational ones go to `interims`.
async fn head_of(
    mut response: ResponseFuture,
    interims: &Interims,
) -> Result<Response<RecvStream>, RequestError> {
    while let Some(head) = poll_fn(|context| response.poll_informational(context)).await {
        let head = head.map_err(|error| failure(&error))?;
        if let Some(head) = informational_head(head.status(), head.headers()) {
            interims.add(head);
        }
    }
    response.await.map_err(|error| failure(&error))
}

fn failure(error: &h2::Error) -> RequestError {
    let told = error.reason().filter(|_| error.is_remote());
    let reason = match told {
        // The stream is above the last one that a GOAWAY in good order names: nothing of it was
        // processed (RFC 9113, 6.8).
        Some(Reason::NO_ERROR) if error.is_go_away() => Some(Reason::REFUSED_STREAM),
        reason => reason.filter(|_| error.is_reset()),
    };
    reset(reason, error)
}
