//! A sidecar and a controller: what counts when, what is said back, and what stays when the
//! controller goes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::clone_on_ref_ptr,
    clippy::indexing_slicing,
    clippy::too_many_lines,
    missing_docs,
    dead_code,
    unreachable_pub,
    reason = "tests"
)]

#[path = "support/controller.rs"]
mod controller;
#[path = "support/mesh.rs"]
mod mesh;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use controller::{
    FakeController, Session, credentials, meshed, policy, policy_for, reference, resource, traffic,
    workload,
};
use mesh::{Mesh, get, until};
use serde_json::{Value, json};
use sidegate_api::control as proto;
use sidegate_api::control::destination::Kind;
use sidegate_api::control::watch_request::Message;
use sidegate_mtls::{Acceptor, SystemClock};
use sidegate_proxy::destinations::{Destination, DestinationUnknown, Destinations};
use sidegate_proxy::sidecar::Sidecar;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// A sidecar and its controller.
struct Pod {
    mesh: Mesh,
    controller: FakeController,
    sidecar: Sidecar,
}

impl Pod {
    async fn start(more: &str) -> Self {
        let mesh = Mesh::new();
        let controller = FakeController::start(&mesh).await;
        let sidecar = mesh
            .start(mesh.cluster_config(controller.address, more))
            .unwrap();
        Self {
            mesh,
            controller,
            sidecar,
        }
    }

    /// With a session that has said all there is.
    async fn ready(more: &str, resources: Vec<proto::Resource>) -> (Self, Session) {
        let mut pod = Self::start(more).await;
        let mut session = pod.controller.session().await;
        let count = resources.len();
        session.complete(resources).await;
        for _ in 0..count {
            session.acknowledged().await;
        }
        pod.sidecar.ready().await.unwrap();
        (pod, session)
    }

    fn destinations(&self) -> Arc<Destinations> {
        self.sidecar.shared().destinations.clone().unwrap()
    }

    /// The paths that the policies in force allow.
    async fn paths(&self) -> Vec<String> {
        paths(&self.snapshot().await)
    }

    async fn snapshot(&self) -> Value {
        get(self.sidecar.addresses().admin, "/snapshot")
            .await
            .json()
    }

    /// Waits until the snapshot is as `accept` wants it.
    async fn until(&self, accept: impl Fn(&Value) -> bool) -> Value {
        let admin = self.sidecar.addresses().admin;
        until(admin, "/snapshot", |answer| accept(&answer.json()))
            .await
            .json()
    }

    /// The controller dies; what is at its address then is returned.
    async fn lose_controller(&mut self, session: Session) -> SocketAddr {
        let address = self.controller.address;
        drop(session);
        let nobody = FakeController::start(&self.mesh).await;
        drop(std::mem::replace(&mut self.controller, nobody));
        self.until(|snapshot| !snapshot["lost"].is_null()).await;
        address
    }

    async fn find_controller(&mut self, address: SocketAddr) -> Session {
        self.controller = FakeController::start_at(&self.mesh, address).await;
        self.controller.session().await
    }
}

fn paths(snapshot: &Value) -> Vec<String> {
    let policies = snapshot["policies"].as_array().unwrap().iter();
    let mut paths: Vec<String> = policies
        .map(|policy| policy["spec"]["rules"][0]["to"][0]["http"]["paths"][0].to_string())
        .collect();
    paths.sort();
    paths
}

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

#[tokio::test]
async fn it_is_not_ready_before_the_controller_says_that_it_is_complete() {
    let mut pod = Pod::start("").await;
    let health = pod.sidecar.addresses().health;
    let mut session = pod.controller.session().await;
    assert_eq!(session.hello.pod, "orders-1");
    assert_eq!(session.hello.pod_uid, "uid-of-orders-1");
    session
        .send(proto::WatchResponse {
            updated: vec![policy("a", "1", 1, "/a")],
            ..Default::default()
        })
        .await;
    // Complete, but without the labels that policies select by.
    session
        .send(proto::WatchResponse {
            complete: true,
            ..Default::default()
        })
        .await;
    let answer = until(health, "/readyz", |answer| {
        !answer.body.contains("controller")
    })
    .await;
    assert_eq!(answer.status, 503);
    assert!(answer.body.contains("no complete snapshot"), "{answer:?}");
    session.complete(vec![]).await;
    assert_eq!(
        session.acknowledged().await,
        ("1".to_owned(), 1, String::new())
    );
    pod.sidecar.ready().await.unwrap();
    assert_eq!(pod.paths().await, ["\"/a\""]);
}

