//! The CA's configuration: one YAML file, read once.
//!
//! Invariant: a [`Config`] that [`Config::load`] returns has been checked; an unknown field or an
//! impossible value is an error that names the file. It holds no secret, so it may be printed.
//!
//! Standalone, `stateDir` is all that must be said. In a cluster:
//!
//! ```yaml
//! trustDomain: cluster.local
//! stateDir: /var/lib/sidegate/ca        # a folder below the volume, made here with mode 0700
//! address: "[::]:19010"
//! metricsAddress: "[::]:19011"
//! limits: { issuancesPerIdentityPerMinute: 1200 }
//! kubernetes:
//!   namespace: sidegate-system
//!   secret: sidegate-ca
//!   bundleConfigMap: sidegate-bundle
//!   tokenAudience: sidegate-ca
//! ```

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
pub use sidegate_mesh::config::ConfigError;
use sidegate_mesh::config::{check_enough, read};
use sidegate_mesh::spiffe::TrustDomain;

/// Shortest leaf lifetime without `allowShortLeafLifetime`.
pub const LEAF_LIFETIME_MIN: Duration = Duration::from_mins(1);

/// Longest leaf lifetime: the intermediate is renewed while half of its 30 days are left, and no
/// leaf may outlive it.
pub const LEAF_LIFETIME_MAX: Duration = Duration::from_hours(7 * 24);

/// Longest path of a Unix socket, in bytes (`sun_path` less its NUL).
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Everything that a CA can be told.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Config {
    /// The trust domain that this CA issues for.
    #[serde(default = "default_trust_domain")]
    pub trust_domain: TrustDomain,
    /// Folder (mode 0700) of keys, certificates and ledger. Relative to the configuration's folder.
    pub state_dir: PathBuf,
    /// Where sidecars ask for their identity: gRPC over TLS.
    #[serde(default = "default_address")]
    pub address: SocketAddr,
    /// Unix socket of the administration; `admin.sock` in the state folder when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admin_socket: Option<PathBuf>,
    /// Where `/metrics`, `/livez` and `/readyz` are served.
    #[serde(default = "default_metrics_address")]
    pub metrics_address: SocketAddr,
    /// Life of a workload's certificate.
    #[serde(default = "default_leaf_lifetime", with = "humantime_serde")]
    pub leaf_lifetime: Duration,
    /// How far a certificate's start lies in the past, for clocks that disagree.
    #[serde(default = "default_backdate", with = "humantime_serde")]
    pub backdate: Duration,
    /// Life of a join token that asks for none.
    #[serde(default = "default_token_lifetime", with = "humantime_serde")]
    pub token_lifetime: Duration,
    /// Admits a leaf lifetime under a minute. For tests only.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_short_leaf_lifetime: bool,
    /// Bounds.
    #[serde(default)]
    pub limits: Limits,
    /// Present in a cluster: keys are in a Secret that all replicas share, and only the token of a
    /// live pod is evidence. Absent: standalone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kubernetes: Option<Kubernetes>,
}

/// The CA's surroundings in a cluster. `{}` is all of the defaults.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Kubernetes {
    /// Where the Secret is, and the bundle that says that an installation has begun.
    pub namespace: String,
    /// The Secret that holds the keys. The CA makes it; nobody else reads it.
    pub secret: String,
    /// The ConfigMap, in each labelled namespace and in `namespace`, that sidecars start their
    /// trust with; its only key is `root.pem`.
    pub bundle_config_map: String,
    /// The audience that a service account token must be made for.
    pub token_audience: String,
    /// The cluster's DNS domain, for the names of the control plane's webhooks.
    pub cluster_domain: String,
    /// Whether a token is refused from an address that is none of its pod's. Say `false` only
    /// where the network hides the addresses of pods from one another.
    pub check_source_address: bool,
    /// How often the Secret is read for what another replica has changed: a revocation is in
    /// effect everywhere after this and a moment.
    #[serde(with = "humantime_serde")]
    pub refresh_interval: Duration,
}

