//! Which resources a sidecar gets, and what becomes of those that are refused.

use serde_json::{Value, json};
use sidegate_api::control::Acknowledge;
use sidegate_controller::index::Accepted;
use sidegate_mesh::resource::{Kind, ResourceKey};

use crate::world::{World, endpoint, pod};

const POLICY: Kind = Kind::AuthorizationPolicy;

fn spec(selector: Value) -> Value {
    json!({
        "selector": selector,
        "action": "Allow",
        "rules": [{ "name": "r", "from": [{ "anyone": {} }], "to": [{ "http": { "methods": ["GET"], "paths": ["/x"] } }] }],
    })
}

fn broken(selector: Value) -> Value {
    let mut spec = spec(selector);
    spec["rules"][0]["from"] = json!([{ "anybody": {} }]);
    spec
}

fn policy_key(name: &str) -> ResourceKey {
    let (namespace, name) = name.split_once('/').unwrap();
    ResourceKey {
        kind: POLICY,
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    }
}

#[test]
fn a_sidecar_gets_the_policies_that_select_it_and_no_other() {
    let mut world = World::new();
    world.resource(
        POLICY,
        "shop/mine",
        3,
        spec(json!({ "matchLabels": { "app": "web" } })),
    );
    world.resource(POLICY, "shop/all", 1, spec(json!({})));
    world.resource(
        POLICY,
        "shop/other",
        1,
        spec(json!({ "matchLabels": { "app": "orders" } })),
    );
    world.resource(POLICY, "plain/all", 1, spec(json!({})));
    world.resource(POLICY, "sidegate-system/mesh", 1, spec(json!({})));
    let mut web = pod("shop/web-1", "10.245.1.99");
    web.account = "web";
    web.labels = json!({ "app": "web" });
    world.pod(&web);
    let id = crate::world::identity(&web);
    let greeting = sidegate_controller::index::Greeting {
        id: &id,
        address: "10.245.1.99".parse().unwrap(),
        pod: "web-1",
        uid: "web-1",
    };
    let sidecar = world.index.connect(&greeting).unwrap();
    let heard = world.hear(sidecar);
    assert_eq!(heard.words(), ["all@1", "mine@3", "mesh@1"]);
    assert!(heard.complete);
    let facts = heard.workload.unwrap();
    assert_eq!(
        (
            facts.enforcement.as_str(),
            facts.zone.as_str(),
            facts.terminating
        ),
        ("enforce", "zone-a", false)
    );
    assert_eq!(facts.labels["app"], "web");
    let json: Value = serde_json::from_slice(&heard.updated[1].json).unwrap();
    assert_eq!(
        json["metadata"],
        json!({ "name": "mine", "namespace": "shop" }),
        "what decides nothing is left out"
    );
    sidegate_mesh::resource::parse_value(&json).unwrap();
}

#[test]
fn nothing_to_say_is_said_completely_and_once() {
    let mut world = World::new();
    let web = pod("shop/web-1", "10.245.1.99");
    world.pod(&web);
    let id = crate::world::identity(&web);
    let greeting = sidegate_controller::index::Greeting {
        id: &id,
        address: "10.245.1.99".parse().unwrap(),
        pod: "web-1",
        uid: "web-1",
    };
    let sidecar = world.index.connect(&greeting).unwrap();
    let first = world.index.take(sidecar).unwrap();
    assert!(first.complete && first.updated.is_empty() && first.version == 1);
    assert_eq!(world.index.take(sidecar), None);
}

