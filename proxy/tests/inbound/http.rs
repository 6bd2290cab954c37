//! Ordinary calls: what the application and the caller see, and what is recorded.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};
use sidegate_mesh::Verdict;
use sidegate_mesh::access_log::Protocol;
use tokio::io::AsyncWriteExt;

use crate::app;
use crate::peers::{Peer, get, next, post, read_all, request, reset_of, whole};
use crate::support::{READERS, Setup, Sidecar, soon, until};

async fn shop() -> (Sidecar, Peer, app::Seen) {
    let (address, seen) = app::http().await;
    let sidecar = Sidecar::start(Setup::http(address, READERS)).await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    (sidecar, peer, seen)
}

async fn scripted<F, T>(serve: F) -> (Sidecar, Peer)
where
    F: Fn(tokio::net::TcpStream) -> T + Send + Sync + 'static,
    T: Future<Output = ()> + Send + 'static,
{
    let sidecar = Sidecar::start(Setup::http(app::raw(serve).await, READERS)).await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    (sidecar, peer)
}

#[tokio::test]
async fn an_allowed_call_is_served_and_recorded() {
    let (sidecar, peer, seen) = shop().await;
    let answer = peer.call(get("/orders/7?secret=1")).await.unwrap();
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.header("x-app"), "1");
    assert!(
        seen.has("GET /orders/7?secret=1 HTTP/1.1"),
        "{:?}",
        seen.all()
    );
    let record = sidecar.record_of("/orders/7").await;
    assert_eq!(
        record.source.as_deref(),
        Some("spiffe://mesh.local/ns/shop/sa/web")
    );
    assert_eq!(
        record.destination.as_deref(),
        Some("spiffe://mesh.local/ns/shop/sa/orders")
    );
    assert_eq!(record.decision, Some(Verdict::Allow));
    assert_eq!(record.policy.as_deref(), Some("shop/orders"));
    assert_eq!(record.rule.as_deref(), Some("readers"));
    assert_eq!(
        (record.status, record.protocol),
        (Some(200), Protocol::Http1)
    );
    assert_eq!((record.query, record.snapshot), (true, Some(1)));
    assert_eq!(record.authority.as_deref(), Some("orders.shop"));
    assert_eq!(record.tls_version, Some("TLSv1.3"));
    assert_eq!(record.response_bytes, answer.body.len() as u64);
    assert!(record.error.is_none() && record.upstream.is_some());
}

#[tokio::test]
async fn spoofed_identities_never_arrive_and_the_real_one_does() {
    let (_sidecar, peer, _) = shop().await;
    let mut request = get("/orders/7");
    for name in [
        "x-forwarded-client-cert",
        "x_forwarded_client_cert",
        "sidegate-client-id",
    ] {
        let value = "URI=spiffe://mesh.local/ns/shop/sa/admin".parse().unwrap();
        request
            .headers_mut()
            .append(http::HeaderName::from_static(name), value);
    }
    request
        .headers_mut()
        .insert("l5d-client-id", "admin".parse().unwrap());
    let answer = peer.call(request).await.unwrap();
    let text = answer.text();
    assert!(
        !text.contains("admin") && !text.contains("l5d") && !text.contains('_'),
        "{text}"
    );
    let web = "spiffe://mesh.local/ns/shop/sa/web";
    assert!(
        text.contains(&format!("x-forwarded-client-cert: URI={web}\n")),
        "{text}"
    );
    assert!(
        text.contains(&format!("sidegate-client-id: {web}\n")),
        "{text}"
    );
    assert!(!text.contains("sidegate-protocol"), "{text}");
    assert!(text.contains("host: orders.shop\n"), "{text}");
}

#[tokio::test]
async fn an_applications_response_cannot_pass_for_ours() {
    let (_sidecar, peer, _) = shop().await;
    let answer = peer.call(get("/orders/7")).await.unwrap();
    assert!(
        !answer.headers.contains_key("sidegate-error"),
        "{:?}",
        answer.headers
    );
    assert!(
        !answer.headers.contains_key("sidegate-decision"),
        "{:?}",
        answer.headers
    );
}

