//! The CA's client against a real gRPC server over TCP and TLS.
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
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use ca::{Authority, bundle_message, id, leaf_params, start, trust_domain, trust_of};
use rcgen::{PublicKeyData as _, SerialNumber};
use sidegate_api::identity as proto;
use sidegate_api::identity::identity_server::{Identity, IdentityServer};
use sidegate_api::identity::issue_svid_request::Evidence as EvidenceMessage;
use sidegate_mesh::clock::ManualClock;
use sidegate_mesh::spiffe::SpiffeId;
use sidegate_mtls::{
    Acceptor, CaClient, CaClientConfig, CredentialStore, Evidence, IdentityConfig, Issue as _,
    IssueError, IssueRequest, JoinToken, Peer, RenewalPolicy, Verifier, VerifyLimits,
    WorkloadIdentity, WorkloadKey, control_plane_id, crypto_provider,
};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_rustls::server::TlsStream;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::server::Connected;
use tonic::{Code, Request, Response, Status, Streaming};

const HANDSHAKE: Duration = Duration::from_hours(24 * 365);
const TOKEN: &str = "sgt_1_very-secret";

/// An accepted connection, as tonic wants it.
struct Connection {
    stream: TlsStream<TcpStream>,
    peer: Option<Peer>,
}

impl Connected for Connection {
    type ConnectInfo = Option<Peer>;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// What one request said, and who sent it by its TLS certificate.
#[derive(Clone, Debug)]
struct Seen {
    evidence: EvidenceMessage,
    presented: Option<(SpiffeId, String)>,
    key: Vec<u8>,
}

struct Inner {
    clock: ManualClock,
    issuer: Arc<Authority>,
    seen: Mutex<Vec<Seen>>,
    acknowledgements: Mutex<Vec<proto::WatchBundleRequest>>,
    refuse: Mutex<Option<(Code, &'static str)>>,
    hang: Mutex<bool>,
    serial: Mutex<u64>,
    bundle: watch::Sender<proto::WatchBundleResponse>,
    /// Ends every stream, as a CA that goes down does.
    down: CancellationToken,
}

#[derive(Clone)]
struct Service(Arc<Inner>);

type Bundles =
    Pin<Box<dyn tokio_stream::Stream<Item = Result<proto::WatchBundleResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Identity for Service {
    type WatchBundleStream = Bundles;

    async fn issue_svid(
        &self,
        request: Request<proto::IssueSvidRequest>,
    ) -> Result<Response<proto::IssueSvidResponse>, Status> {
        let peer = request
            .extensions()
            .get::<Option<Peer>>()
            .cloned()
            .flatten();
        let message = request.into_inner();
        let csr = rcgen::CertificateSigningRequestParams::from_der(&message.csr.as_slice().into())
            .unwrap();
        self.0.seen.lock().unwrap().push(Seen {
            evidence: message.evidence.unwrap(),
            presented: peer.map(|peer| (peer.id, peer.serial.to_string())),
            key: csr.public_key.der_bytes().to_vec(),
        });
        if *self.0.hang.lock().unwrap() {
            std::future::pending::<()>().await;
        }
        if let Some((code, message)) = *self.0.refuse.lock().unwrap() {
            return Err(Status::new(code, message));
        }
        let now = sidegate_mesh::clock::Clock::now(&self.0.clock);
        let mut params = leaf_params(id("shop/web").as_str(), now, Duration::from_mins(1));
        let mut serial = self.0.serial.lock().unwrap();
        *serial += 1;
        params.serial_number = Some(SerialNumber::from(*serial));
        let leaf = self.0.issuer.sign(&params, &csr.public_key);
        Ok(Response::new(proto::IssueSvidResponse {
            chain: vec![leaf.to_vec(), self.0.issuer.der.to_vec()],
            spiffe_id: id("shop/web").to_string(),
        }))
    }

    async fn watch_bundle(
        &self,
        request: Request<Streaming<proto::WatchBundleRequest>>,
    ) -> Result<Response<Self::WatchBundleStream>, Status> {
        let mut requests = request.into_inner();
        let inner = Arc::clone(&self.0);
        tokio::spawn(async move {
            while let Some(Ok(request)) = requests.next().await {
                inner.acknowledgements.lock().unwrap().push(request);
            }
        });
        let mut changes = self.0.bundle.subscribe();
        changes.mark_changed();
        let down = self.0.down.clone().cancelled_owned();
        let bundles = WatchStream::new(changes).map(Ok);
        Ok(Response::new(Box::pin(
            futures_util::StreamExt::take_until(bundles, down),
        )))
    }
}

/// A running CA; dropping it ends its server and every connection.
struct Ca {
    address: SocketAddr,
    service: Service,
    tasks: tokio::task::JoinSet<()>,
}

struct World {
    clock: ManualClock,
    root: Arc<Authority>,
    issuer: Arc<Authority>,
    folder: TempDir,
}

impl World {
    fn new() -> Self {
        let root = Arc::new(Authority::root("mesh.local"));
        let folder = tempfile::tempdir().unwrap();
        let pem = {
            use base64::Engine as _;
            let body = base64::engine::general_purpose::STANDARD.encode(&root.der);
            format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n")
        };
        std::fs::write(folder.path().join("root.pem"), pem).unwrap();
        Self {
            clock: ManualClock::new(start()),
            issuer: Arc::new(root.intermediate()),
            root,
            folder,
        }
    }

