//! What leaves is forgotten: memory stays flat however many pods come and go.

use serde_json::json;
use sidegate_api::control::Acknowledge;
use sidegate_mesh::resource::Kind;

use crate::world::{World, endpoint, key, pod};

fn policy() -> serde_json::Value {
    json!({
        "selector": {}, "action": "Allow",
        "rules": [{ "from": [{ "anyone": {} }], "to": [{ "http": { "methods": ["GET"], "paths": ["/x"] } }] }],
    })
}

/// One pod comes, its sidecar connects, calls, acknowledges, and all of it goes again.
fn round(world: &mut World, number: usize) {
    let name = format!("shop/orders-{number}");
    let uid = format!("uid-{number}");
    let address = format!("10.245.{}.{}", 1 + number / 200 % 50, 1 + number % 200);
    let mut one = pod(&name, &address);
    one.uid = &uid;
    world.pod(&one);
    world.slice("shop/orders", &[endpoint(&one)]);
    let sidecar = world.connect(&one);
    world.ask(sidecar, "10.96.0.7:80");
    world.ask(
        sidecar,
        &format!("203.0.{}.{}:443", number / 200 % 200, number % 200),
    );
    world.ask(sidecar, &format!("{address}:8080"));
    for resource in ["uid-all", "uid-calm"] {
        let said = Acknowledge {
            uid: resource.to_owned(),
            generation: 1,
            refusal: String::new(),
        };
        world.index.acknowledge(sidecar, &said);
    }
    let policy_name = format!("shop/own-{number}");
    world.resource(Kind::AuthorizationPolicy, &policy_name, 1, policy());
    world.hear(sidecar);
    one.is_terminating = true;
    world.pod(&one);
    if number.is_multiple_of(2) {
        world.index.disconnect(sidecar);
    }
    world.index.remove_pod(&key(&name));
    world.index.take(sidecar);
    world.index.disconnect(sidecar);
    let own = sidegate_mesh::resource::ResourceKey {
        kind: Kind::AuthorizationPolicy,
        namespace: "shop".to_owned(),
        name: policy_name.replace("shop/", ""),
    };
    world.index.remove_resource(&own);
    world.slice("shop/orders", &[]);
    if number.is_multiple_of(100) {
        let namespace = format!("ns-{number}");
        world.namespace(
            &namespace,
            json!({ "sidegate.dev/inject": "enabled" }),
            json!({}),
        );
        world.service(&format!("{namespace}/s"), "10.96.9.9", json!({}));
        world.index.remove_service(&key(&format!("{namespace}/s")));
        world.index.remove_namespace(&namespace);
    }
    // As the server, the leader and the follower do all the time.
    world.index.take_woken();
    world.index.take_unreported(100);
    world.index.take_notes(100);
    world.index.untold_acknowledgements(100);
}

#[test]
fn ten_thousand_pods_leave_nothing_behind() {
    let mut world = World::new();
    world.service("shop/orders", "10.96.0.7", json!({}));
    world.resource(Kind::AuthorizationPolicy, "shop/all", 1, policy());
    world.resource(
        Kind::TrafficPolicy,
        "shop/calm",
        1,
        json!({ "service": "orders" }),
    );
    round(&mut world, 0);
    let before = world.index.size();
    for number in 1..=10_000 {
        round(&mut world, number);
        if number.is_multiple_of(1_000) {
            assert_eq!(world.index.size(), before, "after {number} pods");
        }
    }
}

#[test]
fn a_list_that_is_shorter_than_before_forgets_the_rest() {
    let mut world = World::new();
    let before = world.index.size();
    for number in 1..=50 {
        let name = format!("shop/orders-{number}");
        world.pod(&pod(&name, &format!("10.245.1.{number}")));
        world.service(&name, &format!("10.96.0.{number}"), json!({}));
        world.slice(&name, &[]);
    }
    let none = std::collections::HashSet::new();
    world.index.keep_pods(&none);
    world.index.keep_services(&none);
    world.index.keep_slices(&none);
    assert_eq!(world.index.size(), before);
    let kept = [key("shop/orders-1")].into_iter().collect();
    world.pod(&pod("shop/orders-1", "10.245.1.1"));
    world.pod(&pod("shop/orders-2", "10.245.1.2"));
    world.index.keep_pods(&kept);
    assert_eq!(world.index.size().pods, 1);
}
