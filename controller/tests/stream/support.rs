//! A controller, the objects of a small cluster, and sidecars that listen.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde_json::{Value, json};
use sidegate_api::control::control_client::ControlClient;
use sidegate_api::control::watch_request::Message;
use sidegate_api::control::{Acknowledge, Hello, Subscribe, WatchRequest, WatchResponse};
use sidegate_controller::{Config, Controller, RunningController, Surroundings, crd};
use sidegate_mesh::resource::Kind;
use sidegate_mtls::{CredentialStore, SystemClock};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::cluster::Cluster;
use crate::mesh::{Mesh, connect, controller_id, id};

pub const POLICIES: &str = "apis/sidegate.dev/v1alpha1/authorizationpolicies";
pub const TRAFFIC: &str = "apis/sidegate.dev/v1alpha1/trafficpolicies";
pub const PODS: &str = "api/v1/pods";
pub const DEFINITIONS: &str = "apis/apiextensions.k8s.io/v1/customresourcedefinitions";
pub const LEASES: &str = "apis/coordination.k8s.io/v1/leases";

pub struct Bed {
    pub mesh: Mesh,
    pub cluster: Cluster,
}

impl Bed {
    /// Namespace `shop` in the mesh, with pods `web-1` at 127.0.0.11 and `orders-1` at 127.0.0.12.
    pub fn new() -> Self {
        let bed = Self {
            mesh: Mesh::new(),
            cluster: Cluster::new(),
        };
        for crd in crd::crds() {
            bed.cluster.put(DEFINITIONS, crd);
        }
        let labels = json!({ "sidegate.dev/inject": "enabled" });
        let namespace = json!({ "metadata": { "name": "shop", "labels": labels } });
        bed.cluster.put("api/v1/namespaces", namespace);
        bed.pod("web", "127.0.0.11");
        bed.pod("orders", "127.0.0.12");
        bed
    }

    pub fn pod(&self, app: &str, address: &str) {
        self.cluster.put(PODS, pod(app, address));
    }

    /// A policy of `shop` for one app, that changes with `path`.
    pub fn policy(&self, name: &str, app: &str, path: &str) {
        self.cluster.put(POLICIES, policy(name, app, path));
    }

    pub fn config() -> Config {
        let text = "{ address: '127.0.0.1:0', metricsAddress: '127.0.0.1:0', statusInterval: 300ms,
            lease: { duration: 1200ms, interval: 100ms }, drainTimeout: 10s, limits: { helloTimeout: 3s } }";
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("controller.yaml");
        std::fs::write(&path, text).unwrap();
        Config::load(&path).unwrap()
    }

    pub fn surroundings(&self, name: &str) -> Surroundings {
        Surroundings {
            client: self.cluster.client(),
            name: name.to_owned(),
            address: None,
            clock: Arc::new(SystemClock),
        }
    }

    pub async fn start(&self, name: &str) -> RunningController {
        let store = self.mesh.store(&controller_id());
        Controller::start_as(Self::config(), self.surroundings(name), store)
            .await
            .unwrap()
    }

    /// The sidecar of a pod, after its hello.
    pub async fn sidecar(&self, app: &str, address: SocketAddr) -> Sidecar {
        let source = source_of(app);
        let store = self.mesh.store(&id("shop", app));
        Sidecar::hello(&store, source, address, app).await.unwrap()
    }
}

pub fn source_of(app: &str) -> IpAddr {
    let address = if app == "orders" {
        "127.0.0.12"
    } else {
        "127.0.0.11"
    };
    address.parse().unwrap()
}

pub fn pod(app: &str, address: &str) -> Value {
    json!({
        "metadata": {
            "namespace": "shop", "name": format!("{app}-1"), "uid": format!("uid-{app}-1"),
            "labels": { "app": app }, "annotations": { "sidegate.dev/injected": "0.1.0" },
        },
        "spec": {
            "serviceAccountName": app,
            "containers": [{ "name": "app" }],
            "initContainers": [{ "name": "sidegate-proxy", "restartPolicy": "Always" }],
        },
        "status": { "phase": "Running", "podIP": address, "podIPs": [{ "ip": address }] },
    })
}

