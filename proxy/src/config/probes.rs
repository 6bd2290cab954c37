//! `probes`: the application's probes and lifecycle hooks, which the sidecar carries out.
//!
//! Invariant: what is asked, where and with which headers is fixed here; nothing of the kubelet's
//! request adds to it.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use http::uri::PathAndQuery;
use http::{HeaderName, HeaderValue};
use serde::{Deserialize, Serialize};

use super::{Config, Fault, REDACTED, Secret, fault};

/// Shortest secret that nobody guesses.
const SECRET_BYTES_MIN: usize = 32;
/// Most probes and hooks of one pod.
const ENTRIES_MAX: usize = 1_024;
/// A hook has no limit of its own in a cluster, and every wait here has one.
const HOOK_TIMEOUT: Duration = Duration::from_mins(10);
/// The cluster's own default.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// `probes`: what is asked in the kubelet's stead at `/probe/<container>/<kind>`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ProbesConfig {
    /// What the header `sidegate-probe-secret` must hold.
    pub secret: Secret,
    /// By `<container>/<kind>`.
    #[serde(default)]
    pub entries: BTreeMap<String, ProbeConfig>,
}

/// One probe or hook: exactly one of `http`, `tcp` and `grpc`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ProbeConfig {
    /// A GET that is answered with 200 to 399.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpProbe>,
    /// A connection that is accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp: Option<TcpProbe>,
    /// A gRPC health check that says SERVING.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grpc: Option<GrpcProbe>,
    /// Longest time of all of it; 1 s for a probe, 10 min for a hook.
    #[serde(
        default,
        with = "humantime_serde",
        skip_serializing_if = "Option::is_none"
    )]
    pub timeout: Option<Duration>,
}

/// A GET.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct HttpProbe {
    /// Whether it goes over TLS.
    #[serde(default)]
    pub scheme: HttpScheme,
    /// The application's port.
    pub port: u16,
    /// Path and query; a leading slash is added.
    #[serde(default)]
    pub path: String,
    /// Headers of the request, `Host` among them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<HttpHeader>,
}

/// Whether a GET goes over TLS. No certificate is verified, as the kubelet verifies none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum HttpScheme {
    /// Plain.
    #[default]
    #[serde(alias = "HTTP")]
    Http,
    /// TLS.
    #[serde(alias = "HTTPS")]
    Https,
}

/// One header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct HttpHeader {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: String,
}

/// A connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct TcpProbe {
    /// The application's port.
    pub port: u16,
}

/// A gRPC health check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct GrpcProbe {
    /// The application's port.
    pub port: u16,
    /// The service that is asked about; empty: the whole server.
    #[serde(default)]
    pub service: String,
}

/// What a probe or hook is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProbeKind {
    /// Whether the container must be restarted.
    Liveness,
    /// Whether it takes calls.
    Readiness,
    /// Whether it has started.
    Startup,
    /// Right after its start.
    PostStart,
    /// Before its end.
    PreStop,
}

impl ProbeKind {
    /// Every kind.
    pub const ALL: [Self; 5] = [
        Self::Liveness,
        Self::Readiness,
        Self::Startup,
        Self::PostStart,
        Self::PreStop,
    ];

    /// The word in the URL.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Liveness => "liveness",
            Self::Readiness => "readiness",
            Self::Startup => "startup",
            Self::PostStart => "post-start",
            Self::PreStop => "pre-stop",
        }
    }

    /// Whether it is a lifecycle hook.
    pub fn is_hook(self) -> bool {
        matches!(self, Self::PostStart | Self::PreStop)
    }

    /// The kind of `<container>/<kind>`; `None` when that is not what the text is.
    pub fn of_entry(entry: &str) -> Option<Self> {
        let (container, word) = entry.split_once('/')?;
        let kind = Self::ALL.into_iter().find(|kind| kind.as_str() == word)?;
        super::is_label(container).then_some(kind)
    }

    /// The longest time where none is configured.
    pub fn default_timeout(self) -> Duration {
        if self.is_hook() {
            HOOK_TIMEOUT
        } else {
            PROBE_TIMEOUT
        }
    }
}

impl fmt::Display for ProbeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl ProbeConfig {
    /// The application's port, where exactly one kind of question says it.
    fn port(&self) -> Option<(&'static str, u16)> {
        match (&self.http, &self.tcp, &self.grpc) {
            (Some(http), None, None) => Some(("http", http.port)),
            (None, Some(tcp), None) => Some(("tcp", tcp.port)),
            (None, None, Some(grpc)) => Some(("grpc", grpc.port)),
            _ => None,
        }
    }
}

