//! What replicas tell one another: a follower passes its sidecars' acknowledgements to the leader.
//!
//! Invariants: both ends are the controller, by their certificates; a leader listens only to those
//! who came by its own term of the Lease, and no longer than it lasts.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use sidegate_api::control::replica_client::ReplicaClient;
use sidegate_api::control::{Acknowledged, ReportRequest, ReportResponse};
use sidegate_mtls::{Connector, HandshakeError};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;
use tonic::{Status, Streaming};

use crate::lease::{Leadership, Term};
use crate::shared::Shared;

/// Bound for TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Wait after a failure.
const RETRY: Duration = Duration::from_secs(1);
/// Acknowledgements of one message.
const BATCH: usize = 1_000;
/// How long changes are gathered.
const GATHER: Duration = Duration::from_millis(100);
/// The authority of each request; nobody resolves it.
const AUTHORITY: &str = "http://sidegate-controller";

/// Why a report broke off.
#[derive(Debug, thiserror::Error)]
enum ReportError {
    #[error("the holder of the lease has no address in its name")]
    NoAddress,
    #[error("the leader at {0} cannot be reached: {1}")]
    Unreachable(SocketAddr, io::Error),
    #[error("what answers at {0} is not the controller: {1}")]
    NotTheController(SocketAddr, HandshakeError),
    #[error("the leader at {0} takes too long")]
    Slow(SocketAddr),
    #[error("{0}")]
    Transport(#[from] tonic::transport::Error),
    #[error("{}", .0.message())]
    Refused(#[from] Status),
}

/// Reports to whoever leads, until it is dropped.
pub(crate) async fn report(shared: Arc<Shared>) {
    let mut leadership = shared.leadership.subscribe();
    shared.synced.all().await;
    loop {
        let known = leadership.borrow_and_update().clone();
        let Leadership::Follower(term) = known else {
            if leadership.changed().await.is_err() {
                return;
            }
            continue;
        };
        // A renewal of the Lease changes nothing that matters here.
        let other_term = leadership.wait_for(|known| *known != Leadership::Follower(term.clone()));
        tokio::select! {
            _ = other_term => continue,
            outcome = report_to(&shared, &term) => if let Err(error) = outcome {
                tracing::warn!(error = %error, leader = term.holder, "report to the leader broke off");
            }
        }
        shared.clock.sleep(RETRY).await;
    }
}

async fn report_to(shared: &Arc<Shared>, term: &Term) -> Result<(), ReportError> {
    let mut client = connect(shared, term.address().ok_or(ReportError::NoAddress)?).await?;
    let (sender, receiver) = mpsc::channel(1);
    let mut changed = shared.hub.subscribe();
    let mut waiting = shared.hub.change(crate::index::Index::own_acknowledgements);
    let first: Vec<Acknowledged> = waiting.drain(..waiting.len().min(BATCH)).collect();
    // The channel is empty, so there is room for the first message.
    sender.try_send(request(term, first)).ok();
    let answers = client.report(ReceiverStream::new(receiver)).await?;
    let mut answers = answers.into_inner();
    loop {
        let batch: Vec<Acknowledged> = if waiting.is_empty() {
            shared
                .hub
                .change(|index| index.untold_acknowledgements(BATCH))
        } else {
            waiting.drain(..waiting.len().min(BATCH)).collect()
        };
        if batch.is_empty() {
            tokio::select! {
                answer = answers.message() => match answer? {
                    Some(answer) => tell_again(shared, &answer),
                    None => return Ok(()),
                },
                changed = changed.changed() => if changed.is_err() {
                    return Ok(());
                },
            }
            shared.clock.sleep(GATHER).await;
            continue;
        }
        shared.metrics.reported("sent", batch.len());
        tokio::select! {
            sent = sender.send(request(term, batch)) => if sent.is_err() {
                return Ok(());
            },
            answer = answers.message() => match answer? {
                Some(answer) => tell_again(shared, &answer),
                None => return Ok(()),
            },
        }
    }
}

/// The leader's watch is behind ours; it will have caught up when this is told next.
fn tell_again(shared: &Shared, answer: &ReportResponse) {
    shared.metrics.reported("unknown", answer.unknown.len());
    shared.hub.change(|index| {
        for said in &answer.unknown {
            index.tell_again(said);
        }
    });
}

fn request(term: &Term, acknowledged: Vec<Acknowledged>) -> ReportRequest {
    ReportRequest {
        leader: term.holder.clone(),
        term: term.number,
        acknowledged,
    }
}

async fn connect(
    shared: &Shared,
    address: SocketAddr,
) -> Result<ReplicaClient<tonic::transport::Channel>, ReportError> {
    let connecting = async {
        let unreachable = |error| ReportError::Unreachable(address, error);
        let stream = TcpStream::connect(address).await.map_err(unreachable)?;
        stream.set_nodelay(true).map_err(unreachable)?;
        let clock = Arc::clone(&shared.clock);
        let store = Arc::clone(&shared.store);
        let connector = Connector::control_plane(store, CONNECT_TIMEOUT, clock);
        let (stream, _peer) = connector
            .connect(stream, &shared.id)
            .await
            .map_err(|error| ReportError::NotTheController(address, error))?;
        // The connection is made and authenticated; the channel cannot make another by itself.
        let ready = Arc::new(Mutex::new(Some(TokioIo::new(stream))));
        let connector = tower::service_fn(move |_uri: Uri| {
            let stream = ready.lock().unwrap_or_else(PoisonError::into_inner).take();
            std::future::ready(stream.ok_or_else(|| io::Error::from(io::ErrorKind::BrokenPipe)))
        });
        let endpoint = Endpoint::from_static(AUTHORITY)
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(10))
            .keep_alive_while_idle(true);
        let channel = endpoint.connect_with_connector(connector).await?;
        Ok(ReplicaClient::new(channel))
    };
    tokio::select! {
        connected = connecting => connected,
        () = shared.clock.sleep(CONNECT_TIMEOUT) => Err(ReportError::Slow(address)),
    }
}

/// Listens to a follower as long as this replica leads.
pub(crate) async fn listen(
    shared: Arc<Shared>,
    mut requests: Streaming<ReportRequest>,
    answers: mpsc::Sender<Result<ReportResponse, Status>>,
) {
    let mut leadership = shared.leadership.subscribe();
    loop {
        let message = tokio::select! {
            message = requests.message() => message,
            () = answers.closed() => return,
            changed = leadership.changed() => {
                if changed.is_err() || current(&shared).is_none() {
                    refuse(&answers);
                    return;
                }
                continue;
            }
        };
        let Ok(Some(request)) = message else {
            return;
        };
        let is_ours = current(&shared)
            .is_some_and(|term| term.holder == request.leader && term.number == request.term);
        if !is_ours {
            shared
                .metrics
                .reported("refused", request.acknowledged.len());
            refuse(&answers);
            return;
        }
        shared
            .metrics
            .reported("received", request.acknowledged.len());
        let unknown = shared.hub.change(|index| {
            let mut said = request.acknowledged;
            said.retain(|said| !index.hear(said));
            said
        });
        if !unknown.is_empty() && answers.send(Ok(ReportResponse { unknown })).await.is_err() {
            return;
        }
    }
}

fn current(shared: &Shared) -> Option<Term> {
    let now = shared.clock.now();
    shared.leadership.borrow().leads(now).cloned()
}

fn refuse(answers: &mpsc::Sender<Result<ReportResponse, Status>>) {
    let status = Status::failed_precondition("not the leader of that term");
    answers.try_send(Err(status)).ok();
}
