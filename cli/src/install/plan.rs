//! What is to be installed: every choice that flags and `--set` make.
//!
//! Invariant: a [`Plan`] that [`Plan::check`] passed can be turned into manifests that the parts of
//! the control plane accept; each part's own check is asked.

use std::time::Duration;

use ipnet::IpNet;
use sidegate_injector::{Quantity, Resources, Settings};
use sidegate_local::ca_config::{Config as CaConfig, Kubernetes};

/// The namespace of the control plane.
pub(crate) const NAMESPACE: &str = sidegate_mesh::resource::SYSTEM_NAMESPACE;

/// Folder of the CA's volume.
pub(crate) const CA_VOLUME_DIR: &str = "/var/lib/sidegate";

/// Certificates for one identity a minute: an identity is a service account, and a large Deployment
/// that restarts asks for hundreds at once.
const ISSUANCES_PER_IDENTITY: u32 = 1_200;

/// Most replicas of one part.
const REPLICAS_MAX: u32 = 9;

/// Everything that is installed.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// What pods are injected with. Its images' registry, tag and pull policy are those of the
    /// control plane, too.
    pub(crate) injection: Settings,
    /// The cluster's DNS domain.
    pub(crate) cluster_domain: String,
    pub(crate) ca: Part,
    pub(crate) controller: Part,
    pub(crate) injector: Part,
    /// Where the CA keeps its log; absent: with its pod.
    pub(crate) ca_storage: Option<Storage>,
    /// Life of a workload's certificate.
    pub(crate) leaf_lifetime: Duration,
    /// Whether the CA compares a token's pod with the address that it comes from.
    pub(crate) check_source_address: bool,
    pub(crate) pod_cidrs: Vec<IpNet>,
    pub(crate) service_cidrs: Vec<IpNet>,
    pub(crate) external_cidrs: Vec<IpNet>,
    /// Secrets with which the control plane's images are fetched.
    pub(crate) image_pull_secrets: Vec<String>,
    pub(crate) priority_class: Option<String>,
}

/// One part of the control plane.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) replicas: u32,
    pub(crate) resources: Resources,
    /// The whole reference of its image, instead of registry and tag.
    pub(crate) image: Option<String>,
}

/// A volume for each replica of the CA.
#[derive(Clone, Debug)]
pub(crate) struct Storage {
    pub(crate) class: String,
    pub(crate) size: Option<Quantity>,
}

impl Storage {
    /// A volume of that class and the usual size.
    pub(crate) fn of_class(class: &str) -> Self {
        Self {
            class: class.to_owned(),
            size: None,
        }
    }
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            injection: Settings::default(),
            cluster_domain: "cluster.local".to_owned(),
            ca: Part::new("50m", "1", "64Mi", "256Mi"),
            controller: Part::new("50m", "2", "64Mi", "1Gi"),
            injector: Part::new("50m", "1", "32Mi", "256Mi"),
            ca_storage: None,
            leaf_lifetime: CaConfig::new("").leaf_lifetime,
            check_source_address: true,
            pod_cidrs: Vec::new(),
            service_cidrs: Vec::new(),
            external_cidrs: Vec::new(),
            image_pull_secrets: Vec::new(),
            priority_class: None,
        }
    }
}

impl Part {
    fn new(cpu: &str, cpu_limit: &str, memory: &str, memory_limit: &str) -> Self {
        let quantity = |text: &str| {
            #[expect(
                clippy::expect_used,
                reason = "constants of this file; every test makes a Plan"
            )]
            text.parse().expect("a quantity")
        };
        Self {
            replicas: 1,
            resources: Resources {
                cpu_request: quantity(cpu),
                cpu_limit: quantity(cpu_limit),
                memory_request: quantity(memory),
                memory_limit: quantity(memory_limit),
            },
            image: None,
        }
    }
}

impl Plan {
    pub(crate) fn set_replicas(&mut self, replicas: u32) {
        for part in [&mut self.ca, &mut self.controller, &mut self.injector] {
            part.replicas = replicas;
        }
    }

