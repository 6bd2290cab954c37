//! What Sidegate is to reach against its peer, and whether a comparison has shown it.
//!
//! Invariant: a goal is met by the median of the repetitions, and never by figures that a
//! generator spoiled or that nobody measured.

use serde::{Deserialize, Serialize};

use crate::compare::plan::{
    C16, C64, C256, GRPC, IDLE, NEW, NEW_X25519, POST, RATE_1000, RATE_2000, TEN_KIB,
};
use crate::results::Results;
use crate::summary::{
    ADDED_P50, ADDED_P99, CPU_NEW, EVERY_LOAD, HOP_CPU, IDLE_MEMORY, OWN, Spread, THROUGHPUT,
};

/// One goal and what came of it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Goal {
    pub(crate) what: String,
    pub(crate) load: String,
    /// The peer's best mode for this figure; none for a goal that is no ratio.
    pub(crate) peer: Option<String>,
    /// `ratio`, or the unit of Sidegate's own figure.
    pub(crate) unit: String,
    pub(crate) higher_is_better: bool,
    pub(crate) must: f64,
    pub(crate) aim: Option<f64>,
    /// Over the repetitions; none when it was not measured.
    pub(crate) value: Option<Spread>,
    pub(crate) outcome: Outcome,
}

/// What came of a goal.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Outcome {
    /// As good as is aimed for, or better.
    Aim,
    /// As good as it must be.
    Must,
    Missed,
    /// A generator was the bottleneck.
    NoConclusion,
    /// There is no figure: no peer, or noise above the peer's whole cost.
    NotMeasured,
}

impl Outcome {
    /// For people.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::Aim => "met, and the aim",
            Self::Must => "met",
            Self::Missed => "MISSED",
            Self::NoConclusion => "no conclusion",
            Self::NotMeasured => "not measured",
        }
    }
}

/// What to reach: figure, load, must, aim. Of ratios, `THROUGHPUT` alone is better when higher.
const RATIOS: &[(&str, &str, f64, f64)] = &[
    (HOP_CPU, C16, 0.50, 0.42),
    (HOP_CPU, C64, 0.35, 0.28),
    (HOP_CPU, C256, 0.35, 0.28),
    (HOP_CPU, RATE_1000, 0.50, 0.40),
    (HOP_CPU, RATE_2000, 0.50, 0.40),
    (HOP_CPU, TEN_KIB, 0.50, 0.42),
    (HOP_CPU, POST, 0.55, 0.45),
    (HOP_CPU, GRPC, 0.35, 0.25),
    (THROUGHPUT, C16, 2.0, 2.3),
    (THROUGHPUT, C64, 2.5, 3.0),
    (ADDED_P50, RATE_1000, 0.50, 0.35),
    (ADDED_P99, RATE_1000, 0.50, 0.35),
    (CPU_NEW, NEW, 0.70, 0.62),
    (CPU_NEW, NEW_X25519, 0.70, 0.62),
    (IDLE_MEMORY, EVERY_LOAD, 0.20, 0.12),
];
/// Most KiB that an idle connection may take.
const IDLE_CONNECTION_KIB_MAX: f64 = 20.0;

/// Judges every goal whose load was put on Sidegate.
pub(crate) fn judge(results: &Results) -> Vec<Goal> {
    let own: Vec<&str> = results
        .runs
        .iter()
        .filter(|run| run.target == OWN)
        .map(|run| run.load.name.as_str())
        .collect();
    let measured = |load: &str| own.contains(&load) || load == EVERY_LOAD && !own.is_empty();
    let ratios = RATIOS.iter().filter(|goal| measured(goal.1));
    let mut goals: Vec<Goal> = ratios.map(|goal| ratio(results, goal)).collect();
    goals.extend(idle_connection(results));
    goals
}

