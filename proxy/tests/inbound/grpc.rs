//! gRPC: its four kinds of call as streams, its errors, deadlines and cancellations.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::Reason;
use http::{HeaderMap, Response, StatusCode};
use sidegate_mesh::Verdict;
use sidegate_mesh::access_log::Protocol;
use tokio::sync::Notify;

use crate::app;
use crate::peers::{Peer, grpc, next, read_all, reset_of, whole};
use crate::support::{READERS, Setup, Sidecar, soon, until};

fn ok() -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", "0".parse().unwrap());
    trailers.insert("grpc-message", "".parse().unwrap());
    trailers
}

fn head() -> Response<()> {
    Response::builder()
        .header("content-type", "application/grpc")
        .body(())
        .unwrap()
}

/// Echoes each message as it comes, then the status that the request's `want-status` names.
async fn echo() -> std::net::SocketAddr {
    app::h2(|request, mut respond| async move {
        assert_eq!(request.headers()["te"], "trailers");
        assert_eq!(
            request.headers()["sidegate-client-id"],
            "spiffe://mesh.local/ns/shop/sa/web"
        );
        let want = request.headers().get("want-status").cloned();
        let mut recv = request.into_body();
        let mut stream = respond.send_response(head(), false).unwrap();
        while let Some(data) = recv.data().await {
            let Ok(data) = data else { return };
            recv.flow_control().release_capacity(data.len()).unwrap();
            stream.send_data(data, false).unwrap();
        }
        let mut trailers = ok();
        if let Some(want) = want {
            trailers.insert("grpc-status", want);
            trailers.insert("grpc-message", "out of stock".parse().unwrap());
        }
        stream.send_trailers(trailers).unwrap();
    })
    .await
}

async fn shop(address: std::net::SocketAddr) -> (Sidecar, Peer) {
    let sidecar = Sidecar::start(Setup::http(address, READERS)).await;
    let peer = Peer::connect(&sidecar, "shop/web").await;
    (sidecar, peer)
}

#[tokio::test]
async fn messages_go_both_ways_while_the_call_is_open() {
    let (sidecar, peer) = shop(echo().await).await;
    let (response, mut stream) = peer.begin(grpc("Chat"), false).await.unwrap();
    let mut recv = None;
    let mut response = Some(response);
    for n in 0..3_u8 {
        stream.send_data(Bytes::from(vec![n; 5]), false).unwrap();
        if let Some(response) = response.take() {
            recv = Some(soon(response).await.unwrap().into_body());
        }
        let echoed = next(recv.as_mut().unwrap()).await.unwrap().unwrap();
        assert_eq!(echoed, vec![n; 5], "before the next is sent");
    }
    stream.send_data(Bytes::new(), true).unwrap();
    let mut rest = Vec::new();
    let trailers = soon(read_all(recv.as_mut().unwrap(), &mut rest))
        .await
        .unwrap();
    assert_eq!(trailers.unwrap()["grpc-status"], "0");
    let record = sidecar
        .record(|record| record.protocol == Protocol::Grpc)
        .await;
    assert_eq!(record.grpc_service.as_deref(), Some("shop.v1.Orders"));
    assert_eq!(record.grpc_method.as_deref(), Some("Chat"));
    assert_eq!((record.grpc_status, record.status), (Some(0), Some(200)));
    assert_eq!((record.request_bytes, record.response_bytes), (15, 15));
}

#[tokio::test]
async fn status_and_message_of_the_trailers_are_on_record() {
    let (sidecar, peer) = shop(echo().await).await;
    let mut request = grpc("Get");
    request
        .headers_mut()
        .insert("want-status", "9".parse().unwrap());
    let answer = peer.call_with(request, b"message").await.unwrap();
    assert_eq!(answer.trailers.unwrap()["grpc-status"], "9");
    let record = sidecar
        .record(|record| record.protocol == Protocol::Grpc)
        .await;
    assert_eq!(record.grpc_status, Some(9));
    assert_eq!(record.grpc_message.as_deref(), Some("out of stock"));
}

#[tokio::test]
async fn trailers_only_passes_and_is_on_record() {
    let address = app::h2(|_, mut respond| async move {
        let mut response = head();
        response
            .headers_mut()
            .insert("grpc-status", "5".parse().unwrap());
        respond.send_response(response, true).unwrap();
    })
    .await;
    let (sidecar, peer) = shop(address).await;
    let answer = peer.call_with(grpc("Get"), b"message").await.unwrap();
    assert_eq!(answer.header("grpc-status"), "5");
    let record = sidecar
        .record(|record| record.protocol == Protocol::Grpc)
        .await;
    assert_eq!(record.grpc_status, Some(5));
}

#[tokio::test]
async fn a_denied_call_is_permission_denied_in_trailers_only_form() {
    let (sidecar, _) = shop(echo().await).await;
    let peer = Peer::connect(&sidecar, "jobs/batch").await;
    let answer = peer.call_with(grpc("Get"), b"message").await.unwrap();
    assert_eq!(
        (answer.status, answer.header("grpc-status")),
        (StatusCode::OK, "7")
    );
    assert_eq!(answer.header("sidegate-error"), "denied");
    let decision = answer.header("sidegate-decision").to_owned();
    assert!(answer.body.is_empty() && answer.trailers.is_none());
    let record = sidecar
        .record(|record| record.decision == Some(Verdict::Deny))
        .await;
    assert_eq!(record.decision_id, Some(decision));
    assert_eq!(
        (record.grpc_status, record.protocol),
        (Some(7), Protocol::Grpc)
    );
}

