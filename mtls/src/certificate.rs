//! One parsed certificate and the questions that are asked of it.
//!
//! Invariant: what parses here is a version 3 certificate without trailing bytes, without an
//! extension that occurs twice or cannot be read, and with a serial number that is positive. What
//! an extension lacks is said as "absent", never guessed.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use aws_lc_rs::digest::{SHA256, digest};
use sidegate_mesh::spiffe::SpiffeId;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{GeneralName, KeyUsage, ParsedExtension};
use x509_parser::oid_registry::{
    OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_NIST_EC_P384, OID_SIG_ECDSA_WITH_SHA256,
    OID_SIG_ECDSA_WITH_SHA384, OID_SIG_ED25519,
};
use x509_parser::prelude::FromDer;
use x509_parser::x509::X509Version;

use crate::verify::VerifyError;

/// Longest serial number that RFC 5280 allows, in bytes.
const SERIAL_BYTES_MAX: usize = 20;

/// A certificate's serial number: big-endian, without leading zero bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Serial(Box<[u8]>);

/// Why a text or a number is no serial number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a serial number has 1 to 20 bytes, in hexadecimal, and is not zero")]
pub struct SerialError;

impl Serial {
    /// The serial number with these big-endian bytes; leading zeros are dropped.
    ///
    /// # Errors
    ///
    /// [`SerialError`] when it is zero or longer than 20 bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SerialError> {
        let start = bytes.iter().position(|byte| *byte != 0);
        let significant = start.and_then(|start| bytes.get(start..));
        match significant {
            Some(significant) if significant.len() <= SERIAL_BYTES_MAX => {
                Ok(Self(significant.into()))
            }
            _ => Err(SerialError),
        }
    }

    /// Big-endian, without leading zero bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl FromStr for Serial {
    type Err = SerialError;

    /// Hexadecimal, either case, colons allowed between bytes.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits: Vec<u8> = text
            .chars()
            .filter(|c| *c != ':')
            .map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
            .collect::<Option<_>>()
            .ok_or(SerialError)?;
        let bytes: Vec<u8> = digits
            .rchunks(2)
            .rev()
            .map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit))
            .collect();
        Self::from_bytes(&bytes)
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A certificate whose shape is sound; nothing in it is believed yet.
pub(crate) struct Certificate<'a> {
    x509: X509Certificate<'a>,
    serial: Serial,
}

impl<'a> Certificate<'a> {
    /// Parses one DER certificate.
    pub(crate) fn parse(der: &'a [u8]) -> Result<Self, VerifyError> {
        let malformed = |what: &str| VerifyError::Malformed { what: what.into() };
        let (rest, x509) =
            X509Certificate::from_der(der).map_err(|error| malformed(&error.to_string()))?;
        if !rest.is_empty() {
            return Err(malformed("bytes after the certificate"));
        }
        if x509.version() != X509Version::V3 {
            return Err(malformed("not a version 3 certificate"));
        }
        // The map is made only for its check that no extension occurs twice.
        x509.tbs_certificate
            .extensions_map()
            .map_err(|error| malformed(&error.to_string()))?;
        let broken = x509
            .extensions()
            .iter()
            .find(|ext| matches!(ext.parsed_extension(), ParsedExtension::ParseError { .. }));
        if let Some(extension) = broken {
            return Err(malformed(&format!("extension {}", extension.oid)));
        }
        let raw = x509.tbs_certificate.raw_serial();
        // The first bit is the sign.
        let serial = match raw.first() {
            Some(first) if first & 0x80 == 0 => Serial::from_bytes(raw),
            _ => Err(SerialError),
        };
        let serial = serial.map_err(|error| malformed(&error.to_string()))?;
        Ok(Self { x509, serial })
    }

    pub(crate) fn serial(&self) -> &Serial {
        &self.serial
    }

    pub(crate) fn not_before(&self) -> SystemTime {
        system_time(self.x509.validity().not_before.timestamp())
    }

    pub(crate) fn not_after(&self) -> SystemTime {
        system_time(self.x509.validity().not_after.timestamp())
    }

    pub(crate) fn is_ca(&self) -> bool {
        matches!(self.x509.basic_constraints(), Ok(Some(constraints)) if constraints.value.ca)
    }

    /// Key usage and whether it is critical.
    pub(crate) fn key_usage(&self) -> Option<(&KeyUsage, bool)> {
        let usage = self.x509.key_usage().ok()??;
        Some((usage.value, usage.critical))
    }

    /// Whether extended key usage, if it is present, allows both ends of a connection.
    pub(crate) fn serves_both_ends(&self) -> bool {
        match self.x509.extended_key_usage() {
            Ok(None) => true,
            Ok(Some(usage)) => usage.value.server_auth && usage.value.client_auth,
            Err(_) => false,
        }
    }

    /// SHA-256 of the subject's public key, as DER `SubjectPublicKeyInfo`.
    pub(crate) fn public_key_sha256(&self) -> [u8; 32] {
        sha256(self.x509.public_key().raw)
    }

    pub(crate) fn public_key_info(&self) -> &[u8] {
        self.x509.public_key().raw
    }

    /// The issuer's key identifier; empty when the certificate does not name it.
    pub(crate) fn authority_key_id(&self) -> Vec<u8> {
        self.x509
            .extensions()
            .iter()
            .find_map(|extension| match extension.parsed_extension() {
                ParsedExtension::AuthorityKeyIdentifier(id) => id.key_identifier.as_ref(),
                _ => None,
            })
            .map(|id| id.0.to_vec())
            .unwrap_or_default()
    }

    /// The only URI among the subject's alternative names, as a strict SPIFFE ID.
    pub(crate) fn spiffe_id(&self) -> Result<SpiffeId, VerifyError> {
        self.optional_spiffe_id()?.ok_or(VerifyError::NoUriSan)
    }

