//! Whether what was installed is there, runs, and is of one version.

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt;
use sidegate_controller::crd::definition_name;
use sidegate_mesh::resource::{Kind, SYSTEM_NAMESPACE};

use super::Facts;
use super::finding::{Finding, names};
use super::namespace::is_labelled;
use crate::install::manifests::{
    BUNDLE, CA, CONTROLLER, INJECTOR, INJECTOR_WEBHOOK, VALIDATOR_WEBHOOK,
};

const APPLY: &str = "sidegate install | kubectl apply -f -";
const VERSION_LABEL: &str = "app.kubernetes.io/version";
const ROOT: &str = "root.pem";

/// How often a container may have restarted before it is worth a look.
const RESTARTS_MAX: i32 = 3;

/// The whole installation.
pub(super) fn check(facts: &Facts) -> Vec<Finding> {
    let mut findings = vec![definitions(facts)];
    findings.extend([CA, CONTROLLER, INJECTOR].map(|name| part(facts, name)));
    findings.extend([
        versions(facts),
        webhooks(facts),
        bundle_policy(facts),
        bundles(facts),
    ]);
    findings
}

fn definitions(facts: &Facts) -> Finding {
    let check = "resource definitions";
    let missing: Vec<String> = Kind::ALL
        .into_iter()
        .map(definition_name)
        .filter(|name| {
            let mut there = facts.definitions.iter();
            !there.any(|it| it.name_any() == *name && it.metadata.deletion_timestamp.is_none())
        })
        .collect();
    if missing.is_empty() {
        return Finding::well(check, "there");
    }
    Finding::wrong(check, format!("missing: {}", names(&missing)), APPLY)
}

/// Ready and wanted replicas, if the part is there.
fn replicas(facts: &Facts, name: &str) -> Option<(i32, i32)> {
    if name == CA {
        let set = facts
            .stateful_sets
            .iter()
            .find(|it| it.name_any() == name)?;
        let ready = set.status.as_ref().and_then(|status| status.ready_replicas);
        let wanted = set.spec.as_ref().and_then(|spec| spec.replicas);
        return Some((ready.unwrap_or(0), wanted.unwrap_or(1)));
    }
    let deployment = facts.deployments.iter().find(|it| it.name_any() == name)?;
    let status = deployment.status.as_ref();
    let ready = status.and_then(|status| status.ready_replicas);
    let wanted = deployment.spec.as_ref().and_then(|spec| spec.replicas);
    Some((ready.unwrap_or(0), wanted.unwrap_or(1)))
}

fn part(facts: &Facts, name: &'static str) -> Finding {
    let Some((ready, wanted)) = replicas(facts, name) else {
        return Finding::wrong(name, "is not there", APPLY);
    };
    let pods = facts.pods.iter().filter(|pod| {
        let of = pod.labels().get("app.kubernetes.io/name");
        pod.namespace().as_deref() == Some(SYSTEM_NAMESPACE) && of.is_some_and(|of| of == name)
    });
    let troubles: Vec<String> = pods.filter_map(trouble).collect();
    let look =
        format!("kubectl -n {SYSTEM_NAMESPACE} describe pods -l app.kubernetes.io/name={name}");
    if ready == 0 {
        let why = if troubles.is_empty() {
            String::new()
        } else {
            format!(": {}", names(&troubles))
        };
        return Finding::wrong(name, format!("no replica of {wanted} is ready{why}"), look);
    }
    if ready < wanted || !troubles.is_empty() {
        let why = if troubles.is_empty() {
            String::new()
        } else {
            format!(": {}", names(&troubles))
        };
        return Finding::look(
            name,
            format!("{ready} of {wanted} replicas are ready{why}"),
            look,
        );
    }
    Finding::well(name, format!("{ready} of {wanted} replicas are ready"))
}

/// Why a pod of the control plane waits or restarts.
fn trouble(pod: &Pod) -> Option<String> {
    let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
    statuses.iter().find_map(|status| {
        let state = status.state.as_ref();
        let waiting = state.and_then(|state| state.waiting.as_ref());
        let reason = waiting.and_then(|waiting| waiting.reason.clone());
        let restarted = status.restart_count > RESTARTS_MAX;
        let restarts = || format!("{} restarts", status.restart_count);
        let what = reason.or_else(|| restarted.then(restarts))?;
        Some(format!("{} {what}", pod.name_any()))
    })
}

/// The version of the control plane that is installed.
pub(super) fn installed_version(facts: &Facts) -> Option<&str> {
    let injector = facts
        .deployments
        .iter()
        .find(|it| it.name_any() == INJECTOR)?;
    version(&injector.metadata)
}

fn version(metadata: &ObjectMeta) -> Option<&str> {
    let labels = metadata.labels.as_ref()?;
    labels.get(VERSION_LABEL).map(String::as_str)
}

