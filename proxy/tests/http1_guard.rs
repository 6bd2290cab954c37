//! The HTTP/1 guard in front of hyper: what it refuses, what it passes, and that both count alike.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::too_many_lines,
    clippy::format_push_string,
    missing_docs,
    unreachable_pub,
    dead_code,
    reason = "tests"
)]

#[path = "guard/support.rs"]
mod support;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use http::{Method, Request};
use proptest::prelude::*;
use sidegate_mesh::Clock;
use sidegate_proxy::http1::{GuardLimits, Reason, Rejection, ServerGuard};
use support::{Answer, End, Outcome, Script, call, clock, serve, serve_limited};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn whole(text: &str) -> Vec<Vec<u8>> {
    vec![text.as_bytes().to_vec()]
}

fn bytewise(text: &[u8]) -> Vec<Vec<u8>> {
    text.iter().map(|byte| vec![*byte]).collect()
}

/// Refused whole and byte by byte, before the service saw it, with our status and code.
#[track_caller]
fn refused(text: &str, reason: Reason) {
    for pieces in [whole(text), bytewise(text.as_bytes())] {
        let outcome = serve(pieces, End::Open);
        assert_eq!(outcome.reason(), Some(reason), "{text:?}");
        assert!(
            outcome.seen.is_empty(),
            "{text:?} reached the service: {:?}",
            outcome.seen
        );
        let status = format!("HTTP/1.1 {}", Rejection::from(reason).status().as_u16());
        assert!(
            outcome.written.starts_with(&status),
            "{text:?}: {}",
            outcome.written
        );
        let code = format!("sidegate-error: {}\r\n", reason.code());
        assert!(
            outcome.written.contains(&code),
            "{text:?}: {}",
            outcome.written
        );
        assert!(
            outcome.written.contains("connection: close\r\n"),
            "{}",
            outcome.written
        );
    }
}

/// Served whole and byte by byte as these `METHOD target body` lines.
#[track_caller]
fn served(text: &str, expected: &[(&str, &str, &str)]) {
    for pieces in [whole(text), bytewise(text.as_bytes())] {
        let outcome = serve(pieces, End::Open);
        assert_eq!(outcome.rejection, None, "{text:?}");
        let seen: Vec<_> = outcome
            .seen
            .iter()
            .map(|seen| {
                let body = String::from_utf8(seen.body.clone().expect("a whole body")).unwrap();
                (seen.method.as_str(), seen.target.as_str(), body)
            })
            .collect();
        let expected: Vec<_> = expected
            .iter()
            .map(|(method, target, body)| (*method, *target, (*body).to_owned()))
            .collect();
        assert_eq!(seen, expected, "{text:?}");
    }
}

/// A GET of `/` with these further lines.
fn get(lines: &str) -> String {
    format!("GET / HTTP/1.1\r\nHost: a\r\n{lines}\r\n")
}

/// A chunked POST with this body.
fn chunked(body: &str) -> String {
    format!("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{body}")
}

#[test]
fn a_request_line_has_one_form() {
    use Reason as R;
    for (line, reason) in [
        ("GET /", R::RequestLine),
        ("GET  / HTTP/1.1", R::Version),
        ("GET /  HTTP/1.1", R::Version),
        ("GET / HTTP/1.1 ", R::Version),
        (" GET / HTTP/1.1", R::Method),
        ("get / HTTP/1.1", R::Method),
        ("Get / HTTP/1.1", R::Method),
        ("G@T / HTTP/1.1", R::Method),
        ("sidegate-refused / HTTP/1.1", R::Method),
        (
            "SIDEGATE-REFUSED-BUT-FAR-TOO-LONG-FOR-A-METHOD / HTTP/1.1",
            R::Method,
        ),
        ("GET / HTTP/2.0", R::Version),
        ("GET / HTTP/1.2", R::Version),
        ("GET / HTTP/0.9", R::Version),
        ("GET / http/1.1", R::Version),
        ("GET / HTTP/01.1", R::Version),
        ("GET\t/ HTTP/1.1", R::RequestLine),
        ("GET * HTTP/1.1", R::TargetForm),
        ("GET a HTTP/1.1", R::TargetForm),
        ("GET a:80 HTTP/1.1", R::TargetForm),
        ("CONNECT a:80 HTTP/1.1", R::Connect),
        ("GET /a#b HTTP/1.1", R::Fragment),
        ("GET /a?b#c HTTP/1.1", R::Fragment),
        ("GET http://a#c HTTP/1.1", R::Fragment),
        ("GET /%zz HTTP/1.1", R::PercentEncoding),
        ("GET /%4 HTTP/1.1", R::PercentEncoding),
        ("GET /?q=% HTTP/1.1", R::PercentEncoding),
        ("GET /\\a HTTP/1.1", R::Target),
        ("GET /a\u{7f} HTTP/1.1", R::Target),
        ("GET /ä HTTP/1.1", R::Target),
        ("GET /\0 HTTP/1.1", R::Target),
        ("GET https://a/ HTTP/1.1", R::TargetScheme),
        ("GET HTTP://a/ HTTP/1.1", R::TargetScheme),
        ("GET http://u@a/ HTTP/1.1", R::Userinfo),
        ("GET http:///x HTTP/1.1", R::HostInvalid),
        ("GET http://b/ HTTP/1.1", R::HostMismatch),
        ("GET http://a:8080/ HTTP/1.1", R::HostMismatch),
    ] {
        refused(&format!("{line}\r\nHost: a\r\n\r\n"), reason);
    }
    served(
        "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
        &[("OPTIONS", "*", "")],
    );
    served(
        "GET http://a/x?y HTTP/1.1\r\nHost: A:80\r\n\r\n",
        &[("GET", "http://a/x?y", "")],
    );
    served(
        "GET http://a HTTP/1.1\r\nHost: a\r\n\r\n",
        &[("GET", "http://a/", "")],
    );
    served(
        "GET /a%2Fb?c=d|{}[]'`^ HTTP/1.0\r\n\r\n",
        &[("GET", "/a%2Fb?c=d|{}[]'`^", "")],
    );
    served(
        "\r\nPURGE / HTTP/1.1\r\nHost: a\r\n\r\n",
        &[("PURGE", "/", "")],
    );
    refused("\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", R::RequestLine);
    refused("\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", R::BareLf);
}

