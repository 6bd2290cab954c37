//! What sidecars have of each resource: sent, put to use, or refused.
//!
//! Invariant: there is nothing about a pod or a resource that is gone, so the table is at most as
//! large as what is sent.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use sidegate_api::control::Acknowledged;

/// Longest reason that is kept, in bytes.
const REFUSAL_BYTES_MAX: usize = 512;

/// What one sidecar has of one resource.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ack {
    /// 0: sent, not acknowledged yet.
    pub generation: i64,
    /// Why that generation is refused; empty: it is in use.
    pub refusal: String,
    /// The sidecar said so to this replica.
    is_own: bool,
}

/// By pod UID and resource UID.
type Pair = (Arc<str>, Arc<str>);

/// Every acknowledgement that is known.
#[derive(Debug, Default)]
pub(crate) struct Acks {
    /// By pod, then by resource.
    table: BTreeMap<Arc<str>, BTreeMap<Arc<str>, Ack>>,
    /// What the leader has not been told yet; those not in the table are withdrawn.
    untold: BTreeSet<Pair>,
}

impl Acks {
    /// Of one resource, by pod.
    pub(crate) fn of<'a>(
        &'a self,
        resource: &'a str,
    ) -> impl Iterator<Item = (&'a Arc<str>, &'a Ack)> {
        let of_pod = move |(pod, acks): (&'a Arc<str>, &'a BTreeMap<Arc<str>, Ack>)| {
            Some((pod, acks.get(resource)?))
        };
        self.table.iter().filter_map(of_pod)
    }

    pub(crate) fn get(&self, resource: &str, pod: &str) -> Option<&Ack> {
        self.table.get(pod)?.get(resource)
    }

    /// A resource was sent to a sidecar of this replica.
    pub(crate) fn sent(&mut self, pod: &Arc<str>, resource: &Arc<str>) {
        let ack = self.entry(pod, resource);
        if !ack.is_own {
            ack.is_own = true;
            self.untold.insert((Arc::clone(pod), Arc::clone(resource)));
        }
    }

    /// A sidecar of this replica has put a generation to use, or refuses it. Whether that is new.
    pub(crate) fn acknowledge(
        &mut self,
        (pod, resource): (&Arc<str>, &Arc<str>),
        generation: i64,
        refusal: &str,
    ) -> bool {
        let new = Ack {
            generation,
            refusal: cut(refusal).to_owned(),
            is_own: true,
        };
        let ack = self.entry(pod, resource);
        if *ack == new {
            return false;
        }
        *ack = new;
        self.untold.insert((Arc::clone(pod), Arc::clone(resource)));
        true
    }

    /// A sidecar of this replica needs a resource no more. Whether there was something to forget.
    pub(crate) fn withdraw(&mut self, pod: &Arc<str>, resource: &Arc<str>) -> bool {
        if self.remove(pod, resource).is_none() {
            return false;
        }
        self.untold.insert((Arc::clone(pod), Arc::clone(resource)));
        true
    }

    /// What another replica says. Whether that is new; an older word never replaces a newer one.
    pub(crate) fn hear(&mut self, said: &Acknowledged) -> bool {
        let (pod, resource) = (said.pod_uid.as_str(), said.resource_uid.as_str());
        let before = self.get(resource, pod);
        if said.withdrawn {
            return before.is_some_and(|ack| !ack.is_own)
                && self.remove(&pod.into(), &resource.into()).is_some();
        }
        let is_newer = before.is_none_or(|ack| {
            ack.generation < said.generation
                || (ack.generation == said.generation && !ack.is_own && ack.refusal != said.refusal)
        });
        if !is_newer {
            return false;
        }
        let ack = self.entry(&pod.into(), &resource.into());
        ack.generation = said.generation;
        cut(&said.refusal).clone_into(&mut ack.refusal);
        true
    }

    /// A pod is gone.
    pub(crate) fn forget_pod(&mut self, pod: &Arc<str>) {
        self.table.remove(pod);
        let told: Vec<Pair> = self
            .untold
            .range((Arc::clone(pod), Arc::from(""))..)
            .take_while(|(known, _)| known == pod)
            .cloned()
            .collect();
        for pair in told {
            self.untold.remove(&pair);
        }
    }

    /// A resource is gone.
    pub(crate) fn forget_resource(&mut self, resource: &Arc<str>) {
        self.table.retain(|_, acks| {
            acks.remove(resource);
            !acks.is_empty()
        });
        self.untold.retain(|(_, known)| known != resource);
    }

    /// Everything that sidecars said to this replica.
    pub(crate) fn own(&mut self) -> Vec<Acknowledged> {
        self.untold.clear();
        let rows = self
            .table
            .iter()
            .flat_map(|(pod, acks)| acks.iter().map(move |(resource, ack)| (pod, resource, ack)));
        let own = rows.filter(|(_, _, ack)| ack.is_own);
        own.map(|(pod, resource, ack)| said(pod, resource, Some(ack)))
            .collect()
    }

    /// At most `max` of what the leader has not been told yet.
    pub(crate) fn untold(&mut self, max: usize) -> Vec<Acknowledged> {
        let pairs: Vec<Pair> = self.untold.iter().take(max).cloned().collect();
        let told = pairs.iter().map(|pair| {
            self.untold.remove(pair);
            said(&pair.0, &pair.1, self.get(&pair.1, &pair.0))
        });
        told.collect()
    }

    /// The leader could not place this yet; what was withdrawn since need not be placed.
    pub(crate) fn tell_again(&mut self, said: &Acknowledged) {
        let acks = self.table.get_key_value(said.pod_uid.as_str());
        let pair = acks.and_then(|(pod, acks)| {
            let (resource, ack) = acks.get_key_value(said.resource_uid.as_str())?;
            ack.is_own.then(|| (Arc::clone(pod), Arc::clone(resource)))
        });
        self.untold.extend(pair);
    }

    /// Nobody has to be told: this replica is the leader.
    pub(crate) fn all_told(&mut self) {
        self.untold.clear();
    }

    pub(crate) fn len(&self) -> usize {
        self.table.values().map(BTreeMap::len).sum::<usize>() + self.untold.len()
    }

    fn entry(&mut self, pod: &Arc<str>, resource: &Arc<str>) -> &mut Ack {
        let acks = self.table.entry(Arc::clone(pod)).or_default();
        acks.entry(Arc::clone(resource)).or_default()
    }

    fn remove(&mut self, pod: &Arc<str>, resource: &Arc<str>) -> Option<Ack> {
        let acks = self.table.get_mut(pod)?;
        let ack = acks.remove(resource);
        if acks.is_empty() {
            self.table.remove(pod);
        }
        ack
    }
}

fn said(pod: &str, resource: &str, ack: Option<&Ack>) -> Acknowledged {
    Acknowledged {
        pod_uid: pod.to_owned(),
        resource_uid: resource.to_owned(),
        generation: ack.map_or(0, |ack| ack.generation),
        refusal: ack.map(|ack| ack.refusal.clone()).unwrap_or_default(),
        withdrawn: ack.is_none(),
    }
}

fn cut(text: &str) -> &str {
    let mut end = text.len().min(REFUSAL_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default()
}
