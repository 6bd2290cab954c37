//! The signing certificates: roots, the intermediate, and the leaves made under it.
//!
//! Invariant: a leaf says exactly what its [`Issuance`] says and nothing else: one URI name, the DNS
//! names that the issuance lists, digitalSignature, both ends of TLS, cA=false. No certificate
//! outlives its issuer.

use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use sidegate_mesh::spiffe::{SpiffeId, TrustDomain};
use time::OffsetDateTime;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use crate::digest::{Digest, Serial};
use crate::key::Key;
use crate::ledger::Issuance;

/// Life of a root.
pub const ROOT_LIFETIME: Duration = Duration::from_hours(24 * 3_652);

/// Life of an intermediate; it is renewed when half of it is over.
pub const INTERMEDIATE_LIFETIME: Duration = Duration::from_hours(24 * 30);

/// Why a root cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RootProblem {
    /// It is not a certificate, or says of itself that it may not sign.
    #[error("it is not a usable root: {0}")]
    Unusable(String),
    /// Its time has not come or is over.
    #[error("it has expired or is not valid yet: it is valid from {from} to {to}")]
    OutOfDate {
        /// First moment, RFC 3339.
        from: String,
        /// Last moment, RFC 3339.
        to: String,
    },
    /// It lives longer than the ten years that a root may.
    #[error("it is over-long: a root lives at most 10 years")]
    OverLong,
    /// Another key signed it.
    #[error("it is not signed by its own key")]
    NotSelfSigned,
}

/// A root certificate that may be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    /// The certificate.
    pub der: CertificateDer<'static>,
    /// Of the DER certificate.
    pub sha256: Digest,
    /// Of its public key's DER `SubjectPublicKeyInfo`.
    pub public_key_sha256: Digest,
    /// Last moment at which it counts.
    pub not_after: SystemTime,
}

impl Root {
    /// Makes a self-signed root for `key`.
    ///
    /// # Errors
    ///
    /// When the cryptographic library fails.
    pub fn make(
        trust_domain: &TrustDomain,
        key: &Key,
        serial: Serial,
        now: SystemTime,
    ) -> Result<CertificateDer<'static>, rcgen::Error> {
        let name = format!("Sidegate root {}", key.public_key_sha256());
        let mut params = signing_params(trust_domain, &short(&name), serial)?;
        params.not_before = date(now - BACKDATE);
        params.not_after = date(now + ROOT_LIFETIME - BACKDATE);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        Ok(params.self_signed(key)?.into())
    }

    /// Checks a root of `trust_domain` as the CA needs it at `now`.
    ///
    /// # Errors
    ///
    /// [`RootProblem`].
    pub fn check(
        der: &CertificateDer<'static>,
        trust_domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<Self, RootProblem> {
        let root = Self::parse(der, trust_domain)?;
        let (_, x509) = X509Certificate::from_der(&root.der)
            .map_err(|error| RootProblem::Unusable(error.to_string()))?;
        let validity = x509.validity();
        let (from, to) = (
            validity.not_before.timestamp(),
            validity.not_after.timestamp(),
        );
        let seconds = unix_seconds(now).cast_signed();
        if seconds < from || seconds > to {
            let show = |at: i64| humantime::format_rfc3339_seconds(moment(at)).to_string();
            return Err(RootProblem::OutOfDate {
                from: show(from),
                to: show(to),
            });
        }
        let longest = ROOT_LIFETIME + Duration::from_hours(24);
        if to.saturating_sub(from) > longest.as_secs().cast_signed() {
            return Err(RootProblem::OverLong);
        }
        Ok(root)
    }

    /// As [`Self::check`], whatever the time: a root in the bundle may come to its end.
    ///
    /// # Errors
    ///
    /// [`RootProblem`].
    pub fn parse(
        der: &CertificateDer<'static>,
        trust_domain: &TrustDomain,
    ) -> Result<Self, RootProblem> {
        let unusable = |error: &dyn std::fmt::Display| RootProblem::Unusable(error.to_string());
        sidegate_mtls::Root::parse(der.clone(), trust_domain).map_err(|error| unusable(&error))?;
        let (_, x509) = X509Certificate::from_der(der).map_err(|error| unusable(&error))?;
        let self_signed = x509.subject() == x509.issuer()
            && crate::csr::signature_verifies(
                x509.public_key(),
                &x509.signature_algorithm,
                x509.tbs_certificate.as_ref(),
                &x509.signature_value.data,
            );
        if !self_signed {
            return Err(RootProblem::NotSelfSigned);
        }
        Ok(Self {
            sha256: Digest::of(der),
            public_key_sha256: Digest::of(x509.public_key().raw),
            not_after: moment(x509.validity().not_after.timestamp()),
            der: der.clone(),
        })
    }
}

