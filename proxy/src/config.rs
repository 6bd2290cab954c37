//! A sidecar's configuration: read once, checked whole, then immutable.
//!
//! The same type is written by hand as YAML (see [`Config::from_file`]) and built in code by
//! `LocalMesh`. Invariants: an unknown field is an error; every bound has a default and can be
//! changed; whatever passed [`Config::check`] can be started; a secret is never printed.
//!
//! The three choices between standalone and Kubernetes are made here and nowhere else: [`Source`],
//! [`Evidence`] and [`Destination`].

mod cluster;
mod limits;
mod locate;
mod probes;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sidegate_mesh::diagnostics;
use sidegate_mesh::{
    Enforcement, SpiffeId, SpiffeIdError, TrustDomain, Workload, WorkloadPort, yaml,
};

pub(crate) use cluster::absolute;
pub use cluster::{ControllerConfig, EnvironmentError, Pod};
pub use limits::LimitsConfig;
pub use probes::{
    GrpcProbe, HttpHeader, HttpProbe, HttpScheme, ProbeConfig, ProbeKind, ProbesConfig, TcpProbe,
};

/// What replaces a secret wherever configuration is shown.
const REDACTED: &str = "[redacted]";

/// Everything that a sidecar is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Config {
    /// Who the application beside this sidecar is.
    pub workload: WorkloadConfig,
    /// Where identities come from.
    pub ca: CaConfig,
    /// Folder with the resources (policies, services), which is watched. Not with `controller`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<PathBuf>,
    /// The controller of a cluster, which streams what concerns this sidecar. Not with `resources`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub controller: Option<ControllerConfig>,
    /// The pod that this sidecar is in; from the environment, see [`Self::from_environment`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Pod>,
    /// How the destination of the application's calls is known.
    #[serde(default)]
    pub destination: Destination,
    /// The application's ports. Empty when the application only calls.
    #[serde(default)]
    pub ports: Vec<PortConfig>,
    /// Ports that callers without an identity may reach where a policy admits `unauthenticated`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub plaintext_ports: Vec<u16>,
    /// Ports of destinations whose bytes are never looked at.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub opaque_ports: Vec<u16>,
    /// The application's probes and hooks that this sidecar carries out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probes: Option<ProbesConfig>,
    /// Where the application's own calls arrive.
    #[serde(default)]
    pub outbound: OutboundConfig,
    /// Where other sidecars' calls arrive.
    #[serde(default)]
    pub inbound: InboundConfig,
    /// Where this sidecar may be looked into.
    #[serde(default)]
    pub admin: AdminConfig,
    /// Where `/readyz`, `/livez` and `/metrics` are.
    #[serde(default)]
    pub health: HealthConfig,
    /// Local ports that are each bound to one service, for opaque TCP.
    #[serde(default)]
    pub upstreams: Vec<UpstreamConfig>,
    /// Where the access log goes.
    #[serde(default)]
    pub log: LogConfig,
    /// Messages about the sidecar itself.
    #[serde(default)]
    pub diagnostics: DiagnosticsConfig,
    /// Folder (made with mode 0700) in which key and SVID survive a restart. Without it, each start
    /// needs a fresh join token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<PathBuf>,
    /// Worker threads. Limits are shared by all of them.
    #[serde(default = "default_workers")]
    pub workers: usize,
    /// How long a drain goes on accepting connections, so that callers see its GOAWAY and leave.
    #[serde(default = "default_drain_grace", with = "humantime_serde")]
    pub drain_grace: Duration,
    /// How long a drain waits for open calls, counted from its start.
    #[serde(default = "default_drain_timeout", with = "humantime_serde")]
    pub drain_timeout: Duration,
    /// Every bound of this sidecar.
    #[serde(default)]
    pub limits: LimitsConfig,
}

/// `workload`: who the application is.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct WorkloadConfig {
    /// The mesh's trust domain.
    #[serde(default = "default_trust_domain")]
    pub trust_domain: String,
    /// Its namespace.
    pub namespace: String,
    /// Its service account, which is what callers and policies call it by.
    pub service_account: String,
    /// Its labels, which `selector.matchLabels` compares.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Whether a refusal refuses (`enforce`) or is only logged (`audit`). Absent: `enforce` beside a
    /// folder; in a cluster what the controller says of the namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enforcement: Option<Enforcement>,
}

