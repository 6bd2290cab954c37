//! A path pattern: `*` is one segment, `**` any number of them, anything else is itself.
//!
//! Invariant: `*` never stands for the empty segment behind a trailing `/`, so `/x/*` does not
//! admit `/x/`; `**` does, since "any number" starts at none.

use std::fmt;

use crate::resource::{PathPattern, PatternSegment};

/// One segment of a pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Segment {
    /// Itself; empty only at the end, for a trailing `/`.
    Literal(Box<str>),
    /// `*`: exactly one segment.
    One,
    /// `**`: any number of segments, also none.
    Any,
}

/// A path pattern of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Glob {
    text: Box<str>,
    segments: Vec<Segment>,
}

impl Glob {
    /// A resource's pattern.
    pub(crate) fn new(pattern: &PathPattern) -> Self {
        let segments = pattern.segments().iter().map(|segment| match segment {
            PatternSegment::Literal(text) => Segment::Literal(text.clone()),
            PatternSegment::One => Segment::One,
            PatternSegment::Many => Segment::Any,
        });
        Self {
            text: pattern.as_str().into(),
            segments: segments.collect(),
        }
    }

    /// The path of a gRPC method, or of every method when it is `*`.
    pub(crate) fn grpc(service: &str, method: &str) -> Self {
        let last = match method {
            "*" => Segment::One,
            name => Segment::Literal(name.into()),
        };
        Self {
            text: format!("/{service}/{method}").into(),
            segments: vec![Segment::Literal(service.into()), last],
        }
    }

    /// `/**`: every path.
    pub(crate) fn everything() -> Self {
        Self {
            text: "/**".into(),
            segments: vec![Segment::Any],
        }
    }

    pub(crate) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The same pattern as a Deny reads it: with or without a `/` at the end.
    pub(crate) fn without_trailing_slash(mut self) -> Self {
        if matches!(self.segments.last(), Some(Segment::Literal(last)) if last.is_empty()) {
            self.segments.pop();
        }
        self
    }

    /// Whether the pattern covers these segments. Linear in time for each `**`.
    pub(crate) fn matches(&self, path: &[&str]) -> bool {
        // Going back to the latest `**` is enough: it can absorb whatever an earlier one could.
        let (mut at, mut from) = (0, 0);
        let mut retry: Option<(usize, usize)> = None;
        loop {
            let step = match (self.segments.get(at), path.get(from)) {
                (None, None) => return true,
                (Some(Segment::Any), _) => {
                    retry = Some((at + 1, from));
                    at += 1;
                    continue;
                }
                (Some(Segment::One), Some(segment)) => !segment.is_empty(),
                (Some(Segment::Literal(literal)), Some(segment)) => **literal == **segment,
                (None, Some(_)) | (Some(_), None) => false,
            };
            if step {
                (at, from) = (at + 1, from + 1);
                continue;
            }
            match retry {
                Some((after, absorbed)) if absorbed < path.len() => {
                    retry = Some((after, absorbed + 1));
                    (at, from) = (after, absorbed + 1);
                }
                _ => return false,
            }
        }
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::CanonicalPath;

    #[track_caller]
    fn check(glob: &str, path: &str, expected: bool) {
        let path: CanonicalPath = path.parse().unwrap();
        let segments: Vec<&str> = path.segments().collect();
        let matches = Glob::new(&glob.parse().unwrap()).matches(&segments);
        assert_eq!(matches, expected, "{glob} {path}");
    }

    #[test]
    fn a_star_is_one_segment() {
        check("/orders/*", "/orders/7", true);
        check("/orders/*", "/orders", false);
        check("/orders/*", "/orders/", false);
        check("/orders/*", "/orders/7/", false);
        check("/orders/*", "/orders/7/events", false);
        check("/*/events", "/orders/events", true);
        check("/*", "/", false);
    }

    #[test]
    fn two_stars_are_any_number_of_segments() {
        for path in ["/health", "/health/", "/health/a", "/health/a/b/"] {
            check("/health/**", path, true);
        }
        check("/health/**", "/healthy", false);
        check("/**", "/", true);
        check("/**/c", "/a/b/c", true);
        check("/**/c", "/c", true);
        check("/**/c", "/a/b", false);
        check("/a/**/b/**/c", "/a/b/b/x/c", true);
        check("/a/**/b/**/c", "/a/x/c", false);
        check("/**/", "/", true);
        check("/**/", "/a/", true);
        check("/**/", "/a", false);
    }

    #[test]
    fn a_slash_at_the_end_is_another_path() {
        check("/x", "/x/", false);
        check("/x/", "/x", false);
        check("/x/", "/x/", true);
        check("/", "/", true);
        check("/", "/x", false);
    }

    #[test]
    fn the_asterisk_of_options_is_no_segment_that_a_star_covers() {
        check("/**", "*", true);
        check("/*", "*", false);
        check("/", "*", false);
    }
}
