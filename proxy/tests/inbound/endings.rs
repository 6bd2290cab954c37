//! Ending what lives: a policy change, a revocation, a certificate's end, a drain.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use h2::{Reason, RecvStream};
use http::{Request, Response, StatusCode};
use sidegate_mesh::Verdict;
use sidegate_mesh::access_log::Protocol;
use sidegate_proxy::wire::{certificate_ended, policy_denied};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::app;
use crate::peers::{Peer, connect, get, grpc, next, post, read_all, reset_of, websocket, whole};
use crate::support::{
    HEALTH_ONLY, OPAQUE_FOR_NOBODY, READERS, Root, Setup, Sidecar, id, soon, start, store_with,
    trust, until,
};
use crate::tunnels::{opaque_setup, open};

/// Answers a head and goes on for ever; notes how its connection ends.
async fn endless(seen: &app::Seen, answer: &'static str) -> SocketAddr {
    let noted = seen.clone();
    app::raw(move |mut stream: TcpStream| {
        let seen = noted.clone();
        async move {
            app::read_until(&mut stream, "\r\n\r\n").await;
            // Fails where the call ends at this moment.
            drop(stream.write_all(answer.as_bytes()).await);
            seen.note("asked");
            seen.note(app::end_of(&mut stream).await);
        }
    })
    .await
}

const CHUNKED: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n";
const SWITCH: &str = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n\
upgrade: websocket\r\nsec-websocket-accept: x\r\n\r\n";

async fn shop(address: SocketAddr) -> (Sidecar, Peer) {
    let sidecar = Sidecar::start(Setup::http(address, READERS)).await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    (sidecar, peer)
}

async fn denied_in_the_record(sidecar: &Sidecar, protocol: Protocol) {
    let record = sidecar.record(|record| record.protocol == protocol).await;
    assert_eq!(record.decision, Some(Verdict::Deny));
    assert_eq!(record.reason.as_deref(), Some("denied by policy change"));
    assert_eq!(record.error, Some("denied_by_policy_change"));
    assert_eq!(record.snapshot, Some(2), "the snapshot that denies");
    assert!(record.decision_id.is_some());
}

#[tokio::test]
async fn a_policy_change_ends_an_http_1_answer_with_an_abort_on_both_sides() {
    let seen = app::Seen::default();
    let (sidecar, peer) = shop(endless(&seen, CHUNKED).await).await;
    let (response, _stream) = peer.begin(get("/orders/7"), true).await.unwrap();
    let mut recv = soon(response).await.unwrap().into_body();
    assert_eq!(next(&mut recv).await.unwrap().unwrap(), "ok");
    sidecar.publish(HEALTH_ONLY);
    let error = next(&mut recv).await.unwrap_err();
    assert_eq!(error.reason(), Some(policy_denied()));
    until(|| seen.all().len() == 2).await;
    assert_eq!(
        seen.all()[1],
        "connection reset",
        "an abort, never a clean end"
    );
    denied_in_the_record(&sidecar, Protocol::Http1).await;
}

#[tokio::test]
async fn a_policy_change_before_the_head_is_a_403() {
    let seen = app::Seen::default();
    let (sidecar, peer) = shop(endless(&seen, "").await).await;
    let (response, mut stream) = peer.begin(post("/orders"), false).await.unwrap();
    stream
        .send_data(Bytes::from_static(b"half of a body"), false)
        .unwrap();
    until(|| seen.has("asked")).await;
    sidecar.publish(HEALTH_ONLY);
    let answer = whole(response).await.unwrap();
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    assert_eq!(answer.header("sidegate-error"), "denied_by_policy_change");
    until(|| seen.all().len() == 2).await;
    assert_eq!(seen.all()[1], "connection reset", "the body was aborted");
    denied_in_the_record(&sidecar, Protocol::Http1).await;
}

/// A gRPC application that answers its head and one message, or nothing at all.
async fn watching(seen: &app::Seen, answers: bool) -> SocketAddr {
    let noted = seen.clone();
    app::h2(move |request: Request<RecvStream>, mut respond| {
        let seen = noted.clone();
        async move {
            seen.note("asked");
            let stream = answers.then(|| {
                let mut stream = respond.send_response(Response::new(()), false).unwrap();
                stream
                    .send_data(Bytes::from_static(b"message"), false)
                    .unwrap();
                stream
            });
            let mut recv = request.into_body();
            let ended = read_all(&mut recv, &mut Vec::new()).await;
            seen.note(format!("{:?}", ended.unwrap_err().reason().unwrap()));
            drop(stream);
        }
    })
    .await
}

