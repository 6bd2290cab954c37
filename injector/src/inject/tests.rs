//! Injection as a whole: what a pod becomes, and what is refused.
#![allow(clippy::too_many_lines, reason = "tables of cases")]

use proptest::prelude::*;
use serde_json::{Value, json};

use super::annotations::drain_warning;
use super::*;

fn settings() -> Settings {
    let mut settings = Settings::default();
    "1.2.3".clone_into(&mut settings.images.tag);
    settings
}

fn namespace() -> NamespaceFacts {
    NamespaceFacts {
        name: "shop".to_owned(),
        labels: BTreeMap::from([(annotations::INJECT.to_owned(), "enabled".to_owned())]),
        annotations: BTreeMap::new(),
    }
}

fn annotated(pairs: &[(&str, &str)]) -> NamespaceFacts {
    let mut namespace = namespace();
    let pairs = pairs
        .iter()
        .map(|(key, value)| (format!("sidegate.dev/{key}"), (*value).to_owned()));
    namespace.annotations.extend(pairs);
    namespace
}

fn pod() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": "web-1", "labels": { "app": "web" } },
        "spec": {
            "serviceAccountName": "web",
            "containers": [{ "name": "app", "image": "web:1", "ports": [{ "name": "http", "containerPort": 8080 }] }],
        },
    })
}

/// `pod` with each value put at its pointer.
fn with(mut pod: Value, changes: &[(&str, Value)]) -> Value {
    for (pointer, value) in changes {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        let parent = pod
            .pointer_mut(parent)
            .unwrap_or_else(|| panic!("{pointer}"));
        match parent {
            Value::Array(list) => list.push(value.clone()),
            parent => drop(
                parent
                    .as_object_mut()
                    .unwrap()
                    .insert(key.replace("~1", "/"), value.clone()),
            ),
        }
    }
    pod
}

fn attempt(pod: &Value, namespace: &NamespaceFacts) -> Result<Outcome, Refusal> {
    inject_with(pod, namespace, &settings(), &|| Some([0xab; 32]))
}

fn apply(pod: &Value, patch: &Patch) -> Value {
    let mut pod = pod.clone();
    json_patch::patch(&mut pod, patch).unwrap();
    pod
}

#[track_caller]
fn injected_in(pod: &Value, namespace: &NamespaceFacts) -> Value {
    match attempt(pod, namespace) {
        Ok(Outcome::Patched(patch)) => apply(pod, &patch),
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn injected(pod: &Value) -> Value {
    injected_in(pod, &namespace())
}

fn init_container<'p>(pod: &'p Value, name: &str) -> &'p Value {
    let containers = pod["spec"]["initContainers"].as_array().unwrap();
    containers
        .iter()
        .find(|container| container["name"] == name)
        .unwrap()
}

fn config(pod: &Value) -> Value {
    let proxy = init_container(pod, "sidegate-proxy");
    serde_json::from_str(proxy["env"][0]["value"].as_str().unwrap()).unwrap()
}

#[track_caller]
fn check_refused(pod: &Value, expected: &str) {
    check_refused_in(pod, &namespace(), expected);
}

#[track_caller]
fn check_refused_in(pod: &Value, namespace: &NamespaceFacts, expected: &str) {
    match attempt(pod, namespace) {
        Err(refusal) => assert!(refusal.to_string().contains(expected), "{refusal}"),
        Ok(outcome) => panic!("{expected} expected, but {outcome:?}"),
    }
}

