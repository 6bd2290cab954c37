//! Renewal and the bundle, with a CA in the same process and a clock that the test moves.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    clippy::too_many_lines,
    missing_docs,
    dead_code,
    unreachable_pub,
    reason = "tests"
)]

#[path = "support/ca.rs"]
mod ca;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use ca::{Authority, LocalIssuer, Mood, bundle_message, id, start, trust_domain};
use sidegate_api::identity as proto;
use sidegate_mesh::clock::{Clock as _, ManualClock};
use sidegate_mesh::spiffe::SpiffeId;
use sidegate_mtls::{
    Acceptor, Connector, CredentialStore, IdentityConfig, RenewalPolicy, StatusSnapshot,
    WorkloadIdentity,
};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const LIFE: Duration = Duration::from_mins(1);
/// Far beyond what any test moves its clock by.
const HANDSHAKE: Duration = Duration::from_hours(24 * 365);

/// One workload's identity, as a sidecar runs it.
struct Workload {
    id: SpiffeId,
    issuer: LocalIssuer,
    store: Arc<CredentialStore>,
    identity: WorkloadIdentity,
    tracker: TaskTracker,
    cancel: CancellationToken,
}

struct World {
    clock: ManualClock,
    root: Arc<Authority>,
    folder: TempDir,
}

impl World {
    fn new() -> Self {
        let world = Self {
            clock: ManualClock::new(start()),
            root: Arc::new(Authority::root("mesh.local")),
            folder: tempfile::tempdir().unwrap(),
        };
        world.write_root(&world.root);
        world
    }

    fn root_file(&self) -> PathBuf {
        self.folder.path().join("root.pem")
    }

    fn write_root(&self, root: &Authority) {
        std::fs::write(self.root_file(), pem_of(&root.der)).unwrap();
    }

    fn config(&self, id: &SpiffeId, state: Option<&str>) -> IdentityConfig {
        IdentityConfig {
            id: id.clone(),
            trust_domain: trust_domain("mesh.local"),
            root_file: self.root_file(),
            state_dir: state.map(|name| self.folder.path().join(name)),
            renewal: RenewalPolicy::default(),
        }
    }

    fn issuer(&self, id: &SpiffeId) -> LocalIssuer {
        LocalIssuer::new(id, &self.root, LIFE, Arc::new(self.clock.clone()))
    }

    fn workload(&self, id: &SpiffeId, state: Option<&str>) -> Workload {
        self.workload_with(self.issuer(id), id, state)
    }

    fn workload_with(&self, issuer: LocalIssuer, id: &SpiffeId, state: Option<&str>) -> Workload {
        let store = ca::empty_store(Arc::new(self.clock.clone()));
        let (tracker, cancel) = (TaskTracker::new(), CancellationToken::new());
        let identity = WorkloadIdentity::start(
            self.config(id, state),
            Arc::new(issuer.clone()),
            Arc::clone(&store),
            &tracker,
            cancel.clone(),
        )
        .unwrap();
        Workload {
            id: id.clone(),
            issuer,
            store,
            identity,
            tracker,
            cancel,
        }
    }

    /// Moves the clock from one planned renewal to the next until `done`. Never while a workload
    /// is at work: its disk and the network do not follow this clock.
    async fn advance_until(&self, what: &str, workloads: &[&Workload], done: impl Fn() -> bool) {
        for _ in 0..30_000 {
            if done() {
                return;
            }
            if !self.advance_to_next(workloads) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        panic!("never: {what}");
    }

    fn advance_to_next(&self, workloads: &[&Workload]) -> bool {
        let due: Option<Vec<SystemTime>> =
            workloads.iter().map(|w| w.status().next_renewal).collect();
        let next = due.and_then(|due| due.into_iter().min());
        let left = next.and_then(|next| next.duration_since(self.clock.now()).ok());
        match left {
            Some(left) if !left.is_zero() => {
                self.clock.advance(left);
                true
            }
            _ => false,
        }
    }
}

impl Workload {
    fn status(&self) -> StatusSnapshot {
        self.identity.status().snapshot()
    }