#[test]
fn http11_names_exactly_one_host() {
    use Reason as R;
    for (lines, reason) in [
        ("", R::HostMissing),
        ("Host:\r\n", R::HostInvalid),
        ("Host: \r\n", R::HostInvalid),
        ("Host: a\r\nHost: a\r\n", R::HostDuplicate),
        ("Host: a\r\nhOST: b\r\n", R::HostDuplicate),
        ("Host: a,b\r\n", R::HostInvalid),
        ("Host: a b\r\n", R::HostInvalid),
        ("Host: a/b\r\n", R::HostInvalid),
        ("Host: u@a\r\n", R::Userinfo),
        ("Host: a:\r\n", R::HostInvalid),
        ("Host: a:0\r\n", R::HostInvalid),
        ("Host: a:65536\r\n", R::HostInvalid),
        ("Host: a:+80\r\n", R::HostInvalid),
        ("Host: :80\r\n", R::HostInvalid),
        ("Host: a%2e\r\n", R::HostInvalid),
        ("Host: [::1\r\n", R::HostInvalid),
        ("Host: ::1\r\n", R::HostInvalid),
        ("Host: [zz]\r\n", R::HostInvalid),
        ("Host: ä\r\n", R::HostInvalid),
    ] {
        refused(&format!("GET / HTTP/1.1\r\n{lines}\r\n"), reason);
    }
    for host in [
        "a",
        "A.shop:80",
        "127.0.0.1:65535",
        "[::1]",
        "[::1]:80",
        "a_b",
        "a.",
    ] {
        served(
            &format!("GET / HTTP/1.1\r\nHost: \t{host} \r\n\r\n"),
            &[("GET", "/", "")],
        );
    }
    served("GET / HTTP/1.0\r\n\r\n", &[("GET", "/", "")]);
}

#[test]
fn header_lines_have_one_form() {
    use Reason as R;
    for (lines, reason) in [
        ("a: b\n", R::BareLf),
        ("a: b\nc: d\r\n", R::BareLf),
        ("a: b\r\r\n", R::BareCr),
        ("a: b\rc: d\r\n", R::BareCr),
        ("a: b\r\n c\r\n", R::ObsFold),
        ("a: b\r\n\tc: d\r\n", R::ObsFold),
        ("a : b\r\n", R::SpaceBeforeColon),
        ("a\t: b\r\n", R::SpaceBeforeColon),
        ("a b: c\r\n", R::HeaderName),
        ("a\r\n", R::HeaderName),
        (": a\r\n", R::HeaderName),
        ("ä: a\r\n", R::HeaderName),
        ("a\0: b\r\n", R::Nul),
        ("a: \0\r\n", R::Nul),
        ("a: \x01\r\n", R::HeaderValue),
        ("a: \x1b[31m\r\n", R::HeaderValue),
        ("a: \x7f\r\n", R::HeaderValue),
        ("Content_Length: 3\r\n", R::FramingLookalike),
        ("transfer_encoding: chunked\r\n", R::FramingLookalike),
        ("Connection: close, \u{e4}\r\n", R::HeaderValue),
    ] {
        refused(&get(lines), reason);
    }
    served(
        &get("a: b\tc \r\nempty:\r\nd: \u{e4}\r\n"),
        &[("GET", "/", "")],
    );
}

#[test]
fn framing_is_said_once_and_exactly() {
    use Reason as R;
    for (lines, reason) in [
        (
            "Content-Length: 0\r\nTransfer-Encoding: chunked\r\n",
            R::ContentLengthAndTransferEncoding,
        ),
        (
            "Transfer-Encoding: chunked\r\nContent-Length: 0\r\n",
            R::ContentLengthAndTransferEncoding,
        ),
        (
            "Content-Length: 3\r\nContent-Length: 3\r\n",
            R::ContentLengthDuplicate,
        ),
        ("Content-Length: 3, 3\r\n", R::ContentLength),
        ("Content-Length: +3\r\n", R::ContentLength),
        ("Content-Length: -0\r\n", R::ContentLength),
        ("Content-Length: 0x3\r\n", R::ContentLength),
        ("Content-Length: 3 3\r\n", R::ContentLength),
        ("Content-Length:\r\n", R::ContentLength),
        ("Content-Length: 9223372036854775808\r\n", R::ContentLength),
        (
            "Content-Length: 99999999999999999999999999\r\n",
            R::ContentLength,
        ),
        (
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
            R::TransferEncodingDuplicate,
        ),
        ("Transfer-Encoding: Chunked\r\n", R::TransferEncoding),
        ("Transfer-Encoding: ,chunked\r\n", R::TransferEncoding),
        ("Transfer-Encoding: chunked,\r\n", R::TransferEncoding),
        (
            "Transfer-Encoding: chunked, chunked\r\n",
            R::TransferEncoding,
        ),
        ("Transfer-Encoding: gzip, chunked\r\n", R::TransferEncoding),
        ("Transfer-Encoding: identity\r\n", R::TransferEncoding),
        ("Transfer-Encoding:\tchunked\r\n", R::TransferEncoding),
        ("Transfer-Encoding: chunked\t\r\n", R::TransferEncoding),
        ("Transfer-Encoding: \"chunked\"\r\n", R::TransferEncoding),
        ("Transfer-Encoding:\r\n", R::TransferEncoding),
    ] {
        refused(&get(lines), reason);
    }
    refused(
        "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        R::TransferEncodingHttp10,
    );
    served(
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: \t003 \r\n\r\nabcGET /b HTTP/1.1\r\nhost: a\r\n\r\n",
        &[("POST", "/", "abc"), ("GET", "/b", "")],
    );
}

