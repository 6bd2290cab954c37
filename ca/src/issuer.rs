//! One issuance, from an attested identity to a certificate that may leave.
//!
//! check › [`Ledger::intend`] › sign › lint › [`Ledger::record`] › answer
//!
//! Invariant: nothing is signed that is not in the ledger as intended, and nothing leaves that is
//! not in it as issued. Both are on disk before the next step begins.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use rustls_pki_types::CertificateDer;
use sidegate_api::identity::WatchBundleResponse;
use sidegate_mesh::clock::Clock;
use sidegate_mesh::spiffe::{SpiffeId, SpiffeIdError};
use sidegate_mtls::{
    BundleError, CredentialStore, Svid, TrustUpdate, Verifier, VerifyLimits, WorkloadKey,
    crypto_provider,
};
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use crate::authority::{
    INTERMEDIATE_LIFETIME, Intermediate, has_exactly, unix_moment, unix_seconds,
};
use crate::config::Config;
use crate::csr::ProvenKey;
use crate::digest::{Digest, NoRandomness, Serial};
use crate::issuance::{Attested, Refusal};
use crate::key::Key;
use crate::keystore::{KeyStore, KeyStoreError};
use crate::kubernetes::Cluster;
use crate::ledger::{Event, Evidence, Issuance, Ledger, LedgerError, Written};
use crate::limits::IssuanceLimits;
use crate::metrics::Metrics;
use crate::registry::{CONTROL_PLANE, Registry, Reservation, RootState};
use crate::roots::RootsError;
use crate::state::StateFolder;
use crate::watchers::Watchers;

/// Life of the CA's own SVID, if leaves live shorter. It needs no short life: its key is in the
/// process that could sign another.
pub(crate) const OWN_LIFETIME_MIN: Duration = Duration::from_hours(1);

/// How often a change is tried that another replica was faster with.
pub(crate) const ATTEMPTS: usize = 8;

/// A leaf that would live shorter is not worth an answer.
const LEFT_MIN_SECONDS: u64 = 1;

/// The running CA, without its sockets.
pub struct Issuer {
    pub(crate) config: Config,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) folder: Arc<StateFolder>,
    pub(crate) keys: Arc<dyn KeyStore>,
    pub(crate) cluster: Option<Arc<Cluster>>,
    pub(crate) ledger: Arc<dyn Ledger>,
    pub(crate) metrics: Metrics,
    pub(crate) tracker: TaskTracker,
    pub(crate) store: Arc<CredentialStore>,
    /// Held over check, entry and publication of what an administrator changes.
    pub(crate) change: tokio::sync::Mutex<()>,
    registry: Mutex<Registry>,
    watchers: Mutex<Watchers>,
    limits: Mutex<IssuanceLimits>,
    intermediate: ArcSwap<Intermediate>,
    verifier: ArcSwap<Verifier>,
    bundle: watch::Sender<Arc<WatchBundleResponse>>,
}

/// What an [`Issuer`] is made of.
pub(crate) struct Parts {
    pub(crate) config: Config,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) folder: Arc<StateFolder>,
    pub(crate) keys: Arc<dyn KeyStore>,
    pub(crate) cluster: Option<Arc<Cluster>>,
    pub(crate) ledger: Arc<dyn Ledger>,
    pub(crate) registry: Registry,
    pub(crate) intermediate: Intermediate,
    pub(crate) tracker: TaskTracker,
}

