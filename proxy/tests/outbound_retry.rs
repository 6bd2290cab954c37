//! Endpoints that fail: what is tried again, where, and what is left alone.

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
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::{Request, Response};
use support::{Mesh, Peer, Web, handler, id, orders, read_all, reply, says, soon, traffic};

/// Reads the whole body, then resets the stream.
fn resets(reason: Reason) -> support::Handler {
    handler(
        move |request: Request<RecvStream>, mut respond: SendResponse<Bytes>| async move {
            drop(read_all(request.into_body()).await);
            respond.send_reset(reason);
        },
    )
}

/// Reads the whole body and answers with it.
fn echo() -> support::Handler {
    handler(|request, mut respond| async move {
        let (bytes, _) = read_all(request.into_body()).await.unwrap();
        reply(
            &mut respond,
            Response::new(std::str::from_utf8(&bytes).unwrap()),
        );
    })
}

fn status(code: u16, count: &Arc<AtomicUsize>) -> support::Handler {
    let count = Arc::clone(count);
    handler(move |_request, mut respond| {
        count.fetch_add(1, Ordering::SeqCst);
        async move {
            let head = Response::builder().status(code).body("x").unwrap();
            reply(&mut respond, head);
        }
    })
}

const POST: &str = "POST / HTTP/1.1\r\nHost: orders.shop\r\nContent-Length: 5\r\n\r\nhello";

#[tokio::test]
async fn an_endpoint_that_refuses_connections_is_passed_over_and_left_alone() {
    let mesh = Mesh::new();
    let (dead, live) = (
        Peer::start(&mesh, "orders", says("")).await,
        Peer::start(&mesh, "orders", echo()).await,
    );
    dead.kill().await;
    let mut web = Web::start(&mesh, &orders(&[&dead, &live], "")).await;
    let mut client = web.client().await;
    let mut retried = 0;
    for _ in 0..20 {
        client.send(POST).await;
        assert_eq!(
            client.reply().await.text(),
            "hello",
            "a POST too: it was never sent"
        );
        let record = web.record().await;
        assert_eq!(record.destination_address, Some(live.address.into()));
        retried += usize::from(record.attempts == Some(2));
    }
    // Tried once at most, then left alone for a second that doubles; more only on a slow machine.
    assert!(retried <= 3, "{retried}");
}

#[tokio::test]
async fn when_no_endpoint_can_be_reached_the_caller_learns_it() {
    let mesh = Mesh::new();
    let (one, two) = (
        Peer::start(&mesh, "orders", says("")).await,
        Peer::start(&mesh, "orders", says("")).await,
    );
    one.kill().await;
    two.kill().await;
    let mut web = Web::start(&mesh, &orders(&[&one, &two], "")).await;
    for _ in 0..3 {
        let got = web.client().await.get("orders.shop", "/").await;
        assert_eq!(
            (got.status, got.header("sidegate-error")),
            (503, Some("upstream_connect"))
        );
        assert_eq!(
            web.record().await.attempts,
            Some(2),
            "left alone or not, both are tried"
        );
    }
    web.publish(&orders(&[], "").replace("endpoints:\n", "endpoints: []\n"));
    let got = web.client().await.get("orders.shop", "/").await;
    assert_eq!(
        (got.status, got.header("sidegate-error")),
        (503, Some("no_endpoint"))
    );
}

#[tokio::test]
async fn an_endpoint_with_another_identity_is_passed_over() {
    let mesh = Mesh::new();
    let wrong = Peer::start(&mesh, "intruder", says("no")).await;
    let wrong = Peer {
        id: id("orders"),
        ..wrong
    };
    let live = Peer::start(&mesh, "orders", says("yes")).await;
    let web = Web::start(&mesh, &orders(&[&wrong, &live], "")).await;
    for _ in 0..5 {
        assert_eq!(
            web.client().await.get("orders.shop", "/").await.text(),
            "yes"
        );
    }
    assert_eq!(wrong.streams(), 0);
}