impl Default for Kubernetes {
    fn default() -> Self {
        Self {
            namespace: "sidegate-system".to_owned(),
            secret: "sidegate-ca".to_owned(),
            bundle_config_map: "sidegate-bundle".to_owned(),
            token_audience: "sidegate-ca".to_owned(),
            cluster_domain: "cluster.local".to_owned(),
            check_source_address: true,
            refresh_interval: Duration::from_secs(2),
        }
    }
}

/// Every bound of the CA.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Limits {
    /// Certificates for one identity a minute.
    pub issuances_per_identity_per_minute: u32,
    /// In a cluster: certificates for one pod a minute.
    pub issuances_per_pod_per_minute: u32,
    /// Certificates for all identities together a minute.
    pub issuances_per_minute: u32,
    /// In a cluster: tokens from one address a minute. What they prove is not known yet.
    pub tokens_per_address_per_minute: u32,
    /// In a cluster: tokens that are reviewed at once.
    pub reviews_max: usize,
    /// In a cluster: tokens that wait for their review.
    pub reviews_waiting_max: usize,
    /// Connections served at once. Callers without a certificate get at most half of them.
    pub connections_max: usize,
    /// TLS handshakes in flight.
    pub handshakes_max: usize,
    /// Longest TLS handshake.
    #[serde(with = "humantime_serde")]
    pub handshake_timeout: Duration,
    /// Longest answer to one request, streams apart.
    #[serde(with = "humantime_serde")]
    pub request_timeout: Duration,
    /// HTTP/2 streams of one connection.
    pub streams_per_connection_max: u32,
    /// Open `WatchBundle` streams.
    pub watchers_max: usize,
    /// Largest request message, in bytes.
    pub message_bytes_max: usize,
    /// Join tokens that are not expired.
    pub tokens_max: usize,
    /// Certificates that are not expired, the memory that reuse of a key is refused from.
    pub certificates_max: usize,
    /// Entries of the denylist.
    pub revocations_max: usize,
    /// Issuances that wait for the ledger's disk.
    pub ledger_queue_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            issuances_per_identity_per_minute: 120,
            issuances_per_pod_per_minute: 30,
            issuances_per_minute: 6_000,
            tokens_per_address_per_minute: 600,
            reviews_max: 32,
            reviews_waiting_max: 1_024,
            connections_max: 4_096,
            handshakes_max: 128,
            handshake_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(15),
            streams_per_connection_max: 32,
            watchers_max: 4_096,
            message_bytes_max: 64 * 1024,
            tokens_max: 4_096,
            certificates_max: 1_000_000,
            revocations_max: 10_000,
            ledger_queue_max: 1_024,
        }
    }
}

impl Config {
    /// The defaults, with state in `state_dir`.
    pub fn new(state_dir: impl Into<PathBuf>) -> Self {
        Self {
            trust_domain: default_trust_domain(),
            state_dir: state_dir.into(),
            address: default_address(),
            admin_socket: None,
            metrics_address: default_metrics_address(),
            leaf_lifetime: default_leaf_lifetime(),
            backdate: default_backdate(),
            token_lifetime: default_token_lifetime(),
            allow_short_leaf_lifetime: false,
            limits: Limits::default(),
            kubernetes: None,
        }
    }

