//! `results.json`: what a run or a comparison found. `docs/loadtest.md` describes every field.
//!
//! Invariant: fields are only ever added. Times are microseconds unless the name says otherwise.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::clock::Nanos;
use crate::engine::{Load, Outcome};
use crate::goals::Goal;
use crate::machine::Machine;
use crate::recorder::Counts;
use crate::summary::Against;
use crate::sweep::{Knee, Point};
use crate::target::Call;
use crate::usage::Cpu;
use crate::verdict;

/// The version of the schema.
pub(crate) const SCHEMA: &str = "sidegate-loadtest/1";

/// The whole file.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Results {
    pub(crate) schema: String,
    /// `run`, `compare` or `sweep`.
    pub(crate) kind: String,
    /// RFC 3339, UTC.
    pub(crate) created: String,
    pub(crate) command: Vec<String>,
    pub(crate) versions: BTreeMap<String, String>,
    pub(crate) machine: Machine,
    pub(crate) runs: Vec<Run>,
    /// What a baseline is compared by.
    pub(crate) metrics: Vec<Metric>,
    /// Ours over the peer's best mode; empty for `run`.
    pub(crate) ratios: Vec<Against>,
    /// What idle connections take; empty for `run`.
    #[serde(default)]
    pub(crate) idle_connections: Vec<IdleFacts>,
    /// What is to be reached, and whether it was; empty for `run`.
    #[serde(default)]
    pub(crate) goals: Vec<Goal>,
    /// The points of a sweep.
    #[serde(default)]
    pub(crate) points: Vec<Point>,
    /// Where each target's latency bends upwards.
    #[serde(default)]
    pub(crate) knees: Vec<Knee>,
    /// What the peers were configured with: name, text.
    pub(crate) configurations: BTreeMap<String, String>,
    /// What a reader must know before the figures.
    pub(crate) notes: Vec<String>,
}

/// One load on one target.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Run {
    pub(crate) target: String,
    pub(crate) load: LoadFacts,
    pub(crate) repetition: u32,
    pub(crate) elapsed_s: f64,
    pub(crate) interrupted: bool,
    pub(crate) counts: CountFacts,
    /// Answered calls a second.
    pub(crate) throughput: f64,
    pub(crate) response_bytes: u64,
    pub(crate) errors: Vec<ErrorFacts>,
    pub(crate) statuses: BTreeMap<u16, u64>,
    pub(crate) grpc_statuses: BTreeMap<u16, u64>,
    /// From intended start to the last byte of the answer.
    pub(crate) latency_us: Percentiles,
    /// From actual start to the last byte of the answer.
    pub(crate) service_us: Percentiles,
    pub(crate) generator: GeneratorFacts,
    pub(crate) verdict: Verdict,
    /// Upper end of each filled bucket of the latency, in microseconds, and its calls.
    pub(crate) histogram: Vec<(f64, u64)>,
    pub(crate) timeline: Timeline,
    /// What the proxies used; empty for `run`.
    pub(crate) processes: Vec<ProcessFacts>,
}

/// What the load was.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct LoadFacts {
    pub(crate) name: String,
    pub(crate) url: String,
    pub(crate) protocol: String,
    pub(crate) method: String,
    pub(crate) grpc_method: Option<String>,
    pub(crate) proxy: Option<String>,
    pub(crate) body_bytes: usize,
    /// Calls a second; absent in a closed loop.
    pub(crate) rate: Option<f64>,
    pub(crate) connections: u32,
    pub(crate) streams: u32,
    pub(crate) threads: u32,
    /// Every call on a connection of its own.
    #[serde(default)]
    pub(crate) new_connections: bool,
    pub(crate) duration_s: f64,
    pub(crate) warmup_s: f64,
    pub(crate) timeout_s: f64,
}

