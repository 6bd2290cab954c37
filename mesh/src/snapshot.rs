//! What one sidecar knows at one moment: a policy and routes, compiled from one set of resources.
//!
//! Invariant: a snapshot never changes. One that follows another shares what did not change: the
//! same `Arc<Policy>` means that no live stream has to be checked again.

use std::sync::Arc;

use crate::policy::Policy;
use crate::resource::{AuthorizationPolicy, Problem, StaticService, TrafficPolicy};
use crate::routes::Routes;
use crate::store::{BrokenResource, ResourceSet};
use crate::workload::Workload;

/// What one sidecar knows at one moment. Cheap to share, never changed.
#[derive(Debug)]
pub struct Snapshot {
    /// Its number, which the access log names; it rises with each change.
    pub number: u64,
    /// Who may call this workload.
    pub policy: Arc<Policy>,
    /// Where the services are that this workload calls.
    pub routes: Arc<Routes>,
    source: Source,
}

/// From what it was compiled.
#[derive(Debug)]
struct Source {
    set: ResourceSet,
    workload: Workload,
    policy_problems: Vec<Problem>,
    route_problems: Vec<Problem>,
}

impl Snapshot {
    /// Compiles `set` for `workload`. The problems are warnings and conflicts: nothing that is
    /// accepted fails to compile.
    pub fn compile(set: &ResourceSet, workload: &Workload, number: u64) -> (Self, Vec<Problem>) {
        let (policy, policy_problems) = Policy::compile(set, workload);
        let (routes, route_problems) = Routes::compile(set, workload);
        Self::assemble(
            (Arc::new(policy), policy_problems),
            (Arc::new(routes), route_problems),
            number,
            (set, workload),
        )
    }

    /// Compiles `set` again after a change. Keeps the policy of `previous` when no authorization
    /// policy changed, and its routes when no service and no traffic policy did.
    pub fn recompile(
        previous: &Self,
        set: &ResourceSet,
        workload: &Workload,
        number: u64,
    ) -> (Self, Vec<Problem>) {
        let before = &previous.source;
        let same_workload = before.workload == *workload;
        let policy = if same_workload && same_policies(&before.set, set) {
            (Arc::clone(&previous.policy), before.policy_problems.clone())
        } else {
            let (policy, problems) = Policy::compile(set, workload);
            (Arc::new(policy), problems)
        };
        let routes = if same_workload && same_routes(&before.set, set) {
            (Arc::clone(&previous.routes), before.route_problems.clone())
        } else {
            let (routes, problems) = Routes::compile(set, workload);
            (Arc::new(routes), problems)
        };
        Self::assemble(policy, routes, number, (set, workload))
    }

    fn assemble(
        (policy, policy_problems): (Arc<Policy>, Vec<Problem>),
        (routes, route_problems): (Arc<Routes>, Vec<Problem>),
        number: u64,
        (set, workload): (&ResourceSet, &Workload),
    ) -> (Self, Vec<Problem>) {
        let mut problems = policy_problems.clone();
        problems.extend(route_problems.iter().cloned());
        let snapshot = Self {
            number,
            policy,
            routes,
            source: Source {
                set: set.clone(),
                workload: workload.clone(),
                policy_problems,
                route_problems,
            },
        };
        (snapshot, problems)
    }
}

fn same_policies(before: &ResourceSet, after: &ResourceSet) -> bool {
    let facts = |broken: &BrokenResource| {
        let BrokenResource {
            kind,
            namespace,
            name,
            action,
            mode,
            selector,
            problem: _,
        } = broken.clone();
        (kind, namespace, name, action, mode, selector)
    };
    same::<AuthorizationPolicy>(&before.policies, &after.policies)
        && before
            .broken
            .iter()
            .map(facts)
            .eq(after.broken.iter().map(facts))
}

fn same_routes(before: &ResourceSet, after: &ResourceSet) -> bool {
    same::<StaticService>(&before.services, &after.services)
        && same::<TrafficPolicy>(&before.traffic, &after.traffic)
}

fn same<T: PartialEq>(before: &[Arc<T>], after: &[Arc<T>]) -> bool {
    let equal = |(a, b): (&Arc<T>, &Arc<T>)| Arc::ptr_eq(a, b) || a == b;
    before.len() == after.len() && before.iter().zip(after).all(equal)
}
