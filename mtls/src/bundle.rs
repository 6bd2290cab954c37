//! Whom we trust: the roots of each trust domain, and what is revoked.
//!
//! Invariants: roots of different trust domains are never pooled, and no root serves two of them;
//! every root in a [`BundleSet`] is a certificate that may sign (cA, keyCertSign, no workload's
//! ID). Whether a root is in date is asked at each verification, because it changes with time.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::SystemTime;

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, TrustAnchor};
use sidegate_api::identity as proto;
use sidegate_mesh::spiffe::{SpiffeId, TrustDomain};

use crate::certificate::{Certificate, Serial, sha256};
use crate::verify::VerifyError;

/// Most trust domains in one bundle set.
const TRUST_DOMAINS_MAX: usize = 64;
/// Most roots of one trust domain.
const ROOTS_MAX: usize = 16;
/// Most revoked identities and serial numbers, together.
const REVOCATIONS_MAX: usize = 100_000;

/// Why a bundle was not accepted. The one in use stays.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The file is not PEM, or has no certificate.
    #[error("no PEM certificate could be read: {0}")]
    Pem(String),
    /// A root may not sign.
    #[error("root {number} of trust domain {trust_domain} is not usable")]
    Root {
        /// Whose bundle.
        trust_domain: String,
        /// Which root, counted from 1.
        number: usize,
        /// What is wrong with it.
        #[source]
        reason: VerifyError,
    },
    /// The same key is a root of two trust domains, so each could speak for the other.
    #[error("trust domains {first} and {second} share a root")]
    SharedRoot {
        /// One of the two.
        first: String,
        /// The other.
        second: String,
    },
    /// A trust domain's name is not allowed, or occurs twice.
    #[error("trust domain {0:?} is not a name, or occurs twice")]
    TrustDomain(String),
    /// Our own trust domain has no root in it: accepting it would cut us off from everybody.
    #[error("the bundle has no root of our own trust domain {0}")]
    OwnTrustDomainMissing(TrustDomain),
    /// A revocation names nothing that exists.
    #[error("revocation {0:?} is neither a SPIFFE ID nor a serial number")]
    Revocation(String),
    /// More entries than this process is willing to hold.
    #[error("the bundle has more than {max} {what}")]
    TooLarge {
        /// What there is too much of.
        what: &'static str,
        /// The bound.
        max: usize,
    },
}

/// One root certificate.
#[derive(Clone)]
pub struct Root {
    der: CertificateDer<'static>,
    sha256: [u8; 32],
    public_key_sha256: [u8; 32],
    not_before: SystemTime,
    not_after: SystemTime,
    anchor: TrustAnchor<'static>,
}

impl Root {
    /// Parses and checks one root of `trust_domain`.
    ///
    /// # Errors
    ///
    /// [`VerifyError`] when it may not sign certificates of that trust domain.
    pub fn parse(
        der: CertificateDer<'static>,
        trust_domain: &TrustDomain,
    ) -> Result<Self, VerifyError> {
        let certificate = Certificate::parse(&der)?;
        certificate.check_issuer(trust_domain.as_str())?;
        if certificate.has_unknown_critical_extension() {
            return Err(VerifyError::UnknownCriticalExtension);
        }
        let (not_before, not_after) = (certificate.not_before(), certificate.not_after());
        let public_key_sha256 = certificate.public_key_sha256();
        drop(certificate);
        let anchor = webpki::anchor_from_trusted_cert(&der)
            .map_err(|error| VerifyError::Malformed {
                what: error.to_string(),
            })?
            .to_owned();
        Ok(Self {
            sha256: sha256(&der),
            public_key_sha256,
            not_before,
            not_after,
            anchor,
            der,
        })
    }

    /// The certificate, DER.
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// SHA-256 of the DER certificate.
    pub fn sha256(&self) -> &[u8; 32] {
        &self.sha256
    }

    /// The last moment at which it counts.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Whether it counts at `now`.
    pub fn is_valid_at(&self, now: SystemTime) -> bool {
        self.not_before <= now && now <= self.not_after
    }

