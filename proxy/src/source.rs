//! From files to the snapshot in force.
//!
//! Invariants: a resource that is refused keeps its last good version, or fails closed; a source
//! that is lost changes nothing; every refusal is counted and logged once and shown for as long as
//! it lasts; nothing is published before the whole folder was read.

pub(crate) mod folder;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use sidegate_mesh::store::{ResourceSet, ResourceStore};
use sidegate_mesh::{Clock, Problem, Severity, Snapshot, Workload};
use tracing::{error, info, warn};

use crate::metrics::Metrics;
use crate::state::State;
use folder::{Content, Files, Folder, Lost};

/// What the source last said, for the administration port. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Report(Arc<ArcSwap<Reading>>);

/// One reading of the source.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reading {
    /// When it was taken; `None` before the first.
    pub(crate) read_at: Option<SystemTime>,
    /// Why the source could not be read, if so; what was read before stays in force.
    pub(crate) lost: Option<String>,
    /// What is wrong with resources.
    pub(crate) problems: Vec<Problem>,
    /// The resources in force.
    pub(crate) resources: ResourceSet,
}

impl Report {
    /// The last reading.
    pub(crate) fn current(&self) -> Arc<Reading> {
        self.0.load_full()
    }
}

/// Follows a folder and publishes what it says.
pub(crate) struct FolderSource {
    folder: Folder,
    store: ResourceStore,
    workload: Arc<Workload>,
    state: State,
    metrics: Arc<Metrics>,
    clock: Arc<dyn Clock>,
    report: Report,
    reported: HashSet<String>,
}

impl FolderSource {
    /// Publishes into `state` what `folder` says about `workload`.
    pub(crate) fn new(
        folder: Folder,
        workload: Arc<Workload>,
        state: State,
        metrics: Arc<Metrics>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self {
            folder,
            store: ResourceStore::new(),
            workload,
            state,
            metrics,
            clock,
            report: Report::default(),
            reported: HashSet::new(),
        }
    }

    /// Where the last reading can be seen.
    pub(crate) fn report(&self) -> Report {
        self.report.clone()
    }

    /// Follows the folder for ever.
    pub(crate) async fn run(mut self) {
        loop {
            match self.folder.next().await {
                Ok(files) => self.apply(&files),
                Err(lost) => self.lose(&lost),
            }
        }
    }

    /// A lost source changes nothing: what is in force stays in force.
    fn lose(&mut self, lost: &Lost) {
        self.metrics.snapshot_rejections.inc();
        error!(error = %lost, "resources lost, the last ones stay in force");
        let reading = Reading {
            read_at: Some(self.clock.now()),
            lost: Some(lost.to_string()),
            ..(*self.report.current()).clone()
        };
        self.report.0.store(Arc::new(reading));
    }

    fn apply(&mut self, files: &Files) {
        let mut problems = self.store.replace_files(&texts(files));
        let set = self.store.resources().clone();
        let (snapshot, warnings) = self.compile(&set);
        problems.extend(warnings);
        if files.is_empty() {
            let message =
                "the resources folder has no resource files: nobody is called or admitted";
            problems.push(Problem {
                severity: Severity::Warning,
                ..Problem::of_file("", message, "put policies and services into it")
            });
        }
        self.say(&problems);
        let number = snapshot.number;
        self.report.0.store(Arc::new(Reading {
            read_at: Some(self.clock.now()),
            lost: None,
            problems,
            resources: set,
        }));
        self.state.publish(Arc::new(snapshot));
        self.metrics.snapshot_number.set(number);
        info!(generation = number, "snapshot published");
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

/// As the store takes them: a file without a text keeps what was known of it.
fn texts(files: &Files) -> Vec<(String, Result<String, String>)> {
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
