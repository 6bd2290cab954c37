//! What an installation consists of, in the order in which it goes.
//!
//! Invariant: everything that `sidegate install` prints, whatever its flags, is named here or goes
//! with its namespace; a test compares the two.

use std::fmt;

use kube::api::ApiResource;
use serde_json::{Value, json};

use crate::install::manifests::{self, BUNDLE};

/// The namespace of the control plane.
const NAMESPACE: &str = sidegate_mesh::resource::SYSTEM_NAMESPACE;

/// One object by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reference {
    pub(super) api_version: String,
    pub(super) kind: String,
    pub(super) namespace: Option<String>,
    pub(super) name: String,
}

/// What goes together.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub(super) title: &'static str,
    pub(super) objects: Vec<Reference>,
}

/// Kinds of a step, in its order; what is of no kind here goes with the namespace.
const STEPS: &[(&str, &[&str])] = &[
    (
        "the webhooks",
        &[
            "MutatingWebhookConfiguration",
            "ValidatingWebhookConfiguration",
        ],
    ),
    ("the injector and the controller", &["Deployment"]),
    ("the CA", &["StatefulSet"]),
    ("the resource definitions", &["CustomResourceDefinition"]),
    (
        "the policy on the bundle",
        &[
            "ValidatingAdmissionPolicyBinding",
            "ValidatingAdmissionPolicy",
        ],
    ),
    ("the bundles", &[]),
    (
        "roles and the namespace",
        &["ClusterRoleBinding", "ClusterRole", "Namespace"],
    ),
];

/// The step of the bundles.
const BUNDLES: &str = "the bundles";

/// Every step; `bundles` are the namespaces that have a bundle.
pub(super) fn steps(bundles: Vec<String>) -> anyhow::Result<Vec<Step>> {
    let installed = manifests::everything()?;
    let of_kind = |kind: &str| -> Vec<Reference> {
        let of = installed
            .iter()
            .filter(|object| text(object, "/kind") == kind);
        of.map(Reference::of).collect()
    };
    let step = |&(title, kinds): &(&'static str, &[&str])| Step {
        title,
        objects: kinds.iter().flat_map(|kind| of_kind(kind)).collect(),
    };
    let mut steps: Vec<Step> = STEPS.iter().map(step).collect();
    // The control plane's own bundle goes with its namespace.
    let bundles = bundles
        .into_iter()
        .filter(|namespace| namespace != NAMESPACE);
    let bundles: Vec<Reference> = bundles.map(Reference::bundle).collect();
    if let Some(step) = steps.iter_mut().find(|step| step.title == BUNDLES) {
        step.objects = bundles;
    }
    Ok(steps)
}

impl Reference {
    fn of(object: &Value) -> Self {
        let namespace = object.pointer("/metadata/namespace");
        Self {
            api_version: text(object, "/apiVersion").to_owned(),
            kind: text(object, "/kind").to_owned(),
            namespace: namespace.and_then(Value::as_str).map(str::to_owned),
            name: text(object, "/metadata/name").to_owned(),
        }
    }

    fn bundle(namespace: String) -> Self {
        Self {
            api_version: "v1".to_owned(),
            kind: "ConfigMap".to_owned(),
            namespace: Some(namespace),
            name: BUNDLE.to_owned(),
        }
    }

    /// What `kubectl delete -f` needs to know of it.
    pub(super) fn to_manifest(&self) -> Value {
        let mut metadata = json!({ "name": self.name });
        if let (Some(namespace), Some(metadata)) = (&self.namespace, metadata.as_object_mut()) {
            metadata.insert("namespace".to_owned(), namespace.as_str().into());
        }
        json!({ "apiVersion": self.api_version, "kind": self.kind, "metadata": metadata })
    }

    /// How the API server knows its kind.
    pub(super) fn resource(&self) -> ApiResource {
        manifests::resource_of(&self.to_manifest())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind.to_lowercase(), self.name)?;
        match &self.namespace {
            Some(namespace) => write!(f, " -n {namespace}"),
            None => Ok(()),
        }
    }
}

fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    let found = object.pointer(pointer).and_then(Value::as_str);
    found.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(steps: &[Step]) -> Vec<String> {
        let objects = steps.iter().flat_map(|step| &step.objects);
        objects.map(ToString::to_string).collect()
    }

    #[test]
    fn webhooks_go_first_and_definitions_after_whoever_watches_them() {
        let steps = steps(vec!["shop".to_owned(), "sidegate-system".to_owned()]).unwrap();
        let names = names(&steps);
        let at = |name: &str| {
            let found = names.iter().position(|other| other.starts_with(name));
            found.unwrap_or_else(|| panic!("{name} in {names:?}"))
        };
        let order = [
            "mutatingwebhookconfiguration/sidegate-injector",
            "deployment/sidegate-controller -n sidegate-system",
            "statefulset/sidegate-ca -n sidegate-system",
            "customresourcedefinition/authorizationpolicies.sidegate.dev",
            "validatingadmissionpolicy/sidegate-bundle",
            "configmap/sidegate-bundle -n shop",
            "namespace/sidegate-system",
        ];
        let places: Vec<usize> = order.iter().map(|name| at(name)).collect();
        assert!(places.is_sorted(), "{names:?}");
        assert!(!names.contains(&"configmap/sidegate-bundle -n sidegate-system".to_owned()));
    }

    #[test]
    fn everything_that_is_installed_goes() {
        let steps = steps(Vec::new()).unwrap();
        let named: Vec<&Reference> = steps.iter().flat_map(|step| &step.objects).collect();
        for object in manifests::everything().unwrap() {
            let reference = Reference::of(&object);
            let with_namespace = reference.namespace.as_deref() == Some(NAMESPACE);
            assert!(
                with_namespace || named.contains(&&reference),
                "{reference} would be left"
            );
        }
    }

    #[test]
    fn plurals_are_those_of_the_api() {
        let steps = steps(vec!["shop".to_owned()]).unwrap();
        let objects = steps.iter().flat_map(|step| &step.objects);
        let plurals: std::collections::BTreeSet<String> =
            objects.map(|object| object.resource().plural).collect();
        let expected = [
            "clusterrolebindings",
            "clusterroles",
            "configmaps",
            "customresourcedefinitions",
            "deployments",
            "mutatingwebhookconfigurations",
            "namespaces",
            "statefulsets",
            "validatingadmissionpolicies",
            "validatingadmissionpolicybindings",
            "validatingwebhookconfigurations",
        ];
        assert!(plurals.iter().eq(expected), "{plurals:?}");
    }
}
