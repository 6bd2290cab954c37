//! Handshakes: from a byte stream to an authenticated peer.
//!
//! Each handshake loads the credentials once, and gets a [`PeerCheck`] of its own: that is how the
//! reason of a refusal, and the identity that the refused peer claimed, reach the log, while the
//! peer itself only sees the alert that fits best.
//!
//! Invariants: TLS 1.3 only; both ends agree on the ALPN name or the connection is refused; nothing
//! is resumed (no tickets, no session storage, no early data), so each connection is judged by the
//! trust of its own moment; a client accepts exactly the identity that it came for.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, WantsServerCert};
use rustls::sign::SingleCertAndKey;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ConfigBuilder, DigitallySignedStruct,
    DistinguishedName, ServerConfig, SignatureScheme, WantsVerifier,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use sidegate_mesh::clock::Clock;
use sidegate_mesh::spiffe::SpiffeId;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use crate::certificate::{Serial, claimed_identity};
use crate::credentials::{ClockTime, CredentialStore, Credentials, system_time};
use crate::provider::SIGNATURES;
use crate::svid::Svid;
use crate::verify::{PeerCertificate, Verifier, VerifyError};

/// The protocol between two sidecars, and its version.
pub const ALPN: &[u8] = b"sidegate/1";
/// HTTP/2 as gRPC speaks it, between a sidecar and the control plane.
pub const ALPN_H2: &[u8] = b"h2";

/// TLS needs a name where SPIFFE has none. It is never sent (SNI is off) and never compared.
const UNUSED_SERVER_NAME: &str = "sidegate.invalid";

/// Who is at the other end of a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its identity.
    pub id: SpiffeId,
    /// Its certificate's serial number.
    pub serial: Serial,
    /// The connection's end: the earlier `not_after` of the two ends.
    pub not_after: SystemTime,
    /// The epoch of the credentials that this end used.
    pub epoch: u64,
    /// As the access log says it.
    pub tls_version: &'static str,
    /// The whole verified chain, to be asked about again when trust changes.
    pub certificate: Arc<PeerCertificate>,
}

/// Why a connection has no authenticated peer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// This process has no SVID yet.
    #[error("there are no credentials yet")]
    NotReady,
    /// The peer was too slow.
    #[error("the handshake took longer than {after:?}")]
    Timeout {
        /// The bound.
        after: Duration,
    },
    /// The peer's certificate is not believed.
    #[error("the peer's certificate is refused")]
    Certificate {
        /// Why.
        #[source]
        reason: VerifyError,
        /// Who it says that it is. Unverified; for the log only.
        claimed: Option<String>,
    },
    /// The two ends speak no common protocol version, or the peer does not say one.
    #[error("no common application protocol")]
    Alpn {
        /// The identity of the peer, where it was verified before this was noticed.
        claimed: Option<String>,
    },
    /// The peer refused us.
    #[error("the peer refused with alert {alert:?}")]
    Refused {
        /// Its words.
        alert: AlertDescription,
    },
    /// The peer does not speak the TLS that we speak.
    #[error("TLS")]
    Tls(#[source] rustls::Error),
    /// The connection broke.
    #[error("connection lost during the handshake")]
    Io(#[source] io::Error),
}

impl HandshakeError {
    /// The reason's code, as the log and the metrics show it.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotReady => "not_ready",
            Self::Timeout { .. } => "handshake_timeout",
            Self::Certificate { reason, .. } => reason.code(),
            Self::Alpn { .. } => "alpn",
            Self::Refused { .. } => "refused_by_peer",
            Self::Tls(_) => "tls",
            Self::Io(_) => "connection_lost",
        }
    }

    /// Who the refused peer says that it is. Nothing of it is verified.
    pub fn claimed(&self) -> Option<&str> {
        match self {
            Self::Certificate { claimed, .. } | Self::Alpn { claimed } => claimed.as_deref(),
            _ => None,
        }
    }

    /// The certificate's fault, if that is what it was.
    pub fn certificate(&self) -> Option<&VerifyError> {
        match self {
            Self::Certificate { reason, .. } => Some(reason),
            _ => None,
        }
    }
}

/// What the first bytes of a TLS connection say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hello {
    /// More bytes are needed.
    Incomplete,
    /// A sidecar: it offers [`ALPN`].
    Mesh,
    /// Anybody else, whose TLS is not ours to end.
    Foreign,
}

