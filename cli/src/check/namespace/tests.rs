use serde_json::json;

use super::super::finding::Level;
use super::super::injected::tests::meshed;
use super::super::injected::{Leaf, Renewals};
use super::*;

fn of<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn namespace(labels: &Value, annotations: &Value) -> Namespace {
    let mut all = json!({ "sidegate.dev/inject": "enabled" });
    all.as_object_mut()
        .unwrap()
        .extend(labels.as_object().unwrap().clone());
    of(json!({ "metadata": { "name": "shop", "labels": all, "annotations": annotations } }))
}

fn bundle(namespace: &str) -> k8s_openapi::api::core::v1::ConfigMap {
    of(json!({
        "metadata": { "name": "sidegate-bundle", "namespace": namespace },
        "data": { "root.pem": "root" },
    }))
}

/// A namespace with nothing to complain about.
fn healthy() -> Facts {
    Facts {
        namespaces: vec![namespace(&json!({}), &json!({}))],
        bundles: vec![bundle("shop"), bundle("sidegate-system")],
        pods: vec![meshed("web", &[], &json!({ "drainTimeout": "25s" }))],
        resources: vec![(
            Kind::AuthorizationPolicy,
            of(json!({
                "metadata": { "name": "web", "namespace": "shop" },
                "spec": { "action": "Allow" },
            })),
        )],
        certificates: vec![certificate(1_000)],
        ..Facts::default()
    }
}

/// A certificate that has this many seconds of its hour left.
fn certificate(left: i64) -> Certificate {
    let at = |seconds: i64| {
        let moment = OffsetDateTime::from_unix_timestamp(seconds).unwrap();
        moment.format(&Rfc3339).unwrap()
    };
    Certificate {
        pod: "web".to_owned(),
        answer: Ok(super::super::injected::Certs {
            certificate: Some(Leaf {
                not_before: at(left - 3_600),
                not_after: at(left),
            }),
            renewals: Renewals {
                last_error: Some("the CA is away".to_owned()),
            },
        }),
    }
}

fn troubles(facts: &Facts) -> Vec<(&'static str, Level)> {
    let findings = check(facts, "shop").into_iter();
    let bad = findings.filter(|finding| finding.level != Level::Well);
    bad.map(|finding| (finding.check, finding.level)).collect()
}

#[track_caller]
fn check_trouble(change: impl FnOnce(&mut Facts), expected: &[(&'static str, Level)]) {
    let mut facts = healthy();
    change(&mut facts);
    assert_eq!(troubles(&facts), expected);
}

fn pod(value: Value) -> Pod {
    let mut pod = json!({
        "metadata": { "name": "bare", "namespace": "shop" },
        "spec": { "containers": [{ "name": "app", "image": "x" }] },
    });
    json_merge(&mut pod, value);
    of(pod)
}

fn json_merge(to: &mut Value, from: Value) {
    match (to, from) {
        (Value::Object(to), Value::Object(from)) => {
            for (key, value) in from {
                json_merge(to.entry(key).or_insert(Value::Null), value);
            }
        }
        (to, from) => *to = from,
    }
}

#[test]
fn a_healthy_namespace_has_no_trouble() {
    assert_eq!(troubles(&healthy()), []);
}

#[test]
fn a_namespace_that_is_not_in_the_mesh_is_told_how() {
    check_trouble(
        |facts| {
            facts.namespaces[0] = namespace(&json!({ "sidegate.dev/inject": "no" }), &json!({}));
        },
        &[("namespace", Level::Wrong)],
    );
    check_trouble(
        |facts| facts.namespaces.clear(),
        &[("namespace", Level::Wrong)],
    );
}

#[test]
fn what_the_namespace_itself_says_is_judged() {
    for level in ["baseline", "restricted"] {
        let label = json!({ "pod-security.kubernetes.io/enforce": level });
        check_trouble(
            |facts| facts.namespaces[0] = namespace(&label, &json!({})),
            &[("pod security", Level::Wrong)],
        );
    }
    let istio = json!({ "istio-injection": "enabled" });
    check_trouble(
        |facts| facts.namespaces[0] = namespace(&istio, &json!({})),
        &[("other meshes", Level::Wrong)],
    );
    let audit = json!({ "sidegate.dev/enforcement": "audit" });
    check_trouble(
        |facts| facts.namespaces[0] = namespace(&json!({}), &audit),
        &[("adoption", Level::Look)],
    );
    check_trouble(
        |facts| drop(facts.bundles.remove(0)),
        &[("bundle", Level::Wrong)],
    );
    check_trouble(
        |facts| facts.resources.clear(),
        &[("policies", Level::Look)],
    );
}

#[test]
fn every_reason_to_be_without_a_sidecar_has_its_own_line() {
    let adoption = ("adoption", Level::Look);
    let early = pod(json!({}));
    check_trouble(
        |facts| facts.pods.push(early),
        &[adoption, ("pods without sidecar", Level::Look)],
    );
    let out = pod(json!({ "metadata": { "labels": { "sidegate.dev/inject": "disabled" } } }));
    check_trouble(
        |facts| facts.pods.push(out),
        &[adoption, ("opted out", Level::Look)],
    );
    let skipped = pod(json!({ "metadata": { "annotations": { "sidegate.dev/skipped": "x" } } }));
    check_trouble(
        |facts| facts.pods.push(skipped),
        &[adoption, ("skipped", Level::Look)],
    );
    let host = pod(json!({ "spec": { "hostNetwork": true } }));
    check_trouble(
        |facts| facts.pods.push(host),
        &[adoption, ("skipped", Level::Look)],
    );
    let clash = pod(json!({ "spec": { "containers": [
        { "name": "app", "image": "x", "ports": [{ "containerPort": 19006 }] },
    ] } }));
    check_trouble(
        |facts| facts.pods.push(clash),
        &[adoption, ("pods without sidecar", Level::Wrong)],
    );
    let ended = pod(json!({ "status": { "phase": "Succeeded" } }));
    check_trouble(|facts| facts.pods.push(ended), &[]);
}

#[test]
fn a_workload_whose_pods_are_refused_is_found_without_a_pod() {
    let deployment = |annotations: &Value| {
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": { "name": "web", "namespace": "shop" },
            "spec": { "template": {
                "metadata": { "annotations": annotations },
                "spec": { "containers": [{ "name": "app", "image": "x" }] },
            } },
        })
    };
    let wrong = deployment(&json!({ "sidegate.dev/log-level": "loud" }));
    check_trouble(
        |facts| facts.workloads.push(wrong),
        &[("workloads", Level::Wrong)],
    );
    let fine = deployment(&json!({ "sidegate.dev/log-level": "debug" }));
    check_trouble(|facts| facts.workloads.push(fine), &[]);
}

