//! What an application calls: the mesh, what is outside, and what nobody knows.

use std::time::{Duration, Instant};

use http::Request;
use sidegate_mesh::Verdict;
use sidegate_mesh::access_log::{Direction, Protocol};
use sidegate_mesh::routes::PortProtocol;
use sidegate_proxy::destinations::Destination;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::pod::{Cluster, SERVICE, exchange, get, h2, meshed, rest, route, soon};
use crate::{BYTES, WEB, app};

fn service() -> std::net::SocketAddr {
    SERVICE.parse().unwrap()
}

#[tokio::test]
async fn a_request_goes_where_its_connection_was_made_to_whatever_host_it_names() {
    let cluster = Cluster::new();
    let (web, orders) = cluster.web_and_orders(WEB).await;
    app::http(orders.at(8080), "orders").await;
    let endpoint = orders.endpoint(8080).await;
    web.know(SERVICE, meshed(std::slice::from_ref(&endpoint)))
        .await;
    let mut stream = web.connect(service()).await;
    let reply = get(&mut stream, "/orders/7").await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert!(reply.body.starts_with("orders GET /orders/7"), "{reply:?}");
    assert!(
        reply.body.contains("host: anything.example:81"),
        "{reply:?}"
    );
    let caller = format!("sidegate-client-id: {}", web.id());
    assert!(reply.body.contains(&caller), "{reply:?}");
    let record = web.record(|record| record.path.is_some()).await;
    assert_eq!(
        record.destination_service.as_deref(),
        Some("orders.shop:80")
    );
    assert_eq!(record.destination.as_deref(), Some(orders.id().as_str()));
    let served = endpoint.address.into();
    assert_eq!(record.destination_address, Some(served));
    let record = orders.record(|record| record.path.is_some()).await;
    assert_eq!(record.source.as_deref(), Some(web.id().as_str()));
    assert_eq!(record.authority.as_deref(), Some("anything.example:81"));
    assert_eq!(record.destination_address, Some(orders.at(8080).into()));
    assert_eq!(record.decision, Some(Verdict::Allow));
}

#[tokio::test]
async fn http_1_0_without_a_host_is_carried() {
    let cluster = Cluster::new();
    let (web, orders) = cluster.web_and_orders(WEB).await;
    app::http(orders.at(8080), "orders").await;
    web.know(SERVICE, meshed(&[orders.endpoint(8080).await]))
        .await;
    let mut stream = web.connect(service()).await;
    let reply = exchange(&mut stream, "GET /old HTTP/1.0\r\n\r\n").await;
    assert_eq!(reply.status, 200, "{reply:?}");
}

#[tokio::test]
async fn each_request_of_a_connection_sees_the_endpoints_of_its_moment() {
    let cluster = Cluster::new();
    let web = cluster.pod("web", "").await;
    let (one, two) = (
        cluster.pod("orders", WEB).await,
        cluster.pod("orders", WEB).await,
    );
    app::http(one.at(8080), "one").await;
    app::http(two.at(8080), "two").await;
    web.know(SERVICE, meshed(&[one.endpoint(8080).await])).await;
    let mut stream = web.connect(service()).await;
    assert!(get(&mut stream, "/").await.body.starts_with("one "));
    web.know(SERVICE, meshed(&[two.endpoint(8080).await])).await;
    assert!(get(&mut stream, "/").await.body.starts_with("two "));
}

#[tokio::test]
async fn grpc_and_websockets_are_carried() {
    let cluster = Cluster::new();
    let (web, orders) = cluster.web_and_orders(WEB).await;
    let grpc = app::grpc(orders.at(8080)).await;
    web.know(SERVICE, meshed(&[orders.endpoint(8080).await]))
        .await;
    let mut client = h2(web.connect(service()).await).await;
    let request = Request::post("http://orders/shop.v1.Orders/Get")
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    let (response, _) = client
        .send_request(request.body(()).unwrap(), true)
        .unwrap();
    let response = soon(response).await.unwrap();
    assert_eq!(response.headers()["grpc-status"], "0", "{response:?}");
    assert_eq!(web.record(|_| true).await.protocol, Protocol::Grpc);

    let (web, orders) = cluster.web_and_orders(WEB).await;
    grpc.abort();
    app::websocket(orders.at(8080)).await;
    web.know(SERVICE, meshed(&[orders.endpoint(8080).await]))
        .await;
    let mut stream = web.connect(service()).await;
    let upgrade = "GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                   Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    assert_eq!(exchange(&mut stream, upgrade).await.status, 101);
    stream.write_all(b"echo").await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(rest(&mut stream).await.0, b"echo");
    assert_eq!(web.record(|_| true).await.protocol, Protocol::WebSocket);
}

