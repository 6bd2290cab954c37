//! What the outbound half needs around it: a mesh of certificates, peers that speak the wire with
//! the h2 crate alone, a sidecar's outbound half, and an application's raw HTTP/1.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Request, Response};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use sidegate_mesh::access_log::Record;
use sidegate_mesh::store::ResourceStore;
use sidegate_mesh::{Clock, Snapshot, SpiffeId};
use sidegate_mtls::{
    Acceptor, BundleSet, CredentialStore, Revocations, Svid, SystemClock, Trust, VerifyLimits,
    WorkloadKey, crypto_provider,
};
use sidegate_proxy::access_log::Handle;
use sidegate_proxy::balance::Services;
use sidegate_proxy::config::Config;
use sidegate_proxy::connections::Connections;
use sidegate_proxy::drain::Drain;
use sidegate_proxy::limits::Limits;
use sidegate_proxy::metrics::Metrics;
use sidegate_proxy::original::{Kernel, Own};
use sidegate_proxy::outbound::{BoundService, Outbound};
use sidegate_proxy::shared::Shared;
use sidegate_proxy::state::State;
use sidegate_proxy::wire::WireLimits;
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc, watch};

/// Longest wait for anything; long, because the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits for `future`, or fails the test.
#[track_caller]
pub fn soon<F: Future>(future: F) -> impl Future<Output = F::Output> {
    let place = std::panic::Location::caller();
    async move {
        let waited = tokio::time::timeout(PATIENCE, future).await;
        waited.unwrap_or_else(|_| panic!("nothing happened for {PATIENCE:?} at {place}"))
    }
}

pub fn id(account: &str) -> SpiffeId {
    format!("spiffe://mesh.local/ns/shop/sa/{account}")
        .parse()
        .unwrap()
}

/// A trust domain.
pub struct Mesh {
    params: CertificateParams,
    key: KeyPair,
    der: Vec<u8>,
    pub clock: Arc<dyn Clock>,
}

fn moment(at: SystemTime) -> OffsetDateTime {
    let seconds = at.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    OffsetDateTime::from_unix_timestamp(seconds.try_into().unwrap()).unwrap()
}

impl Mesh {
    pub fn new() -> Self {
        Self::with_clock(Arc::new(SystemClock))
    }

    pub fn with_clock(clock: Arc<dyn Clock>) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "root");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![SanType::URI("spiffe://mesh.local".try_into().unwrap())];
        params.not_before = moment(clock.now() - Duration::from_hours(1));
        params.not_after = moment(clock.now() + Duration::from_hours(240));
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().unwrap();
        let der = params.self_signed(&key).unwrap().der().to_vec();
        Self {
            params,
            key,
            der,
            clock,
        }
    }

    pub fn svid(&self, id: &SpiffeId, life: Duration) -> Arc<Svid> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into().unwrap())];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.not_before = moment(self.clock.now() - Duration::from_secs(30));
        params.not_after = moment(self.clock.now() + life);
        params.use_authority_key_identifier_extension = true;
        let key = WorkloadKey::generate().unwrap();
        let issuer = Issuer::from_params(&self.params, &self.key);
        let leaf = params.signed_by(&key, &issuer).unwrap().der().clone();
        Arc::new(Svid::parse(vec![leaf], key, id).unwrap())
    }

    /// What everybody believes, without what is revoked.
    pub fn trust(&self, sequence: u64, revoked: &[SpiffeId]) -> Trust {
        let mut bundles = BundleSet::new(sequence);
        let root = self.der.clone().into();
        bundles
            .insert(&"mesh.local".parse().unwrap(), vec![root])
            .unwrap();
        let mut trust = Trust::from_bundles(bundles);
        if !revoked.is_empty() {
            trust.revocations = Arc::new(Revocations::new(revoked.iter().cloned(), []));
        }
        trust
    }

    pub fn store(&self, id: &SpiffeId, life: Duration) -> Arc<CredentialStore> {
        let clock = Arc::clone(&self.clock);
        let store = CredentialStore::new(VerifyLimits::default(), crypto_provider(), clock);
        store
            .publish(self.svid(id, life), self.trust(1, &[]))
            .unwrap();
        store
    }
}

