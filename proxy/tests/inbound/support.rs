//! A mesh of one called sidecar and peers made by hand, at a time that stands still.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use prometheus_client::registry::Registry;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::CertificateDer;
use sidegate_mesh::access_log::Record;
use sidegate_mesh::store::ResourceStore;
use sidegate_mesh::{Clock, ManualClock, Snapshot, SpiffeId};
use sidegate_mtls::{
    BundleSet, CredentialStore, Revocations, Svid, Trust, VerifyLimits, WorkloadKey,
    crypto_provider,
};
use sidegate_proxy::access_log;
use sidegate_proxy::balance::Services;
use sidegate_proxy::config::Config;
use sidegate_proxy::connections::Connections;
use sidegate_proxy::drain::Drain;
use sidegate_proxy::limits::Limits;
use sidegate_proxy::metrics::Metrics;
use sidegate_proxy::original::{Kernel, Own};
use sidegate_proxy::shared::Shared;
use sidegate_proxy::state::State;
use time::OffsetDateTime;
use tokio::net::TcpListener;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::JoinHandle;

/// Longest that anything may take before a test says that it never comes.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Life of the certificates made here.
pub const LEAF_LIFE: Duration = Duration::from_secs(3600);

pub fn start() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

/// `shop/web` is `spiffe://mesh.local/ns/shop/sa/web`.
pub fn id(text: &str) -> SpiffeId {
    id_in("mesh.local", text)
}

pub fn id_in(trust_domain: &str, text: &str) -> SpiffeId {
    let (namespace, account) = text.split_once('/').unwrap();
    format!("spiffe://{trust_domain}/ns/{namespace}/sa/{account}")
        .parse()
        .unwrap()
}

/// Waits for `future`, but not for ever.
#[track_caller]
pub fn soon<F: Future>(future: F) -> impl Future<Output = F::Output> {
    let place = std::panic::Location::caller();
    async move {
        match tokio::time::timeout(PATIENCE, future).await {
            Ok(output) => output,
            Err(_) => panic!("nothing came in {PATIENCE:?}, waited for at {place}"),
        }
    }
}

