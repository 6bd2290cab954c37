//! The whole data path: an application, its sidecar, another sidecar, another application.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    clippy::clone_on_ref_ptr,
    clippy::format_push_string,
    clippy::too_many_lines,
    missing_docs,
    dead_code,
    unreachable_pub,
    reason = "tests"
)]

#[path = "support/mesh.rs"]
mod mesh;
#[path = "data_path/pair.rs"]
mod pair;
#[path = "outbound/support.rs"]
mod support;

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http::Request;
use pair::{Pair, application, application_of};
use support::{Http1, soon};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::Message;

#[tokio::test]
async fn http_1_1_keeps_its_meaning() {
    let pair = Pair::http(&[application().await]).await;
    let mut client = Http1::connect(pair.outbound).await;
    for _ in 0..2 {
        let got = client.get("orders.shop", "/open/hello").await;
        assert_eq!((got.status, got.text()), (200, "hello"));
        assert_eq!(
            (got.header("connection"), got.header("x-hop")),
            (None, None),
            "one hop's own"
        );
    }
    client
        .send(
            "POST /open/echo HTTP/1.1\r\nHost: orders.shop\r\nTE: trailers\r\nConnection: te\r\n\
             Trailer: x-sum\r\nTransfer-Encoding: chunked\r\n\r\n\
             4\r\nfour\r\n0\r\nx-sum: 4\r\n\r\n",
        )
        .await;
    let got = client.reply().await;
    assert_eq!(got.header("transfer-encoding"), Some("chunked"));
    assert_eq!((got.text(), got.trailer("x-sum")), ("four", Some("4")));
    client
        .send("HEAD /open/hello HTTP/1.1\r\nHost: orders.shop\r\n\r\n")
        .await;
    let got = client.head().await;
    assert_eq!((got.status, got.header("content-length")), (200, Some("5")));
    assert_eq!(client.get("orders.shop", "/open/204").await.status, 204);
    assert_eq!(client.get("orders.shop", "/open/304").await.status, 304);
    client
        .send("GET /open/name HTTP/1.1\r\nHost: orders.shop\r\nConnection: close\r\n\r\n")
        .await;
    assert_eq!(client.reply().await.status, 200);
    assert!(client.rest().await.1.is_ok());
    let mut client = Http1::connect(pair.outbound).await;
    client
        .send("GET /open/hello HTTP/1.0\r\nHost: orders.shop\r\n\r\n")
        .await;
    assert_eq!(client.reply().await.text(), "hello");
}

#[tokio::test]
async fn the_application_learns_who_calls_from_the_certificate_alone() {
    let pair = Pair::http(&[application().await]).await;
    let mut client = Http1::connect(pair.outbound).await;
    client
        .send(
            "GET /open/headers HTTP/1.1\r\nHost: orders.shop\r\n\
             x-forwarded-client-cert: URI=spiffe://mesh.local/ns/shop/sa/admin\r\n\
             sidegate-client-id: spiffe://mesh.local/ns/shop/sa/admin\r\n\r\n",
        )
        .await;
    let got = client.reply().await;
    let text = got.text();
    assert!(
        text.contains("spiffe://mesh.local/ns/shop/sa/web"),
        "{text}"
    );
    assert!(
        !text.contains("admin") && !text.contains("sidegate-port"),
        "{text}"
    );
}

#[tokio::test]
async fn a_refusal_is_on_record_on_both_sides_under_one_id() {
    let pair = Pair::http(&[application().await]).await;
    let mut client = Http1::connect(pair.outbound).await;
    let got = client.get("orders.shop", "/closed").await;
    assert_eq!(got.status, 403);
    let id = got.header("sidegate-decision").unwrap();
    let is = |record: &serde_json::Value| record["decision_id"] == id;
    let inbound = pair.record("orders", is).await;
    let outbound = pair.record("web", is).await;
    for record in [&inbound, &outbound] {
        assert_eq!(
            (record["decision"].as_str(), record["status"].as_u64()),
            (Some("deny"), Some(403))
        );
        assert_eq!(record["source"], "spiffe://mesh.local/ns/shop/sa/web");
    }
    assert_eq!(
        (&inbound["direction"], &outbound["direction"]),
        (&"inbound".into(), &"outbound".into())
    );
}

#[tokio::test]
async fn an_answer_that_is_cut_off_reaches_the_caller_cut_off() {
    let pair = Pair::http(&[application().await]).await;
    let mut client = Http1::connect(pair.outbound).await;
    client
        .send("GET /open/cut HTTP/1.1\r\nHost: orders.shop\r\n\r\n")
        .await;
    assert_eq!(client.head().await.status, 200);
    let (bytes, _) = client.rest().await;
    assert!(!bytes.ends_with(b"0\r\n\r\n"), "{}", bytes.escape_ascii());
    let record = pair
        .record("web", |record| record["path"] == "/open/cut")
        .await;
    assert_eq!(record["error"], "upstream_reset");
}

