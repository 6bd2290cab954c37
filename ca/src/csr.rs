//! Certificate signing requests: a public key and the proof that the caller has its private half.
//!
//! Invariant: nothing else of a request is used. What it says about subject, names, usages or CA
//! is not even looked at, so it cannot end up in a certificate.

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P384_SHA384_ASN1, ED25519, UnparsedPublicKey,
    VerificationAlgorithm,
};
use rcgen::SubjectPublicKeyInfo;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::oid_registry::{
    OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_NIST_EC_P384, OID_SIG_ECDSA_WITH_SHA256,
    OID_SIG_ECDSA_WITH_SHA384, OID_SIG_ED25519,
};
use x509_parser::prelude::FromDer;
use x509_parser::x509;

use crate::digest::Digest;

/// A public key whose owner has shown to have the private one.
pub struct ProvenKey {
    /// What rcgen needs to put it into a certificate.
    pub info: SubjectPublicKeyInfo,
    /// Of the DER `SubjectPublicKeyInfo`.
    pub sha256: Digest,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// Not PKCS#10 in DER, or bytes follow it.
    #[error("the CSR is not a PKCS#10 request in DER")]
    Malformed,
    /// Another kind of key, or another signature than the key's usual one.
    #[error("the key must be P-256 (SHA-256), P-384 (SHA-384) or Ed25519")]
    Algorithm,
    /// The signature does not verify under the request's own key.
    #[error("the CSR's signature does not verify under its own key")]
    Signature,
}

impl ProvenKey {
    /// The key of a PKCS#10 request in DER.
    ///
    /// # Errors
    ///
    /// [`CsrError`].
    pub fn from_csr(der: &[u8]) -> Result<Self, CsrError> {
        let (rest, request) =
            X509CertificationRequest::from_der(der).map_err(|_parse| CsrError::Malformed)?;
        if !rest.is_empty() {
            return Err(CsrError::Malformed);
        }
        let key = &request.certification_request_info.subject_pki;
        let algorithm = verification(&key.algorithm, &request.signature_algorithm)?;
        UnparsedPublicKey::new(algorithm, &key.subject_public_key.data)
            .verify(
                request.certification_request_info.raw,
                &request.signature_value.data,
            )
            .map_err(|_unspecified| CsrError::Signature)?;
        let info = SubjectPublicKeyInfo::from_der(key.raw).map_err(|_rcgen| CsrError::Algorithm)?;
        // Hashed as it will stand in the certificate: two encodings of one key are one key.
        let sha256 = Digest::of(&rcgen::PublicKeyData::subject_public_key_info(&info));
        Ok(Self { info, sha256 })
    }
}

/// Whether `signature` over `message` verifies under `key`, by one of the algorithms allowed here.
pub(crate) fn signature_verifies(
    key: &x509::SubjectPublicKeyInfo<'_>,
    algorithm: &x509::AlgorithmIdentifier<'_>,
    message: &[u8],
    signature: &[u8],
) -> bool {
    verification(&key.algorithm, algorithm).is_ok_and(|algorithm| {
        UnparsedPublicKey::new(algorithm, &key.subject_public_key.data)
            .verify(message, signature)
            .is_ok()
    })
}

/// The one signature algorithm that each kind of key may use.
fn verification(
    key: &x509::AlgorithmIdentifier<'_>,
    signature: &x509::AlgorithmIdentifier<'_>,
) -> Result<&'static dyn VerificationAlgorithm, CsrError> {
    let curve = key.parameters.as_ref().and_then(|any| any.as_oid().ok());
    if key.algorithm == OID_SIG_ED25519 && signature.algorithm == OID_SIG_ED25519 {
        return Ok(&ED25519);
    }
    if key.algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY {
        return Err(CsrError::Algorithm);
    }
    if curve == Some(OID_EC_P256) && signature.algorithm == OID_SIG_ECDSA_WITH_SHA256 {
        return Ok(&ECDSA_P256_SHA256_ASN1);
    }
    if curve == Some(OID_NIST_EC_P384) && signature.algorithm == OID_SIG_ECDSA_WITH_SHA384 {
        return Ok(&ECDSA_P384_SHA384_ASN1);
    }
    Err(CsrError::Algorithm)
}

#[cfg(test)]
mod tests {
    use rcgen::{
        CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384,
        PKCS_ECDSA_P521_SHA512, PKCS_ED25519, SignatureAlgorithm,
    };

    use super::*;

    fn csr(algorithm: &'static SignatureAlgorithm) -> Vec<u8> {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let request = CertificateParams::default().serialize_request(&key);
        request.unwrap().der().to_vec()
    }

    #[test]
    fn the_three_kinds_of_key_are_taken() {
        for algorithm in [
            &PKCS_ECDSA_P256_SHA256,
            &PKCS_ECDSA_P384_SHA384,
            &PKCS_ED25519,
        ] {
            assert!(ProvenKey::from_csr(&csr(algorithm)).is_ok());
        }
    }

    #[test]
    fn other_keys_are_refused() {
        let error = ProvenKey::from_csr(&csr(&PKCS_ECDSA_P521_SHA512)).err();
        assert_eq!(error, Some(CsrError::Algorithm));
    }

    #[test]
    fn a_request_without_proof_of_possession_is_refused() {
        let mut der = csr(&PKCS_ECDSA_P256_SHA256);
        let last = der.len() - 1;
        der[last] ^= 1;
        assert_eq!(ProvenKey::from_csr(&der).err(), Some(CsrError::Signature));
        // Somebody else's key under one's own signature.
        let (own, other) = (csr(&PKCS_ED25519), csr(&PKCS_ED25519));
        let key_of = |der: &[u8]| {
            let (_, request) = X509CertificationRequest::from_der(der).unwrap();
            let key = request.certification_request_info.subject_pki;
            key.subject_public_key.data.to_vec()
        };
        let (own_key, other_key) = (key_of(&own), key_of(&other));
        let at = own.windows(32).position(|w| w == own_key).unwrap();
        let mut stolen = own.clone();
        stolen[at..at + 32].copy_from_slice(&other_key);
        assert_eq!(
            ProvenKey::from_csr(&stolen).err(),
            Some(CsrError::Signature)
        );
    }

    #[test]
    fn garbage_and_trailing_bytes_are_refused() {
        let mut der = csr(&PKCS_ECDSA_P256_SHA256);
        der.push(0);
        for bytes in [der.as_slice(), b"", b"\x30\x80", &[0x30; 64]] {
            assert_eq!(ProvenKey::from_csr(bytes).err(), Some(CsrError::Malformed));
        }
    }

    #[test]
    fn no_bytes_make_the_parser_panic() {
        let config = proptest::test_runner::Config::with_cases(512);
        let good = csr(&PKCS_ECDSA_P256_SHA256);
        let flips = proptest::collection::vec((0..good.len(), proptest::num::u8::ANY), 1..8);
        proptest::test_runner::TestRunner::new(config)
            .run(&flips, |flips| {
                let mut bytes = good.clone();
                for (at, value) in flips {
                    bytes[at] = value;
                }
                drop(ProvenKey::from_csr(&bytes));
                Ok(())
            })
            .unwrap();
    }
}
