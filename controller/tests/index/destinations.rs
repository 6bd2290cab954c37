//! What a destination is, for every kind of Service and endpoint.

use serde_json::{Value, json};

use crate::world::{PodFacts, World, endpoint, from, key, pod, show};

const MESHED: &str = "orders.shop:80 auto [10.245.1.7:8080 shop/orders@zone-a]";

/// One meshed pod behind `shop/orders` at 10.96.0.7.
fn orders(world: &mut World) -> PodFacts<'static> {
    let one = pod("shop/orders-1", "10.245.1.7");
    world.pod(&one);
    world.service("shop/orders", "10.96.0.7", json!({}));
    world.slice("shop/orders", &[endpoint(&one)]);
    one
}

#[track_caller]
fn check(change: impl FnOnce(&mut World), destination: &str, expected: &str) {
    let mut world = World::new();
    let sidecar = world.sidecar();
    orders(&mut world);
    change(&mut world);
    assert_eq!(world.ask(sidecar, destination), expected);
}

#[test]
fn a_cluster_address_leads_to_its_meshed_pods() {
    check(|_| {}, "10.96.0.7:80", MESHED);
    check(|_| {}, "orders.shop:80", MESHED);
    check(
        |_| {},
        "[::ffff:10.96.0.7]:80"
            .replace("[::ffff:10.96.0.7]", "10.96.0.7")
            .as_str(),
        MESHED,
    );
}

#[test]
fn a_port_that_a_service_does_not_have_is_unknown() {
    check(|_| {}, "10.96.0.7:81", "unknown");
    check(|_| {}, "orders.shop:81", "unknown");
    check(|_| {}, "nobody.shop:80", "unknown");
}

#[test]
fn a_pod_address_is_that_pod_alone() {
    let second = pod("shop/orders-2", "10.245.1.8");
    check(
        |world| {
            world.pod(&second);
            world.slice(
                "shop/orders",
                &[
                    endpoint(&pod("shop/orders-1", "10.245.1.7")),
                    endpoint(&second),
                ],
            );
        },
        "10.245.1.8:8080",
        "orders.shop:80 auto [10.245.1.8:8080 shop/orders@zone-a]",
    );
    check(
        |_| {},
        "10.245.1.7:9999",
        "orders-1.shop:9999 auto [10.245.1.7:9999 shop/orders@zone-a]",
    );
}

#[test]
fn a_headless_service_names_the_calls_to_its_pods() {
    check(
        |world| world.service("shop/orders", "None", json!({})),
        "10.245.1.7:8080",
        "orders.shop:80 auto [10.245.1.7:8080 shop/orders@zone-a]",
    );
    check(
        |world| {
            let one = pod("shop/orders-1", "10.245.1.7");
            world.service(
                "shop/zz",
                "None",
                json!({ "ports": [{ "name": "http", "port": 8080, "appProtocol": "grpc" }] }),
            );
            world.slice("shop/zz", &[endpoint(&one)]);
        },
        "10.245.1.7:8080",
        "zz.shop:8080 grpc [10.245.1.7:8080 shop/orders@zone-a]",
    );
}

#[test]
fn ports_lead_to_the_target_ports_of_each_slice() {
    let ports = json!({ "ports": [{ "name": "http", "port": 80 }, { "name": "admin", "port": 9000 }, { "name": "udp", "port": 53, "protocol": "UDP" }] });
    let two = |world: &mut World| {
        let (one, other) = (
            pod("shop/orders-1", "10.245.1.7"),
            pod("shop/orders-2", "10.245.1.8"),
        );
        world.pod(&other);
        world.service("shop/orders", "10.96.0.7", ports.clone());
        // A named target port has another number in each revision of the pod: a slice for each.
        let first = json!([{ "name": "http", "port": 8080 }, { "name": "admin", "port": 9001 }]);
        world.slice_with("shop/orders", "1", first, &[endpoint(&one)]);
        world.slice_with(
            "shop/orders",
            "2",
            json!([{ "name": "http", "port": 8081 }]),
            &[endpoint(&other)],
        );
    };
    check(
        two,
        "10.96.0.7:80",
        "orders.shop:80 auto [10.245.1.7:8080 shop/orders@zone-a, 10.245.1.8:8081 shop/orders@zone-a]",
    );
    check(
        two,
        "10.96.0.7:9000",
        "orders.shop:9000 auto [10.245.1.7:9001 shop/orders@zone-a]",
    );
    check(two, "10.96.0.7:53", "unknown");
}

