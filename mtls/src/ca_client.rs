//! The client of our CA: gRPC over our own TLS.
//!
//! Invariants: exactly the CA's identity is at the other end, by roots that we already have, before
//! the first byte of a request is sent; every call opens a connection of its own, so the SVID that
//! the CA sees is the SVID that the caller named; and every wait has a bound.

use std::fmt;
use std::future::Future;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::crypto::CryptoProvider;
use rustls_pki_types::CertificateDer;
use sidegate_api::identity::identity_client::IdentityClient;
use sidegate_api::identity::issue_svid_request::Evidence as EvidenceMessage;
use sidegate_api::identity::{self as proto, IssueSvidRequest, WatchBundleRequest};
use sidegate_mesh::clock::Clock;
use sidegate_mesh::spiffe::{SpiffeId, SpiffeIdError, TrustDomain};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::client::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::bundle::TrustUpdate;
use crate::handshake::{Attempt, HandshakeError, Tls, TlsProfile};
use crate::issue::{
    Acknowledgement, BoxFuture, BundleStream, BundleWatch, Evidence, Issue, IssueError,
    IssueRequest,
};
use crate::svid::Svid;
use crate::verify::Verifier;

/// Acknowledgements that may wait for the network.
const ACKNOWLEDGEMENTS_MAX: usize = 16;
/// Largest service account token that is sent.
const TOKEN_BYTES_MAX: u64 = 64 * 1024;
/// The authority of each request; nobody resolves it.
const AUTHORITY: &str = "http://sidegate-ca";

/// The identity of a part of the control plane, such as `sidegate-ca`.
///
/// # Errors
///
/// [`SpiffeIdError`] when the name may not be part of an ID.
pub fn control_plane_id(trust_domain: &TrustDomain, name: &str) -> Result<SpiffeId, SpiffeIdError> {
    SpiffeId::for_workload(trust_domain, "sidegate-system", name)
}

/// Where the CA is, and what to say to it.
#[derive(Clone, Debug)]
pub struct CaClientConfig {
    /// `host:port`.
    pub address: String,
    /// Exactly who has to answer there; see [`control_plane_id`].
    pub ca_id: SpiffeId,
    /// What proves who we are before there is an SVID.
    pub evidence: Evidence,
    /// Bound for TCP and TLS together.
    pub connect_timeout: Duration,
    /// Bound for one call, or for the answer's head of a stream.
    pub call_timeout: Duration,
}

impl CaClientConfig {
    /// The CA of `trust_domain` at `address`, with the usual bounds: 5 s to connect, 10 s a call.
    ///
    /// # Errors
    ///
    /// Never for a trust domain that exists; the type cannot say so.
    pub fn new(
        trust_domain: &TrustDomain,
        address: impl Into<String>,
        evidence: Evidence,
    ) -> Result<Self, SpiffeIdError> {
        Ok(Self {
            address: address.into(),
            ca_id: control_plane_id(trust_domain, "sidegate-ca")?,
            evidence,
            connect_timeout: Duration::from_secs(5),
            call_timeout: Duration::from_secs(10),
        })
    }
}

/// Asks the CA for certificates and follows its bundle.
pub struct CaClient {
    config: CaClientConfig,
    provider: Arc<CryptoProvider>,
    clock: Arc<dyn Clock>,
}

impl CaClient {
    /// Connects to nothing yet.
    pub fn new(
        config: CaClientConfig,
        provider: Arc<CryptoProvider>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self {
            config,
            provider,
            clock,
        }
    }

