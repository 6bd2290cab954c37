//! Callers without an identity: on ports that are listed for them, and where the workload audits.

use http::Request;
use sidegate_mesh::Verdict;
use sidegate_mesh::access_log::Protocol;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use crate::pod::{Cluster, Pod, exchange, get, h2, rest, soon};
use crate::{BYTES, WEB, app};

/// Anybody may read orders and open WebSockets; who is in the mesh may do so as well.
const ANYBODY: &str = r#"
apiVersion: sidegate.dev/v1alpha1
kind: AuthorizationPolicy
metadata: { name: ingress, namespace: shop }
spec:
  selector: { matchLabels: { app: orders } }
  ports: [8080]
  action: Allow
  rules:
    - name: ingress
      from: [{ unauthenticated: {} }]
      to:
        - http: { methods: [GET, POST], paths: ["/open/**"] }
        - http: { methods: [GET], paths: ["/ws"], upgrades: [websocket] }
        - grpc: { service: shop.v1.Orders, methods: ["*"] }
"#;

/// Anybody may open opaque connections to 6379.
const ANY_BYTES: &str = r#"
apiVersion: sidegate.dev/v1alpha1
kind: AuthorizationPolicy
metadata: { name: ledger, namespace: shop }
spec:
  selector: { matchLabels: { app: orders } }
  ports: [6379]
  action: Allow
  rules: [{ name: ingress, from: [{ unauthenticated: {} }], to: [{ tcp: {} }] }]
"#;

async fn listed(cluster: &Cluster, policy: &str) -> Pod {
    let more = "plaintextPorts: [8080, 6379]";
    cluster.pod_with("orders", policy, more).await
}

async fn connect(pod: &Pod, port: u16) -> TcpStream {
    TcpStream::connect(pod.exposed(port).await).await.unwrap()
}

#[tokio::test]
async fn a_listed_port_serves_whom_its_policy_admits_and_nobody_else() {
    let cluster = Cluster::new();
    let orders = listed(&cluster, ANYBODY).await;
    app::http(orders.at(8080), "orders").await;
    let mut stream = connect(&orders, 8080).await;
    let request = "POST /open/7?x=1 HTTP/1.1\r\nHost: shop.example\r\nContent-Length: 5\r\n\
                   x-forwarded-client-cert: URI=spiffe://mesh.local/ns/shop/sa/web\r\n\
                   sidegate-client-id: spiffe://mesh.local/ns/shop/sa/web\r\nsidegate-port: 22\r\n\
                   sidegate_client_id: x\r\nl5d-client-id: x\r\nx-own: kept\r\n\r\nhello";
    let reply = exchange(&mut stream, request).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert!(
        reply.body.starts_with("orders POST /open/7?x=1 hello"),
        "{reply:?}"
    );
    assert!(reply.body.contains("x-own: kept") && reply.body.contains("host: shop.example"));
    for forged in ["client-cert", "client-id", "client_id", "sidegate", "l5d"] {
        assert!(!reply.body.contains(forged), "{forged} in {reply:?}");
    }
    let record = orders.record(|_| true).await;
    assert_eq!((record.source, record.tls_version), (None, None));
    assert_eq!(record.decision, Some(Verdict::Allow));
    assert_eq!(record.rule.as_deref(), Some("ingress"));
    assert_eq!(
        (record.protocol, record.status),
        (Protocol::Http1, Some(200))
    );
    assert_eq!(record.request_bytes, 5);
    assert!(record.source_address.is_some() && record.response_bytes > 0);

    // On the same connection.
    let reply = get(&mut stream, "/closed").await;
    assert_eq!(reply.status, 403, "{reply:?}");
    assert!(reply.head.contains("sidegate-decision: "), "{reply:?}");
    let record = orders.record(|_| true).await;
    assert_eq!(record.decision, Some(Verdict::Deny));
    assert_eq!(record.reason.as_deref(), Some("no rule admits"));
    let smuggled = "GET /open/x HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n";
    assert_eq!(exchange(&mut stream, smuggled).await.status, 400);
    assert_eq!(orders.record(|_| true).await.error, Some("bad_request"));
}

