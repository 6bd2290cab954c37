//! Callers without a sidecar that must be let in: the API server, which calls webhooks and
//! aggregated APIs wherever they run.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;
use sidegate_mesh::resource::SYSTEM_NAMESPACE;

use super::Facts;
use super::finding::{Finding, names};
use super::injected::Injected;
use super::namespace::audits;
use super::policies::has_labels;

/// A Service that the API server calls.
struct Target {
    /// What makes it call: `validating webhook policy.example`.
    what: String,
    namespace: String,
    service: String,
    port: i32,
}

/// Those behind meshed pods of one namespace, or of all.
pub(super) fn check(facts: &Facts, namespace: Option<&str>) -> Vec<Finding> {
    let check = "API server's calls";
    let mut refused = Vec::new();
    let mut audited = Vec::new();
    for target in targets(facts) {
        if namespace.is_some_and(|name| name != target.namespace) {
            continue;
        }
        let Some((pod, port)) = closed_to_strangers(facts, &target) else {
            continue;
        };
        let line = format!(
            "{} is served by {} on port {port}",
            target.what,
            pod.sidecar.name()
        );
        if audits(facts, &pod) {
            audited.push(line);
        } else {
            refused.push(line);
        }
    }
    let remedy = "name the port in sidegate.dev/plaintext-ports, restart the pods, and write an \
                  AuthorizationPolicy for it with `from: [{ unauthenticated: {} }]`";
    let mut findings = Vec::new();
    if !refused.is_empty() {
        let message = format!(
            "will be refused, the API server has no identity: {}",
            names(&refused)
        );
        findings.push(Finding::wrong(check, message, remedy));
    }
    if !audited.is_empty() {
        let message = format!("will be refused once enforced: {}", names(&audited));
        findings.push(Finding::look(check, message, remedy));
    }
    if findings.is_empty() {
        findings.push(Finding::well(
            check,
            "no webhook or aggregated API is shut off",
        ));
    }
    findings
}

/// A meshed pod behind a target, and its port, when that port is closed to callers without an
/// identity.
fn closed_to_strangers<'a>(facts: &'a Facts, target: &Target) -> Option<(Injected<'a>, u16)> {
    let service = facts.services.iter().find(|service| {
        service.name_any() == target.service
            && service.namespace().as_deref() == Some(&target.namespace)
    })?;
    let selector = service.spec.as_ref()?.selector.clone()?;
    let selector: BTreeMap<String, String> = selector.into_iter().collect();
    let mut pods = facts.pods.iter().filter(|pod| {
        pod.namespace().as_deref() == Some(&target.namespace) && has_labels(pod, &selector)
    });
    pods.find_map(|pod| {
        let injected = Injected::of(pod)?;
        let port = pod_port(service, target.port, pod)?;
        let open =
            injected.plaintext().contains(&port) || injected.skipped_inbound().contains(&port);
        (!open).then_some((injected, port))
    })
}

/// The pod's port behind a Service's port.
fn pod_port(service: &Service, port: i32, pod: &Pod) -> Option<u16> {
    let ports = service.spec.as_ref()?.ports.as_ref()?;
    let found = ports.iter().find(|it| it.port == port)?;
    let number = match &found.target_port {
        None => found.port,
        Some(IntOrString::Int(number)) => *number,
        Some(IntOrString::String(name)) => {
            let mut containers = super::injected::own_containers(pod);
            containers.find_map(|container| {
                let mut ports = container.ports.iter().flatten();
                let named = ports.find(|port| port.name.as_deref() == Some(name))?;
                Some(named.container_port)
            })?
        }
    };
    u16::try_from(number).ok()
}

fn targets(facts: &Facts) -> Vec<Target> {
    let mut targets = Vec::new();
    let mut add = |what: String, namespace: &str, service: &str, port: Option<i32>| {
        if namespace != SYSTEM_NAMESPACE {
            targets.push(Target {
                what,
                namespace: namespace.to_owned(),
                service: service.to_owned(),
                port: port.unwrap_or(443),
            });
        }
    };
    for configuration in &facts.mutating {
        for webhook in configuration.webhooks.iter().flatten() {
            if let Some(to) = &webhook.client_config.service {
                let what = format!("mutating webhook {}", webhook.name);
                add(what, &to.namespace, &to.name, to.port);
            }
        }
    }
    for configuration in &facts.validating {
        for webhook in configuration.webhooks.iter().flatten() {
            if let Some(to) = &webhook.client_config.service {
                let what = format!("validating webhook {}", webhook.name);
                add(what, &to.namespace, &to.name, to.port);
            }
        }
    }
    for definition in &facts.definitions {
        let conversion = definition.spec.conversion.as_ref();
        let webhook = conversion.and_then(|conversion| conversion.webhook.as_ref());
        let config = webhook.and_then(|webhook| webhook.client_config.as_ref());
        if let Some(to) = config.and_then(|config| config.service.as_ref()) {
            let what = format!("conversion webhook of {}", definition.name_any());
            add(what, &to.namespace, &to.name, to.port);
        }
    }
    for api in &facts.api_services {
        let service = api.spec.as_ref().and_then(|spec| spec.service.as_ref());
        if let Some((to, (namespace, name))) =
            service.and_then(|to| Some((to, (to.namespace.as_ref()?, to.name.as_ref()?))))
        {
            let what = format!("aggregated API {}", api.name_any());
            add(what, namespace, name, to.port);
        }
    }
    targets
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::finding::Level;
    use super::super::injected::tests::meshed;
    use super::*;

    fn facts(config: &Value, namespace: &Value) -> Facts {
        let of = |value: Value| serde_json::from_value(value).unwrap();
        Facts {
            namespaces: vec![serde_json::from_value(namespace.clone()).unwrap()],
            pods: vec![meshed("hook", &[], config)],
            services: vec![of(json!({
                "metadata": { "name": "hook", "namespace": "shop" },
                "spec": {
                    "selector": { "app": "hook" },
                    "ports": [{ "port": 443, "targetPort": "http" }],
                },
            }))],
            validating: vec![serde_json::from_value(json!({
                "metadata": { "name": "x" },
                "webhooks": [{
                    "name": "policy.example", "admissionReviewVersions": ["v1"], "sideEffects": "None",
                    "clientConfig": { "service": { "name": "hook", "namespace": "shop" } },
                }],
            }))
            .unwrap()],
            ..Facts::default()
        }
    }

    #[test]
    fn a_webhook_behind_a_meshed_pod_needs_a_plaintext_port() {
        let enforced = json!({ "metadata": { "name": "shop" } });
        let audited = json!({ "metadata": {
            "name": "shop", "annotations": { "sidegate.dev/enforcement": "audit" },
        } });
        let closed = check(&facts(&json!({}), &enforced), None).remove(0);
        assert_eq!(closed.level, Level::Wrong);
        assert!(closed.message.contains("policy.example"), "{closed:?}");
        assert!(
            closed.message.contains("shop/hook on port 8080"),
            "{closed:?}"
        );
        let open = json!({ "plaintextPorts": [8080] });
        assert_eq!(check(&facts(&open, &enforced), None)[0].level, Level::Well);
        assert_eq!(
            check(&facts(&json!({}), &audited), None)[0].level,
            Level::Look
        );
        let elsewhere = check(&facts(&json!({}), &enforced), Some("jobs"));
        assert_eq!(elsewhere[0].level, Level::Well);
    }
}