    fn serial(&self) -> String {
        self.store.current().unwrap().svid().serial.to_string()
    }

    fn key(&self) -> Vec<u8> {
        self.store.current().unwrap().svid().key().pkcs8().to_vec()
    }

    async fn ready(&self) {
        eventually("ready", || self.store.is_ready()).await;
    }

    async fn stop(self) {
        self.cancel.cancel();
        self.tracker.close();
        self.tracker.wait().await;
    }
}

fn pem_of(der: &[u8]) -> String {
    use base64::Engine as _;
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<&str> = body
        .as_bytes()
        .chunks(64)
        .map(|line| std::str::from_utf8(line).unwrap())
        .collect();
    format!(
        "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n",
        lines.join("\n")
    )
}

/// Lets every task that can run, run.
async fn settle() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}

/// Waits, in real time, for something that other threads (of the state folder) take part in.
async fn eventually(what: &str, done: impl Fn() -> bool) {
    for _ in 0..30_000 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("never: {what}");
}

/// One call: connect, ask, be answered.
async fn call(client: &Arc<CredentialStore>, server: &Arc<CredentialStore>, server_id: &SpiffeId) {
    let (near, far) = tokio::io::duplex(16 * 1024);
    let connector = Connector::new(Arc::clone(client), HANDSHAKE, Arc::clone(client.clock()));
    let acceptor = Acceptor::new(Arc::clone(server), HANDSHAKE, Arc::clone(server.clock()));
    let asking = async {
        let (mut stream, peer) = connector.connect(near, server_id).await.unwrap();
        assert_eq!(peer.id, *server_id);
        stream.write_all(b"ping").await.unwrap();
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"pong");
    };
    let answering = async {
        let (mut stream, _peer) = acceptor.accept(far).await.unwrap();
        let mut question = [0; 4];
        stream.read_exact(&mut question).await.unwrap();
        stream.write_all(b"pong").await.unwrap();
        stream.flush().await.unwrap();
        // The client closes first.
        let _end = stream.read(&mut question).await;
    };
    tokio::join!(asking, answering);
}

/// Calls both ways until told to stop; a failed call panics the task.
struct Calls {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

impl Calls {
    fn between(a: &Workload, b: &Workload) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let count = Arc::new(AtomicU64::new(0));
        let (stopping, counting) = (Arc::clone(&stop), Arc::clone(&count));
        let (a, b) = (
            (Arc::clone(&a.store), a.id.clone()),
            (Arc::clone(&b.store), b.id.clone()),
        );
        let task = tokio::task::spawn(async move {
            while !stopping.load(Ordering::Relaxed) {
                call(&a.0, &b.0, &b.1).await;
                call(&b.0, &a.0, &a.1).await;
                counting.fetch_add(2, Ordering::Relaxed);
                tokio::task::yield_now().await;
            }
        });
        Self { stop, count, task }
    }

    fn made(&self) -> u64 {
        assert!(!self.task.is_finished(), "a call failed");
        self.count.load(Ordering::Relaxed)
    }

    async fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.expect("no call failed");
        self.count.load(Ordering::Relaxed)
    }
}

