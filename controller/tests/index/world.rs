//! A small cluster: objects as the API server would send them, and one sidecar that listens.

use std::net::IpAddr;

use serde_json::{Value, json};
use sidegate_api::control::{self as proto, destination};
use sidegate_controller::index::{Greeting, Index, Key, Ranges, Settings, SidecarId, Target};
use sidegate_mesh::resource::{Kind, ResourceKey};
use sidegate_mesh::spiffe::SpiffeId;

pub fn settings() -> Settings {
    Settings {
        trust_domain: "cluster.local".parse().unwrap(),
        ranges: Ranges {
            pods: vec!["10.245.0.0/16".parse().unwrap()],
            ..Ranges::default()
        },
        subscriptions_max: 8,
        response_bytes_max: 64 * 1024,
        notes_max: 16,
    }
}

pub struct World {
    pub index: Index,
}

/// What a pod is made of.
#[derive(Clone)]
pub struct PodFacts<'a> {
    pub namespace: &'a str,
    pub name: &'a str,
    pub uid: &'a str,
    pub address: &'a str,
    pub account: &'a str,
    pub labels: Value,
    pub is_injected: bool,
    pub config: Value,
    pub is_terminating: bool,
    pub on_host: bool,
    pub phase: &'a str,
    pub node: &'a str,
}

pub fn pod<'a>(name: &'a str, address: &'a str) -> PodFacts<'a> {
    let (namespace, name) = name.split_once('/').unwrap();
    PodFacts {
        namespace,
        name,
        uid: name,
        address,
        account: "orders",
        labels: json!({ "app": "orders" }),
        is_injected: true,
        config: json!({}),
        is_terminating: false,
        on_host: false,
        phase: "Running",
        node: "node1",
    }
}

impl PodFacts<'_> {
    pub fn unmeshed(mut self) -> Self {
        self.is_injected = false;
        self
    }

    pub fn object(&self) -> Value {
        let sidecar = json!({
            "name": "sidegate-proxy",
            "restartPolicy": "Always",
            "env": [{ "name": "SIDEGATE_CONFIG", "value": self.config.to_string() }],
        });
        let mut object = json!({
            "metadata": {
                "namespace": self.namespace,
                "name": self.name,
                "uid": self.uid,
                "labels": self.labels,
            },
            "spec": {
                "nodeName": self.node,
                "serviceAccountName": self.account,
                "hostNetwork": self.on_host,
                "containers": [{ "name": "app", "ports": [{ "name": "http", "containerPort": 8080 }] }],
            },
            "status": { "phase": self.phase, "podIP": self.address, "podIPs": [{ "ip": self.address }] },
        });
        if self.is_injected {
            object["spec"]["initContainers"] = json!([sidecar]);
            object["metadata"]["annotations"] = json!({ "sidegate.dev/injected": "0.1.0" });
        }
        if self.is_terminating {
            object["metadata"]["deletionTimestamp"] = json!("2026-11-24T00:00:00Z");
        }
        object
    }
}

/// An endpoint of a slice that says to be this pod.
pub fn endpoint(pod: &PodFacts<'_>) -> Value {
    json!({
        "addresses": [pod.address],
        "conditions": { "ready": true, "serving": true, "terminating": false },
        "targetRef": { "kind": "Pod", "namespace": pod.namespace, "name": pod.name, "uid": pod.uid },
    })
}

pub fn key(name: &str) -> Key {
    let (namespace, name) = name.split_once('/').unwrap();
    Key::new(namespace, name)
}

impl World {
    /// Namespace `shop` is in the mesh, `plain` is not; a node has 10.245.1.0/24.
    pub fn new() -> Self {
        let mut world = Self {
            index: Index::new(settings()),
        };
        world.namespace(
            "shop",
            json!({ "sidegate.dev/inject": "enabled" }),
            json!({}),
        );
        world.namespace("plain", json!({}), json!({}));
        world.node("node1", "zone-a", "172.18.0.2");
        world.index.apply_service_cidr(&from(json!({
            "metadata": { "name": "kubernetes" }, "spec": { "cidrs": ["10.96.0.0/16", "fd00:10::/108"] }
        })));
        world
    }

    pub fn namespace(&mut self, name: &str, labels: Value, annotations: Value) {
        let metadata = json!({ "name": name, "labels": labels, "annotations": annotations });
        self.index
            .apply_namespace(&from(json!({ "metadata": metadata })));
    }

    pub fn node(&mut self, name: &str, zone: &str, address: &str) {
        self.index.apply_node(&from(json!({
            "metadata": { "name": name, "labels": { "topology.kubernetes.io/zone": zone } },
            "status": { "addresses": [{ "type": "InternalIP", "address": address }, { "type": "Hostname", "address": name }] },
        })));
    }

    pub fn pod(&mut self, pod: &PodFacts<'_>) {
        self.index.apply_pod(&from(pod.object()));
    }

    /// A Service with one port, and what else its spec says.
    pub fn service(&mut self, name: &str, address: &str, spec: Value) {
        let key = key(name);
        let mut whole = json!({
            "clusterIP": address,
            "clusterIPs": [address],
            "ports": [{ "name": "http", "port": 80 }],
        });
        for (field, value) in spec.as_object().unwrap() {
            whole[field] = value.clone();
        }
        let metadata = json!({ "namespace": &*key.namespace, "name": &*key.name });
        self.index
            .apply_service(&from(json!({ "metadata": metadata, "spec": whole })));
    }

