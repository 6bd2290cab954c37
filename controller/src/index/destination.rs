//! What a destination is: a service of the mesh, something outside, or nobody knows.
//!
//! Invariants: an endpoint has an identity only when it is a pod of the mesh (see
//! [`Cluster::endpoint`]); whatever has none is left out where the namespace enforces; nothing but
//! a cluster address of a Service and the address of a pod is ever captured.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use sidegate_api::control::{self as proto, destination::Kind};
use sidegate_mesh::spiffe::{SpiffeId, TrustDomain};

use super::addresses::{Addresses, Owner};
use super::cluster::Cluster;
use super::facts::{Key, Pod, Service, ServicePort, Slice, SliceEndpoint};

/// Ports on which the server speaks first, so that nothing can be found out from the first bytes.
const SERVER_FIRST_PORTS: [u16; 8] = [25, 587, 3306, 4444, 5432, 6379, 9300, 11_211];

/// Longest text of a destination, in bytes.
const TEXT_BYTES_MAX: usize = 320;

/// What a sidecar asks about.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// The address that an application connects to.
    Address(SocketAddr),
    /// A port of a Service by name.
    Named(Key, u16),
}

/// What a sidecar asked about is no destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a destination is `address:port` or `service.namespace:port`")]
pub struct TargetError;

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(TargetError);
        }
        if let Ok(address) = text.parse::<SocketAddr>() {
            let address = SocketAddr::new(address.ip().to_canonical(), address.port());
            return Ok(Self::Address(address));
        }
        let named = || {
            let (host, port) = text.rsplit_once(':')?;
            let (name, namespace) = host.split_once('.')?;
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            let fine = |part: &str| !part.is_empty() && part.chars().all(plain);
            let key = (fine(name) && fine(namespace)).then(|| Key::new(namespace, name))?;
            Some(Self::Named(key, port.parse().ok()?))
        };
        named().ok_or(TargetError)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address}"),
            Self::Named(key, port) => write!(f, "{}.{}:{port}", key.name, key.namespace),
        }
    }
}

/// What a destination is, the same for everybody who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Meshed(Meshed),
    External,
    Unknown,
}

/// A service of the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Meshed {
    /// `orders.shop:80`.
    pub label: String,
    pub protocol: &'static str,
    pub endpoints: BTreeSet<Endpoint>,
    /// Whose traffic policies count.
    pub service: Option<Key>,
}

/// A pod of the mesh as one endpoint.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Endpoint {
    pub address: SocketAddr,
    pub identity: Arc<str>,
    pub zone: Option<Arc<str>>,
    pub hints: Vec<Arc<str>>,
    pub is_draining: bool,
}

/// Everything that a destination is made of.
pub(crate) struct World<'a> {
    pub cluster: &'a Cluster,
    pub addresses: &'a Addresses,
    pub trust_domain: &'a TrustDomain,
}

