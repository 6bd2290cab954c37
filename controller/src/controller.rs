//! The whole controller: from a configuration to running sockets, and back.
//!
//! Invariant: nothing here is global to the process but what `kube` itself sets up; several
//! controllers can run in one.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use k8s_openapi::api::coordination::v1::Lease;
use kube::Client;
use kube::api::Api;
use sidegate_mesh::clock::Clock;
use sidegate_mesh::spiffe::SpiffeIdError;
use sidegate_mtls::{
    CaClient, CaClientConfig, CredentialStore, Evidence, IdentityConfig, IdentityError,
    RenewalPolicy, VerifyLimits, WorkloadIdentity, control_plane_id, crypto_provider, warm_up,
};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::{Config, ConfigError};
use crate::hub::Hub;
use crate::index::{Index, Ranges, Settings};
use crate::lease::{self, Elector, Leadership};
use crate::metrics::Metrics;
use crate::shared::Shared;
use crate::watches::{self, Synced};
use crate::{events, health, replica, server, status};

/// The name of the controller's service account.
const NAME: &str = "sidegate-controller";

/// The controller.
#[derive(Debug)]
pub struct Controller;

/// Why a controller does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A value of the configuration is impossible.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its own identity cannot be started.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A name may not be part of an identity.
    #[error(transparent)]
    SpiffeId(#[from] SpiffeIdError),
    /// A socket cannot be opened.
    #[error("cannot listen on {address} for {purpose}: {source}; is another controller running?")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What for.
        purpose: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// What a controller needs from its surroundings.
#[derive(Clone)]
pub struct Surroundings {
    /// The cluster.
    pub client: Client,
    /// This replica's name: its pod's.
    pub name: String,
    /// Where the other replicas reach it; `None`: where it listens.
    pub address: Option<std::net::IpAddr>,
    /// The time.
    pub clock: Arc<dyn Clock>,
}

/// A controller that serves. Dropping it leaves it running; [`Self::shutdown`] stops it.
#[derive(Debug)]
pub struct RunningController {
    shared: Arc<Shared>,
    leases: Api<Lease>,
    address: SocketAddr,
    metrics_address: SocketAddr,
}

impl Controller {
    /// Gets its identity from the CA, and serves. Call it within a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`StartError`]. That the CA or the API server is absent is none: both are tried again.
    pub async fn start(
        config: Config,
        surroundings: Surroundings,
    ) -> Result<RunningController, StartError> {
        let clock = Arc::clone(&surroundings.clock);
        let provider = crypto_provider();
        warm_up(&provider);
        let limits = VerifyLimits::default();
        let store = CredentialStore::new(limits, Arc::clone(&provider), Arc::clone(&clock));
        let running = Self::start_as(config, surroundings, Arc::clone(&store)).await?;
        let started = start_identity(&running.shared, provider);
        if let Err(error) = started {
            running.shared.cancel.cancel();
            return Err(error);
        }
        Ok(running)
    }

    /// As [`Self::start`], with an identity that somebody else keeps fresh.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub async fn start_as(
        config: Config,
        surroundings: Surroundings,
        store: Arc<CredentialStore>,
    ) -> Result<RunningController, StartError> {
        config.check()?;
        let listener = listen(config.address, "sidecars").await?;
        let health = listen(config.metrics_address, "health and metrics").await?;
        let local = |listener: &TcpListener, address| listener.local_addr().unwrap_or(address);
        let address = local(&listener, config.address);
        let metrics_address = local(&health, config.metrics_address);
        let shared = Arc::new(Shared {
            id: control_plane_id(&config.trust_domain, NAME)?,
            hub: Hub::new(Index::new(settings(&config))),
            store,
            clock: Arc::clone(&surroundings.clock),
            metrics: Metrics::new(),
            synced: Synced::new(),
            leadership: watch::Sender::new(Leadership::Unknown),
            tracker: TaskTracker::new(),
            cancel: CancellationToken::new(),
            config,
        });
        let leases = Api::namespaced(surroundings.client.clone(), &shared.config.namespace);
        let reached = shared.config.advertise_address.unwrap_or_else(|| {
            let ip = surroundings.address.unwrap_or_else(|| address.ip());
            SocketAddr::new(ip, address.port())
        });
        let running = RunningController {
            shared,
            leases,
            address,
            metrics_address,
        };
        running.spawn_all((listener, health), &surroundings, reached);
        Ok(running)
    }
}

