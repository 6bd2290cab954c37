//! What people should hear of an object: notes that become events of the cluster.
//!
//! Invariant: the queue is bounded, and what did not fit is counted.

use std::collections::VecDeque;

use sidegate_mesh::resource::{API_VERSION, ResourceKey};

use super::facts::{Pod, Remark};
use super::resources::Held;
use super::status::text_of;

/// Which object a note is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    /// Such as `v1`.
    pub api_version: &'static str,
    /// Such as `Pod`.
    pub kind: &'static str,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
}

/// One thing that people should hear of one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Which object.
    pub about: About,
    /// What.
    pub remark: Remark,
}

/// Notes that wait to be written.
#[derive(Debug)]
pub(crate) struct Notes {
    waiting: VecDeque<Note>,
    max: usize,
    dropped: u64,
}

impl Notes {
    pub(crate) fn new(max: usize) -> Self {
        Self {
            waiting: VecDeque::new(),
            max,
            dropped: 0,
        }
    }

    pub(crate) fn extend(&mut self, notes: impl IntoIterator<Item = Note>) {
        for note in notes {
            if self.waiting.len() < self.max {
                self.waiting.push_back(note);
            } else {
                self.dropped += 1;
            }
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }
}

pub(crate) fn of_pod(pod: &Pod, remark: &Remark) -> Note {
    Note {
        about: About {
            api_version: "v1",
            kind: "Pod",
            namespace: pod.key.namespace.as_ref().to_owned(),
            name: pod.key.name.as_ref().to_owned(),
            uid: pod.uid.as_ref().to_owned(),
        },
        remark: remark.clone(),
    }
}

pub(crate) fn of_resource(key: &ResourceKey, held: &Held) -> Note {
    let consequence = match held.resource() {
        Some(_) => "the last good version stays in use",
        None => "it fails closed: an Allow gives nothing, a Deny denies what it selects",
    };
    Note {
        about: About {
            api_version: API_VERSION,
            kind: key.kind.as_str(),
            namespace: key.namespace.clone(),
            name: key.name.clone(),
            uid: held.uid.as_ref().to_owned(),
        },
        remark: Remark {
            reason: "Refused",
            message: format!("{}; {consequence}", text_of(&held.problems)),
        },
    }
}

impl super::Index {
    /// At most `max` notes, the oldest first.
    pub fn take_notes(&mut self, max: usize) -> Vec<Note> {
        let number = self.notes.waiting.len().min(max);
        self.notes.waiting.drain(..number).collect()
    }

    /// Notes that did not fit, since the start.
    pub fn notes_dropped(&self) -> u64 {
        self.notes.dropped
    }

    /// Notes again everything that is so now, for a leader that has written nothing yet.
    pub fn note_everything(&mut self) {
        self.notes.waiting.clear();
        let refused: Vec<Note> = self
            .resources
            .keys()
            .filter_map(|key| Some((key, self.resources.get(key)?)))
            .filter(|(_, held)| !held.is_accepted())
            .map(|(key, held)| of_resource(key, held))
            .collect();
        self.notes.extend(refused);
        let in_mesh = |pod: &&std::sync::Arc<Pod>| {
            let namespace = self.cluster.namespaces.get(&pod.key.namespace);
            namespace.is_some_and(|namespace| namespace.injected)
        };
        let pods = self.cluster.pods().filter(in_mesh);
        let notes = pods.flat_map(|pod| pod.remarks.iter().map(|remark| of_pod(pod, remark)));
        let notes: Vec<Note> = notes.collect();
        self.notes.extend(notes);
    }
}
