//! What a sidecar needs around it: a CA in the test's own process, files, a clock.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use sidegate_api::identity as proto;
use sidegate_mesh::{Clock, SpiffeId};
use sidegate_mtls::{
    BoxFuture, BundleStream, BundleWatch, Issue, IssueError, IssueRequest, SystemClock, TrustUpdate,
};
use sidegate_proxy::config::Config;
use sidegate_proxy::sidecar::{Sidecar, StartError};
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

/// A trust domain with its root, and a folder for everything.
pub struct Mesh {
    pub folder: tempfile::TempDir,
    root: Arc<Root>,
}

struct Root {
    params: CertificateParams,
    key: KeyPair,
    der: CertificateDer<'static>,
    serial: AtomicU64,
}

impl Mesh {
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name = name("root");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![uri("spiffe://mesh.local")];
        params.not_before = moment(SystemClock.now() - Duration::from_hours(1));
        params.not_after = moment(SystemClock.now() + Duration::from_hours(24));
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("root.pem"), certificate.pem()).unwrap();
        std::fs::create_dir(folder.path().join("resources")).unwrap();
        let root = Root {
            der: certificate.der().clone(),
            params,
            key,
            serial: AtomicU64::new(1),
        };
        Self {
            folder,
            root: Arc::new(root),
        }
    }

    /// Writes one resource file, as an editor that renames does.
    pub fn resource(&self, name: &str, text: &str) {
        let path = self.resources().join(name);
        let draft = self.folder.path().join("draft");
        std::fs::write(&draft, text).unwrap();
        std::fs::rename(draft, path).unwrap();
    }

    pub fn resources(&self) -> PathBuf {
        self.folder.path().join("resources")
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// A configuration on free ports; `more` is further YAML.
    pub fn config(&self, namespace: &str, service_account: &str, more: &str) -> Config {
        let folder = self.folder.path().display();
        let text = format!(
            "workload:
  namespace: {namespace}
  serviceAccount: {service_account}
  labels: {{ app: {service_account} }}
ca: {{ root: {folder}/root.pem, joinToken: secret-of-{service_account} }}
resources: {folder}/resources
outbound: {{ address: '127.0.0.1:0' }}
inbound: {{ address: '127.0.0.1:0' }}
admin: {{ address: '127.0.0.1:0' }}
health: {{ address: '127.0.0.1:0' }}
log: {{ path: {folder}/{service_account}.jsonl }}
drainGrace: 10ms
{more}"
        );
        Config::from_yaml("test.yaml", &text).unwrap()
    }

    /// The configuration of `shop/orders` in a pod at 127.0.0.1 of a cluster whose controller is at
    /// `controller`; `more` is further YAML.
    pub fn cluster_config(&self, controller: SocketAddr, more: &str) -> Config {
        let folder = self.folder.path().display();
        let text = format!(
            "workload: {{ namespace: shop, serviceAccount: orders }}
ca: {{ root: {folder}/root.pem, tokenFile: {folder}/token }}
controller: {{ address: '{controller}' }}
destination: original
pod: {{ name: orders-1, uid: uid-of-orders-1, ips: [127.0.0.1], node: node-1 }}
outbound: {{ address: '127.0.0.1:0' }}
inbound: {{ address: '127.0.0.1:0' }}
admin: {{ address: '127.0.0.1:0' }}
health: {{ address: '127.0.0.1:0' }}
log: {{ path: {folder}/orders.jsonl }}
drainGrace: 10ms
{more}"
        );
        Config::from_yaml("test.yaml", &text).unwrap()
    }

    /// An issuer of certificates for one workload.
    pub fn issuer(&self, config: &Config) -> Arc<TestIssuer> {
        self.issuer_of(config.workload().unwrap().id)
    }

    pub fn issuer_of(&self, id: SpiffeId) -> Arc<TestIssuer> {
        Arc::new(TestIssuer {
            id,
            root: Arc::clone(&self.root),
            up: AtomicBool::new(true),
            life: Mutex::new(Duration::from_hours(1)),
        })
    }

    pub fn start(&self, config: Config) -> Result<Sidecar, StartError> {
        let issuer = self.issuer(&config);
        Sidecar::start_with_issuer(config, Arc::new(SystemClock), issuer)
    }
}

