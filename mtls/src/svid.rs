//! One SVID: a key and the certificate chain that says whose it is.
//!
//! Invariant: an [`Svid`] that exists has a key that fits its leaf, and a leaf whose profile and
//! identity were checked. Whether peers believe it is the [`crate::Verifier`]'s question.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::{PemObject, SectionKind};
use sidegate_mesh::spiffe::SpiffeId;

use crate::certificate::{Certificate, Serial};
use crate::csr::WorkloadKey;
use crate::verify::{VerifyError, check_leaf};

/// Why a key and a chain are not our SVID.
#[derive(Debug, thiserror::Error)]
pub enum SvidError {
    /// The key cannot be made, read or used.
    #[error("private key: {0}")]
    Key(String),
    /// The leaf's profile is not an SVID's, or nobody would believe the chain.
    #[error("the certificate is not a usable SVID")]
    Certificate(#[from] VerifyError),
    /// The leaf is somebody else's key.
    #[error("the private key does not match the certificate")]
    KeyMismatch,
    /// The leaf names somebody else.
    #[error("the certificate is for {presented}, not for {expected}")]
    WrongIdentity {
        /// Who we are.
        expected: SpiffeId,
        /// Whom it names.
        presented: SpiffeId,
    },
    /// The PEM text has no certificate, or cannot be read.
    #[error("PEM: {0}")]
    Pem(String),
}

/// A workload's identity document and its key.
#[derive(Clone)]
pub struct Svid {
    /// Whose it is.
    pub id: SpiffeId,
    /// DER, leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's serial number.
    pub serial: Serial,
    /// First moment at which the leaf counts.
    pub not_before: SystemTime,
    /// Last moment at which the leaf, and every issuer in the chain, counts.
    pub not_after: SystemTime,
    /// Authority key identifier of the leaf; empty without one.
    pub authority_key_id: Vec<u8>,
    key: WorkloadKey,
    certified: Arc<CertifiedKey>,
}

impl Svid {
    /// Puts a key and the chain that was issued for it together.
    ///
    /// # Errors
    ///
    /// [`SvidError`] when the leaf is no SVID, not `expected`'s, or not this key's.
    pub fn parse(
        chain: Vec<CertificateDer<'static>>,
        key: WorkloadKey,
        expected: &SpiffeId,
    ) -> Result<Self, SvidError> {
        let leaf_der = chain.first().ok_or(VerifyError::NoCertificate)?;
        let leaf = Certificate::parse(leaf_der)?;
        let id = check_leaf(&leaf)?;
        if id != *expected {
            return Err(SvidError::WrongIdentity {
                expected: expected.clone(),
                presented: id,
            });
        }
        let signing_key = key.signing_key()?;
        let own = signing_key.public_key().ok_or(SvidError::KeyMismatch)?;
        if own.as_ref() != leaf.public_key_info() {
            return Err(SvidError::KeyMismatch);
        }
        let mut not_after = leaf.not_after();
        for issuer in chain.iter().skip(1) {
            not_after = not_after.min(Certificate::parse(issuer)?.not_after());
        }
        Ok(Self {
            id,
            serial: leaf.serial().clone(),
            not_before: leaf.not_before(),
            not_after,
            authority_key_id: leaf.authority_key_id(),
            key,
            certified: Arc::new(CertifiedKey::new(chain.clone(), signing_key)),
            chain,
        })
    }

    /// Reads what [`Self::to_pem`] wrote.
    ///
    /// # Errors
    ///
    /// As [`Self::parse`], and [`SvidError::Pem`].
    pub fn from_pem(pem: &[u8], expected: &SpiffeId) -> Result<Self, SvidError> {
        let key = key_from_pem(pem)?;
        let chain = CertificateDer::pem_slice_iter(pem)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| SvidError::Pem(error.to_string()))?;
        Self::parse(chain, key, expected)
    }

    /// Key and chain as PEM text, for a file that nobody else may read.
    pub fn to_pem(&self) -> zeroize::Zeroizing<String> {
        let mut text = key_to_pem(&self.key);
        for certificate in &self.chain {
            push_pem(&mut text, "CERTIFICATE", certificate);
        }
        text
    }

    /// The chain as PEM text, leaf first, without the key.
    pub fn chain_pem(&self) -> String {
        let mut text = zeroize::Zeroizing::new(String::new());
        for certificate in &self.chain {
            push_pem(&mut text, "CERTIFICATE", certificate);
        }
        std::mem::take(&mut *text)
    }

    /// The private key.
    pub fn key(&self) -> &WorkloadKey {
        &self.key
    }

    /// From the first to the last moment at which it counts.
    pub fn lifetime(&self) -> Duration {
        self.not_after
            .duration_since(self.not_before)
            .unwrap_or_default()
    }

    pub(crate) fn certified(&self) -> &Arc<CertifiedKey> {
        &self.certified
    }
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svid")
            .field("id", &self.id)
            .field("serial", &self.serial)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// The private key as PEM text.
pub(crate) fn key_to_pem(key: &WorkloadKey) -> zeroize::Zeroizing<String> {
    let mut text = zeroize::Zeroizing::new(String::with_capacity(8 * 1024));
    push_pem(&mut text, "PRIVATE KEY", key.pkcs8());
    text
}

/// The first private key in PEM text.
pub(crate) fn key_from_pem(pem: &[u8]) -> Result<WorkloadKey, SvidError> {
    for section in <(SectionKind, Vec<u8>)>::pem_slice_iter(pem) {
        let (kind, der) = section.map_err(|error| SvidError::Pem(error.to_string()))?;
        let der = zeroize::Zeroizing::new(der);
        if kind == SectionKind::PrivateKey {
            return WorkloadKey::from_pkcs8(der);
        }
    }
    Err(SvidError::Pem("no PRIVATE KEY section".into()))
}

fn push_pem(text: &mut zeroize::Zeroizing<String>, label: &str, der: &[u8]) {
    let body = zeroize::Zeroizing::new(base64::engine::general_purpose::STANDARD.encode(der));
    text.push_str("-----BEGIN ");
    text.push_str(label);
    text.push_str("-----\n");
    for (index, character) in body.chars().enumerate() {
        if index > 0 && index % 64 == 0 {
            text.push('\n');
        }
        text.push(character);
    }
    text.push_str("\n-----END ");
    text.push_str(label);
    text.push_str("-----\n");
}