/// Why the CA could not renew one of its own certificates.
#[derive(Debug, thiserror::Error)]
pub enum RenewalError {
    /// The system gave no random numbers.
    #[error(transparent)]
    Random(#[from] NoRandomness),
    /// The ledger could not be written.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The ledger names no root to sign with.
    #[error(transparent)]
    Roots(#[from] RootsError),
    /// Root or intermediate cannot be read or written.
    #[error(transparent)]
    Keys(#[from] KeyStoreError),
    /// The cryptographic library refused.
    #[error("signing failed: {0}")]
    Sign(#[from] rcgen::Error),
    /// Our own checks refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The SVID cannot be put to use.
    #[error("the CA's own SVID cannot be used: {0}")]
    Svid(String),
}

impl Issuer {
    /// Puts the parts together. The CA has no SVID of its own until [`Self::renew_own`].
    pub(crate) fn new(parts: Parts) -> Result<Arc<Self>, BundleError> {
        let message = parts.registry.bundle();
        let limits = VerifyLimits::default();
        let trust = TrustUpdate::new(message.clone()).check(&parts.config.trust_domain)?;
        let now = parts.clock.now();
        let store = CredentialStore::new(limits, crypto_provider(), Arc::clone(&parts.clock));
        Ok(Arc::new(Self {
            limits: Mutex::new(IssuanceLimits::new(&parts.config.limits, now)),
            registry: Mutex::new(parts.registry),
            watchers: Mutex::new(Watchers::new(parts.cluster.is_some())),
            intermediate: ArcSwap::from_pointee(parts.intermediate),
            verifier: ArcSwap::from_pointee(Verifier::from_trust(trust, limits)),
            bundle: watch::Sender::new(Arc::new(message)),
            metrics: Metrics::new(),
            config: parts.config,
            clock: parts.clock,
            folder: parts.folder,
            keys: parts.keys,
            cluster: parts.cluster,
            ledger: parts.ledger,
            tracker: parts.tracker,
            store,
            change: tokio::sync::Mutex::new(()),
        }))
    }

    /// Issues a certificate for the key of `csr` to an identity that was attested; the chain, leaf
    /// first, without the root.
    ///
    /// It is carried to its end even if the caller goes away, so that no claim stays half made.
    ///
    /// # Errors
    ///
    /// [`Refusal`]; nothing has left then.
    pub async fn issue(
        self: &Arc<Self>,
        csr: &[u8],
        attested: Attested,
    ) -> Result<Vec<CertificateDer<'static>>, Refusal> {
        let key = ProvenKey::from_csr(csr)?;
        if attested.evidence != Evidence::Own {
            let taken = lock(&self.limits).take(&attested.id, self.clock.now());
            taken.map_err(|wait| Refusal::Limit { wait })?;
        }
        let issuer = Arc::clone(self);
        let task = async move { issuer.issue_to_the_end(&key, &attested).await };
        let task = self.tracker.spawn(task);
        task.await
            .map_err(|error| Refusal::Unavailable(error.to_string()))?
    }

    async fn issue_to_the_end(
        &self,
        key: &ProvenKey,
        attested: &Attested,
    ) -> Result<Vec<CertificateDer<'static>>, Refusal> {
        let intermediate = self.intermediate.load_full();
        let begun = self.begin(attested, key.sha256, &intermediate);
        let (reservation, issuance, written) = match begun {
            Err(Refusal::Forked) => return Err(self.freeze(attested, key.sha256).await),
            begun => begun?,
        };
        let event = Event::Intended(issuance.clone());
        let written = written.await;
        let durable = written.is_ok().then_some(&event);
        self.registry().settle(reservation, durable);
        written?;
        match self.sign(&intermediate, &issuance, key) {
            Ok(chain) => self.record(&issuance, chain).await,
            Err(refusal) => {
                let serial = issuance.serial;
                tracing::error!(%serial, error = %refusal, "certificate not signed");
                let reason = refusal.to_string();
                let refused = Event::Refused {
                    serial,
                    reason: reason.clone(),
                };
                self.registry().apply(&refused);
                self.ledger.refuse(serial, reason).await?;
                Err(refusal)
            }
        }
    }

    /// Claims and queues under one lock, so that the ledger has the order of the claims.
    fn begin(
        &self,
        attested: &Attested,
        key: Digest,
        intermediate: &Intermediate,
    ) -> Result<(Reservation, Issuance, Written), Refusal> {
        let now = self.clock.now();
        let serial = Serial::random().map_err(|error| Refusal::Unavailable(error.to_string()))?;
        let mut registry = self.registry();
        if key == intermediate.public_key_sha256 {
            return Err(Refusal::KeyNotFresh);
        }
        if registry.certificates_len() >= self.config.limits.certificates_max {
            return Err(Refusal::Full("certificates"));
        }
        let reservation = registry.reserve(attested, (key, serial), now)?;
        let not_after = self.not_after(attested, &reservation, intermediate);
        if not_after < unix_seconds(now) + LEFT_MIN_SECONDS {
            registry.settle(reservation, None);
            return Err(Refusal::Unavailable("its own certificate ends".to_owned()));
        }
        let issuance = Issuance {
            spiffe_id: attested.id.clone(),
            serial,
            public_key_sha256: key,
            not_before: unix_seconds(now).saturating_sub(self.config.backdate.as_secs()),
            not_after,
            evidence: attested.evidence.clone(),
            parent_key_sha256: attested.key,
            dns_names: attested.dns_names.clone(),
            lineage: reservation.lineage,
            root_sha256: intermediate.root_sha256,
        };
        let written = self.ledger.intend(issuance.clone());
        Ok((reservation, issuance, written))
    }

    fn not_after(
        &self,
        attested: &Attested,
        reservation: &Reservation,
        intermediate: &Intermediate,
    ) -> u64 {
        let mut life = self.config.leaf_lifetime;
        if attested.evidence == Evidence::Own {
            life = life.max(OWN_LIFETIME_MIN);
        }
        let wanted = unix_seconds(self.clock.now() + life);
        let first = reservation.not_after_max.unwrap_or(u64::MAX);
        wanted.min(first).min(unix_seconds(intermediate.not_after))
    }

    fn sign(
        &self,
        intermediate: &Intermediate,
        issuance: &Issuance,
        key: &ProvenKey,
    ) -> Result<Vec<CertificateDer<'static>>, Refusal> {
        let leaf = intermediate.sign_leaf(issuance, &key.info);
        let leaf = leaf.map_err(|error| Refusal::Unavailable(error.to_string()))?;
        let chain = vec![leaf, intermediate.der.clone()];
        self.lint(&chain, issuance)?;
        Ok(chain)
    }

    /// Looks at what was made with the eyes of those who will be shown it.
    fn lint(&self, chain: &[CertificateDer<'_>], issuance: &Issuance) -> Result<(), Refusal> {
        let verifier = self.verifier.load_full();
        let now = self.clock.now();
        let revoked = verifier.trust().revocations.has_id(&issuance.spiffe_id);
        if revoked {
            return Err(Refusal::Denied("the identity is revoked"));
        }
        let seen = verifier
            .verify(chain, now, Some(&issuance.spiffe_id))
            .map_err(|error| Refusal::Lint(error.to_string()))?;
        let same = seen.serial.as_bytes() == issuance.serial.as_bytes()
            && seen.public_key_sha256 == issuance.public_key_sha256.as_bytes()
            && unix_seconds(seen.not_after) <= issuance.not_after
            && chain
                .first()
                .is_some_and(|leaf| has_exactly(leaf, &issuance.spiffe_id, &issuance.dns_names));
        same.then_some(()).ok_or_else(|| {
            Refusal::Lint("serial number, key, names or end are not what was intended".to_owned())
        })
    }

    async fn record(
        &self,
        issuance: &Issuance,
        chain: Vec<CertificateDer<'static>>,
    ) -> Result<Vec<CertificateDer<'static>>, Refusal> {
        let serial = issuance.serial;
        let certificate_sha256 = chain.first().map_or(Digest::ZERO, |leaf| Digest::of(leaf));
        self.ledger.record(serial, certificate_sha256).await?;
        self.registry().apply(&Event::Issued {
            serial,
            certificate_sha256,
        });
        let not_after = unix_moment(issuance.not_after);
        tracing::info!(
            peer.id = %issuance.spiffe_id,
            %serial,
            evidence = %issuance.evidence,
            not_after = %humantime::format_rfc3339_seconds(not_after),
            "svid issued"
        );
        Ok(chain)
    }

    /// Two keys on one SVID: at least one of the two callers is not whom the SVID was made for.
    async fn freeze(&self, attested: &Attested, key: Digest) -> Refusal {
        let (Some(lineage), Evidence::Svid(parent)) = (attested.lineage, &attested.evidence) else {
            return Refusal::Frozen;
        };
        self.registry().freeze(lineage);
        self.metrics.frozen_lineages.inc();
        tracing::error!(
            peer.id = %attested.id,
            serial = %parent,
            %lineage,
            "lineage frozen: one svid was renewed with two keys"
        );
        let event = Event::Frozen {
            lineage,
            spiffe_id: attested.id.clone(),
            parent: *parent,
            public_key_sha256: key,
        };
        if let Err(error) = self.ledger.append(event).await {
            tracing::error!(error = %error, %lineage, "the freeze lasts only until the next start");
        }
        Refusal::Forked
    }

    // ---- The CA's own certificates -----------------------------------------------------------

    /// Gives the CA a new SVID of its own, with a new key.
    ///
    /// # Errors
    ///
    /// [`RenewalError`]; the old one stays.
    pub(crate) async fn renew_own(self: &Arc<Self>) -> Result<(), RenewalError> {
        let own = |error: &dyn std::fmt::Display| RenewalError::Svid(error.to_string());
        let id = self.own_id().map_err(|error| own(&error))?;
        let key = WorkloadKey::generate().map_err(|error| own(&error))?;
        let csr = key.certificate_request().map_err(|error| own(&error))?;
        let attested = Attested {
            id: id.clone(),
            evidence: Evidence::Own,
            lineage: None,
            key: None,
            dns_names: Vec::new(),
        };
        let chain = self.issue(&csr, attested).await?;
        let svid = Svid::parse(chain, key, &id).map_err(|error| own(&error))?;
        let trust = self.verifier.load().trust().clone();
        let published = self.store.publish(Arc::new(svid), trust);
        published.map_err(|error| own(&error))?;
        Ok(())
    }

    /// Whether another intermediate has to be made: half of its life is over, or the active root
    /// did not sign it.
    pub(crate) fn intermediate_is_due(&self) -> bool {
        let now = self.clock.now();
        !is_current(&self.intermediate(), &self.registry(), now)
    }

    /// Signs with a new intermediate under the active root from now on, if one is due: another
    /// replica's, if that was faster. Hold [`Self::change`].
    ///
    /// # Errors
    ///
    /// [`RenewalError`]; the old one stays.
    pub(crate) async fn renew_intermediate(&self) -> Result<(), RenewalError> {
        for _ in 0..ATTEMPTS {
            self.take_in().await?;
            if !self.intermediate_is_due() {
                return Ok(());
            }
            let registry = || self.registry();
            let made = make_intermediate(&*self.keys, &*self.ledger, registry, &*self.clock).await;
            match made {
                Err(RenewalError::Keys(KeyStoreError::Conflict)) => {}
                made => {
                    let intermediate = made?;
                    let not_after = humantime::format_rfc3339_seconds(intermediate.not_after);
                    tracing::info!(%not_after, "intermediate renewed");
                    self.intermediate.store(Arc::new(intermediate));
                    return Ok(());
                }
            }
        }
        Err(KeyStoreError::Conflict.into())
    }

    /// Takes in what another replica has changed, and publishes it.
    ///
    /// # Errors
    ///
    /// [`KeyStoreError`]; what was in effect stays.
    pub(crate) async fn follow(&self) -> Result<(), KeyStoreError> {
        let _held = self.change.lock().await;
        self.take_in().await
    }

    /// As [`Self::follow`], for who holds [`Self::change`].
    pub(crate) async fn take_in(&self) -> Result<(), KeyStoreError> {
        let now = self.clock.now();
        let Some(news) = self.keys.news().await? else {
            return Ok(());
        };
        let former = self.registry().shared();
        let is_older = news.shared.sequence < former.sequence;
        self.registry().adopt(news.shared);
        if is_older {
            // Restored from a backup: sidecars take only what has a higher number.
            let mut risen = self.registry().shared();
            risen.sequence = self.registry().next_sequence(now);
            self.keys.share(&risen, None).await?;
            self.registry().adopt(risen);
        }
        if let Some(theirs) = news.intermediate {
            self.adopt_intermediate(theirs);
        }
        if self.registry().shared() != former
            && let Err(error) = self.publish()
        {
            tracing::error!(error = %error, "what another replica has changed cannot be published");
        }
        Ok(())
    }

    fn adopt_intermediate(&self, theirs: Intermediate) {
        let ours = self.intermediate();
        let is_better = {
            let registry = self.registry();
            let active = registry.root(RootState::Active).map(|root| root.sha256);
            let signed = |intermediate: &Intermediate| active == Some(intermediate.root_sha256);
            signed(&theirs) && (!signed(&ours) || theirs.not_after > ours.not_after)
        };
        if is_better {
            let not_after = humantime::format_rfc3339_seconds(theirs.not_after);
            tracing::info!(%not_after, "intermediate of another replica taken in");
            self.intermediate.store(Arc::new(theirs));
        }
    }

    /// The identity that every client pins.
    pub(crate) fn own_id(&self) -> Result<SpiffeId, SpiffeIdError> {
        SpiffeId::for_workload(&self.config.trust_domain, CONTROL_PLANE, "sidegate-ca")
    }

    // ---- Shared state --------------------------------------------------------------------------

    /// What the CA knows. Never held across an `await`.
    pub(crate) fn registry(&self) -> MutexGuard<'_, Registry> {
        lock(&self.registry)
    }

