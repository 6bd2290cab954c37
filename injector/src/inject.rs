//! Injection: from a pod to the pod with a gate at its side.
//!
//! [`inject`] works on raw JSON, so that fields which this version does not know survive, and its
//! patch touches nothing but what it adds and the probes that it redirects.
//!
//! Invariants: injecting what was injected changes nothing, and keeps the pod's secret; nothing
//! that a pod brings is taken for ours unless it is exactly what we would have added; no text of a
//! user reaches a place where Kubernetes expands variables.

use std::collections::BTreeMap;

use json_patch::Patch;
use serde_json::Value;

pub use quantity::{Quantity, QuantityError};
pub use refusal::Refusal;
pub use uninject::uninject;
pub use workload::{Visit, Workload, templates};

use crate::inject::annotations::Options;
use crate::inject::edit::Edits;
use crate::inject::existing::Existing;
use crate::inject::pod::Pod;
use crate::inject::probes::Probes;
use crate::inject::sidecar::Sidecar;
use crate::settings::Settings;

pub mod annotations;
mod edit;
mod existing;
mod pod;
mod probes;
mod quantity;
mod refusal;
mod reserved;
mod sidecar;
#[cfg(test)]
mod tests;
mod uninject;
mod workload;

/// The namespaces of the cluster's and of our own control plane, which are never injected.
pub(crate) const EXEMPT_NAMESPACES: [&str; 2] =
    ["kube-system", sidegate_mesh::resource::SYSTEM_NAMESPACE];

/// What a namespace says about the pods in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamespaceFacts {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
}

impl NamespaceFacts {
    /// Whether its pods are to be injected.
    pub fn is_labelled(&self) -> bool {
        let exempt = EXEMPT_NAMESPACES.contains(&self.name.as_str());
        !exempt && self.labels.get(annotations::INJECT).map(String::as_str) == Some("enabled")
    }
}

/// What becomes of a pod that is admitted.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// It gets a sidecar by this patch, or the one that it has is brought up to date.
    Patched(Patch),
    /// It has one already, or asks for none.
    Unchanged,
    /// It cannot have one; the patch, which may be empty, writes the reason down.
    Skipped {
        /// Why.
        reason: &'static str,
        /// The annotation that says so.
        patch: Patch,
    },
}

/// 32 bytes that nobody can guess, for the secret of a pod's probes; `None` when the system has
/// none.
pub fn system_random() -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    aws_lc_rs::rand::fill(&mut bytes).ok()?;
    Some(bytes)
}

/// What becomes of `pod`, made in `namespace`.
///
/// # Errors
///
/// [`Refusal`] when an annotation is wrong, or the pod takes what is the sidecar's.
pub fn inject(
    pod: &Value,
    namespace: &NamespaceFacts,
    settings: &Settings,
) -> Result<Outcome, Refusal> {
    inject_with(pod, namespace, settings, &system_random)
}

/// As [`inject`], with the secret's bytes from `random`, which is asked at most once, and only
/// for a pod that needs a new secret.
///
/// # Errors
///
/// As [`inject`].
pub fn inject_with(
    pod: &Value,
    namespace: &NamespaceFacts,
    settings: &Settings,
    random: &dyn Fn() -> Option<[u8; 32]>,
) -> Result<Outcome, Refusal> {
    let pod = Pod::read(pod)?;
    if !namespace.is_labelled() || !annotations::wants_injection(&pod)? {
        return Ok(Outcome::Unchanged);
    }
    if let Some(reason) = impossible(&pod) {
        return skip(&pod, reason);
    }
    refuse_pod_security(namespace)?;
    let options = Options::read(&pod, namespace, settings)?;
    let existing = Existing::read(&pod)?;
    reserved::check(&pod)?;
    let probes = Probes::read(&pod, &existing, random)?;
    let sidecar = Sidecar {
        pod: &pod,
        namespace,
        settings,
        options: &options,
        probes: &probes,
    };
    let mut edits = Edits::default();
    probes.redirect(&mut edits);
    existing.bring_up_to_date(&sidecar, &mut edits)?;
    mark(&pod, &probes, &mut edits);
    Ok(match edits.into_patch() {
        None => Outcome::Unchanged,
        Some(patch) => Outcome::Patched(patch),
    })
}

/// Why a pod cannot have a sidecar, whatever it asks for.
fn impossible(pod: &Pod<'_>) -> Option<&'static str> {
    let os = pod.spec.get("os").and_then(|os| os.get("name"));
    if pod.annotation("kubernetes.io/config.mirror").is_some() {
        Some("static pods are made by the node")
    } else if pod.flag("hostNetwork") {
        Some("hostNetwork: the pod uses the node's network")
    } else if os.and_then(Value::as_str) == Some("windows") {
        Some("the pod runs on Windows")
    } else {
        None
    }
}

/// Admits a pod without a sidecar. It must not look like one with: a mark or a container of ours
/// would be believed by whoever counts meshed pods.
fn skip(pod: &Pod<'_>, reason: &'static str) -> Result<Outcome, Refusal> {
    if let Some(name) = reserved::names_of_ours(pod).next() {
        return Err(Refusal::Taken {
            what: format!("the name {name}"),
            help: "rename it: a pod without a sidecar must not look like one with",
        });
    }
    let mut edits = Edits::default();
    // The object of a static pod says what runs on the node; a mark would change nothing there.
    if pod.annotation("kubernetes.io/config.mirror").is_none() {
        edits.annotate(pod, annotations::SKIPPED, Some(reason));
        edits.annotate(pod, annotations::INJECTED, None);
    }
    let patch = edits.into_patch().unwrap_or_default();
    Ok(Outcome::Skipped { reason, patch })
}

fn refuse_pod_security(namespace: &NamespaceFacts) -> Result<(), Refusal> {
    let level = namespace.labels.get("pod-security.kubernetes.io/enforce");
    match level.map(String::as_str) {
        Some(level @ ("baseline" | "restricted")) => Err(Refusal::PodSecurity {
            namespace: namespace.name.clone(),
            level: level.to_owned(),
        }),
        _ => Ok(()),
    }
}

/// Marks the pod, and keeps what its probes were.
fn mark(pod: &Pod<'_>, probes: &Probes<'_>, edits: &mut Edits) {
    let originals = probes.originals();
    edits.annotate(pod, annotations::INJECTED, Some(env!("CARGO_PKG_VERSION")));
    edits.annotate(pod, annotations::PROBES, originals.as_deref());
    edits.annotate(pod, annotations::SKIPPED, None);
}
