//! Publishes the roots as a ConfigMap where pods of the mesh start.
//!
//! The ConfigMap is in each namespace labelled `sidegate.dev/inject: enabled`, and in the CA's own,
//! where it also says that the installation has begun. It is what a sidecar starts its trust with;
//! later bundles come to it on its stream. It is made at once when a label appears, since a pod
//! waits for it; put right when it was edited or deleted; and left where it is when the label goes,
//! because pods that mount it may still run. There it is kept up to date as long as it exists, and
//! not made again. Nothing else is ever touched.
//!
//! Each replica publishes, by server-side apply with one field manager, so that two that agree
//! change nothing. Before it puts something right, a replica looks at the Secret: what differs from
//! its own roots may be what another replica has just changed.
//!
//! Invariant: at most `APPLIES_MAX` requests at a time; a namespace that refuses is tried again
//! after a wait that grows, and delays no other.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::{Stream, StreamExt};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::api::{PartialObjectMeta, Patch, PatchParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::authority;
use crate::config::Kubernetes;
use crate::digest::Digest;
use crate::issuer::Issuer;
use crate::kubernetes::{ApiError, FIELD_MANAGER, ask};
use crate::registry::TrustedRoot;

/// The only key of the ConfigMap.
pub const ROOT_PEM: &str = "root.pem";
/// Says that a ConfigMap is ours.
const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Namespaces that are written to at once.
const APPLIES_MAX: usize = 8;
/// Shortest time between two writes to one namespace, and the wait after a first failure.
const WAIT_MIN: Duration = Duration::from_millis(250);
/// Longest wait after failures.
const WAIT_MAX: Duration = Duration::from_secs(30);
/// How often everything is compared even when nothing seems to happen.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);

/// What the roots look like in a ConfigMap.
pub(crate) fn root_pem(roots: &[TrustedRoot]) -> String {
    let pem = roots.iter().map(|known| authority::to_pem(&known.root.der));
    pem.collect()
}

/// Writes the ConfigMap of one namespace.
pub(crate) async fn publish(
    client: &Client,
    settings: &Kubernetes,
    namespace: &str,
    pem: &str,
) -> Result<(), ApiError> {
    let name = &settings.bundle_config_map;
    let wanted = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {
                MANAGED_BY: FIELD_MANAGER,
                "app.kubernetes.io/part-of": "sidegate",
            },
        },
        "data": { ROOT_PEM: pem },
    });
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let patch = Patch::Apply(&wanted);
    ask("publish the bundle", api.patch(name, &params, &patch)).await?;
    Ok(())
}

/// Follows namespaces and ConfigMaps until `cancel`.
pub(crate) async fn run(issuer: Arc<Issuer>, cancel: CancellationToken) {
    let Some(cluster) = issuer.cluster.as_ref().map(Arc::clone) else {
        return;
    };
    let (client, settings) = (cluster.client.clone(), cluster.settings.clone());
    let namespaces = watch_namespaces(client.clone());
    let bundles = watch_bundles(client.clone(), &settings.bundle_config_map);
    tokio::pin!(namespaces);
    tokio::pin!(bundles);
    let mut roots = issuer.subscribe();
    let mut publisher = Publisher {
        plan: Plan::new(settings.namespace.clone()),
        writes: JoinSet::new(),
        client,
        settings,
        issuer,
    };
    loop {
        publisher.write_what_is_due();
        let wake = publisher.wake();
        let clock = Arc::clone(&publisher.issuer.clock);
        tokio::select! {
            () = cancel.cancelled() => break,
            Some(event) = namespaces.next() => publisher.namespace(event),
            Some(event) = bundles.next() => publisher.bundle(event),
            Some(written) = publisher.writes.join_next() => publisher.written(written),
            changed = roots.changed() => if changed.is_err() { break },
            () = clock.sleep_until(wake) => {}
        }
    }
    publisher.writes.shutdown().await;
}

type Watched<K> = Result<Event<K>, watcher::Error>;

fn watch_namespaces(client: Client) -> impl Stream<Item = Watched<PartialObjectMeta<Namespace>>> {
    let labelled = watcher::Config::default().labels("sidegate.dev/inject=enabled");
    watcher(Api::<PartialObjectMeta<Namespace>>::all(client), labelled).default_backoff()
}

fn watch_bundles(client: Client, name: &str) -> impl Stream<Item = Watched<ConfigMap>> + use<> {
    let named = watcher::Config::default().fields(&format!("metadata.name={name}"));
    watcher(Api::<ConfigMap>::all(client), named).default_backoff()
}

struct Publisher {
    issuer: Arc<Issuer>,
    client: Client,
    settings: Kubernetes,
    plan: Plan,
    writes: JoinSet<(String, Result<Digest, ApiError>)>,
}