/// Issues for one workload, while it is up.
pub struct TestIssuer {
    id: SpiffeId,
    root: Arc<Root>,
    up: AtomicBool,
    life: Mutex<Duration>,
}

impl TestIssuer {
    pub fn set_up(&self, up: bool) {
        self.up.store(up, Ordering::SeqCst);
    }

    pub fn set_life(&self, life: Duration) {
        *self.life.lock().unwrap() = life;
    }

    fn sign(&self, csr: &[u8]) -> CertificateDer<'static> {
        let request = CertificateSigningRequestParams::from_der(&csr.into()).unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![uri(self.id.as_str())];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let now = SystemClock.now();
        params.not_before = moment(now - Duration::from_secs(30));
        params.not_after = moment(now + *self.life.lock().unwrap());
        params.use_authority_key_identifier_extension = true;
        let serial = self.root.serial.fetch_add(1, Ordering::SeqCst);
        params.serial_number = Some(SerialNumber::from(serial));
        let issuer = Issuer::from_params(&self.root.params, &self.root.key);
        let certificate = params.signed_by(&request.public_key, &issuer).unwrap();
        certificate.der().clone()
    }

    fn bundle(&self) -> proto::WatchBundleResponse {
        proto::WatchBundleResponse {
            sequence: 1,
            bundles: vec![proto::TrustDomainBundle {
                trust_domain: "mesh.local".into(),
                roots: vec![self.root.der.to_vec()],
            }],
            revocations: None,
            refresh_hint_seconds: 300,
        }
    }
}

impl Issue for TestIssuer {
    fn issue(
        &self,
        request: IssueRequest,
    ) -> BoxFuture<'_, Result<Vec<CertificateDer<'static>>, IssueError>> {
        Box::pin(async move {
            if !self.up.load(Ordering::SeqCst) {
                return Err(IssueError::Failed("the test's CA is down".into()));
            }
            Ok(vec![self.sign(&request.csr)])
        })
    }

    fn watch_bundle(&self, _: BundleWatch) -> BoxFuture<'_, Result<BundleStream, IssueError>> {
        Box::pin(async move {
            use futures_util::StreamExt;
            let (acknowledgements, received) = mpsc::channel(8);
            let first = Ok(TrustUpdate::new(self.bundle()));
            let updates = futures_util::stream::iter([first]);
            // Open for ever; what is acknowledged is thrown away.
            let rest = futures_util::stream::unfold(received, |mut received| async move {
                while received.recv().await.is_some() {}
                std::future::pending().await
            });
            Ok(BundleStream {
                updates: Box::pin(updates.chain(rest)),
                acknowledgements,
            })
        })
    }
}

fn name(text: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, text);
    name
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn moment(at: SystemTime) -> OffsetDateTime {
    OffsetDateTime::from(at)
}

/// An answer of a plain HTTP port.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Sends these bytes, and reads until the other side closes.
pub async fn exchange(address: SocketAddr, request: &str) -> Answer {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    Answer {
        status: status.unwrap_or_default(),
        head: head.to_owned(),
        body: body.to_owned(),
    }
}

/// A plain GET.
pub async fn get(address: SocketAddr, path: &str) -> Answer {
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    exchange(address, &request).await
}

/// Asks again until `accept` says yes; panics with the last answer after a minute.
pub async fn until(address: SocketAddr, path: &str, accept: impl Fn(&Answer) -> bool) -> Answer {
    let begin = std::time::Instant::now();
    loop {
        let answer = get(address, path).await;
        if accept(&answer) {
            return answer;
        }
        assert!(
            begin.elapsed() < Duration::from_mins(1),
            "{path}: {answer:?}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