#[test]
fn both_families_have_their_own_endpoints() {
    let dual = |world: &mut World| {
        let mut one = pod("shop/orders-1", "10.245.1.7").object();
        one["status"]["podIPs"] = json!([{ "ip": "10.245.1.7" }, { "ip": "fd00::7" }]);
        world.index.apply_pod(&from(one));
        world.service(
            "shop/orders",
            "10.96.0.7",
            json!({ "clusterIPs": ["10.96.0.7", "fd00:10::7"] }),
        );
        let six = json!({ "addresses": ["fd00::7"], "conditions": { "ready": true },
            "targetRef": { "kind": "Pod", "namespace": "shop", "name": "orders-1", "uid": "orders-1" } });
        world.slice_with(
            "shop/orders",
            "v6",
            json!([{ "name": "http", "port": 8080 }]),
            &[six],
        );
    };
    check(dual, "10.96.0.7:80", MESHED);
    check(
        dual,
        "[fd00:10::7]:80",
        "orders.shop:80 auto [[fd00::7]:8080 shop/orders@zone-a]",
    );
    check(dual, "[fd00:10::8]:80", "unknown");
}

#[test]
fn ready_serving_and_terminating_are_respected() {
    let with = |ready: Value, serving: Value, terminating: bool| {
        move |world: &mut World| {
            let mut said = endpoint(&pod("shop/orders-1", "10.245.1.7"));
            said["conditions"] =
                json!({ "ready": ready, "serving": serving, "terminating": terminating });
            world.slice("shop/orders", &[said]);
        }
    };
    let leaving = "orders.shop:80 auto [10.245.1.7:8080 shop/orders@zone-a leaving]";
    let nobody = "orders.shop:80 auto []";
    check(
        with(json!(null), json!(null), false),
        "10.96.0.7:80",
        MESHED,
    );
    check(
        with(json!(true), json!(true), false),
        "10.96.0.7:80",
        MESHED,
    );
    check(
        with(json!(false), json!(true), true),
        "10.96.0.7:80",
        leaving,
    );
    check(
        with(json!(false), json!(false), true),
        "10.96.0.7:80",
        nobody,
    );
    check(
        with(json!(false), json!(true), false),
        "10.96.0.7:80",
        nobody,
    );
    check(
        with(json!(false), json!(false), false),
        "10.96.0.7:80",
        nobody,
    );
}

#[test]
fn a_pod_that_is_deleted_leaves_before_its_slice_says_so() {
    let mut gone = pod("shop/orders-1", "10.245.1.7");
    gone.is_terminating = true;
    let change = |world: &mut World| world.pod(&gone);
    check(
        change,
        "10.96.0.7:80",
        "orders.shop:80 auto [10.245.1.7:8080 shop/orders@zone-a leaving]",
    );
}

#[test]
fn topology_hints_say_for_whom_an_endpoint_is_near() {
    let hinted = |zone: &str| {
        let zone = zone.to_owned();
        move |world: &mut World| {
            let mut said = endpoint(&pod("shop/orders-1", "10.245.1.7"));
            said["zone"] = json!("zone-c");
            said["hints"] = json!({ "forZones": [{ "name": zone }, { "name": "zone-d" }] });
            world.slice("shop/orders", &[said]);
        }
    };
    let at = |zone: &str| format!("orders.shop:80 auto [10.245.1.7:8080 shop/orders@{zone}]");
    check(hinted("zone-b"), "10.96.0.7:80", &at("zone-b"));
    check(hinted("zone-a"), "10.96.0.7:80", &at("zone-a"));
    let unhinted = |world: &mut World| {
        let mut said = endpoint(&pod("shop/orders-1", "10.245.1.7"));
        said["zone"] = json!("zone-c");
        world.slice("shop/orders", &[said]);
    };
    check(unhinted, "10.96.0.7:80", &at("zone-c"));
}

