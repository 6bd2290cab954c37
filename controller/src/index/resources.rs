//! Our own resources as the cluster has them, each read alone.
//!
//! Invariants: what is wrong with one resource changes nothing about its neighbours; a resource
//! whose newest version is refused keeps its last good one, and one that never had one is passed on
//! as it is, so that each sidecar fails closed by it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use serde_json::Value;
use sidegate_mesh::resource::{
    Kind, Known, Problem, Resource, ResourceKey, SYSTEM_NAMESPACE, Selector, as_written,
    parse_known,
};

use super::facts::{Key, Namespace, Pod};

/// One version of a resource as sidecars get it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Version {
    pub generation: i64,
    /// The whole object, as a folder would hold it.
    pub json: Arc<[u8]>,
}

/// One resource.
#[derive(Debug)]
pub(crate) struct Held {
    pub uid: Arc<str>,
    /// Of the newest version, good or not.
    pub generation: i64,
    /// For writing the status.
    pub resource_version: String,
    /// The status that the cluster has.
    pub status: Value,
    /// The document of the newest version, to see whether anything changed.
    document: Value,
    /// What is wrong with the newest version; empty: nothing.
    pub problems: Vec<Problem>,
    known: Known,
    good: Option<Good>,
    broken: Version,
}

#[derive(Debug)]
struct Good {
    resource: Arc<Resource>,
    version: Version,
}

impl Held {
    /// What sidecars get.
    pub(crate) fn version(&self) -> &Version {
        self.good
            .as_ref()
            .map_or(&self.broken, |good| &good.version)
    }

    /// What counts, if any version ever did.
    pub(crate) fn resource(&self) -> Option<&Resource> {
        self.good.as_ref().map(|good| &*good.resource)
    }

    /// As [`Self::resource`], to be looked at later.
    pub(crate) fn shared(&self) -> Option<Arc<Resource>> {
        self.good.as_ref().map(|good| Arc::clone(&good.resource))
    }

    /// Whether the newest version counts.
    pub(crate) fn is_accepted(&self) -> bool {
        self.problems.is_empty()
    }

    /// Whether an authorization policy of this namespace concerns a pod.
    pub(crate) fn selects(&self, own: &str, pod: &Pod, namespace: Option<&Namespace>) -> bool {
        let is_own = own == &*pod.key.namespace;
        let matches = |selector: &Selector| selector.matches(&pod.labels);
        match self.resource() {
            Some(Resource::AuthorizationPolicy(policy)) => {
                let spec = &policy.spec;
                let covers = if own == SYSTEM_NAMESPACE {
                    spec.namespace_selector.as_ref().is_none_or(|selector| {
                        namespace.is_some_and(|namespace| selector.matches(&namespace.labels))
                    })
                } else {
                    is_own
                };
                covers && matches(&spec.selector)
            }
            Some(_) => false,
            // As a sidecar judges it: what can't be read may concern anybody.
            None => {
                (is_own || own == SYSTEM_NAMESPACE)
                    && self.known.selector.as_ref().is_none_or(matches)
            }
        }
    }

    /// The service that a traffic policy is about, of its own namespace.
    fn service(&self, key: &ResourceKey) -> Option<Key> {
        match self.resource() {
            Some(Resource::TrafficPolicy(policy)) => {
                Some(Key::new(&key.namespace, &policy.spec.service))
            }
            _ => None,
        }
    }
}

/// What a change of a resource did.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Nothing that matters to a sidecar.
    Nothing,
    /// What sidecars get, or whom it concerns.
    Content {
        /// The newest version is refused, and was not before, or for another reason.
        is_newly_refused: bool,
    },
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Resources {
    held: BTreeMap<ResourceKey, Held>,
    by_uid: HashMap<Arc<str>, ResourceKey>,
    traffic: HashMap<Key, BTreeSet<ResourceKey>>,
}

impl Resources {
    pub(crate) fn get(&self, key: &ResourceKey) -> Option<&Held> {
        self.held.get(key)
    }

    pub(crate) fn key_of(&self, uid: &str) -> Option<&ResourceKey> {
        self.by_uid.get(uid)
    }

    pub(crate) fn len(&self) -> usize {
        self.held.len()
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &ResourceKey> {
        self.held.keys()
    }

    /// Those of one kind and namespace.
    pub(crate) fn of<'a>(
        &'a self,
        kind: Kind,
        namespace: &'a str,
    ) -> impl Iterator<Item = (&'a ResourceKey, &'a Held)> {
        let first = ResourceKey {
            kind,
            namespace: namespace.to_owned(),
            name: String::new(),
        };
        let within = move |key: &ResourceKey| key.kind == kind && key.namespace == namespace;
        self.held
            .range(first..)
            .take_while(move |(key, _)| within(key))
    }

