//! The injector as the API server sees it: TLS, HTTP, reviews, its own roots.
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

#[path = "support/api.rs"]
mod api;
#[path = "../../mtls/tests/support/ca.rs"]
mod ca;
#[path = "support/issuer.rs"]
mod issuer;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use api::FakeApi;
use base64::Engine as _;
use bytes::Bytes;
use ca::{Authority, bundle_message, start};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use hyper_util::rt::{TokioExecutor, TokioIo};
use issuer::{ClusterIssuer, DNS_NAME};
use rustls::time_provider::TimeProvider;
use rustls_pki_types::{CertificateDer, UnixTime};
use serde_json::{Value, json};
use sidegate_injector::{Config, Injector};
use sidegate_mesh::clock::{Clock, ManualClock};
use sidegate_mtls::crypto_provider;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

const LIFE: Duration = Duration::from_hours(1);
/// As long as a busy machine needs.
const PATIENCE: Duration = Duration::from_mins(1);
const MUTATING: &str = "mutatingwebhookconfigurations";
const VALIDATING: &str = "validatingwebhookconfigurations";

struct World {
    clock: ManualClock,
    api: FakeApi,
    root: Arc<Authority>,
    issuer: ClusterIssuer,
    injector: Option<Injector>,
    address: SocketAddr,
    health: SocketAddr,
    folder: TempDir,
}

#[derive(Debug)]
struct Time(ManualClock);

impl TimeProvider for Time {
    fn current_time(&self) -> Option<UnixTime> {
        let since = self
            .0
            .now()
            .duration_since(std::time::SystemTime::UNIX_EPOCH)
            .unwrap();
        Some(UnixTime::since_unix_epoch(since))
    }
}

fn configuration(service: &str) -> Value {
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "metadata": { "annotations": {} },
        "webhooks": [
            { "name": "a.sidegate.dev", "clientConfig": { "service": { "name": service } } },
            { "name": "other.example", "clientConfig": { "url": "https://other.example", "caBundle": "eA==" } },
        ],
    })
}

fn namespace(label: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "labels": { "sidegate.dev/inject": label } } })
}

impl World {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let clock = ManualClock::new(start());
        let api = FakeApi::default();
        api.put("namespaces", "shop", namespace("enabled"));
        api.put(
            MUTATING,
            "sidegate-injector",
            configuration("sidegate-injector"),
        );
        api.put(
            VALIDATING,
            "sidegate-validator",
            configuration("sidegate-injector"),
        );
        let root = Arc::new(Authority::root("cluster.local"));
        let bundle = bundle_message(1, &[("cluster.local", &[&root])]);
        let issuer = ClusterIssuer::new(&root, LIFE, clock.clone(), bundle);
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config {
            address: "127.0.0.1:0".parse().unwrap(),
            health_address: "127.0.0.1:0".parse().unwrap(),
            root_file: folder.path().join("root.pem"),
            ..Config::default()
        };
        config.shutdown_grace = Duration::ZERO;
        std::fs::write(&config.root_file, pem(&root.der)).unwrap();
        change(&mut config);
        let clock_of_injector: Arc<dyn Clock> = Arc::new(clock.clone());
        let injector = Injector::start_with(
            config,
            api.client(),
            Arc::new(issuer.clone()),
            clock_of_injector,
        );
        let injector = injector.await.unwrap();
        let (address, health) = (injector.address(), injector.health_address());
        Self {
            clock,
            api,
            root,
            issuer,
            injector: Some(injector),
            address,
            health,
            folder,
        }
    }

    async fn ready() -> Self {
        let world = Self::new().await;
        world.wait_ready().await;
        world
    }

    async fn wait_ready(&self) {
        let patience = tokio::time::Instant::now() + PATIENCE;
        loop {
            let (status, why) = self.health("/readyz").await;
            if status == StatusCode::OK {
                return;
            }
            assert!(tokio::time::Instant::now() < patience, "never ready: {why}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn health(&self, path: &str) -> (StatusCode, String) {
        let stream = TcpStream::connect(self.health).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .unwrap();
        let connection = tokio::spawn(connection);
        let request = Request::get(path)
            .header("host", "x")
            .body(Full::<Bytes>::default())
            .unwrap();
        let answer = text(sender.send_request(request).await.unwrap()).await;
        connection.abort();
        answer
    }

    /// A connection as the API server makes it: it knows a DNS name and the roots, and has no
    /// certificate.
    async fn connect(&self, alpn: &[u8]) -> std::io::Result<TlsStream<TcpStream>> {
        self.connect_trusting(alpn, &self.root.der).await
    }

    async fn connect_trusting(
        &self,
        alpn: &[u8],
        root: &CertificateDer<'static>,
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(root.clone()).unwrap();
        let time: Arc<dyn TimeProvider> = Arc::new(Time(self.clock.clone()));
        let mut config = rustls::ClientConfig::builder_with_details(crypto_provider(), time)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![alpn.to_vec()];
        let stream = TcpStream::connect(self.address).await?;
        let name = DNS_NAME.try_into().unwrap();
        tokio_rustls::TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await
    }

    async fn send(&self, request: Request<Full<Bytes>>) -> (StatusCode, String) {
        let stream = self.connect(b"http/1.1").await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .unwrap();
        let connection = tokio::spawn(connection);
        let answer = text(sender.send_request(request).await.unwrap()).await;
        connection.abort();
        answer
    }

    async fn review(&self, path: &str, request: &Value) -> Value {
        let (status, body) = self.send(post(path, &review(request))).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        let answer: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(answer["response"]["uid"], request["uid"]);
        answer["response"].clone()
    }

    async fn metric(&self, line: &str) -> bool {
        self.health("/metrics")
            .await
            .1
            .lines()
            .any(|each| each == line)
    }

    fn roots_of(&self, resource: &str, name: &str) -> Vec<CertificateDer<'static>> {
        use rustls_pki_types::pem::PemObject as _;
        let bundle =
            self.api.get(resource, name)["webhooks"][0]["clientConfig"]["caBundle"].clone();
        let pem = base64::engine::general_purpose::STANDARD
            .decode(bundle.as_str().unwrap_or_default())
            .unwrap();
        CertificateDer::pem_slice_iter(&pem)
            .map(Result::unwrap)
            .collect()
    }
}

