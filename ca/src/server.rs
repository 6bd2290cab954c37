//! What sidecars talk to: gRPC over TLS 1.3, as the CA's own SPIFFE ID.
//!
//! A caller need not show a certificate, since it may come for its first one; a certificate that it
//! shows must be good. So a request carries an identity only if TLS has proved it.
//!
//! Invariant: connections, handshakes, streams and messages are bounded, and callers without a
//! certificate cannot use up what those with one need.

use std::sync::Arc;
use std::time::Duration;

use sidegate_api::identity::identity_server::{Identity, IdentityServer};
use sidegate_api::identity::issue_svid_request::Evidence as EvidenceMessage;
use sidegate_api::identity::{
    IssueSvidRequest, IssueSvidResponse, WatchBundleRequest, WatchBundleResponse,
};
use sidegate_mtls::{Caller, Door, DoorLimits, Doorkeeper, PeerCertificate};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use crate::digest::Digest;
use crate::issuance::{Attested, EvidenceError, Refusal};
use crate::issuer::Issuer;
use crate::kubernetes::attest::Attestor;
use crate::ledger::Evidence;

/// How often an idle connection is asked whether it is still there.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
/// How long it may take to answer.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Largest header list of a request.
const HEADER_BYTES_MAX: u32 = 16 * 1024;

/// Serves the identity API until `cancel`, then lets open calls end.
///
/// # Errors
///
/// What gRPC's transport says.
pub(crate) async fn serve(
    listener: TcpListener,
    issuer: Arc<Issuer>,
    cancel: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let limits = &issuer.config.limits;
    let door = DoorLimits {
        connections_max: limits.connections_max,
        anonymous_max: Some(limits.connections_max / 2),
        handshakes_max: limits.handshakes_max,
        handshake_timeout: limits.handshake_timeout,
    };
    let keeper = Arc::<Issuer>::clone(&issuer);
    let door = Door::new(Arc::clone(&issuer.store), door, keeper);
    let incoming = door.open(listener, &issuer.tracker, cancel.clone());
    let service = IdentityService {
        issuer: Arc::clone(&issuer),
        cancel: cancel.clone(),
    };
    let service = IdentityServer::new(service).max_decoding_message_size(limits.message_bytes_max);
    Server::builder()
        .timeout(limits.request_timeout)
        .max_concurrent_streams(limits.streams_per_connection_max)
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, cancel.cancelled_owned())
        .await
}

impl Doorkeeper for Issuer {
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

struct IdentityService {
    issuer: Arc<Issuer>,
    cancel: CancellationToken,
}

#[tonic::async_trait]
impl Identity for IdentityService {
    async fn issue_svid(
        &self,
        request: Request<IssueSvidRequest>,
    ) -> Result<Response<IssueSvidResponse>, Status> {
        let caller = caller(&request)?;
        let issued = self.issue(&caller, request.into_inner()).await;
        issued.map(Response::new).map_err(|refusal| {
            self.issuer.metrics.refused(refusal.code());
            tracing::debug!(
                peer.addr = %caller.address,
                peer.id = certificate(&caller).map(|shown| shown.id.as_str()),
                reason = refusal.code(),
                "svid refused"
            );
            refusal.status()
        })
    }

    type WatchBundleStream = ReceiverStream<Result<WatchBundleResponse, Status>>;