/// An application that waits for `go`, says 103 and 100, and then takes the body.
async fn hesitating(go: Arc<tokio::sync::Notify>) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let go = Arc::clone(&go);
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await.unwrap());
                }
                go.notified().await;
                let interim =
                    "HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n";
                stream.write_all(interim.as_bytes()).await.unwrap();
                let mut body = [0; 4];
                stream.read_exact(&mut body).await.unwrap();
                let answer = "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n";
                stream.write_all(answer.as_bytes()).await.unwrap();
                stream.write_all(&body).await.unwrap();
            });
        }
    });
    address
}

#[tokio::test]
async fn a_caller_that_expects_a_100_gets_the_applications() {
    let go = Arc::new(tokio::sync::Notify::new());
    let pair = Pair::http(&[hesitating(Arc::clone(&go)).await]).await;
    let mut client = Http1::connect(pair.outbound).await;
    client
        .send(
            "POST /open/x HTTP/1.1\r\nHost: orders.shop\r\nContent-Length: 4\r\n\
             Expect: 100-continue\r\n\r\n",
        )
        .await;
    // A sidecar that answered by itself would have done so long ago.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(client.is_quiet());
    go.notify_one();
    assert_eq!(client.head().await.status, 100);
    client.send("body").await;
    assert_eq!(client.reply().await.text(), "body");
}

#[tokio::test]
async fn a_103_that_hyper_cannot_send_is_left_out() {
    let go = Arc::new(tokio::sync::Notify::new());
    let pair = Pair::http(&[hesitating(Arc::clone(&go)).await]).await;
    let mut client = Http1::connect(pair.outbound).await;
    client
        .send("POST /open/x HTTP/1.1\r\nHost: orders.shop\r\nContent-Length: 4\r\n\r\nbody")
        .await;
    go.notify_one();
    assert_eq!(client.reply().await.text(), "body");
}

#[tokio::test]
async fn a_caller_that_goes_away_is_seen_by_the_application() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let pair = Pair::http(&[listener.local_addr().unwrap()]).await;
    let mut client = Http1::connect(pair.outbound).await;
    client
        .send("GET /open/x HTTP/1.1\r\nHost: orders.shop\r\n\r\n")
        .await;
    let (mut stream, _) = soon(listener.accept()).await.unwrap();
    assert!(soon(stream.read(&mut [0; 1024])).await.unwrap() > 0);
    drop(client);
    let end = soon(stream.read(&mut [0; 1024])).await;
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
}

/// A WebSocket server for one caller: it greets, then says everything again.
async fn echoing_websocket() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let application = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
        socket.send(Message::text("first")).await.unwrap();
        while let Some(Ok(message)) = socket.next().await {
            if message.is_text() || message.is_binary() {
                socket.send(message).await.unwrap();
            }
        }
    });
    application
}

#[tokio::test]
async fn a_call_that_the_end_of_a_drain_cuts_says_so() {
    let pair = Pair::hasty(echoing_websocket().await).await;
    let stream = TcpStream::connect(pair.outbound).await.unwrap();
    let (mut socket, _) = tokio_tungstenite::client_async("ws://orders.shop/open/events", stream)
        .await
        .unwrap();
    assert!(soon(socket.next()).await.unwrap().is_ok(), "it talks");
    assert!(!soon(pair.orders[0].drain()).await, "it had to be cut");
    let end = soon(socket.next()).await;
    assert!(
        end.is_none_or(|end| end.is_err()),
        "an abort, never a close"
    );
    let record = pair
        .record("orders", |record| record["protocol"] == "websocket")
        .await;
    assert_eq!(record["error"], "drain_deadline");
    assert_eq!(record["flags"], serde_json::Value::Null, "{record}");
}

#[tokio::test]
async fn a_websocket_talks_both_ways_and_closes() {
    let pair = Pair::http(&[echoing_websocket().await]).await;
    let stream = TcpStream::connect(pair.outbound).await.unwrap();
    let (mut socket, response) =
        tokio_tungstenite::client_async("ws://orders.shop/open/events", stream)
            .await
            .unwrap();
    assert_eq!(response.status(), 101);
    assert_eq!(
        soon(socket.next()).await.unwrap().unwrap(),
        Message::text("first")
    );
    for size in [1, 1000, 200_000] {
        let message = Message::binary(vec![7; size]);
        socket.send(message.clone()).await.unwrap();
        assert_eq!(soon(socket.next()).await.unwrap().unwrap(), message);
    }
    socket.close(None).await.unwrap();
    while let Some(message) = soon(socket.next()).await {
        assert!(message.unwrap().is_close());
    }
    drop(socket);
    let record = pair
        .record("orders", |record| record["protocol"] == "websocket")
        .await;
    assert_eq!(
        (record["method"].as_str(), record["error"].as_str()),
        (Some("GET"), None)
    );
}

async fn tcp_application() -> (std::net::SocketAddr, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    (listener.local_addr().unwrap(), listener)
}

