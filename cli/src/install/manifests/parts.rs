//! The control plane's own pods: configuration, Service, `StatefulSet` or Deployment, budget.
//!
//! Invariants: every pod meets pod security `restricted`, with a read-only root; a change of its
//! configuration restarts it; selectors and names never change from version to version.

use serde_json::{Value, json};

use super::super::plan::{CA_VOLUME_DIR, Part, Plan};
use super::{CA, CONTROLLER, INJECTOR, labels, local, selector};
use sidegate_injector::Resources;
use sidegate_injector::settings::{
    BUNDLE_CONFIG_MAP, BUNDLE_DIR, TOKEN_AUDIENCE, TOKEN_DIR, TOKEN_LIFETIME,
};

/// User and group of the control plane: nobody's on any system, and not the sidecar's.
const UID: u32 = 65_532;

/// Where a part finds its configuration.
const CONFIG_DIR: &str = "/etc/sidegate";

/// Size of a CA's volume: a log of a hundred thousand certificates is about 100 MB.
const CA_STORAGE: &str = "1Gi";

/// What differs between the parts.
struct Component<'a> {
    /// `sidegate-ca`.
    name: &'static str,
    /// `ca`: of the image, the binary and the configuration's file.
    short: &'static str,
    part: &'a Part,
    plan: &'a Plan,
    config: String,
    /// Arguments before `--config`.
    arguments: &'static [&'static str],
    /// Name and number of the port that is served.
    port: (&'static str, u16),
    /// The Service's port.
    service_port: u16,
    health_port: u16,
    volumes: Vec<Value>,
    mounts: Vec<Value>,
}

/// The CA.
pub(super) fn ca(plan: &Plan, config: String) -> Vec<Value> {
    let mut component = Component {
        name: CA,
        short: "ca",
        part: &plan.ca,
        plan,
        config,
        arguments: &["serve"],
        port: ("grpc", 19_010),
        service_port: 19_010,
        health_port: 19_011,
        volumes: Vec::new(),
        mounts: vec![json!({ "name": "state", "mountPath": CA_VOLUME_DIR })],
    };
    let mut claims = Vec::new();
    match &plan.ca_storage {
        None => component
            .volumes
            .push(json!({ "name": "state", "emptyDir": {} })),
        Some(storage) => {
            let size = storage
                .size
                .as_ref()
                .map_or(CA_STORAGE, |size| size.as_str());
            claims.push(json!({
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": { "name": "state" },
                "spec": {
                    "accessModes": ["ReadWriteOnce"],
                    "storageClassName": storage.class,
                    "resources": { "requests": { "storage": size } },
                },
            }));
        }
    }
    let mut spec = json!({
        "replicas": component.part.replicas,
        "serviceName": CA,
        "podManagementPolicy": "Parallel",
        "selector": { "matchLabels": selector(CA) },
        "template": component.template(),
    });
    if let (false, Some(spec)) = (claims.is_empty(), spec.as_object_mut()) {
        spec.insert("volumeClaimTemplates".to_owned(), claims.into());
    }
    component.with("StatefulSet", &spec)
}

/// The controller.
pub(super) fn controller(plan: &Plan, config: String) -> Vec<Value> {
    Component {
        name: CONTROLLER,
        short: "controller",
        part: &plan.controller,
        plan,
        config,
        arguments: &[],
        port: ("grpc", 19_012),
        service_port: 19_012,
        health_port: 19_013,
        volumes: identity_volumes(),
        mounts: identity_mounts(),
    }
    .deployment()
}

/// The injector.
pub(super) fn injector(plan: &Plan, config: String) -> Vec<Value> {
    Component {
        name: INJECTOR,
        short: "injector",
        part: &plan.injector,
        plan,
        config,
        arguments: &[],
        port: ("https", 19_014),
        service_port: 443,
        health_port: 19_015,
        volumes: identity_volumes(),
        mounts: identity_mounts(),
    }
    .deployment()
}

