//! Repetitions of one load on one target, taken together.
//!
//! Invariant: spreads are over repetitions, and what is subtracted or divided comes from the same
//! repetition, so that a busy minute of the machine touches both sides.

use serde::{Deserialize, Serialize};

use crate::compare::plan::IDLE;
use crate::results::{IdleFacts, Metric, ProcessFacts, Run};

/// The target without any proxy.
pub(crate) const DIRECT: &str = "direct";
/// The target that others are compared with.
pub(crate) const OWN: &str = "sidegate";
/// Targets that are modes of the peer.
const PEER: &str = "envoy";

/// Lowest, median and highest.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) low: f64,
    pub(crate) median: f64,
    pub(crate) high: f64,
}

/// Every repetition of one load on one target.
#[derive(Clone, Debug)]
pub(crate) struct Cell<'a> {
    pub(crate) load: &'a str,
    pub(crate) target: &'a str,
    pub(crate) runs: Vec<&'a Run>,
}

/// Ours over the peer's.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Against {
    pub(crate) what: String,
    pub(crate) load: String,
    /// The peer's best mode for this figure.
    pub(crate) peer: String,
    pub(crate) own: Spread,
    pub(crate) other: Spread,
    /// Of the repetitions' own ratios.
    pub(crate) ratio: Spread,
    /// Whether a generator was the bottleneck in one of the runs.
    pub(crate) doubtful: bool,
}

/// CPU of an answered call, the mean over the proxies on its way.
pub(crate) const HOP_CPU: &str = "CPU per request and hop";
/// CPU of a new connection with one call on it, on the called side's proxy.
pub(crate) const CPU_NEW: &str = "CPU per new connection, called side";
pub(crate) const THROUGHPUT: &str = "throughput";
pub(crate) const ADDED_P50: &str = "added p50 (open loop)";
pub(crate) const ADDED_P99: &str = "added p99 (open loop)";
pub(crate) const IDLE_MEMORY: &str = "idle memory per proxy";
/// The load under which figures of a target over all loads go.
pub(crate) const EVERY_LOAD: &str = "every load";

/// A figure of a run that is compared.
#[derive(Clone, Copy)]
struct Figure {
    what: &'static str,
    unit: &'static str,
    higher_is_better: bool,
    /// Processor time is a proxy's own, whoever is the bottleneck.
    always_holds: bool,
    /// Of a run and the direct run of the same repetition.
    of: fn(&Run, Option<&Run>) -> Option<f64>,
}

type Memory = fn(&ProcessFacts) -> u64;

const FIGURES: &[Figure] = &[
    Figure {
        what: HOP_CPU,
        unit: "µs",
        higher_is_better: false,
        always_holds: true,
        of: |run, _| hop_cpu(run).filter(|_| !run.load.new_connections),
    },
    Figure {
        what: CPU_NEW,
        unit: "µs",
        higher_is_better: false,
        always_holds: true,
        of: |run, _| hop_cpu(run).filter(|_| run.load.new_connections),
    },
    Figure {
        what: THROUGHPUT,
        unit: "calls/s",
        higher_is_better: true,
        always_holds: false,
        of: |run, _| {
            let closed = run.load.rate.is_none() && !run.load.new_connections;
            closed.then_some(run.throughput)
        },
    },
    Figure {
        what: ADDED_P50,
        unit: "µs",
        higher_is_better: false,
        always_holds: false,
        of: |run, direct| added_in_open_loop(run, direct, |run| run.latency_us.p50),
    },
    Figure {
        what: ADDED_P99,
        unit: "µs",
        higher_is_better: false,
        always_holds: false,
        of: |run, direct| added_in_open_loop(run, direct, |run| run.latency_us.p99),
    },
];

/// Memory is one figure of a target, over every load.
const MEMORY: &[(&str, Memory)] = &[
    (IDLE_MEMORY, |process| process.rss_idle_kib),
    ("peak memory per proxy", |process| process.rss_peak_kib),
];
const IDLE_CONNECTION: &str = "memory of a connection, called side";

fn added_in_open_loop(run: &Run, direct: Option<&Run>, of: fn(&Run) -> f64) -> Option<f64> {
    run.load.rate?;
    Some(of(run) - of(direct?))
}

impl Spread {
    /// Of samples; none without any.
    pub(crate) fn of(samples: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = samples.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1)?;
        let at = |index: usize| sorted.get(index).copied();
        Some(Self {
            low: at(0)?,
            median: f64::midpoint(at(last / 2)?, at(last.div_ceil(2))?),
            high: at(last)?,
        })
    }
}

