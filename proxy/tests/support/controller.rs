//! A controller in the test's own process, which says what the test says.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;
use sidegate_api::control as proto;
use sidegate_api::control::control_server::{Control, ControlServer};
use sidegate_api::control::destination::Kind;
use sidegate_api::control::watch_request::Message;
use sidegate_mesh::SpiffeId;
use sidegate_mtls::{
    Acceptor, CredentialStore, IdentityConfig, RenewalPolicy, SystemClock, VerifyLimits,
    WorkloadIdentity, crypto_provider,
};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

use super::mesh::Mesh;

pub const CONTROLLER: &str = "spiffe://mesh.local/ns/sidegate-system/sa/sidegate-controller";

/// A controller that listens, until it is dropped.
pub struct FakeController {
    pub address: SocketAddr,
    sessions: mpsc::UnboundedReceiver<Session>,
    _tasks: JoinSet<()>,
    _stop: tokio_util::sync::DropGuard,
}

/// One stream of one sidecar.
pub struct Session {
    pub hello: proto::Hello,
    requests: Streaming<proto::WatchRequest>,
    responses: mpsc::Sender<Result<proto::WatchResponse, Status>>,
    version: u64,
}

/// Credentials of `id`, issued by the mesh's own root.
pub async fn credentials(mesh: &Mesh, id: &str, stop: &CancellationToken) -> Arc<CredentialStore> {
    let clock = Arc::new(SystemClock);
    let store = CredentialStore::new(VerifyLimits::default(), crypto_provider(), clock);
    let id: SpiffeId = id.parse().unwrap();
    let config = IdentityConfig {
        trust_domain: "mesh.local".parse().unwrap(),
        root_file: mesh.path().join("root.pem"),
        state_dir: None,
        renewal: RenewalPolicy::default(),
        id: id.clone(),
    };
    let tasks = TaskTracker::new();
    let issuer = mesh.issuer_of(id);
    WorkloadIdentity::start(config, issuer, Arc::clone(&store), &tasks, stop.clone()).unwrap();
    let mut epochs = store.subscribe();
    while store.current().is_none() {
        epochs.changed().await.unwrap();
    }
    store
}

impl FakeController {
    pub async fn start(mesh: &Mesh) -> Self {
        Self::start_at(mesh, "127.0.0.1:0".parse().unwrap()).await
    }

    pub async fn start_at(mesh: &Mesh, address: SocketAddr) -> Self {
        let stop = CancellationToken::new();
        let store = credentials(mesh, CONTROLLER, &stop).await;
        let clock = Arc::new(SystemClock);
        let acceptor = Acceptor::control_plane(store, Duration::from_secs(10), clock);
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (found, sessions) = mpsc::unbounded_channel();
        let (streams, incoming) = mpsc::channel(8);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if let Ok((stream, _)) = acceptor.accept(stream).await {
                    streams
                        .send(Ok::<_, std::io::Error>(stream))
                        .await
                        .unwrap_or_default();
                }
            }
        });
        let server = tonic::transport::Server::builder()
            .add_service(ControlServer::new(Service(found)))
            .serve_with_incoming(ReceiverStream::new(incoming));
        tasks.spawn(async move { server.await.unwrap_or_default() });
        Self {
            address,
            sessions,
            _tasks: tasks,
            _stop: stop.drop_guard(),
        }
    }

    /// The next sidecar that says hello.
    pub async fn session(&mut self) -> Session {
        self.sessions.recv().await.unwrap()
    }
}

struct Service(mpsc::UnboundedSender<Session>);

#[tonic::async_trait]
impl Control for Service {
    type WatchStream =
        Pin<Box<dyn Stream<Item = Result<proto::WatchResponse, Status>> + Send + 'static>>;