#[tokio::test]
async fn thirty_rotations_under_constant_calls_fail_none() {
    let world = World::new();
    let web = world.workload(&id("shop/web"), None);
    let orders = world.workload(&id("shop/orders"), None);
    web.ready().await;
    orders.ready().await;
    let calls = Calls::between(&web, &orders);
    let enough = || web.status().renewals_ok > 30 && orders.status().renewals_ok > 30;
    let renewals = || web.status().renewals_ok + orders.status().renewals_ok;
    while !enough() {
        let (before, made) = (renewals(), calls.made());
        world
            .advance_until("a rotation", &[&web, &orders], || renewals() > before)
            .await;
        eventually("calls go on", || calls.made() > made + 2).await;
    }
    let count = calls.finish().await;
    assert!(count > 100, "only {count} calls were made");
    for workload in [&web, &orders] {
        let requests = workload.issuer.with(|state| state.requests.clone());
        let keys: HashSet<_> = requests.iter().map(|(key, _)| key).collect();
        assert_eq!(keys.len(), requests.len(), "a key was used twice");
        assert_eq!(workload.status().renewals_failed, 0);
    }
}

#[tokio::test]
async fn a_bundle_change_under_constant_calls_fails_none() {
    let world = World::new();
    let web = world.workload(&id("shop/web"), None);
    let orders = world.workload(&id("shop/orders"), None);
    web.ready().await;
    orders.ready().await;
    let calls = Calls::between(&web, &orders);
    let next = Arc::new(Authority::root("mesh.local"));
    let both = [&web, &orders];

    // 1. Publish: the new root beside the old one.
    let message = bundle_message(2, &[("mesh.local", &[&world.root, &next])]);
    for workload in both {
        workload.issuer.publish(message.clone());
    }
    let acknowledged = |sequence| {
        both.iter().all(|workload| {
            workload.issuer.with(|state| {
                let last = state.acknowledgements.last().unwrap();
                last.sequence == sequence && last.refusal.is_empty()
            })
        })
    };
    eventually("both acknowledged", || acknowledged(2)).await;

    // 2. Activate: leaves come from the new root.
    let intermediate = Arc::new(next.intermediate());
    for workload in both {
        workload
            .issuer
            .with(|state| state.intermediate = Arc::clone(&intermediate));
    }
    let before: Vec<u64> = both.iter().map(|w| w.status().renewals_ok).collect();
    let renewed = || (0..2).all(|i| both[i].status().renewals_ok > before[i]);
    world
        .advance_until("leaves of the new root", &both, renewed)
        .await;

    // 3. Remove: the old root goes.
    let message = bundle_message(3, &[("mesh.local", &[&next])]);
    for workload in both {
        workload.issuer.publish(message.clone());
    }
    eventually("both acknowledged", || acknowledged(3)).await;
    let made = calls.made();
    eventually("calls go on", || calls.made() > made + 10).await;
    calls.finish().await;
    let hashes = web
        .issuer
        .with(|state| state.acknowledgements.last().unwrap().root_sha256.len());
    assert_eq!(hashes, 1);
}

#[tokio::test]
async fn renewal_comes_at_half_of_life_give_or_take_a_tenth() {
    let world = World::new();
    for _ in 0..20 {
        let web = world.workload(&id("shop/web"), None);
        web.ready().await;
        eventually("planned", || web.status().next_renewal.is_some()).await;
        let due = web.status().next_renewal.unwrap();
        let after = due.duration_since(world.clock.now()).unwrap().as_secs_f64();
        assert!((27.0..=33.0).contains(&after), "{after} s of 60 s");
        web.stop().await;
    }
}

#[tokio::test]
async fn a_failed_renewal_keeps_the_old_svid_and_tries_again() {
    let world = World::new();
    let web = world.workload(&id("shop/web"), None);
    web.ready().await;
    let first = web.serial();
    for mood in [Mood::Down, Mood::Impostor, Mood::OtherKey, Mood::Unknown] {
        web.issuer.with(|state| state.mood = mood);
        let failed = web.status().renewals_failed;
        world
            .advance_until("two failures", &[&web], || {
                web.status().renewals_failed > failed + 1
            })
            .await;
        assert_eq!(web.serial(), first, "{mood:?} was published");
        let error = web.status().last_error.unwrap();
        let expected = match mood {
            Mood::Down => "down",
            Mood::Impostor => "not for spiffe://mesh.local/ns/shop/sa/web",
            Mood::OtherKey => "does not match",
            _ => "no path leads to a root",
        };
        assert!(error.contains(expected), "{mood:?}: {error}");
    }
    web.issuer.with(|state| state.mood = Mood::Good);
    world
        .advance_until("renewed", &[&web], || web.status().renewals_ok == 2)
        .await;
    assert_ne!(web.serial(), first);
    assert_eq!(web.status().last_error, None);
}

