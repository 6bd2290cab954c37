//! Identities: a CA in the test's own process.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use http::Uri;
use hyper_util::rt::TokioIo;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls_pki_types::CertificateDer;
use sidegate_mesh::clock::Clock as _;
use sidegate_mesh::spiffe::SpiffeId;
use sidegate_mtls::{
    BundleSet, Connector, CredentialStore, HandshakeError, Svid, SystemClock, Trust, VerifyLimits,
    WorkloadKey, crypto_provider,
};
use time::OffsetDateTime;
use tokio::net::TcpSocket;
use tonic::transport::{Channel, Endpoint};

pub const TRUST_DOMAIN: &str = "cluster.local";

/// Whoever signs.
pub struct Mesh {
    params: CertificateParams,
    key: KeyPair,
    root: CertificateDer<'static>,
}

pub fn id(namespace: &str, account: &str) -> SpiffeId {
    SpiffeId::for_workload(&TRUST_DOMAIN.parse().unwrap(), namespace, account).unwrap()
}

pub fn controller_id() -> SpiffeId {
    id("sidegate-system", "sidegate-controller")
}

fn moment(at: SystemTime) -> OffsetDateTime {
    let seconds = at.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    OffsetDateTime::from_unix_timestamp(seconds.try_into().unwrap()).unwrap()
}

fn params(uri: &str, life: Duration) -> CertificateParams {
    let now = SystemClock.now();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
    params.not_before = moment(now - Duration::from_mins(1));
    params.not_after = moment(now + life);
    params.use_authority_key_identifier_extension = true;
    params
}

impl Mesh {
    pub fn new() -> Self {
        let mut params = params(
            &format!("spiffe://{TRUST_DOMAIN}"),
            Duration::from_hours(24 * 365),
        );
        params.distinguished_name.push(DnType::CommonName, "root");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        let root = params.self_signed(&key).unwrap().der().clone();
        Self { params, key, root }
    }

    pub fn trust(&self, sequence: u64) -> Trust {
        let mut bundles = BundleSet::new(sequence);
        bundles
            .insert(&TRUST_DOMAIN.parse().unwrap(), vec![self.root.clone()])
            .unwrap();
        Trust::from_bundles(bundles)
    }

    /// Credentials of an identity that end after `life`.
    pub fn store_for(&self, id: &SpiffeId, life: Duration) -> Arc<CredentialStore> {
        let mut leaf = params(id.as_str(), life);
        leaf.is_ca = IsCa::ExplicitNoCa;
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = WorkloadKey::generate().unwrap();
        let issuer = Issuer::from_params(&self.params, &self.key);
        let der = leaf.signed_by(&key, &issuer).unwrap().der().clone();
        let svid = Arc::new(Svid::parse(vec![der], key, id).unwrap());
        let store = CredentialStore::new(
            VerifyLimits::default(),
            crypto_provider(),
            Arc::new(SystemClock),
        );
        store.publish(svid, self.trust(1)).unwrap();
        store
    }

    pub fn store(&self, id: &SpiffeId) -> Arc<CredentialStore> {
        self.store_for(id, Duration::from_hours(1))
    }
}

/// Connects from `source` with these credentials, and makes sure that the controller answers.
pub async fn connect(
    store: &Arc<CredentialStore>,
    source: IpAddr,
    address: SocketAddr,
) -> Result<Channel, HandshakeError> {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((source, 0).into()).unwrap();
    let stream = socket.connect(address).await.map_err(HandshakeError::Io)?;
    let connector =
        Connector::control_plane(Arc::clone(store), crate::PATIENCE, Arc::new(SystemClock));
    let (stream, _) = connector.connect(stream, &controller_id()).await?;
    let ready = Arc::new(Mutex::new(Some(TokioIo::new(stream))));
    let connector = tower::service_fn(move |_: Uri| {
        let stream = ready.lock().unwrap().take();
        std::future::ready(
            stream.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::BrokenPipe)),
        )
    });
    Ok(Endpoint::from_static("http://controller")
        .connect_with_connector(connector)
        .await
        .unwrap())
}
