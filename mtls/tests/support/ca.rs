//! A CA in the test's own process, which also issues what no CA should.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use sidegate_api::identity as proto;
use sidegate_mesh::spiffe::{SpiffeId, TrustDomain};
use sidegate_mtls::{
    Acknowledgement, BoxFuture, BundleSet, BundleStream, BundleWatch, CredentialStore, Issue,
    IssueError, IssueRequest, Svid, Trust, TrustUpdate, VerifyLimits, WorkloadKey, crypto_provider,
};
use time::OffsetDateTime;
use tokio::sync::{mpsc, watch};

/// The moment at which tests begin: 2027-01-15.
pub fn start() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_hours(500_000)
}

pub fn trust_domain(name: &str) -> TrustDomain {
    name.parse().unwrap()
}

pub fn id(text: &str) -> SpiffeId {
    format!("spiffe://mesh.local/ns/{}", text.replace('/', "/sa/"))
        .parse()
        .unwrap()
}

pub fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

pub fn moment(at: SystemTime) -> OffsetDateTime {
    let seconds = at.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    OffsetDateTime::from_unix_timestamp(seconds.try_into().unwrap()).unwrap()
}

/// A certificate that may sign, with its key.
pub struct Authority {
    pub params: CertificateParams,
    pub key: KeyPair,
    pub der: CertificateDer<'static>,
}

impl Authority {
    /// A root of `trust_domain`, good for ten years from [`start`].
    pub fn root(trust_domain: &str) -> Self {
        Self::root_with(trust_domain, |_| {})
    }

    pub fn root_with(trust_domain: &str, change: impl FnOnce(&mut CertificateParams)) -> Self {
        let mut params = authority_params(&format!("{trust_domain} root"), start());
        params.subject_alt_names = vec![uri(&format!("spiffe://{trust_domain}"))];
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let der = params.self_signed(&key).unwrap().der().clone();
        Self { params, key, der }
    }

    pub fn intermediate(&self) -> Self {
        self.intermediate_with(|_| {})
    }

    pub fn intermediate_with(&self, change: impl FnOnce(&mut CertificateParams)) -> Self {
        self.intermediate_of(KeyPair::generate().unwrap(), change)
    }

    pub fn intermediate_of(
        &self,
        key: KeyPair,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Self {
        let mut params = authority_params("intermediate", start());
        change(&mut params);
        let der = self.sign(&params, &key);
        Self { params, key, der }
    }

    pub fn sign(
        &self,
        params: &CertificateParams,
        key: &impl PublicKeyData,
    ) -> CertificateDer<'static> {
        let issuer = Issuer::from_params(&self.params, &self.key);
        params.signed_by(key, &issuer).unwrap().der().clone()
    }

    /// A good leaf of `id`, changed.
    pub fn leaf_with(
        &self,
        id: &SpiffeId,
        change: impl FnOnce(&mut CertificateParams),
    ) -> (CertificateDer<'static>, WorkloadKey) {
        let mut params = leaf_params(id.as_str(), start(), Duration::from_hours(1));
        change(&mut params);
        let key = WorkloadKey::generate().unwrap();
        (self.sign(&params, &key), key)
    }

    /// A good SVID of `id`, issued by this intermediate.
    pub fn svid(&self, id: &SpiffeId) -> Arc<Svid> {
        let (leaf, key) = self.leaf_with(id, |_| {});
        Arc::new(Svid::parse(vec![leaf, self.der.clone()], key, id).unwrap())
    }
}

pub fn authority_params(name: &str, from: SystemTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = moment(from - Duration::from_hours(1));
    params.not_after = moment(from + Duration::from_hours(24 * 3650));
    params.use_authority_key_identifier_extension = true;
    params
}

pub fn leaf_params(id: &str, from: SystemTime, life: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![uri(id)];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.not_before = moment(from - Duration::from_secs(30));
    params.not_after = moment(from + life);
    params.use_authority_key_identifier_extension = true;
    params
}

pub fn trust_of(sequence: u64, roots: &[(&str, &[&Authority])]) -> Trust {
    let mut bundles = BundleSet::new(sequence);
    for (name, authorities) in roots {
        let roots = authorities.iter().map(|root| root.der.clone()).collect();
        bundles.insert(&trust_domain(name), roots).unwrap();
    }
    Trust::from_bundles(bundles)
}

pub fn empty_store(clock: Arc<dyn sidegate_mesh::clock::Clock>) -> Arc<CredentialStore> {
    CredentialStore::new(VerifyLimits::default(), crypto_provider(), clock)
}

/// How a [`LocalIssuer`] behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    Good,
    /// Refuses every request.
    Down,
    /// Issues, remembers it, and loses the answer.
    LosesAnswers,
    /// Issues for somebody else.
    Impostor,
    /// Answers with a certificate for another key.
    OtherKey,
    /// Answers with a leaf from a CA that nobody knows.
    Unknown,
}

/// An issuer without a network. Clones share one state.
#[derive(Clone)]
pub struct LocalIssuer {
    state: Arc<Mutex<IssuerState>>,
    bundle: watch::Sender<proto::WatchBundleResponse>,
}

