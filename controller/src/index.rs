//! The index: from what the cluster has to what each sidecar needs.
//!
//! Objects go in, and out come, for each sidecar, the differences between what it has and what it
//! should have. Invariants: nothing here waits, reads a clock or fails; what is gone leaves nothing
//! behind; a sidecar hears only of policies that select it, of the traffic policies of services that
//! it calls, and of destinations that it asked about.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::{core::v1, discovery::v1 as discovery, networking::v1 as networking};
use serde_json::Value;
use sidegate_api::control::{self as proto, Acknowledged};
use sidegate_mesh::resource::{Kind, ResourceKey, SYSTEM_NAMESPACE};
use sidegate_mesh::spiffe::{SpiffeId, TrustDomain};
use sidegate_mesh::workload::Enforcement;

use self::acks::Acks;
use self::addresses::Addresses;
use self::cluster::Cluster;
use self::destination::{State, World};
use self::facts::{Namespace, Node, Pod, Service, Slice};
use self::resources::{Change, Resources};
use self::sidecars::{Sent, Sidecar, Sidecars};

mod acks;
mod addresses;
mod cluster;
mod destination;
mod facts;
mod remarks;
mod resources;
mod sidecars;
mod status;

pub use addresses::Ranges;
pub use destination::{Target, TargetError};
pub use facts::{Key, Remark};
pub use remarks::{About, Note};
pub use sidecars::SidecarId;
pub use status::{Accepted, Report};

/// What the index is told once.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The mesh's trust domain.
    pub trust_domain: TrustDomain,
    /// Ranges from the configuration.
    pub ranges: Ranges,
    /// Destinations that one sidecar may follow.
    pub subscriptions_max: usize,
    /// Size at which a response is cut, in bytes.
    pub response_bytes_max: usize,
    /// Notes for the cluster that wait to be written.
    pub notes_max: usize,
}

/// Why a sidecar is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// There is no such pod, or none yet.
    #[error("there is no such pod")]
    NoPod,
    /// The pod of that name is another one.
    #[error("the pod has another UID")]
    Uid,
    /// The certificate is not of the pod's service account.
    #[error("the pod has another identity")]
    Identity,
    /// The connection comes from elsewhere.
    #[error("the connection does not come from the pod's address")]
    Address,
    /// The pod has ended.
    #[error("the pod has ended")]
    Over,
}

impl HelloError {
    /// The reason's code for metrics.
    pub fn code(self) -> &'static str {
        match self {
            Self::NoPod => "no_pod",
            Self::Uid => "uid",
            Self::Identity => "identity",
            Self::Address => "address",
            Self::Over => "over",
        }
    }

    /// Whether the watch may still show what is missing.
    pub fn may_pass(self) -> bool {
        matches!(self, Self::NoPod | Self::Uid | Self::Address)
    }
}

/// What a sidecar says of itself, and what its connection says of it.
#[derive(Clone, Debug)]
pub struct Greeting<'a> {
    /// From its certificate.
    pub id: &'a SpiffeId,
    /// From its connection.
    pub address: IpAddr,
    /// Its pod's name.
    pub pod: &'a str,
    /// Its pod's UID.
    pub uid: &'a str,
}

/// How much the index holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Sidecars that are connected.
    pub sidecars: usize,
    /// Destinations that somebody follows.
    pub destinations: usize,
    /// Our resources.
    pub resources: usize,
    /// Pods.
    pub pods: usize,
    /// Services.
    pub services: usize,
    /// Acknowledgements.
    pub acknowledgements: usize,
    /// Entries of every map together: what memory follows.
    pub entries: usize,
}

/// A destination that somebody follows.
#[derive(Debug)]
struct Followed {
    state: Arc<State>,
    /// The Service that it depends on.
    service: Option<Key>,
    followers: BTreeSet<SidecarId>,
}

/// See the module.
#[derive(Debug)]
pub struct Index {
    settings: Settings,
    cluster: Cluster,
    addresses: Addresses,
    resources: Resources,
    sidecars: Sidecars,
    followed: HashMap<Target, Followed>,
    followed_by_service: HashMap<Key, BTreeSet<Target>>,
    followed_by_address: HashMap<IpAddr, BTreeSet<Target>>,
    acks: Acks,
    /// Resources whose status may have changed.
    unreported: BTreeSet<ResourceKey>,
    notes: remarks::Notes,
    subscriptions_refused: u64,
}

