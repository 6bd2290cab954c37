//! What namespaces say, from a watch; asked directly where the watch does not know.
//!
//! Invariants: a pod is never judged by a guess. An unknown namespace is read, and so is one that
//! the watch has without our label, because the API server would not have asked; a read that fails
//! is an error.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::Namespace;
use kube::core::PartialObjectMeta;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, ResourceExt as _};
use sidegate_mesh::clock::Clock;
use tokio::sync::Semaphore;

use crate::inject::{NamespaceFacts, annotations};
use crate::webhook::{FactsFuture, Namespaces};

/// Longest direct read.
const READ_TIMEOUT: Duration = Duration::from_secs(2);
/// Direct reads at once.
const READS_MAX: usize = 32;
/// How long after a failure of the watch it is not relied on: longer than its longest backoff, so
/// that by then it either works or has failed again.
const DOUBT: Duration = Duration::from_mins(1);
/// The label that decides about pod security.
const POD_SECURITY: &str = "pod-security.kubernetes.io/enforce";

/// Why nothing can be said about a namespace.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NamespaceError {
    /// There is none of that name.
    #[error("there is no namespace `{0}`")]
    Missing(String),
    /// The API server does not say.
    #[error("namespace {name} cannot be read; try again: {problem}")]
    Unreadable {
        /// Its name.
        name: String,
        /// Why.
        problem: String,
    },
}

/// What namespaces say.
pub(crate) struct NamespaceWatch {
    api: Api<PartialObjectMeta<Namespace>>,
    clock: Arc<dyn Clock>,
    known: RwLock<HashMap<String, Arc<NamespaceFacts>>>,
    is_synced: AtomicBool,
    failed: RwLock<Option<Instant>>,
    reads: Semaphore,
}

impl NamespaceWatch {
    pub(crate) fn new(client: Client, clock: Arc<dyn Clock>) -> Arc<Self> {
        Arc::new(Self {
            api: Api::all(client),
            clock,
            known: RwLock::default(),
            is_synced: AtomicBool::new(false),
            failed: RwLock::default(),
            reads: Semaphore::new(READS_MAX),
        })
    }

    /// Whether every namespace was seen once.
    pub(crate) fn is_synced(&self) -> bool {
        self.is_synced.load(Ordering::Acquire)
    }

    /// How many are known.
    pub(crate) fn len(&self) -> usize {
        self.known().len()
    }

    /// Follows the namespaces for ever.
    pub(crate) async fn follow(&self) {
        let watch = watcher(self.api.clone(), watcher::Config::default());
        let mut events = pin!(watch.default_backoff());
        let mut listed = HashMap::new();
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => self.apply(event, &mut listed),
                Err(error) => {
                    tracing::warn!(error = %error, "watch of namespaces failed");
                    *self.failed.write().unwrap_or_else(PoisonError::into_inner) =
                        Some(Instant::now());
                }
            }
        }
    }

    fn apply(
        &self,
        event: Event<PartialObjectMeta<Namespace>>,
        listed: &mut HashMap<String, Arc<NamespaceFacts>>,
    ) {
        match event {
            Event::Init => listed.clear(),
            Event::InitApply(namespace) => {
                listed.insert(namespace.name_any(), Arc::new(facts_of(&namespace)));
            }
            Event::InitDone => {
                *self.known_mut() = std::mem::take(listed);
                self.is_synced.store(true, Ordering::Release);
            }
            Event::Apply(namespace) => {
                let facts = Arc::new(facts_of(&namespace));
                self.known_mut().insert(namespace.name_any(), facts);
            }
            Event::Delete(namespace) => drop(self.known_mut().remove(&namespace.name_any())),
        }
    }

    async fn find(&self, name: &str) -> Result<Arc<NamespaceFacts>, NamespaceError> {
        if name.is_empty() {
            return Err(NamespaceError::Missing(String::new()));
        }
        let known = self.known().get(name).cloned();
        match known {
            Some(facts) if facts.is_labelled() && !self.is_in_doubt() => Ok(facts),
            _ => self.read(name).await.map(Arc::new),
        }
    }

    fn is_in_doubt(&self) -> bool {
        let failed = self.failed.read().unwrap_or_else(PoisonError::into_inner);
        failed.is_some_and(|failed| failed.elapsed() < DOUBT)
    }

    async fn read(&self, name: &str) -> Result<NamespaceFacts, NamespaceError> {
        let unreadable = |problem: String| NamespaceError::Unreadable {
            name: name.to_owned(),
            problem,
        };
        let read = async {
            let permit = self.reads.acquire().await;
            let _permit = permit.map_err(|error| unreadable(error.to_string()))?;
            self.api
                .get_opt(name)
                .await
                .map_err(|error| unreadable(error.to_string()))
        };
        let read = tokio::select! {
            read = read => read?,
            () = self.clock.sleep(READ_TIMEOUT) => {
                return Err(unreadable("the API server does not answer".to_owned()));
            }
        };
        let namespace = read.ok_or_else(|| NamespaceError::Missing(name.to_owned()))?;
        Ok(facts_of(&namespace))
    }

    fn known(&self) -> RwLockReadGuard<'_, HashMap<String, Arc<NamespaceFacts>>> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn known_mut(&self) -> RwLockWriteGuard<'_, HashMap<String, Arc<NamespaceFacts>>> {
        self.known.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Namespaces for NamespaceWatch {
    fn facts<'a>(&'a self, name: &'a str) -> FactsFuture<'a> {
        Box::pin(self.find(name))
    }
}

impl fmt::Debug for NamespaceWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NamespaceWatch")
            .field("known", &self.len())
            .finish_non_exhaustive()
    }
}

/// What concerns us, and no more: a large cluster has many namespaces with many annotations.
fn facts_of(namespace: &PartialObjectMeta<Namespace>) -> NamespaceFacts {
    let labels = namespace.labels().iter();
    let labels =
        labels.filter(|(key, _)| [annotations::INJECT, POD_SECURITY].contains(&key.as_str()));
    let annotations = namespace.annotations().iter();
    let annotations = annotations.filter(|(key, _)| key.starts_with("sidegate.dev/"));
    let owned = |(key, value): (&String, &String)| (key.clone(), value.clone());
    NamespaceFacts {
        name: namespace.name_any(),
        labels: labels.map(owned).collect::<BTreeMap<_, _>>(),
        annotations: annotations.map(owned).collect(),
    }
}
