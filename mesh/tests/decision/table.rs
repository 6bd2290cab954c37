//! The truth table: enforcement × action × mode × match × protocol, and each sentence of "What
//! decides".

use std::sync::Arc;

use sidegate_mesh::policy::reason;
use sidegate_mesh::policy::{Ask, Caller, HttpAsk};
use sidegate_mesh::resource::{Action, Kind, Mode, Selector};
use sidegate_mesh::{BrokenResource, Enforcement, Policy, Problem, ResourceSet, Verdict};

use crate::world::{allow, decide, decide_for, deny, id, policy, set, workload};

const PORT: u16 = 8080;

/// What is called, and how.
const CALLS: [&str; 7] = [
    "GET /x",
    "POST /s.A/M",
    "GET /x upgrade=websocket",
    "GET /x upgrade=h2c",
    "POST /s.A/M grpc",
    "tcp",
    "plaintext",
];

/// Kinds of rule with what an Allow and a Deny of it say about each of `CALLS`.
const RULES: [(&str, &str, &str); 5] = [
    (
        "http: {methods: ['*'], paths: ['/**']}",
        "yy--y--",
        "yyyyyy-",
    ),
    (
        "http: {methods: ['*'], paths: ['/**'], upgrades: [websocket]}",
        "--y----",
        "--y--y-",
    ),
    ("grpc: {service: s.A, methods: [M]}", "----y--", "-y--yy-"),
    ("tcp: {}", "-----y-", "yyyyyy-"),
    ("anything: {}", "yy--yy-", "yyyyyy-"),
];

/// What admits each of `CALLS` when no Deny is in the way.
fn base(call: &str) -> String {
    let from = "[{anyone: {}}, {unauthenticated: {}}]";
    let to = match call {
        "tcp" => "[{anything: {}}]",
        _ => {
            "[{http: {methods: ['*'], paths: ['/**']}}, {http: {methods: ['*'], paths: ['/**'], upgrades: [websocket]}}]"
        }
    };
    format!(
        "{{selector: {{}}, ports: [8080], action: Allow, rules: [{{name: base, from: {from}, to: {to}}}]}}"
    )
}

#[test]
fn the_truth_table_holds() {
    let mut rows = 0;
    for enforcement in [Enforcement::Enforce, Enforcement::Audit] {
        for action in ["Allow", "Deny"] {
            for mode in ["Enforce", "Audit"] {
                for from_matches in [true, false] {
                    for (to, allows, denies) in RULES {
                        for (at, call) in CALLS.into_iter().enumerate() {
                            let says = if action == "Allow" { allows } else { denies };
                            let matches = from_matches && says.as_bytes()[at] == b'y';
                            check_row(
                                enforcement,
                                (action, mode, to),
                                (from_matches, matches),
                                call,
                            );
                            rows += 1;
                        }
                    }
                }
            }
        }
    }
    assert_eq!(rows, 2 * 2 * 2 * 2 * 5 * 7);
}

fn check_row(
    enforcement: Enforcement,
    (action, mode, to): (&str, &str, &str),
    (from_matches, matches): (bool, bool),
    call: &str,
) {
    let caller = if from_matches { "web" } else { "other" };
    let spec = format!(
        "{{selector: {{}}, ports: [8080], action: {action}, mode: {mode}, \
         rules: [{{name: r, from: [{{workload: {{serviceAccount: {caller}}}}}], to: [{{{to}}}]}}]}}"
    );
    let base = base(call);
    let (who, asked) = if call == "plaintext" {
        ("-", "GET /x")
    } else {
        ("shop/web", call)
    };
    let mut policies = vec![("p", spec.as_str())];
    // A Deny shows on what is allowed otherwise; nothing else admits an upgrade to h2c.
    let has_base = action == "Deny" && call != "GET /x upgrade=h2c";
    if has_base {
        policies.push(("base", &base));
    }
    let decision = decide_for(&workload(enforcement), &policies, (who, PORT, asked));
    let row = format!("{enforcement:?} {action} {mode} {to} {call} {from_matches} {decision:?}");

    // A rule for http that counts closes the port to opaque bytes, whoever calls.
    let is_http = to.starts_with("http") || to.starts_with("grpc");
    let refused_bytes = call == "tcp" && mode == "Enforce" && is_http;
    let refused = match enforcement {
        Enforcement::Enforce => Verdict::Deny,
        Enforcement::Audit => Verdict::WouldDeny,
    };
    let counts = matches && mode == "Enforce";
    let expected = match action {
        _ if refused_bytes => Verdict::Deny,
        "Allow" if counts => Verdict::Allow,
        "Deny" if has_base && !counts => Verdict::Allow,
        _ => refused,
    };
    assert_eq!(decision.verdict, expected, "{row}");
    assert_eq!(decision.is_served(), expected != Verdict::Deny, "{row}");
    let audited =
        (matches && mode == "Audit").then(|| format!("{} shop/p/r", action.to_lowercase()));
    assert_eq!(decision.audit.as_deref(), audited.as_deref(), "{row}");
    if counts && !refused_bytes {
        assert_eq!(decision.policy.as_deref(), Some("shop/p"), "{row}");
        assert_eq!(decision.rule.as_deref(), Some("r"), "{row}");
    }
}