/// Answers one stream of a peer.
pub type Handler =
    Arc<dyn Fn(Request<RecvStream>, SendResponse<Bytes>) -> BoxFuture<'static, ()> + Send + Sync>;

pub fn handler<F, Fut>(answer: F) -> Handler
where
    F: Fn(Request<RecvStream>, SendResponse<Bytes>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    Arc::new(move |request, respond| Box::pin(answer(request, respond)))
}

/// A sidecar's inbound side, made of mTLS and the h2 crate alone.
pub struct Peer {
    pub address: SocketAddr,
    pub id: SpiffeId,
    /// Connections that were accepted so far.
    pub accepted: Arc<AtomicUsize>,
    /// Streams that were begun so far.
    pub streams: Arc<AtomicUsize>,
    pub open: watch::Receiver<usize>,
    pub go_away: Arc<Notify>,
    pub life: watch::Sender<bool>,
}

#[derive(Clone)]
struct PeerState {
    accepted: Arc<AtomicUsize>,
    streams: Arc<AtomicUsize>,
    open: Arc<watch::Sender<usize>>,
    go_away: Arc<Notify>,
    life: watch::Receiver<bool>,
    limits: WireLimits,
    handler: Handler,
}

impl Peer {
    pub async fn start(mesh: &Mesh, account: &str, handler: Handler) -> Self {
        Self::with(mesh, account, WireLimits::default(), handler).await
    }

    pub async fn with(mesh: &Mesh, account: &str, limits: WireLimits, handler: Handler) -> Self {
        let store = mesh.store(&id(account), Duration::from_hours(1));
        Self::with_store(mesh, store, limits, handler).await
    }

    pub async fn with_store(
        mesh: &Mesh,
        store: Arc<CredentialStore>,
        limits: WireLimits,
        handler: Handler,
    ) -> Self {
        let id = store.current().unwrap().id().clone();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let acceptor = Acceptor::new(store, PATIENCE, Arc::clone(&mesh.clock));
        let (life, alive) = watch::channel(true);
        let (open, opened) = watch::channel(0);
        let state = PeerState {
            accepted: Arc::default(),
            streams: Arc::default(),
            open: Arc::new(open),
            go_away: Arc::default(),
            life: alive,
            limits,
            handler,
        };
        let peer = Self {
            address,
            id,
            accepted: Arc::clone(&state.accepted),
            streams: Arc::clone(&state.streams),
            open: opened,
            go_away: Arc::clone(&state.go_away),
            life,
        };
        tokio::spawn(accept(listener, acceptor, state));
        peer
    }

    /// Refuses connections from now on, and cuts those that are open.
    pub async fn kill(&self) {
        self.life.send_replace(false);
        let mut open = self.open.clone();
        soon(open.wait_for(|open| *open == 0)).await.unwrap();
        // The listener is gone when a connection is refused.
        while TcpStream::connect(self.address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    }

    /// Sends GOAWAY on every open connection; what runs goes on.
    pub fn send_go_away(&self) {
        self.go_away.notify_waiters();
    }

    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }

    pub fn streams(&self) -> usize {
        self.streams.load(Ordering::SeqCst)
    }

    /// Waits until this many connections are open.
    pub async fn until_open(&self, count: usize) {
        let mut open = self.open.clone();
        soon(open.wait_for(|open| *open == count)).await.unwrap();
    }
}

async fn accept(listener: TcpListener, acceptor: Acceptor, state: PeerState) {
    let mut life = state.life.clone();
    loop {
        tokio::select! {
            _ = life.wait_for(|alive| !alive) => return,
            accepted = listener.accept() => {
                let (stream, _) = accepted.unwrap();
                state.accepted.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(connection(stream, acceptor.clone(), state.clone()));
            }
        }
    }
}

