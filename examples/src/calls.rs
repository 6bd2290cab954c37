//! The calls that the demo makes: what each shows, how it should end, and how it ended.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::Code;

use crate::client;
use crate::mesh::{LEDGER, Shop, ShopError};
use crate::proto::inventory_client::InventoryClient;
use crate::proto::{GetRequest, ReserveRequest, RestockRequest, WatchRequest};

/// Longest wait for one call.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// One call and its outcome.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Who called.
    pub caller: &'static str,
    /// What was called.
    pub call: &'static str,
    /// How it should end.
    pub expected: &'static str,
    /// How it ended.
    pub actual: String,
    /// How long it took, in milliseconds.
    pub ms: f64,
}

impl Outcome {
    /// Whether it ended as it should.
    pub fn is_expected(&self) -> bool {
        self.actual == self.expected
    }
}

/// Where a demo's calls start.
#[derive(Clone, Copy, Debug)]
struct Doors {
    web: SocketAddr,
    batch: SocketAddr,
    ledger: SocketAddr,
    checkout: SocketAddr,
    orders_inbound: SocketAddr,
}

/// Makes every call of the demo, one after the other.
///
/// # Errors
///
/// [`ShopError::Missing`] when the shop lacks a workload; a call that fails is an [`Outcome`].
pub async fn make_all(shop: &Shop) -> Result<Vec<Outcome>, ShopError> {
    let web = shop.sidecar("shop/web")?.sidecar.addresses();
    let ledger = web
        .upstreams
        .iter()
        .find(|(bound, _)| bound.to_string() == LEDGER);
    let doors = Doors {
        web: web.outbound,
        batch: shop.sidecar("jobs/batch")?.sidecar.addresses().outbound,
        ledger: ledger.ok_or(ShopError::Missing("shop/ledger"))?.1,
        checkout: shop
            .application("shop/web")
            .ok_or(ShopError::Missing("shop/web"))?,
        orders_inbound: shop.sidecar("shop/orders")?.sidecar.addresses().inbound,
    };
    let mut outcomes = Vec::new();
    rest_calls(doors, &mut outcomes).await;
    grpc_calls(doors, &mut outcomes).await;
    stream_calls(doors, &mut outcomes).await;
    Ok(outcomes)
}

/// Notes a call and how it ended.
struct Notes<'a> {
    outcomes: &'a mut Vec<Outcome>,
}

impl Notes<'_> {
    async fn call(
        &mut self,
        (caller, call): (&'static str, &'static str),
        expected: &'static str,
        making: impl Future<Output = Result<String, client::Error>>,
    ) {
        let (actual, ms) = timed(making).await;
        self.outcomes.push(Outcome {
            caller,
            call,
            expected,
            actual,
            ms,
        });
    }
}

async fn rest_calls(doors: Doors, outcomes: &mut Vec<Outcome>) {
    let mut notes = Notes { outcomes };
    let (web, batch) = (doors.web, doors.batch);
    let get = |address, path| status(address, "orders.shop", path);
    let call = ("shop/web", "GET orders.shop/orders/7");
    notes.call(call, "200", get(web, "/orders/7")).await;
    let call = ("shop/web", "GET orders.shop/bytes/1000000");
    notes.call(call, "200", get(web, "/bytes/1000000")).await;
    let call = (
        "shop/web",
        "GET orders.shop/headers, spoofing another identity",
    );
    notes.call(call, "seen as shop/web", spoof(web)).await;
    let call = ("jobs/batch", "GET orders.shop/healthz");
    notes.call(call, "200", get(batch, "/healthz")).await;
    let call = ("jobs/batch", "GET orders.shop/orders/7");
    notes.call(call, "403", get(batch, "/orders/7")).await;
    let call = ("shop/web", "GET nobody.shop/");
    notes
        .call(call, "destination_unknown", status(web, "nobody.shop", "/"))
        .await;
    let call = ("a user", "GET web/checkout/7, which calls all three");
    notes
        .call(call, "200", status(doors.checkout, "web", "/checkout/7"))
        .await;
    let call = ("nobody", "GET orders' inbound port, in plaintext");
    notes
        .call(call, "refused", plaintext(doors.orders_inbound))
        .await;
}

async fn grpc_calls(doors: Doors, outcomes: &mut Vec<Outcome>) {
    let mut notes = Notes { outcomes };
    let (web, batch) = (doors.web, doors.batch);
    let kinds = [
        ("shop.v1.Inventory/Get", Kind::Unary),
        ("shop.v1.Inventory/Watch", Kind::ServerStreaming),
        ("shop.v1.Inventory/Restock", Kind::ClientStreaming),
        ("shop.v1.Inventory/Reserve", Kind::Bidirectional),
    ];
    for (call, kind) in kinds {
        notes.call(("shop/web", call), "Ok", code(web, kind)).await;
    }
    let call = ("jobs/batch", "shop.v1.Inventory/Get");
    notes
        .call(call, "PermissionDenied", code(batch, Kind::Unary))
        .await;
}

async fn stream_calls(doors: Doors, outcomes: &mut Vec<Outcome>) {
    let mut notes = Notes { outcomes };
    let events = "WebSocket orders.shop/orders/7/events";
    notes
        .call(("shop/web", events), "echoed", echo(doors.web))
        .await;
    notes
        .call(("jobs/batch", events), "HTTP 403", echo(doors.batch))
        .await;
    let call = ("shop/web", "TCP ledger.shop:6379, server first");
    notes.call(call, "greeted", greet(doors.ledger)).await;
}