#[test]
fn the_protocol_is_the_services_else_the_pods_else_the_ports() {
    let said = |port: u16, target: u16, application: Value, opaque: Value| {
        move |world: &mut World| {
            let mut one = pod("shop/orders-1", "10.245.1.7");
            one.config = json!({ "opaquePorts": opaque });
            world.pod(&one);
            let ports = json!([{ "name": "http", "port": port, "appProtocol": application }]);
            world.service("shop/orders", "10.96.0.7", json!({ "ports": ports }));
            world.slice_with(
                "shop/orders",
                "1",
                json!([{ "name": "http", "port": target }]),
                &[endpoint(&one)],
            );
        }
    };
    let check = |port: u16, target: u16, application: Value, opaque: Value, expected: &str| {
        let wanted =
            format!("orders.shop:{port} {expected} [10.245.1.7:{target} shop/orders@zone-a]");
        check(
            said(port, target, application, opaque),
            &format!("10.96.0.7:{port}"),
            &wanted,
        );
    };
    for (word, expected) in [
        ("http", "http"),
        ("kubernetes.io/h2c", "http"),
        ("kubernetes.io/ws", "http"),
        ("grpc", "grpc"),
        ("GRPC", "grpc"),
        ("https", "tcp"),
        ("kubernetes.io/wss", "tcp"),
        ("mysql", "tcp"),
        ("tcp", "tcp"),
        ("example.com/own", "auto"),
    ] {
        check(80, 8080, json!(word), json!([]), expected);
    }
    for port in [25, 587, 3306, 4444, 5432, 6379, 9300, 11_211] {
        check(port, port, json!(null), json!([]), "tcp");
        check(80, port, json!(null), json!([]), "tcp");
        check(port, 8080, json!(null), json!([]), "tcp");
    }
    check(3306, 3306, json!("http"), json!([]), "http");
    check(80, 8080, json!(null), json!([8080]), "tcp");
    check(80, 8080, json!(null), json!([80]), "auto");
    check(80, 8080, json!("http"), json!([8080]), "http");
}

#[test]
fn an_endpoint_is_a_pod_only_when_slice_and_pod_agree() {
    let said = |change: &dyn Fn(&mut Value)| {
        let mut said = endpoint(&pod("shop/orders-1", "10.245.1.7"));
        change(&mut said);
        move |world: &mut World| world.slice("shop/orders", &[said])
    };
    let nobody = "orders.shop:80 auto []";
    check(said(&|_| {}), "10.96.0.7:80", MESHED);
    check(
        said(&|said| said["targetRef"]["uid"] = json!("another")),
        "10.96.0.7:80",
        nobody,
    );
    check(
        said(&|said| said["targetRef"]["name"] = json!("orders-9")),
        "10.96.0.7:80",
        nobody,
    );
    check(
        said(&|said| said["targetRef"]["namespace"] = json!("plain")),
        "10.96.0.7:80",
        nobody,
    );
    check(
        said(&|said| {
            drop(
                said["targetRef"]
                    .as_object_mut()
                    .unwrap()
                    .remove("namespace"),
            )
        }),
        "10.96.0.7:80",
        nobody,
    );
    check(
        said(&|said| said["targetRef"]["kind"] = json!("Node")),
        "10.96.0.7:80",
        nobody,
    );
    check(
        said(&|said| drop(said.as_object_mut().unwrap().remove("targetRef"))),
        "10.96.0.7:80",
        nobody,
    );
    for foreign in [
        "10.245.1.8",
        "203.0.113.9",
        "127.0.0.1",
        "169.254.169.254",
        "172.18.0.2",
        "10.96.0.1",
    ] {
        check(
            said(&|said| said["addresses"] = json!([foreign])),
            "10.96.0.7:80",
            nobody,
        );
    }
}

#[test]
fn a_slice_of_another_namespace_adds_nothing() {
    let foreign = |world: &mut World| {
        let thief = pod("plain/orders-1", "10.245.1.66");
        world.pod(&thief);
        world.slice("plain/orders", &[endpoint(&thief)]);
    };
    check(foreign, "10.96.0.7:80", MESHED);
}

