//! The shop's services without a mesh: what they do must be known before sidecars stand between.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

use futures_util::{SinkExt, StreamExt};
use sidegate_examples::proto::inventory_client::InventoryClient;
use sidegate_examples::proto::{GetRequest, ReserveRequest, RestockRequest, WatchRequest};
use sidegate_examples::shop::{inventory, ledger, orders};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;

const ANYWHERE: std::net::SocketAddr =
    std::net::SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// Sends `request` as it stands and returns the whole answer.
async fn raw(address: std::net::SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

async fn get(address: std::net::SocketAddr, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nhost: orders\r\nconnection: close\r\n\r\n");
    raw(address, &request).await
}

#[tokio::test]
async fn orders_lists_shows_creates_and_looks_inside() {
    let orders = orders::serve(ANYWHERE).await.unwrap();
    assert!(
        get(orders.address, "/orders")
            .await
            .contains("\"item\":\"tea\"")
    );
    assert!(
        get(orders.address, "/orders/7")
            .await
            .starts_with("HTTP/1.1 200")
    );
    assert!(
        get(orders.address, "/orders/70")
            .await
            .starts_with("HTTP/1.1 404")
    );
    assert!(
        get(orders.address, "/status/418")
            .await
            .starts_with("HTTP/1.1 418")
    );
    assert!(get(orders.address, "/healthz").await.ends_with("ok\n"));
    assert!(
        get(orders.address, "/headers")
            .await
            .contains("\"host\":\"orders\"")
    );
    assert!(
        get(orders.address, "/delay/1")
            .await
            .contains("waited 1 ms")
    );
    let bytes = get(orders.address, "/bytes/40000").await;
    assert_eq!(bytes.split_once("\r\n\r\n").unwrap().1.len(), 40_000);

    let body = r#"{"item":"mug","quantity":2}"#;
    let head = "host: orders\r\nconnection: close\r\ncontent-type: application/json";
    let length = body.len();
    let request =
        format!("POST /orders HTTP/1.1\r\n{head}\r\ncontent-length: {length}\r\n\r\n{body}");
    let created = raw(orders.address, &request).await;
    assert!(created.starts_with("HTTP/1.1 201"), "{created}");
    assert!(created.contains("location: /orders/10"), "{created}");
    let request = request.replace("POST /orders ", "POST /echo ");
    assert!(raw(orders.address, &request).await.ends_with(body));
    orders.stop().await;
}

#[tokio::test]
async fn an_order_s_events_reach_everybody_who_watches_it() {
    let orders = orders::serve(ANYWHERE).await.unwrap();
    let url = format!("ws://{}/orders/7/events", orders.address);
    let (mut first, _) = tokio_tungstenite::connect_async(&url).await.unwrap();
    first.send(Message::text("packed")).await.unwrap();
    assert_eq!(
        first.next().await.unwrap().unwrap(),
        Message::text("packed")
    );
    let (mut second, _) = tokio_tungstenite::connect_async(&url).await.unwrap();
    second.send(Message::text("sent")).await.unwrap();
    assert_eq!(second.next().await.unwrap().unwrap(), Message::text("sent"));
    assert_eq!(first.next().await.unwrap().unwrap(), Message::text("sent"));
}

#[tokio::test]
async fn inventory_answers_all_four_kinds_of_call() {
    let inventory = inventory::serve(ANYWHERE).await.unwrap();
    let mut client = InventoryClient::connect(format!("http://{}", inventory.address))
        .await
        .unwrap();
    let sku = || "tea".to_owned();
    let level = client
        .get(GetRequest { sku: sku() })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(level.quantity, 100);
    let missing = client
        .get(GetRequest {
            sku: "air".to_owned(),
        })
        .await
        .unwrap_err();
    assert_eq!(missing.code(), tonic::Code::NotFound);

    let deliveries = [5, 7].map(|quantity| RestockRequest {
        sku: sku(),
        quantity,
    });
    let sum = client
        .restock(tokio_stream::iter(deliveries))
        .await
        .unwrap()
        .into_inner();
    assert_eq!((sum.deliveries, sum.quantity), (2, 12));

    let wanted = [100, 100].map(|quantity| ReserveRequest {
        sku: sku(),
        quantity,
    });
    let mut reserved = client
        .reserve(tokio_stream::iter(wanted))
        .await
        .unwrap()
        .into_inner();
    let first = reserved.message().await.unwrap().unwrap();
    assert_eq!((first.reserved, first.remaining), (100, 12));
    let second = reserved.message().await.unwrap().unwrap();
    assert_eq!((second.reserved, second.remaining), (12, 0));
    assert!(reserved.message().await.unwrap().is_none());

    let request = WatchRequest {
        sku: sku(),
        limit: 2,
        repeat_after_ms: 5,
    };
    let mut levels = client.watch(request).await.unwrap().into_inner();
    assert_eq!(levels.message().await.unwrap().unwrap().quantity, 0);
    assert_eq!(levels.message().await.unwrap().unwrap().quantity, 0);
    assert!(levels.message().await.unwrap().is_none());
}

#[tokio::test]
async fn ledger_speaks_first_and_ends_its_side_after_the_caller_has() {
    let ledger = ledger::serve(ANYWHERE).await.unwrap();
    let mut stream = TcpStream::connect(ledger.address).await.unwrap();
    let mut greeting = vec![0; ledger::GREETING.len()];
    stream.read_exact(&mut greeting).await.unwrap();
    assert_eq!(greeting, ledger::GREETING.as_bytes());
    stream.write_all(b"ADD tea 2\r\n").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "250 2\r\n");
    ledger.stop().await;
}