/// Waits until `ready` says so, but not for ever.
#[track_caller]
pub fn until(mut ready: impl FnMut() -> bool) -> impl Future<Output = ()> {
    soon(async move {
        while !ready() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
}

static ROOTS: AtomicU64 = AtomicU64::new(0);

/// A root that signs leaves itself.
pub struct Root {
    params: CertificateParams,
    key: KeyPair,
    der: CertificateDer<'static>,
}

impl Root {
    pub fn new(trust_domain: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        // Another name for each: with the same one it is the signature that does not fit.
        let name = format!("root {}", ROOTS.fetch_add(1, Ordering::Relaxed));
        params.distinguished_name.push(DnType::CommonName, name);
        params.subject_alt_names = vec![uri(&format!("spiffe://{trust_domain}"))];
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = moment(start() - Duration::from_secs(3600));
        params.not_after = moment(start() + Duration::from_secs(86_400 * 3650));
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().unwrap();
        let der = params.self_signed(&key).unwrap().der().clone();
        Self { params, key, der }
    }

    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    pub fn svid(&self, id: &SpiffeId) -> Arc<Svid> {
        self.svid_of(id, start() - Duration::from_secs(30), LEAF_LIFE)
    }

    /// Good from `from` until `life` after [`start`].
    pub fn svid_of(&self, id: &SpiffeId, from: SystemTime, life: Duration) -> Arc<Svid> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![uri(id.as_str())];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.not_before = moment(from);
        params.not_after = moment(start() + life);
        params.use_authority_key_identifier_extension = true;
        let key = WorkloadKey::generate().unwrap();
        let issuer = Issuer::from_params(&self.params, &self.key);
        let leaf = params.signed_by(&key, &issuer).unwrap().der().clone();
        Arc::new(Svid::parse(vec![leaf], key, id).unwrap())
    }
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn moment(at: SystemTime) -> OffsetDateTime {
    let seconds = at.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    OffsetDateTime::from_unix_timestamp(seconds.try_into().unwrap()).unwrap()
}

/// Trust in `roots` of `mesh.local`.
pub fn trust(sequence: u64, roots: &[&Root], revoked: &[SpiffeId]) -> Trust {
    let mut bundles = BundleSet::new(sequence);
    let ders = roots.iter().map(|root| root.der.clone()).collect();
    bundles
        .insert(&"mesh.local".parse().unwrap(), ders)
        .unwrap();
    Trust {
        bundles: Arc::new(bundles),
        revocations: Arc::new(Revocations::new(revoked.iter().cloned(), [])),
    }
}

pub fn store_with(clock: &ManualClock, svid: Arc<Svid>, trust: Trust) -> Arc<CredentialStore> {
    let store = CredentialStore::new(
        VerifyLimits::default(),
        crypto_provider(),
        Arc::new(clock.clone()),
    );
    store.publish(svid, trust).unwrap();
    store
}

/// One port of the called application.
pub struct Port {
    pub name: &'static str,
    pub port: u16,
    pub address: SocketAddr,
}

/// `shop/orders` behind its sidecar's inbound half.
pub struct Sidecar {
    pub clock: ManualClock,
    pub root: Root,
    pub shared: Arc<Shared>,
    pub address: SocketAddr,
    records: Mutex<(UnboundedReceiver<Record>, Vec<Record>)>,
    number: AtomicU64,
    serving: JoinHandle<()>,
}

/// What may be changed before a [`Sidecar`] starts.
pub struct Setup {
    pub ports: Vec<Port>,
    pub policy: String,
    pub more: String,
    pub ready: bool,
    pub audit: bool,
}

impl Setup {
    pub fn http(address: SocketAddr, policy: &str) -> Self {
        Self {
            ports: vec![Port {
                name: "http",
                port: 8080,
                address,
            }],
            policy: policy.to_owned(),
            more: String::new(),
            ready: true,
            audit: false,
        }
    }

    /// Further top-level lines of the configuration.
    pub fn with(mut self, more: &str) -> Self {
        self.more = more.to_owned();
        self
    }
}

impl Sidecar {
    pub async fn start(setup: Setup) -> Self {
        let clock = ManualClock::new(start());
        let root = Root::new("mesh.local");
        let svid = root.svid(&id("shop/orders"));
        let credentials = store_with(&clock, svid, trust(1, &[&root], &[]));
        let (sink, records) = unbounded_channel();
        let log = access_log::Handle::collecting(sink);
        let shared = shared(&setup, &clock, credentials, log);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (_, arrivals) = sidegate_proxy::inbound::own_calls();
        let serving = sidegate_proxy::inbound::serve(listener, Arc::clone(&shared), arrivals);
        let sidecar = Self {
            clock,
            root,
            shared,
            address,
            records: Mutex::new((records, Vec::new())),
            number: AtomicU64::new(0),
            serving: tokio::spawn(serving),
        };
        if setup.ready {
            sidecar.publish(&setup.policy);
        }
        sidecar
    }

    /// Puts `policy`, documents of YAML, into force.
    pub fn publish(&self, policy: &str) {
        let mut resources = ResourceStore::new();
        let file = ("policy.yaml".to_owned(), policy.to_owned());
        let problems = resources.replace_folder(&[file]);
        assert!(problems.is_empty(), "{problems:?}");
        let number = self.number.fetch_add(1, Ordering::Relaxed) + 1;
        let set = resources.resources();
        let (snapshot, _) = Snapshot::compile(set, &self.shared.workload, number);
        self.shared.state.publish(Arc::new(snapshot));
    }

    /// Replaces what the sidecar trusts.
    pub fn trust(&self, trust: Trust) {
        self.shared.credentials.publish_trust(trust).unwrap();
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
                assert!(
                    since.elapsed() < PATIENCE,
                    "no such record at {place}; seen: {seen}"
                );
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

    /// The record of the call to `path`.
    #[track_caller]
    pub fn record_of(&self, path: &str) -> impl Future<Output = Record> {
        let path = path.to_owned();
        self.record(move |record| record.path.as_deref() == Some(&path))
    }

    /// What `/metrics` would say of failed handshakes for `reason`.
    pub fn connections(&self) -> usize {
        self.shared.connections.list().len()
    }

    /// Every call that runs, as `GET /connections` lists it.
    pub fn calls(&self) -> usize {
        let list = self.shared.connections.list();
        list.iter().map(|connection| connection.calls.len()).sum()
    }

    pub async fn served(self) {
        soon(self.serving).await.unwrap();
    }
}

fn shared(
    setup: &Setup,
    clock: &ManualClock,
    credentials: Arc<CredentialStore>,
    log: access_log::Handle,
) -> Arc<Shared> {
    let config = config(setup);
    let mut registry = Registry::default();
    let metrics = Arc::new(Metrics::new(&mut registry, config.limits.metric_series_max));
    let clock: Arc<dyn Clock> = Arc::new(clock.clone());
    Arc::new(Shared {
        workload: Arc::new(config.workload().unwrap()),
        state: State::new(),
        credentials,
        limits: Limits::new(&config.limits, &metrics),
        metrics,
        log,
        drain: Drain::new(Arc::clone(&clock)),
        services: Services::new(Arc::clone(&clock)),
        destinations: None,
        originals: Arc::new(Kernel),
        own: Own::of(&config),
        clock,
        connections: Connections::new(),
        config: Arc::new(config),
    })
}

fn config(setup: &Setup) -> Config {
    use std::fmt::Write as _;
    let mut text = "workload:\n  namespace: shop\n  serviceAccount: orders\n  \
         labels: { app: orders }\nca:\n  root: /nonexistent/root.pem\n  joinToken: unused\n\
         resources: /nonexistent\nports:\n"
        .to_owned();
    for port in &setup.ports {
        let Port {
            name,
            port,
            address,
        } = port;
        writeln!(
            text,
            "  - {{ name: {name}, port: {port}, address: \"{address}\" }}"
        )
        .unwrap();
    }
    text.push_str(&setup.more);
    if setup.audit {
        text = text.replace("workload:\n", "workload:\n  enforcement: audit\n");
    }
    Config::from_yaml("test.yaml", &text).unwrap()
}

/// `shop/web` may read orders, open their events, and call gRPC; everybody may ask for health.
pub const READERS: &str = r#"
apiVersion: sidegate.dev/v1alpha1
kind: AuthorizationPolicy
metadata: { name: orders, namespace: shop }
spec:
  selector: { matchLabels: { app: orders } }
  ports: [http]
  action: Allow
  mode: Enforce
  rules:
    - name: readers
      from: [{ workload: { serviceAccount: web } }]
      to:
        - http: { methods: [GET, HEAD, POST], paths: ["/orders", "/orders/**", "/app/**"] }
        - http: { methods: [GET], paths: ["/orders/*/events"], upgrades: [websocket] }
        - grpc: { service: shop.v1.Orders, methods: [Get, Watch, Chat] }
    - name: health
      from: [{ anyone: {} }]
      to: [{ http: { methods: [GET], paths: [/healthz] } }]
"#;

/// Nothing but health.
pub const HEALTH_ONLY: &str = r#"
apiVersion: sidegate.dev/v1alpha1
kind: AuthorizationPolicy
metadata: { name: orders, namespace: shop }
spec:
  selector: { matchLabels: { app: orders } }
  ports: [http]
  action: Allow
  mode: Enforce
  rules:
    - name: health
      from: [{ anyone: {} }]
      to: [{ http: { methods: [GET], paths: [/healthz] } }]
"#;

/// `shop/web` may open opaque connections to the port `tcp`.
pub const OPAQUE: &str = r#"
apiVersion: sidegate.dev/v1alpha1
kind: AuthorizationPolicy
metadata: { name: ledger, namespace: shop }
spec:
  selector: { matchLabels: { app: orders } }
  ports: [tcp]
  action: Allow
  mode: Enforce
  rules:
    - name: web
      from: [{ workload: { serviceAccount: web } }]
      to: [{ tcp: {} }]
"#;

/// Nobody may open opaque connections any more, but the port still carries them.
pub const OPAQUE_FOR_NOBODY: &str = r#"
apiVersion: sidegate.dev/v1alpha1
kind: AuthorizationPolicy
metadata: { name: ledger, namespace: shop }
spec:
  selector: { matchLabels: { app: orders } }
  ports: [tcp]
  action: Allow
  mode: Enforce
  rules:
    - name: web
      from: [{ workload: { serviceAccount: nobody } }]
      to: [{ tcp: {} }]
"#;
