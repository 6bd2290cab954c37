//! What the parts of a resource must say together.
//!
//! Invariant: a resource that passed can do what it says; each fault names its field.

use std::collections::HashSet;
use std::hash::Hash;

use super::authorization::{AuthorizationPolicy, Rule, Target};
use super::fault::{Fault, Step};
use super::static_service::StaticService;
use super::traffic::{RetryCondition, TrafficPolicy, TrafficPolicySpec};
use super::{Resource, SYSTEM_NAMESPACE};

/// What contradicts itself in a resource; the steps of each fault lead to it, outermost last.
pub(crate) fn check(resource: &Resource) -> Vec<Fault> {
    match resource {
        Resource::AuthorizationPolicy(policy) => check_policy(policy),
        Resource::StaticService(service) => check_service(service),
        Resource::TrafficPolicy(traffic) => check_traffic(traffic),
    }
}

fn check_policy(policy: &AuthorizationPolicy) -> Vec<Fault> {
    let spec = &policy.spec;
    let mut faults = Vec::new();
    if spec.namespace_selector.is_some() && policy.metadata.namespace != SYSTEM_NAMESPACE {
        let fault = Fault::new(
            format!("only policies of the namespace `{SYSTEM_NAMESPACE}` cover other namespaces"),
            "remove `namespaceSelector`",
        );
        faults.push(in_spec(fault, ["namespaceSelector".into()]));
    }
    if spec.ports.is_none() {
        let rules = spec.rules.iter().enumerate();
        faults.extend(rules.flat_map(|(index, rule)| targets_without_ports(index, rule)));
    }
    let names = spec.rules.iter().map(|rule| rule.name.as_ref());
    faults.extend(repeated(names).map(|(index, name)| {
        let fault = Fault::new(
            format!("two rules are named `{name}`"),
            "name each rule once: the log tells them apart by their names",
        );
        in_spec(fault, ["rules".into(), index.into(), "name".into()])
    }));
    let ports = spec.ports.iter().flatten().map(Some);
    faults.extend(repeated(ports).map(|(index, port)| {
        let fault = Fault::new(format!("port {port} is listed twice"), "remove one");
        in_spec(fault, ["ports".into(), index.into()])
    }));
    faults
}

fn targets_without_ports(rule: usize, of: &Rule) -> impl Iterator<Item = Fault> {
    let opaque = |(index, target): (usize, &Target)| {
        let key = match target {
            Target::Tcp {} => "tcp",
            Target::Anything {} => "anything",
            Target::Http { .. } | Target::Grpc { .. } => return None,
        };
        Some((index, key))
    };
    of.to
        .iter()
        .enumerate()
        .filter_map(opaque)
        .map(move |(index, key)| {
            let fault = Fault::new(
                format!("`{key}` lets opaque bytes in, so the policy must name its ports"),
                "add `ports: [ … ]` to the spec, with the ports that may carry them",
            );
            in_spec(
                fault,
                ["rules".into(), rule.into(), "to".into(), index.into()],
            )
        })
}

fn check_service(service: &StaticService) -> Vec<Fault> {
    let spec = &service.spec;
    let numbers = spec.ports.iter().map(|port| Some(port.port));
    let names = spec.ports.iter().map(|port| port.name.as_ref());
    let addresses = spec.endpoints.iter().map(|endpoint| Some(endpoint.address));
    let mut faults: Vec<Fault> = repeated(numbers)
        .map(|(index, port)| {
            let fault = Fault::new(format!("port {port} is listed twice"), "remove one");
            in_spec(fault, ["ports".into(), index.into(), "port".into()])
        })
        .collect();
    faults.extend(repeated(names).map(|(index, name)| {
        let fault = Fault::new(
            format!("two ports are named `{name}`"),
            "name each port once",
        );
        in_spec(fault, ["ports".into(), index.into(), "name".into()])
    }));
    faults.extend(repeated(addresses).map(|(index, address)| {
        let fault = Fault::new(
            format!("the endpoint {address} is listed twice"),
            "keep one; an address has one identity",
        );
        in_spec(fault, ["endpoints".into(), index.into(), "address".into()])
    }));
    faults
}

fn check_traffic(traffic: &TrafficPolicy) -> Vec<Fault> {
    let spec = &traffic.spec;
    let retry = spec.retry.as_ref().map(|retry| retry.per_try_timeout);
    let grpc = spec.grpc_retry.as_ref().map(|retry| retry.per_try_timeout);
    let tries = [("retry", retry.flatten()), ("grpcRetry", grpc.flatten())];
    let mut faults: Vec<Fault> = tries
        .into_iter()
        .filter(|(_, per_try)| exceeds(*per_try, spec))
        .map(|(key, _)| {
            let fault = Fault::new(
                "one try may take longer than the whole call",
                "write less than `timeout`, or remove it",
            );
            in_spec(fault, [key.into(), "perTryTimeout".into()])
        })
        .collect();
    if let Some(retry) = &spec.retry
        && retry.per_try_timeout.is_none()
        && let Some(index) = retry
            .conditions
            .iter()
            .position(|c| *c == RetryCondition::Timeout)
    {
        let fault = Fault::new(
            "a try without a time of its own never times out alone",
            "add `perTryTimeout`, or remove the condition `timeout`",
        );
        faults.push(in_spec(
            fault,
            ["retry".into(), "conditions".into(), index.into()],
        ));
    }
    faults
}

fn exceeds(per_try: Option<std::time::Duration>, spec: &TrafficPolicySpec) -> bool {
    matches!((per_try, spec.timeout), (Some(per_try), Some(timeout)) if per_try > timeout)
}

/// The entries that stood in the list before, with their places.
fn repeated<T: Eq + Hash + Copy>(
    entries: impl Iterator<Item = Option<T>>,
) -> impl Iterator<Item = (usize, T)> {
    let mut seen = HashSet::new();
    let again = move |(index, entry): (usize, Option<T>)| {
        let entry = entry?;
        (!seen.insert(entry)).then_some((index, entry))
    };
    entries.enumerate().filter_map(again)
}

fn in_spec<const N: usize>(fault: Fault, steps: [Step; N]) -> Fault {
    let fault = steps.into_iter().rev().fold(fault, Fault::within);
    fault.within("spec".into())
}

impl From<&str> for Step {
    fn from(key: &str) -> Self {
        Self::Key(key.to_owned())
    }
}

impl From<usize> for Step {
    fn from(index: usize) -> Self {
        Self::Index(index)
    }
}
