//! The resources that the controller has sent.
//!
//! Invariants: a resource is known by what the reference beside it says, its UID included, so that
//! one that is made anew inherits nothing; their number and their bytes are bounded.

use std::collections::{BTreeMap, BTreeSet};

use sidegate_api::control as proto;
use sidegate_mesh::resource::{Kind, SYSTEM_NAMESPACE, parse_value};
use sidegate_mesh::yaml::from_json;
use sidegate_mesh::{Problem, Resource};

use crate::source::Texts;

/// Most bytes of all resources together.
const BYTES_MAX: usize = 64 * 1024 * 1024;
/// Longest reason of a refusal that is reported.
const REFUSAL_BYTES_MAX: usize = 2048;

/// What no two resources share.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(
    clippy::struct_field_names,
    reason = "a name is what Kubernetes calls it"
)]
pub(super) struct Name {
    pub(super) kind: String,
    namespace: String,
    name: String,
}

/// One resource as it came.
#[derive(Clone, Debug)]
struct Item {
    uid: String,
    generation: i64,
    /// As the store reads it, or why it can't be read.
    text: Result<String, String>,
}

/// Every resource that the controller has sent and not withdrawn.
#[derive(Clone, Debug, Default)]
pub(super) struct Held {
    items: BTreeMap<Name, Item>,
    /// Names under which another resource was before.
    renewed: BTreeSet<Name>,
    bytes: usize,
}

/// The controller sends more than is taken.
#[derive(Debug, thiserror::Error)]
#[error("more resources than {count} (`limits.resourcesMax`) or {BYTES_MAX} bytes")]
pub(super) struct TooMuch {
    count: usize,
}

impl Held {
    /// Takes a new or changed resource; returns what it is called.
    ///
    /// # Errors
    ///
    /// [`TooMuch`]; nothing is taken then.
    pub(super) fn update(
        &mut self,
        resource: proto::Resource,
        bounds: &Bounds,
    ) -> Result<Name, TooMuch> {
        let reference = resource.reference.unwrap_or_default();
        let name = Name::of(&reference);
        let text = text_of(&name, &resource.json, bounds.resource_bytes);
        let item = Item {
            uid: reference.uid,
            generation: resource.generation,
            text,
        };
        let before = self.items.get(&name).map_or(0, Item::bytes);
        let bytes = self.bytes - before + item.bytes();
        let is_one_more = !self.items.contains_key(&name);
        if bytes > BYTES_MAX || (is_one_more && self.items.len() >= bounds.resources) {
            return Err(TooMuch {
                count: bounds.resources,
            });
        }
        self.bytes = bytes;
        let uid = item.uid.clone();
        let before = self.items.insert(name.clone(), item);
        if before.is_some_and(|before| before.uid != uid) {
            self.renewed.insert(name.clone());
        }
        Ok(name)
    }

    /// Forgets a resource; false when it is not there, or another one of the same name is.
    pub(super) fn remove(&mut self, reference: &proto::ResourceReference) -> bool {
        let name = Name::of(reference);
        let is_it = |item: &Item| reference.uid.is_empty() || item.uid == reference.uid;
        if !self.items.get(&name).is_some_and(is_it) {
            return false;
        }
        self.forget(&name)
    }

    /// Forgets what has this name.
    pub(super) fn forget(&mut self, name: &Name) -> bool {
        let removed = self.items.remove(name);
        self.bytes -= removed.as_ref().map_or(0, Item::bytes);
        removed.is_some()
    }

    /// Every name.
    pub(super) fn names(&self) -> impl Iterator<Item = &Name> {
        self.items.keys()
    }

    /// Takes from `other` the traffic policies that are missing here; returns their names.
    pub(super) fn keep_traffic(&mut self, other: &Self) -> Vec<Name> {
        let mut kept = Vec::new();
        for (name, item) in &other.items {
            let is_traffic = name.kind == Kind::TrafficPolicy.as_str();
            if is_traffic && !self.items.contains_key(name) {
                self.bytes += item.bytes();
                self.items.insert(name.clone(), item.clone());
                kept.push(name.clone());
            }
        }
        kept
    }

    /// All of them, as the store takes them.
    pub(super) fn texts(&self) -> Texts {
        let text = |(name, item): (&Name, &Item)| (item.place(name), item.text.clone());
        self.items.iter().map(text).collect()
    }

    /// Those that bear the name of another one that was there when this was asked last; without
    /// them, all of them. Nothing when there are none such.
    pub(super) fn texts_without_renewed(&mut self) -> Option<Texts> {
        let renewed = std::mem::take(&mut self.renewed);
        let kept = self
            .items
            .iter()
            .filter(|(name, _)| !renewed.contains(*name));
        let text = |(name, item): (&Name, &Item)| (item.place(name), item.text.clone());
        (!renewed.is_empty()).then(|| kept.map(text).collect())
    }

    /// Takes note of what bears the name of another one in `before`.
    pub(super) fn renew(&mut self, before: &Self) {
        let other = |(name, item): &(&Name, &Item)| {
            let earlier = before.items.get(*name);
            earlier.is_some_and(|earlier| earlier.uid != item.uid)
        };
        let renewed = self.items.iter().filter(other);
        self.renewed = renewed.map(|(name, _)| name.clone()).collect();
    }

    /// What became of a resource.
    pub(super) fn acknowledge(
        &self,
        name: &Name,
        problems: &[Problem],
    ) -> Option<proto::Acknowledge> {
        let item = self.items.get(name)?;
        let place = item.place(name);
        let faults = problems
            .iter()
            .filter(|problem| problem.is_error() && problem.file == place);
        let refusal: Vec<String> = faults.map(Problem::sentence).collect();
        Some(proto::Acknowledge {
            uid: item.uid.clone(),
            generation: item.generation,
            refusal: cut(refusal.join("\n"), REFUSAL_BYTES_MAX),
        })
    }
}

