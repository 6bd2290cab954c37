//! Who gets a certificate, for which key, and what it says.

use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose, SanType};
use sidegate_mesh::clock::Clock;
use sidegate_mtls::WorkloadKey;

use crate::harness::{Bed, Key, check_refused};

const MINUTE: Duration = Duration::from_mins(1);
const DAY: Duration = Duration::from_hours(24);

#[tokio::test]
async fn a_token_gives_the_identity_that_it_names_for_a_day() {
    let bed = Bed::new().await;
    let svid = bed.svid("orders").await;
    assert_eq!(svid.id.as_str(), "spiffe://mesh.local/ns/shop/sa/orders");
    let now = bed.clock.now();
    assert_eq!(svid.not_after, now + DAY);
    assert_eq!(svid.not_before, now - Duration::from_secs(30));
    assert_eq!(
        svid.chain.len(),
        2,
        "leaf and intermediate, without the root"
    );
    assert_eq!(svid.serial.as_bytes().len(), 16);
    bed.verifier()
        .verify(&svid.chain, now, Some(&svid.id))
        .unwrap();
    assert!(bed.ledger().contains(&svid.serial.to_string()));
}

#[tokio::test]
async fn nothing_that_a_request_asks_for_is_granted_but_its_key() {
    let bed = Bed::new().await;
    let token = bed.token("orders").await;
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(["evil.example".to_owned()]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let admin = "spiffe://mesh.local/ns/sidegate-system/sa/sidegate-ca";
    let uri = SanType::URI(admin.try_into().unwrap());
    params.subject_alt_names.push(uri);
    let csr = params.serialize_request(&key).unwrap();
    let chain = bed.join(&token, csr.der()).await.unwrap();
    let id = bed.id("orders");
    let peer = bed
        .verifier()
        .verify(&chain, bed.clock.now(), Some(&id))
        .unwrap();
    assert_eq!(peer.id, id);
    let text = String::from_utf8_lossy(&chain[0]).into_owned();
    assert!(!text.contains("evil.example") && !text.contains("sidegate-system"));
}

#[tokio::test]
async fn a_token_may_be_repeated_with_its_key_and_with_no_other() {
    let mut bed = Bed::new().await;
    let token = bed.token("orders").await;
    let key = Key::new();
    let first = bed.join(&token, &key.csr).await.unwrap();
    bed.clock.advance(MINUTE);
    let again = bed.join(&token, &key.csr).await.unwrap();
    assert_ne!(first[0], again[0], "a new serial number");
    let (first, again) = (
        key.svid(first, &bed.id("orders")),
        key.svid(again, &bed.id("orders")),
    );
    assert_eq!(first.not_after, again.not_after, "the key lives no longer");
    check_refused(
        bed.join(&token, &Key::new().csr).await,
        "UNAUTHENTICATED",
        "another key",
    );
    bed.restart().await;
    bed.join(&token, &key.csr).await.unwrap();
    check_refused(
        bed.join(&token, &Key::new().csr).await,
        "UNAUTHENTICATED",
        "another key",
    );
    assert!(
        bed.metrics()
            .await
            .contains("sidegate_ca_refusals_total{reason=\"token_used\"} 1")
    );
}

#[tokio::test]
async fn a_token_ends_with_its_ten_minutes_also_over_a_restart() {
    let mut bed = Bed::new().await;
    let token = bed.token("orders").await;
    bed.clock.advance(MINUTE * 10);
    bed.restart().await;
    let key = Key::new();
    bed.join(&token, &key.csr).await.unwrap();
    bed.clock.advance(Duration::from_secs(1));
    check_refused(
        bed.join(&token, &key.csr).await,
        "UNAUTHENTICATED",
        "expired",
    );
}

#[tokio::test]
async fn an_unknown_a_changed_and_a_revoked_token_are_refused() {
    let bed = Bed::new().await;
    let created = bed.ca().create_token("shop", "orders").await.unwrap();
    let token = created.token.to_string();
    let mut changed = token.clone();
    let last = changed.pop().unwrap();
    changed.push(if last == '0' { '1' } else { '0' });
    let id = &created.id;
    for wrong in [
        "",
        "sgt_",
        "sgt_0000000000000000_00",
        &changed,
        &format!("sgt_{id}_"),
    ] {
        check_refused(
            bed.join(wrong, &Key::new().csr).await,
            "UNAUTHENTICATED",
            "unknown",
        );
    }
    bed.ca().issuer().revoke_token(id).await.unwrap();
    check_refused(
        bed.join(&token, &Key::new().csr).await,
        "UNAUTHENTICATED",
        "revoked",
    );
}

#[tokio::test]
async fn no_token_names_the_control_plane_or_smuggles_a_segment() {
    let bed = Bed::new().await;
    for (namespace, service_account) in [
        ("sidegate-system", "sidegate-ca"),
        ("sidegate-system", "web"),
        ("shop/sa/web", "x"),
        ("shop", ""),
        ("..", "x"),
    ] {
        let created = bed.ca().create_token(namespace, service_account).await;
        assert!(created.is_err(), "{namespace}/{service_account}");
    }
}

#[tokio::test]
async fn tokens_are_bounded_in_number() {
    let bed = Bed::with(|config| config.limits.tokens_max = 2).await;
    bed.token("a").await;
    bed.token("b").await;
    let third = bed.ca().create_token("shop", "c").await.unwrap_err();
    assert!(third.to_string().contains("2 join tokens"), "{third}");
    bed.clock.advance(MINUTE * 11);
    bed.token("c").await;
}

#[tokio::test]
async fn a_renewal_keeps_the_identity_and_records_the_parent() {
    let bed = Bed::new().await;
    let svid = bed.svid("orders").await;
    let next = bed.renewed(&svid).await;
    assert_eq!(next.id, svid.id);
    assert_ne!(next.serial, svid.serial);
    let parent = format!("svid:{}", svid.serial);
    assert!(bed.ledger().contains(&parent), "the parent is recorded");
}

#[tokio::test]
async fn a_key_is_certified_once() {
    let bed = Bed::new().await;
    let svid = bed.svid("orders").await;
    let own = Key::of(svid.key().clone());
    check_refused(
        bed.renew(&svid, &own.csr).await,
        "INVALID_ARGUMENT",
        "used before",
    );
    let token = bed.token("web").await;
    check_refused(
        bed.join(&token, &own.csr).await,
        "INVALID_ARGUMENT",
        "used before",
    );
    // The refusals have claimed nothing.
    bed.renewed(&svid).await;
    bed.join(&token, &Key::new().csr).await.unwrap();
}

#[tokio::test]
async fn the_cas_own_keys_are_never_certified() {
    let bed = Bed::new().await;
    let token = bed.token("web").await;
    for name in ["root.key", "intermediate.key"] {
        let pem = std::fs::read_to_string(bed.file(name)).unwrap();
        let der = KeyPair::from_pem(&pem).unwrap().serialize_der();
        let key = Key::of(WorkloadKey::from_pkcs8(der.into()).unwrap());
        check_refused(
            bed.join(&token, &key.csr).await,
            "INVALID_ARGUMENT",
            "used before",
        );
    }
}

#[tokio::test]
async fn one_svid_renewed_with_two_keys_freezes_its_lineage() {
    let mut bed = Bed::new().await;
    let first = bed.svid("orders").await;
    let key = Key::new();
    let chain = bed.renew(&first, &key.csr).await.unwrap();
    let second = key.svid(chain, &first.id);
    let repeated = bed.renew(&first, &key.csr).await.unwrap();
    let repeated = key.svid(repeated, &first.id);
    let third = bed.renewed(&second).await;
    // Two SVIDs of one key are one parent: the repetition is no way round.
    check_refused(
        bed.renew(&repeated, &Key::new().csr).await,
        "PERMISSION_DENIED",
        "another key",
    );
    for _ in 0..2 {
        for svid in [&first, &second, &third] {
            let renewed = bed.renew(svid, &Key::new().csr).await;
            check_refused(renewed, "PERMISSION_DENIED", "frozen");
        }
        bed.restart().await;
    }
    assert!(bed.ledger().contains("\"kind\":\"frozen\""));
    // An administrator's token starts another line.
    let fresh = bed.svid("orders").await;
    bed.renewed(&fresh).await;
}

#[tokio::test]
async fn freezing_is_counted_and_others_go_on() {
    let bed = Bed::new().await;
    let (orders, web) = (bed.svid("orders").await, bed.svid("web").await);
    bed.renewed(&orders).await;
    let forked = bed.renew(&orders, &Key::new().csr).await;
    check_refused(forked, "PERMISSION_DENIED", "another key");
    bed.renewed(&web).await;
    let metrics = bed.metrics().await;
    assert!(
        metrics.contains("sidegate_ca_lineages_frozen_total 1"),
        "{metrics}"
    );
    assert!(
        metrics.contains("reason=\"lineage_forked\"} 1"),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_malformed_request_is_refused_and_claims_nothing() {
    let bed = Bed::new().await;
    let token = bed.token("orders").await;
    check_refused(bed.join(&token, b"").await, "INVALID_ARGUMENT", "PKCS#10");
    let mut unsigned = Key::new().csr;
    *unsigned.last_mut().unwrap() ^= 1;
    check_refused(
        bed.join(&token, &unsigned).await,
        "INVALID_ARGUMENT",
        "signature",
    );
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P521_SHA512).unwrap();
    let csr = CertificateParams::default()
        .serialize_request(&key)
        .unwrap();
    check_refused(
        bed.join(&token, csr.der()).await,
        "INVALID_ARGUMENT",
        "P-256",
    );
    bed.join(&token, &Key::new().csr).await.unwrap();
}

#[tokio::test]
async fn an_svid_that_has_expired_renews_nothing() {
    let bed = Bed::new().await;
    let svid = bed.svid("orders").await;
    bed.clock.advance(DAY + Duration::from_secs(1));
    assert!(bed.renew(&svid, &Key::new().csr).await.is_err());
}

#[tokio::test]
async fn no_leaf_outlives_the_root() {
    let mut bed = Bed::new().await;
    let root_life = sidegate_ca::authority::ROOT_LIFETIME;
    bed.clock.advance(root_life - Duration::from_hours(2));
    bed.restart().await;
    let svid = bed.svid("orders").await;
    let left = svid.not_after.duration_since(bed.clock.now()).unwrap();
    assert!(left < Duration::from_hours(2), "{left:?}");
}

#[tokio::test]
async fn the_intermediate_is_renewed_at_half_of_its_life() {
    let bed = Bed::new().await;
    let before = bed.svid("orders").await;
    let token = bed.token("web").await;
    let signer = || async {
        // The CA's own SVID is renewed first; until then no caller believes it.
        let token = bed.token("web").await;
        let chain = bed.join(&token, &Key::new().csr).await.ok()?;
        bed.verifier()
            .verify(&chain, bed.clock.now(), None)
            .unwrap();
        Some(chain[1].clone())
    };
    bed.clock.advance(DAY * 15 - MINUTE * 2);
    let signs = || async { signer().await.is_some() };
    crate::harness::until("the CA has renewed its own svid", signs).await;
    assert_eq!(signer().await.as_ref(), Some(&before.chain[1]), "not yet");
    bed.clock.advance(MINUTE * 2);
    let renewed = || async { signer().await.is_some_and(|now| now != before.chain[1]) };
    crate::harness::until("another intermediate signs", renewed).await;
    assert!(!bed.file("intermediate.new").exists());
    assert!(
        bed.join(&token, &Key::new().csr).await.is_err(),
        "long expired"
    );
}

#[tokio::test]
async fn limits_hold_for_one_identity_and_for_all() {
    let bed = Bed::with(|config| {
        config.limits.issuances_per_identity_per_minute = 2;
        config.limits.issuances_per_minute = 3;
    })
    .await;
    let token = bed.token("orders").await;
    let key = Key::new();
    bed.join(&token, &key.csr).await.unwrap();
    bed.join(&token, &key.csr).await.unwrap();
    let third = bed.join(&token, &key.csr).await;
    check_refused(
        third,
        "RESOURCE_EXHAUSTED",
        "for this identity; try again in",
    );
    bed.svid("web").await;
    let other = bed.token("x").await;
    let fourth = bed.join(&other, &Key::new().csr).await;
    check_refused(fourth, "RESOURCE_EXHAUSTED", "for all identities");
    let metrics = bed.metrics().await;
    assert!(
        metrics.contains("reason=\"limit_identity\"} 1"),
        "{metrics}"
    );
    assert!(metrics.contains("reason=\"limit_overall\"} 1"), "{metrics}");
    bed.clock.advance(MINUTE);
    bed.join(&token, &key.csr).await.unwrap();
}

#[tokio::test]
async fn two_keys_at_once_on_one_token_give_one_certificate() {
    let bed = Bed::new().await;
    let token = bed.token("orders").await;
    let keys: Vec<Key> = (0..8).map(|_| Key::new()).collect();
    let asked = keys.iter().map(|key| bed.join(&token, &key.csr));
    let answers = futures_util::future::join_all(asked).await;
    assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 1);
}

#[tokio::test]
async fn a_stranger_learns_nothing_and_is_counted() {
    let bed = Bed::new().await;
    let other = Bed::new().await;
    let stranger = other.svid("orders").await;
    let renewed = bed.renew(&stranger, &Key::new().csr).await;
    assert!(renewed.is_err(), "another CA's certificate");
    let counted = || async {
        let metrics = bed.metrics().await;
        metrics.contains("sidegate_ca_handshake_failures_total{reason=\"unknown_issuer\"} 1")
    };
    crate::harness::until("the failure is counted", counted).await;
}

#[tokio::test]
async fn a_slow_handshake_and_a_full_house_are_turned_away() {
    let bed = Bed::with(|config| config.limits.connections_max = 2).await;
    let address = bed.ca().address();
    let connect = || tokio::net::TcpStream::connect(address);
    let (_first, _second) = (connect().await.unwrap(), connect().await.unwrap());
    // Both are in their handshake; a third is closed at once.
    let full = || async {
        use tokio::io::AsyncReadExt;
        let mut third = connect().await.unwrap();
        let mut byte = [0];
        let read = third.read(&mut byte);
        let read = tokio::time::timeout(Duration::from_millis(200), read).await;
        matches!(read, Ok(Ok(0) | Err(_)))
    };
    crate::harness::until("a third connection is refused", full).await;
    assert!(bed.metrics().await.contains("reason=\"connections_max\""));
    bed.clock.advance(bed.config.limits.handshake_timeout);
    let served = || async {
        let token = bed.token("orders").await;
        bed.join(&token, &Key::new().csr).await.is_ok()
    };
    crate::harness::until("the slow ones are gone", served).await;
    assert!(bed.metrics().await.contains("reason=\"handshake_timeout\""));
}

#[tokio::test]
async fn a_message_that_is_too_large_is_refused() {
    let bed = Bed::new().await;
    let token = bed.token("orders").await;
    let huge = vec![0; 1 << 20];
    assert!(bed.join(&token, &huge).await.is_err());
    bed.join(&token, &Key::new().csr).await.unwrap();
}
