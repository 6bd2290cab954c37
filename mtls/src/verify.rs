//! The one verifier: decides whether a certificate chain is a peer that we believe.
//!
//! Both directions of a handshake, the check of our own SVID before it is published, the re-check
//! of live connections and the CA's lint of what it issues all come here. webpki alone is not
//! enough for SPIFFE: it accepts a leaf that may sign, no or several URI names, an expired root and
//! more. So everything that a profile says is checked first on the parsed certificates, and webpki
//! then builds and checks the path to a root of the peer's own trust domain.
//!
//! Invariant: this module opens no socket and reads no clock; every refusal has its own reason.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::CertificateError;
use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};
use sidegate_mesh::spiffe::{SpiffeId, SpiffeIdError};
use webpki::{EndEntityCert, KeyUsage};

use crate::bundle::{BundleSet, Revocations, Root, Trust};
use crate::certificate::{Certificate, Serial};
use crate::proven::ProvenSignatures;

/// Bounds of what is accepted.
#[derive(Clone, Copy, Debug)]
pub struct VerifyLimits {
    /// Longest life of a leaf, from its first to its last moment.
    pub leaf_lifetime_max: Duration,
    /// Most certificates that a peer may present, the leaf included.
    pub chain_max: usize,
}

impl Default for VerifyLimits {
    /// A week, which leaves room for a CA configured above its default of a day; three
    /// certificates.
    fn default() -> Self {
        Self {
            leaf_lifetime_max: Duration::from_hours(7 * 24 + 1),
            chain_max: 3,
        }
    }
}

/// Why a chain is not believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// No certificate was presented.
    #[error("no certificate was presented")]
    NoCertificate,
    /// More certificates than allowed were presented.
    #[error("{count} certificates were presented, at most {max} are allowed")]
    ChainTooLong {
        /// How many came.
        count: usize,
        /// How many may come.
        max: usize,
    },
    /// The certificate cannot be read, or not in only one way.
    #[error("malformed certificate: {what}")]
    Malformed {
        /// What is wrong.
        what: String,
    },
    /// No URI among the alternative names.
    #[error("no URI among the subject's alternative names")]
    NoUriSan,
    /// More than one URI among the alternative names.
    #[error("{count} URIs among the subject's alternative names")]
    SeveralUriSans {
        /// How many.
        count: usize,
    },
    /// An alternative name that cannot be read.
    #[error("an alternative name cannot be read")]
    InvalidSan,
    /// The subject is empty but the alternative names are not critical.
    #[error("the alternative names are not critical although the subject is empty")]
    SanNotCritical,
    /// The URI is not a SPIFFE ID.
    #[error("the URI is not a SPIFFE ID")]
    BadSpiffeId(#[source] SpiffeIdError),
    /// The ID has no path: it names a trust domain, not a workload.
    #[error("the SPIFFE ID {id} has no path")]
    IdWithoutPath {
        /// The ID.
        id: String,
    },
    /// There is no bundle for the peer's trust domain.
    #[error("trust domain {trust_domain} is not trusted")]
    WrongTrustDomain {
        /// The peer's.
        trust_domain: String,
    },
    /// The leaf may act as a CA.
    #[error("the leaf is a CA")]
    LeafIsCa,
    /// Key usage of the leaf is absent, not critical, lacks digitalSignature, or may sign
    /// certificates or CRLs.
    #[error("key usage of the leaf: {what}")]
    KeyUsage {
        /// What is wrong.
        what: &'static str,
    },
    /// Extended key usage is there, but does not allow both ends of a connection.
    #[error("extended key usage must allow server and client authentication")]
    ExtKeyUsage,
    /// The leaf's time has not come.
    #[error("the certificate is not valid yet")]
    NotYetValid,
    /// The leaf's time is over.
    #[error("the certificate has expired")]
    Expired,
    /// The leaf lives longer than allowed.
    #[error("the certificate lives {seconds} s, at most {max_seconds} s are allowed")]
    LifetimeTooLong {
        /// Its life.
        seconds: u64,
        /// The bound.
        max_seconds: u64,
    },
    /// A key or signature of a kind that is not allowed.
    #[error("only P-256, P-384 and Ed25519 with SHA-256 or SHA-384 are allowed")]
    Algorithm,
    /// A certificate that should have signed another is no CA.
    #[error("an issuer is not a CA")]
    IssuerIsNotCa,
    /// Key usage of an issuer is absent, not critical, or lacks keyCertSign.
    #[error("key usage of an issuer does not allow signing certificates")]
    IssuerKeyUsage,
    /// An issuer's ID is a workload's, or another trust domain's.
    #[error("an issuer's SPIFFE ID {id} is not the trust domain's own")]
    IssuerId {
        /// The ID.
        id: String,
    },
    /// An issuer's time has not come, or is over.
    #[error("an issuer is out of date")]
    IssuerExpired,
    /// The root's time has not come, or is over.
    #[error("the root is out of date")]
    AnchorExpired,
    /// No path leads to a root of the peer's trust domain.
    #[error("no path leads to a root of the trust domain")]
    UnknownIssuer,
    /// A signature does not verify.
    #[error("a signature does not verify")]
    BadSignature,
    /// An issuer's constraint forbids the path.
    #[error("an issuer's constraint is violated: {what}")]
    Constraint {
        /// Which.
        what: &'static str,
    },
    /// A critical extension that nobody here understands.
    #[error("an unknown critical extension")]
    UnknownCriticalExtension,
    /// The identity or one of the certificates is revoked.
    #[error("revoked: {what}")]
    Revoked {
        /// The identity or serial number.
        what: String,
    },
    /// A valid peer, but not the one that was expected.
    #[error("{presented} answered where {expected} was expected")]
    UnexpectedIdentity {
        /// Who had to be there.
        expected: SpiffeId,
        /// Who was there.
        presented: SpiffeId,
    },
    /// Anything else that the path's verification refuses.
    #[error("path validation: {what}")]
    Path {
        /// Its words.
        what: String,
    },
}

