//! The CA in a cluster: replicas that share a Secret, pods that prove who they are, and the bundle.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use rustls_pki_types::CertificateDer;
use serde_json::{Value, json};
use sidegate_ca::config::Kubernetes;
use sidegate_ca::{Ca, Config, RunningCa, StartError};
use sidegate_mesh::clock::{Clock, ManualClock};
use sidegate_mesh::spiffe::SpiffeId;
use sidegate_mtls::{
    Acknowledgement, BundleSet, BundleWatch, CaClient, CaClientConfig, Evidence, Issue, IssueError,
    IssueRequest, JoinToken, Trust, Verifier, VerifyLimits, crypto_provider,
};
use tempfile::TempDir;

use crate::apiserver::ApiServer;
use crate::harness::{Key, check_refused, next, until};

const SECRET: &str = "/api/v1/namespaces/sidegate-system/secrets/sidegate-ca";
const REVIEWS: &str = "POST /apis/authentication.k8s.io/v1/tokenreviews";

fn bundle_path(namespace: &str) -> String {
    format!("/api/v1/namespaces/{namespace}/configmaps/sidegate-bundle")
}

/// A cluster and the CA's replicas in it.
struct Cluster {
    folder: TempDir,
    api: ApiServer,
    clock: ManualClock,
    change: fn(&mut Config),
}

impl Cluster {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: fn(&mut Config)) -> Self {
        let api = ApiServer::new();
        namespace(&api, "sidegate-system", false);
        Self {
            folder: tempfile::tempdir().unwrap(),
            api,
            clock: ManualClock::new(SystemTime::UNIX_EPOCH + Duration::from_hours(500_000)),
            change,
        }
    }

    fn config(&self, replica: &str) -> Config {
        let mut config = Config::new(self.folder.path().join(replica));
        config.trust_domain = "cluster.local".parse().unwrap();
        config.address = "127.0.0.1:0".parse().unwrap();
        config.metrics_address = "127.0.0.1:0".parse().unwrap();
        config.kubernetes = Some(Kubernetes::default());
        (self.change)(&mut config);
        config
    }

    async fn try_start(&self, replica: &str) -> Result<RunningCa, StartError> {
        let clock = Arc::new(self.clock.clone());
        Ca::start_in_cluster(self.config(replica), clock, self.api.client()).await
    }

    async fn start(&self, replica: &str) -> RunningCa {
        self.try_start(replica).await.unwrap()
    }

    fn bundle(&self) -> Vec<u8> {
        let bundle = self.api.get(&bundle_path("sidegate-system")).unwrap();
        bundle["data"]["root.pem"].as_str().unwrap().into()
    }

    fn verifier(&self) -> Arc<Verifier> {
        let bundles = BundleSet::from_pem(&"cluster.local".parse().unwrap(), &self.bundle());
        let trust = Trust::from_bundles(bundles.unwrap());
        Arc::new(Verifier::from_trust(trust, VerifyLimits::default()))
    }

    fn client(&self, ca: &RunningCa, evidence: Evidence) -> CaClient {
        let trust_domain = "cluster.local".parse().unwrap();
        let config = CaClientConfig::new(&trust_domain, ca.address().to_string(), evidence);
        CaClient::new(
            config.unwrap(),
            crypto_provider(),
            Arc::new(self.clock.clone()),
        )
    }

    async fn ask(
        &self,
        ca: &RunningCa,
        token: &str,
        csr: &[u8],
    ) -> Result<Vec<CertificateDer<'static>>, IssueError> {
        let file = tempfile::NamedTempFile::new_in(self.folder.path()).unwrap();
        std::fs::write(file.path(), token).unwrap();
        let path = file.path().to_owned();
        let request = IssueRequest {
            csr: csr.to_vec(),
            current: None,
            verifier: self.verifier(),
        };
        let client = self.client(ca, Evidence::ServiceAccountToken(path));
        client.issue(request).await
    }

    async fn issue(&self, ca: &RunningCa, token: &str) -> Vec<CertificateDer<'static>> {
        self.ask(ca, token, &Key::new().csr).await.unwrap()
    }

    /// A pod that runs, and its token.
    fn pod(&self, namespace: &str, service_account: &str, name: &str) -> String {
        let base = format!("/api/v1/namespaces/{namespace}");
        let account = json!({
            "metadata": { "name": service_account, "namespace": namespace, "uid": format!("uid-of-{service_account}") },
        });
        self.api.put(
            &format!("{base}/serviceaccounts/{service_account}"),
            account,
        );
        self.api.put(&format!("{base}/pods/{name}"), json!({
            "metadata": { "name": name, "namespace": namespace, "uid": format!("uid-of-{name}") },
            "spec": { "serviceAccountName": service_account, "nodeName": "node1", "containers": [] },
            "status": { "phase": "Running", "podIPs": [{ "ip": "127.0.0.1" }] },
        }));
        let token = self.token(&json!(["sidegate-ca"]), Duration::from_mins(10));
        let token = format!("{token}{}", URL_SAFE_NO_PAD.encode(name));
        self.api.review(
            &token,
            json!({
                "authenticated": true,
                "audiences": ["sidegate-ca"],
                "user": {
                    "username": format!("system:serviceaccount:{namespace}:{service_account}"),
                    "uid": format!("uid-of-{service_account}"),
                    "extra": {
                        "authentication.kubernetes.io/pod-name": [name],
                        "authentication.kubernetes.io/pod-uid": [format!("uid-of-{name}")],
                        "authentication.kubernetes.io/node-name": ["node1"],
                    },
                },
            }),
        );
        token
    }

    fn token(&self, audiences: &Value, life: Duration) -> String {
        let end = self.clock.now() + life;
        let end = end
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap()
            .as_secs();
        let payload = json!({ "aud": audiences, "exp": end });
        format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(payload.to_string()))
    }

    /// Lets much time pass at once, and waits until the replicas have renewed what is their own.
    async fn pass(&self, by: Duration, replicas: &[&RunningCa]) {
        self.clock.advance(by);
        for ca in replicas {
            self.until("a replica renews its own certificate", || async {
                page(ca, "/readyz").await.starts_with("HTTP/1.1 200")
            })
            .await;
        }
    }

    /// Lets time pass until `done`: replicas look for news as it does.
    async fn until<F: Future<Output = bool>>(&self, what: &str, mut done: impl FnMut() -> F) {
        until(what, || {
            self.clock.advance(Duration::from_millis(500));
            done()
        })
        .await;
    }
}

