//! `explain`: each rule with the first predicate that failed and what was compared.

use sidegate_mesh::policy::{Ask, Caller};
use sidegate_mesh::{Enforcement, Explanation, Policy};

use crate::world::{Request, allow, deny, id, set, workload};

fn explain(policies: &[(&str, &str)], (caller, port, call): (&str, u16, &str)) -> Explanation {
    let (policy, _) = Policy::compile(&set(policies), &workload(Enforcement::Enforce));
    let id = (caller != "-").then(|| id(caller));
    let caller = id.as_ref().map_or(Caller::Unauthenticated, Caller::Mesh);
    if call == "tcp" {
        return policy.explain(caller, port, &Ask::Opaque);
    }
    policy.explain(caller, port, &Request::new(call).ask())
}

/// What failed of the only rule.
fn failed(spec: &str, call: (&str, u16, &str)) -> String {
    let explained = explain(&[("p", spec)], call);
    explained.policies[0].rules[0]
        .failed
        .clone()
        .unwrap_or_default()
}

#[test]
fn the_first_predicate_that_failed_is_named_with_what_was_compared() {
    let to = "{http: {methods: [GET, HEAD], paths: [/x, '/y/*'], hosts: [orders.shop]}}";
    let spec = allow("ports: [http],", to);
    let web = "shop/web";
    for (call, expected) in [
        ((web, 8080, "GET /x host=orders"), ""),
        ((web, 9090, "POST /z"), "port 9090 is not in [8080]"),
        (
            ("-", 8080, "GET /x"),
            "caller is unauthenticated, rule wants any identity of this trust domain",
        ),
        ((web, 8080, "POST /z"), "method POST is not in [GET, HEAD]"),
        ((web, 8080, "GET /z"), "path /z matches none of [/x, /y/*]"),
        (
            (web, 8080, "GET /x host=ledger"),
            "host ledger is not in [orders.shop]",
        ),
        (
            (web, 8080, "GET /x"),
            "call names no host, rule wants [orders.shop]",
        ),
        (
            (web, 8080, "GET /x host=orders upgrade=h2c"),
            "call upgrades to h2c, rule lists no upgrades",
        ),
        (
            (web, 8080, "tcp"),
            "call is opaque tcp, rule is for http or grpc",
        ),
    ] {
        assert_eq!(failed(&spec, call), expected, "{call:?}");
    }
    let partner = "{selector: {}, action: Allow, rules: [{from: [{workload: {serviceAccount: web}}, {namespace: {name: jobs}}], to: [{anything: {}}]}], ports: [8080]}";
    assert_eq!(
        failed(partner, ("shop/other", 8080, "GET /x")),
        "caller is spiffe://mesh.local/ns/shop/sa/other, rule wants \
         spiffe://mesh.local/ns/shop/sa/web or any service account of namespace jobs"
    );
}

#[test]
fn grpc_upgrades_and_bytes_are_explained_in_their_own_words() {
    let grpc = allow("", "{grpc: {service: s.A, methods: [M]}}");
    let upgrade = allow(
        "",
        "{http: {methods: [GET], paths: [/x], upgrades: [websocket]}}",
    );
    let tcp = allow("ports: [6379],", "{tcp: {}}");
    let web = "shop/web";
    for (spec, call, expected) in [
        (
            &grpc,
            (web, 8080, "POST /s.A/M"),
            "content type is not gRPC's, rule is for grpc",
        ),
        (
            &grpc,
            (web, 8080, "GET /s.A/M grpc"),
            "method GET is not POST, rule is for grpc",
        ),
        (
            &grpc,
            (web, 8080, "POST /s.A grpc"),
            "path /s.A is not of the form /service/method",
        ),
        (
            &grpc,
            (web, 8080, "POST /s.B/M grpc"),
            "grpc service is s.B, rule wants s.A",
        ),
        (
            &grpc,
            (web, 8080, "POST /s.A/N grpc"),
            "grpc method N is not in [M]",
        ),
        (
            &upgrade,
            (web, 8080, "GET /x"),
            "call is no upgrade, rule wants [websocket]",
        ),
        (
            &upgrade,
            (web, 8080, "GET /x upgrade=h2c"),
            "upgrade h2c is not in [websocket]",
        ),
        (
            &tcp,
            (web, 6379, "GET /x"),
            "call is a request, rule is for opaque tcp",
        ),
        (&tcp, (web, 6379, "tcp"), ""),
    ] {
        assert_eq!(failed(spec, call), expected, "{call:?}");
    }
}

#[test]
fn each_target_of_a_rule_says_why_it_did_not_match() {
    let spec = allow(
        "",
        "{http: {methods: [GET], paths: [/x]}}, {grpc: {service: s.A, methods: [M]}}",
    );
    assert_eq!(
        failed(&spec, ("shop/web", 8080, "POST /x")),
        "to[0]: method POST is not in [GET]; to[1]: content type is not gRPC's, rule is for grpc"
    );
}

#[test]
fn bytes_that_a_port_does_not_carry_are_explained() {
    let spec = allow(
        "ports: [http],",
        "{http: {methods: [GET], paths: [/x]}}, {tcp: {}}",
    );
    assert_eq!(
        failed(&spec, ("shop/web", 8080, "tcp")),
        "port 8080 carries no opaque bytes: a policy names it for http or grpc"
    );
}

#[test]
fn every_policy_that_selects_the_workload_is_shown_with_its_verdict() {
    let to = "{http: {methods: [GET], paths: [/x]}}";
    let policies = [
        ("b", allow("", to)),
        ("a", deny("mode: Audit,", to)),
        ("jobs/c", allow("", to)),
    ];
    let policies: Vec<_> = policies.iter().map(|(n, s)| (*n, s.as_str())).collect();
    let explained = explain(&policies, ("shop/web", 8080, "GET /x"));
    let shown: Vec<(&str, bool, bool)> = explained
        .policies
        .iter()
        .map(|policy| (&*policy.policy, policy.audit, policy.rules[0].matched))
        .collect();
    assert_eq!(shown, [("shop/a", true, true), ("shop/b", false, true)]);
    assert!(explained.is_served());
    assert_eq!(explained.policy.as_deref(), Some("shop/b"));
    assert_eq!(explained.audit.as_deref(), Some("deny shop/a/r"));
}
