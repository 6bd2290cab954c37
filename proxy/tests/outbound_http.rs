//! HTTP/1 and HTTP/2 from an application, through the outbound half, to a peer that speaks the wire.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    clippy::too_many_lines,
    missing_docs,
    reason = "tests"
)]

#[path = "outbound/support.rs"]
#[allow(dead_code, unreachable_pub, reason = "each test file uses its part")]
mod support;

use std::sync::Arc;

use bytes::Bytes;
use h2::Reason;
use http::{HeaderMap, Request, Response, StatusCode};
use sidegate_mesh::Verdict;
use support::{
    Mesh, Peer, Web, handler, id, orders, read_all, reply, reset_of, says, send_all, soon,
};
use tokio::sync::{Notify, mpsc};

/// A peer that tells each head it gets, and answers 200.
async fn teller(mesh: &Mesh) -> (Peer, mpsc::UnboundedReceiver<http::request::Parts>) {
    let (heads, told) = mpsc::unbounded_channel();
    let answer = handler(move |request, mut respond| {
        let heads = heads.clone();
        async move {
            let (head, body) = request.into_parts();
            heads.send(head).unwrap();
            drop(read_all(body).await);
            reply(&mut respond, Response::new("ok"));
        }
    });
    (Peer::start(mesh, "orders", answer).await, told)
}

#[tokio::test]
async fn a_request_goes_to_the_service_of_its_host() {
    let mesh = Mesh::new();
    let (peer, mut heads) = teller(&mesh).await;
    let mut web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let got = web
        .client()
        .await
        .get("orders.shop", "/orders/7?full=1")
        .await;
    assert_eq!((got.status, got.text()), (200, "ok"));
    let head = heads.recv().await.unwrap();
    assert_eq!(head.uri.to_string(), "http://orders.shop/orders/7?full=1");
    assert_eq!(head.headers["sidegate-protocol"], "http/1.1");
    assert_eq!(head.headers["sidegate-port"], "8080");
    let record = web.record().await;
    assert_eq!(
        record.destination_service.as_deref(),
        Some("orders.shop:80")
    );
    assert_eq!(record.destination.as_deref(), Some(id("orders").as_str()));
    assert_eq!(record.source.as_deref(), Some(id("web").as_str()));
    assert_eq!(record.destination_address, Some(peer.address.into()));
    assert_eq!((record.status, record.response_bytes), (Some(200), 2));
    assert_eq!(
        (record.path.as_deref(), record.query),
        (Some("/orders/7"), true)
    );
    assert_eq!(
        (record.tls_version, record.snapshot),
        (Some("TLSv1.3"), Some(1))
    );
    assert_eq!((record.error, record.attempts), (None, None));
    assert!(record.upstream.is_some());
}

#[tokio::test]
async fn an_absolute_form_names_the_service_as_a_proxy_is_asked() {
    let mesh = Mesh::new();
    let (peer, mut heads) = teller(&mesh).await;
    let web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut client = web.client().await;
    let text = "GET http://orders.shop/orders/7 HTTP/1.1\r\nHost: orders.shop\r\n\
                Proxy-Connection: Keep-Alive\r\n\r\n";
    client.send(text).await;
    assert_eq!(client.reply().await.status, 200);
    let head = heads.recv().await.unwrap();
    assert_eq!(head.uri.path(), "/orders/7");
    assert!(!head.headers.contains_key("proxy-connection"));
}

#[tokio::test]
async fn an_unknown_destination_is_refused_clearly() {
    let mesh = Mesh::new();
    let peer = Peer::start(&mesh, "orders", says("ok")).await;
    let mut web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let got = web.client().await.get("nobody.shop", "/").await;
    assert_eq!(got.status, 502);
    assert_eq!(got.header("sidegate-error"), Some("destination_unknown"));
    let record = web.record().await;
    assert_eq!(record.error, Some("destination_unknown"));
    assert_eq!(
        (record.status, record.authority.as_deref()),
        (Some(502), Some("nobody.shop"))
    );
    assert_eq!(peer.accepted(), 0);
}