    pub(crate) fn anchor(&self) -> &TrustAnchor<'static> {
        &self.anchor
    }
}

impl std::fmt::Debug for Root {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Root")
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// The roots of every trust domain that we know, at one sequence.
#[derive(Clone, Debug, Default)]
pub struct BundleSet {
    sequence: u64,
    domains: BTreeMap<String, Vec<Root>>,
}

impl BundleSet {
    /// Trusts nobody yet.
    pub fn new(sequence: u64) -> Self {
        Self {
            sequence,
            domains: BTreeMap::new(),
        }
    }

    /// The roots of `trust_domain` from a PEM file, at sequence 0: the trust that a sidecar starts
    /// with.
    ///
    /// # Errors
    ///
    /// [`BundleError`] when there is no certificate in it, or one is not usable as a root.
    pub fn from_pem(trust_domain: &TrustDomain, pem: &[u8]) -> Result<Self, BundleError> {
        let roots = CertificateDer::pem_slice_iter(pem)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| BundleError::Pem(error.to_string()))?;
        if roots.is_empty() {
            return Err(BundleError::Pem("no CERTIFICATE section".into()));
        }
        let mut bundles = Self::new(0);
        bundles.insert(trust_domain, roots)?;
        Ok(bundles)
    }

    /// Adds the roots of one trust domain. No roots at all means that nobody there is believed.
    ///
    /// # Errors
    ///
    /// [`BundleError`] when the trust domain is already there, or a root is not usable; nothing is
    /// added then.
    pub fn insert(
        &mut self,
        trust_domain: &TrustDomain,
        roots: Vec<CertificateDer<'static>>,
    ) -> Result<(), BundleError> {
        let name = trust_domain.to_string();
        if self.domains.contains_key(&name) {
            return Err(BundleError::TrustDomain(name));
        }
        within(roots.len(), ROOTS_MAX, "roots of one trust domain")?;
        within(self.domains.len() + 1, TRUST_DOMAINS_MAX, "trust domains")?;
        let mut parsed = Vec::with_capacity(roots.len());
        for (index, der) in roots.into_iter().enumerate() {
            let root = Root::parse(der, trust_domain).map_err(|reason| BundleError::Root {
                trust_domain: name.clone(),
                number: index + 1,
                reason,
            })?;
            if let Some(other) = self.domain_with_key(&root.public_key_sha256) {
                return Err(BundleError::SharedRoot {
                    first: other.to_owned(),
                    second: name,
                });
            }
            parsed.push(root);
        }
        self.domains.insert(name, parsed);
        Ok(())
    }

    /// The number that rises with every change; 0 for a bootstrap file.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The roots of one trust domain; `None` when it is unknown.
    pub fn roots(&self, trust_domain: &str) -> Option<&[Root]> {
        self.domains.get(trust_domain).map(Vec::as_slice)
    }

    /// The names of the trust domains, sorted.
    pub fn trust_domains(&self) -> impl Iterator<Item = &str> {
        self.domains.keys().map(String::as_str)
    }

    fn domain_with_key(&self, public_key_sha256: &[u8; 32]) -> Option<&str> {
        let holds = |roots: &Vec<Root>| {
            let mut keys = roots.iter().map(|root| &root.public_key_sha256);
            keys.any(|key| key == public_key_sha256)
        };
        let mut domains = self.domains.iter();
        domains.find_map(|(name, roots)| holds(roots).then_some(name.as_str()))
    }
}

/// What is no longer believed although its certificate is in date.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Revocations {
    ids: HashSet<SpiffeId>,
    serials: HashSet<Serial>,
}

impl Revocations {
    /// Nothing is revoked.
    pub fn none() -> Self {
        Self::default()
    }

    /// Exactly these are revoked.
    pub fn new(
        ids: impl IntoIterator<Item = SpiffeId>,
        serials: impl IntoIterator<Item = Serial>,
    ) -> Self {
        Self {
            ids: ids.into_iter().collect(),
            serials: serials.into_iter().collect(),
        }
    }