#[test]
fn a_pod_gets_redirection_and_a_sidecar_before_everything_else() {
    let pod = with(
        pod(),
        &[("/spec/initContainers", json!([{ "name": "migrate" }]))],
    );
    let after = injected(&pod);
    let names: Vec<_> = after["spec"]["initContainers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["sidegate-init", "sidegate-proxy", "migrate"]);
    assert_eq!(
        after["metadata"]["annotations"]["sidegate.dev/injected"],
        env!("CARGO_PKG_VERSION")
    );
    insta::assert_json_snapshot!("sidecar", after["spec"]);
}

#[test]
fn only_redirection_has_a_privilege_and_both_have_bounds() {
    let after = injected(&pod());
    let init = init_container(&after, "sidegate-init");
    assert_eq!(
        init["securityContext"]["capabilities"],
        json!({ "drop": ["ALL"], "add": ["NET_ADMIN"] })
    );
    let proxy = init_container(&after, "sidegate-proxy");
    let context = &proxy["securityContext"];
    assert_eq!(
        (&context["runAsUser"], &context["runAsNonRoot"]),
        (&json!(1519), &json!(true))
    );
    assert_eq!(context["capabilities"], json!({ "drop": ["ALL"] }));
    for container in [init, proxy] {
        assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
        assert_eq!(
            container["securityContext"]["seccompProfile"]["type"],
            "RuntimeDefault"
        );
        for (kind, amount) in [
            ("requests", "cpu"),
            ("requests", "memory"),
            ("limits", "cpu"),
            ("limits", "memory"),
        ] {
            assert!(
                container["resources"][kind][amount].is_string(),
                "{kind} {amount}"
            );
        }
    }
}

#[test]
fn the_sidecar_is_told_who_and_where_it_is() {
    let config = config(&injected(&pod()));
    assert_eq!(
        config["workload"],
        json!({ "trustDomain": "cluster.local", "namespace": "shop", "serviceAccount": "web" })
    );
    assert_eq!(
        config["ports"],
        json!([{ "name": "http", "port": 8080, "protocol": "auto" }])
    );
    assert_eq!(config["ca"]["tokenFile"], "/var/run/sidegate/token/token");
    assert_eq!(config["destination"], "original");
    assert!(
        config.get("probes").is_none(),
        "nothing to probe, no secret"
    );
}

#[test]
fn ports_are_those_of_what_runs_beside_and_each_once() {
    let containers = json!([
        { "name": "a", "ports": [{ "name": "http", "containerPort": 80 }, { "containerPort": 53, "protocol": "UDP" }] },
        { "name": "b", "ports": [{ "name": "http", "containerPort": 81 }, { "name": "again", "containerPort": 80 }] },
    ]);
    let init = json!([
        { "name": "native", "restartPolicy": "Always", "ports": [{ "name": "metrics", "containerPort": 90 }] },
        { "name": "once", "ports": [{ "name": "never", "containerPort": 91 }] },
    ]);
    let pod = with(
        pod(),
        &[
            ("/spec/containers", containers),
            ("/spec/initContainers", init),
        ],
    );
    let expected = json!([
        { "name": "http", "port": 80, "protocol": "auto" },
        { "port": 81, "protocol": "auto" },
        { "name": "metrics", "port": 90, "protocol": "auto" },
    ]);
    assert_eq!(config(&injected(&pod))["ports"], expected);
}

#[test]
fn a_pod_without_a_service_account_has_the_default_one() {
    let mut pod = pod();
    pod["spec"]["serviceAccountName"] = Value::Null;
    assert_eq!(
        config(&injected(&pod))["workload"]["serviceAccount"],
        "default"
    );
    let pod = with(pod, &[("/spec/serviceAccount", json!("old"))]);
    assert_eq!(config(&injected(&pod))["workload"]["serviceAccount"], "old");
}

// ---- probes ----

/// What the sidecar asks for a probe of `app`, as liveness.
#[track_caller]
fn entry_of(probe: Value) -> Value {
    let pod = with(pod(), &[("/spec/containers/0/livenessProbe", probe)]);
    let after = injected(&pod);
    let now = &after["spec"]["containers"][0]["livenessProbe"];
    assert_eq!(now["httpGet"]["path"], "/probe/app/liveness");
    assert_eq!(now["httpGet"]["port"], 19021);
    assert!(
        now.get("tcpSocket").is_none() && now.get("grpc").is_none(),
        "{now}"
    );
    config(&after)["probes"]["entries"]["app/liveness"].clone()
}

#[test]
fn every_way_of_asking_is_kept_exactly() {
    let http = |port: Value, more: Value| {
        let mut get = json!({ "port": port });
        get.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        json!({ "httpGet": get })
    };
    let asks = |path: &str| json!({ "http": { "scheme": "http", "port": 8080, "path": path }, "timeout": "1s" });
    let cases = [
        (
            http(json!(8080), json!({ "path": "/healthz?full=1&x=$(HOME)" })),
            asks("/healthz?full=1&x=$(HOME)"),
        ),
        (
            http(json!("http"), json!({ "path": "healthz" })),
            asks("healthz"),
        ),
        (http(json!("8080"), json!({})), asks("/")),
        (
            http(json!(8080), json!({ "path": "", "scheme": "" })),
            asks("/"),
        ),
        (
            http(
                json!(8443),
                json!({ "scheme": "HTTPS", "path": "/", "httpHeaders": [{ "name": "Host", "value": "a.example" }, { "name": "X-A", "value": "" }] }),
            ),
            json!({ "http": { "scheme": "https", "port": 8443, "path": "/", "headers": [{ "name": "Host", "value": "a.example" }, { "name": "X-A", "value": "" }] }, "timeout": "1s" }),
        ),
        (
            json!({ "tcpSocket": { "port": "http" }, "timeoutSeconds": 7 }),
            json!({ "tcp": { "port": 8080 }, "timeout": "7s" }),
        ),
        (
            json!({ "grpc": { "port": 9000 }, "timeoutSeconds": 0 }),
            json!({ "grpc": { "port": 9000, "service": "" }, "timeout": "1s" }),
        ),
        (
            json!({ "grpc": { "port": 9000, "service": "a.B" }, "timeoutSeconds": null }),
            json!({ "grpc": { "port": 9000, "service": "a.B" }, "timeout": "1s" }),
        ),
    ];
    for (probe, expected) in cases {
        assert_eq!(entry_of(probe.clone()), expected, "{probe}");
    }
}

#[test]
fn probes_and_hooks_of_every_kind_and_container_are_redirected_and_nothing_else() {
    let get = json!({ "httpGet": { "path": "/x", "port": 8080 } });
    let containers = json!([
        {
            "name": "app",
            "livenessProbe": { "httpGet": { "path": "/x", "port": 8080 }, "periodSeconds": 3, "futureField": 1 },
            "readinessProbe": { "tcpSocket": { "port": 8080 } },
            "startupProbe": { "grpc": { "port": 8080 } },
            "lifecycle": { "postStart": get, "preStop": { "tcpSocket": { "port": 8080 } }, "stopSignal": "SIGINT" },
        },
        { "name": "other", "livenessProbe": { "exec": { "command": ["true"] } }, "lifecycle": { "preStop": { "sleep": { "seconds": 5 } } } },
        { "name": "elsewhere", "livenessProbe": { "httpGet": { "host": "10.0.0.1", "port": 80 } } },
    ]);
    let init = json!([{ "name": "native", "restartPolicy": "Always", "startupProbe": { "tcpSocket": { "port": 6379 } } }]);
    let before = with(
        pod(),
        &[
            ("/spec/containers", containers),
            ("/spec/initContainers", init),
        ],
    );
    let after = injected(&before);
    let config = config(&after);
    let entries: Vec<_> = config["probes"]["entries"]
        .as_object()
        .unwrap()
        .keys()
        .cloned()
        .collect();
    assert_eq!(
        entries,
        [
            "app/liveness",
            "app/post-start",
            "app/pre-stop",
            "app/readiness",
            "app/startup",
            "native/startup"
        ]
    );
    assert_eq!(config["probes"]["secret"], "ab".repeat(32));
    let hook = &config["probes"]["entries"]["app/post-start"];
    assert!(
        hook.get("timeout").is_none(),
        "a hook has no timeout of its own: {hook}"
    );
    let app = &after["spec"]["containers"][0];
    assert_eq!(
        (
            &app["livenessProbe"]["periodSeconds"],
            &app["livenessProbe"]["futureField"]
        ),
        (&json!(3), &json!(1))
    );
    assert_eq!(app["lifecycle"]["stopSignal"], "SIGINT");
    assert_eq!(
        after["spec"]["initContainers"][2]["startupProbe"]["httpGet"]["path"],
        "/probe/native/startup"
    );
    for untouched in [1, 2] {
        assert_eq!(
            after["spec"]["containers"][untouched],
            before["spec"]["containers"][untouched]
        );
    }
}

#[test]
fn a_probe_that_cannot_be_carried_out_is_refused_by_name() {
    let cases = [
        (
            json!({ "httpGet": { "port": "nope" } }),
            "livenessProbe of container app: its port is none",
        ),
        (json!({ "httpGet": { "port": 0 } }), "its port is none"),
        (json!({ "httpGet": { "port": 70_000 } }), "its port is none"),
        (json!({ "grpc": { "port": "http" } }), "its port is none"),
        (
            json!({ "tcpSocket": { "port": 19_021 } }),
            "port 19021 is the sidecar's own",
        ),
        (
            json!({ "httpGet": { "port": 80, "scheme": "FTP" } }),
            "its scheme is unknown",
        ),
        (
            json!({ "httpGet": { "port": 80, "httpHeaders": [{ "name": "a", "value": "b\r\nc: d" }] } }),
            "`a` cannot be sent as a header",
        ),
        (
            json!({ "httpGet": { "port": 80, "httpHeaders": [{ "name": "a b", "value": "" }] } }),
            "`a b` cannot be sent",
        ),
        (
            json!({ "httpGet": { "port": 80 }, "tcpSocket": { "port": 80 } }),
            "more than one way",
        ),
        (
            json!({ "httpGet": { "port": 80 }, "exec": {} }),
            "more than one way",
        ),
        (
            json!({ "httpGet": { "port": 80 }, "timeoutSeconds": "soon" }),
            "timeoutSeconds is no time",
        ),
        (json!({ "httpGet": 80 }), "it is not an object"),
        (
            json!([]),
            "spec.containers[0].livenessProbe: it is not an object",
        ),
    ];
    for (probe, expected) in cases {
        check_refused(
            &with(pod(), &[("/spec/containers/0/livenessProbe", probe)]),
            expected,
        );
    }
    let nameless = with(
        pod(),
        &[
            ("/spec/containers/0/name", json!("A/b")),
            (
                "/spec/containers/0/livenessProbe",
                json!({ "tcpSocket": { "port": 1 } }),
            ),
        ],
    );
    check_refused(&nameless, "no name that a path could hold");
}

#[test]
fn nothing_that_a_user_wrote_can_be_expanded() {
    let probe = json!({ "httpGet": { "path": "/$(POD_NAME)$$", "port": 8080, "httpHeaders": [{ "name": "x", "value": "$(SECRET)" }] } });
    let after = injected(&with(pod(), &[("/spec/containers/0/livenessProbe", probe)]));
    for name in ["sidegate-init", "sidegate-proxy"] {
        assert!(!init_container(&after, name).to_string().contains('$'));
    }
    assert_eq!(
        config(&after)["probes"]["entries"]["app/liveness"]["http"]["path"],
        "/$(POD_NAME)$$"
    );
}

// ---- again ----

/// What the API server does between two webhooks: it writes amounts its own way, and fills in.
fn through_the_api_server(mut pod: Value) -> Value {
    for container in pod["spec"]["initContainers"].as_array_mut().unwrap() {
        let limits = &mut container["resources"]["limits"];
        if limits["cpu"] == "1" {
            limits["cpu"] = json!("1000m");
        }
    }
    with(
        pod,
        &[
            ("/spec/volumes/-", json!({ "name": "kube-api-access-x" })),
            ("/spec/schedulerName", json!("default-scheduler")),
        ],
    )
}

fn probed() -> Value {
    let lifecycle = json!({ "preStop": { "httpGet": { "path": "bye", "port": "http" } } });
    with(
        pod(),
        &[
            (
                "/spec/containers/0/livenessProbe",
                json!({ "httpGet": { "path": "/a?b", "port": "http" }, "periodSeconds": 3 }),
            ),
            (
                "/spec/containers/0/readinessProbe",
                json!({ "tcpSocket": { "port": 8080 } }),
            ),
            (
                "/spec/containers/0/startupProbe",
                json!({ "grpc": { "port": 8080, "service": null } }),
            ),
            ("/spec/containers/0/lifecycle", lifecycle),
        ],
    )
}

#[test]
fn injecting_what_was_injected_changes_nothing() {
    for pod in [pod(), probed()] {
        let once = injected(&pod);
        assert_eq!(attempt(&once, &namespace()).unwrap(), Outcome::Unchanged);
        let back = through_the_api_server(once);
        assert_eq!(attempt(&back, &namespace()).unwrap(), Outcome::Unchanged);
    }
}

#[test]
fn a_container_that_came_later_is_treated_and_the_secret_stays() {
    let once = injected(&probed());
    let late = json!({ "name": "late", "ports": [{ "name": "late", "containerPort": 7000 }], "livenessProbe": { "tcpSocket": { "port": "late" } } });
    let twice = inject_with(
        &with(once, &[("/spec/containers/-", late)]),
        &namespace(),
        &settings(),
        &|| panic!("the secret is there already"),
    );
    let Ok(Outcome::Patched(patch)) = twice else {
        panic!("{twice:?}")
    };
    let late = with(
        injected(&probed()),
        &[(
            "/spec/containers/-",
            json!({ "name": "late", "ports": [{ "name": "late", "containerPort": 7000 }], "livenessProbe": { "tcpSocket": { "port": "late" } } }),
        )],
    );
    let twice = apply(&late, &patch);
    let config = config(&twice);
    assert_eq!(config["probes"]["secret"], "ab".repeat(32));
    assert_eq!(
        config["probes"]["entries"]["late/liveness"],
        json!({ "tcp": { "port": 7000 }, "timeout": "1s" })
    );
    assert_eq!(config["ports"][1]["port"], 7000);
    assert_eq!(attempt(&twice, &namespace()).unwrap(), Outcome::Unchanged);
    assert_eq!(twice["spec"]["initContainers"].as_array().unwrap().len(), 2);
}

#[test]
fn an_init_container_that_came_before_or_between_goes_behind() {
    for place in [0, 1] {
        let mut once = injected(&probed());
        let list = once["spec"]["initContainers"].as_array_mut().unwrap();
        list.insert(place, json!({ "name": "vault" }));
        let twice = injected(&once);
        let names: Vec<_> = twice["spec"]["initContainers"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| c["name"].clone())
            .collect();
        assert_eq!(
            names,
            ["sidegate-init", "sidegate-proxy", "vault"],
            "at {place}"
        );
        assert_eq!(attempt(&twice, &namespace()).unwrap(), Outcome::Unchanged);
    }
}

#[test]
fn a_forgery_of_any_field_is_refused() {
    /// Every way to change one leaf, with the pointer to it.
    fn forgeries(value: &Value, pointer: &str, found: &mut Vec<(String, Value)>) {
        match value {
            Value::Object(map) => map.iter().for_each(|(key, value)| {
                forgeries(
                    value,
                    &format!("{pointer}/{}", key.replace('/', "~1")),
                    found,
                );
            }),
            Value::Array(list) => list
                .iter()
                .enumerate()
                .for_each(|(index, value)| forgeries(value, &format!("{pointer}/{index}"), found)),
            Value::Bool(value) => found.push((pointer.to_owned(), json!(!value))),
            Value::Number(_) => found.push((pointer.to_owned(), json!(1))),
            Value::String(_) => found.push((pointer.to_owned(), json!("forged"))),
            Value::Null => {}
        }
    }
    let once = injected(&pod());
    let mut found = Vec::new();
    forgeries(
        &once["spec"]["initContainers"],
        "/spec/initContainers",
        &mut found,
    );
    forgeries(&once["spec"]["volumes"], "/spec/volumes", &mut found);
    assert!(found.len() > 80, "{}", found.len());
    for (pointer, forged) in found {
        let mut pod = once.clone();
        *pod.pointer_mut(&pointer).unwrap() = forged;
        let name = [
            "/spec/initContainers/0/name",
            "/spec/initContainers/1/name",
            "/spec/volumes/0/name",
            "/spec/volumes/1/name",
        ];
        if name.contains(&pointer.as_str()) || pointer.ends_with("imagePullPolicy") || pod == once {
            continue;
        }
        check_refused(&pod, "is not what is injected here");
    }
}

#[test]
fn a_forged_addition_or_omission_is_refused() {
    let once = injected(&pod());
    let cases = [
        (
            "/spec/initContainers/1/command",
            json!(["/bin/sh"]),
            "command is added",
        ),
        (
            "/spec/initContainers/1/securityContext/privileged",
            json!(true),
            "securityContext.privileged is added",
        ),
        (
            "/spec/initContainers/0/envFrom",
            json!([]),
            "envFrom is added",
        ),
        (
            "/spec/initContainers/1/env/-",
            json!({ "name": "LD_PRELOAD", "value": "/x" }),
            "env differs",
        ),
        (
            "/spec/initContainers/1/livenessProbe",
            Value::Null,
            "livenessProbe differs",
        ),
    ];
    for (pointer, value, expected) in cases {
        check_refused(&with(once.clone(), &[(pointer, value)]), expected);
    }
    let mut without = once.clone();
    without["spec"]["initContainers"][1]
        .as_object_mut()
        .unwrap()
        .remove("resources");
    check_refused(&without, "resources is missing");
    let mut twice = once.clone();
    let proxy = twice["spec"]["initContainers"][1].clone();
    twice["spec"]["initContainers"]
        .as_array_mut()
        .unwrap()
        .push(proxy);
    check_refused(&twice, "it is there twice");
    let other_account = with(once, &[("/spec/serviceAccountName", json!("admin"))]);
    check_refused(&other_account, "env differs");
}

#[test]
fn a_forged_configuration_is_refused_wherever_it_differs() {
    let once = injected(&probed());
    for (key, forged) in [
        (
            "workload",
            json!({ "namespace": "shop", "serviceAccount": "admin" }),
        ),
        (
            "ca",
            json!({ "address": "evil.example:1", "root": "/tmp/root.pem" }),
        ),
        ("controller", json!({ "address": "evil.example:1" })),
        ("plaintextPorts", json!([8080])),
        ("admin", json!({ "address": "0.0.0.0:19000" })),
        ("log", json!({ "path": "/dev/null" })),
    ] {
        let mut config = config(&once);
        config[key] = forged;
        let mut pod = once.clone();
        pod["spec"]["initContainers"][1]["env"][0]["value"] = config.to_string().into();
        check_refused(&pod, "env differs");
    }
}

#[test]
fn entries_are_never_taken_over_from_a_pod() {
    let mut forged = injected(&probed());
    let value = &mut forged["spec"]["initContainers"][1]["env"][0]["value"];
    *value = value
        .as_str()
        .unwrap()
        .replace("\"port\":8080", "\"port\":22")
        .into();
    let again = injected(&forged);
    assert_eq!(config(&again), config(&injected(&probed())));
}

#[test]
fn a_probe_that_asks_the_sidecar_without_an_origin_is_refused() {
    let mut pod = injected(&probed());
    pod["metadata"]["annotations"]
        .as_object_mut()
        .unwrap()
        .remove("sidegate.dev/probes");
    check_refused(&pod, "does not say what it was");
    pod["metadata"]["annotations"]["sidegate.dev/probes"] =
        json!("{\"app/liveness\":{\"httpGet\":[]}}");
    check_refused(&pod, "does not say what it was");
}

// ---- what is refused, what is left alone ----

#[test]
fn two_containers_of_one_name_are_refused() {
    let pod = json!({ "spec": { "containers": [{ "name": "web" }, { "name": "web" }] } });
    check_refused(&pod, "container web: its name is another container's too");
}

#[test]
fn what_is_the_sidecars_is_refused() {
    let cases = [
        (
            "/spec/shareProcessNamespace",
            json!(true),
            "shareProcessNamespace",
        ),
        ("/spec/hostPID", json!(true), "hostPID"),
        (
            "/spec/securityContext",
            json!({ "runAsUser": 1519 }),
            "runAsUser of the pod",
        ),
        (
            "/spec/securityContext",
            json!({ "runAsGroup": 1519 }),
            "runAsGroup of the pod",
        ),
        (
            "/spec/securityContext",
            json!({ "fsGroup": 1519 }),
            "fsGroup of the pod",
        ),
        (
            "/spec/securityContext",
            json!({ "supplementalGroups": [1, 1519] }),
            "supplementalGroups of the pod",
        ),
        (
            "/spec/containers/0/securityContext",
            json!({ "runAsUser": 1519 }),
            "runAsUser of container app",
        ),
        (
            "/spec/initContainers",
            json!([{ "name": "i", "securityContext": { "runAsGroup": 1519 } }]),
            "runAsGroup of container i",
        ),
        (
            "/spec/ephemeralContainers",
            json!([{ "name": "e", "securityContext": { "runAsUser": 1519 } }]),
            "runAsUser of container e",
        ),
        (
            "/spec/containers/0/ports",
            json!([{ "containerPort": 19_006 }]),
            "port 19006 (of container app)",
        ),
        (
            "/spec/containers/0/ports",
            json!([{ "containerPort": 19_000, "protocol": "TCP" }]),
            "port 19000",
        ),
        (
            "/spec/containers/0/volumeMounts",
            json!([{ "name": "sidegate-token", "mountPath": "/t" }]),
            "volume sidegate-token (mounted in container app)",
        ),
        (
            "/spec/containers/-",
            json!({ "name": "sidegate-proxy" }),
            "the name of container sidegate-proxy",
        ),
        (
            "/spec/containers/-",
            json!({ "name": "sidegate-init" }),
            "the name of container sidegate-init",
        ),
        (
            "/spec/initContainers",
            json!([{ "name": "sidegate-proxy", "image": "evil" }]),
            "init container sidegate-proxy is not what is injected here",
        ),
        (
            "/spec/volumes",
            json!([{ "name": "sidegate-token", "emptyDir": {} }]),
            "volume sidegate-token is not what is injected here",
        ),
        (
            "/spec/volumes",
            json!([{ "name": "sidegate-bundle", "configMap": { "name": "mine" } }]),
            "volume sidegate-bundle is not what is injected here",
        ),
    ];
    for (pointer, value, expected) in cases {
        check_refused(&with(pod(), &[(pointer, value)]), expected);
    }
    let fine = [
        (
            "/spec/securityContext",
            json!({ "runAsUser": 1000, "runAsNonRoot": true, "fsGroup": 2000 }),
        ),
        (
            "/spec/containers/0/ports",
            json!([{ "containerPort": 19_021, "protocol": "UDP" }]),
        ),
        ("/spec/shareProcessNamespace", json!(false)),
    ];
    for (pointer, value) in fine {
        injected(&with(pod(), &[(pointer, value)]));
    }
}

#[test]
fn a_pod_that_cannot_be_meshed_is_skipped_with_the_reason() {
    let cases = [
        (
            "/spec/hostNetwork",
            json!(true),
            "hostNetwork: the pod uses the node's network",
        ),
        (
            "/spec/os",
            json!({ "name": "windows" }),
            "the pod runs on Windows",
        ),
    ];
    for (pointer, value, expected) in cases {
        let pod = with(pod(), &[(pointer, value)]);
        let Ok(Outcome::Skipped { reason, patch }) = attempt(&pod, &namespace()) else {
            panic!("{pointer}")
        };
        assert_eq!(reason, expected);
        let after = apply(&pod, &patch);
        assert_eq!(
            after["metadata"]["annotations"],
            json!({ "sidegate.dev/skipped": expected })
        );
        assert_eq!(after["spec"], pod["spec"]);
        let again = attempt(&after, &namespace());
        assert_eq!(
            again,
            Ok(Outcome::Skipped {
                reason,
                patch: Patch::default()
            })
        );
        // A mark of injection on a pod without a sidecar would be believed.
        let forged = with(
            after,
            &[("/metadata/annotations/sidegate.dev~1injected", json!("9"))],
        );
        let Ok(Outcome::Skipped { patch, .. }) = attempt(&forged, &namespace()) else {
            panic!("{pointer}")
        };
        assert!(
            apply(&forged, &patch)["metadata"]["annotations"]
                .get("sidegate.dev/injected")
                .is_none()
        );
        let forged = with(
            pod,
            &[(
                "/spec/initContainers",
                json!([{ "name": "sidegate-proxy" }]),
            )],
        );
        check_refused(&forged, "must not look like one");
    }
    let mirror = with(
        pod(),
        &[(
            "/metadata/annotations",
            json!({ "kubernetes.io/config.mirror": "x" }),
        )],
    );
    let Ok(Outcome::Skipped { patch, .. }) = attempt(&mirror, &namespace()) else {
        panic!()
    };
    assert_eq!(patch, Patch::default());
}

#[test]
fn who_did_not_ask_is_left_alone() {
    let out = with(
        pod(),
        &[("/metadata/labels/sidegate.dev~1inject", json!("disabled"))],
    );
    assert_eq!(attempt(&out, &namespace()), Ok(Outcome::Unchanged));
    for (name, label) in [
        ("kube-system", "enabled"),
        ("sidegate-system", "enabled"),
        ("shop", "disabled"),
    ] {
        let mut namespace = namespace();
        name.clone_into(&mut namespace.name);
        namespace
            .labels
            .insert(annotations::INJECT.to_owned(), label.to_owned());
        assert_eq!(
            attempt(&pod(), &namespace),
            Ok(Outcome::Unchanged),
            "{name} {label}"
        );
    }
    let word = with(
        pod(),
        &[("/metadata/labels/sidegate.dev~1inject", json!("false"))],
    );
    check_refused(
        &word,
        "label sidegate.dev/inject of the pod: \"false\" is not possible; write `disabled`",
    );
}

#[test]
fn pod_security_that_refuses_net_admin_is_said_first() {
    for (level, refused) in [
        ("baseline", true),
        ("restricted", true),
        ("privileged", false),
    ] {
        let mut namespace = namespace();
        namespace.labels.insert(
            "pod-security.kubernetes.io/enforce".to_owned(),
            level.to_owned(),
        );
        if refused {
            check_refused_in(
                &pod(),
                &namespace,
                &format!("namespace shop enforces pod security `{level}`"),
            );
        } else {
            injected_in(&pod(), &namespace);
        }
    }
}

#[test]
fn what_is_no_pod_is_refused() {
    for (value, expected) in [
        (json!(null), "the pod: it is not an object"),
        (json!({}), "spec: it is missing"),
        (json!({ "spec": [] }), "spec: it is not an object"),
        (
            json!({ "metadata": 1, "spec": {} }),
            "metadata: it is not an object",
        ),
        (
            json!({ "metadata": { "annotations": [] }, "spec": {} }),
            "metadata.annotations: it is not an object",
        ),
        (
            json!({ "spec": { "containers": {} } }),
            "spec.containers: it is not a list",
        ),
        (
            json!({ "spec": { "initContainers": [1] } }),
            "spec.initContainers[0]: it is not an object",
        ),
        (
            json!({ "spec": { "containers": [{ "name": 1 }] } }),
            "spec.containers[0].name: it is not a text",
        ),
        (
            json!({ "spec": { "volumes": 1 } }),
            "spec.volumes: it is not a list",
        ),
    ] {
        check_refused(&value, expected);
    }
}

#[test]
fn without_random_bytes_there_is_no_secret_and_no_pod() {
    let refused = inject_with(&probed(), &namespace(), &settings(), &|| None);
    assert_eq!(refused, Err(Refusal::NoRandom));
    assert_ne!(system_random().unwrap(), system_random().unwrap());
}

// ---- annotations ----

fn annotate(key: &str, value: &str) -> Value {
    with(
        pod(),
        &[(
            "/metadata/annotations",
            json!({ format!("sidegate.dev/{key}"): value }),
        )],
    )
}

#[test]
fn a_wrong_annotation_is_refused_by_its_name_and_with_the_allowed_form() {
    let allow = annotated(&[(
        "allow-pod-overrides",
        "enforcement, skip-inbound-ports,skip-outbound-ports,skip-outbound-cidrs,opaque-ports,plaintext-ports,udp-ports",
    )]);
    let cases = [
        (
            "proxy-cpu-request",
            "lots",
            "sidegate.dev/proxy-cpu-request of the pod: `lots` is not an amount; write",
        ),
        ("proxy-cpu-limit", "0", "`0` is not an amount"),
        ("proxy-memory-request", "64mb", "`64mb` is not an amount"),
        ("proxy-memory-limit", "-1", "`-1` is not an amount"),
        (
            "proxy-cpu-request",
            "3",
            "proxy-cpu-request of the pod: the request 3 is above the limit 1; set",
        ),
        (
            "proxy-memory-limit",
            "1Mi",
            "proxy-memory-limit of the pod: the request 48Mi is above the limit 1Mi",
        ),
        (
            "log-level",
            "loud",
            "`loud` is not a level; write `error`, `warn`, `info`, `debug` or `trace`",
        ),
        (
            "drain-timeout",
            "25",
            "`25` is not a time between 1s and 1h; write for example `25s`",
        ),
        ("drain-timeout", "2h", "`2h` is not a time"),
        (
            "enforcement",
            "Audit",
            "`Audit` is not possible; write `enforce` or `audit`",
        ),
        (
            "skip-inbound-ports",
            "80,",
            "`` is not a port; write ports from 1 to 65535",
        ),
        ("skip-inbound-ports", "80;81", "`80;81` is not a port"),
        ("skip-inbound-ports", "+80", "`+80` is not a port"),
        ("skip-outbound-ports", "65536", "`65536` is not a port"),
        ("skip-outbound-ports", "0", "`0` is not a port"),
        (
            "opaque-ports",
            "80,80",
            "`80` is not in the list once; name each entry once",
        ),
        (
            "plaintext-ports",
            "19021",
            "`19021` is not a port of the application: it is the sidecar's; remove it",
        ),
        ("udp-ports", "dns", "`dns` is not a port"),
        (
            "skip-outbound-cidrs",
            "10.0.0.0",
            "`10.0.0.0` is not a network",
        ),
        (
            "skip-outbound-cidrs",
            "10.0.0.1/8",
            "`10.0.0.1/8` is not the start of its network; write `10.0.0.0/8`",
        ),
        (
            "skip-inbound-port",
            "80",
            "sidegate.dev/skip-inbound-port of the pod: there is no such annotation; did you mean `sidegate.dev/skip-inbound-ports`?",
        ),
        (
            "xyz",
            "",
            "there is no such annotation; possible after `sidegate.dev/`: `proxy-cpu-request`",
        ),
        (
            "egress",
            "deny",
            "there is no such annotation; it belongs on the namespace",
        ),
    ];
    for (key, value, expected) in cases {
        check_refused_in(&annotate(key, value), &allow, expected);
        let of_namespace = expected.replace("of the pod", "of namespace shop");
        if key != "egress" {
            let said = of_namespace.split(" possible after").next().unwrap();
            check_refused_in(&pod(), &annotated(&[(key, value)]), said);
        }
    }
    let number = with(
        pod(),
        &[(
            "/metadata/annotations",
            json!({ "sidegate.dev/drain-timeout": 25 }),
        )],
    );
    check_refused(&number, "`25` is not a text; put it between quotes");
    let many = (1..200)
        .map(|port| port.to_string())
        .collect::<Vec<_>>()
        .join(",");
    check_refused_in(
        &annotate("udp-ports", &many),
        &allow,
        "more than 128 entries",
    );
    check_refused_in(
        &pod(),
        &annotated(&[("egress", "no")]),
        "egress of namespace shop: `no` is not possible; write `allow` or `deny`",
    );
    check_refused_in(
        &pod(),
        &annotated(&[("allow-pod-overrides", "skip-inbound-port")]),
        "did you mean `skip-inbound-ports`?",
    );
    check_refused_in(
        &pod(),
        &annotated(&[("allow-pod-overrides", "*")]),
        "possible, with commas between them: `enforcement`",
    );
}

#[test]
fn a_pod_chooses_its_traffic_only_where_its_namespace_lists_it() {
    for key in annotations::OVERRIDES {
        let value = match key {
            "enforcement" => "audit",
            "skip-outbound-cidrs" => "10.0.0.0/8",
            _ => "9090",
        };
        let pod = annotate(key, value);
        check_refused(
            &pod,
            &format!(
                "sidegate.dev/{key} of the pod: namespace shop does not let its pods choose this"
            ),
        );
        let other = annotations::OVERRIDES
            .into_iter()
            .find(|other| *other != key)
            .unwrap();
        check_refused_in(
            &pod,
            &annotated(&[("allow-pod-overrides", other)]),
            "does not let its pods",
        );
        injected_in(&pod, &annotated(&[("allow-pod-overrides", key)]));
        injected_in(
            &pod,
            &annotated(&[("allow-pod-overrides", &format!("sidegate.dev/{key}"))]),
        );
    }
}

#[test]
fn what_was_chosen_reaches_redirection_and_sidecar() {
    let namespace = annotated(&[
        ("allow-pod-overrides", "plaintext-ports,enforcement"),
        ("skip-inbound-ports", "9100"),
        ("skip-outbound-ports", "443,25"),
        ("skip-outbound-cidrs", "fd00::/8, 10.0.0.0/8"),
        ("udp-ports", "53"),
        ("opaque-ports", "3306"),
        ("plaintext-ports", "1"),
        ("enforcement", "enforce"),
        ("proxy-memory-limit", "1Gi"),
    ]);
    let pod = with(
        pod(),
        &[(
            "/metadata/annotations",
            json!({
                "sidegate.dev/plaintext-ports": "9090, 8080",
                "sidegate.dev/enforcement": "audit",
                "sidegate.dev/log-level": "debug",
                "sidegate.dev/drain-timeout": "1m 30s",
                "sidegate.dev/proxy-cpu-limit": "2",
                "other.example/x": "y",
            }),
        )],
    );
    let after = injected_in(&pod, &namespace);
    let arguments: Vec<_> = init_container(&after, "sidegate-init")["args"]
        .as_array()
        .unwrap()
        .iter()
        .map(|a| a.as_str().unwrap())
        .collect();
    assert_eq!(
        arguments,
        [
            "--inbound-port=19006",
            "--outbound-port=19001",
            "--proxy-uid=1519",
            "--inbound-exempt-port=19021",
            "--skip-inbound-port=9100",
            "--skip-outbound-port=25",
            "--skip-outbound-port=443",
            "--udp-port=53",
            "--skip-outbound-cidr=10.0.0.0/8",
            "--skip-outbound-cidr=fd00::/8",
        ]
    );
    let config = config(&after);
    assert_eq!(config["plaintextPorts"], json!([8080, 9090]));
    assert_eq!(config["opaquePorts"], json!([3306]));
    assert_eq!(config["workload"]["enforcement"], "audit");
    assert_eq!(config["diagnostics"]["level"], "debug");
    assert_eq!(config["drainTimeout"], "1m 30s");
    let resources = &init_container(&after, "sidegate-proxy")["resources"];
    assert_eq!(
        resources,
        &json!({ "limits": { "cpu": "2", "memory": "1Gi" }, "requests": { "cpu": "50m", "memory": "48Mi" } })
    );
}

#[test]
fn a_drain_fits_into_the_pods_grace_period_unless_somebody_asks_for_more() {
    let ending_in = |seconds: u64| {
        let grace = json!(seconds);
        with(pod(), &[("/spec/terminationGracePeriodSeconds", grace)])
    };
    for (seconds, drain) in [(60, "25s"), (5, "5s"), (0, "1s")] {
        let pod = ending_in(seconds);
        assert_eq!(config(&injected(&pod))["drainTimeout"], drain, "{seconds}");
        assert_eq!(drain_warning(&pod, &namespace()), None, "nobody asked");
    }
    // Asked for by the pod, or for all pods of a namespace: it is so, and it is said.
    let asked = json!({ "sidegate.dev/drain-timeout": "45s" });
    let asking = with(ending_in(5), &[("/metadata/annotations", asked)]);
    assert_eq!(config(&injected(&asking))["drainTimeout"], "45s");
    let all_ask = annotated(&[("drain-timeout", "45s")]);
    for (pod, namespace) in [(&asking, &namespace()), (&ending_in(5), &all_ask)] {
        let warning = drain_warning(pod, namespace).unwrap();
        assert!(
            warning.contains("waits 45s for open calls, but the pod has only 5s"),
            "{warning}"
        );
    }
    assert_eq!(drain_warning(&ending_in(45), &all_ask), None, "long enough");
    // Another webhook may change the grace period after our first pass.
    let mut later = injected(&pod());
    later["spec"]["terminationGracePeriodSeconds"] = json!(7);
    assert_eq!(config(&injected(&later))["drainTimeout"], "7s");
}

#[test]
fn the_namespaces_enforcement_is_followed_live_and_not_fixed() {
    let after = injected_in(&pod(), &annotated(&[("enforcement", "audit")]));
    assert!(config(&after)["workload"].get("enforcement").is_none());
}

#[test]
fn a_pod_can_take_back_what_its_namespace_opens() {
    let namespace = annotated(&[
        ("allow-pod-overrides", "plaintext-ports"),
        ("plaintext-ports", "9090"),
    ]);
    let after = injected_in(&annotate("plaintext-ports", ""), &namespace);
    assert!(config(&after).get("plaintextPorts").is_none());
}

// ---- the way back, and everything at once ----

/// Without what is the same to Kubernetes: empty lists and objects in four places.
fn tidy(mut pod: Value) -> Value {
    let empty = |value: &Value| match value {
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        other => other.is_null(),
    };
    for (parent, key) in [
        ("/metadata", "annotations"),
        ("/spec", "initContainers"),
        ("/spec", "volumes"),
        ("", "metadata"),
    ] {
        if let Some(Value::Object(parent)) = pod.pointer_mut(parent)
            && parent.get(key).is_some_and(empty)
        {
            parent.remove(key);
        }
    }
    pod
}

#[track_caller]
fn check_way_back(before: &Value, after: &Value) {
    match uninject(after).unwrap() {
        Outcome::Patched(patch) => assert_eq!(tidy(apply(after, &patch)), tidy(before.clone())),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_way_back_ends_where_it_began() {
    let rich = with(
        probed(),
        &[
            ("/spec/initContainers", json!([{ "name": "migrate" }])),
            ("/spec/volumes", json!([{ "name": "data", "emptyDir": {} }])),
            ("/metadata/annotations", json!({ "a": "b" })),
        ],
    );
    for pod in [pod(), probed(), rich] {
        check_way_back(&pod, &injected(&pod));
        assert_eq!(uninject(&pod).unwrap(), Outcome::Unchanged);
    }
    let mut lost = injected(&probed());
    lost["metadata"]["annotations"]
        .as_object_mut()
        .unwrap()
        .remove("sidegate.dev/probes");
    assert!(
        uninject(&lost)
            .unwrap_err()
            .to_string()
            .contains("does not say what it was")
    );
}

/// Any JSON, small.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        "[a-z$()/ ]{0,6}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z/~]{0,6}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// Mostly `usual`, now and then anything.
fn mostly(usual: impl Strategy<Value = Value> + 'static) -> impl Strategy<Value = Value> {
    prop_oneof![12 => usual, 1 => any_json()]
}

fn member(
    key: &'static str,
    value: impl Strategy<Value = Value> + 'static,
) -> impl Strategy<Value = Vec<(String, Value)>> {
    prop::option::of(mostly(value)).prop_map(move |value| {
        value
            .map(|value| (key.to_owned(), value))
            .into_iter()
            .collect()
    })
}

fn object_of(members: Vec<BoxedStrategy<Vec<(String, Value)>>>) -> impl Strategy<Value = Value> {
    let unknown = prop::option::of(any_json()).prop_map(|value| {
        value
            .map(|value| ("unknown~/field".to_owned(), value))
            .into_iter()
            .collect::<Vec<_>>()
    });
    (members, unknown).prop_map(|(members, unknown)| {
        Value::Object(members.into_iter().flatten().chain(unknown).collect())
    })
}

fn some_port() -> impl Strategy<Value = Value> {
    prop_oneof![4 => (1..400_u32).prop_map(Value::from), 2 => Just(json!("http")), 1 => Just(json!(19_021))]
}

fn some_probe() -> impl Strategy<Value = Value> {
    let get = object_of(vec![
        Just(vec![("port".to_owned(), json!(8080))]).boxed(),
        member("path", "[a-z/?$()]{0,8}".prop_map(Value::from)).boxed(),
        member("host", Just(json!(""))).boxed(),
        member(
            "scheme",
            prop_oneof![Just(json!("HTTP")), Just(json!("HTTPS"))],
        )
        .boxed(),
    ]);
    let handler = prop_oneof![
        get.prop_map(|get| ("httpGet".to_owned(), get)),
        some_port().prop_map(|port| ("tcpSocket".to_owned(), json!({ "port": port }))),
        some_port().prop_map(|port| ("grpc".to_owned(), json!({ "port": port }))),
        Just(("exec".to_owned(), json!({ "command": ["true"] }))),
    ];
    (
        handler,
        member("timeoutSeconds", (0..9).prop_map(Value::from)),
    )
        .prop_map(|(handler, more)| Value::Object(std::iter::once(handler).chain(more).collect()))
}

fn some_container() -> impl Strategy<Value = Value> {
    let port = (1..9000_u32, prop::option::of(Just("http")))
        .prop_map(|(port, name)| json!({ "containerPort": port, "name": name }));
    object_of(vec![
        "[a-z]{1,4}"
            .prop_map(|name| vec![("name".to_owned(), name.into())])
            .boxed(),
        member("restartPolicy", Just(json!("Always"))).boxed(),
        member("livenessProbe", some_probe()).boxed(),
        member("startupProbe", some_probe()).boxed(),
        member(
            "lifecycle",
            some_probe().prop_map(|probe| json!({ "preStop": probe })),
        )
        .boxed(),
        member(
            "ports",
            prop::collection::vec(port, 0..3).prop_map(Value::from),
        )
        .boxed(),
        member("securityContext", Just(json!({ "runAsUser": 1000 }))).boxed(),
    ])
}

fn some_pod() -> impl Strategy<Value = Value> {
    let annotations =
        prop::collection::btree_map("[a-z]{1,3}", "[a-z]{0,3}", 0..3).prop_map(|map| json!(map));
    let metadata = object_of(vec![
        member("annotations", annotations).boxed(),
        member("labels", Just(json!({ "app": "x" }))).boxed(),
    ]);
    let spec = object_of(vec![
        member(
            "containers",
            prop::collection::vec(some_container(), 0..3).prop_map(Value::from),
        )
        .boxed(),
        member(
            "initContainers",
            prop::collection::vec(some_container(), 0..3).prop_map(Value::from),
        )
        .boxed(),
        member(
            "volumes",
            prop::collection::vec("[a-z]{1,3}".prop_map(|name| json!({ "name": name })), 0..3)
                .prop_map(Value::from),
        )
        .boxed(),
        member(
            "hostNetwork",
            prop::bool::weighted(0.1).prop_map(Value::from),
        )
        .boxed(),
    ]);
    object_of(vec![
        member("metadata", metadata).boxed(),
        mostly(spec)
            .prop_map(|spec| vec![("spec".to_owned(), spec)])
            .boxed(),
    ])
}

/// How many of the generated pods were injected.
fn check_pod(pod: &Value) -> bool {
    drop(uninject(pod));
    match attempt(pod, &namespace()) {
        Ok(Outcome::Patched(patch)) => {
            let after = apply(pod, &patch);
            assert_eq!(
                attempt(&after, &namespace()),
                Ok(Outcome::Unchanged),
                "{after}"
            );
            check_way_back(pod, &after);
            true
        }
        Ok(Outcome::Skipped { patch, .. }) => {
            apply(pod, &patch);
            false
        }
        Ok(Outcome::Unchanged) | Err(_) => false,
    }
}

#[test]
fn any_pod_is_injected_once_and_comes_back_or_is_refused() {
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 1_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let injected = std::cell::Cell::new(0);
    runner
        .run(&some_pod(), |pod| {
            injected.set(injected.get() + u32::from(check_pod(&pod)));
            Ok(())
        })
        .unwrap();
    assert!(
        injected.get() > 200,
        "too few of them were pods: {}",
        injected.get()
    );
}

#[test]
fn any_json_is_answered() {
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 500,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    runner
        .run(&any_json(), |value| {
            check_pod(&value);
            check_pod(&json!({ "spec": value.clone(), "metadata": value }));
            Ok(())
        })
        .unwrap();
}