#[tokio::test]
async fn an_absent_ca_leaves_the_svid_in_use_until_its_last_moment() {
    let world = World::new();
    let web = world.workload(&id("shop/web"), None);
    let orders = world.workload(&id("shop/orders"), None);
    web.ready().await;
    orders.ready().await;
    web.issuer.with(|state| state.mood = Mood::Down);
    orders.issuer.with(|state| state.mood = Mood::Down);
    world.clock.advance(LIFE);
    settle().await;
    assert!(web.store.is_ready(), "ready at the last second");
    call(&web.store, &orders.store, &orders.id).await;
    world.clock.advance(Duration::from_secs(1));
    assert!(!web.store.is_ready(), "not ready a second later");
    let (near, far) = tokio::io::duplex(16 * 1024);
    let connector = Connector::new(
        Arc::clone(&web.store),
        HANDSHAKE,
        Arc::new(world.clock.clone()),
    );
    let acceptor = Acceptor::new(
        Arc::clone(&orders.store),
        HANDSHAKE,
        Arc::new(world.clock.clone()),
    );
    let (connected, accepted) =
        tokio::join!(connector.connect(near, &orders.id), acceptor.accept(far));
    assert_eq!(connected.unwrap_err().code(), "expired");
    assert!(accepted.is_err());
}

#[tokio::test]
async fn a_lost_answer_is_asked_for_again_with_the_same_key_also_after_a_restart() {
    let world = World::new();
    let issuer = world.issuer(&id("shop/web"));
    let web = world.workload_with(issuer.clone(), &id("shop/web"), Some("state"));
    web.ready().await;
    issuer.with(|state| state.mood = Mood::LosesAnswers);
    world
        .advance_until("an answer was lost", &[&web], || {
            web.status().renewals_failed > 0
        })
        .await;
    web.stop().await;
    issuer.with(|state| state.mood = Mood::Good);
    let web = world.workload_with(issuer.clone(), &id("shop/web"), Some("state"));
    world
        .advance_until("renewed", &[&web], || web.status().renewals_ok > 0)
        .await;
    issuer.with(|state| {
        assert!(!state.frozen, "the lineage was forked");
        let renewals: Vec<_> = state.requests.iter().skip(1).collect();
        assert!(renewals.len() >= 2);
        assert!(renewals.iter().all(|(key, _)| *key == renewals[0].0));
    });
    eventually("the pending key is forgotten", || {
        !world.folder.path().join("state/pending-key.pem").exists()
    })
    .await;
}

#[tokio::test]
async fn key_svid_and_bundle_survive_a_restart_without_the_ca() {
    let world = World::new();
    let issuer = world.issuer(&id("shop/web"));
    let web = world.workload_with(issuer.clone(), &id("shop/web"), Some("state"));
    web.ready().await;
    let next = Arc::new(Authority::root("mesh.local"));
    issuer.publish(bundle_message(7, &[("mesh.local", &[&world.root, &next])]));
    eventually("bundle 7", || web.status().bundle_sequence == 7).await;
    let (serial, key) = (web.serial(), web.key());
    let files = ["state/svid.pem"];
    for file in files {
        let path = world.folder.path().join(file);
        eventually("written", || path.exists()).await;
    }
    eventually("bundle written", || bundles_in(&world) == 1).await;
    web.stop().await;

    issuer.with(|state| state.mood = Mood::Down);
    let silent = LocalIssuer::new(
        &id("shop/web"),
        &world.root,
        LIFE,
        Arc::new(world.clock.clone()),
    );
    silent.with(|state| state.mood = Mood::Down);
    let web = world.workload_with(silent, &id("shop/web"), Some("state"));
    assert!(web.store.is_ready(), "ready at once");
    assert_eq!((web.serial(), web.key()), (serial, key));
    let current = web.store.current().unwrap();
    assert_eq!(current.trust().bundles.sequence(), 7);
    assert_eq!(
        current.trust().bundles.roots("mesh.local").unwrap().len(),
        2
    );
}