#[tokio::test]
async fn connect_and_another_hosts_target_are_refused() {
    let mesh = Mesh::new();
    let peer = Peer::start(&mesh, "orders", says("ok")).await;
    let mut web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut client = web.client().await;
    client
        .send("CONNECT orders.shop:80 HTTP/1.1\r\nHost: orders.shop:80\r\n\r\n")
        .await;
    let got = client.reply().await;
    assert!((400..500).contains(&got.status), "{got:?}");
    assert!(got.header("sidegate-error").is_some());
    assert!(web.record().await.error.is_some());
    let mut client = web.client().await;
    client
        .send("GET http://orders.shop/ HTTP/1.1\r\nHost: other.shop\r\n\r\n")
        .await;
    assert_eq!(client.reply().await.status, 400);
    assert_eq!(web.record().await.error, Some("bad_request"));
    assert_eq!(peer.streams(), 0);
}

#[tokio::test]
async fn what_is_not_http_is_refused_and_recorded() {
    let mesh = Mesh::new();
    let mut web = Web::start(&mesh, "").await;
    for (bytes, reason) in [
        (&b"\x16\x03\x01\x00"[..], "tls"),
        (b"\0\0", "unknown_protocol"),
    ] {
        let mut client = web.client().await;
        tokio::io::AsyncWriteExt::write_all(&mut client.stream, bytes)
            .await
            .unwrap();
        let record = web.record().await;
        assert_eq!(record.reason.as_deref(), Some(reason));
        assert_eq!(record.protocol, sidegate_mesh::access_log::Protocol::Tcp);
        assert!(client.rest().await.0.is_empty());
    }
}

#[tokio::test]
async fn a_connection_is_kept_alive_and_closed_when_asked() {
    let mesh = Mesh::new();
    let peer = Peer::start(&mesh, "orders", says("ok")).await;
    let web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut client = web.client().await;
    for _ in 0..3 {
        assert_eq!(client.get("orders.shop", "/").await.text(), "ok");
    }
    client
        .send("GET / HTTP/1.1\r\nHost: orders.shop\r\nConnection: close\r\n\r\n")
        .await;
    let got = client.reply().await;
    assert_eq!(got.header("connection"), Some("close"));
    assert!(client.rest().await.1.is_ok(), "closed with a FIN");
    assert_eq!(
        (peer.accepted(), peer.streams()),
        (1, 4),
        "one connection carries all"
    );
}

#[tokio::test]
async fn chunks_and_trailers_pass_both_ways() {
    let mesh = Mesh::new();
    let answer = handler(|request, mut respond| async move {
        let te = request.headers().get("te").cloned();
        assert_eq!(te.unwrap(), "trailers");
        let (body, trailers) = read_all(request.into_body()).await.unwrap();
        let sum = trailers.unwrap()["x-sum"].clone();
        let head = Response::builder()
            .header("trailer", "x-got")
            .body(())
            .unwrap();
        let mut stream = respond.send_response(head, false).unwrap();
        stream.send_data(body, false).unwrap();
        let mut trailers = HeaderMap::new();
        trailers.insert("x-got", sum);
        stream.send_trailers(trailers).unwrap();
    });
    let peer = Peer::start(&mesh, "orders", answer).await;
    let mut web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut client = web.client().await;
    client
        .send(
            "POST / HTTP/1.1\r\nHost: orders.shop\r\nTE: trailers\r\nConnection: TE\r\n\
             Trailer: x-sum\r\nTransfer-Encoding: chunked\r\n\r\n\
             3\r\none\r\n4\r\n two\r\n0\r\nx-sum: 42\r\n\r\n",
        )
        .await;
    let got = client.reply().await;
    assert_eq!(got.header("transfer-encoding"), Some("chunked"));
    assert_eq!((got.text(), got.trailer("x-got")), ("one two", Some("42")));
    let record = web.record().await;
    assert_eq!((record.request_bytes, record.response_bytes), (7, 7));
}

