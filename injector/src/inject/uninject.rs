//! The way back: from an injected pod to what it was.
//!
//! Invariant: it removes what bears our names and restores what the annotation says that the
//! probes were; it never guesses.

use serde_json::Value;

use super::annotations;
use super::edit::Edits;
use super::pod::{List, Pod};
use super::{Outcome, Refusal, probes, reserved};

/// Takes the sidecar out of a pod, and gives its probes back.
///
/// # Errors
///
/// [`Refusal`] when it is not a pod, or a redirected probe's origin is lost.
pub fn uninject(pod: &Value) -> Result<Outcome, Refusal> {
    let pod = Pod::read(pod)?;
    let mut edits = Edits::default();
    probes::restore(&pod, &mut edits)?;
    remove_containers(&pod, &mut edits);
    remove_volumes(&pod, &mut edits);
    remove_marks(&pod, &mut edits);
    Ok(edits
        .into_patch()
        .map_or(Outcome::Unchanged, Outcome::Patched))
}

fn remove_containers(pod: &Pod<'_>, edits: &mut Edits) {
    let all = pod.list(List::Init).count();
    let ours = pod
        .list(List::Init)
        .filter(|container| reserved::is_our_container(container.name));
    let ours: Vec<usize> = ours.map(|container| container.index).collect();
    remove_entries("initContainers", &ours, all, edits);
}

fn remove_volumes(pod: &Pod<'_>, edits: &mut Edits) {
    let all = pod.volumes.as_ref().map_or(0, Vec::len);
    let names = pod.volumes.iter().flatten().enumerate();
    let ours = names.filter(|(_, volume)| {
        let name = volume.get("name").and_then(Value::as_str);
        name.is_some_and(reserved::is_our_volume)
    });
    let ours: Vec<usize> = ours.map(|(index, _)| index).collect();
    remove_entries("volumes", &ours, all, edits);
}

/// Removes the entries at these places, ascending; the whole list when nothing else is in it.
fn remove_entries(field: &str, places: &[usize], all: usize, edits: &mut Edits) {
    if places.is_empty() {
        return;
    }
    if places.len() == all {
        edits.remove(&["spec".into(), field.into()]);
        return;
    }
    for place in places.iter().rev() {
        edits.remove(&["spec".into(), field.into(), (*place).into()]);
    }
}

fn remove_marks(pod: &Pod<'_>, edits: &mut Edits) {
    let marks = [
        annotations::INJECTED,
        annotations::PROBES,
        annotations::SKIPPED,
    ];
    let present = |key: &str| pod.annotations().any(|(present, _)| present == key);
    let others = pod
        .annotations()
        .filter(|(key, _)| !marks.contains(key))
        .count();
    if others == 0 && marks.iter().any(|mark| present(mark)) {
        edits.remove(&["metadata".into(), "annotations".into()]);
        return;
    }
    for mark in marks {
        edits.annotate(pod, mark, None);
    }
}