/// Reads the begin of a connection, up to the end of its `ClientHello`. Nothing of it is verified:
/// it only says for whom the connection is meant.
#[derive(Default)]
pub struct HelloReader {
    acceptor: rustls::server::Acceptor,
    read: usize,
}

impl HelloReader {
    /// Longest begin of a connection that is worth waiting for: no sidecar's is longer.
    pub const BYTES_MAX: usize = 16 * 1024;

    /// What is known after these further bytes.
    pub fn read(&mut self, bytes: &[u8]) -> Hello {
        self.read += bytes.len();
        let mut rest = bytes;
        while !rest.is_empty() {
            if !matches!(self.acceptor.read_tls(&mut rest), Ok(1..)) {
                return Hello::Foreign;
            }
            match self.acceptor.accept() {
                Ok(None) => {}
                Ok(Some(hello)) => {
                    let hello = hello.client_hello();
                    let mut offers = hello.alpn().into_iter().flatten();
                    let mesh = offers.any(|offer| offer == ALPN);
                    return if mesh { Hello::Mesh } else { Hello::Foreign };
                }
                Err(_) => return Hello::Foreign,
            }
        }
        if self.read < Self::BYTES_MAX {
            Hello::Incomplete
        } else {
            Hello::Foreign
        }
    }
}

impl fmt::Debug for HelloReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HelloReader")
            .field("read", &self.read)
            .finish_non_exhaustive()
    }
}

/// What kind of peers an [`Acceptor`] lets in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsProfile {
    /// Sidecars: a certificate is required, ALPN `sidegate/1`.
    Mesh,
    /// The control plane's gRPC port: ALPN `h2`; a client without an SVID may come in too, but a
    /// certificate that is presented must be good.
    ControlPlane,
}

impl TlsProfile {
    fn alpn(self) -> &'static [u8] {
        match self {
            Self::Mesh => ALPN,
            Self::ControlPlane => ALPN_H2,
        }
    }
}

/// The server's end.
#[derive(Clone)]
pub struct Acceptor {
    store: Arc<CredentialStore>,
    timeout: Duration,
    clock: Arc<dyn Clock>,
    profile: TlsProfile,
}

impl Acceptor {
    /// Accepts sidecars; a handshake may take `timeout`.
    pub fn new(store: Arc<CredentialStore>, timeout: Duration, clock: Arc<dyn Clock>) -> Self {
        Self {
            store,
            timeout,
            clock,
            profile: TlsProfile::Mesh,
        }
    }

    /// As [`Self::new`], for the control plane's gRPC port; use [`Self::accept_optional`].
    pub fn control_plane(
        store: Arc<CredentialStore>,
        timeout: Duration,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self {
            profile: TlsProfile::ControlPlane,
            ..Self::new(store, timeout, clock)
        }
    }

    /// Authenticates the client at the other end of `io`.
    ///
    /// # Errors
    ///
    /// [`HandshakeError`]; the connection is closed then, after an alert where one fits.
    pub async fn accept<IO>(&self, io: IO) -> Result<(server::TlsStream<IO>, Peer), HandshakeError>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let (stream, peer) = self.accept_optional(io).await?;
        let peer = peer.ok_or(HandshakeError::Certificate {
            reason: VerifyError::NoCertificate,
            claimed: None,
        })?;
        Ok((stream, peer))
    }

    /// As [`Self::accept`]; the peer is `None` when it presented no certificate, which only
    /// [`Self::control_plane`] lets in.
    ///
    /// # Errors
    ///
    /// As [`Self::accept`].
    pub async fn accept_optional<IO>(
        &self,
        io: IO,
    ) -> Result<(server::TlsStream<IO>, Option<Peer>), HandshakeError>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let credentials = self.store.current().ok_or(HandshakeError::NotReady)?;
        let check = PeerCheck::new(Arc::clone(credentials.verifier()), None, self.profile);
        let check = Arc::new(check);
        let config = credentials
            .tls()
            .server_config(&check, self.profile)
            .map_err(HandshakeError::Tls)?;
        let handshake = TlsAcceptor::from(Arc::new(config)).accept(io);
        let result = within(&*self.clock, self.timeout, handshake).await?;
        let stream = result.map_err(|error| check.explain(error))?;
        let (_, connection) = stream.get_ref();
        check.require_alpn(connection.alpn_protocol())?;
        let peer = check.peer(connection.protocol_version(), Some(&credentials));
        Ok((stream, peer))
    }
}