#[tokio::test]
async fn a_method_that_is_not_named_is_denied_and_a_bad_path_is_an_error_in_grpcs_way() {
    let (_sidecar, peer) = shop(echo().await).await;
    let answer = peer.call_with(grpc("Drop"), b"message").await.unwrap();
    assert_eq!(answer.header("grpc-status"), "7");
    let answer = peer.call_with(grpc("Get/x"), b"message").await.unwrap();
    assert_eq!(answer.header("grpc-status"), "13");
    assert_eq!(answer.header("sidegate-error"), "bad_request");
}

/// Never answers; notes how its stream ends.
async fn silent(seen: app::Seen, answers: bool) -> std::net::SocketAddr {
    app::h2(move |request, mut respond| {
        let seen = seen.clone();
        async move {
            seen.note("asked");
            let mut stream = answers.then(|| respond.send_response(head(), false).unwrap());
            let mut recv = request.into_body();
            let mut body = Vec::new();
            let ended = read_all(&mut recv, &mut body).await;
            let reason = match (ended, &mut stream) {
                (Err(error), _) => Ok(error.reason().unwrap()),
                (Ok(_), Some(stream)) => {
                    std::future::poll_fn(|context| stream.poll_reset(context)).await
                }
                (Ok(_), None) => std::future::poll_fn(|context| respond.poll_reset(context)).await,
            };
            seen.note(format!("{:?}", reason.unwrap()));
        }
    })
    .await
}

#[tokio::test]
async fn a_deadline_is_kept_before_and_after_the_head() {
    for answers in [false, true] {
        let seen = app::Seen::default();
        let (sidecar, peer) = shop(silent(seen.clone(), answers).await).await;
        let mut request = grpc("Watch");
        request
            .headers_mut()
            .insert("grpc-timeout", "2S".parse().unwrap());
        let (response, mut stream) = peer.begin(request, false).await.unwrap();
        stream.send_data(Bytes::from_static(b"x"), true).unwrap();
        until(|| seen.has("asked")).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        sidecar.clock.advance(Duration::from_secs(2));
        let answer = whole(response).await.unwrap();
        let status = match &answer.trailers {
            Some(trailers) => trailers["grpc-status"].clone(),
            None => answer.headers["grpc-status"].clone(),
        };
        assert_eq!(
            (status.to_str().unwrap(), answer.trailers.is_some()),
            ("4", answers)
        );
        until(|| seen.has("CANCEL")).await;
        let record = sidecar
            .record(|record| record.protocol == Protocol::Grpc)
            .await;
        assert_eq!(
            (record.error, record.grpc_status),
            (Some("timeout"), Some(4))
        );
    }
}

#[tokio::test]
async fn a_cancelled_call_is_cancelled_at_the_application() {
    for answers in [false, true] {
        let seen = app::Seen::default();
        let (sidecar, peer) = shop(silent(seen.clone(), answers).await).await;
        let (response, mut stream) = peer.begin(grpc("Watch"), false).await.unwrap();
        stream.send_data(Bytes::from_static(b"x"), false).unwrap();
        until(|| seen.has("asked")).await;
        stream.send_reset(Reason::CANCEL);
        until(|| seen.has("CANCEL")).await;
        let record = sidecar
            .record(|record| record.protocol == Protocol::Grpc)
            .await;
        assert_eq!(record.error, Some("peer_reset"));
        drop(response);
    }
}

#[tokio::test]
async fn a_reset_of_the_application_arrives_with_its_reason() {
    let reset = Arc::new(Notify::new());
    let wanted = Arc::clone(&reset);
    let address = app::h2(move |_request, mut respond| {
        let wanted = Arc::clone(&wanted);
        async move {
            let mut stream = respond.send_response(head(), false).unwrap();
            wanted.notified().await;
            stream.send_reset(Reason::ENHANCE_YOUR_CALM);
        }
    })
    .await;
    let (sidecar, peer) = shop(address).await;
    let (response, mut stream) = peer.begin(grpc("Watch"), false).await.unwrap();
    soon(response).await.unwrap();
    reset.notify_one();
    assert_eq!(
        reset_of(&mut stream).await.unwrap(),
        Reason::ENHANCE_YOUR_CALM
    );
    let record = sidecar
        .record(|record| record.protocol == Protocol::Grpc)
        .await;
    assert_eq!(record.error, Some("upstream_reset"));
}

#[tokio::test]
async fn a_reset_instead_of_an_answer_arrives_with_its_reason() {
    let address = app::h2(|_, mut respond| async move {
        respond.send_reset(Reason::REFUSED_STREAM);
    })
    .await;
    let (_sidecar, peer) = shop(address).await;
    let error = peer.call_with(grpc("Get"), b"x").await.unwrap_err();
    assert_eq!(error.reason(), Some(Reason::REFUSED_STREAM));
}

#[tokio::test]
async fn many_calls_share_one_connection_to_the_application() {
    let (sidecar, peer) = shop(echo().await).await;
    let calls = (0..50).map(|_| peer.call_with(grpc("Get"), b"x"));
    for answer in futures_util::future::join_all(calls).await {
        assert_eq!(answer.unwrap().trailers.unwrap()["grpc-status"], "0");
    }
    assert_eq!(sidecar.shared.limits.application_connections.in_use(), 1);
}