#[tokio::test]
async fn connections_to_the_application_are_reused() {
    let (_sidecar, peer, seen) = shop().await;
    for _ in 0..5 {
        peer.call(get("/orders/7")).await.unwrap();
        // The connection is ready again a moment after the last byte of the answer.
        tokio::task::yield_now().await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let connections = seen
        .all()
        .iter()
        .filter(|what| *what == "connection")
        .count();
    assert_eq!(connections, 1, "{:?}", seen.all());
}

#[tokio::test]
async fn a_large_body_is_streamed_both_ways_with_backpressure() {
    let (sidecar, peer, _) = shop().await;
    let size = 24 * 1024 * 1024;
    let (response, mut stream) = peer.begin(post("/orders"), false).await.unwrap();
    let sending = tokio::spawn(async move {
        let mut left = size;
        while left > 0 {
            stream.reserve_capacity(left.min(64 * 1024));
            let room = std::future::poll_fn(|context| stream.poll_capacity(context)).await;
            let chunk = room.unwrap().unwrap().min(left);
            left -= chunk;
            stream
                .send_data(Bytes::from(vec![7; chunk]), left == 0)
                .unwrap();
        }
    });
    let mut recv = soon(response).await.unwrap().into_body();
    // Nobody reads: what is under way is bounded by windows, so the sender comes to a stop.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!sending.is_finished(), "24 MiB were buffered");
    let mut body = Vec::new();
    soon(read_all(&mut recv, &mut body)).await.unwrap();
    assert_eq!(body.len(), size);
    let record = sidecar.record_of("/orders").await;
    assert_eq!(
        (record.request_bytes, record.response_bytes),
        (size as u64, size as u64)
    );
}

#[tokio::test]
async fn a_slow_application_gets_its_time() {
    let (sidecar, peer) = scripted(|mut stream| async move {
        app::read_until(&mut stream, "\r\n\r\n").await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n")
            .await
            .unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        stream.write_all(b"ok").await.unwrap();
    })
    .await;
    let answer = peer.call(get("/orders/7")).await.unwrap();
    assert_eq!(answer.text(), "ok");
    assert!(sidecar.record_of("/orders/7").await.duration >= Duration::from_millis(300));
}

#[tokio::test]
async fn an_application_that_nobody_runs_is_a_refused_stream() {
    let sidecar = Sidecar::start(Setup::http(app::nobody().await, READERS)).await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    let error = peer.call(get("/orders/7")).await.unwrap_err();
    assert_eq!(
        error.reason(),
        Some(h2::Reason::REFUSED_STREAM),
        "the caller may retry elsewhere"
    );
    let record = sidecar.record_of("/orders/7").await;
    assert_eq!(
        (record.error, record.status),
        (Some("upstream_connect"), None)
    );
    assert_eq!(record.decision, Some(Verdict::Allow));
}

#[tokio::test]
async fn an_answer_that_is_cut_off_is_never_a_clean_end() {
    for answer in [
        "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nonly this",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nonly\r\n",
    ] {
        let (sidecar, peer) = scripted(move |mut stream| async move {
            app::answer(&mut stream, answer).await;
        })
        .await;
        let answer = peer.call(get("/orders/7")).await.unwrap();
        assert_eq!(answer.status, StatusCode::OK);
        assert!(answer.reset.is_some(), "a clean end: {answer:?}");
        let record = sidecar.record_of("/orders/7").await;
        assert_eq!(record.error, Some("upstream_reset"));
    }
}

#[tokio::test]
async fn an_application_that_closes_without_an_answer_is_a_502() {
    let (sidecar, peer) = scripted(|mut stream| async move {
        app::read_until(&mut stream, "\r\n\r\n").await;
    })
    .await;
    let answer = peer.call(get("/orders/7")).await.unwrap();
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY);
    assert_eq!(answer.header("sidegate-error"), "upstream_reset");
    let record = sidecar.record_of("/orders/7").await;
    assert_eq!(
        (record.error, record.status),
        (Some("upstream_reset"), Some(502))
    );
}

