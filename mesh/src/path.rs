//! The canonical path: the one form of a request's path that is authorized and forwarded.
//!
//! Invariant: a [`CanonicalPath`] that exists has exactly one spelling. Parsing it again gives the
//! same text; it has no empty, `.` or `..` segment; and each character that a path may hold as it
//! is, is not percent-encoded. So two spellings that an application may take for one another are
//! one path here, or are refused.

use std::fmt;

/// Why a path is refused. Each is answered with 400 and its [`PathError::code`] is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum PathError {
    /// Empty, or it does not start with `/`.
    #[error("a path starts with `/`")]
    NotAbsolute,
    /// A space, a control character or a byte outside ASCII stands in it unencoded.
    #[error("a path has no white space, control character or non-ASCII character")]
    Character,
    /// It holds a `?`; the query was to be cut off before.
    #[error("a path has no `?`")]
    Query,
    /// It holds a `#`.
    #[error("a request's path has no fragment")]
    Fragment,
    /// It holds a `\`, or one that is encoded.
    #[error("a path has no backslash")]
    Backslash,
    /// It holds a `;`, or one that is encoded: servers disagree on what follows it.
    #[error("a path has no `;` parameters")]
    Parameter,
    /// A `%` is not followed by two hexadecimal digits.
    #[error("`%` is followed by two hexadecimal digits")]
    PercentEncoding,
    /// A `/` is encoded as `%2f`.
    #[error("a path has no encoded `/`")]
    EncodedSlash,
    /// A control character is encoded, `%00` among them.
    #[error("a path has no encoded control character")]
    EncodedControl,
    /// A percent sign is encoded so that decoding twice gives another path.
    #[error("a path is not percent-encoded twice")]
    DoubleEncoding,
    /// The decoded bytes are not UTF-8, as in the overlong forms of `.` and `/`.
    #[error("a path's encoded bytes are UTF-8")]
    Utf8,
    /// A segment is `.` or `..`, encoded or not.
    #[error("a path has no `.` or `..` segment")]
    DotSegment,
    /// A segment is empty: `//`.
    #[error("a path has no empty segment")]
    EmptySegment,
}

impl PathError {
    /// The reason code of logs and metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotAbsolute => "path_not_absolute",
            Self::Character => "path_character",
            Self::Query => "path_query",
            Self::Fragment => "path_fragment",
            Self::Backslash => "path_backslash",
            Self::Parameter => "path_parameter",
            Self::PercentEncoding => "path_percent_encoding",
            Self::EncodedSlash => "path_encoded_slash",
            Self::EncodedControl => "path_encoded_control",
            Self::DoubleEncoding => "path_double_encoding",
            Self::Utf8 => "path_utf8",
            Self::DotSegment => "path_dot_segment",
            Self::EmptySegment => "path_empty_segment",
        }
    }
}

/// The path of a request without its query, in its only spelling. `*` is the path of `OPTIONS *`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CanonicalPath(Box<str>);

impl CanonicalPath {
    /// Brings a path to its one form.
    ///
    /// Encoded characters that may stand in a path as they are get decoded; raw ones that may not
    /// (`"`, `<`, `>`, `[`, `]`, `^`, `` ` ``, `{`, `|`, `}`) get encoded; hexadecimal digits become
    /// upper case. `raw_path` is the request target without its query (see [`split_target`]); a
    /// target in absolute form is taken apart by the caller.
    ///
    /// # Errors
    ///
    /// [`PathError`] for everything that an application might read as another path.
    pub fn parse(raw_path: &str) -> Result<Self, PathError> {
        if raw_path == "*" {
            return Ok(Self(raw_path.into()));
        }
        if !raw_path.starts_with('/') {
            return Err(PathError::NotAbsolute);
        }
        let canonical = normalize(raw_path)?;
        check_double_encoding(&canonical)?;
        check_segments(&canonical)?;
        Ok(Self(canonical.into()))
    }

    /// The path as it is authorized, forwarded and logged.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What stands between the slashes: `/orders/7` gives `orders` and `7`, `/orders/` gives
    /// `orders` and an empty text, `/` gives one empty text. `*` gives nothing.
    pub fn segments(&self) -> impl Iterator<Item = &str> {
        let path = self.0.strip_prefix('/');
        path.into_iter().flat_map(|path| path.split('/'))
    }

    /// Whether this is the `*` of `OPTIONS *`, which is the server itself and no path.
    pub fn is_asterisk(&self) -> bool {
        &*self.0 == "*"
    }

