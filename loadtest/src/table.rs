//! What the terminal shows of a run.

use comfy_table::{Cell, CellAlignment, Table, presets};

use crate::baseline::Change;
use crate::results::{Percentiles, Run};

/// A run as text.
pub(crate) fn run(run: &Run) -> String {
    let mut text = format!("{}\n\n", headline(run));
    text.push_str(&latencies(run));
    text.push_str("\n\n");
    text.push_str(&counts(run));
    for error in &run.errors {
        text.push_str(&format!(
            "  {} × {}: {}\n",
            error.count, error.kind, error.example
        ));
    }
    for (status, count) in &run.statuses {
        text.push_str(&format!("  {count} × status {status}\n"));
    }
    for (status, count) in &run.grpc_statuses {
        text.push_str(&format!("  {count} × grpc-status {status}\n"));
    }
    text.push_str(&generator(run));
    for warning in &run.verdict.warnings {
        text.push_str(&format!("warning: {warning}\n"));
    }
    if !run.verdict.conclusive {
        text.push_str("NO CONCLUSION: these figures are not the target's\n");
        for reason in &run.verdict.reasons {
            text.push_str(&format!("  {reason}\n"));
        }
    }
    text
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

fn counts(run: &Run) -> String {
    let counts = &run.counts;
    let mut text = format!("throughput {:.1} calls/s\n", run.throughput);
    if run.load.rate.is_some() {
        text.push_str(&format!(
            "scheduled {} = sent {} + missed {}; {} found no free connection or stream, {} began over 1 ms late\n",
            counts.scheduled, counts.sent, counts.missed, counts.queued, counts.late
        ));
    }
    text.push_str(&format!(
        "sent {} = answered {} + failed {} + unfinished {} (warm-up: {} more)\n",
        counts.sent, counts.answered, counts.failed, counts.unfinished, counts.warmup_sent
    ));
    text
}

fn generator(run: &Run) -> String {
    format!(
        "generator: busiest thread {:.0} % of a CPU, waited {:.0} % of the time for one\n",
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
pub(crate) fn changes(changes: &[Change]) -> String {
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
    table.trim_fmt()
}
