//! Each field of each resource, misspelt, dropped and emptied in turn: the resource is refused, or
//! it says what the documentation says of the absent field. Never does it say more.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    reason = "tests"
)]

use std::collections::BTreeSet;

use serde_json::{Value, json};
use sidegate_mesh::resource::{parse_documents, parse_value};

/// A resource of each kind with every field that there is.
fn full_resources() -> Vec<Value> {
    let metadata = json!({
        "namespace": "sidegate-system",
        "name": "full",
        "labels": { "team": "shop" },
        "annotations": { "note": "everything" },
    });
    let policy = json!({
        "apiVersion": "sidegate.dev/v1alpha1",
        "kind": "AuthorizationPolicy",
        "metadata": metadata,
        "spec": {
            "namespaceSelector": { "matchLabels": { "team": "shop" } },
            "selector": { "matchLabels": { "app": "orders" } },
            "ports": ["http", 6379],
            "action": "Allow",
            "mode": "Enforce",
            "rules": [{
                "name": "readers",
                "from": [
                    { "workload": { "serviceAccount": "web", "namespace": "edge" } },
                    { "namespace": { "name": "reports" } },
                    { "spiffeId": { "id": "spiffe://partner.example/ns/x/sa/y" } },
                    { "anyone": {} },
                    { "unauthenticated": {} },
                ],
                "to": [
                    { "http": {
                        "methods": ["GET"],
                        "paths": ["/orders/*"],
                        "hosts": ["orders.shop"],
                        "upgrades": ["websocket"],
                    } },
                    { "grpc": { "service": "shop.v1.Orders", "methods": ["Get"] } },
                    { "tcp": {} },
                    { "anything": {} },
                ],
            }],
        },
    });
    vec![policy, full_service(&metadata), full_traffic(&metadata)]
}

fn full_service(metadata: &Value) -> Value {
    json!({
        "apiVersion": "sidegate.dev/v1alpha1",
        "kind": "StaticService",
        "metadata": metadata,
        "spec": {
            "ports": [{ "name": "http", "port": 80, "targetPort": 8080, "protocol": "auto" }],
            "endpoints": [
                { "address": "127.0.0.1:21006", "identity": { "workload": { "serviceAccount": "orders", "namespace": "shop" } } },
                { "address": "[::1]:21006", "identity": { "spiffeId": { "id": "spiffe://a/b" } } },
            ],
        },
    })
}

fn full_traffic(metadata: &Value) -> Value {
    json!({
        "apiVersion": "sidegate.dev/v1alpha1",
        "kind": "TrafficPolicy",
        "metadata": metadata,
        "spec": {
            "service": "orders",
            "timeout": "2s",
            "retry": {
                "attempts": 2,
                "conditions": ["connect-failure", "refused-stream", "reset", "timeout", "5xx", "gateway-error"],
                "methods": ["GET", "HEAD"],
                "perTryTimeout": "500ms",
                "budget": "20%",
            },
            "grpcRetry": {
                "attempts": 2,
                "codes": ["unavailable", "cancelled", "deadline-exceeded", "resource-exhausted", "aborted", "internal"],
                "methods": ["shop.v1.Orders/Get"],
                "perTryTimeout": "500ms",
                "budget": "20%",
            },
            "outlierEjection": { "consecutiveFailures": 5, "duration": "10s", "maxEjected": "50%" },
            "loadBalancing": { "policy": "p2c-ewma", "preferZone": true },
        },
    })
}

/// What may be left out, and then means what interface.md says: no other field may.
const MAY_BE_ABSENT: &[&str] = &[
    "/metadata/annotations",
    "/metadata/labels",
    "/spec/endpoints/0/identity/workload/namespace",
    "/spec/grpcRetry",
    "/spec/grpcRetry/budget",
    "/spec/grpcRetry/perTryTimeout",
    "/spec/loadBalancing",
    "/spec/loadBalancing/policy",
    "/spec/loadBalancing/preferZone",
    "/spec/mode",
    "/spec/namespaceSelector",
    "/spec/outlierEjection",
    "/spec/outlierEjection/duration",
    "/spec/outlierEjection/maxEjected",
    "/spec/ports/0/name",
    "/spec/ports/0/protocol",
    "/spec/ports/0/targetPort",
    "/spec/retry",
    "/spec/retry/budget",
    "/spec/rules/0/from/0/workload/namespace",
    "/spec/rules/0/name",
    "/spec/rules/0/to/0/http/hosts",
    "/spec/rules/0/to/0/http/upgrades",
    "/spec/selector/matchLabels",
    "/spec/namespaceSelector/matchLabels",
    "/spec/timeout",
];

/// What may be an empty list or object: it then says so itself.
const MAY_BE_EMPTY: &[&str] = &[
    "/metadata/annotations",
    "/metadata/labels",
    "/spec/endpoints",
    "/spec/loadBalancing",
    "/spec/namespaceSelector",
    "/spec/rules/0/from/3/anyone",
    "/spec/rules/0/from/4/unauthenticated",
    "/spec/rules/0/to/2/tcp",
    "/spec/rules/0/to/3/anything",
    "/spec/selector",
];

/// Whether the keys below are a person's own words.
fn has_free_keys(pointer: &str) -> bool {
    ["/labels", "/annotations", "/matchLabels"]
        .iter()
        .any(|end| pointer.ends_with(end))
}

