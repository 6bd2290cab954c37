//! Path patterns: the globs of `paths`.
//!
//! Invariant: the literal segments of a [`PathPattern`] are canonical, so a pattern is compared
//! with a [`CanonicalPath`] byte for byte.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::problem::Invalid;
use crate::path::{CanonicalPath, PathError};

/// Longest pattern in bytes.
const PATTERN_BYTES_MAX: usize = 2_048;
/// Most segments of a pattern.
const SEGMENTS_MAX: usize = 64;
/// Most `**` of a pattern: with more, matching would have to try too much.
const MANY_MAX: usize = 2;

/// One segment of a pattern.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PatternSegment {
    /// Exactly this text, which is empty for the slash at a path's end.
    Literal(Box<str>),
    /// `*`: exactly one segment that is not empty.
    One,
    /// `**`: any number of segments, none among them.
    Many,
}

/// A pattern of paths, such as `/orders/*/events`.
///
/// `*` is one whole segment and `**` any number of them; neither is part of a segment, and two
/// `**` never follow one another.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PathPattern {
    text: Box<str>,
    segments: Box<[PatternSegment]>,
}

impl PathPattern {
    /// The pattern as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// What stands between the slashes, as in [`CanonicalPath::segments`].
    pub fn segments(&self) -> &[PatternSegment] {
        &self.segments
    }

    /// Whether it is one path and no more.
    pub fn is_exact(&self) -> bool {
        let literal = |segment: &PatternSegment| matches!(segment, PatternSegment::Literal(_));
        self.segments.iter().all(literal)
    }
}

impl FromStr for PathPattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).map_err(PatternError)
    }
}

/// Why a text is no path pattern, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(transparent)]
pub struct PatternError(Invalid);

impl fmt::Display for PathPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for PathPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.text, f)
    }
}

impl Serialize for PathPattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for PathPattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for PathPattern {
    fn schema_name() -> Cow<'static, str> {
        "PathPattern".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "A path: `*` is one whole segment, `**` any number.",
            "pattern": "^/[^?#;\\\\\\s]*$",
            "maxLength": PATTERN_BYTES_MAX,
        })
    }
}

fn parse(text: &str) -> Result<PathPattern, Invalid> {
    if text.len() > PATTERN_BYTES_MAX {
        let message = format!("the path has more than {PATTERN_BYTES_MAX} bytes");
        return Err(Invalid::new(message, "write a shorter pattern with `**`"));
    }
    check_spelling(text)?;
    let rest = text.strip_prefix('/').unwrap_or_default();
    let segments: Vec<PatternSegment> = rest.split('/').map(segment).collect::<Result<_, _>>()?;
    if segments.len() > SEGMENTS_MAX {
        let message = format!("the path has more than {SEGMENTS_MAX} segments");
        return Err(Invalid::new(message, "write a shorter pattern with `**`"));
    }
    check_many(text, &segments)?;
    Ok(PathPattern {
        text: text.into(),
        segments: segments.into(),
    })
}

/// A pattern is spelt as requests are after they were brought to their one form: any other
/// spelling would match nothing.
fn check_spelling(text: &str) -> Result<(), Invalid> {
    if text == "*" || text == "**" {
        return Err(not_absolute(text, "/**"));
    }
    match CanonicalPath::parse(text) {
        Ok(path) if path.as_str() == text => Ok(()),
        Ok(path) => Err(Invalid::new(
            format!("the path `{text}` is not spelt as requests are when they are compared"),
            format!("write `{path}`"),
        )),
        Err(PathError::NotAbsolute) => Err(not_absolute(text, &format!("/{text}"))),
        Err(PathError::Query) => Err(Invalid::new(
            format!("the path `{text}` has a query, and no rule looks at queries"),
            "write the path up to the `?`",
        )),
        Err(error) => Err(Invalid::new(
            format!("no request has the path `{text}`: {error}"),
            "write the path as it is forwarded",
        )),
    }
}

fn not_absolute(text: &str, better: &str) -> Invalid {
    Invalid::new(
        format!("the path `{text}` does not start with `/`"),
        format!("write `{better}`"),
    )
}

fn segment(text: &str) -> Result<PatternSegment, Invalid> {
    match text {
        "*" => Ok(PatternSegment::One),
        "**" => Ok(PatternSegment::Many),
        _ if text.contains('*') => Err(Invalid::new(
            format!("`{text}` mixes `*` with other characters, but `*` stands for a whole segment"),
            "write `*` for one segment or `**` for any number, as in `/orders/*`",
        )),
        _ => Ok(PatternSegment::Literal(text.into())),
    }
}

fn check_many(text: &str, segments: &[PatternSegment]) -> Result<(), Invalid> {
    let is_many = |segment: &&PatternSegment| **segment == PatternSegment::Many;
    let twice = |pair: &[PatternSegment]| pair.iter().all(|s| *s == PatternSegment::Many);
    if segments.windows(2).any(twice) {
        return Err(Invalid::new(
            format!("`**/**` in `{text}` says no more than `**`"),
            "write `**` once",
        ));
    }
    if segments.iter().filter(is_many).count() > MANY_MAX {
        return Err(Invalid::new(
            format!("the path `{text}` has more than {MANY_MAX} `**`"),
            "write several patterns",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<PathPattern, String> {
        text.parse()
            .map_err(|error: PatternError| error.to_string())
    }

    #[test]
    fn a_pattern_is_taken_apart_at_its_slashes() {
        let pattern = parse("/orders/*/a-b/**").unwrap();
        let literal = |text: &str| PatternSegment::Literal(text.into());
        let expected = [
            literal("orders"),
            PatternSegment::One,
            literal("a-b"),
            PatternSegment::Many,
        ];
        assert_eq!(pattern.segments(), expected);
        assert!(!pattern.is_exact());
        assert!(parse("/orders").unwrap().is_exact());
        assert_eq!(parse("/").unwrap().segments(), [literal("")]);
        assert_eq!(
            parse("/a/").unwrap().segments(),
            [literal("a"), literal("")]
        );
    }

    #[test]
    fn what_could_never_match_is_refused_with_what_to_write() {
        for (text, says) in [
            ("orders", "write `/orders`"),
            ("*", "write `/**`"),
            ("**", "write `/**`"),
            ("", "does not start with `/`"),
            ("/a*", "`*` stands for a whole segment"),
            ("/a/***", "`*` stands for a whole segment"),
            ("/**/**", "write `**` once"),
            ("/**/a/**/b/**", "more than 2 `**`"),
            ("/%61", "write `/a`"),
            ("/a%2fb", "no encoded `/`"),
            ("/a%c3%a9", "write `/a%C3%A9`"),
            ("/\u{e9}", "non-ASCII"),
            ("/a//b", "empty segment"),
            ("/a/../b", "`..`"),
            ("/a?b=c", "up to the `?`"),
            ("/a[b", "write `/a%5Bb`"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
        assert!(parse(&format!("/{}", "a".repeat(PATTERN_BYTES_MAX))).is_err());
        assert!(parse(&"/a".repeat(SEGMENTS_MAX)).is_ok());
        assert!(parse(&"/a".repeat(SEGMENTS_MAX + 1)).is_err());
    }
}
