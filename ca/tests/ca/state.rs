//! What the CA refuses to start with, and that it never makes again what was made once.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose, SanType};
use sidegate_mesh::clock::Clock;

use crate::harness::{Bed, Key};

/// Spoils a stopped CA's folder and expects a refusal that says which file and what to do.
async fn check(name: &str, spoil: impl FnOnce(&Bed), expected: &[&str]) {
    let mut bed = Bed::new().await;
    bed.svid("orders").await;
    bed.stop().await;
    spoil(&bed);
    let before = listing(&bed);
    let error = bed.start().await.err();
    let error = error
        .unwrap_or_else(|| panic!("{name}: it started"))
        .to_string();
    for words in expected {
        assert!(
            error.contains(words),
            "{name}: {words:?} is not in {error:?}"
        );
    }
    assert_eq!(listing(&bed), before, "{name}: nothing was made or changed");
}

fn listing(bed: &Bed) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(&bed.config.state_dir).unwrap();
    let mut files: Vec<_> = entries
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.display().to_string(), fs::read(&path).unwrap()))
        .collect();
    files.sort();
    files
}

fn remove(bed: &Bed, name: &str) {
    fs::remove_file(bed.file(name)).unwrap();
}

#[tokio::test]
async fn a_missing_piece_is_never_made_again() {
    let backup = "restore it from a backup";
    check(
        "root.key",
        |bed| remove(bed, "root.key"),
        &["root.key", "missing", backup],
    )
    .await;
    check(
        "root.pem",
        |bed| remove(bed, "root.pem"),
        &["root.pem", "missing", backup],
    )
    .await;
    check(
        "ledger",
        |bed| remove(bed, "ledger"),
        &["ledger", "missing", backup],
    )
    .await;
    let only_ledger = |bed: &Bed| {
        for name in [
            "root.key",
            "root.pem",
            "intermediate.key",
            "intermediate.pem",
        ] {
            remove(bed, name);
        }
    };
    check(
        "a ledger alone",
        only_ledger,
        &["root.pem", "missing", backup],
    )
    .await;
    let only_intermediate = |bed: &Bed| {
        for name in ["root.key", "root.pem", "ledger"] {
            remove(bed, name);
        }
    };
    check(
        "an intermediate alone",
        only_intermediate,
        &["root.pem", "missing"],
    )
    .await;
    let half = |bed: &Bed| remove(bed, "intermediate.key");
    check(
        "half an intermediate",
        half,
        &["intermediate.key", "remove intermediate.pem"],
    )
    .await;
}

#[tokio::test]
async fn a_key_that_does_not_match_is_refused() {
    let other = |bed: &Bed, name: &str| {
        let key = KeyPair::generate().unwrap().serialize_pem();
        fs::write(bed.file(name), key).unwrap();
    };
    check(
        "root",
        |bed| other(bed, "root.key"),
        &["root.key", "does not match"],
    )
    .await;
    let intermediate = |bed: &Bed| other(bed, "intermediate.key");
    check(
        "intermediate",
        intermediate,
        &["intermediate.pem", "does not match"],
    )
    .await;
    let garbage = |bed: &Bed| fs::write(bed.file("root.key"), "garbage").unwrap();
    check("garbage", garbage, &["root.key", "not a P-256 private key"]).await;
}

