//! llhttp's vectors against the guard: what its strict parser refuses, the guard refuses, and what
//! it accepts is accepted or named here with the reason for which it is not.
//!
//! The vectors lie in `../shared`, beside the workspace, or where `SIDEGATE_SHARED` says. Without
//! them the tests say loudly that they were skipped.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    missing_docs,
    unreachable_pub,
    dead_code,
    reason = "tests"
)]

#[path = "guard/support.rs"]
mod support;
#[path = "guard/vectors.rs"]
mod vectors;

use std::collections::BTreeSet;

use http::Method;
use sidegate_proxy::http1::Reason;
use support::{End, call, serve};
use vectors::Vector;

/// Strict rejects of llhttp that the guard may pass, by name and reason (security.md §5), with how
/// many vectors bear that error.
const WAIVED_ERRORS: [(&str, &str); 3] = [
    (
        "Pause on CONNECT/Upgrade",
        "not a refusal: llhttp hands the connection over; the gate of the guard does",
    ),
    (
        "Pause on PRI/Upgrade",
        "not a refusal: llhttp hands an HTTP/2 preface over",
    ),
    (
        "Data after `Connection: close`",
        "what follows the last message is read by nobody; it neither reaches hyper nor an application",
    ),
];

const WAIVED_NAMES: [(&str, &str); 2] = [
    (
        "request/invalid.md: HTTP protocol and ANNOUNCE method",
        "RTSP's method is a token like any other (RFC 9110, §9.1)",
    ),
    (
        "request/invalid.md: Invalid method",
        "refused as it stands, without Host; with one, MKCOLA is a token like any other",
    ),
];

/// Vectors that llhttp accepts and the guard refuses, each by choice.
const STRICTER: [(&str, Reason, &str); 23] = [
    (
        "request/connection.md: CRLF between requests, implicit `keep-alive`",
        Reason::RequestLine,
        "one empty line before a request is forgiven, two are not",
    ),
    (
        "request/method.md: M-SEARCH request",
        Reason::TargetForm,
        "`*` belongs to OPTIONS alone (RFC 9112, §3.2.4)",
    ),
    (
        "request/method.md: SOURCE request with ICE",
        Reason::Version,
        "ICE is not HTTP",
    ),
    (
        "request/method.md: OPTIONS request with RTSP",
        Reason::Version,
        "RTSP is not HTTP",
    ),
    (
        "request/method.md: ANNOUNCE request with RTSP",
        Reason::Version,
        "RTSP is not HTTP",
    ),
    (
        "request/sample.md: curl GET",
        Reason::HostInvalid,
        "`0.0.0.0=5000` names no service",
    ),
    (
        "request/sample.md: Firefox GET",
        Reason::HostInvalid,
        "`0.0.0.0=5000` names no service",
    ),
    (
        "request/sample.md: No HTTP version",
        Reason::RequestLine,
        "HTTP/0.9",
    ),
    (
        "request/transfer-encoding.md: Trailing headers",
        Reason::Trailer,
        "a Content-Type in trailers comes too late to be believed (RFC 9110, §6.5.1)",
    ),
    (
        "request/transfer-encoding.md: POST with `chunked` as last transfer-encoding",
        Reason::TransferEncoding,
        "only `chunked`",
    ),
    (
        "request/transfer-encoding.md: POST with `chunked` as last transfer-encoding (multiple headers)",
        Reason::TransferEncoding,
        "only `chunked`",
    ),
    (
        "request/uri.md: Quotes in URI",
        Reason::Target,
        "`\"` is no character of a URI",
    ),
    (
        "request/uri.md: Fragment in URI",
        Reason::Fragment,
        "a fragment is never sent",
    ),
    (
        "request/uri.md: `host:port` and basic auth",
        Reason::Userinfo,
        "user information",
    ),
    (
        "response/connection.md: HTTP/1.0 with keep-alive and 204 status",
        Reason::UnsolicitedResponse,
        "a second response to one request",
    ),
    (
        "response/connection.md: HTTP/1.1 with 204 status",
        Reason::UnsolicitedResponse,
        "a second response to one request",
    ),
    (
        "response/connection.md: HTTP 304 with Content-Length",
        Reason::UnsolicitedResponse,
        "a second response to one request",
    ),
    (
        "response/connection.md: HTTP 304 with Transfer-Encoding",
        Reason::UnsolicitedResponse,
        "a second response to one request",
    ),
    (
        "response/connection.md: HTTP 100 first, then 400",
        Reason::StatusLine,
        "an empty line where a status line belongs",
    ),
    (
        "response/pipelining.md: Should parse multiple events",
        Reason::UnsolicitedResponse,
        "a second response to one request",
    ),
    (
        "response/sample.md: HTTP version 0.9",
        Reason::Version,
        "HTTP/0.9",
    ),
    (
        "response/sample.md: Response starting with CRLF",
        Reason::StatusLine,
        "an empty line where a status line belongs",
    ),
    (
        "response/transfer-encoding.md: `chunkedchunked` transfer-encoding does not enable chunked enconding",
        Reason::TransferEncoding,
        "only `chunked`; a body that is not understood is not passed on",
    ),
];

