//! WebSocket and opaque TCP: half-close, aborts, and who speaks first.

use std::net::SocketAddr;

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use http::StatusCode;
use sidegate_mesh::Verdict;
use sidegate_mesh::access_log::{Protocol, Record};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::app;
use crate::peers::{Peer, connect, get, next, websocket};
use crate::support::{OPAQUE, Port, READERS, Setup, Sidecar, soon, until};

const SWITCH: &str = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n\
upgrade: websocket\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

pub fn opaque_setup(address: SocketAddr) -> Setup {
    Setup {
        ports: vec![Port {
            name: "tcp",
            port: 6379,
            address,
        }],
        ..Setup::http(address, OPAQUE)
    }
}

pub fn is_tcp(record: &Record) -> bool {
    record.protocol == Protocol::Tcp
}

/// Opens a tunnel and expects its 200.
pub async fn open(
    peer: &Peer,
    request: http::Request<()>,
) -> (SendStream<Bytes>, RecvStream, http::HeaderMap) {
    let (response, stream) = peer.begin(request, false).await.unwrap();
    let (head, recv) = soon(response).await.unwrap().into_parts();
    assert_eq!(head.status, StatusCode::OK);
    (stream, recv, head.headers)
}

#[tokio::test]
async fn a_websocket_is_opened_as_an_upgrade_and_carries_bytes_both_ways() {
    let application = app::raw(|mut stream| async move {
        let head = app::answer(&mut stream, SWITCH).await;
        assert!(
            head.starts_with("GET /orders/7/events HTTP/1.1\r\n"),
            "{head}"
        );
        for line in [
            "connection: upgrade\r\n",
            "upgrade: websocket\r\n",
            "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
            "sec-websocket-version: 13\r\n",
            "host: orders.shop\r\n",
            "sidegate-client-id: spiffe://mesh.local/ns/shop/sa/web\r\n",
        ] {
            assert!(head.contains(line), "{line} in {head}");
        }
        stream.write_all(b"first").await.unwrap();
        let mut asked = [0; 4];
        stream.read_exact(&mut asked).await.unwrap();
        stream.write_all(&asked).await.unwrap();
        assert_eq!(app::end_of(&mut stream).await, "fin");
        stream.write_all(b"last").await.unwrap();
    })
    .await;
    let sidecar = Sidecar::start(Setup::http(application, READERS)).await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    let (mut stream, mut recv, headers) = open(&peer, websocket("/orders/7/events")).await;
    assert_eq!(
        headers["sec-websocket-accept"],
        "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    );
    assert!(!headers.contains_key("upgrade") && !headers.contains_key("connection"));
    assert_eq!(next(&mut recv).await.unwrap().unwrap(), "first");
    stream
        .send_data(Bytes::from_static(b"ping"), false)
        .unwrap();
    assert_eq!(next(&mut recv).await.unwrap().unwrap(), "ping");
    stream.send_data(Bytes::new(), true).unwrap();
    assert_eq!(
        next(&mut recv).await.unwrap().unwrap(),
        "last",
        "half-closed, not closed"
    );
    assert_eq!(next(&mut recv).await.unwrap(), None);
    let record = sidecar.record_of("/orders/7/events").await;
    assert_eq!(
        (record.protocol, record.status),
        (Protocol::WebSocket, Some(101))
    );
    assert_eq!(record.decision, Some(Verdict::Allow));
    assert_eq!((record.request_bytes, record.response_bytes), (4, 13));
    assert!(record.error.is_none(), "{record:?}");
}

#[tokio::test]
async fn an_application_that_declines_an_upgrade_is_heard() {
    let (application, _) = app::http().await;
    let sidecar = Sidecar::start(Setup::http(application, READERS)).await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    let request = websocket("/orders/7/events");
    let (response, _stream) = peer.begin(request, false).await.unwrap();
    let answer = crate::peers::whole(response).await.unwrap();
    assert_eq!(
        (answer.status, answer.header("x-app")),
        (StatusCode::OK, "1")
    );
    assert!(answer.text().contains("upgrade: websocket"));
}

#[tokio::test]
async fn nothing_behind_an_upgrade_is_forwarded_before_its_answer() {
    let seen = app::Seen::default();
    let noted = seen.clone();
    let application = app::raw(move |mut stream| {
        let seen = noted.clone();
        async move {
            app::read_until(&mut stream, "\r\n\r\n").await;
            seen.note("asked");
            let early =
                tokio::time::timeout(std::time::Duration::from_millis(200), stream.read_u8());
            seen.note(early.await.is_ok());
            stream.write_all(SWITCH.as_bytes()).await.unwrap();
            seen.note(stream.read_u8().await.unwrap());
        }
    })
    .await;
    let sidecar = Sidecar::start(Setup::http(application, READERS)).await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    let request = websocket("/orders/7/events");
    let (_response, mut stream) = peer.begin(request, false).await.unwrap();
    stream.send_data(Bytes::from_static(&[42]), false).unwrap();
    until(|| seen.all().len() == 3).await;
    assert_eq!(seen.all(), ["asked", "false", "42"]);
}

#[tokio::test]
async fn a_101_that_nobody_asked_for_is_an_error() {
    let application = app::raw(|mut stream| async move {
        app::answer(&mut stream, SWITCH).await;
        app::end_of(&mut stream).await;
    })
    .await;
    let sidecar = Sidecar::start(Setup::http(application, READERS)).await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    let answer = peer.call(get("/orders/7")).await.unwrap();
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY);
    assert_eq!(answer.header("sidegate-error"), "upstream_protocol");
}

