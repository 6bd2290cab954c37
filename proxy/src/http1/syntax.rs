//! The characters and small grammars of RFC 9110 and RFC 9112, as narrow as they are written.
//!
//! Always true: whatever is accepted here, `http` and hyper accept too, so that nothing passes the
//! guard only to be answered by hyper behind the service's back.

use super::rejection::Reason;

const TOKEN: u8 = 1;
const VALUE: u8 = 2;
const PATH: u8 = 4;
const QUERY: u8 = 8;
const METHOD: u8 = 16;
const REG_NAME: u8 = 32;

/// Longest method, in bytes.
const METHOD_BYTES_MAX: usize = 32;

/// Longest host name, in bytes.
const HOST_BYTES_MAX: usize = 255;

#[expect(
    clippy::indexing_slicing,
    reason = "a constant: an index out of bounds would not compile"
)]
const CLASSES: [u8; 256] = {
    let mut classes = [0; 256];
    let mut byte = 0_u8;
    loop {
        classes[byte as usize] = class(byte);
        if byte == u8::MAX {
            break classes;
        }
        byte += 1;
    }
};

const fn class(byte: u8) -> u8 {
    let alphanumeric = byte.is_ascii_alphanumeric();
    let mut class = 0;
    if alphanumeric
        || matches!(byte, b'!' | b'#'..=b'\'' | b'*' | b'+' | b'-' | b'.' | b'^'..=b'`' | b'|' | b'~')
    {
        class |= TOKEN;
    }
    if matches!(byte, b'\t' | b' '..=b'~' | 0x80..=0xff) {
        class |= VALUE;
    }
    // pchar and `/`; `%` is looked at again.
    if alphanumeric
        || matches!(
            byte,
            b'!' | b'$'..=b'/' | b':' | b';' | b'=' | b'@' | b'_' | b'~'
        )
    {
        class |= PATH;
    }
    // Applications send more than RFC 3986 allows behind `?`; nothing is decided there.
    if matches!(byte, b'!' | b'$'..=b';' | b'=' | b'?'..=b'~') {
        class |= QUERY;
    }
    if byte.is_ascii_uppercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_') {
        class |= METHOD;
    }
    if alphanumeric || matches!(byte, b'-' | b'.' | b'_') {
        class |= REG_NAME;
    }
    class
}

fn is(byte: u8, class: u8) -> bool {
    CLASSES
        .get(usize::from(byte))
        .is_some_and(|classes| classes & class != 0)
}

/// Whether `byte` may stand in a token.
pub(super) fn is_token(byte: u8) -> bool {
    is(byte, TOKEN)
}

/// Whether `byte` may stand in a field's value: HTAB, SP, VCHAR and obs-text.
pub(super) fn is_value(byte: u8) -> bool {
    is(byte, VALUE)
}

/// What is wrong with a value's byte for which [`is_value`] is false.
pub(super) fn value_reason(byte: u8) -> Reason {
    match byte {
        0 => Reason::Nul,
        _ => Reason::HeaderValue,
    }
}

/// An upper-case token that starts with a letter.
pub(super) fn check_method(method: &[u8]) -> Result<(), Reason> {
    let shape = method.len() <= METHOD_BYTES_MAX
        && method.first().is_some_and(u8::is_ascii_uppercase)
        && method.iter().all(|byte| is(*byte, METHOD));
    match (shape, method) {
        (false, _) => Err(Reason::Method),
        (true, b"CONNECT") => Err(Reason::Connect),
        (true, _) => Ok(()),
    }
}

/// The forms of a target that a server meets, with the authority of an absolute one.
pub(super) fn check_target<'a>(
    method: &[u8],
    target: &'a [u8],
) -> Result<Option<&'a [u8]>, Reason> {
    match target {
        b"*" if method == b"OPTIONS" => Ok(None),
        [b'/', ..] => check_path_and_query(target).map(|()| None),
        _ => check_absolute(target).map(Some),
    }
}

