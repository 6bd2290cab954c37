//! Whether a measurement is worse than an earlier one by more than noise explains.
//!
//! Invariant: a figure has become worse only when its median is more than 10 % worse *and* the
//! middle halves of its samples (the whole ranges, with fewer than four) do not overlap.

use std::path::Path;

use anyhow::{Context, ensure};

use crate::results::{LoadFacts, Metric, Results, SCHEMA};

/// A median must move by this much.
const WORSE_MIN: f64 = 0.10;

/// One figure, then and now.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Change {
    pub(crate) name: String,
    pub(crate) unit: String,
    pub(crate) before: f64,
    pub(crate) now: f64,
    pub(crate) regressed: bool,
}

/// Reads the results of an earlier measurement.
///
/// # Errors
///
/// When the file cannot be read, or is not ours.
pub(crate) fn read(path: &Path) -> anyhow::Result<Results> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let results: Results = serde_json::from_slice(&text)
        .with_context(|| format!("{} is not a results.json of this tool", path.display()))?;
    ensure!(
        results.schema == SCHEMA,
        "{} has the schema {}, not {SCHEMA}",
        path.display(),
        results.schema
    );
    Ok(results)
}

/// Every figure that both have and conclude on, and how many they have without a conclusion.
///
/// # Errors
///
/// When they did not measure the same, or either drew no conclusion.
pub(crate) fn compare(before: &Results, now: &Results) -> anyhow::Result<(Vec<Change>, usize)> {
    ensure!(
        before.kind == now.kind,
        "the baseline is of `{}`",
        before.kind
    );
    if now.kind == "run" {
        for (word, results) in [("the baseline", before), ("this run", now)] {
            let reasons = results.runs.iter().flat_map(|run| &run.verdict.reasons);
            let reasons: Vec<_> = reasons.cloned().collect();
            ensure!(
                reasons.is_empty(),
                "{word} draws no conclusion: {}",
                reasons.join("; ")
            );
        }
        ensure!(
            shape(before) == shape(now),
            "the baseline measured another load"
        );
    }
    let (mut changes, mut doubtful) = (Vec::new(), 0);
    for now in &now.metrics {
        let before = before.metrics.iter().find(|before| before.name == now.name);
        match before {
            Some(before) if before.doubtful || now.doubtful => doubtful += 1,
            Some(before) => changes.extend(change(before, now)),
            None => {}
        }
    }
    ensure!(
        !changes.is_empty(),
        "the baseline has no figure in common with this measurement that either draws a conclusion on ({doubtful} have none)"
    );
    Ok((changes, doubtful))
}

/// The loads without what does not matter: how long, and under which name.
fn shape(results: &Results) -> Vec<LoadFacts> {
    let loads = results.runs.iter().map(|run| LoadFacts {
        duration_s: 0.0,
        warmup_s: 0.0,
        name: String::new(),
        url: String::new(),
        proxy: None,
        ..run.load.clone()
    });
    loads.collect()
}

fn change(before: &Metric, now: &Metric) -> Option<Change> {
    let (low, middle, high) = spread(&before.samples)?;
    let (now_low, now_middle, now_high) = spread(&now.samples)?;
    let (moved, apart) = if now.higher_is_better {
        (1.0 - now_middle / middle, now_high < low)
    } else {
        (now_middle / middle - 1.0, now_low > high)
    };
    Some(Change {
        name: now.name.clone(),
        unit: now.unit.clone(),
        before: middle,
        now: now_middle,
        regressed: moved > WORSE_MIN && apart,
    })
}

/// Lower quartile, median and upper quartile; minimum and maximum with fewer than four samples.
pub(crate) fn spread(samples: &[f64]) -> Option<(f64, f64, f64)> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    let edge = if sorted.len() < 4 {
        0
    } else {
        sorted.len() / 4
    };
    let at = |index: usize| sorted.get(index).copied();
    let middle = f64::midpoint(at(last / 2)?, at(last.div_ceil(2))?);
    Some((at(edge)?, middle, at(last - edge)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metric(higher_is_better: bool, samples: &[f64]) -> Metric {
        Metric {
            name: "x".into(),
            unit: "µs".into(),
            higher_is_better,
            samples: samples.to_vec(),
            doubtful: false,
        }
    }

    #[track_caller]
    fn check(higher: bool, before: &[f64], now: &[f64], regressed: bool) {
        let change = change(&metric(higher, before), &metric(higher, now)).unwrap();
        assert_eq!(change.regressed, regressed, "{change:?}");
    }

    #[test]
    fn regression_needs_distance_and_separation() {
        let before = [
            100.0, 102.0, 98.0, 101.0, 99.0, 100.0, 103.0, 97.0, 100.0, 300.0,
        ];
        let by = |factor: f64| before.map(|sample| sample * factor);
        check(false, &before, &before, false);
        check(false, &before, &by(1.08), false);
        check(false, &before, &by(1.25), true);
        check(false, &before, &by(0.5), false);
        check(true, &before, &by(0.8), true);
        check(true, &before, &by(1.25), false);
    }

    #[test]
    fn what_a_generator_spoiled_is_compared_with_nothing() {
        let results = |doubtful: bool| {
            let mut results = Results::new("compare", Vec::new());
            let mut spoiled = metric(false, &[1.0]);
            spoiled.doubtful = doubtful;
            results.metrics = vec![spoiled, metric(false, &[2.0])];
            results.metrics[1].name = "y".into();
            results
        };
        let names = |before: bool, now: bool| {
            let (changes, doubtful) = compare(&results(before), &results(now)).unwrap();
            (changes.len(), doubtful)
        };
        assert_eq!(names(false, false), (2, 0));
        assert_eq!(names(true, false), (1, 1));
        assert_eq!(names(false, true), (1, 1));
        let mut spoiled = results(true);
        spoiled.metrics.truncate(1);
        let told = compare(&spoiled, &results(false)).unwrap_err().to_string();
        assert!(told.contains("(1 have none)"), "{told}");
    }

    #[test]
    fn wide_noise_hides_a_small_change() {
        let before = [50.0, 60.0, 100.0, 140.0, 160.0];
        check(false, &before, &[70.0, 80.0, 120.0, 150.0, 170.0], false);
        check(false, &before, &[270.0, 280.0, 320.0, 350.0, 370.0], true);
    }

    #[test]
    fn few_samples_count_by_their_whole_range() {
        check(false, &[100.0, 110.0, 120.0], &[119.0, 150.0, 160.0], false);
        check(false, &[100.0, 110.0, 120.0], &[121.0, 150.0, 160.0], true);
        assert_eq!(spread(&[3.0, 1.0, 2.0]), Some((1.0, 2.0, 3.0)));
        assert_eq!(spread(&[]), None);
    }
}