    /// The authorization policies that may concern a pod of this namespace.
    pub(crate) fn policies<'a>(
        &'a self,
        namespace: &'a str,
    ) -> impl Iterator<Item = (&'a ResourceKey, &'a Held)> {
        let kind = Kind::AuthorizationPolicy;
        let own = (namespace != SYSTEM_NAMESPACE).then(|| self.of(kind, namespace));
        self.of(kind, SYSTEM_NAMESPACE)
            .chain(own.into_iter().flatten())
    }

    /// The traffic policies of a service.
    pub(crate) fn traffic(&self, service: &Key) -> impl Iterator<Item = &ResourceKey> {
        self.traffic.get(service).into_iter().flatten()
    }

    /// The service of a traffic policy.
    pub(crate) fn service(&self, key: &ResourceKey) -> Option<Key> {
        self.held.get(key).and_then(|held| held.service(key))
    }

    /// Puts an object in place of what it was.
    pub(crate) fn apply(&mut self, key: &ResourceKey, object: &Value) -> Change {
        let metadata = |field: &str| object.get("metadata").and_then(|data| data.get(field));
        let text = |field: &str| metadata(field).and_then(Value::as_str).unwrap_or_default();
        let generation = metadata("generation")
            .and_then(Value::as_i64)
            .unwrap_or_default();
        let document = as_written(object);
        let same = self.held.get_mut(key).filter(|held| {
            *held.uid == *text("uid") && held.generation == generation && held.document == document
        });
        if let Some(held) = same {
            text("resourceVersion").clone_into(&mut held.resource_version);
            held.status = object.get("status").cloned().unwrap_or_default();
            return Change::Nothing;
        }
        let before = self.take(key).filter(|held| *held.uid == *text("uid"));
        let known_problems = before.as_ref().map(|held| held.problems.clone());
        let mut held = read(key, document, generation);
        held.uid = text("uid").into();
        text("resourceVersion").clone_into(&mut held.resource_version);
        held.status = object.get("status").cloned().unwrap_or_default();
        if held.good.is_none() {
            held.good = before.and_then(|before| before.good);
        }
        let is_newly_refused =
            !held.problems.is_empty() && known_problems.as_ref() != Some(&held.problems);
        self.put(key, held);
        Change::Content { is_newly_refused }
    }

    /// Forgets a resource. Whether it was there.
    pub(crate) fn remove(&mut self, key: &ResourceKey) -> bool {
        self.take(key).is_some()
    }

    fn put(&mut self, key: &ResourceKey, held: Held) {
        self.by_uid.insert(Arc::clone(&held.uid), key.clone());
        if let Some(service) = held.service(key) {
            self.traffic.entry(service).or_default().insert(key.clone());
        }
        self.held.insert(key.clone(), held);
    }

    fn take(&mut self, key: &ResourceKey) -> Option<Held> {
        let held = self.held.remove(key)?;
        self.by_uid.remove(&held.uid);
        if let Some(service) = held.service(key)
            && let Some(policies) = self.traffic.get_mut(&service)
        {
            policies.remove(key);
            if policies.is_empty() {
                self.traffic.remove(&service);
            }
        }
        Some(held)
    }
}

fn read(key: &ResourceKey, document: Value, generation: i64) -> Held {
    let (known, outcome) = parse_known(&document);
    let (good, problems) = match outcome {
        Ok(resource) => {
            let version = Version {
                generation,
                json: bytes(&for_sidecars(key, &document)),
            };
            let resource = Arc::new(resource);
            (Some(Good { resource, version }), Vec::new())
        }
        Err(problems) => (None, problems),
    };
    Held {
        uid: "".into(),
        generation,
        resource_version: String::new(),
        status: Value::Null,
        broken: Version {
            generation,
            json: if good.is_none() {
                bytes(&document)
            } else {
                Arc::default()
            },
        },
        document,
        problems,
        known,
        good,
    }
}

/// A sidecar does not know the labels of its namespace, and a policy that it gets selects it: the
/// question is answered before it is asked.
fn for_sidecars(key: &ResourceKey, document: &Value) -> Value {
    let mut document = document.clone();
    if key.namespace == SYSTEM_NAMESPACE
        && let Some(spec) = document.get_mut("spec").and_then(Value::as_object_mut)
    {
        spec.remove("namespaceSelector");
    }
    document
}

fn bytes(document: &Value) -> Arc<[u8]> {
    document.to_string().into_bytes().into()
}
