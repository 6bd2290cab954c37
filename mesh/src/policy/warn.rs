//! What compiles and is probably not meant so.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::compile::{carries_opaque, covers};
use super::lower::{Lowered, resolve_port, selects};
use super::rule::{Effect, Ports, Selected, To};
use crate::resource::{
    Action, AuthorizationPolicy, Kind, PortRef, Problem, ResourceKey, SYSTEM_NAMESPACE, Target,
};
use crate::store::ResourceSet;
use crate::workload::Workload;

/// Warnings about the policies that select one workload.
pub(super) fn warnings(lowered: &Lowered, workload: &Workload) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (selected, policy) in lowered.selected.iter().zip(&lowered.resources) {
        let mut warn = |field: String, message: String, help: &str| {
            problems.push(Problem::warning(key(policy), field, message, help));
        };
        unresolved_ports(policy, workload, &mut warn);
        rules_that_never_match(policy, &mut warn);
        hosts_of_a_deny(policy, &mut warn);
        conflicts(selected, lowered, &mut warn);
    }
    problems
}

/// Warnings about policies that select none of `workloads`: for a tool that knows them all.
pub fn selecting_nothing(set: &ResourceSet, workloads: &[Workload]) -> Vec<Problem> {
    let idle = |policy: &&Arc<AuthorizationPolicy>| {
        !workloads.iter().any(|workload| selects(policy, workload))
    };
    let warning = |policy: &Arc<AuthorizationPolicy>| {
        Problem::warning(
            key(policy),
            "spec.selector",
            "the policy selects no workload",
            "compare `matchLabels` and the namespace with the workload's own",
        )
    };
    set.policies.iter().filter(idle).map(warning).collect()
}

fn key(policy: &AuthorizationPolicy) -> ResourceKey {
    ResourceKey {
        kind: Kind::AuthorizationPolicy,
        namespace: policy.metadata.namespace.clone(),
        name: policy.metadata.name.clone(),
    }
}

fn unresolved_ports(
    policy: &AuthorizationPolicy,
    workload: &Workload,
    warn: &mut impl FnMut(String, String, &str),
) {
    // A mesh-wide policy selects workloads of which some have the port and others have not.
    if policy.metadata.namespace == SYSTEM_NAMESPACE && policy.spec.action == Action::Allow {
        return;
    }
    for (at, port) in policy.spec.ports.iter().flatten().enumerate() {
        if !resolve_port(port, workload).is_empty() {
            continue;
        }
        let PortRef::Name(name) = port else { continue };
        let effect = match policy.spec.action {
            Action::Deny => "so this Deny covers every port",
            Action::Allow => "so this Allow gives nothing there",
        };
        warn(
            format!("spec.ports[{at}]"),
            format!(
                "no port of workload {} is named `{name}`, {effect}",
                workload.id
            ),
            "write a name or a number of the workload's own ports",
        );
    }
}

fn rules_that_never_match(
    policy: &AuthorizationPolicy,
    warn: &mut impl FnMut(String, String, &str),
) {
    for (rule_at, rule) in policy.spec.rules.iter().enumerate() {
        for (to_at, target) in rule.to.iter().enumerate() {
            let Target::Http {
                methods, upgrades, ..
            } = target
            else {
                continue;
            };
            let may_upgrade = methods
                .iter()
                .any(|method| method == "*" || method == "GET");
            if !upgrades.is_empty() && !may_upgrade {
                warn(
                    format!("spec.rules[{rule_at}].to[{to_at}].http.methods"),
                    "the rule can never match: an upgrade to WebSocket is a GET".to_owned(),
                    "write `methods: [GET]` or leave `upgrades` out",
                );
            }
        }
    }
}

fn hosts_of_a_deny(policy: &AuthorizationPolicy, warn: &mut impl FnMut(String, String, &str)) {
    if policy.spec.action != Action::Deny {
        return;
    }
    for (rule_at, rule) in policy.spec.rules.iter().enumerate() {
        for (to_at, target) in rule.to.iter().enumerate() {
            if matches!(target, Target::Http { hosts: Some(_), .. }) {
                warn(
                    format!("spec.rules[{rule_at}].to[{to_at}].http.hosts"),
                    "the caller chooses the host, so this Deny can be evaded".to_owned(),
                    "leave `hosts` out of a Deny",
                );
            }
        }
    }
}

/// A port that another policy, or the same, names for http or grpc never carries opaque bytes.
fn conflicts(selected: &Selected, lowered: &Lowered, warn: &mut impl FnMut(String, String, &str)) {
    let Ports::Named(ports) = &selected.ports else {
        return;
    };
    let for_opaque = has(selected, |to| matches!(to, To::Tcp | To::Anything));
    if selected.effect == Effect::Deny || selected.audit || !for_opaque {
        return;
    }
    for port in ports {
        if carries_opaque(&lowered.selected, lowered.left_open, Some(*port)) {
            continue;
        }
        let others: BTreeSet<&str> = lowered
            .selected
            .iter()
            .filter(|other| !other.audit && other.ports != Ports::Open)
            .filter(|other| covers(&other.ports, Some(*port)))
            .filter(|other| has(other, |to| matches!(to, To::Http(_) | To::Grpc(_))))
            .map(|other| &*other.name)
            .collect();
        let others = others.into_iter().collect::<Vec<_>>().join(", ");
        warn(
            "spec.ports".to_owned(),
            format!("port {port} never carries opaque bytes: {others} names it for http or grpc"),
            "let one port carry either requests or opaque bytes",
        );
    }
}

fn has(policy: &Selected, wanted: fn(&To) -> bool) -> bool {
    policy.rules.iter().flat_map(|rule| &rule.to).any(wanted)
}
