//! Who of the control plane may do what: service accounts, roles, bindings.
//!
//! Invariants: no wildcard; a Secret is read by the CA alone, and only its own; what can be named
//! is named.

use serde_json::{Value, json};

use super::super::plan::NAMESPACE;
use super::{BUNDLE, CA, CONTROLLER, INJECTOR, INJECTOR_WEBHOOK, VALIDATOR_WEBHOOK, global, local};
use sidegate_controller::crd::{GROUP, definition_name, plural};
use sidegate_mesh::resource::Kind;

const RBAC: &str = "rbac.authorization.k8s.io";

/// The CA reviews tokens, looks at the pods that bring them, and publishes the bundle.
pub(super) fn ca() -> Vec<Value> {
    let cluster = vec![
        rule("authentication.k8s.io", &["tokenreviews"], &["create"]),
        rule("", &["pods", "serviceaccounts"], &["get"]),
        rule("", &["namespaces"], &["list", "watch"]),
        // Making cannot be limited to a name; the policy on the bundle lets the CA do the rest. It
        // lists and watches by name too.
        rule("", &["configmaps"], &["create"]),
        named(
            "",
            "configmaps",
            &[BUNDLE],
            &["get", "list", "watch", "patch"],
        ),
    ];
    let own = vec![
        rule("", &["secrets"], &["create"]),
        named("", "secrets", &[CA], &["get", "update"]),
    ];
    account(CA, &cluster, &own)
}

/// The controller watches what it makes the mesh's index from, and writes what became of resources.
pub(super) fn controller() -> Vec<Value> {
    let plurals: Vec<&str> = Kind::ALL.into_iter().map(plural).collect();
    let statuses: Vec<String> = plurals
        .iter()
        .map(|name| format!("{name}/status"))
        .collect();
    let statuses: Vec<&str> = statuses.iter().map(String::as_str).collect();
    let definitions: Vec<String> = Kind::ALL.into_iter().map(definition_name).collect();
    let definitions: Vec<&str> = definitions.iter().map(String::as_str).collect();
    let cluster = vec![
        rule(
            "",
            &["namespaces", "nodes", "pods", "services"],
            &["list", "watch"],
        ),
        rule("discovery.k8s.io", &["endpointslices"], &["list", "watch"]),
        rule("networking.k8s.io", &["servicecidrs"], &["list", "watch"]),
        rule(GROUP, &plurals, &["list", "watch"]),
        rule(GROUP, &statuses, &["patch"]),
        named(
            "apiextensions.k8s.io",
            "customresourcedefinitions",
            &definitions,
            &["get"],
        ),
        rule("events.k8s.io", &["events"], &["create"]),
    ];
    let own = vec![
        rule("coordination.k8s.io", &["leases"], &["create"]),
        named(
            "coordination.k8s.io",
            "leases",
            &[CONTROLLER],
            &["get", "update"],
        ),
    ];
    account(CONTROLLER, &cluster, &own)
}

/// The injector looks at namespaces, and keeps the roots of its two configurations current.
pub(super) fn injector() -> Vec<Value> {
    let verbs = &["get", "list", "watch", "patch"];
    let group = "admissionregistration.k8s.io";
    let cluster = vec![
        rule("", &["namespaces"], &["get", "list", "watch"]),
        named(
            group,
            "mutatingwebhookconfigurations",
            &[INJECTOR_WEBHOOK],
            verbs,
        ),
        named(
            group,
            "validatingwebhookconfigurations",
            &[VALIDATOR_WEBHOOK],
            verbs,
        ),
    ];
    account(INJECTOR, &cluster, &[])
}

/// Who may read pods may read policies; who administers a namespace may write its policies.
pub(super) fn for_people() -> Vec<Value> {
    let plurals: Vec<&str> = Kind::ALL.into_iter().map(plural).collect();
    let role = |name: &str, into: &str, verbs: &[&str]| {
        json!({
            "apiVersion": format!("{RBAC}/v1"),
            "kind": "ClusterRole",
            "metadata": {
                "name": name,
                "labels": {
                    "app.kubernetes.io/part-of": "sidegate",
                    format!("{RBAC}/aggregate-to-{into}"): "true",
                },
            },
            "rules": [rule(GROUP, &plurals, verbs)],
        })
    };
    vec![
        role("sidegate-resources-view", "view", &["get", "list", "watch"]),
        role(
            "sidegate-resources-admin",
            "admin",
            &["create", "delete", "deletecollection", "patch", "update"],
        ),
    ]
}

fn rule(group: &str, resources: &[&str], verbs: &[&str]) -> Value {
    json!({ "apiGroups": [group], "resources": resources, "verbs": verbs })
}

fn named(group: &str, resource: &str, names: &[&str], verbs: &[&str]) -> Value {
    json!({
        "apiGroups": [group],
        "resources": [resource],
        "resourceNames": names,
        "verbs": verbs,
    })
}

/// A service account, its rules in the whole cluster, and those in the control plane's namespace.
fn account(name: &str, cluster: &[Value], own: &[Value]) -> Vec<Value> {
    let subjects = json!([{ "kind": "ServiceAccount", "name": name, "namespace": NAMESPACE }]);
    let mut objects = vec![
        json!({
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": local(name, name),
            "automountServiceAccountToken": false,
        }),
        json!({
            "apiVersion": format!("{RBAC}/v1"),
            "kind": "ClusterRole",
            "metadata": global(name, name),
            "rules": cluster,
        }),
        json!({
            "apiVersion": format!("{RBAC}/v1"),
            "kind": "ClusterRoleBinding",
            "metadata": global(name, name),
            "roleRef": { "apiGroup": RBAC, "kind": "ClusterRole", "name": name },
            "subjects": subjects,
        }),
    ];
    if !own.is_empty() {
        objects.push(json!({
            "apiVersion": format!("{RBAC}/v1"),
            "kind": "Role",
            "metadata": local(name, name),
            "rules": own,
        }));
        objects.push(json!({
            "apiVersion": format!("{RBAC}/v1"),
            "kind": "RoleBinding",
            "metadata": local(name, name),
            "roleRef": { "apiGroup": RBAC, "kind": "Role", "name": name },
            "subjects": subjects,
        }));
    }
    objects
}