#[test]
fn a_pod_on_the_host_network_or_one_that_has_ended_is_no_endpoint() {
    let changed = |change: fn(&mut PodFacts<'_>)| {
        move |world: &mut World| {
            let mut one = pod("shop/orders-1", "10.245.1.7");
            change(&mut one);
            world.pod(&one);
        }
    };
    let nobody = "orders.shop:80 auto []";
    check(changed(|one| one.on_host = true), "10.96.0.7:80", nobody);
    check(
        changed(|one| one.phase = "Succeeded"),
        "10.96.0.7:80",
        nobody,
    );
    check(changed(|one| one.phase = "Failed"), "10.96.0.7:80", nobody);
    check(
        changed(|one| one.is_injected = false),
        "10.96.0.7:80",
        nobody,
    );
    let opted_out: fn(&mut PodFacts<'_>) =
        |one| one.labels = json!({ "sidegate.dev/inject": "disabled" });
    check(changed(opted_out), "10.96.0.7:80", nobody);
}

#[test]
fn external_addresses_and_load_balancers_never_capture_an_address() {
    let wide = |world: &mut World| {
        world.service("shop/orders", "10.96.0.7", json!({
            "type": "LoadBalancer", "externalIPs": ["203.0.113.7", "10.245.1.99"], "loadBalancerIP": "203.0.113.8",
        }));
    };
    check(wide, "203.0.113.7:80", "external");
    check(wide, "203.0.113.8:80", "external");
    check(wide, "172.18.0.2:30080", "external");
    let web = "web-1.shop:80 auto [10.245.1.99:80 shop/web@zone-a]";
    check(wide, "10.245.1.99:80", web);
}

#[test]
fn a_static_service_never_captures_an_address() {
    let listed = |world: &mut World| {
        world.resource(sidegate_mesh::resource::Kind::StaticService, "shop/db", 1, json!({
            "ports": [{ "port": 80 }],
            "endpoints": [{ "address": "203.0.113.7:80", "identity": { "workload": { "serviceAccount": "db" } } }],
        }));
    };
    check(listed, "203.0.113.7:80", "external");
    check(listed, "db.shop:80", "unknown");
}

#[test]
fn an_external_name_is_left_alone() {
    let named = |world: &mut World| {
        world.service("shop/db", "", json!({ "type": "ExternalName", "externalName": "db.example", "clusterIPs": null, "clusterIP": null }));
    };
    check(named, "203.0.113.7:80", "external");
}

#[test]
fn what_is_outside_is_external_and_what_may_be_a_pod_is_unknown() {
    for (address, expected) in [
        ("203.0.113.9:443", "external"),
        ("169.254.169.254:80", "external"),
        ("172.18.0.2:10250", "external"),
        ("[2001:db8::1]:443", "external"),
        ("10.245.7.7:80", "unknown"),
        ("10.96.200.200:80", "unknown"),
        ("127.0.0.1:80", "unknown"),
        ("0.0.0.0:80", "unknown"),
        ("[::1]:80", "unknown"),
        ("224.0.0.1:80", "unknown"),
    ] {
        check(|_| {}, address, expected);
    }
}

#[test]
fn ranges_that_are_said_by_hand_come_before_those_that_are_guessed() {
    let mut settings = crate::world::settings();
    settings.ranges.pods.clear();
    settings.ranges.external = vec!["10.245.1.128/25".parse().unwrap()];
    let mut world = World::new();
    world.index = sidegate_controller::index::Index::new(settings);
    world.namespace(
        "shop",
        json!({ "sidegate.dev/inject": "enabled" }),
        json!({}),
    );
    let sidecar = world.sidecar();
    // Nobody told of ranges: what lies beside a known pod or Service is not surely outside.
    orders(&mut world);
    assert_eq!(world.ask(sidecar, "10.245.1.100:80"), "unknown");
    assert_eq!(world.ask(sidecar, "10.96.3.3:80"), "unknown");
    assert_eq!(world.ask(sidecar, "10.245.2.100:80"), "external");
    assert_eq!(world.ask(sidecar, "10.245.1.200:5432"), "external");
    world.index.apply_node(&from(
        json!({ "metadata": { "name": "n" }, "spec": { "podCIDRs": ["10.245.2.0/24"] } }),
    ));
    let heard: Vec<String> = world.hear(sidecar).destinations.iter().map(show).collect();
    assert_eq!(
        heard,
        ["external", "unknown"],
        "10.245.1.100 is outside now, 10.245.2.100 not"
    );
}

#[test]
fn a_service_outside_the_mesh_is_external_and_its_pods_as_well() {
    let plain = |world: &mut World| {
        let one = pod("plain/legacy-1", "10.245.1.20").unmeshed();
        world.pod(&one);
        world.service("plain/legacy", "10.96.0.20", json!({}));
        world.slice("plain/legacy", &[endpoint(&one)]);
    };
    check(plain, "10.96.0.20:80", "external");
    check(plain, "10.245.1.20:8080", "external");
    // Injected by hand where the namespace does not say so: that is no identity.
    let forged = |world: &mut World| {
        let one = pod("plain/legacy-1", "10.245.1.20");
        world.pod(&one);
        world.service("plain/legacy", "10.96.0.20", json!({}));
        world.slice("plain/legacy", &[endpoint(&one)]);
    };
    check(forged, "10.96.0.20:80", "external");
}

#[test]
fn an_audit_namespace_is_called_as_before_until_its_pods_are_meshed() {
    let audit = |pods: &'static [(&'static str, bool, bool)]| {
        move |world: &mut World| {
            world.namespace(
                "shop",
                json!({ "sidegate.dev/inject": "enabled" }),
                json!({ "sidegate.dev/enforcement": "audit" }),
            );
            let mut endpoints = Vec::new();
            for (index, (name, is_meshed, is_ready)) in pods.iter().enumerate() {
                let address = format!("10.245.1.{}", 7 + index);
                let mut one = pod(name, &address);
                one.is_injected = *is_meshed;
                world.pod(&one);
                let mut said = endpoint(&one);
                said["conditions"]["ready"] = json!(is_ready);
                endpoints.push(said);
            }
            world.slice("shop/orders", &endpoints);
        }
    };
    let at = "10.96.0.7:80";
    check(audit(&[("shop/orders-1", false, true)]), at, "external");
    check(audit(&[]), at, "external");
    // The first meshed pod is not ready yet: the old ones go on.
    check(
        audit(&[
            ("shop/orders-1", true, false),
            ("shop/orders-2", false, true),
        ]),
        at,
        "external",
    );
    check(
        audit(&[
            ("shop/orders-1", true, true),
            ("shop/orders-2", false, true),
        ]),
        at,
        MESHED,
    );
    check(
        audit(&[("shop/orders-1", false, true)]),
        "10.245.1.7:8080",
        "external",
    );
    check(
        audit(&[("shop/orders-1", true, true)]),
        "10.245.1.7:8080",
        MESHED,
    );
}