async fn connection(stream: TcpStream, acceptor: Acceptor, state: PeerState) {
    state.open.send_modify(|open| *open += 1);
    let mut life = state.life.clone();
    tokio::select! {
        _ = life.wait_for(|alive| !alive) => {}
        () = serve(stream, acceptor, &state) => {}
    }
    state.open.send_modify(|open| *open -= 1);
}

async fn serve(stream: TcpStream, acceptor: Acceptor, state: &PeerState) {
    stream.set_nodelay(true).unwrap();
    let Ok((tls, _peer)) = acceptor.accept(stream).await else {
        return;
    };
    let Ok(mut wire) = state.limits.server().handshake::<_, Bytes>(tls).await else {
        return;
    };
    // Dropping the set ends the handlers with the connection.
    let mut handlers = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            () = state.go_away.notified() => wire.graceful_shutdown(),
            accepted = wire.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    state.streams.fetch_add(1, Ordering::SeqCst);
                    handlers.spawn((state.handler)(request, respond));
                }
                _ => return,
            },
        }
    }
}

/// Sends a whole response.
pub fn reply(respond: &mut SendResponse<Bytes>, response: Response<&str>) {
    let (head, body) = response.into_parts();
    let mut stream = respond
        .send_response(Response::from_parts(head, ()), body.is_empty())
        .unwrap();
    if !body.is_empty() {
        stream
            .send_data(Bytes::copy_from_slice(body.as_bytes()), true)
            .unwrap();
    }
}

/// A peer that answers 200 with `text` to everything.
pub fn says(text: &'static str) -> Handler {
    handler(move |request, mut respond| async move {
        drop(read_all(request.into_body()).await);
        reply(&mut respond, Response::new(text));
    })
}

/// The whole body and its trailers.
pub async fn read_all(mut body: RecvStream) -> Result<(Bytes, Option<HeaderMap>), h2::Error> {
    let mut bytes = Vec::new();
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        bytes.extend_from_slice(&data);
    }
    Ok((bytes.into(), body.trailers().await?))
}

/// Waits for a clean end without another byte.
pub async fn read_end(body: &mut RecvStream) {
    while let Some(data) = soon(body.data()).await {
        assert_eq!(data.unwrap(), "");
    }
    assert!(soon(body.trailers()).await.unwrap().is_none());
}

/// Sends bytes as the window opens.
pub async fn send_all(stream: &mut SendStream<Bytes>, data: &[u8], end: bool) {
    let data = Bytes::copy_from_slice(data);
    sidegate_proxy::wire::send::send_data(stream, data, end)
        .await
        .unwrap();
}

/// The reason for which the other side resets the stream.
pub async fn reset_of(respond: &mut SendResponse<Bytes>) -> Reason {
    soon(std::future::poll_fn(|cx| respond.poll_reset(cx)))
        .await
        .unwrap()
}

/// `orders` of namespace `shop` at these endpoints; `more` is a further YAML document.
pub fn orders(peers: &[&Peer], more: &str) -> String {
    service(
        "orders",
        "[{ name: http, port: 80, targetPort: 8080, protocol: auto }]",
        peers,
    ) + more
}

pub fn service(name: &str, ports: &str, peers: &[&Peer]) -> String {
    let endpoint = |peer: &&Peer| {
        format!(
            "    - {{ address: \"{}\", identity: {{ spiffeId: {{ id: \"{}\" }} }} }}\n",
            peer.address, peer.id
        )
    };
    let endpoints: String = peers.iter().map(endpoint).collect();
    format!(
        "apiVersion: sidegate.dev/v1alpha1\nkind: StaticService\nmetadata: {{ name: {name}, namespace: shop }}\n\
         spec:\n  ports: {ports}\n  endpoints:\n{endpoints}---\n"
    )
}

pub fn traffic(service: &str, spec: &str) -> String {
    format!(
        "apiVersion: sidegate.dev/v1alpha1\nkind: TrafficPolicy\n\
         metadata: {{ name: {service}, namespace: shop }}\nspec:\n  service: {service}\n{spec}\n---\n"
    )
}