impl fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acceptor")
            .field("profile", &self.profile)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

/// The client's end.
#[derive(Clone)]
pub struct Connector {
    store: Arc<CredentialStore>,
    timeout: Duration,
    clock: Arc<dyn Clock>,
    profile: TlsProfile,
}

impl Connector {
    /// Connects to sidecars; a handshake may take `timeout`.
    pub fn new(store: Arc<CredentialStore>, timeout: Duration, clock: Arc<dyn Clock>) -> Self {
        Self {
            store,
            timeout,
            clock,
            profile: TlsProfile::Mesh,
        }
    }

    /// As [`Self::new`], to a control plane's gRPC port.
    pub fn control_plane(
        store: Arc<CredentialStore>,
        timeout: Duration,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self {
            profile: TlsProfile::ControlPlane,
            ..Self::new(store, timeout, clock)
        }
    }

    /// Makes sure that exactly `expected` is at the other end of `io`. Nothing but the handshake
    /// is sent before that is known.
    ///
    /// In TLS 1.3 the client is done before the server has judged the client's certificate: a
    /// refusal of ours shows as an error of the first read.
    ///
    /// # Errors
    ///
    /// [`HandshakeError`]; the connection is closed then.
    pub async fn connect<IO>(
        &self,
        io: IO,
        expected: &SpiffeId,
    ) -> Result<(client::TlsStream<IO>, Peer), HandshakeError>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let credentials = self.store.current().ok_or(HandshakeError::NotReady)?;
        let attempt = Attempt {
            tls: credentials.tls(),
            verifier: credentials.verifier(),
            credentials: Some(&credentials),
            profile: self.profile,
        };
        let handshake = attempt.connect(io, expected);
        within(&*self.clock, self.timeout, handshake).await?
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector")
            .field("profile", &self.profile)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

/// One client handshake, also one without credentials of our own: the first call to the CA.
pub(crate) struct Attempt<'a> {
    pub(crate) tls: &'a Tls,
    pub(crate) verifier: &'a Arc<Verifier>,
    pub(crate) credentials: Option<&'a Arc<Credentials>>,
    pub(crate) profile: TlsProfile,
}

impl Attempt<'_> {
    pub(crate) async fn connect<IO>(
        &self,
        io: IO,
        expected: &SpiffeId,
    ) -> Result<(client::TlsStream<IO>, Peer), HandshakeError>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let check = Arc::new(PeerCheck::new(
            Arc::clone(self.verifier),
            Some(expected.clone()),
            self.profile,
        ));
        let config = self.tls.client_config(&check, self.profile);
        let name = ServerName::try_from(UNUSED_SERVER_NAME)
            .map_err(|error| HandshakeError::Tls(rustls::Error::General(error.to_string())))?;
        let handshake = TlsConnector::from(Arc::new(config)).connect(name, io);
        let stream = handshake.await.map_err(|error| check.explain(error))?;
        let (_, connection) = stream.get_ref();
        check.require_alpn(connection.alpn_protocol())?;
        let peer = check.peer(connection.protocol_version(), self.credentials);
        // rustls asks the check for every server, so there is always an outcome here.
        let peer = peer.ok_or(HandshakeError::Certificate {
            reason: VerifyError::NoCertificate,
            claimed: None,
        })?;
        Ok((stream, peer))
    }
}

/// The parts of both configurations that are made once an epoch.
pub(crate) struct Tls {
    client: ClientConfig,
    server: Option<ServerParts>,
    provider: Arc<CryptoProvider>,
    time: Arc<ClockTime>,
}

struct ServerParts {
    certified: Arc<SingleCertAndKey>,
}