fn bundles_in(world: &World) -> usize {
    let entries = std::fs::read_dir(world.folder.path().join("state")).unwrap();
    entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("bundle-"))
        .count()
}

#[tokio::test]
async fn a_replaced_bootstrap_file_wins_over_the_kept_bundle() {
    let world = World::new();
    let web = world.workload(&id("shop/web"), Some("state"));
    web.ready().await;
    web.issuer
        .publish(bundle_message(9, &[("mesh.local", &[&world.root])]));
    eventually("bundle written", || bundles_in(&world) == 1).await;
    eventually("bundle 9", || web.status().bundle_sequence == 9).await;
    web.stop().await;

    let rebuilt = World {
        root: Arc::new(Authority::root("mesh.local")),
        clock: world.clock.clone(),
        folder: world.folder,
    };
    rebuilt.write_root(&rebuilt.root);
    let web = rebuilt.workload(&id("shop/web"), Some("state"));
    // The kept SVID does not follow from the new root, so a new one is asked for.
    eventually("a new svid", || web.status().renewals_ok == 1).await;
    web.issuer
        .with(|state| assert_eq!(state.requests[0].1, None));
}

#[tokio::test]
async fn only_a_rising_sequence_with_our_own_trust_domain_is_applied() {
    let world = World::new();
    let web = world.workload(&id("shop/web"), None);
    web.ready().await;
    eventually("bundle 1", || web.status().bundle_sequence == 1).await;
    web.issuer
        .publish(bundle_message(5, &[("mesh.local", &[&world.root])]));
    eventually("bundle 5", || web.status().bundle_sequence == 5).await;

    let stranger = Arc::new(Authority::root("mesh.local"));
    web.issuer
        .publish(bundle_message(4, &[("mesh.local", &[&stranger])]));
    eventually("the old one is acknowledged again", || {
        web.issuer.with(|state| state.acknowledgements.len() >= 4)
    })
    .await;
    let roots = |web: &Workload| {
        let current = web.store.current().unwrap();
        current.trust().bundles.roots("mesh.local").unwrap()[0]
            .der()
            .clone()
    };
    assert_eq!(roots(&web), world.root.der);
    assert_eq!(web.status().bundles_refused, 0);

    let partner = Arc::new(Authority::root("partner.example"));
    let refused: [(proto::WatchBundleResponse, &str); 4] = [
        (
            bundle_message(6, &[("partner.example", &[&partner])]),
            "own trust domain",
        ),
        (
            bundle_message(7, &[("mesh.local", &[])]),
            "own trust domain",
        ),
        (
            bundle_message(8, &[("mesh.local", &[&partner])]),
            "not usable",
        ),
        (
            proto::WatchBundleResponse {
                revocations: Some(proto::Revocations {
                    spiffe_ids: vec!["nonsense".into()],
                    serials: vec![],
                }),
                ..bundle_message(9, &[("mesh.local", &[&world.root])])
            },
            "revocation",
        ),
    ];
    for (count, (message, why)) in refused.into_iter().enumerate() {
        web.issuer.publish(message);
        let count = u64::try_from(count).unwrap() + 1;
        eventually(why, || {
            let last =
                |state: &mut ca::IssuerState| state.acknowledgements.last().cloned().unwrap();
            let last = web.issuer.with(last);
            web.status().bundles_refused == count && last.refusal.contains(why)
        })
        .await;
        assert_eq!(web.status().bundle_sequence, 5);
        assert_eq!(roots(&web), world.root.der);
        assert_eq!(
            web.issuer
                .with(|state| state.acknowledgements.last().unwrap().sequence),
            5
        );
    }
}

