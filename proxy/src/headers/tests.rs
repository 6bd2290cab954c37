//! What a head may be, and what it becomes.

use bytes::Bytes;
use http::Response;
use http::header::LAST_MODIFIED;

use super::*;

const WEB: &str = "spiffe://mesh.local/ns/shop/sa/web";

fn parts(method: &str, target: &str, fields: &[(&str, &str)]) -> request::Parts {
    let mut request = Request::builder().method(method).uri(target);
    for (name, value) in fields {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap().into_parts().0
}

fn from_sidecar(fields: &[(&str, &str)]) -> Result<Head, RequestError> {
    let mut parts = parts("GET", "http://orders.shop/orders/7?q=1", fields);
    parts.version = Version::HTTP_2;
    sanitize(&mut parts, Sender::Sidecar, &WireLimits::default())
}

fn from_application(fields: &[(&str, &str)]) -> Result<Head, RequestError> {
    let mut parts = parts("GET", "/orders/7?q=1", fields);
    sanitize(&mut parts, Sender::Application, &WireLimits::default())
}

#[track_caller]
fn refused(result: Result<Head, RequestError>, reason: &str) {
    match result {
        Err(RequestError::BadRequest { reason: actual }) => assert_eq!(actual, reason),
        other => panic!("expected {reason}, got {other:?}"),
    }
}

#[test]
fn a_spoofed_identity_is_stripped_in_every_spelling() {
    let head = from_sidecar(&[
        (
            "x-forwarded-client-cert",
            "URI=spiffe://mesh.local/ns/a/sa/root",
        ),
        (
            "X_Forwarded_Client_Cert",
            "URI=spiffe://mesh.local/ns/a/sa/root",
        ),
        ("x-forwarded_client-cert", "x"),
        ("sidegate-client-id", "x"),
        ("sidegate_client_id", "x"),
        ("Sidegate-Anything", "x"),
        ("l5d-client-id", "x"),
        ("l5d_client_id", "x"),
        ("x-forwarded-client-certificate", "kept"),
        ("x-request-id", "kept"),
    ])
    .unwrap();
    let mut names: Vec<_> = head.headers.keys().map(HeaderName::as_str).collect();
    names.sort_unstable();
    assert_eq!(names, ["x-forwarded-client-certificate", "x-request-id"]);
}

#[test]
fn the_application_learns_the_caller_from_the_certificate_alone() {
    let head = from_sidecar(&[("sidegate-client-id", "spiffe://mesh.local/ns/a/sa/root")]);
    let request = head
        .unwrap()
        .to_application(Some(&WEB.parse().unwrap()))
        .unwrap();
    let of = |name: &HeaderName| {
        let values = request.headers().get_all(name).iter();
        values
            .map(|value| value.to_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(of(&CLIENT_ID), [WEB]);
    assert_eq!(of(&CLIENT_CERT), [format!("URI={WEB}")]);
}

#[test]
fn hop_by_hop_fields_and_what_connection_nominates_are_stripped() {
    let head = from_application(&[
        ("host", "orders.shop"),
        ("connection", "close, X-Secret"),
        ("connection", "content-type"),
        ("x-secret", "a"),
        ("content-type", "application/grpc"),
        ("keep-alive", "timeout=5"),
        ("proxy-connection", "keep-alive"),
        ("proxy-authorization", "Basic x"),
        ("upgrade", "h2c"),
        ("http2-settings", "x"),
        ("te", "gzip"),
        ("accept", "*/*"),
    ])
    .unwrap();
    let names: Vec<_> = head.headers.keys().map(HeaderName::as_str).collect();
    assert_eq!(names, ["accept"]);
    assert_eq!(head.kind, Kind::Http, "only what is forwarded decides");
    assert!(!head.te_trailers);
}

#[test]
fn nominating_our_own_headers_does_not_remove_what_we_add() {
    let head = from_application(&[
        ("host", "orders.shop"),
        (
            "connection",
            "x-forwarded-client-cert, sidegate-client-id, sidegate-protocol",
        ),
    ]);
    let mut head = head.unwrap();
    let request = head.to_application(Some(&WEB.parse().unwrap())).unwrap();
    let wire = head.to_wire(Some(8080)).unwrap();
    assert_eq!(wire.headers()[wire::PROTOCOL], "http/1.1");
    assert_eq!(wire.headers()[wire::PORT], "8080");
    assert_eq!(request.headers()[CLIENT_ID], WEB);
}

#[test]
fn the_authority_is_one_or_the_request_is_refused() {
    let head = from_sidecar(&[("host", "ORDERS.shop:80")]).unwrap();
    assert_eq!(head.authority.unwrap().to_string(), "orders.shop");
    refused(from_sidecar(&[("host", "ledger.shop")]), "host_mismatch");
    refused(
        from_sidecar(&[("host", "orders.shop"), ("host", "orders.shop")]),
        "host_repeated",
    );
    refused(from_application(&[]), "host_missing");
    refused(
        from_application(&[("host", "a@orders.shop")]),
        "authority_user_info",
    );
    refused(
        from_application(&[("host", "orders.shop, ledger.shop")]),
        "authority_list",
    );
    refused(from_application(&[("host", "")]), "authority_empty");
}

#[test]
fn http_1_0_needs_no_host() {
    let mut parts = parts("GET", "/", &[]);
    parts.version = Version::HTTP_10;
    let head = sanitize(&mut parts, Sender::Application, &WireLimits::default()).unwrap();
    assert_eq!((head.authority, head.spoken), (None, Spoken::Http10));
}

#[test]
fn the_path_forwarded_is_the_path_authorized() {
    let head = |target: &str| {
        let mut parts = parts("GET", target, &[("host", "orders.shop")]);
        sanitize(&mut parts, Sender::Application, &WireLimits::default())
    };
    let request = head("/%6Frders/%7Euser?x=%2f..")
        .unwrap()
        .to_application(None)
        .unwrap();
    assert_eq!(request.uri(), "/orders/~user?x=%2f..");
    for (target, reason) in [
        ("/a/../admin", "path_dot_segment"),
        ("/a/%2e%2e/admin", "path_dot_segment"),
        ("/a%2fadmin", "path_encoded_slash"),
        ("/a%5cadmin", "path_backslash"),
        ("/a;x/b", "path_parameter"),
        ("//admin", "path_empty_segment"),
        ("/%zz", "path_percent_encoding"),
        ("/%00", "path_encoded_control"),
        ("/%252e", "path_double_encoding"),
    ] {
        refused(head(target), reason);
    }
}

#[test]
fn lengths_that_two_servers_could_read_in_two_ways_are_refused() {
    let twice = [("content-length", "1"), ("content-length", "1")];
    refused(from_sidecar(&twice), "content_length_repeated");
    refused(from_sidecar(&[("content-length", "+1")]), "content_length");
    refused(
        from_sidecar(&[("content-length", "1, 1")]),
        "content_length",
    );
}

#[test]
fn a_websocket_is_a_get_on_both_sides_and_an_extended_connect_between() {
    let head = from_application(&[
        ("host", "orders.shop"),
        ("connection", "keep-alive, Upgrade"),
        ("upgrade", "WebSocket"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("sec-websocket-protocol", "chat"),
    ]);
    let wire = head.unwrap().to_wire(None).unwrap();
    assert_eq!(wire.method(), Method::CONNECT);
    assert_eq!(
        wire.extensions()
            .get::<h2::ext::Protocol>()
            .unwrap()
            .as_str(),
        "websocket"
    );
    assert!(!wire.headers().contains_key(CONNECTION) && !wire.headers().contains_key(UPGRADE));
    let head = sanitize(
        &mut wire.into_parts().0,
        Sender::Sidecar,
        &WireLimits::default(),
    )
    .unwrap();
    assert_eq!((head.kind, &head.method), (Kind::WebSocket, &Method::GET));
    let request = head.to_application(None).unwrap();
    assert_eq!(
        (request.method(), request.version()),
        (&Method::GET, Version::HTTP_11)
    );
    assert_eq!(request.headers()[UPGRADE], "websocket");
    assert_eq!(request.headers()[CONNECTION], "upgrade");
    assert_eq!(
        request.headers()[SEC_WEBSOCKET_KEY],
        "dGhlIHNhbXBsZSBub25jZQ=="
    );
    assert_eq!(request.uri(), "/orders/7?q=1");
}

#[test]
fn an_upgrade_with_a_body_in_front_of_it_is_refused() {
    let upgrade = [
        ("host", "a"),
        ("connection", "upgrade"),
        ("upgrade", "websocket"),
    ];
    for body in [("content-length", "3"), ("transfer-encoding", "chunked")] {
        let fields = [&upgrade[..], &[body]].concat();
        refused(from_application(&fields), "upgrade_with_body");
    }
}

#[test]
fn connect_is_refused_and_so_is_any_other_protocol() {
    let mut plain = parts("CONNECT", "orders.shop:80", &[]);
    plain.version = Version::HTTP_11;
    let plain = sanitize(&mut plain, Sender::Application, &WireLimits::default());
    assert_eq!(
        plain.unwrap_err(),
        RequestError::NotCarried { reason: "connect" }
    );
    let mut other = parts("CONNECT", "http://orders.shop/", &[]);
    other
        .extensions
        .insert(h2::ext::Protocol::from_static("connect-udp"));
    let other = sanitize(&mut other, Sender::Sidecar, &WireLimits::default());
    assert_eq!(
        other.unwrap_err(),
        RequestError::NotCarried { reason: "upgrade" }
    );
}

#[test]
fn a_grpc_call_has_a_grpc_path() {
    let call = |target: &str, content_type: &str| {
        let fields = [
            ("content-type", content_type),
            ("host", "a"),
            ("te", "trailers"),
        ];
        let mut parts = parts("POST", target, &fields);
        sanitize(&mut parts, Sender::Application, &WireLimits::default())
    };
    assert!(
        call("/shop.v1.Orders/Get", "application/grpc")
            .unwrap()
            .is_grpc()
    );
    assert!(
        call("/shop.v1.Orders/Get", "application/grpc+proto")
            .unwrap()
            .is_grpc()
    );
    assert!(
        !call("/shop.v1.Orders/Get", "application/grpc-web")
            .unwrap()
            .is_grpc()
    );
    assert!(
        call("/shop.v1.Orders/Get", "application/grpc")
            .unwrap()
            .te_trailers
    );
    refused(
        call("/shop.v1.Orders/Get/x", "application/grpc"),
        "grpc_path",
    );
    refused(call("/shop.v1.Orders", "application/GRPC"), "grpc_path");
}

#[test]
fn te_goes_to_an_application_only_when_its_caller_said_so() {
    let head = from_sidecar(&[("sidegate-protocol", "http/1.1")]).unwrap();
    assert!(
        !head
            .to_application(None)
            .unwrap()
            .headers()
            .contains_key(TE)
    );
    let head = from_sidecar(&[("sidegate-protocol", "http/1.1"), ("te", "trailers")]).unwrap();
    let request = head.to_application(None).unwrap();
    assert_eq!(request.headers()[TE], "trailers");
    assert_eq!(request.headers()[CONNECTION], "te");
}

#[test]
fn a_peer_speaks_in_values_that_are_known() {
    refused(
        from_sidecar(&[("sidegate-protocol", "spdy")]),
        "sidegate_protocol",
    );
    refused(from_sidecar(&[("sidegate-port", "0")]), "sidegate_port");
    refused(from_sidecar(&[("sidegate-port", "+80")]), "sidegate_port");
    refused(
        from_sidecar(&[("sidegate-port", "80"), ("sidegate-port", "81")]),
        "header_repeated",
    );
    assert_eq!(
        from_sidecar(&[("sidegate-port", "80")]).unwrap().port,
        Some(80)
    );
    let head = from_application(&[("host", "a"), ("sidegate-port", "80")]).unwrap();
    assert_eq!(
        (head.port, head.spoken),
        (None, Spoken::Http11),
        "an application does not"
    );
}

#[test]
fn too_many_fields_are_one_field_too_many() {
    let fields: Vec<_> = (0..101).map(|n| (format!("x-{n}"), "v")).collect();
    let fields: Vec<_> = fields
        .iter()
        .map(|(name, value)| (name.as_str(), *value))
        .collect();
    assert!(from_sidecar(&fields[..100]).is_ok());
    assert_eq!(
        from_sidecar(&fields).unwrap_err(),
        RequestError::HeaderListTooLarge
    );
}

#[test]
fn an_applications_response_cannot_pass_for_a_sidecars() {
    let response = |sender| {
        let response = Response::builder()
            .header("sidegate-error", "denied")
            .header("sidegate_decision", "1")
            .header("sidegate-decision", "1")
            .header("connection", "x-hop")
            .header("x-hop", "1")
            .header("transfer-encoding", "chunked")
            .header("etag", "kept");
        let mut parts = response.body(()).unwrap().into_parts().0;
        sanitize_response(&mut parts, sender);
        parts
            .headers
            .keys()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
    };
    assert_eq!(response(Sender::Application), ["etag"]);
    let mut kept = response(Sender::Sidecar);
    kept.sort();
    assert_eq!(kept, ["etag", "sidegate-decision", "sidegate-error"]);
}

#[test]
fn trailers_carry_neither_identity_nor_framing() {
    let mut trailers = HeaderMap::new();
    for name in [
        "grpc-status",
        "x-forwarded-client-cert",
        "l5d_x",
        "content-length",
        "host",
    ] {
        trailers.insert(HeaderName::from_static(name), HeaderValue::from_static("0"));
    }
    sanitize_trailers(&mut trailers, Sender::Application);
    assert_eq!(trailers.keys().collect::<Vec<_>>(), ["grpc-status"]);
}

#[test]
fn a_key_made_here_is_16_bytes_in_base64() {
    let key = websocket_key();
    assert_eq!(key.len(), 24);
    assert!(key.as_bytes().ends_with(b"=="));
    assert!(b"AQgw".contains(&key.as_bytes()[21]));
    assert_ne!(key, websocket_key());
}

#[test]
fn a_target_of_another_scheme_is_refused() {
    let of = |target: &str| {
        let mut parts = parts("GET", target, &[]);
        sanitize(&mut parts, Sender::Application, &WireLimits::default())
    };
    refused(of("ftp://orders.shop/orders/7"), "target_scheme");
    assert!(of("http://orders.shop/orders/7").is_ok());
    assert!(
        of("https://orders.shop/orders/7").is_ok(),
        "gRPC clients say so over plaintext"
    );
}

#[test]
fn a_method_in_small_letters_is_refused_however_it_came() {
    for (version, sender) in [
        (Version::HTTP_2, Sender::Application),
        (Version::HTTP_2, Sender::Sidecar),
        (Version::HTTP_11, Sender::Application),
    ] {
        for method in ["get", "Get", "deletE"] {
            let mut parts = parts(method, "http://orders.shop/orders/7", &[]);
            parts.version = version;
            refused(
                sanitize(&mut parts, sender, &WireLimits::default()),
                "method",
            );
        }
        let mut parts = parts("PROP-FIND", "http://orders.shop/orders/7", &[]);
        parts.version = version;
        assert!(sanitize(&mut parts, sender, &WireLimits::default()).is_ok());
    }
}

/// A field whose value lies in a larger buffer, as hyper's do, and that buffer.
fn field_in_a_buffer() -> (HeaderMap, Bytes) {
    let buffer = Bytes::from(vec![b'v'; 8 * 1024]);
    let mut value = HeaderValue::from_maybe_shared(buffer.slice(..16)).unwrap();
    value.set_sensitive(true);
    (HeaderMap::from_iter([(LAST_MODIFIED, value)]), buffer)
}

#[test]
fn a_value_is_kept_without_the_buffer_it_was_read_into() {
    let (headers, buffer) = field_in_a_buffer();
    let mut request = parts("GET", "/", &[("host", "orders.shop")]);
    request.headers.extend(headers);
    let head = sanitize(&mut request, Sender::Application, &WireLimits::default()).unwrap();
    assert_eq!(head.headers[LAST_MODIFIED], "v".repeat(16));
    assert!(head.headers[LAST_MODIFIED].is_sensitive());
    assert!(buffer.try_into_mut().is_ok(), "a request holds its buffer");

    let (headers, buffer) = field_in_a_buffer();
    let mut response = Response::new(()).into_parts().0;
    response.headers = headers;
    sanitize_response(&mut response, Sender::Application);
    assert_eq!(response.headers[LAST_MODIFIED], "v".repeat(16));
    assert!(buffer.try_into_mut().is_ok(), "a response holds its buffer");
}