#[tokio::test]
async fn without_a_controller_it_says_so_and_is_not_ready() {
    let mesh = Mesh::new();
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = nobody.local_addr().unwrap();
    drop(nobody);
    let sidecar = mesh.start(mesh.cluster_config(address, "")).unwrap();
    let health = sidecar.addresses().health;
    let answer = until(health, "/readyz", |answer| !answer.body.contains("SVID")).await;
    assert_eq!(answer.status, 503);
    assert!(
        answer.body.contains("no controller answers yet"),
        "{answer:?}"
    );
    let admin = sidecar.addresses().admin;
    let lost = |answer: &mesh::Answer| answer.json()["lost"].is_string();
    let snapshot = until(admin, "/snapshot", lost).await.json();
    assert!(
        snapshot["lost"]
            .as_str()
            .unwrap()
            .contains("cannot be reached"),
        "{snapshot}"
    );
}

#[tokio::test]
async fn whoever_is_not_the_controller_receives_no_request() {
    let mesh = Mesh::new();
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    let web = credentials(&mesh, "spiffe://mesh.local/ns/shop/sa/web", &stop).await;
    let acceptor = Acceptor::control_plane(web, Duration::from_secs(30), Arc::new(SystemClock));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let sidecar = mesh.start(mesh.cluster_config(address, "")).unwrap();
    for _ in 0..2 {
        let (stream, _) = listener.accept().await.unwrap();
        let refused = acceptor.accept(stream).await;
        assert!(refused.is_err(), "the handshake itself is refused");
    }
    let admin = sidecar.addresses().admin;
    let lost = |answer: &mesh::Answer| answer.json()["lost"].is_string();
    let snapshot = until(admin, "/snapshot", lost).await.json();
    let lost = snapshot["lost"].as_str().unwrap();
    assert!(lost.contains("is not the controller"), "{lost}");
}

#[tokio::test]
async fn each_resource_is_acknowledged_or_refused_with_its_field() {
    let (pod, mut session) = Pod::ready("", vec![policy("a", "1", 7, "/a")]).await;
    let mut broken = policy("a", "1", 8, "/b");
    let text = String::from_utf8(broken.json).unwrap();
    broken.json = text.replace("methods", "methodz").into_bytes();
    session
        .send(proto::WatchResponse {
            updated: vec![broken, policy("c", "3", 1, "/c")],
            ..Default::default()
        })
        .await;
    let (uid, generation, refusal) = session.acknowledged().await;
    assert_eq!((uid.as_str(), generation), ("1", 8));
    assert!(refusal.starts_with("spec.rules[0].to[0].http"), "{refusal}");
    assert!(refusal.contains("methodz"), "{refusal}");
    assert_eq!(
        session.acknowledged().await,
        ("3".to_owned(), 1, String::new())
    );
    assert_eq!(
        pod.paths().await,
        ["\"/a\"", "\"/c\""],
        "the last good version stays"
    );
    session
        .send(proto::WatchResponse {
            updated: vec![policy("a", "1", 9, "/d")],
            removed: vec![reference("AuthorizationPolicy", "c", "3")],
            ..Default::default()
        })
        .await;
    assert_eq!(
        session.acknowledged().await,
        ("1".to_owned(), 9, String::new())
    );
    assert_eq!(pod.paths().await, ["\"/d\""]);
}

