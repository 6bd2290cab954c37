//! Resources are read strictly, and what is wrong is said with its place and its remedy.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::too_many_lines,
    missing_docs,
    reason = "tests"
)]

use std::time::Duration;

use serde_json::json;
use sidegate_mesh::resource::{
    Action, EndpointIdentity, GrpcRetryCode, Located, Mode, PortRef, RetryCondition, Source,
    Target, Upgrade, as_written, parse_documents,
};
use sidegate_mesh::{Problem, Resource};

/// The documents of `docs`' reference, word for word.
const REFERENCE: &str = include_str!("data/reference.yaml");

#[track_caller]
fn resources(text: &str) -> Vec<Resource> {
    let read = |result: Result<Located<Resource>, Problem>| match result {
        Ok(located) => located.value,
        Err(problem) => panic!("{problem}"),
    };
    parse_documents("a.yaml", text)
        .into_iter()
        .map(read)
        .collect()
}

#[track_caller]
fn refused(text: &str) -> Problem {
    let mut results = parse_documents("a.yaml", text);
    assert_eq!(results.len(), 1, "{results:?}");
    results.remove(0).unwrap_err()
}

/// A policy with this in place of its one target.
fn policy_to(target: &str) -> String {
    format!(
        "apiVersion: sidegate.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{ name: orders, namespace: shop }}\nspec:\n  selector: {{}}\n  action: Allow\n  rules:\n    - from: [{{ anyone: {{}} }}]\n      to:\n        - {target}\n"
    )
}

#[track_caller]
fn check(text: &str, line: usize, column: usize, says: &[&str]) {
    let problem = refused(text);
    assert_eq!((problem.line, problem.column), (line, column), "{problem}");
    for part in says {
        assert!(
            problem.to_string().contains(part),
            "{problem}\nlacks {part}"
        );
    }
}

#[test]
fn the_reference_is_read_as_it_is_written() {
    let resources = resources(REFERENCE);
    let [orders, ledger, service, traffic] = resources.as_slice() else {
        panic!("{}", resources.len());
    };
    let Resource::AuthorizationPolicy(orders) = orders else {
        panic!("{orders:?}");
    };
    assert_eq!(orders.metadata.namespace, "shop");
    assert_eq!(orders.spec.action, Action::Allow);
    assert_eq!(orders.spec.mode, Mode::Enforce);
    assert_eq!(orders.spec.ports, Some(vec![PortRef::Name("http".into())]));
    assert_eq!(orders.spec.selector.match_labels["app"], "orders");
    let readers = &orders.spec.rules[0];
    assert_eq!(readers.name.as_deref(), Some("readers"));
    assert_eq!(readers.from.len(), 4);
    let gateway = Source::Workload {
        service_account: "gateway".into(),
        namespace: Some("edge".into()),
    };
    assert_eq!(readers.from[1], gateway);
    let Target::Http {
        upgrades, paths, ..
    } = &readers.to[1]
    else {
        panic!("{readers:?}");
    };
    assert_eq!(upgrades, &[Upgrade::Websocket]);
    assert_eq!(paths[0].as_str(), "/orders/*/events");
    let Resource::AuthorizationPolicy(ledger) = ledger else {
        panic!("{ledger:?}");
    };
    assert_eq!(ledger.spec.ports, Some(vec![PortRef::Number(6379)]));
    assert_eq!(ledger.spec.rules[0].to, [Target::Tcp {}]);
    check_service_and_traffic(service, traffic);
}

fn check_service_and_traffic(service: &Resource, traffic: &Resource) {
    let (Resource::StaticService(service), Resource::TrafficPolicy(traffic)) = (service, traffic)
    else {
        panic!("{service:?} {traffic:?}");
    };
    assert_eq!(service.spec.endpoints[0].address.port(), 21006);
    let orders = EndpointIdentity::Workload {
        service_account: "orders".into(),
        namespace: None,
    };
    assert_eq!(service.spec.endpoints[0].identity, orders);
    assert_eq!(traffic.spec.timeout, Some(Duration::from_secs(2)));
    let retry = traffic.spec.retry.as_ref().unwrap();
    let conditions = [RetryCondition::ConnectFailure, RetryCondition::ServerError];
    assert_eq!(retry.conditions, conditions);
    assert_eq!(retry.budget.get(), 20);
    let grpc = traffic.spec.grpc_retry.as_ref().unwrap();
    assert_eq!(grpc.codes, [GrpcRetryCode::Unavailable]);
    assert_eq!(grpc.methods, ["shop.v1.Orders/Get"]);
    let ejection = traffic.spec.outlier_ejection.as_ref().unwrap();
    assert_eq!(ejection.max_ejected.get(), 50);
    assert!(traffic.spec.load_balancing.as_ref().unwrap().prefer_zone);
}