#[tokio::test]
async fn bytes_are_carried_as_they_are_and_an_applications_own_tls_too() {
    let cluster = Cluster::new();
    let (web, orders) = cluster.web_and_orders(BYTES).await;
    app::echo(orders.at(6379)).await;
    web.know(SERVICE, meshed(&[orders.endpoint(6379).await]))
        .await;
    for bytes in [
        &b"\0\x01binary"[..],
        b"\x16\x03\x01\x02\x00a hello of some TLS",
        b"*1\r\n$4\r\nPING\r\n",
        b"NICK somebody\r\n",
    ] {
        let mut stream = web.connect(service()).await;
        stream.write_all(bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        let (echoed, ended) = rest(&mut stream).await;
        assert_eq!((echoed.as_slice(), ended.is_ok()), (bytes, true));
        let record = web.record(|_| true).await;
        assert_eq!(record.protocol, Protocol::Tcp);
        assert_eq!(record.request_bytes, bytes.len() as u64);
        let record = orders.record(|_| true).await;
        assert_eq!(record.policy.as_deref(), Some("shop/ledger"));
    }
}

#[tokio::test]
async fn a_server_that_speaks_first_is_heard() {
    let cluster = Cluster::new();
    let (web, orders) = cluster.web_and_orders(BYTES).await;
    app::greeter(orders.at(6379)).await;
    let endpoint = orders.endpoint(6379).await;
    // Of unknown protocol after a moment of silence; where the route says tcp, at once.
    for protocol in [PortProtocol::Auto, PortProtocol::Tcp] {
        let known = route(std::slice::from_ref(&endpoint), protocol);
        web.know(SERVICE, Destination::Meshed(known.into())).await;
        let mut stream = web.connect(service()).await;
        let mut greeting = [0; 6];
        soon(stream.read_exact(&mut greeting)).await.unwrap();
        assert_eq!(&greeting, b"hello ", "{protocol:?}");
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        stream.shutdown().await.unwrap();
        assert_eq!(rest(&mut stream).await.0, b"GET / HTTP/1.1\r\n\r\n");
    }
}

#[tokio::test]
async fn what_looks_like_http_passes_as_bytes_to_a_tcp_port_and_an_opaque_one() {
    let cluster = Cluster::new();
    let orders = cluster.pod("orders", BYTES).await;
    app::echo(orders.at(6379)).await;
    let endpoint = orders.endpoint(6379).await;
    let tcp = route(std::slice::from_ref(&endpoint), PortProtocol::Tcp);
    for (more, known) in [
        ("", Destination::Meshed(tcp.into())),
        ("opaquePorts: [80]", meshed(&[endpoint])),
    ] {
        let web = cluster.pod_with("web", "", more).await;
        web.know(SERVICE, known).await;
        let mut stream = web.connect(service()).await;
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        stream.shutdown().await.unwrap();
        assert_eq!(
            rest(&mut stream).await.0,
            b"GET / HTTP/1.1\r\n\r\n",
            "{more}"
        );
    }
}

#[tokio::test]
async fn an_http_port_carries_no_bytes_but_a_client_that_hesitates_may_still_speak() {
    let cluster = Cluster::new();
    let (web, orders) = cluster.web_and_orders(WEB).await;
    app::http(orders.at(8080), "orders").await;
    web.know(SERVICE, meshed(&[orders.endpoint(8080).await]))
        .await;
    let mut stream = web.connect(service()).await;
    // Its silence was taken for that of a client whose server speaks first.
    let refused = web.record(|record| record.protocol == Protocol::Tcp).await;
    assert_eq!(refused.error, Some("denied"));
    let record = orders
        .record(|record| record.protocol == Protocol::Tcp)
        .await;
    assert_eq!(
        record.reason.as_deref(),
        Some("the port carries no opaque bytes")
    );
    assert_eq!(get(&mut stream, "/late").await.status, 200);

    let mut stream = web.connect(service()).await;
    stream.write_all(b"\0binary").await.unwrap();
    let (nothing, ended) = rest(&mut stream).await;
    assert!(nothing.is_empty() && ended.is_err(), "{ended:?}");
}

#[tokio::test]
async fn neither_connect_nor_an_absolute_target_chooses_a_destination() {
    let cluster = Cluster::new();
    let (web, orders) = cluster.web_and_orders(WEB).await;
    app::http(orders.at(8080), "orders").await;
    web.know(SERVICE, meshed(&[orders.endpoint(8080).await]))
        .await;
    let mut stream = web.connect(service()).await;
    let absolute = "GET http://10.0.0.1:81/x HTTP/1.1\r\nHost: 10.0.0.1:81\r\n\r\n";
    let reply = exchange(&mut stream, absolute).await;
    assert!(reply.body.starts_with("orders GET /x"), "{reply:?}");
    let connect = "CONNECT 10.0.0.1:81 HTTP/1.1\r\nHost: 10.0.0.1:81\r\n\r\n";
    let reply = exchange(&mut stream, connect).await;
    assert_eq!(reply.status, 400, "{reply:?}");
    let mut client = h2(web.connect(service()).await).await;
    let connect = Request::connect("10.0.0.1:81").body(()).unwrap();
    let (response, _) = client.send_request(connect, false).unwrap();
    let response = soon(response).await.unwrap();
    assert_eq!(response.status(), 403);
    assert_eq!(response.headers()["sidegate-error"], "not_carried");
}

/// An address of this machine that is not loopback.
fn outside() -> Option<std::net::IpAddr> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
    // Nothing is sent: this only asks for the way there.
    socket.connect("192.0.2.1:9").ok()?;
    let ip = socket.local_addr().ok()?.ip();
    (!ip.is_loopback() && !ip.is_unspecified()).then_some(ip)
}