/// The outbound half of `shop/web`.
pub struct Web {
    pub address: SocketAddr,
    pub shared: Arc<Shared>,
    pub outbound: Arc<Outbound>,
    registry: prometheus_client::registry::Registry,
    records: mpsc::UnboundedReceiver<Record>,
}

impl Web {
    pub async fn start(mesh: &Mesh, resources: &str) -> Self {
        Self::with(mesh, resources, "").await
    }

    /// `limits` is further YAML below `limits:`.
    pub async fn with(mesh: &Mesh, resources: &str, limits: &str) -> Self {
        let text = format!(
            "workload: {{ namespace: shop, serviceAccount: web }}\n\
             ca: {{ root: root.pem, joinToken: token }}\nresources: resources\n\
             log: {{ stdout: true }}\ndrainGrace: 1ms\ndrainTimeout: 5s\nlimits: {{ {limits} }}\n"
        );
        let config = Config::from_yaml("test.yaml", &text).unwrap();
        let workload = config.workload().unwrap();
        let mut registry = prometheus_client::registry::Registry::default();
        let metrics = Metrics::new(&mut registry, config.limits.metric_series_max);
        let (collector, records) = mpsc::unbounded_channel();
        let clock = Arc::clone(&mesh.clock);
        let shared = Arc::new(Shared {
            limits: Limits::new(&config.limits, &metrics),
            credentials: mesh.store(&workload.id, Duration::from_hours(1)),
            state: State::new(),
            metrics: Arc::new(metrics),
            log: Handle::collecting(collector),
            drain: Drain::new(Arc::clone(&clock)),
            services: Services::new(Arc::clone(&clock)),
            destinations: None,
            originals: Arc::new(Kernel),
            own: Own::of(&config),
            connections: Connections::new(),
            workload: Arc::new(workload),
            config: Arc::new(config),
            clock,
        });
        let outbound = Outbound::new(Arc::clone(&shared), None);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(Arc::clone(&outbound).serve(listener, None));
        let web = Self {
            address,
            shared,
            outbound,
            registry,
            records,
        };
        web.publish(resources);
        web
    }

    pub fn publish(&self, resources: &str) {
        let mut store = ResourceStore::new();
        let files = [("test.yaml".to_owned(), resources.to_owned())];
        let problems = store.replace_folder(if resources.is_empty() { &[] } else { &files });
        assert!(problems.is_empty(), "{problems:?}");
        let number = self
            .shared
            .state
            .current()
            .map_or(1, |snapshot| snapshot.number + 1);
        let (snapshot, _) = Snapshot::compile(store.resources(), &self.shared.workload, number);
        self.shared.state.publish(Arc::new(snapshot));
    }

    /// Whether `/metrics` would have this line.
    pub fn counts(&self, line: &str) -> bool {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text.lines().any(|sample| sample == line)
    }

    /// A port bound to a service of namespace `shop`.
    pub async fn bind(&self, service: &str) -> SocketAddr {
        let port: sidegate_proxy::config::ServicePort = service.parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let bound = BoundService::from(&port);
        tokio::spawn(Arc::clone(&self.outbound).serve(listener, Some(bound)));
        address
    }

    /// The record of the next call that ended.
    pub async fn record(&mut self) -> Record {
        soon(self.records.recv()).await.unwrap()
    }

    pub async fn client(&self) -> Http1 {
        Http1::connect(self.address).await
    }

    /// An HTTP/2 client; its connection is driven until the handle is dropped.
    pub async fn h2(&self) -> h2::client::SendRequest<Bytes> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let mut builder = h2::client::Builder::new();
        builder
            .initial_connection_window_size(16 << 20)
            .initial_window_size(1 << 20);
        let (client, connection) = builder.handshake(stream).await.unwrap();
        tokio::spawn(async move { drop(connection.await) });
        client.ready().await.unwrap()
    }
}

/// A raw HTTP/1 client.
pub struct Http1 {
    pub stream: TcpStream,
    buffer: Vec<u8>,
}