#[test]
fn what_is_written_out_is_read_again_as_yaml_and_as_json() {
    for resource in resources(REFERENCE) {
        let json = serde_json::to_string_pretty(&resource).unwrap();
        assert_eq!(resources(&json), std::slice::from_ref(&resource), "{json}");
        let one_line = serde_json::to_string(&resource).unwrap();
        assert_eq!(
            resources(&one_line),
            std::slice::from_ref(&resource),
            "{one_line}"
        );
        let tabs = json.replace("  ", "\t");
        assert_eq!(resources(&tabs), std::slice::from_ref(&resource), "{tabs}");
        let yaml = serde_saphyr::to_string(&resource).unwrap();
        assert_eq!(resources(&yaml), [resource], "{yaml}");
    }
}

#[test]
fn a_misspelt_field_is_refused_where_it_stands_with_the_word_that_was_meant() {
    let text = policy_to("http: { method: [GET], paths: [/x] }");
    check(
        &text,
        10,
        19,
        &["unknown field `method`", "did you mean `methods`?"],
    );
    let problem = refused(&text);
    assert_eq!(problem.field.unwrap(), "spec.rules[0].to[0].http.method");
    assert_eq!(
        problem.resource.unwrap().to_string(),
        "AuthorizationPolicy shop/orders"
    );
}

#[test]
fn a_problem_reads_as_a_compilers_does() {
    let problem = refused(&policy_to("http: { method: [GET], paths: [/x] }"));
    let text = "a.yaml:10:19: unknown field `method`; did you mean `methods`?";
    assert_eq!(problem.to_string(), text);
}

#[test]
fn a_missing_field_is_refused_with_how_to_say_everything() {
    let text = policy_to("http: { paths: [/x] }");
    check(
        &text,
        10,
        17,
        &["`methods` is missing", "`methods: [\"*\"]` is every method"],
    );
    let text = policy_to("http: { methods: [GET] }");
    check(
        &text,
        10,
        17,
        &["`paths` is missing", "`paths: [\"/**\"]` is every path"],
    );
}

#[test]
fn a_choice_has_exactly_one_key() {
    let text = policy_to("{}");
    check(
        &text,
        10,
        11,
        &["chooses nothing", "`http`, `grpc`, `tcp` or `anything`"],
    );
    let text = policy_to("{ http: { methods: [GET], paths: [/x] }, anything: {} }");
    check(&text, 10, 11, &["`http` and `anything`", "exactly one key"]);
    let text = policy_to("anything");
    check(&text, 10, 11, &["write `{ anything: { … } }`"]);
    let text = policy_to("htpp: {}");
    check(
        &text,
        10,
        11,
        &["`htpp` is not possible here", "did you mean `http`?"],
    );
    let text = policy_to("{ http: { methods: [GET], paths: [/x] }, tpc: {} }");
    check(&text, 10, 11, &["`tpc`", "did you mean `tcp`?"]);
    let text = policy_to("anything:");
    check(&text, 10, 19, &["no value stands here"]);
}

#[test]
fn a_value_without_quotes_that_kubectl_reads_otherwise_is_refused() {
    for value in [
        "on", "off", "yes", "No", "y", "n", "true", "80", "1.5", "1e3", "0x1f", "1_000", "~",
    ] {
        let text = policy_to("http: { methods: [GET], paths: [/x] }").replace(
            "selector: {}",
            &format!("selector: {{ matchLabels: {{ app: {value} }} }}"),
        );
        let problem = refused(&text);
        assert_eq!((problem.line, problem.column), (5, 35), "{problem}");
        let quoted = text.replace(&format!("app: {value}"), &format!("app: \"{value}\""));
        let accepted = parse_documents("a.yaml", &quoted).remove(0).is_ok();
        assert_eq!(accepted, value != "~", "{value}");
    }
}

