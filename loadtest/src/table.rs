//! What the terminal shows of a run.

use comfy_table::{Cell, CellAlignment, Table, presets};

use crate::baseline::Change;
use crate::goals::Goal;
use crate::results::{Percentiles, Run};
use crate::summary::{self, Against, Cell as Group, Spread};

/// A run as text.
pub(crate) fn run(run: &Run) -> String {
    let mut lines = vec![headline(run), String::new(), latencies(run), String::new()];
    lines.extend(counts(run));
    let errors = run.errors.iter();
    lines.extend(
        errors.map(|error| format!("  {} × {}: {}", error.count, error.kind, error.example)),
    );
    let statuses = run.statuses.iter();
    lines.extend(statuses.map(|(status, count)| format!("  {count} × status {status}")));
    let statuses = run.grpc_statuses.iter();
    lines.extend(statuses.map(|(status, count)| format!("  {count} × grpc-status {status}")));
    lines.push(generator(run));
    lines.extend(
        run.verdict
            .warnings
            .iter()
            .map(|warning| format!("warning: {warning}")),
    );
    if !run.verdict.conclusive {
        lines.push("NO CONCLUSION: these figures are not the target's".to_owned());
        lines.extend(
            run.verdict
                .reasons
                .iter()
                .map(|reason| format!("  {reason}")),
        );
    }
    lines.push(String::new());
    lines.join("\n")
}

/// What a load was, in one line.
pub(crate) fn headline(run: &Run) -> String {
    let load = &run.load;
    let how = match load.rate {
        Some(rate) => format!("open loop, {rate} calls/s"),
        None => "closed loop".to_owned(),
    };
    let via = load
        .proxy
        .as_ref()
        .map_or_else(String::new, |proxy| format!(" through {proxy}"));
    format!(
        "{} {}{via}: {}, {how}, {} connections × {} streams, {:.1} s",
        load.method, load.url, load.protocol, load.connections, load.streams, run.elapsed_s
    )
}

fn latencies(run: &Run) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["", "min", "mean", "p50", "p90", "p99", "p99.9", "max"]);
    let mut row = |name: &str, of: &Percentiles| {
        let values = [of.min, of.mean, of.p50, of.p90, of.p99, of.p999, of.max];
        let cells =
            values.map(|value| Cell::new(duration(value)).set_alignment(CellAlignment::Right));
        table.add_row(std::iter::once(Cell::new(name)).chain(cells));
    };
    row("latency from intended start", &run.latency_us);
    row("  from actual start", &run.service_us);
    if run.load.rate.is_some() {
        row("  generator's lag in it", &run.generator.lag_us);
    }
    table.trim_fmt()
}

fn counts(run: &Run) -> Vec<String> {
    let counts = &run.counts;
    let mut lines = vec![format!("throughput {:.1} calls/s", run.throughput)];
    if run.load.rate.is_some() {
        lines.push(format!(
            "scheduled {} = sent {} + missed {}; {} found no free connection or stream, {} began over 1 ms late",
            counts.scheduled, counts.sent, counts.missed, counts.queued, counts.late
        ));
    }
    lines.push(format!(
        "sent {} = answered {} + failed {} + unfinished {} (warm-up: {} more)",
        counts.sent, counts.answered, counts.failed, counts.unfinished, counts.warmup_sent
    ));
    lines
}

fn generator(run: &Run) -> String {
    format!(
        "generator: busiest thread {:.0} % of a CPU, waited {:.0} % of the time for one",
        run.generator.cpu_share * 100.0,
        run.generator.waiting_share * 100.0
    )
}

/// Microseconds, as a person reads them.
pub(crate) fn duration(micros: f64) -> String {
    match micros {
        _ if micros < 10.0 => format!("{micros:.1} µs"),
        _ if micros < 1e3 => format!("{micros:.0} µs"),
        _ if micros < 1e6 => format!("{:.2} ms", micros / 1e3),
        _ => format!("{:.2} s", micros / 1e6),
    }
}