#[tokio::test]
async fn bytes_to_what_is_outside_pass_as_they_are_and_are_logged() {
    let Some(ip) = outside() else {
        eprintln!("SKIPPED: this machine has no address but loopback");
        return;
    };
    let cluster = Cluster::new();
    let web = cluster.pod("web", "").await;
    let listener = tokio::net::TcpListener::bind((ip, 0)).await.unwrap();
    let at = listener.local_addr().unwrap();
    drop(listener);
    let served = app::greeter(at).await;
    let external = Destination::External { refused: false };
    web.know(&at.to_string(), external).await;
    let mut stream = web.connect(at).await;
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    stream.shutdown().await.unwrap();
    let (bytes, ended) = rest(&mut stream).await;
    assert_eq!(bytes, b"hello GET / HTTP/1.1\r\n\r\n");
    assert!(ended.is_ok());
    let record = web.record(|_| true).await;
    assert_eq!(record.direction, Direction::Outbound);
    assert_eq!(record.protocol, Protocol::Tcp);
    assert_eq!(record.destination_address, Some(at.into()));
    assert_eq!((record.destination, record.error), (None, None));
    assert_eq!((record.request_bytes, record.response_bytes), (18, 24));

    served.abort();
    drop(served.await);
    let mut stream = web.connect(at).await;
    assert!(
        rest(&mut stream).await.1.is_err(),
        "nobody is there: a reset"
    );
    assert_eq!(web.record(|_| true).await.error, Some("upstream_connect"));
}

#[tokio::test]
async fn what_a_namespace_does_not_let_out_is_refused_in_the_callers_own_words() {
    let cluster = Cluster::new();
    let web = cluster.pod("web", "").await;
    web.know("192.0.2.1:80", Destination::External { refused: true })
        .await;
    let to = "192.0.2.1:80".parse().unwrap();
    let mut stream = web.connect(to).await;
    let reply = get(&mut stream, "/").await;
    assert_eq!(reply.status, 403);
    assert!(
        reply.head.contains("sidegate-error: egress_denied"),
        "{reply:?}"
    );
    assert!(reply.head.contains("connection: close"), "{reply:?}");
    let record = web.record(|_| true).await;
    assert_eq!(record.error, Some("egress_denied"));
    let at = record.destination_address.map(|at| at.to_string());
    assert_eq!(at.as_deref(), Some("192.0.2.1:80"));
    assert_eq!(record.destination, None);

    let mut stream = web.connect(to).await;
    stream.write_all(b"\0binary").await.unwrap();
    assert!(rest(&mut stream).await.1.is_err());
    let record = web.record(|_| true).await;
    assert_eq!(record.error, Some("egress_denied"));
    assert_eq!(record.protocol, Protocol::Tcp);
}