#[test]
fn an_empty_value_is_not_an_absent_field() {
    let text = policy_to("http: { methods: [GET], paths: [/x], hosts: }");
    check(&text, 10, 53, &["no value stands here"]);
    let text =
        policy_to("http: { methods: [GET], paths: [/x] }").replace("action:", "ports:\n  action:");
    check(&text, 6, 8, &["no value stands here", "remove the field"]);
    let text = policy_to("http: { methods: [GET], paths: [/x] }")
        .replace("action:", "mode: null\n  action:");
    check(&text, 6, 9, &["no value stands here"]);
}

#[test]
fn an_empty_list_is_refused_wherever_it_could_mean_everything() {
    let good =
        policy_to("http: { methods: [GET], paths: [/x], hosts: [a], upgrades: [websocket] }");
    for (from, to, help) in [
        ("methods: [GET]", "methods: []", "`[\"*\"]`"),
        ("paths: [/x]", "paths: []", "`[\"/**\"]`"),
        ("hosts: [a]", "hosts: []", "remove the field"),
        ("upgrades: [websocket]", "upgrades: []", "remove the field"),
        ("from: [{ anyone: {} }]", "from: []", "`[{ anyone: {} }]`"),
        ("selector: {}", "selector: { matchLabels: {} }", "`{}`"),
        (
            "action: Allow",
            "action: Allow\n  ports: []",
            "remove the field",
        ),
    ] {
        assert!(parse_documents("a.yaml", &good)[0].is_ok());
        let text = good.replace(from, to);
        assert_ne!(text, good);
        let problem = refused(&text).to_string();
        assert!(
            problem.contains("is empty") && problem.contains(help),
            "{problem}"
        );
    }
}

#[test]
fn impossible_values_are_refused_with_what_to_write() {
    let http = |fields: &str| {
        policy_to(&format!(
            "http: {{ methods: [GET], paths: [/x], {fields} }}"
        ))
    };
    check(
        &policy_to("http: { methods: [get], paths: [/x] }"),
        10,
        29,
        &["write `GET`"],
    );
    check(
        &policy_to("http: { methods: [\"*\", GET], paths: [/x] }"),
        10,
        28,
        &["all of them"],
    );
    check(
        &policy_to("http: { methods: GET, paths: [/x] }"),
        10,
        28,
        &["write `[GET]`"],
    );
    check(
        &policy_to("http: { methods: [GET], paths: [x] }"),
        10,
        43,
        &["write `/x`"],
    );
    check(
        &policy_to("http: { methods: [GET], paths: [\"/a*\"] }"),
        10,
        43,
        &["whole segment"],
    );
    check(
        &policy_to("grpc: { service: Orders/Get, methods: [Get] }"),
        10,
        28,
        &["shop.v1.Orders"],
    );
    check(
        &policy_to("grpc: { service: a.B, methods: [a.B/Get] }"),
        10,
        43,
        &["such as `Get`"],
    );
    check(
        &http("hosts: [\"*.shop\"]"),
        10,
        56,
        &["hosts match exactly"],
    );
    check(
        &http("upgrades: [websockets]"),
        10,
        59,
        &["did you mean `websocket`?"],
    );
    check(
        &policy_to("tcp: {}"),
        10,
        11,
        &["must name its ports", "add `ports: [ … ]`"],
    );
    check(&policy_to("anything: {}"), 10, 11, &["must name its ports"]);
    for (port, says) in [
        ("0", "from 1 to 65535"),
        ("65536", "from 1 to 65535"),
        ("-1", "from 1 to 65535"),
        ("\"80\"", "write 80 without quotes"),
        ("HTTP", "is not a port's name"),
        ("080", "a number to YAML"),
    ] {
        let text = policy_to("tcp: {}").replace("action:", &format!("ports: [{port}]\n  action:"));
        check(&text, 6, 11, &[says]);
    }
}

