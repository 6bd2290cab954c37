//! Writes notes as events of the cluster.
//!
//! Invariants: only the leader writes; the rate is bounded; an event's name follows from what it
//! says of what, so that what is said again, also by a later leader, is one event.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, ObjectMeta, PostParams};

use crate::index::Note;
use crate::shared::Shared;

/// How often it is looked what has to be written.
const TICK: Duration = Duration::from_millis(200);
/// Longest note, in bytes; the API server refuses more than 1 KiB.
const NOTE_BYTES_MAX: usize = 1_000;
/// Longest part of a name that is an object's name.
const NAME_BYTES_MAX: usize = 200;

/// Writes what has to be written, until it is dropped.
pub(crate) async fn run(shared: Arc<Shared>, client: Client, instance: String) {
    shared.synced.all().await;
    let each = Duration::from_secs(1) / shared.config.limits.events_per_second.max(1);
    loop {
        shared.clock.sleep(TICK).await;
        let notes = shared.hub.change(|index| index.take_notes(64));
        for note in notes {
            let now = shared.clock.now();
            if shared.leadership.borrow().leads(now).is_none() {
                // A new leader notes everything again.
                continue;
            }
            let api: Api<Event> = Api::namespaced(client.clone(), &note.about.namespace);
            let event = event(&note, &instance, Timestamp::try_from(now).ok());
            match api.create(&PostParams::default(), &event).await {
                Ok(_) => shared.metrics.event_written("written"),
                Err(kube::Error::Api(status)) if status.code == 409 => {
                    shared.metrics.event_written("known");
                }
                Err(error) => {
                    shared.metrics.event_written("failed");
                    tracing::debug!(error = %error, "event not written");
                }
            }
            shared.clock.sleep(each).await;
        }
    }
}

fn event(note: &Note, instance: &str, now: Option<Timestamp>) -> Event {
    let about = &note.about;
    let mut hash = DefaultHasher::new();
    (&about.uid, note.remark.reason, &note.remark.message).hash(&mut hash);
    let name = cut(&about.name, NAME_BYTES_MAX).trim_end_matches(['.', '-']);
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{name}.{:016x}", hash.finish())),
            namespace: Some(about.namespace.clone()),
            ..Default::default()
        },
        type_: Some("Warning".to_owned()),
        reason: Some(note.remark.reason.to_owned()),
        note: Some(cut(&note.remark.message, NOTE_BYTES_MAX).to_owned()),
        action: Some("Observe".to_owned()),
        reporting_controller: Some("sidegate.dev/controller".to_owned()),
        reporting_instance: Some(cut(instance, 128).to_owned()),
        event_time: now.map(MicroTime),
        regarding: Some(ObjectReference {
            api_version: Some(about.api_version.to_owned()),
            kind: Some(about.kind.to_owned()),
            namespace: Some(about.namespace.clone()),
            name: Some(about.name.clone()),
            uid: Some(about.uid.clone()),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn cut(text: &str, max: usize) -> &str {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default()
}
