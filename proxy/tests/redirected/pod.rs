//! Pods of a cluster on 127.0.0.0/8: each with its address, its sidecar's two halves, and its
//! application on any port of that address. What the kernel says of redirected connections is said
//! by a table, and the controller's word by the test.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use sidegate_mesh::access_log::Record;
use sidegate_mesh::host::ServiceName;
use sidegate_mesh::routes::{Endpoint, PortProtocol, Route, Traffic};
use sidegate_mesh::store::ResourceStore;
use sidegate_mesh::{Clock, Enforcement, Snapshot, SpiffeId, Workload};
use sidegate_mtls::{
    BundleSet, Connector, CredentialStore, Svid, SystemClock, Trust, VerifyLimits, WorkloadKey,
    crypto_provider,
};
use sidegate_proxy::access_log::Handle;
use sidegate_proxy::balance::Services;
use sidegate_proxy::config::Config;
use sidegate_proxy::connections::Connections;
use sidegate_proxy::destinations::{Answer, Destination, Destinations};
use sidegate_proxy::drain::Drain;
use sidegate_proxy::inbound::{self, own_calls};
use sidegate_proxy::limits::Limits;
use sidegate_proxy::metrics::Metrics;
use sidegate_proxy::original::{Originals, Own};
use sidegate_proxy::outbound::Outbound;
use sidegate_proxy::shared::Shared;
use sidegate_proxy::state::State;
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;

/// Longest wait for anything; long, because the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The Service that stands before the pods of a test.
pub const SERVICE: &str = "10.96.0.7:80";

/// Waits for `future`, or fails the test.
#[track_caller]
pub fn soon<F: Future>(future: F) -> impl Future<Output = F::Output> {
    let place = std::panic::Location::caller();
    async move {
        let waited = tokio::time::timeout(PATIENCE, future).await;
        waited.unwrap_or_else(|_| panic!("nothing happened for {PATIENCE:?} at {place}"))
    }
}

/// A trust domain, and the addresses of its pods.
pub struct Cluster {
    params: CertificateParams,
    key: KeyPair,
    der: Vec<u8>,
}

/// Pods of every test of the process have addresses of their own.
static NEXT: AtomicU8 = AtomicU8::new(10);

fn moment(at: SystemTime) -> OffsetDateTime {
    OffsetDateTime::from(at)
}

impl Cluster {
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "root");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![SanType::URI("spiffe://mesh.local".try_into().unwrap())];
        params.not_before = moment(SystemClock.now() - Duration::from_hours(1));
        params.not_after = moment(SystemClock.now() + Duration::from_hours(240));
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().unwrap();
        let der = params.self_signed(&key).unwrap().der().to_vec();
        Self { params, key, der }
    }

    fn credentials(&self, id: &SpiffeId) -> Arc<CredentialStore> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into().unwrap())];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.not_before = moment(SystemClock.now() - Duration::from_secs(30));
        params.not_after = moment(SystemClock.now() + Duration::from_hours(1));
        params.use_authority_key_identifier_extension = true;
        let key = WorkloadKey::generate().unwrap();
        let issuer = Issuer::from_params(&self.params, &self.key);
        let leaf = params.signed_by(&key, &issuer).unwrap().der().clone();
        let svid = Arc::new(Svid::parse(vec![leaf], key, id).unwrap());
        let mut bundles = BundleSet::new(1);
        let root = self.der.clone().into();
        bundles
            .insert(&"mesh.local".parse().unwrap(), vec![root])
            .unwrap();
        let clock = Arc::new(SystemClock);
        let store = CredentialStore::new(VerifyLimits::default(), crypto_provider(), clock);
        store.publish(svid, Trust::from_bundles(bundles)).unwrap();
        store
    }

    /// Mutual TLS as this account, by hand.
    pub fn connector(&self, account: &str) -> Connector {
        let id = format!("spiffe://mesh.local/ns/shop/sa/{account}");
        let store = self.credentials(&id.parse().unwrap());
        Connector::new(store, PATIENCE, Arc::new(SystemClock))
    }

    /// A pod whose callers are held to `policy`.
    pub async fn pod(&self, account: &str, policy: &str) -> Pod {
        self.pod_with(account, policy, "").await
    }

    /// `web`, which nobody may call, and `orders` with this policy.
    pub async fn web_and_orders(&self, policy: &str) -> (Pod, Pod) {
        (self.pod("web", "").await, self.pod("orders", policy).await)
    }

    /// `more` is further YAML of the sidecar's configuration.
    pub async fn pod_with(&self, account: &str, policy: &str, more: &str) -> Pod {
        let last = NEXT.fetch_add(1, Ordering::Relaxed);
        let ip = IpAddr::V4(Ipv4Addr::new(127, 77, 0, last));
        let config = configuration(account, ip, more);
        let workload = config.workload().unwrap();
        let mut registry = prometheus_client::registry::Registry::default();
        let metrics = Metrics::new(&mut registry, config.limits.metric_series_max);
        let (collector, records) = mpsc::unbounded_channel();
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let table = Arc::new(Table::default());
        let destinations = Destinations::new(&config.limits, &metrics, Arc::clone(&clock));
        let shared = Arc::new(Shared {
            limits: Limits::new(&config.limits, &metrics),
            credentials: self.credentials(&workload.id),
            state: State::new(),
            metrics: Arc::new(metrics),
            log: Handle::collecting(collector),
            drain: Drain::new(Arc::clone(&clock)),
            services: Services::new(Arc::clone(&clock)),
            destinations: Some(Arc::new(destinations)),
            originals: Arc::clone(&table) as Arc<dyn Originals>,
            own: Own::of(&config),
            connections: Connections::new(),
            workload: Arc::new(workload),
            config: Arc::new(config),
            clock,
        });
        let pod = Pod::begin(ip, table, shared, records).await;
        pod.publish(policy);
        pod
    }
}