#[tokio::test]
async fn a_policy_change_ends_grpc_with_permission_denied() {
    for answers in [true, false] {
        let seen = app::Seen::default();
        let (sidecar, peer) = shop(watching(&seen, answers).await).await;
        let (response, mut stream) = peer.begin(grpc("Watch"), false).await.unwrap();
        stream.send_data(Bytes::from_static(b"x"), false).unwrap();
        until(|| seen.has("asked")).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        sidecar.publish(HEALTH_ONLY);
        let answer = whole(response).await.unwrap();
        if answers {
            let trailers = answer.trailers.expect("trailers after the head");
            assert_eq!(trailers["grpc-status"], "7");
            assert_eq!(answer.body, "message");
        } else {
            assert_eq!(answer.header("grpc-status"), "7");
            assert_eq!(answer.status, StatusCode::OK);
        }
        until(|| seen.has("CANCEL")).await;
        denied_in_the_record(&sidecar, Protocol::Grpc).await;
    }
}

#[tokio::test]
async fn a_policy_change_ends_a_websocket_on_both_sides() {
    let seen = app::Seen::default();
    let (sidecar, peer) = shop(endless(&seen, SWITCH).await).await;
    let (mut stream, _recv, _) = open(&peer, websocket("/orders/7/events")).await;
    sidecar.publish(HEALTH_ONLY);
    assert_eq!(reset_of(&mut stream).await.unwrap(), policy_denied());
    until(|| seen.all().len() == 2).await;
    assert_eq!(seen.all()[1], "connection reset");
    denied_in_the_record(&sidecar, Protocol::WebSocket).await;
}

#[tokio::test]
async fn a_policy_change_ends_an_opaque_connection_on_both_sides() {
    let seen = app::Seen::default();
    let noted = seen.clone();
    let application = app::raw(move |mut stream| {
        let seen = noted.clone();
        async move { seen.note(app::end_of(&mut stream).await) }
    })
    .await;
    let sidecar = Sidecar::start(opaque_setup(application)).await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    let (mut stream, _recv, _) = open(&peer, connect("sidegate-tcp", "/")).await;
    sidecar.publish(OPAQUE_FOR_NOBODY);
    assert_eq!(reset_of(&mut stream).await.unwrap(), policy_denied());
    until(|| seen.has("connection reset")).await;
    denied_in_the_record(&sidecar, Protocol::Tcp).await;
}

#[tokio::test]
async fn a_policy_change_leaves_what_is_still_allowed_alone() {
    let seen = app::Seen::default();
    let (sidecar, peer) = shop(endless(&seen, CHUNKED).await).await;
    let (allowed, _stream) = peer.begin(get("/healthz"), true).await.unwrap();
    let (denied, _stream) = peer.begin(get("/orders/7"), true).await.unwrap();
    let mut allowed = soon(allowed).await.unwrap().into_body();
    let mut denied = soon(denied).await.unwrap().into_body();
    for recv in [&mut allowed, &mut denied] {
        assert_eq!(next(recv).await.unwrap().unwrap(), "ok");
    }
    sidecar.publish(HEALTH_ONLY);
    assert!(next(&mut denied).await.is_err());
    assert_eq!(sidecar.calls(), 1, "the other goes on");
    assert_eq!(
        peer.call(get("/orders/8")).await.unwrap().status,
        StatusCode::FORBIDDEN
    );
}

#[tokio::test]
async fn a_revoked_peer_is_cut_at_once_and_logged() {
    let seen = app::Seen::default();
    let (sidecar, peer) = shop(endless(&seen, CHUNKED).await).await;
    let other = Peer::connect(&sidecar, "jobs/batch").await;
    assert_eq!(
        other.call(get("/orders/1")).await.unwrap().status,
        StatusCode::FORBIDDEN
    );
    let (response, _stream) = peer.begin(get("/orders/7"), true).await.unwrap();
    let mut recv = soon(response).await.unwrap().into_body();
    assert_eq!(next(&mut recv).await.unwrap().unwrap(), "ok");
    let before = std::time::Instant::now();
    sidecar.trust(trust(2, &[&sidecar.root], &[id("shop/web")]));
    let error = next(&mut recv).await.unwrap_err();
    assert_eq!(error.reason(), Some(certificate_ended()));
    assert!(before.elapsed() < Duration::from_secs(5));
    assert!(
        peer.call(get("/healthz")).await.is_err(),
        "the connection is gone"
    );
    let call = sidecar.record_of("/orders/7").await;
    assert_eq!(
        (call.error, call.reason.as_deref()),
        (Some("certificate_ended"), Some("revoked"))
    );
    let cut = sidecar
        .record(|record| record.error == Some("connection_cut"))
        .await;
    assert_eq!(cut.reason.as_deref(), Some("revoked"));
    assert_eq!(
        cut.source.as_deref(),
        Some("spiffe://mesh.local/ns/shop/sa/web")
    );
    until(|| sidecar.connections() == 1).await;
    assert_eq!(
        other.call(get("/orders/2")).await.unwrap().status,
        StatusCode::FORBIDDEN
    );
    until(|| seen.all().contains(&"connection reset".to_owned())).await;
}

