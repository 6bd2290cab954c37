//! From resources to the snapshot in force: the files of a folder, or what a controller streams.
//!
//! Invariants: a resource that is refused keeps its last good version, or fails closed; a source
//! that is lost changes nothing; every refusal is counted and logged once and shown for as long as
//! it lasts; nothing is published before the source was read whole.

pub(crate) mod controller;
pub(crate) mod folder;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use sidegate_mesh::store::{ResourceSet, ResourceStore};
use sidegate_mesh::{Clock, Problem, Severity, Snapshot, Workload};
use tracing::{error, info, warn};

use crate::metrics::Metrics;
use crate::shared::Shared;
use crate::state::State;
use controller::ControllerSource;
use folder::{Content, Files, Folder, Lost};

/// Where resources come from.
pub(crate) enum AnySource {
    Folder(Box<FolderSource>),
    Controller(Box<ControllerSource>),
}

impl AnySource {
    /// Where the last reading can be seen.
    pub(crate) fn report(&self) -> Report {
        match self {
            Self::Folder(source) => source.publisher.report(),
            Self::Controller(source) => source.report(),
        }
    }

    /// Follows the source for ever.
    pub(crate) async fn run(self) {
        match self {
            Self::Folder(source) => source.run().await,
            Self::Controller(source) => source.run().await,
        }
    }
}

/// What the source last said, for the administration port. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Report(Arc<ArcSwap<Reading>>);

/// One reading of the source.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reading {
    /// When it was taken; `None` before the first.
    pub(crate) read_at: Option<SystemTime>,
    /// Why the source cannot be read now, if so; what was read before stays in force.
    pub(crate) lost: Option<String>,
    /// What is wrong with resources.
    pub(crate) problems: Vec<Problem>,
    /// The resources in force.
    pub(crate) resources: ResourceSet,
    /// The workload that they are in force for.
    pub(crate) workload: Option<Arc<Workload>>,
}

impl Report {
    /// The last reading.
    pub(crate) fn current(&self) -> Arc<Reading> {
        self.0.load_full()
    }
}

/// Resources by where they are from: the text of each, or why it has none.
type Texts = Vec<(String, Result<String, String>)>;

/// Compiles what a source says about a workload, and puts it in force.
struct Publisher {
    store: ResourceStore,
    workload: Arc<Workload>,
    state: State,
    metrics: Arc<Metrics>,
    clock: Arc<dyn Clock>,
    report: Report,
    reported: HashSet<String>,
}

impl Publisher {
    fn new(shared: &Shared) -> Self {
        Self {
            store: ResourceStore::new(),
            workload: Arc::clone(&shared.workload),
            state: shared.state.clone(),
            metrics: Arc::clone(&shared.metrics),
            clock: Arc::clone(&shared.clock),
            report: Report::default(),
            reported: HashSet::new(),
        }
    }

    fn report(&self) -> Report {
        self.report.clone()
    }

    /// A lost source changes nothing: what is in force stays in force.
    fn lose(&self, why: String) {
        let reading = Reading {
            lost: Some(why),
            ..(*self.report.current()).clone()
        };
        self.report.0.store(Arc::new(reading));
    }

    /// Puts these resources, all of them, in force; `more` is what the source itself has to say.
    /// Returns what is wrong.
    fn publish(&mut self, texts: &Texts, more: Option<Problem>) -> Vec<Problem> {
        let mut problems = self.store.replace_files(texts);
        let set = self.store.resources().clone();
        let (snapshot, warnings) = self.compile(&set);
        problems.extend(warnings);
        problems.extend(more);
        self.say(&problems);
        let number = snapshot.number;
        self.report.0.store(Arc::new(Reading {
            read_at: Some(self.clock.now()),
            lost: None,
            problems: problems.clone(),
            resources: set,
            workload: Some(Arc::clone(&self.workload)),
        }));
        self.state.publish(Arc::new(snapshot));
        self.metrics.snapshot_number.set(number);
        info!(generation = number, "snapshot published");
        problems
    }

    fn compile(&self, set: &ResourceSet) -> (Snapshot, Vec<Problem>) {
        match self.state.current() {
            Some(previous) => {
                let number = previous.number + 1;
                Snapshot::recompile(&previous, set, &self.workload, number)
            }
            None => Snapshot::compile(set, &self.workload, 1),
        }
    }

    /// Counts and logs each problem once, for as long as it lasts.
    fn say(&mut self, problems: &[Problem]) {
        let mut reported = HashSet::with_capacity(problems.len());
        for problem in problems {
            let text = problem.to_string();
            if !self.reported.contains(&text) {
                if problem.is_error() {
                    self.metrics.snapshot_rejections.inc();
                    error!(error = %text, "resource refused, its last good version stays in force");
                } else {
                    warn!(error = %text, "resource accepted with a warning");
                }
            }
            reported.insert(text);
        }
        self.reported = reported;
    }
}

/// Follows a folder and publishes what it says.
pub(crate) struct FolderSource {
    folder: Folder,
    publisher: Publisher,
}

impl FolderSource {
    /// Publishes what `folder` says about the workload.
    pub(crate) fn new(folder: Folder, shared: &Shared) -> Self {
        Self {
            folder,
            publisher: Publisher::new(shared),
        }
    }

    async fn run(mut self) {
        loop {
            match self.folder.next().await {
                Ok(files) => self.apply(&files),
                Err(lost) => self.lose(&lost),
            }
        }
    }

    fn lose(&self, lost: &Lost) {
        self.publisher.metrics.snapshot_rejections.inc();
        error!(error = %lost, "resources lost, the last ones stay in force");
        self.publisher.lose(lost.to_string());
    }

    fn apply(&mut self, files: &Files) {
        let empty = files.is_empty().then(|| {
            let message =
                "the resources folder has no resource files: nobody is called or admitted";
            Problem {
                severity: Severity::Warning,
                ..Problem::of_file("", message, "put policies and services into it")
            }
        });
        self.publisher.publish(&texts(files), empty);
    }
}

/// As the store takes them: a file without a text keeps what was known of it.
fn texts(files: &Files) -> Texts {
    let text = |content: &Content| match content {
        Content::Text(text) => Ok(text.to_string()),
        Content::Unusable(reason) => Err(reason.clone()),
    };
    files
        .iter()
        .map(|(path, content)| (path.clone(), text(content)))
        .collect()
}

#[cfg(test)]
mod tests;
