//! Whether the figures of a run say something about the target, or about the generator.
//!
//! Invariant: the rules are here and nowhere else; `docs/loadtest.md` repeats them in words.

use crate::results::{Run, Verdict};

/// A thread this busy limits a closed loop.
const CPU_SHARE_MAX: f64 = 0.9;
/// One that waits this long for a CPU shares a machine that has no more to give.
const WAITING_SHARE_MAX: f64 = 0.25;
/// The pacer may contribute this much of the mean latency…
const LAG_MEAN_MAX: f64 = 0.2;
/// …and of the p99…
const LAG_P99_MAX: f64 = 0.5;
/// …and below these times its lag is never held against it.
const LAG_MEAN_FREE_US: f64 = 100.0;
const LAG_P99_FREE_US: f64 = 1_000.0;
/// Calls without a latency, as a share, above which percentiles are lower bounds.
const WITHOUT_LATENCY_MAX: f64 = 0.001;
/// Fewer answers make no p99.
const ANSWERS_MIN: u64 = 1_000;

/// The rules in words.
pub(crate) const RULES: &str = "A run draws no conclusion on latency and throughput when a generator thread used over 90 % of a CPU; in an open loop when its lag is over 20 % of the mean latency (and over 100 µs) or its p99 over half that of the latency (and over 1 ms). Such figures carry a question mark.";

/// Judges a run by its own figures.
pub(crate) fn judge(run: &Run) -> Verdict {
    let reasons = reasons(run);
    Verdict {
        conclusive: reasons.is_empty(),
        reasons,
        warnings: warnings(run),
    }
}

fn reasons(run: &Run) -> Vec<String> {
    let mut reasons = Vec::new();
    let generator = &run.generator;
    let percent = |share: f64| share * 100.0;
    if run.counts.answered == 0 {
        reasons.push("nothing was answered".to_owned());
    }
    if generator.cpu_share > CPU_SHARE_MAX {
        reasons.push(format!(
            "the generator was the bottleneck: one of its threads used {:.0} % of a CPU (try --threads)",
            percent(generator.cpu_share)
        ));
    }
    if run.load.rate.is_none() {
        return reasons;
    }
    let (lag, latency) = (&generator.lag_us, &run.latency_us);
    if lag.mean > LAG_MEAN_FREE_US && lag.mean > LAG_MEAN_MAX * latency.mean {
        reasons.push(format!(
            "the generator lagged: {:.0} µs of the mean latency of {:.0} µs are its own",
            lag.mean, latency.mean
        ));
    } else if lag.p99 > LAG_P99_FREE_US && lag.p99 > LAG_P99_MAX * latency.p99 {
        reasons.push(format!(
            "the generator lagged: its p99 is {:.0} µs, that of the latency {:.0} µs",
            lag.p99, latency.p99
        ));
    }
    reasons
}

#[expect(clippy::cast_precision_loss, reason = "counts stay below 2^53")]
fn warnings(run: &Run) -> Vec<String> {
    let counts = &run.counts;
    let mut warnings = Vec::new();
    if run.interrupted {
        warnings.push("interrupted: the figures are those of the time until then".to_owned());
    }
    if run.generator.waiting_share > WAITING_SHARE_MAX {
        warnings.push(format!(
            "the machine was out of CPU: the generator waited {:.0} % of the time for one; throughput is what all processes reach together",
            run.generator.waiting_share * 100.0
        ));
    }
    let without = counts.scheduled - counts.answered;
    let share = without as f64 / counts.scheduled.max(1) as f64;
    if share > WITHOUT_LATENCY_MAX {
        warnings.push(format!(
            "{:.1} % of the calls have no latency (failed, unfinished or missed): percentiles above p{:.1} are lower bounds",
            share * 100.0,
            (1.0 - share) * 100.0
        ));
    }
    let refused: u64 = run.statuses.range(400..).map(|(_, count)| count).sum();
    let refused_grpc: u64 = run.grpc_statuses.range(1..).map(|(_, count)| count).sum();
    if refused + refused_grpc > 0 {
        warnings.push(format!(
            "{} answers say that the call failed",
            refused + refused_grpc
        ));
    }
    if (1..ANSWERS_MIN).contains(&counts.answered) {
        warnings.push(format!(
            "only {} answers: no p99 can be trusted",
            counts.answered
        ));
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::run;

    #[track_caller]
    fn check(change: impl Fn(&mut Run), words: &str) {
        let mut run = run("direct", 1, 200.0, &[]);
        run.latency_us.mean = 200.0;
        change(&mut run);
        let verdict = judge(&run);
        assert_eq!(verdict.conclusive, words.is_empty(), "{verdict:?}");
        assert!(verdict.reasons.join("; ").contains(words), "{verdict:?}");
    }

    #[test]
    fn generator_that_is_the_bottleneck_draws_no_conclusion() {
        check(|_| {}, "");
        check(|run| run.generator.cpu_share = 0.89, "");
        check(|run| run.generator.cpu_share = 0.91, "used 91 % of a CPU");
        check(|run| run.counts.answered = 0, "nothing was answered");
    }

    #[test]
    fn lag_is_held_against_the_generator_when_it_is_much_of_the_latency() {
        check(|run| run.generator.lag_us.mean = 90.0, "");
        check(
            |run| run.generator.lag_us.mean = 150.0,
            "150 µs of the mean",
        );
        let slower = |run: &mut Run| {
            run.generator.lag_us.mean = 150.0;
            run.latency_us.mean = 900.0;
        };
        check(slower, "");
        check(
            |run| run.generator.lag_us.p99 = 1_500.0,
            "its p99 is 1500 µs",
        );
        let closed = |run: &mut Run| {
            run.generator.lag_us.p99 = 1_500.0;
            run.load.rate = None;
        };
        check(closed, "");
    }

    #[test]
    fn what_has_no_latency_is_warned_about() {
        let mut run = run("direct", 1, 200.0, &[]);
        assert_eq!(judge(&run).warnings, Vec::<String>::new());
        run.counts.answered -= 20;
        run.counts.failed += 20;
        assert!(
            judge(&run).warnings.concat().contains("0.2 % of the calls"),
            "{:?}",
            judge(&run)
        );
    }
}