impl Index {
    /// An index of nothing.
    pub fn new(settings: Settings) -> Self {
        Self {
            addresses: Addresses::new(settings.ranges.clone()),
            notes: remarks::Notes::new(settings.notes_max),
            settings,
            cluster: Cluster::default(),
            resources: Resources::default(),
            sidecars: Sidecars::default(),
            followed: HashMap::new(),
            followed_by_service: HashMap::new(),
            followed_by_address: HashMap::new(),
            acks: Acks::default(),
            unreported: BTreeSet::new(),
            subscriptions_refused: 0,
        }
    }

    /// How much there is.
    pub fn size(&self) -> Size {
        let sets = |map: &HashMap<Key, BTreeSet<Target>>| {
            map.len() + map.values().map(BTreeSet::len).sum::<usize>()
        };
        let entries = self.cluster.len()
            + self.addresses.len()
            + self.resources.len()
            + self.sidecars.size()
            + self.followed.len()
            + self
                .followed
                .values()
                .map(|one| one.followers.len())
                .sum::<usize>()
            + sets(&self.followed_by_service)
            + self
                .followed_by_address
                .values()
                .map(BTreeSet::len)
                .sum::<usize>()
            + self.acks.len()
            + self.unreported.len()
            + self.notes.len();
        Size {
            sidecars: self.sidecars.len(),
            destinations: self.followed.len(),
            resources: self.resources.len(),
            pods: self.cluster.pods().count(),
            services: self.cluster.services().count(),
            acknowledgements: self.acks.len(),
            entries,
        }
    }

    /// Subscriptions that were one too many, since the start.
    pub fn subscriptions_refused(&self) -> u64 {
        self.subscriptions_refused
    }

    /// The sidecars that have something to hear since the last time.
    pub fn take_woken(&mut self) -> BTreeSet<SidecarId> {
        self.sidecars.take_woken()
    }
}

/// Objects of the cluster.
impl Index {
    /// A namespace as it is now.
    pub fn apply_namespace(&mut self, object: &v1::Namespace) {
        if let Some(name) = object.metadata.name.as_deref() {
            self.set_namespace(name, Some(Namespace::of(object)));
        }
    }

    /// A namespace is gone.
    pub fn remove_namespace(&mut self, name: &str) {
        self.set_namespace(name, None);
    }

    /// Removes the namespaces that are not among these.
    pub fn keep_namespaces(&mut self, names: &HashSet<Key>) {
        let is_gone = |name: &&Arc<str>| !names.contains(&Key::new("", name));
        let gone: Vec<_> = self
            .cluster
            .namespaces
            .keys()
            .filter(is_gone)
            .cloned()
            .collect();
        for name in &gone {
            self.set_namespace(name, None);
        }
    }

    fn set_namespace(&mut self, name: &str, namespace: Option<Namespace>) {
        let before = self.cluster.namespaces.get(name);
        if before == namespace.as_ref() {
            return;
        }
        match namespace {
            Some(namespace) => drop(self.cluster.namespaces.insert(name.into(), namespace)),
            None => drop(self.cluster.namespaces.remove(name)),
        }
        for id in self.sidecars.of_namespace(name) {
            self.sidecars.owe(id, |sidecar| {
                sidecar.facts = true;
                // Whether calls to the outside are refused is part of the answer.
                sidecar.destinations.extend(sidecar.targets.iter().cloned());
            });
            self.reselect(id);
        }
        self.resolve_again(&self.followed.keys().cloned().collect());
        self.report_policies_of(name);
    }

    /// A node as it is now.
    pub fn apply_node(&mut self, object: &v1::Node) {
        if let Some(name) = object.metadata.name.as_deref() {
            self.set_node(name, Some(Node::of(object)));
        }
    }

    /// A node is gone.
    pub fn remove_node(&mut self, name: &str) {
        self.set_node(name, None);
    }

    /// Removes the nodes that are not among these.
    pub fn keep_nodes(&mut self, names: &HashSet<Key>) {
        let is_gone = |name: &&Arc<str>| !names.contains(&Key::new("", name));
        let gone: Vec<_> = self.addresses.nodes().filter(is_gone).cloned().collect();
        for name in &gone {
            self.set_node(name, None);
        }
    }

    fn set_node(&mut self, name: &str, node: Option<Node>) {
        if self.addresses.set_node(name, node) {
            for id in self.sidecars.all() {
                self.sidecars.owe(id, |sidecar| sidecar.facts = true);
            }
            self.ranges_changed();
        }
    }

    /// A ServiceCIDR as it is now.
    pub fn apply_service_cidr(&mut self, object: &networking::ServiceCIDR) {
        if let Some(name) = object.metadata.name.as_deref() {
            let ranges = facts::service_ranges(object);
            if self.addresses.set_services(name, Some(ranges)) {
                self.ranges_changed();
            }
        }
    }