    /// Reads and checks a YAML file; relative paths in it are taken from the file's folder.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], which names the file and the field.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let mut config: Self = read(path)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        config.state_dir = folder.join(&config.state_dir);
        config.admin_socket = config.admin_socket.map(|socket| folder.join(socket));
        config.check()?;
        Ok(config)
    }

    /// The administration's Unix socket.
    pub fn admin_socket(&self) -> PathBuf {
        self.admin_socket
            .clone()
            .unwrap_or_else(|| self.state_dir.join("admin.sock"))
    }

    /// Checks every value.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Value`] for the first impossible one.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.check_lifetimes()?;
        if let Some(kubernetes) = &self.kubernetes {
            kubernetes.check()?;
        }
        if self.admin_socket().as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            return Err(ConfigError::value(
                "adminSocket",
                format!("{} is too long", self.admin_socket().display()),
                "a Unix socket's path has at most 107 bytes; choose a shorter one",
            ));
        }
        let positive = [
            (
                "limits.issuancesPerIdentityPerMinute",
                self.limits.issuances_per_identity_per_minute > 0,
            ),
            (
                "limits.issuancesPerMinute",
                self.limits.issuances_per_minute > 0,
            ),
            (
                "limits.issuancesPerPodPerMinute",
                self.limits.issuances_per_pod_per_minute > 0,
            ),
            (
                "limits.tokensPerAddressPerMinute",
                self.limits.tokens_per_address_per_minute > 0,
            ),
            ("limits.reviewsMax", self.limits.reviews_max > 0),
            (
                "limits.reviewsWaitingMax",
                self.limits.reviews_waiting_max > 0,
            ),
            ("limits.connectionsMax", self.limits.connections_max >= 2),
            ("limits.handshakesMax", self.limits.handshakes_max > 0),
            (
                "limits.messageBytesMax",
                self.limits.message_bytes_max >= 4096,
            ),
            ("limits.ledgerQueueMax", self.limits.ledger_queue_max > 0),
        ];
        check_enough(&positive)
    }

    fn check_lifetimes(&self) -> Result<(), ConfigError> {
        let short = self.leaf_lifetime < LEAF_LIFETIME_MIN && !self.allow_short_leaf_lifetime;
        if short || self.leaf_lifetime < Duration::from_secs(1) {
            return Err(ConfigError::value(
                "leafLifetime",
                format!("{:?} is too short", self.leaf_lifetime),
                "write 1m or more; 24h is the default",
            ));
        }
        if self.leaf_lifetime > LEAF_LIFETIME_MAX {
            return Err(ConfigError::value(
                "leafLifetime",
                format!("{:?} is too long", self.leaf_lifetime),
                "write 7d or less; 24h is the default",
            ));
        }
        if self.backdate > Duration::from_mins(10) {
            return Err(ConfigError::value(
                "backdate",
                format!("{:?} is too long", self.backdate),
                "write 10m or less; 30s is the default",
            ));
        }
        let token = Duration::from_secs(1)..=Duration::from_hours(24);
        if !token.contains(&self.token_lifetime) {
            return Err(ConfigError::value(
                "tokenLifetime",
                format!("{:?} is not between 1s and 24h", self.token_lifetime),
                "10m is the default",
            ));
        }
        Ok(())
    }
}

impl Kubernetes {
    fn check(&self) -> Result<(), ConfigError> {
        let names = [
            ("kubernetes.namespace", &self.namespace),
            ("kubernetes.secret", &self.secret),
            ("kubernetes.bundleConfigMap", &self.bundle_config_map),
            ("kubernetes.clusterDomain", &self.cluster_domain),
        ];
        if let Some((field, name)) = names.into_iter().find(|(_, name)| !is_object_name(name)) {
            return Err(ConfigError::value(
                field,
                format!("{name:?} is not a name that Kubernetes knows"),
                "write lower-case letters, digits, `-` and `.`, or leave it out",
            ));
        }
        if self.token_audience.is_empty() {
            return Err(ConfigError::value(
                "kubernetes.tokenAudience",
                "it is empty",
                "without an audience of its own any token would do; sidegate-ca is the \
                       default",
            ));
        }
        let interval = Duration::from_millis(100)..=Duration::from_secs(5);
        if !interval.contains(&self.refresh_interval) {
            return Err(ConfigError::value(
                "kubernetes.refreshInterval",
                format!("{:?} is not between 100ms and 5s", self.refresh_interval),
                "2s is the default; a revocation has to be in effect within 10s",
            ));
        }
        Ok(())
    }
}

/// A DNS subdomain as RFC 1123 has it: what most objects are named by.
fn is_object_name(name: &str) -> bool {
    let part = |part: &str| {
        let alphanumeric = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        !part.is_empty()
            && part.chars().all(|c| alphanumeric(c) || c == '-')
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(part)
}

fn default_trust_domain() -> TrustDomain {
    #[expect(
        clippy::expect_used,
        reason = "a constant that is a valid trust domain"
    )]
    "mesh.local".parse().expect("a valid trust domain")
}