#[tokio::test]
async fn http2_and_grpc_and_websockets_enter_in_plaintext_too() {
    let cluster = Cluster::new();
    let orders = listed(&cluster, ANYBODY).await;
    let grpc = app::grpc(orders.at(8080)).await;
    let mut client = h2(connect(&orders, 8080).await).await;
    for (path, status) in [("/shop.v1.Orders/Get", "0"), ("/shop.v1.Other/Get", "7")] {
        let request = Request::post(format!("http://orders{path}"))
            .header("content-type", "application/grpc")
            .header("sidegate-protocol", "http/1.1");
        let (response, _) = client
            .send_request(request.body(()).unwrap(), true)
            .unwrap();
        let response = soon(response).await.unwrap();
        assert_eq!(response.headers()["grpc-status"], status, "{path}");
        let record = orders.record(|_| true).await;
        assert_eq!((record.protocol, record.source), (Protocol::Grpc, None));
    }
    // What only a sidecar may ask for.
    let mut request = Request::connect("http://orders/").body(()).unwrap();
    let protocol = h2::ext::Protocol::from_static("sidegate-tcp");
    request.extensions_mut().insert(protocol);
    let (response, _) = client.send_request(request, false).unwrap();
    assert_eq!(soon(response).await.unwrap().status(), 403);
    assert_eq!(orders.record(|_| true).await.error, Some("not_carried"));
    drop(grpc);
    // Where nobody listens: not a reset, which only a sidecar makes something of.
    let orders = listed(&cluster, ANYBODY).await;
    let mut client = h2(connect(&orders, 8080).await).await;
    let request = Request::post("http://orders/shop.v1.Orders/Get")
        .header("content-type", "application/grpc");
    let (response, _) = client
        .send_request(request.body(()).unwrap(), true)
        .unwrap();
    let response = soon(response).await.unwrap();
    assert_eq!(response.headers()["grpc-status"], "14");
    assert_eq!(response.headers()["sidegate-error"], "upstream_connect");

    let orders = listed(&cluster, ANYBODY).await;
    app::websocket(orders.at(8080)).await;
    let mut stream = connect(&orders, 8080).await;
    let upgrade = "GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                   Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    let reply = exchange(&mut stream, upgrade).await;
    assert_eq!(reply.status, 101, "{reply:?}");
    assert!(reply.head.contains("sec-websocket-accept: "), "{reply:?}");
    stream.write_all(b"echo").await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(rest(&mut stream).await.0, b"echo");
    let record = orders.record(|_| true).await;
    assert_eq!(
        (record.protocol, record.status),
        (Protocol::WebSocket, Some(101))
    );
    assert_eq!((record.request_bytes, record.response_bytes), (4, 4));
}