/// A comparison with a baseline as text.
pub(crate) fn changes(changes: &[Change], doubtful: usize) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["against the baseline", "before", "now", "change", ""]);
    for change in changes {
        table.add_row([
            change.name.clone(),
            format!("{:.1} {}", change.before, change.unit),
            format!("{:.1} {}", change.now, change.unit),
            format!("{:+.1} %", (change.now / change.before - 1.0) * 100.0),
            if change.regressed { "REGRESSION" } else { "" }.to_owned(),
        ]);
    }
    let text = table.trim_fmt();
    if doubtful == 0 {
        return text;
    }
    format!(
        "{text}\n{doubtful} figures are not compared: the generator was the bottleneck, then or now"
    )
}

/// Rows, the first of them the head, as text.
pub(crate) fn text(rows: &[Vec<String>]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let mut rows = rows.iter();
    if let Some(head) = rows.next() {
        table.set_header(head);
    }
    for row in rows {
        let cells = row.iter().enumerate().map(|(column, text)| {
            let right = if column < 2 {
                CellAlignment::Left
            } else {
                CellAlignment::Right
            };
            Cell::new(text).set_alignment(right)
        });
        table.add_row(cells);
    }
    table.trim_fmt()
}

fn head(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// Median and range of microseconds, in one unit.
fn range(spread: Option<Spread>) -> String {
    let Some(spread) = spread else {
        return String::new();
    };
    let (unit, name) = match spread.median.abs() {
        median if median < 1e3 => (1.0, "µs"),
        median if median < 1e6 => (1e3, "ms"),
        _ => (1e6, "s"),
    };
    let told = |value: f64| match value / unit {
        value if value.abs() < 10.0 => format!("{value:.2}"),
        value if value.abs() < 100.0 => format!("{value:.1}"),
        value => format!("{value:.0}"),
    };
    format!(
        "{} ({}–{}) {name}",
        told(spread.median),
        told(spread.low),
        told(spread.high)
    )
}

/// Ours over the peer's best mode.
pub(crate) fn ratio_rows(ratios: &[Against]) -> Vec<Vec<String>> {
    let mut rows = vec![head(&[
        "load",
        "figure",
        "sidegate",
        "peer's best",
        "peer",
        "ratio",
        "range",
    ])];
    rows.extend(ratios.iter().map(|ratio| {
        vec![
            ratio.load.clone(),
            ratio.what.clone(),
            format!("{:.1}", ratio.own.median),
            format!("{:.1}", ratio.other.median),
            ratio.peer.clone(),
            format!(
                "{:.2}{}",
                ratio.ratio.median,
                if ratio.doubtful { " ?" } else { "" }
            ),
            format!("{:.2}–{:.2}", ratio.ratio.low, ratio.ratio.high),
        ]
    }));
    rows
}

/// What is to be reached, and whether it was.
pub(crate) fn goal_rows(goals: &[Goal]) -> Vec<Vec<String>> {
    let names = [
        "target", "load", "value", "range", "against", "must", "aim", "result",
    ];
    let mut rows = vec![head(&names)];
    rows.extend(goals.iter().map(|goal| {
        let unit = if goal.unit == "ratio" { "" } else { &goal.unit };
        let told = |value: f64| format!("{value:.2} {unit}").trim_end().to_owned();
        let sign = if goal.higher_is_better { "≥" } else { "≤" };
        let value = goal.value.map(|value| told(value.median));
        let range = goal
            .value
            .map(|value| format!("{:.2}–{:.2}", value.low, value.high));
        vec![
            goal.what.clone(),
            goal.load.clone(),
            value.unwrap_or_default(),
            range.unwrap_or_default(),
            goal.peer.clone().unwrap_or_default(),
            format!("{sign} {}", told(goal.must)),
            goal.aim.map(told).unwrap_or_default(),
            goal.outcome.words().to_owned(),
        ]
    }));
    rows
}

/// Each load on each target, over its repetitions.
pub(crate) fn cell_rows(runs: &[Run]) -> Vec<Vec<String>> {
    let names = [
        "load",
        "target",
        "calls/s",
        "p50",
        "p90",
        "p99",
        "p99.9",
        "added p50",
        "added p99",
        "CPU µs/request out, in",
        "RSS MiB idle, peak",
    ];
    let mut rows = vec![head(&names)];
    let cells = summary::cells(runs);
    for cell in &cells {
        let rate = cell
            .spread(|run| run.throughput)
            .map_or_else(String::new, |spread| {
                let doubt = if cell.conclusive() { "" } else { " ?" };
                format!(
                    "{:.0} ({:.0}–{:.0}){doubt}",
                    spread.median, spread.low, spread.high
                )
            });
        let added = |of: fn(&Run) -> f64| {
            if cell.target == summary::DIRECT {
                String::new()
            } else {
                range(summary::added(cell, &cells, of))
            }
        };
        rows.push(vec![
            cell.load.to_owned(),
            cell.target.to_owned(),
            rate,
            range(cell.spread(|run| run.latency_us.p50)),
            range(cell.spread(|run| run.latency_us.p90)),
            range(cell.spread(|run| run.latency_us.p99)),
            range(cell.spread(|run| run.latency_us.p999)),
            added(|run| run.latency_us.p50),
            added(|run| run.latency_us.p99),
            processes(cell, |process| process.cpu_us_per_request, 1),
            memory(cell),
        ]);
    }
    rows
}

type Process = crate::results::ProcessFacts;

/// The medians of each process, in the order of the way.
fn processes(cell: &Group<'_>, of: fn(&Process) -> f64, digits: usize) -> String {
    let count = cell
        .runs
        .iter()
        .map(|run| run.processes.len())
        .max()
        .unwrap_or(0);
    let medians = (0..count).filter_map(|number| {
        let samples = cell
            .runs
            .iter()
            .filter_map(|run| run.processes.get(number))
            .map(of);
        Some(format!("{:.digits$}", Spread::of(samples)?.median))
    });
    medians.collect::<Vec<_>>().join(", ")
}

#[expect(clippy::cast_precision_loss, reason = "memory below 2^53 KiB")]
fn memory(cell: &Group<'_>) -> String {
    let most = |of: fn(&Process) -> u64| {
        let all = cell.runs.iter().flat_map(|run| &run.processes).map(of);
        all.max().map(|kib| kib as f64 / 1024.0)
    };
    let (idle, peak) = (
        most(|process| process.rss_idle_kib),
        most(|process| process.rss_peak_kib),
    );
    match (idle, peak) {
        (Some(idle), Some(peak)) => format!("{idle:.1}, {peak:.1}"),
        _ => String::new(),
    }
}

/// Every run's raw figures.
pub(crate) fn run_rows(runs: &[Run]) -> Vec<Vec<String>> {
    let names = [
        "load",
        "target",
        "#",
        "calls/s",
        "p50 µs",
        "p90 µs",
        "p99 µs",
        "p99.9 µs",
        "max µs",
        "sent",
        "answered",
        "failed",
        "unfinished",
        "missed",
        "late",
        "lag p99 µs",
        "generator CPU %",
    ];
    let mut rows = vec![head(&names)];
    rows.extend(runs.iter().map(|run| {
        let (latency, counts) = (&run.latency_us, &run.counts);
        let mut row = vec![
            run.load.name.clone(),
            run.target.clone(),
            run.repetition.to_string(),
            format!("{:.1}", run.throughput),
        ];
        let times = [
            latency.p50,
            latency.p90,
            latency.p99,
            latency.p999,
            latency.max,
        ];
        row.extend(times.map(|time| format!("{time:.1}")));
        let numbers = [
            counts.sent,
            counts.answered,
            counts.failed,
            counts.unfinished,
            counts.missed,
            counts.late,
        ];
        row.extend(numbers.map(|number| number.to_string()));
        row.push(format!("{:.1}", run.generator.lag_us.p99));
        row.push(format!("{:.0}", run.generator.cpu_share * 100.0));
        row
    }));
    rows
}
