//! What is added to a pod: two containers and two volumes.
//!
//! Invariants: every field that the API server would fill in is filled in here, so that what comes
//! back is what was sent; both containers have requests and limits, no privilege but the one of
//! redirecting, and no token of the application's service account; no `$` of a user's stands in
//! an environment variable, where Kubernetes would expand it.

use serde_json::{Map, Value, json};
use sidegate_mesh::Enforcement;

use super::annotations::Options;
use super::pod::{List, Pod};
use super::probes::Probes;
use super::{NamespaceFacts, reserved};
use crate::settings::{
    BUNDLE_CONFIG_MAP, BUNDLE_DIR, BUNDLE_KEY, BUNDLE_VOLUME, HEALTH_PORT, INBOUND_PORT,
    INIT_CONTAINER, OUTBOUND_PORT, PROXY_CONTAINER, PROXY_UID, Resources, Settings, TOKEN_AUDIENCE,
    TOKEN_DIR, TOKEN_LIFETIME, TOKEN_VOLUME,
};

/// The variable that holds the sidecar's configuration.
pub(super) const CONFIG_VARIABLE: &str = "SIDEGATE_CONFIG";

/// Where Kubernetes mounts the token of the pod's service account into every container that mounts
/// nothing there. The sidecar has no use for it, and the init container is root.
const API_TOKEN_DIR: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// What one pod gets.
pub(super) struct Sidecar<'a> {
    pub(super) pod: &'a Pod<'a>,
    pub(super) namespace: &'a NamespaceFacts,
    pub(super) settings: &'a Settings,
    pub(super) options: &'a Options,
    pub(super) probes: &'a Probes<'a>,
}

impl Sidecar<'_> {
    /// The init container that redirects.
    pub(super) fn init_container(&self) -> Value {
        let images = &self.settings.images;
        json!({
            "name": INIT_CONTAINER,
            "image": images.init(),
            "imagePullPolicy": images.pull_policy.as_str(),
            "args": self.redirection(),
            "resources": resources(&self.settings.init_resources),
            "securityContext": {
                "allowPrivilegeEscalation": false,
                "capabilities": { "drop": ["ALL"], "add": ["NET_ADMIN"] },
                "readOnlyRootFilesystem": true,
                "runAsGroup": 0,
                "runAsNonRoot": false,
                "runAsUser": 0,
                "seccompProfile": { "type": "RuntimeDefault" },
            },
            "terminationMessagePath": "/dev/termination-log",
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "volumeMounts": [no_api_token()],
        })
    }

    /// The native sidecar.
    pub(super) fn proxy_container(&self) -> Value {
        let images = &self.settings.images;
        let wait = humantime::format_duration(self.settings.wait_timeout).to_string();
        json!({
            "name": PROXY_CONTAINER,
            "image": images.proxy(),
            "imagePullPolicy": images.pull_policy.as_str(),
            "restartPolicy": "Always",
            "env": self.environment(),
            // The next container starts when this has ended. A startup probe would say the same up
            // to two seconds later.
            "lifecycle": {
                "postStart": {
                    "exec": { "command": ["/sidegate-proxy", "wait", "--timeout", wait] },
                },
            },
            "livenessProbe": health("/livez", 10, 10, 6),
            "ports": [{
                "containerPort": HEALTH_PORT, "name": "sidegate-health", "protocol": "TCP",
            }],
            "readinessProbe": health("/readyz", 2, 5, 3),
            "resources": resources(&self.options.proxy_resources),
            "securityContext": {
                "allowPrivilegeEscalation": false,
                "capabilities": { "drop": ["ALL"] },
                "readOnlyRootFilesystem": true,
                "runAsGroup": PROXY_UID,
                "runAsNonRoot": true,
                "runAsUser": PROXY_UID,
                "seccompProfile": { "type": "RuntimeDefault" },
            },
            "terminationMessagePath": "/dev/termination-log",
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "volumeMounts": [
                mount(BUNDLE_VOLUME, BUNDLE_DIR),
                mount(TOKEN_VOLUME, TOKEN_DIR),
                no_api_token(),
            ],
        })
    }

    fn redirection(&self) -> Vec<String> {
        let mut arguments = vec![
            format!("--inbound-port={INBOUND_PORT}"),
            format!("--outbound-port={OUTBOUND_PORT}"),
            format!("--proxy-uid={PROXY_UID}"),
            format!("--inbound-exempt-port={HEALTH_PORT}"),
        ];
        let ports = [
            ("skip-inbound-port", &self.options.skip_inbound_ports),
            ("skip-outbound-port", &self.options.skip_outbound_ports),
            ("udp-port", &self.options.udp_ports),
        ];
        for (flag, ports) in ports {
            arguments.extend(ports.iter().map(|port| format!("--{flag}={port}")));
        }
        let networks = self.options.skip_outbound_cidrs.iter();
        arguments.extend(networks.map(|network| format!("--skip-outbound-cidr={network}")));
        arguments
    }

    fn environment(&self) -> Value {
        let field = |name: &str, path: &str| {
            json!({
                "name": name,
                "valueFrom": { "fieldRef": { "apiVersion": "v1", "fieldPath": path } },
            })
        };
        json!([
            { "name": CONFIG_VARIABLE, "value": unexpandable(&self.config()) },
            field("POD_NAME", "metadata.name"),
            field("POD_UID", "metadata.uid"),
            field("POD_IPS", "status.podIPs"),
            field("NODE_NAME", "spec.nodeName"),
        ])
    }

    /// The configuration of `sidegate-proxy`.
    fn config(&self) -> Value {
        let (settings, options) = (self.settings, self.options);
        let mut config = json!({
            "workload": self.workload(),
            "ca": {
                "address": settings.ca_address,
                "root": format!("{BUNDLE_DIR}/{BUNDLE_KEY}"),
                "tokenFile": format!("{TOKEN_DIR}/token"),
            },
            "controller": { "address": settings.controller_address },
            "destination": "original",
            "ports": self.ports(),
            "health": { "address": format!("[::]:{HEALTH_PORT}") },
            "inbound": { "address": format!("[::]:{INBOUND_PORT}") },
            "log": { "stdout": true },
            "diagnostics": { "level": options.log_level.as_str() },
            "drainTimeout": humantime::format_duration(options.drain_timeout).to_string(),
        });
        if let Some(config) = config.as_object_mut() {
            let lists = [
                ("plaintextPorts", &options.plaintext_ports),
                ("opaquePorts", &options.opaque_ports),
            ];
            for (key, ports) in lists.into_iter().filter(|(_, ports)| !ports.is_empty()) {
                config.insert(key.to_owned(), json!(ports));
            }
            let probes = self.probes.config();
            config.extend(probes.map(|probes| ("probes".to_owned(), probes)));
        }
        config
    }

    fn workload(&self) -> Value {
        let mut workload = Map::new();
        let mut put = |key: &str, value: &str| {
            workload.insert(key.to_owned(), value.into());
        };
        put("trustDomain", self.settings.trust_domain.as_str());
        put("namespace", &self.namespace.name);
        put("serviceAccount", self.pod.service_account());
        match self.options.enforcement {
            None => {}
            Some(Enforcement::Enforce) => put("enforcement", "enforce"),
            Some(Enforcement::Audit) => put("enforcement", "audit"),
        }
        Value::Object(workload)
    }

    /// The TCP ports of what runs beside the sidecar. A number or a name that comes again is the
    /// first one's, as it is for a Service.
    fn ports(&self) -> Vec<Value> {
        let (mut ports, mut numbers, mut names) = (Vec::new(), Vec::new(), Vec::new());
        let lists = [List::Main, List::Init];
        let containers = lists.into_iter().flat_map(|list| self.pod.list(list));
        let beside = |container: &&super::pod::Container<'_>| {
            container.runs_beside() && !reserved::is_our_container(container.name)
        };
        for container in containers.filter(beside) {
            // `reserved::check` has read the same list.
            for port in container.objects("ports").unwrap_or_default() {
                let text = |field: &str| port.get(field).and_then(Value::as_str);
                let number = port.get("containerPort").and_then(Value::as_u64);
                let number = number.and_then(|number| u16::try_from(number).ok());
                let tcp = text("protocol").is_none_or(|protocol| protocol == "TCP");
                let Some(number) = number.filter(|number| tcp && *number > 0) else {
                    continue;
                };
                if numbers.contains(&number) {
                    continue;
                }
                numbers.push(number);
                let mut entry = json!({ "port": number, "protocol": "auto" });
                let name = text("name").filter(|name| is_port_name(name) && !names.contains(name));
                if let (Some(name), Some(entry)) = (name, entry.as_object_mut()) {
                    names.push(name);
                    entry.insert("name".to_owned(), name.into());
                }
                ports.push(entry);
            }
        }
        ports
    }
}

