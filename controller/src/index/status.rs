//! What became of each resource: accepted or not, and live on how many sidecars.
//!
//! Invariant: a report is about one generation; who has acknowledged an earlier one does not count.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use serde_json::Value;
use sidegate_mesh::policy::Policy;
use sidegate_mesh::resource::{Kind, Problem, Resource, ResourceKey, SYSTEM_NAMESPACE};
use sidegate_mesh::spiffe::SpiffeId;
use sidegate_mesh::store::ResourceSet;
use sidegate_mesh::workload::{Enforcement, Workload, WorkloadPort};

use super::Index;
use super::addresses::Owner;
use super::facts::Pod;
use super::resources::Held;

/// Kinds of workloads for which warnings are looked for.
const WORKLOADS_MAX: usize = 4;
/// Longest message, in bytes.
const MESSAGE_BYTES_MAX: usize = 1_024;

/// Whether a resource can be put to use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// It can; what is probably not meant so is in these words.
    Yes(Vec<String>),
    /// It cannot.
    No {
        /// One word for machines.
        reason: &'static str,
        /// Field and message.
        message: String,
    },
}

/// What became of one resource.
#[derive(Clone, Debug)]
pub struct Report {
    /// Which one.
    pub key: ResourceKey,
    /// Its UID.
    pub uid: String,
    /// The generation that this is about.
    pub generation: i64,
    /// The version of the object that this was made from.
    pub resource_version: String,
    /// The status that the object has.
    pub status: Value,
    /// Whether it can be put to use.
    pub accepted: Accepted,
    /// Sidecars that it concerns.
    pub selected: usize,
    /// Those that have put this generation to use.
    pub live: usize,
    /// Those that refuse this generation.
    pub refused: usize,
    /// The words of one that refuses.
    pub refusal: Option<String>,
    /// What else selects some of the workloads, for the warnings.
    compared: Vec<(Workload, Vec<Arc<Resource>>)>,
}

impl Report {
    /// What is probably not meant so: rules that never match, ports that no workload has, policies
    /// that contradict one another. Compiles, so it takes its time.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = match &self.accepted {
            Accepted::Yes(warnings) => warnings.clone(),
            Accepted::No { .. } => return Vec::new(),
        };
        for (workload, resources) in &self.compared {
            let all = resources.iter().map(|resource| Resource::clone(resource));
            let (_, problems) = Policy::compile(&ResourceSet::new(all), workload);
            for problem in problems {
                let text = problem.sentence();
                if problem.resource.as_ref() == Some(&self.key) && !warnings.contains(&text) {
                    warnings.push(text);
                }
            }
        }
        warnings
    }
}

impl Index {
    /// At most `max` resources whose status may have changed.
    pub fn take_unreported(&mut self, max: usize) -> Vec<ResourceKey> {
        let keys: Vec<ResourceKey> = self.unreported.iter().take(max).cloned().collect();
        for key in &keys {
            self.unreported.remove(key);
        }
        keys
    }

    /// The status of a resource may have changed, or could not be written.
    pub fn report_again(&mut self, key: &ResourceKey) {
        if self.resources.get(key).is_some() {
            self.unreported.insert(key.clone());
        }
    }

    /// Every status may have changed.
    pub fn report_everything(&mut self) {
        self.unreported.extend(self.resources.keys().cloned());
    }

    pub(super) fn report_policies_of(&mut self, namespace: &str) {
        let kind = Kind::AuthorizationPolicy;
        for namespace in [namespace, SYSTEM_NAMESPACE] {
            let keys = self
                .resources
                .of(kind, namespace)
                .map(|(key, _)| key.clone());
            self.unreported.extend(keys.collect::<Vec<_>>());
        }
    }

