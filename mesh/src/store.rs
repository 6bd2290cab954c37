//! The resources of one folder or one control stream.
//!
//! Invariant: a resource that can't be read never replaces one that could, and never leaves a
//! hole: with a last good version, that one stays; without, a mark stays that denies what the
//! resource might have denied.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::resource::{
    Action, AuthorizationPolicy, Kind, Known, Mode, Problem, Resource, ResourceKey,
    SYSTEM_NAMESPACE, Selector, StaticService, TrafficPolicy,
};
use crate::workload::Workload;

mod replace;

/// Most resources of one folder.
pub const RESOURCES_PER_FOLDER_MAX: usize = 10_000;

/// The resources of one folder, each in its last good version.
///
/// Pure: it is given paths and texts, and gives problems back.
#[derive(Debug, Default)]
pub struct ResourceStore {
    entries: BTreeMap<ResourceKey, Entry>,
    /// Documents that were refused because another one stands for their resource.
    seconds: BTreeSet<replace::Second>,
    set: ResourceSet,
}

impl ResourceStore {
    /// A store without resources.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes the folder's files, all of them, what the store holds.
    ///
    /// A resource whose document is refused keeps its last good version, also when its file can't
    /// be read at all; one that has none becomes a [`BrokenResource`]. A resource whose file is gone
    /// is gone, and so is one whose document is gone from a file that is otherwise wholly good: any
    /// other may have been cut off. Of two documents of one resource, the one in force stays (at
    /// first: the one earlier by path), and the other is refused.
    ///
    /// Returns what is wrong, in the order of the files' paths.
    pub fn replace_folder(&mut self, files: &[(String, String)]) -> Vec<Problem> {
        self.replace(
            files
                .iter()
                .map(|(path, text)| (path.as_str(), Ok(text.as_str())))
                .collect(),
        )
    }

    /// The same as [`Self::replace_folder`], for files of which some could not be read: in place
    /// of the text stands why, in words such as "permission denied".
    pub fn replace_files(&mut self, files: &[(String, Result<String, String>)]) -> Vec<Problem> {
        let files = files.iter().map(|(path, text)| {
            let text = text.as_deref().map_err(String::as_str);
            (path.as_str(), text)
        });
        self.replace(files.collect())
    }

    fn replace(&mut self, files: Vec<replace::File<'_>>) -> Vec<Problem> {
        let before = replace::Before {
            entries: &self.entries,
            seconds: &self.seconds,
        };
        let replaced = replace::replace(&before, files);
        self.entries = replaced.entries;
        self.seconds = replaced.seconds;
        self.set = ResourceSet::of(&self.entries, replaced.broken);
        replaced.problems
    }

    /// What is in force now.
    pub fn resources(&self) -> &ResourceSet {
        &self.set
    }

    /// Resources whose last good version is in force because their newest was refused.
    pub fn stale(&self) -> impl Iterator<Item = &ResourceKey> {
        let stale = self.entries.iter().filter(|(_, entry)| entry.is_stale);
        stale.map(|(key, _)| key)
    }
}

/// One resource in force.
#[derive(Clone, Debug)]
struct Entry {
    /// The file of its newest version, good or not.
    file: String,
    good: Good,
    /// Whether the newest version was refused.
    is_stale: bool,
}

#[derive(Clone, Debug)]
enum Good {
    Policy(Arc<AuthorizationPolicy>),
    Service(Arc<StaticService>),
    Traffic(Arc<TrafficPolicy>),
}

impl Good {
    /// The resource as it is kept: the same `Arc` as before when nothing changed.
    fn keep(resource: Resource, before: Option<&Self>) -> Self {
        match (resource, before) {
            (Resource::AuthorizationPolicy(new), Some(Self::Policy(old))) if new == **old => {
                Self::Policy(Arc::clone(old))
            }
            (Resource::StaticService(new), Some(Self::Service(old))) if new == **old => {
                Self::Service(Arc::clone(old))
            }
            (Resource::TrafficPolicy(new), Some(Self::Traffic(old))) if new == **old => {
                Self::Traffic(Arc::clone(old))
            }
            (Resource::AuthorizationPolicy(new), _) => Self::Policy(Arc::new(new)),
            (Resource::StaticService(new), _) => Self::Service(Arc::new(new)),
            (Resource::TrafficPolicy(new), _) => Self::Traffic(Arc::new(new)),
        }
    }
}

