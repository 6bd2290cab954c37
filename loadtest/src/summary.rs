//! Repetitions of one load on one target, taken together.
//!
//! Invariant: spreads are over repetitions, and what is subtracted or divided comes from the same
//! repetition, so that a busy minute of the machine touches both sides.

use serde::{Deserialize, Serialize};

use crate::results::{Metric, ProcessFacts, Run};

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

/// The figure that a limit can be set on.
pub(crate) const HOP_CPU: &str = "CPU per request and hop";

type Figure = fn(&Run, Option<&Run>) -> Option<f64>;
type Memory = fn(&ProcessFacts) -> u64;

/// What is compared: name, unit, whether more is better, and how it is read.
const FIGURES: &[(&str, &str, bool, Figure)] = &[
    (HOP_CPU, "µs", false, |run, _| hop_cpu(run)),
    ("throughput", "calls/s", true, |run, _| {
        run.load.rate.is_none().then_some(run.throughput)
    }),
    ("added p50 (open loop)", "µs", false, |run, direct| {
        run.load.rate?;
        Some(run.latency_us.p50 - direct?.latency_us.p50)
    }),
    ("added p99 (open loop)", "µs", false, |run, direct| {
        run.load.rate?;
        Some(run.latency_us.p99 - direct?.latency_us.p99)
    }),
];

/// Memory is one figure of a target, over every load.
const MEMORY: &[(&str, Memory)] = &[
    ("idle memory per proxy", |process| process.rss_idle_kib),
    ("peak memory per proxy", |process| process.rss_peak_kib),
];
/// The name of that.
const EVERY_LOAD: &str = "every load";

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

/// The samples of each figure, by repetition.
fn samples(cell: &Cell<'_>, cells: &[Cell<'_>], figure: Figure) -> Vec<(u32, f64)> {
    let direct = find(cells, cell.load, DIRECT);
    let read = cell.runs.iter().filter_map(|run| {
        let direct = direct.and_then(|direct| direct.repetition(run.repetition));
        Some((run.repetition, figure(run, direct)?))
    });
    read.collect()
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

/// What a baseline is compared by: every figure of every target.
pub(crate) fn metrics(runs: &[Run]) -> Vec<Metric> {
    let cells = cells(runs);
    let mut metrics = Vec::new();
    for cell in cells.iter().filter(|cell| cell.target == OWN) {
        for (what, unit, higher_is_better, figure) in FIGURES {
            let samples = samples(cell, &cells, *figure);
            if !samples.is_empty() {
                metrics.push(Metric {
                    name: format!("{}: {what}", cell.load),
                    unit: (*unit).to_owned(),
                    higher_is_better: *higher_is_better,
                    samples: samples.into_iter().map(|(_, sample)| sample).collect(),
                });
            }
        }
    }
    for (what, of) in MEMORY {
        metrics.extend(memory(runs, OWN, *of).map(|mib| Metric {
            name: format!("{EVERY_LOAD}: {what}"),
            unit: "MiB".to_owned(),
            higher_is_better: false,
            samples: vec![mib],
        }));
    }
    metrics
}

/// Ours over the peer's best mode, figure by figure.
pub(crate) fn ratios(runs: &[Run]) -> Vec<Against> {
    let cells = cells(runs);
    let mut ratios = Vec::new();
    for own in cells.iter().filter(|cell| cell.target == OWN) {
        let peers = cells
            .iter()
            .filter(|cell| cell.load == own.load && cell.target.starts_with(PEER));
        let peers: Vec<_> = peers.collect();
        for (what, _, higher_is_better, figure) in FIGURES {
            let mut best: Option<Against> = None;
            for peer in &peers {
                let Some(ratio) = ratio(what, (own, peer), &cells, *figure) else {
                    continue;
                };
                let better = best.as_ref().is_none_or(|best| {
                    (ratio.other.median > best.other.median) == *higher_is_better
                });
                if better {
                    best = Some(ratio);
                }
            }
            ratios.extend(best);
        }
    }
    ratios.extend(
        MEMORY
            .iter()
            .filter_map(|(what, of)| memory_ratio(runs, what, *of)),
    );
    ratios
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

fn ratio(
    what: &str,
    (own, peer): (&Cell<'_>, &Cell<'_>),
    cells: &[Cell<'_>],
    figure: Figure,
) -> Option<Against> {
    let mine = samples(own, cells, figure);
    let its = samples(peer, cells, figure);
    let mut pairs = Vec::new();
    for (repetition, mine) in &mine {
        let (_, its) = its.iter().find(|(other, _)| other == repetition)?;
        // Noise above the peer's whole cost: there is nothing to divide by.
        if *its <= 0.0 {
            return None;
        }
        pairs.push(mine / its);
    }
    Some(Against {
        what: what.to_owned(),
        load: own.load.to_owned(),
        peer: peer.target.to_owned(),
        ratio: Spread::of(pairs)?,
        own: Spread::of(mine.iter().map(|(_, sample)| *sample))?,
        other: Spread::of(its.iter().map(|(_, sample)| *sample))?,
        // Processor time is the proxies' own, whoever is the bottleneck.
        doubtful: !(what.starts_with("CPU") || own.conclusive() && peer.conclusive()),
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
        let ratios = ratios(&runs());
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
        let ratios = ratios(&runs);
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
    fn cells_keep_the_order_of_loads_and_targets() {
        let runs = runs();
        let cells = cells(&runs);
        let targets: Vec<&str> = cells.iter().map(|cell| cell.target).collect();
        assert_eq!(targets, ["direct", "sidegate", "envoy-h1", "envoy-h2"]);
        assert!(cells.iter().all(|cell| cell.runs.len() == 2));
    }
}