#[test]
fn identities_match_exactly_or_not_at_all() {
    let from = |source: &str| {
        policy_to("http: { methods: [GET], paths: [/x] }").replace("{ anyone: {} }", source)
    };
    let account = "{ workload: { serviceAccount: \"web*\" } }";
    check(&from(account), 8, 44, &["identities match exactly"]);
    for id in [
        "spiffe://",
        "spiffe://A/ns/x/sa/y",
        "http://a/b",
        "spiffe://a/ns/*/sa/y",
        "spiffe://a",
    ] {
        let text = from(&format!("{{ spiffeId: {{ id: \"{id}\" }} }}"));
        let problem = refused(&text).to_string();
        assert!(problem.contains("write"), "{problem}");
    }
    let text = from("{ namespace: { name: Shop } }");
    check(&text, 8, 35, &["is not a namespace's name"]);
}

#[test]
fn contradictions_within_a_resource_are_refused() {
    let two = policy_to("http: { methods: [GET], paths: [/x] }")
        .replace("- from", "- name: a\n      from");
    let rule = two.split("  rules:\n").nth(1).unwrap().to_owned();
    check(
        &format!("{two}{rule}"),
        12,
        13,
        &["two rules are named `a`"],
    );
    let selector = policy_to("http: { methods: [GET], paths: [/x] }")
        .replace("action:", "namespaceSelector: {}\n  action:");
    check(&selector, 6, 22, &["sidegate-system"]);
    let system = selector.replace("namespace: shop", "namespace: sidegate-system");
    assert!(parse_documents("a.yaml", &system)[0].is_ok());
    let service = "apiVersion: sidegate.dev/v1alpha1\nkind: StaticService\nmetadata: { name: a, namespace: b }\nspec:\n  ports: [{ port: 80 }, { port: 80 }]\n  endpoints: []\n";
    check(service, 5, 33, &["listed twice"]);
    let traffic = "apiVersion: sidegate.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: { name: a, namespace: b }\nspec:\n  service: a\n  timeout: 1s\n  retry: { attempts: 1, conditions: [5xx], methods: [GET], perTryTimeout: 2s }\n";
    check(traffic, 7, 75, &["longer than the whole call"]);
    let traffic = traffic
        .replace("5xx", "timeout")
        .replace(", perTryTimeout: 2s", "");
    check(&traffic, 7, 38, &["add `perTryTimeout`"]);
}

#[test]
fn the_head_of_a_document_is_checked() {
    let good = policy_to("http: { methods: [GET], paths: [/x] }");
    let with = |from: &str, to: &str| good.replace(from, to);
    check(
        &with("v1alpha1", "v1beta1"),
        1,
        13,
        &["write `sidegate.dev/v1alpha1`"],
    );
    let kind = with("kind: AuthorizationPolicy", "kind: AuthorisationPolicy");
    check(&kind, 2, 7, &["did you mean `AuthorizationPolicy`?"]);
    check(&with("name: orders,", ""), 3, 11, &["`name` is missing"]);
    check(
        &with(", namespace: shop", ""),
        3,
        11,
        &["`namespace` is missing"],
    );
    check(
        &with("name: orders", "name: Orders"),
        3,
        19,
        &["is not a resource's name"],
    );
    check(
        &with("spec:", "status: {}\nspec:"),
        4,
        1,
        &["written by the cluster"],
    );
    check(&with("spec:", "sepc:"), 4, 1, &["did you mean `spec`?"]);
    check("[]", 1, 1, &["a document is an object"]);
    check("just a text", 1, 1, &["a document is an object"]);
}

#[test]
fn a_key_that_stands_twice_is_refused() {
    let text = policy_to("http: { methods: [GET], paths: [/x] }")
        .replace("  action: Allow", "  action: Deny\n  action: Allow");
    check(&text, 7, 3, &["`action` is written twice"]);
}

#[test]
fn what_other_parsers_read_otherwise_is_refused() {
    let good = policy_to("http: { methods: [GET], paths: [/x] }");
    let tagged = good.replace("action: Allow", "action: !!str Allow");
    assert!(refused(&tagged).message.contains("tags"));
    let merged = good.replace(
        "selector: {}",
        "selector: { <<: { matchLabels: { a: b } } }",
    );
    assert!(refused(&merged).message.contains("merge keys"));
}

