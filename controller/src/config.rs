//! The controller's configuration: one YAML file, read once.
//!
//! Invariant: a [`Config`] that [`Config::load`] returns has been checked; an unknown field or an
//! impossible value is an error that names the file. It holds no secret, so it may be printed.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
pub use sidegate_mesh::config::ConfigError;
use sidegate_mesh::config::{check_enough, read};
use sidegate_mesh::resource::SYSTEM_NAMESPACE;
use sidegate_mesh::spiffe::TrustDomain;

/// Everything that a controller can be told.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Config {
    /// Where sidecars and the other replicas come: gRPC over mutual TLS.
    pub address: SocketAddr,
    /// Where `/metrics`, `/livez` and `/readyz` are served.
    pub metrics_address: SocketAddr,
    /// The mesh's trust domain.
    pub trust_domain: TrustDomain,
    /// Where the controller's own certificate comes from.
    pub ca: Ca,
    /// The namespace of the control plane: where the Lease is.
    pub namespace: String,
    /// `host:port` at which the other replicas reach this one; absent: the pod's own address
    /// (`POD_IP`) and the port of `address`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advertise_address: Option<SocketAddr>,
    /// Ranges of pod addresses that the nodes do not tell. With neither, the neighbourhood of each
    /// known pod (/24, /64) counts as one.
    pub pod_cidrs: Vec<IpNet>,
    /// Ranges of Service addresses beside those of the cluster's ServiceCIDRs.
    pub service_cidrs: Vec<IpNet>,
    /// Ranges that are never the mesh's though they lie in one of the others, such as a database in
    /// the pods' own subnet. A known pod or Service comes first.
    pub external_cidrs: Vec<IpNet>,
    /// The Lease by which one replica is the leader.
    pub lease: Lease,
    /// Shortest time between two writes of one resource's status.
    #[serde(with = "humantime_serde")]
    pub status_interval: Duration,
    /// How long open streams may take to end when the controller stops.
    #[serde(with = "humantime_serde")]
    pub drain_timeout: Duration,
    /// Bounds.
    pub limits: Limits,
}

/// Where the controller's own certificate comes from.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Ca {
    /// The CA, `host:port`.
    pub address: String,
    /// The roots to start with: a PEM file.
    pub root: PathBuf,
    /// The service account token that proves who this is; read anew for each request.
    pub token_file: PathBuf,
}

/// The Lease by which one replica is the leader.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Lease {
    /// Its name.
    pub name: String,
    /// How long a leader is one without a renewal.
    #[serde(with = "humantime_serde")]
    pub duration: Duration,
    /// How often it renews, and how often the others look.
    #[serde(with = "humantime_serde")]
    pub interval: Duration,
}

/// Every bound of the controller.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Limits {
    /// Connections served at once.
    pub connections_max: usize,
    /// TLS handshakes in flight.
    pub handshakes_max: usize,
    /// Longest TLS handshake.
    #[serde(with = "humantime_serde")]
    pub handshake_timeout: Duration,
    /// HTTP/2 streams of one connection.
    pub streams_per_connection_max: u32,
    /// Streams of sidecars at once.
    pub sidecars_max: usize,
    /// Longest wait for a stream's first message, and for a pod that the watch has not seen yet.
    #[serde(with = "humantime_serde")]
    pub hello_timeout: Duration,
    /// Destinations that one sidecar may follow. One more is answered as unknown.
    pub subscriptions_max: usize,
    /// Size at which a response is cut, in bytes; one resource or destination is never cut.
    pub response_bytes_max: usize,
    /// Largest message of a sidecar, in bytes.
    pub message_bytes_max: usize,
    /// Events for the cluster that wait to be written.
    pub events_max: usize,
    /// Events written a second.
    pub events_per_second: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            address: (Ipv4Addr::UNSPECIFIED, 19_012).into(),
            metrics_address: (Ipv4Addr::UNSPECIFIED, 19_013).into(),
            trust_domain: default_trust_domain(),
            ca: Ca::default(),
            namespace: SYSTEM_NAMESPACE.to_owned(),
            advertise_address: None,
            pod_cidrs: Vec::new(),
            service_cidrs: Vec::new(),
            external_cidrs: Vec::new(),
            lease: Lease::default(),
            status_interval: Duration::from_secs(2),
            drain_timeout: Duration::from_secs(5),
            limits: Limits::default(),
        }
    }
}