#[track_caller]
fn check(policies: &[(&str, &str)], call: (&str, u16, &str), allowed: bool) {
    let decision = decide(policies, call);
    let verdict = if allowed {
        Verdict::Allow
    } else {
        Verdict::Deny
    };
    assert_eq!(decision.verdict, verdict, "{call:?} {decision:?}");
}

#[track_caller]
fn check_allow(to: &str, call: &str, allowed: bool) {
    check(&[("p", &allow("", to))], ("shop/web", PORT, call), allowed);
}

/// Whether a Deny of `to` stops a call that another policy allows.
#[track_caller]
fn check_deny(to: &str, call: &str, denied: bool) {
    let all = allow(
        "ports: [8080],",
        "{http: {methods: ['*'], paths: ['/**']}}, {http: {methods: ['*'], paths: ['/**'], upgrades: [websocket]}}",
    );
    let policies = [("p", deny("ports: [8080],", to)), ("q", all)];
    let policies: Vec<(&str, &str)> = policies.iter().map(|(n, s)| (*n, s.as_str())).collect();
    check(&policies, ("shop/web", PORT, call), !denied);
}

#[test]
fn nothing_is_allowed_without_a_policy() {
    let decision = decide(&[], ("shop/web", PORT, "GET /x"));
    assert_eq!(
        (decision.verdict, decision.reason),
        (Verdict::Deny, reason::NO_POLICY)
    );
    let allowed = allow("", "{http: {methods: [GET], paths: [/x]}}");
    let decision = decide(&[("p", &allowed)], ("shop/web", PORT, "GET /y"));
    assert_eq!(
        (decision.verdict, decision.reason),
        (Verdict::Deny, "no rule admits")
    );
}

#[test]
fn a_matching_deny_wins_over_every_allow() {
    let to = "{http: {methods: [GET], paths: [/x]}}";
    let (allowed, denied) = (allow("", to), deny("", to));
    for policies in [
        [("a", allowed.as_str()), ("b", denied.as_str())],
        [("a", denied.as_str()), ("b", allowed.as_str())],
    ] {
        let decision = decide(&policies, ("shop/web", PORT, "GET /x"));
        assert_eq!(
            (decision.verdict, decision.reason),
            (Verdict::Deny, "denied by rule")
        );
    }
}

#[test]
fn the_first_matching_rule_by_name_and_place_is_the_one_on_record() {
    let spec = "{selector: {}, action: Allow, rules: [
        {from: [{anyone: {}}], to: [{http: {methods: [PUT], paths: ['/**']}}]},
        {from: [{anyone: {}}], to: [{http: {methods: ['*'], paths: ['/*']}}]},
        {name: third, from: [{anyone: {}}], to: [{http: {methods: [GET], paths: [/x]}}]}]}";
    let decision = decide(&[("b", spec), ("a", spec)], ("shop/web", PORT, "GET /x"));
    assert_eq!(decision.policy.as_deref(), Some("shop/a"));
    assert_eq!(decision.rule.as_deref(), Some("1"));
    assert_eq!(decision.reason, "allowed by rule");
}

