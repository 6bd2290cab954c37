//! The control thread: identity, resources, administration, health, upkeep.
//!
//! Invariant: none of its tasks ends by itself; one that does, by a panic too, is a failure of the
//! sidecar, since a renewal or a policy change that silently stops is worse than a restart.

use std::io;
use std::net::TcpListener as StdListener;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, UNIX_EPOCH};

use prometheus_client::registry::Registry;
use sidegate_mtls::{
    IdentityConfig, IdentityError, IdentityStatus, Issue, RenewalPolicy, WorkloadIdentity,
};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admin::Admin;
use crate::config::Source;
use crate::health::Health;
use crate::probes::Probes;
use crate::responder::{self, CONNECTION_LIFE_MAX};
use crate::shared::Shared;
use crate::source::controller::ControllerSource;
use crate::source::folder::Folder;
use crate::source::{AnySource, FolderSource, Report};
use crate::worker::Addresses;

/// The pause after a first failure to get a certificate: the application waits for it to start, and
/// what the CA asks for may be a moment late.
const ISSUE_PAUSE: Duration = Duration::from_millis(100);
/// How often metrics follow what is counted elsewhere.
const UPKEEP: Duration = Duration::from_secs(1);
/// Into how many sweeps the idle time of a peer's series is divided.
const SWEEPS: u32 = 10;

/// What the control thread works with.
pub(crate) struct Control {
    pub(crate) shared: Arc<Shared>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) issuer: Arc<dyn Issue>,
    pub(crate) addresses: Addresses,
    pub(crate) admin: StdListener,
    pub(crate) health: StdListener,
}

/// Why the control thread could not begin.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Control {
    /// Runs until the drain has closed. Says through `started` whether it could begin.
    ///
    /// # Errors
    ///
    /// Which task ended by itself.
    pub(crate) fn run(self, started: &SyncSender<Result<(), ControlError>>) -> Result<(), String> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(error) => {
                tell(started, Err(error.into()));
                return Ok(());
            }
        };
        let ended = runtime.block_on(self.serve(started));
        // A scan of a folder that hangs must not keep the process.
        runtime.shutdown_background();
        ended
    }

    async fn serve(self, started: &SyncSender<Result<(), ControlError>>) -> Result<(), String> {
        let stop = CancellationToken::new();
        let _stop_all = stop.clone().drop_guard();
        let identity_tasks = TaskTracker::new();
        let begun = self.begin(&stop, &identity_tasks);
        let mut tasks = match begun {
            Ok(tasks) => {
                tell(started, Ok(()));
                tasks
            }
            Err(error) => {
                tell(started, Err(error));
                return Ok(());
            }
        };
        let ended = tokio::select! {
            () = self.shared.drain.closed() => Ok(()),
            Some(ended) = tasks.join_next() => Err(match ended {
                Ok(task) => format!("the task of the {task} ended"),
                Err(error) => error.to_string(),
            }),
        };
        stop.cancel();
        ended
    }

    fn begin(
        &self,
        stop: &CancellationToken,
        identity_tasks: &TaskTracker,
    ) -> Result<JoinSet<&'static str>, ControlError> {
        let identity = WorkloadIdentity::start(
            self.identity_config(),
            Arc::clone(&self.issuer),
            Arc::clone(&self.shared.credentials),
            identity_tasks,
            stop.clone(),
        )?;
        // Counted at once: a write to the state folder is a task too, while it lasts.
        let expected = identity_tasks.len();
        let status = Arc::clone(identity.status());
        let source = self.source();
        let admin = self.serve_admin(source.report(), &status, stop)?;
        let health = self.serve_health(stop)?;
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            source.run().await;
            "resources"
        });
        tasks.spawn(async move {
            admin.await;
            "administration port"
        });
        tasks.spawn(async move {
            health.await;
            "health port"
        });
        let (shared, identity_tasks) = (Arc::clone(&self.shared), identity_tasks.clone());
        tasks.spawn(async move {
            upkeep(shared, status, || identity_tasks.len() >= expected).await;
            "identity"
        });
        Ok(tasks)
    }

    fn serve_admin(
        &self,
        report: Report,
        identity: &Arc<IdentityStatus>,
        stop: &CancellationToken,
    ) -> io::Result<impl Future<Output = ()> + Send + use<>> {
        let admin = Admin {
            shared: Arc::clone(&self.shared),
            addresses: self.addresses.clone(),
            report,
            identity: Arc::clone(identity),
        };
        let bounds = responder::Bounds {
            connections: self.shared.limits.admin_connections.clone(),
            life_max: CONNECTION_LIFE_MAX,
            makes_room: false,
        };
        let listener = TcpListener::from_std(self.admin.try_clone()?)?;
        Ok(responder::serve(
            listener,
            Arc::new(admin),
            bounds,
            stop.clone(),
        ))
    }

    fn serve_health(
        &self,
        stop: &CancellationToken,
    ) -> io::Result<impl Future<Output = ()> + Send + use<>> {
        let probes = Probes::new(&self.shared).map(Arc::new);
        // The longest hook, and the time that any other connection has.
        let longest = probes.as_ref().map(|probes| probes.longest());
        let bounds = responder::Bounds {
            connections: self.shared.limits.health_connections.clone(),
            life_max: longest.unwrap_or_default() + CONNECTION_LIFE_MAX,
            makes_room: true,
        };
        let health = Health {
            shared: Arc::clone(&self.shared),
            registry: Arc::clone(&self.registry),
            probes,
        };
        let listener = TcpListener::from_std(self.health.try_clone()?)?;
        Ok(responder::serve(
            listener,
            Arc::new(health),
            bounds,
            stop.clone(),
        ))
    }

    fn identity_config(&self) -> IdentityConfig {
        let (config, workload) = (&self.shared.config, &self.shared.workload);
        IdentityConfig {
            id: workload.id.clone(),
            trust_domain: workload.trust_domain.clone(),
            root_file: config.ca.root.clone(),
            state_dir: config.state.clone(),
            renewal: RenewalPolicy {
                backoff_min: ISSUE_PAUSE,
                ..RenewalPolicy::default()
            },
        }
    }

    fn source(&self) -> AnySource {
        let shared = &self.shared;
        match shared.config.source() {
            Source::Folder(path) => {
                let limits = &shared.config.limits;
                let folder = Folder::new(path, limits, Arc::clone(&shared.clock));
                AnySource::Folder(Box::new(FolderSource::new(folder, shared)))
            }
            Source::Controller(address) => {
                let source = ControllerSource::new(address, Arc::clone(shared));
                AnySource::Controller(Box::new(source))
            }
        }
    }
}