    /// Credentials of whoever listens: the CA, or somebody else.
    fn credentials(&self, id: &SpiffeId) -> Arc<CredentialStore> {
        let store = ca::empty_store(Arc::new(self.clock.clone()));
        let trust = trust_of(1, &[("mesh.local", &[&self.root])]);
        store.publish(self.issuer.svid(id), trust).unwrap();
        store
    }

    async fn ca(&self, address: &str) -> Ca {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let ca_id = control_plane_id(&trust_domain("mesh.local"), "sidegate-ca").unwrap();
        let acceptor = Acceptor::control_plane(
            self.credentials(&ca_id),
            HANDSHAKE,
            Arc::new(self.clock.clone()),
        );
        let (sender, receiver) = mpsc::channel(8);
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if let Ok((stream, peer)) = acceptor.accept_optional(stream).await {
                    let connection = Connection { stream, peer };
                    drop(sender.send(Ok::<_, io::Error>(connection)).await);
                }
            }
        });
        let bundle = bundle_message(1, &[("mesh.local", &[&self.root])]);
        let service = Service(Arc::new(Inner {
            clock: self.clock.clone(),
            issuer: Arc::clone(&self.issuer),
            seen: Mutex::default(),
            acknowledgements: Mutex::default(),
            refuse: Mutex::default(),
            hang: Mutex::default(),
            serial: Mutex::default(),
            bundle: watch::Sender::new(bundle),
            down: CancellationToken::new(),
        }));
        let server = IdentityServer::new(service.clone());
        tasks.spawn(async move {
            tonic::transport::Server::builder()
                .add_service(server)
                .serve_with_incoming(ReceiverStream::new(receiver))
                .await
                .unwrap();
        });
        Ca {
            address,
            service,
            tasks,
        }
    }

    fn client(&self, address: SocketAddr, evidence: Evidence) -> CaClient {
        let config =
            CaClientConfig::new(&trust_domain("mesh.local"), address.to_string(), evidence)
                .unwrap();
        CaClient::new(config, crypto_provider(), Arc::new(self.clock.clone()))
    }

    fn verifier(&self) -> Arc<Verifier> {
        let trust = trust_of(1, &[("mesh.local", &[&self.root])]);
        Arc::new(Verifier::from_trust(trust, VerifyLimits::default()))
    }

    fn request(&self) -> IssueRequest {
        IssueRequest {
            csr: WorkloadKey::generate()
                .unwrap()
                .certificate_request()
                .unwrap(),
            current: None,
            verifier: self.verifier(),
        }
    }

    fn start(&self, address: SocketAddr) -> (WorkloadIdentity, TaskTracker, CancellationToken) {
        let (tracker, cancel) = (TaskTracker::new(), CancellationToken::new());
        let config = IdentityConfig {
            id: id("shop/web"),
            trust_domain: trust_domain("mesh.local"),
            root_file: self.folder.path().join("root.pem"),
            state_dir: Some(self.folder.path().join("state")),
            renewal: RenewalPolicy::default(),
        };
        let identity = WorkloadIdentity::start(
            config,
            Arc::new(self.client(address, token())),
            ca::empty_store(Arc::new(self.clock.clone())),
            &tracker,
            cancel.clone(),
        );
        (identity.unwrap(), tracker, cancel)
    }
}

fn token() -> Evidence {
    Evidence::JoinToken(JoinToken::new(TOKEN))
}

async fn eventually(what: &str, done: impl Fn() -> bool) {
    for _ in 0..30_000 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("never: {what}");
}