    /// A ServiceCIDR is gone.
    pub fn remove_service_cidr(&mut self, name: &str) {
        if self.addresses.set_services(name, None) {
            self.ranges_changed();
        }
    }

    /// Removes the ServiceCIDRs that are not among these.
    pub fn keep_service_cidrs(&mut self, names: &HashSet<Key>) {
        let is_gone = |name: &&Arc<str>| !names.contains(&Key::new("", name));
        let gone: Vec<_> = self
            .addresses
            .service_ranges()
            .filter(is_gone)
            .cloned()
            .collect();
        for name in &gone {
            self.remove_service_cidr(name);
        }
    }

    fn ranges_changed(&mut self) {
        self.resolve_again(&self.followed.keys().cloned().collect());
        let kind = Kind::StaticService;
        let static_services = self.resources.keys().filter(|key| key.kind == kind);
        self.unreported.extend(static_services.cloned());
    }

    /// A pod as it is now.
    pub fn apply_pod(&mut self, object: &v1::Pod) {
        if let Some(pod) = Pod::of(object) {
            self.set_pod(&pod.key.clone(), Some(pod));
        }
    }

    /// A pod is gone.
    pub fn remove_pod(&mut self, key: &Key) {
        self.set_pod(key, None);
    }

    /// Removes the pods that are not among these.
    pub fn keep_pods(&mut self, keys: &HashSet<Key>) {
        let is_gone = |pod: &&Arc<Pod>| !keys.contains(&pod.key);
        let gone: Vec<_> = self.cluster.pods().filter(is_gone).cloned().collect();
        for pod in &gone {
            self.set_pod(&pod.key, None);
        }
    }

    fn set_pod(&mut self, key: &Key, pod: Option<Pod>) {
        if self.cluster.pod(key).map(|before| &**before) == pod.as_ref() {
            return;
        }
        let after = pod.map(Arc::new);
        let before = self.cluster.set_pod(key, after.clone());
        let counted = |pod: &Option<Arc<Pod>>| {
            let there = pod.as_ref().filter(|pod| pod.is_there());
            there.map(|pod| pod.addresses.clone()).unwrap_or_default()
        };
        let new_ranges = self.addresses.count_pod(&counted(&after), true);
        if self.addresses.count_pod(&counted(&before), false) || new_ranges {
            self.ranges_changed();
        }
        let mut targets = BTreeSet::new();
        for pod in before.iter().chain(&after) {
            for address in &pod.addresses {
                targets.extend(
                    self.followed_by_address
                        .get(address)
                        .into_iter()
                        .flatten()
                        .cloned(),
                );
            }
            for slice in self.cluster.slices_with(pod) {
                let of_service = self.followed_by_service.get(&slice.service);
                targets.extend(of_service.into_iter().flatten().cloned());
            }
        }
        self.resolve_again(&targets);
        self.pod_changed(before.as_deref(), after.as_deref());
    }

    fn pod_changed(&mut self, before: Option<&Pod>, after: Option<&Pod>) {
        let gone = before.filter(|before| after.is_none_or(|after| after.uid != before.uid));
        if let Some(gone) = gone {
            if let Some(id) = self.sidecars.of_pod(&gone.uid) {
                self.sidecars.end(id);
            }
            self.acks.forget_pod(&gone.uid);
        }
        if let Some(after) = after {
            if after.is_over {
                self.acks.forget_pod(&after.uid);
            }
            if let Some(id) = self.sidecars.of_pod(&after.uid) {
                self.sidecars.owe(id, |sidecar| sidecar.facts = true);
                self.reselect(id);
            }
            let said = before.filter(|before| before.uid == after.uid);
            let said = said.map_or(&[][..], |before| &before.remarks);
            let new = after.remarks.iter().filter(|remark| !said.contains(remark));
            let injected = self.cluster.namespaces.get(&after.key.namespace);
            if injected.is_some_and(|namespace| namespace.injected) {
                self.notes
                    .extend(new.map(|remark| remarks::of_pod(after, remark)));
            }
        }
        self.report_policies_selecting(before, after);
    }

    /// A Service as it is now.
    pub fn apply_service(&mut self, object: &v1::Service) {
        if let Some(service) = Service::of(object) {
            self.set_service(&service.key.clone(), Some(service));
        }
    }

    /// A Service is gone.
    pub fn remove_service(&mut self, key: &Key) {
        self.set_service(key, None);
    }