#[test]
fn changes_of_labels_policies_and_namespaces_are_heard_as_differences() {
    let mut world = World::new();
    let sidecar = world.sidecar();
    world.resource(
        POLICY,
        "shop/mine",
        1,
        spec(json!({ "matchLabels": { "app": "web" } })),
    );
    assert_eq!(world.hear(sidecar).words(), ["mine@1"]);
    world.resource(
        POLICY,
        "shop/mine",
        2,
        spec(json!({ "matchLabels": { "app": "web", "tier": "1" } })),
    );
    assert_eq!(world.hear(sidecar).words(), ["-mine"]);
    let mut web = pod("shop/web-1", "10.245.1.99");
    web.account = "web";
    web.labels = json!({ "app": "web", "tier": "1" });
    world.pod(&web);
    let heard = world.hear(sidecar);
    assert_eq!(heard.words(), ["mine@2"]);
    assert_eq!(heard.workload.unwrap().labels["tier"], "1");
    web.is_terminating = true;
    world.pod(&web);
    assert!(world.hear(sidecar).workload.unwrap().terminating, "at once");
    world.namespace(
        "shop",
        json!({ "sidegate.dev/inject": "enabled" }),
        json!({ "sidegate.dev/enforcement": "audit" }),
    );
    assert_eq!(world.hear(sidecar).workload.unwrap().enforcement, "audit");
    world.index.remove_resource(&policy_key("shop/mine"));
    assert_eq!(world.hear(sidecar).words(), ["-mine"]);
}

#[test]
fn a_mesh_wide_policy_selects_namespaces_by_their_real_labels() {
    let mut world = World::new();
    let sidecar = world.sidecar();
    let mut wide = spec(json!({}));
    wide["namespaceSelector"] = json!({ "matchLabels": { "team": "payments" } });
    world.resource(POLICY, "sidegate-system/wide", 1, wide.clone());
    assert_eq!(world.hear(sidecar).responses, 0);
    world.namespace(
        "shop",
        json!({ "sidegate.dev/inject": "enabled", "team": "payments" }),
        json!({}),
    );
    let heard = world.hear(sidecar);
    assert_eq!(heard.words(), ["wide@1"]);
    // The sidecar does not know the labels of its namespace, so it is not asked.
    let json: Value = serde_json::from_slice(&heard.updated[0].json).unwrap();
    assert_eq!(json["spec"].get("namespaceSelector"), None);
    world.namespace(
        "shop",
        json!({ "sidegate.dev/inject": "enabled", "team": "web" }),
        json!({}),
    );
    assert_eq!(world.hear(sidecar).words(), ["-wide"]);
    // Elsewhere the field is an error, and not silently mesh-wide.
    world.resource(POLICY, "shop/wide", 1, wide);
    let report = world.index.report(&policy_key("shop/wide")).unwrap();
    assert!(matches!(report.accepted, Accepted::No { .. }));
}

#[test]
fn a_refused_policy_keeps_its_last_good_version() {
    let mut world = World::new();
    let sidecar = world.sidecar();
    world.resource(POLICY, "shop/p", 1, spec(json!({})));
    assert_eq!(world.hear(sidecar).words(), ["p@1"]);
    world.resource(POLICY, "shop/p", 2, broken(json!({})));
    assert_eq!(world.hear(sidecar).responses, 0);
    let report = world.index.report(&policy_key("shop/p")).unwrap();
    let Accepted::No { reason, message } = report.accepted else {
        panic!("accepted")
    };
    assert_eq!(reason, "Invalid");
    assert!(
        message.starts_with("spec.rules[0].from[0]") && message.contains("anybody"),
        "{message}"
    );
    let notes = world.index.take_notes(10);
    assert_eq!(notes.len(), 1);
    assert!(
        notes[0].remark.message.contains("last good version"),
        "{notes:?}"
    );
    world.resource(POLICY, "shop/p", 3, spec(json!({})));
    assert_eq!(world.hear(sidecar).words(), ["p@3"]);
}

#[test]
fn a_policy_that_was_never_good_is_passed_on_to_fail_closed() {
    let mut world = World::new();
    let sidecar = world.sidecar();
    world.resource(
        POLICY,
        "shop/mine",
        1,
        broken(json!({ "matchLabels": { "app": "web" } })),
    );
    world.resource(
        POLICY,
        "shop/other",
        1,
        broken(json!({ "matchLabels": { "app": "orders" } })),
    );
    world.resource(POLICY, "shop/unreadable", 1, json!("nonsense"));
    world.resource(POLICY, "shop/good", 1, spec(json!({})));
    assert_eq!(
        world.hear(sidecar).words(),
        ["good@1", "mine@1", "unreadable@1"]
    );
}