/// How much is taken.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) resources: usize,
    pub(super) resource_bytes: usize,
}

impl Name {
    fn of(reference: &proto::ResourceReference) -> Self {
        Self {
            kind: reference.kind.clone(),
            namespace: reference.namespace.clone(),
            name: reference.name.clone(),
        }
    }

    fn is(&self, resource: &Resource) -> bool {
        let metadata = resource.metadata();
        self.kind == resource.kind().as_str()
            && self.namespace == metadata.namespace
            && self.name == metadata.name
    }
}

impl Item {
    /// Where messages say that it comes from.
    fn place(&self, name: &Name) -> String {
        let Name {
            kind,
            namespace,
            name,
        } = name;
        format!("{kind} {namespace}/{name} ({})", self.uid)
    }

    fn bytes(&self) -> usize {
        let (Ok(text) | Err(text)) = &self.text;
        text.len() + self.uid.len()
    }
}

/// The text that the store reads: YAML, of which JSON is a part but for some characters.
fn text_of(name: &Name, json: &[u8], bytes_max: usize) -> Result<String, String> {
    if json.len() > bytes_max {
        return Err(format!("larger than {bytes_max} bytes"));
    }
    let mut value: serde_json::Value =
        serde_json::from_slice(json).map_err(|error| format!("not JSON: {error}"))?;
    if let Ok(resource) = parse_value(&value) {
        if !name.is(&resource) {
            return Err(format!(
                "it is {}, not what its reference says",
                resource.key()
            ));
        }
        if name.namespace == SYSTEM_NAMESPACE {
            // The controller knows the labels of namespaces and has selected already; one that
            // can't be read stays in its place and is refused.
            let spec = value.get_mut("spec").and_then(|spec| spec.as_object_mut());
            drop(spec.map(|spec| spec.remove("namespaceSelector")));
        }
    }
    Ok(from_json(&value.to_string()))
}

fn cut(mut text: String, bytes_max: usize) -> String {
    text.truncate(text.floor_char_boundary(bytes_max));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds {
        resources: 2,
        resource_bytes: 4096,
    };

    fn resource(namespace: &str, name: &str, uid: &str, spec: &str) -> proto::Resource {
        let json = format!(
            r#"{{"apiVersion":"sidegate.dev/v1alpha1","kind":"AuthorizationPolicy",
            "metadata":{{"namespace":"{namespace}","name":"{name}"}},"spec":{spec}}}"#
        );
        proto::Resource {
            reference: Some(reference(namespace, name, uid)),
            generation: 1,
            json: json.into_bytes(),
        }
    }

    fn reference(namespace: &str, name: &str, uid: &str) -> proto::ResourceReference {
        proto::ResourceReference {
            kind: "AuthorizationPolicy".into(),
            namespace: namespace.into(),
            name: name.into(),
            uid: uid.into(),
        }
    }

    const SPEC: &str = r#"{"selector":{},"action":"Deny","rules":[{"from":[{"anyone":{}}],
        "to":[{"http":{"methods":["*"],"paths":["/**"]}}]}]}"#;

    fn only(held: &Held) -> Result<String, String> {
        held.texts().pop().unwrap().1
    }

    #[test]
    fn a_selected_policy_loses_the_selector_that_only_the_controller_can_read() {
        let spec = SPEC.replace(
            r#"{"selector""#,
            r#"{"namespaceSelector":{"matchLabels":{"team":"a"}},"selector""#,
        );
        let mut held = Held::default();
        held.update(resource("sidegate-system", "a", "1", &spec), &BOUNDS)
            .unwrap();
        assert!(!only(&held).unwrap().contains("namespaceSelector"));
        let misspelt = spec.replace("matchLabels", "matchLabel");
        held.update(resource("sidegate-system", "a", "1", &misspelt), &BOUNDS)
            .unwrap();
        assert!(
            only(&held).unwrap().contains("namespaceSelector"),
            "it is to be refused"
        );
    }

    #[test]
    fn a_removal_of_the_one_before_leaves_the_one_of_the_same_name() {
        let mut held = Held::default();
        held.update(resource("shop", "a", "1", SPEC), &BOUNDS)
            .unwrap();
        held.update(resource("shop", "a", "2", SPEC), &BOUNDS)
            .unwrap();
        assert!(!held.remove(&reference("shop", "a", "1")));
        assert_eq!(held.names().count(), 1);
        assert!(held.remove(&reference("shop", "a", "2")));
        assert_eq!((held.names().count(), held.bytes), (0, 0));
    }

    #[test]
    fn what_is_too_much_is_not_taken() {
        let mut held = Held::default();
        for name in ["a", "b", "a"] {
            held.update(resource("shop", name, "1", SPEC), &BOUNDS)
                .unwrap();
        }
        assert!(
            held.update(resource("shop", "c", "1", SPEC), &BOUNDS)
                .is_err()
        );
        let large = SPEC.replace("/**", &"/x".repeat(3000));
        held.update(resource("shop", "a", "1", &large), &BOUNDS)
            .unwrap();
        let texts = held.texts();
        assert_eq!(texts[0].1.as_ref().unwrap_err(), "larger than 4096 bytes");
    }

    #[test]
    fn an_object_under_another_name_is_refused() {
        let mut held = Held::default();
        let mut other = resource("shop", "a", "1", SPEC);
        other.reference = Some(reference("shop", "b", "1"));
        held.update(other, &BOUNDS).unwrap();
        let reason = only(&held).unwrap_err();
        assert!(reason.contains("AuthorizationPolicy shop/a"), "{reason}");
    }
}
