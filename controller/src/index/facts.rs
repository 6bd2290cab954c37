//! What the index keeps of each Kubernetes object: the few facts that decide something.
//!
//! Invariant: an object whose facts are the same as before changes nothing; nothing of an object is
//! kept that decides nothing, so memory follows what matters.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use k8s_openapi::api::core::v1;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::Value;
use sidegate_mesh::workload::{Enforcement, WorkloadPort};

/// Label of a namespace that is in the mesh, and of a pod that opts out.
const INJECT: &str = "sidegate.dev/inject";
/// Annotation of a namespace: whether refusals refuse.
const ENFORCEMENT: &str = "sidegate.dev/enforcement";
/// Annotation of a namespace: whether calls may leave the mesh.
const EGRESS: &str = "sidegate.dev/egress";
/// Annotation of a pod that was injected: by which version.
const INJECTED: &str = "sidegate.dev/injected";
/// Annotation of a pod that was not: why.
const SKIPPED: &str = "sidegate.dev/skipped";
/// The sidecar's container.
const SIDECAR: &str = "sidegate-proxy";
/// The one container of ours that sets up redirection.
const REDIRECTION: &str = "sidegate-init";
/// Namespaces that are never injected, whatever their labels.
const NEVER_INJECTED: [&str; 2] = ["kube-system", "sidegate-system"];
/// How long a pod has to end when it does not say.
const GRACE_DEFAULT: i64 = 30;
/// Shortest drain of a sidecar, as the injector has it.
const DRAIN_TIMEOUT_MIN: Duration = Duration::from_secs(1);

/// Namespace and name of an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

impl Key {
    /// The key of a name in a namespace.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }

    /// The key of an object; `None` for one that has none, which the API server never sends.
    pub fn of(metadata: &ObjectMeta) -> Option<Self> {
        let namespace = metadata.namespace.as_deref().unwrap_or_default();
        Some(Self::new(namespace, metadata.name.as_deref()?))
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// What is known of a namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Namespace {
    /// Its pods are in the mesh.
    pub injected: bool,
    /// Whether refusals refuse there.
    pub enforcement: Enforcement,
    /// Calls out of the mesh are refused.
    pub egress_denied: bool,
    /// For `namespaceSelector`.
    pub labels: BTreeMap<String, String>,
}

impl Namespace {
    pub(crate) fn of(object: &v1::Namespace) -> Self {
        let metadata = &object.metadata;
        let name = metadata.name.as_deref().unwrap_or_default();
        let labels = metadata.labels.clone().unwrap_or_default();
        let annotation = |key| text_of(metadata.annotations.as_ref(), key);
        let labelled = labels.get(INJECT).is_some_and(|value| value == "enabled");
        Self {
            injected: labelled && !NEVER_INJECTED.contains(&name),
            // Whatever is not the word for less protection is not less protection.
            enforcement: match annotation(ENFORCEMENT) {
                Some("audit") => Enforcement::Audit,
                _ => Enforcement::Enforce,
            },
            egress_denied: !matches!(annotation(EGRESS), None | Some("allow")),
            labels,
        }
    }

    /// Endpoints without identity are never called.
    pub(crate) fn is_strict(&self) -> bool {
        self.injected && self.enforcement == Enforcement::Enforce
    }
}

/// What is known of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Node {
    pub zone: Option<Arc<str>>,
    pub addresses: Vec<IpAddr>,
    pub pod_ranges: Vec<IpNet>,
}

impl Node {
    pub(crate) fn of(object: &v1::Node) -> Self {
        let status = object.status.as_ref();
        let addresses = status.and_then(|status| status.addresses.as_ref());
        let spec = object.spec.as_ref();
        let ranges = spec.and_then(|spec| spec.pod_cidrs.as_ref());
        let zone = text_of(
            object.metadata.labels.as_ref(),
            "topology.kubernetes.io/zone",
        );
        Self {
            zone: zone.map(Arc::from),
            addresses: addresses
                .into_iter()
                .flatten()
                .filter_map(|address| address.address.parse().ok())
                .collect(),
            pod_ranges: ranges
                .into_iter()
                .flatten()
                .filter_map(|range| range.parse().ok())
                .collect(),
        }
    }
}

