//! What every pod of a cluster is injected with.
//!
//! Invariant: [`Settings`] that passed [`Settings::check`] can be put into a pod as they are; a
//! pod's or namespace's annotations change only what they are documented to change.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use sidegate_mesh::TrustDomain;

use crate::inject::Quantity;

/// Uid and gid of the sidecar. Redirection leaves this uid's traffic alone.
pub const PROXY_UID: u32 = 1519;
/// Where the sidecar answers about itself. Loopback only.
pub const ADMIN_PORT: u16 = 19_000;
/// Where redirected calls of the application arrive.
pub const OUTBOUND_PORT: u16 = 19_001;
/// Where redirected calls to the application arrive.
pub const INBOUND_PORT: u16 = 19_006;
/// Health, metrics and rewritten probes.
pub const HEALTH_PORT: u16 = 19_021;
/// The ports that no container and no annotation may name.
pub const RESERVED_PORTS: [u16; 4] = [ADMIN_PORT, OUTBOUND_PORT, INBOUND_PORT, HEALTH_PORT];

/// The init container that redirects.
pub const INIT_CONTAINER: &str = "sidegate-init";
/// The native sidecar.
pub const PROXY_CONTAINER: &str = "sidegate-proxy";
/// The volume with the projected token.
pub const TOKEN_VOLUME: &str = "sidegate-token";
/// The volume with the mesh's roots.
pub const BUNDLE_VOLUME: &str = "sidegate-bundle";
/// The ConfigMap with the mesh's roots, in every labelled namespace.
pub const BUNDLE_CONFIG_MAP: &str = "sidegate-bundle";
/// The key in that ConfigMap, and the file's name.
pub const BUNDLE_KEY: &str = "root.pem";
/// Where the roots are in a container.
pub const BUNDLE_DIR: &str = "/var/run/sidegate/bundle";
/// Where the token is in a container.
pub const TOKEN_DIR: &str = "/var/run/sidegate/token";
/// For whom the token is, and for nobody else.
pub const TOKEN_AUDIENCE: &str = "sidegate-ca";
/// Life of the projected token.
pub const TOKEN_LIFETIME: Duration = Duration::from_mins(10);

/// What every pod of a cluster is injected with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Settings {
    /// The mesh's trust domain.
    pub trust_domain: TrustDomain,
    /// Where the images come from.
    pub images: Images,
    /// `HOST:PORT` of the CA, as a pod resolves it.
    pub ca_address: String,
    /// `HOST:PORT` of the controller, as a pod resolves it.
    pub controller_address: String,
    /// What the init container may use.
    pub init_resources: Resources,
    /// What the sidecar may use, unless a pod says otherwise.
    pub proxy_resources: Resources,
    /// How much a sidecar says about itself, unless a pod says otherwise.
    pub log_level: LogLevel,
    /// How long a sidecar waits for open calls when it ends, unless a pod says otherwise; at most
    /// the pod's grace period.
    #[serde(with = "humantime_serde")]
    pub drain_timeout: Duration,
    /// How long the application waits for its sidecar to be ready.
    #[serde(with = "humantime_serde")]
    pub wait_timeout: Duration,
}

/// Where the images come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Images {
    /// Registry and folder; the images are `REGISTRY/proxy:TAG` and `REGISTRY/init:TAG`.
    pub registry: String,
    /// The version.
    pub tag: String,
    /// When a node fetches them.
    pub pull_policy: PullPolicy,
    /// The whole reference of the sidecar's image, for example with a digest, instead of the above.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy: Option<String>,
    /// The whole reference of the init container's image, instead of the above.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<String>,
}

impl Images {
    /// The sidecar's image.
    pub fn proxy(&self) -> String {
        self.reference(self.proxy.as_deref(), "proxy")
    }

    /// The init container's image.
    pub fn init(&self) -> String {
        self.reference(self.init.as_deref(), "init")
    }

    fn reference(&self, whole: Option<&str>, name: &str) -> String {
        match whole {
            Some(whole) => whole.to_owned(),
            None => format!("{}/{name}:{}", self.registry, self.tag),
        }
    }
}

