//! `sidegate status --wait`: until all is accepted and live everywhere.

use std::collections::BTreeMap;
use std::io::Write;

use futures_util::{Stream, StreamExt, stream};
use kube::api::DynamicObject;
use kube::runtime::watcher;
use sidegate_mesh::resource::Kind;
use tokio::time::Instant;

use super::{State, StatusArgs, missing};
use crate::kube::{Cluster, Scope, api_resource, is_refused};

/// How the waiting ended.
pub(super) enum Waited {
    /// Everything is accepted and live everywhere.
    Live(Vec<State>),
    /// The time is over; what is missing, in words.
    TimedOut(Vec<State>, Vec<String>),
}

/// What the watches have told so far.
#[derive(Default)]
struct Known {
    states: BTreeMap<(Kind, String, String), State>,
    /// Kinds whose list is complete.
    listed: Vec<Kind>,
    /// What a new list of a kind has brought so far.
    coming: Vec<State>,
}

type Watched = (Kind, Result<watcher::Event<DynamicObject>, watcher::Error>);

/// Watches until everything that was named, or everything in the scope, is live.
///
/// # Errors
///
/// When the cluster refuses, or notes cannot be written.
pub(super) async fn until_live(
    cluster: &Cluster,
    scope: &Scope,
    arguments: &StatusArgs,
    notes: &mut impl Write,
) -> anyhow::Result<Waited> {
    let deadline = Instant::now() + arguments.timeout;
    // Said at once, what the watches would only try again and again.
    super::list(cluster, scope, &arguments.resources).await?;
    let mut watches = stream::select_all(Kind::ALL.map(|kind| watch(cluster, scope, kind)));
    let mut known = Known::default();
    let mut said = Vec::new();
    loop {
        let next = tokio::time::timeout_at(deadline, watches.next()).await;
        let wanted = known.wanted(arguments);
        let Ok(Some((kind, event))) = next else {
            let mut words = unsettled(arguments, &wanted);
            let over = humantime::format_duration(arguments.timeout);
            words.insert(0, format!("not live everywhere after {over}:"));
            return Ok(Waited::TimedOut(wanted, words));
        };
        match event {
            Ok(event) => known.take(kind, event),
            Err(
                watcher::Error::InitialListFailed(error) | watcher::Error::WatchStartFailed(error),
            ) if is_refused(&error) => {
                let doing = format!("watching {}", api_resource(kind).plural);
                return Err(cluster.explain(error, &doing));
            }
            Err(error) => tracing::debug!(%error, "a watch failed and is tried again"),
        }
        if known.listed.len() < Kind::ALL.len() {
            continue;
        }
        let wanted = known.wanted(arguments);
        let words = unsettled(arguments, &wanted);
        if words.is_empty() {
            return Ok(Waited::Live(wanted));
        }
        if words != said {
            for words in &words {
                writeln!(notes, "waiting for {words}")?;
            }
            said = words;
        }
    }
}

fn watch(
    cluster: &Cluster,
    scope: &Scope,
    kind: Kind,
) -> std::pin::Pin<Box<dyn Stream<Item = Watched> + Send>> {
    use kube::runtime::WatchStreamExt;
    let watcher = watcher(cluster.resources(kind, scope), watcher::Config::default());
    Box::pin(watcher.default_backoff().map(move |event| (kind, event)))
}

/// What is not as it should be, in words.
fn unsettled(arguments: &StatusArgs, wanted: &[State]) -> Vec<String> {
    let unsettled = wanted.iter().filter(|state| !state.is_settled());
    let missing = missing(&arguments.resources, wanted).into_iter();
    let missing = missing.map(|name| format!("{name}: not there"));
    missing.chain(unsettled.map(State::words)).collect()
}

impl Known {
    fn take(&mut self, kind: Kind, event: watcher::Event<DynamicObject>) {
        match event {
            watcher::Event::Init => self.coming.retain(|state| state.kind != kind),
            watcher::Event::InitApply(object) => self.coming.push(State::of(kind, &object)),
            watcher::Event::InitDone => {
                self.states.retain(|(of, ..), _| *of != kind);
                let (listed, others) = std::mem::take(&mut self.coming)
                    .into_iter()
                    .partition(|state| state.kind == kind);
                self.coming = others;
                let listed: Vec<State> = listed;
                self.states
                    .extend(listed.into_iter().map(|state| (state.key(), state)));
                if !self.listed.contains(&kind) {
                    self.listed.push(kind);
                }
            }
            watcher::Event::Apply(object) => {
                let state = State::of(kind, &object);
                self.states.insert(state.key(), state);
            }
            watcher::Event::Delete(object) => {
                self.states.remove(&State::of(kind, &object).key());
            }
        }
    }

    fn wanted(&self, arguments: &StatusArgs) -> Vec<State> {
        let named = &arguments.resources;
        let is = |state: &&State| named.is_empty() || named.iter().any(|named| named.is(state));
        self.states.values().filter(is).cloned().collect()
    }
}
