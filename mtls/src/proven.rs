//! Certificate signatures that were verified before are not verified again.
//!
//! A peer that connects again shows the certificates that it showed before, and all peers of a mesh
//! show one issuer: most of what a handshake would compute is known. That a key has signed some
//! bytes never changes, so that much is remembered, and nothing else: path, dates, usages,
//! constraints and revocation are judged anew each time.
//!
//! Invariants: only what a trusted root has signed, itself or through issuers, is remembered, so
//! that a stranger can push nothing out; it is found again only by key, algorithm, message
//! and signature together; memory is bounded; a handshake's own signature, by which a peer proves
//! that it holds its key, never comes here.

use std::collections::HashSet;
use std::mem;
use std::sync::{Mutex, MutexGuard, PoisonError};

use aws_lc_rs::digest::{Context, SHA256};
use rustls_pki_types::{AlgorithmIdentifier, InvalidSignature, SignatureVerificationAlgorithm};
use webpki::Error;

use crate::provider::SIGNATURES;

/// Signatures that are remembered for sure, the latest ones; never more than twice as many, in at
/// most 160 KiB. A peer that comes anew takes one.
const REMEMBERED: usize = 1024;

/// SHA-256 of all that a verification depends on.
type Proof = [u8; 32];

/// Signatures that were found good.
#[derive(Debug, Default)]
pub(crate) struct ProvenSignatures(Mutex<Generations>);

/// Two sets, of which the older one goes as a whole: no order to keep for each use.
#[derive(Debug, Default)]
struct Generations {
    young: HashSet<Proof>,
    old: HashSet<Proof>,
}

impl Generations {
    fn has(&mut self, proof: &Proof) -> bool {
        if self.young.contains(proof) {
            return true;
        }
        let found = self.old.contains(proof);
        if found {
            self.keep(*proof);
        }
        found
    }

    fn keep(&mut self, proof: Proof) {
        if self.young.len() >= REMEMBERED {
            self.old = mem::take(&mut self.young);
        }
        self.young.insert(proof);
    }
}

impl ProvenSignatures {
    /// Calls `verify` with every algorithm that may sign a certificate, each of which looks here
    /// first.
    pub(crate) fn with<T>(
        &self,
        verify: impl FnOnce(&[&dyn SignatureVerificationAlgorithm]) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let recalling = SIGNATURES.all.iter().map(|algorithm| Recalling {
            algorithm: *algorithm,
            proven: self,
        });
        let recalling: Vec<_> = recalling.collect();
        let algorithms: Vec<&dyn SignatureVerificationAlgorithm> = recalling
            .iter()
            .map(|algorithm| algorithm as &dyn SignatureVerificationAlgorithm)
            .collect();
        verify(&algorithms)
    }

    /// How many are remembered.
    #[cfg(test)]
    pub(crate) fn remembered(&self) -> usize {
        let generations = self.lock();
        generations.young.len() + generations.old.len()
    }

    fn lock(&self) -> MutexGuard<'_, Generations> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One algorithm, and what it has found good before.
#[derive(Debug)]
struct Recalling<'a> {
    algorithm: &'a dyn SignatureVerificationAlgorithm,
    proven: &'a ProvenSignatures,
}

impl SignatureVerificationAlgorithm for Recalling<'_> {
    fn verify_signature(
        &self,
        public_key: &[u8],
        message: &[u8],
        signature: &[u8],
    ) -> Result<(), InvalidSignature> {
        let (key, hash) = (self.public_key_alg_id(), self.signature_alg_id());
        let proof = proof(&[&key, &hash, public_key, message, signature]);
        if self.proven.lock().has(&proof) {
            return Ok(());
        }
        self.algorithm
            .verify_signature(public_key, message, signature)?;
        self.proven.lock().keep(proof);
        Ok(())
    }

    fn public_key_alg_id(&self) -> AlgorithmIdentifier {
        self.algorithm.public_key_alg_id()
    }

    fn signature_alg_id(&self) -> AlgorithmIdentifier {
        self.algorithm.signature_alg_id()
    }

    fn fips(&self) -> bool {
        self.algorithm.fips()
    }
}