#[tokio::test]
async fn a_refused_stream_is_sent_again_with_its_whole_body() {
    let mesh = Mesh::new();
    let refuse = Arc::new(AtomicBool::new(true));
    let answer = {
        let refuse = Arc::clone(&refuse);
        handler(
            move |request: Request<RecvStream>, mut respond: SendResponse<Bytes>| {
                let refused = refuse.swap(false, Ordering::SeqCst);
                async move {
                    let (bytes, _) = read_all(request.into_body()).await.unwrap();
                    if refused {
                        respond.send_reset(Reason::REFUSED_STREAM);
                    } else {
                        reply(
                            &mut respond,
                            Response::new(std::str::from_utf8(&bytes).unwrap()),
                        );
                    }
                }
            },
        )
    };
    let peer = Peer::start(&mesh, "orders", answer).await;
    let mut web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut client = web.client().await;
    client.send(POST).await;
    assert_eq!(client.reply().await.text(), "hello");
    let record = web.record().await;
    assert_eq!((record.attempts, record.request_bytes), (Some(2), 5));
    assert_eq!(peer.streams(), 2);
}

#[tokio::test]
async fn a_body_that_is_too_large_to_keep_is_not_sent_again() {
    let mesh = Mesh::new();
    let peer = Peer::start(&mesh, "orders", resets(Reason::REFUSED_STREAM)).await;
    let web = Web::start(&mesh, &orders(&[&peer], "")).await;
    let mut client = web.client().await;
    let length = 128 * 1024;
    client
        .send(&format!(
            "POST / HTTP/1.1\r\nHost: orders.shop\r\nContent-Length: {length}\r\n\r\n"
        ))
        .await;
    client.send(&"x".repeat(length)).await;
    // It never reached an application: what clients may send again is a 503.
    assert_eq!(client.reply().await.status, 503);
    assert_eq!(peer.streams(), 1);
}

#[tokio::test]
async fn a_reset_before_the_answer_is_repeated_only_if_idempotent() {
    let mesh = Mesh::new();
    let bad = Peer::start(&mesh, "orders", resets(Reason::INTERNAL_ERROR)).await;
    let worse = Peer::start(&mesh, "orders", resets(Reason::INTERNAL_ERROR)).await;
    let good = Peer::start(&mesh, "orders", echo()).await;
    let mut web = Web::start(&mesh, &orders(&[&bad, &worse], "")).await;
    let mut client = web.client().await;
    client.send(POST).await;
    assert_eq!(client.reply().await.status, 502);
    let record = web.record().await;
    assert_eq!(
        (record.error, record.attempts),
        (Some("upstream_reset"), None)
    );
    assert_eq!(bad.streams() + worse.streams(), 1, "the caller's to repeat");
    assert_eq!(client.get("orders.shop", "/").await.status, 502);
    assert_eq!(web.record().await.attempts, Some(2));
    assert_eq!(bad.streams() + worse.streams(), 3, "a GET was sent to both");
    web.publish(&orders(&[&bad, &worse, &good], ""));
    for _ in 0..20 {
        assert_eq!(client.get("orders.shop", "/").await.status, 200);
    }
}

#[tokio::test]
async fn a_status_is_tried_again_as_the_policy_says() {
    let mesh = Mesh::new();
    let (failed, answered) = (Arc::default(), Arc::default());
    let bad = Peer::start(&mesh, "orders", status(503, &failed)).await;
    let worse = Peer::start(&mesh, "orders", status(503, &failed)).await;
    let good = Peer::start(&mesh, "orders", status(200, &answered)).await;
    let policy = "  retry: { attempts: 2, conditions: [5xx], methods: [GET], budget: 100% }\n  \
                  outlierEjection: { consecutiveFailures: 1000 }";
    let policy = traffic("orders", policy);
    let mut web = Web::start(&mesh, &orders(&[&bad, &worse], &policy)).await;
    let mut client = web.client().await;
    client.send(POST).await;
    assert_eq!(client.reply().await.status, 503);
    assert_eq!(
        web.record().await.attempts,
        None,
        "POST is not among the methods"
    );
    assert_eq!(client.get("orders.shop", "/").await.status, 503);
    assert_eq!(web.record().await.attempts, Some(3));
    assert_eq!(failed.load(Ordering::SeqCst), 4);
    web.publish(&orders(&[&bad, &good], &policy));
    for _ in 0..20 {
        assert_eq!(client.get("orders.shop", "/").await.status, 200);
    }
}

