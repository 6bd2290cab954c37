//! Kill -9 of the real binary at 200 random points under load.
//!
//! Callers renew without pause, a new key each time, and repeat a request whose answer they lost.
//! Whatever the moment of death: no serial number twice, nothing in a caller's hands that the
//! ledger does not name, nobody locked out, and the chain holds.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use sidegate_mtls::{Evidence, Issue, IssueError, IssueRequest, JoinToken, Svid};
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use crate::binary::{Site, client, workload};
use crate::harness::{Key, PATIENCE};

const KILLS: usize = 200;
const CALLERS: usize = 3;

/// Callers stop when this many kills are not done in time; the machine is too busy then.
const TIME_MAX: Duration = Duration::from_mins(4);

/// Where the CA is; empty while it is dead, `None` at the end.
type Address = watch::Receiver<Option<String>>;

struct Caller {
    number: usize,
    site: Arc<Site>,
    address: Address,
    token: String,
    svids: Vec<Arc<Svid>>,
    /// How many certificates all callers have got.
    got: Arc<watch::Sender<u64>>,
}

impl Caller {
    /// Joins, then renews until the end; every SVID that it was given.
    async fn run(mut self) -> Vec<Arc<Svid>> {
        let mut key = Key::new();
        while let Some(address) = self.next_address().await {
            let current = self.svids.last().cloned();
            let evidence = match current {
                None => Evidence::JoinToken(JoinToken::new(&self.token)),
                Some(_) => Evidence::None,
            };
            let request = IssueRequest {
                csr: key.csr.clone(),
                current,
                verifier: self.site.verifier(),
            };
            match client(&address, evidence).issue(request).await {
                Ok(chain) => {
                    self.svids.push(key.svid(chain, &workload(self.number)));
                    key = Key::new();
                    self.got.send_modify(|got| *got += 1);
                }
                Err(IssueError::Refused { code, message, .. }) if code != "UNAVAILABLE" => {
                    panic!("locked out: {code}: {message}");
                }
                // Died under way: the same request again, as soon as there is a CA.
                Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
        self.svids
    }

    async fn next_address(&mut self) -> Option<String> {
        let ready = |address: &Option<String>| address.as_ref().is_none_or(|a| !a.is_empty());
        let address = self.address.wait_for(ready).await;
        address.ok().and_then(|address| address.clone())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_kills_repeat_no_serial_and_leave_nothing_unrecorded() {
    let unlimited = "limits: { issuancesPerIdentityPerMinute: 4000000000, \
        issuancesPerMinute: 4000000000 }\n";
    let site = Arc::new(Site::new(unlimited));
    let mut ca = site.serve();
    let (sender, address) = watch::channel(Some(ca.address.clone()));
    let tracker = TaskTracker::new();
    let got = Arc::new(watch::Sender::new(0));
    let mut progress = got.subscribe();
    let callers: Vec<_> = (0..CALLERS)
        .map(|number| {
            let name = format!("w{number}");
            let token = site.ask(&["token", "create", "-n", "shop", "-s", &name]);
            let caller = Caller {
                number,
                site: Arc::clone(&site),
                address: address.clone(),
                token: token.trim().to_owned(),
                svids: Vec::new(),
                got: Arc::clone(&got),
            };
            tracker.spawn(caller.run())
        })
        .collect();
    let begun = Instant::now();
    for kill in 0..KILLS {
        assert!(
            begun.elapsed() < TIME_MAX,
            "only {kill} kills in {TIME_MAX:?}"
        );
        let random = rand();
        // Under load: not before somebody has got something from this one.
        let before = *progress.borrow_and_update();
        let issued = progress.wait_for(|got| *got > before);
        tokio::time::timeout(PATIENCE, issued)
            .await
            .unwrap()
            .unwrap();
        tokio::time::sleep(Duration::from_micros(random % 12_000)).await;
        sender.send_replace(Some(String::new()));
        ca.kill();
        // Now and then it dies while it starts, too.
        if random.is_multiple_of(16) {
            let mut starting = site.begin();
            tokio::time::sleep(Duration::from_micros(random % 30_000)).await;
            starting.kill();
        }
        ca = tokio::task::block_in_place(|| site.serve());
        sender.send_replace(Some(ca.address.clone()));
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    sender.send_replace(None);
    let mut handed = Vec::new();
    for caller in callers {
        handed.extend(caller.await.unwrap());
    }
    let interrupted = check(&site, &handed);
    println!(
        "{} certificates, {KILLS} kills, {interrupted} between intent and record, {:?}",
        handed.len(),
        begun.elapsed()
    );
}

/// How many certificates were intended and never issued: kills that hit the narrowest place.
fn check(site: &Site, handed: &[Arc<Svid>]) -> usize {
    let intact: Value =
        serde_json::from_str(&site.ask(&["issued", "--verify", "-o", "json"])).unwrap();
    assert_eq!(intact["intact"], true);
    let issued = site.ask(&["issued", "-o", "json"]);
    let issued: Vec<Value> = serde_json::from_str(&issued).unwrap();
    let mut states = HashMap::new();
    for entry in &issued {
        let serial = entry["serial"].as_str().unwrap().to_owned();
        let again = states.insert(serial, entry["state"].as_str().unwrap());
        assert!(again.is_none(), "a serial number was used twice: {entry}");
    }
    let mut serials = HashSet::new();
    for svid in handed {
        let serial = svid.serial.to_string();
        assert_eq!(states.get(&serial), Some(&"issued"), "unrecorded: {serial}");
        assert!(serials.insert(serial), "handed out twice");
    }
    assert!(handed.len() >= KILLS, "too little load: {}", handed.len());
    states
        .values()
        .filter(|state| **state == "intended")
        .count()
}

/// Random enough to hit every step in two hundred tries; the hasher's keys are random.
fn rand() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    RandomState::new().build_hasher().finish()
}