#[test]
fn an_alias_says_what_its_anchor_says() {
    let text = policy_to("http: { methods: &m [GET], paths: [/x] }")
        + "        - http: { methods: *m, paths: [/y] }\n";
    let resources = resources(&text);
    let Resource::AuthorizationPolicy(policy) = &resources[0] else {
        panic!("{resources:?}");
    };
    let Target::Http { methods, .. } = &policy.spec.rules[0].to[1] else {
        panic!("{policy:?}");
    };
    assert_eq!(methods, &["GET"]);
}

#[test]
fn a_broken_document_leaves_its_neighbours_alone() {
    let good = policy_to("http: { methods: [GET], paths: [/x] }");
    for broken in [
        "{ [",
        "a: b: c",
        "\"no end",
        "key: |\n text\n\t- x: [",
        "- a\nb",
        "&a *a",
        "%BAD\n",
        "\u{1}",
    ] {
        let text = format!("{good}---\n{broken}\n---\n{good}---\n{good}");
        let results = parse_documents("a.yaml", &text);
        let outcomes: Vec<bool> = results.iter().map(Result::is_ok).collect();
        assert_eq!(outcomes, [true, false, true, true], "{broken}: {results:?}");
        let problem = results[1].as_ref().unwrap_err();
        assert!((12..=17).contains(&problem.line), "{problem}");
        let third = results[2].as_ref().unwrap();
        let lines_before = text[..text.rfind(&format!("{good}---")).unwrap()]
            .lines()
            .count();
        assert_eq!(third.line, lines_before + 1);
    }
}

#[test]
fn empty_documents_are_passed_over_but_an_empty_file_is_an_error() {
    let good = policy_to("http: { methods: [GET], paths: [/x] }");
    let text = format!("# a comment\n%YAML 1.2\n---\n---\n{good}\n---\n# the end\n---\n");
    assert_eq!(resources(&text).len(), 1, "{text}");
    let text = format!("{good}...\n%YAML 1.2\n---\n{good}");
    assert_eq!(resources(&text).len(), 2, "{text}");
    for empty in [
        "",
        " \n",
        "# nothing\n",
        "---\n",
        "---\n---\n...\n",
        "~",
        "\u{feff}",
    ] {
        let problem = refused(empty);
        assert!(problem.message.contains("empty"), "{empty:?}: {problem}");
    }
}

#[test]
fn places_are_found_again_by_field() {
    let text = policy_to("http: { methods: [GET], paths: [/x] }");
    let located = parse_documents("a.yaml", &text).remove(0).unwrap();
    assert_eq!((located.line, located.column), (1, 1));
    assert_eq!(
        located.locate("spec.rules[0].to[0].http.paths[0]"),
        (10, 43)
    );
    assert_eq!(located.locate("spec.rules[0].to[0].http.hosts"), (10, 17));
    assert_eq!(located.locate(""), (1, 1));
}

#[test]
fn what_a_cluster_adds_to_an_object_is_taken_off_and_nothing_else() {
    let object = json!({
        "apiVersion": "sidegate.dev/v1alpha1", "kind": "TrafficPolicy",
        "metadata": {
            "namespace": "shop", "name": "orders", "uid": "x", "generation": 3, "resourceVersion": "7",
            "creationTimestamp": null, "managedFields": [], "finalizers": ["x/y"],
            "annotations": { "kubectl.kubernetes.io/last-applied-configuration": "{}" },
        },
        "spec": { "service": "orders", "tiemout": "2s" }, "status": { "conditions": [] }, "extra": 1,
    });
    let written = as_written(&object);
    let expected = json!({
        "apiVersion": "sidegate.dev/v1alpha1", "kind": "TrafficPolicy",
        "metadata": { "namespace": "shop", "name": "orders" },
        "spec": { "service": "orders", "tiemout": "2s" }, "extra": 1,
    });
    assert_eq!(written, expected);
    assert_eq!(as_written(&written), written);
    for odd in [json!(null), json!([1]), json!({ "metadata": 1 })] {
        assert_eq!(as_written(&odd), odd);
    }
    let unnamed = json!({ "metadata": { "generateName": "orders-" } });
    assert_eq!(as_written(&unnamed)["metadata"]["name"], "orders-abcde");
}
