//! `grpc-timeout`: how long a gRPC caller waits.
//!
//! Invariant: what is passed on is never longer than what is left, and never zero.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};

/// The field's name.
pub const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// Largest number that the field may carry: eight digits.
const AMOUNT_MAX: u128 = 99_999_999;

/// The caller's patience; `None` when it gave none, or none that can be read.
pub fn read(headers: &HeaderMap) -> Option<Duration> {
    parse(headers.get(GRPC_TIMEOUT)?.to_str().ok()?)
}

/// Tells the called side what is left of the caller's patience.
pub fn write(headers: &mut HeaderMap, left: Duration) {
    // Eight digits and a unit are always a field's value.
    if let Ok(value) = HeaderValue::try_from(format(left)) {
        headers.insert(GRPC_TIMEOUT, value);
    }
}

fn parse(text: &str) -> Option<Duration> {
    let split = text.len().checked_sub(1)?;
    let (amount, unit) = (text.get(..split)?, text.get(split..)?);
    if amount.is_empty() || amount.len() > 8 || !amount.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = amount.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(amount * 3600)),
        "M" => Some(Duration::from_secs(amount * 60)),
        "S" => Some(Duration::from_secs(amount)),
        "m" => Some(Duration::from_millis(amount)),
        "u" => Some(Duration::from_micros(amount)),
        "n" => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

/// In the finest unit in which eight digits suffice, rounded down.
fn format(left: Duration) -> String {
    let nanos = left.as_nanos().max(1);
    let units = [
        (1, 'n'),
        (1_000, 'u'),
        (1_000_000, 'm'),
        (1_000_000_000, 'S'),
        (60_000_000_000, 'M'),
        (3_600_000_000_000, 'H'),
    ];
    let fits = units.iter().find(|(size, _)| nanos / size <= AMOUNT_MAX);
    match fits {
        Some((size, unit)) => format!("{}{unit}", nanos / size),
        None => format!("{AMOUNT_MAX}H"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: Option<Duration>) {
        assert_eq!(parse(text), expected, "{text}");
    }

    #[test]
    fn every_unit_is_read() {
        check("2H", Some(Duration::from_hours(2)));
        check("99999999H", Some(Duration::from_hours(99_999_999)));
        check("3M", Some(Duration::from_mins(3)));
        check("4S", Some(Duration::from_secs(4)));
        check("250m", Some(Duration::from_millis(250)));
        check("7u", Some(Duration::from_micros(7)));
        check("99999999n", Some(Duration::from_nanos(99_999_999)));
    }

    #[test]
    fn what_is_not_a_timeout_is_none() {
        for text in [
            "",
            "S",
            "1",
            "1s",
            "-1S",
            "+1S",
            "1.5S",
            "123456789n",
            " 1S",
            "1 S",
            "1ü",
        ] {
            check(text, None);
        }
    }

    #[test]
    fn what_is_passed_on_is_never_longer_and_never_zero() {
        for nanos in [
            0_u64,
            1,
            99_999_999,
            100_000_000,
            1_234_567_890_123,
            u64::MAX,
        ] {
            let left = Duration::from_nanos(nanos);
            let written = parse(&format(left)).unwrap();
            assert!(
                written <= left.max(Duration::from_nanos(1)),
                "{left:?} {written:?}"
            );
            assert!(written > Duration::ZERO, "{left:?}");
            assert!(left.as_secs_f64() - written.as_secs_f64() <= left.as_secs_f64() / 1_000_000.0);
        }
    }
}
