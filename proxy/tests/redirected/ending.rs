//! Pods that end: applications that refuse, pods that are gone, callers that are told to go.

use std::sync::Arc;
use std::time::Duration;

use sidegate_mesh::access_log::Protocol;
use sidegate_mesh::routes::Endpoint;
use tokio::io::AsyncWriteExt;

use crate::pod::{Cluster, SERVICE, exchange, get, meshed, rest, soon};
use crate::{BYTES, WEB, app};

const POST: &str = "POST /orders HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello";

#[tokio::test]
async fn an_application_that_refuses_the_connection_sends_any_call_elsewhere() {
    let cluster = Cluster::new();
    let web = cluster.pod("web", "").await;
    let (gone, here) = (
        cluster.pod("orders", WEB).await,
        cluster.pod("orders", WEB).await,
    );
    app::http(here.at(8080), "here").await;
    let endpoints = [gone.endpoint(8080).await, here.endpoint(8080).await];
    for _ in 0..8 {
        // Known anew each time, so that neither is left alone for its failures.
        web.know(SERVICE, meshed(&endpoints)).await;
        let mut stream = web.connect(SERVICE.parse().unwrap()).await;
        let reply = exchange(&mut stream, POST).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        assert!(
            reply.body.starts_with("here POST /orders hello"),
            "{reply:?}"
        );
    }
    let refused = gone.record(|_| true).await;
    assert_eq!(refused.error, Some("upstream_connect"));
}

#[tokio::test]
async fn with_one_endpoint_the_caller_learns_that_it_could_not_be_reached() {
    let cluster = Cluster::new();
    let (web, orders) = cluster.web_and_orders(WEB).await;
    let endpoint = orders.endpoint(8080).await;
    web.know(SERVICE, meshed(std::slice::from_ref(&endpoint)))
        .await;
    let mut stream = web.connect(SERVICE.parse().unwrap()).await;
    let reply = exchange(&mut stream, POST).await;
    assert_eq!(reply.status, 503);
    assert!(
        reply.head.contains("sidegate-error: upstream_connect"),
        "{reply:?}"
    );
    let record = web.record(|_| true).await;
    assert_eq!(record.error, Some("upstream_connect"));
    assert_eq!(record.destination_address, Some(endpoint.address.into()));
    assert!(record.attempts > Some(1), "{record:?}");

    // A pod that is gone altogether.
    let nobody = Endpoint::new("127.0.0.1:1".parse().unwrap(), orders.id().clone());
    web.know(SERVICE, meshed(&[nobody])).await;
    let reply = exchange(&mut stream, POST).await;
    assert_eq!(reply.status, 503);
    assert!(
        reply.head.contains("sidegate-error: upstream_connect"),
        "{reply:?}"
    );
}

#[tokio::test]
async fn a_call_that_is_tried_again_sees_endpoints_that_came_meanwhile() {
    let cluster = Cluster::new();
    let web = Arc::new(cluster.pod("web", "").await);
    let (gone, new) = (
        cluster.pod("orders", WEB).await,
        cluster.pod("orders", WEB).await,
    );
    app::http(new.at(8080), "new").await;
    web.know(SERVICE, meshed(&[gone.endpoint(8080).await]))
        .await;
    let mut stream = web.connect(SERVICE.parse().unwrap()).await;
    let call = tokio::spawn(async move { exchange(&mut stream, POST).await });
    drop(gone.record(|_| true).await);
    web.know(SERVICE, meshed(&[new.endpoint(8080).await])).await;
    let reply = soon(call).await.unwrap();
    assert_eq!(reply.status, 200, "{reply:?}");
    assert!(reply.body.starts_with("new "), "{reply:?}");
}

#[tokio::test]
async fn a_tunnel_to_an_application_that_refuses_goes_elsewhere_too() {
    let cluster = Cluster::new();
    let web = cluster.pod("web", "").await;
    let (gone, here) = (
        cluster.pod("orders", BYTES).await,
        cluster.pod("orders", BYTES).await,
    );
    app::echo(here.at(6379)).await;
    let endpoints = [gone.endpoint(6379).await, here.endpoint(6379).await];
    for _ in 0..4 {
        web.know(SERVICE, meshed(&endpoints)).await;
        let mut stream = web.connect(SERVICE.parse().unwrap()).await;
        stream.write_all(b"\0bytes").await.unwrap();
        stream.shutdown().await.unwrap();
        assert_eq!(rest(&mut stream).await.0, b"\0bytes");
    }
}

#[tokio::test]
async fn an_endpoint_that_is_about_to_end_is_chosen_only_when_there_is_no_other() {
    let cluster = Cluster::new();
    let web = cluster.pod("web", "").await;
    let (old, new) = (
        cluster.pod("orders", WEB).await,
        cluster.pod("orders", WEB).await,
    );
    app::http(old.at(8080), "old").await;
    app::http(new.at(8080), "new").await;
    let mut ending = old.endpoint(8080).await;
    ending.draining = true;
    web.know(SERVICE, meshed(&[ending.clone(), new.endpoint(8080).await]))
        .await;
    for _ in 0..16 {
        let mut stream = web.connect(SERVICE.parse().unwrap()).await;
        assert!(get(&mut stream, "/").await.body.starts_with("new "));
    }
    web.know(SERVICE, meshed(&[ending])).await;
    let mut stream = web.connect(SERVICE.parse().unwrap()).await;
    assert!(get(&mut stream, "/").await.body.starts_with("old "));
}

#[tokio::test]
async fn callers_of_a_workload_that_is_about_to_end_are_told_to_go_and_still_served() {
    let cluster = Cluster::new();
    let (web, orders) = cluster.web_and_orders(WEB).await;
    app::http(orders.at(8080), "orders").await;
    web.know(SERVICE, meshed(&[orders.endpoint(8080).await]))
        .await;
    let mut stream = web.connect(SERVICE.parse().unwrap()).await;
    assert_eq!(get(&mut stream, "/before").await.status, 200);
    let connections = || orders.shared.connections.list();
    let [before] = &connections()[..] else {
        panic!("one connection")
    };
    let before = before.since.clone();
    orders.shared.drain.ask_to_leave();
    // The connection goes, without a call that fails; the next one is another connection.
    let begun = std::time::Instant::now();
    while connections()
        .iter()
        .any(|connection| connection.since == before)
    {
        assert_eq!(get(&mut stream, "/during").await.status, 200);
        assert!(begun.elapsed() < crate::pod::PATIENCE);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    for _ in 0..8 {
        assert_eq!(get(&mut stream, "/after").await.status, 200);
    }
    let record = web
        .record(|record| record.path.as_deref() == Some("/after"))
        .await;
    assert_eq!((record.protocol, record.attempts), (Protocol::Http1, None));
}