impl Default for Ca {
    fn default() -> Self {
        Self {
            address: "sidegate-ca.sidegate-system.svc.cluster.local:19010".to_owned(),
            root: PathBuf::from("/var/run/sidegate/bundle/root.pem"),
            token_file: PathBuf::from("/var/run/sidegate/token/token"),
        }
    }
}

impl Default for Lease {
    fn default() -> Self {
        Self {
            name: "sidegate-controller".to_owned(),
            duration: Duration::from_secs(15),
            interval: Duration::from_secs(2),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 8_192,
            handshakes_max: 128,
            handshake_timeout: Duration::from_secs(5),
            streams_per_connection_max: 8,
            sidecars_max: 8_192,
            hello_timeout: Duration::from_secs(10),
            subscriptions_max: 4_096,
            response_bytes_max: 512 * 1024,
            message_bytes_max: 1024 * 1024,
            events_max: 1_024,
            events_per_second: 20,
        }
    }
}

impl Config {
    /// Reads and checks a YAML file; relative paths in it are taken from the file's folder.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], which names the file and the field.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let mut config: Self = read(path)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        config.ca.root = folder.join(&config.ca.root);
        config.ca.token_file = folder.join(&config.ca.token_file);
        config.check()?;
        Ok(config)
    }

    /// Checks every value.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Value`] for the first impossible one.
    pub fn check(&self) -> Result<(), ConfigError> {
        let lease = &self.lease;
        if lease.interval.is_zero() || lease.duration < lease.interval * 3 {
            return Err(ConfigError::value(
                "lease.duration",
                "a leader could lose its Lease between two renewals",
                "write at least three times lease.interval",
            ));
        }
        let limits = &self.limits;
        let enough = [
            ("limits.connectionsMax", limits.connections_max >= 2),
            ("limits.handshakesMax", limits.handshakes_max > 0),
            ("limits.sidecarsMax", limits.sidecars_max > 0),
            ("limits.subscriptionsMax", limits.subscriptions_max > 0),
            (
                "limits.streamsPerConnectionMax",
                limits.streams_per_connection_max > 0,
            ),
            ("limits.responseBytesMax", limits.response_bytes_max >= 4096),
            ("limits.messageBytesMax", limits.message_bytes_max >= 4096),
            ("limits.eventsPerSecond", limits.events_per_second > 0),
        ];
        check_enough(&enough)
    }
}

fn default_trust_domain() -> TrustDomain {
    #[expect(
        clippy::expect_used,
        reason = "a constant that is a valid trust domain"
    )]
    "cluster.local".parse().expect("a valid trust domain")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("controller.yaml");
        std::fs::write(&path, text).unwrap();
        Config::load(&path)
    }

    #[track_caller]
    fn check_refused(text: &str, expected: &str) {
        let error = load(text).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }

    #[test]
    fn nothing_must_be_said_in_a_cluster() {
        let config = load("{}").unwrap();
        assert_eq!(config.address.to_string(), "0.0.0.0:19012");
        assert_eq!(config.metrics_address.to_string(), "0.0.0.0:19013");
        assert_eq!(config.trust_domain.to_string(), "cluster.local");
        assert_eq!(
            config.ca.token_file,
            Path::new("/var/run/sidegate/token/token")
        );
    }

    #[test]
    fn what_is_printed_can_be_read_again() {
        let text = "podCidrs: [10.245.0.0/16]\nlease: { duration: 9s, interval: 3s }\nca: { root: root.pem }\n";
        let config = load(text).unwrap();
        assert!(config.ca.root.is_absolute(), "relative to the file");
        let printed = serde_saphyr::to_string(&config).unwrap();
        let again: Config = serde_saphyr::from_str(&printed).unwrap();
        assert_eq!(again.pod_cidrs, config.pod_cidrs);
        assert_eq!(again.lease.duration, Duration::from_secs(9));
    }

    #[test]
    fn an_unknown_field_is_refused_with_its_place() {
        check_refused(
            "namespace: sidegate-system\nlimits: { sidecarMax: 1 }\n",
            "controller.yaml:2:11: unknown field `sidecarMax`",
        );
    }

    #[test]
    fn impossible_values_are_refused() {
        check_refused("lease: { duration: 5s, interval: 2s }", "lease.duration");
        check_refused("limits: { sidecarsMax: 0 }", "limits.sidecarsMax");
        check_refused("podCidrs: [10.245.0.0]", "controller.yaml:1:12: invalid");
    }
}
