//! What each connected sidecar has, and what it has yet to be told.
//!
//! Invariant: what is to be told is a set of keys, and each key is told in its state of the moment
//! in which the sidecar is ready to hear it: a slow reader costs no more than a fast one.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use sidegate_api::control as proto;
use sidegate_mesh::resource::ResourceKey;

use super::destination::Target;
use super::facts::Key;

/// Names one stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SidecarId(u64);

/// Most destinations beyond the bound that are answered at a time.
const REFUSED_MAX: usize = 64;

/// A resource as it was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sent {
    pub uid: Arc<str>,
    pub generation: i64,
    pub json: Arc<[u8]>,
}

/// One sidecar.
#[derive(Debug)]
pub(crate) struct Sidecar {
    pub pod: Key,
    pub pod_uid: Arc<str>,
    /// What it has.
    pub sent: BTreeMap<ResourceKey, Sent>,
    pub workload: Option<proto::Workload>,
    /// What it follows.
    pub targets: BTreeSet<Target>,
    /// Whose traffic policies it gets, and for how many of its destinations.
    pub services: BTreeMap<Key, usize>,
    /// What it is to be told.
    pub resources: BTreeSet<ResourceKey>,
    pub destinations: BTreeSet<Target>,
    pub facts: bool,
    /// Whether everything that selects it was sent once.
    pub complete: bool,
    pub version: u64,
    /// Its pod is gone, or it has come again by another stream.
    pub is_over: bool,
}

impl Sidecar {
    pub(crate) fn new(pod: Key, pod_uid: Arc<str>) -> Self {
        Self {
            pod,
            pod_uid,
            sent: BTreeMap::new(),
            workload: None,
            targets: BTreeSet::new(),
            services: BTreeMap::new(),
            resources: BTreeSet::new(),
            destinations: BTreeSet::new(),
            facts: true,
            complete: false,
            version: 0,
            is_over: false,
        }
    }

    /// Whether there is something to tell.
    pub(crate) fn is_owed(&self) -> bool {
        self.facts || !self.complete || !self.resources.is_empty() || !self.destinations.is_empty()
    }

    /// Notes a destination that is too many, to be answered as unknown. Whether there was room.
    pub(crate) fn refuse(&mut self, target: Target) -> bool {
        let refused = self.destinations.len().saturating_sub(self.targets.len());
        refused < REFUSED_MAX && self.destinations.insert(target)
    }
}

/// Every sidecar that is connected to this replica.
#[derive(Debug, Default)]
pub(crate) struct Sidecars {
    by_id: HashMap<SidecarId, Sidecar>,
    by_pod: HashMap<Arc<str>, SidecarId>,
    by_namespace: HashMap<Arc<str>, BTreeSet<SidecarId>>,
    woken: BTreeSet<SidecarId>,
    last: u64,
}

impl Sidecars {
    pub(crate) fn get(&self, id: SidecarId) -> Option<&Sidecar> {
        self.by_id.get(&id)
    }

    pub(crate) fn get_mut(&mut self, id: SidecarId) -> Option<&mut Sidecar> {
        self.by_id.get_mut(&id)
    }

    pub(crate) fn of_pod(&self, uid: &str) -> Option<SidecarId> {
        self.by_pod.get(uid).copied()
    }

    pub(crate) fn of_namespace(&self, namespace: &str) -> Vec<SidecarId> {
        let ids = self.by_namespace.get(namespace);
        ids.into_iter().flatten().copied().collect()
    }

    pub(crate) fn all(&self) -> Vec<SidecarId> {
        self.by_id.keys().copied().collect()
    }

    pub(crate) fn add(&mut self, sidecar: Sidecar) -> SidecarId {
        self.last += 1;
        let id = SidecarId(self.last);
        if let Some(before) = self.by_pod.insert(Arc::clone(&sidecar.pod_uid), id) {
            self.end(before);
        }
        let namespace = Arc::clone(&sidecar.pod.namespace);
        self.by_namespace.entry(namespace).or_default().insert(id);
        self.by_id.insert(id, sidecar);
        id
    }

    pub(crate) fn remove(&mut self, id: SidecarId) -> Option<Sidecar> {
        let sidecar = self.by_id.remove(&id)?;
        if self.by_pod.get(&sidecar.pod_uid) == Some(&id) {
            self.by_pod.remove(&sidecar.pod_uid);
        }
        if let Some(ids) = self.by_namespace.get_mut(&sidecar.pod.namespace) {
            ids.remove(&id);
            if ids.is_empty() {
                self.by_namespace.remove(&sidecar.pod.namespace);
            }
        }
        self.woken.remove(&id);
        Some(sidecar)
    }

    /// Its stream has to end.
    pub(crate) fn end(&mut self, id: SidecarId) {
        if let Some(sidecar) = self.by_id.get_mut(&id) {
            sidecar.is_over = true;
            self.woken.insert(id);
        }
    }

    /// Changes what a sidecar is to be told, and wakes it.
    pub(crate) fn owe<T>(&mut self, id: SidecarId, change: impl FnOnce(&mut Sidecar) -> T) {
        if let Some(sidecar) = self.by_id.get_mut(&id) {
            drop(change(sidecar));
            self.woken.insert(id);
        }
    }

    pub(crate) fn take_woken(&mut self) -> BTreeSet<SidecarId> {
        std::mem::take(&mut self.woken)
    }

    pub(crate) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Entries of every map together.
    pub(crate) fn size(&self) -> usize {
        let of = |sidecar: &Sidecar| {
            sidecar.sent.len()
                + sidecar.targets.len()
                + sidecar.services.len()
                + sidecar.resources.len()
                + sidecar.destinations.len()
        };
        self.by_id.values().map(of).sum::<usize>()
            + self.by_id.len()
            + self.by_pod.len()
            + self.by_namespace.values().map(BTreeSet::len).sum::<usize>()
            + self.woken.len()
    }
}
