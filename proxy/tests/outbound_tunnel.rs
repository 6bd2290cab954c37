//! Upgrades to WebSocket and opaque TCP, through the outbound half, to a peer that speaks the wire.

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

use std::io::ErrorKind;
use std::sync::Arc;

use bytes::Bytes;
use h2::Reason;
use http::{Method, Request, Response};
use sidegate_mesh::Verdict;
use sidegate_mesh::access_log::Protocol;
use support::{Http1, Mesh, Peer, Web, handler, orders, reply, says, send_all, service, soon};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};

const UPGRADE: &str = "GET /orders/7/events?x=1 HTTP/1.1\r\nHost: orders.shop\r\n\
    Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
    Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nOrigin: http://x\r\n\r\n";

/// Accepts a tunnel, then echoes until the end and ends as well.
fn echo() -> support::Handler {
    handler(|request, mut respond| async move {
        let head =
            Response::builder().header("sec-websocket-accept", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        let mut stream = respond
            .send_response(head.body(()).unwrap(), false)
            .unwrap();
        let mut body = request.into_body();
        while let Some(data) = body.data().await {
            let Ok(data) = data else { return };
            body.flow_control().release_capacity(data.len()).unwrap();
            send_all(&mut stream, &data, false).await;
        }
        send_all(&mut stream, b"", true).await;
    })
}

#[tokio::test]
async fn a_websocket_is_an_extended_connect_and_nothing_is_sent_before_its_answer() {
    let mesh = Mesh::new();
    let go = Arc::new(Notify::new());
    let (events, mut told) = mpsc::unbounded_channel();
    let answer = {
        let go = Arc::clone(&go);
        handler(move |request: Request<h2::RecvStream>, mut respond| {
            let (go, events) = (Arc::clone(&go), events.clone());
            async move {
                assert_eq!(request.method(), Method::CONNECT);
                let protocol = request.extensions().get::<h2::ext::Protocol>().unwrap();
                assert_eq!(protocol.as_str(), "websocket");
                assert_eq!(
                    request.uri().to_string(),
                    "http://orders.shop/orders/7/events?x=1"
                );
                let headers = request.headers();
                assert_eq!(headers["sec-websocket-key"], "dGhlIHNhbXBsZSBub25jZQ==");
                assert_eq!(headers["origin"], "http://x");
                assert!(!headers.contains_key("upgrade") && !headers.contains_key("connection"));
                events
                    .send(format!("end {}", request.body().is_end_stream()))
                    .unwrap();
                go.notified().await;
                let head = Response::builder().header("sec-websocket-accept", "accepted");
                let mut stream = respond
                    .send_response(head.body(()).unwrap(), false)
                    .unwrap();
                let mut body = request.into_body();
                let data = body.data().await.unwrap().unwrap();
                send_all(&mut stream, &data, false).await;
                support::read_end(&mut body).await;
                send_all(&mut stream, b"bye", true).await;
            }
        })
    };
    let peer = Peer::start(&mesh, "orders", answer).await;
    let mut web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut client = web.client().await;
    client.send(UPGRADE).await;
    assert_eq!(soon(told.recv()).await.unwrap(), "end false");
    assert!(client.is_quiet());
    go.notify_one();
    let head = client.head().await;
    assert_eq!(head.status, 101);
    assert_eq!(
        (head.header("upgrade"), head.header("connection")),
        (Some("websocket"), Some("upgrade"))
    );
    assert_eq!(head.header("sec-websocket-accept"), Some("accepted"));
    client.send("hello").await;
    assert_eq!(client.take(5).await, b"hello");
    client.stream.shutdown().await.unwrap();
    let (rest, end) = client.rest().await;
    assert_eq!((rest, end.is_ok()), (b"bye".to_vec(), true));
    let record = web.record().await;
    assert_eq!(
        (record.protocol, record.status),
        (Protocol::WebSocket, Some(101))
    );
    assert_eq!(
        (record.method.as_deref(), record.error),
        (Some("GET"), None)
    );
    assert_eq!((record.request_bytes, record.response_bytes), (5, 8));
}

#[tokio::test]
async fn a_refused_upgrade_is_an_answer_and_requests_may_follow() {
    let mesh = Mesh::new();
    let answer = handler(|request: Request<h2::RecvStream>, mut respond| async move {
        if request.method() == Method::CONNECT {
            let head = Response::builder()
                .status(403)
                .header("sidegate-decision", "00c0ffee");
            reply(&mut respond, head.body("no").unwrap());
        } else {
            reply(&mut respond, Response::new("yes"));
        }
    });
    let peer = Peer::start(&mesh, "orders", answer).await;
    let mut web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut client = web.client().await;
    client.send(UPGRADE).await;
    let got = client.reply().await;
    assert_eq!(
        (got.status, got.header("sidegate-decision")),
        (403, Some("00c0ffee"))
    );
    assert_eq!(client.get("orders.shop", "/").await.text(), "yes");
    let record = web.record().await;
    assert_eq!(
        (record.decision, record.status),
        (Some(Verdict::Deny), Some(403))
    );
}

#[tokio::test]
async fn bytes_behind_an_upgrade_that_did_not_wait_go_nowhere() {
    let mesh = Mesh::new();
    let peer = Peer::start(&mesh, "orders", echo()).await;
    let web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut client = web.client().await;
    client.send(&format!("{UPGRADE}early")).await;
    let got = client.head().await;
    assert!(got.status >= 400, "{got:?}");
    let (rest, _) = client.rest().await;
    assert!(!rest.windows(5).any(|part| part == b"early"));
}

#[tokio::test]
async fn a_websocket_from_http2_passes_as_it_came() {
    let mesh = Mesh::new();
    let peer = Peer::start(&mesh, "orders", echo()).await;
    let mut web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut h2 = web.h2().await;
    while !h2.is_extended_connect_protocol_enabled() {
        tokio::task::yield_now().await;
    }
    let mut request = Request::connect("http://orders.shop/events")
        .body(())
        .unwrap();
    request
        .extensions_mut()
        .insert(h2::ext::Protocol::from_static("websocket"));
    let (response, mut stream) = h2.send_request(request, false).unwrap();
    let mut body = soon(response).await.unwrap().into_body();
    send_all(&mut stream, b"hello", false).await;
    assert_eq!(soon(body.data()).await.unwrap().unwrap(), "hello");
    send_all(&mut stream, b"", true).await;
    support::read_end(&mut body).await;
    let record = web.record().await;
    assert_eq!(
        (record.protocol, record.status),
        (Protocol::WebSocket, Some(200))
    );
}

/// `ledger` of namespace `shop`: opaque bytes.
fn ledger(peer: &Peer) -> String {
    service(
        "ledger",
        "[{ name: db, port: 6379, protocol: tcp }]",
        &[peer],
    )
}

#[tokio::test]
async fn a_server_may_speak_first_and_each_half_closes_alone() {
    let mesh = Mesh::new();
    let answer = handler(|request: Request<h2::RecvStream>, mut respond| async move {
        assert_eq!(request.method(), Method::CONNECT);
        let protocol = request.extensions().get::<h2::ext::Protocol>().unwrap();
        assert_eq!(protocol.as_str(), "sidegate-tcp");
        assert_eq!(request.headers()["sidegate-port"], "6379");
        let mut stream = respond.send_response(Response::new(()), false).unwrap();
        send_all(&mut stream, b"welcome", false).await;
        let (bytes, _) = support::read_all(request.into_body()).await.unwrap();
        assert_eq!(bytes, "question");
        send_all(&mut stream, b"answer", true).await;
    });
    let peer = Peer::start(&mesh, "ledger", answer).await;
    let mut web = Web::start(&mesh, &ledger(&peer)).await;
    let address = web.bind("ledger.shop:6379").await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut greeting = [0; 7];
    soon(stream.read_exact(&mut greeting)).await.unwrap();
    assert_eq!(&greeting, b"welcome");
    stream.write_all(b"question").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut rest = Vec::new();
    soon(stream.read_to_end(&mut rest)).await.unwrap();
    assert_eq!(rest, b"answer");
    let record = web.record().await;
    assert_eq!(record.protocol, Protocol::Tcp);
    assert_eq!(
        record.destination_service.as_deref(),
        Some("ledger.shop:6379")
    );
    assert_eq!((record.request_bytes, record.response_bytes), (8, 13));
    assert_eq!((record.error, record.path), (None, None));
}

#[tokio::test]
async fn the_called_side_may_close_its_half_first() {
    let mesh = Mesh::new();
    let (got, mut received) = mpsc::unbounded_channel();
    let answer = handler(move |request: Request<h2::RecvStream>, mut respond| {
        let got = got.clone();
        async move {
            let mut stream = respond.send_response(Response::new(()), false).unwrap();
            send_all(&mut stream, b"all there is", true).await;
            let (bytes, _) = support::read_all(request.into_body()).await.unwrap();
            got.send(bytes).unwrap();
        }
    });
    let peer = Peer::start(&mesh, "ledger", answer).await;
    let web = Web::start(&mesh, &ledger(&peer)).await;
    let address = web.bind("ledger.shop:6379").await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut rest = Vec::new();
    soon(stream.read_to_end(&mut rest)).await.unwrap();
    assert_eq!(rest, b"all there is");
    stream.write_all(b"still listening?").await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(soon(received.recv()).await.unwrap(), "still listening?");
}

#[tokio::test]
async fn a_reset_by_the_application_is_a_reset_at_the_peer() {
    let mesh = Mesh::new();
    let (ends, mut told) = mpsc::unbounded_channel();
    let answer = handler(move |request: Request<h2::RecvStream>, mut respond| {
        let ends = ends.clone();
        async move {
            let mut stream = respond.send_response(Response::new(()), false).unwrap();
            send_all(&mut stream, b"x", false).await;
            let end = support::read_all(request.into_body()).await;
            ends.send(end.map(drop).map_err(|error| error.reason()))
                .unwrap();
        }
    });
    let peer = Peer::start(&mesh, "ledger", answer).await;
    let mut web = Web::start(&mesh, &ledger(&peer)).await;
    let address = web.bind("ledger.shop:6379").await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    soon(stream.read_u8()).await.unwrap();
    stream.set_zero_linger().unwrap();
    drop(stream);
    assert_eq!(soon(told.recv()).await.unwrap(), Err(Some(Reason::CANCEL)));
    assert_eq!(web.record().await.error, Some("peer_reset"));
}

#[tokio::test]
async fn a_reset_by_the_peer_is_a_reset_at_the_application() {
    let mesh = Mesh::new();
    let answer = handler(|_request, mut respond| async move {
        let mut stream = respond.send_response(Response::new(()), false).unwrap();
        send_all(&mut stream, b"x", false).await;
        let () = std::future::poll_fn(|cx| stream.poll_reset(cx).map(drop)).await;
    });
    let peer = Peer::start(&mesh, "ledger", answer).await;
    let mut web = Web::start(&mesh, &ledger(&peer)).await;
    let address = web.bind("ledger.shop:6379").await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    soon(stream.read_u8()).await.unwrap();
    peer.kill().await;
    let end = soon(stream.read_u8()).await.unwrap_err();
    assert_eq!(end.kind(), ErrorKind::ConnectionReset, "not a clean end");
    assert_eq!(web.record().await.error, Some("upstream_reset"));
}

#[tokio::test]
async fn a_tunnel_that_is_refused_is_a_reset_and_nothing_was_sent() {
    let mesh = Mesh::new();
    let (bytes, mut read) = mpsc::unbounded_channel();
    let answer = handler(move |request: Request<h2::RecvStream>, mut respond| {
        let bytes = bytes.clone();
        async move {
            let head = Response::builder()
                .status(403)
                .header("sidegate-decision", "00c0ffee");
            reply(&mut respond, head.body("").unwrap());
            let mut body = request.into_body();
            bytes
                .send(matches!(body.data().await, Some(Ok(_))))
                .unwrap();
        }
    });
    let peer = Peer::start(&mesh, "ledger", answer).await;
    let mut web = Web::start(&mesh, &ledger(&peer)).await;
    let address = web.bind("ledger.shop:6379").await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"secret").await.unwrap();
    let end = soon(stream.read_u8()).await.unwrap_err();
    assert_eq!(end.kind(), ErrorKind::ConnectionReset);
    assert!(
        !soon(read.recv()).await.unwrap(),
        "no byte left before the answer"
    );
    let record = web.record().await;
    assert_eq!(
        (record.error, record.decision),
        (Some("denied"), Some(Verdict::Deny))
    );
    assert_eq!(record.decision_id.as_deref(), Some("00c0ffee"));
}