impl Tls {
    /// Configurations that show `svid`, if there is one, and believe what `verifier` believes.
    pub(crate) fn build(
        provider: &Arc<CryptoProvider>,
        clock: &Arc<dyn Clock>,
        verifier: &Arc<Verifier>,
        svid: Option<&Arc<Svid>>,
    ) -> Result<Self, rustls::Error> {
        let time = Arc::new(ClockTime(Arc::clone(clock)));
        let check = PeerCheck::new(Arc::clone(verifier), None, TlsProfile::Mesh);
        let builder = ClientConfig::builder_with_details(
            Arc::clone(provider),
            Arc::<ClockTime>::clone(&time),
        )
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(check));
        let certified =
            svid.map(|svid| Arc::new(SingleCertAndKey::from(Arc::clone(svid.certified()))));
        let mut client = match &certified {
            Some(certified) => {
                builder.with_client_cert_resolver(Arc::<SingleCertAndKey>::clone(certified))
            }
            None => builder.with_no_client_auth(),
        };
        client.resumption = Resumption::disabled();
        client.enable_sni = false;
        client.enable_early_data = false;
        Ok(Self {
            client,
            server: certified.map(|certified| ServerParts { certified }),
            provider: Arc::clone(provider),
            time,
        })
    }

    fn client_config(&self, check: &Arc<PeerCheck>, profile: TlsProfile) -> ClientConfig {
        let mut config = self.client.clone();
        config
            .dangerous()
            .set_certificate_verifier(Arc::<PeerCheck>::clone(check));
        config.alpn_protocols = vec![profile.alpn().to_vec()];
        config
    }

    fn server_config(
        &self,
        check: &Arc<PeerCheck>,
        profile: TlsProfile,
    ) -> Result<ServerConfig, rustls::Error> {
        let config = self
            .server_builder()?
            .with_client_cert_verifier(Arc::<PeerCheck>::clone(check));
        self.finish_server(config, vec![profile.alpn().to_vec()])
    }

    /// A server that asks no certificate of its clients.
    fn open_server_config(&self, protocols: &[&[u8]]) -> Result<ServerConfig, rustls::Error> {
        let config = self.server_builder()?.with_no_client_auth();
        let protocols = protocols.iter().map(|name| name.to_vec()).collect();
        self.finish_server(config, protocols)
    }

    fn server_builder(&self) -> Result<ConfigBuilder<ServerConfig, WantsVerifier>, rustls::Error> {
        ServerConfig::builder_with_details(
            Arc::clone(&self.provider),
            Arc::<ClockTime>::clone(&self.time),
        )
        .with_protocol_versions(&[&rustls::version::TLS13])
    }

    fn finish_server(
        &self,
        config: ConfigBuilder<ServerConfig, WantsServerCert>,
        protocols: Vec<Vec<u8>>,
    ) -> Result<ServerConfig, rustls::Error> {
        let server = self.server.as_ref();
        let server = server.ok_or_else(|| rustls::Error::General("no certificate".into()))?;
        let mut config =
            config.with_cert_resolver(Arc::<SingleCertAndKey>::clone(&server.certified));
        // Our order of suites, not the client's: where a sidecar runs AES-128-GCM costs the least.
        config.ignore_client_order = true;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        config.alpn_protocols = protocols;
        Ok(config)
    }
}

/// The server's configuration for one connection of clients outside the mesh, such as the API
/// server, which know us by a DNS name in our certificate. They are asked for no certificate, and
/// nothing about them is known afterwards.
///
/// # Errors
///
/// [`HandshakeError::Tls`] when rustls refuses the configuration.
pub fn server_config_open(
    credentials: &Credentials,
    protocols: &[&[u8]],
) -> Result<ServerConfig, HandshakeError> {
    let config = credentials.tls().open_server_config(protocols);
    config.map_err(HandshakeError::Tls)
}

/// The server's configuration for one connection of the control plane's gRPC port, and the check
/// that knows afterwards who came. [`Acceptor::control_plane`] does both; this is for a server that
/// drives rustls itself.
///
/// # Errors
///
/// [`HandshakeError::Tls`] when rustls refuses the configuration.
pub fn server_config_optional_client(
    credentials: &Credentials,
) -> Result<(ServerConfig, Arc<PeerCheck>), HandshakeError> {
    let verifier = Arc::clone(credentials.verifier());
    let check = Arc::new(PeerCheck::new(verifier, None, TlsProfile::ControlPlane));
    let config = credentials
        .tls()
        .server_config(&check, TlsProfile::ControlPlane)
        .map_err(HandshakeError::Tls)?;
    Ok((config, check))
}

/// The verifier of one handshake: remembers what it saw.
#[derive(Debug)]
pub struct PeerCheck {
    verifier: Arc<Verifier>,
    expected: Option<SpiffeId>,
    profile: TlsProfile,
    verified: OnceLock<Arc<PeerCertificate>>,
    refusal: Mutex<Option<Refusal>>,
}

#[derive(Debug)]
struct Refusal {
    reason: VerifyError,
    claimed: Option<String>,
}