#[tokio::test]
async fn a_server_that_speaks_first_is_heard_and_half_close_is_kept() {
    let application = app::raw(|mut stream| async move {
        stream.write_all(b"hello").await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        stream
            .write_all(text.to_uppercase().as_bytes())
            .await
            .unwrap();
    })
    .await;
    let sidecar = Sidecar::start(opaque_setup(application)).await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    // The authority chooses nothing.
    let request = connect("sidegate-tcp", "/");
    let (mut stream, mut recv, _) = open(&peer, request).await;
    assert_eq!(next(&mut recv).await.unwrap().unwrap(), "hello");
    stream.send_data(Bytes::from_static(b"bye"), true).unwrap();
    assert_eq!(next(&mut recv).await.unwrap().unwrap(), "BYE");
    assert_eq!(next(&mut recv).await.unwrap(), None);
    let record = sidecar.record(is_tcp).await;
    assert_eq!((record.request_bytes, record.response_bytes), (3, 8));
    assert_eq!(
        (record.decision, record.status),
        (Some(Verdict::Allow), None)
    );
    assert!(
        record.error.is_none() && record.path.is_none(),
        "{record:?}"
    );
}

#[tokio::test]
async fn a_caller_without_permission_opens_no_tunnel() {
    let seen = app::Seen::default();
    let noted = seen.clone();
    let application = app::raw(move |_| {
        noted.note("connection");
        async {}
    })
    .await;
    let sidecar = Sidecar::start(opaque_setup(application)).await;
    let peer = Peer::connect(&sidecar, "jobs/batch").await;
    let answer = peer.call(connect("sidegate-tcp", "/")).await.unwrap();
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    assert_eq!(sidecar.record(is_tcp).await.decision, Some(Verdict::Deny));
    assert!(seen.all().is_empty());
}

#[tokio::test]
async fn an_abort_of_the_application_is_a_reset_and_never_a_clean_end() {
    let application = app::raw(|mut stream| async move {
        stream.write_all(b"hello").await.unwrap();
        stream.read_u8().await.unwrap();
        socket2::SockRef::from(&stream)
            .set_linger(Some(std::time::Duration::ZERO))
            .unwrap();
    })
    .await;
    let sidecar = Sidecar::start(opaque_setup(application)).await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    let (mut stream, mut recv, _) = open(&peer, connect("sidegate-tcp", "/")).await;
    assert_eq!(next(&mut recv).await.unwrap().unwrap(), "hello");
    stream.send_data(Bytes::from_static(b"x"), false).unwrap();
    let error = next(&mut recv).await.unwrap_err();
    assert_eq!(error.reason(), Some(Reason::CANCEL));
    assert_eq!(sidecar.record(is_tcp).await.error, Some("upstream_reset"));
}