#[tokio::test]
async fn each_renewal_reports_the_issuer_of_the_leaf() {
    let world = World::new();
    let web = world.workload(&id("shop/web"), None);
    web.ready().await;
    let expected = web.store.current().unwrap().svid().authority_key_id.clone();
    assert!(!expected.is_empty());
    eventually("reported", || {
        web.issuer
            .with(|state| state.acknowledgements.last().unwrap().leaf_issuer_key_id == expected)
    })
    .await;
    let next = Arc::new(world.root.intermediate());
    web.issuer.with(|state| state.intermediate = next);
    world
        .advance_until("renewed", &[&web], || web.status().renewals_ok == 2)
        .await;
    let renewed = web.store.current().unwrap().svid().authority_key_id.clone();
    assert_ne!(renewed, expected);
    eventually("reported", || {
        web.issuer
            .with(|state| state.acknowledgements.last().unwrap().leaf_issuer_key_id == renewed)
    })
    .await;
}

#[tokio::test]
async fn revocation_and_a_removed_root_reach_live_connections() {
    let world = World::new();
    let web = world.workload(&id("shop/web"), None);
    let orders = world.workload(&id("shop/orders"), None);
    web.ready().await;
    orders.ready().await;
    eventually("bundle 1", || orders.status().bundle_sequence == 1).await;
    let peer = peer_seen_by(&orders, &web).await;
    let mut epochs = orders.store.subscribe();
    epochs.mark_unchanged();
    assert_eq!(orders.store.current().unwrap().still_trusts(&peer), Ok(()));

    let mut message = bundle_message(2, &[("mesh.local", &[&world.root])]);
    message.revocations = Some(proto::Revocations {
        spiffe_ids: vec![web.id.to_string()],
        serials: vec![],
    });
    orders.issuer.publish(message);
    epochs.changed().await.unwrap();
    let refused = orders.store.current().unwrap().still_trusts(&peer);
    assert_eq!(refused.unwrap_err().code(), "revoked");

    let mut message = bundle_message(3, &[("mesh.local", &[&world.root])]);
    message.revocations = Some(proto::Revocations {
        spiffe_ids: vec![],
        serials: vec![peer.serial.as_bytes().to_vec()],
    });
    orders.issuer.publish(message);
    epochs.changed().await.unwrap();
    let refused = orders.store.current().unwrap().still_trusts(&peer);
    assert_eq!(refused.unwrap_err().code(), "revoked");

    let next = Arc::new(Authority::root("mesh.local"));
    orders.issuer.with(|state| {
        state.root = Arc::clone(&next);
        state.intermediate = Arc::new(next.intermediate());
        // Without an SVID that anybody believes, this asks as for the first time.
        state.lineage.clear();
    });
    orders
        .issuer
        .publish(bundle_message(4, &[("mesh.local", &[&next])]));
    epochs.changed().await.unwrap();
    let refused = orders.store.current().unwrap().still_trusts(&peer);
    assert_eq!(refused.unwrap_err().code(), "unknown_issuer");
    // Our own SVID went with the root, so it is renewed at once, without waiting for half of life.
    eventually("renewed at once", || orders.status().renewals_ok == 2).await;
    assert_eq!(orders.store.own_svid_is_trusted(), Ok(()));
}

async fn peer_seen_by(server: &Workload, client: &Workload) -> sidegate_mtls::Peer {
    let (near, far) = tokio::io::duplex(16 * 1024);
    let clock = || Arc::clone(server.store.clock());
    let connector = Connector::new(Arc::clone(&client.store), HANDSHAKE, clock());
    let acceptor = Acceptor::new(Arc::clone(&server.store), HANDSHAKE, clock());
    let (connected, accepted) =
        tokio::join!(connector.connect(near, &server.id), acceptor.accept(far));
    connected.unwrap();
    accepted.unwrap().1
}

