//! Calls of a cluster, followed in a thread of their own while the screen is drawn.
//!
//! Always true: what has not been taken yet is bounded by [`SAMPLES_MAX`]; of more, the latest
//! remain.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::{SAMPLES_MAX, Sample, TopArgs, sample_of};
use crate::kube::Cluster;
use crate::kube::log::{Event, Logs};
use crate::kube::sidecars::Selection;
use crate::logs::filter::Filter;

/// Lines on their way from the followers.
const EVENTS_MAX: usize = 4096;

/// The calls that a cluster's sidecars write down.
pub(super) struct Followed {
    inbox: Arc<Mutex<Inbox>>,
    /// Ends the thread when it is dropped.
    _open: oneshot::Sender<()>,
}

#[derive(Default)]
struct Inbox {
    samples: VecDeque<Sample>,
    note: Option<String>,
    failure: Option<anyhow::Error>,
}

impl Followed {
    /// Finds the sidecars that are meant, and begins to follow them.
    ///
    /// # Errors
    ///
    /// When the cluster cannot be asked, or no sidecar is meant.
    pub(super) fn start(arguments: &TopArgs) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let logs = runtime.block_on(async {
            let cluster = Cluster::connect(&arguments.cluster).await?;
            let selection = Selection::new(
                &cluster,
                arguments.workload.as_deref(),
                arguments.namespace.as_deref(),
                arguments.all_namespaces,
            )?;
            cluster.some_sidecars(&selection).await?;
            anyhow::Ok(Logs {
                cluster,
                selection,
                since: Some(arguments.window),
            })
        })?;
        let (open, closed) = oneshot::channel();
        let inbox = Arc::new(Mutex::new(Inbox::default()));
        let of_thread = Arc::clone(&inbox);
        let follow = move || {
            let followed = runtime.block_on(follow(logs, &of_thread, closed));
            lock(&of_thread).failure = followed.err();
            runtime.shutdown_background();
        };
        let thread = std::thread::Builder::new().name("follow".to_owned());
        thread.spawn(follow).context("the system gives no thread")?;
        Ok(Self { inbox, _open: open })
    }

    /// The calls that have come since the last time.
    ///
    /// # Errors
    ///
    /// When the cluster refuses to be followed.
    pub(super) fn take(&mut self) -> anyhow::Result<VecDeque<Sample>> {
        let mut inbox = lock(&self.inbox);
        match inbox.failure.take() {
            Some(failure) => Err(failure),
            None => Ok(std::mem::take(&mut inbox.samples)),
        }
    }

    /// The last thing that went wrong on the way.
    pub(super) fn note(&self) -> Option<String> {
        lock(&self.inbox).note.clone()
    }
}

fn lock(inbox: &Mutex<Inbox>) -> MutexGuard<'_, Inbox> {
    inbox.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn follow(
    logs: Logs,
    inbox: &Mutex<Inbox>,
    mut closed: oneshot::Receiver<()>,
) -> anyhow::Result<()> {
    // One workload's sidecars have no other side's records beside their own.
    let filter = if logs.selection.wanted.is_all() {
        Filter::each_call_of(logs.selection.scope.namespace())
    } else {
        Filter::default()
    };
    let (lines, mut events) = mpsc::channel(EVENTS_MAX);
    let mut followers = JoinSet::new();
    followers.spawn(logs.follow(HashMap::new(), lines));
    loop {
        let event = tokio::select! {
            event = events.recv() => event,
            _dropped = &mut closed => return Ok(()),
        };
        match event {
            Some(Event::Line(line)) => {
                let Some(sample) = sample_of(&line.raw.text, &filter, Some(&line.workload)) else {
                    continue;
                };
                let mut inbox = lock(inbox);
                inbox.samples.push_back(sample);
                if inbox.samples.len() > SAMPLES_MAX {
                    inbox.samples.pop_front();
                }
            }
            Some(Event::Note(note)) => lock(inbox).note = Some(note),
            None => break,
        }
    }
    match followers.join_next().await {
        Some(ended) => ended?,
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::kube::Scope;
    use crate::kube::fake::{Fake, pod};
    use crate::kube::sidecars::Wanted;

    #[tokio::test]
    async fn calls_of_a_cluster_are_counted_once_as_they_come() {
        let fake = Fake::start().await;
        fake.put("pods", pod("shop", "web-0", "web"));
        let logs = Logs {
            cluster: fake.cluster(),
            selection: Selection {
                scope: Scope::Namespace("shop".to_owned()),
                wanted: Wanted::default(),
            },
            since: Some(Duration::from_secs(10)),
        };
        let record = |direction: &str, destination: &str| {
            format!(
                r#"{{"kind":"access","time":"2026-11-24T07:00:01.000000Z","direction":"{direction}","source":"spiffe://m/ns/shop/sa/web","destination":"spiffe://m/ns/{destination}","status":200}}"#
            )
        };
        let web = ("shop", "web-0");
        fake.say(web, "01", &record("outbound", "shop/sa/orders"));
        fake.say(web, "02", &record("outbound", "jobs/sa/batch"));
        fake.say(web, "03", &record("inbound", "shop/sa/web"));
        let inbox = Arc::new(Mutex::new(Inbox::default()));
        let (open, closed) = oneshot::channel();
        let of_thread = Arc::clone(&inbox);
        let mut following = JoinSet::new();
        following.spawn(async move { follow(logs, &of_thread, closed).await });
        let come = async {
            while lock(&inbox).samples.len() < 2 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), come)
            .await
            .unwrap();
        drop(open);
        following.join_next().await.unwrap().unwrap().unwrap();
        let called: Vec<_> = lock(&inbox)
            .samples
            .iter()
            .map(|sample| sample.called.clone())
            .collect();
        assert_eq!(called, ["jobs/batch", "shop/web"]);
    }
}
