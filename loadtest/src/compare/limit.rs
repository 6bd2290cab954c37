//! A limit on Sidegate's CPU per hop, for whoever must not let it slip.
//!
//! Always true: a limit is broken only when every repetition's own ratio is above it, which a busy
//! machine does not explain; and by CPU alone, since it moves throughput and latency.

use anyhow::ensure;

use crate::summary::{Against, HOP_CPU};

/// What `--cpu-ratio-max` takes: Sidegate's CPU over Envoy's, above 0.
///
/// # Errors
///
/// When it is no such number.
pub(crate) fn parse(text: &str) -> anyhow::Result<f64> {
    let ratio: f64 = text.parse()?;
    ensure!(ratio.is_finite() && ratio > 0.0, "not above 0");
    Ok(ratio)
}

/// One line for each load whose CPU per hop was above `max` times Envoy's in every repetition; none
/// when all keep it.
///
/// # Errors
///
/// When nothing was compared with Envoy: then nobody knows.
pub(super) fn broken(ratios: &[Against], max: f64) -> anyhow::Result<Vec<String>> {
    let mut of_cpu = ratios
        .iter()
        .filter(|ratio| ratio.what == HOP_CPU)
        .peekable();
    ensure!(
        of_cpu.peek().is_some(),
        "nothing was compared with Envoy, so --cpu-ratio-max says nothing"
    );
    let above = of_cpu.filter(|against| against.ratio.low > max);
    let line = |against: &Against| {
        format!(
            "{}: {HOP_CPU} is {:.2} of {}'s, and above {max} in every repetition ({:.2} to {:.2})",
            against.load, against.ratio.median, against.peer, against.ratio.low, against.ratio.high
        )
    };
    Ok(above.map(line).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::summary::Spread;

    fn against(what: &str, repetitions: [f64; 3]) -> Against {
        let spread = Spread::of(repetitions).unwrap();
        Against {
            what: what.to_owned(),
            load: "100 B, 16 connections".to_owned(),
            peer: "envoy-h2".to_owned(),
            own: spread,
            other: spread,
            ratio: spread,
            doubtful: false,
        }
    }

    #[test]
    fn only_cpu_that_is_above_it_in_every_repetition_breaks_the_limit() {
        let ratios = [
            against(HOP_CPU, [0.61, 0.7, 0.9]),
            against("throughput", [2.0, 2.0, 2.0]),
        ];
        assert!(broken(&ratios, 0.61).unwrap().is_empty());
        assert_eq!(
            broken(&ratios, 0.6).unwrap(),
            [
                "100 B, 16 connections: CPU per request and hop is 0.70 of envoy-h2's, and above 0.6 in every repetition (0.61 to 0.90)"
            ]
        );
    }

    #[test]
    fn a_limit_on_what_was_not_compared_is_an_error() {
        let throughput = against("throughput", [2.0, 2.0, 2.0]);
        assert!(broken(&[throughput], 0.6).is_err());
    }

    #[test]
    fn a_limit_is_above_zero() {
        assert!((parse("0.6").unwrap() - 0.6).abs() < 1e-9);
        for text in ["0", "-1", "NaN", "inf", "x"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