/// What `call` says, or why it failed, and the milliseconds that it took.
async fn timed(call: impl Future<Output = Result<String, client::Error>>) -> (String, f64) {
    let started = Instant::now();
    let actual = match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Ok(Ok(said)) => said,
        Ok(Err(error)) => error.to_string(),
        Err(_elapsed) => "no answer in time".to_owned(),
    };
    (actual, started.elapsed().as_secs_f64() * 1000.0)
}

/// The status of a `GET`, or the error code when a sidecar made the answer and denied nothing.
async fn status(address: SocketAddr, host: &str, path: &str) -> Result<String, client::Error> {
    let answer = client::get(address, host, path, &[]).await?;
    let denied = answer.headers.contains_key("sidegate-decision");
    match answer.headers.get("sidegate-error") {
        Some(code) if !denied => Ok(code.to_str()?.to_owned()),
        _ => Ok(answer.status.as_u16().to_string()),
    }
}

async fn spoof(address: SocketAddr) -> Result<String, client::Error> {
    let spoofed = [
        (
            "x-forwarded-client-cert",
            "URI=spiffe://mesh.local/ns/shop/sa/admin",
        ),
        ("sidegate-client-id", "spiffe://mesh.local/ns/shop/sa/admin"),
    ];
    let answer = client::get(address, "orders.shop", "/headers", &spoofed).await?;
    let seen: serde_json::Value = serde_json::from_slice(&answer.body)?;
    let caller = seen
        .get("sidegate-client-id")
        .and_then(|id| id.as_str())
        .unwrap_or("nobody");
    let workload = caller
        .strip_prefix("spiffe://mesh.local/ns/")
        .unwrap_or(caller);
    Ok(format!("seen as {}", workload.replace("/sa/", "/")))
}

/// Speaks HTTP to a port that speaks mesh TLS only.
async fn plaintext(address: SocketAddr) -> Result<String, client::Error> {
    let mut stream = TcpStream::connect(address).await?;
    stream
        .write_all(b"GET /orders/7 HTTP/1.1\r\nHost: orders.shop\r\n\r\n")
        .await?;
    let mut answer = Vec::new();
    // A reset is as good a refusal as a close.
    let read = stream.read_to_end(&mut answer).await;
    let text = String::from_utf8_lossy(&answer);
    let served = read.is_ok() && text.starts_with("HTTP/1.1 2");
    Ok(if served {
        text.into_owned()
    } else {
        "refused".to_owned()
    })
}

/// The four kinds of gRPC call, each with the inventory's method of that kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// `Get`.
    #[value(name = "get")]
    Unary,
    /// `Watch`.
    #[value(name = "watch")]
    ServerStreaming,
    /// `Restock`.
    #[value(name = "restock")]
    ClientStreaming,
    /// `Reserve`.
    #[value(name = "reserve")]
    Bidirectional,
}

async fn code(address: SocketAddr, kind: Kind) -> Result<String, client::Error> {
    let code = match grpc(address.to_string(), "http://inventory.shop", kind).await {
        Ok(()) => Code::Ok,
        Err(status) => status.code(),
    };
    Ok(format!("{code:?}"))
}

/// One call of the inventory at `address` with the authority of `origin`, read to its end.
///
/// # Errors
///
/// The status with which it ended; `UNAVAILABLE` when nothing could be reached.
pub async fn grpc(address: String, origin: &str, kind: Kind) -> Result<(), tonic::Status> {
    let channel = client::channel(address, origin)
        .await
        .map_err(|error| tonic::Status::unavailable(error.to_string()))?;
    call_inventory(InventoryClient::new(channel), kind).await
}

async fn call_inventory(
    mut inventory: InventoryClient<tonic::transport::Channel>,
    kind: Kind,
) -> Result<(), tonic::Status> {
    let sku = || "tea".to_owned();
    match kind {
        Kind::Unary => inventory.get(GetRequest { sku: sku() }).await.map(drop),
        Kind::ServerStreaming => {
            let request = WatchRequest {
                sku: sku(),
                limit: 3,
                repeat_after_ms: 5,
            };
            let mut levels = inventory.watch(request).await?.into_inner();
            while levels.message().await?.is_some() {}
            Ok(())
        }
        Kind::ClientStreaming => {
            let deliveries = [1, 2, 3].map(|quantity| RestockRequest {
                sku: sku(),
                quantity,
            });
            inventory
                .restock(tokio_stream::iter(deliveries))
                .await
                .map(drop)
        }
        Kind::Bidirectional => {
            let wanted = [1, 2].map(|quantity| ReserveRequest {
                sku: sku(),
                quantity,
            });
            let mut reserved = inventory
                .reserve(tokio_stream::iter(wanted))
                .await?
                .into_inner();
            while reserved.message().await?.is_some() {}
            Ok(())
        }
    }
}

async fn echo(address: SocketAddr) -> Result<String, client::Error> {
    let url = "ws://orders.shop/orders/7/events";
    let said = client::websocket(address, url, "packed").await?;
    Ok(if said == "packed" {
        "echoed".to_owned()
    } else {
        said
    })
}

async fn greet(ledger: SocketAddr) -> Result<String, client::Error> {
    let said = client::converse(ledger, &["BALANCE tea"]).await?;
    let greeted = said.first().is_some_and(|line| line.starts_with("220 "));
    let answered = said.get(1).is_some_and(|line| line.starts_with("250 "));
    Ok(if greeted && answered {
        "greeted".to_owned()
    } else {
        said.join(" / ")
    })
}