fn configuration(account: &str, ip: IpAddr, more: &str) -> Config {
    let text = format!(
        "workload: {{ namespace: shop, serviceAccount: {account}, labels: {{ app: {account} }} }}\n\
         ca: {{ root: root.pem, tokenFile: token }}\ncontroller: {{ address: 'controller:1' }}\n\
         destination: original\npod: {{ name: {account}, uid: u, ips: ['{ip}'] }}\n\
         log: {{ stdout: true }}\ndrainGrace: 1ms\ndrainTimeout: 5s\n{more}\n"
    );
    Config::from_yaml("test.yaml", &text).unwrap()
}

/// Where connections were going, by who made them or by who accepted them.
#[derive(Default)]
struct Table(Mutex<HashMap<SocketAddr, SocketAddr>>);

impl Table {
    fn insert(&self, end: SocketAddr, original: SocketAddr) {
        self.0.lock().unwrap().insert(end, original);
    }
}

impl Originals for Table {
    fn of(&self, stream: &TcpStream) -> io::Result<SocketAddr> {
        let table = self.0.lock().unwrap();
        let original = table.get(&stream.peer_addr()?);
        let original = original.or(table.get(&stream.local_addr()?));
        original.copied().ok_or(io::ErrorKind::NotFound.into())
    }
}

/// A pod with its sidecar.
pub struct Pod {
    pub ip: IpAddr,
    pub shared: Arc<Shared>,
    outbound: SocketAddr,
    table: Arc<Table>,
    records: Mutex<(mpsc::UnboundedReceiver<Record>, Vec<Record>)>,
    number: AtomicU64,
}

impl Pod {
    async fn begin(
        ip: IpAddr,
        table: Arc<Table>,
        shared: Arc<Shared>,
        records: mpsc::UnboundedReceiver<Record>,
    ) -> Self {
        let (own, arrivals) = own_calls();
        let calls = Outbound::new(Arc::clone(&shared), Some(own));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let outbound = listener.local_addr().unwrap();
        tokio::spawn(calls.serve(listener, None));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        tokio::spawn(inbound::serve(listener, Arc::clone(&shared), arrivals));
        Self {
            ip,
            shared,
            outbound,
            table,
            records: Mutex::new((records, Vec::new())),
            number: AtomicU64::new(0),
        }
    }

    pub fn id(&self) -> &SpiffeId {
        &self.shared.workload.id
    }

