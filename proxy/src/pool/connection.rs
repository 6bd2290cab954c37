//! One connection of the pool: how it is made, what it carries, when it ends.
//!
//! Invariant: whatever ends a connection, its place in the pool and its permit are given back, and
//! those who wait for it are told.

use std::future::poll_fn;
use std::io;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::task::Poll;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use h2::client::SendRequest;
use sidegate_mesh::access_log::Direction;
use sidegate_mtls::{HandshakeError, Peer};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio_rustls::client::TlsStream;

use super::{Connection, Host, Pool};
use crate::error::RequestError;
use crate::limits::Permit;
use crate::socket::Socket;
use crate::wire::keepalive;

/// How often a connection asks its peer whether it is there, and how long it waits.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(15);

type Wire = h2::client::Connection<TlsStream<Socket>, Bytes>;

/// Makes a connection for `host` and keeps it until it ends.
pub(super) async fn run(pool: Arc<Pool>, host: Arc<Host>, permit: Permit) {
    let mut attempt = Attempt {
        host: &host,
        reported: false,
    };
    // Boxed: a connection that stands needs nothing of how it was made.
    match Box::pin(establish(&pool, &host)).await {
        Err(error) => attempt.failed(error),
        Ok((sender, wire, peer)) => {
            let connection = Arc::new(Connection {
                sender,
                active: AtomicUsize::new(0),
                peer: Arc::new(peer),
                cut: OnceLock::new(),
                quiet_since: Mutex::new(pool.shared.clock.now()),
                tunnels: Notify::new(),
                clock: Arc::clone(&pool.shared.clock),
            });
            attempt.succeeded(&connection);
            drive(&pool, &host, connection, wire).await;
        }
    }
    drop(permit);
}

/// An attempt that is reported once, also when its task is dropped.
struct Attempt<'a> {
    host: &'a Host,
    reported: bool,
}

impl Attempt<'_> {
    fn succeeded(&mut self, connection: &Arc<Connection>) {
        self.reported = true;
        self.host.connected(connection);
    }

    fn failed(&mut self, error: RequestError) {
        self.reported = true;
        self.host.not_connected(error);
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if !self.reported {
            self.failed(RequestError::Draining);
        }
    }
}

async fn establish(
    pool: &Pool,
    host: &Host,
) -> Result<(SendRequest<Bytes>, Wire, Peer), RequestError> {
    let socket = open(pool, host).await?;
    // One TLS handshake is one permit: a burst of new connections must not starve what runs.
    let permit = pool.shared.limits.upstream_handshakes.try_acquire();
    let permit = permit.ok_or(RequestError::Overloaded {
        bound: "handshakesMax",
    })?;
    let handshake = pool.connector.connect(socket, &host.key.identity).await;
    drop(permit);
    let (tls, peer) = handshake.map_err(|error| {
        let metrics = &pool.shared.metrics;
        metrics.handshake_failure(Direction::Outbound, error.code());
        untrusted(&error)
    })?;
    if peer.epoch != host.key.epoch {
        // New credentials came in between; the next attempt has the new key.
        return Err(RequestError::UpstreamConnect {
            detail: "credentials have changed".to_owned(),
        });
    }
    let handshake = pool.wire.client().handshake(tls);
    let clock = &pool.shared.clock;
    tokio::select! {
        made = handshake => {
            let (sender, wire) = made.map_err(|error| broken(&error))?;
            Ok((sender, wire, peer))
        }
        () = clock.sleep(pool.shared.config.limits.handshake_timeout) => Err(timed_out()),
    }
}

/// The bytes below TLS: within this process where the address is this pod's, since nothing that it
/// sends is redirected, and the application would be reached past its policy.
async fn open(pool: &Pool, host: &Host) -> Result<Socket, RequestError> {
    if !pool.shared.own.has(host.key.address.ip()) {
        let dialled = dial(pool, host).await;
        return dialled
            .map(Socket::Tcp)
            .map_err(|error| unreachable(&error));
    }
    let own = pool.own.as_ref();
    let own = own.ok_or_else(|| RequestError::UpstreamConnect {
        detail: "this pod takes no calls".to_owned(),
    })?;
    own.connect(host.key.address).map(Socket::Own)
}

async fn dial(pool: &Pool, host: &Host) -> io::Result<TcpStream> {
    let tcp = tokio::select! {
        tcp = TcpStream::connect(host.key.address) => tcp?,
        () = pool.shared.clock.sleep(pool.shared.config.limits.connect_timeout) => {
            return Err(io::ErrorKind::TimedOut.into());
        }
    };
    tcp.set_nodelay(true)?;
    Ok(tcp)
}

fn unreachable(error: &io::Error) -> RequestError {
    RequestError::UpstreamConnect {
        detail: error.to_string(),
    }
}

fn broken(error: &h2::Error) -> RequestError {
    RequestError::UpstreamConnect {
        detail: error.to_string(),
    }
}

fn timed_out() -> RequestError {
    RequestError::UpstreamConnect {
        detail: "handshake timed out".to_owned(),
    }
}

fn untrusted(error: &HandshakeError) -> RequestError {
    match error {
        HandshakeError::NotReady => RequestError::NotReady,
        // What broke or was slow says nothing about an identity.
        HandshakeError::Io(_) | HandshakeError::Timeout { .. } => RequestError::UpstreamConnect {
            detail: error.code().to_owned(),
        },
        _ => RequestError::UpstreamIdentity {
            reason: error.code().to_owned(),
        },
    }
}