#[test]
fn a_star_is_one_segment_and_two_are_any_number() {
    let to = "{http: {methods: [GET], paths: ['/orders/*', '/health/**']}}";
    for (path, allowed) in [
        ("/orders/7", true),
        ("/orders", false),
        ("/orders/", false),
        ("/orders/7/", false),
        ("/orders/7/events", false),
        ("/health", true),
        ("/health/", true),
        ("/health/a/b", true),
        ("/healthy", false),
        ("/", false),
    ] {
        check_allow(to, &format!("GET {path}"), allowed);
    }
}

#[test]
fn a_deny_also_covers_the_path_with_a_slash_at_its_end() {
    let to = "{http: {methods: [GET], paths: [/x, '/y/*', /z/]}}";
    for (path, denied) in [
        ("/x", true),
        ("/x/", true),
        ("/x/a", false),
        ("/y/a", true),
        ("/y/a/", true),
        ("/y/", false),
        ("/z/", true),
        ("/z", true),
    ] {
        check_deny(to, &format!("GET {path}"), denied);
    }
    check_allow("{http: {methods: [GET], paths: [/x]}}", "GET /x/", false);
}

#[test]
fn head_is_not_get_and_a_deny_knows_no_case() {
    check_allow("{http: {methods: [GET], paths: [/x]}}", "HEAD /x", false);
    check_allow("{http: {methods: [HEAD], paths: [/x]}}", "GET /x", false);
    check_allow("{http: {methods: [GET], paths: [/x]}}", "get /x", false);
    check_allow("{http: {methods: ['*'], paths: [/x]}}", "PURGE /x", true);
    check_allow("{http: {methods: [PURGE], paths: [/x]}}", "PURGE /x", true);
    check_allow("{http: {methods: [PURGE], paths: [/x]}}", "purge /x", false);
    check_deny("{http: {methods: [GET], paths: [/x]}}", "HEAD /x", false);
    check_deny("{http: {methods: [GET], paths: [/x]}}", "get /x", true);
    check_deny("{http: {methods: [PURGE], paths: [/x]}}", "Purge /x", true);
}

#[test]
fn a_deny_for_grpc_matches_the_path_whatever_the_content_type() {
    let to = "{grpc: {service: s.A, methods: [M]}}";
    for call in [
        "POST /s.A/M grpc",
        "POST /s.A/M",
        "GET /s.A/M",
        "POST /s.A/M/",
    ] {
        check_deny(to, call, true);
    }
    check_deny(to, "POST /s.A/N grpc", false);
    check_deny(
        "{grpc: {service: s.A, methods: ['*']}}",
        "POST /s.A/N grpc",
        true,
    );
    check_deny(
        "{grpc: {service: s.A, methods: ['*']}}",
        "POST /s.B/N grpc",
        false,
    );
}

#[test]
fn an_allow_for_grpc_is_for_a_grpc_call_only() {
    let to = "{grpc: {service: s.A, methods: [M]}}";
    check_allow(to, "POST /s.A/M grpc", true);
    check_allow(to, "POST /s.A/M", false);
    check_allow(to, "GET /s.A/M grpc", false);
    check_allow(to, "POST /s.A/M/ grpc", false);
    check_allow(to, "POST /s.A/M grpc upgrade=websocket", false);
    check_allow(to, "POST /s.A/N grpc", false);
    check_allow(
        "{grpc: {service: s.A, methods: ['*']}}",
        "POST /s.A/N grpc",
        true,
    );
    check_allow(
        "{grpc: {service: s.A, methods: ['*']}}",
        "POST /s.A/N-1 grpc",
        false,
    );
}

#[test]
fn an_upgrade_takes_a_rule_that_lists_it() {
    let listed = "{http: {methods: [GET], paths: [/x], upgrades: [websocket]}}";
    check_allow(listed, "GET /x upgrade=websocket", true);
    check_allow(listed, "GET /x upgrade=WebSocket", true);
    check_allow(listed, "GET /x upgrade=h2c", false);
    check_allow(listed, "GET /x", false);
    for to in ["{http: {methods: [GET], paths: [/x]}}", "{anything: {}}"] {
        check(
            &[("p", &allow("ports: [8080],", to))],
            ("shop/web", PORT, "GET /x upgrade=websocket"),
            false,
        );
        check(
            &[("p", &allow("ports: [8080],", to))],
            ("shop/web", PORT, "GET /x"),
            true,
        );
    }
    check_deny(
        "{http: {methods: [GET], paths: [/x]}}",
        "GET /x upgrade=websocket",
        true,
    );
    check_deny(listed, "GET /x upgrade=websocket", true);
    check_deny(listed, "GET /x", false);
}