#[tokio::test]
async fn peers_of_a_removed_root_are_cut_and_those_of_another_go_on() {
    let seen = app::Seen::default();
    let (sidecar, old) = shop(endless(&seen, CHUNKED).await).await;
    let next_root = Root::new("mesh.local");
    sidecar.trust(trust(2, &[&sidecar.root, &next_root], &[]));
    assert_eq!(
        old.call(get("/x")).await.unwrap().status,
        StatusCode::FORBIDDEN,
        "both trusted"
    );
    let svid = next_root.svid(&id("shop/web"));
    let both = trust(2, &[&sidecar.root, &next_root], &[]);
    let store = store_with(&sidecar.clock, svid, both);
    let new = Peer::with(sidecar.address, &store, &sidecar.clock)
        .await
        .unwrap();
    assert_eq!(
        new.call(get("/x")).await.unwrap().status,
        StatusCode::FORBIDDEN
    );
    sidecar.trust(trust(3, &[&next_root], &[]));
    until(|| sidecar.connections() == 1).await;
    assert!(old.call(get("/x")).await.is_err());
    assert_eq!(
        new.call(get("/x")).await.unwrap().status,
        StatusCode::FORBIDDEN
    );
}

#[tokio::test]
async fn a_connection_is_told_to_go_away_before_its_certificate_ends_and_cut_when_it_does() {
    let seen = app::Seen::default();
    let (sidecar, _) = shop(endless(&seen, CHUNKED).await).await;
    let svid = sidecar
        .root
        .svid_of(&id("shop/web"), start(), Duration::from_secs(600));
    let store = store_with(&sidecar.clock, svid, trust(1, &[&sidecar.root], &[]));
    let peer = Peer::with(sidecar.address, &store, &sidecar.clock)
        .await
        .unwrap();
    let (response, _stream) = peer.begin(get("/orders/7"), true).await.unwrap();
    let mut recv = soon(response).await.unwrap().into_body();
    assert_eq!(next(&mut recv).await.unwrap().unwrap(), "ok");
    // The default drain timeout of 30 s before its end.
    sidecar.clock.advance(Duration::from_secs(569));
    tokio::time::sleep(Duration::from_millis(50)).await;
    let (_late, _stream) = peer.begin(get("/orders/8"), true).await.expect("not yet");
    until(|| sidecar.calls() == 2).await;
    sidecar.clock.advance(Duration::from_secs(2));
    soon(async {
        while peer.begin(get("/orders/9"), true).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert_eq!(sidecar.calls(), 2, "open calls go on");
    sidecar.clock.advance(Duration::from_secs(29));
    let error = next(&mut recv).await.unwrap_err();
    assert_eq!(error.reason(), Some(certificate_ended()));
    let record = sidecar.record_of("/orders/7").await;
    let reason = record.reason.as_deref();
    assert_eq!(
        (record.error, reason),
        (Some("certificate_ended"), Some("expired"))
    );
    until(|| sidecar.connections() == 0).await;
}

#[tokio::test]
async fn a_drain_sends_goaway_refuses_new_calls_and_lets_open_ones_end() {
    let seen = app::Seen::default();
    let application = app::raw({
        let seen = seen.clone();
        move |mut stream: TcpStream| {
            let seen = seen.clone();
            async move {
                app::read_until(&mut stream, "\r\n\r\n").await;
                seen.note("asked");
                until(|| seen.has("go")).await;
                let answer = "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone";
                app::answer_now(&mut stream, answer).await;
            }
        }
    })
    .await;
    let (sidecar, peer) = shop(application).await;
    let (open, _stream) = peer.begin(get("/orders/7"), true).await.unwrap();
    until(|| seen.has("asked")).await;
    sidecar
        .shared
        .drain
        .start(Duration::from_secs(1), Duration::from_secs(30));
    // Within the grace period new connections are accepted, and their calls refused.
    let late = Peer::connect(&sidecar, "shop/web").await;
    match late.call(get("/orders/8")).await {
        Ok(answer) => panic!("served while draining: {answer:?}"),
        Err(error) => {
            let refused = error.reason() == Some(Reason::REFUSED_STREAM);
            assert!(refused || error.is_go_away(), "{error:?}");
        }
    }
    sidecar.clock.advance(Duration::from_secs(1));
    soon(async {
        while TcpStream::connect(sidecar.address).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    seen.note("go");
    let answer = whole(open).await.unwrap();
    assert_eq!(answer.text(), "done");
    assert!(
        soon(sidecar.shared.drain.finish()).await,
        "nothing had to be cut"
    );
    sidecar.served().await;
}

#[tokio::test]
async fn a_drains_deadline_cuts_what_is_still_open() {
    let seen = app::Seen::default();
    let (sidecar, peer) = shop(endless(&seen, CHUNKED).await).await;
    let (response, _stream) = peer.begin(get("/orders/7"), true).await.unwrap();
    let mut recv = soon(response).await.unwrap().into_body();
    assert_eq!(next(&mut recv).await.unwrap().unwrap(), "ok");
    sidecar
        .shared
        .drain
        .start(Duration::from_secs(1), Duration::from_secs(30));
    let finish = sidecar.shared.drain.clone();
    let finish = tokio::spawn(async move { finish.finish().await });
    for _ in 0..31 {
        tokio::time::sleep(Duration::from_millis(5)).await;
        sidecar.clock.advance(Duration::from_secs(1));
    }
    assert!(!soon(finish).await.unwrap(), "the open call was cut");
    assert!(next(&mut recv).await.is_err(), "never a clean end");
    assert_eq!(
        sidecar.record_of("/orders/7").await.error,
        Some("drain_deadline")
    );
    sidecar.served().await;
}

#[tokio::test]
async fn live_calls_are_listed_without_query_and_leave_the_list() {
    let seen = app::Seen::default();
    let (sidecar, peer) = shop(endless(&seen, CHUNKED).await).await;
    let (response, mut stream) = peer.begin(get("/orders/7?secret=1"), true).await.unwrap();
    let recv = soon(response).await.unwrap().into_body();
    let list = sidecar.shared.connections.list();
    assert_eq!(list.len(), 1);
    assert_eq!(
        list[0].peer.as_deref(),
        Some("spiffe://mesh.local/ns/shop/sa/web")
    );
    let call = &list[0].calls[0];
    assert_eq!((call.port, &*call.method), (8080, "GET"));
    assert_eq!(call.path.as_deref(), Some("/orders/7"));
    stream.send_reset(Reason::CANCEL);
    drop(recv);
    until(|| sidecar.calls() == 0).await;
    assert_eq!(
        sidecar.record_of("/orders/7").await.error,
        Some("peer_reset")
    );
    drop((stream, peer));
    until(|| sidecar.connections() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_stream_is_not_missed_when_the_policy_changes_as_it_begins() {
    let seen = app::Seen::default();
    let (sidecar, peer) = shop(endless(&seen, CHUNKED).await).await;
    let (mut ended, mut refused) = (0, 0);
    for round in 0..40 {
        sidecar.publish(READERS);
        let begin = async {
            let mut calls = Vec::new();
            for n in 0..12 {
                calls.push(
                    peer.begin(get(&format!("/orders/{n}")), true)
                        .await
                        .unwrap(),
                );
                tokio::time::sleep(Duration::from_micros(700)).await;
            }
            calls
        };
        let change = async {
            tokio::time::sleep(Duration::from_micros(300 * (round % 30))).await;
            sidecar.publish(HEALTH_ONLY);
        };
        let (calls, ()) = tokio::join!(begin, change);
        for (response, _stream) in calls {
            let response = match soon(response).await {
                Ok(response) if response.status() == StatusCode::FORBIDDEN => {
                    refused += 1;
                    continue;
                }
                Ok(response) => response,
                Err(error) => {
                    // Its head was on its way when it was reset.
                    assert_eq!(error.reason(), Some(policy_denied()), "{error:?}");
                    ended += 1;
                    continue;
                }
            };
            let mut recv = response.into_body();
            let end = soon(read_all(&mut recv, &mut Vec::new())).await;
            assert_eq!(end.unwrap_err().reason(), Some(policy_denied()));
            ended += 1;
        }
    }
    // Otherwise the changes came before all calls or after them, and nothing was proved.
    assert!(ended > 0 && refused > 0, "{ended} ended, {refused} refused");
}

#[tokio::test]
async fn a_short_certificate_leaves_most_of_its_life_to_calls() {
    let seen = app::Seen::default();
    let (sidecar, _) = shop(endless(&seen, CHUNKED).await).await;
    // A drain takes 30 s; going away that early would leave nothing of 20 s.
    let life = Duration::from_secs(20);
    let svid = sidecar.root.svid_of(&id("shop/web"), start(), life);
    let store = store_with(&sidecar.clock, svid, trust(1, &[&sidecar.root], &[]));
    let peer = Peer::with(sidecar.address, &store, &sidecar.clock)
        .await
        .unwrap();
    assert_eq!(
        peer.call(get("/x")).await.unwrap().status,
        StatusCode::FORBIDDEN
    );
    sidecar.clock.advance(Duration::from_secs(14));
    let answer = peer.call(get("/x")).await.unwrap();
    assert_eq!(answer.status, StatusCode::FORBIDDEN, "still served");
    sidecar.clock.advance(Duration::from_secs(2));
    soon(async {
        while peer.call(get("/x")).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    until(|| sidecar.connections() == 0).await;
}