#[test]
fn chunks_have_one_form() {
    use Reason as R;
    for (body, reason) in [
        ("3 \r\nabc\r\n0\r\n\r\n", R::ChunkSize),
        ("3\t\r\nabc\r\n0\r\n\r\n", R::ChunkSize),
        (" 3\r\nabc\r\n0\r\n\r\n", R::ChunkSize),
        ("+3\r\nabc\r\n0\r\n\r\n", R::ChunkSize),
        ("0x3\r\nabc\r\n0\r\n\r\n", R::ChunkSize),
        ("g\r\n", R::ChunkSize),
        ("\r\n", R::ChunkSize),
        ("3\nabc\r\n0\r\n\r\n", R::ChunkSize),
        ("3\rabc\r\n0\r\n\r\n", R::ChunkSize),
        ("00000000000000003\r\n", R::ChunkSize),
        ("ffffffffffffffff\r\n", R::ChunkSize),
        ("8000000000000000\r\n", R::ChunkSize),
        ("3;\r\nabc\r\n0\r\n\r\n", R::ChunkExtension),
        ("3;a=\r\nabc\r\n0\r\n\r\n", R::ChunkExtension),
        ("3; a\r\nabc\r\n0\r\n\r\n", R::ChunkExtension),
        ("3;a =b\r\nabc\r\n0\r\n\r\n", R::ChunkExtension),
        ("3;a\nabc\r\n0\r\n\r\n", R::ChunkExtension),
        ("3;a=\"b\nabc\r\n0\r\n\r\n", R::ChunkExtension),
        ("3;a=\"b\"c\r\nabc\r\n0\r\n\r\n", R::ChunkExtension),
        ("3\r\nabcd\r\n0\r\n\r\n", R::ChunkEnd),
        ("3\r\nabc\n0\r\n\r\n", R::ChunkEnd),
        ("3\r\nabc0\r\n\r\n", R::ChunkEnd),
        ("0\r\na: b\n\r\n", R::BareLf),
        ("0\r\na : b\r\n\r\n", R::SpaceBeforeColon),
        ("0\r\nContent-Length: 3\r\n\r\n", R::Trailer),
        ("0\r\nhost: b\r\n\r\n", R::Trailer),
        ("0\r\n \r\n\r\n", R::ObsFold),
        ("0\r\n\n", R::BareLf),
        ("0\r\n\rX\r\n", R::BareCr),
    ] {
        for pieces in [whole(&chunked(body)), bytewise(chunked(body).as_bytes())] {
            let outcome = serve(pieces, End::Open);
            assert_eq!(outcome.reason(), Some(reason), "{body:?}");
            assert_eq!(outcome.seen.len(), 1, "{body:?}: the head was sound");
            assert_eq!(
                outcome.seen[0].body, None,
                "{body:?}: the body must not end well"
            );
            assert_eq!(
                outcome.written.matches("HTTP/1.1").count(),
                1,
                "{body:?}: closed"
            );
        }
    }
    served(
        &chunked("3;a;b=c;d=\"e;\\\"f\"\r\nabc\r\nA\r\n0123456789\r\n000\r\n\r\n"),
        &[("POST", "/", "abc0123456789")],
    );
    let with_trailers =
        chunked("1\r\na\r\n0\r\nx: y\r\nz:\r\n\r\nGET /n HTTP/1.1\r\nHost: a\r\n\r\n");
    for pieces in [whole(&with_trailers), bytewise(with_trailers.as_bytes())] {
        let outcome = serve(pieces, End::Open);
        assert_eq!(
            (
                outcome.rejection,
                outcome.seen.len(),
                outcome.seen[0].trailers
            ),
            (None, 2, 2)
        );
    }
    let extension = format!("1;{}\r\na\r\n", "e".repeat(9_000));
    assert_eq!(
        serve(whole(&chunked(&extension)), End::Open).reason(),
        Some(R::ChunkExtension)
    );
}

#[test]
fn heads_and_trailers_are_bounded() {
    let long = get(&format!("a: {}\r\n", "b".repeat(70_000)));
    refused_large(&long, Reason::HeadTooLarge);
    refused_large(&get(&"a: b\r\n".repeat(100)), Reason::TooManyHeaders);
    refused_large(
        &format!("GET /{}", "x".repeat(65_600)),
        Reason::HeadTooLarge,
    );
    let fits = get(&"a: b\r\n".repeat(99));
    served(&fits, &[("GET", "/", "")]);
    let largest = get(&format!(
        "a: {}\r\n",
        "b".repeat(65_536 - get("").len() - 5)
    ));
    assert_eq!(largest.len(), 65_536);
    served(&largest, &[("GET", "/", "")]);
    let trailers = chunked(&format!("0\r\n{}\r\n", "a: b\r\n".repeat(101)));
    assert_eq!(
        serve(whole(&trailers), End::Open).reason(),
        Some(Reason::TooManyHeaders)
    );
    let trailers = chunked(&format!("0\r\na: {}\r\n\r\n", "b".repeat(70_000)));
    assert_eq!(
        serve(whole(&trailers), End::Open).reason(),
        Some(Reason::HeadTooLarge)
    );
    let trailers = chunked(&format!("0\r\na: {}\r\n\r\n", "b".repeat(60_000)));
    let outcome = serve(whole(&trailers), End::Open);
    assert_eq!(
        (outcome.rejection, outcome.seen[0].trailers),
        (None, 1),
        "hyper's bound is ours"
    );
}

