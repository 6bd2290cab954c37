//! The shop in its mesh, in one process: what the demo promises, and what must not break it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sidegate_examples::calls::{self, Outcome};
use sidegate_examples::client;
use sidegate_examples::mesh::Shop;
use sidegate_examples::shop::orders;
use sidegate_local::{LocalMesh, Member, SystemClock};

const ANYWHERE: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// Longest wait for something that takes under a second on an idle machine.
const PATIENCE: Duration = Duration::from_secs(30);

async fn open() -> (tempfile::TempDir, Shop) {
    let dir = tempfile::tempdir().unwrap();
    let shop = Shop::open(dir.path(), Arc::new(SystemClock)).await.unwrap();
    (dir, shop)
}

async fn status(outbound: SocketAddr, path: &str) -> u16 {
    let answer = client::get(outbound, "orders.shop", path, &[])
        .await
        .unwrap();
    answer.status.as_u16()
}

/// Calls until the answer has this status; returns how long that took.
async fn until_status(outbound: SocketAddr, path: &str, wanted: u16) -> Duration {
    let started = Instant::now();
    while status(outbound, path).await != wanted {
        assert!(
            started.elapsed() < PATIENCE,
            "{path} is not answered {wanted}"
        );
        tokio::task::yield_now().await;
    }
    started.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_of_the_demo_ends_as_it_should_and_is_on_record() {
    let (_dir, shop) = open().await;
    let outcomes = calls::make_all(&shop).await.unwrap();
    let wrong: Vec<&Outcome> = outcomes
        .iter()
        .filter(|outcome| !outcome.is_expected())
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(outcomes.len() >= 16, "{}", outcomes.len());

    shop.flush_logs().await;
    let log = std::fs::read_to_string(&shop.sidecar("shop/orders").unwrap().log).unwrap();
    let records: Vec<serde_json::Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let denied = records
        .iter()
        .find(|record| record["decision"] == "deny")
        .unwrap();
    assert_eq!(denied["source"], "spiffe://mesh.local/ns/jobs/sa/batch");
    assert_eq!(denied["reason"], "no rule admits");
    assert!(denied["decision_id"].is_string());
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_edited_on_disk_takes_effect_and_a_broken_one_changes_nothing() {
    let (_dir, shop) = open().await;
    let batch = shop
        .sidecar("jobs/batch")
        .unwrap()
        .sidecar
        .addresses()
        .outbound;
    let orders = shop.sidecar("shop/orders").unwrap();
    assert_eq!(status(batch, "/orders/7").await, 403);

    let policy = "apiVersion: sidegate.dev/v1alpha1
kind: AuthorizationPolicy
metadata: { name: batch, namespace: shop }
spec:
  selector: { matchLabels: { app: orders } }
  action: Allow
  rules:
    - name: batch
      from: [{ workload: { serviceAccount: batch, namespace: jobs } }]
      to: [{ http: { methods: [GET], paths: [\"/orders/*\"] } }]
";
    shop.mesh().write_resource("batch.yaml", policy).unwrap();
    until_status(batch, "/orders/7", 200).await;

    shop.mesh()
        .write_resource("batch.yaml", &policy.replace("methods", "method"))
        .unwrap();
    let admin = orders.sidecar.addresses().admin;
    let started = Instant::now();
    loop {
        let answer = client::get(admin, &admin.to_string(), "/snapshot", &[])
            .await
            .unwrap();
        let snapshot = String::from_utf8_lossy(&answer.body);
        if snapshot.contains("batch.yaml") && snapshot.contains("unknown field `method`") {
            break;
        }
        assert!(
            started.elapsed() < PATIENCE,
            "the broken policy is not reported"
        );
        tokio::task::yield_now().await;
    }
    assert_eq!(
        status(batch, "/orders/7").await,
        200,
        "the last good version stays"
    );

    std::fs::remove_file(shop.mesh().resources_dir().join("batch.yaml")).unwrap();
    until_status(batch, "/orders/7", 403).await;
    shop.close().await;
}

/// A mesh in which `orders` has two endpoints, and the outbound address of `web`.
async fn two_endpoints(dir: &Path) -> (LocalMesh, SocketAddr) {
    let trust_domain = "mesh.local".parse().unwrap();
    let mut mesh = LocalMesh::start(dir, trust_domain, Arc::new(SystemClock))
        .await
        .unwrap();
    let mut endpoints = String::new();
    for i in 0..2 {
        let application = orders::serve(ANYWHERE).await.unwrap();
        let member = Member::new("shop", "orders").port("http", 80, application.address);
        let mut config = mesh.sidecar_config(&member).await.unwrap();
        config.state = Some(dir.join(format!("state/orders-{i}")));
        config.log.path = Some(dir.join(format!("logs/orders-{i}.log")));
        let inbound = mesh.add(config).unwrap().sidecar.addresses().inbound;
        endpoints += "    - { identity: { workload: { serviceAccount: orders } }, address: \"";
        endpoints += &inbound.to_string();
        endpoints += "\" }\n";
    }
    let config = mesh
        .sidecar_config(&Member::new("shop", "web"))
        .await
        .unwrap();
    let web = mesh.add(config).unwrap().sidecar.addresses().outbound;
    let orders = include_str!("../resources/shop/orders.yaml");
    let service = "apiVersion: sidegate.dev/v1alpha1
kind: StaticService
metadata: { name: orders, namespace: shop }
spec:
  ports: [{ name: http, port: 80, protocol: auto }]
  endpoints:
";
    let resources = format!("{orders}---\n{service}{endpoints}");
    mesh.write_resource("orders.yaml", &resources).unwrap();
    mesh.until(|_, snapshot| !snapshot.routes.all().is_empty())
        .await
        .unwrap();
    until_status(web, "/orders/7", 200).await;
    (mesh, web)
}

#[tokio::test(flavor = "multi_thread")]
async fn losing_an_endpoint_fails_no_idempotent_call() {
    let dir = tempfile::tempdir().unwrap();
    let (mesh, web) = two_endpoints(dir.path()).await;
    let (stop, served) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU64::new(0)),
    );
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let (stop, served) = (Arc::clone(&stop), Arc::clone(&served));
        callers.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(status(web, "/orders/7").await, 200);
                served.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let reached = async |count: u64| {
        let started = Instant::now();
        while served.load(Ordering::Relaxed) < count {
            assert!(started.elapsed() < PATIENCE, "calls have stopped");
            tokio::task::yield_now().await;
        }
    };
    reached(200).await;
    mesh.sidecars()[0].sidecar.crash().await;
    let at_crash = served.load(Ordering::Relaxed);
    reached(at_crash + 400).await;
    stop.store(true, Ordering::Relaxed);
    callers.join_all().await;
    mesh.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mesh_that_is_left_alone_goes_on() {
    let (_dir, shop) = open().await;
    let web = shop.sidecar("shop/web").unwrap();
    let outbound = web.sidecar.addresses().outbound;
    let started = Instant::now();
    // Longer than every interval at which a sidecar looks after itself.
    while started.elapsed() < Duration::from_secs(4) {
        let failure = tokio::time::timeout(Duration::from_millis(100), web.sidecar.failed()).await;
        assert!(failure.is_err(), "{failure:?}");
        assert_eq!(status(outbound, "/orders/7").await, 200);
    }
    shop.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ambiguous_request_is_answered_and_its_connection_closed() {
    let (_dir, shop) = open().await;
    let web = shop
        .sidecar("shop/web")
        .unwrap()
        .sidecar
        .addresses()
        .outbound;
    let answer = client::get(web, "orders.shop", "/orders%2f7", &[])
        .await
        .unwrap();
    assert_eq!(answer.status, 400);
    assert_eq!(answer.headers["sidegate-error"], "bad_request");
    assert_eq!(answer.headers["connection"], "close");
    let answer = client::get(web, "orders.shop", "/orders/7", &[])
        .await
        .unwrap();
    assert!(
        !answer.headers.contains_key("connection"),
        "{:?}",
        answer.headers
    );
    shop.close().await;
}