#[tokio::test]
async fn what_nobody_knows_fails_after_a_second_at_most() {
    let cluster = Cluster::new();
    let web = cluster.pod("web", "").await;
    let to = "10.96.0.9:80".parse().unwrap();
    let begun = Instant::now();
    let mut stream = web.connect(to).await;
    let reply = get(&mut stream, "/").await;
    assert_eq!(reply.status, 502);
    let error = "sidegate-error: destination_unknown";
    assert!(reply.head.contains(error), "{reply:?}");
    assert!(begun.elapsed() >= Duration::from_millis(900));
    let record = web.record(|_| true).await;
    assert_eq!(record.error, Some("destination_unknown"));
    let at = record.destination_address.map(|at| at.to_string());
    assert_eq!(at.as_deref(), Some("10.96.0.9:80"));

    let mut client = h2(web.connect(to).await).await;
    let request = Request::post("http://x/a.B/C").header("content-type", "application/grpc");
    let (response, _) = client
        .send_request(request.body(()).unwrap(), true)
        .unwrap();
    let response = soon(response).await.unwrap();
    assert_eq!(response.headers()["grpc-status"], "14");
    assert_eq!(response.headers()["sidegate-error"], "destination_unknown");

    let mut stream = web.connect(to).await;
    stream.write_all(b"\0binary").await.unwrap();
    assert!(rest(&mut stream).await.1.is_err(), "others see a reset");
}

#[tokio::test]
async fn a_connection_that_was_begun_in_the_mesh_does_not_go_on_outside() {
    let cluster = Cluster::new();
    let (web, orders) = cluster.web_and_orders(WEB).await;
    app::http(orders.at(8080), "orders").await;
    web.know(SERVICE, meshed(&[orders.endpoint(8080).await]))
        .await;
    let mut stream = web.connect(service()).await;
    assert_eq!(get(&mut stream, "/").await.status, 200);
    web.know(SERVICE, Destination::External { refused: false })
        .await;
    let reply = get(&mut stream, "/").await;
    assert_eq!(reply.status, 503);
    assert!(reply.head.contains("sidegate-error: destination_changed"));
    assert!(
        reply.head.contains("connection: close"),
        "the next one may do"
    );
}

#[tokio::test]
async fn loops_and_our_own_ports_are_refused_and_logged() {
    let cluster = Cluster::new();
    let web = cluster.pod("web", "").await;
    for (to, reason) in [
        ("127.0.0.1:8080".to_owned(), "loopback"),
        ("[::ffff:127.0.0.1]:8080".to_owned(), "loopback"),
        ("[::1]:8080".to_owned(), "loopback"),
        ("0.0.0.0:80".to_owned(), "unspecified"),
        (web.at(19000).to_string(), "own_port"),
        (web.at(19001).to_string(), "own_port"),
        (web.at(19006).to_string(), "own_port"),
        (web.at(19021).to_string(), "own_port"),
    ] {
        let mut stream = web.connect(to.parse().unwrap()).await;
        drop(rest(&mut stream).await);
        let record = web.record(|_| true).await;
        assert_eq!(record.error, Some("destination_refused"), "{to}");
        assert_eq!(record.reason.as_deref(), Some(reason), "{to}");
    }
    let mut stream = web.connect_directly().await;
    drop(rest(&mut stream).await);
    let record = web.record(|_| true).await;
    assert_eq!(record.reason.as_deref(), Some("not_redirected"));
}

#[tokio::test]
async fn a_caller_that_connects_early_and_speaks_http_late_is_read_as_such() {
    let cluster = Cluster::new();
    let (web, orders) = cluster.web_and_orders("").await;
    // Where bytes are carried too: without a policy, in a namespace that audits.
    orders.audit("");
    let (opened, mut openings) = tokio::sync::mpsc::unbounded_channel();
    app::raw(orders.at(8080), move |mut stream| {
        let opened = opened.clone();
        async move {
            opened.send(()).unwrap();
            let mut head = [0; 512];
            if stream.read(&mut head).await.is_ok_and(|read| read > 0) {
                let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
                stream.write_all(answer).await.unwrap();
            }
        }
    })
    .await;
    web.know(SERVICE, meshed(&[orders.endpoint(8080).await]))
        .await;
    let mut stream = web.connect(service()).await;
    // Its silence was taken for that of a client whose server speaks first.
    soon(openings.recv()).await.unwrap();
    assert_eq!(get(&mut stream, "/late").await.status, 200);
    let late = |record: &sidegate_mesh::access_log::Record| record.path.is_some();
    let record = orders.record(late).await;
    assert_eq!(record.protocol, Protocol::Http1, "{record:?}");
    assert_eq!(record.path.as_deref(), Some("/late"));
    assert_eq!(record.decision, Some(Verdict::WouldDeny));
    let record = web.record(|record| record.protocol == Protocol::Tcp).await;
    assert!(record.error.is_none(), "{record:?}");
}