#[tokio::test]
async fn a_deny_that_cannot_be_read_denies_and_one_made_anew_inherits_nothing() {
    let (pod, mut session) = Pod::ready("", vec![policy("a", "1", 1, "/a")]).await;
    let mut broken = policy("a", "2", 1, "/b");
    let text = String::from_utf8(broken.json).unwrap();
    broken.json = text
        .replace("Allow", "Deny")
        .replace("from", "form")
        .into_bytes();
    session
        .send(proto::WatchResponse {
            updated: vec![broken],
            ..Default::default()
        })
        .await;
    let (uid, _, refusal) = session.acknowledged().await;
    assert_eq!(uid, "2");
    assert!(!refusal.is_empty());
    let snapshot = pod.snapshot().await;
    assert!(paths(&snapshot).is_empty(), "{snapshot}");
    assert_eq!(snapshot["resources"]["broken"], json!(["shop/a"]));
}

#[tokio::test]
async fn what_is_known_stays_in_force_until_another_controller_is_complete() {
    let first = vec![policy("a", "1", 1, "/a"), policy("b", "2", 1, "/b")];
    let (mut pod, session) = Pod::ready("", first).await;
    let address = pod.lose_controller(session).await;
    assert_eq!(pod.paths().await, ["\"/a\"", "\"/b\""]);
    assert!(pod.sidecar.missing().is_empty(), "it stays ready");
    let mut session = pod.find_controller(address).await;
    session
        .send(proto::WatchResponse {
            updated: vec![policy("c", "3", 1, "/c")],
            workload: Some(workload("other", "audit")),
            ..Default::default()
        })
        .await;
    session.complete(vec![policy("a", "1", 2, "/a2")]).await;
    assert_eq!(session.acknowledged().await.0, "1");
    assert_eq!(session.acknowledged().await.0, "3");
    assert_eq!(pod.paths().await, ["\"/a2\"", "\"/c\""]);
}

#[tokio::test]
async fn nothing_of_a_stream_counts_before_it_is_complete() {
    let (mut pod, session) = Pod::ready("", vec![policy("a", "1", 1, "/a")]).await;
    let address = pod.lose_controller(session).await;
    let mut session = pod.find_controller(address).await;
    session
        .send(proto::WatchResponse {
            updated: vec![policy("c", "3", 1, "/c")],
            removed: vec![reference("AuthorizationPolicy", "a", "1")],
            workload: Some(workload("other", "enforce")),
            ..Default::default()
        })
        .await;
    let known = pod.destinations();
    let ask = async {
        session.subscribed().await;
        session
            .send(proto::WatchResponse {
                destinations: vec![proto::Destination {
                    destination: "10.96.0.2:80".into(),
                    kind: Some(Kind::External(proto::External { refused: true })),
                }],
                ..Default::default()
            })
            .await;
        session
    };
    let (destination, session) = tokio::join!(known.resolve(at("10.96.0.2:80")), ask);
    assert!(matches!(
        destination,
        Ok(Destination::External { refused: true })
    ));
    assert_eq!(
        pod.paths().await,
        ["\"/a\""],
        "resources wait, destinations do not"
    );
    drop(session);
}

#[tokio::test]
async fn a_destination_is_subscribed_to_on_first_use_and_followed() {
    let (pod, mut session) = Pod::ready("", vec![]).await;
    let destinations = pod.destinations();
    let service = at("10.96.0.7:80");
    assert!(destinations.current(service).is_none());
    let answer = async {
        assert_eq!(session.subscribed().await, "10.96.0.7:80");
        session
            .tell("10.96.0.7:80", Kind::Unknown(proto::Unknown {}))
            .await;
        let kind = meshed("ledger.shop:80", &["10.1.0.4:8080"]);
        session.tell("10.96.0.7:80", kind).await;
    };
    let (found, ()) = tokio::join!(destinations.resolve(service), answer);
    let Ok(Destination::Meshed(route)) = found else {
        panic!("{found:?}");
    };
    assert_eq!(&*route.service, "ledger.shop:80");
    assert_eq!(route.endpoints[0].address, at("10.1.0.4:8080"));
    assert_eq!(route.traffic.timeout, None);
    // Its traffic policy comes later, and its endpoints change.
    session
        .send(proto::WatchResponse {
            updated: vec![traffic("ledger", "t", "2s")],
            ..Default::default()
        })
        .await;
    assert_eq!(session.acknowledged().await.0, "t");
    let Some(Destination::Meshed(route)) = destinations.current(service) else {
        panic!("it was known");
    };
    assert_eq!(route.traffic.timeout, Some(Duration::from_secs(2)));
    session
        .tell("10.96.0.7:80", meshed("ledger.shop:80", &[]))
        .await;
    let admin = pod.sidecar.addresses().admin;
    let emptied =
        |answer: &mesh::Answer| answer.json()["destinations"][0]["endpoints"] == json!([]);
    let page = until(admin, "/destinations", emptied).await.json();
    assert_eq!(page["zone"], "zone-a");
    assert_eq!(page["connected"], true);
    assert_eq!(page["destinations"][0]["service"], "ledger.shop:80");
    let Some(Destination::Meshed(route)) = destinations.current(service) else {
        panic!("it was known");
    };
    assert_eq!(
        route.traffic.timeout,
        Some(Duration::from_secs(2)),
        "also by a new route"
    );
}

