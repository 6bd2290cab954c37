//! x509-limbo: path validation cases that nobody here wrote.
//!
//! Its leaves are web servers, so everything that asks for a SPIFFE ID is left out here; what is
//! tested is what remains: parsing, roots and issuers that are no CA or out of date, and the path.
//! A case that ends otherwise than limbo says is waived by name, with a reason.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, TrustAnchor};
use serde_json::Value;

use webpki::KeyUsage;

use super::{Presented, VerifyError};
use crate::certificate::Certificate;
use crate::proven::ProvenSignatures;

fn cases() -> Option<Vec<Value>> {
    let named = std::env::var_os("SIDEGATE_SHARED").map(PathBuf::from);
    let above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    let mut folders = named
        .into_iter()
        .chain(above.map(|folder| folder.join("shared")));
    let file = folders
        .find(|path| path.join("vectors").is_dir())?
        .join("vectors/x509-limbo-core.json");
    let document: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    Some(document["testcases"].as_array().unwrap().clone())
}

fn certificates(value: &Value) -> Option<Vec<CertificateDer<'static>>> {
    let list = value.as_array().unwrap();
    let parse = |pem: &Value| CertificateDer::from_pem_slice(pem.as_str().unwrap().as_bytes());
    list.iter().map(|pem| parse(pem).ok()).collect()
}