#[test]
fn hosts_compare_after_every_name_form_is_brought_to_one() {
    let spellings = [
        "orders",
        "orders.shop",
        "orders.shop.svc",
        "orders.shop.svc.cluster.local",
        "orders.shop.svc.mesh.local",
        "orders:80",
        "ORDERS.Shop.:8080",
        "orders.shop.svc.cluster.local:443",
    ];
    for written in spellings.iter().filter(|name| !name.contains(':')) {
        let to = format!("{{http: {{methods: [GET], paths: [/x], hosts: [{written}]}}}}");
        for called in spellings {
            check_allow(&to, &format!("GET /x host={called}"), true);
        }
        for called in [
            "orders.jobs",
            "order",
            "orders.shop.svc.other.local",
            "10.0.0.1",
        ] {
            check_allow(&to, &format!("GET /x host={called}"), false);
        }
        check_allow(&to, "GET /x", false);
    }
    let foreign = "{http: {methods: [GET], paths: [/x], hosts: [api.example.com]}}";
    check_allow(foreign, "GET /x host=API.example.com:8443", true);
    check_allow(foreign, "GET /x host=example.com", false);
}

#[test]
fn a_deny_with_hosts_also_covers_a_request_without_one() {
    let to = "{http: {methods: [GET], paths: [/x], hosts: [orders.shop]}}";
    check_deny(to, "GET /x host=orders", true);
    check_deny(to, "GET /x", true);
    check_deny(to, "GET /x host=orders.jobs", false);
}

#[test]
fn identities_match_exactly_or_by_namespace() {
    let from = |from: &str| {
        format!(
            "{{selector: {{}}, action: Allow, rules: [{{from: [{from}], to: [{{http: {{methods: [GET], paths: [/x]}}}}]}}]}}"
        )
    };
    let check = |source: &str, caller: &str, allowed: bool| {
        check(&[("p", &from(source))], (caller, PORT, "GET /x"), allowed);
    };
    check("{workload: {serviceAccount: web}}", "shop/web", true);
    check("{workload: {serviceAccount: web}}", "jobs/web", false);
    check("{workload: {serviceAccount: web}}", "shop/webx", false);
    check(
        "{workload: {serviceAccount: web}}",
        "spiffe://other/ns/shop/sa/web",
        false,
    );
    check(
        "{workload: {serviceAccount: batch, namespace: jobs}}",
        "jobs/batch",
        true,
    );
    check(
        "{workload: {serviceAccount: batch, namespace: jobs}}",
        "shop/batch",
        false,
    );
    check("{namespace: {name: jobs}}", "jobs/any", true);
    check("{namespace: {name: jobs}}", "jobsx/any", false);
    check(
        "{namespace: {name: jobs}}",
        "spiffe://other/ns/jobs/sa/any",
        false,
    );
    check(
        "{namespace: {name: jobs}}",
        "spiffe://mesh.local/ns/jobs/sa/any/more",
        false,
    );
    let partner = "spiffe://partner.example/ns/x/sa/y";
    check(&format!("{{spiffeId: {{id: '{partner}'}}}}"), partner, true);
    check(&format!("{{spiffeId: {{id: '{partner}'}}}}"), "x/y", false);
}

#[test]
fn anyone_is_any_identity_of_our_own_trust_domain() {
    let to = allow("", "{http: {methods: [GET], paths: [/x]}}");
    check(&[("p", &to)], ("jobs/batch", PORT, "GET /x"), true);
    check(
        &[("p", &to)],
        ("spiffe://other/ns/shop/sa/web", PORT, "GET /x"),
        false,
    );
    check(&[("p", &to)], ("-", PORT, "GET /x"), false);
}