pub struct IssuerState {
    pub id: SpiffeId,
    pub root: Arc<Authority>,
    pub intermediate: Arc<Authority>,
    pub mood: Mood,
    pub life: Duration,
    pub clock: Arc<dyn sidegate_mesh::clock::Clock>,
    /// Public key of each request, in order, with the serial of the SVID that it renews.
    pub requests: Vec<(Vec<u8>, Option<String>)>,
    pub acknowledgements: Vec<Acknowledgement>,
    /// Keys already certified for a parent; another key freezes the lineage.
    pub lineage: HashMap<Option<String>, Vec<u8>>,
    pub frozen: bool,
    serial: u64,
}

impl LocalIssuer {
    pub fn new(
        id: &SpiffeId,
        root: &Arc<Authority>,
        life: Duration,
        clock: Arc<dyn sidegate_mesh::clock::Clock>,
    ) -> Self {
        let bundle = bundle_message(1, &[("mesh.local", &[root])]);
        Self {
            state: Arc::new(Mutex::new(IssuerState {
                id: id.clone(),
                intermediate: Arc::new(root.intermediate()),
                root: Arc::clone(root),
                mood: Mood::Good,
                life,
                clock,
                requests: Vec::new(),
                acknowledgements: Vec::new(),
                lineage: HashMap::new(),
                frozen: false,
                serial: 0,
            })),
            bundle: watch::Sender::new(bundle),
        }
    }

    pub fn with<T>(&self, look: impl FnOnce(&mut IssuerState) -> T) -> T {
        look(&mut self.state.lock().unwrap())
    }

    pub fn publish(&self, message: proto::WatchBundleResponse) {
        self.bundle.send_replace(message);
    }

    fn answer(&self, request: &IssueRequest) -> Result<Vec<CertificateDer<'static>>, IssueError> {
        let mut state = self.state.lock().unwrap();
        let csr = rcgen::CertificateSigningRequestParams::from_der(&request.csr.as_slice().into())
            .expect("a well-formed request");
        let key = csr.public_key.der_bytes().to_vec();
        let parent = request.current.as_ref().map(|svid| svid.serial.to_string());
        state.requests.push((key.clone(), parent.clone()));
        if state.mood == Mood::Down {
            return Err(IssueError::Failed("down".into()));
        }
        let first = state.lineage.entry(parent).or_insert_with(|| key.clone());
        if *first != key {
            state.frozen = true;
            return Err(IssueError::Failed("lineage frozen".into()));
        }
        state.serial += 1;
        let now = state.clock.now();
        let named = match state.mood {
            Mood::Impostor => "spiffe://mesh.local/ns/shop/sa/somebody-else",
            _ => state.id.as_str(),
        };
        let mut params = leaf_params(named, now, state.life);
        params.not_before = moment(now);
        params.serial_number = Some(SerialNumber::from(state.serial));
        let stranger = Authority::root("mesh.local").intermediate();
        let other_key = WorkloadKey::generate().unwrap();
        let (leaf, issuer) = match state.mood {
            Mood::OtherKey => (
                state.intermediate.sign(&params, &other_key),
                state.intermediate.der.clone(),
            ),
            Mood::Unknown => (
                stranger.sign(&params, &csr.public_key),
                stranger.der.clone(),
            ),
            _ => (
                state.intermediate.sign(&params, &csr.public_key),
                state.intermediate.der.clone(),
            ),
        };
        if state.mood == Mood::LosesAnswers {
            return Err(IssueError::Failed("the answer was lost".into()));
        }
        Ok(vec![leaf, issuer])
    }
}

impl Issue for LocalIssuer {
    fn issue(
        &self,
        request: IssueRequest,
    ) -> BoxFuture<'_, Result<Vec<CertificateDer<'static>>, IssueError>> {
        Box::pin(async move { self.answer(&request) })
    }

    fn watch_bundle(&self, watch: BundleWatch) -> BoxFuture<'_, Result<BundleStream, IssueError>> {
        let mut changes = self.bundle.subscribe();
        changes.mark_changed();
        let updates = tokio_stream::StreamExt::map(
            tokio_stream::wrappers::WatchStream::new(changes),
            |message| Ok(TrustUpdate::new(message)),
        );
        let (acknowledgements, mut receiver) = mpsc::channel(16);
        let state = Arc::clone(&self.state);
        state
            .lock()
            .unwrap()
            .acknowledgements
            .push(watch.acknowledgement);
        tokio::task::spawn(async move {
            while let Some(acknowledgement) = receiver.recv().await {
                state.lock().unwrap().acknowledgements.push(acknowledgement);
            }
        });
        Box::pin(async move {
            Ok(BundleStream {
                updates: Box::pin(updates),
                acknowledgements,
            })
        })
    }
}

pub fn bundle_message(
    sequence: u64,
    roots: &[(&str, &[&Arc<Authority>])],
) -> proto::WatchBundleResponse {
    proto::WatchBundleResponse {
        sequence,
        bundles: roots
            .iter()
            .map(|(name, roots)| proto::TrustDomainBundle {
                trust_domain: (*name).into(),
                roots: roots.iter().map(|root| root.der.to_vec()).collect(),
            })
            .collect(),
        revocations: None,
        refresh_hint_seconds: 0,
    }
}