fn default_address() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 19_010).into()
}

fn default_metrics_address() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 19_011).into()
}

fn default_leaf_lifetime() -> Duration {
    Duration::from_hours(24)
}

fn default_backdate() -> Duration {
    Duration::from_secs(30)
}

fn default_token_lifetime() -> Duration {
    Duration::from_mins(10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca.yaml");
        std::fs::write(&path, text).unwrap();
        Config::load(&path)
    }

    #[track_caller]
    fn check_refused(text: &str, expected: &str) {
        let error = load(text).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }

    #[test]
    fn a_state_folder_is_all_that_must_be_said() {
        let config = load("stateDir: state\n").unwrap();
        assert!(config.state_dir.is_absolute(), "relative to the file");
        assert_eq!(config.address.to_string(), "127.0.0.1:19010");
        assert_eq!(config.leaf_lifetime, Duration::from_hours(24));
        assert!(config.admin_socket().ends_with("state/admin.sock"));
    }

    #[test]
    fn what_is_printed_can_be_read_again() {
        let config = load("stateDir: state\nleafLifetime: 90m\n").unwrap();
        let text = serde_saphyr::to_string(&config).unwrap();
        let again: Config = serde_saphyr::from_str(&text).unwrap();
        assert_eq!(again.leaf_lifetime, Duration::from_mins(90));
        assert_eq!(again.limits.tokens_max, config.limits.tokens_max);
    }

    #[test]
    fn a_cluster_needs_no_more_than_a_word() {
        let config = load("stateDir: state\nkubernetes: {}\n").unwrap();
        let kubernetes = config.kubernetes.unwrap();
        assert_eq!(kubernetes.secret, "sidegate-ca");
        assert!(kubernetes.check_source_address);
        assert!(load("stateDir: state\n").unwrap().kubernetes.is_none());
    }

    #[test]
    fn the_example_for_a_cluster_is_read() {
        let source = include_str!("config.rs");
        let example = source.split("//! ```yaml\n").nth(1).unwrap();
        let example = example.split("//! ```").next().unwrap();
        let example = example.replace("//! ", "");
        let config = load(&example).unwrap();
        assert!(config.address.ip().is_unspecified(), "{example}");
        assert_eq!(config.kubernetes.unwrap().namespace, "sidegate-system");
    }

    #[test]
    fn an_unknown_field_is_refused_with_its_place() {
        check_refused(
            "stateDir: state\nleafLifetme: 1h\n",
            "ca.yaml:2:1: unknown field `leafLifetme`",
        );
        check_refused("stateDir: s\nlimits: { tokenMax: 1 }\n", "tokenMax");
    }

    #[test]
    fn impossible_values_are_refused() {
        check_refused("{}", "stateDir");
        check_refused("stateDir: s\nleafLifetime: 59s\n", "leafLifetime");
        check_refused("stateDir: s\nleafLifetime: 8d\n", "leafLifetime");
        check_refused("stateDir: s\nbackdate: 1h\n", "backdate");
        check_refused("stateDir: s\ntokenLifetime: 0s\n", "tokenLifetime");
        check_refused("stateDir: s\ntrustDomain: Mesh\n", "trust domain");
        check_refused(
            "stateDir: s\nlimits: { connectionsMax: 0 }\n",
            "connections",
        );
        check_refused(&format!("stateDir: {}\n", "x".repeat(120)), "adminSocket");
        for (wrong, field) in [
            ("{ secret: Keys }", "kubernetes.secret"),
            ("{ namespace: a..b }", "kubernetes.namespace"),
            ("{ tokenAudience: '' }", "kubernetes.tokenAudience"),
            ("{ refreshInterval: 6s }", "kubernetes.refreshInterval"),
            ("{ webhook: x }", "webhook"),
        ] {
            check_refused(&format!("stateDir: s\nkubernetes: {wrong}\n"), field);
        }
    }
}
