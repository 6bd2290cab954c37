//! Who is served, how much, and what people hear of pods.

use std::net::IpAddr;

use serde_json::json;
use sidegate_controller::index::{Greeting, HelloError, Target};
use sidegate_mesh::spiffe::SpiffeId;

use crate::world::{World, from, key, pod};

#[track_caller]
fn check(id: &str, address: &str, name: &str, uid: &str, expected: Result<(), HelloError>) {
    let mut world = World::new();
    world.pod(&pod("shop/orders-1", "10.245.1.7"));
    let mut over = pod("shop/over-1", "10.245.1.8");
    over.phase = "Failed";
    world.pod(&over);
    let id: SpiffeId = id.parse().unwrap();
    let greeting = Greeting {
        id: &id,
        address: address.parse::<IpAddr>().unwrap(),
        pod: name,
        uid,
    };
    let found = world.index.check(&greeting).map(drop);
    assert_eq!(found, expected, "{id} {address} {name} {uid}");
}

#[test]
fn a_sidecar_is_the_pod_that_its_certificate_and_its_address_say() {
    let orders = "spiffe://cluster.local/ns/shop/sa/orders";
    let at = "10.245.1.7";
    check(orders, at, "orders-1", "orders-1", Ok(()));
    check(orders, "::ffff:10.245.1.7", "orders-1", "orders-1", Ok(()));
    check(orders, at, "orders-2", "orders-1", Err(HelloError::NoPod));
    check(orders, at, "orders-1", "another", Err(HelloError::Uid));
    check(
        orders,
        "10.245.1.8",
        "orders-1",
        "orders-1",
        Err(HelloError::Address),
    );
    check(
        orders,
        "10.245.1.8",
        "over-1",
        "over-1",
        Err(HelloError::Over),
    );
    check(
        "spiffe://cluster.local/ns/shop/sa/web",
        at,
        "orders-1",
        "orders-1",
        Err(HelloError::Identity),
    );
    check(
        "spiffe://cluster.local/ns/plain/sa/orders",
        at,
        "orders-1",
        "orders-1",
        Err(HelloError::NoPod),
    );
    check(
        "spiffe://partner.example/ns/shop/sa/orders",
        at,
        "orders-1",
        "orders-1",
        Err(HelloError::Identity),
    );
    check(
        "spiffe://cluster.local/other/path",
        at,
        "orders-1",
        "orders-1",
        Err(HelloError::Identity),
    );
}

#[test]
fn a_second_stream_of_a_pod_ends_the_first_and_a_pod_that_goes_ends_its_own() {
    let mut world = World::new();
    let first = world.sidecar();
    let second = world.sidecar();
    assert!(world.index.is_over(first) && !world.index.is_over(second));
    assert!(world.index.take_woken().contains(&first));
    world.index.disconnect(first);
    assert!(
        !world.index.is_over(second),
        "the older stream's end is nothing to the newer one"
    );
    world.index.remove_pod(&key("shop/web-1"));
    assert!(world.index.is_over(second));
    assert_eq!(world.index.take(second), None);
}

#[test]
fn one_destination_too_many_is_answered_as_unknown_and_counted() {
    let mut world = World::new();
    let sidecar = world.sidecar();
    for number in 1..=8 {
        assert_eq!(
            world.ask(sidecar, &format!("203.0.113.{number}:80")),
            "external"
        );
    }
    assert_eq!(world.ask(sidecar, "203.0.113.9:80"), "unknown");
    assert_eq!(world.index.subscriptions_refused(), 1);
    assert_eq!(world.index.size().destinations, 8);
    world
        .index
        .unsubscribe(sidecar, &"203.0.113.1:80".parse().unwrap());
    assert_eq!(world.ask(sidecar, "203.0.113.9:80"), "external");
    // A flood is answered as far as it can be bounded, and costs nothing that stays.
    let before = world.index.size().entries;
    for number in 0..10_000_u32 {
        let [_, b, c, d] = number.to_be_bytes();
        world
            .index
            .subscribe(sidecar, format!("198.{b}.{c}.{d}:80").parse().unwrap());
    }
    assert!(world.index.size().entries <= before + 64 + 8 + 1);
    world.hear(sidecar);
    world.index.take_woken();
    assert!(world.index.size().entries <= before);
}

