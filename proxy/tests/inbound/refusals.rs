//! What is refused, how it is answered, and that nothing of it reaches the application.

use std::sync::Arc;
use std::time::Duration;

use http::{Method, StatusCode};
use sidegate_mesh::Verdict;
use sidegate_mtls::{BundleSet, CredentialStore, HandshakeError, Trust};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::app;
use crate::peers::{Peer, connect, get, handshake, post, request, websocket};
use crate::support::{
    READERS, Root, Setup, Sidecar, id, id_in, soon, start, store_with, trust, until,
};

async fn shop() -> (Sidecar, app::Seen) {
    let (address, seen) = app::http().await;
    let sidecar = Sidecar::start(Setup::http(address, READERS)).await;
    (sidecar, seen)
}

#[tokio::test]
async fn a_call_that_no_rule_admits_is_a_403_with_a_decision_that_the_log_explains() {
    let (sidecar, seen) = shop().await;
    let peer = Peer::connect(&sidecar, "jobs/batch").await;
    let answer = peer.call(get("/orders/7")).await.unwrap();
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    let decision = answer.header("sidegate-decision").to_owned();
    assert_eq!(answer.header("sidegate-error"), "denied");
    let body = format!(r#"{{"error":"denied by policy","decision":"{decision}"}}"#);
    assert_eq!(answer.text(), body);
    let record = sidecar.record_of("/orders/7").await;
    assert_eq!(record.decision_id.as_deref(), Some(&*decision));
    assert_eq!(
        (record.decision, record.status),
        (Some(Verdict::Deny), Some(403))
    );
    assert_eq!(record.reason.as_deref(), Some("no rule admits"));
    assert_eq!(record.response_bytes, body.len() as u64);
    assert_eq!(
        record.source.as_deref(),
        Some("spiffe://mesh.local/ns/jobs/sa/batch")
    );
    let allowed = peer.call(get("/healthz")).await.unwrap();
    assert_eq!(allowed.status, StatusCode::OK, "anyone may ask for health");
    assert!(
        seen.all().iter().all(|what| !what.contains("/orders")),
        "{:?}",
        seen.all()
    );
}

#[tokio::test]
async fn a_denied_head_request_gets_no_body() {
    let (sidecar, _seen) = shop().await;
    let peer = Peer::connect(&sidecar, "jobs/batch").await;
    let answer = peer.call(request(Method::HEAD, "/orders/7")).await.unwrap();
    assert_eq!((answer.status, answer.text()), (StatusCode::FORBIDDEN, ""));
    assert!(answer.reset.is_none(), "{answer:?}");
    assert_eq!(sidecar.record_of("/orders/7").await.response_bytes, 0);
}

#[tokio::test]
async fn the_called_service_is_on_record_only_where_this_workload_is_behind_it() {
    let (address, _seen) = app::http().await;
    let service = |name: &str, account: &str| {
        format!(
            "---\napiVersion: sidegate.dev/v1alpha1\nkind: StaticService\n\
             metadata: {{ name: {name}, namespace: shop }}\nspec:\n  \
             ports: [{{ name: http, port: 80, targetPort: 8080, protocol: auto }}]\n  \
             endpoints: [{{ address: \"127.0.0.1:1\", \
             identity: {{ workload: {{ serviceAccount: {account} }} }} }}]\n"
        )
    };
    let resources = format!(
        "{READERS}{}{}",
        service("orders", "orders"),
        service("ledger", "ledger")
    );
    let sidecar = Sidecar::start(Setup::http(address, &resources)).await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    peer.call(get("/orders/7")).await.unwrap();
    let record = sidecar.record_of("/orders/7").await;
    assert_eq!(
        record.destination_service.as_deref(),
        Some("orders.shop:80")
    );
    let mut other = get("/orders/8");
    *other.uri_mut() = "http://ledger.shop/orders/8".parse().unwrap();
    peer.call(other).await.unwrap();
    assert_eq!(
        sidecar.record_of("/orders/8").await.destination_service,
        None
    );
}

#[tokio::test]
async fn a_denied_request_with_a_body_is_answered_before_its_body() {
    let (sidecar, _seen) = shop().await;
    let peer = Peer::connect(&sidecar, "jobs/batch").await;
    let answer = peer
        .call_with(post("/orders"), &[1; 100_000])
        .await
        .unwrap();
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    assert!(answer.reset.is_none(), "{answer:?}");
}

#[tokio::test]
async fn spellings_of_another_path_are_refused_on_the_wire() {
    let (sidecar, seen) = shop().await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    for path in [
        "/orders/../admin",
        "/orders/%2e%2e/admin",
        "/orders/..%2fadmin",
        "/orders%2f..%2fadmin",
        "/orders/%5c..%5cadmin",
        "/orders//admin",
        "/orders;x=1/admin",
        "/orders/%00",
        "/orders/%252e%252e/admin",
        "/orders/%zz",
        "/orders/%",
        "/orders/./7",
        "/orders/%c0%ae%c0%ae/admin",
    ] {
        let answer = peer.call(get(path)).await.unwrap();
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{path}");
        assert_eq!(answer.header("sidegate-error"), "bad_request", "{path}");
        let record = sidecar.record_of(path).await;
        assert!(
            record
                .reason
                .is_some_and(|reason| reason.starts_with("path_")),
            "{path}"
        );
    }
    assert!(seen.all().is_empty(), "{:?}", seen.all());
    let answer = peer.call(get("/%6frders/%37")).await.unwrap();
    assert_eq!(answer.status, StatusCode::OK);
    assert!(
        seen.has("GET /orders/7 HTTP/1.1"),
        "forwarded as authorized: {:?}",
        seen.all()
    );
}

#[tokio::test]
async fn a_host_that_is_not_the_authority_is_refused() {
    let (sidecar, seen) = shop().await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    let mut request = get("/orders/7");
    request
        .headers_mut()
        .insert("host", "ledger.shop".parse().unwrap());
    let answer = peer.call(request).await.unwrap();
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    let record = sidecar.record_of("/orders/7").await;
    assert_eq!(record.reason.as_deref(), Some("host_mismatch"));
    assert!(seen.all().is_empty());
}

#[tokio::test]
async fn connect_is_refused_and_so_are_unknown_protocols() {
    let (sidecar, seen) = shop().await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    let mut plain = http::Request::new(());
    *plain.method_mut() = Method::CONNECT;
    *plain.uri_mut() = "orders.shop:80".parse().unwrap();
    let answer = peer.call(plain).await.unwrap();
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    assert_eq!(answer.header("sidegate-error"), "not_carried");
    let answer = peer.call(connect("connect-udp", "/orders")).await.unwrap();
    assert_eq!(answer.header("sidegate-error"), "not_carried");
    assert!(seen.all().is_empty());
}

#[tokio::test]
async fn a_tunnel_into_an_http_port_is_refused_whoever_asks() {
    let (sidecar, seen) = shop().await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    let answer = peer.call(connect("sidegate-tcp", "/")).await.unwrap();
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    assert_eq!(answer.header("sidegate-error"), "denied");
    let record = sidecar
        .record(|record| record.decision == Some(Verdict::Deny))
        .await;
    assert_eq!(
        record.reason.as_deref(),
        Some("the port carries no opaque bytes")
    );
    assert!(seen.all().is_empty(), "{:?}", seen.all());
}

#[tokio::test]
async fn an_upgrade_without_permission_is_refused() {
    let (sidecar, seen) = shop().await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    let answer = peer.call(websocket("/orders/7")).await.unwrap();
    assert_eq!(
        answer.status,
        StatusCode::FORBIDDEN,
        "GET is allowed there, the upgrade is not"
    );
    let record = sidecar.record_of("/orders/7").await;
    assert_eq!(record.method.as_deref(), Some("GET"));
    assert!(seen.all().is_empty());
}

#[tokio::test]
async fn a_header_list_beyond_its_bound_is_a_431_of_ours_that_is_logged() {
    let (sidecar, seen) = shop().await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    let mut many = get("/orders/many");
    for n in 0..110 {
        let name = http::HeaderName::try_from(format!("x-{n}")).unwrap();
        many.headers_mut().insert(name, "v".parse().unwrap());
    }
    let mut large = get("/orders/large");
    large
        .headers_mut()
        .insert("x-large", "v".repeat(70_000).parse().unwrap());
    for (request, path) in [(many, "/orders/many"), (large, "/orders/large")] {
        let answer = peer.call(request).await.unwrap();
        assert_eq!(answer.status, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
        assert_eq!(answer.header("sidegate-error"), "header_list_too_large");
        let record = sidecar.record_of(path).await;
        assert_eq!(record.error, Some("header_list_too_large"));
    }
    assert!(seen.all().is_empty());
}

#[tokio::test]
async fn a_port_that_the_workload_does_not_have_is_refused() {
    let (sidecar, seen) = shop().await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    let mut request = get("/orders/7");
    request
        .headers_mut()
        .insert("sidegate-port", "22".parse().unwrap());
    let answer = peer.call(request).await.unwrap();
    assert_eq!(answer.header("sidegate-error"), "destination_unknown");
    assert!(seen.all().is_empty());
}

#[tokio::test]
async fn nothing_is_served_before_a_snapshot_is_complete() {
    let (address, seen) = app::http().await;
    let mut setup = Setup::http(address, READERS);
    setup.ready = false;
    let sidecar = Sidecar::start(setup).await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    let answer = peer.call(get("/orders/7")).await.unwrap();
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(answer.header("sidegate-error"), "not_ready");
    sidecar.publish(READERS);
    assert_eq!(
        peer.call(get("/orders/7")).await.unwrap().status,
        StatusCode::OK
    );
    assert_eq!(seen.all().len(), 2, "one connection, one request");
}

#[tokio::test]
async fn requests_beyond_the_bound_are_shed() {
    let application = app::raw(|mut stream| async move {
        app::end_of(&mut stream).await;
    })
    .await;
    let setup = Setup::http(application, READERS).with("limits: { inboundRequestsMax: 1 }\n");
    let sidecar = Sidecar::start(setup).await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    let (first, _stream) = peer.begin(get("/orders/1"), true).await.unwrap();
    until(|| sidecar.shared.limits.inbound_requests.in_use() == 1).await;
    let answer = peer.call(get("/orders/2")).await.unwrap();
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(answer.header("sidegate-error"), "overloaded");
    drop(first);
}

#[tokio::test]
async fn an_audited_workload_serves_and_says_what_it_would_have_denied() {
    let (address, seen) = app::http().await;
    let mut setup = Setup::http(address, READERS);
    setup.audit = true;
    let sidecar = Sidecar::start(setup).await;
    let peer = Peer::connect(&sidecar, "jobs/batch").await;
    assert_eq!(
        peer.call(get("/orders/7")).await.unwrap().status,
        StatusCode::OK
    );
    let record = sidecar.record_of("/orders/7").await;
    assert_eq!(record.decision, Some(Verdict::WouldDeny));
    assert_eq!(record.reason.as_deref(), Some("no rule admits"));
    let answer = peer.call(get("/orders/../admin")).await.unwrap();
    assert_eq!(
        answer.status,
        StatusCode::BAD_REQUEST,
        "syntax is refused in audit too"
    );
    assert_eq!(seen.all().len(), 2);
}

/// What is sent without TLS, and what comes back.
async fn plaintext(sidecar: &Sidecar, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(sidecar.address).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = Vec::new();
    drop(soon(stream.read_to_end(&mut answer)).await);
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn plaintext_is_refused_and_logged() {
    let (sidecar, seen) = shop().await;
    let http = plaintext(
        &sidecar,
        b"GET /orders/7 HTTP/1.1\r\nhost: orders.shop\r\n\r\n",
    )
    .await;
    assert!(
        http.starts_with("HTTP/1.1 400 Bad Request\r\nsidegate-error: plaintext\r\n"),
        "{http}"
    );
    let preface = plaintext(&sidecar, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    assert!(preface.starts_with("HTTP/1.1 400"), "{preface}");
    assert_eq!(plaintext(&sidecar, &[0, 1, 2, 3]).await, "");
    for _ in 0..3 {
        let record = sidecar
            .record(|record| record.error == Some("tls_handshake"))
            .await;
        assert_eq!(record.reason.as_deref(), Some("plaintext refused"));
        assert_eq!(record.decision, Some(Verdict::Deny));
        assert!(record.source.is_none(), "nobody is proved to have called");
        assert!(
            record
                .source_address
                .is_some_and(|from| from.to_string().starts_with("127.0.0.1:"))
        );
    }
    assert!(seen.all().is_empty());
}

async fn refused_as(sidecar: &Sidecar, store: &Arc<CredentialStore>) -> String {
    let tried = Peer::with(sidecar.address, store, &sidecar.clock).await;
    if let Ok(peer) = tried {
        // TLS 1.3: a client learns of its refusal only when it reads.
        assert!(peer.call(get("/orders/7")).await.is_err(), "served");
    }
    let record = sidecar
        .record(|record| record.error == Some("tls_handshake"))
        .await;
    assert!(
        record.source.is_none(),
        "a refused certificate proves nothing"
    );
    record.reason.unwrap().into_owned()
}

#[tokio::test]
async fn certificates_of_others_are_refused_with_their_reason_and_claim() {
    let (sidecar, seen) = shop().await;
    let theirs = trust(1, &[&sidecar.root], &[]);
    let other = Root::new("mesh.local");
    // A store believes its own SVID: so both roots, as an attacker may well trust ours.
    let both = trust(1, &[&sidecar.root, &other], &[]);
    let svid = other.svid(&id("shop/web"));
    let store = store_with(&sidecar.clock, svid, both);
    let reason = refused_as(&sidecar, &store).await;
    assert!(reason.starts_with("unknown_issuer"), "{reason}");
    assert!(
        reason.ends_with("claimed spiffe://mesh.local/ns/shop/sa/web"),
        "{reason}"
    );

    let partner = Root::new("partner.example");
    let svid = partner.svid(&id_in("partner.example", "shop/web"));
    let mut bundles = BundleSet::new(1);
    let domains = [("mesh.local", &sidecar.root), ("partner.example", &partner)];
    for (domain, root) in domains {
        bundles
            .insert(&domain.parse().unwrap(), vec![root.der().clone()])
            .unwrap();
    }
    let store = store_with(&sidecar.clock, svid, Trust::from_bundles(bundles));
    let reason = refused_as(&sidecar, &store).await;
    assert!(
        reason.contains("spiffe://partner.example/ns/shop/sa/web"),
        "{reason}"
    );

    let early = start() - Duration::from_secs(7200);
    let svid = sidecar
        .root
        .svid_of(&id("shop/web"), early, Duration::from_secs(1));
    let store = store_with(&sidecar.clock, svid, theirs);
    sidecar.clock.advance(Duration::from_secs(2));
    let reason = refused_as(&sidecar, &store).await;
    assert!(reason.starts_with("expired"), "{reason}");
    assert!(seen.all().is_empty());
}

#[tokio::test]
async fn a_caller_without_a_certificate_or_without_our_protocol_is_refused() {
    let (sidecar, seen) = shop().await;
    for (alpn, reason) in [(&b"sidegate/1"[..], "no_certificate"), (b"h2", "alpn")] {
        let mut config =
            rustls::ClientConfig::builder_with_provider(sidegate_mtls::crypto_provider())
                .with_protocol_versions(&[&rustls::version::TLS13])
                .unwrap()
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(Anybody))
                .with_no_client_auth();
        config.alpn_protocols = vec![alpn.to_vec()];
        let tcp = TcpStream::connect(sidecar.address).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let tls = soon(connector.connect("x.invalid".try_into().unwrap(), tcp)).await;
        if let Ok(mut tls) = tls {
            let mut byte = [0];
            assert!(
                !matches!(soon(tls.read(&mut byte)).await, Ok(1..)),
                "spoken to"
            );
        }
        let record = sidecar
            .record(|record| record.error == Some("tls_handshake"))
            .await;
        assert_eq!(record.reason.as_deref(), Some(reason));
    }
    assert!(seen.all().is_empty());
}

#[tokio::test]
async fn a_caller_that_expects_somebody_else_sends_nothing() {
    let (sidecar, _seen) = shop().await;
    let svid = sidecar.root.svid(&id("shop/web"));
    let store = store_with(&sidecar.clock, svid, trust(1, &[&sidecar.root], &[]));
    let tried = handshake(sidecar.address, &store, &sidecar.clock, &id("shop/ledger")).await;
    assert!(
        matches!(tried, Err(HandshakeError::Certificate { .. })),
        "{tried:?}"
    );
}

#[tokio::test]
async fn a_handshake_that_never_comes_is_ended_in_time() {
    let (sidecar, _seen) = shop().await;
    let mut silent = TcpStream::connect(sidecar.address).await.unwrap();
    silent.write_all(&[0x16]).await.unwrap();
    until(|| sidecar.shared.limits.handshakes.in_use() == 1).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    sidecar.clock.advance(Duration::from_secs(6));
    let mut byte = [0];
    assert_eq!(soon(silent.read(&mut byte)).await.unwrap_or(0), 0);
    let record = sidecar
        .record(|record| record.error == Some("tls_handshake"))
        .await;
    assert_eq!(record.reason.as_deref(), Some("handshake_timeout"));
    until(|| sidecar.shared.limits.handshakes.in_use() == 0).await;
}

#[tokio::test]
async fn connections_and_handshakes_beyond_their_bounds_are_closed() {
    let (address, _) = app::http().await;
    let setup = Setup::http(address, READERS)
        .with("limits: { inboundConnectionsMax: 2, inboundConnectionsPerPeerMax: 1 }\n");
    let sidecar = Sidecar::start(setup).await;
    let first = Peer::connect(&sidecar, "shop/web").await;
    assert_eq!(
        first.call(get("/orders/7")).await.unwrap().status,
        StatusCode::OK
    );
    let second = Peer::connect(&sidecar, "shop/web").await;
    assert!(
        second.call(get("/orders/7")).await.is_err(),
        "one peer has its share"
    );
    until(|| sidecar.shared.limits.inbound_connections.in_use() == 1).await;
    let _other = Peer::connect(&sidecar, "jobs/batch").await;
    let mut third = TcpStream::connect(sidecar.address).await.unwrap();
    let mut byte = [0];
    assert_eq!(
        soon(third.read(&mut byte)).await.unwrap_or(0),
        0,
        "closed at once"
    );
    let limits = &sidecar.shared.limits;
    assert_eq!(limits.inbound_connections.refused(), 1);
}

#[tokio::test]
async fn a_method_that_the_rule_does_not_name_is_denied() {
    let (sidecar, _seen) = shop().await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    let answer = peer
        .call(request(Method::DELETE, "/orders/7"))
        .await
        .unwrap();
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
}

/// Believes every server: the test is about the server's view of its client.
#[derive(Debug)]
struct Anybody;

impl rustls::client::danger::ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        sidegate_mtls::crypto_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}