fn versions(facts: &Facts) -> Finding {
    let check = "versions";
    let own = env!("CARGO_PKG_VERSION");
    let deployments = facts
        .deployments
        .iter()
        .map(|it| (it.name_any(), &it.metadata));
    let sets = facts
        .stateful_sets
        .iter()
        .map(|it| (it.name_any(), &it.metadata));
    let others: Vec<String> = deployments
        .chain(sets)
        .filter_map(|(name, metadata)| {
            let version = version(metadata)?;
            (version != own).then(|| format!("{name} {version}"))
        })
        .collect();
    if others.is_empty() {
        return Finding::well(check, own);
    }
    Finding::look(
        check,
        format!("this command line is {own}, but {}", names(&others)),
        format!("upgrade with `{APPLY}`, or use the command line of that version"),
    )
}

fn webhooks(facts: &Facts) -> Finding {
    let check = "webhooks";
    let mutating = facts
        .mutating
        .iter()
        .find(|it| it.name_any() == INJECTOR_WEBHOOK);
    let validating = facts
        .validating
        .iter()
        .find(|it| it.name_any() == VALIDATOR_WEBHOOK);
    let (Some(mutating), Some(validating)) = (mutating, validating) else {
        return Finding::wrong(check, "a configuration is missing", APPLY);
    };
    let mutating = mutating.webhooks.iter().flatten();
    let mutating = mutating.map(|it| (&it.name, &it.client_config, &it.failure_policy));
    let validating = validating.webhooks.iter().flatten();
    let validating = validating.map(|it| (&it.name, &it.client_config, &it.failure_policy));
    let root = root(facts, SYSTEM_NAMESPACE).map(str::trim);
    for (name, client, failure) in mutating.chain(validating) {
        let bundle = client.ca_bundle.as_ref().map(|bundle| bundle.0.as_slice());
        let Some(bundle) = bundle.filter(|bundle| !bundle.is_empty()) else {
            return Finding::wrong(
                check,
                format!("{name} has no caBundle, so every call to it fails"),
                "the injector writes it once it has its certificate; see its pods above",
            );
        };
        let bundle = String::from_utf8_lossy(bundle);
        if root.is_some_and(|root| root != bundle.trim()) {
            return Finding::look(
                check,
                format!("{name} trusts other roots than the mesh"),
                "the injector follows the roots within seconds; if this stays, see its logs",
            );
        }
        if failure.as_deref() != Some("Fail") {
            return Finding::look(
                check,
                format!("{name} has a failurePolicy other than Fail: what it cannot judge passes"),
                APPLY,
            );
        }
    }
    Finding::well(check, "fail closed, and trust the mesh's roots")
}

fn bundle_policy(facts: &Facts) -> Finding {
    let check = "bundle policy";
    let binds = facts.bundle_bindings.iter().any(|binding| {
        let spec = binding.spec.as_ref();
        let denies = spec.and_then(|spec| spec.validation_actions.as_ref());
        denies.is_some_and(|actions| actions.iter().any(|action| action == "Deny"))
    });
    if binds {
        return Finding::well(
            check,
            "only the CA writes the roots that sidecars start with",
        );
    }
    Finding::wrong(
        check,
        format!(
            "the ValidatingAdmissionPolicy {BUNDLE} does not bind: who may write ConfigMaps can make sidecars trust another CA"
        ),
        APPLY,
    )
}

/// The roots in a namespace.
fn root<'a>(facts: &'a Facts, namespace: &str) -> Option<&'a str> {
    let bundle = facts
        .bundles
        .iter()
        .find(|it| it.namespace().as_deref() == Some(namespace))?;
    bundle.data.as_ref()?.get(ROOT).map(String::as_str)
}

/// What is wrong with the bundle of one namespace.
pub(super) fn bundle_fault(facts: &Facts, namespace: &str) -> Option<&'static str> {
    let Some(mesh) = root(facts, SYSTEM_NAMESPACE) else {
        return Some("the control plane has none");
    };
    match root(facts, namespace) {
        None => Some("missing"),
        Some(root) if root != mesh => Some("another one than the control plane's"),
        Some(_) => None,
    }
}