fn refused_large(text: &str, reason: Reason) {
    let outcome = serve(whole(text), End::Open);
    assert_eq!(outcome.reason(), Some(reason));
    assert!(outcome.seen.is_empty());
    assert!(
        outcome.written.starts_with("HTTP/1.1 431 "),
        "{}",
        outcome.written
    );
}

#[test]
fn limits_are_the_callers_to_choose() {
    let limits = GuardLimits {
        head_bytes_max: 64,
        headers_max: 2,
        ..GuardLimits::default()
    };
    let reason = |text: &str| serve_limited(whole(text), End::Open, limits).reason();
    assert_eq!(reason(&get("a: b\r\n")), None);
    assert_eq!(
        reason(&get("a: b\r\nc: d\r\n")),
        Some(Reason::TooManyHeaders)
    );
    assert_eq!(
        reason(&get(&format!("a: {}\r\n", "b".repeat(64)))),
        Some(Reason::HeadTooLarge)
    );
}

#[test]
fn a_bad_head_behind_good_ones_is_refused_in_its_turn() {
    let text = format!("{}{}{}", get(""), "GET /x HTTP/1.1\r\n\r\n", get(""));
    for pieces in [whole(&text), bytewise(text.as_bytes())] {
        let outcome = serve(pieces, End::Open);
        assert_eq!(outcome.reason(), Some(Reason::HostMissing));
        assert_eq!(outcome.seen.len(), 1, "one before it, none behind it");
        assert!(
            outcome.written.contains("HTTP/1.1 200"),
            "{}",
            outcome.written
        );
        assert!(
            outcome.written.contains("HTTP/1.1 400"),
            "{}",
            outcome.written
        );
    }
}

#[test]
fn nothing_behind_the_last_message_is_read() {
    for last in [
        get("Connection: close\r\n"),
        get("Connection: keep-alive, Close\r\nConnection: keep-alive\r\n"),
        "GET / HTTP/1.0\r\n\r\n".to_owned(),
    ] {
        let outcome = serve(whole(&format!("{last}{}", get(""))), End::Open);
        assert_eq!(
            (outcome.rejection, outcome.seen.len()),
            (None, 1),
            "{last:?}"
        );
    }
    let kept = "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n".repeat(2);
    assert_eq!(serve(whole(&kept), End::Open).seen.len(), 2);
}

#[test]
fn a_connection_that_ends_inside_a_message_is_no_message() {
    let outcome = serve(whole("GET / HTTP/1.1\r\nHost: a\r\n"), End::Closed);
    assert_eq!(outcome.reason(), Some(Reason::IncompleteHead));
    let outcome = serve(
        whole("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nab"),
        End::Closed,
    );
    assert_eq!(outcome.reason(), Some(Reason::IncompleteBody));
    assert_eq!(outcome.seen[0].body, None);
    assert_eq!(serve(whole(&get("")), End::Closed).rejection, None);
    assert_eq!(serve(Vec::new(), End::Closed).rejection, None);
}

fn guard_over(
    io: tokio::io::DuplexStream,
    clock: Arc<dyn Clock>,
) -> (
    ServerGuard<tokio::io::DuplexStream>,
    sidegate_proxy::http1::GuardHandle,
) {
    ServerGuard::new(io, GuardLimits::default(), clock)
}

#[tokio::test]
async fn a_head_must_arrive_in_its_time_and_an_idle_connection_need_not() {
    let (mut peer, io) = tokio::io::duplex(1024);
    let clock = clock();
    let (mut guard, handle) = guard_over(io, Arc::clone(&clock) as Arc<dyn Clock>);
    let mut buffer = [0; 256];
    let mut reading = Box::pin(async move {
        let bytes = guard.read(&mut buffer).await.unwrap();
        String::from_utf8_lossy(&buffer[..bytes]).into_owned()
    });
    assert!(futures_util::poll!(&mut reading).is_pending());
    clock.advance(Duration::from_hours(1));
    assert!(
        futures_util::poll!(&mut reading).is_pending(),
        "idle is not late"
    );
    peer.write_all(b"GET / HT").await.unwrap();
    assert!(futures_util::poll!(&mut reading).is_pending());
    clock.advance(Duration::from_millis(9_999));
    peer.write_all(b"TP/1.1\r\n").await.unwrap();
    assert!(
        futures_util::poll!(&mut reading).is_pending(),
        "more bytes buy no more time"
    );
    clock.advance(Duration::from_millis(1));
    let read = reading.await;
    assert!(read.starts_with("sidegate-refused "), "{read}");
    assert_eq!(
        handle.rejection().map(|rejection| rejection.reason),
        Some(Reason::HeadTimeout)
    );
}