#[test]
fn an_enforcing_namespace_leaves_out_what_has_no_identity() {
    let half = |world: &mut World| {
        let other = pod("shop/orders-2", "10.245.1.8").unmeshed();
        world.pod(&other);
        world.slice(
            "shop/orders",
            &[
                endpoint(&pod("shop/orders-1", "10.245.1.7")),
                endpoint(&other),
            ],
        );
    };
    check(half, "10.96.0.7:80", MESHED);
    check(half, "10.245.1.8:8080", "orders.shop:80 auto []");
    let selectorless = |world: &mut World| {
        world.slice(
            "shop/orders",
            &[json!({ "addresses": ["203.0.113.9"], "conditions": { "ready": true } })],
        );
    };
    check(selectorless, "10.96.0.7:80", "orders.shop:80 auto []");
    // Any other word than `audit` enforces.
    let misspelt = |world: &mut World| {
        world.namespace(
            "shop",
            json!({ "sidegate.dev/inject": "enabled" }),
            json!({ "sidegate.dev/enforcement": "audti" }),
        );
        world.slice("shop/orders", &[]);
    };
    check(misspelt, "10.96.0.7:80", "orders.shop:80 auto []");
}

#[test]
fn the_api_server_is_external_also_from_a_meshed_default_namespace() {
    let meshed_default = |world: &mut World| {
        world.namespace(
            "default",
            json!({ "sidegate.dev/inject": "enabled" }),
            json!({}),
        );
        world.service(
            "default/kubernetes",
            "10.96.0.1",
            json!({ "ports": [{ "name": "https", "port": 443 }] }),
        );
        world.slice_with(
            "default/kubernetes",
            "1",
            json!([{ "name": "https", "port": 6443 }]),
            &[json!({ "addresses": ["172.18.0.2"], "conditions": { "ready": true } })],
        );
    };
    check(meshed_default, "10.96.0.1:443", "external");
}