impl Config {
    pub(super) fn check_probes(&self, faults: &mut Vec<Fault>) {
        let Some(probes) = &self.probes else { return };
        if self.controller.is_none() {
            let message = "there is no pod to probe";
            fault(faults, "probes", message, "leave it out");
        }
        if probes.secret.reveal() == REDACTED {
            let message = "this is printed configuration: its secret was left out";
            fault(faults, "probes.secret", message, "write the secret itself");
        } else if probes.secret.reveal().len() < SECRET_BYTES_MIN {
            let message = "whoever guesses the secret may probe the application";
            let help = "write 32 random bytes in hexadecimal";
            fault(faults, "probes.secret", message, help);
        } else if HeaderValue::from_str(probes.secret.reveal()).is_err() {
            let message = "the secret cannot be a header's value";
            fault(faults, "probes.secret", message, "use letters and digits");
        }
        if probes.entries.len() > ENTRIES_MAX {
            let message = format!("more than {ENTRIES_MAX} probes");
            fault(faults, "probes.entries", message, "write fewer");
        }
        for (entry, probe) in &probes.entries {
            self.check_probe(faults, entry, probe);
        }
    }

    fn check_probe(&self, faults: &mut Vec<Fault>, entry: &str, probe: &ProbeConfig) {
        let field = format!("probes.entries.{entry}");
        if ProbeKind::of_entry(entry).is_none() {
            let message = format!("`{entry}` is not CONTAINER/KIND");
            let help = "kinds are liveness, readiness, startup, post-start and pre-stop";
            fault(faults, &field, message, help);
        }
        match probe.port() {
            None => {
                let message = "a probe asks in exactly one way";
                fault(
                    faults,
                    &field,
                    message,
                    "write one of `http`, `tcp` and `grpc`",
                );
            }
            Some((way, 0)) => {
                let field = format!("{field}.{way}.port");
                fault(faults, &field, "a port is 1 to 65535", "write its number");
            }
            Some((way, port)) => {
                let own = self.listeners();
                if let Some((key, _)) = own.iter().find(|(_, address)| address.port() == port) {
                    let field = format!("{field}.{way}.port");
                    let message = format!("{port} is this sidecar's own `{key}`");
                    fault(faults, &field, message, "write a port of the application");
                }
            }
        }
        if probe.timeout.is_some_and(|timeout| timeout.is_zero()) {
            let field = format!("{field}.timeout");
            fault(faults, &field, "no time at all", "write for example `1s`");
        }
        if let Some(http) = &probe.http {
            check_http(faults, &field, http);
        }
    }
}

fn hex_digit(value: u8) -> char {
    let digit = char::from_digit(u32::from(value), 16).unwrap_or('0');
    digit.to_ascii_uppercase()
}

fn check_http(faults: &mut Vec<Fault>, field: &str, http: &HttpProbe) {
    if http.path_and_query().is_none() {
        let field = format!("{field}.http.path");
        let message = format!("`{}` is not a path", http.path);
        fault(faults, &field, message, "write for example `/healthz`");
    }
    for (i, header) in http.headers.iter().enumerate() {
        let name = HeaderName::from_bytes(header.name.as_bytes());
        if name.is_err() || HeaderValue::from_str(&header.value).is_err() {
            let field = format!("{field}.http.headers.{i}");
            let message = format!("`{}` cannot be sent as a header", header.name);
            fault(faults, &field, message, "write a name and a value of HTTP");
        }
    }
}

impl HttpProbe {
    /// Path and query as they are asked for: with a leading slash, without a fragment, and with
    /// what may not stand in a URL encoded.
    pub fn path_and_query(&self) -> Option<PathAndQuery> {
        let path = self.path.split('#').next().unwrap_or_default();
        let mut text = String::with_capacity(path.len() + 1);
        if !path.starts_with('/') {
            text.push('/');
        }
        for byte in path.bytes() {
            if byte.is_ascii_graphic() && !br#""<>\^`{|}"#.contains(&byte) {
                text.push(char::from(byte));
            } else {
                text.push('%');
                text.extend([byte >> 4, byte & 0xf].map(hex_digit));
            }
        }
        text.parse().ok()
    }
}