    async fn watch_bundle(
        &self,
        request: Request<Streaming<WatchBundleRequest>>,
    ) -> Result<Response<Self::WatchBundleStream>, Status> {
        let caller = caller(&request)?;
        let max = self.issuer.config.limits.watchers_max;
        let stream = {
            let registry = self.issuer.registry();
            let named = certificate(&caller).and_then(|shown| {
                let serial = crate::digest::Serial::from_bytes(shown.serial.as_bytes())?;
                let lineage = registry.certificate(&serial).map(|issued| issued.lineage);
                // Another replica may have issued it.
                let lineage = lineage.or(self.issuer.cluster.as_ref().map(|_| serial))?;
                Some((shown.id.clone(), lineage))
            });
            self.issuer.watchers().open(named, caller.address, max)
        };
        let stream = stream.ok_or_else(|| {
            self.issuer.metrics.refused("watchers_max");
            Status::resource_exhausted("too many bundle streams are open; try again later")
        })?;
        // One: a caller that reads slowly gets the latest bundle, not all of them.
        let (answers, receiver) = mpsc::channel(1);
        let watch = Watch {
            issuer: Arc::clone(&self.issuer),
            stream,
            answers,
        };
        let cancel = self.cancel.clone();
        self.issuer
            .tracker
            .spawn(watch.run(request.into_inner(), cancel));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

impl IdentityService {
    async fn issue(
        &self,
        caller: &Caller,
        message: IssueSvidRequest,
    ) -> Result<IssueSvidResponse, Refusal> {
        let attested = self.attest(caller, message.evidence).await?;
        let kind = match attested.evidence {
            Evidence::JoinToken(_) => "join-token",
            Evidence::Svid(_) => "svid",
            Evidence::Pod(_) => "pod",
            Evidence::Own => "self",
        };
        let spiffe_id = attested.id.to_string();
        let chain = self.issuer.issue(&message.csr, attested).await?;
        self.issuer.metrics.issued(kind);
        Ok(IssueSvidResponse {
            chain: chain.iter().map(|der| der.to_vec()).collect(),
            spiffe_id,
        })
    }

    async fn attest(
        &self,
        caller: &Caller,
        evidence: Option<EvidenceMessage>,
    ) -> Result<Attested, Refusal> {
        if let Some(cluster) = &self.issuer.cluster {
            return self.attest_pod(&cluster.attestor, caller, evidence).await;
        }
        let now = self.issuer.clock.now();
        match evidence {
            Some(EvidenceMessage::JoinToken(token)) => {
                self.issuer.registry().attest_token(&token.token, now)
            }
            Some(EvidenceMessage::CurrentSvid(_)) => {
                let shown = certificate(caller).ok_or(EvidenceError::NoCertificate)?;
                // Again, since the handshake may be long past and a root or the caller gone.
                let verifier = self.issuer.verifier();
                let peer = verifier
                    .verify(&shown.chain, now, Some(&shown.id))
                    .map_err(EvidenceError::Certificate)?;
                self.issuer.registry().attest_svid(&peer)
            }
            Some(EvidenceMessage::ServiceAccountToken(_)) => {
                Err(EvidenceError::NotInACluster.into())
            }
            None => Err(EvidenceError::Missing.into()),
        }
    }

    /// In a cluster every certificate is attested anew.
    async fn attest_pod(
        &self,
        attestor: &Attestor,
        caller: &Caller,
        evidence: Option<EvidenceMessage>,
    ) -> Result<Attested, Refusal> {
        let Some(EvidenceMessage::ServiceAccountToken(shown)) = evidence else {
            return Err(EvidenceError::InACluster.into());
        };
        let mut attested = attestor.attest(&shown.token, caller.address).await?;
        // Its key may not be certified a second time; otherwise it proves nothing here.
        let shown = certificate(caller);
        attested.key = shown.and_then(|shown| Digest::from_bytes(&shown.public_key_sha256));
        Ok(attested)
    }
}

/// One open `WatchBundle` stream.
struct Watch {
    issuer: Arc<Issuer>,
    stream: u64,
    answers: mpsc::Sender<Result<WatchBundleResponse, Status>>,
}

impl Watch {
    async fn run(self, mut requests: Streaming<WatchBundleRequest>, cancel: CancellationToken) {
        let mut bundle = self.issuer.subscribe();
        bundle.mark_changed();
        let mut listening = true;
        loop {
            tokio::select! {
                () = cancel.cancelled() => break,
                () = self.answers.closed() => break,
                changed = bundle.changed() => {
                    let message = bundle.borrow_and_update().as_ref().clone();
                    if changed.is_err() || !self.send(message, &mut requests, &mut listening).await {
                        break;
                    }
                }
                message = requests.message(), if listening => {
                    listening = self.hear(message);
                }
            }
        }
    }

    /// Acknowledgements are heard also while a slow reader keeps the answer waiting.
    async fn send(
        &self,
        message: WatchBundleResponse,
        requests: &mut Streaming<WatchBundleRequest>,
        listening: &mut bool,
    ) -> bool {
        let sending = self.answers.send(Ok(message));
        tokio::pin!(sending);
        loop {
            tokio::select! {
                sent = &mut sending => return sent.is_ok(),
                message = requests.message(), if *listening => {
                    *listening = self.hear(message);
                }
            }
        }
    }

    /// Whether there may be more to hear.
    fn hear(&self, message: Result<Option<WatchBundleRequest>, Status>) -> bool {
        let Ok(Some(message)) = message else {
            return false;
        };
        let published = self.issuer.registry().sequence();
        let mut watchers = self.issuer.watchers();
        watchers.acknowledge(self.stream, &message, published);
        true
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.issuer.watchers().close(self.stream);
    }
}

fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    let caller = request.extensions().get::<Caller>();
    caller
        .cloned()
        .ok_or_else(|| Status::internal("the connection has no facts"))
}

/// The certificate that a caller showed.
fn certificate(caller: &Caller) -> Option<&Arc<PeerCertificate>> {
    caller.peer.as_ref().map(|peer| &peer.certificate)
}