    /// Who watches. Never held across an `await`; taken after the registry, never before.
    pub(crate) fn watchers(&self) -> MutexGuard<'_, Watchers> {
        lock(&self.watchers)
    }

    /// What signs now.
    pub(crate) fn intermediate(&self) -> Arc<Intermediate> {
        self.intermediate.load_full()
    }

    /// What decides whom we believe now.
    pub(crate) fn verifier(&self) -> Arc<Verifier> {
        self.verifier.load_full()
    }

    /// The bundle, and every change of it.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<WatchBundleResponse>> {
        self.bundle.subscribe()
    }

    /// Sends out what the registry says now.
    pub(crate) fn publish(&self) -> Result<u64, BundleError> {
        let message = self.registry().bundle();
        let trust = TrustUpdate::new(message.clone()).check(&self.config.trust_domain)?;
        let verifier = Verifier::from_trust(trust.clone(), *self.store.limits());
        self.verifier.store(Arc::new(verifier));
        if let Err(error) = self.store.publish_trust(trust) {
            tracing::error!(error = %error, "the CA's own handshakes keep the former bundle");
        }
        let sequence = message.sequence;
        self.bundle.send_replace(Arc::new(message));
        tracing::info!(sequence, "bundle published");
        Ok(sequence)
    }
}