    /// As [`Self::spiffe_id`], but no URI at all is fine: a signing certificate need not have one.
    pub(crate) fn optional_spiffe_id(&self) -> Result<Option<SpiffeId>, VerifyError> {
        let mut uris = Vec::new();
        for name in self.alternative_names() {
            match name {
                GeneralName::URI(uri) => uris.push(*uri),
                // A name that a parser drops could be the one that another parser believes.
                GeneralName::Invalid(..) => return Err(VerifyError::InvalidSan),
                _ => {}
            }
        }
        match uris.as_slice() {
            [] => Ok(None),
            [uri] => uri.parse().map(Some).map_err(VerifyError::BadSpiffeId),
            several => Err(VerifyError::SeveralUriSans {
                count: several.len(),
            }),
        }
    }

    /// Whether a critical extension is one that webpki checks on a path. It looks at leaf and
    /// intermediates only; for a root the question is ours.
    pub(crate) fn has_unknown_critical_extension(&self) -> bool {
        self.x509.extensions().iter().any(|extension| {
            extension.critical
                && !matches!(
                    extension.parsed_extension(),
                    ParsedExtension::BasicConstraints(_)
                        | ParsedExtension::KeyUsage(_)
                        | ParsedExtension::ExtendedKeyUsage(_)
                        | ParsedExtension::SubjectAlternativeName(_)
                        | ParsedExtension::NameConstraints(_)
                )
        })
    }

    /// Whether the alternative names are marked critical where the subject is empty.
    pub(crate) fn alternative_name_is_critical_enough(&self) -> bool {
        let subject_is_empty = self.x509.subject().iter_rdn().next().is_none();
        match self.x509.subject_alternative_name() {
            Ok(Some(names)) => names.critical || !subject_is_empty,
            _ => true,
        }
    }

    /// Whether the subject's key and the issuer's signature are of kinds that we allow.
    pub(crate) fn algorithms_are_allowed(&self) -> bool {
        let key = &self.x509.public_key().algorithm;
        let key_is_allowed = if key.algorithm == OID_KEY_TYPE_EC_PUBLIC_KEY {
            let curve = key.parameters.as_ref().and_then(|any| any.as_oid().ok());
            curve.is_some_and(|curve| curve == OID_EC_P256 || curve == OID_NIST_EC_P384)
        } else {
            key.algorithm == OID_SIG_ED25519
        };
        let signature = &self.x509.signature_algorithm.algorithm;
        let signature_is_allowed = *signature == OID_SIG_ECDSA_WITH_SHA256
            || *signature == OID_SIG_ECDSA_WITH_SHA384
            || *signature == OID_SIG_ED25519;
        key_is_allowed && signature_is_allowed
    }

    /// Refuses what may not sign certificates of `trust_domain`: cA, key usage, an ID that is a
    /// workload's or another trust domain's.
    pub(crate) fn check_issuer(&self, trust_domain: &str) -> Result<(), VerifyError> {
        if !self.is_ca() {
            return Err(VerifyError::IssuerIsNotCa);
        }
        match self.key_usage() {
            Some((usage, true)) if usage.key_cert_sign() => {}
            _ => return Err(VerifyError::IssuerKeyUsage),
        }
        // An issuer that limits itself to one direction would limit its leaves with it.
        if !self.serves_both_ends() {
            return Err(VerifyError::IssuerKeyUsage);
        }
        match self.optional_spiffe_id()? {
            Some(id) if !id.path().is_empty() || id.trust_domain() != trust_domain => {
                Err(VerifyError::IssuerId { id: id.to_string() })
            }
            _ if self.algorithms_are_allowed() => Ok(()),
            _ => Err(VerifyError::Algorithm),
        }
    }

    fn alternative_names(&self) -> &[GeneralName<'a>] {
        match self.x509.subject_alternative_name() {
            Ok(Some(names)) => &names.value.general_names,
            _ => &[],
        }
    }
}

/// What a certificate says that it is, for a log line about a refusal. Believed by nobody: the
/// first URI, else the first other name that can be read, cut at 256 characters.
pub(crate) fn claimed_identity(der: &[u8]) -> Option<String> {
    let (_, x509) = X509Certificate::from_der(der).ok()?;
    let names = x509.subject_alternative_name().ok().flatten();
    let names = names.map_or(&[][..], |names| &names.value.general_names);
    let uri = names.iter().find_map(|name| match name {
        GeneralName::URI(uri) => Some((*uri).to_owned()),
        _ => None,
    });
    let other = || names.first().map(ToString::to_string);
    let subject = || Some(x509.subject().to_string()).filter(|subject| !subject.is_empty());
    let claimed = uri.or_else(other).or_else(subject)?;
    Some(claimed.chars().take(256).collect())
}

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
    hash
}

fn system_time(unix_seconds: i64) -> SystemTime {
    let distance = Duration::from_secs(unix_seconds.unsigned_abs());
    let moment = if unix_seconds < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(distance)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(distance)
    };
    // Out of the platform's range: the epoch is long past, so the certificate is out of date.
    moment.unwrap_or(SystemTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serial_number_has_one_form() {
        let serial: Serial = "00:0A:ff".parse().unwrap();
        assert_eq!(serial.to_string(), "0aff");
        assert_eq!("aff".parse::<Serial>().unwrap(), serial);
        assert_eq!(Serial::from_bytes(&[0, 10, 255]).unwrap(), serial);
    }

    #[test]
    fn what_is_no_serial_number_is_refused() {
        for text in ["", "0", "00:00", "x", "-1", &"11".repeat(21)] {
            assert_eq!(text.parse::<Serial>(), Err(SerialError), "{text}");
        }
    }
}
