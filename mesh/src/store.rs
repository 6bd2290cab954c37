//! The resources of one folder or one control stream.
//!
//! Invariant: a resource that can't be read never replaces one that could, and never leaves a
//! hole: with a last good version, that one stays; without, a mark stays that denies what the
//! resource might have denied.

use std::sync::Arc;

use crate::resource::{
    Action, AuthorizationPolicy, Kind, Mode, Problem, SYSTEM_NAMESPACE, Selector, StaticService,
    TrafficPolicy,
};
use crate::workload::Workload;

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
