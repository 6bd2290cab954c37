//! What only a sidecar in a cluster is told: its controller, its pod.
//!
//! Invariant: the modes do not mix. A configuration that names a controller has the destinations,
//! the evidence and the ports of a cluster, and one that names a folder has none of them.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{Config, ConfigError, Destination, fault, is_host_port};

/// The environment variable that holds the configuration itself.
const CONFIG_VARIABLE: &str = "SIDEGATE_CONFIG";

/// `controller`: where policies and destinations come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ControllerConfig {
    /// `HOST:PORT` of the controller.
    pub address: String,
}

/// The pod that the sidecar is in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Pod {
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// Its addresses, the primary one first; never empty.
    pub ips: Vec<IpAddr>,
    /// The node that it runs on.
    #[serde(default)]
    pub node: String,
}

/// The environment does not say what a sidecar in a pod must know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EnvironmentError {
    /// A variable is not set, or empty.
    #[error("the environment variable {variable} is not set; the injector sets it")]
    Missing {
        /// Its name.
        variable: &'static str,
    },
    /// `POD_IPS` holds something else than addresses.
    #[error("`{text}` in POD_IPS is not an IP address")]
    Address {
        /// What stands there.
        text: String,
    },
}

impl Config {
    /// Reads and checks the configuration that `variable` finds in the environment: the text in
    /// `SIDEGATE_CONFIG`, and the pod in `POD_NAME`, `POD_UID`, `POD_IPS` and `NODE_NAME`.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], with the place of each problem or the name of the variable.
    pub fn from_environment(
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, ConfigError> {
        let text = variable(CONFIG_VARIABLE).unwrap_or_default();
        let mut config = Self::from_yaml(CONFIG_VARIABLE, &text)?;
        if config.controller.is_some() && config.pod.is_none() {
            config.pod = Some(Pod::from_environment(variable)?);
        }
        Ok(config)
    }

    pub(super) fn check_cluster(&self, faults: &mut Vec<super::Fault>) {
        let mut fault =
            |field: &str, message: &str, help: &str| fault(faults, field, message, help);
        match (&self.controller, &self.resources) {
            (Some(_), Some(_)) => fault(
                "controller",
                "there is a `resources` folder as well",
                "keep one of the two",
            ),
            (None, None) => fault(
                "resources",
                "nothing says what is allowed",
                "write the folder of the resources, or `controller` in a cluster",
            ),
            _ => {}
        }
        if let Some(controller) = &self.controller
            && !is_host_port(&controller.address)
        {
            let message = format!("`{}` is not HOST:PORT", controller.address);
            let help = "write for example `sidegate-controller.sidegate-system.svc:19012`";
            fault("controller.address", &message, help);
        }
        if let Some(pod) = &self.pod
            && pod.ips.is_empty()
        {
            fault("pod.ips", "no address", "write the pod's addresses");
        }
        let token_and_more = self.ca.join_token.is_some()
            || self.ca.join_token_file.is_some()
            || self.state.is_some();
        if self.ca.token_file.is_some() && token_and_more {
            let message = "in a cluster each certificate is asked for with this token alone";
            fault("ca.tokenFile", message, "leave out join tokens and `state`");
        }
        self.check_destination(faults);
        self.check_port_lists(faults);
        self.check_probes(faults);
    }

    fn check_destination(&self, faults: &mut Vec<super::Fault>) {
        let original = self.destination == Destination::Original;
        if original != self.controller.is_some() {
            let message = "only the controller knows whose address is whose";
            let help = "write `destination: original` and `controller` together, or neither";
            fault(faults, "destination", message, help);
        }
        if original && !self.upstreams.is_empty() {
            let message = "every call is redirected here, so no port is bound to a service";
            fault(faults, "upstreams", message, "leave it out");
        }
        for (i, port) in self.ports.iter().enumerate() {
            let field = format!("ports.{i}.address");
            match port.address {
                Some(_) if original => {
                    let message = "the application is called at the pod's own address";
                    fault(faults, &field, message, "leave it out");
                }
                None if !original => {
                    let message = "nothing says where the application listens";
                    let help = "write its address and port, such as `127.0.0.1:8080`";
                    fault(faults, &field, message, help);
                }
                _ => {}
            }
        }
    }

    fn check_port_lists(&self, faults: &mut Vec<super::Fault>) {
        let lists = [
            ("plaintextPorts", &self.plaintext_ports),
            ("opaquePorts", &self.opaque_ports),
        ];
        for (key, ports) in lists {
            if !ports.is_empty() && self.destination != Destination::Original {
                let message = "callers reach these ports only by redirection";
                fault(
                    faults,
                    key,
                    message,
                    "leave it out, or write `destination: original`",
                );
            }
            for (i, port) in ports.iter().enumerate() {
                let field = format!("{key}.{i}");
                if *port == 0 {
                    fault(faults, &field, "a port is 1 to 65535", "write its number");
                }
                if ports.iter().take(i).any(|other| other == port) {
                    let message = format!("port {port} is there already");
                    fault(faults, &field, message, "name each port once");
                }
            }
        }
        let own = self.listeners();
        for (i, port) in self.plaintext_ports.iter().enumerate() {
            if let Some((key, _)) = own.iter().find(|(_, address)| address.port() == *port) {
                let message = format!("{port} is this sidecar's own `{key}`");
                fault(
                    faults,
                    &format!("plaintextPorts.{i}"),
                    message,
                    "write a port of the application",
                );
            }
        }
    }
}

/// The same address, its host with a dot at the end where it is a service's full name: otherwise a
/// pod's resolver tries each of its search domains first, and the application waits for that.
pub(crate) fn absolute(address: &str) -> String {
    match address.rsplit_once(':') {
        Some((host, port)) if is_full_name(host) => format!("{host}.:{port}"),
        _ => address.to_owned(),
    }
}

/// Whether this is `NAME.NAMESPACE.svc.DOMAIN`, without a dot at its end.
fn is_full_name(host: &str) -> bool {
    let domain = host.split_once(".svc.").map(|(_, domain)| domain);
    domain.is_some_and(|domain| !domain.is_empty() && !domain.ends_with('.'))
}

impl Pod {
    fn from_environment(
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, EnvironmentError> {
        let needed = |name: &'static str| {
            let text = variable(name).filter(|text| !text.is_empty());
            text.ok_or(EnvironmentError::Missing { variable: name })
        };
        let address = |text: &str| {
            let address = text.trim().parse().ok();
            address.ok_or_else(|| EnvironmentError::Address {
                text: text.to_owned(),
            })
        };
        Ok(Self {
            name: needed("POD_NAME")?,
            uid: needed("POD_UID")?,
            ips: needed("POD_IPS")?
                .split(',')
                .map(address)
                .collect::<Result<_, _>>()?,
            node: variable("NODE_NAME").unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_services_full_name_is_looked_up_as_it_is() {
        for (address, expected) in [
            (
                "ca.system.svc.cluster.local:19010",
                "ca.system.svc.cluster.local.:19010",
            ),
            (
                "ca.system.svc.cluster.local.:19010",
                "ca.system.svc.cluster.local.:19010",
            ),
            ("ca.system.svc:19010", "ca.system.svc:19010"),
            ("localhost:19010", "localhost:19010"),
            ("127.0.0.1:19010", "127.0.0.1:19010"),
            ("[fd00::1]:19010", "[fd00::1]:19010"),
        ] {
            assert_eq!(absolute(address), expected);
        }
    }
}