    /// Whether no certificate of this identity is believed.
    pub fn has_id(&self, id: &SpiffeId) -> bool {
        self.ids.contains(id)
    }

    /// Whether this certificate is not believed.
    pub fn has_serial(&self, serial: &Serial) -> bool {
        self.serials.contains(serial)
    }

    /// How many identities and serial numbers are revoked.
    pub fn len(&self) -> usize {
        self.ids.len() + self.serials.len()
    }

    /// Whether nothing is revoked.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Whom to believe: roots and revocations, always replaced together.
#[derive(Clone, Debug, Default)]
pub struct Trust {
    /// The roots.
    pub bundles: Arc<BundleSet>,
    /// The denylist.
    pub revocations: Arc<Revocations>,
}

impl Trust {
    /// Trusts these roots and revokes nothing.
    pub fn from_bundles(bundles: BundleSet) -> Self {
        Self {
            bundles: Arc::new(bundles),
            revocations: Arc::new(Revocations::none()),
        }
    }

    /// SHA-256 of each root of one trust domain, as an acknowledgement reports them.
    pub fn root_hashes(&self, trust_domain: &TrustDomain) -> Vec<[u8; 32]> {
        let roots = self.bundles.roots(trust_domain.as_str());
        roots
            .unwrap_or_default()
            .iter()
            .map(|root| root.sha256)
            .collect()
    }
}

/// One message of the bundle stream, as it came.
#[derive(Clone, Debug)]
pub struct TrustUpdate(proto::WatchBundleResponse);

impl TrustUpdate {
    /// Wraps a message; nothing in it is believed before [`Self::check`].
    pub fn new(message: proto::WatchBundleResponse) -> Self {
        Self(message)
    }

    /// Rises with every change.
    pub fn sequence(&self) -> u64 {
        self.0.sequence
    }

    /// After how many seconds of silence to ask again; 0 when the sender does not say.
    pub fn refresh_hint_seconds(&self) -> u32 {
        self.0.refresh_hint_seconds
    }

    /// The message.
    pub fn message(&self) -> &proto::WatchBundleResponse {
        &self.0
    }

    /// Turns the message into trust that can be put to use by a member of `own`.
    ///
    /// # Errors
    ///
    /// [`BundleError`] when anything in it is not usable; then all of it is refused.
    pub fn check(&self, own: &TrustDomain) -> Result<Trust, BundleError> {
        let mut bundles = BundleSet::new(self.0.sequence);
        for bundle in &self.0.bundles {
            let name = &bundle.trust_domain;
            let trust_domain: TrustDomain = name
                .parse()
                .map_err(|_error| BundleError::TrustDomain(name.clone()))?;
            let roots = bundle.roots.iter().cloned().map(CertificateDer::from);
            bundles.insert(&trust_domain, roots.collect())?;
        }
        if bundles.roots(own.as_str()).is_none_or(<[Root]>::is_empty) {
            return Err(BundleError::OwnTrustDomainMissing(own.clone()));
        }
        let revocations = self.0.revocations.as_ref();
        Ok(Trust {
            bundles: Arc::new(bundles),
            revocations: Arc::new(revocations.map_or(Ok(Revocations::none()), parse_revocations)?),
        })
    }
}

fn parse_revocations(message: &proto::Revocations) -> Result<Revocations, BundleError> {
    let entries = message.spiffe_ids.len() + message.serials.len();
    within(entries, REVOCATIONS_MAX, "revocations")?;
    let ids: BTreeSet<SpiffeId> = message
        .spiffe_ids
        .iter()
        .map(|id| {
            id.parse()
                .map_err(|_error| BundleError::Revocation(id.clone()))
        })
        .collect::<Result<_, _>>()?;
    let serials = message
        .serials
        .iter()
        .map(|bytes| {
            Serial::from_bytes(bytes)
                .map_err(|_error| BundleError::Revocation(format!("{bytes:02x?}")))
        })
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Revocations::new(ids, serials))
}

fn within(count: usize, max: usize, what: &'static str) -> Result<(), BundleError> {
    if count > max {
        return Err(BundleError::TooLarge { what, max });
    }
    Ok(())
}
