//! The application's probes and lifecycle hooks, which this sidecar carries out: the kubelet's own
//! would be refused like those of anybody without an identity.
//!
//! Invariants: only who knows the pod's secret is answered; target, path and headers are those of
//! the configuration, and nothing of the request adds to them; the answer is 200 or 503 without a
//! body, so that nobody reads the application through it. What counts as a success is what the
//! kubelet counts as one. Only the pod's own address is asked, never one of this sidecar's ports.

mod grpc;
mod http;

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use ::http::StatusCode;
use ::http::request::Parts;
use futures_util::FutureExt;
use sidegate_mesh::Clock;
use subtle::ConstantTimeEq;
use tokio::net::TcpStream;
use tracing::{info, warn};

use crate::config::{ProbeConfig, ProbeKind, Secret};
use crate::limits::Limit;
use crate::original::Own;
use crate::responder::{Answer, Reply, empty};
use crate::shared::Shared;

/// The header that must hold the pod's secret.
const SECRET_HEADER: &str = "sidegate-probe-secret";
/// Where probes are, with what follows.
const PREFIX: &str = "/probe/";
/// What the kubelet's requests begin with too, by which applications know a probe.
const USER_AGENT: &str = concat!("kube-probe/sidegate-", env!("CARGO_PKG_VERSION"));

/// The probes and hooks of one pod.
pub(crate) struct Probes {
    secret: Secret,
    entries: HashMap<String, Arc<Probe>>,
    asker: Arc<Asker>,
    limit: Limit,
}

/// One probe or hook.
struct Probe {
    entry: String,
    kind: ProbeKind,
    config: ProbeConfig,
    timeout: Duration,
    last: AtomicU8,
}

/// What asks the application.
struct Asker {
    ip: IpAddr,
    own: Own,
    tls: http::Tls,
    clock: Arc<dyn Clock>,
}

/// Why the application is not well.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("cannot connect to {address}: {source}")]
    Connect {
        address: SocketAddr,
        source: std::io::Error,
    },
    #[error("{0} is this sidecar's own")]
    Own(SocketAddr),
    #[error("no TLS at {address}: {source}")]
    Tls {
        address: SocketAddr,
        source: std::io::Error,
    },
    #[error("no answer: {0}")]
    Http(#[from] hyper::Error),
    #[error("no answer: {0}")]
    Http2(#[from] h2::Error),
    #[error("status {0}")]
    Status(StatusCode),
    #[error("it cannot be asked: {0}")]
    Request(#[from] ::http::Error),
    #[error("redirected to `{0}`, which is no URL")]
    Location(String),
    #[error("stopped after {0} redirections")]
    Redirects(usize),
    #[error("gRPC status {0}")]
    Grpc(String),
    #[error("it is not serving: {0}")]
    NotServing(u64),
    #[error("no answer within {0:?}")]
    Timeout(Duration),
}

impl Probes {
    /// The probes of the configuration; `None` when it has none.
    pub(crate) fn new(shared: &Shared) -> Option<Self> {
        let config = shared.config.probes.as_ref()?;
        let entries = config.entries.iter().filter_map(|(entry, config)| {
            let kind = ProbeKind::of_entry(entry)?;
            let probe = Probe {
                entry: entry.clone(),
                kind,
                timeout: config.timeout.unwrap_or_else(|| kind.default_timeout()),
                config: config.clone(),
                last: AtomicU8::new(UNASKED),
            };
            Some((entry.clone(), Arc::new(probe)))
        });
        let pod = shared.config.pod.as_ref();
        let primary = pod.and_then(|pod| pod.ips.first().copied());
        let asker = Asker {
            ip: primary.unwrap_or(Ipv4Addr::LOCALHOST.into()),
            own: shared.own.clone(),
            tls: http::Tls::new(),
            clock: Arc::clone(&shared.clock),
        };
        Some(Self {
            secret: config.secret.clone(),
            entries: entries.collect(),
            asker: Arc::new(asker),
            limit: shared.limits.probes.clone(),
        })
    }

    /// The longest time that one of them may take.
    pub(crate) fn longest(&self) -> Duration {
        let times = self.entries.values().map(|probe| probe.timeout);
        times.max().unwrap_or_default()
    }

    /// The answer to a request for a probe; `None` when the request is for something else.
    pub(crate) fn respond(&self, request: &Parts) -> Option<Reply> {
        let entry = request.uri.path().strip_prefix(PREFIX)?;
        if !self.knows_secret(request) {
            return Some(empty(StatusCode::FORBIDDEN).into());
        }
        let Some(probe) = self.entries.get(entry) else {
            return Some(empty(StatusCode::NOT_FOUND).into());
        };
        // The limit has counted what it turns away.
        let Some(permit) = self.limit.try_acquire() else {
            return Some(empty(StatusCode::SERVICE_UNAVAILABLE).into());
        };
        let (probe, asker) = (Arc::clone(probe), Arc::clone(&self.asker));
        let answer = async move {
            let result = asker.ask(&probe).await;
            drop(permit);
            probe.answer(&result)
        };
        Some(Reply::Later(answer.boxed()))
    }

    fn knows_secret(&self, request: &Parts) -> bool {
        let mut given = request.headers.get_all(SECRET_HEADER).iter();
        let (Some(given), None) = (given.next(), given.next()) else {
            return false;
        };
        let expected = self.secret.reveal().as_bytes();
        bool::from(given.as_bytes().ct_eq(expected))
    }
}

const UNASKED: u8 = 0;
const WELL: u8 = 1;
const FAILED: u8 = 2;

impl Probe {
    /// What the kubelet is told. To a hook it reads no status: what fails there is the request
    /// itself.
    fn answer(&self, result: &Result<(), Failure>) -> Option<Answer> {
        self.say(result);
        match result {
            Ok(()) => Some(empty(StatusCode::OK)),
            Err(_) if self.kind.is_hook() => None,
            Err(_) => Some(empty(StatusCode::SERVICE_UNAVAILABLE)),
        }
    }

    /// The kubelet shows 503 and no more; the reason is here, once for each change.
    fn say(&self, result: &Result<(), Failure>) {
        let now = if result.is_ok() { WELL } else { FAILED };
        let before = self.last.swap(now, Ordering::Relaxed);
        match result {
            Ok(()) if before == FAILED => info!(probe = self.entry, "probe succeeds again"),
            Err(error) if before != FAILED => warn!(probe = self.entry, %error, "probe fails"),
            _ => {}
        }
    }
}

impl Asker {
    async fn ask(&self, probe: &Probe) -> Result<(), Failure> {
        let asked = async {
            let config = &probe.config;
            match (&config.http, &config.tcp, &config.grpc) {
                (Some(http), ..) => http::ask(self, http, probe.kind).await,
                (_, Some(tcp), _) => self.connect(tcp.port).await.map(drop),
                (.., Some(grpc)) => grpc::ask(self, grpc).await,
                // The configuration's own check refuses it.
                _ => Err(Failure::Timeout(Duration::ZERO)),
            }
        };
        tokio::select! {
            biased;
            result = asked => result,
            () = self.clock.sleep(probe.timeout) => Err(Failure::Timeout(probe.timeout)),
        }
    }

    fn address(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip, port)
    }

    /// Connects to the application at the pod's own address, which from this user is not redirected.
    async fn connect(&self, port: u16) -> Result<TcpStream, Failure> {
        let address = self.address(port);
        if self.own.refuses_inbound(address).is_some() {
            return Err(Failure::Own(address));
        }
        TcpStream::connect(address)
            .await
            .map_err(|source| Failure::Connect { address, source })
    }
}

#[cfg(test)]
mod tests;
