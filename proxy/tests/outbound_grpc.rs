//! gRPC from an application, through the outbound half, to a peer that speaks the wire.

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
use h2::Reason;
use http::{HeaderMap, Request, Response};
use sidegate_mesh::access_log::Protocol;
use sidegate_mesh::{Clock, ManualClock};
use support::{Mesh, Peer, Web, handler, orders, read_all, reply, reset_of, soon, traffic};
use tokio::sync::{Notify, mpsc};

fn call(path: &str) -> http::request::Builder {
    Request::post(format!("http://orders.shop{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
}

fn status(code: &str) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", code.parse().unwrap());
    trailers
}

#[tokio::test]
async fn a_bidirectional_call_passes_messages_as_they_come_and_its_status() {
    let mesh = Mesh::new();
    let answer = handler(|request, mut respond| async move {
        let head = Response::builder()
            .header("content-type", "application/grpc")
            .body(())
            .unwrap();
        let mut stream = respond.send_response(head, false).unwrap();
        let mut body = request.into_body();
        while let Some(data) = body.data().await {
            let data = data.unwrap();
            body.flow_control().release_capacity(data.len()).unwrap();
            stream.send_data(data, false).unwrap();
        }
        let mut trailers = status("5");
        trailers.insert("grpc-message", "gone".parse().unwrap());
        stream.send_trailers(trailers).unwrap();
    });
    let peer = Peer::start(&mesh, "orders", answer).await;
    let mut web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut h2 = web.h2().await;
    let (response, mut stream) = h2
        .send_request(call("/a.B/C").body(()).unwrap(), false)
        .unwrap();
    let mut body = soon(response).await.unwrap().into_body();
    for message in ["one", "two", "three"] {
        stream.send_data(Bytes::from(message), false).unwrap();
        assert_eq!(soon(body.data()).await.unwrap().unwrap(), message);
    }
    stream.send_data(Bytes::new(), true).unwrap();
    assert!(soon(body.data()).await.is_none());
    assert_eq!(
        soon(body.trailers()).await.unwrap().unwrap()["grpc-status"],
        "5"
    );
    let record = web.record().await;
    assert_eq!(record.protocol, Protocol::Grpc);
    assert_eq!(
        (
            record.grpc_service.as_deref(),
            record.grpc_method.as_deref()
        ),
        (Some("a.B"), Some("C"))
    );
    assert_eq!(
        (record.grpc_status, record.grpc_message.as_deref()),
        (Some(5), Some("gone"))
    );
    assert_eq!((record.request_bytes, record.response_bytes), (11, 11));
}

#[tokio::test]
async fn a_trailers_only_answer_passes_as_one() {
    let mesh = Mesh::new();
    let answer = handler(|_request, mut respond| async move {
        let head = Response::builder()
            .header("content-type", "application/grpc")
            .header("grpc-status", "12")
            .body("")
            .unwrap();
        reply(&mut respond, head);
    });
    let peer = Peer::start(&mesh, "orders", answer).await;
    let mut web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut h2 = web.h2().await;
    let (response, _) = h2
        .send_request(call("/a.B/C").body(()).unwrap(), true)
        .unwrap();
    let response = soon(response).await.unwrap();
    assert_eq!(response.headers()["grpc-status"], "12");
    assert!(response.body().is_end_stream());
    assert_eq!(web.record().await.grpc_status, Some(12));
}

#[tokio::test]
async fn a_failure_made_here_is_a_grpc_status_with_http_200() {
    let mesh = Mesh::new();
    let mut web = Web::start(&mesh, "").await;
    let mut h2 = web.h2().await;
    let (response, _) = h2
        .send_request(call("/a.B/C").body(()).unwrap(), true)
        .unwrap();
    let response = soon(response).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "application/grpc");
    assert_eq!(response.headers()["grpc-status"], "14");
    assert_eq!(response.headers()["sidegate-error"], "destination_unknown");
    assert!(response.body().is_end_stream());
    let record = web.record().await;
    assert_eq!(
        (record.grpc_status, record.error),
        (Some(14), Some("destination_unknown"))
    );
}

/// A peer that notes `grpc-timeout`, answers a head on demand, and tells how its stream was reset.
struct Waiting {
    heads: mpsc::UnboundedReceiver<String>,
    resets: mpsc::UnboundedReceiver<Reason>,
    peer: Peer,
}

