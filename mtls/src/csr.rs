//! A workload's key pair and the request that asks for its certificate.
//!
//! Invariant: the private key lives in memory that is overwritten when it is dropped, and `Debug`
//! does not show it.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};
use rcgen::{CertificateParams, PublicKeyData, SignatureAlgorithm, SigningKey};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use zeroize::Zeroizing;

use crate::svid::SvidError;

/// A P-256 key pair, made for one certificate and never used for another.
#[derive(Clone)]
pub struct WorkloadKey {
    pkcs8: Arc<Zeroizing<Vec<u8>>>,
    pair: Arc<EcdsaKeyPair>,
}

impl WorkloadKey {
    /// A new random key.
    ///
    /// # Errors
    ///
    /// [`SvidError::Key`] when the system gives no randomness.
    pub fn generate() -> Result<Self, SvidError> {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING)
            .map_err(|error| SvidError::Key(error.to_string()))?;
        let document = pair
            .to_pkcs8v1()
            .map_err(|error| SvidError::Key(error.to_string()))?;
        Ok(Self {
            pkcs8: Arc::new(Zeroizing::new(document.as_ref().to_vec())),
            pair: Arc::new(pair),
        })
    }

    /// The key in a PKCS#8 document.
    ///
    /// # Errors
    ///
    /// [`SvidError::Key`] when it is not a P-256 key.
    pub fn from_pkcs8(pkcs8: Zeroizing<Vec<u8>>) -> Result<Self, SvidError> {
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &pkcs8)
            .map_err(|error| SvidError::Key(error.to_string()))?;
        Ok(Self {
            pkcs8: Arc::new(pkcs8),
            pair: Arc::new(pair),
        })
    }

    /// The private key, PKCS#8 DER.
    pub fn pkcs8(&self) -> &Zeroizing<Vec<u8>> {
        &self.pkcs8
    }

    /// A PKCS#10 request, DER. It names nobody: the identity comes from the evidence, and the CA
    /// takes only the public key and the proof that its private half is at hand.
    ///
    /// # Errors
    ///
    /// [`SvidError::Key`] when signing fails.
    pub fn certificate_request(&self) -> Result<Vec<u8>, SvidError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        let request = params
            .serialize_request(self)
            .map_err(|error| SvidError::Key(error.to_string()))?;
        Ok(request.der().to_vec())
    }

    /// The key as rustls signs with it.
    pub(crate) fn signing_key(&self) -> Result<Arc<dyn rustls::sign::SigningKey>, SvidError> {
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.pkcs8.as_slice()));
        rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&der)
            .map_err(|error| SvidError::Key(error.to_string()))
    }
}

impl PublicKeyData for WorkloadKey {
    fn der_bytes(&self) -> &[u8] {
        self.pair.public_key().as_ref()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}

impl SigningKey for WorkloadKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.pair
            .sign(&SystemRandom::new(), message)
            .map(|signature| signature.as_ref().to_vec())
            .map_err(|_unspecified| rcgen::Error::RingUnspecified)
    }
}

impl fmt::Debug for WorkloadKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WorkloadKey(redacted)")
    }
}