#[tokio::test]
async fn a_connection_ends_with_the_earlier_of_its_two_certificates() {
    let world = World::new();
    let web = world.workload(&id("shop/web"), None);
    web.ready().await;
    world.clock.advance(Duration::from_secs(10));
    let orders = world.workload(&id("shop/orders"), None);
    orders.ready().await;
    let end =
        |workload: &Workload| -> SystemTime { workload.store.current().unwrap().svid().not_after };
    assert!(end(&web) < end(&orders));
    assert_eq!(peer_seen_by(&orders, &web).await.not_after, end(&web));
    assert_eq!(peer_seen_by(&web, &orders).await.not_after, end(&web));
}

#[tokio::test]
async fn a_wrong_mode_of_the_state_folder_is_refused_and_a_new_one_is_private() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let world = World::new();
    let path = world.folder.path().join("state");
    std::fs::create_dir(&path).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o750)).unwrap();
    let start = |state: &str| {
        WorkloadIdentity::start(
            world.config(&id("shop/web"), Some(state)),
            Arc::new(world.issuer(&id("shop/web"))),
            ca::empty_store(Arc::new(world.clock.clone())),
            &TaskTracker::new(),
            CancellationToken::new(),
        )
    };
    let error = start("state").unwrap_err().to_string();
    assert!(
        error.contains("mode 0750") && error.contains("chmod 700"),
        "{error}"
    );

    let web = world.workload(&id("shop/web"), Some("new"));
    let mode = |name: &str| {
        let metadata = std::fs::metadata(world.folder.path().join(name)).unwrap();
        metadata.mode() & 0o777
    };
    assert_eq!(mode("new"), 0o700);
    eventually("written", || {
        world.folder.path().join("new/svid.pem").exists()
    })
    .await;
    assert_eq!(mode("new/svid.pem"), 0o600);
    let error = start("new").unwrap_err().to_string();
    assert!(error.contains("in use by another process"), "{error}");
    web.stop().await;
}

#[tokio::test]
async fn an_expired_svid_on_disk_is_not_shown_and_asks_with_other_evidence() {
    let world = World::new();
    let issuer = world.issuer(&id("shop/web"));
    let web = world.workload_with(issuer.clone(), &id("shop/web"), Some("state"));
    web.ready().await;
    let path = world.folder.path().join("state/svid.pem");
    eventually("written", || path.exists()).await;
    web.stop().await;
    world.clock.advance(LIFE + Duration::from_secs(1));
    issuer.with(|state| state.requests.clear());
    let web = world.workload_with(issuer.clone(), &id("shop/web"), Some("state"));
    eventually("asked", || issuer.with(|state| !state.requests.is_empty())).await;
    issuer.with(|state| assert_eq!(state.requests[0].1, None));
    web.stop().await;
}

#[tokio::test]
async fn no_key_or_token_shows_in_debug_output() {
    let world = World::new();
    let web = world.workload(&id("shop/web"), None);
    web.ready().await;
    let current = web.store.current().unwrap();
    let svid = current.svid();
    let text = format!(
        "{current:?} {svid:?} {:?} {:?} {:?}",
        svid.key(),
        web.store,
        sidegate_mtls::Evidence::JoinToken(sidegate_mtls::JoinToken::new("sgt_1_secret")),
    );
    assert!(!text.contains("secret"), "{text}");
    let pem = svid.to_pem();
    let body = pem.lines().nth(1).unwrap();
    assert!(!text.contains(body), "{text}");
    let bytes = format!("{:?}", &svid.key().pkcs8()[40..48]);
    assert!(!text.contains(bytes.trim_matches(['[', ']'])), "{text}");
}