/// The ranges of a ServiceCIDR.
pub(crate) fn service_ranges(object: &networking::ServiceCIDR) -> Vec<IpNet> {
    let ranges = object.spec.as_ref().and_then(|spec| spec.cidrs.as_ref());
    let ranges = ranges.into_iter().flatten();
    ranges.filter_map(|range| range.parse().ok()).collect()
}

/// Something that people should hear of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remark {
    /// One word for machines.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

/// What is known of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pod {
    pub key: Key,
    pub uid: Arc<str>,
    /// Empty on the host network: those addresses are the node's.
    pub addresses: Vec<IpAddr>,
    pub node: Option<Arc<str>>,
    pub service_account: Arc<str>,
    pub labels: BTreeMap<String, String>,
    /// Its containers have ended for good.
    pub is_over: bool,
    pub is_terminating: bool,
    /// It was injected and has not opted out.
    pub has_sidecar: bool,
    pub ports: Vec<WorkloadPort>,
    /// Ports that carry opaque bytes, as they were fixed at injection.
    pub opaque_ports: Vec<u16>,
    pub remarks: Vec<Remark>,
}

impl Pod {
    pub(crate) fn of(object: &v1::Pod) -> Option<Self> {
        let metadata = &object.metadata;
        let spec = object.spec.as_ref()?;
        let status = object.status.as_ref();
        let on_host = spec.host_network.unwrap_or_default();
        let sidecar = spec
            .init_containers
            .iter()
            .flatten()
            .find(|container| is_sidecar(container));
        let labels = metadata.labels.clone().unwrap_or_default();
        let annotation = |key| text_of(metadata.annotations.as_ref(), key);
        let opted_out = labels.get(INJECT).is_some_and(|value| value == "disabled");
        let has_sidecar =
            sidecar.is_some() && annotation(INJECTED).is_some() && !opted_out && !on_host;
        let injected = sidecar.map(injected_config).unwrap_or_default();
        let phase = status.and_then(|status| status.phase.as_deref());
        Some(Self {
            key: Key::of(metadata)?,
            uid: metadata.uid.as_deref()?.into(),
            addresses: if on_host {
                Vec::new()
            } else {
                addresses(status)
            },
            node: spec.node_name.as_deref().map(Arc::from),
            service_account: spec
                .service_account_name
                .as_deref()
                .unwrap_or("default")
                .into(),
            labels,
            is_over: matches!(phase, Some("Succeeded" | "Failed")),
            is_terminating: metadata.deletion_timestamp.is_some(),
            has_sidecar,
            ports: ports(spec),
            opaque_ports: numbers(&injected, "opaquePorts"),
            remarks: remarks(spec, annotation(SKIPPED), has_sidecar.then_some(&injected)),
        })
    }

    /// It is there, and it can be reached by its addresses.
    pub(crate) fn is_there(&self) -> bool {
        !self.is_over && !self.addresses.is_empty()
    }
}

fn is_sidecar(container: &v1::Container) -> bool {
    container.name == SIDECAR && container.restart_policy.as_deref() == Some("Always")
}

fn addresses(status: Option<&v1::PodStatus>) -> Vec<IpAddr> {
    let Some(status) = status else {
        return Vec::new();
    };
    let listed = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str());
    let mut addresses: Vec<IpAddr> = listed.filter_map(|ip| ip.parse().ok()).collect();
    if addresses.is_empty() {
        addresses.extend(
            status
                .pod_ip
                .iter()
                .filter_map(|ip| ip.parse::<IpAddr>().ok()),
        );
    }
    addresses
}

/// The sidecar's configuration as it was fixed at injection.
fn injected_config(container: &v1::Container) -> Value {
    let mut variables = container.env.iter().flatten();
    let found = variables.find(|variable| variable.name == "SIDEGATE_CONFIG");
    let text = found.and_then(|variable| variable.value.as_deref());
    text.and_then(|text| serde_json::from_str(text).ok())
        .unwrap_or_default()
}

fn numbers(config: &Value, field: &str) -> Vec<u16> {
    let list = config.get(field).and_then(Value::as_array);
    let list = list.into_iter().flatten().filter_map(Value::as_u64);
    list.filter_map(|number| u16::try_from(number).ok())
        .collect()
}