    /// The pod's own address and `port`, where its application listens.
    pub fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip, port)
    }

    /// What other pods reach when they connect to `port`: the kernel redirects it to the sidecar.
    pub async fn exposed(&self, port: u16) -> SocketAddr {
        self.exposed_as(self.at(port)).await
    }

    /// As [`Self::exposed`], with an original destination that need not be the pod's.
    pub async fn exposed_as(&self, original: SocketAddr) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        self.table.insert(address, original);
        let (_, arrivals) = own_calls();
        tokio::spawn(inbound::serve(listener, Arc::clone(&self.shared), arrivals));
        address
    }

    /// As [`Self::exposed`], as an endpoint.
    pub async fn endpoint(&self, port: u16) -> Endpoint {
        Endpoint::new(self.exposed(port).await, self.id().clone())
    }

    /// An application's connection to `to`, which the kernel redirects to the sidecar.
    pub async fn connect(&self, to: SocketAddr) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        self.table.insert(socket.local_addr().unwrap(), to);
        let stream = socket.connect(self.outbound).await.unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    /// A connection that nobody redirected.
    pub async fn connect_directly(&self) -> TcpStream {
        TcpStream::connect(self.outbound).await.unwrap()
    }

    /// The controller's word about `at`.
    pub async fn know(&self, at: &str, destination: Destination) {
        let at: SocketAddr = at.parse().unwrap();
        let destinations = Arc::clone(self.shared.destinations.as_ref().unwrap());
        // Only what somebody has asked about is remembered.
        let asked = Arc::clone(&destinations);
        let asking = tokio::spawn(async move { drop(asked.resolve(at).await) });
        let begun = Instant::now();
        loop {
            destinations.update(at, Answer::Known(destination.clone()));
            let known = destinations.current(at);
            if format!("{known:?}") == format!("{:?}", Some(&destination)) {
                break;
            }
            assert!(begun.elapsed() < PATIENCE);
            tokio::task::yield_now().await;
        }
        soon(asking).await.unwrap();
    }

    /// Puts `policy`, documents of YAML, into force.
    pub fn publish(&self, policy: &str) {
        self.publish_as(policy, Enforcement::Enforce);
    }

    /// As [`Self::publish`], in a namespace that audits.
    pub fn audit(&self, policy: &str) {
        self.publish_as(policy, Enforcement::Audit);
    }

    fn publish_as(&self, policy: &str, enforcement: Enforcement) {
        let mut resources = ResourceStore::new();
        let files = [("policy.yaml".to_owned(), policy.to_owned())];
        let problems = resources.replace_folder(if policy.is_empty() { &[] } else { &files });
        assert!(problems.is_empty(), "{problems:?}");
        let number = self.number.fetch_add(1, Ordering::Relaxed) + 1;
        let workload = Workload {
            enforcement,
            ..(*self.shared.workload).clone()
        };
        let (snapshot, _) = Snapshot::compile(resources.resources(), &workload, number);
        self.shared.state.publish(Arc::new(snapshot));
    }

    /// The first record not yet taken that `is` says yes to.
    #[track_caller]
    pub fn record(&self, is: impl Fn(&Record) -> bool) -> impl Future<Output = Record> {
        let place = std::panic::Location::caller();
        async move {
            let since = Instant::now();
            loop {
                if let Some(record) = self.take(&is) {
                    return record;
                }
                let seen = format!("{:#?}", self.records.lock().unwrap().1);
                let patient = since.elapsed() < PATIENCE;
                assert!(patient, "no such record at {place}; seen: {seen}");
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
    }

    fn take(&self, is: impl Fn(&Record) -> bool) -> Option<Record> {
        let mut records = self.records.lock().unwrap();
        let (receiver, seen) = &mut *records;
        seen.extend(std::iter::from_fn(|| receiver.try_recv().ok()));
        let at = seen.iter().position(is)?;
        Some(seen.remove(at))
    }
}

/// The service `orders.shop:80` at `endpoints`.
pub fn route(endpoints: &[Endpoint], protocol: PortProtocol) -> Route {
    Route {
        service: "orders.shop:80".into(),
        name: ServiceName {
            namespace: "shop".to_owned(),
            name: "orders".to_owned(),
        },
        port: 80,
        protocol,
        target_port: 8080,
        endpoints: endpoints.into(),
        traffic: Arc::new(Traffic::default()),
    }
}

pub fn meshed(endpoints: &[Endpoint]) -> Destination {
    Destination::Meshed(Arc::new(route(endpoints, PortProtocol::Auto)))
}

/// One answer on a raw HTTP/1 connection; its body has a length, is chunked, or goes to the end.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: String,
}

/// Sends `request` and reads one answer.
pub async fn exchange(stream: &mut TcpStream, request: &str) -> Reply {
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut read = Vec::new();
    loop {
        if let Some(reply) = parse(&read) {
            return reply;
        }
        let mut chunk = [0; 4096];
        let length = soon(stream.read(&mut chunk)).await.unwrap();
        assert!(
            length > 0,
            "closed after {:?}",
            String::from_utf8_lossy(&read)
        );
        read.extend_from_slice(&chunk[..length]);
    }
}

fn parse(read: &[u8]) -> Option<Reply> {
    let text = std::str::from_utf8(read).unwrap();
    let (head, body) = text.split_once("\r\n\r\n")?;
    let head = head.to_ascii_lowercase();
    let status = head.split(' ').nth(1)?.parse().unwrap();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))
        .map_or(0, |length| length.parse().unwrap());
    (body.len() >= length).then(|| Reply {
        status,
        head: head.clone(),
        body: body[..length].to_owned(),
    })
}

/// A GET of `path`, for any host.
pub async fn get(stream: &mut TcpStream, path: &str) -> Reply {
    exchange(
        stream,
        &format!("GET {path} HTTP/1.1\r\nHost: anything.example:81\r\n\r\n"),
    )
    .await
}

/// How the connection ends, with what came before.
pub async fn rest(stream: &mut TcpStream) -> (Vec<u8>, io::Result<()>) {
    let mut read = Vec::new();
    let ended = soon(stream.read_to_end(&mut read)).await;
    (read, ended.map(drop))
}

/// An HTTP/2 connection, driven until the handle is dropped.
pub async fn h2(stream: TcpStream) -> h2::client::SendRequest<Bytes> {
    let (client, connection) = soon(h2::client::handshake(stream)).await.unwrap();
    tokio::spawn(async move { drop(connection.await) });
    soon(client.ready()).await.unwrap()
}