/// Everything that a workload's policy and routes are compiled from. Cheap to clone.
///
/// Each list is ordered by namespace and name. A resource that did not change is the same `Arc`
/// as before.
#[derive(Clone, Debug, Default)]
pub struct ResourceSet {
    /// Every authorization policy.
    pub policies: Vec<Arc<AuthorizationPolicy>>,
    /// Every static service.
    pub services: Vec<Arc<StaticService>>,
    /// Every traffic policy.
    pub traffic: Vec<Arc<TrafficPolicy>>,
    /// What was refused and has no last good version.
    pub broken: Vec<BrokenResource>,
}

impl ResourceSet {
    /// The resources themselves, none of them broken.
    pub fn new(resources: impl IntoIterator<Item = Resource>) -> Self {
        let entry = |resource: Resource| {
            let entry = Entry {
                file: String::new(),
                good: Good::keep(resource.clone(), None),
                is_stale: false,
            };
            (resource.key(), entry)
        };
        Self::of(&resources.into_iter().map(entry).collect(), Vec::new())
    }

    fn of(entries: &BTreeMap<ResourceKey, Entry>, broken: Vec<BrokenResource>) -> Self {
        let mut set = Self {
            broken,
            ..Self::default()
        };
        for entry in entries.values() {
            match &entry.good {
                Good::Policy(policy) => set.policies.push(Arc::clone(policy)),
                Good::Service(service) => set.services.push(Arc::clone(service)),
                Good::Traffic(traffic) => set.traffic.push(Arc::clone(traffic)),
            }
        }
        set
    }
}

/// A resource that was refused and has no last good version: what could be read of it.
#[derive(Clone, Debug, PartialEq)]
pub struct BrokenResource {
    /// Its kind.
    pub kind: Option<Kind>,
    /// Its namespace.
    pub namespace: Option<String>,
    /// Its name.
    pub name: Option<String>,
    /// Of an authorization policy: what a match does.
    pub action: Option<Action>,
    /// Of an authorization policy: whether it counts.
    pub mode: Option<Mode>,
    /// Of an authorization policy: what it selects.
    pub selector: Option<Selector>,
    /// What is wrong with it, and where.
    pub problem: Problem,
}

impl BrokenResource {
    fn new(known: Known, problem: Problem) -> Self {
        Self {
            kind: known.kind,
            namespace: known.namespace,
            name: known.name,
            action: known.action,
            mode: known.mode,
            selector: known.selector,
            problem,
        }
    }

    /// Whether this denies every call to a workload.
    ///
    /// It does when it may be a `Deny` that counts, in the workload's namespace (or a mesh-wide
    /// one), and its selector matches or can't be read.
    pub fn denies(&self, workload: &Workload) -> bool {
        let may_be_policy = self
            .kind
            .is_none_or(|kind| kind == Kind::AuthorizationPolicy);
        let may_deny = self.action != Some(Action::Allow) && self.mode != Some(Mode::Audit);
        let covers_namespace = self.namespace.as_ref().is_none_or(|namespace| {
            *namespace == workload.namespace || namespace == SYSTEM_NAMESPACE
        });
        let may_select = self
            .selector
            .as_ref()
            .is_none_or(|selector| selector.matches(&workload.labels));
        may_be_policy && may_deny && covers_namespace && may_select
    }

    /// `namespace/name` as far as they are known, with `?` for the rest.
    pub fn label(&self) -> String {
        let known = |part: &Option<String>| part.clone().unwrap_or_else(|| "?".to_owned());
        format!("{}/{}", known(&self.namespace), known(&self.name))
    }
}