fn ports(spec: &v1::PodSpec) -> Vec<WorkloadPort> {
    let native = |container: &&v1::Container| container.restart_policy.as_deref() == Some("Always");
    let sidecars = spec.init_containers.iter().flatten().filter(native);
    let containers = spec.containers.iter().chain(sidecars);
    let theirs = containers.filter(|container| container.name != SIDECAR);
    let is_tcp = |port: &&v1::ContainerPort| port.protocol.as_deref().unwrap_or("TCP") == "TCP";
    theirs
        .flat_map(|container| container.ports.iter().flatten().filter(is_tcp))
        .filter_map(|port| {
            let number = u16::try_from(port.container_port).ok()?;
            Some(WorkloadPort {
                name: port.name.clone(),
                port: number,
            })
        })
        .collect()
}

fn remarks(spec: &v1::PodSpec, skipped: Option<&str>, injected: Option<&Value>) -> Vec<Remark> {
    let mut remarks = Vec::new();
    if let Some(why) = skipped {
        remarks.push(Remark {
            reason: "SidegateSkipped",
            message: format!("the pod is not in the mesh: {}", cut(why)),
        });
    }
    let Some(injected) = injected else {
        return remarks;
    };
    let grace = spec
        .termination_grace_period_seconds
        .unwrap_or(GRACE_DEFAULT);
    let grace = Duration::from_secs(u64::try_from(grace).unwrap_or_default());
    // Where nobody asked for a time, the sidecar has the pod's own, and a second at least.
    let grace = grace.max(DRAIN_TIMEOUT_MIN);
    let drain = injected.get("drainTimeout").and_then(Value::as_str);
    if let Some(drain) = drain.and_then(|text| humantime::parse_duration(text).ok())
        && drain > grace
    {
        remarks.push(Remark {
            reason: "DrainTimeoutTooLong",
            message: format!(
                "sidegate.dev/drain-timeout ({}) is longer than terminationGracePeriodSeconds ({}): \
                 open calls will be cut",
                humantime::format_duration(drain),
                humantime::format_duration(grace),
            ),
        });
    }
    remarks.extend(escapes(spec));
    remarks
}

/// Containers that could go around the sidecar.
fn escapes(spec: &v1::PodSpec) -> impl Iterator<Item = Remark> {
    let ours = [SIDECAR, REDIRECTION];
    let containers = spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten());
    let theirs = containers.filter(move |container| !ours.contains(&container.name.as_str()));
    theirs.filter_map(|container| {
        let context = container.security_context.as_ref()?;
        let added = context
            .capabilities
            .as_ref()
            .and_then(|set| set.add.as_ref());
        let named = |name: &&String| {
            let name = name.strip_prefix("CAP_").unwrap_or(name);
            ["NET_ADMIN", "SYS_ADMIN", "ALL"].contains(&name)
        };
        let power = match added.into_iter().flatten().find(named) {
            Some(name) => format!("the capability {}", cut(name)),
            None if context.privileged.unwrap_or_default() => "privileges".to_owned(),
            None => return None,
        };
        Some(Remark {
            reason: "CanBypassSidecar",
            message: format!(
                "container {} has {power}: it can change the redirection and go around the sidecar",
                container.name
            ),
        })
    })
}

fn cut(text: &str) -> String {
    text.chars().take(200).collect()
}

/// What is known of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Service {
    pub key: Key,
    /// Empty when it has none of its own: headless, or a name for something else.
    pub addresses: Vec<IpAddr>,
    pub is_headless: bool,
    pub ports: Vec<ServicePort>,
}

/// One TCP port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServicePort {
    pub name: Arc<str>,
    pub port: u16,
    pub application: Option<Arc<str>>,
}