    async fn issue_svid(
        &self,
        request: IssueRequest,
    ) -> Result<Vec<CertificateDer<'static>>, IssueError> {
        // Read before the connection is made: without evidence there is nothing to connect for.
        let evidence = self.evidence(request.current.as_ref()).await?;
        let mut client = self
            .client(&request.verifier, request.current.as_ref())
            .await?;
        let message = IssueSvidRequest {
            csr: request.csr,
            evidence: Some(evidence),
        };
        let call = client.issue_svid(message);
        let answer = self.within(self.config.call_timeout, call).await?;
        let answer = answer.map_err(|status| refused(&status))?.into_inner();
        Ok(answer.chain.into_iter().map(CertificateDer::from).collect())
    }

    async fn follow_bundle(&self, watch: BundleWatch) -> Result<BundleStream, IssueError> {
        let mut client = self.client(&watch.verifier, watch.current.as_ref()).await?;
        let (acknowledgements, receiver) = mpsc::channel(ACKNOWLEDGEMENTS_MAX);
        let first = futures_util::stream::iter([watch.acknowledgement]);
        let requests = first
            .chain(ReceiverStream::new(receiver))
            .map(watch_request);
        let call = client.watch_bundle(requests);
        let answer = self.within(self.config.call_timeout, call).await?;
        let messages = answer.map_err(|status| refused(&status))?.into_inner();
        let updates = messages.map(|message| {
            message
                .map(TrustUpdate::new)
                .map_err(|status| refused(&status))
        });
        Ok(BundleStream {
            updates: Box::pin(updates),
            acknowledgements,
        })
    }

    async fn evidence(&self, current: Option<&Arc<Svid>>) -> Result<EvidenceMessage, IssueError> {
        match (&self.config.evidence, current) {
            // In a cluster every issuance attests anew; an SVID is never evidence there.
            (Evidence::ServiceAccountToken(path), _) => {
                let token = read_token(path).await.map_err(|error| {
                    IssueError::NoEvidence(format!(
                        "service account token {}: {error}",
                        path.display()
                    ))
                })?;
                Ok(EvidenceMessage::ServiceAccountToken(
                    proto::ServiceAccountToken { token },
                ))
            }
            (_, Some(_)) => Ok(EvidenceMessage::CurrentSvid(proto::CurrentSvid {})),
            (Evidence::JoinToken(token), None) => {
                Ok(EvidenceMessage::JoinToken(proto::JoinToken {
                    token: token.expose().to_owned(),
                }))
            }
            (Evidence::None, None) => Err(IssueError::NoEvidence(
                "there is no usable SVID and no join token; make one with \
                 `sidegate-ca token create`"
                    .into(),
            )),
        }
    }

    async fn client(
        &self,
        verifier: &Arc<Verifier>,
        svid: Option<&Arc<Svid>>,
    ) -> Result<IdentityClient<Channel>, IssueError> {
        let connect = self.connect(verifier, svid);
        let stream = self.within(self.config.connect_timeout, connect).await??;
        let endpoint = Endpoint::from_static(AUTHORITY)
            .http2_keep_alive_interval(Duration::from_secs(20))
            .keep_alive_timeout(Duration::from_secs(10))
            .keep_alive_while_idle(true);
        // The connection is made and authenticated already; it is handed over once, so that the
        // channel cannot make another one by itself.
        let ready = Arc::new(Mutex::new(Some(TokioIo::new(stream))));
        let connector = tower::service_fn(move |_uri: Uri| {
            let stream = ready.lock().unwrap_or_else(PoisonError::into_inner).take();
            std::future::ready(stream.ok_or_else(|| io::Error::from(io::ErrorKind::BrokenPipe)))
        });
        let channel = endpoint.connect_with_connector(connector);
        let channel = self.within(self.config.connect_timeout, channel).await?;
        let channel = channel.map_err(|error| IssueError::Failed(error.to_string()))?;
        Ok(IdentityClient::new(channel))
    }

    async fn connect(
        &self,
        verifier: &Arc<Verifier>,
        svid: Option<&Arc<Svid>>,
    ) -> Result<TlsStream<TcpStream>, IssueError> {
        let address = || self.config.address.clone();
        let unreachable = |source| IssueError::Unreachable {
            address: address(),
            source,
        };
        let not_the_ca = |source| IssueError::NotTheCa {
            address: address(),
            source,
        };
        let tls = Tls::build(&self.provider, &self.clock, verifier, svid)
            .map_err(|error| not_the_ca(HandshakeError::Tls(error)))?;
        let io = TcpStream::connect(&self.config.address)
            .await
            .map_err(unreachable)?;
        io.set_nodelay(true).map_err(unreachable)?;
        let attempt = Attempt {
            tls: &tls,
            verifier,
            credentials: None,
            profile: TlsProfile::ControlPlane,
        };
        match attempt.connect(io, &self.config.ca_id).await {
            Ok((stream, _peer)) => Ok(stream),
            Err(HandshakeError::Io(source)) => Err(unreachable(source)),
            Err(error) => Err(not_the_ca(error)),
        }
    }

    async fn within<F: Future>(&self, bound: Duration, call: F) -> Result<F::Output, IssueError> {
        tokio::select! {
            biased;
            output = call => Ok(output),
            () = self.clock.sleep(bound) => Err(IssueError::Timeout { after_ms: bound.as_millis() }),
        }
    }
}

impl Issue for CaClient {
    fn issue(
        &self,
        request: IssueRequest,
    ) -> BoxFuture<'_, Result<Vec<CertificateDer<'static>>, IssueError>> {
        Box::pin(self.issue_svid(request))
    }

    fn watch_bundle(&self, watch: BundleWatch) -> BoxFuture<'_, Result<BundleStream, IssueError>> {
        Box::pin(self.follow_bundle(watch))
    }
}

impl fmt::Debug for CaClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CaClient")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

fn watch_request(acknowledgement: Acknowledgement) -> WatchBundleRequest {
    WatchBundleRequest {
        acknowledged_sequence: acknowledgement.sequence,
        root_sha256: acknowledgement
            .root_sha256
            .iter()
            .map(|hash| hash.to_vec())
            .collect(),
        leaf_issuer_key_id: acknowledgement.leaf_issuer_key_id,
        refusal: acknowledgement.refusal,
    }
}

async fn read_token(path: &std::path::Path) -> io::Result<String> {
    let size = tokio::fs::metadata(path).await?.len();
    if size > TOKEN_BYTES_MAX {
        return Err(io::Error::other("larger than 64 KiB"));
    }
    let token = tokio::fs::read_to_string(path).await?;
    Ok(token.trim().to_owned())
}

fn refused(status: &Status) -> IssueError {
    let code = match status.code() {
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::Unauthenticated => "UNAUTHENTICATED",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Unavailable => "UNAVAILABLE",
        _ => return IssueError::Failed(format!("{}: {}", status.code(), status.message())),
    };
    IssueError::Refused {
        code,
        message: status.message().to_owned(),
        wants_new_key: status.code() == Code::InvalidArgument,
    }
}