pub fn policy(name: &str, app: &str, path: &str) -> Value {
    json!({
        "apiVersion": "sidegate.dev/v1alpha1", "kind": Kind::AuthorizationPolicy.as_str(),
        "metadata": { "namespace": "shop", "name": name },
        "spec": {
            "selector": { "matchLabels": { "app": app } }, "action": "Allow",
            "rules": [{ "from": [{ "anyone": {} }], "to": [{ "http": { "methods": ["GET"], "paths": [path] } }] }],
        },
    })
}

/// A sidecar's end of the stream.
pub struct Sidecar {
    requests: mpsc::Sender<WatchRequest>,
    answers: Streaming<WatchResponse>,
}

impl Sidecar {
    pub async fn hello(
        store: &Arc<CredentialStore>,
        source: IpAddr,
        address: SocketAddr,
        app: &str,
    ) -> Result<Self, Status> {
        let hello = Hello {
            version: "test".to_owned(),
            pod: format!("{app}-1"),
            pod_uid: format!("uid-{app}-1"),
        };
        Self::begin(store, source, address, Message::Hello(hello)).await
    }

    pub async fn begin(
        store: &Arc<CredentialStore>,
        source: IpAddr,
        address: SocketAddr,
        first: Message,
    ) -> Result<Self, Status> {
        let channel = connect(store, source, address)
            .await
            .map_err(|error| Status::internal(error.to_string()))?;
        let (requests, receiver) = mpsc::channel(16);
        requests
            .send(WatchRequest {
                message: Some(first),
            })
            .await
            .unwrap();
        let answers = ControlClient::new(channel)
            .watch(ReceiverStream::new(receiver))
            .await?;
        Ok(Self {
            requests,
            answers: answers.into_inner(),
        })
    }

    pub async fn say(&self, message: Message) {
        self.requests
            .send(WatchRequest {
                message: Some(message),
            })
            .await
            .unwrap();
    }

    pub async fn subscribe(&self, destination: &str) {
        self.say(Message::Subscribe(Subscribe {
            destination: destination.to_owned(),
        }))
        .await;
    }

    pub async fn acknowledge(&self, uid: &str, generation: i64, refusal: &str) {
        let said = Acknowledge {
            uid: uid.to_owned(),
            generation,
            refusal: refusal.to_owned(),
        };
        self.say(Message::Acknowledge(said)).await;
    }

    pub async fn next(&mut self) -> Result<Option<WatchResponse>, Status> {
        let waited = tokio::time::timeout(crate::PATIENCE, self.answers.message()).await;
        waited.expect("an answer in time")
    }

    pub async fn answer(&mut self) -> WatchResponse {
        self.next().await.unwrap().expect("the stream goes on")
    }

    /// Whether nothing was said so far.
    pub async fn is_silent(&mut self) -> bool {
        tokio::select! {
            biased;
            _ = self.answers.message() => false,
            () = tokio::task::yield_now() => true,
        }
    }

    /// How the stream ends.
    pub async fn end(&mut self) -> Result<(), Status> {
        while self.next().await?.is_some() {}
        Ok(())
    }
}

pub fn updates(response: &WatchResponse) -> Vec<String> {
    let updated = response.updated.iter();
    updated
        .map(|one| {
            format!(
                "{}@{}",
                one.reference.as_ref().unwrap().name,
                one.generation
            )
        })
        .chain(response.removed.iter().map(|one| format!("-{}", one.name)))
        .collect()
}

/// A request of the health port.
pub async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let status = text.split(' ').nth(1).unwrap().parse().unwrap();
    (status, text)
}

/// Waits until the metrics say this.
pub async fn metrics_say(address: SocketAddr, words: &str) {
    let waiting = async {
        while !get(address, "/metrics").await.1.contains(words) {
            tokio::task::yield_now().await;
        }
    };
    let waited = tokio::time::timeout(crate::PATIENCE, waiting).await;
    waited.unwrap_or_else(|_| panic!("the metrics never said: {words}"));
}