#[test]
fn what_a_sidecar_was_injected_with_is_judged() {
    let replace = |arguments: &'static [&str], config: Value| {
        move |facts: &mut Facts| facts.pods[0] = meshed("web", arguments, &config)
    };
    let probe = json!({ "probes": { "entries": { "app/liveness": { "tcp": { "port": 8080 } } } } });
    check_trouble(
        replace(&["--skip-inbound-port=8080"], probe.clone()),
        &[("probes", Level::Look)],
    );
    check_trouble(replace(&["--skip-inbound-port=9090"], probe), &[]);
    let slow = json!({ "drainTimeout": "31s" });
    check_trouble(replace(&[], slow), &[("draining", Level::Look)]);
    check_trouble(
        |facts| {
            let annotations = facts.pods[0].annotations_mut();
            annotations.insert("sidegate.dev/injected".to_owned(), "0.0.1".to_owned());
        },
        &[("sidecars' versions", Level::Look)],
    );
}

#[test]
fn other_protocols_are_closed_unless_they_are_named() {
    let udp = |facts: &mut Facts, arguments: &[&str]| {
        facts.pods[0] = meshed("web", arguments, &json!({}));
        let spec = facts.pods[0].spec.as_mut().unwrap();
        spec.containers[0].ports = of(json!([{ "containerPort": 514, "protocol": "UDP" }]));
    };
    check_trouble(|facts| udp(facts, &[]), &[("other protocols", Level::Look)]);
    check_trouble(|facts| udp(facts, &["--udp-port=514"]), &[]);
}

#[test]
fn a_container_that_could_undo_redirection_is_named() {
    let context = |value: Value| {
        move |facts: &mut Facts| {
            let spec = facts.pods[0].spec.as_mut().unwrap();
            spec.containers[0].security_context = of(value);
        }
    };
    let able = [("escapes", Level::Look)];
    check_trouble(context(json!({ "privileged": true })), &able);
    check_trouble(
        context(json!({ "capabilities": { "add": ["NET_ADMIN"] } })),
        &able,
    );
    check_trouble(context(json!({ "runAsUser": 0 })), &able);
    let dropped = json!({ "runAsUser": 0, "capabilities": { "drop": ["ALL"] } });
    check_trouble(context(dropped), &[]);
    check_trouble(context(json!({ "runAsUser": 1000 })), &[]);
}

#[test]
fn a_certificate_is_judged_by_what_is_left_of_its_life() {
    for (left, expected) in [
        (3_000, vec![]),
        (901, vec![]),
        (899, vec![("certificates", Level::Look)]),
        (0, vec![("certificates", Level::Wrong)]),
    ] {
        check_trouble(|facts| facts.certificates[0] = certificate(left), &expected);
    }
    check_trouble(
        |facts| facts.certificates[0].answer = Err("no answer".to_owned()),
        &[("certificates", Level::Look)],
    );
}
