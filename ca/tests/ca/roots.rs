//! The change from one root to the next, step by step, and what each step waits for.

use std::time::Duration;

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use sidegate_mesh::clock::Clock;

use crate::harness::{Bed, acknowledge, next, until};

fn roots(bed: &Bed) -> Vec<CertificateDer<'static>> {
    let pem = std::fs::read(bed.file("root.pem")).unwrap();
    CertificateDer::pem_slice_iter(&pem)
        .map(Result::unwrap)
        .collect()
}

#[tokio::test]
async fn a_root_is_changed_in_three_steps_and_each_waits_for_all() {
    let mut bed = Bed::new().await;
    let svid = bed.svid("orders").await;
    let first = roots(&bed);
    let mut stream = bed.watch(Some(&svid)).await;
    let update = next(&mut stream).await;
    acknowledge(&stream, &update, &bed).await;
    bed.ca().issuer().prepare_root().await.unwrap();
    let both = roots(&bed);
    assert_eq!(
        (both.len(), &both[0]),
        (2, &first[0]),
        "the active one first"
    );
    let again = bed.ca().issuer().prepare_root().await.unwrap_err();
    assert!(again.to_string().contains("prepared already"), "{again}");
    // Published, not acknowledged: nothing is signed under it, and activation names who is missing.
    bed.verifier()
        .verify(&bed.svid("web").await.chain, bed.clock.now(), None)
        .unwrap();
    let early = bed
        .ca()
        .issuer()
        .activate_root(false)
        .await
        .unwrap_err()
        .to_string();
    assert!(
        early.contains("ns/shop/sa/orders") && early.contains("--force"),
        "{early}"
    );
    // `web` holds a certificate and is cut off: it is waited for all the same.
    let update = next(&mut stream).await;
    acknowledge(&stream, &update, &bed).await;
    let issuer = bed.ca().issuer();
    until("only web is missing", || async {
        let early = issuer.activate_root(false).await.unwrap_err().to_string();
        early.contains("1 identities") && early.contains("ns/shop/sa/web")
    })
    .await;
    bed.ca()
        .issuer()
        .revoke_identity(bed.id("web").as_str())
        .await
        .unwrap();
    let update = next(&mut stream).await;
    acknowledge(&stream, &update, &bed).await;
    until("all have acknowledged", || async {
        issuer.activate_root(false).await.is_ok()
    })
    .await;
    let active = roots(&bed);
    assert_eq!(
        active,
        [both[1].clone(), both[0].clone()],
        "now the other way round"
    );
    // A leaf under the old root and one under the new are both believed.
    let renewed = bed.renewed(&svid).await;
    for svid in [&svid, &renewed] {
        bed.verifier()
            .verify(&svid.chain, bed.clock.now(), Some(&svid.id))
            .unwrap();
    }
    bed.restart().await;
    let early = bed
        .ca()
        .issuer()
        .retire_root(false)
        .await
        .unwrap_err()
        .to_string();
    assert!(early.contains("in date"), "{early}");
    bed.clock.advance(Duration::from_mins(24 * 60 + 1));
    bed.ca().issuer().retire_root(false).await.unwrap();
    assert_eq!(roots(&bed), [both[1].clone()]);
    for key in ["root-next.key", "root-old.key"] {
        assert!(!bed.file(key).exists(), "{key}");
    }
    bed.restart().await;
    bed.svid("orders").await;
}

#[tokio::test]
async fn force_overrides_and_is_written_into_the_ledger() {
    let mut bed = Bed::new().await;
    let svid = bed.svid("orders").await;
    bed.ca().issuer().prepare_root().await.unwrap();
    assert!(bed.ca().issuer().activate_root(false).await.is_err());
    bed.ca().issuer().activate_root(true).await.unwrap();
    assert!(bed.ca().issuer().retire_root(false).await.is_err());
    bed.ca().issuer().retire_root(true).await.unwrap();
    assert_eq!(bed.ledger().matches("\"forced\":true").count(), 2);
    assert!(
        bed.verifier()
            .verify(&svid.chain, bed.clock.now(), None)
            .is_err()
    );
    bed.restart().await;
    bed.svid("orders").await;
}