impl VerifyError {
    /// The reason's code, as the log and the metrics show it.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoCertificate => "no_certificate",
            Self::ChainTooLong { .. } => "chain_too_long",
            Self::Malformed { .. } => "malformed_certificate",
            Self::NoUriSan => "no_uri_san",
            Self::SeveralUriSans { .. } => "several_uri_sans",
            Self::InvalidSan => "invalid_san",
            Self::SanNotCritical => "san_not_critical",
            Self::BadSpiffeId(_) => "bad_spiffe_id",
            Self::IdWithoutPath { .. } => "id_without_path",
            Self::WrongTrustDomain { .. } => "wrong_trust_domain",
            Self::LeafIsCa => "leaf_is_ca",
            Self::KeyUsage { .. } => "key_usage",
            Self::ExtKeyUsage => "ext_key_usage",
            Self::NotYetValid => "not_yet_valid",
            Self::Expired => "expired",
            Self::LifetimeTooLong { .. } => "lifetime_too_long",
            Self::Algorithm => "algorithm",
            Self::IssuerIsNotCa => "issuer_is_not_ca",
            Self::IssuerKeyUsage => "issuer_key_usage",
            Self::IssuerId { .. } => "issuer_id",
            Self::IssuerExpired => "issuer_expired",
            Self::AnchorExpired => "root_expired",
            Self::UnknownIssuer => "unknown_issuer",
            Self::BadSignature => "bad_signature",
            Self::Constraint { .. } => "constraint",
            Self::UnknownCriticalExtension => "critical_extension",
            Self::Revoked { .. } => "revoked",
            Self::UnexpectedIdentity { .. } => "unexpected_identity",
            Self::Path { .. } => "path",
        }
    }

    /// The nearest word that TLS has for it, which decides the alert that the peer receives.
    pub(crate) fn for_tls(&self) -> CertificateError {
        match self {
            Self::NotYetValid => CertificateError::NotValidYet,
            Self::Expired | Self::IssuerExpired | Self::AnchorExpired => CertificateError::Expired,
            Self::Revoked { .. } => CertificateError::Revoked,
            Self::UnknownIssuer | Self::WrongTrustDomain { .. } => CertificateError::UnknownIssuer,
            Self::BadSignature => CertificateError::BadSignature,
            Self::LeafIsCa
            | Self::KeyUsage { .. }
            | Self::ExtKeyUsage
            | Self::Algorithm
            | Self::IssuerIsNotCa
            | Self::IssuerKeyUsage => CertificateError::InvalidPurpose,
            Self::UnexpectedIdentity { .. } => CertificateError::ApplicationVerificationFailure,
            Self::UnknownCriticalExtension => CertificateError::UnhandledCriticalExtension,
            Self::NoCertificate
            | Self::ChainTooLong { .. }
            | Self::Malformed { .. }
            | Self::NoUriSan
            | Self::SeveralUriSans { .. }
            | Self::InvalidSan
            | Self::SanNotCritical
            | Self::BadSpiffeId(_)
            | Self::IdWithoutPath { .. }
            | Self::LifetimeTooLong { .. }
            | Self::IssuerId { .. }
            | Self::Constraint { .. }
            | Self::Path { .. } => CertificateError::BadEncoding,
        }
    }
}

