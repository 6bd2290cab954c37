//! The roots in the webhook configurations: what the API server believes us by.
//!
//! One task for each of the two configurations watches it and the mesh's bundle, and makes the one
//! follow the other. An annotation keeps the bundle's sequence, so that two replicas, of which one
//! has not heard of a new root yet, do not undo each other's work.
//!
//! Invariants: nothing but `caBundle` and that annotation is written, and only in configurations
//! of our names; what is equal is not written again; an older bundle never replaces a newer one
//! unless that one has been left alone for a while.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::StreamExt as _;
use kube::api::{DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, ResourceExt as _};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use serde_json::{Value, json};
use sidegate_mesh::clock::{Clock, Sleep};
use sidegate_mtls::CredentialStore;

use crate::metrics::Metrics;

/// The sequence of the bundle that a configuration carries.
const SEQUENCE: &str = "sidegate.dev/bundle-sequence";
/// How long a newer bundle that another wrote is left alone although we do not know it.
const DEFERENCE: Duration = Duration::from_mins(1);
/// Waits after a write that failed.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// Which of the two configurations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Configuration {
    Mutating,
    Validating,
}

impl Configuration {
    fn resource(self) -> ApiResource {
        let kind = match self {
            Self::Mutating => "MutatingWebhookConfiguration",
            Self::Validating => "ValidatingWebhookConfiguration",
        };
        let kind = GroupVersionKind::gvk("admissionregistration.k8s.io", "v1", kind);
        ApiResource::from_gvk(&kind)
    }

    fn word(self) -> &'static str {
        match self {
            Self::Mutating => "mutating",
            Self::Validating => "validating",
        }
    }
}

/// Keeps the roots of one configuration.
pub(crate) struct CaBundle {
    which: Configuration,
    name: String,
    api: Api<DynamicObject>,
    store: Arc<CredentialStore>,
    clock: Arc<dyn Clock>,
    metrics: Arc<Metrics>,
    is_settled: AtomicBool,
}

/// What a configuration should carry.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wanted {
    sequence: u64,
    roots: BTreeSet<Vec<u8>>,
}

/// What is to be done with a configuration.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// It is as it should be, or not there.
    Nothing,
    /// Another knows a newer bundle; look again later.
    Defer,
    /// Write ours.
    Write,
}

impl CaBundle {
    pub(crate) fn new(
        which: Configuration,
        name: &str,
        client: Client,
        store: Arc<CredentialStore>,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        Arc::new(Self {
            which,
            name: name.to_owned(),
            api: Api::all_with(client, &which.resource()),
            clock: Arc::clone(store.clock()),
            store,
            metrics,
            is_settled: AtomicBool::new(false),
        })
    }

    /// Whether the configuration was once seen as it should be, or absent.
    pub(crate) fn is_settled(&self) -> bool {
        self.is_settled.load(Ordering::Acquire)
    }

    /// Follows configuration and bundle for ever.
    pub(crate) async fn follow(&self) {
        let selector = format!("metadata.name={}", self.name);
        let watch = watcher(
            self.api.clone(),
            watcher::Config::default().fields(&selector),
        );
        let mut events = pin!(watch.default_backoff());
        let mut epochs = self.store.subscribe();
        let mut seen = Seen::default();
        let mut later: Option<Sleep> = None;
        let mut failures = 0;
        let mut deferred = false;
        loop {
            tokio::select! {
                event = events.next() => match event {
                    Some(Ok(event)) => seen.apply(event),
                    Some(Err(error)) => {
                        tracing::warn!(name = self.name, error = %error, "watch of the webhook configuration failed");
                        continue;
                    }
                    None => return,
                },
                changed = epochs.changed() => if changed.is_err() { return },
                () = due(&mut later) => later = None,
            }
            let Some(wanted) = self.wanted() else {
                continue;
            };
            if !seen.is_complete {
                continue;
            }
            // A deferred look that comes due is the last one: then ours is written.
            let step = step(seen.object.as_ref(), &wanted, deferred && later.is_none());
            deferred = step == Step::Defer;
            let written = match (step, &seen.object) {
                (Step::Write, Some(object)) => self.write(object, &wanted).await,
                (Step::Defer, _) => {
                    later.get_or_insert_with(|| self.clock.sleep(DEFERENCE));
                    continue;
                }
                _ => Ok(()),
            };
            later = match written {
                Ok(()) => {
                    self.is_settled.store(true, Ordering::Release);
                    failures = 0;
                    None
                }
                Err(error) => {
                    let wait = RETRY_MIN
                        .saturating_mul(1 << failures.min(5))
                        .min(RETRY_MAX);
                    failures += 1;
                    tracing::warn!(name = self.name, error = %error, retry_in = ?wait, "roots not written");
                    Some(self.clock.sleep(wait))
                }
            };
        }
    }

