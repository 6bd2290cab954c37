//! What the API server asks before it takes an object: webhooks, and the policy on the bundle.
//!
//! Invariants: injection fails closed where it is wanted, and is never asked for kube-system or the
//! control plane's own namespace, so that a cluster without an injector can still be mended. The
//! bundle, which every sidecar starts its trust with, is written by the CA alone.

use serde_json::{Value, json};

use super::super::plan::NAMESPACE;
use super::{BUNDLE, CA, INJECTOR, INJECTOR_WEBHOOK, VALIDATOR_WEBHOOK, global};
use sidegate_controller::crd::{GROUP, VERSION, plural};
use sidegate_mesh::resource::Kind;

const ADMISSION: &str = "admissionregistration.k8s.io/v1";

/// Label of namespaces, and of pods that opt out.
const INJECT: &str = "sidegate.dev/inject";

/// The injector's two configurations.
pub(super) fn webhooks() -> Vec<Value> {
    let mutating = json!({
        "apiVersion": ADMISSION,
        "kind": "MutatingWebhookConfiguration",
        "metadata": global(INJECTOR_WEBHOOK, INJECTOR),
        "webhooks": [{
            "name": "inject.sidegate.dev",
            "admissionReviewVersions": ["v1"],
            "clientConfig": service("/mutate"),
            "failurePolicy": "Fail",
            "matchPolicy": "Equivalent",
            "namespaceSelector": {
                "matchLabels": { INJECT: "enabled" },
                "matchExpressions": [{
                    "key": "kubernetes.io/metadata.name",
                    "operator": "NotIn",
                    "values": ["kube-system", NAMESPACE],
                }],
            },
            "objectSelector": {
                "matchExpressions": [{ "key": INJECT, "operator": "NotIn", "values": ["disabled"] }],
            },
            "reinvocationPolicy": "IfNeeded",
            "rules": [{
                "apiGroups": [""],
                "apiVersions": ["v1"],
                "operations": ["CREATE"],
                "resources": ["pods"],
                "scope": "Namespaced",
            }],
            "sideEffects": "None",
            "timeoutSeconds": 5,
        }],
    });
    let plurals: Vec<&str> = Kind::ALL.into_iter().map(plural).collect();
    let validating = json!({
        "apiVersion": ADMISSION,
        "kind": "ValidatingWebhookConfiguration",
        "metadata": global(VALIDATOR_WEBHOOK, INJECTOR),
        "webhooks": [{
            "name": "validate.sidegate.dev",
            "admissionReviewVersions": ["v1"],
            "clientConfig": service("/validate"),
            "failurePolicy": "Fail",
            "matchPolicy": "Equivalent",
            "rules": [{
                "apiGroups": [GROUP],
                "apiVersions": [VERSION],
                "operations": ["CREATE", "UPDATE"],
                "resources": plurals,
                "scope": "Namespaced",
            }],
            "sideEffects": "None",
            "timeoutSeconds": 5,
        }],
    });
    vec![mutating, validating]
}

fn service(path: &str) -> Value {
    json!({
        "service": { "name": INJECTOR, "namespace": NAMESPACE, "path": path, "port": 443 },
    })
}

/// Editors of a namespace may write `ConfigMaps`, but not this one: whoever writes it is trusted by
/// every sidecar that starts there. Namespaces that end take theirs along, and whoever may remove
/// this very policy may remove a bundle, so that uninstalling does not depend on how fast that
/// is noticed.
pub(super) fn bundle_policy() -> Vec<Value> {
    let may_write = format!(
        "request.userInfo.username == 'system:serviceaccount:{NAMESPACE}:{CA}' || \
         (request.operation == 'DELETE' && \
         (request.userInfo.username in ['system:serviceaccount:kube-system:namespace-controller', \
         'system:kube-controller-manager'] || \
         authorizer.group('admissionregistration.k8s.io').resource('validatingadmissionpolicies')\
         .name('{BUNDLE}').check('delete').allowed()))"
    );
    // Not `request.name`: it is absent when a collection is deleted, as the end of a namespace does.
    let is_the_bundle = format!(
        "(request.operation == 'DELETE' ? oldObject : object).metadata.?name.orValue('') == '{BUNDLE}'"
    );
    let policy = json!({
        "apiVersion": ADMISSION,
        "kind": "ValidatingAdmissionPolicy",
        "metadata": global(BUNDLE, CA),
        "spec": {
            "failurePolicy": "Fail",
            "matchConditions": [{
                "name": "is-the-bundle",
                "expression": is_the_bundle,
            }],
            "matchConstraints": {
                "matchPolicy": "Equivalent",
                "resourceRules": [{
                    "apiGroups": [""],
                    "apiVersions": ["v1"],
                    "operations": ["CREATE", "UPDATE", "DELETE"],
                    "resources": ["configmaps"],
                    "scope": "Namespaced",
                }],
            },
            "validations": [{
                "expression": may_write,
                "message": format!("the ConfigMap {BUNDLE} holds the roots that sidecars trust; only Sidegate's CA writes it"),
                "reason": "Forbidden",
            }],
        },
    });
    let binding = json!({
        "apiVersion": ADMISSION,
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": global(BUNDLE, CA),
        "spec": { "policyName": BUNDLE, "validationActions": ["Deny"] },
    });
    vec![policy, binding]
}