    /// Removes the Services that are not among these.
    pub fn keep_services(&mut self, keys: &HashSet<Key>) {
        let is_gone = |service: &&Arc<Service>| !keys.contains(&service.key);
        let gone: Vec<_> = self.cluster.services().filter(is_gone).cloned().collect();
        for service in &gone {
            self.set_service(&service.key, None);
        }
    }

    fn set_service(&mut self, key: &Key, service: Option<Service>) {
        if self.cluster.service(key).map(|before| &**before) == service.as_ref() {
            return;
        }
        let after = service.map(Arc::new);
        let before = self.cluster.set_service(key, after.clone());
        let addresses = |service: &Option<Arc<Service>>| -> Vec<IpAddr> {
            destination::addresses_of(service.as_deref()).collect()
        };
        let new_ranges = self.addresses.count_service(&addresses(&after), true);
        if self.addresses.count_service(&addresses(&before), false) || new_ranges {
            self.ranges_changed();
        }
        let mut targets: BTreeSet<Target> = BTreeSet::new();
        targets.extend(
            self.followed_by_service
                .get(key)
                .into_iter()
                .flatten()
                .cloned(),
        );
        let slices = self.cluster.slices_of(key);
        let endpoints = slices.flat_map(|slice| slice.endpoints.iter().map(|one| one.address));
        let all = addresses(&before)
            .into_iter()
            .chain(addresses(&after))
            .chain(endpoints);
        for address in all {
            targets.extend(
                self.followed_by_address
                    .get(&address)
                    .into_iter()
                    .flatten()
                    .cloned(),
            );
        }
        self.resolve_again(&targets);
        if before.is_none() || after.is_none() {
            self.unreported.extend(self.resources.traffic(key).cloned());
        }
    }

    /// An EndpointSlice as it is now.
    pub fn apply_slice(&mut self, object: &discovery::EndpointSlice) {
        if let Some(key) = Key::of(&object.metadata) {
            self.set_slice(&key, Slice::of(object));
        }
    }

    /// An EndpointSlice is gone.
    pub fn remove_slice(&mut self, key: &Key) {
        self.set_slice(key, None);
    }

    /// Removes the EndpointSlices that are not among these.
    pub fn keep_slices(&mut self, keys: &HashSet<Key>) {
        let is_gone = |slice: &&Arc<Slice>| !keys.contains(&slice.key);
        let gone: Vec<_> = self.cluster.slices().filter(is_gone).cloned().collect();
        for slice in &gone {
            self.set_slice(&slice.key, None);
        }
    }

    fn set_slice(&mut self, key: &Key, slice: Option<Slice>) {
        let after = slice.map(Arc::new);
        let before = self.cluster.set_slice(key, after.clone());
        if before == after {
            return;
        }
        let mut targets = BTreeSet::new();
        for slice in before.iter().chain(&after) {
            let of_service = self.followed_by_service.get(&slice.service);
            targets.extend(of_service.into_iter().flatten().cloned());
            // A pod's own address is called by the name of its Service.
            for endpoint in &slice.endpoints {
                let at = self.followed_by_address.get(&endpoint.address);
                targets.extend(at.into_iter().flatten().cloned());
            }
        }
        self.resolve_again(&targets);
    }

    /// One of our resources as it is now, whatever it looks like.
    pub fn apply_resource(&mut self, key: &ResourceKey, object: &Value) {
        let service = self.resources.service(key);
        let uid = self.resources.get(key).map(|held| Arc::clone(&held.uid));
        let change = self.resources.apply(key, object);
        let Some(held) = self.resources.get(key) else {
            return;
        };
        self.unreported.insert(key.clone());
        let Change::Content { is_newly_refused } = change else {
            return;
        };
        if let Some(uid) = uid.filter(|uid| *uid != held.uid) {
            self.acks.forget_resource(&uid);
        }
        if is_newly_refused {
            self.notes.extend([remarks::of_resource(key, held)]);
        }
        self.resource_changed(key, service);
    }

    /// One of our resources is gone.
    pub fn remove_resource(&mut self, key: &ResourceKey) {
        let service = self.resources.service(key);
        let uid = self.resources.get(key).map(|held| Arc::clone(&held.uid));
        if self.resources.remove(key) {
            if let Some(uid) = uid {
                self.acks.forget_resource(&uid);
            }
            self.unreported.remove(key);
            self.resource_changed(key, service);
        }
    }

    /// The resources of one kind that are not among these.
    pub fn resources_beside(&self, kind: Kind, keys: &HashSet<Key>) -> Vec<ResourceKey> {
        let is_gone = |key: &&ResourceKey| {
            key.kind == kind && !keys.contains(&Key::new(&key.namespace, &key.name))
        };
        self.resources.keys().filter(is_gone).cloned().collect()
    }