/// `ca`: where identities come from, and what proves ours.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct CaConfig {
    /// `HOST:PORT` of the CA.
    #[serde(default = "default_ca_address")]
    pub address: String,
    /// PEM file with the root that the CA must chain to: bootstrap trust, never fetched.
    pub root: PathBuf,
    /// Join token: expiring, one use. Needed for the first start only when `state` is set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub join_token: Option<Secret>,
    /// File with the join token, instead of `joinToken`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub join_token_file: Option<PathBuf>,
    /// File with a service account token of the cluster, instead of a join token; read anew for
    /// each certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
}

/// One port of the application.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct PortConfig {
    /// Name by which a policy may call it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Number by which policies and callers call it.
    pub port: u16,
    /// Where the application really listens; absent with `destination: original`, where that is
    /// the address that was called.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<SocketAddr>,
    /// What it speaks.
    #[serde(default)]
    pub protocol: PortProtocol,
}

/// What a port speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PortProtocol {
    /// Found out from the first bytes, within what policy lets enter.
    #[default]
    Auto,
    /// HTTP/1 or HTTP/2.
    Http,
    /// gRPC.
    Grpc,
    /// Opaque bytes.
    Tcp,
}

/// `outbound`: where the application's calls arrive.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct OutboundConfig {
    /// Loopback only: whoever reaches it calls in the workload's name.
    pub address: SocketAddr,
}

impl Default for OutboundConfig {
    fn default() -> Self {
        Self {
            address: SocketAddr::from(([127, 0, 0, 1], 19001)),
        }
    }
}

/// `inbound`: where other sidecars connect, with mesh TLS only.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct InboundConfig {
    /// Any address: nobody without an identity of the mesh gets past the handshake.
    pub address: SocketAddr,
}

impl Default for InboundConfig {
    fn default() -> Self {
        Self {
            address: SocketAddr::from(([0, 0, 0, 0], 19006)),
        }
    }
}

/// `admin`: where this sidecar may be looked into.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct AdminConfig {
    /// Loopback only.
    pub address: SocketAddr,
}

impl Default for AdminConfig {
    fn default() -> Self {
        Self {
            address: SocketAddr::from(([127, 0, 0, 1], 19000)),
        }
    }
}

/// `health`: readiness, liveness and metrics.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct HealthConfig {
    /// Loopback unless a scraper or a prober sits elsewhere: metrics name who calls whom.
    pub address: SocketAddr,
}

impl Default for HealthConfig {
    fn default() -> Self {
        Self {
            address: SocketAddr::from(([127, 0, 0, 1], 19021)),
        }
    }
}

/// A local port bound to one service.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct UpstreamConfig {
    /// `NAME.NAMESPACE:PORT`.
    pub service: ServicePort,
    /// Loopback only.
    pub address: SocketAddr,
}

/// `log`: the access log, one JSON object a line.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct LogConfig {
    /// File to append to; reopened when it was moved away. Absent: standard output.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Says that standard output is meant. Not together with `path`.
    pub stdout: bool,
    /// Records that wait for the writer; more are dropped and counted.
    pub queue_records_max: usize,
    /// Refusals that wait for the writer, apart from the others; more are aggregated per peer.
    pub denials_queue_max: usize,
    /// Latest refusals that the administration port shows.
    pub denials_kept_max: usize,
    /// Longest time from a call's end to its line in the file.
    #[serde(with = "humantime_serde")]
    pub flush_interval: Duration,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            path: None,
            stdout: false,
            queue_records_max: 16_384,
            denials_queue_max: 4_096,
            denials_kept_max: 256,
            flush_interval: Duration::from_millis(200),
        }
    }
}

