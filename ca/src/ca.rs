//! The whole CA: from a configuration to running sockets, and back.
//!
//! Invariant: nothing here is global to the process; several CAs can run in one. A CA serves only
//! after its state has been checked and its own certificates are made.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use sidegate_mesh::clock::Clock;
use sidegate_mesh::spiffe::TrustDomain;
use sidegate_mtls::{BundleError, serve_health};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::authority::{Intermediate, Root};
use crate::config::{Config, ConfigError, Kubernetes};
use crate::digest::{NoRandomness, Serial};
use crate::issuer::{Issuer, Parts, RenewalError, is_current, obtain_intermediate};
use crate::key::Key;
use crate::keystore::{FolderKeys, KeyStore};
use crate::kubernetes::attest::Attestor;
use crate::kubernetes::secret::{SecretError, SecretKeys, Stored};
use crate::kubernetes::{self, ApiError, Cluster, bundle};
use crate::ledger::file::FileLedger;
use crate::ledger::{Event, Ledger, LedgerError};
use crate::operations::{CreatedToken, OperationError};
use crate::registry::{Registry, RootState};
use crate::roots::{self, Found, LEDGER, ROOT, RootsError};
use crate::state::{StateError, StateFolder};
use crate::{admin, server};

/// How long open calls may take to end when the CA stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest time between two looks at what has to be renewed.
const MAINTENANCE_INTERVAL: Duration = Duration::from_mins(1);

/// How often an API server that does not answer is asked again when the CA starts, once a second.
const API_TRIES: usize = 30;

/// A root's end is warned of this many days before.
const WARNINGS_DAYS: [u64; 3] = [7, 14, 30];

/// The certificate authority.
pub struct Ca;

