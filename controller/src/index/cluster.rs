//! Pods, Services and slices, and what leads from one to the other.
//!
//! Invariants: each map follows the objects exactly, so what is gone leaves nothing behind; an
//! endpoint is a pod only when slice and pod agree on namespace, UID and address.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

use super::facts::{Key, Namespace, Pod, Service, Slice, SliceEndpoint};

/// The objects that destinations are made of.
#[derive(Debug, Default)]
pub(crate) struct Cluster {
    pub namespaces: HashMap<Arc<str>, Namespace>,
    pods: HashMap<Key, Arc<Pod>>,
    pods_by_uid: HashMap<Arc<str>, Key>,
    pods_by_address: HashMap<IpAddr, BTreeSet<Key>>,
    pods_by_namespace: HashMap<Arc<str>, BTreeSet<Arc<str>>>,
    services: HashMap<Key, Arc<Service>>,
    services_by_address: HashMap<IpAddr, BTreeSet<Key>>,
    slices: HashMap<Key, Arc<Slice>>,
    slices_by_service: HashMap<Key, BTreeSet<Key>>,
    /// The slices that say something of a pod, by its UID.
    slices_by_pod: HashMap<Arc<str>, BTreeSet<Key>>,
}

impl Cluster {
    pub(crate) fn pod(&self, key: &Key) -> Option<&Arc<Pod>> {
        self.pods.get(key)
    }

    pub(crate) fn pod_by_uid(&self, uid: &str) -> Option<&Arc<Pod>> {
        self.pods.get(self.pods_by_uid.get(uid)?)
    }

    /// The one pod that has an address now; `Err` when it cannot be told which.
    pub(crate) fn pod_at(&self, address: IpAddr) -> Result<Option<&Arc<Pod>>, Ambiguous> {
        let keys = self.pods_by_address.get(&address).into_iter().flatten();
        let there: Vec<_> = keys
            .filter_map(|key| self.pods.get(key))
            .filter(|pod| pod.is_there())
            .collect();
        // An address may pass on while the pod that had it still ends.
        let staying: Vec<_> = there.iter().filter(|pod| !pod.is_terminating).collect();
        match (staying.as_slice(), there.as_slice()) {
            ([one], _) => Ok(Some(**one)),
            ([], [one]) => Ok(Some(*one)),
            ([], []) => Ok(None),
            _ => Err(Ambiguous),
        }
    }