/// Moves the clock to the next planned renewal, again and again, until `done`.
async fn renew_until(
    world: &World,
    identity: &WorkloadIdentity,
    what: &str,
    done: impl Fn() -> bool,
) {
    use sidegate_mesh::clock::Clock as _;
    for _ in 0..30_000 {
        if done() {
            return;
        }
        let next = identity.status().snapshot().next_renewal;
        let left = next.and_then(|next| next.duration_since(world.clock.now()).ok());
        match left {
            Some(left) if !left.is_zero() => world.clock.advance(left),
            _ => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
    panic!("never: {what}: {:?}", identity.status().snapshot());
}

#[tokio::test]
async fn the_join_token_is_used_once_and_every_renewal_shows_the_svid_that_it_renews() {
    let world = World::new();
    let ca = world.ca("127.0.0.1:0").await;
    let (identity, tracker, cancel) = world.start(ca.address);
    eventually("ready", || identity.store().is_ready()).await;
    renew_until(&world, &identity, "three renewals", || {
        identity.status().snapshot().renewals_ok == 4
    })
    .await;
    cancel.cancel();
    tracker.close();
    tracker.wait().await;
    // A restart needs no token either.
    let (identity, ..) = world.start(ca.address);
    assert!(identity.store().is_ready());
    renew_until(&world, &identity, "renewed", || {
        identity.status().snapshot().renewals_ok == 1
    })
    .await;

    let seen = ca.service.0.seen.lock().unwrap().clone();
    assert_eq!(seen.len(), 5);
    let EvidenceMessage::JoinToken(first) = &seen[0].evidence else {
        panic!("{:?}", seen[0]);
    };
    assert_eq!((first.token.as_str(), &seen[0].presented), (TOKEN, &None));
    for (index, renewal) in seen.iter().enumerate().skip(1) {
        assert_eq!(
            renewal.evidence,
            EvidenceMessage::CurrentSvid(proto::CurrentSvid {})
        );
        let (presented, serial) = renewal.presented.clone().unwrap();
        assert_eq!(
            (presented, serial),
            (id("shop/web"), format!("{index:02x}"))
        );
    }
    let keys: HashSet<_> = seen.iter().map(|seen| &seen.key).collect();
    assert_eq!(keys.len(), 5, "a key was used twice");
}

#[tokio::test]
async fn whoever_is_not_the_ca_receives_no_byte_of_a_request() {
    let world = World::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = world.client(listener.local_addr().unwrap(), token());
    for other in [
        "shop/web",
        "sidegate-system/sidegate-controller",
        "shop/sidegate-ca",
    ] {
        let acceptor = Acceptor::control_plane(
            world.credentials(&id(other)),
            HANDSHAKE,
            Arc::new(world.clock.clone()),
        );
        let serving = async {
            let (stream, _) = listener.accept().await.unwrap();
            match acceptor.accept_optional(stream).await {
                // The client learns who we are first, so it is the one who hangs up.
                Err(error) => Err(error),
                Ok((mut stream, _)) => {
                    let mut bytes = Vec::new();
                    drop(stream.read_to_end(&mut bytes).await);
                    Ok(bytes)
                }
            }
        };
        let (issued, served) = tokio::join!(client.issue(world.request()), serving);
        let Err(IssueError::NotTheCa { source, .. }) = issued else {
            panic!("{other}: {issued:?}");
        };
        assert_eq!(source.code(), "unexpected_identity", "{other}");
        assert_eq!(source.claimed(), Some(id(other).as_str()));
        match served {
            Err(error) => assert_eq!(error.code(), "refused_by_peer", "{other}: {error:?}"),
            Ok(bytes) => assert!(bytes.is_empty(), "{other} received {} bytes", bytes.len()),
        }
    }
}

#[tokio::test]
async fn a_ca_of_another_root_is_not_the_ca() {
    let world = World::new();
    let ca = World::new().ca("127.0.0.1:0").await;
    let issued = world
        .client(ca.address, token())
        .issue(world.request())
        .await;
    let Err(IssueError::NotTheCa { source, .. }) = issued else {
        panic!("{issued:?}");
    };
    assert_eq!(source.code(), "unknown_issuer");
    assert!(ca.service.0.seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn without_evidence_nobody_is_asked_and_the_message_says_what_to_do() {
    let world = World::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = world.client(listener.local_addr().unwrap(), Evidence::None);
    let error = client.issue(world.request()).await.unwrap_err().to_string();
    assert!(error.contains("sidegate-ca token create"), "{error}");
    let accepted = tokio::time::timeout(Duration::from_millis(50), listener.accept()).await;
    assert!(accepted.is_err(), "a connection was made");
}

#[tokio::test]
async fn a_silent_ca_is_given_up_in_time() {
    let world = World::new();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = world.client(silent.local_addr().unwrap(), token());
    let mut call = client.issue(world.request());
    let mut accepted = Vec::new();
    // Connected and waiting for a handshake that never comes.
    tokio::select! {
        result = &mut call => panic!("{result:?}"),
        connection = silent.accept() => accepted.push(connection.unwrap()),
    }
    let advance = async {
        eventually("the client waits", || world.clock.sleepers() > 0).await;
        world.clock.advance(Duration::from_secs(5));
    };
    let (result, ()) = tokio::join!(call, advance);
    assert!(
        matches!(result, Err(IssueError::Timeout { after_ms: 5_000 })),
        "{result:?}"
    );

    let ca = world.ca("127.0.0.1:0").await;
    *ca.service.0.hang.lock().unwrap() = true;
    let client = world.client(ca.address, token());
    let advance = async {
        eventually("the CA has the request", || {
            !ca.service.0.seen.lock().unwrap().is_empty()
        })
        .await;
        world.clock.advance(Duration::from_secs(10));
    };
    let (result, ()) = tokio::join!(client.issue(world.request()), advance);
    assert!(
        matches!(result, Err(IssueError::Timeout { after_ms: 10_000 })),
        "{result:?}"
    );
}

#[tokio::test]
async fn a_refusal_is_passed_on_in_the_cas_words_and_only_a_bad_key_is_replaced() {
    let world = World::new();
    let ca = world.ca("127.0.0.1:0").await;
    let keys = |ca: &Ca| -> Vec<Vec<u8>> {
        let seen = ca.service.0.seen.lock().unwrap();
        seen.iter().map(|seen| seen.key.clone()).collect()
    };
    *ca.service.0.refuse.lock().unwrap() = Some((Code::Unauthenticated, "token is used"));
    let (identity, ..) = world.start(ca.address);
    renew_until(&world, &identity, "three refusals", || keys(&ca).len() == 3).await;
    let distinct: HashSet<_> = keys(&ca).into_iter().collect();
    assert_eq!(
        distinct.len(),
        1,
        "the same request is repeated with the same key"
    );
    eventually("reported", || {
        let error = identity.status().snapshot().last_error.unwrap_or_default();
        error.contains("UNAUTHENTICATED: token is used")
    })
    .await;
    assert!(!identity.store().is_ready());

    *ca.service.0.refuse.lock().unwrap() = Some((Code::InvalidArgument, "key is known"));
    let asked = keys(&ca).len();
    renew_until(&world, &identity, "two more", || {
        keys(&ca).len() >= asked + 2
    })
    .await;
    let distinct: HashSet<_> = keys(&ca).into_iter().collect();
    assert!(distinct.len() >= 2, "a refused key was offered again");
}

#[tokio::test]
async fn the_bundle_is_followed_and_acknowledged_and_followed_again_after_the_ca_restarts() {
    let world = World::new();
    let mut ca = world.ca("127.0.0.1:0").await;
    let (identity, ..) = world.start(ca.address);
    eventually("ready", || identity.store().is_ready()).await;
    let next = Arc::new(Authority::root("mesh.local"));
    let message = bundle_message(2, &[("mesh.local", &[&world.root, &next])]);
    ca.service.0.bundle.send_replace(message);
    eventually("bundle 2 acknowledged", || {
        let acknowledgements = ca.service.0.acknowledgements.lock().unwrap();
        acknowledgements.last().is_some_and(|last| {
            last.acknowledged_sequence == 2
                && last.root_sha256.len() == 2
                && !last.leaf_issuer_key_id.is_empty()
        })
    })
    .await;

    let address = ca.address.to_string();
    ca.service.0.down.cancel();
    ca.tasks.shutdown().await;
    let ca = world.ca(&address).await;
    let message = bundle_message(3, &[("mesh.local", &[&world.root])]);
    ca.service.0.bundle.send_replace(message);
    let again = || {
        let acknowledgements = ca.service.0.acknowledgements.lock().unwrap();
        let last = acknowledgements.last();
        last.is_some_and(|last| last.acknowledged_sequence == 3)
    };
    for _ in 0..30_000 {
        if again() {
            break;
        }
        // The wait between two attempts is on this clock.
        world.clock.advance(Duration::from_millis(100));
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(again());
    assert_eq!(identity.status().snapshot().bundle_sequence, 3);
}