fn pem(der: &[u8]) -> String {
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n")
}

async fn text<B>(response: Response<B>) -> (StatusCode, String)
where
    B: hyper::body::Body,
    B::Error: std::fmt::Debug,
{
    let status = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

fn post(path: &str, body: &str) -> Request<Full<Bytes>> {
    Request::post(path)
        .header("host", DNS_NAME)
        .header("content-type", "application/json; charset=utf-8")
        .body(Full::from(body.to_owned()))
        .unwrap()
}

fn review(request: &Value) -> String {
    json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request })
        .to_string()
}

fn pod_in(namespace: &str) -> Value {
    json!({
        "uid": "u-1", "kind": { "group": "", "version": "v1", "kind": "Pod" }, "operation": "CREATE",
        "namespace": namespace, "dryRun": true,
        "object": { "metadata": { "name": "p" }, "spec": { "containers": [{ "name": "app" }] } },
    })
}

/// Waits until something is so; it is asked again and again, for as long as a busy machine needs.
async fn eventually<F: Future<Output = bool>>(what: &str, mut is_so: impl FnMut() -> F) {
    let patience = tokio::time::Instant::now() + PATIENCE;
    while !is_so().await {
        assert!(tokio::time::Instant::now() < patience, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_pod_is_injected_over_both_versions_of_http() {
    let world = World::ready().await;
    let answer = world.review("/mutate", &pod_in("shop")).await;
    assert_eq!(
        (&answer["allowed"], &answer["patchType"]),
        (&json!(true), &json!("JSONPatch"))
    );
    let stream = world.connect(b"h2").await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
    tokio::spawn(connection);
    for _ in 0..3 {
        let mut request = post("/mutate", &review(&pod_in("shop")));
        *request.uri_mut() = format!("https://{DNS_NAME}/mutate?timeout=5s")
            .parse()
            .unwrap();
        let (status, body) = text(sender.send_request(request).await.unwrap()).await;
        assert_eq!(status, StatusCode::OK);
        let answer: Value = serde_json::from_str(&body).unwrap();
        let patch = base64::engine::general_purpose::STANDARD
            .decode(answer["response"]["patch"].as_str().unwrap())
            .unwrap();
        assert!(String::from_utf8(patch).unwrap().contains("sidegate-proxy"));
    }
    assert!(
        world
            .metric("sidegate_injector_admissions_total{webhook=\"mutate\",result=\"patched\"} 4")
            .await
    );
}

#[tokio::test]
async fn resources_are_judged_in_the_words_of_validate() {
    let world = World::ready().await;
    let mut request = json!({
        "uid": "u", "kind": { "group": "sidegate.dev", "version": "v1alpha1", "kind": "AuthorizationPolicy" },
        "operation": "UPDATE", "namespace": "shop",
        "object": {
            "apiVersion": "sidegate.dev/v1alpha1", "kind": "AuthorizationPolicy",
            "metadata": { "name": "x", "namespace": "shop", "uid": "y", "generation": 2 },
            "spec": {
                "selectr": {}, "action": "Allow",
                "rules": [{ "from": [{ "anyone": {} }], "to": [{ "grpc": { "service": "a.B", "methods": ["*"] } }] }],
            },
        },
    });
    let answer = world.review("/validate", &request).await;
    assert_eq!(answer["allowed"], false);
    assert_eq!(
        answer["status"]["message"],
        "spec.selectr: unknown field `selectr`; did you mean `selector`?"
    );
    assert_eq!(
        answer["status"]["details"]["causes"][0]["field"],
        "spec.selectr"
    );
    for (field, value) in [("operation", "DELETE"), ("subResource", "status")] {
        let mut other = request.clone();
        other[field] = json!(value);
        assert_eq!(
            world.review("/validate", &other).await["allowed"],
            true,
            "{field}"
        );
    }
    request["kind"]["group"] = json!("security.istio.io");
    assert_eq!(world.review("/validate", &request).await["allowed"], true);
}

#[tokio::test]
async fn what_is_no_review_gets_a_status_and_what_has_a_uid_an_answer() {
    let world = World::ready().await;
    let long = "x".repeat(1024 * 1024 + 1);
    let cases = [
        (
            Request::get("/mutate")
                .header("host", "x")
                .body(Full::default())
                .unwrap(),
            405,
        ),
        (post("/nowhere", "{}"), 404),
        (
            Request::post("/mutate")
                .header("host", "x")
                .body(Full::from("{}"))
                .unwrap(),
            415,
        ),
        (post("/mutate", "not json"), 400),
        (post("/validate", "{}"), 400),
        (post("/mutate", &long), 413),
    ];
    for (request, expected) in cases {
        let what = format!("{} {}", request.method(), request.uri());
        let (status, body) = world.send(request).await;
        assert_eq!(status.as_u16(), expected, "{what}: {body}");
        assert!(body.len() < 200 && body.ends_with('\n'), "{body}");
    }
    let malformed = world
        .review("/mutate", &json!({ "uid": "u", "operation": ["CREATE"] }))
        .await;
    assert_eq!(
        (&malformed["allowed"], &malformed["status"]["code"]),
        (&json!(false), &json!(400))
    );
    let mut refused = pod_in("shop");
    refused["object"]["spec"]["hostPID"] = json!(true);
    let refused = world.review("/mutate", &refused).await;
    assert!(
        refused["status"]["message"]
            .as_str()
            .unwrap()
            .contains("hostPID")
    );
    let mut not_a_pod = pod_in("shop");
    not_a_pod["object"] = json!([]);
    let not_a_pod = world.review("/mutate", &not_a_pod).await;
    assert_eq!(
        not_a_pod["status"]["message"],
        "the pod: it is not an object"
    );
    for (field, value) in [
        ("operation", "UPDATE"),
        ("subResource", "ephemeralcontainers"),
    ] {
        let mut other = pod_in("shop");
        other[field] = json!(value);
        assert_eq!(
            world.review("/mutate", &other).await,
            json!({ "uid": "u-1", "allowed": true })
        );
    }
}

#[tokio::test]
async fn a_body_without_an_announced_length_ends_at_the_bound() {
    let world = World::ready().await;
    let stream = world.connect(b"http/1.1").await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    let chunk = || Ok::<_, std::io::Error>(Frame::data(Bytes::from(vec![b' '; 64 * 1024])));
    let body = StreamBody::new(tokio_stream::iter((0..64).map(move |_| chunk())));
    let request = Request::post("/mutate")
        .header("host", "x")
        .header("content-type", "application/json")
        .body(body)
        .unwrap();
    let (status, _) = text(sender.send_request(request).await.unwrap()).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
}

/// Sends the head of a review, and waits until the injector asks for its body.
async fn begin(stream: &mut TlsStream<TcpStream>, bytes: usize) {
    let head = format!(
        "POST /mutate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         content-length: {bytes}\r\nexpect: 100-continue\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = vec![0; 25];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer, b"HTTP/1.1 100 Continue\r\n\r\n");
}

#[tokio::test]
async fn a_body_that_does_not_come_is_not_waited_for() {
    let world = World::ready().await;
    let mut stream = world.connect(b"http/1.1").await.unwrap();
    begin(&mut stream, 100).await;
    stream.write_all(b"{").await.unwrap();
    world.clock.advance(Duration::from_secs(5));
    let mut answer = vec![0; 12];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer, b"HTTP/1.1 408");
}

#[tokio::test]
async fn an_unknown_namespace_is_read_and_no_pod_is_judged_by_a_guess() {
    let world = World::ready().await;
    assert_eq!(
        world.review("/mutate", &pod_in("shop")).await["patchType"],
        "JSONPatch"
    );
    assert_eq!(world.api.reads(), 0, "the watch knows it");
    let missing = world.review("/mutate", &pod_in("nowhere")).await;
    assert_eq!(
        missing["status"]["message"],
        "the pod cannot be injected: there is no namespace `nowhere`"
    );
    assert_eq!(world.review("/mutate", &pod_in("")).await["allowed"], false);
    // The API server asked, so it has a label that our watch has not seen yet.
    world.api.put("namespaces", "late", namespace("disabled"));
    eventually("late is known", || async {
        world.metric("sidegate_injector_namespaces 2").await
    })
    .await;
    let reads = world.api.reads();
    assert_eq!(
        world.review("/mutate", &pod_in("late")).await,
        json!({ "uid": "u-1", "allowed": true })
    );
    assert_eq!(world.api.reads(), reads + 1);
    world.api.put("namespaces", "late", namespace("enabled"));
    eventually("late is labelled", || async {
        world.review("/mutate", &pod_in("late")).await["patchType"] == "JSONPatch"
    })
    .await;
}

#[tokio::test]
async fn without_the_api_server_what_is_known_goes_on_only_as_long_as_the_watch_does() {
    let world = World::ready().await;
    world.api.set_down(true);
    eventually("the loss is noticed", || async {
        let answer = world.review("/mutate", &pod_in("shop")).await;
        answer["status"]["message"]
            .as_str()
            .unwrap_or_default()
            .contains("namespace shop cannot be read; try again")
    })
    .await;
    assert_eq!(
        world.review("/mutate", &pod_in("shop")).await["status"]["code"],
        500
    );
    world.api.set_down(false);
    eventually("it is read again", || async {
        world.review("/mutate", &pod_in("shop")).await["allowed"] == true
    })
    .await;
}

#[tokio::test]
async fn the_roots_are_written_and_repaired_and_follow_the_bundle() {
    let world = World::ready().await;
    let both = [
        (MUTATING, "sidegate-injector"),
        (VALIDATING, "sidegate-validator"),
    ];
    for (resource, name) in both {
        assert_eq!(
            world.roots_of(resource, name),
            std::slice::from_ref(&world.root.der)
        );
        assert_eq!(
            world.api.get(resource, name)["webhooks"][1]["clientConfig"]["caBundle"],
            "eA==",
            "not ours"
        );
    }
    assert_eq!(world.api.patches().len(), 2, "each once");
    // An edit is undone.
    let mut edited = world.api.get(MUTATING, "sidegate-injector");
    edited["webhooks"][0]["clientConfig"]["caBundle"] = json!("bm9uc2Vuc2U=");
    world.api.put(MUTATING, "sidegate-injector", edited);
    eventually("repaired", || async {
        world.roots_of(MUTATING, "sidegate-injector") == std::slice::from_ref(&world.root.der)
    })
    .await;
    // A new root comes beside the old one.
    let next = Arc::new(Authority::root("cluster.local"));
    world.issuer.publish(bundle_message(
        2,
        &[("cluster.local", &[&world.root, &next])],
    ));
    for (resource, name) in both {
        eventually("followed", || async {
            let roots = world.roots_of(resource, name);
            roots.len() == 2 && roots.contains(&next.der) && roots.contains(&world.root.der)
        })
        .await;
        let annotations = world.api.get(resource, name)["metadata"]["annotations"].clone();
        assert_eq!(annotations["sidegate.dev/bundle-sequence"], "2");
    }
    // One that is made anew gets them too.
    world.api.remove(VALIDATING, "sidegate-validator");
    world.api.put(
        VALIDATING,
        "sidegate-validator",
        configuration("sidegate-injector"),
    );
    eventually("made anew", || async {
        world.roots_of(VALIDATING, "sidegate-validator").len() == 2
    })
    .await;
    assert!(
        world
            .api
            .patches()
            .iter()
            .all(|(name, _)| both.iter().any(|(_, ours)| ours == name))
    );
}

#[tokio::test]
async fn an_older_bundle_does_not_undo_a_newer_one_for_a_while() {
    let world = World::ready().await;
    let newer = Authority::root("cluster.local");
    let mut theirs = world.api.get(MUTATING, "sidegate-injector");
    theirs["metadata"]["annotations"]["sidegate.dev/bundle-sequence"] = json!("7");
    theirs["webhooks"][0]["clientConfig"]["caBundle"] =
        json!(base64::engine::general_purpose::STANDARD.encode(pem(&newer.der)));
    let (patches, sleepers) = (world.api.patches().len(), world.clock.sleepers());
    world.api.put(MUTATING, "sidegate-injector", theirs);
    eventually("it waits", || async { world.clock.sleepers() > sleepers }).await;
    assert_eq!(world.api.patches().len(), patches);
    assert_eq!(
        world.roots_of(MUTATING, "sidegate-injector"),
        std::slice::from_ref(&newer.der)
    );
    eventually("ours is written", || async {
        world.clock.advance(Duration::from_secs(61));
        world.roots_of(MUTATING, "sidegate-injector") == std::slice::from_ref(&world.root.der)
    })
    .await;
}

#[tokio::test]
async fn a_write_that_fails_is_tried_again() {
    let world = World::with(|config| config.webhooks.mutating = "absent-first".to_owned()).await;
    world.wait_ready().await;
    assert!(
        world
            .api
            .patches()
            .iter()
            .all(|(name, _)| name == "sidegate-validator")
    );
    world
        .api
        .put(MUTATING, "absent-first", configuration("sidegate-injector"));
    eventually("written", || async {
        world.roots_of(MUTATING, "absent-first").len() == 1
    })
    .await;
}

#[tokio::test]
async fn each_handshake_shows_the_certificate_of_its_moment() {
    let world = World::ready().await;
    let leaf =
        |stream: &TlsStream<TcpStream>| stream.get_ref().1.peer_certificates().unwrap()[0].to_vec();
    let first = leaf(&world.connect(b"h2").await.unwrap());
    assert_eq!(first, leaf(&world.connect(b"h2").await.unwrap()));
    world.clock.advance(LIFE * 2 / 3);
    eventually("renewed", || async {
        leaf(&world.connect(b"h2").await.unwrap()) != first
    })
    .await;
}

#[tokio::test]
async fn an_open_connection_ends_with_its_certificate() {
    let world = World::ready().await;
    // HTTP/2, because an idle connection of HTTP/1 ends by itself after a while.
    let stream = world.connect(b"h2").await.unwrap();
    let handshake =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.unwrap();
    let connection = tokio::spawn(connection);
    let mut request = post("/nowhere", "{}");
    *request.uri_mut() = format!("https://{DNS_NAME}/nowhere").parse().unwrap();
    let (status, _) = text(sender.send_request(request).await.unwrap()).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    assert!(!connection.is_finished());
    world.clock.advance(LIFE + Duration::from_secs(1));
    let ended = tokio::time::timeout(PATIENCE, connection).await;
    drop(ended.expect("the connection outlives its certificate"));
}

#[tokio::test]
async fn after_its_certificate_has_ended_it_heals_itself() {
    let world = World::ready().await;
    world.issuer.set_down(true);
    world.clock.advance(LIFE + Duration::from_secs(1));
    eventually("not ready", || async {
        world.clock.advance(Duration::from_secs(1));
        let (status, why) = world.health("/readyz").await;
        status == StatusCode::SERVICE_UNAVAILABLE && why.contains("no usable certificate")
    })
    .await;
    assert!(
        world.connect(b"h2").await.is_err(),
        "an ended certificate is no good to anybody"
    );
    assert_eq!(
        world.health("/livez").await.0,
        StatusCode::OK,
        "a new start would not help"
    );
    world.issuer.set_down(false);
    eventually("healed", || async {
        world.clock.advance(Duration::from_mins(1));
        world.health("/readyz").await.0 == StatusCode::OK
    })
    .await;
    assert_eq!(
        world.review("/mutate", &pod_in("shop")).await["allowed"],
        true
    );
}

#[tokio::test]
async fn only_when_a_new_start_would_help_it_is_not_alive() {
    let world = World::ready().await;
    let root_file = world.folder.path().join("root.pem");
    std::fs::write(&root_file, "other roots").unwrap();
    assert_eq!(
        world.health("/livez").await.0,
        StatusCode::OK,
        "its certificate is good"
    );
    world.issuer.set_down(true);
    world.clock.advance(LIFE + Duration::from_secs(1));
    assert_eq!(
        world.health("/livez").await.0,
        StatusCode::SERVICE_UNAVAILABLE
    );
}

#[tokio::test]
async fn readiness_says_what_is_missing() {
    let clock = ManualClock::new(start());
    let api = FakeApi::default();
    api.set_down(true);
    let root = Arc::new(Authority::root("cluster.local"));
    let issuer = ClusterIssuer::new(
        &root,
        LIFE,
        clock.clone(),
        bundle_message(1, &[("cluster.local", &[&root])]),
    );
    issuer.set_down(true);
    let folder = tempfile::tempdir().unwrap();
    let config = Config {
        address: "127.0.0.1:0".parse().unwrap(),
        health_address: "127.0.0.1:0".parse().unwrap(),
        root_file: folder.path().join("root.pem"),
        ..Config::default()
    };
    std::fs::write(&config.root_file, pem(&root.der)).unwrap();
    let injector = Injector::start_with(
        config,
        api.client(),
        Arc::new(issuer.clone()),
        Arc::new(clock.clone()),
    )
    .await
    .unwrap();
    let (address, health) = (injector.address(), injector.health_address());
    let world = World {
        clock,
        api,
        root,
        issuer,
        injector: Some(injector),
        address,
        health,
        folder,
    };
    let (status, why) = world.health("/readyz").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    for part in [
        "no usable certificate",
        "namespaces are not known",
        "webhook configurations do not have our roots",
    ] {
        assert!(why.contains(part), "{why}");
    }
    assert!(world.connect(b"h2").await.is_err());
    assert_eq!(world.health("/nowhere").await.0, StatusCode::NOT_FOUND);
    world.issuer.set_down(false);
    world.api.set_down(false);
    eventually("ready", || async {
        world.clock.advance(Duration::from_secs(30));
        world.health("/readyz").await.0 == StatusCode::OK
    })
    .await;
}

#[tokio::test]
async fn idle_strangers_do_not_keep_the_api_server_out() {
    let world = World::with(|config| config.limits.connections_max = 4).await;
    world.wait_ready().await;
    let mut strangers = Vec::new();
    for _ in 0..16 {
        strangers.push(TcpStream::connect(world.address).await.unwrap());
        assert_eq!(
            world.review("/mutate", &pod_in("shop")).await["allowed"],
            true
        );
    }
    let ended = &mut strangers[0];
    assert_eq!(
        ended.read(&mut [0; 1]).await.unwrap_or(0),
        0,
        "the first stranger had to go"
    );
    let metrics = world.health("/metrics").await.1;
    assert!(
        metrics.contains("connections_refused_total{reason=\"idle_for_another\"}"),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_client_that_trusts_somebody_else_is_not_served() {
    let world = World::ready().await;
    let stranger = Authority::root("cluster.local");
    assert!(world.connect_trusting(b"h2", &stranger.der).await.is_err());
    eventually("counted", || async {
        world
            .health("/metrics")
            .await
            .1
            .contains("handshake_failures_total{reason=")
    })
    .await;
}

#[tokio::test]
async fn told_to_end_it_finishes_what_it_has_begun() {
    let mut world = World::ready().await;
    let mut stream = world.connect(b"http/1.1").await.unwrap();
    let body = review(&pod_in("shop"));
    begin(&mut stream, body.len()).await;
    let ending = tokio::spawn(world.injector.take().unwrap().shutdown());
    eventually("no longer accepting", || async {
        TcpStream::connect(world.address).await.is_err()
    })
    .await;
    stream.write_all(body.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.ok();
    let answer = String::from_utf8_lossy(&answer);
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.contains("JSONPatch"),
        "{answer}"
    );
    ending.await.unwrap();
}
