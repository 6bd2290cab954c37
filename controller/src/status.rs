//! Writes the status of our resources.
//!
//! Invariants: only the leader writes, and only while it is one by its own clock; each write names
//! the version of the object that it was made from, so that a word of an earlier leader, or about an
//! earlier version, is refused by the API server; one resource is written at most once an interval.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::{StreamExt as _, stream};
use kube::Client;
use kube::api::{Api, ApiResource, DynamicObject, Patch, PatchParams};
use serde_json::{Value, json};
use sidegate_mesh::resource::{API_VERSION, Kind, ResourceKey};

use crate::crd;
use crate::index::{Accepted, Report};
use crate::shared::Shared;

/// How long a new leader listens to the other replicas before it writes.
const SETTLE: Duration = Duration::from_secs(2);
/// How often it is looked what has to be written.
const TICK: Duration = Duration::from_millis(100);
/// Shortest time between two looks at one resource of which nothing had to be written.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// Resources that are looked at together.
const BATCH: usize = 512;
/// Writes in flight.
const WRITES_MAX: usize = 8;

/// See the module.
pub(crate) struct Writer {
    shared: Arc<Shared>,
    client: Client,
    /// When each may be looked at again.
    resting: BTreeMap<ResourceKey, SystemTime>,
    /// Looked at too early.
    waiting: BTreeSet<ResourceKey>,
    /// Since when this replica is the leader.
    leads_since: Option<SystemTime>,
}

impl Writer {
    pub(crate) fn new(shared: Arc<Shared>, client: Client) -> Self {
        Self {
            shared,
            client,
            resting: BTreeMap::new(),
            waiting: BTreeSet::new(),
            leads_since: None,
        }
    }

    /// Writes what has to be written, until it is dropped.
    pub(crate) async fn run(mut self) {
        self.shared.synced.all().await;
        loop {
            let tick = self.shared.clock.sleep(TICK);
            tick.await;
            self.step().await;
        }
    }

    async fn step(&mut self) {
        let now = self.shared.clock.now();
        let leads = self.shared.leadership.borrow().leads(now).is_some();
        self.shared.metrics.leader.set(i64::from(leads));
        if !leads {
            self.leads_since = None;
            self.waiting.clear();
            return;
        }
        let since = *self.leads_since.get_or_insert_with(|| {
            self.shared.hub.change(|index| {
                index.report_everything();
                index.note_everything();
                index.acknowledgements_told();
            });
            now
        });
        if now.duration_since(since).unwrap_or_default() < SETTLE {
            return;
        }
        self.resting.retain(|_, until| now < *until);
        let keys = self.shared.hub.change(|index| index.take_unreported(BATCH));
        self.waiting.extend(keys);
        let due: Vec<ResourceKey> = self
            .waiting
            .iter()
            .filter(|key| !self.resting.contains_key(key))
            .cloned()
            .collect();
        for key in &due {
            self.waiting.remove(key);
        }
        let this = &*self;
        let writes = stream::iter(due).map(|key| this.write(key));
        let looked: Vec<(ResourceKey, Duration)> =
            writes.buffer_unordered(WRITES_MAX).collect().await;
        let until = looked.into_iter().map(|(key, rest)| (key, now + rest));
        self.resting.extend(until);
    }

    /// Returns how long the resource rests then.
    async fn write(&self, key: ResourceKey) -> (ResourceKey, Duration) {
        let interval = self.shared.config.status_interval;
        let Some(report) = self.shared.hub.look(|index| index.report(&key)) else {
            return (key, Duration::ZERO);
        };
        let now = self.shared.clock.now();
        let status = document(&report, now);
        let now = self.shared.clock.now();
        // Compiling took its time; a leader that was stopped meanwhile may be none any more.
        let leads = self.shared.leadership.borrow().leads(now).is_some();
        if status == report.status || !leads {
            return (key, LOOK_INTERVAL.min(interval));
        }
        let patch = json!({
            "metadata": { "uid": report.uid, "resourceVersion": report.resource_version },
            "status": status,
        });
        let api = self.api(&key);
        let (parameters, patch) = (PatchParams::default(), Patch::Merge(&patch));
        match api.patch_status(&key.name, &parameters, &patch).await {
            Ok(_) => self.shared.metrics.status_written("written"),
            Err(kube::Error::Api(status)) if status.code == 404 => {
                self.shared.metrics.status_written("gone");
            }
            Err(kube::Error::Api(status)) if status.code == 409 => {
                // The watch brings the newer version, and with it another look.
                self.shared.metrics.status_written("stale");
            }
            Err(error) => {
                self.shared.metrics.status_written("failed");
                tracing::warn!(resource = %key, error = %error, "status not written");
                self.shared.hub.change(|index| index.report_again(&key));
            }
        }
        (key, interval)
    }