#[test]
fn one_tenants_error_never_delays_anothers_deny() {
    let mut world = World::new();
    let sidecar = world.sidecar();
    for garbage in [
        json!(null),
        json!([1, 2]),
        json!({ "selector": 7 }),
        json!({ "rules": { "a": [[[]]] } }),
    ] {
        world.resource(POLICY, "plain/garbage", 1, garbage);
    }
    let mut deny = spec(json!({}));
    deny["action"] = json!("Deny");
    world.resource(POLICY, "shop/deny", 1, deny);
    assert_eq!(world.hear(sidecar).words(), ["deny@1"]);
}

#[test]
fn a_traffic_policy_goes_to_those_who_call_its_service() {
    let mut world = World::new();
    let sidecar = world.sidecar();
    let one = pod("shop/orders-1", "10.245.1.7");
    world.pod(&one);
    world.service("shop/orders", "10.96.0.7", json!({}));
    world.slice("shop/orders", &[endpoint(&one)]);
    let traffic = |timeout: &str| json!({ "service": "orders", "timeout": timeout });
    world.resource(Kind::TrafficPolicy, "shop/slow", 1, traffic("2s"));
    assert_eq!(world.hear(sidecar).responses, 0);
    world
        .index
        .subscribe(sidecar, "10.96.0.7:80".parse().unwrap());
    assert_eq!(world.hear(sidecar).words()[0], "slow@1");
    world
        .index
        .subscribe(sidecar, "10.245.1.7:8080".parse().unwrap());
    world.hear(sidecar);
    world
        .index
        .unsubscribe(sidecar, &"10.96.0.7:80".parse().unwrap());
    assert_eq!(
        world.hear(sidecar).responses,
        0,
        "a call to the pod's own address still counts"
    );
    world.resource(Kind::TrafficPolicy, "shop/slow", 2, traffic("3s"));
    assert_eq!(world.hear(sidecar).words(), ["slow@2"]);
    world.resource(
        Kind::TrafficPolicy,
        "shop/slow",
        3,
        json!({ "service": "other" }),
    );
    assert_eq!(world.hear(sidecar).words(), ["-slow"]);
    world.resource(Kind::TrafficPolicy, "shop/slow", 4, traffic("4s"));
    assert_eq!(world.hear(sidecar).words(), ["slow@4"]);
    world
        .index
        .unsubscribe(sidecar, &"10.245.1.7:8080".parse().unwrap());
    assert_eq!(world.hear(sidecar).words(), ["-slow"]);
}

fn acknowledge(name: &str, generation: i64, refusal: &str) -> Acknowledge {
    Acknowledge {
        uid: format!("uid-{name}"),
        generation,
        refusal: refusal.to_owned(),
    }
}

#[test]
fn live_counts_the_sidecars_that_have_this_generation() {
    let mut world = World::new();
    let sidecar = world.sidecar();
    world.pod(&pod("shop/orders-1", "10.245.1.7"));
    world.resource(POLICY, "shop/all", 1, spec(json!({})));
    world.hear(sidecar);
    let count = |world: &World| {
        let report = world.index.report(&policy_key("shop/all")).unwrap();
        (report.live, report.refused, report.selected)
    };
    assert_eq!(count(&world), (0, 0, 2));
    assert!(world.index.acknowledge(sidecar, &acknowledge("all", 1, "")));
    assert_eq!(count(&world), (1, 0, 2));
    world.resource(
        POLICY,
        "shop/all",
        2,
        spec(json!({ "matchLabels": { "app": "web" } })),
    );
    assert_eq!(count(&world), (0, 0, 1), "another generation");
    assert!(
        !world.index.acknowledge(sidecar, &acknowledge("all", 2, "")),
        "it was not sent yet"
    );
    world.hear(sidecar);
    assert!(
        world
            .index
            .acknowledge(sidecar, &acknowledge("all", 2, "unknown field"))
    );
    assert_eq!(count(&world), (0, 1, 1));
    assert!(
        !world
            .index
            .acknowledge(sidecar, &acknowledge("foreign", 1, "")),
        "no such resource"
    );
    world.index.disconnect(sidecar);
    assert_eq!(
        count(&world),
        (0, 1, 1),
        "what it has does not depend on the stream"
    );
    world.index.remove_pod(&crate::world::key("shop/web-1"));
    assert_eq!(count(&world), (0, 0, 0));
}