    /// The image of a part of the control plane.
    pub(crate) fn image(&self, name: &str, part: &Part) -> String {
        let images = &self.injection.images;
        part.image
            .clone()
            .unwrap_or_else(|| format!("{}/{name}:{}", images.registry, images.tag))
    }

    /// The CA's configuration.
    pub(crate) fn ca_config(&self) -> CaConfig {
        let mut config = CaConfig::new(format!("{CA_VOLUME_DIR}/ca"));
        config.trust_domain = self.injection.trust_domain.clone();
        config.address = (std::net::Ipv6Addr::UNSPECIFIED, 19_010).into();
        config.metrics_address = (std::net::Ipv6Addr::UNSPECIFIED, 19_011).into();
        config.leaf_lifetime = self.leaf_lifetime;
        config.limits.issuances_per_identity_per_minute = ISSUANCES_PER_IDENTITY;
        config.kubernetes = Some(Kubernetes {
            cluster_domain: self.cluster_domain.clone(),
            check_source_address: self.check_source_address,
            ..Kubernetes::default()
        });
        config
    }

    /// The controller's configuration.
    pub(crate) fn controller_config(&self) -> sidegate_controller::Config {
        let mut config = sidegate_controller::Config::default();
        config
            .address
            .set_ip(std::net::Ipv6Addr::UNSPECIFIED.into());
        config
            .metrics_address
            .set_ip(std::net::Ipv6Addr::UNSPECIFIED.into());
        config.trust_domain = self.injection.trust_domain.clone();
        config.ca.address = self.service_address("sidegate-ca", 19_010);
        config.pod_cidrs.clone_from(&self.pod_cidrs);
        config.service_cidrs.clone_from(&self.service_cidrs);
        config.external_cidrs.clone_from(&self.external_cidrs);
        config
    }

    /// The injector's configuration.
    pub(crate) fn injector_config(&self) -> sidegate_injector::Config {
        let mut injection = self.injection.clone();
        injection.ca_address = self.service_address("sidegate-ca", 19_010);
        injection.controller_address = self.service_address("sidegate-controller", 19_012);
        sidegate_injector::Config {
            injection,
            ..sidegate_injector::Config::default()
        }
    }

    /// Checks what no single flag shows, with each part's own check of its configuration.
    pub(crate) fn check(&self) -> Result<(), String> {
        for (name, part) in [
            ("ca", &self.ca),
            ("controller", &self.controller),
            ("injector", &self.injector),
        ] {
            if !(1..=REPLICAS_MAX).contains(&part.replicas) {
                let replicas = part.replicas;
                return Err(format!(
                    "{name}.replicas: {replicas} is not between 1 and 9"
                ));
            }
            let amounts = &part.resources;
            if amounts.cpu_request > amounts.cpu_limit
                || amounts.memory_request > amounts.memory_limit
            {
                return Err(format!(
                    "{name}: a request is above its limit; raise the limit"
                ));
            }
            let image = self.image(name, part);
            if !is_image(&image) {
                return Err(format!("`{image}` is not an image's reference"));
            }
        }
        if self
            .ca_storage
            .as_ref()
            .is_some_and(|it| it.class.is_empty())
        {
            return Err("--ca-storage-class has no name".to_owned());
        }
        self.ca_config()
            .check()
            .map_err(|error| format!("ca: {error}"))?;
        self.controller_config()
            .check()
            .map_err(|error| format!("controller: {error}"))?;
        self.injector_config()
            .check()
            .map_err(|error| format!("injector: {error}"))
    }

    fn service_address(&self, service: &str, port: u16) -> String {
        format!("{service}.{NAMESPACE}.svc.{}:{port}", self.cluster_domain)
    }
}

/// Whether a text can be an image's reference; the registry has the last word.
fn is_image(image: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-/:@+".contains(c);
    let parts_named = image.split('/').all(|part| !part.is_empty());
    let tagged = !image.ends_with(':') && !image.ends_with('@');
    !image.is_empty() && image.chars().all(allowed) && parts_named && tagged
}
