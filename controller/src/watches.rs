//! Watches of the cluster, which keep the index as the cluster is.
//!
//! Invariants: nothing is streamed to a sidecar before every kind was listed once; our own objects
//! are watched untyped, so that one that cannot be decoded harms nobody; one of them that vanishes
//! is forgotten only when its definition is still there, because a definition that goes takes its
//! objects along, and a lost source is not an empty one.

use std::collections::{BTreeSet, HashSet};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt as _};
use futures_util::{Stream, StreamExt as _};
use k8s_openapi::api::{core::v1, discovery::v1 as discovery, networking::v1 as networking};
use kube::api::{Api, ApiResource, DynamicObject};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use serde_json::Value;
use sidegate_mesh::resource::{API_VERSION, Kind, ResourceKey};
use tokio::sync::watch;

use crate::crd;
use crate::index::{Index, Key};
use crate::shared::Shared;

/// Every kind that is watched, as metrics and `/readyz` call it.
const KINDS: [&str; 9] = [
    "pods",
    "services",
    "endpointslices",
    "namespaces",
    "nodes",
    "servicecidrs",
    "authorizationpolicies",
    "staticservices",
    "trafficpolicies",
];

/// How long to wait before a definition is asked for again that could not be read.
const CONFIRM_RETRY: Duration = Duration::from_millis(500);

/// Which kinds were listed once.
#[derive(Debug)]
pub(crate) struct Synced {
    missing: Mutex<BTreeSet<&'static str>>,
    all: watch::Sender<bool>,
}

impl Synced {
    pub(crate) fn new() -> Self {
        Self {
            missing: Mutex::new(KINDS.into_iter().collect()),
            all: watch::Sender::new(false),
        }
    }

    /// The kinds that were not listed yet.
    pub(crate) fn missing(&self) -> Vec<&'static str> {
        let missing = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
        missing.iter().copied().collect()
    }

    /// Waits until every kind was listed.
    pub(crate) async fn all(&self) {
        // The sender lives as long as this value, so there is always an answer.
        self.all
            .subscribe()
            .wait_for(|all| *all)
            .await
            .map(drop)
            .ok();
    }

    fn listed(&self, kind: &'static str) {
        let mut missing = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
        if missing.remove(kind) {
            tracing::info!(objects = kind, "listed");
        }
        if missing.is_empty() {
            self.all
                .send_if_modified(|all| !std::mem::replace(all, true));
        }
    }
}

/// Starts every watch.
pub(crate) fn start(shared: &Arc<Shared>, client: &Client) {
    let all = Watched::<v1::Pod> {
        kind: "pods",
        apply: Index::apply_pod,
        remove: Index::remove_pod,
        keep: Index::keep_pods,
    };
    shared.spawn(all.run(Arc::clone(shared), Api::all(client.clone())));
    let all = Watched::<v1::Service> {
        kind: "services",
        apply: Index::apply_service,
        remove: Index::remove_service,
        keep: Index::keep_services,
    };
    shared.spawn(all.run(Arc::clone(shared), Api::all(client.clone())));
    let all = Watched::<discovery::EndpointSlice> {
        kind: "endpointslices",
        apply: Index::apply_slice,
        remove: Index::remove_slice,
        keep: Index::keep_slices,
    };
    shared.spawn(all.run(Arc::clone(shared), Api::all(client.clone())));
    let all = Watched::<v1::Namespace> {
        kind: "namespaces",
        apply: Index::apply_namespace,
        remove: |index, key| index.remove_namespace(&key.name),
        keep: Index::keep_namespaces,
    };
    shared.spawn(all.run(Arc::clone(shared), Api::all(client.clone())));
    let all = Watched::<v1::Node> {
        kind: "nodes",
        apply: Index::apply_node,
        remove: |index, key| index.remove_node(&key.name),
        keep: Index::keep_nodes,
    };
    shared.spawn(all.run(Arc::clone(shared), Api::all(client.clone())));
    let all = Watched::<networking::ServiceCIDR> {
        kind: "servicecidrs",
        apply: Index::apply_service_cidr,
        remove: |index, key| index.remove_service_cidr(&key.name),
        keep: Index::keep_service_cidrs,
    };
    shared.spawn(all.run(Arc::clone(shared), Api::all(client.clone())));
    for kind in Kind::ALL {
        let own = OwnKind::new(kind, Arc::clone(shared), client.clone());
        shared.spawn(own.run());
    }
}

