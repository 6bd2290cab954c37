//! Certificates that nobody here made: go-spiffe's X.509-SVID files.
//!
//! The files lie beside the project, in `../shared/vectors`, or where `SIDEGATE_SHARED` says; where
//! they are absent, the test says that it was skipped.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    missing_docs,
    reason = "tests"
)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use sidegate_mesh::spiffe::SpiffeId;
use sidegate_mtls::{BundleSet, Revocations, Svid, SvidError, Verifier, VerifyLimits};

fn shared() -> Option<PathBuf> {
    let named = std::env::var_os("SIDEGATE_SHARED").map(PathBuf::from);
    let above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    let beside = above.map(|folder| folder.join("shared"));
    named
        .into_iter()
        .chain(beside)
        .find(|path| path.join("vectors").is_dir())
}

/// In the validity of every go-spiffe file.
fn moment_of(name: &str) -> SystemTime {
    let seconds = match name {
        // 2020-03-24T14:30Z; these live for one hour.
        "good-cert-and-key.pem" | "good-key-and-cert.pem" | "good-leaf-and-intermediate.pem" => {
            1_585_060_200
        }
        // 2021-01-01
        _ => 1_609_459_200,
    };
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

/// What our verifier says of the file's chain, when it trusts the last certificate of the file if
/// that may be a root, and otherwise a root that signed nothing here.
fn verdict(name: &str, pem: &[u8]) -> String {
    let chain: Result<Vec<CertificateDer<'static>>, _> =
        CertificateDer::pem_slice_iter(pem).collect();
    let chain = match chain {
        Ok(chain) if !chain.is_empty() => chain,
        Ok(_) => return "no certificate in the file".into(),
        Err(_) => return "not PEM".into(),
    };
    let trust_domain = "example.org".parse().unwrap();
    let mut bundles = BundleSet::new(1);
    let last = chain.last().unwrap().clone();
    if bundles.insert(&trust_domain, vec![last]).is_err() {
        bundles.insert(&trust_domain, vec![]).unwrap();
    }
    // Their files live for five years; our own bound has tests of its own.
    let limits = VerifyLimits {
        leaf_lifetime_max: Duration::from_hours(24 * 3650),
        ..VerifyLimits::default()
    };
    let verifier = Verifier::new(Arc::new(bundles), Arc::new(Revocations::none()), limits);
    match verifier.verify(&chain, moment_of(name), None) {
        Ok(peer) => format!("believed as {}", peer.id),
        Err(error) => error.code().into(),
    }
}

/// What our own loader says of the file as a key and a chain.
fn loaded(pem: &[u8]) -> &'static str {
    let expected: SpiffeId = "spiffe://example.org/workload-1".parse().unwrap();
    match Svid::from_pem(pem, &expected) {
        Ok(_) => "loaded",
        Err(SvidError::Pem(_)) => "pem",
        Err(SvidError::Key(_)) => "key",
        Err(SvidError::KeyMismatch) => "mismatch",
        Err(SvidError::WrongIdentity { .. }) => "identity",
        Err(SvidError::Certificate(_)) => "certificate",
    }
}

/// By the file's name: the verifier's verdict, and the loader's.
fn expected(name: &str) -> (&'static str, &'static str) {
    match name {
        "good-cert-and-key.pem" | "good-key-and-cert.pem" => ("unknown_issuer", "loaded"),
        "good-leaf-and-intermediate.pem" => ("believed as spiffe://example.org/workload-1", "pem"),
        // Good by the SPIFFE profile, which is checked first; RSA is what we do not allow.
        "good-leaf-only.pem" => ("algorithm", "pem"),
        "wrong-intermediate-no-ca.pem" => ("issuer_is_not_ca", "pem"),
        "wrong-intermediate-no-key-cert-sign.pem" => ("issuer_key_usage", "pem"),
        "wrong-leaf-ca-true.pem" => ("leaf_is_ca", "pem"),
        "wrong-leaf-cert-sign.pem"
        | "wrong-leaf-crl-sign.pem"
        | "wrong-leaf-no-digital-signature.pem" => ("key_usage", "pem"),
        "wrong-leaf-empty-id.pem" => ("no_uri_san", "pem"),
        "corrupt-cert.pem" => ("malformed_certificate", "pem"),
        "corrupt-key.pem" | "key-pkcs8-rsa.pem" => ("no certificate in the file", "key"),
        "key-pkcs8-ecdsa.pem" => ("no certificate in the file", "certificate"),
        "not-pem" => ("no certificate in the file", "pem"),
        other => panic!("{other} is new: say what is expected of it"),
    }
}

#[test]
fn every_go_spiffe_svid_file_ends_as_its_name_says() {
    let Some(shared) = shared() else {
        eprintln!("SKIPPED: no ../shared/vectors beside the project, and no SIDEGATE_SHARED");
        return;
    };
    let folder = shared.join("vectors/go-spiffe/svid/x509svid/testdata");
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(files.len() >= 16, "only {} files", files.len());
    let mut wrong = Vec::new();
    for file in files {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let pem = std::fs::read(&file).unwrap();
        let found = (verdict(&name, &pem), loaded(&pem));
        let expected = expected(&name);
        if (found.0.as_str(), found.1) != expected {
            wrong.push(format!("{name}: {found:?}, expected {expected:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