    fn api(&self, key: &ResourceKey) -> Api<DynamicObject> {
        let resource = ApiResource {
            group: crd::GROUP.to_owned(),
            version: crd::VERSION.to_owned(),
            api_version: API_VERSION.to_owned(),
            kind: key.kind.as_str().to_owned(),
            plural: crd::plural(key.kind).to_owned(),
        };
        Api::namespaced_with(self.client.clone(), &key.namespace, &resource)
    }
}

/// The status that a report means. Conditions that say the same keep their time.
fn document(report: &Report, now: SystemTime) -> Value {
    let counts = format!("{} of {}", report.live, report.selected);
    let conditions = [accepted(report), live(report, &counts)];
    let conditions = conditions.map(|condition| condition.document(report, now));
    json!({
        "observedGeneration": report.generation,
        "live": counts,
        "sidecars": {
            "selected": report.selected,
            "live": report.live,
            "refused": report.refused,
        },
        "conditions": conditions,
    })
}

struct Condition {
    name: &'static str,
    is_true: bool,
    reason: &'static str,
    message: String,
}

fn accepted(report: &Report) -> Condition {
    let (is_true, reason, message) = match &report.accepted {
        Accepted::No { reason, message } => (false, *reason, message.clone()),
        Accepted::Yes(_) => match report.warnings() {
            warnings if warnings.is_empty() => (true, "Accepted", String::new()),
            warnings => (true, "AcceptedWithWarnings", warnings.join("; ")),
        },
    };
    Condition {
        name: "Accepted",
        is_true,
        reason,
        message,
    }
}

fn live(report: &Report, counts: &str) -> Condition {
    let nobody = match report.key.kind {
        Kind::AuthorizationPolicy => "it selects no sidecar",
        // A sidecar gets to know a service when its workload calls it.
        Kind::StaticService | Kind::TrafficPolicy => "no sidecar has called this service yet",
    };
    let (is_true, reason, message) = if matches!(report.accepted, Accepted::No { .. }) {
        (
            false,
            "NotAccepted",
            format!("{counts}: this generation is not accepted"),
        )
    } else if report.selected == 0 {
        (true, "NoSidecars", format!("{counts}: {nobody}"))
    } else if report.live == report.selected {
        (true, "Live", counts.to_owned())
    } else if let Some(refusal) = &report.refusal {
        (false, "Refused", format!("{counts}: {refusal}"))
    } else {
        (
            false,
            "Pending",
            format!("{counts} sidecars have put it to use"),
        )
    };
    Condition {
        name: "Live",
        is_true,
        reason,
        message,
    }
}

impl Condition {
    fn document(self, report: &Report, now: SystemTime) -> Value {
        let status = if self.is_true { "True" } else { "False" };
        let before = report.status.get("conditions").and_then(Value::as_array);
        let before = before
            .into_iter()
            .flatten()
            .find(|one| one["type"] == self.name);
        let since = before.filter(|one| one["status"] == status);
        let since = since.and_then(|one| one["lastTransitionTime"].as_str());
        let since = since.map_or_else(
            || humantime::format_rfc3339_seconds(now).to_string(),
            str::to_owned,
        );
        json!({
            "type": self.name,
            "status": status,
            "reason": self.reason,
            "message": self.message,
            "observedGeneration": report.generation,
            "lastTransitionTime": since,
        })
    }
}