/// Carries the connection's frames until it ends or must be cut.
async fn drive(pool: &Arc<Pool>, host: &Arc<Host>, connection: Arc<Connection>, mut wire: Wire) {
    let pings = wire.ping_pong();
    // The pool's own handle keeps the connection open; users hold theirs. This task must hold none,
    // or it would wait for itself.
    let weak = Arc::downgrade(&connection);
    let peer = Arc::clone(&connection.peer);
    let guard = Retire {
        host,
        connection: Weak::clone(&weak),
    };
    let watch = Watch {
        pool,
        host,
        connection: Weak::clone(&weak),
        peer,
    };
    drop(connection);
    let mut settled = false;
    let frames = poll_fn(|cx| {
        let ended = std::pin::Pin::new(&mut wire).poll(cx);
        if !settled
            && let Some(connection) = weak.upgrade()
            && connection.sender.is_extended_connect_protocol_enabled()
        {
            settled = true;
            connection.tunnels.notify_waiters();
        }
        if let Poll::Ready(Err(error)) = &ended {
            tracing::debug!(upstream.addr = %host.key.address, %error, "connection ended");
        }
        ended.map(drop)
    });
    let gone = async {
        match pings {
            Some(pings) => {
                let clock = Arc::clone(&pool.shared.clock);
                keepalive::watch(pings, clock, PING_INTERVAL, PING_TIMEOUT).await;
            }
            None => std::future::pending().await,
        }
    };
    let gone = async {
        gone.await;
        tracing::debug!(upstream.addr = %host.key.address, "no answer to a ping");
    };
    let cut = async { watch.cut(watch.until_cut().await) };
    // Apart, and polled only when one of them is woken: the frames are, for each call.
    let mut ends: FuturesUnordered<BoxFuture<'_, ()>> = FuturesUnordered::new();
    ends.push(gone.boxed());
    ends.push(cut.boxed());
    tokio::select! {
        () = frames => {}
        _ = ends.next() => {}
    }
    drop(ends);
    drop(guard);
}

/// Takes the connection out of the pool, however its task ends.
struct Retire<'a> {
    host: &'a Host,
    connection: Weak<Connection>,
}

impl Drop for Retire<'_> {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.upgrade() {
            self.host.retire(&connection);
            connection.tunnels.notify_waiters();
        }
    }
}

/// What ends a connection that works.
struct Watch<'a> {
    pool: &'a Arc<Pool>,
    host: &'a Arc<Host>,
    connection: Weak<Connection>,
    peer: Arc<Peer>,
}

impl Watch<'_> {
    /// Takes the connection out of the pool when it should carry nothing new, and returns why once
    /// it must carry nothing at all.
    async fn until_cut(&self) -> RequestError {
        let retired = async {
            tokio::select! {
                () = self.idle() => {}
                () = self.near_end() => {}
                () = self.replaced() => {}
                () = self.pool.shared.drain.accept_until() => {}
            }
            if let Some(connection) = self.connection.upgrade() {
                self.host.retire(&connection);
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = retired => RequestError::Draining,
            () = self.pool.shared.clock.sleep_until(self.peer.not_after) => {
                RequestError::CertificateEnded { reason: "expired" }
            }
            reason = self.distrusted() => RequestError::CertificateEnded { reason },
            () = self.pool.shared.drain.deadline() => RequestError::Draining,
        }
    }

    fn cut(&self, error: RequestError) {
        if let Some(connection) = self.connection.upgrade() {
            // Set once: the first reason is the one that its streams are told.
            drop(connection.cut.set(error));
        }
    }

    /// No stream for the idle limit.
    async fn idle(&self) {
        let limit = self.pool.shared.config.limits.pool_idle_timeout;
        loop {
            let Some(quiet) = self.connection.upgrade().map(|it| it.quiet()) else {
                return;
            };
            let left = limit.saturating_sub(quiet);
            if left.is_zero() {
                return;
            }
            // Looked at again then, instead of at each call's begin and end.
            self.pool.shared.clock.sleep(left).await;
        }
    }

    /// A drain's length before the certificate's end, so that what runs can finish.
    async fn near_end(&self) {
        let ahead = self.pool.shared.config.drain_timeout;
        let moment = self
            .peer
            .not_after
            .checked_sub(ahead)
            .unwrap_or(SystemTime::UNIX_EPOCH);
        self.pool.shared.clock.sleep_until(moment).await;
    }

    /// Newer credentials are in use.
    async fn replaced(&self) {
        let mut epochs = self.pool.shared.credentials.subscribe();
        // An error means that nothing will ever be published again.
        if epochs
            .wait_for(|epoch| *epoch != self.host.key.epoch)
            .await
            .is_err()
        {
            std::future::pending::<()>().await;
        }
    }

    /// The peer is no longer believed.
    async fn distrusted(&self) -> &'static str {
        let mut epochs = self.pool.shared.credentials.subscribe();
        loop {
            if epochs.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
            let Some(credentials) = self.pool.shared.credentials.current() else {
                continue;
            };
            if let Err(error) = credentials.still_trusts(&self.peer) {
                return error.code();
            }
        }
    }
}