/// `diagnostics`: JSON lines on standard error about the sidecar itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct DiagnosticsConfig {
    /// `off`, `error`, `warn`, `info`, `debug` (`trace` is the same in a release), or a filter such as
    /// `info,sidegate_proxy=debug`.
    pub level: String,
}

impl Default for DiagnosticsConfig {
    fn default() -> Self {
        Self {
            level: "info".to_owned(),
        }
    }
}

/// A text that is never shown.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Keeps `text` from being shown.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for the one place that sends it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(REDACTED)
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(REDACTED)
    }
}

/// A service and one of its ports: `ledger.shop:6379`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServicePort {
    /// The service's name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// The port by which callers know it.
    pub port: u16,
}

/// A text is not `NAME.NAMESPACE:PORT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a service is NAME.NAMESPACE:PORT, such as `ledger.shop:6379`")]
pub struct ServicePortError;

impl FromStr for ServicePort {
    type Err = ServicePortError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (host, port) = text.rsplit_once(':').ok_or(ServicePortError)?;
        let (name, namespace) = host.split_once('.').ok_or(ServicePortError)?;
        let port: u16 = port
            .parse()
            .ok()
            .filter(|port| *port != 0)
            .ok_or(ServicePortError)?;
        if !is_label(name) || !is_label(namespace) {
            return Err(ServicePortError);
        }
        Ok(Self {
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            port,
        })
    }
}

impl fmt::Display for ServicePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}:{}", self.name, self.namespace, self.port)
    }
}

impl Serialize for ServicePort {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ServicePort {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// Where resources come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A folder of YAML files.
    Folder(PathBuf),
    /// The controller of a cluster, at `HOST:PORT`.
    Controller(String),
}

/// What proves who we are before there is an SVID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// A join token; absent when only a kept SVID can prove it.
    JoinToken(Option<JoinToken>),
    /// A service account token of the cluster, in this file, each time.
    ServiceAccountToken(PathBuf),
}

/// Where the join token is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JoinToken {
    /// In the configuration itself.
    Inline(Secret),
    /// In a file, read when it is needed.
    File(PathBuf),
}

/// How the destination of an application's call is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Destination {
    /// By the request's authority, or by a port that is bound to one service.
    #[default]
    Authority,
    /// By the address that the application connected to, before it was redirected here.
    Original,
}