#[test]
fn unauthenticated_matches_plaintext_callers_and_nothing_else_does() {
    let spec = |from: &str| {
        format!(
            "{{selector: {{}}, action: Allow, rules: [{{from: [{from}], to: [{{http: {{methods: [GET], paths: [/x]}}}}]}}]}}"
        )
    };
    let plaintext = spec("{unauthenticated: {}}");
    check(&[("p", &plaintext)], ("-", PORT, "GET /x"), true);
    check(&[("p", &plaintext)], ("shop/web", PORT, "GET /x"), false);
    for from in [
        "{anyone: {}}",
        "{namespace: {name: shop}}",
        "{workload: {serviceAccount: web}}",
    ] {
        check(&[("p", &spec(from))], ("-", PORT, "GET /x"), false);
    }
}

#[test]
fn a_deny_whose_port_name_does_not_resolve_covers_all_ports_an_allow_none() {
    let to = "{http: {methods: [GET], paths: [/x]}}";
    let all = allow("", to);
    for port in [8080, 9090, 4444] {
        let denied = deny("ports: [nope],", to);
        check(
            &[("p", &denied), ("q", &all)],
            ("shop/web", port, "GET /x"),
            false,
        );
        let denied = deny("ports: [http, nope],", to);
        check(
            &[("p", &denied), ("q", &all)],
            ("shop/web", port, "GET /x"),
            false,
        );
        let allowed = allow("ports: [nope],", to);
        check(&[("p", &allowed)], ("shop/web", port, "GET /x"), false);
        let allowed = allow("ports: [http, nope],", to);
        check(
            &[("p", &allowed)],
            ("shop/web", port, "GET /x"),
            port == 8080,
        );
        let denied = deny("ports: [http],", to);
        check(
            &[("p", &denied), ("q", &all)],
            ("shop/web", port, "GET /x"),
            port != 8080,
        );
    }
}

#[test]
fn on_an_opaque_connection_a_deny_counts_by_its_from_alone() {
    let bytes = allow("ports: [6379],", "{tcp: {}}");
    check(&[("q", &bytes)], ("shop/web", 6379, "tcp"), true);
    for to in [
        "{http: {methods: [GET], paths: [/x]}}",
        "{grpc: {service: s.A, methods: [M]}}",
    ] {
        let denied = deny("", to);
        check(
            &[("p", &denied), ("q", &bytes)],
            ("shop/web", 6379, "tcp"),
            false,
        );
        let elsewhere = deny("ports: [http],", to);
        check(
            &[("p", &elsewhere), ("q", &bytes)],
            ("shop/web", 6379, "tcp"),
            true,
        );
    }
}

#[track_caller]
fn check_carries(policies: &[(&str, String)], expected: [bool; 3]) {
    let policies: Vec<_> = policies.iter().map(|(n, s)| (*n, s.as_str())).collect();
    let (policy, _) = Policy::compile(&set(&policies), &workload(Enforcement::Enforce));
    let carries = [8080, 9090, 6379].map(|port| policy.carries_opaque(port));
    assert_eq!(carries, expected);
}

#[test]
fn a_port_with_http_or_grpc_policy_never_carries_opaque_bytes() {
    let http = "{http: {methods: [GET], paths: [/x]}}";
    let grpc = "{grpc: {service: s.A, methods: [M]}}";
    let tcp = |ports: &str| allow(&format!("ports: [{ports}],"), "{tcp: {}}");
    // Nothing is said of a port.
    check_carries(&[], [true; 3]);
    // Named.
    check_carries(&[("a", allow("ports: [http],", http))], [false, true, true]);
    check_carries(&[("a", deny("ports: [grpc],", grpc))], [true, false, true]);
    // Left open.
    check_carries(&[("a", allow("", http))], [false; 3]);
    // Left open, but named for bytes.
    check_carries(
        &[("a", allow("", http)), ("b", tcp("6379"))],
        [false, false, true],
    );
    check_carries(
        &[
            ("a", allow("", grpc)),
            ("b", allow("ports: [6379],", "{anything: {}}")),
        ],
        [false, false, true],
    );
    // Named for both: http wins, also within one policy.
    check_carries(
        &[("a", allow("ports: [http],", http)), ("b", tcp("http"))],
        [false, true, true],
    );
    check_carries(
        &[(
            "a",
            allow("ports: [http],", &format!("{http}, {{tcp: {{}}}}")),
        )],
        [false, true, true],
    );
    // What only audits neither closes a port nor opens one.
    check_carries(
        &[("a", allow("ports: [http], mode: Audit,", http))],
        [true; 3],
    );
    check_carries(
        &[
            ("a", allow("", http)),
            ("b", allow("ports: [6379], mode: Audit,", "{tcp: {}}")),
        ],
        [false; 3],
    );
    // A Deny opens none.
    check_carries(
        &[
            ("a", allow("", http)),
            ("b", deny("ports: [6379],", "{tcp: {}}")),
        ],
        [false; 3],
    );
    // A Deny that may have meant any port closes all.
    check_carries(
        &[("a", deny("ports: [nope],", http)), ("b", tcp("6379"))],
        [false; 3],
    );
}

