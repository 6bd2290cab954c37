//! `sidegate top`: live rates, success and latency for each caller and called.
//!
//! Invariant: what is kept is bounded, in time by the window and in number by [`SAMPLES_MAX`].

mod cluster;

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::Line as Text;
use ratatui::widgets::{Row, Table};
use ratatui::{DefaultTerminal, Frame};
use serde::Serialize;
use sidegate_mesh::access_log::{Line, escape};
use time::OffsetDateTime;

use crate::kube::ClusterArgs;
use crate::logs::filter::{Filter, is_of};
use crate::logs::show::{called, caller};
use crate::logs::source::Folder;
use crate::output::{Format, print_table};

/// Most calls that are kept; of a window with more, the latest.
const SAMPLES_MAX: usize = 500_000;

/// How much of the end of each log is read at first.
const BACKFILL_BYTES: u64 = 8 * 1024 * 1024;

const HEADER: [&str; 9] = [
    "CALLER", "CALLED", "RPS", "SUCCESS", "DENIED", "P50 MS", "P95 MS", "P99 MS", "CALLS",
];

const EXAMPLES: &str = "\
Calls are counted where they were served; those that failed before, where they were made.
On a terminal the screen is live, and q ends it. Elsewhere, and with --once, one table is
printed after one interval.

Without --dir, the sidecars of a cluster are followed: those of the context's namespace, of -n NS,
or with -A of all; WORKLOAD is meant as by `sidegate logs`.

Examples:
  sidegate top -n shop
  sidegate top -A --once --interval 5s
  sidegate top --dir /tmp/mesh
  sidegate top --dir /tmp/mesh --once --interval 5s -o json";

/// Live rates, success and latency per caller and called.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct TopArgs {
    /// Only calls that this workload's sidecars know.
    #[arg(conflicts_with = "dir")]
    workload: Option<String>,
    /// Namespace whose sidecars are followed; default: the context's.
    #[arg(short, long, value_name = "NS", conflicts_with = "dir")]
    namespace: Option<String>,
    /// The sidecars of all namespaces.
    #[arg(short = 'A', long, conflicts_with_all = ["namespace", "dir"])]
    all_namespaces: bool,
    /// Folder of `sidegate demo --dir DIR`, instead of a cluster.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["kubeconfig", "context"])]
    dir: Option<PathBuf>,
    /// Print one table after one interval, and end.
    #[arg(long)]
    once: bool,
    /// Time between two looks.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = humantime::parse_duration)]
    interval: Duration,
    /// Time over which rates and latencies are taken.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
    window: Duration,
    /// How the one table is printed.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// Shows what the logs of a folder or a cluster say about the last seconds.
///
/// # Errors
///
/// When there is no log, the cluster cannot be asked, or the terminal cannot be used.
pub(crate) fn run(arguments: &TopArgs) -> anyhow::Result<u8> {
    let source = match &arguments.dir {
        Some(dir) => {
            let folder = Folder::open(&dir.join("logs"))?.near_end(BACKFILL_BYTES);
            Source::Folder(folder, Box::new(Filter::each_call_once()))
        }
        None => Source::Cluster(cluster::Followed::start(arguments)?),
    };
    let mut view = View::new(source, arguments.window);
    if arguments.once || !io::stdout().is_terminal() {
        view.look(OffsetDateTime::now_utc())?;
        std::thread::sleep(arguments.interval);
        let pairs = view.look(OffsetDateTime::now_utc())?;
        print_once(&mut io::stdout().lock(), &pairs, arguments.output)?;
        return Ok(0);
    }
    let mut terminal = ratatui::try_init().context("cannot use the terminal; try --once")?;
    let outcome = live(&mut terminal, &mut view, arguments.interval);
    ratatui::restore();
    outcome?;
    Ok(0)
}