/// One of Kubernetes' own kinds: what its objects do to the index.
struct Watched<K> {
    kind: &'static str,
    apply: fn(&mut Index, &K),
    remove: fn(&mut Index, &Key),
    keep: fn(&mut Index, &HashSet<Key>),
}

impl<K> Watched<K>
where
    K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
{
    async fn run(self, shared: Arc<Shared>, api: Api<K>) {
        let mut events = Box::pin(events(api));
        let mut seen = HashSet::new();
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => self.handle(&shared, event, &mut seen),
                Err(error) => {
                    // Before Kubernetes 1.33 there is no such kind; ranges are then guessed.
                    if self.kind == "servicecidrs" && is_absent(&error) {
                        shared.synced.listed(self.kind);
                        shared.metrics.is_synced(self.kind, false);
                    } else {
                        broke(&shared, self.kind, &error);
                    }
                }
            }
        }
    }

    fn handle(&self, shared: &Shared, event: Event<K>, seen: &mut HashSet<Key>) {
        shared.metrics.watched(self.kind);
        match event {
            Event::Init => seen.clear(),
            Event::InitApply(object) => {
                seen.extend(Key::of(object.meta()));
                shared.hub.change(|index| (self.apply)(index, &object));
            }
            Event::InitDone => {
                shared.hub.change(|index| (self.keep)(index, seen));
                *seen = HashSet::new();
                shared.synced.listed(self.kind);
                shared.metrics.is_synced(self.kind, true);
            }
            Event::Apply(object) => shared.hub.change(|index| (self.apply)(index, &object)),
            Event::Delete(object) => {
                if let Some(key) = Key::of(object.meta()) {
                    shared.hub.change(|index| (self.remove)(index, &key));
                }
            }
        }
    }
}

/// One of our own kinds, untyped.
struct OwnKind {
    kind: Kind,
    plural: &'static str,
    shared: Arc<Shared>,
    client: Client,
    seen: HashSet<Key>,
    /// Objects that vanished, and whose definition has to be asked for.
    vanished: BTreeSet<ResourceKey>,
}

/// What is known of a definition.
enum Definition {
    There,
    /// It is gone, or goes.
    Lost,
    Unknown,
}

impl OwnKind {
    fn new(kind: Kind, shared: Arc<Shared>, client: Client) -> Self {
        Self {
            kind,
            plural: crd::plural(kind),
            shared,
            client,
            seen: HashSet::new(),
            vanished: BTreeSet::new(),
        }
    }

    fn resource(&self) -> ApiResource {
        ApiResource {
            group: crd::GROUP.to_owned(),
            version: crd::VERSION.to_owned(),
            api_version: API_VERSION.to_owned(),
            kind: self.kind.as_str().to_owned(),
            plural: self.plural.to_owned(),
        }
    }