    fn resource_changed(&mut self, key: &ResourceKey, service_before: Option<Key>) {
        let concerned = match key.kind {
            Kind::StaticService => Vec::new(),
            Kind::AuthorizationPolicy if key.namespace == SYSTEM_NAMESPACE => self.sidecars.all(),
            Kind::AuthorizationPolicy => self.sidecars.of_namespace(&key.namespace),
            Kind::TrafficPolicy => {
                let services = service_before
                    .into_iter()
                    .chain(self.resources.service(key));
                let targets = services.filter_map(|service| self.followed_by_service.get(&service));
                let followed = targets
                    .flatten()
                    .filter_map(|target| self.followed.get(target));
                let ids: BTreeSet<SidecarId> = followed
                    .flat_map(|followed| followed.followers.iter().copied())
                    .collect();
                ids.into_iter().collect()
            }
        };
        for id in concerned {
            if self
                .sidecars
                .get(id)
                .is_some_and(|one| self.differs(one, key))
            {
                self.sidecars.owe(id, |sidecar| {
                    sidecar.resources.insert(key.clone());
                });
            }
        }
        if key.kind == Kind::AuthorizationPolicy {
            self.report_policies_of(&key.namespace);
        }
        if key.kind == Kind::TrafficPolicy {
            let services = self.resources.service(key);
            let siblings = services
                .iter()
                .flat_map(|service| self.resources.traffic(service));
            self.unreported
                .extend(siblings.cloned().collect::<Vec<_>>());
        }
    }
}

/// Sidecars.
impl Index {
    /// Checks who a sidecar is.
    ///
    /// # Errors
    ///
    /// [`HelloError`]; some of them may pass when the watch shows more.
    pub fn check(&self, greeting: &Greeting<'_>) -> Result<Key, HelloError> {
        let (namespace, service_account) = greeting.id.workload().ok_or(HelloError::Identity)?;
        if greeting.id.trust_domain() != self.settings.trust_domain.as_str() {
            return Err(HelloError::Identity);
        }
        // The namespace is that of the certificate, so no pod of another one can be meant.
        let key = Key::new(namespace, greeting.pod);
        let pod = self.cluster.pod(&key).ok_or(HelloError::NoPod)?;
        if *pod.uid != *greeting.uid {
            return Err(HelloError::Uid);
        }
        if *pod.service_account != *service_account {
            return Err(HelloError::Identity);
        }
        if pod.is_over {
            return Err(HelloError::Over);
        }
        if !pod.addresses.contains(&greeting.address.to_canonical()) {
            return Err(HelloError::Address);
        }
        Ok(key)
    }

    /// A sidecar comes; what it is owed is everything. An older stream of the same pod ends.
    ///
    /// # Errors
    ///
    /// As [`Self::check`].
    pub fn connect(&mut self, greeting: &Greeting<'_>) -> Result<SidecarId, HelloError> {
        let key = self.check(greeting)?;
        let sidecar = Sidecar::new(key, greeting.uid.into());
        let id = self.sidecars.add(sidecar);
        self.reselect(id);
        self.sidecars.owe(id, |_| {});
        Ok(id)
    }

    /// A sidecar's stream has ended. What it acknowledged still holds.
    pub fn disconnect(&mut self, id: SidecarId) {
        if let Some(sidecar) = self.sidecars.remove(id) {
            for target in &sidecar.targets {
                self.unfollow(id, target);
            }
        }
    }

    /// Whether a sidecar's stream has to end: its pod is gone, or it has come again.
    pub fn is_over(&self, id: SidecarId) -> bool {
        self.sidecars.get(id).is_none_or(|sidecar| sidecar.is_over)
    }

    /// A sidecar asks about a destination, from now on. One too many is answered as unknown.
    pub fn subscribe(&mut self, id: SidecarId, target: Target) {
        let max = self.settings.subscriptions_max;
        let Some(sidecar) = self.sidecars.get_mut(id) else {
            return;
        };
        if !sidecar.targets.contains(&target) && sidecar.targets.len() >= max {
            self.subscriptions_refused += 1;
            self.sidecars.owe(id, |sidecar| sidecar.refuse(target));
            return;
        }
        let is_new = sidecar.targets.insert(target.clone());
        self.sidecars
            .owe(id, |sidecar| sidecar.destinations.insert(target.clone()));
        if is_new {
            self.follow(id, &target);
        }
    }

