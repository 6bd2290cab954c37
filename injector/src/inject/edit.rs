//! The JSON Patch, operation by operation.
//!
//! Invariant: the operations apply to the pod that they were made for, in their order.

use json_patch::jsonptr::{PointerBuf, Token};
use json_patch::{AddOperation, Patch, PatchOperation, RemoveOperation, ReplaceOperation};
use serde_json::{Value, json};

use super::pod::Pod;

/// The operations so far.
#[derive(Default)]
pub(super) struct Edits {
    operations: Vec<PatchOperation>,
    /// Whether an operation has made `metadata.annotations`.
    has_made_annotations: bool,
}

/// A step of a path: a key, or a place in a list.
pub(super) enum Step<'a> {
    Key(&'a str),
    At(usize),
    /// Behind the last entry of a list.
    End,
}

impl<'a> From<&'a str> for Step<'a> {
    fn from(key: &'a str) -> Self {
        Self::Key(key)
    }
}

impl From<usize> for Step<'_> {
    fn from(index: usize) -> Self {
        Self::At(index)
    }
}

impl Edits {
    /// Adds a member, or an entry before the one at the place.
    pub(super) fn add(&mut self, path: &[Step<'_>], value: Value) {
        let path = pointer(path);
        self.operations
            .push(PatchOperation::Add(AddOperation { path, value }));
    }

    /// Replaces what is there.
    pub(super) fn replace(&mut self, path: &[Step<'_>], value: Value) {
        let path = pointer(path);
        self.operations
            .push(PatchOperation::Replace(ReplaceOperation { path, value }));
    }

    /// Removes what is there.
    pub(super) fn remove(&mut self, path: &[Step<'_>]) {
        let path = pointer(path);
        self.operations
            .push(PatchOperation::Remove(RemoveOperation { path }));
    }

    /// Makes an annotation have this value, or be absent. Each key at most once a pod.
    pub(super) fn annotate(&mut self, pod: &Pod<'_>, key: &str, value: Option<&str>) {
        let present = pod.annotations().any(|(present, _)| present == key);
        let path = ["metadata".into(), "annotations".into(), key.into()];
        match value {
            Some(value) if pod.annotation(key) == Some(value) => {}
            Some(value) => {
                self.make_annotations(pod);
                self.add(&path, value.into());
            }
            None if present => self.remove(&path),
            None => {}
        }
    }

    fn make_annotations(&mut self, pod: &Pod<'_>) {
        if pod.has_annotations() || self.has_made_annotations {
            return;
        }
        self.has_made_annotations = true;
        match pod.metadata {
            Some(_) => self.add(&["metadata".into(), "annotations".into()], json!({})),
            None => self.add(&["metadata".into()], json!({ "annotations": {} })),
        }
    }

    /// The patch; `None` when there is nothing to do.
    pub(super) fn into_patch(self) -> Option<Patch> {
        (!self.operations.is_empty()).then_some(Patch(self.operations))
    }
}

fn pointer(path: &[Step<'_>]) -> PointerBuf {
    let token = |step: &Step<'_>| match step {
        Step::Key(key) => Token::new(*key).into_owned(),
        Step::At(index) => Token::from(*index),
        Step::End => Token::new("-").into_owned(),
    };
    PointerBuf::from_tokens(path.iter().map(token))
}