fn print_once(out: &mut impl Write, pairs: &[Pair], format: Format) -> anyhow::Result<()> {
    if format != Format::Table {
        return format.print(out, &pairs);
    }
    print_table(out, &HEADER, pairs.iter().map(|pair| pair.cells().to_vec()))?;
    Ok(())
}

fn live(terminal: &mut DefaultTerminal, view: &mut View, interval: Duration) -> anyhow::Result<()> {
    loop {
        let pairs = view.look(OffsetDateTime::now_utc())?;
        terminal.draw(|frame| draw(frame, &pairs, view.window, view.note().as_deref()))?;
        if quits_within(interval)? {
            return Ok(());
        }
    }
}

/// Waits for `interval`, less when a key ends it all or the screen has to be drawn anew.
fn quits_within(interval: Duration) -> io::Result<bool> {
    let since = Instant::now();
    while let Some(left) = interval.checked_sub(since.elapsed()) {
        if !event::poll(left)? {
            break;
        }
        match event::read()? {
            Event::Key(key) if key.kind == KeyEventKind::Press => {
                let control_c =
                    key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c');
                if control_c || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) {
                    return Ok(true);
                }
            }
            Event::Resize(..) => break,
            _ => {}
        }
    }
    Ok(false)
}

fn draw(frame: &mut Frame<'_>, pairs: &[Pair], window: Duration, note: Option<&str>) {
    let [top, body, bottom] = Layout::vertical([
        Constraint::Length(2),
        Constraint::Fill(1),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    let rate: f64 = pairs.iter().map(|pair| pair.rps).sum();
    let title = format!(
        " sidegate top   {rate:.1} calls/s over {}",
        humantime::format_duration(window)
    );
    frame.render_widget(Text::from(title).bold(), top);
    let rows = pairs.iter().map(|pair| {
        let tone = if pair.success < 0.99 {
            Style::new().fg(Color::Red)
        } else {
            Style::new()
        };
        Row::new(pair.cells()).style(tone)
    });
    let names = pairs
        .iter()
        .flat_map(|pair| [pair.caller.len(), pair.called.len()])
        .max()
        .unwrap_or(0);
    let name = u16::try_from(names.clamp(8, 40)).unwrap_or(40);
    let widths = [name, name, 9, 8, 7, 9, 9, 9, 9].map(Constraint::Length);
    let table = Table::new(rows, widths)
        .header(Row::new(HEADER).bold())
        .column_spacing(2);
    frame.render_widget(table, body);
    let hint = match note {
        Some(note) => format!(" {}; q ends", escape(note)),
        None if pairs.is_empty() => " no calls yet; q ends".to_owned(),
        None => " q ends".to_owned(),
    };
    frame.render_widget(Text::from(hint).dim(), bottom);
}

/// One caller and called over the window.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Pair {
    caller: String,
    called: String,
    rps: f64,
    /// From 0 to 1.
    success: f64,
    denied: u64,
    p50_ms: f64,
    p95_ms: f64,
    p99_ms: f64,
    calls: u64,
}

impl Pair {
    fn cells(&self) -> [String; 9] {
        [
            escape(&self.caller).into_owned(),
            escape(&self.called).into_owned(),
            format!("{:.1}", self.rps),
            format!("{:.1}%", self.success * 100.0),
            self.denied.to_string(),
            format!("{:.1}", self.p50_ms),
            format!("{:.1}", self.p95_ms),
            format!("{:.1}", self.p99_ms),
            self.calls.to_string(),
        ]
    }
}

/// One record of the window.
struct Sample {
    ended: OffsetDateTime,
    caller: String,
    called: String,
    calls: u64,
    failed: bool,
    denied: bool,
    ms: f64,
}

/// Where calls come from.
enum Source {
    Folder(Folder, Box<Filter>),
    Cluster(cluster::Followed),
}

/// What the logs say about the last seconds.
struct View {
    source: Source,
    window: Duration,
    samples: VecDeque<Sample>,
}

impl View {
    fn new(source: Source, window: Duration) -> Self {
        Self {
            source,
            window,
            samples: VecDeque::new(),
        }
    }

    /// Reads on, forgets what is older than the window, and adds up the rest, busiest first.
    fn look(&mut self, now: OffsetDateTime) -> anyhow::Result<Vec<Pair>> {
        let samples = &mut self.samples;
        let mut add = |sample: Sample| {
            samples.push_back(sample);
            if samples.len() > SAMPLES_MAX {
                samples.pop_front();
            }
        };
        match &mut self.source {
            Source::Folder(folder, filter) => folder.read(false, |raw| {
                sample_of(&raw.text, filter, None)
                    .into_iter()
                    .for_each(&mut add);
            })?,
            Source::Cluster(followed) => followed.take()?.into_iter().for_each(&mut add),
        }
        let window = self.window;
        samples.retain(|sample| now - sample.ended <= window);
        Ok(self.pairs())
    }

    /// What whoever looks should know.
    fn note(&self) -> Option<String> {
        match &self.source {
            Source::Folder(..) => None,
            Source::Cluster(followed) => followed.note(),
        }
    }

    fn pairs(&self) -> Vec<Pair> {
        let mut by_pair: BTreeMap<(&str, &str), Vec<&Sample>> = BTreeMap::new();
        for sample in &self.samples {
            by_pair
                .entry((&sample.caller, &sample.called))
                .or_default()
                .push(sample);
        }
        let mut pairs: Vec<Pair> = by_pair
            .into_iter()
            .map(|(names, samples)| add_up(names, &samples, self.window))
            .collect();
        pairs.sort_by_key(|pair| std::cmp::Reverse(pair.calls));
        pairs
    }
}

/// The call of a line, if it counts; of a sidecar's line only when it is about `workload`.
fn sample_of(text: &str, filter: &Filter, workload: Option<&str>) -> Option<Sample> {
    let line = Line::parse(text).ok()?;
    let is_own = workload.is_none_or(|workload| is_of(&line, workload));
    let counts = is_own && line.is_access() && filter.admits(&line);
    counts.then(|| sample(&line))?
}

/// A record counts when its call ended.
fn sample(line: &Line) -> Option<Sample> {
    let ms = line
        .duration_ms
        .filter(|ms| ms.is_finite() && *ms >= 0.0)
        .unwrap_or_default();
    Some(Sample {
        ended: line
            .at()?
            .checked_add(time::Duration::seconds_f64(ms.min(1e12) / 1000.0))?,
        caller: caller(line),
        called: called(line),
        calls: line.calls(),
        failed: line.failed(),
        denied: line.decision.as_deref() == Some("deny"),
        ms,
    })
}

fn add_up(names: (&str, &str), samples: &[&Sample], window: Duration) -> Pair {
    let count = |of: fn(&Sample) -> bool| -> u64 {
        samples
            .iter()
            .filter(|sample| of(sample))
            .map(|sample| sample.calls)
            .sum()
    };
    let (calls, failed) = (count(|_| true), count(|sample| sample.failed));
    let mut ms: Vec<f64> = samples.iter().map(|sample| sample.ms).collect();
    ms.sort_by(f64::total_cmp);
    let calls_f64 = as_f64(calls);
    Pair {
        caller: names.0.to_owned(),
        called: names.1.to_owned(),
        rps: calls_f64 / window.as_secs_f64().max(0.001),
        success: 1.0 - as_f64(failed) / calls_f64.max(1.0),
        denied: count(|sample| sample.denied),
        p50_ms: percentile(&ms, 50),
        p95_ms: percentile(&ms, 95),
        p99_ms: percentile(&ms, 99),
        calls,
    }
}

/// Nearest rank: the smallest value that `percent` of all do not exceed.
fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted
        .get(rank.saturating_sub(1))
        .copied()
        .unwrap_or_default()
}