impl Publisher {
    fn namespace(&mut self, event: Watched<PartialObjectMeta<Namespace>>) {
        match event {
            Ok(event) => self.plan.namespace(event.map_name(|namespace| {
                let ending = namespace.metadata.deletion_timestamp.is_some();
                (namespace.name_any(), !ending)
            })),
            Err(error) => self.watch_failed("namespaces", &error),
        }
    }

    fn bundle(&mut self, event: Watched<ConfigMap>) {
        match event {
            Ok(event) => self.plan.bundle(event.map_name(|bundle| {
                let pem = bundle.data.as_ref().and_then(|data| data.get(ROOT_PEM));
                let ours = bundle.labels().get(MANAGED_BY).map(String::as_str);
                let found = Found {
                    pem: pem.map_or(Digest::ZERO, |pem| Digest::of(pem.as_bytes())),
                    ours: ours == Some(FIELD_MANAGER),
                };
                (bundle.namespace().unwrap_or_default(), found)
            })),
            Err(error) => self.watch_failed("bundles", &error),
        }
    }

    fn watch_failed(&self, what: &'static str, error: &watcher::Error) {
        self.issuer.metrics.kubernetes_failed("watch");
        tracing::warn!(what, error = %error, "the Kubernetes API ended a watch; watching again");
    }

    fn written(
        &mut self,
        written: Result<(String, Result<Digest, ApiError>), tokio::task::JoinError>,
    ) {
        let (namespace, result) = match written {
            Ok(written) => written,
            Err(error) => {
                tracing::error!(error = %error, "a bundle was not published");
                return;
            }
        };
        let now = self.issuer.clock.now();
        match result {
            Ok(digest) => {
                self.issuer.metrics.bundle_written("ok");
                tracing::debug!(namespace, "bundle published in a namespace");
                self.plan.wrote(&namespace, digest, now);
            }
            // The namespace is gone or on its way; its label's watch says so too.
            Err(error) if error.is_not_found() && namespace != self.settings.namespace => {
                self.plan.left(&namespace);
            }
            Err(error) => {
                self.issuer.metrics.bundle_written("failed");
                let wait = self.plan.failed(&namespace, now);
                tracing::warn!(
                    namespace,
                    error = %error,
                    retry_in = ?wait,
                    "the bundle was not published: pods of this namespace do not start yet"
                );
            }
        }
    }

    fn write_what_is_due(&mut self) {
        let now = self.issuer.clock.now();
        let pem = root_pem(&self.issuer.registry().roots());
        let wanted = Digest::of(pem.as_bytes());
        let behind = self.plan.behind(wanted);
        self.issuer
            .metrics
            .bundles(self.plan.targets().count(), behind.len());
        for namespace in behind {
            if self.writes.len() >= APPLIES_MAX {
                return;
            }
            if !self.plan.begin(&namespace, now) {
                continue;
            }
            let issuer = Arc::clone(&self.issuer);
            let (client, settings) = (self.client.clone(), self.settings.clone());
            self.writes.spawn(async move {
                if let Err(error) = issuer.follow().await {
                    tracing::debug!(error = %error, "publishing what was known before");
                }
                let pem = root_pem(&issuer.registry().roots());
                let published = publish(&client, &settings, &namespace, &pem).await;
                let digest = Digest::of(pem.as_bytes());
                (namespace, published.map(|()| digest))
            });
        }
    }

    /// When there may be something to do without any event.
    fn wake(&self) -> SystemTime {
        let now = self.issuer.clock.now();
        let look = now + LOOK_INTERVAL;
        self.plan.next(now).map_or(look, |due| due.min(look))
    }
}

/// What a namespace's ConfigMap says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Found {
    pem: Digest,
    ours: bool,
}

/// How it goes with writing to a namespace.
#[derive(Clone, Copy, Debug)]
struct Writing {
    failures: u32,
    not_before: SystemTime,
    under_way: bool,
}

/// Where the bundle should be, where it is, and when to try again. Pure.
struct Plan {
    own: String,
    labelled: Listed<bool>,
    found: Listed<Found>,
    writing: BTreeMap<String, Writing>,
}

/// What a watch has shown: nothing is concluded before its first list is whole.
struct Listed<T> {
    known: BTreeMap<String, T>,
    listing: Option<BTreeMap<String, T>>,
    complete: bool,
}

impl<T: Clone> Listed<T> {
    fn new() -> Self {
        Self {
            known: BTreeMap::new(),
            listing: None,
            complete: false,
        }
    }

    fn take(&mut self, event: Named<T>) {
        match event {
            Named::Init => self.listing = Some(BTreeMap::new()),
            Named::InitApply(name, value) => {
                let listing = self.listing.get_or_insert_default();
                listing.insert(name, value);
            }
            Named::InitDone => {
                self.known = self.listing.take().unwrap_or_default();
                self.complete = true;
            }
            Named::Apply(name, value) => drop(self.known.insert(name, value)),
            Named::Delete(name) => drop(self.known.remove(&name)),
        }
    }
}