#[test]
fn a_namespace_may_refuse_calls_to_the_outside() {
    let mut world = World::new();
    let sidecar = world.sidecar();
    assert_eq!(world.ask(sidecar, "203.0.113.9:443"), "external");
    let labels = json!({ "sidegate.dev/inject": "enabled" });
    world.namespace(
        "shop",
        labels.clone(),
        json!({ "sidegate.dev/egress": "deny" }),
    );
    assert_eq!(world.hear(sidecar).words(), ["external, refused"]);
    assert_eq!(world.ask(sidecar, "203.0.113.10:443"), "external, refused");
    world.namespace("shop", labels, json!({ "sidegate.dev/egress": "allow" }));
    assert_eq!(world.hear(sidecar).words(), ["external", "external"]);
}

#[test]
fn kube_system_and_the_control_plane_are_never_injected() {
    for name in ["kube-system", "sidegate-system"] {
        let service = format!("{name}/dns");
        let change = |world: &mut World| {
            world.namespace(name, json!({ "sidegate.dev/inject": "enabled" }), json!({}));
            world.service(&service, "10.96.0.53", json!({}));
        };
        check(change, "10.96.0.53:80", "external");
    }
}

#[test]
fn each_change_is_heard_and_nothing_else() {
    let mut world = World::new();
    let sidecar = world.sidecar();
    assert_eq!(world.ask(sidecar, "10.96.0.7:80"), "unknown");
    let one = pod("shop/orders-1", "10.245.1.7");
    world.service("shop/orders", "10.96.0.7", json!({}));
    assert_eq!(world.hear(sidecar).words(), ["orders.shop:80 auto []"]);
    world.slice("shop/orders", &[endpoint(&one)]);
    assert!(
        world.hear(sidecar).words().is_empty(),
        "the pod is not known yet"
    );
    world.pod(&one);
    assert_eq!(world.hear(sidecar).words(), [MESHED]);
    world.pod(&one);
    world.pod(&pod("plain/other", "10.245.9.9"));
    world.service("shop/other", "10.96.0.8", json!({}));
    assert_eq!(world.hear(sidecar).responses, 0);
    world.index.remove_pod(&key("shop/orders-1"));
    assert_eq!(world.hear(sidecar).words(), ["orders.shop:80 auto []"]);
    world.pod(&one);
    world.index.remove_slice(&key("shop/orders-1"));
    world.index.remove_service(&key("shop/orders"));
    assert_eq!(
        world.hear(sidecar).words(),
        ["unknown"],
        "only the last state is heard"
    );
    world.service("shop/elsewhere", "10.96.0.7", json!({}));
    assert_eq!(
        world.hear(sidecar).words(),
        ["elsewhere.shop:80 auto []"],
        "the address is another's now"
    );
}

#[test]
fn an_address_that_passes_on_is_the_new_pods() {
    let mut world = World::new();
    let sidecar = world.sidecar();
    let mut old = pod("shop/orders-1", "10.245.1.7");
    world.pod(&old);
    let of = |name: &str| format!("{name}.shop:80 auto [10.245.1.7:80 shop/orders@zone-a]");
    assert_eq!(world.ask(sidecar, "10.245.1.7:80"), of("orders-1"));
    let new = pod("shop/orders-2", "10.245.1.7");
    world.pod(&new);
    assert_eq!(
        world.hear(sidecar).words(),
        ["unknown"],
        "two pods, and no saying which"
    );
    old.is_terminating = true;
    world.pod(&old);
    assert_eq!(world.hear(sidecar).words(), [of("orders-2")]);
    world.index.remove_pod(&key("shop/orders-1"));
    assert_eq!(world.hear(sidecar).responses, 0);
}