/// Why a CA does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A value of the configuration is impossible.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The state folder cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// Roots or intermediate cannot be used.
    #[error(transparent)]
    Roots(#[from] RootsError),
    /// The ledger cannot be used.
    #[error(
        "{0}; restore the state folder from a backup: without its ledger a CA does not know what it issued"
    )]
    Ledger(#[from] LedgerError),
    /// The folder is another trust domain's.
    #[error(
        "the state in {} is trust domain {found}'s, and the configuration says {configured}; change trustDomain or stateDir", path.display()
    )]
    TrustDomain {
        /// The state folder.
        path: PathBuf,
        /// Whose it is.
        found: TrustDomain,
        /// What was configured.
        configured: TrustDomain,
    },
    /// The keys of a cluster cannot be used.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// The Kubernetes API does not do what a CA needs.
    #[error(transparent)]
    Kubernetes(#[from] ApiError),
    /// The CA cannot make its own certificates.
    #[error("cannot make the CA's own certificates: {0}")]
    Own(#[from] RenewalError),
    /// The bundle that the ledger describes is not usable.
    #[error("the bundle is not usable: {0}")]
    Bundle(#[from] BundleError),
    /// A socket cannot be opened.
    #[error("cannot listen on {address} for {purpose}: {source}; is another CA running?")]
    Listen {
        /// Where.
        address: String,
        /// What for.
        purpose: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl From<NoRandomness> for StartError {
    fn from(error: NoRandomness) -> Self {
        Self::Own(error.into())
    }
}

/// A CA that serves. Dropping it stops it; [`Self::shutdown`] also waits.
pub struct RunningCa {
    issuer: Arc<Issuer>,
    ledger: Arc<FileLedger>,
    address: SocketAddr,
    metrics_address: SocketAddr,
    cancel: CancellationToken,
}

impl Ca {
    /// Opens or makes the state, and serves on the configured sockets. Call it within a tokio
    /// runtime; what it starts runs there until [`RunningCa::shutdown`].
    ///
    /// # Errors
    ///
    /// [`StartError`], which says what is wrong and what to do. Nothing is left running.
    pub async fn start(config: Config, clock: Arc<dyn Clock>) -> Result<RunningCa, StartError> {
        config.check()?;
        if config.kubernetes.is_some() {
            let client = kubernetes::client().await?;
            return Self::start_in_cluster(config, clock, client).await;
        }
        let opening = (config.clone(), Arc::clone(&clock));
        let open = tokio::task::spawn_blocking(move || Opened::open(&opening.0, &opening.1));
        let opened = open
            .await
            .map_err(|error| RenewalError::Svid(error.to_string()))??;
        Self::serve(opened, config, clock).await
    }

    /// As [`Self::start`], in the cluster that `client` talks to. Without a section `kubernetes`
    /// the configuration's defaults for it are used.
    ///
    /// # Errors
    ///
    /// As [`Self::start`].
    pub async fn start_in_cluster(
        config: Config,
        clock: Arc<dyn Clock>,
        client: kube::Client,
    ) -> Result<RunningCa, StartError> {
        config.check()?;
        let opened = Opened::open_in_cluster(&config, &clock, client).await?;
        Self::serve(opened, config, clock).await
    }

    async fn serve(
        opened: Opened,
        config: Config,
        clock: Arc<dyn Clock>,
    ) -> Result<RunningCa, StartError> {
        let ledger = Arc::clone(&opened.ledger);
        let issuer = opened.into_issuer(config, clock).await?;
        issuer.renew_own().await?;
        if issuer.folder.in_first_start() {
            issuer.folder.finish_first_start()?;
        }
        let cancel = CancellationToken::new();
        let running = listen(issuer, ledger, &cancel).await;
        if running.is_err() {
            cancel.cancel();
        }
        running
    }
}

impl RunningCa {
    /// Where sidecars reach it.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where `/metrics` is.
    pub fn metrics_address(&self) -> SocketAddr {
        self.metrics_address
    }

    /// The file that sidecars start their trust with; there is none in a cluster.
    pub fn root_path(&self) -> PathBuf {
        self.issuer.folder.path(ROOT)
    }

    /// The administration's Unix socket.
    pub fn admin_socket(&self) -> PathBuf {
        self.issuer.config.admin_socket()
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.issuer.config.trust_domain
    }

    /// Makes a join token, as `sidegate-ca token create` does.
    ///
    /// # Errors
    ///
    /// [`OperationError`].
    pub async fn create_token(
        &self,
        namespace: &str,
        service_account: &str,
    ) -> Result<CreatedToken, OperationError> {
        self.issuer
            .create_token(namespace, service_account, None)
            .await
    }

    /// Everything that an administrator may do.
    pub fn issuer(&self) -> &Arc<Issuer> {
        &self.issuer
    }

    /// Ends open calls, writes what is queued, and gives the state folder free.
    pub async fn shutdown(self) {
        self.cancel.cancel();
        self.issuer.tracker.close();
        let stopped = tokio::time::timeout(STOP_TIMEOUT, self.issuer.tracker.wait());
        if stopped.await.is_err() {
            tracing::warn!("some calls did not end in time");
        }
        let ledger = Arc::clone(&self.ledger);
        if let Err(error) = tokio::task::spawn_blocking(move || ledger.close()).await {
            tracing::error!(error = %error, "the ledger was not closed");
        }
        // Explicitly: a connection that is being torn down may hold the issuer a little longer.
        if let Err(error) = self.issuer.folder.release() {
            tracing::error!(error = %error, "the state folder stays locked");
        }
        if let Err(error) = std::fs::remove_file(self.admin_socket()) {
            tracing::debug!(error = %error, "the administration's socket stays");
        }
        tracing::info!("stopped");
    }
}

impl Drop for RunningCa {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

/// The state, checked.
struct Opened {
    folder: Arc<StateFolder>,
    keys: Arc<dyn KeyStore>,
    cluster: Option<Arc<Cluster>>,
    ledger: Arc<FileLedger>,
    registry: Registry,
    intermediate: Option<Intermediate>,
    torn: u64,
}

impl Opened {
    /// Blocks.
    fn open(config: &Config, clock: &Arc<dyn Clock>) -> Result<Self, StartError> {
        let folder = Arc::new(StateFolder::open(&config.state_dir)?);
        let now = clock.now();
        let first = match roots::look(&folder)? {
            Found::Everything => None,
            Found::Nothing => Some(create(&folder, &config.trust_domain, now)?),
        };
        let mut registry = Registry::new(config.trust_domain.clone());
        let (ledger, torn) = FileLedger::open(
            &folder.path(LEDGER),
            Arc::clone(clock),
            config.limits.ledger_queue_max,
            &mut |entry| registry.replay(entry, now),
        )?;
        if let Some(created) = first {
            registry.apply(&created);
            ledger.append_now(created)?;
        }
        check_ledger(&folder, config, &registry)?;
        registry.prune(now);
        roots::check(&folder, &registry, now)?;
        let intermediate = roots::load_intermediate(&folder, &registry, now)?;
        Ok(Self {
            keys: Arc::new(FolderKeys::new(Arc::clone(&folder))),
            cluster: None,
            folder,
            ledger: Arc::new(ledger),
            registry,
            intermediate,
            torn,
        })
    }

    async fn open_in_cluster(
        config: &Config,
        clock: &Arc<dyn Clock>,
        client: kube::Client,
    ) -> Result<Self, StartError> {
        let settings = config.kubernetes.clone().unwrap_or_default();
        let folder = Arc::new(StateFolder::open_volume(&config.state_dir)?);
        let path = folder.path(LEDGER);
        let used = std::fs::metadata(&path).is_ok_and(|ledger| ledger.len() > 0);
        let keys = SecretKeys::new(
            client.clone(),
            &settings,
            &config.trust_domain,
            Arc::clone(clock),
        );
        let stored = open_keys(&keys, used.then_some(path.as_path()), &**clock).await?;
        publish_first(&client, &settings, &stored, &**clock).await?;
        let opening = (config.clone(), Arc::clone(clock), Arc::clone(&folder));
        let open = tokio::task::spawn_blocking(move || {
            open_ledger_in_cluster(&opening.0, &opening.1, &opening.2, stored)
        });
        let (ledger, torn, registry, intermediate) = open
            .await
            .map_err(|error| RenewalError::Svid(error.to_string()))??;
        let trust_domain = config.trust_domain.clone();
        let attestor = Attestor::new(
            client.clone(),
            settings.clone(),
            trust_domain,
            &config.limits,
            Arc::clone(clock),
        );
        let cluster = Cluster {
            client,
            settings,
            attestor,
        };
        Ok(Self {
            folder,
            keys: Arc::new(keys),
            cluster: Some(Arc::new(cluster)),
            ledger: Arc::new(ledger),
            registry,
            intermediate,
            torn,
        })
    }

    async fn into_issuer(
        self,
        config: Config,
        clock: Arc<dyn Clock>,
    ) -> Result<Arc<Issuer>, StartError> {
        if self.torn > 0 {
            tracing::warn!(
                bytes = self.torn,
                "the ledger's last line was cut off by a crash; it was never acknowledged and is removed"
            );
            let event = Event::Repaired { bytes: self.torn };
            self.ledger.append(event).await?;
        }
        let registry = Mutex::new(self.registry);
        let intermediate = if let Some(intermediate) = self.intermediate {
            intermediate
        } else {
            let lock = || registry.lock().unwrap_or_else(PoisonError::into_inner);
            obtain_intermediate(&*self.keys, &*self.ledger, lock, &*clock).await?
        };
        let registry = registry
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        let ledger: Arc<dyn Ledger> = self.ledger;
        Ok(Issuer::new(Parts {
            config,
            clock,
            folder: self.folder,
            keys: self.keys,
            cluster: self.cluster,
            ledger,
            registry,
            intermediate,
            tracker: TaskTracker::new(),
        })?)
    }
}

/// Reads the keys, or makes them; waits for an API server that is only starting.
async fn open_keys(
    keys: &SecretKeys,
    ledger: Option<&Path>,
    clock: &dyn Clock,
) -> Result<Stored, StartError> {
    let mut tries = 0;
    loop {
        tries += 1;
        match keys.open(ledger).await {
            Err(SecretError::Api(error)) if error.is_passing() && tries < API_TRIES => {
                tracing::warn!(error = %error, "waiting for the Kubernetes API");
                clock.sleep(Duration::from_secs(1)).await;
            }
            opened => return Ok(opened?),
        }
    }
}

/// Says that the installation has begun, before anything is signed: from now on a Secret that is
/// missing is an error.
async fn publish_first(
    client: &kube::Client,
    settings: &Kubernetes,
    stored: &Stored,
    clock: &dyn Clock,
) -> Result<(), StartError> {
    let pem = bundle::root_pem(&stored.shared.roots);
    let mut tries = 0;
    loop {
        tries += 1;
        match bundle::publish(client, settings, &settings.namespace, &pem).await {
            Err(error) if error.is_passing() && tries < API_TRIES => {
                tracing::warn!(error = %error, "waiting for the Kubernetes API");
                clock.sleep(Duration::from_secs(1)).await;
            }
            published => return Ok(published?),
        }
    }
}

type LedgerInCluster = (FileLedger, u64, Registry, Option<Intermediate>);

/// The replica's own ledger. What it says of roots and revocations is history: what counts is in
/// the Secret. Blocks.
fn open_ledger_in_cluster(
    config: &Config,
    clock: &Arc<dyn Clock>,
    folder: &StateFolder,
    mut stored: Stored,
) -> Result<LedgerInCluster, StartError> {
    let now = clock.now();
    let mut registry = Registry::new(config.trust_domain.clone());
    let (ledger, torn) = FileLedger::open(
        &folder.path(LEDGER),
        Arc::clone(clock),
        config.limits.ledger_queue_max,
        &mut |entry| registry.replay(entry, now),
    )?;
    let active = stored.shared.roots.iter();
    let active = active.map(|known| &known.root.der).next();
    if let (0, Some(root)) = (ledger.head().entries, active) {
        let created = Event::Created {
            trust_domain: config.trust_domain.clone(),
            root: BASE64.encode(root),
            sequence: stored.shared.sequence,
        };
        registry.apply(&created);
        ledger.append_now(created)?;
    }
    check_ledger(folder, config, &registry)?;
    let intermediate = stored.take_intermediate();
    registry.adopt(stored.shared);
    registry.prune(now);
    let intermediate = intermediate.filter(|i| is_current(i, &registry, now));
    Ok((ledger, torn, registry, intermediate))
}

/// Makes a CA's first root. What a crash leaves of it is not believed: see
/// [`StateFolder::begin_first_start`].
fn create(
    folder: &StateFolder,
    trust_domain: &TrustDomain,
    now: SystemTime,
) -> Result<Event, StartError> {
    folder.begin_first_start()?;
    let key = Key::generate()?;
    let root =
        Root::make(trust_domain, &key, Serial::random()?, now).map_err(RenewalError::from)?;
    roots::create_root(folder, &root, &key.to_pem()?)?;
    let registry = Registry::new(trust_domain.clone());
    tracing::info!(trust_domain = %trust_domain, "new certificate authority");
    Ok(Event::Created {
        trust_domain: trust_domain.clone(),
        root: BASE64.encode(&root),
        sequence: registry.next_sequence(now),
    })
}

fn check_ledger(
    folder: &StateFolder,
    config: &Config,
    registry: &Registry,
) -> Result<(), StartError> {
    let found = registry.created_for().ok_or_else(|| RootsError::Piece {
        path: folder.path(LEDGER),
        problem: "it does not begin with the CA's own entry".to_owned(),
        help: "restore it from a backup",
    })?;
    if *found != config.trust_domain {
        return Err(StartError::TrustDomain {
            path: config.state_dir.clone(),
            found: found.clone(),
            configured: config.trust_domain.clone(),
        });
    }
    match registry.problems().first() {
        None => Ok(()),
        Some(problem) => Err(RootsError::Piece {
            path: folder.path(LEDGER),
            problem: problem.clone(),
            help: "restore it from a backup",
        }
        .into()),
    }
}

async fn listen(
    issuer: Arc<Issuer>,
    ledger: Arc<FileLedger>,
    cancel: &CancellationToken,
) -> Result<RunningCa, StartError> {
    let config = &issuer.config;
    let (identity, address) = bind(config.address, "sidecars").await?;
    let (metrics, metrics_address) = bind(config.metrics_address, "metrics").await?;
    let socket = config.admin_socket();
    let admin = admin::bind(&socket).map_err(|source| StartError::Listen {
        address: socket.display().to_string(),
        purpose: "the administration",
        source,
    })?;
    let tracker = &issuer.tracker;
    let identity = server::serve(identity, Arc::clone(&issuer), cancel.clone());
    tracker.spawn(async move {
        if let Err(error) = identity.await {
            tracing::error!(error = %error, "the identity API has ended");
        }
    });
    let admin = admin::serve(admin, Arc::clone(&issuer), cancel.clone());
    tracker.spawn(async move {
        if let Err(error) = admin.await {
            tracing::error!(error = %error, "the administration has ended");
        }
    });
    tracker.spawn(serve_health(
        metrics,
        Arc::<Issuer>::clone(&issuer),
        Arc::clone(&issuer.clock),
        tracker.clone(),
        cancel.clone(),
    ));
    tracker.spawn(maintain(Arc::clone(&issuer), cancel.clone()));
    if issuer.cluster.is_some() {
        tracker.spawn(kubernetes::follow(Arc::clone(&issuer), cancel.clone()));
        tracker.spawn(bundle::run(Arc::clone(&issuer), cancel.clone()));
    }
    let id = issuer.own_id().map(|id| id.to_string()).unwrap_or_default();
    tracing::info!(
        peer.id = id,
        %address,
        metrics = %metrics_address,
        admin = %socket.display(),
        root = root_place(&issuer),
        "serving"
    );
    Ok(RunningCa {
        issuer,
        ledger,
        address,
        metrics_address,
        cancel: cancel.clone(),
    })
}

/// Where the bundle is that a sidecar starts its trust with.
fn root_place(issuer: &Issuer) -> String {
    match &issuer.cluster {
        None => issuer.folder.path(ROOT).display().to_string(),
        Some(cluster) => {
            let name = &cluster.settings.bundle_config_map;
            format!("ConfigMap {name} in each labelled namespace")
        }
    }
}

async fn bind(
    address: SocketAddr,
    purpose: &'static str,
) -> Result<(TcpListener, SocketAddr), StartError> {
    let failed = |source| StartError::Listen {
        address: address.to_string(),
        purpose,
        source,
    };
    let listener = match TcpListener::bind(address).await {
        // `[::]` is every address, of either kind, unless the system has only one.
        Err(error) if is_without_v6(address, &error) => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    };
    let listener = listener.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok((listener, address))
}

fn is_without_v6(address: SocketAddr, error: &io::Error) -> bool {
    let code = error.raw_os_error();
    let refused = [
        rustix::io::Errno::AFNOSUPPORT,
        rustix::io::Errno::ADDRNOTAVAIL,
    ];
    let refused = refused.map(|errno| Some(errno.raw_os_error()));
    address.ip() == Ipv6Addr::UNSPECIFIED && refused.contains(&code)
}

/// Renews what the CA itself holds, forgets what has expired, and warns of the root's end.
async fn maintain(issuer: Arc<Issuer>, cancel: CancellationToken) {
    let mut warned = None;
    loop {
        let now = issuer.clock.now();
        warned = warn_of_root_end(&issuer, now, warned);
        if let Err(error) = renew(&issuer, now).await {
            tracing::warn!(error = %error, "the CA's own certificate was not renewed; trying again");
        }
        {
            let mut registry = issuer.registry();
            registry.prune(now);
            issuer.watchers().prune(&registry);
        }
        let wake = issuer.clock.sleep_until(next_look(&issuer));
        tokio::select! {
            () = cancel.cancelled() => return,
            () = wake => {}
        }
    }
}

async fn renew(issuer: &Arc<Issuer>, now: SystemTime) -> Result<(), RenewalError> {
    if issuer.intermediate_is_due() {
        let _held = issuer.change.lock().await;
        issuer.renew_intermediate().await?;
        return issuer.renew_own().await;
    }
    if own_half_life(issuer).is_none_or(|half| now >= half) {
        return issuer.renew_own().await;
    }
    Ok(())
}

fn own_half_life(issuer: &Issuer) -> Option<SystemTime> {
    let credentials = issuer.store.current()?;
    let svid = credentials.svid();
    let life = svid.not_after.duration_since(svid.not_before).ok()?;
    Some(svid.not_before + life / 2)
}

/// The next renewal, but not later than a minute from now, and not before a second has passed: what
/// failed is tried again soon, and not at once.
fn next_look(issuer: &Issuer) -> SystemTime {
    let now = issuer.clock.now();
    let renewal = own_half_life(issuer)
        .unwrap_or(now)
        .min(issuer.intermediate().half_life());
    renewal
        .min(now + MAINTENANCE_INTERVAL)
        .max(now + Duration::from_secs(1))
}

fn warn_of_root_end(issuer: &Issuer, now: SystemTime, warned: Option<u64>) -> Option<u64> {
    let end = issuer
        .registry()
        .root(RootState::Active)
        .map(|root| root.not_after)?;
    let days = end.duration_since(now).unwrap_or_default().as_secs() / 86_400;
    let reached = WARNINGS_DAYS
        .into_iter()
        .find(|threshold| days < *threshold);
    if reached.is_some() && reached != warned {
        tracing::warn!(
            days,
            not_after = %humantime::format_rfc3339_seconds(end),
            "the root ends soon: run `sidegate-ca root prepare`, then `root activate`"
        );
    }
    reached
}
