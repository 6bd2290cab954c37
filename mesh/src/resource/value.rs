//! Small values of resources: ports, shares, times, counts.
//!
//! Invariant: each is refused outside its bounds, with what to write instead.

use std::borrow::Cow;
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use super::problem::Invalid;

/// Most tries that a policy may ask for.
const ATTEMPTS_MAX: u32 = 10;
/// Most failures that an ejection may wait for.
const CONSECUTIVE_FAILURES_MAX: u32 = 1_000;
/// Longest time that a policy may name.
const DURATION_MAX: Duration = Duration::from_hours(24);
/// Shortest time that a policy may name.
const DURATION_MIN: Duration = Duration::from_millis(1);

/// A share from 0 % to 100 %, written `20%`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Percent(u8);

impl Percent {
    /// `20%`.
    pub const DEFAULT_BUDGET: Self = Self(20);
    /// `50%`.
    pub const HALF: Self = Self(50);

    /// The number before the percent sign, 0 to 100.
    pub fn get(self) -> u8 {
        self.0
    }

    /// The share as a fraction, 0 to 1.
    pub fn fraction(self) -> f64 {
        f64::from(self.0) / 100.0
    }
}

impl FromStr for Percent {
    type Err = PercentError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text
            .strip_suffix('%')
            .filter(|digits| is_plain_number(digits));
        match digits.and_then(|digits| digits.parse().ok()) {
            Some(number @ 0..=100) => Ok(Self(number)),
            _ => Err(PercentError(Invalid::new(
                format!("`{text}` is not a share"),
                "write a whole number from 0 to 100 and a percent sign, such as `20%`",
            ))),
        }
    }
}

/// Why a text is no share.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(transparent)]
pub struct PercentError(Invalid);

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

impl Serialize for Percent {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Percent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

impl JsonSchema for Percent {
    fn schema_name() -> Cow<'static, str> {
        "Percent".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": "^(100|[1-9]?[0-9])%$" })
    }
}

/// A port of a workload, by its number or its name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PortRef {
    /// 1 to 65535.
    Number(u16),
    /// The name that the workload gave to it.
    Name(String),
}

impl fmt::Display for PortRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl Serialize for PortRef {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Number(number) => serializer.serialize_u16(*number),
            Self::Name(name) => serializer.serialize_str(name),
        }
    }
}

impl<'de> Deserialize<'de> for PortRef {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Port;
        impl Visitor<'_> for Port {
            type Value = PortRef;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port's number or name")
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<PortRef, E> {
                check_port(number).map(PortRef::Number).map_err(E::custom)
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<PortRef, E> {
                Err(E::custom(no_port(number)))
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<PortRef, E> {
                check_port_name(name).map_err(E::custom)?;
                Ok(PortRef::Name(name.to_owned()))
            }
        }
        deserializer.deserialize_any(Port)
    }
}

impl JsonSchema for PortRef {
    fn schema_name() -> Cow<'static, str> {
        "PortRef".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A port's number or name.",
            "oneOf": [super::schema::port(generator), super::schema::port_name(generator)],
        })
    }
}

/// Checks a port's name as Kubernetes has it: at most 15 of `a-z`, `0-9` and `-`, one a letter.
pub(super) fn check_port_name(name: &str) -> Result<(), Invalid> {
    if is_plain_number(name) {
        return Err(Invalid::new(
            format!("the port's number \"{name}\" is written as a text"),
            format!("write {name} without quotes"),
        ));
    }
    let has_letter = name.bytes().any(|byte| byte.is_ascii_lowercase());
    if crate::host::is_dns_label(name) && name.len() <= 15 && has_letter && !name.contains("--") {
        return Ok(());
    }
    Err(Invalid::new(
        format!("`{name}` is not a port's name"),
        "write at most 15 characters of a-z, 0-9 and single `-`, a letter among them",
    ))
}

fn check_port(number: u64) -> Result<u16, Invalid> {
    match u16::try_from(number) {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(no_port(number)),
    }
}

