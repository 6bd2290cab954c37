//! Admissions per second on one core: from a review's bytes to the answer's bytes.
#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark")]

use std::collections::BTreeMap;
use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use serde_json::{Value, json};
use sidegate_injector::{NamespaceFacts, Outcome, Settings, inject};

/// A pod as the API server sends it: defaulted, with probes, and with managed fields.
fn review() -> String {
    let container = |name: &str| {
        json!({
            "name": name, "image": "registry.example/shop/web:2.3", "imagePullPolicy": "IfNotPresent",
            "env": (0..20).map(|i| json!({ "name": format!("VARIABLE_{i}"), "value": "x".repeat(40) })).collect::<Vec<_>>(),
            "ports": [{ "name": format!("p-{name}"), "containerPort": name.len() + 8000, "protocol": "TCP" }],
            "livenessProbe": { "httpGet": { "path": "/healthz", "port": format!("p-{name}"), "scheme": "HTTP" }, "periodSeconds": 10, "timeoutSeconds": 1 },
            "readinessProbe": { "tcpSocket": { "port": name.len() + 8000 }, "periodSeconds": 10 },
            "resources": { "limits": { "cpu": "1", "memory": "512Mi" } },
            "volumeMounts": [{ "name": "kube-api-access", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": true }],
        })
    };
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "generateName": "web-7d9c-", "labels": { "app": "web" }, "annotations": { "a": "b" }, "managedFields": [{ "fieldsV1": { "f:spec": "x".repeat(1500) } }] },
        "spec": { "serviceAccountName": "web", "containers": [container("app"), container("exporter")], "volumes": [{ "name": "kube-api-access", "projected": {} }] },
    });
    json!({
        "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
        "request": { "uid": "u", "kind": { "group": "", "version": "v1", "kind": "Pod" }, "operation": "CREATE", "namespace": "shop", "object": pod },
    })
    .to_string()
}

fn admissions(criterion: &mut Criterion) {
    let (settings, body) = (Settings::default(), review());
    let namespace = NamespaceFacts {
        name: "shop".to_owned(),
        labels: BTreeMap::from([("sidegate.dev/inject".to_owned(), "enabled".to_owned())]),
        annotations: BTreeMap::new(),
    };
    let mut group = criterion.benchmark_group("admissions");
    group.throughput(Throughput::Elements(1));
    group.bench_function("a pod of two containers", |bencher| {
        bencher.iter(|| {
            let review: Value = serde_json::from_str(black_box(&body)).unwrap();
            let pod = review.pointer("/request/object").unwrap();
            let Ok(Outcome::Patched(patch)) = inject(pod, &namespace, &settings) else {
                return 0;
            };
            patch.to_string().len()
        });
    });
    group.finish();
}

criterion_group!(benches, admissions);
criterion_main!(benches);