/// Whether an intermediate may go on signing.
pub(crate) fn is_current(
    intermediate: &Intermediate,
    registry: &Registry,
    now: SystemTime,
) -> bool {
    let active = registry.root(RootState::Active).map(|root| root.sha256);
    active == Some(intermediate.root_sha256) && now < intermediate.half_life()
}

/// The first intermediate of a CA that starts: its own, or that of a replica that was faster.
pub(crate) async fn obtain_intermediate<'a>(
    keys: &dyn KeyStore,
    ledger: &dyn Ledger,
    registry: impl Fn() -> MutexGuard<'a, Registry>,
    clock: &dyn Clock,
) -> Result<Intermediate, RenewalError> {
    for _ in 0..ATTEMPTS {
        match make_intermediate(keys, ledger, &registry, clock).await {
            Err(RenewalError::Keys(KeyStoreError::Conflict)) => {}
            made => return made,
        }
        let now = clock.now();
        let Some(news) = keys.news().await? else {
            continue;
        };
        let mut registry = registry();
        registry.adopt(news.shared);
        let theirs = news.intermediate;
        if let Some(theirs) = theirs.filter(|theirs| is_current(theirs, &registry, now)) {
            return Ok(theirs);
        }
    }
    Err(KeyStoreError::Conflict.into())
}

