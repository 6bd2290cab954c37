//! Calls of a cluster: what its sidecars wrote, merged in the order of their times.
//!
//! Always true: what is held back to be sorted is bounded in time and in size; where a bound
//! bites, the newest is what remains, and that is said.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use sidegate_mesh::access_log::timestamp;
use time::OffsetDateTime;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::LogsArgs;
use super::denials::Denials;
use super::filter::Filter;
use super::show::{Entry, Printer};
use super::source::Raw;
use crate::kube::Cluster;
use crate::kube::log::{Event, Line, Logs, Place};
use crate::kube::sidecars::{Selection, Sidecar};

/// Most bytes of lines that are held to be sorted; of more, the newest are shown.
const HELD_BYTES_MAX: usize = 256 * 1024 * 1024;

/// Entries that are printed at once.
const PRINTED_MAX: usize = 10_000;

/// How long a line that has come waits for those that should be before it.
const WINDOW: Duration = Duration::from_millis(500);

/// Lines that wait so at most.
const WAITING_MAX: usize = 10_000;

/// Longest time between two looks at what waits.
const TICK: Duration = Duration::from_millis(100);

/// Lines on their way from the followers.
const EVENTS_MAX: usize = 1024;

/// Shows what the arguments ask for, of the cluster that they name.
///
/// # Errors
///
/// When the cluster cannot be asked, no sidecar is meant, or nothing can be written.
pub(super) fn run(arguments: &LogsArgs, printer: &mut Printer<impl Write>) -> anyhow::Result<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let code = runtime.block_on(async {
        let cluster = Cluster::connect(&arguments.cluster).await?;
        show(arguments, cluster, printer, &mut io::stderr()).await
    });
    // Nobody waits for what is still on its way.
    runtime.shutdown_background();
    code
}

/// Returns 1 when some log could not be read.
pub(super) async fn show(
    arguments: &LogsArgs,
    cluster: Cluster,
    printer: &mut Printer<impl Write>,
    notes: &mut impl Write,
) -> anyhow::Result<u8> {
    let selection = Selection::new(
        &cluster,
        arguments.workload.as_deref(),
        arguments.namespace.as_deref(),
        arguments.all_namespaces,
    )?;
    let now = OffsetDateTime::now_utc();
    let mut view = View {
        filter: Filter::of_pods(arguments, selection.scope.namespace(), now),
        denials: arguments.denied.then(Denials::default),
        printer,
        notes,
        noted: false,
    };
    let sidecars = if arguments.follow {
        cluster.sidecars(&selection).await?
    } else {
        cluster.some_sidecars(&selection).await?
    };
    if sidecars.is_empty() {
        view.note(&format!("no sidecar of {} yet", selection.words()))?;
    }
    let logs = Logs {
        cluster,
        selection,
        since: arguments.since,
    };
    let places = view.show_past(&logs, &sidecars).await?;
    if arguments.follow {
        view.show_coming(logs, places).await?;
    }
    Ok(u8::from(view.noted && !arguments.follow))
}

struct View<'a, W, N> {
    filter: Filter,
    denials: Option<Denials>,
    printer: &'a mut Printer<W>,
    notes: &'a mut N,
    noted: bool,
}

impl<W: Write, N: Write> View<'_, W, N> {
    fn note(&mut self, note: &str) -> anyhow::Result<()> {
        self.noted = true;
        writeln!(self.notes, "sidegate: {note}")?;
        Ok(())
    }

    /// Shows what was written until now; returns how far that was.
    async fn show_past(
        &mut self,
        logs: &Logs,
        sidecars: &[Sidecar],
    ) -> anyhow::Result<HashMap<String, Place>> {
        let mut held = Held::default();
        let mut notes = Vec::new();
        let gathered = logs.gather(sidecars, |event| match event {
            Event::Line(line) => {
                let workload = Arc::clone(&line.workload);
                if let Some(entry) = entry(&self.filter, line) {
                    held.take(entry, workload, self.denials.as_mut());
                }
            }
            Event::Note(note) => notes.push(note),
        });
        let places = gathered.await?;
        if let Some(denials) = &mut self.denials {
            let asked: Vec<_> = sidecars
                .iter()
                .filter(|sidecar| sidecar.running)
                .cloned()
                .collect();
            let answers = logs.cluster.ask_all::<Vec<Value>>(&asked, "/denials").await;
            let mut failures = Vec::new();
            for (sidecar, answer) in asked.iter().zip(answers) {
                match answer {
                    Ok(refusals) => held.remember(sidecar, &refusals, denials, &self.filter),
                    Err(error) => failures.push(error),
                }
            }
            notes.extend(missing(&failures));
        }
        for note in notes {
            self.note(&note)?;
        }
        if held.lost > 0 {
            let (shown, all) = (held.lines.len(), held.number);
            writeln!(
                self.notes,
                "sidegate: the latest {shown} of {all} calls are shown; choose with --since or filters"
            )?;
        }
        self.print_held(held)?;
        Ok(places)
    }

    fn print_held(&mut self, held: Held) -> anyhow::Result<()> {
        let mut lines = held.lines.into_iter().peekable();
        if lines.peek().is_none() {
            return self.printer.print(Vec::new());
        }
        while lines.peek().is_some() {
            let part = lines.by_ref().take(PRINTED_MAX);
            let entries = part.filter_map(|((time, _), (raw, workload))| {
                Some(self.filter.entry_of(raw, &workload)?.or_at(&time))
            });
            let entries = entries.collect();
            self.printer.print(entries)?;
        }
        Ok(())
    }

    /// Shows what comes, until the reader has enough.
    async fn show_coming(
        &mut self,
        logs: Logs,
        places: HashMap<String, Place>,
    ) -> anyhow::Result<()> {
        let (lines, mut events) = mpsc::channel(EVENTS_MAX);
        let mut followers = JoinSet::new();
        followers.spawn(logs.follow(places, lines));
        let mut waiting = Waiting::default();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    Some(Event::Line(line)) => self.wait(line, &mut waiting),
                    Some(Event::Note(note)) => self.note(&note)?,
                    None => break,
                },
                _now = tick.tick() => {}
            }
            let due = waiting.take_due(Instant::now());
            if !due.is_empty() {
                self.printer.print(due)?;
            }
        }
        self.printer.print(waiting.take_all())?;
        match followers.join_next().await {
            Some(ended) => ended?,
            None => Ok(()),
        }
    }

    fn wait(&mut self, line: Line, waiting: &mut Waiting) {
        let (pod, text) = (Arc::clone(&line.raw.file), line.raw.text.clone());
        let Some(entry) = entry(&self.filter, line) else {
            return;
        };
        // What was shown from a sidecar's memory before its log gave it.
        let shown = |denials: &mut Denials| denials.forget(&pod, &text);
        if !self.denials.as_mut().is_some_and(shown) {
            waiting.push(entry, Instant::now());
        }
    }
}