/// One thing that is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where: keys and indices, such as `ports.0.address`.
    pub field: String,
    /// What is wrong.
    pub message: String,
    /// What to write instead.
    pub help: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`: {}; {}", self.field, self.message, self.help)
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The text is not a configuration. Every line is `FILE:LINE:COLUMN: message`.
    #[error("{}", lines.join("\n"))]
    Invalid {
        /// One line a problem.
        lines: Vec<String>,
    },
    /// The environment of a pod lacks something.
    #[error(transparent)]
    Environment(#[from] EnvironmentError),
    /// A configuration built in code contradicts itself.
    #[error("{}", faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Faults {
        /// What is wrong.
        faults: Vec<Fault>,
    },
}

impl Config {
    /// The defaults of a sidecar for `workload`, which has no ports yet.
    pub fn new(workload: WorkloadConfig, ca: CaConfig, resources: PathBuf) -> Self {
        Self {
            workload,
            ca,
            resources: Some(resources),
            controller: None,
            pod: None,
            destination: Destination::default(),
            ports: Vec::new(),
            plaintext_ports: Vec::new(),
            opaque_ports: Vec::new(),
            probes: None,
            outbound: OutboundConfig::default(),
            inbound: InboundConfig::default(),
            admin: AdminConfig::default(),
            health: HealthConfig::default(),
            upstreams: Vec::new(),
            log: LogConfig::default(),
            diagnostics: DiagnosticsConfig::default(),
            state: None,
            workers: default_workers(),
            drain_grace: default_drain_grace(),
            drain_timeout: default_drain_timeout(),
            limits: LimitsConfig::default(),
        }
    }

    /// Reads and checks a file. Relative paths in it are relative to its folder.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], with the place of each problem.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        let mut config = Self::from_yaml(&path.display().to_string(), &text)?;
        if let Some(folder) = path.parent() {
            config.resolve_paths(folder);
        }
        Ok(config)
    }

    /// Reads and checks a text; `name` is what problems call it.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Invalid`], with the place of each problem.
    pub fn from_yaml(name: &str, text: &str) -> Result<Self, ConfigError> {
        let config: Self = serde_saphyr::from_str(text).map_err(|error| ConfigError::Invalid {
            lines: vec![yaml::syntax_error(name, &error)],
        })?;
        let faults = config.check();
        if faults.is_empty() {
            return Ok(config);
        }
        let places = locate::Places::of(text);
        let lines = faults
            .iter()
            .map(|fault| format!("{name}:{}: {fault}", places.find(&fault.field)))
            .collect();
        Err(ConfigError::Invalid { lines })
    }

    /// Everything that contradicts itself or could not be started; empty when all is well.
    pub fn check(&self) -> Vec<Fault> {
        let mut faults = Vec::new();
        self.check_workload(&mut faults);
        self.check_ca(&mut faults);
        self.check_cluster(&mut faults);
        self.check_ports(&mut faults);
        self.check_listeners(&mut faults);
        self.check_applications(&mut faults);
        self.check_rest(&mut faults);
        self.check_log(&mut faults);
        self.limits.check(&mut faults);
        faults
    }

    /// The workload that policies select.
    ///
    /// # Errors
    ///
    /// [`SpiffeIdError`] when a name cannot be part of an identity, which [`Self::check`] finds too.
    pub fn workload(&self) -> Result<Workload, SpiffeIdError> {
        let trust_domain: TrustDomain = self.workload.trust_domain.parse()?;
        let id = SpiffeId::for_workload(
            &trust_domain,
            &self.workload.namespace,
            &self.workload.service_account,
        )?;
        let ports = self.ports.iter().map(|port| WorkloadPort {
            name: port.name.clone(),
            port: port.port,
        });
        Ok(Workload {
            id,
            trust_domain,
            namespace: self.workload.namespace.clone(),
            labels: self.workload.labels.clone(),
            ports: ports.collect(),
            enforcement: self.workload.enforcement.unwrap_or_default(),
        })
    }

    /// Where resources come from.
    pub fn source(&self) -> Source {
        match (&self.controller, &self.resources) {
            (Some(controller), _) => Source::Controller(controller.address.clone()),
            (None, folder) => Source::Folder(folder.clone().unwrap_or_default()),
        }
    }

    /// What proves who we are.
    pub fn evidence(&self) -> Evidence {
        if let Some(file) = &self.ca.token_file {
            return Evidence::ServiceAccountToken(file.clone());
        }
        let inline = self.ca.join_token.clone().map(JoinToken::Inline);
        let file = || self.ca.join_token_file.clone().map(JoinToken::File);
        Evidence::JoinToken(inline.or_else(file))
    }

    /// How the destination of a call is known.
    pub fn destination(&self) -> Destination {
        self.destination
    }

    /// The configuration as YAML with every default, secrets redacted.
    pub fn to_yaml(&self) -> String {
        serde_saphyr::to_string(self).unwrap_or_else(|error| format!("# {error}\n"))
    }

    /// Every listener with the key that configures it.
    pub fn listeners(&self) -> Vec<(String, SocketAddr)> {
        let mut listeners = vec![
            ("outbound.address".to_owned(), self.outbound.address),
            ("inbound.address".to_owned(), self.inbound.address),
            ("admin.address".to_owned(), self.admin.address),
            ("health.address".to_owned(), self.health.address),
        ];
        let upstreams = self.upstreams.iter().enumerate();
        listeners.extend(upstreams.map(|(i, u)| (format!("upstreams.{i}.address"), u.address)));
        listeners
    }

    fn resolve_paths(&mut self, folder: &Path) {
        let paths = [
            self.resources.as_mut(),
            Some(&mut self.ca.root),
            self.ca.join_token_file.as_mut(),
            self.ca.token_file.as_mut(),
            self.log.path.as_mut(),
            self.state.as_mut(),
        ];
        for path in paths.into_iter().flatten() {
            *path = folder.join(&*path);
        }
    }

    fn check_workload(&self, faults: &mut Vec<Fault>) {
        let workload = &self.workload;
        if let Err(error) = workload.trust_domain.parse::<TrustDomain>() {
            fault(
                faults,
                "workload.trustDomain",
                error,
                "write for example `mesh.local`",
            );
        }
        if !is_label(&workload.namespace) {
            fault(
                faults,
                "workload.namespace",
                format!("`{}` is not a name", workload.namespace),
                "use a-z, 0-9 and `-`, 1 to 63 characters",
            );
        }
        if !is_subdomain(&workload.service_account) {
            fault(
                faults,
                "workload.serviceAccount",
                format!("`{}` is not a name", workload.service_account),
                "use labels of a-z, 0-9 and `-`, with dots between them",
            );
        }
    }

    fn check_ca(&self, faults: &mut Vec<Fault>) {
        let ca = &self.ca;
        if !is_host_port(&ca.address) {
            let message = format!("`{}` is not HOST:PORT", ca.address);
            fault(
                faults,
                "ca.address",
                message,
                "write for example `127.0.0.1:19010`",
            );
        }
        match (&ca.join_token, &ca.join_token_file) {
            (Some(_), Some(_)) => fault(
                faults,
                "ca.joinTokenFile",
                "there is a `joinToken` as well",
                "keep one of the two",
            ),
            (None, None) if self.state.is_none() && ca.token_file.is_none() => fault(
                faults,
                "ca",
                "nothing proves who this workload is",
                "set `joinToken` or `joinTokenFile` (`sidegate-ca token create` makes one), or \
                 `state` with a kept SVID",
            ),
            _ => {}
        }
        if ca
            .join_token
            .as_ref()
            .is_some_and(|token| token.reveal() == REDACTED)
        {
            let message = "this is printed configuration: its secret was left out";
            fault(faults, "ca.joinToken", message, "write the token itself");
        }
    }

    fn check_ports(&self, faults: &mut Vec<Fault>) {
        for (i, port) in self.ports.iter().enumerate() {
            let earlier = self.ports.iter().take(i);
            if port.port == 0 {
                let message = "a port is 1 to 65535";
                fault(
                    faults,
                    &format!("ports.{i}.port"),
                    message,
                    "write its number",
                );
            }
            if earlier.clone().any(|other| other.port == port.port) {
                let message = format!("port {} is there already", port.port);
                fault(
                    faults,
                    &format!("ports.{i}.port"),
                    message,
                    "name each port once",
                );
            }
            let Some(name) = &port.name else { continue };
            if earlier
                .clone()
                .any(|other| other.name.as_ref() == Some(name))
            {
                let message = format!("the name `{name}` is there already");
                fault(
                    faults,
                    &format!("ports.{i}.name"),
                    message,
                    "name each port once",
                );
            }
            if !is_label(name) || name.bytes().all(|byte| byte.is_ascii_digit()) {
                let message = format!("`{name}` is not a port's name");
                let help = "use a-z, 0-9 and `-`, with a letter";
                fault(faults, &format!("ports.{i}.name"), message, help);
            }
        }
    }

    fn check_listeners(&self, faults: &mut Vec<Fault>) {
        let listeners = self.listeners();
        for (i, (field, address)) in listeners.iter().enumerate() {
            let earlier = listeners.iter().take(i);
            if let Some((other, _)) = earlier.clone().find(|(_, a)| overlap(*a, *address)) {
                let message = format!("{address} is taken by `{other}`");
                fault(
                    faults,
                    field,
                    message,
                    "give each listener a port of its own",
                );
            }
            let public = matches!(field.as_str(), "inbound.address" | "health.address");
            if !public && !address.ip().is_loopback() {
                let message = format!("{address} is reachable from other machines");
                let help = "listen on loopback, for example `127.0.0.1:PORT`: whoever reaches it \
                            acts as this workload";
                fault(faults, field, message, help);
            }
        }
    }

    /// A call handed to one of our own listeners would run in circles.
    fn check_applications(&self, faults: &mut Vec<Fault>) {
        let listeners = self.listeners();
        for (i, port) in self.ports.iter().enumerate() {
            let field = format!("ports.{i}.address");
            let Some(address) = port.address else {
                continue;
            };
            if address.port() == 0 || address.ip().is_unspecified() {
                let message = format!("nobody can be called at {address}");
                fault(
                    faults,
                    &field,
                    message,
                    "write the application's address and port",
                );
            }
            if let Some((own, _)) = listeners.iter().find(|(_, a)| overlap(*a, address)) {
                let message = format!("{address} is this sidecar's own `{own}`");
                fault(
                    faults,
                    &field,
                    message,
                    "write the application's address and port",
                );
            }
        }
    }

    fn check_rest(&self, faults: &mut Vec<Fault>) {
        if !(1..=64).contains(&self.workers) {
            let message = format!("{} workers", self.workers);
            fault(faults, "workers", message, "have 1 to 64");
        }
        if self.drain_grace > self.drain_timeout {
            let message = "the grace period is longer than the whole drain";
            fault(
                faults,
                "drainGrace",
                message,
                "keep it below `drainTimeout`",
            );
        }
        let folder = self.resources.as_deref();
        if folder.is_some_and(|folder| folder.as_os_str().is_empty()) {
            fault(
                faults,
                "resources",
                "no folder",
                "write the folder of the resources",
            );
        }
        if let Err(error) = diagnostics::check(&self.diagnostics.level) {
            fault(
                faults,
                "diagnostics.level",
                error,
                "write for example `info`",
            );
        }
    }

    fn check_log(&self, faults: &mut Vec<Fault>) {
        if self.log.path.is_some() && self.log.stdout {
            fault(
                faults,
                "log.stdout",
                "there is a `path` as well",
                "keep one of the two",
            );
        }
        let bounds = [
            ("log.queueRecordsMax", self.log.queue_records_max),
            ("log.denialsQueueMax", self.log.denials_queue_max),
            ("log.denialsKeptMax", self.log.denials_kept_max),
        ];
        for (field, bound) in bounds {
            if bound == 0 {
                fault(
                    faults,
                    field,
                    "nothing could ever be logged",
                    "write 1 or more",
                );
            }
        }
        let flush = self.log.flush_interval;
        if flush.is_zero() || flush > Duration::from_millis(200) {
            let message = "a line must be written at most 200 ms late";
            fault(
                faults,
                "log.flushInterval",
                message,
                "write `1ms` to `200ms`",
            );
        }
    }
}