fn moment(case: &Value) -> SystemTime {
    let Some(text) = case["validation_time"].as_str() else {
        return SystemTime::UNIX_EPOCH + Duration::from_hours(500_000);
    };
    let format = time::format_description::well_known::Rfc3339;
    let at = time::OffsetDateTime::parse(text, &format).unwrap();
    let seconds = u64::try_from(at.unix_timestamp()).unwrap_or(0);
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

/// The refusal's code, or `None` when the path is believed.
fn refusal(case: &Value, proven: &ProvenSignatures) -> Option<String> {
    let code = |error: VerifyError| error.code().to_owned();
    let leaf =
        CertificateDer::from_pem_slice(case["peer_certificate"].as_str().unwrap().as_bytes());
    let (Ok(leaf), Some(issuers), Some(roots)) = (
        leaf,
        certificates(&case["untrusted_intermediates"]),
        certificates(&case["trusted_certs"]),
    ) else {
        return Some("pem".to_owned());
    };
    let now = moment(case);
    let judged = || -> Result<(), VerifyError> {
        check_limbo_leaf(&Certificate::parse(&leaf)?)?;
        for issuer in &issuers {
            if !Certificate::parse(issuer)?.is_ca() {
                return Err(VerifyError::IssuerIsNotCa);
            }
        }
        let mut anchors: Vec<TrustAnchor<'_>> = Vec::new();
        for root in &roots {
            let parsed = Certificate::parse(root)?;
            let in_date = parsed.not_before() <= now && now <= parsed.not_after();
            if parsed.has_unknown_critical_extension() {
                return Err(VerifyError::UnknownCriticalExtension);
            }
            let may_sign = parsed
                .key_usage()
                .is_none_or(|(usage, _)| usage.key_cert_sign());
            if in_date && parsed.is_ca() && may_sign {
                anchors.extend(webpki::anchor_from_trusted_cert(root).ok());
            }
        }
        let path = Presented {
            leaf: &leaf,
            issuers: &issuers,
            now,
            proven,
        };
        path.leads_to_for(KeyUsage::server_auth(), &anchors)
    };
    judged().err().map(code)
}

/// What we ask of every leaf, except for what only a SPIFFE ID can satisfy.
fn check_limbo_leaf(leaf: &Certificate<'_>) -> Result<(), VerifyError> {
    if leaf.is_ca() {
        return Err(VerifyError::LeafIsCa);
    }
    if leaf
        .key_usage()
        .is_some_and(|(usage, _)| usage.key_cert_sign())
    {
        return Err(VerifyError::KeyUsage {
            what: "may sign certificates",
        });
    }
    if !leaf.alternative_name_is_critical_enough() {
        return Err(VerifyError::SanNotCritical);
    }
    if !leaf.algorithms_are_allowed() {
        return Err(VerifyError::Algorithm);
    }
    Ok(())
}

/// Why a case may end otherwise than limbo says; the first prefix that fits counts.
const WAIVED: &[(&str, &str)] = &[
    ("crl::", "revocation comes with the bundle, not from CRLs"),
    ("webpki::cn::", "a common name is never an identity here"),
    (
        "webpki::san::",
        "DNS names are not compared; one SPIFFE ID is demanded elsewhere",
    ),
    ("rfc5280::san::ip-in-dns", "DNS names are not compared"),
    ("rfc5280::san::underscore-dns", "DNS names are not compared"),
    (
        "rfc5280::nc::invalid-dnsname-leading-period",
        "DNS names are not compared",
    ),
    (
        "webpki::eku::",
        "extended key usage by the SPIFFE profile is tested over handshakes",
    ),
    (
        "rfc5280::aki::",
        "key identifiers only help to find a path; the signature decides",
    ),
    (
        "rfc5280::ski::",
        "key identifiers only help to find a path; the signature decides",
    ),
    (
        "webpki::aki::",
        "key identifiers only help to find a path; the signature decides",
    ),
    (
        "pathlen::max-chain-depth-",
        "our bound is on what is presented, tested over handshakes",
    ),
    (
        "pathlen::validation-ignores-pathlen-in-leaf",
        "stricter: a leaf is never a CA",
    ),
    ("rfc5280::ca-as-leaf", "stricter: a leaf is never a CA"),
    (
        "pathlen::self-issued-certs-pathlen",
        "stricter: webpki does not treat self-issued apart",
    ),
    (
        "rfc5280::nc::permitted-self-issued",
        "stricter: webpki does not treat self-issued apart",
    ),
    (
        "rfc5280::nc::permitted-dn-match",
        "stricter: webpki refuses directory name constraints",
    ),
    (
        "rfc5280::nc::nc-permits-email-",
        "stricter: an e-mail leaf is no server",
    ),
    (
        "rfc5280::nc::not-allowed-in-ee-",
        "a leaf's name constraints have no effect: it signs nothing",
    ),
    (
        "rfc5280::nc::permitted-dns-match-noncritical",
        "constraints count, critical or not",
    ),
    (
        "webpki::nc::intermediate-permitted-excluded-subtrees-both-",
        "no constraint is none",
    ),
    (
        "pathological::nc-dos-3",
        "webpki's budget ends it; SVIDs have no name that it would compare",
    ),
    (
        "rfc5280::ca-empty-subject",
        "a CA's name is not an identity",
    ),
    ("rfc5280::pc::ica-noncritical-pc", "policies are not used"),
    (
        "rfc5280::root-non-critical-basic-constraints",
        "cA counts, critical or not",
    ),
    (
        "rfc5280::unknown-critical-extension-unrelated-root",
        "stricter: a bundle with such a root is refused as a whole",
    ),
    (
        "webpki::cryptographydotio-chain",
        "stricter: RSA is not allowed",
    ),
];

#[test]
fn limbo_cases_end_as_limbo_says_or_are_waived_with_a_reason() {
    let Some(cases) = cases() else {
        println!("SKIPPED: no shared/vectors beside the project, and no SIDEGATE_SHARED");
        return;
    };
    assert_eq!(cases.len(), 194);
    let mut unexplained = Vec::new();
    let mut used = std::collections::HashSet::new();
    // Twice: that a signature is known changes no verdict.
    let proven = ProvenSignatures::default();
    for case in cases.iter().chain(&cases) {
        let id = case["id"].as_str().unwrap();
        let refusal = refusal(case, &proven);
        if refusal.is_some() == (case["expected_result"] == "FAILURE") {
            continue;
        }
        match WAIVED.iter().find(|(prefix, _)| id.starts_with(prefix)) {
            Some((prefix, _)) => drop(used.insert(*prefix)),
            None => unexplained.push(format!("{id}: {refusal:?}")),
        }
    }
    assert!(
        unexplained.is_empty(),
        "neither as expected nor waived: {unexplained:#?}"
    );
    let stale: Vec<_> = WAIVED
        .iter()
        .filter(|(prefix, _)| !used.contains(prefix))
        .collect();
    assert!(stale.is_empty(), "waived, but as expected: {stale:#?}");
}