/// That some sidecars did not say what they remember.
fn missing(failures: &[anyhow::Error]) -> Option<String> {
    let first = failures.first()?;
    Some(match failures.len() {
        1 => format!("what it remembers is missing: {first:#}"),
        count => format!("what {count} sidecars remember is missing; the first: {first:#}"),
    })
}

/// The entry of a line, if it is to be shown; one that says no time has that of its writing.
fn entry(filter: &Filter, line: Line) -> Option<Entry> {
    let written = line.written.map(|written| timestamp(written.into()));
    let entry = filter.entry_of(line.raw, &line.workload)?;
    Some(entry.or_at(&written.unwrap_or_default()))
}

/// A line, and whose sidecar wrote it.
type OfSidecar = (Raw, Arc<str>);

/// Lines that are held until all are there, by time.
#[derive(Default)]
struct Held {
    lines: BTreeMap<(String, u64), OfSidecar>,
    number: u64,
    bytes: usize,
    lost: u64,
}

impl Held {
    fn take(&mut self, entry: Entry, workload: Arc<str>, denials: Option<&mut Denials>) {
        let time = entry.time().to_owned();
        let raw = entry.into_raw();
        if let Some(denials) = denials {
            denials.see(&raw.file, &raw.text);
        }
        self.push(time, (raw, workload), HELD_BYTES_MAX);
    }

    fn push(&mut self, time: String, line: OfSidecar, bytes_max: usize) {
        self.bytes += size(&line.0);
        self.number += 1;
        self.lines.insert((time, self.number), line);
        while self.bytes > bytes_max {
            let Some((_, (oldest, _))) = self.lines.pop_first() else {
                return;
            };
            self.bytes -= size(&oldest);
            self.lost += 1;
        }
    }

    /// Adds the refusals that a sidecar remembers and no log has.
    fn remember(
        &mut self,
        sidecar: &Sidecar,
        refusals: &[Value],
        denials: &mut Denials,
        filter: &Filter,
    ) {
        let (pod, workload): (String, Arc<str>) = (sidecar.name(), sidecar.workload().into());
        for (number, refusal) in (1..).zip(refusals) {
            let text = refusal.to_string();
            if !denials.is_new(&pod, &text) {
                continue;
            }
            let raw = Raw {
                file: pod.as_str().into(),
                number,
                text,
            };
            if let Some(entry) = filter.entry_of(raw, &workload) {
                self.take(entry, Arc::clone(&workload), None);
            }
        }
    }
}

/// A line and what is kept beside it.
fn size(raw: &Raw) -> usize {
    raw.text.len() + 128
}

/// Entries that have come and wait for those that should be before them.
#[derive(Default)]
struct Waiting {
    entries: BTreeMap<(String, u64), (Instant, Entry)>,
    number: u64,
}

impl Waiting {
    fn push(&mut self, entry: Entry, now: Instant) {
        self.number += 1;
        self.entries
            .insert((entry.time().to_owned(), self.number), (now, entry));
    }

    /// What has waited long enough, with all that is before it; and the oldest half of too many.
    fn take_due(&mut self, now: Instant) -> Vec<Entry> {
        let due = |came: &Instant| now.duration_since(*came) >= WINDOW;
        let waited = self.entries.iter().rev().find(|(_, (came, _))| due(came));
        let mut last = waited.map(|(key, _)| key.clone());
        if self.entries.len() > WAITING_MAX {
            let half = self.entries.keys().nth(WAITING_MAX / 2).cloned();
            last = last.max(half);
        }
        let Some(last) = last else {
            return Vec::new();
        };
        let mut rest = self.entries.split_off(&last);
        let at_last = rest.remove(&last);
        let taken = std::mem::replace(&mut self.entries, rest);
        let entries = taken.into_values().chain(at_last).map(|(_, entry)| entry);
        entries.collect()
    }

    fn take_all(&mut self) -> Vec<Entry> {
        let entries = std::mem::take(&mut self.entries).into_values();
        entries.map(|(_, entry)| entry).collect()
    }
}

#[cfg(test)]
mod tests;
