//! Every object of an installation, in the order in which it is applied.
//!
//! Invariants: the order never varies; an object is valid for the API server's own types (a test
//! reads each with them); no rule of ours has a wildcard; no `caBundle` is printed, because
//! applying an empty one would wipe what the injector has written.

mod network;
mod parts;
mod rbac;
mod webhooks;

use anyhow::Context;
use kube::api::ApiResource;
use kube::core::GroupVersionKind;
use serde_json::{Value, json};

use super::plan::{NAMESPACE, Plan};

/// The `ConfigMap` of each namespace that holds the mesh's roots.
pub(crate) const BUNDLE: &str = sidegate_injector::settings::BUNDLE_CONFIG_MAP;
/// The `MutatingWebhookConfiguration`.
pub(crate) const INJECTOR_WEBHOOK: &str = "sidegate-injector";
/// The `ValidatingWebhookConfiguration`.
pub(crate) const VALIDATOR_WEBHOOK: &str = "sidegate-validator";
/// The CA: `StatefulSet`, Service, `ServiceAccount` and Secret.
pub(crate) const CA: &str = "sidegate-ca";
/// The controller: Deployment, Service and `ServiceAccount`.
pub(crate) const CONTROLLER: &str = "sidegate-controller";
/// The injector: Deployment, Service and `ServiceAccount`.
pub(crate) const INJECTOR: &str = "sidegate-injector";

/// A part of the output, and the file of the kustomize base that holds it.
pub(crate) struct Section {
    pub(crate) file: &'static str,
    pub(crate) objects: Vec<Value>,
}

/// Everything, in order: what others need comes first, and the webhooks last, so that none refuses
/// what it cannot judge yet.
pub(crate) fn sections(plan: &Plan) -> anyhow::Result<Vec<Section>> {
    let ca = to_yaml("the CA", &plan.ca_config())?;
    let controller = to_yaml("the controller", &plan.controller_config())?;
    let injector = to_yaml("the injector", &plan.injector_config())?;
    let section = |file, objects: Vec<Vec<Value>>| Section {
        file,
        objects: objects.into_iter().flatten().collect(),
    };
    Ok(vec![
        section("crds.yaml", vec![sidegate_controller::crds()]),
        section(
            "namespace.yaml",
            vec![vec![namespace()], rbac::for_people(), network::closed()],
        ),
        section("bundle-policy.yaml", vec![webhooks::bundle_policy()]),
        section(
            "ca.yaml",
            vec![rbac::ca(), network::ca(), parts::ca(plan, ca)],
        ),
        section(
            "controller.yaml",
            vec![
                rbac::controller(),
                network::controller(),
                parts::controller(plan, controller),
            ],
        ),
        section(
            "injector.yaml",
            vec![
                rbac::injector(),
                network::injector(),
                parts::injector(plan, injector),
            ],
        ),
        section("webhooks.yaml", vec![webhooks::webhooks()]),
    ])
}

/// Every object that some flags or others print.
pub(crate) fn everything() -> anyhow::Result<Vec<Value>> {
    let mut plan = Plan::default();
    plan.set_replicas(2);
    let sections = sections(&plan)?.into_iter();
    Ok(sections.flat_map(|section| section.objects).collect())
}

/// How the API server knows the type of an object of ours.
pub(crate) fn resource_of(object: &Value) -> ApiResource {
    let text = |field: &str| {
        object
            .get(field)
            .and_then(Value::as_str)
            .unwrap_or_default()
    };
    let (group, version) = text("apiVersion")
        .split_once('/')
        .unwrap_or(("", text("apiVersion")));
    let kind = text("kind");
    // Each kind of ours follows the rule of the language; a test names them.
    let mut plural = kind.to_lowercase();
    if let Some(stem) = plural.strip_suffix('y') {
        plural = format!("{stem}ies");
    } else {
        plural.push('s');
    }
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), &plural)
}

fn to_yaml(whose: &str, config: &impl serde::Serialize) -> anyhow::Result<String> {
    serde_saphyr::to_string(config)
        .with_context(|| format!("the configuration of {whose} cannot be written"))
}

fn namespace() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {
            "name": NAMESPACE,
            "labels": {
                "app.kubernetes.io/part-of": "sidegate",
                "pod-security.kubernetes.io/enforce": "restricted",
                "pod-security.kubernetes.io/audit": "restricted",
                "pod-security.kubernetes.io/warn": "restricted",
            },
        },
    })
}

/// Labels of everything that belongs to one part.
fn labels(name: &str) -> Value {
    json!({
        "app.kubernetes.io/name": name,
        "app.kubernetes.io/part-of": "sidegate",
        "app.kubernetes.io/version": env!("CARGO_PKG_VERSION"),
    })
}

/// What selects the pods of one part; it never changes, or an upgrade would be refused.
fn selector(name: &str) -> Value {
    json!({ "app.kubernetes.io/name": name })
}

/// Metadata of an object in the control plane's namespace.
fn local(name: &str, part: &str) -> Value {
    json!({ "name": name, "namespace": NAMESPACE, "labels": labels(part) })
}

/// Metadata of an object of the whole cluster.
fn global(name: &str, part: &str) -> Value {
    json!({ "name": name, "labels": labels(part) })
}