/// An event of a watch, less what nobody needs.
enum Named<T> {
    Init,
    InitApply(String, T),
    InitDone,
    Apply(String, T),
    Delete(String),
}

trait MapName<K> {
    fn map_name<T>(self, read: impl FnOnce(&K) -> (String, T)) -> Named<T>;
}

impl<K> MapName<K> for Event<K> {
    fn map_name<T>(self, read: impl FnOnce(&K) -> (String, T)) -> Named<T> {
        match self {
            Event::Init => Named::Init,
            Event::InitDone => Named::InitDone,
            Event::InitApply(object) => {
                let (name, value) = read(&object);
                Named::InitApply(name, value)
            }
            Event::Apply(object) => {
                let (name, value) = read(&object);
                Named::Apply(name, value)
            }
            Event::Delete(object) => Named::Delete(read(&object).0),
        }
    }
}

impl Plan {
    fn new(own: String) -> Self {
        Self {
            own,
            labelled: Listed::new(),
            found: Listed::new(),
            writing: BTreeMap::new(),
        }
    }

    fn namespace(&mut self, event: Named<bool>) {
        let before: BTreeSet<String> = self.targets().map(ToOwned::to_owned).collect();
        self.labelled.take(event);
        let after: BTreeSet<String> = self.targets().map(ToOwned::to_owned).collect();
        // A namespace that comes, or comes again, owes nothing to its past.
        for came in after.difference(&before) {
            self.writing.remove(came);
        }
        let found = &self.found.known;
        self.writing
            .retain(|name, _| after.contains(name) || found.contains_key(name));
    }

    fn bundle(&mut self, event: Named<Found>) {
        self.found.take(event);
    }

    /// Namespaces in which the bundle has to be.
    fn targets(&self) -> impl Iterator<Item = &str> {
        let labelled = self.labelled.known.iter();
        let labelled = labelled.filter(|(name, live)| **live && **name != self.own);
        let labelled = labelled.map(|(name, _)| name.as_str());
        std::iter::once(self.own.as_str()).chain(labelled)
    }

    /// Namespaces in which it is not as it should be.
    fn behind(&self, wanted: Digest) -> Vec<String> {
        if !self.labelled.complete || !self.found.complete {
            return Vec::new();
        }
        let is = |name: &str| self.found.known.get(name);
        let targets = self
            .targets()
            .filter(|name| is(name).is_none_or(|found| found.pem != wanted || !found.ours));
        // Where the label is gone: as long as it is there, it is true.
        let left = self.found.known.iter().filter(|(name, found)| {
            found.ours && found.pem != wanted && self.targets().all(|target| target != *name)
        });
        let left = left.map(|(name, _)| name.as_str());
        targets.chain(left).map(ToOwned::to_owned).collect()
    }

    /// Whether a write may begin now.
    fn begin(&mut self, namespace: &str, now: SystemTime) -> bool {
        let writing = self.writing.entry(namespace.to_owned()).or_insert(Writing {
            failures: 0,
            not_before: now,
            under_way: false,
        });
        let may = !writing.under_way && writing.not_before <= now;
        writing.under_way |= may;
        may
    }

    fn wrote(&mut self, namespace: &str, pem: Digest, now: SystemTime) {
        let found = Found { pem, ours: true };
        self.found.known.insert(namespace.to_owned(), found);
        if let Some(writing) = self.writing.get_mut(namespace) {
            writing.under_way = false;
            writing.failures = 0;
            writing.not_before = now + WAIT_MIN;
        }
    }

    fn failed(&mut self, namespace: &str, now: SystemTime) -> Duration {
        let Some(writing) = self.writing.get_mut(namespace) else {
            return WAIT_MIN;
        };
        let wait = WAIT_MIN
            .saturating_mul(1 << writing.failures.min(10))
            .min(WAIT_MAX);
        writing.failures += 1;
        writing.under_way = false;
        writing.not_before = now + wait;
        wait
    }

    fn left(&mut self, namespace: &str) {
        self.writing.remove(namespace);
        self.labelled.known.remove(namespace);
        self.found.known.remove(namespace);
    }