fn ratio(results: &Results, (what, load, must, aim): &(&str, &str, f64, f64)) -> Goal {
    let found = results
        .ratios
        .iter()
        .find(|ratio| ratio.what == *what && ratio.load == *load);
    let mut goal = Goal {
        what: (*what).to_owned(),
        load: (*load).to_owned(),
        peer: found.map(|found| found.peer.clone()),
        unit: "ratio".to_owned(),
        higher_is_better: *what == THROUGHPUT,
        must: *must,
        aim: Some(*aim),
        value: found.map(|found| found.ratio),
        outcome: Outcome::NotMeasured,
    };
    goal.outcome = outcome(&goal, found.is_some_and(|found| found.doubtful));
    goal
}

fn idle_connection(results: &Results) -> Option<Goal> {
    let own = results
        .idle_connections
        .iter()
        .find(|idle| idle.target == OWN)?;
    let mut goal = Goal {
        what: "memory of a connection".to_owned(),
        load: IDLE.to_owned(),
        peer: None,
        unit: "KiB".to_owned(),
        higher_is_better: false,
        must: IDLE_CONNECTION_KIB_MAX,
        aim: None,
        value: Spread::of(own.bytes_per_connection.iter().map(|bytes| bytes / 1024.0)),
        outcome: Outcome::NotMeasured,
    };
    goal.outcome = outcome(&goal, false);
    Some(goal)
}

fn outcome(goal: &Goal, doubtful: bool) -> Outcome {
    let Some(value) = goal.value else {
        return Outcome::NotMeasured;
    };
    let reached = |bound: f64| {
        if goal.higher_is_better {
            value.median >= bound
        } else {
            value.median <= bound
        }
    };
    match goal.aim {
        _ if doubtful => Outcome::NoConclusion,
        Some(aim) if reached(aim) => Outcome::Aim,
        _ if reached(goal.must) => Outcome::Must,
        _ => Outcome::Missed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::plan::LOADS;
    use crate::results::tests::run;
    use crate::summary;

    fn results(own_cpu: f64, doubtful: bool) -> Results {
        let mut runs = vec![
            run("direct", 1, 100.0, &[]),
            run("sidegate", 1, 200.0, &[own_cpu]),
            run("envoy-h1", 1, 500.0, &[100.0]),
        ];
        for run in &mut runs {
            run.load.name = RATE_1000.to_owned();
            run.verdict.conclusive = !doubtful;
        }
        let mut results = Results::new("compare", runs);
        results.ratios = summary::ratios(&results.runs, &[]);
        results.goals = judge(&results);
        results
    }

    #[track_caller]
    fn check(own_cpu: f64, doubtful: bool, what: &str, outcome: Outcome) {
        let goals = results(own_cpu, doubtful).goals;
        let goal = goals.iter().find(|goal| goal.what == what).unwrap();
        assert_eq!(goal.outcome, outcome, "{goal:?}");
    }

    #[test]
    fn goal_is_met_at_its_bound_and_missed_above_it() {
        check(40.0, false, HOP_CPU, Outcome::Aim);
        check(41.0, false, HOP_CPU, Outcome::Must);
        check(50.0, false, HOP_CPU, Outcome::Must);
        check(51.0, false, HOP_CPU, Outcome::Missed);
        check(51.0, false, ADDED_P50, Outcome::Aim);
    }

    #[test]
    fn generator_that_was_the_bottleneck_meets_no_goal_of_latency() {
        check(40.0, true, HOP_CPU, Outcome::Aim);
        check(40.0, true, ADDED_P50, Outcome::NoConclusion);
    }

    #[test]
    fn goal_without_a_peer_is_not_measured() {
        let mut results = results(40.0, false);
        results.ratios.clear();
        let goals = judge(&results);
        assert!(!goals.is_empty());
        assert!(
            goals
                .iter()
                .all(|goal| goal.outcome == Outcome::NotMeasured),
            "{goals:?}"
        );
    }

    #[test]
    fn every_goal_has_a_load_and_the_aim_is_beyond_the_must() {
        for (what, load, must, aim) in RATIOS {
            assert!(*load == EVERY_LOAD || LOADS.iter().any(|known| known.name == *load));
            assert_eq!(aim > must, *what == THROUGHPUT, "{what} {load}");
        }
    }
}
