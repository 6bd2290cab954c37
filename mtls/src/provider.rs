//! The cryptography that is spoken, and nothing else.
//!
//! Invariant: everything here is a value that is passed in; no process-wide default provider is
//! ever installed or read.

use std::sync::Arc;

use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider, kx_group};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::{NamedGroup, SignatureScheme};
use webpki::aws_lc_rs as algorithms;

use crate::csr::WorkloadKey;

/// What may sign a certificate or a handshake: P-256, P-384 and Ed25519. RSA, P-521 and everything
/// older is refused.
pub(crate) static SIGNATURES: WebPkiSupportedAlgorithms = WebPkiSupportedAlgorithms {
    all: &[
        algorithms::ECDSA_P256_SHA256,
        algorithms::ECDSA_P256_SHA384,
        algorithms::ECDSA_P384_SHA256,
        algorithms::ECDSA_P384_SHA384,
        algorithms::ED25519,
    ],
    // TLS 1.3 binds the curve to the hash, so each scheme has exactly one algorithm.
    mapping: &[
        (
            SignatureScheme::ECDSA_NISTP256_SHA256,
            &[algorithms::ECDSA_P256_SHA256],
        ),
        (
            SignatureScheme::ECDSA_NISTP384_SHA384,
            &[algorithms::ECDSA_P384_SHA384],
        ),
        (SignatureScheme::ED25519, &[algorithms::ED25519]),
    ],
};

/// aws-lc-rs with TLS 1.3 suites only, AES-128-GCM first, and hybrid post-quantum key exchange
/// (X25519MLKEM768) preferred: it costs about 0.1 ms a handshake, and traffic recorded today stays
/// closed to tomorrow's machines.
pub fn crypto_provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        kx_groups: vec![
            kx_group::X25519MLKEM768,
            kx_group::X25519,
            kx_group::SECP256R1,
        ],
        signature_verification_algorithms: SIGNATURES,
        ..default_provider()
    })
}

/// Does once what the first handshake of a thread would otherwise stall for (about 24 ms): seeding
/// the random generator and setting up the key-exchange and signature code. Call it on each thread
/// that will serve, before it reports ready.
pub fn warm_up(provider: &CryptoProvider) {
    for group in &provider.kx_groups {
        // The peer's share of a hybrid group has another shape than ours, so only a plain group
        // can be completed with itself. A failure here is harmless: a handshake will report it.
        let Ok(exchange) = group.start() else {
            continue;
        };
        let share = exchange.pub_key().to_vec();
        if group.name() != NamedGroup::X25519MLKEM768 {
            drop(exchange.complete(&share));
        }
    }
    if let Ok(key) = WorkloadKey::generate() {
        drop(key.certificate_request());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tls13_suites_are_offered_and_aes_128_gcm_comes_first() {
        let provider = crypto_provider();
        let first = provider.cipher_suites.first().unwrap().suite();
        assert_eq!(first, rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
        for suite in &provider.cipher_suites {
            assert!(suite.tls13().is_some(), "{suite:?}");
        }
        warm_up(&provider);
    }
}