/// A response as it was on the connection.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub trailers: Vec<(String, String)>,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }

    pub fn trailer(&self, name: &str) -> Option<&str> {
        find(&self.trailers, name)
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

fn find<'a>(fields: &'a [(String, String)], name: &str) -> Option<&'a str> {
    fields
        .iter()
        .find(|(key, _)| key.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.as_str())
}

fn fields(headers: &[httparse::Header<'_>]) -> Vec<(String, String)> {
    let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
    headers
        .iter()
        .map(|header| (header.name.to_owned(), text(header.value)))
        .collect()
}

impl Http1 {
    pub async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            buffer: Vec::new(),
        }
    }

    pub async fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).await.unwrap();
    }

    pub async fn get(&mut self, host: &str, path: &str) -> Reply {
        self.send(&format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n"))
            .await;
        self.reply().await
    }

    /// More bytes; `false` at a clean end.
    pub async fn fill(&mut self) -> std::io::Result<bool> {
        Ok(soon(self.stream.read_buf(&mut self.buffer)).await? > 0)
    }

    /// The next head; 1xx ones count, too.
    pub async fn head(&mut self) -> Reply {
        loop {
            let mut headers = [httparse::EMPTY_HEADER; 128];
            let mut response = httparse::Response::new(&mut headers);
            if let httparse::Status::Complete(length) = response.parse(&self.buffer).unwrap() {
                let reply = Reply {
                    status: response.code.unwrap(),
                    headers: fields(response.headers),
                    body: Vec::new(),
                    trailers: Vec::new(),
                };
                self.buffer.drain(..length);
                return reply;
            }
            assert!(
                self.fill().await.unwrap(),
                "closed before a head: {:?}",
                self.buffer
            );
        }
    }

    /// The next response whole, to a request other than HEAD.
    pub async fn reply(&mut self) -> Reply {
        let mut reply = self.head().await;
        if matches!(reply.status, 100..=199 | 204 | 304) {
            return reply;
        }
        if reply.header("transfer-encoding") == Some("chunked") {
            self.chunked(&mut reply).await;
        } else if let Some(length) = reply.header("content-length") {
            let length: usize = length.parse().unwrap();
            reply.body = self.take(length).await;
        } else {
            while self.fill().await.unwrap() {}
            reply.body = std::mem::take(&mut self.buffer);
        }
        reply
    }

    pub async fn take(&mut self, length: usize) -> Vec<u8> {
        while self.buffer.len() < length {
            assert!(self.fill().await.unwrap(), "closed within a body");
        }
        self.buffer.drain(..length).collect()
    }

    async fn chunked(&mut self, reply: &mut Reply) {
        loop {
            let (start, size) = loop {
                match httparse::parse_chunk_size(&self.buffer).unwrap() {
                    httparse::Status::Complete(found) => break found,
                    httparse::Status::Partial => assert!(self.fill().await.unwrap(), "cut off"),
                }
            };
            self.buffer.drain(..start);
            let size = usize::try_from(size).unwrap();
            if size == 0 {
                break;
            }
            reply.body.extend(self.take(size).await);
            assert_eq!(self.take(2).await, b"\r\n");
        }
        loop {
            let mut headers = [httparse::EMPTY_HEADER; 128];
            if let httparse::Status::Complete((length, trailers)) =
                httparse::parse_headers(&self.buffer, &mut headers).unwrap()
            {
                reply.trailers = fields(trailers);
                self.buffer.drain(..length);
                return;
            }
            assert!(self.fill().await.unwrap(), "cut off");
        }
    }

    /// What comes until the end, and how that end was.
    pub async fn rest(mut self) -> (Vec<u8>, std::io::Result<()>) {
        loop {
            match self.fill().await {
                Ok(true) => {}
                Ok(false) => return (self.buffer, Ok(())),
                Err(error) => return (self.buffer, Err(error)),
            }
        }
    }

    /// Whether nothing has arrived.
    pub fn is_quiet(&mut self) -> bool {
        self.buffer.is_empty()
            && self
                .stream
                .try_read_buf(&mut self.buffer)
                .is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
    }
}