#[tokio::test]
async fn without_a_controller_known_destinations_stay_and_new_ones_fail_in_a_second() {
    let (mut pod, mut session) = Pod::ready("", vec![traffic("ledger", "t", "2s")]).await;
    let destinations = pod.destinations();
    let known = at("10.96.0.7:80");
    let kind = meshed("ledger.shop:80", &["10.1.0.4:8080"]);
    let (found, session) = tokio::join!(destinations.resolve(known), async {
        session.subscribed().await;
        session.tell("10.96.0.7:80", kind.clone()).await;
        session
    });
    assert!(matches!(found, Ok(Destination::Meshed(_))));
    let address = pod.lose_controller(session).await;
    assert!(matches!(
        destinations.current(known),
        Some(Destination::Meshed(_))
    ));
    let asked = Instant::now();
    let unknown = destinations.resolve(at("10.96.0.8:80")).await;
    assert!(matches!(unknown, Err(DestinationUnknown)));
    assert!(asked.elapsed() >= Duration::from_millis(990), "it waited");
    let mut session = pod.find_controller(address).await;
    let mut told = [session.subscribed().await, session.subscribed().await];
    told.sort();
    assert_eq!(
        told,
        ["10.96.0.7:80", "10.96.0.8:80"],
        "a new controller is told all"
    );
    // The traffic policy of before stays until its service was answered.
    session.complete(vec![]).await;
    pod.until(|snapshot| snapshot["lost"].is_null()).await;
    let timeout = || match destinations.current(known) {
        Some(Destination::Meshed(route)) => route.traffic.timeout,
        other => panic!("{other:?}"),
    };
    assert_eq!(timeout(), Some(Duration::from_secs(2)));
    session.tell("10.96.0.7:80", kind).await;
    session
        .tell("10.96.0.8:80", Kind::Unknown(proto::Unknown {}))
        .await;
    pod.until(|snapshot| snapshot["resources"]["TrafficPolicy"] == json!([]))
        .await;
    assert_eq!(timeout(), None);
}

#[tokio::test]
async fn labels_and_enforcement_of_the_pod_count_as_they_change() {
    let policies = vec![
        policy("a", "1", 1, "/a"),
        policy_for("other", "b", "2", 1, "/b"),
    ];
    let (pod, mut session) = Pod::ready("", policies).await;
    let snapshot = pod.snapshot().await;
    assert_eq!(paths(&snapshot), ["\"/a\""]);
    assert_eq!(snapshot["enforcement"], "enforce");
    session
        .send(proto::WatchResponse {
            workload: Some(workload("other", "audit")),
            ..Default::default()
        })
        .await;
    let snapshot = pod
        .until(|snapshot| snapshot["enforcement"] == "audit")
        .await;
    assert_eq!(paths(&snapshot), ["\"/b\""]);
    session
        .send(proto::WatchResponse {
            workload: Some(workload("other", "whatever")),
            ..Default::default()
        })
        .await;
    pod.until(|snapshot| snapshot["enforcement"] == "enforce")
        .await;
}