impl Component<'_> {
    fn deployment(&self) -> Vec<Value> {
        let spec = json!({
            "replicas": self.part.replicas,
            "selector": { "matchLabels": selector(self.name) },
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": { "maxSurge": 1, "maxUnavailable": 0 },
            },
            "template": self.template(),
        });
        self.with("Deployment", &spec)
    }

    /// The workload of that spec, behind everything that it needs.
    fn with(&self, kind: &str, spec: &Value) -> Vec<Value> {
        let mut objects = vec![
            json!({
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": local(self.name, self.name),
                "data": { self.config_file(): self.config },
            }),
            json!({
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": local(self.name, self.name),
                "spec": {
                    "selector": selector(self.name),
                    "ports": [{
                        "name": self.port.0,
                        "port": self.service_port,
                        "protocol": "TCP",
                        "targetPort": self.port.0,
                    }],
                },
            }),
            json!({
                "apiVersion": "apps/v1",
                "kind": kind,
                "metadata": local(self.name, self.name),
                "spec": spec,
            }),
        ];
        if self.part.replicas > 1 {
            objects.push(json!({
                "apiVersion": "policy/v1",
                "kind": "PodDisruptionBudget",
                "metadata": local(self.name, self.name),
                "spec": {
                    "maxUnavailable": 1,
                    "selector": { "matchLabels": selector(self.name) },
                },
            }));
        }
        objects
    }

    fn config_file(&self) -> String {
        format!("{}.yaml", self.short)
    }

    fn template(&self) -> Value {
        let mut volumes = vec![json!({ "name": "config", "configMap": { "name": self.name } })];
        volumes.extend(self.volumes.iter().cloned());
        let mut spec = json!({
            "serviceAccountName": self.name,
            // Each part asks the API server.
            "automountServiceAccountToken": true,
            "securityContext": {
                "runAsNonRoot": true,
                "runAsUser": UID,
                "runAsGroup": UID,
                "fsGroup": UID,
                "seccompProfile": { "type": "RuntimeDefault" },
            },
            "containers": [self.container()],
            "volumes": volumes,
            "topologySpreadConstraints": [{
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": { "matchLabels": selector(self.name) },
            }],
        });
        let optional = [
            (
                "priorityClassName",
                self.plan.priority_class.clone().map(Value::from),
            ),
            ("imagePullSecrets", self.pull_secrets()),
        ];
        for (field, value) in optional {
            if let (Some(value), Some(spec)) = (value, spec.as_object_mut()) {
                spec.insert(field.to_owned(), value);
            }
        }
        json!({
            "metadata": {
                "labels": labels(self.name),
                "annotations": {
                    "sidegate.dev/config-hash": format!("{:016x}", fingerprint(&self.config)),
                    "prometheus.io/scrape": "true",
                    "prometheus.io/port": self.health_port.to_string(),
                },
            },
            "spec": spec,
        })
    }

    fn pull_secrets(&self) -> Option<Value> {
        let names = &self.plan.image_pull_secrets;
        let secrets = names.iter().map(|name| json!({ "name": name }));
        (!names.is_empty()).then(|| secrets.collect())
    }

    fn container(&self) -> Value {
        let mut arguments: Vec<String> =
            self.arguments.iter().map(|&word| word.to_owned()).collect();
        arguments.push("--config".to_owned());
        arguments.push(format!("{CONFIG_DIR}/{}", self.config_file()));
        let mut mounts =
            vec![json!({ "name": "config", "mountPath": CONFIG_DIR, "readOnly": true })];
        mounts.extend(self.mounts.iter().cloned());
        let probe = |path: &str, period: u32, failures: u32| {
            json!({
                "httpGet": { "path": path, "port": "health" },
                "periodSeconds": period,
                "failureThreshold": failures,
            })
        };
        json!({
            "name": self.short,
            "image": self.plan.image(self.short, self.part),
            "imagePullPolicy": self.plan.injection.images.pull_policy.as_str(),
            "args": arguments,
            "env": [field("POD_NAME", "metadata.name"), field("POD_NAMESPACE", "metadata.namespace"),
                    field("POD_UID", "metadata.uid"), field("POD_IP", "status.podIP")],
            "ports": [
                { "name": self.port.0, "containerPort": self.port.1, "protocol": "TCP" },
                { "name": "health", "containerPort": self.health_port, "protocol": "TCP" },
            ],
            "readinessProbe": probe("/readyz", 2, 2),
            "livenessProbe": probe("/livez", 10, 6),
            "resources": resources(&self.part.resources),
            "securityContext": {
                "allowPrivilegeEscalation": false,
                "capabilities": { "drop": ["ALL"] },
                "readOnlyRootFilesystem": true,
            },
            "volumeMounts": mounts,
        })
    }
}

/// The token and the roots, as every pod of the mesh has them.
fn identity_volumes() -> Vec<Value> {
    vec![
        json!({
            "name": "token",
            "projected": { "sources": [{ "serviceAccountToken": {
                "path": "token",
                "audience": TOKEN_AUDIENCE,
                "expirationSeconds": TOKEN_LIFETIME.as_secs(),
            } }] },
        }),
        json!({ "name": "bundle", "configMap": { "name": BUNDLE_CONFIG_MAP } }),
    ]
}

fn identity_mounts() -> Vec<Value> {
    let mount =
        |name: &str, path: &str| json!({ "name": name, "mountPath": path, "readOnly": true });
    vec![mount("token", TOKEN_DIR), mount("bundle", BUNDLE_DIR)]
}

fn field(name: &str, path: &str) -> Value {
    json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } })
}

fn resources(amounts: &Resources) -> Value {
    json!({
        "requests": {
            "cpu": amounts.cpu_request.as_str(),
            "memory": amounts.memory_request.as_str(),
        },
        "limits": {
            "cpu": amounts.cpu_limit.as_str(),
            "memory": amounts.memory_limit.as_str(),
        },
    })
}

/// FNV-1a: tells one configuration from another, and promises nothing else.
fn fingerprint(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_follows_its_text() {
        assert_eq!(fingerprint("a"), 0xaf63_dc4c_8601_ec8c, "as published");
        assert_ne!(
            fingerprint("leafLifetime: 1h"),
            fingerprint("leafLifetime: 2h")
        );
    }
}
