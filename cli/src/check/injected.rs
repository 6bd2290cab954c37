//! What a meshed pod was injected with, read from the pod itself.
//!
//! Invariant: only what the injector wrote counts; annotations are read at injection and say nothing
//! about a pod that lives.

use k8s_openapi::api::core::v1::{Container, Pod};
use serde::Deserialize;
use serde_json::Value;

use crate::kube::sidecars::{CONTAINER, Sidecar};

/// The container that redirects.
const INIT: &str = "sidegate-init";
/// The sidecar's configuration.
const CONFIG: &str = "SIDEGATE_CONFIG";

/// A meshed pod.
pub(super) struct Injected<'a> {
    pub(super) sidecar: Sidecar,
    pub(super) pod: &'a Pod,
    config: Value,
}

/// What a sidecar says of its certificate; `Err` is why it said nothing.
#[derive(Clone, Debug)]
pub(super) struct Certificate {
    /// `namespace/pod`.
    pub(super) pod: String,
    pub(super) answer: Result<Certs, String>,
}

/// The part of a sidecar's `GET /certs` that is needed here.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Certs {
    pub(super) certificate: Option<Leaf>,
    pub(super) renewals: Renewals,
}

/// A certificate's life, RFC 3339.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Leaf {
    pub(super) not_before: String,
    pub(super) not_after: String,
}

/// How renewing went.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Renewals {
    pub(super) last_error: Option<String>,
}

impl<'a> Injected<'a> {
    /// A pod that has a sidecar and has not ended.
    pub(super) fn of(pod: &'a Pod) -> Option<Self> {
        let sidecar = Sidecar::of(pod).filter(|sidecar| !sidecar.ended)?;
        let container = init_container(pod, CONTAINER)?;
        let mut environment = container.env.iter().flatten();
        let config = environment.find(|variable| variable.name == CONFIG);
        let config = config.and_then(|variable| variable.value.as_deref());
        let config = config.and_then(|text| serde_json::from_str(text).ok());
        Some(Self {
            sidecar,
            pod,
            config: config.unwrap_or_default(),
        })
    }

    /// The values of a flag of the init container.
    fn flag(&self, flag: &str) -> Vec<u16> {
        let container = init_container(self.pod, INIT);
        let arguments = container.and_then(|container| container.args.as_deref());
        let prefix = format!("--{flag}=");
        let values = arguments.into_iter().flatten();
        values
            .filter_map(|argument| argument.strip_prefix(&prefix)?.parse().ok())
            .collect()
    }

    /// TCP ports that callers reach past the sidecar.
    pub(super) fn skipped_inbound(&self) -> Vec<u16> {
        self.flag("skip-inbound-port")
    }

    /// UDP ports that are open.
    pub(super) fn udp_open(&self) -> Vec<u16> {
        self.flag("udp-port")
    }

    /// TCP ports on which callers without an identity are served, if a policy says so.
    pub(super) fn plaintext(&self) -> Vec<u16> {
        let ports = self.config.get("plaintextPorts").and_then(Value::as_array);
        let number = |port: &Value| u16::try_from(port.as_u64()?).ok();
        ports.into_iter().flatten().filter_map(number).collect()
    }

    /// The pod's own word on enforcement.
    pub(super) fn enforcement(&self) -> Option<&str> {
        self.config.pointer("/workload/enforcement")?.as_str()
    }

    /// How long the sidecar waits for open calls at its end, in seconds.
    pub(super) fn drain_s(&self) -> Option<u64> {
        let text = self.config.get("drainTimeout")?.as_str()?;
        humantime::parse_duration(text).ok().map(|it| it.as_secs())
    }

    /// Ports that probes and hooks ask, each with the probe's name.
    pub(super) fn probed(&self) -> Vec<(&str, u16)> {
        let entries = self
            .config
            .pointer("/probes/entries")
            .and_then(Value::as_object);
        let port = |probe: &Value| {
            let ways = ["http", "tcp", "grpc"];
            let way = ways.into_iter().find_map(|way| probe.get(way));
            u16::try_from(way?.get("port")?.as_u64()?).ok()
        };
        let entries = entries.into_iter().flatten();
        entries
            .filter_map(|(name, probe)| Some((name.as_str(), port(probe)?)))
            .collect()
    }
}

fn init_container<'a>(pod: &'a Pod, name: &str) -> Option<&'a Container> {
    let containers = pod.spec.as_ref()?.init_containers.as_ref()?;
    containers.iter().find(|container| container.name == name)
}

/// The containers that are the application's own.
pub(super) fn own_containers(pod: &Pod) -> impl Iterator<Item = &Container> {
    let spec = pod.spec.as_ref();
    let init = spec.and_then(|spec| spec.init_containers.as_deref());
    let main = spec.map(|spec| spec.containers.as_slice());
    let all = init.into_iter().flatten().chain(main.into_iter().flatten());
    all.filter(|container| container.name != INIT && container.name != CONTAINER)
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    /// A meshed pod of `shop` with these arguments of the init container and this configuration.
    pub(crate) fn meshed(name: &str, arguments: &[&str], config: &Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {
                "name": name, "namespace": "shop", "uid": name, "labels": { "app": name },
                "annotations": { "sidegate.dev/injected": env!("CARGO_PKG_VERSION") },
            },
            "spec": {
                "initContainers": [
                    { "name": "sidegate-init", "args": arguments },
                    {
                        "name": "sidegate-proxy", "restartPolicy": "Always",
                        "env": [{ "name": "SIDEGATE_CONFIG", "value": config.to_string() }],
                    },
                ],
                "containers": [{ "name": "app", "ports": [{ "name": "http", "containerPort": 8080 }] }],
            },
            "status": {
                "phase": "Running",
                "conditions": [{ "type": "Ready", "status": "True" }],
                "initContainerStatuses": [{
                    "name": "sidegate-proxy", "image": "", "imageID": "", "ready": true,
                    "restartCount": 0, "state": { "running": {} },
                }],
            },
        }))
        .unwrap()
    }

    #[test]
    fn what_a_pod_was_injected_with_is_read_from_the_pod() {
        let config = json!({
            "workload": { "enforcement": "audit" },
            "plaintextPorts": [9090],
            "drainTimeout": "40s",
            "probes": { "secret": "x", "entries": {
                "app/liveness": { "http": { "port": 8080, "path": "/" }, "timeout": "1s" },
                "app/startup": { "grpc": { "port": 9000 }, "timeout": "1s" },
            } },
        });
        let arguments = [
            "--skip-inbound-port=22",
            "--udp-port=53",
            "--skip-outbound-port=25",
        ];
        let pod = meshed("web", &arguments, &config);
        let injected = Injected::of(&pod).unwrap();
        assert_eq!(injected.skipped_inbound(), [22]);
        assert_eq!(injected.udp_open(), [53]);
        assert_eq!(injected.plaintext(), [9090]);
        assert_eq!(injected.enforcement(), Some("audit"));
        assert_eq!(injected.drain_s(), Some(40));
        assert_eq!(
            injected.probed(),
            [("app/liveness", 8080), ("app/startup", 9000)]
        );
    }
}