    async fn watch(
        &self,
        request: Request<Streaming<proto::WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.and_then(|first| first.message);
        let Some(Message::Hello(hello)) = first else {
            return Err(Status::invalid_argument("a stream begins with a hello"));
        };
        let (responses, stream) = mpsc::channel(64);
        let session = Session {
            hello,
            requests,
            responses,
            version: 0,
        };
        self.0.send(session).unwrap_or_default();
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

impl Session {
    pub async fn send(&mut self, response: proto::WatchResponse) {
        self.version += 1;
        let response = proto::WatchResponse {
            version: self.version,
            ..response
        };
        self.responses.send(Ok(response)).await.unwrap();
    }

    /// These resources, the facts of a pod labelled `app: orders`, and that this is all.
    pub async fn complete(&mut self, updated: Vec<proto::Resource>) {
        self.send(proto::WatchResponse {
            updated,
            workload: Some(workload("orders", "enforce")),
            complete: true,
            ..Default::default()
        })
        .await;
    }

    pub async fn tell(&mut self, destination: &str, kind: Kind) {
        self.send(proto::WatchResponse {
            destinations: vec![proto::Destination {
                destination: destination.to_owned(),
                kind: Some(kind),
            }],
            complete: true,
            ..Default::default()
        })
        .await;
    }

    pub async fn next(&mut self) -> Message {
        let next = self.requests.message().await.unwrap();
        next.unwrap().message.unwrap()
    }

    pub async fn acknowledged(&mut self) -> (String, i64, String) {
        match self.next().await {
            Message::Acknowledge(ack) => (ack.uid, ack.generation, ack.refusal),
            other => panic!("{other:?}"),
        }
    }

    pub async fn subscribed(&mut self) -> String {
        match self.next().await {
            Message::Subscribe(subscribe) => subscribe.destination,
            other => panic!("{other:?}"),
        }
    }
}

pub fn workload(app: &str, enforcement: &str) -> proto::Workload {
    proto::Workload {
        labels: [("app".to_owned(), app.to_owned())].into(),
        enforcement: enforcement.to_owned(),
        zone: "zone-a".to_owned(),
        terminating: false,
    }
}

/// An `AuthorizationPolicy` of `shop` for `app: orders` that allows GET of `path`.
pub fn policy(name: &str, uid: &str, generation: i64, path: &str) -> proto::Resource {
    policy_for("orders", name, uid, generation, path)
}

pub fn policy_for(
    app: &str,
    name: &str,
    uid: &str,
    generation: i64,
    path: &str,
) -> proto::Resource {
    let json = serde_json::json!({
        "apiVersion": "sidegate.dev/v1alpha1",
        "kind": "AuthorizationPolicy",
        "metadata": { "namespace": "shop", "name": name },
        "spec": {
            "selector": { "matchLabels": { "app": app } },
            "action": "Allow",
            "rules": [{
                "name": name,
                "from": [{ "anyone": {} }],
                "to": [{ "http": { "methods": ["GET"], "paths": [path] } }],
            }],
        },
    });
    resource("AuthorizationPolicy", name, uid, generation, &json)
}

pub fn traffic(service: &str, uid: &str, timeout: &str) -> proto::Resource {
    let json = serde_json::json!({
        "apiVersion": "sidegate.dev/v1alpha1",
        "kind": "TrafficPolicy",
        "metadata": { "namespace": "shop", "name": service },
        "spec": { "service": service, "timeout": timeout },
    });
    resource("TrafficPolicy", service, uid, 1, &json)
}

pub fn resource(
    kind: &str,
    name: &str,
    uid: &str,
    generation: i64,
    json: &serde_json::Value,
) -> proto::Resource {
    proto::Resource {
        reference: Some(reference(kind, name, uid)),
        generation,
        json: json.to_string().into_bytes(),
    }
}

pub fn reference(kind: &str, name: &str, uid: &str) -> proto::ResourceReference {
    proto::ResourceReference {
        kind: kind.to_owned(),
        namespace: "shop".to_owned(),
        name: name.to_owned(),
        uid: uid.to_owned(),
    }
}

pub fn meshed(service: &str, addresses: &[&str]) -> Kind {
    let endpoint = |address: &&str| proto::Endpoint {
        address: (*address).to_owned(),
        spiffe_id: "spiffe://mesh.local/ns/shop/sa/ledger".to_owned(),
        ..Default::default()
    };
    Kind::Meshed(proto::Meshed {
        service: service.to_owned(),
        protocol: "auto".to_owned(),
        endpoints: addresses.iter().map(endpoint).collect(),
    })
}