fn as_f64(count: u64) -> f64 {
    u32::try_from(count).map_or(f64::from(u32::MAX), f64::from)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use time::format_description::well_known::Rfc3339;

    use super::*;

    fn at(second: &str) -> OffsetDateTime {
        OffsetDateTime::parse(&format!("2026-11-24T07:00:{second}Z"), &Rfc3339).unwrap()
    }

    fn call(second: &str, caller: &str, ms: f64, more: &str) -> String {
        format!(
            "{{\"kind\":\"access\",\"time\":\"2026-11-24T07:00:{second}.000000Z\",\"duration_ms\":{ms:?},\
             \"direction\":\"inbound\",\"source\":\"spiffe://m/ns/shop/sa/{caller}\",\
             \"destination\":\"spiffe://m/ns/shop/sa/orders\",{more}}}\n"
        )
    }

    fn view(log: &str) -> (tempfile::TempDir, View) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.log"), log).unwrap();
        let folder = Folder::open(dir.path()).unwrap();
        let source = Source::Folder(folder, Box::new(Filter::each_call_once()));
        let view = View::new(source, Duration::from_secs(10));
        (dir, view)
    }

    fn busy() -> String {
        let ok = "\"status\":200,\"decision\":\"allow\"";
        let mut log: String = (1..=98)
            .map(|ms| call("05", "web", f64::from(ms), ok))
            .collect();
        log += &call("06", "web", 500.0, "\"status\":503,\"error\":\"timeout\"");
        log += &call("06", "web", 0.1, "\"status\":403,\"decision\":\"deny\"");
        log += &call("06", "batch", 1.0, "\"decision\":\"deny\",\"count\":20");
        log += &call("00", "old", 1.0, ok);
        log += "broken\n";
        log + &call("05", "web", 1.0, ok).replace("inbound", "outbound")
    }

    #[test]
    fn rates_success_and_latency_are_per_pair_and_of_the_window() {
        let (_dir, mut view) = view(&busy());
        let pairs = view.look(at("12")).unwrap();
        let mut out = Vec::new();
        print_once(&mut out, &pairs, Format::Table).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "\
CALLER      CALLED       RPS   SUCCESS  DENIED  P50 MS  P95 MS  P99 MS  CALLS
shop/web    shop/orders  10.0  98.0%    1       49.0    94.0    98.0    100
shop/batch  shop/orders  2.0   0.0%     20      1.0     1.0     1.0     20
"
        );
        assert!(
            view.look(at("40")).unwrap().is_empty(),
            "the window has moved on"
        );
    }

    #[test]
    fn new_calls_are_added_as_they_come() {
        let (dir, mut view) = view(&call("01", "web", 1.0, "\"status\":200"));
        assert_eq!(view.look(at("02")).unwrap()[0].calls, 1);
        let more = busy() + &call("07", "web", 1.0, "\"status\":200");
        fs::write(dir.path().join("b.log"), more).unwrap();
        assert_eq!(view.look(at("08")).unwrap()[0].calls, 102);
    }

    #[test]
    fn the_screen_shows_the_pairs() {
        let (_dir, mut view) = view(&busy());
        let pairs = view.look(at("12")).unwrap();
        let mut terminal = Terminal::new(TestBackend::new(100, 8)).unwrap();
        terminal
            .draw(|frame| draw(frame, &pairs, Duration::from_secs(10), None))
            .unwrap();
        let screen = terminal.backend().to_string();
        assert!(
            screen.contains("sidegate top   12.0 calls/s over 10s"),
            "{screen}"
        );
        assert!(
            screen.contains("shop/web     shop/orders  10.0       98.0%"),
            "{screen}"
        );
        assert!(screen.contains("q ends"), "{screen}");
    }

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        assert_eq!(percentile(&[], 99).to_bits(), 0);
        let ten: Vec<f64> = (1..=10).map(f64::from).collect();
        let found = [50, 95, 99].map(|percent| format!("{}", percentile(&ten, percent)));
        assert_eq!(found, ["5", "10", "10"]);
    }
}