#[tokio::test]
async fn an_answer_that_could_be_read_in_two_ways_is_a_502() {
    let (sidecar, peer) = scripted(|mut stream| async move {
        let answer = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\nok";
        app::answer(&mut stream, answer).await;
        app::end_of(&mut stream).await;
    })
    .await;
    let answer = peer.call(get("/orders/7")).await.unwrap();
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY);
    assert_eq!(answer.header("sidegate-error"), "upstream_protocol");
    assert_eq!(
        sidecar.record_of("/orders/7").await.error,
        Some("upstream_protocol")
    );
}

#[tokio::test]
async fn a_kept_connection_that_the_application_closed_costs_no_call() {
    let (_sidecar, peer) = scripted(|mut stream| async move {
        // Says that it keeps the connection, and closes it.
        app::answer(
            &mut stream,
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
        )
        .await;
    })
    .await;
    for _ in 0..20 {
        let answer = peer.call(get("/orders/7")).await.unwrap();
        assert_eq!((answer.status, answer.text()), (StatusCode::OK, "ok"));
    }
}

#[tokio::test]
async fn a_caller_that_gives_up_is_noticed_by_the_application() {
    let seen = app::Seen::default();
    let noted = seen.clone();
    let (sidecar, peer) = scripted(move |mut stream| {
        let seen = noted.clone();
        async move {
            app::read_until(&mut stream, "\r\n\r\n").await;
            seen.note("asked");
            seen.note(app::end_of(&mut stream).await);
        }
    })
    .await;
    let (response, mut stream) = peer.begin(get("/orders/7"), true).await.unwrap();
    until(|| seen.has("asked")).await;
    stream.send_reset(h2::Reason::CANCEL);
    drop(response);
    until(|| seen.all().len() == 2).await;
    assert_ne!(seen.all()[1], "fin", "an abort is no clean end");
    let record = sidecar.record_of("/orders/7").await;
    assert_eq!((record.error, record.status), (Some("peer_reset"), None));
    assert_eq!(sidecar.calls(), 0);
}

#[tokio::test]
async fn a_request_body_that_is_cut_off_is_never_a_clean_end() {
    let seen = app::Seen::default();
    let noted = seen.clone();
    let (sidecar, peer) = scripted(move |mut stream| {
        let seen = noted.clone();
        async move {
            seen.note(
                app::read_until(&mut stream, "part")
                    .await
                    .contains("chunked"),
            );
            seen.note(app::end_of(&mut stream).await);
        }
    })
    .await;
    let (response, mut stream) = peer.begin(post("/orders"), false).await.unwrap();
    stream
        .send_data(Bytes::from_static(b"part"), false)
        .unwrap();
    until(|| seen.has("true")).await;
    stream.send_reset(h2::Reason::CANCEL);
    drop(response);
    until(|| seen.all().len() == 2).await;
    let record = sidecar.record_of("/orders").await;
    assert_eq!(
        (record.error, record.request_bytes),
        (Some("peer_reset"), 4)
    );
}

