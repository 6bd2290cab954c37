//! Where the pods are in what people write: deployments, cron jobs, lists.
//!
//! Invariant: a kind that makes no pods has no template, whatever its spec looks like.

use serde_json::Value;

/// A kind that makes pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A pod itself.
    Pod,
    /// Its pods' template is `spec.template`.
    Template,
    /// Its pods' template is `spec.jobTemplate.spec.template`.
    CronJob,
}

impl Kind {
    /// The kind of a document; `None` when it makes no pods.
    fn of(document: &Value) -> Option<Self> {
        let text = |field: &str| document.get(field).and_then(Value::as_str);
        match (text("apiVersion")?, text("kind")?) {
            ("v1", "Pod") => Some(Self::Pod),
            ("v1", "ReplicationController")
            | ("apps/v1", "Deployment" | "ReplicaSet" | "StatefulSet" | "DaemonSet")
            | ("batch/v1", "Job") => Some(Self::Template),
            ("batch/v1", "CronJob") => Some(Self::CronJob),
            _ => None,
        }
    }

    /// JSON Pointer from the document to its pod or template.
    fn pointer(self) -> &'static str {
        match self {
            Self::Pod => "",
            Self::Template => "/spec/template",
            Self::CronJob => "/spec/jobTemplate/spec/template",
        }
    }
}

/// What is called with each workload.
pub type Visit<'a, E> = dyn FnMut(&Workload, &mut Value) -> Result<(), E> + 'a;

/// Deepest list within lists.
const DEPTH_MAX: usize = 8;

/// Calls `visit` with each workload of a document, those in lists included, and its pod or
/// template.
///
/// # Errors
///
/// The first error of `visit`.
pub fn templates<E>(document: &mut Value, visit: &mut Visit<'_, E>) -> Result<(), E> {
    visit_within(document, DEPTH_MAX, visit)
}

/// Which workload a template belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Its kind, as written.
    pub kind: String,
    /// Its name; empty when it has none.
    pub name: String,
    /// Its namespace, when it says one.
    pub namespace: Option<String>,
}

fn visit_within<E>(document: &mut Value, depth: usize, visit: &mut Visit<'_, E>) -> Result<(), E> {
    let is_list = document.get("kind").and_then(Value::as_str) == Some("List");
    if let (true, Some(Value::Array(items))) = (is_list && depth > 0, document.get_mut("items")) {
        for item in items {
            visit_within(item, depth - 1, visit)?;
        }
        return Ok(());
    }
    let Some(kind) = Kind::of(document) else {
        return Ok(());
    };
    let metadata = |field: &str| {
        let value = document
            .get("metadata")
            .and_then(|metadata| metadata.get(field));
        value.and_then(Value::as_str).map(str::to_owned)
    };
    let workload = Workload {
        kind: document
            .get("kind")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned(),
        name: metadata("name")
            .or_else(|| metadata("generateName"))
            .unwrap_or_default(),
        namespace: metadata("namespace").filter(|namespace| !namespace.is_empty()),
    };
    match document.pointer_mut(kind.pointer()) {
        Some(template) => visit(&workload, template),
        None => Ok(()),
    }
}