/// `scheduled = missed + sent` in an open loop, `sent = answered + failed + unfinished` always.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(crate) struct CountFacts {
    pub(crate) scheduled: u64,
    pub(crate) missed: u64,
    pub(crate) sent: u64,
    pub(crate) answered: u64,
    pub(crate) failed: u64,
    pub(crate) unfinished: u64,
    pub(crate) warmup_sent: u64,
    pub(crate) queued: u64,
    pub(crate) late: u64,
}

/// Failed calls of one kind.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(crate) struct ErrorFacts {
    pub(crate) kind: String,
    pub(crate) count: u64,
    pub(crate) example: String,
}

/// A distribution.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub(crate) struct Percentiles {
    pub(crate) min: f64,
    pub(crate) mean: f64,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    pub(crate) max: f64,
}

/// How the generator itself did.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct GeneratorFacts {
    /// Of one CPU, the busiest thread.
    pub(crate) cpu_share: f64,
    /// Of the time, the busiest thread ready to run and without a CPU.
    pub(crate) waiting_share: f64,
    /// How late calls became due, all zero in a closed loop.
    pub(crate) lag_us: Percentiles,
}

/// Whether the figures say something about the target.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub(crate) struct Verdict {
    pub(crate) conclusive: bool,
    /// Why not.
    pub(crate) reasons: Vec<String>,
    /// What limits the figures without spoiling them.
    pub(crate) warnings: Vec<String>,
}

/// Latency over time: the filled cells as column, row, calls.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Timeline {
    pub(crate) column_ms: f64,
    pub(crate) columns: usize,
    /// Row `r` holds latencies from 2^(r/4) µs on.
    pub(crate) cells: Vec<(usize, usize, u32)>,
}

/// What one process used while the load was measured.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct ProcessFacts {
    pub(crate) name: String,
    pub(crate) cpu_us: f64,
    /// CPU over answered calls.
    pub(crate) cpu_us_per_request: f64,
    pub(crate) rss_idle_kib: u64,
    pub(crate) rss_peak_kib: u64,
}

/// What an idle mutual-TLS connection takes of the memory of the proxy that is called.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct IdleFacts {
    pub(crate) target: String,
    pub(crate) connections_per_sample: u32,
    /// One sample a batch.
    pub(crate) bytes_per_connection: Vec<f64>,
}

/// A figure with its samples: ten windows of a run, or the repetitions of a comparison.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Metric {
    pub(crate) name: String,
    pub(crate) unit: String,
    pub(crate) higher_is_better: bool,
    pub(crate) samples: Vec<f64>,
    /// A generator was the bottleneck in one of the runs: it is compared with nothing.
    #[serde(default)]
    pub(crate) doubtful: bool,
}

impl Percentiles {
    /// Of a histogram of nanoseconds.
    pub(crate) fn of(histogram: &Histogram<u64>) -> Self {
        if histogram.is_empty() {
            return Self::default();
        }
        let at = |quantile| micros(histogram.value_at_quantile(quantile));
        Self {
            min: micros(histogram.min()),
            mean: histogram.mean() / 1e3,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: micros(histogram.max()),
        }
    }
}

impl LoadFacts {
    /// Of a load that is about to run.
    pub(crate) fn new(name: &str, call: &Call, load: &Load) -> Self {
        Self {
            name: name.to_owned(),
            url: call.url.to_string(),
            protocol: call.protocol.name().to_owned(),
            method: call.method.to_string(),
            grpc_method: call.grpc_method.clone(),
            proxy: call.proxy.as_ref().map(ToString::to_string),
            body_bytes: call.body.len(),
            rate: load.rate,
            connections: load.connections,
            streams: load.streams,
            threads: load.threads,
            new_connections: load.new_connections,
            duration_s: load.duration.as_secs_f64(),
            warmup_s: load.warmup.as_secs_f64(),
            timeout_s: load.timeout.as_secs_f64(),
        }
    }
}