#[tokio::test]
async fn a_body_behind_expect_is_read_only_after_the_peers_100() {
    let mesh = Mesh::new();
    let (go, gone) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let answer = {
        let (go, gone) = (Arc::clone(&go), Arc::clone(&gone));
        handler(move |request, mut respond| {
            let (go, gone) = (Arc::clone(&go), Arc::clone(&gone));
            async move {
                assert_eq!(request.headers()["expect"], "100-continue");
                gone.notify_one();
                go.notified().await;
                let informational = Response::builder().status(100).body(()).unwrap();
                respond.send_informational(informational).unwrap();
                let (body, _) = read_all(request.into_body()).await.unwrap();
                assert_eq!(body, "12345");
                reply(&mut respond, Response::new("taken"));
            }
        })
    };
    let peer = Peer::start(&mesh, "orders", answer).await;
    let web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut client = web.client().await;
    client
        .send(
            "POST / HTTP/1.1\r\nHost: orders.shop\r\nContent-Length: 5\r\n\
             Expect: 100-continue\r\n\r\n",
        )
        .await;
    soon(gone.notified()).await;
    // The head has reached the peer; had the sidecar said 100 by itself, it would be here by now.
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert!(client.is_quiet());
    go.notify_one();
    assert_eq!(client.head().await.status, 100);
    client.send("12345").await;
    assert_eq!(client.reply().await.text(), "taken");
}

#[tokio::test]
async fn an_answer_without_a_100_leaves_the_body_unread() {
    let mesh = Mesh::new();
    let (bytes, mut read) = mpsc::unbounded_channel();
    let answer = handler(move |request, mut respond| {
        let bytes = bytes.clone();
        async move {
            let head = Response::builder().status(417).body("no").unwrap();
            reply(&mut respond, head);
            bytes
                .send(read_all(request.into_body()).await.is_ok())
                .unwrap();
        }
    });
    let peer = Peer::start(&mesh, "orders", answer).await;
    let web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut client = web.client().await;
    client
        .send(
            "POST / HTTP/1.1\r\nHost: orders.shop\r\nContent-Length: 5\r\n\
             Expect: 100-continue\r\n\r\n",
        )
        .await;
    let got = client.reply().await;
    assert_eq!(
        (got.status, got.text()),
        (417, "no"),
        "and no 100 before it"
    );
    assert!(
        !soon(read.recv()).await.unwrap(),
        "the peer sees a reset, not an empty body"
    );
}

#[tokio::test]
async fn answers_without_a_body_stay_without_one() {
    let mesh = Mesh::new();
    let answer = handler(|request, mut respond| async move {
        let status: u16 = request.uri().path()[1..].parse().unwrap();
        let mut head = Response::builder().status(status);
        if status != 204 {
            head = head.header("content-length", "1000");
        }
        respond.send_response(head.body(()).unwrap(), true).unwrap();
    });
    let peer = Peer::start(&mesh, "orders", answer).await;
    let mut web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut client = web.client().await;
    client
        .send("HEAD /200 HTTP/1.1\r\nHost: orders.shop\r\n\r\n")
        .await;
    let got = client.head().await;
    assert_eq!(
        (got.status, got.header("content-length")),
        (200, Some("1000"))
    );
    assert_eq!(client.get("orders.shop", "/204").await.status, 204);
    // hyper leaves out the length of what a 304 does not carry, which is allowed.
    assert_eq!(client.get("orders.shop", "/304").await.status, 304);
    // The connection is still in step.
    assert_eq!(
        client
            .get("orders.shop", "/204")
            .await
            .header("transfer-encoding"),
        None
    );
    assert!(client.is_quiet());
    for _ in 0..4 {
        let record = web.record().await;
        assert_eq!((record.response_bytes, record.error), (0, None));
    }
}

#[tokio::test]
async fn an_http_1_0_caller_is_served_and_an_abort_reaches_it_as_one() {
    let mesh = Mesh::new();
    let cut = Arc::new(Notify::new());
    let answer = {
        let cut = Arc::clone(&cut);
        handler(move |request, mut respond| {
            let cut = Arc::clone(&cut);
            async move {
                assert_eq!(request.headers()["sidegate-protocol"], "http/1.0");
                let mut stream = respond.send_response(Response::new(()), false).unwrap();
                send_all(&mut stream, b"half", false).await;
                if request.uri().path() == "/whole" {
                    send_all(&mut stream, b" and half", true).await;
                } else {
                    cut.notified().await;
                    stream.send_reset(Reason::INTERNAL_ERROR);
                }
            }
        })
    };
    let peer = Peer::start(&mesh, "orders", answer).await;
    let mut web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut client = web.client().await;
    client
        .send("GET /whole HTTP/1.0\r\nHost: orders.shop\r\n\r\n")
        .await;
    assert_eq!(client.reply().await.text(), "half and half");
    assert_eq!(web.record().await.error, None);
    let mut client = web.client().await;
    client
        .send("GET /cut HTTP/1.0\r\nHost: orders.shop\r\n\r\n")
        .await;
    assert_eq!(client.head().await.status, 200);
    assert_eq!(client.take(4).await, b"half");
    cut.notify_one();
    let (_, end) = client.rest().await;
    assert!(
        end.is_err(),
        "a body that ends by closing must not seem whole"
    );
    assert_eq!(web.record().await.error, Some("upstream_reset"));
}