    /// A sidecar needs a destination no more.
    pub fn unsubscribe(&mut self, id: SidecarId, target: &Target) {
        let Some(sidecar) = self.sidecars.get_mut(id) else {
            return;
        };
        sidecar.destinations.remove(target);
        if sidecar.targets.remove(target) {
            let service = self.unfollow(id, target);
            self.count_service(id, service.as_ref(), None);
        }
    }

    fn follow(&mut self, id: SidecarId, target: &Target) {
        if !self.followed.contains_key(target) {
            let (state, service) = self.world().resolve(target);
            if let Some(service) = &service {
                let targets = self.followed_by_service.entry(service.clone());
                targets.or_default().insert(target.clone());
            }
            if let Target::Address(address) = target {
                let targets = self.followed_by_address.entry(address.ip());
                targets.or_default().insert(target.clone());
            }
            let followed = Followed {
                state: Arc::new(state),
                service,
                followers: BTreeSet::new(),
            };
            self.followed.insert(target.clone(), followed);
        }
        if let Some(followed) = self.followed.get_mut(target) {
            followed.followers.insert(id);
            let service = followed.state.service().cloned();
            self.count_service(id, None, service.as_ref());
        }
    }

    /// Returns the Service whose traffic policies counted for that destination.
    fn unfollow(&mut self, id: SidecarId, target: &Target) -> Option<Key> {
        let followed = self.followed.get_mut(target)?;
        followed.followers.remove(&id);
        let service = followed.state.service().cloned();
        if followed.followers.is_empty() {
            let depended = followed.service.take();
            self.followed.remove(target);
            if let Some(depended) = depended {
                forget(&mut self.followed_by_service, &depended, target);
            }
            if let Target::Address(address) = target {
                forget(&mut self.followed_by_address, &address.ip(), target);
            }
        }
        service
    }

    /// One of a sidecar's destinations is now of another Service.
    fn count_service(&mut self, id: SidecarId, before: Option<&Key>, after: Option<&Key>) {
        if before == after {
            return;
        }
        let Some(sidecar) = self.sidecars.get_mut(id) else {
            return;
        };
        let mut changed = Vec::new();
        if let Some(after) = after {
            let number = sidecar.services.entry(after.clone()).or_default();
            *number += 1;
            if *number == 1 {
                changed.push(after.clone());
            }
        }
        if let Some(before) = before
            && let Some(number) = sidecar.services.get_mut(before)
        {
            *number -= 1;
            if *number == 0 {
                sidecar.services.remove(before);
                changed.push(before.clone());
            }
        }
        let policies = changed
            .iter()
            .flat_map(|service| self.resources.traffic(service));
        let policies: Vec<ResourceKey> = policies.cloned().collect();
        if !policies.is_empty() {
            self.sidecars
                .owe(id, |sidecar| sidecar.resources.extend(policies));
        }
    }

    fn resolve_again(&mut self, targets: &BTreeSet<Target>) {
        for target in targets {
            let (state, service) = self.world().resolve(target);
            let Some(followed) = self.followed.get_mut(target) else {
                continue;
            };
            let depended = std::mem::replace(&mut followed.service, service.clone());
            if depended != service {
                if let Some(depended) = depended {
                    forget(&mut self.followed_by_service, &depended, target);
                }
                if let Some(service) = service {
                    let targets = self.followed_by_service.entry(service);
                    targets.or_default().insert(target.clone());
                }
            }
            if *followed.state == state {
                continue;
            }
            let before = std::mem::replace(&mut followed.state, Arc::new(state));
            let after = followed.state.service().cloned();
            for id in followed.followers.clone() {
                self.sidecars
                    .owe(id, |sidecar| sidecar.destinations.insert(target.clone()));
                self.count_service(id, before.service(), after.as_ref());
            }
        }
    }