    /// A pod changed: every policy that selects it, or did, counts again.
    pub(super) fn report_policies_selecting(&mut self, before: Option<&Pod>, after: Option<&Pod>) {
        let Some(any) = before.or(after) else {
            return;
        };
        let facts = |pod: &Pod| (self.counts(pod), Arc::clone(&pod.uid), pod.labels.clone());
        if before.map(facts) == after.map(facts) {
            return;
        }
        let namespace = self.cluster.namespaces.get(&any.key.namespace);
        let selects = |key: &ResourceKey, held: &Held| {
            let pods = before.iter().chain(&after);
            let mut meshed = pods.filter(|pod| self.cluster.is_meshed(pod));
            meshed.any(|pod| held.selects(&key.namespace, pod, namespace))
        };
        let policies = self.resources.policies(&any.key.namespace);
        let concerned = policies.filter(|(key, held)| selects(key, held));
        let keys: Vec<ResourceKey> = concerned.map(|(key, _)| key.clone()).collect();
        self.unreported.extend(keys);
        let gone = before.filter(|gone| after.is_none_or(|after| after.uid != gone.uid));
        if gone.is_some() {
            let kind = Kind::TrafficPolicy;
            let traffic = self.resources.keys().filter(|key| key.kind == kind);
            self.unreported.extend(traffic.cloned().collect::<Vec<_>>());
        }
    }

    /// Whether a pod is a sidecar that can put something to use.
    fn counts(&self, pod: &Pod) -> bool {
        self.cluster.is_meshed(pod) && pod.is_there() && !pod.is_terminating
    }

    /// What became of a resource; `None` when it is gone.
    pub fn report(&self, key: &ResourceKey) -> Option<Report> {
        let held = self.resources.get(key)?;
        let mut report = Report {
            key: key.clone(),
            uid: held.uid.as_ref().to_owned(),
            generation: held.generation,
            resource_version: held.resource_version.clone(),
            status: held.status.clone(),
            accepted: self.accepted(key, held),
            selected: 0,
            live: 0,
            refused: 0,
            refusal: None,
            compared: Vec::new(),
        };
        match key.kind {
            Kind::AuthorizationPolicy => {
                let selected = self.selected(key, held);
                for pod in &selected {
                    self.count(&mut report, held, pod);
                }
                report.compared = self.compared(&selected);
            }
            Kind::TrafficPolicy => {
                let pods = self.acks.of(&held.uid).map(|(pod, _)| pod);
                let pods = pods.filter_map(|pod| self.cluster.pod_by_uid(pod));
                for pod in pods.filter(|pod| self.counts(pod)) {
                    self.count(&mut report, held, pod);
                }
            }
            Kind::StaticService => {}
        }
        Some(report)
    }

    fn count(&self, report: &mut Report, held: &Held, pod: &Pod) {
        report.selected += 1;
        let ack = self.acks.get(&held.uid, &pod.uid);
        let Some(ack) = ack.filter(|ack| ack.generation == held.generation) else {
            return;
        };
        if ack.refusal.is_empty() {
            report.live += 1;
        } else {
            report.refused += 1;
            report
                .refusal
                .get_or_insert_with(|| format!("{}: {}", pod.key, ack.refusal));
        }
    }

    fn selected(&self, key: &ResourceKey, held: &Held) -> Vec<&Arc<Pod>> {
        let selects = |pod: &&Arc<Pod>| {
            let namespace = self.cluster.namespaces.get(&pod.key.namespace);
            self.counts(pod) && held.selects(&key.namespace, pod, namespace)
        };
        if key.namespace == SYSTEM_NAMESPACE {
            self.cluster.pods().filter(selects).collect()
        } else {
            self.cluster
                .pods_of(&key.namespace)
                .filter(selects)
                .collect()
        }
    }

