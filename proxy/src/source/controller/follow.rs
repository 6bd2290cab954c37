//! One stream of the controller, message by message.
//!
//! Invariant: what a new stream says of policies counts from the moment on in which it is complete,
//! all of it at once; what it says of destinations counts at once, since each message holds all that
//! is known of one.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use sidegate_api::control as proto;
use sidegate_mesh::{Enforcement, Problem, ServiceName, Traffic, Workload};
use sidegate_mtls::Peer;
use tonic::Streaming;
use tracing::{debug, info, warn};

use super::answer::answer;
use super::held::{Bounds, Held, Name};
use super::outbox::Outbox;
use super::{ControllerSource, Ended};

/// Longest wait for everything that selects this sidecar.
const COMPLETE_TIMEOUT: Duration = Duration::from_mins(1);
/// How often unused destinations are looked for.
const SWEEP: Duration = Duration::from_secs(10);
/// The share of a connection's life before its certificate's end in which a new one is made.
const RENEWAL_SHARE: u32 = 10;

/// What the controllers have said so far.
#[derive(Debug, Default)]
pub(super) struct Known {
    held: Held,
    facts: Option<Facts>,
    /// Traffic policies of before that this stream may yet confirm.
    unconfirmed: BTreeSet<Name>,
}

/// What changes about the own pod while it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Facts {
    labels: BTreeMap<String, String>,
    enforcement: Enforcement,
}

/// What one stream has said, until it is complete.
struct Sync {
    /// `None` once it counts.
    staged: Option<Staged>,
    /// Destinations of which this stream has said nothing yet.
    unanswered: BTreeSet<SocketAddr>,
}

#[derive(Default)]
struct Staged {
    held: Held,
    facts: Option<Facts>,
}

/// What a message changed.
#[derive(Default)]
struct Changes {
    touched: BTreeSet<Name>,
    any: bool,
}

impl ControllerSource {
    /// Follows one stream to its end; returns why it ended.
    pub(super) async fn follow(
        &mut self,
        mut messages: Streaming<proto::WatchResponse>,
        outbox: &Outbox,
        peer: &Peer,
    ) -> Ended {
        self.shared.metrics.controller_connected.set(1);
        let clock = Arc::clone(&self.shared.clock);
        let begun = clock.now();
        let mut epochs = self.shared.credentials.subscribe();
        let mut incomplete = clock.sleep(COMPLETE_TIMEOUT);
        let mut renewal = clock.sleep_until(renewal_at(peer.not_after, begun));
        let mut sweep = clock.sleep(SWEEP);
        let mut sync = Sync {
            staged: Some(Staged::default()),
            unanswered: self.destinations.all(),
        };
        loop {
            tokio::select! {
                message = messages.message() => match message {
                    Ok(Some(message)) => {
                        if let Err(ended) = self.apply(message, &mut sync, outbox) {
                            return ended;
                        }
                    }
                    Ok(None) => return Ended::Closed,
                    Err(status) => return status.into(),
                },
                () = &mut incomplete, if sync.staged.is_some() => {
                    return Ended::Incomplete { after: COMPLETE_TIMEOUT };
                }
                () = &mut renewal => return Ended::CertificateEnds,
                Ok(()) = epochs.changed() => {
                    if let Some(distrusted) = self.distrusts(peer) {
                        return distrusted;
                    }
                }
                () = &mut sweep => {
                    // Not before: what an earlier controller said may be needed to go on.
                    if sync.staged.is_none() {
                        self.destinations.sweep();
                    }
                    sweep = clock.sleep(SWEEP);
                }
            }
        }
    }

    fn distrusts(&self, peer: &Peer) -> Option<Ended> {
        let credentials = self.shared.credentials.current()?;
        let trusted = credentials.still_trusts(peer);
        trusted.err().map(|error| Ended::Distrusted(error.code()))
    }

    fn apply(
        &mut self,
        message: proto::WatchResponse,
        sync: &mut Sync,
        outbox: &Outbox,
    ) -> Result<(), Ended> {
        let mut changes = Changes::default();
        self.take_resources(message.updated, &message.removed, sync, &mut changes)?;
        if let Some(workload) = message.workload {
            self.take_facts(workload, sync, &mut changes);
        }
        if message.complete {
            self.complete(sync, &mut changes);
        }
        for destination in &message.destinations {
            if let Ok(at) = destination.destination.parse() {
                sync.unanswered.remove(&at);
            }
        }
        self.confirm(sync, &mut changes);
        if sync.staged.is_none() && changes.any {
            let problems = self.publish();
            self.acknowledge(&changes.touched, &problems, outbox);
        }
        for destination in message.destinations {
            self.take_destination(destination);
        }
        Ok(())
    }

