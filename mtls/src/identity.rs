//! A workload's identity over time: the first SVID, its renewals, and the bundle.
//!
//! Two tasks keep a [`CredentialStore`] fresh. One renews the SVID at half of its life, with a new
//! key each time; the other follows the bundle and reports what became of each. Both survive an
//! absent CA: what is in use stays in use, and they try again with a capped, jittered backoff.
//!
//! Invariants: what the CA answers is believed only after our own verifier has; a failed renewal
//! never takes the old SVID away; a bundle is applied only when its sequence rises and our own
//! trust domain is in it; a key is on disk before it is sent, because the CA freezes an identity
//! that asks twice with different keys.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::StreamExt as _;
use sidegate_mesh::access_log::timestamp;
use sidegate_mesh::spiffe::{SpiffeId, TrustDomain};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use crate::bundle::{BundleError, BundleSet, Trust, TrustUpdate};
use crate::credentials::{CredentialStore, PublishError};
use crate::csr::WorkloadKey;
use crate::issue::{Acknowledgement, BundleStream, BundleWatch, Issue, IssueError, IssueRequest};
use crate::state_dir::{StateDir, StateError};
use crate::svid::{Svid, SvidError};
use crate::verify::Verifier;

/// After how much silence the bundle is asked for again when the CA does not say.
const REFRESH_DEFAULT: Duration = Duration::from_mins(5);
/// The shortest silence that a CA can ask for.
const REFRESH_MIN: Duration = Duration::from_secs(5);

/// Who we are and where that is kept.
#[derive(Clone, Debug)]
pub struct IdentityConfig {
    /// Exactly the identity that the CA must attest.
    pub id: SpiffeId,
    /// The trust domain of [`Self::id`].
    pub trust_domain: TrustDomain,
    /// The roots to start with: a PEM file that is there already, never fetched.
    pub root_file: PathBuf,
    /// Where key, SVID and bundle survive a restart; `None` keeps them in memory.
    pub state_dir: Option<PathBuf>,
    /// When to renew, and how long to wait after a failure.
    pub renewal: RenewalPolicy,
}

/// When to renew, and how long to wait after a failure.
#[derive(Clone, Copy, Debug)]
pub struct RenewalPolicy {
    /// Shortest time between a certificate and its renewal.
    pub interval_min: Duration,
    /// Wait after the first failure; doubles with each.
    pub backoff_min: Duration,
    /// Longest wait after a failure; also bounded by a twentieth of the SVID's life.
    pub backoff_max: Duration,
}

impl Default for RenewalPolicy {
    fn default() -> Self {
        Self {
            interval_min: Duration::from_millis(500),
            backoff_min: Duration::from_millis(500),
            backoff_max: Duration::from_mins(1),
        }
    }
}

/// Why an identity could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// The bootstrap trust cannot be read.
    #[error("root file {path} (a copy of `root.pem` in the CA's state folder)")]
    RootFile {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// The bootstrap trust is not usable.
    #[error("root file {path}")]
    Root {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: BundleError,
    },
    /// The state folder cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
}

