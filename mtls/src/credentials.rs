//! What this process shows and whom it believes, as one immutable value, and the place it is
//! swapped in.
//!
//! Invariants: a handshake loads the store once, so it never mixes two epochs; the two rustls
//! configurations of an epoch come from the same SVID and the same verifier; and nothing is
//! published that our own verifier would refuse, except after a change of trust, when the old SVID
//! stays until its renewal.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use rustls::crypto::CryptoProvider;
use rustls_pki_types::UnixTime;
use sidegate_mesh::clock::Clock;
use sidegate_mesh::spiffe::SpiffeId;
use tokio::sync::watch;

use crate::bundle::Trust;
use crate::handshake::{Peer, Tls};
use crate::svid::Svid;
use crate::verify::{Verifier, VerifyError, VerifyLimits};

/// Why credentials were not put to use; those in use stay.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// Our own verifier refuses the SVID, so every peer would.
    #[error("our own verifier refuses the SVID")]
    Svid(#[source] VerifyError),
    /// The bundle is older than the one in use.
    #[error("bundle {sequence} is older than bundle {current}, which is in use")]
    Stale {
        /// The refused one's.
        sequence: u64,
        /// The one's in use.
        current: u64,
    },
    /// There is no SVID yet to go with the trust.
    #[error("there is no SVID yet")]
    NoSvid,
    /// rustls refuses the configuration.
    #[error("TLS configuration")]
    Tls(#[from] rustls::Error),
}

/// One epoch: our SVID, whom we believe, and the TLS configurations made of them.
pub struct Credentials {
    epoch: u64,
    svid: Arc<Svid>,
    verifier: Arc<Verifier>,
    tls: Tls,
    clock: Arc<dyn Clock>,
}

impl Credentials {
    /// Rises with every change of SVID, bundle or revocations.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Who we are.
    pub fn id(&self) -> &SpiffeId {
        &self.svid.id
    }

    /// What we show.
    pub fn svid(&self) -> &Arc<Svid> {
        &self.svid
    }

    /// What decides whom we believe.
    pub fn verifier(&self) -> &Arc<Verifier> {
        &self.verifier
    }

    /// Whom we believe.
    pub fn trust(&self) -> &Trust {
        self.verifier.trust()
    }

    /// Whether `peer`, authenticated in an earlier epoch, would still be believed now. Owners of
    /// live connections ask this after [`CredentialStore::subscribe`] reported a change.
    ///
    /// # Errors
    ///
    /// [`VerifyError`] says why not: expired, revoked, or its root was removed.
    pub fn still_trusts(&self, peer: &Peer) -> Result<(), VerifyError> {
        let chain = &peer.certificate.chain;
        let verified = self
            .verifier
            .verify(chain, self.clock.now(), Some(&peer.id));
        verified.map(drop)
    }

    pub(crate) fn tls(&self) -> &Tls {
        &self.tls
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("epoch", &self.epoch)
            .field("svid", &self.svid)
            .field("bundle", &self.trust().bundles.sequence())
            .finish_non_exhaustive()
    }
}

/// Where the current [`Credentials`] are. Shared by every thread; loading costs a few nanoseconds.
pub struct CredentialStore {
    current: ArcSwapOption<Credentials>,
    /// Held over check and swap, so that two publishers cannot interleave.
    publishing: Mutex<()>,
    epoch: watch::Sender<u64>,
    limits: VerifyLimits,
    provider: Arc<CryptoProvider>,
    clock: Arc<dyn Clock>,
}

impl CredentialStore {
    /// An empty store: whoever asks is not ready.
    pub fn new(
        limits: VerifyLimits,
        provider: Arc<CryptoProvider>,
        clock: Arc<dyn Clock>,
    ) -> Arc<Self> {
        Arc::new(Self {
            current: ArcSwapOption::empty(),
            publishing: Mutex::new(()),
            epoch: watch::Sender::new(0),
            limits,
            provider,
            clock,
        })
    }

    /// The credentials of this moment; `None` before the first SVID.
    pub fn current(&self) -> Option<Arc<Credentials>> {
        self.current.load_full()
    }

    /// Whether there is an SVID that is in date: without one, nothing may be served.
    pub fn is_ready(&self) -> bool {
        let current = self.current.load();
        let not_after = current.as_ref().map(|current| current.svid.not_after);
        not_after.is_some_and(|end| self.clock.now() <= end)
    }

    /// Reports each new epoch. A receiver that is slow sees the latest, not all of them.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.epoch.subscribe()
    }

    /// The clock by which everything here is judged.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// The cryptography that is spoken.
    pub fn provider(&self) -> &Arc<CryptoProvider> {
        &self.provider
    }

    /// The bounds of what is accepted.
    pub fn limits(&self) -> &VerifyLimits {
        &self.limits
    }

    /// Makes `svid` and `trust` current for every later handshake; returns the new epoch.
    ///
    /// Open connections keep what they were built with; their owners hear of the epoch through
    /// [`Self::subscribe`].
    ///
    /// # Errors
    ///
    /// [`PublishError`] when our own verifier refuses the SVID, or `trust` is older than the one in
    /// use; the old credentials stay.
    pub fn publish(&self, svid: Arc<Svid>, trust: Trust) -> Result<u64, PublishError> {
        let _held = self.hold();
        self.refuse_older(&trust)?;
        let verifier = Verifier::from_trust(trust, self.limits);
        verifier
            .verify(&svid.chain, self.clock.now(), Some(&svid.id))
            .map_err(PublishError::Svid)?;
        self.swap(svid, Arc::new(verifier))
    }

    /// Makes `svid` current, with the trust that is in use.
    ///
    /// # Errors
    ///
    /// [`PublishError`] when there is no trust yet, or our own verifier refuses the SVID.
    pub fn publish_svid(&self, svid: Arc<Svid>) -> Result<u64, PublishError> {
        let _held = self.hold();
        let current = self.current().ok_or(PublishError::NoSvid)?;
        let verifier = Arc::clone(&current.verifier);
        verifier
            .verify(&svid.chain, self.clock.now(), Some(&svid.id))
            .map_err(PublishError::Svid)?;
        self.swap(svid, verifier)
    }

    /// Makes `trust` current, with the SVID that is in use, even when that SVID does not follow
    /// from it any more: a root that was removed must not be believed a moment longer because our
    /// own renewal is late. [`Self::own_svid_is_trusted`] then says so.
    ///
    /// # Errors
    ///
    /// [`PublishError::Stale`] when `trust` is older, [`PublishError::NoSvid`] before the first.
    pub fn publish_trust(&self, trust: Trust) -> Result<u64, PublishError> {
        let _held = self.hold();
        let current = self.current().ok_or(PublishError::NoSvid)?;
        self.refuse_older(&trust)?;
        let verifier = Arc::new(Verifier::from_trust(trust, self.limits));
        self.swap(Arc::clone(&current.svid), verifier)
    }

    /// Whether our own verifier still believes our own SVID at this moment.
    ///
    /// # Errors
    ///
    /// [`VerifyError`] says why not; a store without an SVID has no certificate.
    pub fn own_svid_is_trusted(&self) -> Result<(), VerifyError> {
        let current = self.current().ok_or(VerifyError::NoCertificate)?;
        let svid = &current.svid;
        let verified = current
            .verifier
            .verify(&svid.chain, self.clock.now(), Some(&svid.id));
        verified.map(drop)
    }

    fn refuse_older(&self, trust: &Trust) -> Result<(), PublishError> {
        let sequence = trust.bundles.sequence();
        match self.current() {
            Some(current) if sequence < current.trust().bundles.sequence() => {
                Err(PublishError::Stale {
                    sequence,
                    current: current.trust().bundles.sequence(),
                })
            }
            _ => Ok(()),
        }
    }

    fn swap(&self, svid: Arc<Svid>, verifier: Arc<Verifier>) -> Result<u64, PublishError> {
        let epoch = *self.epoch.borrow() + 1;
        let tls = Tls::build(&self.provider, &self.clock, &verifier, Some(&svid))?;
        self.current.store(Some(Arc::new(Credentials {
            epoch,
            svid,
            verifier,
            tls,
            clock: Arc::clone(&self.clock),
        })));
        self.epoch.send_replace(epoch);
        Ok(epoch)
    }

    fn hold(&self) -> std::sync::MutexGuard<'_, ()> {
        self.publishing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for CredentialStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CredentialStore")
            .field("current", &self.current())
            .finish_non_exhaustive()
    }
}

/// rustls' view of our clock.
pub(crate) struct ClockTime(pub(crate) Arc<dyn Clock>);

impl rustls::time_provider::TimeProvider for ClockTime {
    fn current_time(&self) -> Option<UnixTime> {
        let since_epoch = self.0.now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
        Some(UnixTime::since_unix_epoch(since_epoch))
    }
}

impl fmt::Debug for ClockTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClockTime")
    }
}

/// The moment that rustls hands to a verifier.
pub(crate) fn system_time(now: UnixTime) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(now.as_secs())
}