#[tokio::test]
async fn nothing_passes_an_upgrade_before_it_is_accepted() {
    let (mut peer, io) = tokio::io::duplex(1024);
    let (mut guard, handle) = guard_over(io, clock());
    let upgrade = get("Connection: upgrade\r\nUpgrade: websocket\r\n");
    peer.write_all(upgrade.as_bytes()).await.unwrap();
    let mut buffer = [0; 1024];
    assert_eq!(guard.read(&mut buffer).await.unwrap(), upgrade.len());
    let request = Request::builder()
        .header("upgrade", "websocket")
        .body(())
        .unwrap();
    let gate = handle.admit(&request).unwrap().expect("a gate");
    {
        let mut reading = Box::pin(guard.read(&mut buffer));
        assert!(futures_util::poll!(&mut reading).is_pending());
    }
    gate.accept().unwrap();
    peer.write_all(b"\x81\x00 frames, not HTTP").await.unwrap();
    let bytes = guard.read(&mut buffer).await.unwrap();
    assert_eq!(&buffer[..bytes], b"\x81\x00 frames, not HTTP");
    assert_eq!(handle.rejection(), None);
}

#[tokio::test]
async fn bytes_that_did_not_wait_for_the_upgrade_refuse_it() {
    let upgrade = get("Connection: upgrade\r\nUpgrade: websocket\r\n");
    let (mut peer, io) = tokio::io::duplex(1024);
    let (mut guard, handle) = guard_over(io, clock());
    peer.write_all(upgrade.as_bytes()).await.unwrap();
    let mut buffer = [0; 1024];
    assert!(guard.read(&mut buffer).await.unwrap() > 0);
    let request = Request::builder()
        .header("upgrade", "websocket")
        .body(())
        .unwrap();
    let gate = handle.admit(&request).unwrap().expect("a gate");
    peer.write_all(b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n")
        .await
        .unwrap();
    {
        let mut reading = Box::pin(guard.read(&mut buffer));
        assert!(futures_util::poll!(&mut reading).is_pending(), "held back");
    }
    let refusal = gate.accept().unwrap_err();
    assert_eq!(refusal.reason, Reason::UpgradeEarlyData);
    // Declined, what was held is a request like any other.
    let bytes = guard.read(&mut buffer).await.unwrap();
    assert!(buffer[..bytes].starts_with(b"GET /smuggled "));
}

#[test]
fn bytes_that_come_with_an_upgrade_refuse_it_before_the_service_sees_it() {
    let upgrade = get("Connection: upgrade\r\nUpgrade: websocket\r\n");
    let outcome = serve(whole(&format!("{upgrade}early")), End::Open);
    assert_eq!(outcome.reason(), Some(Reason::UpgradeEarlyData));
    assert!(outcome.seen.is_empty());
}

#[test]
fn a_declined_upgrade_leaves_an_ordinary_connection() {
    // As curl --http2 and Java's client ask on every call; the service drops the gate.
    let h2c = "POST / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nContent-Length: 1\r\n\r\nb";
    let pieces = vec![h2c.into(), get("").into_bytes(), get("").into_bytes()];
    let outcome = serve(pieces, End::Open);
    assert_eq!((outcome.rejection, outcome.seen.len()), (None, 3));
}

#[tokio::test]
async fn a_refusal_reaches_a_peer_that_is_still_sending() {
    use hyper::service::service_fn;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = async {
        let (io, _) = listener.accept().await.unwrap();
        let limits = GuardLimits::default();
        let (guard, handle) = ServerGuard::new(io, limits, clock());
        let service = service_fn(move |request: Request<hyper::body::Incoming>| {
            let rejection = handle.admit(&request).map(drop).expect_err("refused");
            let answer = http::Response::builder().status(rejection.status());
            std::future::ready(answer.body(http_body_util::Empty::<bytes::Bytes>::new()))
        });
        let io = hyper_util::rt::TokioIo::new(guard);
        sidegate_proxy::http1::server(Duration::from_mins(1), &limits)
            .serve_connection(io, service)
            .await
            .unwrap();
    };
    let asking = async {
        let mut io = tokio::net::TcpStream::connect(address).await.unwrap();
        io.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\nContent-Length: 100000\r\n\r\n").await.unwrap();
        io.write_all(&vec![b'x'; 100_000]).await.unwrap();
        let mut answer = String::new();
        io.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let ((), answer) = tokio::join!(serving, asking);
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
}

#[tokio::test]
async fn a_rejection_that_no_request_carried_is_told_once() {
    let (mut peer, io) = tokio::io::duplex(1024);
    let (mut guard, handle) = guard_over(io, clock());
    peer.write_all(chunked("x").as_bytes()).await.unwrap();
    let mut buffer = [0; 1024];
    assert!(guard.read(&mut buffer).await.unwrap() > 0);
    let error = guard.read(&mut buffer).await.unwrap_err();
    let rejection = Rejection::of(&error).expect("the rejection inside the error");
    assert_eq!(rejection.reason, Reason::ChunkSize);
    assert_eq!(handle.take_unreported(), Some(rejection));
    assert_eq!(handle.take_unreported(), None);
    assert_eq!(handle.rejection(), Some(rejection));
}

#[tokio::test]
async fn a_body_that_broke_off_is_no_refusal_of_its_own() {
    let (mut peer, io) = tokio::io::duplex(1024);
    let (mut guard, handle) = guard_over(io, clock());
    let cut = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\na";
    peer.write_all(cut.as_bytes()).await.unwrap();
    drop(peer);
    let mut passed = String::new();
    guard.read_to_string(&mut passed).await.unwrap();
    assert_eq!(passed, cut);
    let reason = handle.rejection().map(|rejection| rejection.reason);
    assert_eq!(reason, Some(Reason::IncompleteBody));
    assert_eq!(
        handle.take_unreported(),
        None,
        "the call's own record tells"
    );
}

#[track_caller]
fn answered(method: &Method, text: &str, expected: (u16, &str)) {
    for pieces in [whole(text), bytewise(text.as_bytes())] {
        let answer = call(method, false, pieces, End::Open);
        assert_eq!(answer.rejection, None, "{text:?}");
        let body = Some(expected.1.as_bytes().to_vec());
        assert_eq!(answer.response, Some((expected.0, body)), "{text:?}");
        assert!(answer.reusable, "{text:?}");
    }
}

#[track_caller]
fn answer_refused(text: &str, reason: Reason) -> Answer {
    let last = call(&Method::GET, false, whole(text), End::Open);
    let bytes = call(&Method::GET, false, bytewise(text.as_bytes()), End::Open);
    for answer in [&last, &bytes] {
        assert_eq!(
            answer.rejection.map(|rejection| rejection.reason),
            Some(reason),
            "{text:?}"
        );
        assert!(!answer.reusable, "{text:?}");
    }
    last
}

#[test]
fn a_response_head_has_one_form() {
    use Reason as R;
    for (text, reason) in [
        ("HTTP/1.1  200 OK\r\n\r\n", R::StatusCode),
        ("HTTP/1.1 20 OK\r\n\r\n", R::StatusCode),
        ("HTTP/1.1 2000 OK\r\n\r\n", R::StatusCode),
        ("HTTP/1.1 099 OK\r\n\r\n", R::StatusCode),
        ("HTTP/1.1 600 OK\r\n\r\n", R::StatusCode),
        ("HTTP/1.2 200 OK\r\n\r\n", R::Version),
        ("HTTP/2 200 OK\r\n\r\n", R::Version),
        ("ICY 200 OK\r\n\r\n", R::StatusLine),
        ("\r\nHTTP/1.1 200 OK\r\n\r\n", R::StatusLine),
        ("HTTP/1.1 200 O\x01K\r\n\r\n", R::HeaderValue),
        ("HTTP/1.1 200 OK\nContent-Length: 0\n\n", R::BareLf),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na",
            R::ContentLengthDuplicate,
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n",
            R::ContentLengthAndTransferEncoding,
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            R::TransferEncoding,
        ),
        (
            "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            R::TransferEncodingHttp10,
        ),
        (
            "HTTP/1.1 204 No Content\r\nContent-Length: 1\r\n\r\na",
            R::BodyNotAllowed,
        ),
        (
            "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            R::BodyNotAllowed,
        ),
        (
            "HTTP/1.1 103 Early\r\nContent-Length: 1\r\n\r\na",
            R::BodyNotAllowed,
        ),
        (
            "HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\n\r\n",
            R::UnexpectedSwitch,
        ),
        ("HTTP/1.1 200 OK\r\n a: b\r\n\r\n", R::ObsFold),
    ] {
        assert_eq!(answer_refused(text, reason).response, None, "{text:?}");
    }
    let early = "HTTP/1.1 103 Early Hints\r\n\r\n";
    assert_eq!(
        answer_refused(&early.repeat(33), R::TooManyInformational).response,
        None
    );
}

#[test]
fn responses_are_framed_by_status_and_method() {
    let get = Method::GET;
    answered(
        &get,
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        (200, "ok"),
    );
    answered(&get, "HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", (200, ""));
    answered(
        &get,
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 None\r\n\r\n",
        (204, ""),
    );
    answered(
        &get,
        "HTTP/1.1 204 None\r\nContent-Length: 0\r\n\r\n",
        (204, ""),
    );
    answered(
        &get,
        "HTTP/1.1 304 Same\r\nContent-Length: 9\r\n\r\n",
        (304, ""),
    );
    answered(
        &Method::HEAD,
        "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n",
        (200, ""),
    );
    answered(
        &Method::HEAD,
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        (200, ""),
    );
    answered(
        &get,
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        (200, "ok"),
    );
    let closing = call(&get, false, whole("HTTP/1.1 200 OK\r\n\r\nok"), End::Closed);
    assert_eq!(
        (closing.rejection, closing.response),
        (None, Some((200, Some(b"ok".to_vec()))))
    );
    let cut = call(
        &get,
        false,
        whole("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok"),
        End::Closed,
    );
    assert_eq!(cut.response, Some((200, None)));
    assert_eq!(
        cut.rejection.map(|rejection| rejection.reason),
        Some(Reason::IncompleteBody)
    );
}

#[test]
fn bytes_behind_a_response_answer_nothing_and_end_the_connection() {
    let second = "HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nstolen!";
    for first in [
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        "HTTP/1.1 304 Same\r\nContent-Length: 5\r\n\r\n",
    ] {
        let answer = answer_refused(&format!("{first}{second}"), Reason::UnsolicitedResponse);
        assert!(
            answer.response.is_some(),
            "the response before them was sound"
        );
    }
}

#[tokio::test]
async fn a_response_that_came_before_its_request_is_never_its_answer() {
    let (mut application, io) = tokio::io::duplex(1024);
    let (mut guard, handle) =
        sidegate_proxy::http1::ClientGuard::new(io, GuardLimits::default(), clock());
    application
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        .await
        .unwrap();
    handle.begin(&Method::GET, false);
    let error = guard
        .write_all(b"GET / HTTP/1.1\r\n\r\n")
        .await
        .unwrap_err();
    assert_eq!(
        Rejection::of(&error).map(|found| found.reason),
        Some(Reason::UnsolicitedResponse)
    );
    drop(guard);
    let mut received = Vec::new();
    application.read_to_end(&mut received).await.unwrap();
    assert!(
        received.is_empty(),
        "nothing of the request was sent: it may be retried"
    );
}

/// Writes requests, good and bad, out of pieces in which attacks hide.
fn message(random: &mut fastrand::Rng) -> Vec<u8> {
    let pick =
        |random: &mut fastrand::Rng, from: &[&str]| from[random.usize(..from.len())].to_owned();
    let rarely = |random: &mut fastrand::Rng| random.u8(..12) == 0;
    let known = |rare: bool, few: usize, all: usize| if rare { all } else { few };
    let mut text = String::new();
    if rarely(random) {
        text += &pick(random, &["\r\n", "\n", "\r", " "]);
    }
    let methods = known(rarely(random), 6, 8);
    text += &pick(
        random,
        &[
            "GET", "POST", "PUT", "OPTIONS", "HEAD", "PURGE", "get", "CONNECT",
        ][..methods],
    );
    text += if rarely(random) { "  " } else { " " };
    let targets = known(rarely(random), 5, 9);
    text += &pick(
        random,
        &[
            "/",
            "/a?b",
            "/%41",
            "/a/b;c",
            "http://a/x",
            "*",
            "/#",
            "/%",
            "http://b/",
        ][..targets],
    );
    text += if rarely(random) {
        " HTTP/1.0"
    } else {
        " HTTP/1.1"
    };
    text += if rarely(random) { "\n" } else { "\r\n" };
    if !rarely(random) {
        text += "Host: a\r\n";
    }
    for _ in 0..random.usize(..4) {
        text += &pick(
            random,
            &[
                "A: b\r\n",
                "Expect: 100-continue\r\n",
                "TE: trailers\r\n",
                "C:\r\n",
                "Accept: \t*/* \r\n",
            ],
        );
        if rarely(random) {
            text += &pick(
                random,
                &[
                    "x : y\r\n",
                    " x\r\n",
                    "x\r\n",
                    "x:\0\r\n",
                    "x: y\rz\r\n",
                    "Host: a\r\n",
                    "Connection: close\r\n",
                    "Connection: keep-alive\r\n",
                ],
            );
        }
    }
    match random.u8(..6) {
        0 => {
            let body = "b".repeat(random.usize(..40));
            text.push_str(&format!("Content-Length: {}\r\n\r\n{body}", body.len()));
        }
        1 | 2 => {
            text += "Transfer-Encoding: chunked\r\n";
            if rarely(random) {
                text += &pick(
                    random,
                    &["Content-Length: 4\r\n", "Transfer-Encoding: chunked\r\n"],
                );
            }
            text += "\r\n";
            for _ in 0..random.usize(..3) {
                let data = "c".repeat(random.usize(1..20));
                text.push_str(&format!("{:x}", data.len()));
                if rarely(random) {
                    text += &pick(random, &[";a", ";a=b", ";a=\"b\"", " ", ";", ";a=\"", "\n"]);
                }
                text.push_str(&format!("\r\n{data}\r\n"));
            }
            text += "0\r\n";
            if rarely(random) {
                text += &pick(
                    random,
                    &["T: u\r\n", "T: u\r\nV: w\r\n", "Host: b\r\n", " f\r\n"],
                );
            }
            text += "\r\n";
        }
        _ => text += "\r\n",
    }
    let mut bytes = text.into_bytes();
    if random.u8(..8) == 0 && !bytes.is_empty() {
        let at = random.usize(..bytes.len());
        match random.u8(..3) {
            0 => drop(bytes.remove(at)),
            1 => bytes.insert(at, random.u8(..)),
            _ => bytes[at] = random.u8(..),
        }
    }
    bytes
}

fn split(random: &mut fastrand::Rng, bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut rest = VecDeque::from(bytes.to_vec());
    let mut pieces = Vec::new();
    while !rest.is_empty() {
        let most = if random.bool() { 4 } else { 200 };
        let size = random.usize(1..=most).min(rest.len());
        pieces.push(rest.drain(..size).collect());
    }
    pieces
}

/// The heads in what the guard passes on, as httparse and the framing of the heads count them.
fn heads_passed(pieces: Vec<Vec<u8>>) -> usize {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let passed = runtime.block_on(async {
        let (mut guard, _) = ServerGuard::new(
            Script::new(pieces, End::Open),
            GuardLimits::default(),
            clock(),
        );
        let mut passed = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            let mut reading = Box::pin(guard.read(&mut buffer));
            match futures_util::poll!(&mut reading) {
                std::task::Poll::Ready(Ok(bytes)) if bytes > 0 => {
                    drop(reading);
                    passed.extend_from_slice(&buffer[..bytes]);
                }
                _ => break passed,
            }
        }
    });
    count_heads(&passed)
}