    /// The slice `NAME-1` of a Service, port `http` at 8080.
    pub fn slice(&mut self, service: &str, endpoints: &[Value]) {
        self.slice_with(
            service,
            "1",
            json!([{ "name": "http", "port": 8080 }]),
            endpoints,
        );
    }

    pub fn slice_with(&mut self, service: &str, suffix: &str, ports: Value, endpoints: &[Value]) {
        let key = key(service);
        let is_v6 = endpoints
            .iter()
            .any(|one| one["addresses"][0].as_str().unwrap().contains(':'));
        self.index.apply_slice(&from(json!({
            "metadata": {
                "namespace": &*key.namespace,
                "name": format!("{}-{suffix}", key.name),
                "labels": { "kubernetes.io/service-name": &*key.name },
            },
            "addressType": if is_v6 { "IPv6" } else { "IPv4" },
            "ports": ports,
            "endpoints": endpoints,
        })));
    }

    pub fn resource(&mut self, kind: Kind, name: &str, generation: i64, spec: Value) {
        let key = key(name);
        let key = ResourceKey {
            kind,
            namespace: key.namespace.to_string(),
            name: key.name.to_string(),
        };
        let object = json!({
            "apiVersion": "sidegate.dev/v1alpha1",
            "kind": kind.as_str(),
            "metadata": {
                "namespace": key.namespace, "name": key.name, "uid": format!("uid-{}", key.name),
                "generation": generation, "resourceVersion": generation.to_string(),
                "annotations": { "kubectl.kubernetes.io/last-applied-configuration": "{}" },
            },
            "spec": spec,
        });
        self.index.apply_resource(&key, &object);
    }

    /// The sidecar of `shop/web-1`, with everything it is owed already taken.
    pub fn sidecar(&mut self) -> SidecarId {
        let mut web = pod("shop/web-1", "10.245.1.99");
        web.account = "web";
        web.labels = json!({ "app": "web" });
        self.pod(&web);
        self.connect(&web)
    }

    pub fn connect(&mut self, pod: &PodFacts<'_>) -> SidecarId {
        let id = identity(pod);
        let greeting = Greeting {
            id: &id,
            address: pod.address.parse::<IpAddr>().unwrap(),
            pod: pod.name,
            uid: pod.uid,
        };
        let sidecar = self.index.connect(&greeting).unwrap();
        self.hear(sidecar);
        sidecar
    }

    /// Everything that a sidecar has to hear now.
    pub fn hear(&mut self, sidecar: SidecarId) -> Heard {
        let mut heard = Heard::default();
        while let Some(response) = self.index.take(sidecar) {
            heard.responses += 1;
            heard.complete |= response.complete;
            heard.workload = response.workload.or(heard.workload);
            heard.updated.extend(response.updated);
            heard.removed.extend(response.removed);
            heard.destinations.extend(response.destinations);
        }
        heard
    }

    /// What a sidecar hears of one destination.
    pub fn ask(&mut self, sidecar: SidecarId, destination: &str) -> String {
        let target: Target = destination.parse().unwrap();
        self.index.subscribe(sidecar, target);
        let heard = self.hear(sidecar);
        let said = heard
            .destinations
            .iter()
            .find(|one| one.destination == destination);
        show(said.expect("an answer"))
    }
}

#[derive(Default)]
pub struct Heard {
    pub responses: usize,
    pub complete: bool,
    pub workload: Option<proto::Workload>,
    pub updated: Vec<proto::Resource>,
    pub removed: Vec<proto::ResourceReference>,
    pub destinations: Vec<proto::Destination>,
}

impl Heard {
    /// `NAME@GENERATION` of each update, `-NAME` of each removal, and what is said of destinations.
    pub fn words(&self) -> Vec<String> {
        let updated = self.updated.iter().map(|one| {
            format!(
                "{}@{}",
                one.reference.as_ref().unwrap().name,
                one.generation
            )
        });
        let removed = self.removed.iter().map(|one| format!("-{}", one.name));
        let destinations = self.destinations.iter().map(show);
        updated.chain(removed).chain(destinations).collect()
    }
}

/// A destination in one line.
pub fn show(said: &proto::Destination) -> String {
    match said.kind.as_ref().unwrap() {
        destination::Kind::Unknown(_) => "unknown".to_owned(),
        destination::Kind::External(external) if external.refused => "external, refused".to_owned(),
        destination::Kind::External(_) => "external".to_owned(),
        destination::Kind::Meshed(meshed) => {
            let endpoints = meshed.endpoints.iter().map(|one| {
                let account = one.spiffe_id.rsplit('/').next().unwrap();
                let namespace = one.spiffe_id.split('/').nth(4).unwrap();
                let zone = if one.zone.is_empty() {
                    String::new()
                } else {
                    format!("@{}", one.zone)
                };
                let leaving = if one.terminating { " leaving" } else { "" };
                format!("{} {namespace}/{account}{zone}{leaving}", one.address)
            });
            let endpoints: Vec<String> = endpoints.collect();
            format!(
                "{} {} [{}]",
                meshed.service,
                meshed.protocol,
                endpoints.join(", ")
            )
        }
    }
}

pub fn identity(pod: &PodFacts<'_>) -> SpiffeId {
    let td = "cluster.local".parse().unwrap();
    SpiffeId::for_workload(&td, pod.namespace, pod.account).unwrap()
}

pub fn from<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}