#[tokio::test]
async fn a_response_that_is_cut_off_never_ends_cleanly() {
    let mesh = Mesh::new();
    let cut = Arc::new(Notify::new());
    let answer = {
        let cut = Arc::clone(&cut);
        handler(move |_request, mut respond| {
            let cut = Arc::clone(&cut);
            async move {
                let mut stream = respond.send_response(Response::new(()), false).unwrap();
                send_all(&mut stream, b"half", false).await;
                cut.notified().await;
                stream.send_reset(Reason::INTERNAL_ERROR);
            }
        })
    };
    let peer = Peer::start(&mesh, "orders", answer).await;
    let mut web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut client = web.client().await;
    client
        .send("GET / HTTP/1.1\r\nHost: orders.shop\r\n\r\n")
        .await;
    assert_eq!(client.head().await.status, 200);
    assert_eq!(client.take(7).await, b"4\r\nhalf");
    cut.notify_one();
    let (bytes, _) = client.rest().await;
    assert_eq!(bytes, b"\r\n", "and no last chunk");
    let record = web.record().await;
    assert_eq!(record.error, Some("upstream_reset"));
    assert_eq!((record.status, record.response_bytes), (Some(200), 4));
    let mut h2 = web.h2().await;
    let request = Request::get("http://orders.shop/").body(()).unwrap();
    let (response, _) = h2.send_request(request, true).unwrap();
    let mut body = soon(response).await.unwrap().into_body();
    assert_eq!(soon(body.data()).await.unwrap().unwrap(), "half");
    cut.notify_one();
    let failed = soon(body.data()).await.unwrap().unwrap_err();
    assert_eq!(failed.reason(), Some(Reason::INTERNAL_ERROR));
}

#[tokio::test]
async fn a_caller_that_goes_away_cancels_its_call() {
    let mesh = Mesh::new();
    let (reasons, mut told) = mpsc::unbounded_channel();
    let began = Arc::new(Notify::new());
    let answer = {
        let began = Arc::clone(&began);
        handler(move |_request, mut respond| {
            let (reasons, began) = (reasons.clone(), Arc::clone(&began));
            async move {
                began.notify_one();
                reasons.send(reset_of(&mut respond).await).unwrap();
            }
        })
    };
    let peer = Peer::start(&mesh, "orders", answer).await;
    let mut web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut client = web.client().await;
    client
        .send("GET / HTTP/1.1\r\nHost: orders.shop\r\n\r\n")
        .await;
    soon(began.notified()).await;
    drop(client);
    assert_eq!(soon(told.recv()).await, Some(Reason::CANCEL));
    assert_eq!(web.record().await.flags, ["cut_off"]);
    let mut h2 = web.h2().await;
    let request = Request::post("http://orders.shop/").body(()).unwrap();
    let (response, mut stream) = h2.send_request(request, false).unwrap();
    soon(began.notified()).await;
    stream.send_reset(Reason::CANCEL);
    drop(response);
    assert_eq!(soon(told.recv()).await, Some(Reason::CANCEL));
    assert_eq!(peer.accepted(), 1, "a cancelled stream costs no connection");
}