impl Run {
    /// What came of one load.
    pub(crate) fn new(target: &str, load: LoadFacts, repetition: u32, outcome: &Outcome) -> Self {
        let record = &outcome.record;
        let counts = counts(record.counts, outcome.missed);
        let until = record.last.saturating_sub(record.span.from);
        let elapsed_s = seconds(outcome.elapsed.max(until));
        let latency_us = Percentiles::of(&record.latency);
        let generator = generator(outcome);
        let errors = record
            .errors
            .iter()
            .map(|(kind, (count, example))| ErrorFacts {
                kind: (*kind).to_owned(),
                count: *count,
                example: example.clone(),
            });
        let mut run = Self {
            target: target.to_owned(),
            load,
            repetition,
            elapsed_s,
            interrupted: outcome.interrupted,
            counts,
            throughput: per(counts.answered, elapsed_s),
            response_bytes: record.bytes,
            errors: errors.collect(),
            statuses: record.statuses.clone(),
            grpc_statuses: record.grpc_statuses.clone(),
            latency_us,
            service_us: Percentiles::of(&record.service),
            generator,
            verdict: Verdict::default(),
            histogram: buckets(&record.latency),
            timeline: timeline(outcome),
            processes: Vec::new(),
        };
        run.verdict = verdict::judge(&run);
        run
    }
}

/// The samples by which a single run is compared: each of ten windows.
pub(crate) fn window_metrics(outcome: &Outcome, closed: bool) -> Vec<Metric> {
    let width = seconds(outcome.elapsed) / 10.0;
    let filled: Vec<_> = outcome
        .record
        .windows
        .iter()
        .filter(|window| window.answered > 0)
        .collect();
    let latency = |quantile: f64| -> Vec<f64> {
        let told = filled
            .iter()
            .map(|window| micros(window.latency.value_at_quantile(quantile)));
        told.collect()
    };
    let metric = |name: &str, unit: &str, higher_is_better, samples| Metric {
        name: name.to_owned(),
        unit: unit.to_owned(),
        higher_is_better,
        samples,
        doubtful: false,
    };
    let mut metrics = vec![
        metric("latency p50", "µs", false, latency(0.5)),
        metric("latency p99", "µs", false, latency(0.99)),
    ];
    if closed {
        let rates = filled
            .iter()
            .map(|window| per(window.answered, width))
            .collect();
        metrics.push(metric("throughput", "calls/s", true, rates));
    }
    metrics
}

fn counts(counts: Counts, missed: u64) -> CountFacts {
    CountFacts {
        scheduled: counts.sent + missed,
        missed,
        sent: counts.sent,
        answered: counts.answered,
        failed: counts.failed,
        unfinished: counts.unfinished,
        warmup_sent: counts.warmup_sent,
        queued: counts.queued,
        late: counts.late,
    }
}

fn generator(outcome: &Outcome) -> GeneratorFacts {
    let most = |of: fn(&Cpu) -> u64| {
        let most = outcome.generator.iter().map(of).max().unwrap_or(0);
        seconds(most) / seconds(outcome.elapsed.max(1))
    };
    GeneratorFacts {
        cpu_share: most(|cpu| cpu.ran),
        waiting_share: most(|cpu| cpu.waited),
        lag_us: Percentiles::of(&outcome.record.lag),
    }
}

fn buckets(histogram: &Histogram<u64>) -> Vec<(f64, u64)> {
    let filled = histogram.iter_recorded();
    filled
        .map(|bucket| (micros(bucket.value_iterated_to()), bucket.count_at_value()))
        .collect()
}

fn timeline(outcome: &Outcome) -> Timeline {
    let record = &outcome.record;
    let mut cells = Vec::new();
    for (column, rows) in record.timeline.iter().enumerate() {
        let filled = rows.iter().enumerate().filter(|(_, calls)| **calls > 0);
        cells.extend(filled.map(|(row, calls)| (column, row, *calls)));
    }
    Timeline {
        column_ms: seconds(record.span.slot()) * 1e3,
        columns: record.timeline.len(),
        cells,
    }
}