fn check_absolute(target: &[u8]) -> Result<&[u8], Reason> {
    if !target.iter().all(u8::is_ascii_graphic) {
        return Err(Reason::Target);
    }
    let Some(rest) = target.strip_prefix(b"http://") else {
        let has_scheme = target.windows(3).any(|three| three == b"://");
        return Err(if has_scheme {
            Reason::TargetScheme
        } else {
            Reason::TargetForm
        });
    };
    let end = rest
        .iter()
        .position(|byte| matches!(byte, b'/' | b'?' | b'#'))
        .unwrap_or(rest.len());
    let (authority, rest) = rest.split_at(end);
    check_authority(authority)?;
    check_path_and_query(rest)?;
    Ok(authority)
}

fn check_path_and_query(target: &[u8]) -> Result<(), Reason> {
    let mut class = PATH;
    let mut bytes = target.iter().copied();
    while let Some(byte) = bytes.next() {
        match byte {
            b'?' => class = QUERY,
            b'#' => return Err(Reason::Fragment),
            b'%' => {
                let two = bytes.next().zip(bytes.next());
                if !two.is_some_and(|(a, b)| a.is_ascii_hexdigit() && b.is_ascii_hexdigit()) {
                    return Err(Reason::PercentEncoding);
                }
            }
            _ if is(byte, class) => {}
            _ => return Err(Reason::Target),
        }
    }
    Ok(())
}

/// `host[:port]`: a registered name without `%`, an IPv4 address or an IPv6 literal.
pub(super) fn check_authority(authority: &[u8]) -> Result<(), Reason> {
    if authority.contains(&b'@') {
        return Err(Reason::Userinfo);
    }
    let (host, port) = split_port(authority);
    if !is_host(host) || !port.is_none_or(is_port) {
        return Err(Reason::HostInvalid);
    }
    Ok(())
}

fn is_host(host: &[u8]) -> bool {
    if let [b'[', literal @ .., b']'] = host {
        return std::str::from_utf8(literal)
            .is_ok_and(|literal| literal.parse::<std::net::Ipv6Addr>().is_ok());
    }
    (1..=HOST_BYTES_MAX).contains(&host.len()) && host.iter().all(|byte| is(*byte, REG_NAME))
}

fn is_port(port: &[u8]) -> bool {
    (1..=5).contains(&port.len()) && decimal(port).is_some_and(|port| (1..=65_535).contains(&port))
}

/// Whether two valid authorities name the same: without regard to case, port 80 by default.
pub(super) fn same_authority(one: &[u8], other: &[u8]) -> bool {
    let (one_host, one_port) = split_port(one);
    let (other_host, other_port) = split_port(other);
    let port = |port: Option<&[u8]>| port.map_or(Some(80), decimal);
    one_host.eq_ignore_ascii_case(other_host) && port(one_port) == port(other_port)
}

fn split_port(authority: &[u8]) -> (&[u8], Option<&[u8]>) {
    // The last colon, unless it stands inside an IPv6 literal.
    let colon = authority
        .iter()
        .rposition(|byte| matches!(byte, b':' | b']'));
    match colon.and_then(|at| authority.split_at_checked(at)) {
        Some((host, [b':', port @ ..])) => (host, Some(port)),
        _ => (authority, None),
    }
}

/// A decimal number of digits only, at most what `i64` holds.
pub(super) fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number: u64 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    i64::try_from(number).is_ok().then_some(number)
}

/// Without the blanks at both ends; `tabs` says whether HTAB is one.
pub(super) fn trim(value: &[u8], tabs: bool) -> &[u8] {
    let blank = |byte: &u8| *byte == b' ' || (tabs && *byte == b'\t');
    let start = value
        .iter()
        .position(|byte| !blank(byte))
        .unwrap_or(value.len());
    let end = value
        .iter()
        .rposition(|byte| !blank(byte))
        .map_or(start, |at| at + 1);
    value.get(start..end).unwrap_or_default()
}

/// The elements of a comma-separated list, without blanks.
pub(super) fn list(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value
        .split(|byte| *byte == b',')
        .map(|element| trim(element, true))
}
