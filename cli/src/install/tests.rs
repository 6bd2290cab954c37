//! What is printed, held against the API server's own types and the parts' own configurations.

use std::collections::BTreeSet;
use std::path::PathBuf;

use k8s_openapi::api::admissionregistration::v1 as admission;
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1 as rbac;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::*;

fn arguments(line: &str) -> InstallArgs {
    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        install: InstallArgs,
    }
    let words = std::iter::once("install").chain(line.split_whitespace());
    <Line as clap::Parser>::try_parse_from(words)
        .unwrap()
        .install
}

fn sections_of(line: &str) -> Vec<Section> {
    sections(&arguments(line).plan().unwrap()).unwrap()
}

fn objects(line: &str) -> Vec<Value> {
    let sections = sections_of(line).into_iter();
    sections.flat_map(|section| section.objects).collect()
}

fn kind(object: &Value) -> &str {
    object["kind"].as_str().unwrap()
}

fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap()
}

fn find<'a>(objects: &'a [Value], of: &str, called: &str) -> &'a Value {
    let wanted = |object: &&Value| kind(object) == of && name(object) == called;
    objects.iter().find(wanted).unwrap()
}

/// Everything that flags can turn on.
const EVERYTHING: &str = "--ha --trust-domain example.org --image-registry registry.example/sidegate/ \
    --image-tag 9.9.9 --image-pull-policy Always --ca-storage-class fast --set ca.storageSize=5Gi \
    --set ca.leafLifetime=12h --set clusterDomain=corp.example --set controller.podCidrs=10.0.0.0/8,fd00::/56 \
    --set controller.serviceCidrs=10.96.0.0/12 --set controller.externalCidrs=10.244.250.0/24 \
    --set imagePullSecrets=a,b --set priorityClassName=high --set injector.image=own/injector@sha256:00 \
    --set proxy.memoryLimit=1Gi --set proxy.logLevel=debug --set ca.checkSourceAddress=false";

/// A field that the API server does not know is dropped by its type, and the object differs.
#[track_caller]
fn check_type<T: Serialize + DeserializeOwned>(object: &Value) {
    let typed: T = serde_json::from_value(object.clone()).unwrap();
    let again = serde_json::to_value(typed).unwrap();
    assert_eq!(&again, object, "{} {}", kind(object), name(object));
}

#[test]
fn every_object_is_what_the_api_server_knows() {
    for line in ["", EVERYTHING] {
        for object in objects(line) {
            match kind(&object) {
                // The schemas' own tests hold these.
                "CustomResourceDefinition" => {}
                "Namespace" => check_type::<Namespace>(&object),
                "ServiceAccount" => check_type::<ServiceAccount>(&object),
                "ClusterRole" => check_type::<rbac::ClusterRole>(&object),
                "ClusterRoleBinding" => check_type::<rbac::ClusterRoleBinding>(&object),
                "Role" => check_type::<rbac::Role>(&object),
                "RoleBinding" => check_type::<rbac::RoleBinding>(&object),
                "ConfigMap" => check_type::<ConfigMap>(&object),
                "Service" => check_type::<Service>(&object),
                "StatefulSet" => check_type::<StatefulSet>(&object),
                "Deployment" => check_type::<Deployment>(&object),
                "PodDisruptionBudget" => check_type::<PodDisruptionBudget>(&object),
                "NetworkPolicy" => check_type::<NetworkPolicy>(&object),
                "MutatingWebhookConfiguration" => {
                    check_type::<admission::MutatingWebhookConfiguration>(&object);
                }
                "ValidatingWebhookConfiguration" => {
                    check_type::<admission::ValidatingWebhookConfiguration>(&object);
                }
                "ValidatingAdmissionPolicy" => {
                    check_type::<admission::ValidatingAdmissionPolicy>(&object);
                }
                "ValidatingAdmissionPolicyBinding" => {
                    check_type::<admission::ValidatingAdmissionPolicyBinding>(&object);
                }
                other => panic!("no type for {other}"),
            }
        }
    }
}