/// Every field of a resource: where its object is, and its key.
fn fields(value: &Value, at: &str, found: &mut Vec<(String, String)>) {
    match value {
        Value::Object(map) if !has_free_keys(at) => {
            for (key, inner) in map {
                found.push((at.to_owned(), key.clone()));
                fields(inner, &format!("{at}/{key}"), found);
            }
        }
        Value::Array(list) => {
            for (index, inner) in list.iter().enumerate() {
                fields(inner, &format!("{at}/{index}"), found);
            }
        }
        _ => {}
    }
}

fn all_fields() -> Vec<(Value, String, String)> {
    let mut all = Vec::new();
    for resource in full_resources() {
        let mut found = Vec::new();
        fields(&resource, "", &mut found);
        all.extend(
            found
                .into_iter()
                .map(|(at, key)| (resource.clone(), at, key)),
        );
    }
    assert!(all.len() > 80, "{}", all.len());
    all
}

/// A resource with one object changed.
fn with(
    resource: &Value,
    at: &str,
    change: impl FnOnce(&mut serde_json::Map<String, Value>),
) -> Value {
    let mut changed = resource.clone();
    change(changed.pointer_mut(at).unwrap().as_object_mut().unwrap());
    changed
}

fn is_accepted(resource: &Value) -> bool {
    let from_json = parse_value(resource).is_ok();
    let yaml = serde_saphyr::to_string(resource).unwrap();
    let results = parse_documents("a.yaml", &yaml);
    assert_eq!(from_json, results.iter().all(Result::is_ok), "{yaml}");
    from_json
}

#[test]
fn the_full_resources_are_accepted() {
    for resource in full_resources() {
        let problems = parse_value(&resource).err();
        assert_eq!(problems, None);
        assert!(is_accepted(&resource));
    }
}

#[test]
fn a_misspelt_field_is_refused_whichever_it_is() {
    for (resource, at, key) in all_fields() {
        let mut chars = key.chars();
        let first = chars.next().unwrap();
        let rest = chars.as_str();
        let misspellings = [
            format!("{key}s"),
            format!("x{key}"),
            format!("{key} "),
            key[..key.len() - 1].to_owned(),
            format!("{}{rest}", first.to_uppercase()),
            key.to_uppercase(),
            format!("{key}\u{200b}"),
            key.replace('e', "\u{435}") + "_",
            String::new(),
        ];
        for misspelt in misspellings {
            let renamed = with(&resource, &at, |map| {
                let value = map.remove(&key).unwrap();
                map.insert(misspelt.clone(), value);
            });
            assert!(!is_accepted(&renamed), "{at}/{key} as {misspelt:?}");
            let beside = with(&resource, &at, |map| {
                let value = map[&key].clone();
                map.insert(misspelt.clone(), value);
            });
            assert!(!is_accepted(&beside), "{at}/{key} and {misspelt:?}");
        }
    }
}

#[test]
fn only_what_is_documented_may_be_dropped() {
    let mut dropped = BTreeSet::new();
    for (resource, at, key) in all_fields() {
        let without = with(&resource, &at, |map| drop(map.remove(&key)));
        if is_accepted(&without) {
            dropped.insert(format!("{at}/{key}"));
        }
    }
    let documented: BTreeSet<String> = MAY_BE_ABSENT.iter().map(ToString::to_string).collect();
    assert_eq!(dropped, documented);
}

#[test]
fn ports_may_be_dropped_only_where_no_opaque_bytes_come_in() {
    let resource = &full_resources()[0];
    let without = with(resource, "/spec", |spec| drop(spec.remove("ports")));
    assert!(!is_accepted(&without));
    let mut narrow = without.clone();
    narrow["spec"]["rules"][0]["to"]
        .as_array_mut()
        .unwrap()
        .truncate(2);
    assert!(is_accepted(&narrow));
}

#[test]
fn a_field_without_a_value_is_refused_whichever_it_is() {
    for (resource, at, key) in all_fields() {
        let nothing = with(&resource, &at, |map| map[&key] = Value::Null);
        assert!(!is_accepted(&nothing), "{at}/{key}");
    }
}

#[test]
fn only_what_is_documented_may_be_empty() {
    for (resource, at, key) in all_fields() {
        let pointer = format!("{at}/{key}");
        let empty = match &resource.pointer(&pointer).unwrap() {
            Value::Array(_) => json!([]),
            Value::Object(_) => json!({}),
            _ => json!(""),
        };
        let emptied = with(&resource, &at, |map| map[&key] = empty);
        assert_eq!(
            is_accepted(&emptied),
            MAY_BE_EMPTY.contains(&pointer.as_str()),
            "{pointer}"
        );
    }
}

#[test]
fn a_value_of_another_type_is_refused_whichever_it_is() {
    for (resource, at, key) in all_fields() {
        let pointer = format!("{at}/{key}");
        let now = resource.pointer(&pointer).unwrap();
        for other in [
            json!(true),
            json!(7.5),
            json!(-1),
            json!("no such\nvalue;"),
            json!([["x"]]),
            json!({ "x": {} }),
        ] {
            let is_same_type = now.is_boolean() && other.is_boolean();
            if is_same_type {
                continue;
            }
            let changed = with(&resource, &at, |map| map[&key] = other.clone());
            let is_free = has_free_keys(&pointer);
            assert!(is_free || !is_accepted(&changed), "{pointer} as {other}");
        }
    }
}
