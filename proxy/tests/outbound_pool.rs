//! Connections to other sidecars: when they are shared, made, left and cut.

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
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{RecvStream, SendStream};
use http::{Request, Response, StatusCode};
use sidegate_mesh::ManualClock;
use sidegate_proxy::wire::WireLimits;
use support::{Mesh, Peer, Web, handler, id, orders, read_all, says, send_all, soon};
use tokio::sync::Notify;

/// Answers the head at once and ends the body when told.
fn holding(release: &Arc<Notify>) -> support::Handler {
    let release = Arc::clone(release);
    handler(move |_request, mut respond| {
        let release = Arc::clone(&release);
        async move {
            let mut stream = respond.send_response(Response::new(()), false).unwrap();
            release.notified().await;
            stream.send_data(Bytes::from("done"), true).unwrap();
        }
    })
}

async fn get(h2: &mut SendRequest<Bytes>) -> (StatusCode, RecvStream) {
    let request = Request::get("http://orders.shop/").body(()).unwrap();
    let (response, _) = h2.send_request(request, true).unwrap();
    let response = soon(response).await.unwrap();
    (response.status(), response.into_body())
}

fn limits(streams_max: u32) -> WireLimits {
    WireLimits {
        streams_max,
        ..WireLimits::default()
    }
}

#[tokio::test]
async fn streams_share_a_connection_up_to_what_the_peer_allows() {
    let mesh = Mesh::new();
    let release = Arc::new(Notify::new());
    let peer = Peer::with(&mesh, "orders", limits(2), holding(&release)).await;
    let web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut h2 = web.h2().await;
    // The first tells the peer's settings.
    let mut bodies = vec![get(&mut h2).await.1];
    bodies.push(get(&mut h2).await.1);
    assert_eq!(peer.accepted(), 1);
    bodies.push(get(&mut h2).await.1);
    assert_eq!(
        peer.accepted(),
        2,
        "a third stream needs a second connection"
    );
    release.notify_waiters();
    for body in bodies {
        assert_eq!(soon(read_all(body)).await.unwrap().0, "done");
    }
}

#[tokio::test]
async fn connections_and_those_who_wait_are_bounded() {
    let mesh = Mesh::new();
    let release = Arc::new(Notify::new());
    let peer = Peer::with(&mesh, "orders", limits(1), holding(&release)).await;
    let bounds = "upstreamConnectionsPerEndpointMax: 1, upstreamWaitersMax: 1";
    let mut web = Web::with(&mesh, &orders(&[&peer], ""), bounds).await;
    let mut h2 = web.h2().await;
    let (_, first) = get(&mut h2).await;
    let request = || Request::get("http://orders.shop/").body(()).unwrap();
    let (second, _) = h2.send_request(request(), true).unwrap();
    while web.shared.limits.upstream_waiters.in_use() == 0 {
        tokio::task::yield_now().await;
    }
    let (status, refused) = get(&mut h2).await;
    assert_eq!(status, 503);
    assert!(
        read_all(refused)
            .await
            .unwrap()
            .0
            .starts_with(b"{\"error\":\"overloaded\"")
    );
    let record = web.record().await;
    assert_eq!(
        (record.error, record.reason.as_deref()),
        (Some("overloaded"), Some("upstreamWaitersMax"))
    );
    assert_eq!(web.shared.limits.upstream_waiters.refused(), 1);
    release.notify_waiters();
    assert_eq!(soon(read_all(first)).await.unwrap().0, "done");
    let second = soon(second).await.unwrap();
    release.notify_waiters();
    assert_eq!(soon(read_all(second.into_body())).await.unwrap().0, "done");
    assert_eq!(peer.accepted(), 1);
    assert_eq!(web.shared.limits.upstream_waiters.in_use(), 0);
}