/// The volumes, with their names.
pub(super) fn volumes() -> [(&'static str, Value); 2] {
    let token = json!({
        "name": TOKEN_VOLUME,
        "projected": {
            "defaultMode": 0o644,
            "sources": [{
                "serviceAccountToken": {
                    "audience": TOKEN_AUDIENCE,
                    "expirationSeconds": TOKEN_LIFETIME.as_secs(),
                    "path": "token",
                },
            }],
        },
    });
    let bundle = json!({
        "name": BUNDLE_VOLUME,
        "configMap": { "defaultMode": 0o644, "name": BUNDLE_CONFIG_MAP },
    });
    [(TOKEN_VOLUME, token), (BUNDLE_VOLUME, bundle)]
}

/// Whether Kubernetes would take a port's name; the API server refuses the pod otherwise.
fn is_port_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=15).contains(&name.len())
        && name.bytes().all(allowed)
        && name.bytes().any(|byte| byte.is_ascii_lowercase())
}

/// JSON in one line without a `$`: Kubernetes expands `$(NAME)` in the values of variables, and
/// what a user wrote into a path or a header must stay what it is.
fn unexpandable(config: &Value) -> String {
    config.to_string().replace('$', "\\u0024")
}

fn resources(of: &Resources) -> Value {
    json!({
        "limits": { "cpu": of.cpu_limit, "memory": of.memory_limit },
        "requests": { "cpu": of.cpu_request, "memory": of.memory_request },
    })
}

fn health(path: &str, period: u32, timeout: u32, failures: u32) -> Value {
    json!({
        "httpGet": { "path": path, "port": HEALTH_PORT, "scheme": "HTTP" },
        "periodSeconds": period,
        "timeoutSeconds": timeout,
        "successThreshold": 1,
        "failureThreshold": failures,
    })
}

fn mount(volume: &str, path: &str) -> Value {
    json!({ "name": volume, "mountPath": path, "readOnly": true })
}

/// Keeps the token of the application's service account out: Kubernetes mounts it only where
/// nothing is mounted. The roots are public.
fn no_api_token() -> Value {
    mount(BUNDLE_VOLUME, API_TOKEN_DIR)
}