impl Cell<'_> {
    /// A figure over the repetitions.
    pub(crate) fn spread(&self, figure: impl Fn(&Run) -> f64) -> Option<Spread> {
        Spread::of(self.runs.iter().map(|run| figure(run)))
    }

    /// Whether every repetition says something about the target.
    pub(crate) fn conclusive(&self) -> bool {
        self.runs.iter().all(|run| run.verdict.conclusive)
    }

    fn repetition(&self, number: u32) -> Option<&Run> {
        self.runs
            .iter()
            .find(|run| run.repetition == number)
            .copied()
    }
}

/// Runs by load and target, in the order in which they first came.
pub(crate) fn cells(runs: &[Run]) -> Vec<Cell<'_>> {
    let mut cells: Vec<Cell<'_>> = Vec::new();
    for run in runs {
        let (load, target) = (run.load.name.as_str(), run.target.as_str());
        let same = |cell: &&mut Cell<'_>| cell.load == load && cell.target == target;
        match cells.iter_mut().find(same) {
            Some(cell) => cell.runs.push(run),
            None => cells.push(Cell {
                load,
                target,
                runs: vec![run],
            }),
        }
    }
    let order: Vec<String> = cells.iter().map(|cell| cell.load.to_owned()).collect();
    cells.sort_by_key(|cell| order.iter().position(|load| load == cell.load));
    cells
}

/// Mean over the proxies on the way of CPU per answered call, in microseconds.
pub(crate) fn hop_cpu(run: &Run) -> Option<f64> {
    mean(
        run.processes
            .iter()
            .map(|process| process.cpu_us_per_request),
    )
}

/// The highest that a proxy of `target` used, in MiB, over every run.
#[expect(clippy::cast_precision_loss, reason = "memory below 2^53 KiB")]
fn memory(runs: &[Run], target: &str, of: Memory) -> Option<f64> {
    let runs = runs.iter().filter(|run| run.target == target);
    let most = runs.flat_map(|run| &run.processes).map(of).max();
    most.map(|kib| kib as f64 / 1024.0)
}

#[expect(clippy::cast_precision_loss, reason = "a handful of processes")]
fn mean(values: impl ExactSizeIterator<Item = f64>) -> Option<f64> {
    let count = values.len();
    (count > 0).then(|| values.sum::<f64>() / count as f64)
}

/// A figure of one load on one target.
struct Samples {
    /// Repetition, and what it measured.
    values: Vec<(u32, f64)>,
    doubtful: bool,
}

impl Samples {
    fn of(cell: &Cell<'_>, cells: &[Cell<'_>], figure: Figure) -> Self {
        let against = find(cells, cell.load, DIRECT);
        let mut samples = Self {
            values: Vec::new(),
            doubtful: false,
        };
        for run in &cell.runs {
            let direct = against.and_then(|direct| direct.repetition(run.repetition));
            let Some(value) = (figure.of)(run, direct) else {
                continue;
            };
            samples.values.push((run.repetition, value));
            let added = run.load.rate.is_some();
            let sound = run.verdict.conclusive
                && (!added || direct.is_none_or(|direct| direct.verdict.conclusive));
            samples.doubtful |= !(sound || figure.always_holds);
        }
        samples
    }

    fn spread(&self) -> Option<Spread> {
        Spread::of(self.values.iter().map(|(_, value)| *value))
    }
}

fn find<'a, 'b>(cells: &'b [Cell<'a>], load: &str, target: &str) -> Option<&'b Cell<'a>> {
    cells
        .iter()
        .find(|cell| cell.load == load && cell.target == target)
}

/// Added latency over `direct` in the same repetitions.
pub(crate) fn added(cell: &Cell<'_>, cells: &[Cell<'_>], of: fn(&Run) -> f64) -> Option<Spread> {
    let direct = find(cells, cell.load, DIRECT)?;
    let pairs = cell
        .runs
        .iter()
        .filter_map(|run| Some(of(run) - of(direct.repetition(run.repetition)?)));
    Spread::of(pairs)
}