fn count_heads(mut rest: &[u8]) -> usize {
    let mut count = 0;
    while !rest.is_empty() {
        let mut headers = [httparse::EMPTY_HEADER; 128];
        let mut request = httparse::Request::new(&mut headers);
        let httparse::Status::Complete(length) = request.parse(rest).expect("what passes parses")
        else {
            panic!(
                "half a head has passed: {:?}",
                String::from_utf8_lossy(rest)
            );
        };
        if request.method == Some("sidegate-refused") {
            assert_eq!(length, rest.len(), "nothing follows the internal request");
            return count;
        }
        count += 1;
        let value = |name: &str| {
            let found = request
                .headers
                .iter()
                .find(|header| header.name.eq_ignore_ascii_case(name));
            found.map(|header| String::from_utf8_lossy(header.value).trim().to_owned())
        };
        let length_header = value("content-length").map_or(0, |length| length.parse().unwrap());
        let is_chunked = value("transfer-encoding").is_some();
        rest = &rest[length..];
        rest = if is_chunked {
            after_chunks(rest)
        } else {
            &rest[rest.len().min(length_header)..]
        };
    }
    count
}

fn after_chunks(mut rest: &[u8]) -> &[u8] {
    loop {
        let Ok(httparse::Status::Complete((start, size))) = httparse::parse_chunk_size(rest) else {
            return &[];
        };
        rest = &rest[start..];
        if size == 0 {
            break;
        }
        let size = usize::try_from(size).unwrap() + 2;
        if rest.len() < size {
            return &[];
        }
        rest = &rest[size..];
    }
    let mut headers = [httparse::EMPTY_HEADER; 128];
    match httparse::parse_headers(rest, &mut headers) {
        Ok(httparse::Status::Complete((length, _))) => &rest[length..],
        _ => &[],
    }
}