#[tokio::test]
async fn a_pods_own_enforcement_wins_over_its_namespaces() {
    let mesh = Mesh::new();
    let mut controller = FakeController::start(&mesh).await;
    let mut config = mesh.cluster_config(controller.address, "");
    config.workload.enforcement = Some(sidegate_mesh::Enforcement::Audit);
    let sidecar = mesh.start(config).unwrap();
    let mut session = controller.session().await;
    session.complete(vec![]).await;
    sidecar.ready().await.unwrap();
    let snapshot = get(sidecar.addresses().admin, "/snapshot").await.json();
    assert_eq!(snapshot["enforcement"], "audit");
}

#[tokio::test]
async fn a_pod_that_is_being_deleted_sends_callers_away_and_serves_on() {
    let (pod, mut session) = Pod::ready("", vec![]).await;
    let drain = pod.sidecar.shared().drain.clone();
    assert!(!drain.is_asked_to_leave());
    session
        .send(proto::WatchResponse {
            workload: Some(proto::Workload {
                terminating: true,
                ..workload("orders", "enforce")
            }),
            ..Default::default()
        })
        .await;
    drain.asked_to_leave().await;
    assert!(!drain.is_draining());
    assert!(pod.sidecar.missing().is_empty());
}

#[tokio::test]
async fn a_flood_of_resources_changes_nothing_and_is_counted() {
    let more = "limits: { resourcesMax: 2 }";
    let (pod, mut session) = Pod::ready(more, vec![policy("a", "1", 1, "/a")]).await;
    let flood = ["b", "c", "d"].map(|name| policy(name, name, 1, "/x"));
    session
        .send(proto::WatchResponse {
            updated: flood.into(),
            ..Default::default()
        })
        .await;
    let snapshot = pod.until(|snapshot| !snapshot["lost"].is_null()).await;
    assert!(
        snapshot["lost"].as_str().unwrap().contains("resourcesMax"),
        "{snapshot}"
    );
    assert_eq!(paths(&snapshot), ["\"/a\""]);
    let metrics = get(pod.sidecar.addresses().health, "/metrics").await.body;
    assert!(
        metrics.contains("sidegate_limit_refusals_total{limit=\"resources\"} 1"),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_policy_of_the_whole_mesh_is_taken_as_selected() {
    let json = json!({
        "apiVersion": "sidegate.dev/v1alpha1",
        "kind": "AuthorizationPolicy",
        "metadata": { "namespace": "sidegate-system", "name": "all" },
        "spec": {
            "namespaceSelector": { "matchLabels": { "team": "a" } },
            "selector": {},
            "action": "Allow",
            "rules": [{ "from": [{ "anyone": {} }],
                        "to": [{ "http": { "methods": ["GET"], "paths": ["/all"] } }] }],
        },
    });
    let mut all = resource("AuthorizationPolicy", "all", "9", 1, &json);
    all.reference.as_mut().unwrap().namespace = "sidegate-system".to_owned();
    let (pod, _session) = Pod::ready("", vec![all]).await;
    assert_eq!(pod.paths().await, ["\"/all\""]);
}

#[tokio::test]
async fn a_destination_that_is_not_called_any_more_is_unsubscribed_from() {
    let more = "limits: { destinationIdleTimeout: 1ms }";
    let (pod, mut session) = Pod::ready(more, vec![]).await;
    let destinations = pod.destinations();
    let (found, ()) = tokio::join!(destinations.resolve(at("10.96.0.7:80")), async {
        session.subscribed().await;
        let external = Kind::External(proto::External { refused: false });
        session.tell("10.96.0.7:80", external).await;
    });
    assert!(matches!(
        found,
        Ok(Destination::External { refused: false })
    ));
    let next = session.next().await;
    let Message::Unsubscribe(unsubscribe) = next else {
        panic!("{next:?}");
    };
    assert_eq!(unsubscribe.destination, "10.96.0.7:80");
    assert!(destinations.current(at("10.96.0.7:80")).is_none());
}

const SECRET: &str = "0123456789abcdef0123456789abcdef";

/// An application that answers each connection with this status line.
async fn application(status: &'static str) -> (SocketAddr, tokio::task::JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = [0; 1024];
            let read = stream.read(&mut head).await.unwrap_or(0);
            assert!(!String::from_utf8_lossy(&head[..read]).contains("secret"));
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 4\r\n\r\nbody");
            stream
                .write_all(answer.as_bytes())
                .await
                .unwrap_or_default();
        }
    });
    (address, tasks)
}