#[tokio::test]
async fn http2_with_prior_knowledge_passes_informational_answers_and_trailers() {
    let mesh = Mesh::new();
    let answer = handler(|request, mut respond| async move {
        assert_eq!(request.headers()["sidegate-protocol"], "h2");
        let hint = Response::builder()
            .status(103)
            .header("link", "</x>")
            .body(())
            .unwrap();
        respond.send_informational(hint).unwrap();
        let mut stream = respond.send_response(Response::new(()), false).unwrap();
        send_all(&mut stream, b"body", false).await;
        let mut trailers = HeaderMap::new();
        trailers.insert("x-end", "1".parse().unwrap());
        stream.send_trailers(trailers).unwrap();
    });
    let peer = Peer::start(&mesh, "orders", answer).await;
    let mut web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut h2 = web.h2().await;
    let request = Request::get("http://orders.shop/").body(()).unwrap();
    let (mut response, _) = h2.send_request(request, true).unwrap();
    let hint = soon(std::future::poll_fn(|cx| response.poll_informational(cx))).await;
    let hint = hint.unwrap().unwrap();
    assert_eq!(
        (hint.status(), &hint.headers()["link"]),
        (StatusCode::EARLY_HINTS, &"</x>".parse().unwrap())
    );
    let (body, trailers) = read_all(soon(response).await.unwrap().into_body())
        .await
        .unwrap();
    assert_eq!(body, "body");
    assert_eq!(trailers.unwrap()["x-end"], "1");
    assert_eq!(
        web.record().await.protocol,
        sidegate_mesh::access_log::Protocol::Http2
    );
}

#[tokio::test]
async fn a_header_list_that_is_too_large_is_answered_431_and_recorded() {
    let mesh = Mesh::new();
    let peer = Peer::start(&mesh, "orders", says("ok")).await;
    let mut web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut client = web.client().await;
    let fields: Vec<String> = (0..101).map(|i| format!("x-{i}: y\r\n")).collect();
    let fields = fields.concat();
    client
        .send(&format!(
            "GET / HTTP/1.1\r\nHost: orders.shop\r\n{fields}\r\n"
        ))
        .await;
    let got = client.reply().await;
    assert_eq!(got.status, 431);
    assert_eq!(got.header("sidegate-error"), Some("header_list_too_large"));
    assert_eq!(web.record().await.error, Some("header_list_too_large"));
    let mut client = web.client().await;
    let long = "y".repeat(70 * 1024);
    client
        .send(&format!(
            "GET / HTTP/1.1\r\nHost: orders.shop\r\nx: {long}\r\n\r\n"
        ))
        .await;
    assert_eq!(client.reply().await.status, 431);
    assert_eq!(web.record().await.status, Some(431));
    let mut h2 = web.h2().await;
    let request = Request::get("http://orders.shop/")
        .header("x", long)
        .body(())
        .unwrap();
    let (response, _) = h2.send_request(request, true).unwrap();
    let response = soon(response).await.unwrap();
    assert_eq!(response.status(), 431);
    assert_eq!(
        response.headers()["sidegate-error"],
        "header_list_too_large"
    );
    assert_eq!(web.record().await.error, Some("header_list_too_large"));
    assert_eq!(peer.streams(), 0);
}

#[tokio::test]
async fn nothing_of_ours_that_an_application_says_goes_on() {
    let mesh = Mesh::new();
    let (peer, mut heads) = teller(&mesh).await;
    let web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut client = web.client().await;
    client
        .send(
            "GET / HTTP/1.1\r\nHost: orders.shop\r\nsidegate-port: 1\r\nsidegate-protocol: h2\r\n\
             sidegate_client_id: x\r\nx-forwarded-client-cert: URI=spiffe://x\r\n\
             x-hop: 1\r\nConnection: x-hop\r\n\r\n",
        )
        .await;
    assert_eq!(client.reply().await.status, 200);
    let head = heads.recv().await.unwrap();
    assert_eq!(head.headers["sidegate-port"], "8080");
    assert_eq!(head.headers["sidegate-protocol"], "http/1.1");
    for name in [
        "sidegate_client_id",
        "x-forwarded-client-cert",
        "x-hop",
        "connection",
    ] {
        assert!(!head.headers.contains_key(name), "{name}");
    }
}

#[tokio::test]
async fn a_peers_refusal_passes_with_its_decision_and_is_recorded() {
    let mesh = Mesh::new();
    let answer = handler(|_request, mut respond| async move {
        let head = Response::builder()
            .status(403)
            .header("sidegate-error", "denied")
            .header("sidegate-decision", "00c0ffee")
            .body("{}")
            .unwrap();
        reply(&mut respond, head);
    });
    let peer = Peer::start(&mesh, "orders", answer).await;
    let mut web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let got = web.client().await.get("orders.shop", "/").await;
    assert_eq!(
        (got.status, got.header("sidegate-decision")),
        (403, Some("00c0ffee"))
    );
    let record = web.record().await;
    assert_eq!(record.decision, Some(Verdict::Deny));
    assert_eq!(record.decision_id.as_deref(), Some("00c0ffee"));
    assert_eq!(record.error, None, "the failure was not made here");
}