impl Default for Images {
    fn default() -> Self {
        Self {
            registry: "sidegate".to_owned(),
            tag: env!("CARGO_PKG_VERSION").to_owned(),
            pull_policy: PullPolicy::IfNotPresent,
            proxy: None,
            init: None,
        }
    }
}

/// When a node fetches an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PullPolicy {
    /// When it has none of that name.
    #[default]
    IfNotPresent,
    /// Each time.
    Always,
    /// Never.
    Never,
}

impl PullPolicy {
    /// As a container says it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::IfNotPresent => "IfNotPresent",
            Self::Always => "Always",
            Self::Never => "Never",
        }
    }
}

/// Requests and limits of one container. All four, because a quota may ask for each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Resources {
    /// CPU that is set aside, such as `50m`.
    pub cpu_request: Quantity,
    /// CPU that is never exceeded.
    pub cpu_limit: Quantity,
    /// Memory that is set aside, such as `64Mi`.
    pub memory_request: Quantity,
    /// Memory that is never exceeded.
    pub memory_limit: Quantity,
}

/// How much a sidecar says about itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// What someone must act on.
    Error,
    /// Also what is degraded.
    Warn,
    /// Also changes of state.
    #[default]
    Info,
    /// Also each connection.
    Debug,
    /// Everything, in a development build; as [`Self::Debug`] in a release.
    Trace,
}

impl LogLevel {
    /// Every level, the quietest first.
    pub const ALL: [Self; 5] = [
        Self::Error,
        Self::Warn,
        Self::Info,
        Self::Debug,
        Self::Trace,
    ];

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }

    /// The level of exactly that word.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|level| level.as_str() == word)
    }
}

/// A setting is impossible.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}; {help}")]
pub struct SettingsError {
    /// The field, as in the file.
    pub field: &'static str,
    /// What is wrong.
    pub problem: String,
    /// What to write instead.
    pub help: &'static str,
}

/// Shortest drain: a sidecar goes on accepting for as long.
pub(crate) const DRAIN_TIMEOUT_MIN: Duration = Duration::from_secs(1);
/// Longest drain: what Kubernetes gives a pod to end is minutes, not hours.
pub(crate) const DRAIN_TIMEOUT_MAX: Duration = Duration::from_hours(1);

impl Settings {
    /// Checks what the types cannot say.
    ///
    /// # Errors
    ///
    /// [`SettingsError`] for the first impossible value.
    pub fn check(&self) -> Result<(), SettingsError> {
        let addresses = [
            ("caAddress", &self.ca_address),
            ("controllerAddress", &self.controller_address),
        ];
        for (field, address) in addresses {
            let port = address
                .rsplit_once(':')
                .map(|(host, port)| (!host.is_empty(), port));
            if !matches!(port, Some((true, port)) if port.parse::<u16>().is_ok_and(|port| port > 0))
            {
                return Err(SettingsError {
                    field,
                    problem: format!("`{address}` has no host and port"),
                    help: "write HOST:PORT",
                });
            }
        }
        for (field, image) in [
            ("images.proxy", self.images.proxy()),
            ("images.init", self.images.init()),
        ] {
            if image.is_empty() || image.chars().any(|c| c.is_whitespace() || c == '$') {
                return Err(SettingsError {
                    field,
                    problem: format!("`{image}` is not an image's reference"),
                    help: "write REGISTRY/NAME:TAG or REGISTRY/NAME@DIGEST",
                });
            }
        }
        self.init_resources.check("initResources")?;
        self.proxy_resources.check("proxyResources")?;
        let drain = DRAIN_TIMEOUT_MIN..=DRAIN_TIMEOUT_MAX;
        if !drain.contains(&self.drain_timeout) {
            return Err(SettingsError {
                field: "drainTimeout",
                problem: format!("{:?} is not between 1s and 1h", self.drain_timeout),
                help: "25s is the default",
            });
        }
        if !(Duration::from_secs(1)..=Duration::from_mins(10)).contains(&self.wait_timeout) {
            return Err(SettingsError {
                field: "waitTimeout",
                problem: format!("{:?} is not between 1s and 10m", self.wait_timeout),
                help: "60s is the default",
            });
        }
        Ok(())
    }
}