    /// Service and method when the path has gRPC's form, `^/[\w.]+/\w+$`.
    pub fn grpc(&self) -> Option<(&str, &str)> {
        let (service, method) = self.0.strip_prefix('/')?.split_once('/')?;
        let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        let is_service = !service.is_empty() && service.bytes().all(|b| word(b) || b == b'.');
        let is_method = !method.is_empty() && method.bytes().all(word);
        (is_service && is_method).then_some((service, method))
    }
}

impl fmt::Display for CanonicalPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for CanonicalPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl std::str::FromStr for CanonicalPath {
    type Err = PathError;

    fn from_str(raw_path: &str) -> Result<Self, Self::Err> {
        Self::parse(raw_path)
    }
}

/// Cuts a request target in origin form into its path and its query, the `?` in neither.
pub fn split_target(target: &str) -> (&str, Option<&str>) {
    match target.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (target, None),
    }
}

/// Brings each character to its one form. What it refuses can't be part of any path.
fn normalize(raw_path: &str) -> Result<String, PathError> {
    let mut canonical = String::with_capacity(raw_path.len());
    let mut beyond_ascii = Vec::new();
    let mut bytes = raw_path.bytes();
    while let Some(byte) = bytes.next() {
        let decoded = match byte {
            b'%' => decode(bytes.next(), bytes.next())?,
            0x80.. => return Err(PathError::Character),
            _ => byte,
        };
        let encoded = byte == b'%';
        if decoded >= 0x80 {
            beyond_ascii.push(decoded);
            push_encoded(&mut canonical, decoded);
            continue;
        }
        check_utf8(&mut beyond_ascii)?;
        push(&mut canonical, decoded, encoded)?;
    }
    check_utf8(&mut beyond_ascii)?;
    Ok(canonical)
}

/// Appends one ASCII character in its one form.
fn push(canonical: &mut String, byte: u8, encoded: bool) -> Result<(), PathError> {
    match byte {
        b'/' if encoded => return Err(PathError::EncodedSlash),
        b'\\' => return Err(PathError::Backslash),
        b';' => return Err(PathError::Parameter),
        b'?' if !encoded => return Err(PathError::Query),
        b'#' if !encoded => return Err(PathError::Fragment),
        b' ' if !encoded => return Err(PathError::Character),
        0..0x20 | 0x7f if encoded => return Err(PathError::EncodedControl),
        0..0x20 | 0x7f => return Err(PathError::Character),
        _ if stands_as_it_is(byte) => canonical.push(char::from(byte)),
        _ => push_encoded(canonical, byte),
    }
    Ok(())
}

/// RFC 3986's `pchar` without `;`, and the separator.
fn stands_as_it_is(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"/-._~!$&'()*+,=:@".contains(&byte)
}

fn push_encoded(canonical: &mut String, byte: u8) {
    let digit = |nibble: u8| match nibble {
        0..10 => char::from(b'0' + nibble),
        _ => char::from(b'A' + (nibble - 10)),
    };
    canonical.extend(['%', digit(byte >> 4), digit(byte & 0x0f)]);
}

fn decode(high: Option<u8>, low: Option<u8>) -> Result<u8, PathError> {
    let digit = |byte: Option<u8>| match byte {
        Some(byte @ b'0'..=b'9') => Ok(byte - b'0'),
        Some(byte @ b'a'..=b'f') => Ok(byte - b'a' + 10),
        Some(byte @ b'A'..=b'F') => Ok(byte - b'A' + 10),
        _ => Err(PathError::PercentEncoding),
    };
    Ok(digit(high)? << 4 | digit(low)?)
}

/// Checks one run of encoded bytes beyond ASCII, and empties it.
fn check_utf8(run: &mut Vec<u8>) -> Result<(), PathError> {
    let valid = std::str::from_utf8(run).is_ok();
    run.clear();
    if valid { Ok(()) } else { Err(PathError::Utf8) }
}

/// Refuses an encoded percent sign before two hexadecimal digits, also when those were encoded.
fn check_double_encoding(canonical: &str) -> Result<(), PathError> {
    let twice = |rest: &str| {
        let mut bytes = rest.bytes();
        matches!((bytes.next(), bytes.next()), (Some(a), Some(b))
            if a.is_ascii_hexdigit() && b.is_ascii_hexdigit())
    };
    // Nothing else in a canonical path holds `%25`: a `%` starts an encoding of three characters.
    if canonical.split("%25").skip(1).any(twice) {
        return Err(PathError::DoubleEncoding);
    }
    Ok(())
}

fn check_segments(canonical: &str) -> Result<(), PathError> {
    let mut segments = canonical.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        match segment {
            "." | ".." => return Err(PathError::DotSegment),
            "" if segments.peek().is_some() => return Err(PathError::EmptySegment),
            _ => {}
        }
    }
    Ok(())
}
