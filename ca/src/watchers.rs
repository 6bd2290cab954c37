//! Who watches the bundle, and who has put which sequence to use.
//!
//! Acknowledgements count by line of renewals, not by connection: a sidecar that is cut off still
//! holds its certificate, so a new root waits for it. Among replicas only open streams are known,
//! so there a new root also waits until every certificate from before it has ended.
//!
//! Invariant: one record a stream and one a line of renewals in date, so the memory is bounded by
//! the streams and certificates that there may be.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;

use sidegate_api::identity::WatchBundleRequest;
use sidegate_mesh::spiffe::SpiffeId;

use crate::digest::{Digest, Serial};
use crate::registry::{CONTROL_PLANE, Registry};

/// Longest refusal that is kept of what a caller says, in characters.
const REFUSAL_MAX: usize = 256;

/// All open streams, and what is known from closed ones.
pub struct Watchers {
    /// Whether there are other replicas: each knows only what it issued, and a sidecar may
    /// acknowledge to another one than that which issued its certificate.
    replicas: bool,
    next: u64,
    streams: HashMap<u64, Watcher>,
    lineages: HashMap<Serial, Acknowledged>,
}

/// One open stream.
#[derive(Clone, Debug)]
pub struct Watcher {
    /// Who it is; absent when no certificate was shown.
    pub caller: Option<(SpiffeId, Serial)>,
    /// From where.
    pub address: SocketAddr,
    /// What is in use there.
    pub acknowledged: Acknowledged,
    /// Why the last bundle is not in use there.
    pub refusal: String,
}

/// What one sidecar has in use.
#[derive(Clone, Debug, Default)]
pub struct Acknowledged {
    /// The bundle's sequence.
    pub sequence: u64,
    /// Its roots.
    pub roots: Vec<Digest>,
}

impl Watchers {
    /// Nobody watches yet.
    pub fn new(replicas: bool) -> Self {
        Self {
            replicas,
            next: 0,
            streams: HashMap::new(),
            lineages: HashMap::new(),
        }
    }

    /// Adds a stream, unless there are `max`. `caller` is identity and lineage.
    pub fn open(
        &mut self,
        caller: Option<(SpiffeId, Serial)>,
        address: SocketAddr,
        max: usize,
    ) -> Option<u64> {
        if self.streams.len() >= max {
            return None;
        }
        self.next += 1;
        let watcher = Watcher {
            caller,
            address,
            acknowledged: Acknowledged::default(),
            refusal: String::new(),
        };
        self.streams.insert(self.next, watcher);
        Some(self.next)
    }

    /// Takes in a message of a stream. A sequence that was never published is none.
    pub fn acknowledge(&mut self, stream: u64, message: &WatchBundleRequest, published: u64) {
        let Some(watcher) = self.streams.get_mut(&stream) else {
            return;
        };
        watcher.refusal = message.refusal.chars().take(REFUSAL_MAX).collect();
        if message.acknowledged_sequence > published {
            return;
        }
        let roots = message.root_sha256.iter().take(64);
        watcher.acknowledged = Acknowledged {
            sequence: message.acknowledged_sequence,
            roots: roots.filter_map(|hash| Digest::from_bytes(hash)).collect(),
        };
        if let Some((_, lineage)) = &watcher.caller {
            let acknowledged = watcher.acknowledged.clone();
            self.lineages.insert(*lineage, acknowledged);
        }
    }

    /// Forgets a stream; what it acknowledged still counts.
    pub fn close(&mut self, stream: u64) {
        self.streams.remove(&stream);
    }

    /// The open streams.
    pub fn streams(&self) -> impl Iterator<Item = &Watcher> {
        self.streams.values()
    }

    /// How many streams are open.
    pub fn len(&self) -> usize {
        self.streams.len()
    }

    /// Whether no stream is open.
    pub fn is_empty(&self) -> bool {
        self.streams.is_empty()
    }

    /// Forgets lines of renewals of which no certificate is in date.
    pub fn prune(&mut self, registry: &Registry) {
        let live: HashSet<Serial> = registry.certificates().map(|c| c.lineage).collect();
        self.lineages.retain(|lineage, _| live.contains(lineage));
    }

    /// Identities that hold a certificate in date, or watch, and have not put `sequence` with
    /// `root` to use. Revoked ones do not count, nor does the control plane.
    pub fn missing(
        &self,
        registry: &Registry,
        sequence: u64,
        root: Option<Digest>,
    ) -> BTreeSet<SpiffeId> {
        let current = |acknowledged: &Acknowledged| {
            acknowledged.sequence >= sequence
                && root.is_none_or(|root| acknowledged.roots.contains(&root))
        };
        let certificates = registry
            .issued()
            .filter(|_| !self.replicas)
            .filter(|certificate| is_workload(&certificate.spiffe_id))
            .filter(|certificate| !registry.revoked_ids().contains_key(&certificate.spiffe_id))
            .filter(|certificate| !self.lineages.get(&certificate.lineage).is_some_and(current))
            .map(|certificate| certificate.spiffe_id.clone());
        let streams = self
            .streams
            .values()
            .filter(|watcher| !current(&watcher.acknowledged))
            .filter_map(|watcher| watcher.caller.as_ref())
            .map(|(id, _)| id.clone());
        certificates.chain(streams).collect()
    }

    /// Streams without a certificate that have not put `sequence` to use.
    pub fn missing_anonymous(&self, sequence: u64) -> usize {
        let anonymous = self
            .streams
            .values()
            .filter(|watcher| watcher.caller.is_none());
        anonymous
            .filter(|watcher| watcher.acknowledged.sequence < sequence)
            .count()
    }
}

fn is_workload(id: &SpiffeId) -> bool {
    id.workload()
        .is_some_and(|(namespace, _)| namespace != CONTROL_PLANE)
}