#[tokio::test]
async fn the_processes_bound_on_connections_holds() {
    let mesh = Mesh::new();
    let release = Arc::new(Notify::new());
    let first = Peer::start(&mesh, "orders", holding(&release)).await;
    let other = Peer::start(&mesh, "other", says("ok")).await;
    let resources = orders(&[&first], "")
        + &support::service(
            "other",
            "[{ name: http, port: 80, protocol: http }]",
            &[&other],
        );
    let mut web = Web::with(&mesh, &resources, "upstreamConnectionsMax: 1").await;
    let mut h2 = web.h2().await;
    let (_, body) = get(&mut h2).await;
    let got = web.client().await.get("other.shop", "/").await;
    assert_eq!(got.status, 503);
    assert_eq!(
        web.record().await.reason.as_deref(),
        Some("upstreamConnectionsMax")
    );
    release.notify_waiters();
    assert_eq!(soon(read_all(body)).await.unwrap().0, "done");
}

#[tokio::test]
async fn an_idle_connection_is_closed_and_its_permit_given_back() {
    let mesh = Mesh::new();
    let peer = Peer::start(&mesh, "orders", says("ok")).await;
    let web = Web::with(&mesh, &orders(&[&peer], ""), "poolIdleTimeout: 100ms").await;
    assert_eq!(
        web.client().await.get("orders.shop", "/").await.text(),
        "ok"
    );
    peer.until_open(0).await;
    while web.shared.limits.upstream_connections.in_use() > 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(web.outbound.pool().connections(), 0);
    assert_eq!(
        web.client().await.get("orders.shop", "/").await.text(),
        "ok"
    );
    assert_eq!(peer.accepted(), 2);
}

#[tokio::test]
async fn a_connection_that_goes_away_finishes_what_runs_and_begins_nothing() {
    let mesh = Mesh::new();
    let release = Arc::new(Notify::new());
    let peer = Peer::start(&mesh, "orders", holding(&release)).await;
    let web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut h2 = web.h2().await;
    let (_, before) = get(&mut h2).await;
    peer.send_go_away();
    // Whether or not the GOAWAY is here already, the next call succeeds, on a new connection in the
    // end.
    let mut after = Vec::new();
    while peer.accepted() == 1 {
        after.push(get(&mut h2).await.1);
    }
    release.notify_waiters();
    assert_eq!(soon(read_all(before)).await.unwrap().0, "done");
    for body in after {
        assert_eq!(soon(read_all(body)).await.unwrap().0, "done");
    }
    peer.until_open(1).await;
}

#[tokio::test]
async fn new_credentials_get_new_connections_and_the_old_ones_finish() {
    let mesh = Mesh::new();
    let release = Arc::new(Notify::new());
    let peer = Peer::start(&mesh, "orders", holding(&release)).await;
    let web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut h2 = web.h2().await;
    let (_, old) = get(&mut h2).await;
    let svid = mesh.svid(&id("web"), Duration::from_hours(1));
    web.shared.credentials.publish_svid(svid).unwrap();
    let (status, new) = get(&mut h2).await;
    assert_eq!((status.as_u16(), peer.accepted()), (200, 2));
    release.notify_waiters();
    assert_eq!(soon(read_all(old)).await.unwrap().0, "done");
    assert_eq!(soon(read_all(new)).await.unwrap().0, "done");
    peer.until_open(1).await;
}

#[tokio::test]
async fn a_peer_that_is_revoked_is_cut_off_at_once() {
    let mesh = Mesh::new();
    let release = Arc::new(Notify::new());
    let peer = Peer::start(&mesh, "orders", holding(&release)).await;
    let mut web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut h2 = web.h2().await;
    let (_, body) = get(&mut h2).await;
    web.shared
        .credentials
        .publish_trust(mesh.trust(2, &[id("orders")]))
        .unwrap();
    assert!(soon(read_all(body)).await.is_err());
    let record = web.record().await;
    assert_eq!(
        (record.error, record.reason.as_deref()),
        (Some("certificate_ended"), Some("revoked"))
    );
    peer.until_open(0).await;
    let (status, _) = get(&mut h2).await;
    assert_eq!(status, 502, "and it is not believed again");
    let record = web.record().await;
    assert_eq!(
        (record.error, record.reason.as_deref()),
        (Some("upstream_identity"), Some("revoked"))
    );
    assert_eq!(peer.streams(), 1);
}