/// A certificate chain that was verified, and what it says.
#[derive(Clone, PartialEq, Eq)]
pub struct PeerCertificate {
    /// The leaf's only SPIFFE ID.
    pub id: SpiffeId,
    /// The leaf's serial number.
    pub serial: Serial,
    /// First moment at which the leaf counts.
    pub not_before: SystemTime,
    /// Last moment at which the leaf, and every issuer presented with it, counts.
    pub not_after: SystemTime,
    /// SHA-256 of the leaf's public key (`SubjectPublicKeyInfo`, DER).
    pub public_key_sha256: [u8; 32],
    /// The leaf's authority key identifier; empty without one.
    pub authority_key_id: Vec<u8>,
    /// What was presented, leaf first.
    pub chain: Arc<[CertificateDer<'static>]>,
}

impl fmt::Debug for PeerCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerCertificate")
            .field("id", &self.id)
            .field("serial", &self.serial)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// Decides whom to believe, by one set of roots and revocations.
#[derive(Clone, Debug)]
pub struct Verifier {
    trust: Trust,
    limits: VerifyLimits,
    proven: Arc<ProvenSignatures>,
}

impl Verifier {
    /// Believes what leads to one of `bundles`' roots, is within `limits` and not in `revocations`.
    pub fn new(
        bundles: Arc<BundleSet>,
        revocations: Arc<Revocations>,
        limits: VerifyLimits,
    ) -> Self {
        let trust = Trust {
            bundles,
            revocations,
        };
        Self::from_trust(trust, limits)
    }

    /// As [`Self::new`], from roots and revocations that came together.
    pub fn from_trust(trust: Trust, limits: VerifyLimits) -> Self {
        Self {
            trust,
            limits,
            proven: Arc::default(),
        }
    }

    /// Roots and revocations that decide.
    pub fn trust(&self) -> &Trust {
        &self.trust
    }

    /// The bounds that decide.
    pub fn limits(&self) -> &VerifyLimits {
        &self.limits
    }

