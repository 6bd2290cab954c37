//! The whole mesh in one process: a CA and several sidecars, from the configuration types of the
//! binaries.
//!
//! Everything is kept in one folder: `ca/` (mode 0700), `state/` (each sidecar's key and SVID),
//! `resources/` (watched YAML) and `logs/`. Every listener takes a free port.
//!
//! Invariant: nothing here reaches into a sidecar or the CA. What a sidecar of a `LocalMesh` may do,
//! the same sidecar as a process may do, and no more.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The CA's own configuration, for whoever writes one for it.
pub use sidegate_ca::config as ca_config;
use sidegate_ca::{Ca, RunningCa};
use sidegate_mesh::{Clock, Enforcement, Snapshot, SpiffeId, SpiffeIdError, TrustDomain};
pub use sidegate_mtls::SystemClock;
use sidegate_proxy::config;
pub use sidegate_proxy::config::ServicePort;
use sidegate_proxy::sidecar::{Failure, Sidecar, StartError};
use tempfile::TempDir;
use tokio::task::JoinSet;

/// A free port of the loopback interface.
const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Longest path of a Unix socket, in bytes (`sun_path` less its NUL).
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Why a mesh, or a part of it, could not start.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// A folder or file of the mesh.
    #[error("cannot use {}", path.display())]
    Folder {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The CA did not start.
    #[error("the CA did not start")]
    Ca(#[source] Box<sidegate_ca::StartError>),
    /// A workload's namespace or service account cannot be part of a SPIFFE ID.
    #[error("{workload} cannot have an identity")]
    Identity {
        /// `namespace/service-account`.
        workload: String,
        /// Why.
        source: SpiffeIdError,
    },
    /// The CA made no join token.
    #[error("the CA made no join token for {workload}")]
    Token {
        /// `namespace/service-account`.
        workload: String,
        /// Why.
        source: Box<sidegate_ca::OperationError>,
    },
    /// A sidecar ended before it was ready.
    #[error("the sidecar of {workload} will not be ready")]
    Failed {
        /// `namespace/service-account`.
        workload: String,
        /// Why.
        source: Failure,
    },
    /// A sidecar did not start.
    #[error("the sidecar of {workload} did not start")]
    Sidecar {
        /// `namespace/service-account`.
        workload: String,
        /// Why.
        source: Box<StartError>,
    },
}

/// Who a member of the mesh is, and what its sidecar carries.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its namespace.
    pub namespace: String,
    /// Its service account.
    pub service_account: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Whether refusals refuse.
    pub enforcement: Enforcement,
    /// Its application's ports.
    pub ports: Vec<config::PortConfig>,
    /// Services for which its sidecar opens a local port of their own.
    pub upstreams: Vec<ServicePort>,
}

impl Member {
    /// A member that only calls, labelled `app: SERVICE_ACCOUNT`.
    pub fn new(namespace: &str, service_account: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            service_account: service_account.to_owned(),
            labels: BTreeMap::from([("app".to_owned(), service_account.to_owned())]),
            enforcement: Enforcement::Enforce,
            ports: Vec::new(),
            upstreams: Vec::new(),
        }
    }

    /// Adds a port of its application, which listens on `address`.
    #[must_use]
    pub fn port(mut self, name: &str, port: u16, address: SocketAddr) -> Self {
        self.ports.push(config::PortConfig {
            name: Some(name.to_owned()),
            port,
            address: Some(address),
            protocol: config::PortProtocol::default(),
        });
        self
    }

    /// Adds a local port that is bound to `service`.
    #[must_use]
    pub fn upstream(mut self, service: ServicePort) -> Self {
        self.upstreams.push(service);
        self
    }

    /// `namespace/service-account`.
    pub fn workload(&self) -> String {
        format!("{}/{}", self.namespace, self.service_account)
    }
}

/// A sidecar that runs.
#[derive(Debug)]
pub struct LocalSidecar {
    /// `namespace/service-account`.
    pub workload: String,
    /// Its identity.
    pub id: SpiffeId,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its application's ports.
    pub ports: Vec<config::PortConfig>,
    /// Its access log.
    pub log: PathBuf,
    /// The sidecar itself: its addresses, its readiness, its end.
    pub sidecar: Sidecar,
}

