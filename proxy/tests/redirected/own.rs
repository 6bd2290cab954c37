//! A pod that calls itself, by its Service or by its address.

use sidegate_mesh::Verdict;
use sidegate_mesh::access_log::Protocol;
use sidegate_mesh::routes::Endpoint;
use tokio::io::AsyncWriteExt;

use crate::pod::{Cluster, SERVICE, get, meshed, rest};
use crate::{BYTES, WEB, app};

#[tokio::test]
async fn a_pod_that_calls_its_own_service_is_its_own_caller_on_both_sides() {
    let cluster = Cluster::new();
    let own = WEB.replace("serviceAccount: web", "serviceAccount: orders");
    let orders = cluster.pod("orders", &own).await;
    app::http(orders.at(8080), "orders").await;
    let endpoint = Endpoint::new(orders.at(8080), orders.id().clone());
    orders.know(SERVICE, meshed(&[endpoint])).await;
    let mut stream = orders.connect(SERVICE.parse().unwrap()).await;
    let reply = get(&mut stream, "/self").await;
    assert_eq!(reply.status, 200, "{reply:?}");
    let caller = format!("sidegate-client-id: {}", orders.id());
    assert!(reply.body.contains(&caller), "{reply:?}");
    for _ in 0..2 {
        let record = orders.record(|record| record.path.is_some()).await;
        assert_eq!(record.source.as_deref(), Some(orders.id().as_str()));
        assert_eq!(record.destination.as_deref(), Some(orders.id().as_str()));
        assert_eq!(record.destination_address, Some(orders.at(8080).into()));
    }
}

#[tokio::test]
async fn a_pod_that_calls_its_own_address_is_held_to_its_own_policy() {
    let cluster = Cluster::new();
    let orders = cluster.pod("orders", &format!("{WEB}---{BYTES}")).await;
    app::http(orders.at(8080), "orders").await;
    app::echo(orders.at(6379)).await;
    // Nobody's word is needed for one's own address.
    let mut stream = orders.connect(orders.at(8080)).await;
    let reply = get(&mut stream, "/self").await;
    assert_eq!(reply.status, 403, "{reply:?}");
    let denied = orders.record(|record| record.reason.is_some()).await;
    assert_eq!(denied.decision, Some(Verdict::Deny));
    assert_eq!(denied.source.as_deref(), Some(orders.id().as_str()));

    let mut stream = orders.connect(orders.at(6379)).await;
    stream.write_all(b"\0bytes").await.unwrap();
    assert!(rest(&mut stream).await.1.is_err());
    let denied = orders
        .record(|record| record.protocol == Protocol::Tcp)
        .await;
    assert_eq!(denied.decision, Some(Verdict::Deny));

    orders.publish(&BYTES.replace("serviceAccount: web", "serviceAccount: orders"));
    let mut stream = orders.connect(orders.at(6379)).await;
    stream.write_all(b"\0bytes").await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(rest(&mut stream).await.0, b"\0bytes");
}