#[tokio::test]
async fn informational_answers_pass_and_100_only_when_the_application_sent_it() {
    let (_sidecar, peer) = scripted(|mut stream| async move {
        let head = app::read_until(&mut stream, "\r\n\r\n").await;
        assert!(head.contains("expect: 100-continue"), "{head}");
        stream
            .write_all(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n")
            .await
            .unwrap();
        stream
            .write_all(b"HTTP/1.1 100 Continue\r\n\r\n")
            .await
            .unwrap();
        let body = app::read_until(&mut stream, "0\r\n\r\n").await;
        assert!(body.contains("body"), "{body}");
        app::answer_now(
            &mut stream,
            "HTTP/1.1 201 Created\r\ncontent-length: 0\r\n\r\n",
        )
        .await;
        app::end_of(&mut stream).await;
    })
    .await;
    let mut request = post("/orders");
    request
        .headers_mut()
        .insert("expect", "100-continue".parse().unwrap());
    let (mut response, mut stream) = peer.begin(request, false).await.unwrap();
    let mut heads = Vec::new();
    while heads.last() != Some(&100) {
        let next = soon(std::future::poll_fn(|c| response.poll_informational(c))).await;
        heads.push(next.expect("a 100").unwrap().status().as_u16());
    }
    assert_eq!(heads, [103, 100]);
    stream.send_data(Bytes::from_static(b"body"), true).unwrap();
    assert_eq!(whole(response).await.unwrap().status, StatusCode::CREATED);
}

#[tokio::test]
async fn a_final_answer_instead_of_100_reaches_the_caller_before_its_body() {
    let (_sidecar, peer) = scripted(|mut stream| async move {
        app::answer(
            &mut stream,
            "HTTP/1.1 417 Expectation Failed\r\ncontent-length: 0\r\n\r\n",
        )
        .await;
        app::end_of(&mut stream).await;
    })
    .await;
    let mut request = post("/orders");
    request
        .headers_mut()
        .insert("expect", "100-continue".parse().unwrap());
    let (response, _stream) = peer.begin(request, false).await.unwrap();
    let answer = whole(response).await.unwrap();
    assert_eq!(answer.status, StatusCode::EXPECTATION_FAILED);
    assert!(answer.reset.is_none(), "{answer:?}");
}

#[tokio::test]
async fn messages_without_a_body_end_with_their_head() {
    for (method, answer, status) in [
        (
            Method::HEAD,
            "HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n",
            200,
        ),
        (Method::GET, "HTTP/1.1 204 No Content\r\n\r\n", 204),
        (
            Method::GET,
            "HTTP/1.1 304 Not Modified\r\netag: \"x\"\r\n\r\n",
            304,
        ),
    ] {
        let (_sidecar, peer) = scripted(move |mut stream| async move {
            app::answer(&mut stream, answer).await;
            app::end_of(&mut stream).await;
        })
        .await;
        let answer = peer.call(request(method, "/orders/7")).await.unwrap();
        assert_eq!((answer.status.as_u16(), answer.body.len()), (status, 0));
        assert!(answer.reset.is_none(), "{answer:?}");
        if status == 200 {
            assert_eq!(answer.header("content-length"), "1000");
        }
    }
}

#[tokio::test]
async fn trailers_pass_both_ways_without_identities() {
    let (_sidecar, peer) = scripted(|mut stream| async move {
        let head = app::read_until(&mut stream, "\r\n\r\n").await;
        assert!(head.contains("te: trailers"), "{head}");
        let body = app::read_until(&mut stream, "\r\n\r\n").await;
        assert!(body.contains("x-sum: 1\r\n"), "{body}");
        assert!(!body.contains("client"), "{body}");
        app::answer_now(
            &mut stream,
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n\
             2\r\nok\r\n0\r\nx-sum: 2\r\nsidegate-error: forged\r\n\r\n",
        )
        .await;
        app::end_of(&mut stream).await;
    })
    .await;
    let mut request = post("/orders");
    request
        .headers_mut()
        .insert("te", "trailers".parse().unwrap());
    request
        .headers_mut()
        .insert("trailer", "x-sum, sidegate-client-id".parse().unwrap());
    let (response, mut stream) = peer.begin(request, false).await.unwrap();
    stream
        .send_data(Bytes::from_static(b"body"), false)
        .unwrap();
    let mut trailers = HeaderMap::new();
    trailers.insert("x-sum", "1".parse().unwrap());
    trailers.insert("sidegate-client-id", "admin".parse().unwrap());
    stream.send_trailers(trailers).unwrap();
    let answer = whole(response).await.unwrap();
    let trailers = answer.trailers.expect("trailers");
    assert_eq!(trailers["x-sum"], "2");
    assert_eq!(trailers.len(), 1, "{trailers:?}");
}

#[tokio::test]
async fn the_application_hears_the_version_that_its_caller_spoke() {
    let (_sidecar, peer) = scripted(|mut stream| async move {
        let head = app::read_until(&mut stream, "\r\n\r\n").await;
        assert!(head.starts_with("GET /orders/7 HTTP/1.0\r\n"), "{head}");
        let answer = "HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok";
        app::answer_now(&mut stream, answer).await;
    })
    .await;
    let mut request = get("/orders/7");
    request
        .headers_mut()
        .insert("sidegate-protocol", "http/1.0".parse().unwrap());
    let answer = peer.call(request).await.unwrap();
    assert_eq!(answer.text(), "ok");
}

#[tokio::test]
async fn an_early_answer_ends_a_request_body_that_goes_on() {
    let (sidecar, peer) = scripted(|mut stream| async move {
        app::answer(
            &mut stream,
            "HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n",
        )
        .await;
        // Reads nothing more, and does not close either.
        std::future::pending::<()>().await;
        drop(stream);
    })
    .await;
    let (response, mut stream) = peer.begin(post("/orders"), false).await.unwrap();
    stream
        .send_data(Bytes::from_static(b"begin"), false)
        .unwrap();
    let answer = whole(response).await.unwrap();
    assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
    assert!(answer.reset.is_none(), "{answer:?}");
    until(|| sidecar.clock.sleepers() > 0).await;
    sidecar.clock.advance(Duration::from_secs(3));
    assert_eq!(reset_of(&mut stream).await.unwrap(), h2::Reason::NO_ERROR);
    assert_eq!(sidecar.record_of("/orders").await.status, Some(401));
}

#[tokio::test]
async fn a_body_that_stands_still_before_any_answer_is_ended() {
    let seen = app::Seen::default();
    let noted = seen.clone();
    let (sidecar, peer) = scripted(move |mut stream| {
        let seen = noted.clone();
        async move {
            app::read_until(&mut stream, "begin").await;
            seen.note("begin");
            seen.note(app::end_of(&mut stream).await);
        }
    })
    .await;
    let (response, mut stream) = peer.begin(post("/orders"), false).await.unwrap();
    stream
        .send_data(Bytes::from_static(b"begin"), false)
        .unwrap();
    until(|| seen.has("begin")).await;
    // The pause is watched from the first poll that found nothing; until then time must not move.
    tokio::time::sleep(Duration::from_millis(50)).await;
    sidecar.clock.advance(Duration::from_secs(61));
    let answer = whole(response).await.unwrap();
    assert_eq!(answer.status, StatusCode::REQUEST_TIMEOUT);
    assert_eq!(answer.header("sidegate-error"), "idle_timeout");
    until(|| seen.all().len() == 2).await;
    assert_eq!(
        sidecar.record_of("/orders").await.error,
        Some("idle_timeout")
    );
}

#[tokio::test]
async fn a_stream_without_a_byte_for_the_idle_limit_is_ended() {
    let application = app::raw(|mut stream| async move {
        app::answer(
            &mut stream,
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
        )
        .await;
        app::end_of(&mut stream).await;
    })
    .await;
    let setup = Setup::http(application, READERS).with("limits: { streamIdleTimeout: 60s }\n");
    let sidecar = Sidecar::start(setup).await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    let (response, _stream) = peer.begin(get("/orders/7"), true).await.unwrap();
    let mut recv = soon(response).await.unwrap().into_body();
    for _ in 0..4 {
        sidecar.clock.advance(Duration::from_secs(15));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let ended = next(&mut recv).await.unwrap_err();
    assert_eq!(ended.reason(), Some(h2::Reason::CANCEL));
    assert_eq!(
        sidecar.record_of("/orders/7").await.error,
        Some("idle_timeout")
    );
}