/// Why one renewal failed. The SVID in use stays.
#[derive(Debug, thiserror::Error)]
enum RenewalError {
    #[error(transparent)]
    Issue(#[from] IssueError),
    #[error(transparent)]
    Svid(#[from] SvidError),
    #[error(transparent)]
    Publish(#[from] PublishError),
    #[error(transparent)]
    State(#[from] StateError),
}

/// What the identity is doing, for metrics and the administration port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StatusSnapshot {
    /// Certificates that were issued and put to use, the first included.
    pub renewals_ok: u64,
    /// Attempts that failed.
    pub renewals_failed: u64,
    /// Why the last attempt failed; `None` after a success.
    pub last_error: Option<String>,
    /// When the next attempt is due.
    pub next_renewal: Option<SystemTime>,
    /// Sequence of the bundle in use.
    pub bundle_sequence: u64,
    /// Bundles that were put to use.
    pub bundles_applied: u64,
    /// Bundles that were refused.
    pub bundles_refused: u64,
    /// Why the last bundle was refused; `None` after one was put to use.
    pub last_bundle_refusal: Option<String>,
    /// Times that the state folder could not be written.
    pub state_errors: u64,
}

/// Counters of one identity. Cheap to share.
#[derive(Debug, Default)]
pub struct IdentityStatus {
    renewals_ok: AtomicU64,
    renewals_failed: AtomicU64,
    bundles_applied: AtomicU64,
    bundles_refused: AtomicU64,
    state_errors: AtomicU64,
    bundle_sequence: AtomicU64,
    texts: Mutex<StatusTexts>,
}

#[derive(Debug, Default)]
struct StatusTexts {
    last_error: Option<String>,
    next_renewal: Option<SystemTime>,
    last_bundle_refusal: Option<String>,
}

impl IdentityStatus {
    /// All of it at one moment.
    pub fn snapshot(&self) -> StatusSnapshot {
        let texts = self.texts();
        StatusSnapshot {
            renewals_ok: self.renewals_ok.load(Ordering::Relaxed),
            renewals_failed: self.renewals_failed.load(Ordering::Relaxed),
            last_error: texts.last_error.clone(),
            next_renewal: texts.next_renewal,
            bundle_sequence: self.bundle_sequence.load(Ordering::Relaxed),
            bundles_applied: self.bundles_applied.load(Ordering::Relaxed),
            bundles_refused: self.bundles_refused.load(Ordering::Relaxed),
            last_bundle_refusal: texts.last_bundle_refusal.clone(),
            state_errors: self.state_errors.load(Ordering::Relaxed),
        }
    }

    fn texts(&self) -> MutexGuard<'_, StatusTexts> {
        self.texts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running identity. It lives until its cancellation token is cancelled.
#[derive(Clone, Debug)]
pub struct WorkloadIdentity {
    store: Arc<CredentialStore>,
    status: Arc<IdentityStatus>,
}

impl WorkloadIdentity {
    /// Loads what an earlier run left, publishes it at once when it is still good, and keeps
    /// `store` fresh from then on, in two tasks on `tracker`.
    ///
    /// # Errors
    ///
    /// [`IdentityError`] when the bootstrap trust or the state folder cannot be used. That the CA
    /// is absent is no error: [`CredentialStore::current`] stays `None` until it answers.
    pub fn start(
        config: IdentityConfig,
        issuer: Arc<dyn Issue>,
        store: Arc<CredentialStore>,
        tracker: &TaskTracker,
        cancel: CancellationToken,
    ) -> Result<Self, IdentityError> {
        let (trust, state) = open_trust(&config)?;
        let status = Arc::new(IdentityStatus::default());
        let sequence = trust.bundles.sequence();
        status.bundle_sequence.store(sequence, Ordering::Relaxed);
        let engine = Arc::new(Engine {
            config,
            issuer,
            store: Arc::clone(&store),
            state,
            trust: Mutex::new(trust),
            status: Arc::clone(&status),
            renew_now: Notify::new(),
            tracker: tracker.clone(),
        });
        engine.publish_kept_svid()?;
        let (renewing, following) = (Arc::clone(&engine), engine);
        let (renew_cancel, follow_cancel) = (cancel.clone(), cancel);
        tracker.spawn(async move {
            tokio::select! {
                () = renew_cancel.cancelled() => {}
                () = renewing.keep_renewing() => {}
            }
        });
        tracker.spawn(async move {
            tokio::select! {
                () = follow_cancel.cancelled() => {}
                () = following.keep_following() => {}
            }
        });
        Ok(Self { store, status })
    }

    /// Where the credentials are.
    pub fn store(&self) -> &Arc<CredentialStore> {
        &self.store
    }

    /// How it is doing.
    pub fn status(&self) -> &Arc<IdentityStatus> {
        &self.status
    }
}

/// The trust to start with: the bundle that an earlier run kept, else the bootstrap file.
fn open_trust(config: &IdentityConfig) -> Result<(Trust, Option<Arc<StateDir>>), IdentityError> {
    let path = || config.root_file.clone();
    let pem = std::fs::read(&config.root_file).map_err(|source| IdentityError::RootFile {
        path: path(),
        source,
    })?;
    let bundles =
        BundleSet::from_pem(&config.trust_domain, &pem).map_err(|source| IdentityError::Root {
            path: path(),
            source,
        })?;
    let bootstrap = Trust::from_bundles(bundles);
    let Some(folder) = &config.state_dir else {
        return Ok((bootstrap, None));
    };
    let state = StateDir::open(folder, &pem)?;
    let kept = match state.load_bundle() {
        Ok(kept) => kept,
        Err(error) => {
            warn!(error = %chain_of(&error), "kept bundle ignored");
            None
        }
    };
    let trust = kept.and_then(|update| match update.check(&config.trust_domain) {
        Ok(trust) => Some(trust),
        Err(error) => {
            warn!(error = %chain_of(&error), "kept bundle ignored");
            None
        }
    });
    Ok((trust.unwrap_or(bootstrap), Some(Arc::new(state))))
}

struct Engine {
    config: IdentityConfig,
    issuer: Arc<dyn Issue>,
    store: Arc<CredentialStore>,
    state: Option<Arc<StateDir>>,
    /// Held over every publication, so that an SVID never brings an older trust back.
    trust: Mutex<Trust>,
    status: Arc<IdentityStatus>,
    renew_now: Notify,
    /// A write that has begun is waited for at shutdown, so that the folder is free afterwards.
    tracker: TaskTracker,
}

impl Engine {
    fn publish_kept_svid(&self) -> Result<(), IdentityError> {
        let Some(state) = &self.state else {
            return Ok(());
        };
        let Some(svid) = state.load_svid(&self.config.id)? else {
            return Ok(());
        };
        let (serial, not_after) = (svid.serial.clone(), svid.not_after);
        match self.publish_svid(Arc::new(svid)) {
            Ok(epoch) => info!(
                peer.id = %self.config.id, %serial, generation = epoch, "svid of the last run is used"
            ),
            Err(error) => warn!(
                error = %chain_of(&error), %serial, ?not_after,
                "svid of the last run is not usable"
            ),
        }
        Ok(())
    }

    async fn keep_renewing(&self) {
        let mut pending: Option<WorkloadKey> = self.kept_pending_key().await;
        let mut failures = 0_u32;
        let mut due = self.store.current().map(|current| {
            let svid = current.svid();
            self.renewal_time(svid, svid.not_before)
        });
        loop {
            if let Some(due) = due {
                self.status.texts().next_renewal = Some(due);
                tokio::select! {
                    () = self.store.clock().sleep_until(due) => {}
                    () = self.renew_now.notified() => {}
                }
            }
            due = Some(match self.renew(&mut pending).await {
                Ok(svid) => {
                    failures = 0;
                    self.status.renewals_ok.fetch_add(1, Ordering::Relaxed);
                    self.status.texts().last_error = None;
                    self.renewal_time(&svid, self.store.clock().now())
                }
                Err(error) => {
                    failures = failures.saturating_add(1);
                    let delay = self.backoff(failures);
                    self.report_failure(&error, delay);
                    self.store.clock().now() + delay
                }
            });
        }
    }

    /// Half of what is left at `from`, give or take a tenth of it.
    fn renewal_time(&self, svid: &Svid, from: SystemTime) -> SystemTime {
        let from = from.max(svid.not_before);
        let life = svid.not_after.duration_since(from).unwrap_or_default();
        let half = life.mul_f64(0.45 + 0.1 * fastrand::f64());
        let earliest = self.store.clock().now() + self.config.renewal.interval_min;
        (from + half).max(earliest)
    }

    fn backoff(&self, failures: u32) -> Duration {
        let policy = &self.config.renewal;
        let doubled = 1_u32
            .checked_shl(failures.saturating_sub(1))
            .unwrap_or(u32::MAX);
        let life = self
            .store
            .current()
            .map(|current| current.svid().lifetime());
        let cap = life.map_or(policy.backoff_max, |life| policy.backoff_max.min(life / 20));
        let delay = policy.backoff_min.saturating_mul(doubled).min(cap);
        delay
            .max(policy.backoff_min)
            .mul_f64(0.5 + 0.5 * fastrand::f64())
    }

    fn report_failure(&self, error: &RenewalError, delay: Duration) {
        let text = chain_of(error);
        self.status.renewals_failed.fetch_add(1, Ordering::Relaxed);
        match self.store.current() {
            Some(current) if self.store.clock().now() <= current.svid().not_after => {
                warn!(error = %text, retry_in = ?delay, "svid renewal failed; the old one stays");
            }
            _ => error!(error = %text, retry_in = ?delay, "there is no usable svid"),
        }
        self.status.texts().last_error = Some(text);
    }

    async fn renew(&self, pending: &mut Option<WorkloadKey>) -> Result<Arc<Svid>, RenewalError> {
        let key = match pending {
            Some(key) => key.clone(),
            None => pending.insert(self.new_pending_key().await?).clone(),
        };
        let request = IssueRequest {
            csr: key.certificate_request()?,
            current: self.usable_svid(),
            verifier: Arc::new(self.verifier()),
        };
        let chain = match self.issuer.issue(request).await {
            Ok(chain) => chain,
            Err(error) => {
                if matches!(
                    error,
                    IssueError::Refused {
                        wants_new_key: true,
                        ..
                    }
                ) {
                    *pending = None;
                    self.on_disk(StateDir::remove_pending_key).await;
                }
                return Err(error.into());
            }
        };
        let svid = Arc::new(Svid::parse(chain, key, &self.config.id)?);
        let epoch = self.publish_svid(Arc::clone(&svid))?;
        *pending = None;
        let kept = Arc::clone(&svid);
        self.on_disk(move |state| {
            state.store_svid(&kept)?;
            // Only now: with the old SVID still on disk, the same key must be asked for again.
            state.remove_pending_key()
        })
        .await;
        info!(
            peer.id = %svid.id, serial = %svid.serial, generation = epoch,
            not_after = timestamp(svid.not_after), "svid rotated"
        );
        Ok(svid)
    }

    async fn kept_pending_key(&self) -> Option<WorkloadKey> {
        let key = self.state.as_ref()?.load_pending_key();
        let key = match key {
            Ok(key) => key?,
            Err(error) => {
                warn!(error = %chain_of(&error), "pending key ignored");
                return None;
            }
        };
        let current = self.store.current();
        let is_current = current.is_some_and(|current| current.svid().key().pkcs8() == key.pkcs8());
        if is_current {
            // The last run stored the SVID and ended before it could forget the key.
            self.on_disk(StateDir::remove_pending_key).await;
            return None;
        }
        Some(key)
    }

    async fn new_pending_key(&self) -> Result<WorkloadKey, RenewalError> {
        let key = WorkloadKey::generate()?;
        if let Some(state) = &self.state {
            let (state, kept) = (Arc::clone(state), key.clone());
            self.blocking(move || state.store_pending_key(&kept))
                .await?;
        }
        Ok(key)
    }

    /// Our SVID, as long as it can be shown: one that the CA would refuse in the handshake would
    /// only get in the way of other evidence.
    fn usable_svid(&self) -> Option<Arc<Svid>> {
        let current = self.store.current()?;
        self.store.own_svid_is_trusted().ok()?;
        Some(Arc::clone(current.svid()))
    }

    fn publish_svid(&self, svid: Arc<Svid>) -> Result<u64, PublishError> {
        let trust = self.trust();
        self.store.publish(svid, trust.clone())
    }

    async fn keep_following(&self) {
        let mut failures = 0_u32;
        loop {
            let mut heard = false;
            let ended = self.follow_once(&mut heard).await;
            if ended.is_ok() {
                // We ended it ourselves, to open another.
                failures = 0;
                continue;
            }
            // A stream that worked was no failure, however it ended.
            failures = if heard { 1 } else { failures.saturating_add(1) };
            let delay = self.backoff(failures);
            if let Err(error) = ended {
                warn!(error = %chain_of(&error), retry_in = ?delay, "bundle stream lost");
            }
            self.store.clock().sleep(delay).await;
        }
    }

    /// Follows one stream to its end; notes in `heard` that a bundle came over it.
    async fn follow_once(&self, heard: &mut bool) -> Result<(), IssueError> {
        // Before the look at the SVID: one that comes between the two would be missed.
        let mut epochs = self.store.subscribe();
        let current = self.usable_svid();
        let anonymous = current.is_none();
        let mut stream = self
            .issuer
            .watch_bundle(BundleWatch {
                current,
                verifier: Arc::new(self.verifier()),
                acknowledgement: self.acknowledgement(String::new()),
            })
            .await?;
        let mut refresh = REFRESH_DEFAULT;
        loop {
            let acknowledgement = tokio::select! {
                update = stream.updates.next() => {
                    let Some(update) = update.transpose()? else {
                        return Err(IssueError::Failed("the CA ended the bundle stream".into()));
                    };
                    *heard = true;
                    refresh = refresh_after(&update);
                    self.apply(update).await
                }
                changed = epochs.changed() => match changed {
                    // The first SVID has come. Again with it: the CA must know whose
                    // acknowledgements these are, or a change of roots waits for ever.
                    Ok(()) if anonymous && self.usable_svid().is_some() => return Ok(()),
                    Ok(()) => self.acknowledgement(String::new()),
                    Err(_) => return Ok(()),
                },
                // Nothing was heard for so long: ask again, on a new connection.
                () = self.store.clock().sleep(refresh) => return Ok(()),
            };
            acknowledge(&stream, acknowledgement)?;
        }
    }

    /// Puts a bundle to use, or refuses it; returns what to report.
    async fn apply(&self, update: TrustUpdate) -> Acknowledgement {
        let current = self.trust().bundles.sequence();
        if update.sequence() <= current {
            return self.acknowledgement(String::new());
        }
        let published = update
            .check(&self.config.trust_domain)
            .map_err(|error| chain_of(&error))
            .and_then(|trust| self.publish_trust(trust).map_err(|error| chain_of(&error)));
        if let Err(refusal) = published {
            self.status.bundles_refused.fetch_add(1, Ordering::Relaxed);
            error!(error = %refusal, generation = update.sequence(), "bundle refused");
            self.status.texts().last_bundle_refusal = Some(refusal.clone());
            return self.acknowledgement(refusal);
        }
        let sequence = update.sequence();
        self.status.bundles_applied.fetch_add(1, Ordering::Relaxed);
        self.status
            .bundle_sequence
            .store(sequence, Ordering::Relaxed);
        self.status.texts().last_bundle_refusal = None;
        info!(generation = sequence, "bundle put to use");
        self.on_disk(move |state| state.store_bundle(&update)).await;
        // Before the first SVID there is none to be out of trust.
        let stranded = self.store.current().is_some() && self.store.own_svid_is_trusted().is_err();
        if stranded {
            warn!(
                generation = sequence,
                "our own svid is not trusted any more; renewing now"
            );
            self.renew_now.notify_one();
        }
        self.acknowledgement(String::new())
    }

    fn publish_trust(&self, next: Trust) -> Result<(), PublishError> {
        let mut trust = self.trust();
        match self.store.publish_trust(next.clone()) {
            // The first SVID will be published with it.
            Ok(_) | Err(PublishError::NoSvid) => {
                *trust = next;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn acknowledgement(&self, refusal: String) -> Acknowledgement {
        let trust = self.trust().clone();
        let current = self.store.current();
        Acknowledgement {
            sequence: trust.bundles.sequence(),
            root_sha256: trust.root_hashes(&self.config.trust_domain),
            leaf_issuer_key_id: current
                .map(|current| current.svid().authority_key_id.clone())
                .unwrap_or_default(),
            refusal,
        }
    }

    fn verifier(&self) -> Verifier {
        Verifier::from_trust(self.trust().clone(), *self.store.limits())
    }

    fn trust(&self) -> MutexGuard<'_, Trust> {
        self.trust.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes to the state folder, if there is one. A full disk costs the next restart, never the
    /// identity in use.
    async fn on_disk(
        &self,
        write: impl FnOnce(&StateDir) -> Result<(), StateError> + Send + 'static,
    ) {
        let Some(state) = self.state.clone() else {
            return;
        };
        if let Err(error) = self.blocking(move || write(&state)).await {
            self.status.state_errors.fetch_add(1, Ordering::Relaxed);
            error!(error = %chain_of(&error), "state folder could not be written");
        }
    }

    async fn blocking(
        &self,
        write: impl FnOnce() -> Result<(), StateError> + Send + 'static,
    ) -> Result<(), StateError> {
        match self.tracker.spawn_blocking(write).await {
            Ok(result) => result,
            Err(error) => Err(StateError::Io {
                path: self.config.state_dir.clone().unwrap_or_default(),
                source: std::io::Error::other(error),
            }),
        }
    }
}

fn refresh_after(update: &TrustUpdate) -> Duration {
    match update.refresh_hint_seconds() {
        0 => REFRESH_DEFAULT,
        seconds => Duration::from_secs(seconds.into()).max(REFRESH_MIN),
    }
}

fn acknowledge(stream: &BundleStream, acknowledgement: Acknowledgement) -> Result<(), IssueError> {
    stream
        .acknowledgements
        .try_send(acknowledgement)
        .map_err(|_full_or_closed| IssueError::Failed("acknowledgements are not taken".into()))
}

/// An error with all of its sources, on one line.
fn chain_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
