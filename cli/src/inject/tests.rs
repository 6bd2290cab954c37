//! Manifests as people write them, and what becomes of them.

use serde_json::json;
use sidegate_proxy::config::Config;

use super::*;

const MANIFESTS: [(&str, &str); 6] = [
    ("deployment", include_str!("manifests/deployment.yaml")),
    ("statefulset", include_str!("manifests/statefulset.yaml")),
    ("job", include_str!("manifests/job.yaml")),
    ("cronjob", include_str!("manifests/cronjob.yaml")),
    ("daemonset", include_str!("manifests/daemonset.yaml")),
    ("list", include_str!("manifests/list.yaml")),
];

fn change(uninject: bool) -> Change<'static> {
    let mut settings = Settings::default();
    "1.2.3".clone_into(&mut settings.images.tag);
    Change {
        uninject,
        namespace: "default",
        labels: &[],
        annotations: &[],
        settings,
        random: &|| Some([0x5a; 32]),
    }
}

#[track_caller]
fn apply(change: &Change<'_>, text: &str) -> (String, Vec<String>) {
    let mut notes = Notes::default();
    let changed = change.apply("x.yaml", text, &mut notes);
    assert_eq!(notes.faults, Vec::<String>::new());
    (changed, notes.said)
}

fn values(text: &str) -> Vec<Value> {
    documents(text)
        .map(|(line, part)| parse("x", line, part).unwrap())
        .collect()
}

#[test]
fn real_manifests_become_what_they_should() {
    for (name, manifest) in MANIFESTS {
        let (injected, _) = apply(&change(false), manifest);
        let mark = format!("sidegate.dev/injected: {:?}", env!("CARGO_PKG_VERSION"));
        assert!(injected.contains(&mark), "{name}: {injected}");
        // The mark names the version of the code.
        insta::assert_snapshot!(
            name,
            injected.replace(&mark, "sidegate.dev/injected: VERSION")
        );
    }
}

#[test]
fn injecting_twice_is_injecting_once() {
    for (name, manifest) in MANIFESTS {
        let (once, _) = apply(&change(false), manifest);
        let (twice, said) = apply(&change(false), &once);
        assert_eq!(once, twice, "{name}");
        assert!(
            said.iter()
                .all(|note| note.ends_with("unchanged") || note.contains("not injected")),
            "{said:?}"
        );
    }
}

#[test]
fn the_way_back_ends_at_the_same_objects() {
    for (name, manifest) in MANIFESTS {
        let (injected, _) = apply(&change(false), manifest);
        let (back, _) = apply(&change(true), &injected);
        let mut before = values(manifest);
        // A template without metadata gets an empty one back.
        for document in &mut before {
            if document["kind"] == "Job" {
                document["spec"]["template"]["metadata"] = json!({});
            }
        }
        assert_eq!(values(&back), before, "{name}");
    }
}

#[test]
fn the_sidecar_reads_every_configuration_that_is_injected() {
    let mut read = 0;
    for (name, manifest) in MANIFESTS {
        let (injected, _) = apply(&change(false), manifest);
        for mut document in values(&injected) {
            let mut visit = |workload: &Workload, template: &mut Value| {
                let containers = template
                    .pointer("/spec/initContainers")
                    .and_then(Value::as_array);
                let proxy = containers
                    .into_iter()
                    .flatten()
                    .find(|c| c["name"] == "sidegate-proxy");
                if let Some(proxy) = proxy {
                    let text = proxy["env"][0]["value"].as_str().unwrap();
                    let variable = |name: &str| {
                        Some(
                            match name {
                                "SIDEGATE_CONFIG" => text,
                                "POD_IPS" => "10.245.1.4,fd00::4",
                                _ => "x",
                            }
                            .to_owned(),
                        )
                    };
                    let config = Config::from_environment(variable);
                    let config = config.unwrap_or_else(|error| panic!("{name}: {error}"));
                    let namespace = workload.namespace.as_deref().unwrap();
                    assert_eq!(config.workload.namespace, namespace);
                    read += 1;
                }
                Ok::<_, std::convert::Infallible>(())
            };
            let Ok(()) = templates(&mut document, &mut visit);
        }
    }
    assert_eq!(read, 7);
}

#[test]
fn what_is_no_workload_stays_byte_for_byte() {
    let other = "# a comment\n%YAML 1.1\n---\napiVersion: v1 # kept\nkind: ConfigMap\nmetadata: {name: x}\ndata:\n  mode: 0644\n...\n--- # next\n\n---\nkind: Deployment\nspec: {template: {}}\n";
    assert_eq!(apply(&change(false), other).0, other);
    let deployment =
        "---\napiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {containers: []}\n";
    let last = "---\n# the last\nkind: ConfigMap\ndata: {mode: 0644}\n";
    let (mixed, said) = apply(&change(false), &format!("{other}{deployment}{last}"));
    assert!(mixed.starts_with(other) && mixed.ends_with(last), "{mixed}");
    assert_eq!(said, ["Pod default/p: injected"]);
}