    fn world(&self) -> World<'_> {
        World {
            cluster: &self.cluster,
            addresses: &self.addresses,
            trust_domain: &self.settings.trust_domain,
        }
    }

    /// Compares what selects a sidecar with what it has.
    fn reselect(&mut self, id: SidecarId) {
        let Some(sidecar) = self.sidecars.get(id) else {
            return;
        };
        let policies = self
            .resources
            .policies(&sidecar.pod.namespace)
            .map(|(key, _)| key);
        let keys: BTreeSet<&ResourceKey> = sidecar.sent.keys().chain(policies).collect();
        let owed = keys.into_iter().filter(|key| self.differs(sidecar, key));
        let owed: Vec<ResourceKey> = owed.cloned().collect();
        if !owed.is_empty() {
            self.sidecars
                .owe(id, |sidecar| sidecar.resources.extend(owed));
        }
    }

    /// What a sidecar should have of a resource.
    fn wanted(&self, sidecar: &Sidecar, key: &ResourceKey) -> Option<Sent> {
        let held = self.resources.get(key)?;
        let is_wanted = match key.kind {
            Kind::StaticService => false,
            Kind::TrafficPolicy => {
                let service = self.resources.service(key);
                service.is_some_and(|service| sidecar.services.contains_key(&service))
            }
            Kind::AuthorizationPolicy => {
                let namespace = self.cluster.namespaces.get(&sidecar.pod.namespace);
                let pod = self.cluster.pod(&sidecar.pod);
                pod.is_some_and(|pod| held.selects(&key.namespace, pod, namespace))
            }
        };
        let version = held.version();
        is_wanted.then(|| Sent {
            uid: Arc::clone(&held.uid),
            generation: version.generation,
            json: Arc::clone(&version.json),
        })
    }

    fn differs(&self, sidecar: &Sidecar, key: &ResourceKey) -> bool {
        self.wanted(sidecar, key).as_ref() != sidecar.sent.get(key)
    }

    /// What a sidecar has to hear next, as far as it fits; `None`: nothing.
    pub fn take(&mut self, id: SidecarId) -> Option<proto::WatchResponse> {
        let sidecar = self.sidecars.get(id)?;
        if sidecar.is_over || !sidecar.is_owed() {
            return None;
        }
        let mut response = proto::WatchResponse {
            workload: self.take_facts(id),
            ..Default::default()
        };
        let mut room = self.settings.response_bytes_max;
        self.take_resources(id, &mut response, &mut room);
        self.take_destinations(id, &mut response, &mut room);
        let sidecar = self.sidecars.get_mut(id)?;
        let is_first_complete = !sidecar.complete && sidecar.resources.is_empty();
        sidecar.complete |= is_first_complete;
        let says_something = is_first_complete
            || response.workload.is_some()
            || !response.updated.is_empty()
            || !response.removed.is_empty()
            || !response.destinations.is_empty();
        if !says_something {
            return None;
        }
        sidecar.version += 1;
        response.version = sidecar.version;
        response.complete = sidecar.complete;
        Some(response)
    }

    fn take_facts(&mut self, id: SidecarId) -> Option<proto::Workload> {
        let sidecar = self.sidecars.get(id)?;
        let pod = self.cluster.pod(&sidecar.pod)?;
        let namespace = self.cluster.namespaces.get(&pod.key.namespace);
        let enforcement = namespace.map_or(Enforcement::Enforce, |known| known.enforcement);
        let facts = proto::Workload {
            labels: pod.labels.clone().into_iter().collect(),
            enforcement: match enforcement {
                Enforcement::Enforce => "enforce".to_owned(),
                Enforcement::Audit => "audit".to_owned(),
            },
            zone: self
                .addresses
                .zone(pod.node.as_ref())
                .map(|zone| zone.as_ref().to_owned())
                .unwrap_or_default(),
            terminating: pod.is_terminating,
        };
        let sidecar = self.sidecars.get_mut(id)?;
        sidecar.facts = false;
        if sidecar.workload.as_ref() == Some(&facts) {
            return None;
        }
        let moved = sidecar
            .workload
            .as_ref()
            .is_some_and(|before| before.zone != facts.zone);
        if moved {
            sidecar.destinations.extend(sidecar.targets.iter().cloned());
        }
        sidecar.workload = Some(facts.clone());
        Some(facts)
    }

    fn take_resources(
        &mut self,
        id: SidecarId,
        response: &mut proto::WatchResponse,
        room: &mut usize,
    ) {
        while *room > 0
            && let Some(key) = self
                .sidecars
                .get_mut(id)
                .and_then(|one| one.resources.pop_first())
        {
            let Some(sidecar) = self.sidecars.get(id) else {
                return;
            };
            let wanted = self.wanted(sidecar, &key);
            let before = sidecar.sent.get(&key).cloned();
            let pod = Arc::clone(&sidecar.pod_uid);
            if wanted == before {
                continue;
            }
            let other = before.filter(|before| {
                wanted
                    .as_ref()
                    .is_none_or(|wanted| wanted.uid != before.uid)
            });
            if let Some(other) = other {
                self.acks.withdraw(&pod, &other.uid);
                response.removed.push(reference(&key, &other.uid));
                *room = room.saturating_sub(128);
            }
            if let Some(sent) = &wanted {
                *room = room.saturating_sub(sent.json.len() + 128);
                response.updated.push(proto::Resource {
                    reference: Some(reference(&key, &sent.uid)),
                    generation: sent.generation,
                    json: sent.json.to_vec(),
                });
                self.acks.sent(&pod, &sent.uid);
            }
            self.report_again(&key);
            if let Some(sidecar) = self.sidecars.get_mut(id) {
                match wanted {
                    Some(sent) => drop(sidecar.sent.insert(key, sent)),
                    None => drop(sidecar.sent.remove(&key)),
                }
            }
        }
    }

    fn take_destinations(
        &mut self,
        id: SidecarId,
        response: &mut proto::WatchResponse,
        room: &mut usize,
    ) {
        while *room > 0
            && let Some(target) = self
                .sidecars
                .get_mut(id)
                .and_then(|one| one.destinations.pop_first())
        {
            let Some(sidecar) = self.sidecars.get(id) else {
                return;
            };
            let namespace = self.cluster.namespaces.get(&sidecar.pod.namespace);
            let denied = namespace.is_some_and(|namespace| namespace.egress_denied);
            let pod = self.cluster.pod(&sidecar.pod);
            let zone = pod.and_then(|pod| self.addresses.zone(pod.node.as_ref()));
            let follows = sidecar.targets.contains(&target);
            let followed = self.followed.get(&target).filter(|_| follows);
            let state = followed.map_or(&State::Unknown, |followed| &followed.state);
            let message = state.message(&target, zone.map(|zone| &**zone), denied);
            *room = room.saturating_sub(size_of(&message));
            response.destinations.push(message);
        }
    }

    /// A sidecar has put a version of a resource to use, or refuses it. Whether it has that version.
    pub fn acknowledge(&mut self, id: SidecarId, said: &proto::Acknowledge) -> bool {
        let Some(sidecar) = self.sidecars.get(id) else {
            return false;
        };
        let Some(key) = self.resources.key_of(&said.uid) else {
            return false;
        };
        let sent = sidecar.sent.get(key).filter(|sent| *sent.uid == *said.uid);
        // The word about a version may cross with a newer one.
        let Some(sent) = sent.filter(|sent| said.generation <= sent.generation) else {
            return false;
        };
        let pair = (&Arc::clone(&sidecar.pod_uid), &Arc::clone(&sent.uid));
        if self.acks.acknowledge(pair, said.generation, &said.refusal) {
            self.unreported.insert(key.clone());
        }
        true
    }
}