    fn accepted(&self, key: &ResourceKey, held: &Held) -> Accepted {
        if !held.is_accepted() {
            return Accepted::No {
                reason: "Invalid",
                message: text_of(&held.problems),
            };
        }
        match held.resource() {
            Some(Resource::StaticService(service)) => {
                let endpoints = service.spec.endpoints.iter().enumerate();
                let refused = endpoints
                    .filter_map(|(index, endpoint)| {
                        Some((index, self.forbidden(endpoint.address)?))
                    })
                    .map(|(index, why)| format!("spec.endpoints[{index}].address: {why}"));
                let refused: Vec<String> = refused.collect();
                if refused.is_empty() {
                    Accepted::Yes(vec![
                        "in a cluster only Services have addresses: no call is sent by this one"
                            .to_owned(),
                    ])
                } else {
                    Accepted::No {
                        reason: "AddressNotAllowed",
                        message: cut(&refused.join("; ")),
                    }
                }
            }
            Some(Resource::TrafficPolicy(policy)) => {
                let service = super::Key::new(&key.namespace, &policy.spec.service);
                let mut warnings = Vec::new();
                if self.cluster.service(&service).is_none() {
                    warnings.push(format!("spec.service: there is no service {service}"));
                }
                let first = self.resources.traffic(&service).next();
                if let Some(first) = first.filter(|first| *first != key) {
                    warnings.push(format!(
                        "spec.service: {service} already has the traffic policy `{}`, so this one does nothing",
                        first.name
                    ));
                }
                Accepted::Yes(warnings)
            }
            _ => Accepted::Yes(Vec::new()),
        }
    }

    /// Why an address may not be an endpoint that is listed by hand.
    fn forbidden(&self, address: SocketAddr) -> Option<&'static str> {
        let ip = address.ip().to_canonical();
        let is_link_local = match ip {
            std::net::IpAddr::V4(ip) => ip.is_link_local(),
            std::net::IpAddr::V6(ip) => ip.is_unicast_link_local(),
        };
        match self.addresses.owner(ip) {
            _ if is_link_local => Some("a link-local address is no endpoint in a cluster"),
            Owner::Nobody => Some("a loopback or multicast address is no endpoint in a cluster"),
            Owner::Node => Some("a node's address is no endpoint"),
            Owner::Cluster => Some("an address of the cluster's own ranges is no endpoint"),
            Owner::Outside => None,
        }
    }

    /// Some different workloads, each with the policies that select it.
    fn compared(&self, selected: &[&Arc<Pod>]) -> Vec<(Workload, Vec<Arc<Resource>>)> {
        type Shape<'a> = (&'a str, &'a BTreeMap<String, String>, &'a [WorkloadPort]);
        let mut shapes: Vec<Shape<'_>> = Vec::new();
        let mut compared = Vec::new();
        for pod in selected {
            let shape: Shape<'_> = (&pod.key.namespace, &pod.labels, &pod.ports);
            if shapes.len() >= WORKLOADS_MAX || shapes.contains(&shape) {
                continue;
            }
            shapes.push(shape);
            let namespace = self.cluster.namespaces.get(&pod.key.namespace);
            let policies = self.resources.policies(&pod.key.namespace);
            let selecting =
                policies.filter(|(key, held)| held.selects(&key.namespace, pod, namespace));
            let resources = selecting.filter_map(|(_, held)| held.shared()).collect();
            let trust_domain = &self.settings.trust_domain;
            let id = SpiffeId::for_workload(trust_domain, &pod.key.namespace, &pod.service_account);
            let Ok(id) = id else { continue };
            let workload = Workload {
                id,
                trust_domain: trust_domain.clone(),
                namespace: pod.key.namespace.as_ref().to_owned(),
                labels: pod.labels.clone(),
                ports: pod.ports.clone(),
                enforcement: Enforcement::Enforce,
            };
            compared.push((workload, resources));
        }
        compared
    }
}

/// Problems as one text: each with its field.
pub(super) fn text_of(problems: &[Problem]) -> String {
    let texts: Vec<String> = problems.iter().map(Problem::sentence).collect();
    cut(&texts.join("; "))
}

fn cut(text: &str) -> String {
    let mut end = text.len().min(MESSAGE_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default().to_owned()
}
