//! The gRPC port of a part of the control plane: who comes in, and how many.
//!
//! Invariants: whoever is served was let in by the one [`Acceptor`]; connections and handshakes are
//! bounded, and callers without a certificate cannot use up what those with one need.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::server::Connected;

use crate::credentials::CredentialStore;
use crate::handshake::{Acceptor, HandshakeError, Peer};

/// Pause after the system has refused to accept: out of file descriptors, most likely, and some
/// will be closed soon.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How many a [`Door`] lets in.
#[derive(Clone, Copy, Debug)]
pub struct DoorLimits {
    /// Connections at once.
    pub connections_max: usize,
    /// Of these, callers without a certificate; `None` lets in nobody without one.
    pub anonymous_max: Option<usize>,
    /// TLS handshakes in flight.
    pub handshakes_max: usize,
    /// Longest TLS handshake.
    pub handshake_timeout: Duration,
}

/// Who counts what happens at a [`Door`]. Reasons are words of this crate.
pub trait Doorkeeper: Send + Sync + 'static {
    /// A connection was turned away.
    fn refused(&self, reason: &'static str);
    /// A TLS handshake failed.
    fn handshake_failed(&self, reason: &'static str);
    /// A connection is open.
    fn opened(&self);
    /// It is open no longer.
    fn closed(&self);
}

/// Who is at the other end of a connection, as TLS has proved it.
#[derive(Clone, Debug)]
pub struct Caller {
    /// From where.
    pub address: SocketAddr,
    /// Absent where no certificate was shown.
    pub peer: Option<Peer>,
}

/// A connection that was let in, as tonic serves it; each of its requests carries the [`Caller`].
pub struct Connection {
    stream: TlsStream<TcpStream>,
    caller: Caller,
    _open: Open,
}

/// Counts a connection for as long as it lives.
struct Open {
    keeper: Arc<dyn Doorkeeper>,
    _permits: (OwnedSemaphorePermit, Option<OwnedSemaphorePermit>),
}

impl Drop for Open {
    fn drop(&mut self) {
        self.keeper.closed();
    }
}

/// Who may come in, and how many.
pub struct Door {
    acceptor: Acceptor,
    store: Arc<CredentialStore>,
    keeper: Arc<dyn Doorkeeper>,
    connections: Arc<Semaphore>,
    anonymous: Option<Arc<Semaphore>>,
    handshakes: Arc<Semaphore>,
    handshakes_max: usize,
}

impl Door {
    /// Shows the credentials of `store` at their moment to whoever comes.
    pub fn new(
        store: Arc<CredentialStore>,
        limits: DoorLimits,
        keeper: Arc<dyn Doorkeeper>,
    ) -> Self {
        let clock = Arc::clone(store.clock());
        let timeout = limits.handshake_timeout;
        let semaphore = |max| Arc::new(Semaphore::new(max));
        Self {
            acceptor: Acceptor::control_plane(Arc::clone(&store), timeout, clock),
            store,
            keeper,
            connections: semaphore(limits.connections_max),
            anonymous: limits.anonymous_max.map(semaphore),
            handshakes: semaphore(limits.handshakes_max),
            handshakes_max: limits.handshakes_max,
        }
    }

    /// The connections that are let in, until `cancel`; for tonic's `serve_with_incoming`.
    ///
    /// Handshakes in flight are broken off then; connections that are open go on.
    pub fn open(
        self,
        listener: TcpListener,
        tracker: &TaskTracker,
        cancel: CancellationToken,
    ) -> ReceiverStream<io::Result<Connection>> {
        let (accepted, incoming) = mpsc::channel(self.handshakes_max);
        let opening = Opening {
            door: Arc::new(self),
            accepted,
            tracker: tracker.clone(),
            cancel,
        };
        tracker.spawn(opening.run(listener));
        ReceiverStream::new(incoming)
    }

    fn refuse(&self, reason: &'static str, address: SocketAddr) {
        self.keeper.refused(reason);
        tracing::debug!(reason, peer.addr = %address, "connection refused");
    }

    async fn handshake(
        &self,
        stream: TcpStream,
    ) -> Result<(TlsStream<TcpStream>, Option<Peer>), HandshakeError> {
        if self.anonymous.is_some() {
            return self.acceptor.accept_optional(stream).await;
        }
        let (stream, peer) = self.acceptor.accept(stream).await?;
        Ok((stream, Some(peer)))
    }

    /// The connection, once it has shown who it is; `None`, and counted, when it is refused.
    async fn admit(
        &self,
        (stream, address): (TcpStream, SocketAddr),
        (connection, handshake): (OwnedSemaphorePermit, OwnedSemaphorePermit),
    ) -> Option<Connection> {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(error = %error, "cannot set TCP_NODELAY");
        }
        let (stream, peer) = match self.handshake(stream).await {
            Ok(accepted) => accepted,
            Err(error) => {
                self.keeper.handshake_failed(error.code());
                tracing::debug!(
                    peer.addr = %address,
                    reason = error.code(),
                    claimed = error.claimed(),
                    "handshake failed"
                );
                return None;
            }
        };
        drop(handshake);
        let anonymous = match &self.anonymous {
            Some(anonymous) if peer.is_none() => {
                let Ok(permit) = Arc::clone(anonymous).try_acquire_owned() else {
                    self.refuse("anonymous_connections_max", address);
                    return None;
                };
                Some(permit)
            }
            _ => None,
        };
        self.keeper.opened();
        Some(Connection {
            stream,
            caller: Caller { address, peer },
            _open: Open {
                keeper: Arc::clone(&self.keeper),
                _permits: (connection, anonymous),
            },
        })
    }
}

/// The accepting of connections.
struct Opening {
    door: Arc<Door>,
    accepted: mpsc::Sender<io::Result<Connection>>,
    tracker: TaskTracker,
    cancel: CancellationToken,
}

impl Opening {
    async fn run(self, listener: TcpListener) {
        loop {
            let accepted = tokio::select! {
                () = self.cancel.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, address)) => self.begin(stream, address),
                Err(error) => {
                    tracing::warn!(error = %error, "cannot accept connections");
                    self.door.store.clock().sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn begin(&self, stream: TcpStream, address: SocketAddr) {
        let door = Arc::clone(&self.door);
        let Ok(connection) = Arc::clone(&door.connections).try_acquire_owned() else {
            return door.refuse("connections_max", address);
        };
        let Ok(handshake) = Arc::clone(&door.handshakes).try_acquire_owned() else {
            return door.refuse("handshakes_max", address);
        };
        let (accepted, cancel) = (self.accepted.clone(), self.cancel.clone());
        self.tracker.spawn(async move {
            let admitting = async {
                let admitted = door.admit((stream, address), (connection, handshake));
                if let Some(connection) = admitted.await {
                    // The server is gone only when everything is.
                    drop(accepted.send(Ok(connection)).await);
                }
            };
            tokio::select! {
                () = cancel.cancelled() => {}
                () = admitting => {}
            }
        });
    }
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.caller.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