/// Whoever started us may have given up waiting; then there is nobody to tell.
fn tell(started: &SyncSender<Result<(), ControlError>>, result: Result<(), ControlError>) {
    if started.send(result).is_err() {
        tracing::warn!("nobody waits for the start of the control thread");
    }
}

/// Copies what the identity counts into the metrics, and removes series of departed peers. Ends
/// when the identity no longer runs.
async fn upkeep(
    shared: Arc<Shared>,
    status: Arc<IdentityStatus>,
    identity_runs: impl Fn() -> bool,
) {
    let sweep_every = shared.config.limits.metric_series_idle_timeout / SWEEPS;
    let mut sweep_at = shared.clock.now() + sweep_every;
    let mut epochs = shared.credentials.subscribe();
    while identity_runs() {
        let now = shared.clock.now();
        follow_identity(&shared, &status);
        if now >= sweep_at {
            shared.metrics.sweep(SWEEPS);
            sweep_at = now + sweep_every;
        }
        tokio::select! {
            () = shared.clock.sleep(UPKEEP) => {}
            Ok(()) = epochs.changed() => {}
        }
    }
}

fn follow_identity(shared: &Shared, status: &IdentityStatus) {
    let (status, metrics) = (status.snapshot(), &shared.metrics);
    let ok = metrics.renewals_ok.inner();
    ok.store(status.renewals_ok, Ordering::Relaxed);
    let failed = metrics.renewals_failed.inner();
    failed.store(status.renewals_failed, Ordering::Relaxed);
    if let Some(credentials) = shared.credentials.current() {
        let since = credentials.svid().not_after.duration_since(UNIX_EPOCH);
        metrics.set_certificate_not_after(since.unwrap_or_default().as_secs());
    }
}