#[test]
fn bytes_on_an_http_port_are_refused_also_where_only_audited() {
    let spec = allow("ports: [http],", "{http: {methods: [GET], paths: [/x]}}");
    let workload = workload(Enforcement::Audit);
    let decision = decide_for(&workload, &[("p", &spec)], ("shop/web", PORT, "tcp"));
    assert_eq!(
        (decision.verdict, decision.reason),
        (Verdict::Deny, reason::OPAQUE)
    );
    let decision = decide_for(&workload, &[("p", &spec)], ("shop/web", 6379, "tcp"));
    assert_eq!(decision.verdict, Verdict::WouldDeny);
}

#[test]
fn a_mesh_wide_policy_selects_in_every_namespace_that_its_selector_names() {
    let to = "{http: {methods: [GET], paths: [/x]}}";
    let own = allow("", to);
    let denied = |rest: &str| deny(rest, to);
    let check = |name: &str, rest: &str, denies: bool| {
        let spec = denied(rest);
        check(
            &[(name, &spec), ("q", &own)],
            ("shop/web", PORT, "GET /x"),
            !denies,
        );
    };
    check("sidegate-system/p", "", true);
    check("jobs/p", "", false);
    let name = "kubernetes.io/metadata.name";
    check(
        "sidegate-system/p",
        &format!("namespaceSelector: {{matchLabels: {{{name}: shop}}}},"),
        true,
    );
    check(
        "sidegate-system/p",
        &format!("namespaceSelector: {{matchLabels: {{{name}: jobs}}}},"),
        false,
    );
    // Standalone no other label of a namespace is known: a Deny is wide, an Allow narrow.
    let other = "namespaceSelector: {matchLabels: {env: prod}},";
    check("sidegate-system/p", other, true);
    let allowed = allow(other, to);
    crate::table::check(
        &[("sidegate-system/p", &allowed)],
        ("shop/web", PORT, "GET /x"),
        false,
    );
}

#[test]
fn a_selector_that_does_not_match_selects_nothing() {
    let spec = "{selector: {matchLabels: {app: other}}, action: Allow, rules: [{from: [{anyone: {}}], to: [{http: {methods: [GET], paths: [/x]}}]}]}";
    check(&[("p", spec)], ("shop/web", PORT, "GET /x"), false);
    let spec = spec.replace("other", "orders");
    check(&[("p", &spec)], ("shop/web", PORT, "GET /x"), true);
}

/// What could be read of a policy that does not compile.
fn broken(namespace: Option<&str>, action: Option<Action>, app: Option<&str>) -> BrokenResource {
    let selector = app.map(|app| Selector {
        match_labels: [("app".to_owned(), app.to_owned())].into(),
    });
    BrokenResource {
        kind: Some(Kind::AuthorizationPolicy),
        namespace: namespace.map(str::to_owned),
        name: Some("broken".to_owned()),
        action,
        mode: None,
        selector,
        problem: Problem::of_file("p.yaml", "broken", "mend it"),
    }
}