fn namespace(api: &ApiServer, name: &str, labelled: bool) {
    let labels = if labelled {
        json!({ "sidegate.dev/inject": "enabled" })
    } else {
        json!({})
    };
    let object = json!({ "metadata": { "name": name, "labels": labels } });
    api.put(&format!("/api/v1/namespaces/{name}"), object);
}

fn change(api: &ApiServer, path: &str, pointer: &str, value: Value) {
    let mut object = api.get(path).unwrap();
    let names = pointer.split('/').skip(1);
    *names.fold(&mut object, |place, name| &mut place[name]) = value;
    api.put(path, object);
}

fn workload(service_account: &str) -> SpiffeId {
    let id = format!("spiffe://cluster.local/ns/shop/sa/{service_account}");
    id.parse().unwrap()
}

fn serial(chain: &[CertificateDer<'_>]) -> String {
    use x509_parser::prelude::FromDer;
    let (_, leaf) = x509_parser::certificate::X509Certificate::from_der(&chain[0]).unwrap();
    let serial = leaf.tbs_certificate.raw_serial();
    serial
        .iter()
        .fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}

#[tokio::test]
async fn a_pod_gets_the_identity_of_its_service_account() {
    let cluster = Cluster::new();
    let ca = cluster.start("a").await;
    let token = cluster.pod("shop", "web", "web-1");
    let chain = cluster.issue(&ca, &token).await;
    let verifier = cluster.verifier();
    let peer = verifier.verify(&chain, cluster.clock.now(), Some(&workload("web")));
    assert_eq!(peer.unwrap().id, workload("web"));
    let ledger = std::fs::read_to_string(cluster.folder.path().join("a/ledger")).unwrap();
    assert!(ledger.contains("pod:uid-of-web-1/web-1@node1"), "{ledger}");
    assert!(!ledger.contains(&token), "a token is never written down");
    assert_eq!(
        cluster
            .api
            .requests("GET /api/v1/namespaces/shop/pods/web-1"),
        1
    );
    // Every time anew: the pod is read again for the next certificate.
    cluster.issue(&ca, &token).await;
    assert_eq!(
        cluster
            .api
            .requests("GET /api/v1/namespaces/shop/pods/web-1"),
        2
    );
}

#[tokio::test]
async fn what_is_not_worth_a_review_is_not_reviewed() {
    let cluster = Cluster::new();
    let ca = cluster.start("a").await;
    let api = cluster.token(
        &json!(["https://kubernetes.default.svc"]),
        Duration::from_mins(10),
    );
    let late = cluster.token(&json!(["sidegate-ca"]), Duration::ZERO);
    let legacy = format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(r#"{"sub":"x"}"#));
    for (token, words) in [
        (api.as_str(), "audience: sidegate-ca"),
        (&late, "expired"),
        (&legacy, "from a Secret"),
        ("nonsense", "mount a projected one"),
        (&format!("{api}{}", "A".repeat(10_000)), "bytes"),
    ] {
        let refused = cluster.ask(&ca, token, &Key::new().csr).await;
        check_refused(refused, "UNAUTHENTICATED", words);
    }
    assert_eq!(cluster.api.requests(REVIEWS), 0);
    let forged = cluster.token(&json!(["sidegate-ca"]), Duration::from_mins(10));
    let refused = cluster.ask(&ca, &forged, &Key::new().csr).await;
    check_refused(refused, "UNAUTHENTICATED", "does not accept the token");
    assert_eq!(cluster.api.requests(REVIEWS), 1);
}

#[tokio::test]
async fn a_pod_that_is_not_live_or_not_the_same_gets_nothing() {
    let cluster = Cluster::new();
    let ca = cluster.start("a").await;
    let pod = "/api/v1/namespaces/shop/pods/web-1";
    let account = "/api/v1/namespaces/shop/serviceaccounts/web";
    let refused = |token: String, code: &'static str, words: &'static str| {
        let (cluster, ca) = (&cluster, &ca);
        async move {
            let refused = cluster.ask(ca, &token, &Key::new().csr).await;
            check_refused(refused, code, words);
        }
    };
    let token = || cluster.pod("shop", "web", "web-1");
    let gone = token();
    cluster.api.delete(pod);
    refused(gone, "UNAUTHENTICATED", "shop/web-1 is gone").await;
    let again = token();
    change(&cluster.api, pod, "/metadata/uid", json!("another"));
    refused(again, "UNAUTHENTICATED", "another one has its name").await;
    let ending = token();
    let when = json!("2026-01-01T00:00:00Z");
    change(&cluster.api, pod, "/metadata/deletionTimestamp", when);
    refused(ending, "PERMISSION_DENIED", "being deleted").await;
    let elsewhere = token();
    let other = json!([{ "ip": "10.1.2.3" }]);
    change(&cluster.api, pod, "/status/podIPs", other);
    refused(elsewhere, "UNAUTHENTICATED", "came from 127.0.0.1").await;
    let recreated = token();
    change(&cluster.api, account, "/metadata/uid", json!("new"));
    refused(recreated, "UNAUTHENTICATED", "made again").await;
    let lost = token();
    cluster.api.delete(account);
    refused(lost, "UNAUTHENTICATED", "service account is gone").await;
    let metrics = metrics(&ca).await;
    for reason in [
        "pod_gone",
        "pod_replaced",
        "pod_terminating",
        "source_address",
        "service_account_replaced",
        "service_account_gone",
    ] {
        let counted = format!("sidegate_ca_refusals_total{{reason=\"{reason}\"}} 1");
        assert!(metrics.contains(&counted), "{counted}\n{metrics}");
    }
}

async fn metrics(ca: &RunningCa) -> String {
    page(ca, "/metrics").await
}

/// As [`metrics`], without holding on to the CA.
fn metrics_of(ca: &RunningCa) -> impl Future<Output = String> + use<> {
    page_at(ca.metrics_address(), "/metrics")
}

async fn page(ca: &RunningCa, path: &str) -> String {
    page_at(ca.metrics_address(), path.to_owned()).await
}

async fn page_at(address: SocketAddr, path: impl std::fmt::Display) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: ca\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

#[tokio::test]
async fn where_the_network_hides_addresses_they_are_not_asked_for() {
    let hidden = |config: &mut Config| {
        config.kubernetes.as_mut().unwrap().check_source_address = false;
    };
    let cluster = Cluster::with(hidden);
    let ca = cluster.start("a").await;
    let token = cluster.pod("shop", "web", "web-1");
    let pod = "/api/v1/namespaces/shop/pods/web-1";
    let other = json!([{ "ip": "10.1.2.3" }]);
    change(&cluster.api, pod, "/status/podIPs", other);
    cluster.issue(&ca, &token).await;
}

#[tokio::test]
async fn join_tokens_and_current_svids_prove_nothing_in_a_cluster() {
    let cluster = Cluster::new();
    let ca = cluster.start("a").await;
    let key = Key::new();
    let token = cluster.pod("shop", "web", "web-1");
    let chain = cluster.ask(&ca, &token, &key.csr).await.unwrap();
    let svid = key.svid(chain, &workload("web"));
    for (evidence, current) in [
        (Evidence::JoinToken(JoinToken::new("sgt_1_2")), None),
        (Evidence::None, Some(svid)),
    ] {
        let request = IssueRequest {
            csr: Key::new().csr,
            current,
            verifier: cluster.verifier(),
        };
        let answer = cluster.client(&ca, evidence).issue(request).await;
        check_refused(answer, "INVALID_ARGUMENT", "only the service account token");
    }
    let refused = ca
        .create_token("shop", "web")
        .await
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("never evidence") && refused.contains("label"),
        "{refused}"
    );
}

#[tokio::test]
async fn a_key_is_certified_for_one_pod_only_and_never_longer() {
    let cluster = Cluster::new();
    let ca = cluster.start("a").await;
    let (first, second) = (
        cluster.pod("shop", "web", "web-1"),
        cluster.pod("shop", "web", "web-2"),
    );
    let key = Key::new();
    let once = cluster.ask(&ca, &first, &key.csr).await.unwrap();
    let stolen = cluster.ask(&ca, &second, &key.csr).await;
    check_refused(stolen, "INVALID_ARGUMENT", "new key");
    cluster.clock.advance(Duration::from_mins(1));
    let again = cluster.ask(&ca, &first, &key.csr).await.unwrap();
    let end = |chain: &[CertificateDer<'static>]| {
        let verified = cluster.verifier().verify(chain, cluster.clock.now(), None);
        verified.unwrap().not_after
    };
    assert_eq!(
        end(&once),
        end(&again),
        "an answer that was lost is repeated, not prolonged"
    );
}

#[tokio::test]
async fn a_pod_and_an_address_have_limits_of_their_own() {
    let few = |config: &mut Config| {
        config.limits.issuances_per_pod_per_minute = 2;
        config.limits.tokens_per_address_per_minute = 5;
    };
    let cluster = Cluster::with(few);
    let ca = cluster.start("a").await;
    let first = cluster.pod("shop", "web", "web-1");
    cluster.issue(&ca, &first).await;
    cluster.issue(&ca, &first).await;
    let third = cluster.ask(&ca, &first, &Key::new().csr).await;
    check_refused(third, "RESOURCE_EXHAUSTED", "pod shop/web-1; try again");
    let second = cluster.pod("shop", "web", "web-2");
    cluster.issue(&ca, &second).await;
    cluster.issue(&ca, &second).await;
    let reviewed = cluster.api.requests(REVIEWS);
    let sixth = cluster.ask(&ca, &second, &Key::new().csr).await;
    check_refused(sixth, "RESOURCE_EXHAUSTED", "from 127.0.0.1; try again");
    assert_eq!(cluster.api.requests(REVIEWS), reviewed, "before any review");
}

#[tokio::test]
async fn as_many_tokens_are_reviewed_and_wait_as_may() {
    let few = |config: &mut Config| {
        config.limits.reviews_max = 1;
        config.limits.reviews_waiting_max = 1;
    };
    let cluster = Cluster::with(few);
    let ca = cluster.start("a").await;
    let token = cluster.pod("shop", "web", "web-1");
    cluster.api.set_stalled(true);
    let is_busy = async || {
        let key = Key::new();
        let asked = cluster.ask(&ca, &token, &key.csr);
        let asked = tokio::time::timeout(Duration::from_secs(1), asked).await;
        matches!(asked, Ok(Err(error)) if error.to_string().contains("being reviewed"))
    };
    // One is reviewed, one waits, and one is sent away.
    until("one of three is sent away", || async {
        let asked = tokio::join!(is_busy(), is_busy(), is_busy());
        asked.0 || asked.1 || asked.2
    })
    .await;
    cluster.api.set_stalled(false);
    cluster.issue(&ca, &token).await;
    assert!(metrics(&ca).await.contains("reason=\"reviews_max\""));
}

#[tokio::test]
async fn the_control_plane_is_attested_like_any_pod_and_only_the_injector_has_dns_names() {
    let cluster = Cluster::new();
    let ca = cluster.start("a").await;
    let names = |chain: &[CertificateDer<'static>]| {
        use x509_parser::prelude::FromDer;
        let (_, leaf) = x509_parser::certificate::X509Certificate::from_der(&chain[0]).unwrap();
        let names = leaf.subject_alternative_name().unwrap().unwrap();
        let names = names.value.general_names.iter();
        names.map(ToString::to_string).collect::<Vec<String>>()
    };
    let injector = cluster.pod("sidegate-system", "sidegate-injector", "injector-1");
    let chain = cluster.issue(&ca, &injector).await;
    let id = "spiffe://cluster.local/ns/sidegate-system/sa/sidegate-injector";
    let expected = [
        format!("URI({id})"),
        "DNSName(sidegate-injector.sidegate-system.svc)".to_owned(),
        "DNSName(sidegate-injector.sidegate-system.svc.cluster.local)".to_owned(),
    ];
    assert_eq!(names(&chain), expected);
    // And whoever verifies peers takes it.
    let now = cluster.clock.now();
    cluster
        .verifier()
        .verify(&chain, now, Some(&id.parse().unwrap()))
        .unwrap();
    for (namespace, account) in [
        ("sidegate-system", "sidegate-controller"),
        ("shop", "sidegate-injector"),
    ] {
        let token = cluster.pod(namespace, account, "pod-1");
        let chain = cluster.issue(&ca, &token).await;
        assert_eq!(names(&chain).len(), 1, "{namespace}/{account}");
    }
    let own = cluster.pod("sidegate-system", "sidegate-ca", "ca-1");
    let refused = cluster.ask(&ca, &own, &Key::new().csr).await;
    check_refused(refused, "PERMISSION_DENIED", "own identity");
}

#[tokio::test]
async fn two_replicas_that_start_at_once_make_one_root_and_both_sign() {
    let cluster = Cluster::new();
    let (a, b) = tokio::join!(cluster.try_start("a"), cluster.try_start("b"));
    let (a, b) = (a.unwrap(), b.unwrap());
    assert_eq!(
        cluster
            .api
            .requests("POST /api/v1/namespaces/sidegate-system/secrets"),
        2
    );
    let token = cluster.pod("shop", "web", "web-1");
    let mut serials = std::collections::BTreeSet::new();
    let mut intermediates = std::collections::BTreeSet::new();
    let verifier = cluster.verifier();
    for _ in 0..5 {
        let (one, other) = tokio::join!(cluster.issue(&a, &token), cluster.issue(&b, &token));
        for chain in [one, other] {
            verifier.verify(&chain, cluster.clock.now(), None).unwrap();
            serials.insert(serial(&chain));
            intermediates.insert(chain[1].to_vec());
        }
    }
    assert_eq!((serials.len(), intermediates.len()), (10, 1));
}

#[tokio::test]
async fn a_replica_that_starts_again_without_its_volume_has_the_same_root() {
    let cluster = Cluster::new();
    cluster.start("a").await.shutdown().await;
    let bundle = cluster.bundle();
    let secret = cluster.api.get(SECRET).unwrap();
    let again = cluster.start("fresh").await;
    assert_eq!(cluster.bundle(), bundle);
    assert_eq!(
        cluster.api.get(SECRET).unwrap(),
        secret,
        "nothing is made anew"
    );
    again.shutdown().await;
}

#[tokio::test]
async fn without_its_secret_an_installation_that_has_begun_gets_no_new_root() {
    let cluster = Cluster::new();
    let ca = cluster.start("a").await;
    let token = cluster.pod("shop", "web", "web-1");
    let backup = cluster.api.delete(SECRET);
    // A running replica goes on, and makes nothing.
    cluster
        .until("it is seen", || async {
            metrics(&ca).await.contains("keys_behind 1")
        })
        .await;
    cluster.issue(&ca, &token).await;
    let refused = ca.issuer().revoke_identity(workload("web").as_str()).await;
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("restore the Secret"), "{refused}");
    ca.shutdown().await;
    // The bundle says that it has begun; without it, the replica's own ledger does.
    let error = cluster.try_start("b").await.err().unwrap().to_string();
    assert!(
        error.contains("ConfigMap sidegate-system/sidegate-bundle"),
        "{error}"
    );
    assert!(
        error.contains("restore the Secret from a backup"),
        "{error}"
    );
    cluster.api.delete(&bundle_path("sidegate-system"));
    let error = cluster.try_start("a").await.err().unwrap().to_string();
    assert!(error.contains("a/ledger"), "{error}");
    assert!(cluster.api.get(SECRET).is_none(), "no new root");
    cluster.api.put(SECRET, backup);
    let ca = cluster.start("a").await;
    cluster.issue(&ca, &token).await;
}