#[tokio::test]
async fn modes_and_owners_are_checked() {
    let set = |bed: &Bed, name: &str, mode| {
        let path = bed.file(name);
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    check(
        "folder",
        |bed| set(bed, "", 0o755),
        &["mode 0755", "chmod 700"],
    )
    .await;
    check(
        "key",
        |bed| set(bed, "root.key", 0o644),
        &["root.key", "chmod 600"],
    )
    .await;
    if rustix::process::geteuid().is_root() {
        let give = |bed: &Bed| std::os::unix::fs::chown(bed.file(""), Some(12_345), None).unwrap();
        check(
            "owner",
            give,
            &["belongs to uid 12345", "run the CA as the owner"],
        )
        .await;
    }
}

#[tokio::test]
async fn an_expired_root_is_refused() {
    let late = |bed: &Bed| bed.clock.advance(sidegate_ca::authority::ROOT_LIFETIME);
    check("expired", late, &["root.pem", "expired", "backup"]).await;
}

#[tokio::test]
async fn a_root_that_may_not_sign_or_lives_too_long_is_refused() {
    let replace = |bed: &Bed, ca: bool, years: u64| {
        let key = KeyPair::from_pem(&fs::read_to_string(bed.file("root.key")).unwrap()).unwrap();
        let mut params = CertificateParams::default();
        let now = bed.clock.now();
        params.not_before = (now - Duration::from_mins(1)).into();
        params.not_after = (now + Duration::from_hours(years * 365 * 24)).into();
        params.subject_alt_names = vec![SanType::URI("spiffe://mesh.local".try_into().unwrap())];
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.is_ca = if ca {
            IsCa::Ca(BasicConstraints::Unconstrained)
        } else {
            IsCa::ExplicitNoCa
        };
        let pem = params.self_signed(&key).unwrap().pem();
        fs::write(bed.file("root.pem"), pem).unwrap();
    };
    check(
        "no CA",
        |bed| replace(bed, false, 1),
        &["root.pem", "not a CA"],
    )
    .await;
    check(
        "too long",
        |bed| replace(bed, true, 20),
        &["root.pem", "over-long"],
    )
    .await;
    let other = ["root.pem", "not the root that the ledger was made with"];
    check("another", |bed| replace(bed, true, 1), &other).await;
}

#[tokio::test]
async fn a_ledger_that_was_changed_or_emptied_is_refused_with_its_line() {
    let change = |bed: &Bed| {
        let changed = bed
            .ledger()
            .replacen("ns/shop/sa/orders", "ns/shop/sa/admin2", 1);
        fs::write(bed.file("ledger"), changed).unwrap();
    };
    check(
        "changed",
        change,
        &["ledger:", "changed after it was written", "backup"],
    )
    .await;
    let remove_line = |bed: &Bed| {
        let ledger = bed.ledger();
        let lines: Vec<&str> = ledger.lines().collect();
        let rest = [&lines[..2], &lines[3..]].concat().join("\n") + "\n";
        fs::write(bed.file("ledger"), rest).unwrap();
    };
    check(
        "a line removed",
        remove_line,
        &["ledger:3", "removed, added or moved"],
    )
    .await;
    let empty = |bed: &Bed| fs::write(bed.file("ledger"), "").unwrap();
    check("emptied", empty, &["ledger", "does not begin", "backup"]).await;
}

#[tokio::test]
async fn another_trust_domain_needs_another_folder() {
    let mut bed = Bed::new().await;
    bed.stop().await;
    bed.config.trust_domain = "other.local".parse().unwrap();
    let error = bed.start().await.err().unwrap().to_string();
    assert!(error.contains("trust domain mesh.local's"), "{error}");
}

#[tokio::test]
async fn a_second_ca_on_the_folder_is_refused() {
    let bed = Bed::new().await;
    let second = sidegate_ca::Ca::start(bed.config.clone(), bed.clock()).await;
    let error = second.err().unwrap().to_string();
    assert!(error.contains("another CA process"), "{error}");
    bed.svid("orders").await;
}

#[tokio::test]
async fn a_torn_last_line_is_cut_off_and_said() {
    let mut bed = Bed::new().await;
    let svid = bed.svid("orders").await;
    bed.stop().await;
    let whole = bed.ledger();
    let mut torn = whole.clone();
    torn.push_str("{\"index\":99,\"time\":1,\"ki");
    fs::write(bed.file("ledger"), torn).unwrap();
    bed.start().await.unwrap();
    let repaired = bed.ledger();
    assert!(repaired.starts_with(&whole), "nothing else is lost");
    assert!(repaired[whole.len()..].contains("\"kind\":\"repaired\",\"bytes\":24"));
    bed.renewed(&svid).await;
    bed.restart().await;
}

#[tokio::test]
async fn an_unfinished_first_start_begins_again() {
    let mut bed = Bed::new().await;
    bed.stop().await;
    let root = fs::read(bed.file("root.pem")).unwrap();
    // The marker says that nobody has been shown anything yet.
    fs::write(bed.file("first-start"), "").unwrap();
    remove(&bed, "ledger");
    bed.start().await.unwrap();
    assert_ne!(fs::read(bed.file("root.pem")).unwrap(), root);
    assert!(!bed.file("first-start").exists());
    bed.svid("orders").await;
}

#[tokio::test]
async fn an_interrupted_intermediate_is_put_in_place() {
    let mut bed = Bed::new().await;
    bed.stop().await;
    let certificate = fs::read(bed.file("intermediate.pem")).unwrap();
    let key = fs::read(bed.file("intermediate.key")).unwrap();
    let other = KeyPair::generate().unwrap().serialize_pem();
    fs::write(
        bed.file("intermediate.new"),
        [certificate.clone(), key.clone()].concat(),
    )
    .unwrap();
    let mode = fs::Permissions::from_mode(0o600);
    fs::set_permissions(bed.file("intermediate.new"), mode).unwrap();
    fs::write(bed.file("intermediate.key"), other).unwrap();
    bed.start().await.unwrap();
    assert_eq!(fs::read(bed.file("intermediate.key")).unwrap(), key);
    assert!(!bed.file("intermediate.new").exists());
    bed.svid("orders").await;
}

#[tokio::test]
async fn root_and_identities_survive_a_restart() {
    let mut bed = Bed::new().await;
    let svid = bed.svid("orders").await;
    let root = fs::read(bed.file("root.pem")).unwrap();
    bed.restart().await;
    assert_eq!(fs::read(bed.file("root.pem")).unwrap(), root);
    let next = bed.renewed(&svid).await;
    assert_eq!(next.id, svid.id);
    assert!(bed.join("sgt_x_y", &Key::new().csr).await.is_err());
}