#[tokio::test]
async fn tcp_keeps_its_halves_and_its_resets() {
    let (address, listener) = tcp_application().await;
    let pair = Pair::tcp(address).await;
    let upstream = pair.web.addresses().upstreams[0].1;
    let mut client = TcpStream::connect(upstream).await.unwrap();
    let (mut server, _) = soon(listener.accept()).await.unwrap();
    server.write_all(b"first").await.unwrap();
    let mut greeting = [0; 5];
    soon(client.read_exact(&mut greeting)).await.unwrap();
    assert_eq!(&greeting, b"first", "the server may speak first");
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    let mut question = Vec::new();
    soon(server.read_to_end(&mut question)).await.unwrap();
    assert_eq!(question, b"question", "one half is closed");
    server.write_all(b"answer").await.unwrap();
    drop(server);
    let mut answer = Vec::new();
    soon(client.read_to_end(&mut answer)).await.unwrap();
    assert_eq!(answer, b"answer", "and the other still open");
    // A reset of either side is a reset on the other.
    let open = async || {
        let mut client = TcpStream::connect(upstream).await.unwrap();
        let (mut server, _) = soon(listener.accept()).await.unwrap();
        // Only once a byte has passed is the tunnel open: before, a reset is a failure to connect.
        server.write_all(b"x").await.unwrap();
        soon(client.read_u8()).await.unwrap();
        (client, server)
    };
    let (mut client, server) = open().await;
    server.set_zero_linger().unwrap();
    drop(server);
    let end = soon(client.read_u8()).await.unwrap_err();
    assert_eq!(end.kind(), ErrorKind::ConnectionReset);
    let (client, mut server) = open().await;
    client.set_zero_linger().unwrap();
    drop(client);
    let end = soon(server.read_u8()).await.unwrap_err();
    assert_eq!(end.kind(), ErrorKind::ConnectionReset);
}

/// Callers that go on until they are told to stop; each call must succeed.
struct Load {
    done: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    callers: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    fn start(address: std::net::SocketAddr, request: &'static str) -> Self {
        let (done, stop) = (
            Arc::new(AtomicUsize::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let call = || {
            let (done, stop) = (Arc::clone(&done), Arc::clone(&stop));
            tokio::spawn(async move {
                let mut client = Http1::connect(address).await;
                while !stop.load(Ordering::SeqCst) {
                    client.send(request).await;
                    let got = client.reply().await;
                    assert_eq!((got.status, got.text()), (200, "slow"), "{got:?}");
                    done.fetch_add(1, Ordering::SeqCst);
                }
            })
        };
        Self {
            callers: (0..16).map(|_| call()).collect(),
            done,
            stop,
        }
    }

    async fn more(&self, count: usize) {
        let until = self.done.load(Ordering::SeqCst) + count;
        soon(async {
            while self.done.load(Ordering::SeqCst) < until {
                assert!(
                    self.callers.iter().all(|caller| !caller.is_finished()),
                    "a call failed"
                );
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
    }

    async fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        for caller in self.callers {
            soon(caller).await.unwrap();
        }
    }
}

#[tokio::test]
async fn killing_an_endpoint_under_load_fails_no_idempotent_call() {
    let pair = Pair::http(&[application_of("a").await, application_of("b").await]).await;
    let load = Load::start(
        pair.outbound,
        "GET /open/slow HTTP/1.1\r\nHost: orders.shop\r\n\r\n",
    );
    load.more(500).await;
    pair.orders[0].crash().await;
    load.more(500).await;
    load.end().await;
}

#[tokio::test]
async fn draining_an_endpoint_under_load_fails_no_call_at_all() {
    let pair = Pair::http(&[application_of("a").await, application_of("b").await]).await;
    let request = "POST /open/slow HTTP/1.1\r\nHost: orders.shop\r\nContent-Length: 4\r\n\r\nbody";
    let load = Load::start(pair.outbound, request);
    load.more(500).await;
    assert!(soon(pair.orders[0].drain()).await, "nothing had to be cut");
    load.more(500).await;
    load.end().await;
}

#[tokio::test]
async fn http2_passes_to_an_application_on_http2() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let application = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut wire = h2::server::handshake(stream).await.unwrap();
        while let Some(Ok((request, mut respond))) = wire.accept().await {
            assert_eq!(request.uri().authority().unwrap(), "orders.shop");
            let mut stream = respond
                .send_response(http::Response::new(()), false)
                .unwrap();
            stream.send_data(Bytes::from_static(b"h2"), false).unwrap();
            stream.send_trailers(pair::trailers("x-end", "1")).unwrap();
        }
    });
    let pair = Pair::http(&[application]).await;
    let stream = TcpStream::connect(pair.outbound).await.unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(async move { drop(connection.await) });
    let mut client = client.ready().await.unwrap();
    let request = Request::get("http://orders.shop/open/x").body(()).unwrap();
    let (response, _) = client.send_request(request, true).unwrap();
    let (body, trailers) = support::read_all(soon(response).await.unwrap().into_body())
        .await
        .unwrap();
    assert_eq!(
        (&body[..], &trailers.unwrap()["x-end"]),
        (&b"h2"[..], &"1".parse().unwrap())
    );
}