    /// Verifies `chain`, leaf first, at `now`; with `expected`, only exactly that identity.
    ///
    /// # Errors
    ///
    /// [`VerifyError`] says why the chain is not believed. With several defects, the first one in
    /// the order of this module's checks is reported.
    pub fn verify(
        &self,
        chain: &[CertificateDer<'_>],
        now: SystemTime,
        expected: Option<&SpiffeId>,
    ) -> Result<PeerCertificate, VerifyError> {
        let (leaf_der, issuer_ders) = chain.split_first().ok_or(VerifyError::NoCertificate)?;
        if chain.len() > self.limits.chain_max {
            return Err(VerifyError::ChainTooLong {
                count: chain.len(),
                max: self.limits.chain_max,
            });
        }
        let leaf = Certificate::parse(leaf_der)?;
        let id = check_leaf(&leaf)?;
        let roots = self.roots_of(&id)?;
        self.check_dates(&leaf, now)?;
        let issuers = check_issuers(issuer_ders, &id, now)?;
        if !leaf.algorithms_are_allowed() {
            return Err(VerifyError::Algorithm);
        }
        let path = Presented {
            leaf: leaf_der,
            issuers: issuer_ders,
            now,
            proven: &self.proven,
        };
        path.check(roots)?;
        self.check_revoked(&id, std::iter::once(&leaf).chain(&issuers))?;
        if let Some(expected) = expected.filter(|expected| **expected != id) {
            return Err(VerifyError::UnexpectedIdentity {
                expected: expected.clone(),
                presented: id,
            });
        }
        let ends = std::iter::once(&leaf)
            .chain(&issuers)
            .map(Certificate::not_after);
        Ok(PeerCertificate {
            id,
            serial: leaf.serial().clone(),
            not_before: leaf.not_before(),
            not_after: ends.min().unwrap_or(now),
            public_key_sha256: leaf.public_key_sha256(),
            authority_key_id: leaf.authority_key_id(),
            chain: chain
                .iter()
                .cloned()
                .map(CertificateDer::into_owned)
                .collect(),
        })
    }

    fn roots_of(&self, id: &SpiffeId) -> Result<&[Root], VerifyError> {
        let roots = self.trust.bundles.roots(id.trust_domain());
        roots.ok_or_else(|| VerifyError::WrongTrustDomain {
            trust_domain: id.trust_domain().to_owned(),
        })
    }

    fn check_dates(&self, leaf: &Certificate<'_>, now: SystemTime) -> Result<(), VerifyError> {
        let (not_before, not_after) = (leaf.not_before(), leaf.not_after());
        if now < not_before {
            return Err(VerifyError::NotYetValid);
        }
        if now > not_after {
            return Err(VerifyError::Expired);
        }
        let life = not_after.duration_since(not_before).unwrap_or_default();
        if life > self.limits.leaf_lifetime_max {
            return Err(VerifyError::LifetimeTooLong {
                seconds: life.as_secs(),
                max_seconds: self.limits.leaf_lifetime_max.as_secs(),
            });
        }
        Ok(())
    }

    fn check_revoked<'c, 'a: 'c>(
        &self,
        id: &SpiffeId,
        mut presented: impl Iterator<Item = &'c Certificate<'a>>,
    ) -> Result<(), VerifyError> {
        let revocations = &self.trust.revocations;
        if revocations.has_id(id) {
            return Err(VerifyError::Revoked {
                what: id.to_string(),
            });
        }
        let revoked = presented.find(|certificate| revocations.has_serial(certificate.serial()));
        match revoked {
            Some(certificate) => Err(VerifyError::Revoked {
                what: certificate.serial().to_string(),
            }),
            None => Ok(()),
        }
    }
}

/// What the X.509-SVID profile says of a leaf; returns its identity.
pub(crate) fn check_leaf(leaf: &Certificate<'_>) -> Result<SpiffeId, VerifyError> {
    let id = leaf.spiffe_id()?;
    if id.path().is_empty() {
        return Err(VerifyError::IdWithoutPath { id: id.to_string() });
    }
    if leaf.is_ca() {
        return Err(VerifyError::LeafIsCa);
    }
    let refuse = |what| Err(VerifyError::KeyUsage { what });
    match leaf.key_usage() {
        None => return refuse("absent"),
        Some((usage, _)) if usage.key_cert_sign() => return refuse("may sign certificates"),
        Some((usage, _)) if usage.crl_sign() => return refuse("may sign CRLs"),
        Some((usage, _)) if !usage.digital_signature() => return refuse("no digitalSignature"),
        Some((_, false)) => return refuse("not critical"),
        Some((_, true)) => {}
    }
    if !leaf.serves_both_ends() {
        return Err(VerifyError::ExtKeyUsage);
    }
    if !leaf.alternative_name_is_critical_enough() {
        return Err(VerifyError::SanNotCritical);
    }
    Ok(id)
}

/// Every presented issuer is checked, also one that the path will not use.
fn check_issuers<'a>(
    ders: &'a [CertificateDer<'_>],
    id: &SpiffeId,
    now: SystemTime,
) -> Result<Vec<Certificate<'a>>, VerifyError> {
    let mut issuers = Vec::with_capacity(ders.len());
    for der in ders {
        let issuer = Certificate::parse(der)?;
        issuer.check_issuer(id.trust_domain())?;
        if now < issuer.not_before() || now > issuer.not_after() {
            return Err(VerifyError::IssuerExpired);
        }
        issuers.push(issuer);
    }
    Ok(issuers)
}