impl PeerCheck {
    fn new(verifier: Arc<Verifier>, expected: Option<SpiffeId>, profile: TlsProfile) -> Self {
        Self {
            verifier,
            expected,
            profile,
            verified: OnceLock::new(),
            refusal: Mutex::new(None),
        }
    }

    /// The peer's certificate, once it was verified.
    pub fn certificate(&self) -> Option<&Arc<PeerCertificate>> {
        self.verified.get()
    }

    fn judge(
        &self,
        leaf: &CertificateDer<'_>,
        issuers: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let chain: Vec<CertificateDer<'_>> =
            std::iter::once(leaf).chain(issuers).cloned().collect();
        let now = system_time(now);
        match self.verifier.verify(&chain, now, self.expected.as_ref()) {
            Ok(certificate) => {
                self.verified.get_or_init(|| Arc::new(certificate));
                Ok(())
            }
            Err(reason) => {
                let alert = rustls::Error::InvalidCertificate(reason.for_tls());
                let claimed = claimed_identity(leaf);
                *self.refusal() = Some(Refusal { reason, claimed });
                Err(alert)
            }
        }
    }

    /// Turns what rustls says into what happened.
    fn explain(&self, error: io::Error) -> HandshakeError {
        if let Some(Refusal { reason, claimed }) = self.refusal().take() {
            return HandshakeError::Certificate { reason, claimed };
        }
        let claimed = || self.certificate().map(|peer| peer.id.to_string());
        let error = match error.downcast::<rustls::Error>() {
            Ok(error) => error,
            Err(error) => return HandshakeError::Io(error),
        };
        match error {
            rustls::Error::NoCertificatesPresented => HandshakeError::Certificate {
                reason: VerifyError::NoCertificate,
                claimed: None,
            },
            rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol)
            | rustls::Error::NoApplicationProtocol => HandshakeError::Alpn { claimed: claimed() },
            // A certificate that somebody else holds the key of.
            rustls::Error::InvalidCertificate(CertificateError::BadSignature) => {
                HandshakeError::Certificate {
                    reason: VerifyError::BadSignature,
                    claimed: claimed(),
                }
            }
            rustls::Error::AlertReceived(alert) => HandshakeError::Refused { alert },
            error => HandshakeError::Tls(error),
        }
    }

    fn require_alpn(&self, agreed: Option<&[u8]>) -> Result<(), HandshakeError> {
        if agreed == Some(self.profile.alpn()) {
            return Ok(());
        }
        let claimed = self.certificate().map(|peer| peer.id.to_string());
        Err(HandshakeError::Alpn { claimed })
    }

    fn peer(
        &self,
        version: Option<rustls::ProtocolVersion>,
        own: Option<&Arc<Credentials>>,
    ) -> Option<Peer> {
        let certificate = self.certificate()?;
        let own_end = own.map(|own| own.svid().not_after);
        let not_after = own_end.map_or(certificate.not_after, |end| end.min(certificate.not_after));
        Some(Peer {
            id: certificate.id.clone(),
            serial: certificate.serial.clone(),
            not_after,
            epoch: own.map_or(0, |own| own.epoch()),
            tls_version: match version {
                Some(rustls::ProtocolVersion::TLSv1_3) => "TLSv1.3",
                _ => "unknown",
            },
            certificate: Arc::clone(certificate),
        })
    }

    fn refusal(&self) -> std::sync::MutexGuard<'_, Option<Refusal>> {
        self.refusal.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn refuse_tls12() -> rustls::Error {
    rustls::Error::General("TLS 1.2 is not spoken here".into())
}

impl ServerCertVerifier for PeerCheck {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.judge(end_entity, intermediates, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(refuse_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &SIGNATURES)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        SIGNATURES.supported_schemes()
    }
}

impl ClientCertVerifier for PeerCheck {
    fn client_auth_mandatory(&self) -> bool {
        self.profile == TlsProfile::Mesh
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.judge(end_entity, intermediates, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(refuse_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &SIGNATURES)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        SIGNATURES.supported_schemes()
    }
}

async fn within<F: Future>(
    clock: &dyn Clock,
    timeout: Duration,
    handshake: F,
) -> Result<F::Output, HandshakeError> {
    tokio::select! {
        biased;
        result = handshake => Ok(result),
        () = clock.sleep(timeout) => Err(HandshakeError::Timeout { after: timeout }),
    }
}