    /// When the next waiting write may begin, if that is not now.
    fn next(&self, now: SystemTime) -> Option<SystemTime> {
        let waiting = self.writing.values().filter(|writing| !writing.under_way);
        let moments = waiting.map(|writing| writing.not_before);
        moments.filter(|moment| *moment > now).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: Digest = Digest::ZERO;

    fn other() -> Digest {
        Digest::of(b"other roots")
    }

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn found(pem: Digest, ours: bool) -> Found {
        Found { pem, ours }
    }

    /// A plan whose first lists are whole.
    fn plan(labelled: &[&str], bundles: &[(&str, Found)]) -> Plan {
        let mut plan = Plan::new("sidegate-system".to_owned());
        plan.namespace(Named::Init);
        for name in labelled {
            plan.namespace(Named::InitApply((*name).to_owned(), true));
        }
        plan.namespace(Named::InitDone);
        plan.bundle(Named::Init);
        for (name, found) in bundles {
            plan.bundle(Named::InitApply((*name).to_owned(), *found));
        }
        plan.bundle(Named::InitDone);
        plan
    }

    #[test]
    fn nothing_is_written_before_both_lists_are_whole() {
        let mut plan = Plan::new("sidegate-system".to_owned());
        plan.namespace(Named::Init);
        plan.namespace(Named::InitApply("shop".to_owned(), true));
        plan.namespace(Named::InitDone);
        plan.bundle(Named::Init);
        assert!(plan.behind(WANTED).is_empty());
        plan.bundle(Named::InitDone);
        assert_eq!(plan.behind(WANTED), ["sidegate-system", "shop"]);
    }

    #[test]
    fn what_is_missing_edited_or_not_marked_is_put_right_where_the_label_is() {
        let bundles = [
            ("sidegate-system", found(WANTED, true)),
            ("edited", found(other(), true)),
            ("unmarked", found(WANTED, false)),
            ("good", found(WANTED, true)),
        ];
        let plan = plan(&["edited", "missing", "unmarked", "good"], &bundles);
        assert_eq!(plan.behind(WANTED), ["edited", "missing", "unmarked"]);
    }

    #[test]
    fn elsewhere_only_what_is_ours_is_kept_true_and_nothing_is_made() {
        let own = ("sidegate-system", found(WANTED, true));
        let strangers = ("stranger", found(other(), false));
        let mut plan = plan(&["shop"], &[own, strangers, ("shop", found(WANTED, true))]);
        plan.namespace(Named::Delete("shop".to_owned()));
        assert!(plan.behind(WANTED).is_empty());
        let now_old = Digest::of(b"a root was added");
        assert_eq!(plan.behind(now_old), ["sidegate-system", "shop"]);
        plan.bundle(Named::Delete("shop".to_owned()));
        assert_eq!(plan.behind(now_old), ["sidegate-system"]);
    }

    #[test]
    fn a_namespace_that_ends_is_left_alone() {
        let mut plan = plan(&["shop"], &[("sidegate-system", found(WANTED, true))]);
        plan.namespace(Named::Apply("shop".to_owned(), false));
        assert!(plan.behind(WANTED).is_empty());
    }

    #[test]
    fn one_write_at_a_time_and_waits_that_grow() {
        let mut plan = plan(&["shop"], &[("sidegate-system", found(WANTED, true))]);
        assert!(plan.begin("shop", at(0)));
        assert!(!plan.begin("shop", at(0)), "under way");
        assert_eq!(plan.failed("shop", at(0)), WAIT_MIN);
        assert!(!plan.begin("shop", at(0)), "waits");
        assert!(plan.begin("shop", at(1)));
        assert_eq!(plan.failed("shop", at(1)), WAIT_MIN * 2);
        for second in 2..40 {
            plan.begin("shop", at(second * 100));
            assert!(plan.failed("shop", at(second * 100)) <= WAIT_MAX);
        }
        assert!(plan.begin("shop", at(10_000)));
        plan.wrote("shop", WANTED, at(10_000));
        assert!(plan.behind(WANTED).is_empty());
        assert!(!plan.begin("shop", at(10_000)), "a fight has a pace");
        assert!(plan.begin("shop", at(10_001)));
    }

    #[test]
    fn a_label_that_comes_again_is_served_at_once() {
        let mut plan = plan(&["shop"], &[("sidegate-system", found(WANTED, true))]);
        plan.begin("shop", at(0));
        for _ in 0..9 {
            plan.failed("shop", at(0));
        }
        assert!(!plan.begin("shop", at(1)));
        plan.namespace(Named::Delete("shop".to_owned()));
        plan.namespace(Named::Apply("shop".to_owned(), true));
        assert!(plan.begin("shop", at(1)));
    }

    #[test]
    fn what_a_watch_no_longer_lists_is_gone() {
        let mut plan = plan(&["shop", "old"], &[]);
        plan.namespace(Named::Init);
        plan.namespace(Named::InitApply("shop".to_owned(), true));
        let targets: Vec<&str> = plan.targets().collect();
        assert_eq!(
            targets,
            ["sidegate-system", "old", "shop"],
            "not before it is whole"
        );
        plan.namespace(Named::InitDone);
        let targets: Vec<&str> = plan.targets().collect();
        assert_eq!(targets, ["sidegate-system", "shop"]);
    }
}
