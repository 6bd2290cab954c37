//! Whom sidecars believe, and what is no longer believed.

use sidegate_mtls::VerifyError;

use crate::harness::{Bed, Key, acknowledge, check_refused, next, until};

#[tokio::test]
async fn the_bundle_comes_at_once_to_anybody_and_then_every_change() {
    let bed = Bed::new().await;
    let svid = bed.svid("orders").await;
    for caller in [None, Some(&svid)] {
        let mut stream = bed.watch(caller).await;
        let first = next(&mut stream).await;
        let serial = bed.svid("web").await.serial.to_string();
        let issuer = bed.ca().issuer();
        let sequence = issuer.revoke_serial(&serial).await.unwrap();
        let second = next(&mut stream).await;
        assert_eq!(second.sequence(), sequence);
        assert!(second.sequence() > first.sequence());
        let revocations = second.message().revocations.clone().unwrap();
        assert!(revocations.serials.iter().any(|bytes| hex(bytes) == serial));
    }
}

#[tokio::test]
async fn a_revoked_identity_is_believed_by_nobody_and_gets_nothing() {
    let mut bed = Bed::new().await;
    let svid = bed.svid("orders").await;
    let unused = bed.token("orders").await;
    let sequence = bed
        .ca()
        .issuer()
        .revoke_identity(svid.id.as_str())
        .await
        .unwrap();
    for _ in 0..2 {
        let update = next(&mut bed.watch(None).await).await;
        assert_eq!(update.sequence(), sequence, "kept over a restart");
        let trust = update.check(&bed.trust_domain()).unwrap();
        assert!(trust.revocations.has_id(&svid.id));
        assert!(bed.renew(&svid, &Key::new().csr).await.is_err());
        let joined = bed.join(&unused, &Key::new().csr).await;
        check_refused(joined, "PERMISSION_DENIED", "revoked");
        assert!(bed.ca().create_token("shop", "orders").await.is_err());
        bed.restart().await;
    }
}

#[tokio::test]
async fn an_identity_that_is_reinstated_keeps_its_old_certificates_revoked() {
    let bed = Bed::new().await;
    let old = bed.svid("orders").await;
    let issuer = bed.ca().issuer();
    let revoked = issuer.revoke_identity(old.id.as_str()).await.unwrap();
    let reinstated = issuer.reinstate(old.id.as_str()).await.unwrap();
    assert!(reinstated > revoked);
    assert!(bed.renew(&old, &Key::new().csr).await.is_err());
    let fresh = bed.svid("orders").await;
    bed.renewed(&fresh).await;
    let update = next(&mut bed.watch(None).await).await;
    let trust = update.check(&bed.trust_domain()).unwrap();
    assert!(!trust.revocations.has_id(&old.id));
    assert!(trust.revocations.has_serial(&old.serial));
}

#[tokio::test]
async fn one_certificate_is_revoked_in_any_spelling_and_others_are_not() {
    let bed = Bed::new().await;
    let (one, other) = (bed.svid("orders").await, bed.svid("orders").await);
    let plain = one.serial.to_string().to_uppercase();
    let pairs: Vec<String> = plain
        .as_bytes()
        .chunks(2)
        .map(|c| String::from_utf8_lossy(c).into())
        .collect();
    bed.ca()
        .issuer()
        .revoke_serial(&pairs.join(":"))
        .await
        .unwrap();
    assert!(bed.renew(&one, &Key::new().csr).await.is_err());
    bed.renewed(&other).await;
}

#[tokio::test]
async fn what_does_not_exist_or_is_not_ours_is_not_revoked() {
    let bed = Bed::new().await;
    let issuer = bed.ca().issuer();
    for wrong in [
        "spiffe://other.local/ns/shop/sa/web",
        "spiffe://mesh.local/ns/sidegate-system/sa/sidegate-ca",
        "spiffe://mesh.local",
        "shop/web",
    ] {
        assert!(issuer.revoke_identity(wrong).await.is_err(), "{wrong}");
    }
    for wrong in ["", "00", &"0f".repeat(16)] {
        assert!(issuer.revoke_serial(wrong).await.is_err(), "{wrong}");
    }
}

#[tokio::test]
async fn sequences_rise_over_restarts_even_when_the_clock_goes_back() {
    let mut bed = Bed::new().await;
    let mut last = 0;
    for n in 0..4 {
        let id = bed.id(&format!("w{n}")).to_string();
        let sequence = bed.ca().issuer().revoke_identity(&id).await.unwrap();
        assert!(sequence > last);
        last = sequence;
        bed.restart().await;
        assert_eq!(next(&mut bed.watch(None).await).await.sequence(), last);
    }
}

#[tokio::test]
async fn acknowledgements_are_tracked_by_caller() {
    let bed = Bed::new().await;
    let svid = bed.svid("orders").await;
    let unacknowledged = |n: usize| {
        let bed = &bed;
        move || async move {
            let line = format!("sidegate_ca_identities_unacknowledged {n}");
            bed.metrics().await.contains(&line)
        }
    };
    until("one has not acknowledged", unacknowledged(1)).await;
    let mut stream = bed.watch(Some(&svid)).await;
    let update = next(&mut stream).await;
    acknowledge(&stream, &update, &bed).await;
    until("all have acknowledged", unacknowledged(0)).await;
    bed.ca()
        .issuer()
        .revoke_identity(bed.id("x").as_str())
        .await
        .unwrap();
    until("not the next one", unacknowledged(1)).await;
    let update = next(&mut stream).await;
    acknowledge(&stream, &update, &bed).await;
    until("now the next one", unacknowledged(0)).await;
    let metrics = bed.metrics().await;
    assert!(metrics.contains("sidegate_ca_watchers 1"), "{metrics}");
}

#[tokio::test]
async fn bundle_streams_are_bounded_and_counted() {
    let bed = Bed::with(|config| config.limits.watchers_max = 1).await;
    let mut first = bed.watch(None).await;
    next(&mut first).await;
    let watch = sidegate_mtls::BundleWatch {
        current: None,
        verifier: bed.verifier(),
        acknowledgement: sidegate_mtls::Acknowledgement::default(),
    };
    let client = bed.client(sidegate_mtls::Evidence::None);
    let second = sidegate_mtls::Issue::watch_bundle(&client, watch).await;
    check_refused(second, "RESOURCE_EXHAUSTED", "too many");
    drop(first);
    until("there is room again", || async {
        bed.metrics().await.contains("sidegate_ca_watchers 0")
    })
    .await;
}

#[tokio::test]
async fn the_ca_pins_its_own_id_and_no_workload_can_stand_in_for_it() {
    let bed = Bed::new().await;
    let svid = bed.svid("web").await;
    let ca = "spiffe://mesh.local/ns/sidegate-system/sa/sidegate-ca"
        .parse()
        .unwrap();
    let now = sidegate_mesh::clock::Clock::now(&bed.clock);
    let verified = bed.verifier().verify(&svid.chain, now, Some(&ca));
    assert!(matches!(
        verified,
        Err(VerifyError::UnexpectedIdentity { .. })
    ));
}

fn hex(bytes: &[u8]) -> String {
    sidegate_mtls::Serial::from_bytes(bytes)
        .unwrap()
        .to_string()
}