#[tokio::test]
async fn a_slow_reader_slows_its_writer_both_ways() {
    const LENGTH: usize = 64 << 20;
    let mesh = Mesh::new();
    let release = Arc::new(Notify::new());
    let answer = {
        let release = Arc::clone(&release);
        handler(move |request, mut respond| {
            let release = Arc::clone(&release);
            async move {
                release.notified().await;
                let (body, _) = read_all(request.into_body()).await.unwrap();
                let mut stream = respond.send_response(Response::new(()), false).unwrap();
                let data = Bytes::from(vec![7; body.len()]);
                sidegate_proxy::wire::send::send_data(&mut stream, data, true)
                    .await
                    .unwrap();
            }
        })
    };
    let peer = Peer::start(&mesh, "orders", answer).await;
    let mut web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut client = web.client().await;
    client
        .send(&format!(
            "POST / HTTP/1.1\r\nHost: orders.shop\r\nContent-Length: {LENGTH}\r\n\r\n"
        ))
        .await;
    let (read, mut write) = client.stream.into_split();
    let sent = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let writer = {
        let sent = Arc::clone(&sent);
        tokio::spawn(async move {
            let chunk = vec![1; 1 << 16];
            while sent.load(std::sync::atomic::Ordering::SeqCst) < LENGTH {
                tokio::io::AsyncWriteExt::write_all(&mut write, &chunk)
                    .await
                    .unwrap();
                sent.fetch_add(chunk.len(), std::sync::atomic::Ordering::SeqCst);
            }
            write
        })
    };
    // It stalls: what was taken does not grow any more, and is far from all.
    let mut before = usize::MAX;
    loop {
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        let now = sent.load(std::sync::atomic::Ordering::SeqCst);
        if now == before {
            break;
        }
        before = now;
    }
    assert!(
        before < 24 << 20,
        "{before} bytes were taken though nobody reads"
    );
    release.notify_one();
    let write = soon(writer).await.unwrap();
    let mut read = read;
    let mut got = 0;
    let mut buffer = vec![0; 1 << 16];
    while got < LENGTH {
        let length = soon(tokio::io::AsyncReadExt::read(&mut read, &mut buffer))
            .await
            .unwrap();
        assert!(length > 0);
        got += length;
    }
    drop((read, write));
    let record = web.record().await;
    assert_eq!(
        (record.request_bytes, record.response_bytes),
        (64 << 20, 64 << 20)
    );
}

#[tokio::test]
async fn a_body_that_breaks_its_framing_is_refused_once_and_by_its_reason() {
    let mesh = Mesh::new();
    let (peer, _heads) = teller(&mesh).await;
    let mut web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut client = web.client().await;
    client
        .send("POST /orders HTTP/1.1\r\nhost: orders.shop\r\ntransfer-encoding: chunked\r\n\r\n1\nZ\n0\n\n")
        .await;
    let got = client.reply().await;
    assert_eq!(
        (got.status, got.header("sidegate-error")),
        (400, Some("bad_request"))
    );
    let record = web.record().await;
    assert_eq!(
        (record.error, record.status),
        (Some("bad_request"), Some(400))
    );
    assert_eq!(record.reason.as_deref(), Some("chunk_size"));
    assert_eq!(record.path.as_deref(), Some("/orders"));
    let got = web.client().await.get("orders.shop", "/next").await;
    assert_eq!(got.status, 200);
    let record = web.record().await;
    assert_eq!(
        record.path.as_deref(),
        Some("/next"),
        "nothing was told of twice"
    );
}

#[tokio::test]
async fn a_head_request_refused_here_gets_no_body_over_http2_either() {
    let mesh = Mesh::new();
    let mut web = Web::start(&mesh, "").await;
    let mut client = web.h2().await;
    let request = Request::head("http://nobody.shop/x").body(()).unwrap();
    let (response, _) = client.send_request(request, true).unwrap();
    let response = soon(response).await.unwrap();
    assert_eq!(response.status(), 502);
    let (body, _) = soon(read_all(response.into_body())).await.unwrap();
    assert_eq!(body, "");
    let record = web.record().await;
    assert_eq!(
        (record.response_bytes, record.error),
        (0, Some("destination_unknown"))
    );
}
