//! The injector's configuration: one YAML file, read once.
//!
//! Invariant: a [`Config`] that [`Config::load`] returns has been checked; an unknown field or an
//! impossible value is an error that names the file and the field. It holds no secret.

use std::net::{Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
pub use sidegate_mesh::config::ConfigError;
use sidegate_mesh::config::{check_enough, read};

use crate::settings::{BUNDLE_DIR, BUNDLE_KEY, LogLevel, Settings, SettingsError, TOKEN_DIR};

/// Everything that an injector can be told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Config {
    /// Where the API server calls: HTTPS.
    pub address: SocketAddr,
    /// Where `/readyz`, `/livez` and `/metrics` are.
    pub health_address: SocketAddr,
    /// PEM file with the mesh's roots to start with.
    pub root_file: PathBuf,
    /// File with the projected token that proves to the CA who we are.
    pub token_file: PathBuf,
    /// How much the injector says about itself.
    pub log_level: LogLevel,
    /// How long it goes on serving after it was told to end, until nobody sends it anything.
    #[serde(with = "humantime_serde")]
    pub shutdown_grace: Duration,
    /// The configurations whose `caBundle` follows the mesh's roots.
    pub webhooks: Webhooks,
    /// What pods are injected with; its trust domain and CA are the injector's own, too.
    pub injection: Settings,
    /// Bounds.
    pub limits: Limits,
}

/// The configurations whose `caBundle` follows the mesh's roots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Webhooks {
    /// Name of the `MutatingWebhookConfiguration`.
    pub mutating: String,
    /// Name of the `ValidatingWebhookConfiguration`.
    pub validating: String,
}

impl Default for Webhooks {
    fn default() -> Self {
        Self {
            mutating: "sidegate-injector".to_owned(),
            validating: "sidegate-validator".to_owned(),
        }
    }
}

/// Every bound of the injector.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Limits {
    /// Largest request body, in bytes.
    pub body_bytes_max: usize,
    /// Connections at once; one more ends the one that has been idle longest.
    pub connections_max: usize,
    /// TLS handshakes in flight.
    pub handshakes_max: usize,
    /// Longest TLS handshake.
    #[serde(with = "humantime_serde")]
    pub handshake_timeout: Duration,
    /// Reviews in flight; more are answered 503.
    pub reviews_max: usize,
    /// Longest time from a request's head to the end of its body, and again to its answer.
    #[serde(with = "humantime_serde")]
    pub review_timeout: Duration,
    /// HTTP/2 streams of one connection.
    pub streams_per_connection_max: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes_max: 1024 * 1024,
            connections_max: 512,
            handshakes_max: 64,
            handshake_timeout: Duration::from_secs(3),
            reviews_max: 256,
            review_timeout: Duration::from_secs(4),
            streams_per_connection_max: 128,
        }
    }
}

impl Config {
    /// Reads and checks a YAML file.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], which names the file or the field.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let config: Self = read(path)?;
        config.check()?;
        Ok(config)
    }

    /// Checks every value.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] for the first impossible one.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.injection.check().map_err(|wrong| {
            let SettingsError {
                field,
                problem,
                help,
            } = wrong;
            ConfigError::value(format!("injection.{field}"), problem, help)
        })?;
        let limits = &self.limits;
        let at_least_one = [
            ("limits.connectionsMax", limits.connections_max > 0),
            ("limits.handshakesMax", limits.handshakes_max > 0),
            ("limits.reviewsMax", limits.reviews_max > 0),
            ("limits.bodyBytesMax", limits.body_bytes_max >= 4096),
            (
                "limits.streamsPerConnectionMax",
                limits.streams_per_connection_max > 0,
            ),
            (
                "limits.handshakeTimeout",
                !limits.handshake_timeout.is_zero(),
            ),
            ("limits.reviewTimeout", !limits.review_timeout.is_zero()),
            ("webhooks.mutating", !self.webhooks.mutating.is_empty()),
            ("webhooks.validating", !self.webhooks.validating.is_empty()),
        ];
        check_enough(&at_least_one)
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            address: (Ipv6Addr::UNSPECIFIED, 19_014).into(),
            health_address: (Ipv6Addr::UNSPECIFIED, 19_015).into(),
            root_file: Path::new(BUNDLE_DIR).join(BUNDLE_KEY),
            token_file: Path::new(TOKEN_DIR).join("token"),
            log_level: LogLevel::Info,
            shutdown_grace: Duration::from_secs(5),
            webhooks: Webhooks::default(),
            injection: Settings::default(),
            limits: Limits::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("injector.yaml");
        std::fs::write(&path, text).unwrap();
        Config::load(&path)
    }

    #[track_caller]
    fn check_refused(text: &str, expected: &str) {
        let error = load(text).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }

    #[test]
    fn nothing_must_be_said() {
        let config = load("{}").unwrap();
        assert_eq!(config, Config::default());
        assert_eq!(config.address.to_string(), "[::]:19014");
        assert_eq!(config.health_address.to_string(), "[::]:19015");
        assert_eq!(config.limits.body_bytes_max, 1 << 20);
    }

    #[test]
    fn what_is_printed_can_be_read_again() {
        let text = serde_saphyr::to_string(&Config::default()).unwrap();
        assert_eq!(load(&text).unwrap(), Config::default(), "{text}");
    }

    #[test]
    fn impossible_values_are_refused_with_their_place() {
        check_refused("adress: x", "injector.yaml:1:1: unknown field `adress`");
        check_refused("injection: { caAddress: x }", "injection.caAddress");
        check_refused("limits: { connectionsMax: 0 }", "limits.connectionsMax");
        check_refused("webhooks: { mutating: '' }", "webhooks.mutating");
        assert!(matches!(
            Config::load(Path::new("/nowhere/x")),
            Err(ConfigError::Read { .. })
        ));
    }
}