/// The parts, each behind its length, so that no two lists of parts read the same.
fn proof(parts: &[&[u8]]) -> Proof {
    let mut digest = Context::new(&SHA256);
    for part in parts {
        digest.update(&(part.len() as u64).to_be_bytes());
        digest.update(part);
    }
    let mut proof = Proof::default();
    proof.copy_from_slice(digest.finish().as_ref());
    proof
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Finds good what is signed with `good`, and counts how often it was asked.
    #[derive(Debug)]
    struct Counting {
        asked: AtomicUsize,
        key: &'static [u8],
        hash: &'static [u8],
    }

    impl Counting {
        fn new(key: &'static str, hash: &'static str) -> Self {
            Self {
                asked: AtomicUsize::new(0),
                key: key.as_bytes(),
                hash: hash.as_bytes(),
            }
        }

        fn p256() -> Self {
            Self::new("p256", "sha256")
        }

        fn asked(&self) -> usize {
            self.asked.load(Ordering::Relaxed)
        }

        fn recalling<'a>(&'a self, proven: &'a ProvenSignatures) -> Recalling<'a> {
            Recalling {
                algorithm: self,
                proven,
            }
        }
    }

    impl SignatureVerificationAlgorithm for Counting {
        fn verify_signature(
            &self,
            _public_key: &[u8],
            _message: &[u8],
            signature: &[u8],
        ) -> Result<(), InvalidSignature> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            (signature == b"good").then_some(()).ok_or(InvalidSignature)
        }

        fn public_key_alg_id(&self) -> AlgorithmIdentifier {
            AlgorithmIdentifier::from_slice(self.key)
        }

        fn signature_alg_id(&self) -> AlgorithmIdentifier {
            AlgorithmIdentifier::from_slice(self.hash)
        }
    }

    #[test]
    fn what_was_good_is_computed_once_and_what_was_not_each_time() {
        let (proven, algorithm) = (ProvenSignatures::default(), Counting::p256());
        let recalling = algorithm.recalling(&proven);
        for _ in 0..3 {
            assert!(recalling.verify_signature(b"k", b"m", b"good").is_ok());
            assert!(recalling.verify_signature(b"k", b"m", b"bad").is_err());
        }
        assert_eq!(algorithm.asked(), 1 + 3);
    }

    #[test]
    fn another_key_or_message_is_not_the_same_though_its_bytes_join_to_the_same() {
        let (proven, algorithm) = (ProvenSignatures::default(), Counting::p256());
        let recalling = algorithm.recalling(&proven);
        for (key, message) in [("k", "m"), ("km", ""), ("", "km"), ("k", "n")] {
            let good = recalling.verify_signature(key.as_bytes(), message.as_bytes(), b"good");
            assert!(good.is_ok());
        }
        assert_eq!(algorithm.asked(), 4);
    }

    #[test]
    fn what_one_algorithm_found_good_is_nothing_to_another() {
        let proven = ProvenSignatures::default();
        for (key, hash) in [("p256", "sha256"), ("p384", "sha256"), ("p256", "sha384")] {
            let algorithm = Counting::new(key, hash);
            let recalling = algorithm.recalling(&proven);
            assert!(recalling.verify_signature(b"k", b"m", b"good").is_ok());
            assert_eq!(algorithm.asked(), 1, "{key} {hash}");
        }
    }

    #[test]
    fn memory_is_bounded_and_what_is_used_stays() {
        let (proven, algorithm) = (ProvenSignatures::default(), Counting::p256());
        let recalling = algorithm.recalling(&proven);
        let verify = |key: usize| recalling.verify_signature(&key.to_be_bytes(), b"m", b"good");
        for key in 0..5 * REMEMBERED {
            verify(key).unwrap();
            verify(0).unwrap();
        }
        assert_eq!(algorithm.asked(), 5 * REMEMBERED);
        assert!(proven.remembered() <= 2 * REMEMBERED);
    }
}