/// Further ones of the kind of the last: responses whose body only the end of the connection ends.
const STRICTER_RESPONSES: [(&str, Reason); 4] = [
    (
        "response/transfer-encoding.md: `chunked` before other transfer-encoding",
        Reason::TransferEncoding,
    ),
    (
        "response/transfer-encoding.md: multiple transfer-encoding where chunked is not the last one",
        Reason::TransferEncodingDuplicate,
    ),
    ("response/sample.md: RTSP response", Reason::StatusLine),
    ("response/sample.md: ICE response", Reason::StatusLine),
];

fn strict() -> Option<Vec<Vector>> {
    let Some(vectors) = vectors::all() else {
        eprintln!("SKIPPED: llhttp's vectors are not at hand (../shared, or SIDEGATE_SHARED)");
        return None;
    };
    assert!(
        vectors.len() > 200,
        "only {} vectors were read",
        vectors.len()
    );
    Some(
        vectors
            .into_iter()
            .filter(|vector| !vector.kind.contains("lenient"))
            .collect(),
    )
}

/// The vector as the guard would pass it but for what it tests: most have no Host, and some a
/// fragment beside the fault.
fn with_host(vector: &Vector) -> Vec<u8> {
    let text: Vec<u8> = replace(&vector.input, b"#hey ", b" ");
    let lower = text.to_ascii_lowercase();
    if lower.windows(5).any(|five| five == b"host:") {
        return text;
    }
    let host: &[u8] = if lower.windows(17).any(|word| word == b"hypnotoad.org:123") {
        b"HTTP/1.1\r\nHost: hypnotoad.org:1234\r\n"
    } else if lower.windows(13).any(|word| word == b"hypnotoad.org") {
        b"HTTP/1.1\r\nHost: hypnotoad.org\r\n"
    } else {
        b"HTTP/1.1\r\nHost: a\r\n"
    };
    replace(&text, b"HTTP/1.1\r\n", host)
}

fn replace(text: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut replaced = Vec::new();
    let mut rest = text;
    while let Some((byte, tail)) = rest.split_first() {
        if let Some(behind) = rest.strip_prefix(from) {
            replaced.extend_from_slice(to);
            rest = behind;
        } else {
            replaced.push(*byte);
            rest = tail;
        }
    }
    replaced
}

/// What the guard found, and how many heads hyper got: in one piece, or byte by byte.
fn guard(vector: &Vector, input: &[u8], bytewise: bool, end: End) -> (Option<Reason>, usize) {
    let pieces = if bytewise {
        input.iter().map(|byte| vec![*byte]).collect()
    } else {
        vec![input.to_vec()]
    };
    if vector.kind.starts_with("request") {
        let outcome = serve(pieces, end);
        assert!(
            outcome.written.matches("HTTP/1.1 4").count()
                <= outcome.written.matches("sidegate-error: ").count(),
            "{}: hyper refused by itself: {}",
            vector.name,
            outcome.written
        );
        (outcome.reason(), outcome.seen.len())
    } else {
        let answer = call(&Method::GET, true, pieces, end);
        let reason = answer.rejection.map(|rejection| rejection.reason);
        (reason, usize::from(answer.response.is_some()))
    }
}