#[tokio::test]
async fn a_connection_ends_with_the_earlier_certificate() {
    let clock = ManualClock::new(SystemTime::UNIX_EPOCH + Duration::from_hours(500_000));
    let mesh = Mesh::with_clock(Arc::new(clock.clone()));
    let release = Arc::new(Notify::new());
    let store = mesh.store(&id("orders"), Duration::from_mins(10));
    let peer = Peer::with_store(
        &mesh,
        Arc::clone(&store),
        WireLimits::default(),
        holding(&release),
    )
    .await;
    let mut web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut h2 = web.h2().await;
    let (_, body) = get(&mut h2).await;
    // A drain's length (5 s) before the end it takes nothing new.
    clock.advance(Duration::from_secs(595));
    store
        .publish_svid(mesh.svid(&id("orders"), Duration::from_hours(1)))
        .unwrap();
    let mut later = Vec::new();
    while peer.accepted() == 1 {
        later.push(get(&mut h2).await.1);
        tokio::task::yield_now().await;
    }
    clock.advance(Duration::from_secs(5));
    assert!(soon(read_all(body)).await.is_err(), "cut at its end");
    let record = web.record().await;
    assert_eq!(
        (record.error, record.reason.as_deref()),
        (Some("certificate_ended"), Some("expired"))
    );
    peer.until_open(1).await;
    release.notify_waiters();
    drop(later);
}

#[tokio::test]
async fn another_identity_at_the_address_gets_nothing() {
    let mesh = Mesh::new();
    let peer = Peer::start(&mesh, "intruder", says("no")).await;
    let impostor = Peer {
        id: id("orders"),
        ..peer
    };
    let mut web = Web::start(&mesh, &orders(&[&impostor], "")).await;
    let got = web.client().await.get("orders.shop", "/").await;
    assert_eq!(
        (got.status, got.header("sidegate-error")),
        (502, Some("upstream_identity"))
    );
    assert_eq!(
        web.record().await.reason.as_deref(),
        Some("unexpected_identity")
    );
    assert_eq!(impostor.streams(), 0);
    let failures = "sidegate_tls_handshake_failures_total\
                    {direction=\"outbound\",reason=\"unexpected_identity\"} 1";
    assert!(web.counts(failures));
}

#[tokio::test]
async fn strangers_that_stall_in_their_handshakes_keep_no_call_from_going_out() {
    let mesh = Mesh::new();
    let peer = Peer::start(&mesh, "orders", says("ok")).await;
    let web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let limits = &web.shared.limits;
    let stalled: Vec<_> = std::iter::from_fn(|| limits.handshakes.try_acquire()).collect();
    assert!(!stalled.is_empty());
    let got = web.client().await.get("orders.shop", "/").await;
    assert_eq!((got.status, got.text()), (200, "ok"));
}

#[tokio::test]
async fn thousands_of_streams_may_each_hold_an_unread_message() {
    const STREAMS: usize = 4_000;
    let mesh = Mesh::new();
    let answer = handler(|request, mut respond| async move {
        let mut stream = respond.send_response(Response::new(()), false).unwrap();
        stream
            .send_data(Bytes::from_static(b"8 bytes."), false)
            .unwrap();
        drop(read_all(request.into_body()).await);
        send_all(&mut stream, b"end", true).await;
    });
    let peer = Peer::with(&mesh, "orders", limits(10_000), answer).await;
    let bounds = "upstreamConnectionsPerEndpointMax: 1, streamsPerConnectionMax: 10000";
    let web = Web::with(&mesh, &orders(&[&peer], ""), bounds).await;
    let mut h2 = web.h2().await;
    let mut calls: Vec<(RecvStream, SendStream<Bytes>)> = Vec::new();
    for _ in 0..STREAMS {
        let request = Request::post("http://orders.shop/").body(()).unwrap();
        let mut ready = soon(h2.ready()).await.unwrap();
        let (response, stream) = ready.send_request(request, false).unwrap();
        h2 = ready;
        // The first message of each stays unread, here and so in the sidecar.
        calls.push((soon(response).await.unwrap().into_body(), stream));
    }
    assert_eq!((peer.accepted(), peer.streams()), (1, STREAMS));
    for (body, mut stream) in calls {
        stream.send_data(Bytes::new(), true).unwrap();
        assert_eq!(soon(read_all(body)).await.unwrap().0, "8 bytes.end");
    }
    assert_eq!(peer.accepted(), 1, "the connection lived through it");
}
