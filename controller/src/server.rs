//! What sidecars and other replicas talk to: gRPC over mutual TLS, as the controller's SPIFFE ID.
//!
//! Invariants: who has no certificate that is believed gets no stream; connections, handshakes,
//! streams and messages are bounded; a stream ends with the certificates that it stands on.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use sidegate_api::control::control_server::{Control, ControlServer};
use sidegate_api::control::replica_server::{Replica, ReplicaServer};
use sidegate_api::control::{ReportRequest, ReportResponse, WatchRequest, WatchResponse};
use sidegate_mtls::{Acceptor, Peer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status, Streaming};

use crate::replica;
use crate::session::Session;
use crate::shared::Shared;

/// How often an idle connection is asked whether it is still there.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// How long it may take to answer.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Largest header list of a request.
const HEADER_BYTES_MAX: u32 = 16 * 1024;
/// Streams of other replicas.
const REPLICAS_MAX: usize = 32;

/// Serves until the controller stops, then lets open streams end.
///
/// # Errors
///
/// What gRPC's transport says.
pub(crate) async fn serve(
    listener: TcpListener,
    shared: Arc<Shared>,
) -> Result<(), tonic::transport::Error> {
    let limits = &shared.config.limits;
    let (accepted, incoming) = mpsc::channel(limits.handshakes_max);
    let door = Arc::new(Door::new(Arc::clone(&shared), accepted));
    shared.spawn(accept(listener, door));
    let control = ControlServer::new(ControlService {
        sidecars: Arc::new(Semaphore::new(limits.sidecars_max)),
        shared: Arc::clone(&shared),
    });
    let replica = ReplicaServer::new(ReplicaService {
        replicas: Arc::new(Semaphore::new(REPLICAS_MAX)),
        shared: Arc::clone(&shared),
    });
    Server::builder()
        .max_concurrent_streams(limits.streams_per_connection_max)
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_service(control.max_decoding_message_size(limits.message_bytes_max))
        .add_service(replica.max_decoding_message_size(limits.message_bytes_max))
        .serve_with_incoming_shutdown(
            ReceiverStream::new(incoming),
            shared.cancel.clone().cancelled_owned(),
        )
        .await
}

/// Who may come in, and how many.
struct Door {
    shared: Arc<Shared>,
    acceptor: Acceptor,
    connections: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
    accepted: mpsc::Sender<io::Result<Connection>>,
}

impl Door {
    fn new(shared: Arc<Shared>, accepted: mpsc::Sender<io::Result<Connection>>) -> Self {
        let limits = &shared.config.limits;
        let store = Arc::clone(&shared.store);
        let clock = Arc::clone(&shared.clock);
        Self {
            acceptor: Acceptor::control_plane(store, limits.handshake_timeout, clock),
            connections: Arc::new(Semaphore::new(limits.connections_max)),
            handshakes: Arc::new(Semaphore::new(limits.handshakes_max)),
            accepted,
            shared,
        }
    }

    fn refuse(&self, reason: &'static str, address: SocketAddr) {
        self.shared.metrics.connection_refused(reason);
        tracing::debug!(reason, peer.addr = %address, "connection refused");
    }

    async fn admit(&self, stream: TcpStream, address: SocketAddr, permit: OwnedSemaphorePermit) {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(error = %error, "cannot set TCP_NODELAY");
        }
        let (stream, peer) = match self.acceptor.accept(stream).await {
            Ok(accepted) => accepted,
            Err(error) => {
                self.shared.metrics.handshake_failed(error.code());
                tracing::debug!(
                    peer.addr = %address,
                    reason = error.code(),
                    claimed = error.claimed(),
                    "handshake failed"
                );
                return;
            }
        };
        self.shared.metrics.connections.inc();
        let connection = Connection {
            stream,
            caller: Caller { address, peer },
            _open: Open {
                shared: Arc::clone(&self.shared),
                _permit: permit,
            },
        };
        // The server is gone only when everything is.
        drop(self.accepted.send(Ok(connection)).await);
    }
}

async fn accept(listener: TcpListener, door: Arc<Door>) {
    loop {
        let (stream, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, most likely: some will be closed soon.
                tracing::warn!(error = %error, "cannot accept connections");
                door.shared.clock.sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(connection) = Arc::clone(&door.connections).try_acquire_owned() else {
            door.refuse("connections_max", address);
            continue;
        };
        let Ok(handshake) = Arc::clone(&door.handshakes).try_acquire_owned() else {
            door.refuse("handshakes_max", address);
            continue;
        };
        let admitting = Arc::clone(&door);
        door.shared.spawn(async move {
            admitting.admit(stream, address, connection).await;
            drop(handshake);
        });
    }
}

/// Who is at the other end, as TLS has proved it.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub address: SocketAddr,
    pub peer: Peer,
}

/// One authenticated connection.
struct Connection {
    stream: TlsStream<TcpStream>,
    caller: Caller,
    _open: Open,
}

/// Counts a connection for as long as it lives.
struct Open {
    shared: Arc<Shared>,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.shared.metrics.connections.dec();
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

struct ControlService {
    shared: Arc<Shared>,
    sidecars: Arc<Semaphore>,
}

#[tonic::async_trait]
impl Control for ControlService {
    type WatchStream = ReceiverStream<Result<WatchResponse, Status>>;

    async fn watch(
        &self,
        request: Request<Streaming<WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let caller = caller(&request)?;
        let Ok(permit) = Arc::clone(&self.sidecars).try_acquire_owned() else {
            self.shared.metrics.hello_refused("sidecars_max");
            let words = "too many streams are open; try again later";
            return Err(Status::resource_exhausted(words));
        };
        // One: a sidecar that reads slowly gets the latest state, not each that there was.
        let (answers, receiver) = mpsc::channel(1);
        let session = Session {
            shared: Arc::clone(&self.shared),
            caller,
            answers,
        };
        self.shared.tracker.spawn(async move {
            session.run(request.into_inner()).await;
            drop(permit);
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

struct ReplicaService {
    shared: Arc<Shared>,
    replicas: Arc<Semaphore>,
}

#[tonic::async_trait]
impl Replica for ReplicaService {
    type ReportStream = ReceiverStream<Result<ReportResponse, Status>>;

    async fn report(
        &self,
        request: Request<Streaming<ReportRequest>>,
    ) -> Result<Response<Self::ReportStream>, Status> {
        let caller = caller(&request)?;
        if caller.peer.id != self.shared.id {
            self.shared.metrics.reported("not_a_replica", 0);
            return Err(Status::permission_denied(
                "only the controller's replicas report",
            ));
        }
        let Ok(permit) = Arc::clone(&self.replicas).try_acquire_owned() else {
            return Err(Status::resource_exhausted("too many replicas report"));
        };
        let (answers, receiver) = mpsc::channel(1);
        let shared = Arc::clone(&self.shared);
        self.shared.spawn(async move {
            replica::listen(shared, request.into_inner(), answers).await;
            drop(permit);
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    let caller = request.extensions().get::<Caller>();
    caller
        .cloned()
        .ok_or_else(|| Status::internal("the connection has no facts"))
}
