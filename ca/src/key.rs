//! The CA's own keys: P-256, made here, kept in the state folder.
//!
//! Invariant: a private key leaves this module only as PEM for a secret file, or to TLS, and is
//! cleared from memory afterwards. `Debug` shows the public key's hash.

use std::fmt;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};
use rcgen::{PKCS_ECDSA_P256_SHA256, PublicKeyData, SignatureAlgorithm, SigningKey};
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject;
use zeroize::{Zeroize, Zeroizing};

use crate::digest::{Digest, NoRandomness};

/// A private key and its public half.
pub struct Key {
    pair: EcdsaKeyPair,
    random: SystemRandom,
}

/// The file holds no P-256 key in PKCS#8 PEM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a P-256 private key in PKCS#8 PEM")]
pub struct NotAKey;

impl Key {
    /// A new one.
    ///
    /// # Errors
    ///
    /// [`NoRandomness`].
    pub fn generate() -> Result<Self, NoRandomness> {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING);
        Ok(Self {
            pair: pair.map_err(|_unspecified| NoRandomness)?,
            random: SystemRandom::new(),
        })
    }

    /// The key of a PEM file.
    ///
    /// # Errors
    ///
    /// [`NotAKey`].
    pub fn from_pem(pem: &[u8]) -> Result<Self, NotAKey> {
        let mut der = PrivatePkcs8KeyDer::from_pem_slice(pem).map_err(|_pem| NotAKey)?;
        let pair =
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, der.secret_pkcs8_der());
        der.zeroize();
        Ok(Self {
            pair: pair.map_err(|_rejected| NotAKey)?,
            random: SystemRandom::new(),
        })
    }

    /// PKCS#8, DER.
    ///
    /// # Errors
    ///
    /// [`NoRandomness`] when the cryptographic library fails; it has no other reason.
    pub fn to_pkcs8(&self) -> Result<Zeroizing<Vec<u8>>, NoRandomness> {
        let document = self.pair.to_pkcs8v1();
        // The document clears itself.
        let document = document.map_err(|_unspecified| NoRandomness)?;
        Ok(Zeroizing::new(document.as_ref().to_vec()))
    }

    /// PKCS#8, PEM.
    ///
    /// # Errors
    ///
    /// As [`Self::to_pkcs8`].
    pub fn to_pem(&self) -> Result<Zeroizing<String>, NoRandomness> {
        use base64::Engine;
        let der = self.to_pkcs8()?;
        let text = Zeroizing::new(base64::engine::general_purpose::STANDARD.encode(&*der));
        let mut pem = Zeroizing::new(String::with_capacity(text.len() + 64));
        pem.push_str("-----BEGIN PRIVATE KEY-----\n");
        for line in text.as_bytes().chunks(64) {
            // Base64 is ASCII.
            pem.push_str(std::str::from_utf8(line).unwrap_or_default());
            pem.push('\n');
        }
        pem.push_str("-----END PRIVATE KEY-----\n");
        Ok(pem)
    }

    /// SHA-256 of the public key's DER `SubjectPublicKeyInfo`.
    pub fn public_key_sha256(&self) -> Digest {
        Digest::of(&self.subject_public_key_info())
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", self.public_key_sha256())
    }
}

impl PublicKeyData for Key {
    fn der_bytes(&self) -> &[u8] {
        self.pair.public_key().as_ref()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

impl SigningKey for Key {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        let signature = self.pair.sign(&self.random, message);
        let signature = signature.map_err(|_unspecified| rcgen::Error::RemoteKeyError)?;
        Ok(signature.as_ref().to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_the_same_after_its_way_through_a_file() {
        let key = Key::generate().unwrap();
        let pem = key.to_pem().unwrap();
        let again = Key::from_pem(pem.as_bytes()).unwrap();
        assert_eq!(again.public_key_sha256(), key.public_key_sha256());
        assert_eq!(Key::from_pem(b"garbage").unwrap_err(), NotAKey);
    }

    #[test]
    fn debug_shows_nothing_of_the_private_key() {
        let key = Key::generate().unwrap();
        assert_eq!(
            format!("{key:?}"),
            format!("Key({})", key.public_key_sha256())
        );
    }
}