fn bundles(facts: &Facts) -> Finding {
    let check = "bundles";
    let labelled = facts
        .namespaces
        .iter()
        .filter(|namespace| is_labelled(namespace));
    let wanted = labelled.map(ResourceExt::name_any);
    let faults: Vec<String> = wanted
        .chain([SYSTEM_NAMESPACE.to_owned()])
        .filter_map(|name| Some(format!("{name}: {}", bundle_fault(facts, &name)?)))
        .collect();
    if faults.is_empty() {
        return Finding::well(check, "the mesh's roots are in every labelled namespace");
    }
    Finding::wrong(
        check,
        names(&faults),
        format!(
            "the CA publishes them within seconds; see `kubectl -n {SYSTEM_NAMESPACE} logs {CA}-0`"
        ),
    )
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::finding::Level;
    use super::*;

    fn of<T: serde::de::DeserializeOwned>(value: Value) -> T {
        serde_json::from_value(value).unwrap()
    }

    fn bundle(namespace: &str, root: &str) -> Value {
        json!({ "metadata": { "name": BUNDLE, "namespace": namespace }, "data": { "root.pem": root } })
    }

    fn workload(name: &str, ready: i32) -> Value {
        json!({
            "metadata": { "name": name, "labels": { VERSION_LABEL: env!("CARGO_PKG_VERSION") } },
            "spec": {
                "replicas": 2, "selector": {}, "serviceName": "", "template": {},
            },
            "status": { "readyReplicas": ready, "replicas": 2 },
        })
    }

    fn webhook(name: &str) -> Value {
        json!({ "metadata": { "name": name }, "webhooks": [{
            "name": name, "admissionReviewVersions": [], "sideEffects": "None", "failurePolicy": "Fail",
            // `root` in base64.
            "clientConfig": { "caBundle": "cm9vdA==" },
        }] })
    }

    /// An installation with nothing wrong.
    fn healthy() -> Facts {
        let definition = |kind: Kind| {
            of(json!({
                "metadata": { "name": definition_name(kind) },
                "spec": { "group": "", "names": { "kind": "", "plural": "" }, "scope": "", "versions": [] },
            }))
        };
        Facts {
            definitions: Kind::ALL.map(definition).to_vec(),
            deployments: vec![of(workload(CONTROLLER, 2)), of(workload(INJECTOR, 2))],
            stateful_sets: vec![of(workload(CA, 2))],
            mutating: vec![of(webhook(INJECTOR_WEBHOOK))],
            validating: vec![of(webhook(VALIDATOR_WEBHOOK))],
            bundle_bindings: vec![of(json!({
                "metadata": { "name": BUNDLE }, "spec": { "validationActions": ["Deny"] },
            }))],
            bundles: vec![
                of(bundle(SYSTEM_NAMESPACE, "root\n")),
                of(bundle("shop", "root\n")),
            ],
            namespaces: vec![of(json!({
                "metadata": { "name": "shop", "labels": { "sidegate.dev/inject": "enabled" } },
            }))],
            ..Facts::default()
        }
    }

    /// What is not well, of the checks of `facts`.
    fn troubles(facts: &Facts) -> Vec<(&'static str, Level)> {
        let findings = check(facts).into_iter();
        let bad = findings.filter(|finding| finding.level != Level::Well);
        bad.map(|finding| (finding.check, finding.level)).collect()
    }

    #[test]
    fn a_healthy_installation_has_no_trouble() {
        assert_eq!(troubles(&healthy()), []);
    }

    #[test]
    fn without_an_installation_everything_is_wrong() {
        let found = troubles(&Facts::default());
        assert!(
            found.iter().all(|(_, level)| *level == Level::Wrong),
            "{found:?}"
        );
        assert_eq!(found.len(), 7, "all but the versions: {found:?}");
    }

    #[test]
    fn each_trouble_is_found_where_it_is() {
        let mut facts = healthy();
        facts.deployments[0] = of(workload(CONTROLLER, 1));
        assert_eq!(troubles(&facts), [(CONTROLLER, Level::Look)]);

        let mut facts = healthy();
        facts.stateful_sets[0] = of(workload(CA, 0));
        assert_eq!(troubles(&facts), [(CA, Level::Wrong)]);

        let mut facts = healthy();
        facts.bundles[1] = of(bundle("shop", "forged\n"));
        assert_eq!(troubles(&facts), [("bundles", Level::Wrong)]);

        let mut facts = healthy();
        facts.bundle_bindings[0] = of(json!({
            "metadata": { "name": BUNDLE }, "spec": { "validationActions": ["Audit"] },
        }));
        assert_eq!(troubles(&facts), [("bundle policy", Level::Wrong)]);

        let mut facts = healthy();
        let webhooks = facts.mutating[0].webhooks.as_mut().unwrap();
        webhooks[0].client_config.ca_bundle = None;
        assert_eq!(troubles(&facts), [("webhooks", Level::Wrong)]);

        let mut facts = healthy();
        let webhooks = facts.validating[0].webhooks.as_mut().unwrap();
        webhooks[0].failure_policy = Some("Ignore".to_owned());
        assert_eq!(troubles(&facts), [("webhooks", Level::Look)]);

        let mut facts = healthy();
        facts.deployments[1]
            .labels_mut()
            .insert(VERSION_LABEL.to_owned(), "0.0.9".to_owned());
        assert_eq!(troubles(&facts), [("versions", Level::Look)]);
    }
}