#[test]
fn a_broken_policy_without_a_last_good_version_never_widens() {
    let own = policy(
        "q",
        &allow("ports: [http],", "{http: {methods: [GET], paths: [/x]}}"),
    );
    let check = |broken: BrokenResource, denies: bool| {
        let set = ResourceSet {
            policies: vec![Arc::clone(&own)],
            broken: vec![broken.clone()],
            ..ResourceSet::default()
        };
        let (policy, _) = Policy::compile(&set, &workload(Enforcement::Enforce));
        let request = crate::world::Request::new("GET /x");
        let caller = id("shop/web");
        let decision = policy.authorize(Caller::Mesh(&caller), PORT, &request.ask());
        assert_eq!(decision.is_served(), !denies, "{broken:?}");
        if denies {
            assert_eq!(decision.reason, reason::BROKEN);
        }
        // Gone, it might have left every port open for http: bytes don't profit.
        let concerns = broken.namespace.as_deref() != Some("jobs")
            && broken.kind != Some(Kind::StaticService)
            && broken.mode != Some(Mode::Audit)
            && broken
                .selector
                .as_ref()
                .is_none_or(|s| s.match_labels["app"] == "orders");
        assert_eq!(policy.carries_opaque(6379), !concerns, "{broken:?}");
    };
    let (allow, deny) = (Some(Action::Allow), Some(Action::Deny));
    check(broken(Some("shop"), deny, Some("orders")), true);
    check(broken(Some("shop"), deny, Some("other")), false);
    check(broken(Some("shop"), deny, None), true);
    check(broken(Some("jobs"), deny, None), false);
    check(broken(Some("sidegate-system"), deny, None), true);
    check(broken(None, deny, None), true);
    check(broken(Some("shop"), None, None), true);
    check(broken(Some("shop"), allow, None), false);
    let mut other_kind = broken(Some("shop"), None, None);
    other_kind.kind = Some(Kind::StaticService);
    check(other_kind, false);
    let mut unknown_kind = broken(Some("shop"), None, None);
    unknown_kind.kind = None;
    check(unknown_kind, true);
    let mut audit = broken(Some("shop"), deny, None);
    audit.mode = Some(Mode::Audit);
    check(audit, false);
}

#[test]
fn an_audit_workload_says_what_it_would_have_denied() {
    let spec = deny("", "{http: {methods: [GET], paths: [/x]}}");
    let decision = decide_for(
        &workload(Enforcement::Audit),
        &[("p", &spec)],
        ("shop/web", PORT, "GET /x"),
    );
    assert!(decision.is_served());
    assert_eq!(decision.verdict, Verdict::WouldDeny);
    assert_eq!(decision.policy.as_deref(), Some("shop/p"));
    assert_eq!(decision.reason, reason::DENIED);
    let decision = decide_for(&workload(Enforcement::Audit), &[], ("-", PORT, "GET /x"));
    assert_eq!(
        (decision.verdict, decision.reason),
        (Verdict::WouldDeny, reason::NO_POLICY)
    );
}

#[test]
fn a_call_without_a_certificate_may_not_send_bytes_as_anyone() {
    let (policy, _) = Policy::compile(
        &set(&[("p", &allow("ports: [6379],", "{tcp: {}}"))]),
        &workload(Enforcement::Enforce),
    );
    let decision = policy.authorize(Caller::Unauthenticated, 6379, &Ask::Opaque);
    assert_eq!(decision.verdict, Verdict::Deny);
}

#[test]
fn a_call_without_an_identity_on_a_port_not_listed_for_such_is_never_allowed() {
    let spec = "{selector: {}, ports: [8080], action: Allow, rules: [{name: r, \
                from: [{unauthenticated: {}}], to: [{http: {methods: ['*'], paths: ['/**']}}]}]}";
    let (path, authority) = ("/x".parse().unwrap(), None);
    let ask = Ask::Http(HttpAsk {
        method: "GET",
        path: &path,
        authority,
        upgrade: None,
        grpc: false,
    });
    for (enforcement, verdict) in [
        (Enforcement::Enforce, Verdict::Deny),
        (Enforcement::Audit, Verdict::WouldDeny),
    ] {
        let (policy, _) = Policy::compile(&set(&[("p", spec)]), &workload(enforcement));
        assert_eq!(policy.enforcement(), enforcement);
        let listed = policy.authorize(Caller::Unauthenticated, 8080, &ask);
        assert_eq!(listed.verdict, Verdict::Allow);
        let decision = policy.without_identity(8080, &ask);
        assert_eq!(decision.verdict, verdict);
        assert_eq!(decision.reason, reason::NO_IDENTITY);
        assert_eq!((decision.policy, decision.rule), (None, None));
        // Bytes never pass for HTTP, whoever sends them and also where only audited.
        let bytes = policy.without_identity(8080, &Ask::Opaque);
        assert_eq!(
            (bytes.verdict, bytes.reason),
            (Verdict::Deny, reason::OPAQUE)
        );
    }
}