fn no_port(number: impl fmt::Display) -> Invalid {
    Invalid::new(
        format!("there is no port {number}"),
        "write a number from 1 to 65535",
    )
}

/// Reads a port's number.
pub(super) fn port<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
    let number = i64::deserialize(deserializer)?;
    let port = u64::try_from(number)
        .ok()
        .and_then(|number| check_port(number).ok());
    port.ok_or_else(|| de::Error::custom(no_port(number)))
}

/// Reads a port's number that may be absent, but not empty.
pub(super) fn optional_port<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<u16>, D::Error> {
    port(deserializer).map(Some)
}

/// Reads a field that may be absent, but not empty.
pub(super) fn some<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    T::deserialize(deserializer).map(Some)
}

/// Reads how often a call may be tried again.
pub(super) fn attempts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    count(deserializer, ATTEMPTS_MAX)
}

/// Reads how many failures one after the other eject an endpoint.
pub(super) fn consecutive_failures<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<u32, D::Error> {
    count(deserializer, CONSECUTIVE_FAILURES_MAX)
}

fn count<'de, D: Deserializer<'de>>(deserializer: D, max: u32) -> Result<u32, D::Error> {
    let number = i64::deserialize(deserializer)?;
    match u32::try_from(number) {
        Ok(count) if (1..=max).contains(&count) => Ok(count),
        _ => Err(de::Error::custom(Invalid::new(
            format!("{number} is out of bounds"),
            format!("write a number from 1 to {max}"),
        ))),
    }
}

/// Reads where a sidecar listens.
pub(super) fn endpoint_address<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<SocketAddr, D::Error> {
    let text = String::deserialize(deserializer)?;
    let Ok(address) = text.parse::<SocketAddr>() else {
        return Err(de::Error::custom(Invalid::new(
            format!("`{text}` is not an IP address and a port"),
            "write both, such as \"127.0.0.1:21006\" or \"[::1]:21006\"",
        )));
    };
    check_address(address).map_err(de::Error::custom)?;
    Ok(address)
}

fn check_address(address: SocketAddr) -> Result<(), Invalid> {
    let ip = address.ip().to_canonical();
    let is_broadcast = matches!(ip, std::net::IpAddr::V4(ip) if ip.is_broadcast());
    if address.port() == 0 {
        return Err(no_port(0));
    }
    if ip.is_unspecified() || ip.is_multicast() || is_broadcast {
        return Err(Invalid::new(
            format!("`{ip}` is no address that can be connected to"),
            "write the address of the sidecar's inbound listener",
        ));
    }
    Ok(())
}

fn is_plain_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// A time as text, such as `2s`.
pub(super) mod duration {
    use super::{DURATION_MAX, DURATION_MIN, Deserialize, Deserializer, Duration, Invalid};
    use serde::{Serializer, de};

    pub(in super::super) fn serialize<S: Serializer>(
        duration: &Duration,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_duration(*duration))
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Duration, D::Error> {
        let text = String::deserialize(deserializer)?;
        let Ok(duration) = humantime::parse_duration(&text) else {
            return Err(de::Error::custom(Invalid::new(
                format!("`{text}` is not a time"),
                "write a number and its unit, such as `2s` or `250ms`",
            )));
        };
        if (DURATION_MIN..=DURATION_MAX).contains(&duration) {
            return Ok(duration);
        }
        Err(de::Error::custom(Invalid::new(
            format!("`{text}` is out of bounds"),
            "write a time from `1ms` to `24h`",
        )))
    }
}

/// A time as text that may be absent, but not empty.
pub(super) mod optional_duration {
    use super::{Deserializer, Duration, Serializer, duration};

    #[expect(clippy::ref_option, reason = "serde passes the field by reference")]
    pub(in super::super) fn serialize<S: Serializer>(
        duration: &Option<Duration>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match duration {
            Some(duration) => duration::serialize(duration, serializer),
            None => serializer.serialize_none(),
        }
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Duration>, D::Error> {
        duration::deserialize(deserializer).map(Some)
    }
}