/// A chain as it was presented, of which a path is built at one moment.
struct Presented<'a> {
    leaf: &'a CertificateDer<'a>,
    issuers: &'a [CertificateDer<'a>],
    now: SystemTime,
    proven: &'a ProvenSignatures,
}

impl Presented<'_> {
    /// Builds and checks a path to one of `roots` that is in date.
    fn check(&self, roots: &[Root]) -> Result<(), VerifyError> {
        let in_date = roots.iter().filter(|root| root.is_valid_at(self.now));
        let usable: Vec<TrustAnchor<'_>> = in_date.map(|root| root.anchor().clone()).collect();
        let refusal = match self.leads_to(&usable) {
            Ok(()) => return Ok(()),
            Err(refusal) => refusal,
        };
        // The rest only says the true reason. Roots of one name hide it: the wrong one's signature.
        let one_by_one = usable.iter().map(std::slice::from_ref);
        let specific = one_by_one
            .filter_map(|root| self.leads_to(root).err())
            .find(|error| {
                !matches!(
                    error,
                    VerifyError::BadSignature | VerifyError::UnknownIssuer
                )
            });
        if let Some(specific) = specific {
            return Err(specific);
        }
        let every: Vec<TrustAnchor<'_>> = roots.iter().map(|root| root.anchor().clone()).collect();
        if usable.len() < every.len() && self.leads_to(&every).is_ok() {
            return Err(VerifyError::AnchorExpired);
        }
        if refusal == VerifyError::BadSignature && self.is_sound_without_root() {
            return Err(VerifyError::UnknownIssuer);
        }
        Err(refusal)
    }

    /// Whether the presented chain is whole in itself. Then a signature that does not verify is the
    /// root's: another CA of the same name, or a root that was replaced.
    fn is_sound_without_root(&self) -> bool {
        let Some((top, between)) = self.issuers.split_last() else {
            return false;
        };
        // Nothing of this leads to a root of ours: a stranger's signatures are not remembered.
        let path = Presented {
            issuers: between,
            proven: &ProvenSignatures::default(),
            ..*self
        };
        webpki::anchor_from_trusted_cert(top).is_ok_and(|anchor| path.leads_to(&[anchor]).is_ok())
    }

    fn leads_to(&self, anchors: &[TrustAnchor<'_>]) -> Result<(), VerifyError> {
        // Both usages were already demanded of every certificate that limits itself.
        self.leads_to_for(KeyUsage::client_auth(), anchors)
    }

    fn leads_to_for(
        &self,
        usage: KeyUsage,
        anchors: &[TrustAnchor<'_>],
    ) -> Result<(), VerifyError> {
        let since_epoch = self.now.duration_since(SystemTime::UNIX_EPOCH);
        let now = UnixTime::since_unix_epoch(since_epoch.unwrap_or_default());
        let verified = EndEntityCert::try_from(self.leaf).and_then(|leaf| {
            self.proven.with(|algorithms| {
                leaf.verify_for_usage(algorithms, anchors, self.issuers, now, usage, None, None)
                    .map(drop)
            })
        });
        verified.map_err(|error| path_error(&error))
    }
}

fn path_error(error: &webpki::Error) -> VerifyError {
    use webpki::Error;
    match error {
        Error::UnknownIssuer => VerifyError::UnknownIssuer,
        Error::InvalidSignatureForPublicKey => VerifyError::BadSignature,
        Error::CertExpired { .. } | Error::CertNotValidYet { .. } => VerifyError::IssuerExpired,
        Error::EndEntityUsedAsCa => VerifyError::IssuerIsNotCa,
        Error::CaUsedAsEndEntity => VerifyError::LeafIsCa,
        Error::RequiredEkuNotFoundContext(_) | Error::EmptyEkuExtension => VerifyError::ExtKeyUsage,
        Error::PathLenConstraintViolated => VerifyError::Constraint {
            what: "path length",
        },
        Error::NameConstraintViolation => VerifyError::Constraint { what: "names" },
        Error::UnsupportedCriticalExtension => VerifyError::UnknownCriticalExtension,
        Error::UnsupportedSignatureAlgorithmContext(_)
        | Error::UnsupportedSignatureAlgorithmForPublicKeyContext(_)
        | Error::SignatureAlgorithmMismatch => VerifyError::Algorithm,
        Error::BadDer
        | Error::BadDerTime
        | Error::ExtensionValueInvalid
        | Error::MalformedExtensions
        | Error::TrailingData(_)
        | Error::InvalidCertValidity
        | Error::InvalidSerialNumber => VerifyError::Malformed {
            what: error.to_string(),
        },
        other => VerifyError::Path {
            what: other.to_string(),
        },
    }
}

#[cfg(test)]
mod limbo;

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
    use rcgen::{KeyUsagePurpose, SanType};
    use sidegate_mesh::spiffe::TrustDomain;

    use super::*;

    /// Since 1970.
    const NOW: Duration = Duration::from_hours(24 * 20_000);

    /// A root of the mesh, and a chain of two that it signed.
    fn root_and_chain() -> (CertificateDer<'static>, Vec<CertificateDer<'static>>) {
        let authority = |name: &str| {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
            (params, KeyPair::generate().unwrap())
        };
        let (root, issuer) = (authority("root"), authority("issuer"));
        let root_der = root.0.self_signed(&root.1).unwrap().der().clone();
        let by_root = Issuer::from_params(&root.0, &root.1);
        let issuer_der = issuer.0.signed_by(&issuer.1, &by_root).unwrap();
        let mut leaf = CertificateParams::default();
        let uri = "spiffe://mesh.local/ns/shop/sa/web".try_into().unwrap();
        leaf.subject_alt_names = vec![SanType::URI(uri)];
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.not_before = time::OffsetDateTime::UNIX_EPOCH + NOW;
        leaf.not_after = leaf.not_before + Duration::from_hours(1);
        let by_issuer = Issuer::from_params(&issuer.0, &issuer.1);
        let leaf_der = leaf.signed_by(&KeyPair::generate().unwrap(), &by_issuer);
        let chain = vec![leaf_der.unwrap().der().clone(), issuer_der.der().clone()];
        (root_der, chain)
    }

    #[test]
    fn a_stranger_leaves_nothing_in_the_memory_of_signatures() {
        let (root, chain) = root_and_chain();
        let (_, strangers) = root_and_chain();
        let mut bundles = BundleSet::new(1);
        let trust_domain: TrustDomain = "mesh.local".parse().unwrap();
        bundles.insert(&trust_domain, vec![root]).unwrap();
        let revocations = Arc::new(Revocations::none());
        let verifier = Verifier::new(Arc::new(bundles), revocations, VerifyLimits::default());
        let now = SystemTime::UNIX_EPOCH + NOW;
        let refused = verifier.verify(&strangers, now, None).unwrap_err();
        assert_eq!(refused, VerifyError::UnknownIssuer);
        assert_eq!(verifier.proven.remembered(), 0);
        verifier.verify(&chain, now, None).unwrap();
        assert_eq!(verifier.proven.remembered(), 2);
    }
}