#[test]
fn an_object_is_there_once() {
    let objects = objects(EVERYTHING);
    let keys: BTreeSet<(&str, &str)> = objects.iter().map(|it| (kind(it), name(it))).collect();
    assert_eq!(keys.len(), objects.len());
}

#[test]
fn no_rule_has_a_wildcard_and_only_the_ca_reads_a_secret() {
    for object in objects("") {
        for rule in object["rules"].as_array().into_iter().flatten() {
            assert!(!rule.to_string().contains('*'), "{rule}");
            if rule["resources"].to_string().contains("secrets") {
                assert_eq!((kind(&object), name(&object)), ("Role", "sidegate-ca"));
                let reads = rule["verbs"].to_string().contains("get");
                assert_eq!(
                    reads,
                    rule["resourceNames"] == json!(["sidegate-ca"]),
                    "{rule}"
                );
                for verb in ["list", "watch", "delete"] {
                    assert!(!rule["verbs"].to_string().contains(verb), "{rule}");
                }
            }
        }
    }
}

#[test]
fn webhooks_fail_closed_and_never_touch_the_control_plane() {
    let objects = objects("");
    let mutating = find(
        &objects,
        "MutatingWebhookConfiguration",
        "sidegate-injector",
    );
    let webhook = &mutating["webhooks"][0];
    assert_eq!(webhook["failurePolicy"], "Fail");
    assert_eq!(webhook["sideEffects"], "None");
    assert_eq!(webhook["reinvocationPolicy"], "IfNeeded");
    assert!(webhook["timeoutSeconds"].as_i64().unwrap() <= 5);
    let namespaces = &webhook["namespaceSelector"];
    assert_eq!(namespaces["matchLabels"]["sidegate.dev/inject"], "enabled");
    assert_eq!(
        namespaces["matchExpressions"][0]["values"],
        json!(["kube-system", "sidegate-system"])
    );
    let pods = &webhook["objectSelector"]["matchExpressions"][0];
    assert_eq!(
        (&pods["operator"], &pods["values"]),
        (&json!("NotIn"), &json!(["disabled"]))
    );
    let text = serde_json::to_string(&objects).unwrap();
    assert!(!text.contains("caBundle"), "applying again would wipe it");
}

#[test]
fn the_configurations_are_read_by_the_parts_themselves() {
    for line in ["", EVERYTHING] {
        let objects = objects(line);
        let folder = tempfile::tempdir().unwrap();
        let file = |part: &str| {
            let config = find(&objects, "ConfigMap", &format!("sidegate-{part}"));
            let path = folder.path().join(format!("{part}.yaml"));
            let text = config["data"][format!("{part}.yaml")].as_str().unwrap();
            std::fs::write(&path, text).unwrap();
            path
        };
        let ca = sidegate_local::ca_config::Config::load(&file("ca")).unwrap();
        assert_eq!(ca.kubernetes.unwrap().namespace, "sidegate-system");
        let controller = sidegate_controller::Config::load(&file("controller")).unwrap();
        let injector = sidegate_injector::Config::load(&file("injector")).unwrap();
        let networks = |list: &[ipnet::IpNet]| -> Vec<String> {
            list.iter().map(ToString::to_string).collect()
        };
        let said = [
            networks(&controller.pod_cidrs),
            networks(&controller.service_cidrs),
            networks(&controller.external_cidrs),
        ];
        let expected: [&[&str]; 3] = match line {
            "" => [&[], &[], &[]],
            _ => [
                &["10.0.0.0/8", "fd00::/56"],
                &["10.96.0.0/12"],
                &["10.244.250.0/24"],
            ],
        };
        assert_eq!(said, expected);
        assert_eq!(controller.trust_domain, ca.trust_domain);
        assert_eq!(injector.injection.trust_domain, ca.trust_domain);
        assert_eq!(injector.injection.ca_address, controller.ca.address);
    }
}