/// What a baseline is compared by: every figure of Sidegate.
pub(crate) fn metrics(runs: &[Run], idle: &[IdleFacts]) -> Vec<Metric> {
    let cells = cells(runs);
    let mut metrics = Vec::new();
    for cell in cells.iter().filter(|cell| cell.target == OWN) {
        for figure in FIGURES {
            let samples = Samples::of(cell, &cells, *figure);
            if !samples.values.is_empty() {
                metrics.push(Metric {
                    name: format!("{}: {}", cell.load, figure.what),
                    unit: figure.unit.to_owned(),
                    higher_is_better: figure.higher_is_better,
                    samples: samples.values.iter().map(|(_, value)| *value).collect(),
                    doubtful: samples.doubtful,
                });
            }
        }
    }
    let lower = |name: String, unit: &str, samples| Metric {
        name,
        unit: unit.to_owned(),
        higher_is_better: false,
        samples,
        doubtful: false,
    };
    for (what, of) in MEMORY {
        let mib = memory(runs, OWN, *of);
        metrics.extend(mib.map(|mib| lower(format!("{EVERY_LOAD}: {what}"), "MiB", vec![mib])));
    }
    let idle = idle.iter().filter(|idle| idle.target == OWN);
    metrics.extend(idle.map(|idle| {
        let name = format!("{IDLE}: {IDLE_CONNECTION}");
        lower(name, "KiB", kib(idle))
    }));
    metrics
}

fn kib(idle: &IdleFacts) -> Vec<f64> {
    let bytes = idle.bytes_per_connection.iter();
    bytes.map(|bytes| bytes / 1024.0).collect()
}

/// Ours over the peer's best mode, figure by figure.
pub(crate) fn ratios(runs: &[Run], idle: &[IdleFacts]) -> Vec<Against> {
    let cells = cells(runs);
    let mut ratios = Vec::new();
    for own in cells.iter().filter(|cell| cell.target == OWN) {
        let peers = cells
            .iter()
            .filter(|cell| cell.load == own.load && cell.target.starts_with(PEER));
        let peers: Vec<_> = peers.collect();
        for figure in FIGURES {
            let against = peers
                .iter()
                .filter_map(|peer| ratio((own, peer), &cells, *figure));
            ratios.extend(best(against, figure.higher_is_better));
        }
    }
    for (what, of) in MEMORY {
        ratios.extend(memory_ratio(runs, what, *of));
    }
    ratios.extend(idle_ratio(idle));
    ratios
}

/// The one whose peer did best.
fn best(against: impl Iterator<Item = Against>, higher_is_better: bool) -> Option<Against> {
    against.reduce(|best, next| {
        if (next.other.median > best.other.median) == higher_is_better {
            next
        } else {
            best
        }
    })
}

fn memory_ratio(runs: &[Run], what: &str, of: Memory) -> Option<Against> {
    let own = memory(runs, OWN, of)?;
    let peers = runs.iter().filter(|run| run.target.starts_with(PEER));
    let figures = peers.filter_map(|run| Some((&run.target, memory(runs, &run.target, of)?)));
    let (peer, other) = figures.min_by(|left, right| left.1.total_cmp(&right.1))?;
    let one = |value| Spread::of([value]);
    Some(Against {
        what: what.to_owned(),
        load: EVERY_LOAD.to_owned(),
        peer: peer.clone(),
        own: one(own)?,
        other: one(other)?,
        ratio: one(own / other)?,
        doubtful: false,
    })
}

fn idle_ratio(idle: &[IdleFacts]) -> Option<Against> {
    let own = kib(idle.iter().find(|idle| idle.target == OWN)?);
    let peers = idle.iter().filter(|idle| idle.target.starts_with(PEER));
    let against = peers.filter_map(|peer| {
        let other = kib(peer);
        let pairs = own.iter().zip(&other).map(|(own, other)| own / other);
        Some(Against {
            what: IDLE_CONNECTION.to_owned(),
            load: IDLE.to_owned(),
            peer: peer.target.clone(),
            ratio: Spread::of(pairs)?,
            own: Spread::of(own.iter().copied())?,
            other: Spread::of(other)?,
            doubtful: false,
        })
    });
    best(against, false)
}