#[test]
fn yaml_is_read_and_written_as_kubectl_reads_it() {
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, annotations: {a: 'yes', b: '0644', c: '1e3', d: '12:30', e: 'null', f: '2027-01-01'}}\nspec: {hostIPC: no, x: 0644, y: on, z: '~', containers: []}\n";
    let (injected, _) = apply(&change(false), pod);
    let after = &values(&injected)[0];
    assert_eq!(
        (
            &after["spec"]["hostIPC"],
            &after["spec"]["x"],
            &after["spec"]["y"]
        ),
        (&json!(false), &json!(420), &json!(true))
    );
    for quoted in [
        "'yes'",
        "'0644'",
        "'1e3'",
        "'12:30'",
        "'null'",
        "'2027-01-01'",
        "'~'",
    ] {
        let other = quoted.replace('\'', "\"");
        assert!(
            injected.contains(quoted) || injected.contains(&other),
            "{quoted} in {injected}"
        );
    }
}

#[test]
fn json_stays_json() {
    let pod = "{\"apiVersion\": \"v1\", \"kind\": \"Pod\", \"metadata\": {\"name\": \"p\"}, \"spec\": {\"containers\": []}}";
    let (injected, _) = apply(&change(false), pod);
    let parsed: Value = serde_json::from_str(&injected).unwrap();
    assert_eq!(
        parsed["spec"]["initContainers"][1]["name"],
        "sidegate-proxy"
    );
}

#[test]
fn a_refusal_names_file_line_and_workload() {
    let text = "kind: x\n---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d, namespace: shop}\nspec: {template: {spec: {hostPID: true}}}\n---\na: [\n";
    let mut notes = Notes::default();
    change(false).apply("x.yaml", text, &mut notes);
    let [parse, refusal] = &notes.faults[..] else {
        panic!("{notes:?}")
    };
    let (parse, refusal) = if parse.contains("hostPID") {
        (refusal, parse)
    } else {
        (parse, refusal)
    };
    assert!(
        refusal.starts_with("x.yaml:2: Deployment shop/d: with hostPID"),
        "{refusal}"
    );
    assert!(
        parse.starts_with("x.yaml:8:") || parse.starts_with("x.yaml:9:"),
        "{parse}"
    );
}

#[test]
fn namespaces_come_from_the_manifest_and_from_flags() {
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: shop, annotations: {sidegate.dev/udp-ports: '53'}}\nspec: {containers: []}\n";
    let namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, annotations: {sidegate.dev/allow-pod-overrides: udp-ports}}\n---\n";
    let mut notes = Notes::default();
    change(false).apply("x.yaml", pod, &mut notes);
    assert!(
        notes.faults[0].contains("does not let its pods choose this"),
        "{notes:?}"
    );
    assert!(
        apply(&change(false), &format!("{namespace}{pod}"))
            .0
            .contains("--udp-port=53")
    );
    let flag = [(
        "sidegate.dev/allow-pod-overrides".to_owned(),
        "udp-ports".to_owned(),
    )];
    let by_flag = Change {
        annotations: &flag,
        ..change(false)
    };
    assert!(apply(&by_flag, pod).0.contains("--udp-port=53"));
    let system = pod.replace("shop", "kube-system");
    assert_eq!(apply(&change(false), &system).0, system);
}

#[test]
fn files_flags_and_exit_codes_are_as_documented() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pod.yaml");
    std::fs::write(
        &path,
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {hostPID: true}\n",
    )
    .unwrap();
    let arguments = |path: &Path| InjectArgs {
        filename: vec![path.to_owned()],
        uninject: false,
        namespace: "shop".to_owned(),
        namespace_label: Vec::new(),
        namespace_annotation: Vec::new(),
        settings: None,
        trust_domain: Some("example.org".parse().unwrap()),
        image_registry: Some("r.example/x".to_owned()),
        image_tag: Some("v9".to_owned()),
    };
    assert_eq!(run(&arguments(&path)).unwrap(), FAILED);
    assert_eq!(run(&arguments(Path::new("/nowhere"))).unwrap(), WRONG_USAGE);
    let wrong = InjectArgs {
        settings: Some(path.clone()),
        ..arguments(&path)
    };
    assert_eq!(run(&wrong).unwrap(), WRONG_USAGE);
    let arguments = arguments(&path);
    let change = arguments.change().unwrap();
    assert_eq!(change.settings.images.proxy(), "r.example/x/proxy:v9");
    assert_eq!(change.settings.trust_domain.as_str(), "example.org");
    assert_eq!(pair("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
    assert!(pair("a").is_err() && pair("=a").is_err());
}