/// Adds one fault.
fn fault(faults: &mut Vec<Fault>, field: &str, message: impl fmt::Display, help: &str) {
    faults.push(Fault {
        field: field.to_owned(),
        message: message.to_string(),
        help: help.to_owned(),
    });
}

/// Whether two listeners, or a listener and a target, mean the same socket.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    let any = a.ip().is_unspecified() || b.ip().is_unspecified();
    a.port() != 0 && a.port() == b.port() && (any || a.ip() == b.ip())
}

/// Whether this names a host and a port.
fn is_host_port(address: &str) -> bool {
    let port = address.rsplit_once(':').and_then(|(host, port)| {
        (!host.is_empty()).then(|| port.parse::<u16>().ok().filter(|port| *port != 0))?
    });
    port.is_some()
}

/// Whether this is a DNS subdomain, as Kubernetes names service accounts: `team.builder`.
fn is_subdomain(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(is_label)
}

/// Whether this is a DNS label, as Kubernetes names namespaces, services and ports.
fn is_label(name: &str) -> bool {
    let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
    (1..=63).contains(&name.len())
        && name.bytes().all(allowed)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

fn default_trust_domain() -> String {
    "mesh.local".to_owned()
}

fn default_ca_address() -> String {
    "127.0.0.1:19010".to_owned()
}

fn default_workers() -> usize {
    1
}

fn default_drain_grace() -> Duration {
    Duration::from_secs(1)
}

fn default_drain_timeout() -> Duration {
    Duration::from_secs(30)
}

#[cfg(test)]
mod tests;