/// However a stream of requests is cut, hyper sees what the guard passed, and never refuses itself.
fn differ(seed: u64, rounds: usize) {
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut refusals, mut requests) = (0, 0);
    for round in 0..rounds {
        let stream: Vec<u8> = (0..random.usize(1..5))
            .flat_map(|_| message(&mut random))
            .collect();
        let shown = || {
            format!(
                "seed {seed}, round {round}: {:?}",
                String::from_utf8_lossy(&stream)
            )
        };
        let whole = serve(vec![stream.clone()], End::Open);
        for pieces in [bytewise(&stream), split(&mut random, &stream)] {
            let cut: Outcome = serve(pieces.clone(), End::Open);
            assert_eq!(
                (&cut.seen, cut.rejection),
                (&whole.seen, whole.rejection),
                "{}",
                shown()
            );
            assert_eq!(heads_passed(pieces), whole.seen.len(), "{}", shown());
        }
        assert_eq!(
            heads_passed(vec![stream.clone()]),
            whole.seen.len(),
            "{}",
            shown()
        );
        let own = whole.written.matches("HTTP/1.1 4").count()
            + whole.written.matches("HTTP/1.0 4").count();
        assert_eq!(
            own,
            whole.written.matches("sidegate-error: ").count(),
            "{}",
            shown()
        );
        refusals += usize::from(whole.rejection.is_some());
        requests += whole.seen.len();
    }
    assert!(
        refusals > rounds / 20 && requests > rounds / 2,
        "{refusals} and {requests} of {rounds}"
    );
}