impl Service {
    pub(crate) fn of(object: &v1::Service) -> Option<Self> {
        let spec = object.spec.as_ref()?;
        let is_name = spec.type_.as_deref() == Some("ExternalName");
        let single = spec.cluster_ip.as_slice();
        let listed = spec.cluster_ips.as_deref().unwrap_or(single);
        let is_tcp = |port: &&v1::ServicePort| port.protocol.as_deref().unwrap_or("TCP") == "TCP";
        let port = |port: &v1::ServicePort| {
            Some(ServicePort {
                name: port.name.as_deref().unwrap_or_default().into(),
                port: u16::try_from(port.port).ok()?,
                application: port.app_protocol.as_deref().map(Arc::from),
            })
        };
        let ports = spec.ports.iter().flatten().filter(is_tcp);
        Some(Self {
            key: Key::of(&object.metadata)?,
            // externalIPs and load balancers' addresses are chosen by whoever writes the Service:
            // they never capture an address (CVE-2020-8554).
            addresses: listed
                .iter()
                .filter(|_| !is_name)
                .filter_map(|ip| ip.parse().ok())
                .collect(),
            is_headless: !is_name && listed.iter().any(|ip| ip == "None"),
            ports: ports.filter_map(port).collect(),
        })
    }
}

/// What is known of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slice {
    pub key: Key,
    pub service: Key,
    pub is_v6: bool,
    /// Name of the Service's port, number of the endpoints' port.
    pub ports: Vec<(Arc<str>, u16)>,
    pub endpoints: Vec<SliceEndpoint>,
}

/// One endpoint of a slice, as it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SliceEndpoint {
    pub address: IpAddr,
    /// Name and UID of a pod that it says to be, of the slice's own namespace.
    pub pod: Option<(Arc<str>, Arc<str>)>,
    pub is_ready: bool,
    pub is_serving: bool,
    pub is_terminating: bool,
    pub zone: Option<Arc<str>>,
    /// Zones that topology hints assign it to.
    pub hints: Vec<Arc<str>>,
}

impl Slice {
    /// `None` for a slice of no Service, or one of names instead of addresses.
    pub(crate) fn of(object: &discovery::EndpointSlice) -> Option<Self> {
        let key = Key::of(&object.metadata)?;
        let service = text_of(
            object.metadata.labels.as_ref(),
            "kubernetes.io/service-name",
        )?;
        if !["IPv4", "IPv6"].contains(&object.address_type.as_str()) {
            return None;
        }
        let is_tcp =
            |port: &&discovery::EndpointPort| port.protocol.as_deref().unwrap_or("TCP") == "TCP";
        let ports = object.ports.iter().flatten().filter(is_tcp);
        let port = |port: &discovery::EndpointPort| {
            let number = u16::try_from(port.port?).ok()?;
            Some((Arc::from(port.name.as_deref().unwrap_or_default()), number))
        };
        let endpoints = object.endpoints.iter();
        Some(Self {
            service: Key {
                namespace: Arc::clone(&key.namespace),
                name: service.into(),
            },
            is_v6: object.address_type == "IPv6",
            ports: ports.filter_map(port).collect(),
            endpoints: endpoints
                .filter_map(|endpoint| slice_endpoint(endpoint, &key.namespace))
                .collect(),
            key,
        })
    }
}

fn slice_endpoint(endpoint: &discovery::Endpoint, namespace: &str) -> Option<SliceEndpoint> {
    let conditions = endpoint.conditions.as_ref();
    let is_ready = conditions.and_then(|known| known.ready).unwrap_or(true);
    let target = endpoint.target_ref.as_ref().filter(|target| {
        target.kind.as_deref() == Some("Pod") && target.namespace.as_deref() == Some(namespace)
    });
    let pod = target.and_then(|target| {
        let (name, uid) = (target.name.as_deref()?, target.uid.as_deref()?);
        Some((Arc::from(name), Arc::from(uid)))
    });
    let hints = endpoint
        .hints
        .as_ref()
        .and_then(|hints| hints.for_zones.as_ref());
    Some(SliceEndpoint {
        // Further addresses of one endpoint are not called by kube-proxy either.
        address: endpoint.addresses.first()?.parse().ok()?,
        pod,
        is_ready,
        is_serving: conditions
            .and_then(|known| known.serving)
            .unwrap_or(is_ready),
        is_terminating: conditions
            .and_then(|known| known.terminating)
            .unwrap_or_default(),
        zone: endpoint.zone.as_deref().map(Arc::from),
        hints: hints
            .into_iter()
            .flatten()
            .map(|zone| Arc::from(zone.name.as_str()))
            .collect(),
    })
}

fn text_of<'a>(map: Option<&'a BTreeMap<String, String>>, key: &str) -> Option<&'a str> {
    map?.get(key).map(String::as_str)
}
