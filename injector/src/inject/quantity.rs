//! A Kubernetes quantity such as `50m` or `64Mi`, positive.
//!
//! Invariant: two quantities are equal when they are the same amount, however they are written;
//! the API server writes them its own way.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Nanos in one.
const ONE: u128 = 1_000_000_000;

/// A positive amount of CPU or memory, as it was written.
#[derive(Clone, Debug)]
pub struct Quantity {
    text: String,
    nanos: u128,
}

/// A text is not a quantity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not an amount; write a positive number with a unit of Kubernetes, such as `100m`, `0.5` or `64Mi`"
)]
pub struct QuantityError {
    text: String,
}

impl Quantity {
    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The amount in billionths.
    pub(crate) fn nanos(&self) -> u128 {
        self.nanos
    }
}

impl FromStr for Quantity {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match parse(text) {
            Some(nanos) if nanos > 0 => Ok(Self {
                text: text.to_owned(),
                nanos,
            }),
            _ => {
                let shown: String = text.chars().take(32).collect();
                Err(QuantityError {
                    text: shown.escape_debug().to_string(),
                })
            }
        }
    }
}

/// The amount in billionths, rounded up; `None` when the text is no quantity or beyond all use.
fn parse(text: &str) -> Option<u128> {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at_checked(end)?;
    if text.len() > 32 {
        return None;
    }
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.len() + fraction.len() == 0 || number.matches('.').count() > 1 {
        return None;
    }
    // At most 18 digits on either side: nothing here can overflow before the checks see it.
    if whole.len() > 18 || fraction.len() > 9 {
        return None;
    }
    let digits = |text: &str| {
        if text.is_empty() {
            Some(0)
        } else {
            text.parse::<u128>().ok()
        }
    };
    let scale = 10_u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let value = digits(whole)?
        .checked_mul(scale)?
        .checked_add(digits(fraction)?)?;
    let unit = unit(suffix)?;
    Some(value.checked_mul(unit)?.div_ceil(scale))
}

/// What one of this suffix is in billionths.
fn unit(suffix: &str) -> Option<u128> {
    let power = |base: u128, exponent: u32| ONE.checked_mul(base.checked_pow(exponent)?);
    match suffix {
        "n" => Some(1),
        "u" => Some(1_000),
        "m" => Some(1_000_000),
        "" => Some(ONE),
        "k" => power(1_000, 1),
        "M" => power(1_000, 2),
        "G" => power(1_000, 3),
        "T" => power(1_000, 4),
        "P" => power(1_000, 5),
        "Ki" => power(1_024, 1),
        "Mi" => power(1_024, 2),
        "Gi" => power(1_024, 3),
        "Ti" => power(1_024, 4),
        "Pi" => power(1_024, 5),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E'])?;
            let exponent: u32 = exponent
                .strip_prefix('+')
                .unwrap_or(exponent)
                .parse()
                .ok()?;
            (exponent <= 15).then(|| power(10, exponent))?
        }
    }
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nanos == other.nanos
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> Ordering {
        self.nanos.cmp(&other.nanos)
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for Quantity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // A bare `1` is a number in YAML, and Kubernetes takes it.
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn amount(text: &str) -> Option<u128> {
        text.parse::<Quantity>().ok().map(|quantity| quantity.nanos)
    }

    #[test]
    fn the_same_amount_is_equal_however_it_is_written() {
        for (one, other) in [
            ("1000m", "1"),
            ("0.5", "500m"),
            ("1024Mi", "1Gi"),
            ("1e3", "1k"),
            ("1.5Gi", "1536Mi"),
            (".5", "500m"),
            ("5.", "5"),
            ("100u", "100000n"),
        ] {
            assert!(amount(one).is_some(), "{one}");
            assert_eq!(amount(one), amount(other), "{one} {other}");
        }
        assert!(amount("999m") < amount("1"));
    }

    #[test]
    fn what_is_no_positive_amount_is_refused() {
        for text in [
            "", "0", "-1", "1 ", "1mi", "1GiB", "0.0", "1.1.1", "Mi", "1e99", "inf", "NaN", "0x10",
            "١",
        ] {
            assert_eq!(amount(text), None, "{text}");
        }
        assert_eq!(amount(&"9".repeat(40)), None);
    }
}
