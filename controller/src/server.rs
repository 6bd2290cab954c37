//! What sidecars and other replicas talk to: gRPC over mutual TLS, as the controller's SPIFFE ID.
//!
//! Invariants: who has no certificate that is believed gets no stream; connections, handshakes,
//! streams and messages are bounded; a stream ends with the certificates that it stands on.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use sidegate_api::control::control_server::{Control, ControlServer};
use sidegate_api::control::replica_server::{Replica, ReplicaServer};
use sidegate_api::control::{ReportRequest, ReportResponse, WatchRequest, WatchResponse};
use sidegate_mtls::{Door, DoorLimits, Doorkeeper, Peer};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
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
    let door = DoorLimits {
        connections_max: limits.connections_max,
        anonymous_max: None,
        handshakes_max: limits.handshakes_max,
        handshake_timeout: limits.handshake_timeout,
    };
    let keeper = Arc::<Shared>::clone(&shared);
    let door = Door::new(Arc::clone(&shared.store), door, keeper);
    let incoming = door.open(listener, &shared.tracker, shared.cancel.clone());
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
        .serve_with_incoming_shutdown(incoming, shared.cancel.clone().cancelled_owned())
        .await
}

impl Doorkeeper for Shared {
    fn refused(&self, reason: &'static str) {
        self.metrics.connection_refused(reason);
    }

    fn handshake_failed(&self, reason: &'static str) {
        self.metrics.handshake_failed(reason);
    }

    fn opened(&self) {
        self.metrics.connections.inc();
    }

    fn closed(&self) {
        self.metrics.connections.dec();
    }
}

/// Who is at the other end, as TLS has proved it.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub address: SocketAddr,
    pub peer: Peer,
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
    let caller = request.extensions().get::<sidegate_mtls::Caller>();
    let peer = caller.and_then(|caller| Some((caller.address, caller.peer.clone()?)));
    let (address, peer) = peer.ok_or_else(|| Status::internal("the connection has no facts"))?;
    Ok(Caller { address, peer })
}