#[tokio::test]
async fn a_damaged_secret_is_refused_as_a_whole() {
    let cluster = Cluster::new();
    cluster.start("a").await.shutdown().await;
    let other = Cluster::new();
    other.start("a").await.shutdown().await;
    let foreign = other.api.get(SECRET).unwrap();
    let whole = cluster.api.get(SECRET).unwrap();
    let text = |text: &str| json!(STANDARD.encode(text));
    let cases: Vec<(&str, Value, &str)> = vec![
        ("root.key", Value::Null, "root.key: it is missing"),
        ("root.key", text("nonsense"), "root.key: not a P-256"),
        (
            "root.key",
            foreign["data"]["root.key"].clone(),
            "not the key of the active root",
        ),
        (
            "root.pem",
            foreign["data"]["root.pem"].clone(),
            "not those that state.json names",
        ),
        ("state.json", Value::Null, "state.json: it is missing"),
        ("state.json", text("{}"), "state.json: missing field"),
        (
            "intermediate.key",
            Value::Null,
            "intermediate.key: it is missing",
        ),
        (
            "intermediate.pem",
            foreign["data"]["intermediate.pem"].clone(),
            "intermediate.pem: ",
        ),
        (
            "root-old.key",
            whole["data"]["root.key"].clone(),
            "no root has such a key",
        ),
        ("extra", text("x"), "extra: a CA knows no such key"),
    ];
    for (key, value, words) in cases {
        let mut secret = whole.clone();
        if value.is_null() {
            secret["data"].as_object_mut().unwrap().remove(key);
        } else {
            secret["data"][key] = value;
        }
        cluster.api.put(SECRET, secret);
        let error = cluster.try_start("b").await.err().unwrap().to_string();
        assert!(error.contains(words), "{key}: {error}");
        assert!(error.contains("restore the Secret"), "{key}: {error}");
    }
    let elsewhere = |config: &mut Config| config.trust_domain = "other.local".parse().unwrap();
    let stranger = Cluster {
        change: elsewhere,
        ..cluster
    };
    stranger.api.put(SECRET, whole);
    let error = stranger.try_start("c").await.err().unwrap().to_string();
    assert!(error.contains("cluster.local's"), "{error}");
}