/// An application that notes how its connection ends after one byte.
async fn noting(seen: &app::Seen) -> SocketAddr {
    let noted = seen.clone();
    app::raw(move |mut stream: TcpStream| {
        let seen = noted.clone();
        async move {
            stream.read_u8().await.unwrap();
            seen.note("open");
            seen.note(app::end_of(&mut stream).await);
        }
    })
    .await
}

#[tokio::test]
async fn an_abort_of_the_caller_is_a_reset_and_a_fin_is_a_fin() {
    for (end, expected) in [(None, "connection reset"), (Some(()), "fin")] {
        let seen = app::Seen::default();
        let sidecar = Sidecar::start(opaque_setup(noting(&seen).await)).await;
        let peer = Peer::connect(&sidecar, "shop/web").await;
        let (mut stream, _recv, _) = open(&peer, connect("sidegate-tcp", "/")).await;
        stream.send_data(Bytes::from_static(b"x"), false).unwrap();
        until(|| seen.has("open")).await;
        match end {
            None => stream.send_reset(Reason::CANCEL),
            Some(()) => stream.send_data(Bytes::new(), true).unwrap(),
        }
        until(|| seen.all().len() == 2).await;
        assert_eq!(seen.all()[1], expected);
        let error = end.is_none().then_some("peer_reset");
        assert_eq!(sidecar.record(is_tcp).await.error, error);
    }
}

#[tokio::test]
async fn a_callers_lost_connection_is_an_abort() {
    let seen = app::Seen::default();
    let sidecar = Sidecar::start(opaque_setup(noting(&seen).await)).await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    let (mut stream, _recv, _) = open(&peer, connect("sidegate-tcp", "/")).await;
    stream.send_data(Bytes::from_static(b"x"), false).unwrap();
    until(|| seen.has("open")).await;
    peer.driver.abort();
    until(|| seen.all().len() == 2).await;
    assert_eq!(seen.all()[1], "connection reset");
    until(|| sidecar.connections() == 0).await;
}

#[tokio::test]
async fn a_slow_reader_slows_its_writer() {
    let seen = app::Seen::default();
    let noted = seen.clone();
    let application = app::raw(move |mut stream| {
        let seen = noted.clone();
        async move {
            let chunk = vec![0; 64 * 1024];
            for _ in 0..1024 {
                if stream.write_all(&chunk).await.is_err() {
                    return;
                }
            }
            seen.note("all written");
            app::end_of(&mut stream).await;
        }
    })
    .await;
    let sidecar = Sidecar::start(opaque_setup(application)).await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    let (mut stream, mut recv, _) = open(&peer, connect("sidegate-tcp", "/")).await;
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert!(!seen.has("all written"), "64 MiB were buffered");
    let mut received = 0;
    while received < 64 * 1024 * 1024 {
        received += next(&mut recv).await.unwrap().expect("more").len();
    }
    stream.send_data(Bytes::new(), true).unwrap();
    until(|| seen.has("all written")).await;
}

#[tokio::test]
async fn an_opaque_target_that_nobody_runs_is_a_refused_stream() {
    let sidecar = Sidecar::start(opaque_setup(app::nobody().await)).await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    let error = peer.call(connect("sidegate-tcp", "/")).await.unwrap_err();
    assert_eq!(error.reason(), Some(Reason::REFUSED_STREAM));
    assert_eq!(sidecar.record(is_tcp).await.error, Some("upstream_connect"));
}

#[tokio::test]
async fn a_tunnel_that_names_two_ports_goes_to_neither() {
    let application = app::raw(|_| async { panic!("nothing reaches the application") }).await;
    let sidecar = Sidecar::start(opaque_setup(application)).await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    let mut request = connect("sidegate-tcp", "/");
    request.headers_mut().append("sidegate-port", 6379.into());
    request.headers_mut().append("sidegate-port", 80.into());
    let (response, _stream) = peer.begin(request, false).await.unwrap();
    assert_eq!(
        soon(response).await.unwrap().status(),
        StatusCode::BAD_REQUEST
    );
    let record = sidecar.record(is_tcp).await;
    assert_eq!(record.reason.as_deref(), Some("header_repeated"));
}