    /// The roots of our own trust domain; `None` before there is an SVID that follows from them.
    fn wanted(&self) -> Option<Wanted> {
        let credentials = self.store.current()?;
        let bundles = &credentials.trust().bundles;
        let roots = bundles.roots(credentials.id().trust_domain())?;
        Some(Wanted {
            sequence: bundles.sequence(),
            roots: roots.iter().map(|root| root.der().to_vec()).collect(),
        })
    }

    async fn write(&self, object: &DynamicObject, wanted: &Wanted) -> Result<(), kube::Error> {
        let ca_bundle = STANDARD.encode(pem(&wanted.roots));
        let named = entries(object).filter_map(|entry| entry.get("name")?.as_str());
        let webhooks: Vec<Value> = named
            .map(|name| json!({ "name": name, "clientConfig": { "caBundle": ca_bundle } }))
            .collect();
        let patch = json!({
            "metadata": { "annotations": { SEQUENCE: wanted.sequence.to_string() } },
            "webhooks": webhooks,
        });
        let patch = Patch::Strategic(patch);
        let written = self
            .api
            .patch(&self.name, &PatchParams::default(), &patch)
            .await;
        self.metrics
            .roots_written(self.which.word(), written.is_ok());
        written?;
        tracing::info!(
            name = self.name,
            generation = wanted.sequence,
            "roots written"
        );
        Ok(())
    }
}

async fn due(later: &mut Option<Sleep>) {
    match later {
        Some(later) => later.await,
        None => std::future::pending().await,
    }
}

/// The configuration as the watch has it.
#[derive(Default)]
struct Seen {
    object: Option<DynamicObject>,
    listed: Option<DynamicObject>,
    is_complete: bool,
}

impl Seen {
    fn apply(&mut self, event: Event<DynamicObject>) {
        match event {
            Event::Init => self.listed = None,
            Event::InitApply(object) => self.listed = Some(object),
            Event::InitDone => {
                self.object = self.listed.take();
                self.is_complete = true;
            }
            Event::Apply(object) => self.object = Some(object),
            Event::Delete(_) => self.object = None,
        }
    }
}

/// The webhooks of a configuration that are called by a Service; a URL has roots of its own.
fn entries(object: &DynamicObject) -> impl Iterator<Item = &Value> {
    let webhooks = object.data.get("webhooks").and_then(Value::as_array);
    let of_service = |entry: &&Value| {
        entry
            .pointer("/clientConfig/service")
            .is_some_and(Value::is_object)
    };
    webhooks.into_iter().flatten().filter(of_service)
}

fn step(object: Option<&DynamicObject>, wanted: &Wanted, deferred_long: bool) -> Step {
    let Some(object) = object else {
        return Step::Nothing;
    };
    let current = |entry: &Value| {
        let text = entry
            .pointer("/clientConfig/caBundle")
            .and_then(Value::as_str);
        roots_in(text.unwrap_or_default()) == Some(wanted.roots.clone())
    };
    if entries(object).all(current) {
        return Step::Nothing;
    }
    let theirs = object
        .annotations()
        .get(SEQUENCE)
        .and_then(|text| text.parse::<u64>().ok());
    if theirs.is_some_and(|theirs| theirs > wanted.sequence) && !deferred_long {
        return Step::Defer;
    }
    Step::Write
}

/// The certificates in a `caBundle`; `None` when it is none.
fn roots_in(ca_bundle: &str) -> Option<BTreeSet<Vec<u8>>> {
    let pem = STANDARD.decode(ca_bundle).ok()?;
    let roots = CertificateDer::pem_slice_iter(&pem).map(|der| der.map(|der| der.to_vec()));
    roots.collect::<Result<_, _>>().ok()
}

fn pem(roots: &BTreeSet<Vec<u8>>) -> String {
    let mut text = String::new();
    for der in roots {
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        let body = STANDARD.encode(der);
        let mut rest = body.as_str();
        while !rest.is_empty() {
            let (line, after) = rest.split_at_checked(64).unwrap_or((rest, ""));
            text.push_str(line);
            text.push('\n');
            rest = after;
        }
        text.push_str("-----END CERTIFICATE-----\n");
    }
    text
}