#[test]
fn a_follower_tells_a_leader_what_its_sidecars_have() {
    let (mut follower, mut leader) = (World::new(), World::new());
    let sidecar = follower.sidecar();
    leader.sidecar();
    for world in [&mut follower, &mut leader] {
        world.resource(POLICY, "shop/all", 5, spec(json!({})));
    }
    follower.hear(sidecar);
    let first = follower.index.own_acknowledgements();
    assert_eq!(first.len(), 1, "sent, not acknowledged yet");
    follower
        .index
        .acknowledge(sidecar, &acknowledge("all", 5, ""));
    let told = follower.index.untold_acknowledgements(10);
    assert_eq!((told.len(), told[0].generation), (1, 5));
    assert!(
        follower.index.untold_acknowledgements(10).is_empty(),
        "once"
    );
    let live = |world: &World| world.index.report(&policy_key("shop/all")).unwrap().live;
    for said in first.iter().chain(&told).chain(&first) {
        leader.index.hear(said);
    }
    assert_eq!(live(&leader), 1, "an older word never replaces a newer one");
    let mut stranger = told[0].clone();
    stranger.pod_uid = "nobody".to_owned();
    assert!(
        !leader.index.hear(&stranger),
        "its pod is not known here yet"
    );
    assert_eq!(leader.index.size().acknowledgements, 1);
    follower.index.tell_again(&stranger);
    follower.index.tell_again(&told[0]);
    let again = follower.index.untold_acknowledgements(10);
    assert_eq!(again, told, "only what still holds is told again");
    follower.index.remove_resource(&policy_key("shop/all"));
    follower.hear(sidecar);
    assert!(
        follower.index.untold_acknowledgements(10).is_empty(),
        "a leader forgets by itself"
    );
}

#[test]
fn addresses_of_the_cluster_are_no_endpoints_of_a_static_service() {
    let key = ResourceKey {
        kind: Kind::StaticService,
        namespace: "shop".to_owned(),
        name: "db".to_owned(),
    };
    let mut world = World::new();
    for (address, is_fine) in [
        ("203.0.113.7:80", true),
        ("[2001:db8::7]:80", true),
        ("127.0.0.1:80", false),
        ("169.254.169.254:80", false),
        ("[fe80::1]:80", false),
        ("172.18.0.2:80", false),
        ("10.245.3.3:80", false),
        ("10.96.0.7:80", false),
    ] {
        let endpoint =
            json!({ "address": address, "identity": { "workload": { "serviceAccount": "db" } } });
        world.resource(
            Kind::StaticService,
            "shop/db",
            1,
            json!({ "ports": [{ "port": 80 }], "endpoints": [endpoint] }),
        );
        let report = world.index.report(&key).unwrap();
        assert_eq!(
            matches!(report.accepted, Accepted::Yes(_)),
            is_fine,
            "{address}: {:?}",
            report.accepted
        );
    }
}

#[test]
fn what_is_probably_not_meant_so_is_said() {
    let mut world = World::new();
    world.pod(&pod("shop/orders-1", "10.245.1.7"));
    let mut tcp = spec(json!({}));
    tcp["ports"] = json!(["http"]);
    tcp["rules"][0]["to"] = json!([{ "tcp": {} }]);
    world.resource(POLICY, "shop/tcp", 1, tcp);
    let mut http = spec(json!({}));
    http["ports"] = json!(["http"]);
    world.resource(POLICY, "shop/http", 1, http);
    let warnings = world
        .index
        .report(&policy_key("shop/tcp"))
        .unwrap()
        .warnings();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(
        warnings[0].starts_with("spec.ports: port 8080 never"),
        "{warnings:?}"
    );
    let traffic = |name: &str| ResourceKey {
        kind: Kind::TrafficPolicy,
        namespace: "shop".to_owned(),
        name: name.to_owned(),
    };
    world.resource(
        Kind::TrafficPolicy,
        "shop/a",
        1,
        json!({ "service": "nobody" }),
    );
    world.resource(
        Kind::TrafficPolicy,
        "shop/b",
        1,
        json!({ "service": "nobody" }),
    );
    let warnings = world.index.report(&traffic("b")).unwrap().warnings();
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(
        warnings[1].contains("already has the traffic policy `a`"),
        "{warnings:?}"
    );
}