#[tokio::test]
async fn an_endpoint_that_fails_in_a_row_is_ejected() {
    let mesh = Mesh::new();
    let (one, two) = (Arc::default(), Arc::default());
    let bad = Peer::start(&mesh, "orders", status(500, &one)).await;
    let worse = Peer::start(&mesh, "orders", status(500, &two)).await;
    let policy = "  outlierEjection: { consecutiveFailures: 3, duration: 1h, maxEjected: 50% }";
    let resources = orders(&[&bad, &worse], &traffic("orders", policy));
    let web = Web::start(&mesh, &resources).await;
    let mut client = web.client().await;
    for _ in 0..30 {
        assert_eq!(client.get("orders.shop", "/").await.status, 500);
    }
    let mut counts = [one.load(Ordering::SeqCst), two.load(Ordering::SeqCst)];
    counts.sort_unstable();
    // At most half is ejected, after three failures; the other goes on being asked.
    assert_eq!(counts, [3, 27]);
}

#[tokio::test]
async fn a_try_that_takes_too_long_is_tried_elsewhere_and_a_call_ends_at_its_timeout() {
    let mesh = Mesh::new();
    let slow = handler(|_request, mut respond: SendResponse<Bytes>| async move {
        let () = std::future::poll_fn(|cx| respond.poll_reset(cx).map(drop)).await;
    });
    let bad = Peer::start(&mesh, "orders", Arc::clone(&slow)).await;
    let good = Peer::start(&mesh, "orders", says("ok")).await;
    let policy = "  timeout: 30s\n  retry: { attempts: 2, conditions: [timeout], methods: [GET], \
                  perTryTimeout: 100ms }\n  outlierEjection: { consecutiveFailures: 1000 }";
    let web = Web::start(&mesh, &orders(&[&bad, &good], &traffic("orders", policy))).await;
    let mut client = web.client().await;
    for _ in 0..20 {
        assert_eq!(client.get("orders.shop", "/").await.text(), "ok");
        if bad.streams() > 0 {
            break;
        }
    }
    let policy = traffic("orders", "  timeout: 200ms");
    let mut web = Web::start(&mesh, &orders(&[&bad], &policy)).await;
    let got = web.client().await.get("orders.shop", "/").await;
    assert_eq!(
        (got.status, got.header("sidegate-error")),
        (504, Some("timeout"))
    );
    assert_eq!(web.record().await.error, Some("timeout"));
}

#[tokio::test]
async fn killing_an_endpoint_under_load_fails_no_idempotent_call() {
    let mesh = Mesh::new();
    let answer = || {
        handler(|_request, mut respond| async move {
            // Calls must be under way when the endpoint goes.
            tokio::time::sleep(Duration::from_millis(2)).await;
            reply(&mut respond, Response::new("ok"));
        })
    };
    let doomed = Peer::start(&mesh, "orders", answer()).await;
    let stays = Peer::start(&mesh, "orders", answer()).await;
    let web = Web::start(&mesh, &orders(&[&doomed, &stays], "")).await;
    let stop = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicUsize::new(0));
    let callers: Vec<_> = (0..32)
        .map(|_| {
            let (stop, done, address) = (Arc::clone(&stop), Arc::clone(&done), web.address);
            tokio::spawn(async move {
                let mut client = support::Http1::connect(address).await;
                while !stop.load(Ordering::SeqCst) {
                    let got = client.get("orders.shop", "/").await;
                    assert_eq!((got.status, got.text()), (200, "ok"), "{got:?}");
                    done.fetch_add(1, Ordering::SeqCst);
                }
            })
        })
        .collect();
    let until = async |count: usize| {
        while done.load(Ordering::SeqCst) < count {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    soon(until(1_000)).await;
    assert!(
        doomed.streams() > 100 && stays.streams() > 100,
        "both are used"
    );
    doomed.kill().await;
    let now = done.load(Ordering::SeqCst);
    soon(until(now + 1_000)).await;
    stop.store(true, Ordering::SeqCst);
    for caller in callers {
        soon(caller).await.unwrap();
    }
}