#[tokio::test]
async fn a_crash_between_the_ledger_and_the_key_files_is_finished_at_start() {
    let mut bed = Bed::new().await;
    bed.ca().issuer().prepare_root().await.unwrap();
    let files = [
        "root.key",
        "root-next.key",
        "root.pem",
        "intermediate.key",
        "intermediate.pem",
    ];
    let before: Vec<Vec<u8>> = files
        .iter()
        .map(|name| std::fs::read(bed.file(name)).unwrap())
        .collect();
    bed.ca().issuer().activate_root(false).await.unwrap();
    bed.stop().await;
    // As if the power had gone right after the ledger's entry.
    std::fs::remove_file(bed.file("root-old.key")).unwrap();
    for (name, bytes) in files.iter().zip(&before) {
        std::fs::write(bed.file(name), bytes).unwrap();
    }
    set_mode(&bed, "root-next.key", 0o600);
    bed.start().await.unwrap();
    assert_eq!(
        std::fs::read(bed.file("root.key")).unwrap(),
        before[1],
        "the new root's key"
    );
    assert!(!bed.file("root-next.key").exists());
    let listed = roots(&bed);
    assert_eq!(listed.len(), 2);
    let svid = bed.svid("orders").await;
    bed.ca().issuer().retire_root(false).await.unwrap();
    bed.verifier()
        .verify(&svid.chain, bed.clock.now(), None)
        .unwrap();
}

#[tokio::test]
async fn a_prepared_root_can_be_given_up() {
    let mut bed = Bed::new().await;
    bed.ca().issuer().prepare_root().await.unwrap();
    let prepared = roots(&bed)[1].clone();
    let sha256 = sidegate_ca::digest::Digest::of(&prepared).to_string();
    bed.ca().issuer().remove_root(&sha256).await.unwrap();
    assert_eq!(roots(&bed).len(), 1);
    assert!(!bed.file("root-next.key").exists());
    assert!(bed.ca().issuer().activate_root(true).await.is_err());
    bed.restart().await;
    bed.ca().issuer().prepare_root().await.unwrap();
}

#[tokio::test]
async fn another_cas_root_is_added_and_removed_and_the_active_one_stays() {
    let bed = Bed::new().await;
    let other = Bed::new().await;
    let pem = std::fs::read_to_string(other.file("root.pem")).unwrap();
    let issuer = bed.ca().issuer();
    let mut stream = bed.watch(None).await;
    next(&mut stream).await;
    issuer.add_root(&pem).await.unwrap();
    let update = next(&mut stream).await;
    assert_eq!(update.message().bundles[0].roots.len(), 2);
    assert!(issuer.add_root(&pem).await.is_err(), "already there");
    // Believed by sidecars, but this CA renews only what it has issued.
    let stranger = other.svid("orders").await;
    bed.verifier()
        .verify(&stranger.chain, bed.clock.now(), None)
        .unwrap();
    let renewed = bed.renew(&stranger, &crate::harness::Key::new().csr).await;
    crate::harness::check_refused(renewed, "UNAUTHENTICATED", "not issued by this CA");
    let sha256 = |bed: &Bed| sidegate_ca::digest::Digest::of(&roots(bed)[0]).to_string();
    let active = issuer
        .remove_root(&sha256(&bed))
        .await
        .unwrap_err()
        .to_string();
    assert!(active.contains("this root signs"), "{active}");
    issuer.remove_root(&sha256(&other)).await.unwrap();
    assert_eq!(next(&mut stream).await.message().bundles[0].roots.len(), 1);
    assert!(issuer.remove_root(&sha256(&other)).await.is_err());
}

#[tokio::test]
async fn what_is_no_root_of_ours_is_not_added() {
    let bed = Bed::new().await;
    let other = Bed::with(|config| config.trust_domain = "other.local".parse().unwrap()).await;
    let foreign = std::fs::read_to_string(other.file("root.pem")).unwrap();
    let intermediate = std::fs::read_to_string(bed.file("intermediate.pem")).unwrap();
    for wrong in ["", "garbage", &foreign, &intermediate] {
        assert!(bed.ca().issuer().add_root(wrong).await.is_err(), "{wrong}");
    }
}

fn set_mode(bed: &Bed, name: &str, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    let permissions = std::fs::Permissions::from_mode(mode);
    std::fs::set_permissions(bed.file(name), permissions).unwrap();
}