/// The intermediate that signs leaves now.
pub struct Intermediate {
    issuer: Issuer<'static, Key>,
    /// The certificate.
    pub der: CertificateDer<'static>,
    /// First moment at which it counts.
    pub not_before: SystemTime,
    /// Last moment at which it counts; not after its root's.
    pub not_after: SystemTime,
    /// The root that signed it.
    pub root_sha256: Digest,
    /// Of its public key's DER `SubjectPublicKeyInfo`.
    pub public_key_sha256: Digest,
}

/// Why an intermediate cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IntermediateProblem {
    /// It is not a certificate that may sign.
    #[error("it is not a usable intermediate: {0}")]
    Unusable(String),
    /// The key is another one's.
    #[error("the key does not match the certificate")]
    KeyMismatch,
    /// No root that we trust signed it.
    #[error("no root of root.pem signed it")]
    UnknownRoot,
}

impl Intermediate {
    /// Makes an intermediate for `key` as `issuance` says, signed by a root.
    ///
    /// # Errors
    ///
    /// When the cryptographic library fails.
    pub fn make(
        issuance: &Issuance,
        trust_domain: &TrustDomain,
        key: &Key,
        (root, root_key): (&Root, &Key),
    ) -> Result<CertificateDer<'static>, rcgen::Error> {
        let name = format!("Sidegate intermediate {}", key.public_key_sha256());
        let mut params = signing_params(trust_domain, &short(&name), issuance.serial)?;
        params.not_before = date(unix_moment(issuance.not_before));
        params.not_after = date(unix_moment(issuance.not_after));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let issuer = Issuer::from_ca_cert_der(&root.der, root_key)?;
        Ok(params.signed_by(key, &issuer)?.into())
    }

    /// Takes an intermediate into use.
    ///
    /// # Errors
    ///
    /// [`IntermediateProblem`]. That it is out of date is none: the caller makes another.
    pub fn load(
        der: &CertificateDer<'static>,
        key: Key,
        trust_domain: &TrustDomain,
        roots: &[Root],
    ) -> Result<Self, IntermediateProblem> {
        let unusable =
            |error: &dyn std::fmt::Display| IntermediateProblem::Unusable(error.to_string());
        // The same profile: may sign, for this trust domain only, with keys that we allow.
        sidegate_mtls::Root::parse(der.clone(), trust_domain).map_err(|error| unusable(&error))?;
        let (_, x509) = X509Certificate::from_der(der).map_err(|error| unusable(&error))?;
        let public_key_sha256 = Digest::of(x509.public_key().raw);
        if key.public_key_sha256() != public_key_sha256 {
            return Err(IntermediateProblem::KeyMismatch);
        }
        let signer = roots.iter().find(|root| signed_by(&x509, root));
        let root = signer.ok_or(IntermediateProblem::UnknownRoot)?;
        let validity = x509.validity();
        Ok(Self {
            not_before: moment(validity.not_before.timestamp()),
            not_after: moment(validity.not_after.timestamp()).min(root.not_after),
            root_sha256: root.sha256,
            public_key_sha256,
            issuer: Issuer::from_ca_cert_der(der, key).map_err(|error| unusable(&error))?,
            der: der.clone(),
        })
    }

    /// Whether that is its serial number.
    pub fn has_serial(&self, serial: Serial) -> bool {
        let parsed = X509Certificate::from_der(&self.der);
        parsed.is_ok_and(|(_, x509)| x509.tbs_certificate.raw_serial() == serial.as_bytes())
    }

    /// When it is to be renewed.
    pub fn half_life(&self) -> SystemTime {
        let life = self.not_after.duration_since(self.not_before);
        self.not_before + life.unwrap_or_default() / 2
    }

    /// Signs the leaf that `issuance` describes, for that public key.
    ///
    /// # Errors
    ///
    /// When the cryptographic library fails.
    pub fn sign_leaf(
        &self,
        issuance: &Issuance,
        public_key: &impl PublicKeyData,
    ) -> Result<CertificateDer<'static>, rcgen::Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.serial_number = Some(SerialNumber::from_slice(issuance.serial.as_bytes()));
        params.not_before = date(unix_moment(issuance.not_before));
        params.not_after = date(unix_moment(issuance.not_after));
        params.subject_alt_names = vec![uri(&issuance.spiffe_id)?];
        for name in &issuance.dns_names {
            let name = SanType::DnsName(name.as_str().try_into()?);
            params.subject_alt_names.push(name);
        }
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        Ok(params.signed_by(public_key, &self.issuer)?.into())
    }

    /// The private key.
    pub fn key(&self) -> &Key {
        self.issuer.key()
    }
}