    async fn run(mut self) {
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &self.resource());
        let mut events = Box::pin(events_of(api));
        // What vanished before the question was asked, and the question.
        let mut asked: Option<(BTreeSet<ResourceKey>, BoxFuture<'static, Definition>)> = None;
        loop {
            if asked.is_none() && !self.vanished.is_empty() {
                asked = Some((std::mem::take(&mut self.vanished), self.ask()));
            }
            let answer = async {
                match &mut asked {
                    Some((_, question)) => question.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                event = events.next() => match event {
                    Some(Ok(event)) => {
                        let again = self.handle(event);
                        if let (Some(key), Some((keys, _))) = (again, &mut asked) {
                            keys.remove(&key);
                        }
                    }
                    Some(Err(error)) => broke(&self.shared, self.plural, &error),
                    None => return,
                },
                definition = answer => {
                    let keys = asked.take().map(|(keys, _)| keys).unwrap_or_default();
                    self.settle(keys, &definition);
                }
            }
        }
    }

    /// Returns the object that is there after all.
    fn handle(&mut self, event: Event<DynamicObject>) -> Option<ResourceKey> {
        self.shared.metrics.watched(self.plural);
        match event {
            Event::Init => self.seen.clear(),
            Event::InitApply(object) => {
                self.seen.extend(Key::of(&object.metadata));
                return Some(self.apply(object));
            }
            Event::InitDone => {
                let seen = std::mem::take(&mut self.seen);
                let gone = self
                    .shared
                    .hub
                    .look(|index| index.resources_beside(self.kind, &seen));
                self.vanished.extend(gone);
                self.shared.synced.listed(self.plural);
                self.shared.metrics.is_synced(self.plural, true);
                self.shared.metrics.is_lost(self.plural, false);
            }
            Event::Apply(object) => return Some(self.apply(object)),
            Event::Delete(object) => drop(self.vanished.insert(self.key(&object))),
        }
        None
    }

    fn key(&self, object: &DynamicObject) -> ResourceKey {
        ResourceKey {
            kind: self.kind,
            namespace: object.namespace().unwrap_or_default(),
            name: object.name_any(),
        }
    }

    fn apply(&mut self, object: DynamicObject) -> ResourceKey {
        let key = self.key(&object);
        self.vanished.remove(&key);
        // What cannot even be written as JSON is refused like anything else that is not understood.
        let mut value = serde_json::to_value(object).unwrap_or_default();
        if let Value::Object(map) = &mut value {
            map.insert("apiVersion".to_owned(), API_VERSION.into());
            map.insert("kind".to_owned(), self.kind.as_str().into());
        }
        self.shared
            .hub
            .change(|index| index.apply_resource(&key, &value));
        key
    }

    /// Asks for the definition. It is marked as going before its objects are deleted, so an answer
    /// to a question that was asked after a deletion tells why that was.
    fn ask(&self) -> BoxFuture<'static, Definition> {
        let resource = ApiResource {
            group: "apiextensions.k8s.io".to_owned(),
            version: "v1".to_owned(),
            api_version: "apiextensions.k8s.io/v1".to_owned(),
            kind: "CustomResourceDefinition".to_owned(),
            plural: "customresourcedefinitions".to_owned(),
        };
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
        let name = crd::definition_name(self.kind);
        let clock = Arc::clone(&self.shared.clock);
        async move {
            match api.get_metadata_opt(&name).await {
                Ok(Some(found)) if found.metadata.deletion_timestamp.is_none() => Definition::There,
                Ok(_) => Definition::Lost,
                Err(error) => {
                    tracing::warn!(error = %error, definition = name, "cannot ask for a definition");
                    clock.sleep(CONFIRM_RETRY).await;
                    Definition::Unknown
                }
            }
        }
        .boxed()
    }

    fn settle(&mut self, keys: BTreeSet<ResourceKey>, definition: &Definition) {
        match definition {
            Definition::There => {
                self.shared.metrics.is_lost(self.plural, false);
                self.shared.hub.change(|index| {
                    for key in &keys {
                        index.remove_resource(key);
                    }
                });
            }
            Definition::Lost => {
                self.shared.metrics.is_lost(self.plural, true);
                tracing::error!(
                    definition = crd::definition_name(self.kind),
                    kept = keys.len(),
                    "the definition is gone; what was known of its objects stays in use"
                );
            }
            Definition::Unknown => self.vanished.extend(keys),
        }
    }
}

fn events<K>(api: Api<K>) -> impl Stream<Item = watcher::Result<Event<K>>>
where
    K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let events = watcher(api, watcher::Config::default()).default_backoff();
    events.modify(|object| object.meta_mut().managed_fields = None)
}

fn events_of(api: Api<DynamicObject>) -> impl Stream<Item = watcher::Result<Event<DynamicObject>>> {
    let events = watcher(api, watcher::Config::default()).default_backoff();
    events.modify(|object| object.metadata.managed_fields = None)
}

fn broke(shared: &Shared, kind: &'static str, error: &watcher::Error) {
    shared.metrics.watch_broke(kind);
    // A watch that grew too old is begun anew: nothing is wrong.
    let is_expired = matches!(error, watcher::Error::WatchError(status) if status.code == 410);
    if is_expired {
        tracing::debug!(objects = kind, "watch expired");
    } else {
        tracing::warn!(objects = kind, error = %error, "watch broke off; it is begun anew");
    }
}

fn is_absent(error: &watcher::Error) -> bool {
    let (watcher::Error::InitialListFailed(error) | watcher::Error::WatchStartFailed(error)) =
        error
    else {
        return false;
    };
    matches!(error, kube::Error::Api(status) if status.code == 404)
}
