//! A CA in this process on a clock that stands still, and callers of it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::StreamExt;
use rustls_pki_types::CertificateDer;
use sidegate_ca::{Ca, Config, RunningCa, StartError};
use sidegate_mesh::clock::{Clock, ManualClock};
use sidegate_mesh::spiffe::{SpiffeId, TrustDomain};
use sidegate_mtls::{
    Acknowledgement, BundleSet, BundleStream, BundleWatch, CaClient, CaClientConfig, Evidence,
    Issue, IssueError, IssueRequest, JoinToken, Svid, Trust, TrustUpdate, Verifier, VerifyLimits,
    WorkloadKey, crypto_provider,
};
use tempfile::TempDir;

/// Longest wait for something that must happen.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

pub(crate) struct Bed {
    _folder: TempDir,
    pub(crate) config: Config,
    pub(crate) clock: ManualClock,
    running: Option<RunningCa>,
}

impl Bed {
    pub(crate) async fn new() -> Self {
        Self::with(|_| {}).await
    }

    pub(crate) async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::new(folder.path().join("state"));
        config.address = "127.0.0.1:0".parse().unwrap();
        config.metrics_address = "127.0.0.1:0".parse().unwrap();
        change(&mut config);
        let start = SystemTime::UNIX_EPOCH + Duration::from_hours(500_000);
        let mut bed = Self {
            _folder: folder,
            config,
            clock: ManualClock::new(start),
            running: None,
        };
        bed.start().await.unwrap();
        bed
    }

    pub(crate) async fn start(&mut self) -> Result<(), StartError> {
        self.running = Some(Ca::start(self.config.clone(), self.clock()).await?);
        Ok(())
    }

    pub(crate) async fn stop(&mut self) {
        self.running.take().unwrap().shutdown().await;
    }

    pub(crate) async fn restart(&mut self) {
        self.stop().await;
        self.start().await.unwrap();
    }

    pub(crate) fn ca(&self) -> &RunningCa {
        self.running.as_ref().unwrap()
    }

    pub(crate) fn clock(&self) -> Arc<dyn Clock> {
        Arc::new(self.clock.clone())
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.config.state_dir.join(name)
    }

    pub(crate) fn trust_domain(&self) -> TrustDomain {
        self.config.trust_domain.clone()
    }

    /// Believes what the bootstrap file says.
    pub(crate) fn verifier(&self) -> Arc<Verifier> {
        let pem = std::fs::read(self.file("root.pem")).unwrap();
        let bundles = BundleSet::from_pem(&self.trust_domain(), &pem).unwrap();
        let trust = Trust::from_bundles(bundles);
        Arc::new(Verifier::from_trust(trust, VerifyLimits::default()))
    }

    pub(crate) fn client(&self, evidence: Evidence) -> CaClient {
        let address = self.ca().address().to_string();
        let config = CaClientConfig::new(&self.trust_domain(), address, evidence).unwrap();
        CaClient::new(config, crypto_provider(), self.clock())
    }

    pub(crate) async fn token(&self, service_account: &str) -> String {
        let created = self.ca().create_token("shop", service_account).await;
        created.unwrap().token.to_string()
    }

    pub(crate) fn id(&self, service_account: &str) -> SpiffeId {
        SpiffeId::for_workload(&self.trust_domain(), "shop", service_account).unwrap()
    }

    pub(crate) async fn join(
        &self,
        token: &str,
        csr: &[u8],
    ) -> Result<Vec<CertificateDer<'static>>, IssueError> {
        let client = self.client(Evidence::JoinToken(JoinToken::new(token)));
        let request = IssueRequest {
            csr: csr.to_vec(),
            current: None,
            verifier: self.verifier(),
        };
        client.issue(request).await
    }

    pub(crate) async fn renew(
        &self,
        current: &Arc<Svid>,
        csr: &[u8],
    ) -> Result<Vec<CertificateDer<'static>>, IssueError> {
        let request = IssueRequest {
            csr: csr.to_vec(),
            current: Some(Arc::clone(current)),
            verifier: self.verifier(),
        };
        self.client(Evidence::None).issue(request).await
    }

    /// A workload that has just joined.
    pub(crate) async fn svid(&self, service_account: &str) -> Arc<Svid> {
        let token = self.token(service_account).await;
        let key = Key::new();
        let chain = self.join(&token, &key.csr).await.unwrap();
        key.svid(chain, &self.id(service_account))
    }

    /// The workload's next SVID.
    pub(crate) async fn renewed(&self, current: &Arc<Svid>) -> Arc<Svid> {
        let key = Key::new();
        let chain = self.renew(current, &key.csr).await.unwrap();
        key.svid(chain, &current.id)
    }

    pub(crate) async fn watch(&self, current: Option<&Arc<Svid>>) -> BundleStream {
        let watch = BundleWatch {
            current: current.cloned(),
            verifier: self.verifier(),
            acknowledgement: Acknowledgement::default(),
        };
        self.client(Evidence::None)
            .watch_bundle(watch)
            .await
            .unwrap()
    }

    /// What Prometheus would read.
    pub(crate) async fn metrics(&self) -> String {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let address = self.ca().metrics_address();
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = b"GET /metrics HTTP/1.1\r\nhost: ca\r\nconnection: close\r\n\r\n";
        stream.write_all(request).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    #[track_caller]
    pub(crate) fn ledger(&self) -> String {
        std::fs::read_to_string(self.file("ledger")).unwrap()
    }
}

/// A key and the request that asks for its certificate.
pub(crate) struct Key {
    pub(crate) key: WorkloadKey,
    pub(crate) csr: Vec<u8>,
}

impl Key {
    pub(crate) fn new() -> Self {
        Self::of(WorkloadKey::generate().unwrap())
    }

    pub(crate) fn of(key: WorkloadKey) -> Self {
        let csr = key.certificate_request().unwrap();
        Self { key, csr }
    }

    pub(crate) fn svid(&self, chain: Vec<CertificateDer<'static>>, id: &SpiffeId) -> Arc<Svid> {
        Arc::new(Svid::parse(chain, self.key.clone(), id).unwrap())
    }
}

#[track_caller]
pub(crate) fn check_refused<T: std::fmt::Debug>(
    answer: Result<T, IssueError>,
    expected: &str,
    words: &str,
) {
    match answer {
        Err(IssueError::Refused { code, message, .. }) => {
            assert_eq!(code, expected, "{message}");
            assert!(message.contains(words), "{words}: {message}");
        }
        other => panic!("expected {expected}, got {other:?}"),
    }
}

pub(crate) async fn next(stream: &mut BundleStream) -> TrustUpdate {
    let update = tokio::time::timeout(PATIENCE, stream.updates.next()).await;
    update
        .expect("a bundle comes")
        .expect("the stream goes on")
        .unwrap()
}

pub(crate) async fn acknowledge(stream: &BundleStream, update: &TrustUpdate, bed: &Bed) {
    let trust = update.check(&bed.trust_domain()).unwrap();
    let acknowledgement = Acknowledgement {
        sequence: update.sequence(),
        root_sha256: trust.root_hashes(&bed.trust_domain()),
        ..Acknowledgement::default()
    };
    stream.acknowledgements.send(acknowledgement).await.unwrap();
}

/// Waits until `done`, looking again and again: what is waited for happens in another task.
pub(crate) async fn until<F: Future<Output = bool>>(what: &str, mut done: impl FnMut() -> F) {
    let waiting = async {
        while !done().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let ended = tokio::time::timeout(PATIENCE, waiting).await;
    assert!(ended.is_ok(), "never happened: {what}");
}