impl std::fmt::Debug for Intermediate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Intermediate")
            .field("not_after", &self.not_after)
            .field("root_sha256", &self.root_sha256)
            .finish_non_exhaustive()
    }
}

/// How far the start of a signing certificate lies in the past.
const BACKDATE: Duration = Duration::from_mins(1);

fn signing_params(
    trust_domain: &TrustDomain,
    name: &str,
    serial: Serial,
) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::default();
    let mut subject = DistinguishedName::new();
    subject.push(DnType::OrganizationName, trust_domain.as_str());
    subject.push(DnType::CommonName, name);
    params.distinguished_name = subject;
    params.serial_number = Some(SerialNumber::from_slice(serial.as_bytes()));
    params.subject_alt_names = vec![uri(&trust_domain.id())?];
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn signed_by(certificate: &X509Certificate<'_>, root: &Root) -> bool {
    let Ok((_, issuer)) = X509Certificate::from_der(&root.der) else {
        return false;
    };
    certificate.issuer() == issuer.subject()
        && crate::csr::signature_verifies(
            issuer.public_key(),
            &certificate.signature_algorithm,
            certificate.tbs_certificate.as_ref(),
            &certificate.signature_value.data,
        )
}

/// Whether a leaf has exactly these names: one URI, and each of the DNS names once.
pub fn has_exactly(leaf: &CertificateDer<'_>, id: &SpiffeId, dns_names: &[String]) -> bool {
    let Ok((_, x509)) = X509Certificate::from_der(leaf) else {
        return false;
    };
    let names = x509.subject_alternative_name().ok().flatten();
    let names = names.map_or(&[][..], |names| &names.value.general_names);
    let wanted = std::iter::once(GeneralName::URI(id.as_str()))
        .chain(dns_names.iter().map(|name| GeneralName::DNSName(name)));
    names.len() == 1 + dns_names.len() && wanted.into_iter().all(|name| names.contains(&name))
}

/// A name of at most 64 characters, which X.520 allows; the hash in it is only for people.
fn short(name: &str) -> String {
    name.chars().take(46).collect()
}

fn uri(id: &SpiffeId) -> Result<SanType, rcgen::Error> {
    Ok(SanType::URI(id.as_str().try_into()?))
}

fn date(at: SystemTime) -> OffsetDateTime {
    OffsetDateTime::from(at)
}

/// The certificates of a PEM file.
///
/// # Errors
///
/// What is wrong with the file.
pub fn certificates_of_pem(
    path: &Path,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, String> {
    use rustls_pki_types::pem::PemObject;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => Err(format!("{} holds no PEM certificate", path.display())),
        Err(error) => Err(format!("{} is not PEM: {error}", path.display())),
    }
}