/// What replicas tell one another.
impl Index {
    /// What a sidecar of another replica has. Whether its pod and the resource are known here.
    pub fn hear(&mut self, said: &Acknowledged) -> bool {
        let pod = self.cluster.pod_by_uid(&said.pod_uid);
        let key = self.resources.key_of(&said.resource_uid);
        let (Some(pod), Some(key)) = (pod, key) else {
            return false;
        };
        let (is_over, key) = (pod.is_over, key.clone());
        if !is_over && self.acks.hear(said) {
            self.unreported.insert(key);
        }
        true
    }

    /// The leader could not place this yet: it is told again, if it still holds.
    pub fn tell_again(&mut self, said: &Acknowledged) {
        self.acks.tell_again(said);
    }

    /// Everything that this replica's sidecars have, for a leader that knows nothing yet.
    pub fn own_acknowledgements(&mut self) -> Vec<Acknowledged> {
        self.acks.own()
    }

    /// At most `max` of what changed since.
    pub fn untold_acknowledgements(&mut self, max: usize) -> Vec<Acknowledged> {
        self.acks.untold(max)
    }

    /// This replica is the leader: it has nobody to tell.
    pub fn acknowledgements_told(&mut self) {
        self.acks.all_told();
    }
}

fn reference(key: &ResourceKey, uid: &str) -> proto::ResourceReference {
    proto::ResourceReference {
        kind: key.kind.as_str().to_owned(),
        namespace: key.namespace.clone(),
        name: key.name.clone(),
        uid: uid.to_owned(),
    }
}

/// About how large a destination is on the wire.
fn size_of(message: &proto::Destination) -> usize {
    let endpoints = match &message.kind {
        Some(proto::destination::Kind::Meshed(meshed)) => meshed.endpoints.len(),
        _ => 0,
    };
    message.destination.len() + 64 + endpoints * 160
}

fn forget<K: std::hash::Hash + Eq, V: Ord>(map: &mut HashMap<K, BTreeSet<V>>, key: &K, value: &V) {
    if let Some(values) = map.get_mut(key) {
        values.remove(value);
        if values.is_empty() {
            map.remove(key);
        }
    }
}