/// Makes an intermediate: intend, sign, check, record, and only then write it and its key down.
async fn make_intermediate<'a>(
    keys: &dyn KeyStore,
    ledger: &dyn Ledger,
    registry: impl Fn() -> MutexGuard<'a, Registry>,
    clock: &dyn Clock,
) -> Result<Intermediate, RenewalError> {
    let now = clock.now();
    let key = Key::generate()?;
    let (issuance, root) = {
        let registry = registry();
        let root = registry
            .root(RootState::Active)
            .ok_or(RootsError::NoActiveRoot)?;
        (
            intermediate_issuance(&registry, root, &key, now)?,
            root.clone(),
        )
    };
    ledger.intend(issuance.clone()).await?;
    registry().apply(&Event::Intended(issuance.clone()));
    let trust_domain = registry().trust_domain().clone();
    let root_key = keys.root_key(&root).await?;
    let der = Intermediate::make(&issuance, &trust_domain, &key, (&root, &root_key))?;
    drop(root_key);
    let certificate_sha256 = Digest::of(&der);
    let intermediate = Intermediate::load(&der, key, &trust_domain, &[root])
        .map_err(|problem| RenewalError::Svid(problem.to_string()))?;
    let serial = issuance.serial;
    ledger.record(serial, certificate_sha256).await?;
    registry().apply(&Event::Issued {
        serial,
        certificate_sha256,
    });
    keys.keep_intermediate(&intermediate).await?;
    Ok(intermediate)
}

fn intermediate_issuance(
    registry: &Registry,
    root: &crate::authority::Root,
    key: &Key,
    now: SystemTime,
) -> Result<Issuance, NoRandomness> {
    let serial = Serial::random()?;
    let end = (now + INTERMEDIATE_LIFETIME).min(root.not_after);
    Ok(Issuance {
        spiffe_id: registry.trust_domain().id(),
        serial,
        public_key_sha256: key.public_key_sha256(),
        not_before: unix_seconds(now).saturating_sub(60),
        not_after: unix_seconds(end),
        evidence: Evidence::Own,
        parent_key_sha256: None,
        dns_names: Vec::new(),
        lineage: serial,
        root_sha256: root.sha256,
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