/// One certificate in PEM.
pub fn to_pem(der: &CertificateDer<'_>) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        // Base64 is ASCII.
        pem.push_str(std::str::from_utf8(line).unwrap_or_default());
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

/// Seconds since 1970; 0 before.
pub fn unix_seconds(at: SystemTime) -> u64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or_default().as_secs()
}

/// The moment that many seconds after 1970 began.
pub fn unix_moment(seconds: u64) -> SystemTime {
    let at = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
    at.unwrap_or(SystemTime::UNIX_EPOCH)
}

fn moment(seconds: i64) -> SystemTime {
    u64::try_from(seconds).map_or(SystemTime::UNIX_EPOCH, unix_moment)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Evidence;

    fn now() -> SystemTime {
        unix_moment(1_800_000_000)
    }

    fn trust_domain() -> TrustDomain {
        "mesh.local".parse().unwrap()
    }

    fn root() -> (Root, Key) {
        let key = Key::generate().unwrap();
        let serial = Serial::random().unwrap();
        let der = Root::make(&trust_domain(), &key, serial, now()).unwrap();
        (Root::check(&der, &trust_domain(), now()).unwrap(), key)
    }

    fn issuance(id: &SpiffeId, root: &Root, life: Duration) -> Issuance {
        let serial = Serial::random().unwrap();
        Issuance {
            spiffe_id: id.clone(),
            serial,
            public_key_sha256: Digest::ZERO,
            not_before: unix_seconds(now()) - 30,
            not_after: unix_seconds(now() + life),
            evidence: Evidence::Own,
            parent_key_sha256: None,
            dns_names: Vec::new(),
            lineage: serial,
            root_sha256: root.sha256,
        }
    }

    #[test]
    fn a_leaf_has_the_spiffe_profile_and_nothing_more() {
        let (root, root_key) = root();
        let key = Key::generate().unwrap();
        let of_intermediate = issuance(&trust_domain().id(), &root, INTERMEDIATE_LIFETIME);
        let der = Intermediate::make(&of_intermediate, &trust_domain(), &key, (&root, &root_key));
        let roots = [root.clone()];
        let intermediate = Intermediate::load(&der.unwrap(), key, &trust_domain(), &roots).unwrap();
        let id = SpiffeId::for_workload(&trust_domain(), "shop", "web").unwrap();
        let of_leaf = issuance(&id, &root, Duration::from_hours(24));
        let leaf_key = Key::generate().unwrap();
        let leaf = intermediate.sign_leaf(&of_leaf, &leaf_key).unwrap();
        let (rest, x509) = X509Certificate::from_der(&leaf).unwrap();
        assert!(rest.is_empty());
        assert_eq!(x509.tbs_certificate.raw_serial(), of_leaf.serial.as_bytes());
        assert!(x509.subject().iter().next().is_none());
        let san = x509.subject_alternative_name().unwrap().unwrap();
        assert!(san.critical, "critical, since the subject is empty");
        assert_eq!(san.value.general_names.len(), 1);
        let usage = x509.key_usage().unwrap().unwrap();
        assert!(usage.critical);
        assert_eq!(usage.value.flags, 1, "digitalSignature only");
        let ends = x509.extended_key_usage().unwrap().unwrap().value;
        assert!(ends.server_auth && ends.client_auth && !ends.any);
        assert!(!x509.basic_constraints().unwrap().unwrap().value.ca);
        assert_eq!(x509.extensions().len(), 6, "and key identifiers");
        let (_, signing) = X509Certificate::from_der(&intermediate.der).unwrap();
        assert!(signing.name_constraints().unwrap().is_none());
    }

    #[test]
    fn dns_names_are_those_of_the_issuance_and_no_others() {
        let (root, root_key) = root();
        let key = Key::generate().unwrap();
        let of_intermediate = issuance(&trust_domain().id(), &root, INTERMEDIATE_LIFETIME);
        let der = Intermediate::make(&of_intermediate, &trust_domain(), &key, (&root, &root_key));
        let roots = [root.clone()];
        let intermediate = Intermediate::load(&der.unwrap(), key, &trust_domain(), &roots).unwrap();
        let id = SpiffeId::for_workload(&trust_domain(), "sidegate-system", "hook").unwrap();
        let mut of_leaf = issuance(&id, &root, Duration::from_hours(1));
        let names = ["hook.sidegate-system.svc", "hook.sidegate-system.svc.x"].map(String::from);
        of_leaf.dns_names = names.to_vec();
        let leaf = intermediate
            .sign_leaf(&of_leaf, &Key::generate().unwrap())
            .unwrap();
        assert!(has_exactly(&leaf, &id, &names));
        assert!(!has_exactly(&leaf, &id, &names[..1]), "one too many");
        assert!(!has_exactly(&leaf, &id, &[]));
        let others = [names[0].clone(), "other.sidegate-system.svc".to_owned()];
        assert!(!has_exactly(&leaf, &id, &others));
        let (_, x509) = X509Certificate::from_der(&leaf).unwrap();
        assert!(x509.subject_alternative_name().unwrap().unwrap().critical);
    }

    #[test]
    fn an_expired_an_unborn_and_an_over_long_root_are_refused() {
        let (root, _) = root();
        let check = |at| Root::check(&root.der, &trust_domain(), at);
        assert!(check(root.not_after).is_ok(), "the last moment");
        let late = check(root.not_after + Duration::from_secs(1));
        assert!(matches!(late, Err(RootProblem::OutOfDate { .. })));
        let early = check(now() - BACKDATE - Duration::from_secs(1));
        assert!(matches!(early, Err(RootProblem::OutOfDate { .. })));
        let key = Key::generate().unwrap();
        let serial = Serial::random().unwrap();
        let mut params = signing_params(&trust_domain(), "long", serial).unwrap();
        params.not_before = date(now());
        params.not_after = date(now() + ROOT_LIFETIME * 2);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        let der: CertificateDer<'static> = params.self_signed(&key).unwrap().into();
        let long = Root::check(&der, &trust_domain(), now());
        assert_eq!(long.unwrap_err(), RootProblem::OverLong);
    }

    #[test]
    fn what_may_not_sign_or_signs_for_others_is_no_root() {
        let key = Key::generate().unwrap();
        let serial = Serial::random().unwrap();
        let mut params = signing_params(&trust_domain(), "leaf", serial).unwrap();
        params.not_before = date(now());
        params.not_after = date(now() + Duration::from_hours(1));
        params.is_ca = IsCa::ExplicitNoCa;
        let der: CertificateDer<'static> = params.self_signed(&key).unwrap().into();
        let not_ca = Root::check(&der, &trust_domain(), now());
        assert!(
            matches!(not_ca, Err(RootProblem::Unusable(_))),
            "{not_ca:?}"
        );
        let other: TrustDomain = "other.local".parse().unwrap();
        let (root, _) = root();
        let foreign = Root::check(&root.der, &other, now());
        assert!(
            matches!(foreign, Err(RootProblem::Unusable(_))),
            "{foreign:?}"
        );
    }

    #[test]
    fn an_intermediate_needs_its_own_key_and_a_root_that_we_trust() {
        let (root, root_key) = root();
        let key = Key::generate().unwrap();
        let issuance = issuance(&trust_domain().id(), &root, INTERMEDIATE_LIFETIME);
        let make = || {
            let signer = (&root, &root_key);
            Intermediate::make(&issuance, &trust_domain(), &key, signer).unwrap()
        };
        let load = |key: Key, roots: &[Root]| {
            Intermediate::load(&make(), key, &trust_domain(), roots).unwrap_err()
        };
        let mismatch = load(Key::generate().unwrap(), std::slice::from_ref(&root));
        assert_eq!(mismatch, IntermediateProblem::KeyMismatch);
        let pem = key.to_pem().unwrap();
        let again = Key::from_pem(pem.as_bytes()).unwrap();
        let (stranger, _) = self::root();
        assert_eq!(load(again, &[stranger]), IntermediateProblem::UnknownRoot);
    }
}