impl World<'_> {
    /// What a target is now, and the Service that it depends on.
    pub(crate) fn resolve(&self, target: &Target) -> (State, Option<Key>) {
        match target {
            Target::Named(key, port) => match self.cluster.service(key) {
                Some(service) => (self.service(service, *port, None), Some(key.clone())),
                None => (State::Unknown, Some(key.clone())),
            },
            Target::Address(address) => {
                if let Some(service) = self.cluster.service_at(address.ip()) {
                    let is_v6 = address.is_ipv6();
                    let state = self.service(service, address.port(), Some(is_v6));
                    return (state, Some(service.key.clone()));
                }
                let state = self.address(*address);
                let service = state.service().cloned();
                (state, service)
            }
        }
    }

    fn address(&self, address: SocketAddr) -> State {
        match self.cluster.pod_at(address.ip()) {
            Ok(Some(pod)) => self.pod(pod, address),
            // It will soon be told whose it is.
            Err(_) => State::Unknown,
            Ok(None) => match self.addresses.owner(address.ip()) {
                Owner::Outside | Owner::Node => State::External,
                Owner::Cluster | Owner::Nobody => State::Unknown,
            },
        }
    }

    /// A pod's own address is that pod, never another one.
    fn pod(&self, pod: &Pod, address: SocketAddr) -> State {
        let namespace = self.cluster.namespaces.get(&pod.key.namespace);
        let is_meshed = self.cluster.is_meshed(pod);
        if !is_meshed && !namespace.is_some_and(super::facts::Namespace::is_strict) {
            return State::External;
        }
        let (service, port) = match self.service_of(pod, address) {
            Some((service, port)) => (Some(service), Some(port)),
            None => (None, None),
        };
        let label = match (&service, &port) {
            (Some(service), Some(port)) => label(&service.key, port.port),
            _ => label(&pod.key, address.port()),
        };
        let endpoint = is_meshed.then(|| self.endpoint(pod, address)).flatten();
        State::Meshed(Meshed {
            label,
            protocol: protocol(port.as_ref(), address.port(), [pod].into_iter()),
            endpoints: endpoint.into_iter().collect(),
            service: service.map(|service| service.key.clone()),
        })
    }

    fn endpoint(&self, pod: &Pod, address: SocketAddr) -> Option<Endpoint> {
        let identity =
            SpiffeId::for_workload(self.trust_domain, &pod.key.namespace, &pod.service_account);
        Some(Endpoint {
            address,
            identity: Arc::clone(identity.ok()?.text()),
            zone: self.addresses.zone(pod.node.as_ref()).cloned(),
            hints: Vec::new(),
            is_draining: pod.is_terminating,
        })
    }

    /// The Service that a call to a pod's own address is meant for: a headless one first.
    fn service_of(&self, pod: &Pod, address: SocketAddr) -> Option<(Arc<Service>, ServicePort)> {
        let mut candidates: Vec<(Arc<Service>, ServicePort)> = Vec::new();
        for slice in self.cluster.slices_with(pod) {
            let is_there = slice.endpoints.iter().any(|endpoint| {
                endpoint.address == address.ip()
                    && self
                        .cluster
                        .endpoint(slice, endpoint)
                        .is_some_and(|found| found.uid == pod.uid)
            });
            let named = slice
                .ports
                .iter()
                .find(|(_, number)| *number == address.port());
            let service = self.cluster.service(&slice.service);
            let (true, Some((name, _)), Some(service)) = (is_there, named, service) else {
                continue;
            };
            let port = service.ports.iter().find(|port| port.name == *name);
            candidates.extend(port.map(|port| (Arc::clone(service), port.clone())));
        }
        candidates
            .into_iter()
            .min_by(|(a, _), (b, _)| (!a.is_headless, &a.key).cmp(&(!b.is_headless, &b.key)))
    }

    fn service(&self, service: &Service, number: u16, is_v6: Option<bool>) -> State {
        let Some(port) = service.ports.iter().find(|port| port.port == number) else {
            // The port may be a new one; an address of the cluster is never the outside.
            return State::Unknown;
        };
        if is_api_server(&service.key) {
            return State::External;
        }
        let found = self.endpoints(service, port, is_v6);
        let namespace = self.cluster.namespaces.get(&service.key.namespace);
        let is_strict = namespace.is_some_and(super::facts::Namespace::is_strict);
        let has_ready = found.meshed.iter().any(|endpoint| !endpoint.is_draining);
        let nobody_meshed = found.meshed.is_empty();
        // During adoption what is not meshed yet is called as before. An endpoint without identity
        // is called by nobody else.
        if !is_strict && !has_ready && (found.unmeshed_ready || nobody_meshed) {
            return State::External;
        }
        let target_port = found
            .meshed
            .iter()
            .map(|endpoint| endpoint.address.port())
            .min();
        State::Meshed(Meshed {
            label: label(&service.key, number),
            protocol: protocol(
                Some(port),
                target_port.unwrap_or(number),
                found.pods.iter().map(|pod| &***pod),
            ),
            endpoints: found.meshed,
            service: Some(service.key.clone()),
        })
    }

    fn endpoints(&self, service: &Service, port: &ServicePort, is_v6: Option<bool>) -> Found<'_> {
        let mut found = Found::default();
        let of_family = |slice: &&Arc<Slice>| is_v6.is_none_or(|is_v6| slice.is_v6 == is_v6);
        for slice in self.cluster.slices_of(&service.key).filter(of_family) {
            let numbers = slice.ports.iter().filter(|(name, _)| *name == port.name);
            for (_, number) in numbers {
                for endpoint in &slice.endpoints {
                    self.collect(&mut found, slice, endpoint, *number);
                }
            }
        }
        found
    }

    fn collect<'a>(
        &'a self,
        found: &mut Found<'a>,
        slice: &Slice,
        said: &SliceEndpoint,
        port: u16,
    ) {
        let is_leaving = said.is_serving && said.is_terminating;
        let pod = self.cluster.endpoint(slice, said);
        let Some(pod) = pod.filter(|pod| self.cluster.is_meshed(pod)) else {
            found.unmeshed_ready |= said.is_ready;
            return;
        };
        if !said.is_ready && !is_leaving {
            return;
        }
        let Some(mut endpoint) = self.endpoint(pod, SocketAddr::new(said.address, port)) else {
            return;
        };
        endpoint.is_draining |= said.is_terminating;
        endpoint.zone = said.zone.clone().or(endpoint.zone);
        endpoint.hints.clone_from(&said.hints);
        found.meshed.insert(endpoint);
        found.pods.push(pod);
    }
}