#[test]
fn flags_reach_what_they_are_about() {
    let objects = objects(EVERYTHING);
    let ca = find(&objects, "StatefulSet", "sidegate-ca");
    assert_eq!(ca["spec"]["replicas"], 2);
    let claim = &ca["spec"]["volumeClaimTemplates"][0]["spec"];
    assert_eq!(claim["storageClassName"], "fast");
    assert_eq!(claim["resources"]["requests"]["storage"], "5Gi");
    let pod = &ca["spec"]["template"]["spec"];
    assert_eq!(pod["priorityClassName"], "high");
    assert_eq!(
        pod["imagePullSecrets"],
        json!([{ "name": "a" }, { "name": "b" }])
    );
    let container = &pod["containers"][0];
    assert_eq!(container["image"], "registry.example/sidegate/ca:9.9.9");
    assert_eq!(container["imagePullPolicy"], "Always");
    let injector = find(&objects, "Deployment", "sidegate-injector");
    let image = &injector["spec"]["template"]["spec"]["containers"][0]["image"];
    assert_eq!(image, "own/injector@sha256:00");
    let config = find(&objects, "ConfigMap", "sidegate-injector")["data"]["injector.yaml"].clone();
    let config = config.as_str().unwrap();
    for expected in [
        "example.org",
        "9.9.9",
        "debug",
        "sidegate-ca.sidegate-system.svc.corp.example:19010",
    ] {
        assert!(config.contains(expected), "{expected} in {config}");
    }
    let budgets = objects
        .iter()
        .filter(|it| kind(it) == "PodDisruptionBudget");
    assert_eq!(budgets.count(), 3);
    let plain = self::objects("");
    let budgets = plain.iter().filter(|it| kind(it) == "PodDisruptionBudget");
    assert_eq!(
        budgets.count(),
        0,
        "with one replica it would block a drain"
    );
}

#[test]
fn what_cannot_be_installed_is_refused_before_anything_is_printed() {
    let refused = [
        ("--set ca.replicas=0", "ca.replicas"),
        ("--set ca.replicas=10", "ca.replicas"),
        ("--set ca.leafLifetime=30d", "leafLifetime"),
        ("--set proxy.memoryRequest=2Gi", "above the limit"),
        ("--set injector.cpuRequest=3", "above its limit"),
        ("--set proxy.drainTimeout=2h", "drainTimeout"),
        ("--image-registry a//b", "not an image"),
        ("--image-tag", "not an image"),
    ];
    for (line, expected) in refused {
        let mut arguments = if line == "--image-tag" {
            InstallArgs::default()
        } else {
            arguments(line)
        };
        if line == "--image-tag" {
            arguments.image_tag = Some(String::new());
        }
        let error = arguments.plan().unwrap_err();
        assert!(error.contains(expected), "{line}: {error}");
    }
}

#[test]
fn yaml_says_the_same_as_json() {
    let objects = objects(EVERYTHING);
    let yaml = to_yaml(&objects).unwrap();
    let read: Vec<Value> = serde_saphyr::from_multiple(&yaml).unwrap();
    assert_eq!(read, objects);
}

#[test]
fn the_same_flags_give_the_same_bytes() {
    let print = || to_yaml(&objects(EVERYTHING)).unwrap();
    assert_eq!(print(), print());
}

/// `deploy/kubernetes` is `sidegate install` in files, for those who use kustomize.
#[test]
fn the_kustomize_base_is_what_install_prints() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes");
    let files = base(&sections_of("")).unwrap();
    for (file, text) in &files {
        let kept = std::fs::read_to_string(folder.join(file)).unwrap_or_default();
        assert!(
            kept == *text,
            "deploy/kubernetes/{file} differs from `sidegate install`: run `sidegate install \
             --base deploy/kubernetes` and review the change"
        );
    }
    let there = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    let there: BTreeSet<_> = there.map(|name| name.into_string().unwrap()).collect();
    let expected = files.iter().map(|(file, _)| (*file).to_owned()).collect();
    assert_eq!(there, expected, "files that nobody prints");
}