async fn waiting(mesh: &Mesh, with_head: bool) -> Waiting {
    let (heads, told) = mpsc::unbounded_channel();
    let (resets, reset) = mpsc::unbounded_channel();
    let answer = handler(move |request: Request<_>, mut respond| {
        let (heads, resets) = (heads.clone(), resets.clone());
        async move {
            let left = request
                .headers()
                .get("grpc-timeout")
                .map(|left| left.to_str().unwrap().to_owned());
            heads.send(left.unwrap_or_default()).unwrap();
            let reason = if with_head {
                let mut stream = respond.send_response(Response::new(()), false).unwrap();
                stream.send_data(Bytes::from("m"), false).unwrap();
                std::future::poll_fn(|cx| stream.poll_reset(cx))
                    .await
                    .unwrap()
            } else {
                reset_of(&mut respond).await
            };
            resets.send(reason).unwrap();
        }
    });
    Waiting {
        heads: told,
        resets: reset,
        peer: Peer::start(mesh, "orders", answer).await,
    }
}

fn manual() -> (Mesh, ManualClock) {
    let clock = ManualClock::new(SystemTime::UNIX_EPOCH + Duration::from_hours(500_000));
    (Mesh::with_clock(Arc::new(clock.clone())), clock)
}

#[tokio::test]
async fn a_deadline_is_passed_on_and_ends_the_call_where_it_waits() {
    let (mesh, clock) = manual();
    let mut peer = waiting(&mesh, false).await;
    let mut web = Web::start(&mesh, &orders(&[&peer.peer], "")).await;
    let mut h2 = web.h2().await;
    let request = call("/a.B/C")
        .header("grpc-timeout", "2S")
        .body(())
        .unwrap();
    let (response, _stream) = h2.send_request(request, false).unwrap();
    assert_eq!(soon(peer.heads.recv()).await.unwrap(), "2000000u");
    clock.advance(Duration::from_millis(1999));
    assert!(peer.resets.try_recv().is_err());
    clock.advance(Duration::from_millis(1));
    let response = soon(response).await.unwrap();
    assert_eq!(
        (
            response.status().as_u16(),
            &response.headers()["grpc-status"]
        ),
        (200, &"4".parse().unwrap())
    );
    assert_eq!(soon(peer.resets.recv()).await, Some(Reason::CANCEL));
    let record = web.record().await;
    assert_eq!(
        (record.error, record.grpc_status),
        (Some("timeout"), Some(4))
    );
}

#[tokio::test]
async fn what_is_passed_on_is_what_is_left() {
    let (mesh, clock) = manual();
    let (sent, mut heads) = mpsc::unbounded_channel();
    let (hold, asked) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let answer = {
        let (hold, asked) = (Arc::clone(&hold), Arc::clone(&asked));
        handler(
            move |request: Request<_>, mut respond: h2::server::SendResponse<Bytes>| {
                let (sent, hold, asked) = (sent.clone(), Arc::clone(&hold), Arc::clone(&asked));
                async move {
                    sent.send(request.headers()["grpc-timeout"].clone())
                        .unwrap();
                    asked.notify_one();
                    hold.notified().await;
                    respond.send_reset(Reason::REFUSED_STREAM);
                }
            },
        )
    };
    let peer = Peer::start(&mesh, "orders", answer).await;
    let web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut h2 = web.h2().await;
    let request = call("/a.B/C")
        .header("grpc-timeout", "10S")
        .body(())
        .unwrap();
    let (_response, _) = h2.send_request(request, true).unwrap();
    assert_eq!(soon(heads.recv()).await.unwrap(), "10000000u");
    soon(asked.notified()).await;
    clock.advance(Duration::from_secs(4));
    hold.notify_one();
    assert_eq!(
        soon(heads.recv()).await.unwrap(),
        "6000000u",
        "the second try has less time"
    );
}

#[tokio::test]
async fn a_deadline_after_the_head_ends_in_trailers() {
    let (mesh, clock) = manual();
    let mut peer = waiting(&mesh, true).await;
    let mut web = Web::start(&mesh, &orders(&[&peer.peer], "")).await;
    let mut h2 = web.h2().await;
    let request = call("/a.B/C")
        .header("grpc-timeout", "1S")
        .body(())
        .unwrap();
    let (response, _stream) = h2.send_request(request, false).unwrap();
    let mut body = soon(response).await.unwrap().into_body();
    assert_eq!(soon(body.data()).await.unwrap().unwrap(), "m");
    clock.advance(Duration::from_secs(1));
    assert!(soon(body.data()).await.is_none());
    let trailers = soon(body.trailers()).await.unwrap().unwrap();
    assert_eq!(trailers["grpc-status"], "4");
    assert_eq!(trailers["sidegate-error"], "timeout");
    assert_eq!(soon(peer.resets.recv()).await, Some(Reason::CANCEL));
    let record = web.record().await;
    assert_eq!(
        (record.error, record.grpc_status),
        (Some("timeout"), Some(4))
    );
}