#[expect(clippy::cast_precision_loss, reason = "a time below 2^53 ns")]
fn micros(time: Nanos) -> f64 {
    time as f64 / 1e3
}

#[expect(clippy::cast_precision_loss, reason = "a time below 2^53 ns")]
fn seconds(time: Nanos) -> f64 {
    time as f64 / 1e9
}

#[expect(clippy::cast_precision_loss, reason = "counts stay below 2^53")]
fn per(count: u64, of: f64) -> f64 {
    if of > 0.0 { count as f64 / of } else { 0.0 }
}

/// CPU of one process over answered calls.
pub(crate) fn process(name: &str, used: Cpu, answered: u64, rss_kib: (u64, u64)) -> ProcessFacts {
    let cpu_us = micros(used.ran);
    ProcessFacts {
        name: name.to_owned(),
        cpu_us,
        cpu_us_per_request: cpu_us / per(answered, 1.0).max(1.0),
        rss_idle_kib: rss_kib.0,
        rss_peak_kib: rss_kib.1,
    }
}

impl Results {
    /// Results of this process, made now.
    pub(crate) fn new(kind: &str, runs: Vec<Run>) -> Self {
        let own = env!("CARGO_PKG_NAME").to_owned();
        Self {
            schema: SCHEMA.to_owned(),
            kind: kind.to_owned(),
            created: crate::clock::wall(),
            command: std::env::args().collect(),
            versions: BTreeMap::from([(own, env!("CARGO_PKG_VERSION").to_owned())]),
            machine: Machine::this(),
            runs,
            metrics: Vec::new(),
            ratios: Vec::new(),
            idle_connections: Vec::new(),
            goals: Vec::new(),
            points: Vec::new(),
            knees: Vec::new(),
            configurations: BTreeMap::new(),
            notes: Vec::new(),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A run in an open loop with these figures; each hop idles at 5 or, for the peer, 10 MiB.
    pub(crate) fn run(target: &str, repetition: u32, p50: f64, hop_cpu: &[f64]) -> Run {
        let idle_kib = if target == "sidegate" { 5 } else { 10 } * 1024;
        let percentiles = Percentiles {
            p50,
            p99: p50 * 2.0,
            ..Percentiles::default()
        };
        let process = |cpu: &f64| ProcessFacts {
            name: "hop".into(),
            cpu_us: cpu * 1e4,
            cpu_us_per_request: *cpu,
            rss_idle_kib: idle_kib,
            rss_peak_kib: idle_kib * 2,
        };
        let load = serde_json::json!({
            "name": "load", "url": "http://x/", "protocol": "http1", "method": "GET", "body_bytes": 0,
            "rate": 1000.0, "connections": 1, "streams": 1, "threads": 1,
            "duration_s": 1.0, "warmup_s": 0.0, "timeout_s": 1.0,
        });
        Run {
            target: target.to_owned(),
            load: serde_json::from_value(load).unwrap(),
            repetition,
            elapsed_s: 10.0,
            interrupted: false,
            counts: CountFacts {
                scheduled: 10_000,
                missed: 0,
                sent: 10_000,
                answered: 10_000,
                failed: 0,
                unfinished: 0,
                warmup_sent: 0,
                queued: 0,
                late: 0,
            },
            throughput: 1000.0,
            response_bytes: 0,
            errors: Vec::new(),
            statuses: BTreeMap::from([(200, 10_000)]),
            grpc_statuses: BTreeMap::new(),
            latency_us: percentiles,
            service_us: percentiles,
            generator: GeneratorFacts {
                cpu_share: 0.1,
                waiting_share: 0.0,
                lag_us: Percentiles::default(),
            },
            verdict: Verdict {
                conclusive: true,
                ..Verdict::default()
            },
            histogram: vec![(p50, 10_000)],
            timeline: Timeline {
                column_ms: 100.0,
                columns: 10,
                cells: vec![(0, 20, 10_000)],
            },
            processes: hop_cpu.iter().map(process).collect(),
        }
    }
}