#[tokio::test]
async fn a_port_bound_to_an_http_service_speaks_http_whatever_the_host() {
    let mesh = Mesh::new();
    let answer = handler(|request: Request<h2::RecvStream>, mut respond| async move {
        assert_eq!(request.uri().authority().unwrap(), "orders.shop");
        reply(&mut respond, Response::new("ok"));
    });
    let peer = Peer::start(&mesh, "orders", answer).await;
    let mut web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let address = web.bind("orders.shop:80").await;
    let mut client = Http1::connect(address).await;
    assert_eq!(client.get(&address.to_string(), "/").await.text(), "ok");
    assert_eq!(web.record().await.authority.as_deref(), Some("orders.shop"));
}

#[tokio::test]
async fn a_port_of_unknown_protocol_carries_bytes_that_are_not_http() {
    let mesh = Mesh::new();
    let peer = Peer::start(&mesh, "orders", echo()).await;
    let mut web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let address = web.bind("orders.shop:80").await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"\0\x01binary").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut rest = Vec::new();
    soon(stream.read_to_end(&mut rest)).await.unwrap();
    assert_eq!(rest, b"\0\x01binary");
    assert_eq!(web.record().await.protocol, Protocol::Tcp);
}

#[tokio::test]
async fn http_is_not_sent_to_an_opaque_service() {
    let mesh = Mesh::new();
    let peer = Peer::start(&mesh, "ledger", says("no")).await;
    let web = Web::start(&mesh, &ledger(&peer)).await;
    let got = web.client().await.get("ledger.shop:6379", "/").await;
    assert_eq!(
        (got.status, got.header("sidegate-error")),
        (403, Some("not_carried"))
    );
    assert_eq!(peer.streams(), 0);
}

#[tokio::test]
async fn a_large_transfer_arrives_whole() {
    let mesh = Mesh::new();
    let peer = Peer::start(&mesh, "ledger", echo()).await;
    let web = Web::start(&mesh, &ledger(&peer)).await;
    let address = web.bind("ledger.shop:6379").await;
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut read, mut write) = stream.into_split();
    let data: Bytes = (0..8 << 20)
        .map(|i: u32| i.to_le_bytes()[0] ^ i.to_le_bytes()[1])
        .collect();
    let sent = data.clone();
    let writer = tokio::spawn(async move {
        write.write_all(&sent).await.unwrap();
        write.shutdown().await.unwrap();
    });
    let mut got = Vec::new();
    soon(read.read_to_end(&mut got)).await.unwrap();
    assert!(got == data, "{} of {} bytes", got.len(), data.len());
    writer.await.unwrap();
}