#[tokio::test]
async fn a_running_replica_never_takes_in_another_cas_keys() {
    let cluster = Cluster::new();
    let ca = cluster.start("a").await;
    let other = Cluster::new();
    other.start("a").await.shutdown().await;
    let bundle = cluster.bundle();
    cluster.api.put(SECRET, other.api.get(SECRET).unwrap());
    cluster
        .until("it is refused", || async {
            metrics(&ca).await.contains("keys_behind 1")
        })
        .await;
    let refused = ca.issuer().prepare_root().await.unwrap_err().to_string();
    assert!(refused.contains("another CA"), "{refused}");
    assert_eq!(cluster.bundle(), bundle);
    let token = cluster.pod("shop", "web", "web-1");
    cluster.issue(&ca, &token).await;
}

#[tokio::test]
async fn a_revocation_is_in_effect_through_every_replica_and_after_a_restart() {
    let cluster = Cluster::new();
    let (a, b) = (cluster.start("a").await, cluster.start("b").await);
    let token = cluster.pod("shop", "web", "web-1");
    let chain = cluster.issue(&a, &token).await;
    // A sidecar that hears of it through the other replica.
    let watch = BundleWatch {
        current: None,
        verifier: cluster.verifier(),
        acknowledgement: Acknowledgement::default(),
    };
    let mut stream = cluster
        .client(&b, Evidence::None)
        .watch_bundle(watch)
        .await
        .unwrap();
    let first = next(&mut stream).await;
    let sequence = a
        .issuer()
        .revoke_identity(workload("web").as_str())
        .await
        .unwrap();
    assert!(sequence > first.sequence());
    let until_heard = async {
        let second = next(&mut stream).await;
        assert_eq!(second.sequence(), sequence);
        let trust = second.check(&"cluster.local".parse().unwrap()).unwrap();
        let verifier = Verifier::from_trust(trust, VerifyLimits::default());
        let refused = verifier
            .verify(&chain, cluster.clock.now(), None)
            .unwrap_err();
        assert_eq!(refused.code(), "revoked");
    };
    let time_passes = async {
        loop {
            cluster.clock.advance(Duration::from_millis(500));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        () = until_heard => {}
        () = time_passes => {}
    }
    let refused = cluster.ask(&b, &token, &Key::new().csr).await;
    check_refused(refused, "PERMISSION_DENIED", "revoked");
    // A serial number of the other replica's, and a restart of both.
    let other = cluster.pod("shop", "orders", "orders-1");
    let chain = cluster.issue(&a, &other).await;
    let later = b.issuer().revoke_serial(&serial(&chain)).await.unwrap();
    assert!(later > sequence, "the sequence rises across replicas");
    a.shutdown().await;
    b.shutdown().await;
    let fresh = cluster.start("fresh").await;
    let refused = cluster.ask(&fresh, &token, &Key::new().csr).await;
    check_refused(refused, "PERMISSION_DENIED", "revoked");
    let last = fresh
        .issuer()
        .revoke_identity(workload("orders").as_str())
        .await
        .unwrap();
    assert!(last > later, "and across restarts");
    let early = fresh
        .issuer()
        .reinstate(workload("web").as_str())
        .await
        .unwrap_err();
    assert!(
        early.to_string().contains("may be in date until"),
        "{early}"
    );
    cluster.pass(Duration::from_hours(25), &[&fresh]).await;
    fresh
        .issuer()
        .reinstate(workload("web").as_str())
        .await
        .unwrap();
    let token = cluster.pod("shop", "web", "web-1");
    cluster.issue(&fresh, &token).await;
}

#[tokio::test]
async fn a_secret_restored_from_a_backup_is_published_under_a_higher_number() {
    let cluster = Cluster::new();
    let (a, b) = (cluster.start("a").await, cluster.start("b").await);
    let backup = cluster.api.get(SECRET).unwrap();
    cluster.clock.advance(Duration::from_secs(10));
    let id = workload("web");
    let sequence = a.issuer().revoke_identity(id.as_str()).await.unwrap();
    let shows = |ca: &RunningCa, what: String| {
        let page = metrics_of(ca);
        async move { page.await.contains(&what) }
    };
    let now = format!("sidegate_ca_bundle_sequence {sequence}");
    cluster.until("b has it", || shows(&b, now.clone())).await;
    cluster.api.put(SECRET, backup);
    // What was revoked since is not any more, and every sidecar hears of it.
    cluster
        .until("nothing is revoked in either", || async {
            let none = || "sidegate_ca_revocations 0".to_owned();
            shows(&a, none()).await && shows(&b, none()).await
        })
        .await;
    let text = metrics(&a).await;
    let line = text
        .lines()
        .find(|line| line.starts_with("sidegate_ca_bundle_sequence "));
    let published: u64 = line.unwrap().rsplit(' ').next().unwrap().parse().unwrap();
    assert!(published > sequence, "{published} after {sequence}");
    let token = cluster.pod("shop", "web", "web-1");
    cluster.issue(&a, &token).await;
}

#[tokio::test]
async fn of_changes_through_two_replicas_at_once_none_is_lost() {
    let cluster = Cluster::new();
    let (a, b) = (cluster.start("a").await, cluster.start("b").await);
    let name = |n: usize| format!("spiffe://cluster.local/ns/shop/sa/w{n}");
    let revoke = |ca: &RunningCa, n: usize| {
        let issuer = Arc::clone(ca.issuer());
        async move { issuer.revoke_identity(&name(n)).await.unwrap() }
    };
    let mut sequences = std::collections::BTreeSet::new();
    for n in 0..10 {
        let (one, other) = tokio::join!(revoke(&a, 2 * n), revoke(&b, 2 * n + 1));
        sequences.extend([one, other]);
    }
    assert_eq!(sequences.len(), 20, "no number is used twice");
    let secret = cluster.api.get(SECRET).unwrap();
    let state = STANDARD
        .decode(secret["data"]["state.json"].as_str().unwrap())
        .unwrap();
    let state: Value = serde_json::from_slice(&state).unwrap();
    assert_eq!(state["revokedIdentities"].as_object().unwrap().len(), 20);
}

#[tokio::test]
async fn the_intermediate_is_renewed_once_for_all_replicas() {
    let cluster = Cluster::new();
    let (a, b) = (cluster.start("a").await, cluster.start("b").await);
    let before = cluster
        .issue(&a, &cluster.pod("shop", "web", "web-1"))
        .await[1]
        .clone();
    cluster.pass(Duration::from_hours(16 * 24), &[&a, &b]).await;
    let renewed = async |ca: &RunningCa| {
        let token = cluster.pod("shop", "web", "web-1");
        let chain = cluster.ask(ca, &token, &Key::new().csr).await;
        chain
            .ok()
            .map(|chain| chain[1].clone())
            .filter(|now| *now != before)
    };
    cluster
        .until("both have renewed", || async {
            let (one, other) = (renewed(&a).await, renewed(&b).await);
            one.is_some() && one == other
        })
        .await;
    let secret = cluster.api.get(SECRET).unwrap();
    let pem = STANDARD
        .decode(secret["data"]["intermediate.pem"].as_str().unwrap())
        .unwrap();
    let pem = String::from_utf8(pem).unwrap();
    assert_eq!(pem.matches("BEGIN CERTIFICATE").count(), 1);
}

#[tokio::test]
async fn the_bundle_is_where_the_label_is_repaired_there_and_nowhere_else_touched() {
    let cluster = Cluster::new();
    namespace(&cluster.api, "plain", false);
    let strangers = json!({ "metadata": { "name": "sidegate-bundle", "namespace": "plain" }, "data": { "root.pem": "mine" } });
    cluster.api.put(&bundle_path("plain"), strangers);
    namespace(&cluster.api, "early", true);
    let ca = cluster.start("a").await;
    let is = |namespace: &'static str, pem: Option<Vec<u8>>| {
        let api = cluster.api.clone();
        move || {
            let found = api.get(&bundle_path(namespace));
            let found = found.map(|f| {
                f["data"]["root.pem"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned()
            });
            let pem = pem.clone();
            async move { found.map(String::into_bytes) == pem }
        }
    };
    let good = cluster.bundle();
    cluster
        .until("early has it", is("early", Some(good.clone())))
        .await;
    namespace(&cluster.api, "shop", true);
    cluster
        .until("shop has it", is("shop", Some(good.clone())))
        .await;
    change(
        &cluster.api,
        &bundle_path("shop"),
        "/data/root.pem",
        json!("forged"),
    );
    cluster
        .until("it is repaired", is("shop", Some(good.clone())))
        .await;
    cluster.api.delete(&bundle_path("shop"));
    cluster
        .until("it is made again", is("shop", Some(good.clone())))
        .await;
    cluster.api.delete(&bundle_path("sidegate-system"));
    cluster
        .until("also here", is("sidegate-system", Some(good.clone())))
        .await;
    // The label goes: what is there stays, and stays true, but is not made again.
    namespace(&cluster.api, "shop", false);
    let issuer = ca.issuer();
    issuer.prepare_root().await.unwrap();
    cluster
        .until("two roots everywhere", || async {
            let two = |namespace: &str| {
                let bundle = cluster.api.get(&bundle_path(namespace)).unwrap();
                let pem = bundle["data"]["root.pem"].as_str().unwrap().to_owned();
                pem.matches("BEGIN").count() == 2
            };
            two("shop") && two("early") && two("sidegate-system")
        })
        .await;
    cluster.api.delete(&bundle_path("shop"));
    namespace(&cluster.api, "witness", true);
    let all = cluster.bundle();
    cluster
        .until("a later one is served", is("witness", Some(all)))
        .await;
    assert!(cluster.api.get(&bundle_path("shop")).is_none());
    let plain = cluster.api.get(&bundle_path("plain")).unwrap();
    assert_eq!(plain["data"]["root.pem"], "mine");
    let metrics = metrics(&ca).await;
    assert!(
        metrics.contains("sidegate_ca_bundle_namespaces 3"),
        "{metrics}"
    );
    assert!(
        metrics.contains("bundle_writes_total{result=\"ok\"}"),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_root_is_changed_for_all_replicas_and_waits_for_what_none_of_them_knows() {
    let cluster = Cluster::new();
    let (a, b) = (cluster.start("a").await, cluster.start("b").await);
    a.issuer().prepare_root().await.unwrap();
    let again = b.issuer().prepare_root().await.unwrap_err().to_string();
    assert!(again.contains("prepared already"), "{again}");
    let early = b
        .issuer()
        .activate_root(false)
        .await
        .unwrap_err()
        .to_string();
    assert!(early.contains("before the root was prepared"), "{early}");
    cluster.pass(Duration::from_hours(25), &[&a, &b]).await;
    b.issuer().activate_root(false).await.unwrap();
    let new = async |ca: &RunningCa| {
        let token = cluster.pod("shop", "web", "web-1");
        cluster.issue(ca, &token).await[1].clone()
    };
    let under_new = new(&b).await;
    cluster
        .until("a signs under it too", || async {
            new(&a).await == under_new
        })
        .await;
    let early = a.issuer().retire_root(false).await.unwrap_err().to_string();
    assert!(early.contains("may be in date until"), "{early}");
    cluster.pass(Duration::from_hours(25), &[&a, &b]).await;
    a.issuer().retire_root(false).await.unwrap();
    let secret = cluster.api.get(SECRET).unwrap();
    let keys: Vec<&String> = secret["data"].as_object().unwrap().keys().collect();
    let expected = [
        "intermediate.key",
        "intermediate.pem",
        "root.key",
        "root.pem",
        "state.json",
    ];
    assert_eq!(keys, expected, "the former key is deleted");
    a.shutdown().await;
    b.shutdown().await;
    cluster.start("a").await.shutdown().await;
}

#[tokio::test]
async fn it_is_ready_once_keys_are_loaded_and_waits_for_an_api_that_is_starting() {
    let cluster = Cluster::new();
    cluster.api.set_down(true);
    let start = cluster.try_start("a");
    let api = cluster.api.clone();
    let wait = async {
        cluster
            .until("it asks again", || async {
                api.requests("GET /api/v1/namespaces/sidegate-system/configmaps") >= 3
            })
            .await;
        api.set_down(false);
        loop {
            cluster.clock.advance(Duration::from_millis(500));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let ca = tokio::select! {
        started = start => started.unwrap(),
        () = wait => unreachable!(),
    };
    assert!(page(&ca, "/readyz").await.starts_with("HTTP/1.1 200"));
    // Losing the API later changes nothing for those who hold a certificate.
    cluster.api.set_down(true);
    let token = cluster.pod("shop", "web", "web-1");
    let refused = cluster.ask(&ca, &token, &Key::new().csr).await;
    check_refused(refused, "UNAVAILABLE", "does not answer");
    assert!(page(&ca, "/readyz").await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn no_key_or_token_is_in_what_a_cluster_sees_but_the_secret() {
    let cluster = Cluster::new();
    namespace(&cluster.api, "shop", true);
    let ca = cluster.start("a").await;
    let shop = bundle_path("shop");
    cluster
        .until("shop has its bundle", || {
            let found = cluster.api.get(&shop).is_some();
            async move { found }
        })
        .await;
    for namespace in ["shop", "sidegate-system"] {
        let bundle = cluster
            .api
            .get(&bundle_path(namespace))
            .unwrap()
            .to_string();
        assert!(!bundle.contains("PRIVATE"), "{bundle}");
    }
    assert!(!metrics(&ca).await.contains("PRIVATE"));
    let files = std::fs::read_dir(cluster.folder.path().join("a")).unwrap();
    let names: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    let keys = names
        .iter()
        .filter(|name| name.to_string_lossy().contains("key"));
    assert_eq!(keys.count(), 0, "{names:?}");
}
