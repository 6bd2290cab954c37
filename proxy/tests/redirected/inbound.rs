//! What arrives at a pod: any of its ports, and nothing else.

use sidegate_mesh::Verdict;
use sidegate_mesh::access_log::{Direction, Protocol};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::pod::{Cluster, SERVICE, get, meshed, rest};
use crate::{BYTES, WEB, app};

#[tokio::test]
async fn any_port_may_be_called_and_names_come_from_the_configuration() {
    let cluster = Cluster::new();
    let web = cluster.pod("web", "").await;
    let named = WEB.replace("ports: [8080]", "ports: [http, 9999]");
    let ports = "ports: [{ name: http, port: 8080 }]";
    let orders = cluster.pod_with("orders", &named, ports).await;
    for (port, status) in [(8080, 200), (9999, 200), (7777, 403)] {
        app::http(orders.at(port), "orders").await;
        web.know(SERVICE, meshed(&[orders.endpoint(port).await]))
            .await;
        let mut stream = web.connect(SERVICE.parse().unwrap()).await;
        let reply = get(&mut stream, "/").await;
        assert_eq!(reply.status, status, "{port}: {reply:?}");
    }
}

#[tokio::test]
async fn an_audit_workload_serves_what_parses_and_says_what_it_would_have_refused() {
    let cluster = Cluster::new();
    let (web, orders) = cluster.web_and_orders("").await;
    let nobody = |policy: &str| policy.replace("serviceAccount: web", "serviceAccount: nobody");
    orders.audit(&format!("{}---{}", nobody(WEB), nobody(BYTES)));
    app::http(orders.at(8080), "orders").await;
    app::echo(orders.at(6379)).await;
    web.know(SERVICE, meshed(&[orders.endpoint(8080).await]))
        .await;
    let mut stream = web.connect(SERVICE.parse().unwrap()).await;
    assert_eq!(get(&mut stream, "/").await.status, 200);
    let record = orders.record(|record| record.path.is_some()).await;
    assert_eq!(record.decision, Some(Verdict::WouldDeny));
    assert_eq!(record.reason.as_deref(), Some("no rule admits"));

    web.know(SERVICE, meshed(&[orders.endpoint(6379).await]))
        .await;
    let mut stream = web.connect(SERVICE.parse().unwrap()).await;
    stream.write_all(b"\0bytes").await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(rest(&mut stream).await.0, b"\0bytes");
    let record = orders
        .record(|record| record.protocol == Protocol::Tcp)
        .await;
    assert_eq!(record.decision, Some(Verdict::WouldDeny));

    // Bytes never pass for HTTP, also where only audited.
    web.know(SERVICE, meshed(&[orders.endpoint(8080).await]))
        .await;
    let mut stream = web.connect(SERVICE.parse().unwrap()).await;
    stream.write_all(b"\0bytes").await.unwrap();
    assert!(rest(&mut stream).await.1.is_err());
    let record = orders
        .record(|record| record.protocol == Protocol::Tcp)
        .await;
    assert_eq!(record.decision, Some(Verdict::Deny));
}

#[tokio::test]
async fn what_is_not_for_this_pod_or_for_us_is_refused_and_logged() {
    let cluster = Cluster::new();
    let orders = cluster.pod("orders", WEB).await;
    for (port, reason) in [
        (19006, "own_port"),
        (19021, "own_port"),
        (19000, "own_port"),
    ] {
        let at = orders.exposed(port).await;
        let mut stream = TcpStream::connect(at).await.unwrap();
        drop(rest(&mut stream).await);
        let record = orders.record(|_| true).await;
        assert_eq!(record.direction, Direction::Inbound);
        assert_eq!(record.error, Some("destination_refused"));
        assert_eq!(record.reason.as_deref(), Some(reason));
        assert_eq!(record.decision, Some(Verdict::Deny));
    }
    let at = orders.exposed_as("192.0.2.1:80".parse().unwrap()).await;
    let mut stream = TcpStream::connect(at).await.unwrap();
    drop(rest(&mut stream).await);
    let record = orders.record(|_| true).await;
    assert_eq!(record.reason.as_deref(), Some("not_this_pod"));
    let at = record.destination_address.map(|at| at.to_string());
    assert_eq!(at.as_deref(), Some("192.0.2.1:80"));
}