fn waiver(vector: &Vector) -> Option<&'static str> {
    let error = vector.error.as_deref()?;
    let by_error = WAIVED_ERRORS.iter().find(|(waived, _)| *waived == error);
    let by_name = || {
        WAIVED_NAMES
            .iter()
            .find(|(waived, _)| *waived == vector.name)
    };
    by_error.or_else(by_name).map(|(_, reason)| *reason)
}

#[test]
fn what_llhttp_refuses_strictly_is_refused() {
    let Some(vectors) = strict() else { return };
    let rejects: Vec<_> = vectors
        .iter()
        .filter(|vector| vector.error.is_some())
        .collect();
    let (mut refused, mut waived) = (0, BTreeSet::new());
    for vector in &rejects {
        if waiver(vector).is_some() {
            waived.insert(vector.name.clone());
            continue;
        }
        for input in [vector.input.clone(), with_host(vector)] {
            for bytewise in [false, true] {
                let (reason, _) = guard(vector, &input, bytewise, End::Closed);
                assert!(
                    reason.is_some_and(|reason| reason != Reason::IncompleteBody),
                    "{} ({:?}) was accepted: {reason:?}",
                    vector.name,
                    vector.error
                );
            }
        }
        refused += 1;
    }
    eprintln!(
        "{refused} of {} strict rejects refused; waived: {waived:#?}",
        rejects.len()
    );
    assert!(refused >= 60, "only {refused} strict rejects were tried");
    assert!(
        waived.len() <= 19,
        "more is waived than was reasoned about: {waived:#?}"
    );
}

#[test]
fn what_llhttp_refuses_is_refused_before_the_connection_ends() {
    let Some(vectors) = strict() else { return };
    // The fault stands in a line that does not end, and whose end might still mend it.
    let needs_end = ["request/invalid.md: Invalid HTTP version"];
    for vector in vectors.iter().filter(|vector| vector.error.is_some()) {
        if waiver(vector).is_some() || needs_end.contains(&vector.name.as_str()) {
            continue;
        }
        let (reason, _) = guard(vector, &with_host(vector), false, End::Open);
        assert!(
            reason.is_some(),
            "{} ({:?}) waits",
            vector.name,
            vector.error
        );
    }
}

#[test]
fn what_llhttp_accepts_is_accepted_or_named_here() {
    let Some(vectors) = strict() else { return };
    let mut stricter: BTreeSet<&str> = STRICTER.iter().map(|(name, ..)| *name).collect();
    stricter.extend(STRICTER_RESPONSES.iter().map(|(name, _)| *name));
    let mut accepted = 0;
    for vector in vectors
        .iter()
        .filter(|vector| vector.error.is_none() && !vector.interface)
    {
        let (reason, heads) = guard(vector, &with_host(vector), false, End::Open);
        let chosen = STRICTER
            .iter()
            .map(|(name, reason, _)| (*name, *reason))
            .chain(STRICTER_RESPONSES)
            .find(|(name, _)| *name == vector.name);
        if let Some((name, expected)) = chosen {
            assert_eq!(reason, Some(expected), "{name}");
            stricter.remove(name);
            continue;
        }
        assert_eq!(reason, None, "{} was refused", vector.name);
        if vector.kind == "request" {
            assert_eq!(heads, vector.heads, "{}", vector.name);
        }
        accepted += 1;
    }
    assert!(
        stricter.is_empty(),
        "named as stricter and not found: {stricter:#?}"
    );
    assert!(accepted >= 60, "only {accepted} vectors were accepted");
}
