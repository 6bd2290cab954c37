//! A sidecar's control side: start, readiness, administration, metrics, resources, drain.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::clone_on_ref_ptr,
    clippy::too_many_lines,
    clippy::indexing_slicing,
    missing_docs,
    dead_code,
    unreachable_pub,
    reason = "tests"
)]

#[path = "support/mesh.rs"]
mod mesh;

use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh::{Mesh, exchange, get, until};
use sidegate_mtls::SystemClock;
use sidegate_proxy::sidecar::{Failure, Sidecar, StartError};
use tokio::net::TcpStream;

const POLICY: &str = "\
apiVersion: sidegate.dev/v1alpha1
kind: AuthorizationPolicy
metadata: { name: orders, namespace: shop }
spec:
  selector: { matchLabels: { app: orders } }
  action: Allow
  rules:
    - name: readers
      from: [{ workload: { serviceAccount: web } }]
      to: [{ http: { methods: [GET], paths: [\"/orders/*\"] } }]
";

const SERVICE: &str = "\
apiVersion: sidegate.dev/v1alpha1
kind: StaticService
metadata: { name: orders, namespace: shop }
spec:
  ports: [{ name: http, port: 80, protocol: auto }]
  endpoints:
    - { address: \"127.0.0.1:21006\", identity: { workload: { serviceAccount: orders } } }
";

const PORTS: &str = "ports: [{ name: http, port: 80, address: '127.0.0.1:1' }]";

fn started(mesh: &Mesh) -> Sidecar {
    mesh.start(mesh.config("shop", "orders", PORTS)).unwrap()
}

async fn ready(mesh: &Mesh) -> Sidecar {
    mesh.resource("orders.yaml", POLICY);
    let sidecar = started(mesh);
    sidecar.ready().await.unwrap();
    sidecar
}

#[tokio::test]
async fn it_is_ready_only_with_an_svid_a_bundle_and_a_complete_snapshot() {
    let mesh = Mesh::new();
    std::fs::remove_dir(mesh.resources()).unwrap();
    let config = mesh.config("shop", "orders", PORTS);
    let issuer = mesh.issuer(&config);
    issuer.set_up(false);
    let sidecar =
        Sidecar::start_with_issuer(config, Arc::new(SystemClock), issuer.clone()).unwrap();
    let health = sidecar.addresses().health;
    let answer = get(health, "/readyz").await;
    assert_eq!(answer.status, 503, "{answer:?}");
    for missing in ["SVID", "bundle", "snapshot"] {
        assert!(answer.body.contains(missing), "{missing}: {answer:?}");
    }
    assert_eq!(get(health, "/livez").await.status, 200);
    issuer.set_up(true);
    let only_snapshot = "not ready: no complete snapshot of the resources yet\n";
    let answer = until(health, "/readyz", |answer| answer.body == only_snapshot).await;
    assert_eq!(answer.status, 503);
    std::fs::create_dir(mesh.resources()).unwrap();
    mesh.resource("orders.yaml", POLICY);
    sidecar.ready().await.unwrap();
    assert_eq!(get(health, "/readyz").await.status, 200);
}

#[tokio::test]
async fn an_ended_svid_without_another_makes_it_not_ready() {
    let mesh = Mesh::new();
    mesh.resource("orders.yaml", POLICY);
    let config = mesh.config("shop", "orders", PORTS);
    let issuer = mesh.issuer(&config);
    issuer.set_life(Duration::from_secs(3));
    let sidecar =
        Sidecar::start_with_issuer(config, Arc::new(SystemClock), issuer.clone()).unwrap();
    sidecar.ready().await.unwrap();
    issuer.set_up(false);
    let health = sidecar.addresses().health;
    let answer = until(health, "/readyz", |answer| answer.status == 503).await;
    assert!(answer.body.contains("the SVID has expired"), "{answer:?}");
    issuer.set_life(Duration::from_hours(1));
    issuer.set_up(true);
    until(health, "/readyz", |answer| answer.status == 200).await;
}

#[tokio::test]
async fn a_port_that_is_taken_is_named_with_its_key() {
    let mesh = Mesh::new();
    let first = started(&mesh);
    let taken = first.addresses().inbound;
    let mut config = mesh.config("shop", "orders", PORTS);
    config.inbound.address = taken;
    let error = mesh.start(config).unwrap_err();
    assert!(matches!(error, StartError::Bind(_)), "{error:?}");
    let text = format!("{error}: {:?}", std::error::Error::source(&error));
    assert!(text.contains(&taken.to_string()), "{text}");
    assert!(text.contains("inbound.address"), "{text}");
    let chain = format!("{:#}", anyhow::Error::new(error));
    assert!(chain.contains("in use"), "{chain}");
}

#[tokio::test]
async fn several_workers_share_a_port_that_nobody_else_can_join() {
    let mesh = Mesh::new();
    let several = format!("{PORTS}\nworkers: 3");
    let first = mesh.start(mesh.config("shop", "orders", &several)).unwrap();
    let mut config = mesh.config("shop", "orders", &several);
    config.outbound.address = first.addresses().outbound;
    let error = mesh.start(config).unwrap_err();
    assert!(error.to_string().contains("outbound.address"), "{error}");
}

#[tokio::test]
async fn a_missing_root_is_an_error_at_once() {
    let mesh = Mesh::new();
    let mut config = mesh.config("shop", "orders", PORTS);
    config.ca.root = mesh.path().join("nowhere.pem");
    let error = mesh.start(config).unwrap_err();
    assert!(format!("{:#}", anyhow::Error::new(error)).contains("nowhere.pem"));
}

#[tokio::test]
async fn several_sidecars_run_in_one_process() {
    let mesh = Mesh::new();
    mesh.resource("orders.yaml", POLICY);
    let orders = started(&mesh);
    let web = mesh.start(mesh.config("shop", "web", "")).unwrap();
    orders.ready().await.unwrap();
    web.ready().await.unwrap();
    let certs = get(web.addresses().admin, "/certs").await.json();
    assert_eq!(
        certs["certificate"]["id"],
        "spiffe://mesh.local/ns/shop/sa/web"
    );
    orders.crash().await;
    assert_eq!(get(web.addresses().health, "/readyz").await.status, 200);
}

#[tokio::test]
async fn administration_shows_what_is_and_no_secret() {
    let mesh = Mesh::new();
    mesh.resource("service.yaml", SERVICE);
    let sidecar = ready(&mesh).await;
    let admin = sidecar.addresses().admin;
    let index = get(admin, "/").await;
    assert_eq!(index.status, 200);
    assert!(
        index
            .head
            .to_lowercase()
            .contains("content-type: application/json"),
        "{index:?}"
    );
    for page in index.json().as_object().unwrap().keys() {
        let answer = get(admin, page).await;
        assert_eq!(answer.status, 200, "{page}: {answer:?}");
        answer.json();
        for secret in ["secret-of-orders", "PRIVATE KEY"] {
            assert!(
                !answer.body.contains(secret),
                "{page} shows {secret}: {answer:?}"
            );
        }
    }
    let config = get(admin, "/config").await.json();
    assert_eq!(config["config"]["ca"]["joinToken"], "[redacted]");
    assert_eq!(config["listening"]["admin"], admin.to_string());
    let snapshot = get(admin, "/snapshot").await.json();
    assert_eq!(
        snapshot["resources"]["AuthorizationPolicy"][0],
        "shop/orders"
    );
    assert_eq!(
        snapshot["policies"][0]["spec"]["rules"][0]["name"],
        "readers"
    );
    assert_eq!(snapshot["routes"][0]["service"], "orders.shop:80");
    assert_eq!(
        snapshot["routes"][0]["endpoints"][0]["address"],
        "127.0.0.1:21006"
    );
    let certs = get(admin, "/certs").await.json();
    assert_eq!(
        certs["certificate"]["id"],
        "spiffe://mesh.local/ns/shop/sa/orders"
    );
    assert_eq!(
        certs["bundle"]["roots"]["mesh.local"][0]["sha256"]
            .as_str()
            .unwrap()
            .len(),
        64
    );
    assert!(certs["renewals"]["ok"].as_u64().unwrap() >= 1, "{certs}");
    assert_eq!(get(admin, "/nothing").await.status, 404);
}

#[tokio::test]
async fn administration_refuses_pages_strangers_and_writing() {
    let mesh = Mesh::new();
    let sidecar = started(&mesh);
    let admin = sidecar.addresses().admin;
    let port = admin.port();
    for (head, status) in [
        (
            format!("GET /config HTTP/1.1\r\nhost: localhost:{port}\r\n"),
            200,
        ),
        (
            format!("GET /config HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n"),
            200,
        ),
        (
            format!("GET /config HTTP/1.1\r\nhost: [::1]:{port}\r\n"),
            200,
        ),
        (
            format!("GET http://{admin}/config HTTP/1.1\r\nhost: {admin}\r\n"),
            200,
        ),
        (
            format!("GET /config HTTP/1.1\r\nhost: evil.example:{port}\r\n"),
            403,
        ),
        (
            "GET /config HTTP/1.1\r\nhost: localhost\r\n".to_owned(),
            403,
        ),
        (
            format!("GET /config HTTP/1.1\r\nhost: u@localhost:{port}\r\n"),
            403,
        ),
        (
            format!("GET /config HTTP/1.1\r\nhost: {admin}\r\nhost: {admin}\r\n"),
            403,
        ),
        ("GET /config HTTP/1.0\r\n".to_owned(), 403),
        (
            format!("GET http://evil.example/ HTTP/1.1\r\nhost: {admin}\r\n"),
            403,
        ),
        (
            format!("GET /config HTTP/1.1\r\nhost: {admin}\r\norigin: http://{admin}\r\n"),
            403,
        ),
        (
            format!("GET /config HTTP/1.1\r\nhost: {admin}\r\norigin: null\r\n"),
            403,
        ),
        (
            format!("POST /config HTTP/1.1\r\nhost: {admin}\r\ncontent-length: 0\r\n"),
            405,
        ),
        (format!("DELETE /config HTTP/1.1\r\nhost: {admin}\r\n"), 405),
    ] {
        let answer = exchange(admin, &format!("{head}connection: close\r\n\r\n")).await;
        assert_eq!(answer.status, status, "{head}{answer:?}");
        assert_eq!(
            answer.body.contains("config"),
            status == 200,
            "{head}{answer:?}"
        );
    }
}

#[tokio::test]
async fn metrics_are_text_that_promtool_accepts() {
    let mesh = Mesh::new();
    let sidecar = ready(&mesh).await;
    let has_end = "sidegate_certificate_not_after_timestamp_seconds";
    let answer = until(sidecar.addresses().health, "/metrics", |answer| {
        answer.body.contains(has_end) && answer.body.contains("renewals_total{result=\"ok\"} 1")
    })
    .await;
    assert!(
        answer.head.contains("text/plain; version=0.0.4"),
        "{answer:?}"
    );
    assert!(
        answer.body.contains("sidegate_snapshot_number 1\n"),
        "{answer:?}"
    );
    let promtool = std::process::Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn();
    let Ok(mut promtool) = promtool else {
        eprintln!("SKIPPED: promtool does not run here; apt-get install prometheus");
        return;
    };
    let mut input = promtool.stdin.take().unwrap();
    std::io::Write::write_all(&mut input, answer.body.as_bytes()).unwrap();
    drop(input);
    let output = promtool.wait_with_output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && words.is_empty(),
        "{words}\n{}",
        answer.body
    );
}

#[tokio::test]
async fn a_limit_bites_and_is_counted() {
    let mesh = Mesh::new();
    let few = format!("{PORTS}\nlimits: {{ adminConnectionsMax: 1 }}");
    let sidecar = mesh.start(mesh.config("shop", "orders", &few)).unwrap();
    let admin = sidecar.addresses().admin;
    let held = TcpStream::connect(admin).await.unwrap();
    let health = sidecar.addresses().health;
    let limit = &sidecar.shared().limits.admin_connections;
    let begin = Instant::now();
    while limit.in_use() == 0 {
        assert!(begin.elapsed() < Duration::from_mins(1));
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let mut refused = TcpStream::connect(admin).await.unwrap();
    let mut end = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(&mut refused, &mut end)
        .await
        .unwrap();
    assert!(end.is_empty(), "closed without a word");
    let counted = "sidegate_limit_refusals_total{limit=\"admin_connections\"} 1\n";
    let metrics = get(health, "/metrics").await;
    assert!(metrics.body.contains(counted), "{metrics:?}");
    drop(held);
    while limit.in_use() > 0 {
        assert!(begin.elapsed() < Duration::from_mins(1));
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(get(admin, "/").await.status, 200);
}

#[tokio::test]
async fn a_saved_policy_is_live_within_a_second() {
    let mesh = Mesh::new();
    let sidecar = ready(&mesh).await;
    let mut numbers = sidecar.shared().state.subscribe();
    let before = *numbers.borrow_and_update();
    let saved = Instant::now();
    mesh.resource("orders.yaml", &POLICY.replace("readers", "renamed"));
    numbers.changed().await.unwrap();
    let took = saved.elapsed();
    assert_eq!(*numbers.borrow(), before + 1);
    // The figure is 1 s; a busy machine gets more before this test turns red.
    assert!(took < Duration::from_secs(3), "{took:?}");
    let snapshot = get(sidecar.addresses().admin, "/snapshot").await.json();
    assert_eq!(
        snapshot["policies"][0]["spec"]["rules"][0]["name"],
        "renamed"
    );
}

#[tokio::test]
async fn a_broken_file_keeps_the_last_good_policy_and_is_reported() {
    let mesh = Mesh::new();
    let sidecar = ready(&mesh).await;
    let (admin, health) = (sidecar.addresses().admin, sidecar.addresses().health);
    mesh.resource("orders.yaml", &POLICY.replace("methods", "methodz"));
    let has_problem = |answer: &mesh::Answer| {
        answer.json()["problems"]
            .as_array()
            .is_some_and(|p| !p.is_empty())
    };
    let snapshot = until(admin, "/snapshot", has_problem).await.json();
    let problem = &snapshot["problems"][0];
    assert_eq!(problem["line"], 10, "{snapshot}");
    assert!(
        problem["message"].as_str().unwrap().contains("methodz"),
        "{snapshot}"
    );
    assert_eq!(
        snapshot["policies"][0]["spec"]["rules"][0]["name"], "readers",
        "{snapshot}"
    );
    let metrics = get(health, "/metrics").await.body;
    assert!(
        metrics.contains("sidegate_snapshot_rejections_total 1\n"),
        "{metrics}"
    );
    mesh.resource("orders.yaml", POLICY);
    until(admin, "/snapshot", |answer| !has_problem(answer)).await;
}

#[tokio::test]
async fn a_vanished_folder_is_a_lost_source_and_changes_nothing() {
    let mesh = Mesh::new();
    mesh.resource("orders.yaml", POLICY);
    let hasty = format!("{PORTS}\nlimits: {{ resourcesRereadInterval: 50ms }}");
    let sidecar = mesh.start(mesh.config("shop", "orders", &hasty)).unwrap();
    sidecar.ready().await.unwrap();
    let admin = sidecar.addresses().admin;
    let away = mesh.path().join("away");
    std::fs::rename(mesh.resources(), &away).unwrap();
    let snapshot = until(admin, "/snapshot", |answer| {
        !answer.json()["lost"].is_null()
    })
    .await
    .json();
    assert_eq!(
        snapshot["resources"]["AuthorizationPolicy"][0], "shop/orders",
        "{snapshot}"
    );
    assert_eq!(
        snapshot["policies"][0]["spec"]["rules"][0]["name"], "readers",
        "{snapshot}"
    );
    assert_eq!(get(sidecar.addresses().health, "/readyz").await.status, 200);
    std::fs::rename(&away, mesh.resources()).unwrap();
    until(admin, "/snapshot", |answer| answer.json()["lost"].is_null()).await;
}

#[tokio::test]
async fn a_drain_makes_it_not_ready_at_once_and_ends() {
    let mesh = Mesh::new();
    mesh.resource("orders.yaml", POLICY);
    let mut config = mesh.config("shop", "orders", PORTS);
    config.drain_grace = Duration::from_millis(500);
    let sidecar = Arc::new(mesh.start(config).unwrap());
    sidecar.ready().await.unwrap();
    let health = sidecar.addresses().health;
    let drained = {
        let sidecar = Arc::clone(&sidecar);
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(async move { sidecar.drain().await });
        tasks
    };
    sidecar.shared().drain.draining().await;
    let answer = get(health, "/readyz").await;
    assert_eq!(
        (answer.status, answer.body.as_str()),
        (503, "not ready: draining\n")
    );
    assert_eq!(sidecar.ready().await, Err(Failure::Draining));
    assert_eq!(drained.join_all().await, [true]);
    for address in [
        health,
        sidecar.addresses().inbound,
        sidecar.addresses().outbound,
    ] {
        let refused = TcpStream::connect(address).await;
        assert!(refused.is_err(), "{address} is still open");
    }
}

#[tokio::test]
async fn a_thread_that_panics_is_the_failure_of_the_sidecar() {
    let mesh = Mesh::new();
    let clock = PanickingClock::default();
    let config = mesh.config("shop", "orders", PORTS);
    let issuer = mesh.issuer(&config);
    let sidecar = Sidecar::start_with_issuer(config, Arc::new(clock.clone()), issuer).unwrap();
    clock.0.store(true, std::sync::atomic::Ordering::SeqCst);
    let failure = sidecar.failed().await;
    clock.0.store(false, std::sync::atomic::Ordering::SeqCst);
    assert!(matches!(failure, Failure::Thread { .. }), "{failure}");
    assert!(sidecar.ready().await.is_err());
    let begin = Instant::now();
    while TcpStream::connect(sidecar.addresses().health).await.is_ok() {
        assert!(
            begin.elapsed() < Duration::from_mins(1),
            "it is still served"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A clock that panics once it is told to.
#[derive(Clone, Default)]
struct PanickingClock(Arc<std::sync::atomic::AtomicBool>);

impl sidegate_mesh::Clock for PanickingClock {
    fn now(&self) -> std::time::SystemTime {
        assert!(
            !self.0.load(std::sync::atomic::Ordering::SeqCst),
            "the clock was told to panic"
        );
        SystemClock.now()
    }

    fn sleep_until(&self, deadline: std::time::SystemTime) -> sidegate_mesh::clock::Sleep {
        SystemClock.sleep_until(deadline)
    }
}

#[tokio::test]
async fn strangers_that_ask_nothing_keep_no_question_away() {
    let mesh = Mesh::new();
    let few = format!("{PORTS}\nlimits: {{ healthConnectionsMax: 2 }}");
    let sidecar = mesh.start(mesh.config("shop", "orders", &few)).unwrap();
    let health = sidecar.addresses().health;
    let mut strangers = Vec::new();
    for _ in 0..5 {
        strangers.push(TcpStream::connect(health).await.unwrap());
    }
    for _ in 0..3 {
        assert_eq!(get(health, "/livez").await.status, 200);
    }
    let mut end = Vec::new();
    let oldest = &mut strangers[0];
    tokio::io::AsyncReadExt::read_to_end(oldest, &mut end)
        .await
        .unwrap();
    assert!(end.is_empty(), "it made room");
    let metrics = get(health, "/metrics").await;
    let counted = "sidegate_limit_refusals_total{limit=\"health_connections\"}";
    assert!(metrics.body.contains(counted), "{metrics:?}");
    assert!(sidecar.shared().limits.health_connections.in_use() <= 2);
}