impl RunningController {
    fn spawn_all(
        &self,
        (listener, health): (TcpListener, TcpListener),
        surroundings: &Surroundings,
        reached: SocketAddr,
    ) {
        let shared = &self.shared;
        let client = || surroundings.client.clone();
        let elector = Elector {
            api: self.leases.clone(),
            config: shared.config.lease.clone(),
            identity: format!("{}/{reached}", surroundings.name),
            leadership: shared.leadership.clone(),
            clock: Arc::clone(&shared.clock),
            seen: None,
        };
        watches::start(shared, &surroundings.client);
        shared.spawn(health::serve(health, Arc::clone(shared)));
        shared.spawn(elector.run());
        shared.spawn(replica::report(Arc::clone(shared)));
        shared.spawn(status::Writer::new(Arc::clone(shared), client()).run());
        shared.spawn(events::run(
            Arc::clone(shared),
            client(),
            surroundings.name.clone(),
        ));
        let serving = server::serve(listener, Arc::clone(shared));
        // Not stopped with the others: it ends by itself when its streams have ended.
        shared.tracker.spawn(async move {
            if let Err(error) = serving.await {
                tracing::error!(error = %error, "the server has failed");
            }
        });
    }

    /// Where sidecars reach it.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where `/metrics` is.
    pub fn metrics_address(&self) -> SocketAddr {
        self.metrics_address
    }

    /// Ends every stream, so that sidecars turn to another replica, and gives the Lease back.
    pub async fn shutdown(self) {
        let now = self.shared.clock.now();
        let term = self.shared.leadership.borrow().leads(now).cloned();
        self.shared.cancel.cancel();
        self.shared.tracker.close();
        let releasing = async {
            if let Some(term) = term {
                lease::release(&self.leases, &self.shared.config.lease.name, &term).await;
            }
        };
        let ending = async { tokio::join!(self.shared.tracker.wait(), releasing) };
        tokio::select! {
            _ = ending => {}
            () = self.shared.clock.sleep(self.shared.config.drain_timeout) => {
                tracing::warn!("some streams did not end in time");
            }
        }
    }
}

fn settings(config: &Config) -> Settings {
    Settings {
        trust_domain: config.trust_domain.clone(),
        ranges: Ranges {
            pods: config.pod_cidrs.clone(),
            services: config.service_cidrs.clone(),
            external: config.external_cidrs.clone(),
        },
        subscriptions_max: config.limits.subscriptions_max,
        response_bytes_max: config.limits.response_bytes_max,
        notes_max: config.limits.events_max,
    }
}

fn start_identity(
    shared: &Arc<Shared>,
    provider: Arc<rustls::crypto::CryptoProvider>,
) -> Result<(), StartError> {
    let config = &shared.config;
    let evidence = Evidence::ServiceAccountToken(config.ca.token_file.clone());
    let ca = CaClientConfig::new(&config.trust_domain, config.ca.address.clone(), evidence)?;
    let client = CaClient::new(ca, provider, Arc::clone(&shared.clock));
    let identity = IdentityConfig {
        id: shared.id.clone(),
        trust_domain: config.trust_domain.clone(),
        root_file: config.ca.root.clone(),
        state_dir: None,
        renewal: RenewalPolicy::default(),
    };
    WorkloadIdentity::start(
        identity,
        Arc::new(client),
        Arc::clone(&shared.store),
        &shared.tracker,
        shared.cancel.clone(),
    )?;
    Ok(())
}

async fn listen(address: SocketAddr, purpose: &'static str) -> Result<TcpListener, StartError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| StartError::Listen {
            address,
            purpose,
            source,
        })
}