#[tokio::test]
async fn a_services_timeout_is_deadline_exceeded_too() {
    let (mesh, clock) = manual();
    let mut peer = waiting(&mesh, false).await;
    let resources = orders(&[&peer.peer], &traffic("orders", "  timeout: 3s"));
    let mut web = Web::start(&mesh, &resources).await;
    let mut h2 = web.h2().await;
    let (response, _) = h2
        .send_request(call("/a.B/C").body(()).unwrap(), true)
        .unwrap();
    assert_eq!(
        soon(peer.heads.recv()).await.unwrap(),
        "",
        "none was asked for, none is passed on"
    );
    clock.advance(Duration::from_secs(3));
    assert_eq!(soon(response).await.unwrap().headers()["grpc-status"], "4");
    assert_eq!(soon(peer.resets.recv()).await, Some(Reason::CANCEL));
    assert_eq!(web.record().await.error, Some("timeout"));
}

#[tokio::test]
async fn a_cancelled_stream_is_cancelled_at_the_peer_after_its_head() {
    let mesh = Mesh::new();
    let mut peer = waiting(&mesh, true).await;
    let mut web = Web::start(&mesh, &orders(&[&peer.peer], "")).await;
    let mut h2 = web.h2().await;
    let (response, mut stream) = h2
        .send_request(call("/a.B/C").body(()).unwrap(), false)
        .unwrap();
    let mut body = soon(response).await.unwrap().into_body();
    assert_eq!(soon(body.data()).await.unwrap().unwrap(), "m");
    stream.send_reset(Reason::CANCEL);
    assert_eq!(soon(peer.resets.recv()).await, Some(Reason::CANCEL));
    assert_eq!(web.record().await.error, Some("peer_reset"));
}

#[tokio::test]
async fn a_peers_cancel_reaches_the_caller_as_one() {
    let mesh = Mesh::new();
    let answer = handler(|request: Request<_>, mut respond| async move {
        let mut stream = respond.send_response(Response::new(()), false).unwrap();
        stream.send_data(Bytes::from("m"), false).unwrap();
        drop(read_all(request.into_body()).await);
        stream.send_reset(Reason::CANCEL);
    });
    let peer = Peer::start(&mesh, "orders", answer).await;
    let web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut h2 = web.h2().await;
    let (response, mut stream) = h2
        .send_request(call("/a.B/C").body(()).unwrap(), false)
        .unwrap();
    let mut body = soon(response).await.unwrap().into_body();
    assert_eq!(soon(body.data()).await.unwrap().unwrap(), "m");
    stream.send_data(Bytes::new(), true).unwrap();
    let failed = soon(body.data()).await.unwrap().unwrap_err();
    assert_eq!(failed.reason(), Some(Reason::CANCEL));
}

#[tokio::test]
async fn a_lost_connection_is_unavailable_and_not_an_end() {
    let mesh = Mesh::new();
    let peer = waiting(&mesh, true).await;
    let mut web = Web::start(&mesh, &orders(&[&peer.peer], "")).await;
    let mut h2 = web.h2().await;
    let (response, _stream) = h2
        .send_request(call("/a.B/C").body(()).unwrap(), false)
        .unwrap();
    let mut body = soon(response).await.unwrap().into_body();
    assert_eq!(soon(body.data()).await.unwrap().unwrap(), "m");
    peer.peer.kill().await;
    assert!(soon(body.data()).await.is_none());
    assert_eq!(
        soon(body.trailers()).await.unwrap().unwrap()["grpc-status"],
        "14"
    );
    let record = web.record().await;
    assert_eq!(
        (record.error, record.grpc_status),
        (Some("upstream_reset"), Some(14))
    );
}

#[tokio::test]
async fn a_clock_that_stands_still_times_nothing_out() {
    let (mesh, clock) = manual();
    let before = clock.now();
    let mut peer = waiting(&mesh, false).await;
    let web = Web::start(&mesh, &orders(&[&peer.peer], "")).await;
    let mut h2 = web.h2().await;
    let request = call("/a.B/C")
        .header("grpc-timeout", "1n")
        .body(())
        .unwrap();
    let (_response, _) = h2.send_request(request, true).unwrap();
    assert_eq!(
        soon(peer.heads.recv()).await.unwrap(),
        "1n",
        "never zero, never more"
    );
    assert_eq!(clock.now(), before);
}