fn ratio(
    (own, peer): (&Cell<'_>, &Cell<'_>),
    cells: &[Cell<'_>],
    figure: Figure,
) -> Option<Against> {
    let mine = Samples::of(own, cells, figure);
    let its = Samples::of(peer, cells, figure);
    let mut pairs = Vec::new();
    for (repetition, mine) in &mine.values {
        let (_, its) = its.values.iter().find(|(other, _)| other == repetition)?;
        // Noise above the peer's whole cost: there is nothing to divide by.
        if *its <= 0.0 {
            return None;
        }
        pairs.push(mine / its);
    }
    Some(Against {
        what: figure.what.to_owned(),
        load: own.load.to_owned(),
        peer: peer.target.to_owned(),
        ratio: Spread::of(pairs)?,
        own: mine.spread()?,
        other: its.spread()?,
        doubtful: mine.doubtful || its.doubtful,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::run;

    fn runs() -> Vec<Run> {
        let mut runs = Vec::new();
        // The second repetition met a machine half as fast.
        for (repetition, slow) in [(1, 1.0), (2, 2.0)] {
            runs.push(run("direct", repetition, 100.0 * slow, &[]));
            runs.push(run(
                "sidegate",
                repetition,
                200.0 * slow,
                &[10.0 * slow, 20.0 * slow],
            ));
            runs.push(run(
                "envoy-h1",
                repetition,
                500.0 * slow,
                &[60.0 * slow, 60.0 * slow],
            ));
            runs.push(run(
                "envoy-h2",
                repetition,
                600.0 * slow,
                &[30.0 * slow, 30.0 * slow],
            ));
        }
        runs
    }

    #[track_caller]
    fn check(what: &str, peer: &str, own: f64, ratio: f64) {
        let ratios = ratios(&runs(), &[]);
        let found = ratios
            .iter()
            .find(|ratio| ratio.what.starts_with(what))
            .unwrap();
        assert_eq!(found.peer, peer);
        assert!((found.own.low - own).abs() < 1e-9, "{found:?}");
        let spread = found.ratio;
        assert!(
            (spread.low - ratio).abs() < 1e-9 && (spread.high - ratio).abs() < 1e-9,
            "{found:?}"
        );
    }

    #[test]
    fn ratio_is_to_the_best_mode_of_each_figure_within_a_repetition() {
        check("CPU", "envoy-h2", 15.0, 0.5);
        check("added p50", "envoy-h1", 100.0, 0.25);
        check("idle memory", "envoy-h1", 5.0, 0.5);
    }

    #[test]
    fn nothing_is_divided_by_what_noise_swallowed() {
        let mut runs = runs();
        runs.retain(|run| run.target != "envoy-h2");
        for run in &mut runs {
            if run.target == "envoy-h1" {
                run.latency_us.p50 = 90.0;
            }
        }
        let ratios = ratios(&runs, &[]);
        assert!(
            ratios
                .iter()
                .all(|ratio| !ratio.what.starts_with("added p50")),
            "{ratios:?}"
        );
        assert!(
            ratios
                .iter()
                .any(|ratio| ratio.what.starts_with("added p99"))
        );
    }

    #[test]
    fn figures_of_a_spoiled_run_are_doubtful_unless_they_are_processor_time() {
        let mut runs = runs();
        runs[0].verdict.conclusive = false;
        assert_eq!(runs[0].target, DIRECT);
        let doubtful = metrics(&runs, &[]);
        let doubtful = doubtful.iter().filter(|metric| metric.doubtful);
        let doubtful: Vec<&str> = doubtful.map(|metric| metric.name.as_str()).collect();
        assert_eq!(
            doubtful,
            ["load: added p50 (open loop)", "load: added p99 (open loop)"]
        );
        let ratios = ratios(&runs, &[]);
        let doubtful = ratios.iter().filter(|ratio| ratio.doubtful).count();
        assert_eq!(doubtful, 2);
    }

    #[test]
    fn idle_connections_are_compared_with_the_mode_that_takes_least() {
        let facts = |target: &str, bytes: f64| IdleFacts {
            target: target.to_owned(),
            connections_per_sample: 500,
            bytes_per_connection: vec![bytes, bytes * 2.0],
        };
        let idle = [
            facts("sidegate", 1024.0),
            facts("envoy-h1", 4096.0),
            facts("envoy-h2", 2048.0),
        ];
        let ratio = idle_ratio(&idle).unwrap();
        assert_eq!(ratio.peer, "envoy-h2");
        assert_eq!(ratio.ratio, Spread::of([0.5]).unwrap());
        assert_eq!(ratio.own, Spread::of([1.0, 2.0]).unwrap());
    }

    #[test]
    fn cells_keep_the_order_of_loads_and_targets() {
        let runs = runs();
        let cells = cells(&runs);
        let targets: Vec<&str> = cells.iter().map(|cell| cell.target).collect();
        assert_eq!(targets, ["direct", "sidegate", "envoy-h1", "envoy-h2"]);
        assert!(cells.iter().all(|cell| cell.runs.len() == 2));
    }
}
