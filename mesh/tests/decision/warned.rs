//! What compiles and is warned about.

use std::sync::Arc;

use sidegate_mesh::policy::selecting_nothing;
use sidegate_mesh::{Enforcement, Policy, Snapshot};

use crate::world::{allow, deny, policy, set, workload};

/// The warnings, each as `policy field: message`.
fn warnings(policies: &[(&str, String)]) -> Vec<String> {
    let policies: Vec<_> = policies.iter().map(|(n, s)| (*n, s.as_str())).collect();
    let (_, problems) = Policy::compile(&set(&policies), &workload(Enforcement::Enforce));
    let text = |problem: &sidegate_mesh::Problem| {
        assert!(!problem.is_error() && problem.help.is_some());
        let key = problem.resource.as_ref().unwrap();
        let field = problem.field.as_deref().unwrap();
        format!("{} {field}: {}", key.name, problem.message)
    };
    problems.iter().map(text).collect()
}

const HTTP: &str = "{http: {methods: [GET], paths: [/x]}}";

#[test]
fn what_is_meant_so_is_not_warned_about() {
    let all = [
        ("a", allow("ports: [http, 9090],", HTTP)),
        ("b", allow("ports: [6379],", "{tcp: {}}")),
        ("c", deny("", HTTP)),
        (
            "d",
            allow(
                "",
                "{http: {methods: [GET], paths: [/y], upgrades: [websocket]}}",
            ),
        ),
    ];
    assert_eq!(warnings(&all), Vec::<String>::new());
}

#[test]
fn hosts_in_a_deny_are_warned_about() {
    let spec = deny("", "{http: {methods: [GET], paths: [/x], hosts: [orders]}}");
    assert_eq!(
        warnings(&[("a", spec)]),
        [
            "a spec.rules[0].to[0].http.hosts: the caller chooses the host, so this Deny can be evaded"
        ]
    );
}

#[test]
fn a_port_name_that_does_not_resolve_is_warned_about() {
    assert_eq!(
        warnings(&[
            ("a", allow("ports: [http, nope],", HTTP)),
            ("b", deny("ports: [nope],", HTTP))
        ]),
        [
            "a spec.ports[1]: no port of workload spiffe://mesh.local/ns/shop/sa/orders is named \
             `nope`, so this Allow gives nothing there",
            "b spec.ports[0]: no port of workload spiffe://mesh.local/ns/shop/sa/orders is named \
             `nope`, so this Deny covers every port",
        ]
    );
}

#[test]
fn two_policies_in_conflict_over_a_port_are_warned_about() {
    let conflict = warnings(&[
        ("a", allow("ports: [http],", HTTP)),
        ("b", allow("ports: [8080, 6379],", "{tcp: {}}")),
    ]);
    assert_eq!(
        conflict,
        ["b spec.ports: port 8080 never carries opaque bytes: shop/a names it for http or grpc"]
    );
    let within = allow("ports: [http],", &format!("{HTTP}, {{anything: {{}}}}"));
    assert_eq!(warnings(&[("a", within)]).len(), 1);
}

#[test]
fn a_rule_that_can_never_match_is_warned_about() {
    let spec = allow(
        "",
        "{http: {methods: [POST], paths: [/x], upgrades: [websocket]}}",
    );
    assert_eq!(
        warnings(&[("a", spec)]),
        [
            "a spec.rules[0].to[0].http.methods: the rule can never match: an upgrade to WebSocket is a GET"
        ]
    );
}

#[test]
fn a_policy_that_selects_no_workload_is_warned_about() {
    let other = "{selector: {matchLabels: {app: other}}, action: Allow, rules: [{from: [{anyone: {}}], to: [{http: {methods: [GET], paths: [/x]}}]}]}";
    let set = set(&[
        ("a", other),
        ("b", &allow("", HTTP)),
        ("jobs/c", &allow("", HTTP)),
    ]);
    let problems = selecting_nothing(&set, &[workload(Enforcement::Enforce)]);
    let names: Vec<_> = problems
        .iter()
        .map(|p| p.resource.as_ref().unwrap().name.as_str())
        .collect();
    assert_eq!(names, ["a", "c"]);
}

#[test]
fn a_snapshot_keeps_its_policy_while_no_policy_changes() {
    let workload = workload(Enforcement::Enforce);
    let mut set = set(&[
        ("a", &allow("", HTTP)),
        ("b", &deny("ports: [nope],", HTTP)),
    ]);
    let (first, problems) = Snapshot::compile(&set, &workload, 1);
    assert_eq!(problems.len(), 1);
    // The same text read again is the same policy.
    set.policies[0] = policy("a", &allow("", HTTP));
    set.services.push(Arc::new(crate::world::service(
        "orders",
        "[{port: 80}]",
        "[]",
    )));
    let (second, problems) = Snapshot::recompile(&first, &set, &workload, 2);
    assert!(Arc::ptr_eq(&first.policy, &second.policy));
    assert!(!Arc::ptr_eq(&first.routes, &second.routes));
    assert_eq!((second.number, problems.len()), (2, 1));
    set.policies[0] = policy("a", &deny("", HTTP));
    let (third, _) = Snapshot::recompile(&second, &set, &workload, 3);
    assert!(!Arc::ptr_eq(&second.policy, &third.policy));
    assert!(Arc::ptr_eq(&second.routes, &third.routes));
    let mut renamed = workload.clone();
    renamed.labels.clear();
    let (fourth, _) = Snapshot::recompile(&third, &set, &renamed, 4);
    assert!(!Arc::ptr_eq(&third.policy, &fourth.policy));
}