    fn take_resources(
        &mut self,
        updated: Vec<proto::Resource>,
        removed: &[proto::ResourceReference],
        sync: &mut Sync,
        changes: &mut Changes,
    ) -> Result<(), Ended> {
        let limits = &self.shared.config.limits;
        let bounds = Bounds {
            resources: limits.resources_max as usize,
            resource_bytes: limits.resource_file_bytes_max as usize,
        };
        let held = match &mut sync.staged {
            Some(staged) => &mut staged.held,
            None => &mut self.known.held,
        };
        for resource in updated {
            let name = held.update(resource, &bounds).inspect_err(|_| {
                self.shared.metrics.limit_refusals("resources").inc();
            })?;
            self.known.unconfirmed.remove(&name);
            changes.touched.insert(name);
            changes.any = true;
        }
        for reference in removed {
            changes.any |= held.remove(reference);
        }
        Ok(())
    }

    fn take_facts(&mut self, workload: proto::Workload, sync: &mut Sync, changes: &mut Changes) {
        if workload.terminating {
            self.announce_end();
        }
        let zone = Some(workload.zone).filter(|zone| !zone.is_empty());
        self.destinations.set_zone(zone.map(Into::into));
        let enforcement = self.shared.config.workload.enforcement;
        let facts = Facts {
            labels: workload.labels.into_iter().collect(),
            enforcement: enforcement.unwrap_or_else(|| enforcement_of(&workload.enforcement)),
        };
        if let Some(staged) = &mut sync.staged {
            staged.facts = Some(facts);
            return;
        }
        changes.any |= self.known.facts.as_ref() != Some(&facts);
        self.known.facts = Some(facts);
    }

    /// The pod is about to end: whoever calls had better go elsewhere.
    fn announce_end(&self) {
        if !self.shared.drain.is_asked_to_leave() {
            self.shared.drain.ask_to_leave();
            info!("the pod is being deleted, callers are sent elsewhere");
        }
    }

    /// Everything that selects this sidecar is here: it counts, if the pod's own facts, by which
    /// policies select, are here too.
    fn complete(&mut self, sync: &mut Sync, changes: &mut Changes) {
        let Some(staged) = sync.staged.take_if(|staged| staged.facts.is_some()) else {
            return;
        };
        let before = std::mem::replace(&mut self.known.held, staged.held);
        self.known.held.renew(&before);
        let kept = self.known.held.keep_traffic(&before);
        self.known.unconfirmed = kept.into_iter().collect();
        self.known.facts = staged.facts;
        self.said.clear();
        info!("the controller has said all that concerns this workload");
        changes.touched = self.known.held.names().cloned().collect();
        changes
            .touched
            .retain(|name| !self.known.unconfirmed.contains(name));
        changes.any = true;
    }

    /// Lets go of the traffic policies of before that nothing has confirmed, once the stream has
    /// said all that it was asked.
    fn confirm(&mut self, sync: &mut Sync, changes: &mut Changes) {
        if sync.staged.is_some() || self.known.unconfirmed.is_empty() {
            return;
        }
        let called = self.destinations.all();
        sync.unanswered.retain(|at| called.contains(at));
        if sync.unanswered.is_empty() {
            for name in std::mem::take(&mut self.known.unconfirmed) {
                changes.any |= self.known.held.forget(&name);
            }
        }
    }

    fn publish(&mut self) -> Vec<Problem> {
        if let Some(facts) = &self.known.facts {
            let workload = &self.publisher.workload;
            self.publisher.workload = Arc::new(Workload {
                labels: facts.labels.clone(),
                enforcement: facts.enforcement,
                ..Workload::clone(workload)
            });
        }
        // A last good version is that of the object itself, not of another of its name.
        if let Some(texts) = self.known.held.texts_without_renewed() {
            self.publisher.store.replace_files(&texts);
        }
        let problems = self.publisher.publish(&self.known.held.texts(), None);
        if let Some(snapshot) = self.shared.state.current() {
            let traffic = |name: &ServiceName| snapshot.routes.traffic(name);
            self.destinations.set_traffic(traffic);
        }
        problems
    }

    fn acknowledge(&self, touched: &BTreeSet<Name>, problems: &[Problem], outbox: &Outbox) {
        for name in touched {
            if let Some(acknowledge) = self.known.held.acknowledge(name, problems) {
                outbox.put(acknowledge);
            }
        }
    }

    fn take_destination(&self, destination: proto::Destination) {
        let Ok(at) = destination.destination.parse() else {
            debug!(destination = destination.destination, "destination ignored");
            return;
        };
        let answer = answer(at, destination.kind, |name| self.traffic(name));
        self.destinations.update(at, answer);
    }

    fn traffic(&self, name: &ServiceName) -> Arc<Traffic> {
        let snapshot = self.shared.state.current();
        snapshot.map_or_else(Arc::default, |snapshot| snapshot.routes.traffic(name))
    }
}

/// What is not known refuses.
fn enforcement_of(word: &str) -> Enforcement {
    match word {
        "audit" => Enforcement::Audit,
        "enforce" => Enforcement::Enforce,
        _ => {
            warn!(word, "enforcement unknown, refusals refuse");
            Enforcement::Enforce
        }
    }
}

/// When a new connection is made, so that no certificate ends on one that is in use.
fn renewal_at(not_after: SystemTime, now: SystemTime) -> SystemTime {
    let life = not_after.duration_since(now).unwrap_or_default();
    now + life - life / RENEWAL_SHARE
}
