//! The injector as a whole: its identity, its watches, its ports.
//!
//! Invariants: it starts without the CA, the API server or a webhook configuration, and becomes
//! ready when they are there; told to end, it is not ready at once, serves on for the grace period,
//! finishes what it has begun, and leaves no task behind.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kube::Client;
use sidegate_mesh::SpiffeIdError;
use sidegate_mesh::clock::Clock;
use sidegate_mtls::{
    CaClient, CaClientConfig, CredentialStore, Evidence, IdentityConfig, IdentityError, Issue,
    RenewalPolicy, VerifyLimits, WorkloadIdentity, control_plane_id, crypto_provider, serve_health,
};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::ca_bundle::{CaBundle, Configuration};
use crate::config::Config;
use crate::connections::Connections;
use crate::health::Health;
use crate::metrics::Metrics;
use crate::namespaces::NamespaceWatch;
use crate::server::{self, Door};
use crate::webhook::Webhook;

/// How long the end may take beyond the grace period.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// Why an injector cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The identity cannot be looked after.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The trust domain makes no identity.
    #[error(transparent)]
    Id(#[from] SpiffeIdError),
    /// A port cannot be opened.
    #[error("cannot listen on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The root file cannot be read.
    #[error("root file {}", path.display())]
    RootFile {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A running injector.
pub struct Injector {
    address: SocketAddr,
    health_address: SocketAddr,
    health: Arc<Health>,
    clock: Arc<dyn Clock>,
    grace: Duration,
    tracker: TaskTracker,
    /// Ends the serving of reviews.
    serving: CancellationToken,
    /// Ends everything else.
    running: CancellationToken,
}

impl Injector {
    /// Starts with the CA of the configuration.
    ///
    /// # Errors
    ///
    /// [`StartError`] when a port or the root file cannot be used. That CA or API server are absent
    /// is no error.
    pub async fn start(
        config: Config,
        client: Client,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, StartError> {
        let provider = crypto_provider();
        let evidence = Evidence::ServiceAccountToken(config.token_file.clone());
        let injection = &config.injection;
        let ca = CaClientConfig::new(&injection.trust_domain, &injection.ca_address, evidence)?;
        let issuer = Arc::new(CaClient::new(ca, provider, Arc::clone(&clock)));
        Self::start_with(config, client, issuer, clock).await
    }

    /// As [`Self::start`], with certificates from `issuer`.
    ///
    /// # Errors
    ///
    /// As [`Self::start`].
    pub async fn start_with(
        config: Config,
        client: Client,
        issuer: Arc<dyn Issue>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, StartError> {
        let (tracker, running) = (TaskTracker::new(), CancellationToken::new());
        let listener = listen(config.address).await?;
        let health_listener = listen(config.health_address).await?;
        let store = CredentialStore::new(
            VerifyLimits::default(),
            crypto_provider(),
            Arc::clone(&clock),
        );
        let trust_domain = config.injection.trust_domain.clone();
        let root = std::fs::read(&config.root_file).map_err(|source| StartError::RootFile {
            path: config.root_file.clone(),
            source,
        })?;
        let identity = IdentityConfig {
            id: control_plane_id(&trust_domain, "sidegate-injector")?,
            trust_domain,
            root_file: config.root_file.clone(),
            state_dir: None,
            renewal: RenewalPolicy::default(),
        };
        let identity = WorkloadIdentity::start(
            identity,
            issuer,
            Arc::clone(&store),
            &tracker,
            running.clone(),
        )?;
        let metrics = Metrics::new();
        let connections = Connections::new(config.limits.connections_max);
        let health = Arc::new(Health {
            identity: Arc::clone(identity.status()),
            namespaces: NamespaceWatch::new(client.clone(), Arc::clone(&clock)),
            bundles: bundles(&config, &client, &store, &metrics),
            connections,
            metrics,
            store,
            root_file: config.root_file.clone(),
            root,
            is_ending: AtomicBool::new(false),
        });
        let injector = Self {
            address: address_of(&listener, config.address)?,
            health_address: address_of(&health_listener, config.health_address)?,
            health,
            clock,
            grace: config.shutdown_grace,
            tracker,
            serving: CancellationToken::new(),
            running,
        };
        let door = injector.door(config);
        injector.spawn(door, listener, health_listener);
        Ok(injector)
    }

    fn door(&self, config: Config) -> Arc<Door> {
        let health = &self.health;
        Arc::new(Door {
            store: Arc::clone(&health.store),
            webhook: Webhook {
                settings: config.injection,
                namespaces: Arc::<NamespaceWatch>::clone(&health.namespaces),
                metrics: Arc::clone(&health.metrics),
            },
            handshakes: Semaphore::new(config.limits.handshakes_max),
            reviews: Semaphore::new(config.limits.reviews_max),
            limits: config.limits,
            clock: Arc::clone(&self.clock),
            metrics: Arc::clone(&health.metrics),
            connections: Arc::clone(&health.connections),
            tracker: self.tracker.clone(),
        })
    }

    fn spawn(&self, door: Arc<Door>, listener: TcpListener, health_listener: TcpListener) {
        let namespaces = Arc::clone(&self.health.namespaces);
        self.spawn_until_end(async move { namespaces.follow().await });
        for bundle in &self.health.bundles {
            let bundle = Arc::clone(bundle);
            self.spawn_until_end(async move { bundle.follow().await });
        }
        self.tracker
            .spawn(server::serve(listener, door, self.serving.clone()));
        let (clock, tracker) = (Arc::clone(&self.clock), self.tracker.clone());
        let health = Arc::<Health>::clone(&self.health);
        let running = self.running.clone();
        self.tracker.spawn(serve_health(
            health_listener,
            health,
            clock,
            tracker,
            running,
        ));
    }

    fn spawn_until_end(&self, task: impl Future<Output = ()> + Send + 'static) {
        let running = self.running.clone();
        self.tracker.spawn(async move {
            tokio::select! {
                () = running.cancelled() => {}
                () = task => {}
            }
        });
    }

    /// Where the API server calls.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where health and metrics are.
    pub fn health_address(&self) -> SocketAddr {
        self.health_address
    }

    /// Ends: not ready at once, serves for the grace period, then finishes what it has begun.
    pub async fn shutdown(self) {
        self.health.is_ending.store(true, Ordering::Release);
        self.clock.sleep(self.grace).await;
        self.serving.cancel();
        self.tracker.close();
        // Connections end by themselves now; what remains are the watches.
        let all = self.tracker.wait();
        self.running.cancel();
        tokio::select! {
            () = all => {}
            () = self.clock.sleep(END_TIMEOUT) => tracing::warn!("connections were cut at the end"),
        }
    }
}

impl std::fmt::Debug for Injector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Injector")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

/// What keeps the roots of both configurations.
fn bundles(
    config: &Config,
    client: &Client,
    store: &Arc<CredentialStore>,
    metrics: &Arc<Metrics>,
) -> [Arc<CaBundle>; 2] {
    let names = &config.webhooks;
    let both = [
        (Configuration::Mutating, &names.mutating),
        (Configuration::Validating, &names.validating),
    ];
    both.map(|(which, name)| {
        let (store, metrics) = (Arc::clone(store), Arc::clone(metrics));
        CaBundle::new(which, name, client.clone(), store, metrics)
    })
}

/// Opens a port; every address of IPv4 in place of IPv6 where the system has none.
async fn listen(address: SocketAddr) -> Result<TcpListener, StartError> {
    let failed = |source| StartError::Listen { address, source };
    match TcpListener::bind(address).await {
        Err(_) if address.is_ipv6() && address.ip().is_unspecified() => {
            let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
            TcpListener::bind(address).await.map_err(failed)
        }
        bound => bound.map_err(failed),
    }
}

fn address_of(listener: &TcpListener, address: SocketAddr) -> Result<SocketAddr, StartError> {
    listener
        .local_addr()
        .map_err(|source| StartError::Listen { address, source })
}