#[test]
fn guard_and_hyper_see_the_same_requests_however_they_are_cut() {
    differ(0x51de_6a7e, 500);
    let seed = fastrand::u64(..);
    eprintln!("random seed: {seed}");
    differ(seed, 500);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_input_makes_either_guard_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), tail in ".{0,80}") {
        serve(vec![bytes.clone()], End::Closed);
        call(&Method::GET, true, vec![bytes.clone()], End::Closed);
        let mut framed = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
        framed.extend_from_slice(tail.as_bytes());
        framed.extend_from_slice(&bytes);
        serve(vec![framed], End::Closed);
        let mut answer = b"HTTP/1.1 200 OK\r\n".to_vec();
        answer.extend_from_slice(&bytes);
        call(&Method::GET, false, vec![answer], End::Closed);
    }
}

/// What a small head costs in the guard, beside the socket and hyper.
#[test]
#[ignore = "measures time; `.ci/run` runs it with --release"]
fn a_small_head_costs_less_than_a_microsecond() {
    const HEAD: &[u8] = b"GET /orders/7?full=1 HTTP/1.1\r\nHost: orders.shop\r\nUser-Agent: curl/8.5.0\r\nAccept: */*\r\nX-Request-Id: 0123456789abcdef\r\n\r\n";
    const ROUNDS: usize = 200_000;
    struct Endless(usize);
    impl tokio::io::AsyncRead for Endless {
        fn poll_read(
            mut self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
            buffer: &mut tokio::io::ReadBuf<'_>,
        ) -> std::task::Poll<std::io::Result<()>> {
            if self.0 > 0 {
                self.0 -= 1;
                buffer.put_slice(HEAD);
            }
            std::task::Poll::Ready(Ok(()))
        }
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let time = |guarded: bool| {
        let mut best = Duration::MAX;
        for _ in 0..5 {
            let start = std::time::Instant::now();
            runtime.block_on(async {
                let mut buffer = [0; 8192];
                let mut total = 0;
                if guarded {
                    let (mut guard, _) =
                        ServerGuard::new(Endless(ROUNDS), GuardLimits::default(), clock());
                    while let Ok(bytes @ 1..) = guard.read(&mut buffer).await {
                        total += bytes;
                    }
                } else {
                    let mut plain = Endless(ROUNDS);
                    while let Ok(bytes @ 1..) = plain.read(&mut buffer).await {
                        total += bytes;
                    }
                }
                assert_eq!(total, HEAD.len() * ROUNDS);
            });
            best = best.min(start.elapsed());
        }
        best / u32::try_from(ROUNDS).unwrap()
    };
    let cost = time(true).saturating_sub(time(false));
    eprintln!("a head of {} bytes: {cost:?}", HEAD.len());
    if !cfg!(debug_assertions) {
        assert!(cost < Duration::from_micros(1), "{cost:?}");
    }
}