/// A CA and the sidecars that were added to it.
pub struct LocalMesh {
    dir: PathBuf,
    trust_domain: TrustDomain,
    clock: Arc<dyn Clock>,
    ca: RunningCa,
    sidecars: Vec<LocalSidecar>,
    /// Held until the CA has gone.
    _socket_dir: Option<TempDir>,
}

impl LocalMesh {
    /// Starts a CA in `dir`, or starts the one that is there again.
    ///
    /// # Errors
    ///
    /// [`LocalError`] when a folder cannot be made, or the CA refuses to start.
    pub async fn start(
        dir: &Path,
        trust_domain: TrustDomain,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, LocalError> {
        let mut config = sidegate_ca::Config::new(dir.join("ca"));
        config.trust_domain = trust_domain;
        Self::start_with(dir, config, clock).await
    }

    /// As [`Self::start`], with a configuration of the CA's own. Its addresses become free ports.
    ///
    /// # Errors
    ///
    /// As [`Self::start`].
    pub async fn start_with(
        dir: &Path,
        mut config: sidegate_ca::Config,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, LocalError> {
        for folder in ["resources", "logs", "state"] {
            let path = dir.join(folder);
            std::fs::create_dir_all(&path).map_err(|source| LocalError::Folder { path, source })?;
        }
        config.address = ANY_PORT;
        config.metrics_address = ANY_PORT;
        // A Unix socket's path is short, and a mesh may lie deep: then its socket lies elsewhere.
        let socket_dir = if config.admin_socket().as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            let socket_dir = private_dir()?;
            config.admin_socket = Some(socket_dir.path().join("admin.sock"));
            Some(socket_dir)
        } else {
            None
        };
        let trust_domain = config.trust_domain.clone();
        let ca = Ca::start(config, Arc::clone(&clock))
            .await
            .map_err(|error| LocalError::Ca(Box::new(error)))?;
        Ok(Self {
            dir: dir.to_owned(),
            trust_domain,
            clock,
            ca,
            sidecars: Vec::new(),
            _socket_dir: socket_dir,
        })
    }

    /// The configuration of a sidecar for `member`, with a fresh join token, ready for
    /// [`Self::add`] or to be changed first.
    ///
    /// # Errors
    ///
    /// [`LocalError::Token`] when the CA makes none.
    pub async fn sidecar_config(&self, member: &Member) -> Result<config::Config, LocalError> {
        let token = self
            .ca
            .create_token(&member.namespace, &member.service_account)
            .await
            .map_err(|error| LocalError::Token {
                workload: member.workload(),
                source: Box::new(error),
            })?;
        let name = format!("{}-{}", member.namespace, member.service_account);
        let upstreams = member
            .upstreams
            .iter()
            .map(|service| config::UpstreamConfig {
                service: service.clone(),
                address: ANY_PORT,
            });
        let workload = config::WorkloadConfig {
            trust_domain: self.trust_domain.to_string(),
            namespace: member.namespace.clone(),
            service_account: member.service_account.clone(),
            labels: member.labels.clone(),
            enforcement: Some(member.enforcement),
        };
        let ca = config::CaConfig {
            address: self.ca.address().to_string(),
            root: self.ca.root_path(),
            join_token: Some(config::Secret::new(token.token.to_string())),
            join_token_file: None,
            token_file: None,
        };
        let mut config = config::Config::new(workload, ca, self.resources_dir());
        config.ports.clone_from(&member.ports);
        config.outbound.address = ANY_PORT;
        config.inbound.address = ANY_PORT;
        config.admin.address = ANY_PORT;
        config.health.address = ANY_PORT;
        config.upstreams = upstreams.collect();
        config.log.path = Some(self.logs_dir().join(format!("{name}.log")));
        config.state = Some(self.dir.join("state").join(name));
        Ok(config)
    }

    /// Starts a sidecar. It is not ready yet; see [`Self::ready`].
    ///
    /// # Errors
    ///
    /// [`LocalError::Sidecar`] when it refuses its configuration or a port.
    pub fn add(&mut self, config: config::Config) -> Result<&LocalSidecar, LocalError> {
        let (namespace, account) = (&config.workload.namespace, &config.workload.service_account);
        let workload = format!("{namespace}/{account}");
        let id =
            SpiffeId::for_workload(&self.trust_domain, namespace, account).map_err(|source| {
                LocalError::Identity {
                    workload: workload.clone(),
                    source,
                }
            })?;
        let log = config.log.path.clone().unwrap_or_default();
        let (labels, ports) = (config.workload.labels.clone(), config.ports.clone());
        let sidecar = Sidecar::start(config, Arc::clone(&self.clock)).map_err(|source| {
            LocalError::Sidecar {
                workload: workload.clone(),
                source: Box::new(source),
            }
        })?;
        Ok(self.sidecars.push_mut(LocalSidecar {
            workload,
            id,
            labels,
            ports,
            log,
            sidecar,
        }))
    }

    /// Waits until every sidecar has an SVID, a bundle and a complete snapshot.
    ///
    /// # Errors
    ///
    /// [`LocalError::Failed`] when a sidecar never will.
    pub async fn ready(&self) -> Result<(), LocalError> {
        for member in &self.sidecars {
            member
                .sidecar
                .ready()
                .await
                .map_err(|source| LocalError::Failed {
                    workload: member.workload.clone(),
                    source,
                })?;
        }
        Ok(())
    }

    /// Waits until the snapshot of every sidecar `holds`, and all are ready.
    ///
    /// # Errors
    ///
    /// As [`Self::ready`].
    pub async fn until(
        &self,
        holds: impl Fn(&LocalSidecar, &Snapshot) -> bool,
    ) -> Result<(), LocalError> {
        for member in &self.sidecars {
            let state = &member.sidecar.shared().state;
            let mut numbers = state.subscribe();
            while !state
                .current()
                .is_some_and(|snapshot| holds(member, &snapshot))
            {
                tokio::select! {
                    failure = member.sidecar.failed() => {
                        return Err(LocalError::Failed { workload: member.workload.clone(), source: failure });
                    }
                    Ok(()) = numbers.changed() => {}
                }
            }
        }
        self.ready().await
    }

    /// Waits until every record of a call that has ended is in its file.
    pub async fn flush_logs(&self) {
        for member in &self.sidecars {
            member.sidecar.shared().log.flush().await;
        }
    }

    /// Writes a resource file as an editor should: beside, then renamed over.
    ///
    /// # Errors
    ///
    /// [`LocalError::Folder`] when the file cannot be written.
    pub fn write_resource(&self, file: &str, yaml: &str) -> Result<(), LocalError> {
        let path = self.resources_dir().join(file);
        let beside = path.with_extension("yaml.new");
        std::fs::write(&beside, yaml)
            .and_then(|()| std::fs::rename(&beside, &path))
            .map_err(|source| LocalError::Folder { path, source })
    }

    /// The sidecars, in the order in which they were added.
    pub fn sidecars(&self) -> &[LocalSidecar] {
        &self.sidecars
    }

    /// The sidecar of `namespace/service-account`, the first when there are several.
    pub fn sidecar(&self, workload: &str) -> Option<&LocalSidecar> {
        self.sidecars
            .iter()
            .find(|member| member.workload == workload)
    }

    /// The CA.
    pub fn ca(&self) -> &RunningCa {
        &self.ca
    }

    /// The mesh's trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The watched folder of resources.
    pub fn resources_dir(&self) -> PathBuf {
        self.dir.join("resources")
    }

    /// The folder of access logs.
    pub fn logs_dir(&self) -> PathBuf {
        self.dir.join("logs")
    }

    /// Drains every sidecar, all at once, then stops the CA.
    pub async fn stop(self) {
        let mut drains = JoinSet::new();
        for member in self.sidecars {
            drains.spawn(async move { member.sidecar.drain().await });
        }
        drains.join_all().await;
        self.ca.shutdown().await;
    }
}

fn private_dir() -> Result<TempDir, LocalError> {
    tempfile::Builder::new()
        .prefix("sidegate-ca-")
        .tempdir()
        .map_err(|source| LocalError::Folder {
            path: std::env::temp_dir(),
            source,
        })
}