#[test]
fn a_response_is_cut_and_the_rest_follows() {
    let mut world = World::new();
    for number in 0..40 {
        let rules: Vec<_> = (0..40).map(|rule| json!({
            "name": format!("rule-{rule}"), "from": [{ "anyone": {} }],
            "to": [{ "http": { "methods": ["GET"], "paths": ["/a-long-path-that-takes-some-room"] } }],
        })).collect();
        let spec = json!({ "selector": {}, "action": "Allow", "rules": rules });
        world.resource(
            sidegate_mesh::resource::Kind::AuthorizationPolicy,
            &format!("shop/p{number}"),
            1,
            spec,
        );
    }
    let web = pod("shop/web-1", "10.245.1.99");
    world.pod(&web);
    let id = crate::world::identity(&web);
    let greeting = Greeting {
        id: &id,
        address: "10.245.1.99".parse().unwrap(),
        pod: "web-1",
        uid: "web-1",
    };
    let sidecar = world.index.connect(&greeting).unwrap();
    let mut responses = Vec::new();
    while let Some(response) = world.index.take(sidecar) {
        responses.push(response);
    }
    assert!(responses.len() > 2, "{}", responses.len());
    let total: usize = responses.iter().map(|one| one.updated.len()).sum();
    assert_eq!(total, 40);
    let (last, others) = responses.split_last().unwrap();
    assert!(last.complete && others.iter().all(|one| !one.complete));
    for response in &responses {
        let bytes: usize = response.updated.iter().map(|one| one.json.len()).sum();
        assert!(bytes < 64 * 1024 + 8 * 1024, "{bytes}");
    }
}

#[test]
fn a_destination_is_an_address_or_a_service_by_name() {
    for fine in ["10.96.0.7:80", "[fd00::7]:80", "orders.shop:80"] {
        assert_eq!(fine.parse::<Target>().unwrap().to_string(), fine);
    }
    assert_eq!(
        "[::ffff:10.96.0.7]:80"
            .parse::<Target>()
            .unwrap()
            .to_string(),
        "10.96.0.7:80"
    );
    let long = format!("{}.shop:80", "a".repeat(400));
    for bad in [
        "",
        "10.96.0.7",
        "orders:80",
        "orders.shop:99999",
        "a b.shop:80",
        "orders..:80",
        ".shop:80",
        &long,
    ] {
        bad.parse::<Target>().unwrap_err();
    }
}

#[test]
fn people_hear_of_pods_that_are_skipped_or_can_go_around_their_sidecar() {
    let mut world = World::new();
    let mut skipped = pod("shop/host-1", "172.18.0.2").unmeshed().object();
    skipped["metadata"]["annotations"] = json!({ "sidegate.dev/skipped": "hostNetwork" });
    world.index.apply_pod(&from(skipped.clone()));
    world.index.apply_pod(&from(skipped));
    let mut strong = pod("shop/strong-1", "10.245.1.30");
    strong.config = json!({ "drainTimeout": "45s" });
    let mut object = strong.object();
    object["spec"]["containers"][0]["securityContext"] =
        json!({ "capabilities": { "add": ["NET_ADMIN"] } });
    world.index.apply_pod(&from(object.clone()));
    object["metadata"]["namespace"] = json!("plain");
    world.index.apply_pod(&from(object));
    let notes: Vec<(String, &str)> = world
        .index
        .take_notes(10)
        .iter()
        .map(|note| {
            (
                format!("{}/{}", note.about.namespace, note.about.name),
                note.remark.reason,
            )
        })
        .collect();
    assert_eq!(
        notes,
        [
            ("shop/host-1".to_owned(), "SidegateSkipped"),
            ("shop/strong-1".to_owned(), "DrainTimeoutTooLong"),
            ("shop/strong-1".to_owned(), "CanBypassSidecar"),
        ]
    );
    world.index.note_everything();
    assert_eq!(
        world.index.take_notes(10).len(),
        3,
        "a new leader says it again"
    );
    for number in 0..40 {
        let name = format!("shop/many-{number}");
        let mut object = pod(&name, "10.245.1.31").unmeshed().object();
        object["metadata"]["annotations"] = json!({ "sidegate.dev/skipped": "opt" });
        world.index.apply_pod(&from(object));
    }
    assert_eq!(world.index.notes_dropped(), 24);
}
