//! Floods: an attacker with a certificate does not stop the others.

use std::time::Duration;

use bytes::Bytes;
use h2::Reason;
use http::StatusCode;
use tokio::io::AsyncWriteExt;

use crate::app;
use crate::peers::{Peer, get, grpc, handshake, post};
use crate::support::{READERS, Setup, Sidecar, id, soon, store_with, trust, until};

async fn shop() -> (Sidecar, Peer) {
    let (address, _) = app::http().await;
    let sidecar = Sidecar::start(Setup::http(address, READERS)).await;
    let honest = Peer::connect(&sidecar, "shop/web").await;
    (sidecar, honest)
}

async fn still_serves(sidecar: &Sidecar, honest: &Peer) {
    assert_eq!(
        honest.call(get("/orders/7")).await.unwrap().status,
        StatusCode::OK
    );
    let fresh = Peer::connect(sidecar, "shop/web").await;
    assert_eq!(
        fresh.call(get("/orders/7")).await.unwrap().status,
        StatusCode::OK
    );
}

#[tokio::test]
async fn rapid_resets_end_the_attackers_connection_and_no_other() {
    let (sidecar, honest) = shop().await;
    let attacker = Peer::connect(&sidecar, "shop/web").await;
    let mut ended = false;
    for n in 0..100_000 {
        let Ok((response, mut stream)) = attacker.begin(post("/orders"), false).await else {
            ended = true;
            break;
        };
        stream.send_reset(Reason::CANCEL);
        drop(response);
        if n % 10 == 0 {
            tokio::task::yield_now().await;
        }
    }
    assert!(ended, "the attacker goes on");
    let cut = sidecar
        .record(|record| record.error == Some("connection_cut"))
        .await;
    assert!(cut.reason.unwrap().ends_with("_flood"));
    still_serves(&sidecar, &honest).await;
    // Whatever of it was begun has ended; nothing piles up.
    until(|| sidecar.calls() == 0).await;
}

#[tokio::test]
async fn header_floods_are_refused_one_by_one() {
    let (sidecar, honest) = shop().await;
    let attacker = Peer::connect(&sidecar, "shop/web").await;
    for _ in 0..50 {
        let mut request = get("/orders/7");
        request
            .headers_mut()
            .insert("x-large", "v".repeat(100_000).parse().unwrap());
        let answer = attacker.call(request).await.unwrap();
        assert_eq!(answer.status, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    }
    still_serves(&sidecar, &honest).await;
}

/// One frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

#[tokio::test]
async fn continuation_settings_and_ping_floods_are_survived() {
    let (sidecar, honest) = shop().await;
    let preface = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        frame(4, 0, 0, &[]),
    ]
    .concat();
    let continuations = [
        frame(1, 0, 1, &[0x82]),
        frame(9, 0, 1, &[0; 16]).repeat(20_000),
    ]
    .concat();
    let settings = frame(4, 0, 0, &[0, 4, 0, 0, 255, 255]).repeat(50_000);
    let pings = frame(6, 0, 0, &[0; 8]).repeat(50_000);
    for flood in [continuations, settings, pings] {
        let svid = sidecar.root.svid(&id("shop/web"));
        let store = store_with(&sidecar.clock, svid, trust(1, &[&sidecar.root], &[]));
        let mut tls = handshake(sidecar.address, &store, &sidecar.clock, &id("shop/orders"))
            .await
            .unwrap();
        let send = async {
            tls.write_all(&preface).await?;
            tls.write_all(&flood).await?;
            tls.flush().await
        };
        // Nobody reads the answers: the sidecar may close, or stop reading; it must not choke.
        drop(tokio::time::timeout(Duration::from_secs(3), send).await);
        still_serves(&sidecar, &honest).await;
    }
}

#[tokio::test]
async fn a_peer_that_keeps_a_worker_busy_with_frames_of_no_call_loses_its_connection() {
    let (sidecar, honest) = shop().await;
    let preface = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        frame(4, 0, 0, &[]),
    ]
    .concat();
    let settings = frame(4, 0, 0, &[0, 4, 0, 0, 255, 255]);
    let ping = frame(6, 0, 0, &[0; 8]);
    for idle in [settings, ping] {
        let svid = sidecar.root.svid(&id("shop/web"));
        let store = store_with(&sidecar.clock, svid, trust(1, &[&sidecar.root], &[]));
        let tls = handshake(sidecar.address, &store, &sidecar.clock, &id("shop/orders"))
            .await
            .unwrap();
        // The answers are read: only the number of frames gives this peer away.
        let (mut answers, mut sending) = tokio::io::split(tls);
        let reader =
            tokio::spawn(
                async move { tokio::io::copy(&mut answers, &mut tokio::io::sink()).await },
            );
        sending.write_all(&preface).await.unwrap();
        let flood = async {
            while sending.write_all(&idle.repeat(100)).await.is_ok()
                && sending.flush().await.is_ok()
            {
                tokio::task::yield_now().await;
            }
        };
        soon(flood).await;
        drop(soon(reader).await);
        let cut = sidecar
            .record(|record| record.error == Some("connection_cut"))
            .await;
        assert_eq!(cut.reason.as_deref(), Some("frame_flood"));
        still_serves(&sidecar, &honest).await;
    }
}

#[tokio::test]
async fn many_streams_that_each_hold_one_small_frame_do_not_end_the_connection() {
    let address = app::h2(|request, mut respond| async move {
        // Reads nothing until the end.
        let body = request.into_body();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let mut response = http::Response::new(());
        response
            .headers_mut()
            .insert("grpc-status", "0".parse().unwrap());
        drop(respond.send_response(response, true));
        drop(body);
    })
    .await;
    let sidecar = Sidecar::start(Setup::http(address, READERS)).await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    let mut open = Vec::new();
    for _ in 0..200 {
        let (response, mut stream) = peer.begin(grpc("Chat"), false).await.unwrap();
        for _ in 0..8 {
            stream
                .send_data(Bytes::from_static(b"8 bytes!"), false)
                .unwrap();
        }
        open.push((response, stream));
    }
    for (response, _stream) in open {
        assert_eq!(soon(response).await.unwrap().status(), StatusCode::OK);
    }
}

#[tokio::test]
async fn streams_beyond_the_bound_wait_and_are_served() {
    let (sidecar, peer) = shop().await;
    let calls = (0..1000).map(|_| peer.call(get("/orders/7")));
    for answer in futures_util::future::join_all(calls).await {
        assert_eq!(answer.unwrap().status, StatusCode::OK);
    }
    assert_eq!(sidecar.calls(), 0);
}

#[tokio::test]
async fn streams_of_a_peer_that_ignores_the_bound_are_refused_and_the_rest_served() {
    let (sidecar, honest) = shop().await;
    let attacker = Peer::unbounded(&sidecar, "shop/web").await;
    let calls = (0..1000).map(|_| attacker.call(get("/orders/7")));
    let mut served = 0;
    for answer in futures_util::future::join_all(calls).await {
        match answer {
            Ok(answer) => {
                assert_eq!(answer.status, StatusCode::OK);
                served += 1;
            }
            Err(error) => assert_eq!(error.reason(), Some(Reason::REFUSED_STREAM), "{error:?}"),
        }
    }
    assert!(served >= 256, "{served}");
    still_serves(&sidecar, &honest).await;
}