#[tokio::test]
async fn probes_and_hooks_are_answered_before_the_sidecar_is_ready() {
    let (good, _good) = application("200 OK").await;
    let (bad, _bad) = application("500 Internal Server Error").await;
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let nobody = closed.local_addr().unwrap().port();
    drop(closed);
    let more = format!(
        "probes:
  secret: {SECRET}
  entries:
    app/liveness: {{ http: {{ port: {}, path: /healthz }} }}
    app/readiness: {{ http: {{ port: {}, path: /healthz }}, timeout: 1m }}
    app/startup: {{ tcp: {{ port: {} }}, timeout: 1m }}
    app/post-start: {{ http: {{ port: {} }} }}
    app/pre-stop: {{ tcp: {{ port: {nobody} }} }}
",
        good.port(),
        bad.port(),
        good.port(),
        bad.port(),
    );
    let pod = Pod::start(&more.replace("/healthz } }", "/healthz }, timeout: 1m }")).await;
    let health = pod.sidecar.addresses().health;
    let ask = async |entry: &str, secret: &str| {
        let request = format!(
            "GET /probe/{entry} HTTP/1.1\r\nhost: pod\r\nconnection: close\r\n\
             sidegate-probe-secret: {secret}\r\nx-secret: mine\r\n\r\n"
        );
        mesh::exchange(health, &request).await
    };
    for (entry, status) in [
        ("app/liveness", 200),
        ("app/readiness", 503),
        ("app/startup", 200),
        ("app/post-start", 200),
        ("app/unknown", 404),
    ] {
        let answer = ask(entry, SECRET).await;
        assert_eq!(
            (answer.status, answer.body.as_str()),
            (status, ""),
            "{entry}"
        );
    }
    let hook = ask("app/pre-stop", SECRET).await;
    assert_eq!(
        hook.head, "",
        "the kubelet takes any answer of a hook for a success"
    );
    assert_eq!(ask("app/liveness", "wrong").await.status, 403);
    let admin = pod.sidecar.addresses().admin;
    let shown = get(admin, "/config").await.body;
    assert!(
        shown.contains("app/liveness") && !shown.contains(SECRET),
        "{shown}"
    );
}

#[tokio::test]
async fn what_is_said_of_certificates_is_under_both_names_and_destinations_have_a_page() {
    let (pod, _session) = Pod::ready("", vec![]).await;
    let admin = pod.sidecar.addresses().admin;
    let certificates = get(admin, "/certificates").await.json();
    let id = "spiffe://mesh.local/ns/shop/sa/orders";
    assert_eq!(certificates["certificate"]["id"], id);
    assert_eq!(get(admin, "/certs").await.json()["certificate"]["id"], id);
    let page = get(admin, "/destinations").await.json();
    assert_eq!(page["destinations"], json!([]));
    assert_eq!(get(admin, "/denials").await.json(), json!([]));
}

#[tokio::test]
async fn redirected_calls_of_both_families_have_a_listener() {
    let mesh = Mesh::new();
    let config = mesh.cluster_config("127.0.0.1:1".parse().unwrap(), "");
    let sidecar = mesh.start(config).unwrap();
    let port = sidecar.addresses().outbound.port();
    for loopback in ["127.0.0.1", "::1"] {
        // Where the machine has no IPv6, none is needed.
        if std::net::TcpListener::bind((loopback, 0)).is_err() {
            continue;
        }
        let connected = tokio::net::TcpStream::connect((loopback, port)).await;
        assert!(connected.is_ok(), "{loopback}");
    }
    let mut config = mesh.cluster_config("127.0.0.1:1".parse().unwrap(), "");
    config.health.address = "[::]:0".parse().unwrap();
    let sidecar = mesh.start(config).unwrap();
    let health = SocketAddr::from(([127, 0, 0, 1], sidecar.addresses().health.port()));
    assert_eq!(
        get(health, "/livez").await.status,
        200,
        "any of IPv6 is any of IPv4 too"
    );
}