/// The endpoints of one port of a Service.
#[derive(Default)]
struct Found<'a> {
    meshed: BTreeSet<Endpoint>,
    /// The pods of `meshed`.
    pods: Vec<&'a Arc<Pod>>,
    /// Something without identity could be called.
    unmeshed_ready: bool,
}

impl State {
    /// As one sidecar sees it: in its zone, and under its namespace's rule for calls to the outside.
    pub(crate) fn message(
        &self,
        target: &Target,
        zone: Option<&str>,
        egress_denied: bool,
    ) -> proto::Destination {
        let kind = match self {
            Self::Unknown => Kind::Unknown(proto::Unknown {}),
            Self::External => Kind::External(proto::External {
                refused: egress_denied,
            }),
            Self::Meshed(meshed) => Kind::Meshed(proto::Meshed {
                service: meshed.label.clone(),
                protocol: meshed.protocol.to_owned(),
                endpoints: meshed
                    .endpoints
                    .iter()
                    .map(|endpoint| endpoint.message(zone))
                    .collect(),
            }),
        };
        proto::Destination {
            destination: target.to_string(),
            kind: Some(kind),
        }
    }

    /// The Service whose traffic policies count.
    pub(crate) fn service(&self) -> Option<&Key> {
        match self {
            Self::Meshed(meshed) => meshed.service.as_ref(),
            _ => None,
        }
    }
}

impl Endpoint {
    fn message(&self, zone: Option<&str>) -> proto::Endpoint {
        // A hint says for which zones an endpoint is: for a caller there it is near, wherever it
        // runs, and for any other it is not.
        let is_for = |zone: &&str| self.hints.iter().any(|hint| **hint == **zone);
        let zone = match (self.hints.as_slice(), zone.filter(is_for)) {
            (_, Some(zone)) => zone,
            ([first, ..], None) => first,
            ([], None) => self.zone.as_deref().unwrap_or_default(),
        };
        proto::Endpoint {
            address: self.address.to_string(),
            spiffe_id: self.identity.as_ref().to_owned(),
            zone: zone.to_owned(),
            terminating: self.is_draining,
        }
    }
}

/// The Service by which pods reach the API server. Its endpoints are no pods, it is made and kept by
/// the API server itself, and its namespace may well be in the mesh.
fn is_api_server(key: &Key) -> bool {
    &*key.namespace == "default" && &*key.name == "kubernetes"
}

fn label(key: &Key, port: u16) -> String {
    // A pod's name may have dots, a service's has none.
    format!("{}.{}:{port}", key.name.replace('.', "-"), key.namespace)
}

/// What is spoken on a port: as its Service says, else as its pods say, else as its number says.
fn protocol<'a>(
    port: Option<&ServicePort>,
    target: u16,
    mut pods: impl Iterator<Item = &'a Pod>,
) -> &'static str {
    let said = port.and_then(|port| port.application.as_deref());
    if let Some(known) = said.and_then(application_protocol) {
        return known;
    }
    let is_server_first = SERVER_FIRST_PORTS.contains(&target)
        || port.is_some_and(|port| SERVER_FIRST_PORTS.contains(&port.port));
    if is_server_first || pods.any(|pod| pod.opaque_ports.contains(&target)) {
        "tcp"
    } else {
        "auto"
    }
}

/// `appProtocol`, the words of Kubernetes and those that people use. One that is not known says
/// nothing.
fn application_protocol(word: &str) -> Option<&'static str> {
    match word.to_ascii_lowercase().as_str() {
        "http" | "http1" | "http2" | "h2c" | "ws" | "kubernetes.io/h2c" | "kubernetes.io/ws" => {
            Some("http")
        }
        "grpc" | "kubernetes.io/grpc" => Some("grpc"),
        "tcp" | "tls" | "https" | "wss" | "kubernetes.io/wss" | "mysql" | "postgresql"
        | "postgres" | "redis" | "mongo" | "mongodb" | "amqp" | "kafka" | "smtp" | "ldap"
        | "ldaps" | "mqtt" | "ssh" | "ftp" => Some("tcp"),
        _ => None,
    }
}

/// The addresses at which a Service can be called.
pub(crate) fn addresses_of(service: Option<&Service>) -> impl Iterator<Item = IpAddr> + '_ {
    service
        .into_iter()
        .flat_map(|service| service.addresses.iter().copied())
}
