//! Who may reach the control plane, where the network enforces it.
//!
//! Invariant: what is not named is closed. The webhook's port admits any source, because the
//! address of the API server cannot be known.

use serde_json::{Value, json};

use super::super::plan::NAMESPACE;
use super::{CA, CONTROLLER, INJECTOR, local, selector};

/// Nothing comes in that no other policy admits.
pub(super) fn closed() -> Vec<Value> {
    vec![json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {
            "name": "sidegate-closed",
            "namespace": NAMESPACE,
            "labels": { "app.kubernetes.io/part-of": "sidegate" },
        },
        "spec": { "podSelector": {}, "policyTypes": ["Ingress"] },
    })]
}

/// Every pod asks the CA.
pub(super) fn ca() -> Vec<Value> {
    policy(CA, &json!([pods_to(&[19_010, 19_011])]))
}

/// Every sidecar follows the controller.
pub(super) fn controller() -> Vec<Value> {
    policy(CONTROLLER, &json!([pods_to(&[19_012, 19_013])]))
}

/// The API server calls the injector.
pub(super) fn injector() -> Vec<Value> {
    let anyone = json!({ "ports": ports(&[19_014]) });
    policy(INJECTOR, &json!([anyone, pods_to(&[19_015])]))
}

/// Pods of every namespace, to these ports. Metrics hold no secret.
fn pods_to(numbers: &[u16]) -> Value {
    json!({ "from": [{ "namespaceSelector": {} }], "ports": ports(numbers) })
}

fn ports(numbers: &[u16]) -> Vec<Value> {
    let port = |number| json!({ "protocol": "TCP", "port": number });
    numbers.iter().map(port).collect()
}

fn policy(name: &str, ingress: &Value) -> Vec<Value> {
    vec![json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": local(name, name),
        "spec": {
            "podSelector": { "matchLabels": selector(name) },
            "policyTypes": ["Ingress"],
            "ingress": ingress,
        },
    })]
}