    pub(crate) fn pods_of<'a>(&'a self, namespace: &str) -> impl Iterator<Item = &'a Arc<Pod>> {
        let entry = self.pods_by_namespace.get_key_value(namespace);
        entry.into_iter().flat_map(move |(namespace, names)| {
            names.iter().filter_map(move |name| {
                self.pods.get(&Key {
                    namespace: Arc::clone(namespace),
                    name: Arc::clone(name),
                })
            })
        })
    }

    pub(crate) fn pods(&self) -> impl Iterator<Item = &Arc<Pod>> {
        self.pods.values()
    }

    pub(crate) fn service(&self, key: &Key) -> Option<&Arc<Service>> {
        self.services.get(key)
    }

    pub(crate) fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    pub(crate) fn service_at(&self, address: IpAddr) -> Option<&Arc<Service>> {
        let keys = self.services_by_address.get(&address)?;
        keys.first().and_then(|key| self.services.get(key))
    }

    pub(crate) fn slices(&self) -> impl Iterator<Item = &Arc<Slice>> {
        self.slices.values()
    }

    pub(crate) fn slices_of(&self, service: &Key) -> impl Iterator<Item = &Arc<Slice>> {
        let keys = self.slices_by_service.get(service).into_iter().flatten();
        keys.filter_map(|key| self.slices.get(key))
    }

    pub(crate) fn slices_with(&self, pod: &Pod) -> impl Iterator<Item = &Arc<Slice>> {
        let keys = self.slices_by_pod.get(&pod.uid).into_iter().flatten();
        keys.filter_map(|key| self.slices.get(key))
    }

    /// Whether a pod is in the mesh: its namespace is, it was injected, it has not opted out.
    pub(crate) fn is_meshed(&self, pod: &Pod) -> bool {
        let namespace = self.namespaces.get(&pod.key.namespace);
        pod.has_sidecar && namespace.is_some_and(|namespace| namespace.injected)
    }

    /// The pod that an endpoint of a slice really is.
    pub(crate) fn endpoint(&self, slice: &Slice, endpoint: &SliceEndpoint) -> Option<&Arc<Pod>> {
        let (name, uid) = endpoint.pod.as_ref()?;
        let key = Key {
            namespace: Arc::clone(&slice.key.namespace),
            name: Arc::clone(name),
        };
        let pod = self.pods.get(&key)?;
        let is_it = pod.uid == *uid && pod.is_there() && pod.addresses.contains(&endpoint.address);
        is_it.then_some(pod)
    }

    /// Puts a pod in place of what it was, which is returned.
    pub(crate) fn set_pod(&mut self, key: &Key, pod: Option<Arc<Pod>>) -> Option<Arc<Pod>> {
        let before = self.pods.remove(key);
        if let Some(before) = &before {
            self.pods_by_uid.remove(&before.uid);
            for address in &before.addresses {
                forget(&mut self.pods_by_address, address, key);
            }
        }
        match pod {
            Some(pod) => {
                self.pods_by_uid.insert(Arc::clone(&pod.uid), key.clone());
                for address in &pod.addresses {
                    self.pods_by_address
                        .entry(*address)
                        .or_default()
                        .insert(key.clone());
                }
                let names = self.pods_by_namespace.entry(Arc::clone(&key.namespace));
                names.or_default().insert(Arc::clone(&key.name));
                self.pods.insert(key.clone(), pod);
            }
            None => forget(&mut self.pods_by_namespace, &key.namespace, &key.name),
        }
        before
    }

    /// Puts a Service in place of what it was, which is returned.
    pub(crate) fn set_service(
        &mut self,
        key: &Key,
        service: Option<Arc<Service>>,
    ) -> Option<Arc<Service>> {
        let before = self.services.remove(key);
        for address in before.iter().flat_map(|before| &before.addresses) {
            forget(&mut self.services_by_address, address, key);
        }
        if let Some(service) = service {
            for address in &service.addresses {
                self.services_by_address
                    .entry(*address)
                    .or_default()
                    .insert(key.clone());
            }
            self.services.insert(key.clone(), service);
        }
        before
    }

    /// Puts a slice in place of what it was, which is returned.
    pub(crate) fn set_slice(&mut self, key: &Key, slice: Option<Arc<Slice>>) -> Option<Arc<Slice>> {
        let before = self.slices.remove(key);
        if let Some(before) = &before {
            forget(&mut self.slices_by_service, &before.service, key);
            for (_, uid) in before
                .endpoints
                .iter()
                .filter_map(|endpoint| endpoint.pod.as_ref())
            {
                forget(&mut self.slices_by_pod, uid, key);
            }
        }
        if let Some(slice) = slice {
            let service = self.slices_by_service.entry(slice.service.clone());
            service.or_default().insert(key.clone());
            for (_, uid) in slice
                .endpoints
                .iter()
                .filter_map(|endpoint| endpoint.pod.as_ref())
            {
                let slices = self.slices_by_pod.entry(Arc::clone(uid));
                slices.or_default().insert(key.clone());
            }
            self.slices.insert(key.clone(), slice);
        }
        before
    }

    /// Entries of every map together.
    pub(crate) fn len(&self) -> usize {
        fn inner<K, V>(map: &HashMap<K, BTreeSet<V>>) -> usize {
            map.len() + map.values().map(BTreeSet::len).sum::<usize>()
        }
        self.namespaces.len()
            + self.pods.len()
            + self.pods_by_uid.len()
            + inner(&self.pods_by_address)
            + inner(&self.pods_by_namespace)
            + self.services.len()
            + inner(&self.services_by_address)
            + self.slices.len()
            + inner(&self.slices_by_service)
            + inner(&self.slices_by_pod)
    }
}

/// Two pods seem to have one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ambiguous;

fn forget<K: Hash + Eq, V: Ord>(map: &mut HashMap<K, BTreeSet<V>>, key: &K, value: &V) {
    if let Some(values) = map.get_mut(key) {
        values.remove(value);
        if values.is_empty() {
            map.remove(key);
        }
    }
}