#[tokio::test]
async fn bytes_and_an_applications_own_tls_enter_where_the_policy_carries_them() {
    let cluster = Cluster::new();
    let orders = listed(&cluster, &format!("{ANY_BYTES}---{ANYBODY}")).await;
    app::echo(orders.at(6379)).await;
    for bytes in [&b"\0\x01binary"[..], b"PING\r\n", &hello()] {
        let mut stream = connect(&orders, 6379).await;
        stream.write_all(bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        assert_eq!(rest(&mut stream).await.0, bytes);
        let record = orders.record(|_| true).await;
        assert_eq!((record.protocol, record.source), (Protocol::Tcp, None));
        assert_eq!(record.decision, Some(Verdict::Allow));
        assert_eq!(record.request_bytes, bytes.len() as u64);
    }
    // On a port with http policy neither passes as bytes.
    for bytes in [&b"\0\x01binary"[..], &hello()] {
        let mut stream = connect(&orders, 8080).await;
        stream.write_all(bytes).await.unwrap();
        let (nothing, ended) = rest(&mut stream).await;
        assert!(nothing.is_empty() && ended.is_err(), "{ended:?}");
        let record = orders.record(|_| true).await;
        assert_eq!(
            record.reason.as_deref(),
            Some("the port carries no opaque bytes")
        );
    }
}

/// A whole `ClientHello` of somebody who is not in the mesh.
fn hello() -> Vec<u8> {
    let roots = rustls::RootCertStore::empty();
    let provider = sidegate_mtls::crypto_provider();
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = "shop.example".try_into().unwrap();
    let mut client = rustls::ClientConnection::new(config.into(), name).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

#[tokio::test]
async fn a_server_that_speaks_first_is_heard_in_plaintext() {
    let cluster = Cluster::new();
    let orders = listed(&cluster, ANY_BYTES).await;
    app::greeter(orders.at(6379)).await;
    let mut stream = connect(&orders, 6379).await;
    let mut greeting = [0; 6];
    soon(stream.read_exact(&mut greeting)).await.unwrap();
    assert_eq!(&greeting, b"hello ");
}

#[tokio::test]
async fn a_sidecar_that_is_slow_to_speak_is_not_taken_for_a_silent_client() {
    let cluster = Cluster::new();
    let orders = cluster.pod("orders", "").await;
    orders.audit("");
    let (opened, mut openings) = mpsc::unbounded_channel();
    app::raw(orders.at(6379), move |mut stream| {
        let opened = opened.clone();
        async move {
            opened.send(()).unwrap();
            let mut asked = [0; 3];
            if stream.read_exact(&mut asked).await.is_ok() {
                stream.write_all(&asked).await.unwrap();
            }
        }
    })
    .await;
    let stream = connect(&orders, 6379).await;
    // Its silence has been taken for that of a client whose server speaks first.
    soon(openings.recv()).await.unwrap();
    let web = cluster.connector("web");
    let (tls, _) = soon(web.connect(stream, orders.id())).await.unwrap();
    let (client, connection) = soon(h2::client::handshake(tls)).await.unwrap();
    tokio::spawn(async move { drop::<Result<(), h2::Error>>(connection.await) });
    let mut request = Request::connect("http://orders/").body(()).unwrap();
    let protocol = h2::ext::Protocol::from_static("sidegate-tcp");
    request.extensions_mut().insert(protocol);
    let mut client: h2::client::SendRequest<bytes::Bytes> = soon(client.ready()).await.unwrap();
    while !client.is_extended_connect_protocol_enabled() {
        tokio::task::yield_now().await;
    }
    let (response, mut send) = client.send_request(request, false).unwrap();
    let response = soon(response).await.unwrap();
    assert_eq!(response.status(), 200);
    send.send_data("abc".into(), true).unwrap();
    let data = soon(response.into_body().data()).await.unwrap().unwrap();
    assert_eq!(data, "abc");
    let record = orders.record(|_| true).await;
    assert!(record.source.is_some(), "{record:?}");
}

#[tokio::test]
async fn a_silent_client_that_speaks_http_after_all_is_read_as_such() {
    let cluster = Cluster::new();
    let orders = cluster.pod("orders", "").await;
    orders.audit("");
    let (opened, mut openings) = mpsc::unbounded_channel();
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
    let mut stream = connect(&orders, 8080).await;
    soon(openings.recv()).await.unwrap();
    assert_eq!(get(&mut stream, "/late").await.status, 200);
    let record = orders.record(|_| true).await;
    assert_eq!(record.protocol, Protocol::Http1, "{record:?}");
    assert_eq!(record.path.as_deref(), Some("/late"));
}

#[tokio::test]
async fn a_listed_port_still_takes_the_mesh() {
    let cluster = Cluster::new();
    let (web, orders) = (cluster.pod("web", "").await, listed(&cluster, WEB).await);
    app::http(orders.at(8080), "orders").await;
    let known = crate::pod::meshed(&[orders.endpoint(8080).await]);
    web.know(crate::pod::SERVICE, known).await;
    let mut stream = web.connect(crate::pod::SERVICE.parse().unwrap()).await;
    assert_eq!(get(&mut stream, "/").await.status, 200);
    let record = orders.record(|_| true).await;
    assert_eq!(record.source.as_deref(), Some(web.id().as_str()));
}

#[tokio::test]
async fn elsewhere_plaintext_is_refused_whatever_the_policy_says() {
    let cluster = Cluster::new();
    let orders = cluster.pod("orders", ANYBODY).await;
    app::http(orders.at(8080), "orders").await;
    let mut stream = connect(&orders, 8080).await;
    let reply = get(&mut stream, "/open/x").await;
    assert_eq!(reply.status, 400);
    assert!(
        reply.head.contains("sidegate-error: plaintext"),
        "{reply:?}"
    );
    let record = orders.record(|_| true).await;
    assert_eq!(record.decision, Some(Verdict::Deny));
    assert_eq!(record.reason.as_deref(), Some("plaintext refused"));
}

#[tokio::test]
async fn an_audit_workload_serves_plaintext_and_says_that_it_would_have_refused_it() {
    let cluster = Cluster::new();
    let orders = cluster
        .pod_with("orders", "", "plaintextPorts: [8080]")
        .await;
    orders.audit(&format!("{ANYBODY}---{BYTES}"));
    app::http(orders.at(8080), "orders").await;
    app::http(orders.at(9090), "metrics").await;
    app::echo(orders.at(6379)).await;
    // For want of an identity, whatever rule there is.
    let mut stream = connect(&orders, 9090).await;
    assert_eq!(get(&mut stream, "/open/x").await.status, 200);
    let record = orders.record(|_| true).await;
    assert_eq!(record.decision, Some(Verdict::WouldDeny));
    assert_eq!(record.reason.as_deref(), Some("plaintext refused"));
    assert_eq!((record.source, record.policy), (None, None));
    // For want of a rule, on a listed port.
    let mut stream = connect(&orders, 8080).await;
    assert_eq!(get(&mut stream, "/closed").await.status, 200);
    let record = orders.record(|_| true).await;
    assert_eq!(record.decision, Some(Verdict::WouldDeny));
    assert_eq!(record.reason.as_deref(), Some("no rule admits"));
    assert_eq!(get(&mut stream, "/open/x").await.status, 200);
    assert_eq!(orders.record(|_| true).await.decision, Some(Verdict::Allow));
    // Bytes, and TLS that is somebody else's.
    for bytes in [&b"\0bytes"[..], &hello()] {
        let mut stream = connect(&orders, 6379).await;
        stream.write_all(bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        assert_eq!(rest(&mut stream).await.0, bytes);
        let record = orders.record(|_| true).await;
        assert_eq!(record.decision, Some(Verdict::WouldDeny));
        assert_eq!(record.reason.as_deref(), Some("plaintext refused"));
    }
    // Refused syntax stays refused.
    let mut stream = connect(&orders, 9090).await;
    let smuggled = "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n";
    assert_eq!(exchange(&mut stream, smuggled).await.status, 400);
}

#[tokio::test]
async fn when_audit_ends_plaintext_ends_with_it() {
    let cluster = Cluster::new();
    let orders = cluster.pod("orders", "").await;
    orders.audit(BYTES);
    app::echo(orders.at(6379)).await;
    let at = orders.exposed(6379).await;
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream.write_all(b"\0bytes").await.unwrap();
    let mut echoed = [0; 6];
    soon(stream.read_exact(&mut echoed)).await.unwrap();
    orders.publish(BYTES);
    let (nothing, ended) = rest(&mut stream).await;
    assert!(nothing.is_empty() && ended.is_err(), "{ended:?}");
    let record = orders.record(|_| true).await;
    assert_eq!(record.error, Some("denied_by_policy_change"));
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream.write_all(b"\0bytes").await.unwrap();
    drop(rest(&mut stream).await);
    let record = orders.record(|_| true).await;
    assert_eq!(record.reason.as_deref(), Some("plaintext refused"));
}

#[tokio::test]
async fn a_plaintext_call_that_is_denied_while_it_runs_is_cut() {
    let cluster = Cluster::new();
    let orders = listed(&cluster, ANYBODY).await;
    app::raw(orders.at(8080), |mut stream| async move {
        let head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n";
        drop(stream.write_all(head).await);
        drop(stream.read_to_end(&mut Vec::new()).await);
    })
    .await;
    let mut stream = connect(&orders, 8080).await;
    let request = b"GET /open/stream HTTP/1.1\r\nHost: x\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut read = Vec::new();
    while !read.ends_with(b"first\r\n") {
        assert!(soon(stream.read_buf(&mut read)).await.unwrap() > 0);
    }
    orders.publish(WEB);
    let (end, _) = rest(&mut stream).await;
    assert_eq!(end, b"", "no last chunk: it is no clean end");
    let record = orders.record(|_| true).await;
    assert_eq!(record.error, Some("denied_by_policy_change"));
}
