//! One sidecar: its threads, from start to end.
//!
//! Invariants: nothing is global, so that several run in one process; a thread that fails, by a
//! panic too, is reported and closes the whole sidecar; only `main.rs` decides to exit.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;

use prometheus_client::registry::Registry;
use sidegate_mesh::{Clock, SpiffeIdError};
use sidegate_mtls::{
    CaClient, CaClientConfig, CredentialStore, IdentityError, Issue, VerifyLimits, crypto_provider,
};
use tokio::sync::watch;
use tracing::{error, info};

use crate::access_log;
use crate::balance::Services;
use crate::config::{self, Config, ConfigError, Destination, Evidence, Fault, JoinToken, Source};
use crate::connections::Connections;
use crate::control::{Control, ControlError};
use crate::destinations::Destinations;
use crate::drain::Drain;
use crate::health::{self, Missing};
use crate::limits::Limits;
use crate::metrics::Metrics;
use crate::original::{Kernel, Own};
use crate::shared::Shared;
use crate::state::State;
use crate::worker::{self, Addresses, BindError};

/// Why a sidecar could not be started. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration contradicts itself.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A listener cannot be opened: the port is taken, or the address is not ours.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// A name cannot be part of an identity.
    #[error("the workload has no valid identity")]
    Workload(#[from] SpiffeIdError),
    /// The file of the join token cannot be read.
    #[error("cannot read the join token {} (`ca.joinTokenFile`)", path.display())]
    JoinToken {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The bootstrap root or the state folder cannot be used.
    #[error("no identity can be had")]
    Identity(#[from] IdentityError),
    /// The access log cannot be written.
    #[error("the access log cannot be opened")]
    Log(#[source] io::Error),
    /// The system gives no thread or runtime.
    #[error("a thread could not be started")]
    Thread(#[source] io::Error),
}

/// Why a sidecar that ran does so no longer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// A thread failed, and with it the sidecar.
    #[error("the thread {thread} failed: {reason}")]
    Thread {
        /// Its name.
        thread: String,
        /// What is known of it.
        reason: String,
    },
    /// It drains, or has been closed.
    #[error("the sidecar drains")]
    Draining,
}

/// A sidecar that runs. Dropping it closes it at once; [`Self::drain`] ends it well.
#[derive(Debug)]
pub struct Sidecar {
    shared: Arc<Shared>,
    addresses: Addresses,
    failure: Arc<watch::Sender<Option<Failure>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Sidecar {
    /// Starts a sidecar that asks the CA of its configuration. It listens when this returns; see
    /// [`Self::ready`] for when it serves.
    ///
    /// # Errors
    ///
    /// [`StartError`], which names the key of the configuration or the file.
    pub fn start(config: Config, clock: Arc<dyn Clock>) -> Result<Self, StartError> {
        check(&config)?;
        let issuer = ca_client(&config, &clock)?;
        Self::start_with_issuer(config, clock, issuer)
    }

    /// Starts a sidecar that gets its certificates from `issuer`.
    ///
    /// # Errors
    ///
    /// [`StartError`], which names the key of the configuration or the file.
    pub fn start_with_issuer(
        config: Config,
        clock: Arc<dyn Clock>,
        issuer: Arc<dyn Issue>,
    ) -> Result<Self, StartError> {
        check(&config)?;
        let workload = Arc::new(config.workload()?);
        let bound = worker::bind(&config)?;
        let mut registry = Registry::default();
        let metrics = Arc::new(Metrics::new(&mut registry, config.limits.metric_series_max));
        let counters = access_log::Counters {
            dropped: metrics.access_log_dropped.clone(),
            write_failures: metrics.access_log_write_failures.clone(),
        };
        let log = access_log::start(&config.log, counters).map_err(StartError::Log)?;
        let destinations = (config.destination() == Destination::Original)
            .then(|| Destinations::new(&config.limits, &metrics, Arc::clone(&clock)));
        let shared = Arc::new(Shared {
            workload,
            destinations: destinations.map(Arc::new),
            originals: Arc::new(Kernel),
            own: Own::of(&config),
            state: State::new(),
            credentials: CredentialStore::new(
                VerifyLimits::default(),
                crypto_provider(),
                Arc::clone(&clock),
            ),
            limits: Limits::new(&config.limits, &metrics),
            metrics,
            log,
            drain: Drain::new(Arc::clone(&clock)),
            connections: Connections::new(),
            services: Services::new(Arc::clone(&clock)),
            config: Arc::new(config),
            clock,
        });
        let sidecar = Self {
            shared: Arc::clone(&shared),
            addresses: bound.addresses.clone(),
            failure: Arc::new(watch::Sender::new(None)),
            threads: Mutex::default(),
        };
        sidecar.start_control(Control {
            shared,
            registry: Arc::new(registry),
            issuer,
            addresses: bound.addresses,
            admin: bound.admin,
            health: bound.health,
        })?;
        for (i, listeners) in bound.workers.into_iter().enumerate() {
            let shared = Arc::clone(&sidecar.shared);
            let body = move || worker::run(listeners, &shared);
            sidecar.thread(&format!("worker-{i}"), body)?;
        }
        info!(peer.id = %sidecar.shared.workload.id, "sidecar started");
        Ok(sidecar)
    }

    /// Where it listens.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// What its threads share.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// What is missing for it to be ready; nothing when it is.
    pub fn missing(&self) -> Vec<Missing> {
        health::missing(&self.shared)
    }

    /// Waits until it is ready: an SVID, a bundle, a complete snapshot.
    ///
    /// # Errors
    ///
    /// [`Failure`] when it never will be.
    pub async fn ready(&self) -> Result<(), Failure> {
        let mut epochs = self.shared.credentials.subscribe();
        let mut numbers = self.shared.state.subscribe();
        loop {
            if self.missing().is_empty() {
                return Ok(());
            }
            tokio::select! {
                failure = self.failed() => return Err(failure),
                () = self.shared.drain.draining() => return Err(Failure::Draining),
                Ok(()) = epochs.changed() => {}
                Ok(()) = numbers.changed() => {}
            }
        }
    }

    /// Waits for a failure of one of its threads; for ever when there is none.
    pub async fn failed(&self) -> Failure {
        let mut failure = self.failure.subscribe();
        let found = failure.wait_for(Option::is_some).await;
        match found.ok().and_then(|failure| failure.clone()) {
            Some(failure) => failure,
            None => std::future::pending().await,
        }
    }

    /// Ends well: not ready at once, no new requests, open calls up to the drain timeout. True when
    /// no call had to be cut. Its threads have ended when this returns.
    pub async fn drain(&self) -> bool {
        let config = &self.shared.config;
        info!(timeout = ?config.drain_timeout, "drain begun");
        self.shared
            .drain
            .start(config.drain_grace, config.drain_timeout);
        let clean = self.shared.drain.finish().await;
        self.join().await;
        if !self.shared.log.flush().await {
            error!("the end of the access log could not be written");
        }
        info!(clean, "drain ended");
        clean
    }

    /// Ends at once, as a process does that is killed: every connection breaks.
    pub async fn crash(&self) {
        self.shared.drain.close();
        self.join().await;
    }

    async fn join(&self) {
        let threads =
            std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        let joined = tokio::task::spawn_blocking(move || {
            threads
                .into_iter()
                .filter_map(|thread| thread.join().err())
                .count()
        });
        match joined.await {
            Ok(0) => {}
            Ok(panicked) => error!(panicked, "threads ended by a panic"),
            Err(error) => error!(%error, "threads could not be waited for"),
        }
    }

    fn start_control(&self, control: Control) -> Result<(), StartError> {
        let (started, starting) = mpsc::sync_channel(1);
        self.thread("control", move || control.run(&started))?;
        match starting.recv() {
            Ok(Ok(())) => Ok(()),
            Ok(Err(ControlError::Identity(error))) => Err(error.into()),
            Ok(Err(ControlError::Io(error))) => Err(StartError::Thread(error)),
            Err(_) => Err(StartError::Thread(io::Error::other(
                "the control thread panicked",
            ))),
        }
    }

    /// Runs `body` on a thread whose failure is the sidecar's.
    fn thread(
        &self,
        name: &str,
        body: impl FnOnce() -> Result<(), String> + Send + 'static,
    ) -> Result<(), StartError> {
        let mut alarm = Alarm {
            thread: name.to_owned(),
            reason: Some("it panicked".to_owned()),
            failure: Arc::clone(&self.failure),
            drain: self.shared.drain.clone(),
        };
        let thread = std::thread::Builder::new()
            .name(format!("sidegate-{name}"))
            .spawn(move || alarm.ends(body()))
            .map_err(StartError::Thread)?;
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.push(thread);
        Ok(())
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        self.shared.drain.close();
    }
}

impl Alarm {
    /// The thread ends by itself, with this result.
    fn ends(&mut self, result: Result<(), String>) {
        self.reason = result.err();
    }
}

/// Rings when a thread ends with a reason, which a panic leaves in place.
struct Alarm {
    thread: String,
    reason: Option<String>,
    failure: Arc<watch::Sender<Option<Failure>>>,
    drain: Drain,
}

impl Drop for Alarm {
    fn drop(&mut self) {
        let Some(reason) = self.reason.take() else {
            return;
        };
        let thread = std::mem::take(&mut self.thread);
        error!(thread, error = reason, "thread failed");
        self.failure.send_if_modified(|failure| {
            let first = failure.is_none();
            if first {
                *failure = Some(Failure::Thread { thread, reason });
            }
            first
        });
        self.drain.close();
    }
}

fn check(config: &Config) -> Result<(), ConfigError> {
    let mut faults = config.check();
    if matches!(config.source(), Source::Controller(_)) && config.pod.is_none() {
        faults.push(Fault {
            field: "pod".to_owned(),
            message: "the controller wants to know which pod this is".to_owned(),
            help: "start it where POD_NAME, POD_UID and POD_IPS are set".to_owned(),
        });
    }
    if faults.is_empty() {
        return Ok(());
    }
    Err(ConfigError::Faults { faults })
}

fn ca_client(config: &Config, clock: &Arc<dyn Clock>) -> Result<Arc<dyn Issue>, StartError> {
    let trust_domain = config.workload()?.trust_domain;
    let address = config::absolute(&config.ca.address);
    let client = CaClientConfig::new(&trust_domain, address, evidence(config)?)?;
    Ok(Arc::new(CaClient::new(
        client,
        crypto_provider(),
        Arc::clone(clock),
    )))
}

fn evidence(config: &Config) -> Result<sidegate_mtls::Evidence, StartError> {
    let token =
        |text: &str| sidegate_mtls::Evidence::JoinToken(sidegate_mtls::JoinToken::new(text));
    match config.evidence() {
        Evidence::ServiceAccountToken(path) => {
            Ok(sidegate_mtls::Evidence::ServiceAccountToken(path))
        }
        Evidence::JoinToken(None) => Ok(sidegate_mtls::Evidence::None),
        Evidence::JoinToken(Some(JoinToken::Inline(secret))) => Ok(token(secret.reveal())),
        Evidence::JoinToken(Some(JoinToken::File(path))) => match std::fs::read_to_string(&path) {
            Ok(text) => Ok(token(text.trim())),
            // Its file may go once it was used: the kept SVID is the evidence from then on.
            Err(error) if config.state.is_some() && error.kind() == io::ErrorKind::NotFound => {
                info!(path = %path.display(), "no join token, only a kept SVID will do");
                Ok(sidegate_mtls::Evidence::None)
            }
            Err(source) => Err(StartError::JoinToken { path, source }),
        },
    }
}