impl Resources {
    fn check(&self, field: &'static str) -> Result<(), SettingsError> {
        let pairs = [
            (&self.cpu_request, &self.cpu_limit),
            (&self.memory_request, &self.memory_limit),
        ];
        match pairs.iter().find(|(request, limit)| request > limit) {
            None => Ok(()),
            Some((request, limit)) => Err(SettingsError {
                field,
                problem: format!("the request {request} is above the limit {limit}"),
                help: "raise the limit",
            }),
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            trust_domain: default_trust_domain(),
            images: Images::default(),
            ca_address: "sidegate-ca.sidegate-system.svc.cluster.local:19010".to_owned(),
            controller_address: "sidegate-controller.sidegate-system.svc.cluster.local:19012"
                .to_owned(),
            // A pod's demand is the larger of its init containers' and its other containers', so
            // this costs nothing that the sidecar does not cost already.
            init_resources: resources("10m", "500m", "16Mi", "64Mi"),
            proxy_resources: resources("50m", "1", "48Mi", "256Mi"),
            log_level: LogLevel::Info,
            drain_timeout: Duration::from_secs(25),
            wait_timeout: Duration::from_mins(1),
        }
    }
}

fn resources(
    cpu_request: &str,
    cpu_limit: &str,
    memory_request: &str,
    memory_limit: &str,
) -> Resources {
    let quantity = |text: &str| {
        #[expect(
            clippy::expect_used,
            reason = "constants of this file, each read by a test"
        )]
        text.parse().expect("a quantity")
    };
    Resources {
        cpu_request: quantity(cpu_request),
        cpu_limit: quantity(cpu_limit),
        memory_request: quantity(memory_request),
        memory_limit: quantity(memory_limit),
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

    fn settings(text: &str) -> Result<Settings, String> {
        let settings: Settings = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
        settings.check().map_err(|error| error.to_string())?;
        Ok(settings)
    }

    #[track_caller]
    fn check_refused(text: &str, expected: &str) {
        let error = settings(text).unwrap_err();
        assert!(error.contains(expected), "{text}: {error}");
    }

    #[test]
    fn nothing_must_be_said() {
        let defaults = settings("{}").unwrap();
        assert_eq!(defaults, Settings::default());
        assert!(defaults.images.proxy().starts_with("sidegate/proxy:"));
        assert_eq!(defaults.trust_domain.as_str(), "cluster.local");
    }

    #[test]
    fn what_is_written_can_be_read_again() {
        let text = serde_saphyr::to_string(&Settings::default()).unwrap();
        assert_eq!(settings(&text).unwrap(), Settings::default(), "{text}");
    }

    #[test]
    fn a_whole_reference_wins_over_registry_and_tag() {
        let text = "images: { registry: r.example/x, tag: v2, proxy: 'r.example/p@sha256:00' }";
        let images = settings(text).unwrap().images;
        assert_eq!(images.proxy(), "r.example/p@sha256:00");
        assert_eq!(images.init(), "r.example/x/init:v2");
    }

    #[test]
    fn impossible_settings_are_refused_by_name() {
        check_refused("trustDomian: x", "trustDomian");
        check_refused("caAddress: nowhere", "caAddress");
        check_refused("controllerAddress: ':1'", "controllerAddress");
        check_refused("images: { tag: 'a b' }", "images.proxy");
        check_refused("images: { init: '' }", "images.init");
        check_refused("drainTimeout: 2h", "drainTimeout");
        check_refused("waitTimeout: 0s", "waitTimeout");
        check_refused("logLevel: loud", "loud");
        check_refused(
            "proxyResources: { cpuRequest: 2, cpuLimit: 1, memoryRequest: 1Mi, memoryLimit: 1Mi }",
            "proxyResources: the request 2 is above the limit 1",
        );
        check_refused(
            "initResources: { cpuRequest: lots, cpuLimit: 1, memoryRequest: 1Mi, memoryLimit: 1Mi }",
            "lots",
        );
    }
}
