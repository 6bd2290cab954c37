//! `web`: calls the three others, each through the addresses of its own sidecar.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::{Request, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tonic::transport::Endpoint;
use tower::service_fn;

use super::{Running, start};
use crate::proto::GetRequest;
use crate::proto::inventory_client::InventoryClient;

/// Longest wait for one of the three services.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest answer of `orders` that is read.
const ORDER_BYTES_MAX: usize = 64 * 1024;

/// How `web` reaches the others.
#[derive(Clone, Copy, Debug)]
pub struct Reach {
    /// The outbound listener of its sidecar.
    pub outbound: SocketAddr,
    /// The port of its sidecar that is bound to `ledger`.
    pub ledger: SocketAddr,
}

/// What `GET /checkout/{id}` answers.
#[derive(Debug, Serialize)]
struct Checkout {
    order: serde_json::Value,
    in_stock: u64,
    balance: i64,
}

#[derive(Debug, thiserror::Error)]
enum CheckoutError {
    #[error("orders answered {0}")]
    Orders(StatusCode),
    #[error("inventory answered {:?}: {}", .0.code(), .0.message())]
    Inventory(#[from] tonic::Status),
    #[error("ledger answered {0:?}")]
    Ledger(String),
    #[error("{service} could not be reached: {error}")]
    Unreachable {
        service: &'static str,
        error: String,
    },
}

impl CheckoutError {
    fn unreachable(
        service: &'static str,
    ) -> impl FnOnce(Box<dyn std::error::Error + Send + Sync>) -> Self {
        move |error| Self::Unreachable {
            service,
            error: error.to_string(),
        }
    }
}

impl IntoResponse for CheckoutError {
    fn into_response(self) -> Response {
        let status = match self {
            Self::Orders(StatusCode::NOT_FOUND) => StatusCode::NOT_FOUND,
            _ => StatusCode::BAD_GATEWAY,
        };
        (
            status,
            Json(serde_json::json!({ "error": self.to_string() })),
        )
            .into_response()
    }
}

/// Serves `web` on `listen`.
///
/// # Errors
///
/// The listener's error when `listen` cannot be bound.
pub async fn serve(listen: SocketAddr, reach: Reach) -> io::Result<Running> {
    let router = Router::new()
        .route("/checkout/{id}", get(checkout))
        .route("/healthz", get(async || "ok\n"))
        .with_state(reach);
    start(listen, |listener, stop| async move {
        let served = axum::serve(listener, router)
            .with_graceful_shutdown(stop.cancelled_owned())
            .await;
        if let Err(error) = served {
            tracing::error!(%error, "web ended");
        }
    })
    .await
}

async fn checkout(
    State(reach): State<Reach>,
    Path(id): Path<u64>,
) -> Result<Json<Checkout>, CheckoutError> {
    let order = within("orders", order(reach.outbound, id)).await?;
    let item = order
        .get("item")
        .and_then(|item| item.as_str())
        .unwrap_or_default();
    let in_stock = within("inventory", in_stock(reach.outbound, item)).await?;
    let balance = within("ledger", book(reach.ledger, item)).await?;
    Ok(Json(Checkout {
        order,
        in_stock,
        balance,
    }))
}

async fn within<T>(
    service: &'static str,
    call: impl Future<Output = Result<T, CheckoutError>>,
) -> Result<T, CheckoutError> {
    tokio::time::timeout(CALL_TIMEOUT, call)
        .await
        .unwrap_or_else(|_elapsed| {
            let error = format!("no answer within {} s", CALL_TIMEOUT.as_secs());
            Err(CheckoutError::Unreachable { service, error })
        })
}

async fn order(outbound: SocketAddr, id: u64) -> Result<serde_json::Value, CheckoutError> {
    let (status, body) = fetch(outbound, "orders.shop", &format!("/orders/{id}"))
        .await
        .map_err(CheckoutError::unreachable("orders"))?;
    if status != StatusCode::OK {
        return Err(CheckoutError::Orders(status));
    }
    serde_json::from_slice(&body).map_err(|error| CheckoutError::Unreachable {
        service: "orders",
        error: error.to_string(),
    })
}

/// One HTTP/1.1 `GET` to `host` through the sidecar's outbound listener.
async fn fetch(
    outbound: SocketAddr,
    host: &str,
    path: &str,
) -> Result<(StatusCode, Bytes), Box<dyn std::error::Error + Send + Sync>> {
    let stream = TcpStream::connect(outbound).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::get(path)
        .header(header::HOST, host)
        .header(header::USER_AGENT, "sidegate-shop-web")
        .body(Empty::<Bytes>::new())?;
    let call = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ORDER_BYTES_MAX)
            .collect()
            .await?
            .to_bytes();
        Ok((status, body))
    };
    // The connection is driven beside the call, and dropped with it.
    tokio::select! {
        answered = call => answered,
        closed = connection => match closed {
            Ok(()) => Err("the connection was closed before the answer".into()),
            Err(error) => Err(error.into()),
        },
    }
}

async fn in_stock(outbound: SocketAddr, sku: &str) -> Result<u64, CheckoutError> {
    // The authority names the service; the connection goes to the sidecar whatever it says.
    let channel = Endpoint::from_static("http://inventory.shop")
        .connect_with_connector(service_fn(move |_authority| async move {
            TcpStream::connect(outbound).await.map(TokioIo::new)
        }))
        .await
        .map_err(|error| CheckoutError::unreachable("inventory")(error.into()))?;
    let request = GetRequest {
        sku: sku.to_owned(),
    };
    match InventoryClient::new(channel).get(request).await {
        Ok(level) => Ok(level.into_inner().quantity),
        Err(status) if status.code() == tonic::Code::NotFound => Ok(0),
        Err(status) => Err(status.into()),
    }
}

/// Books one piece of `item` and returns how many were booked so far.
async fn book(ledger: SocketAddr, item: &str) -> Result<i64, CheckoutError> {
    let answer = converse(ledger, &format!("ADD {item} 1\r\n"))
        .await
        .map_err(|error| CheckoutError::unreachable("ledger")(error.into()))?;
    let balance = answer
        .strip_prefix("250 ")
        .and_then(|balance| balance.trim().parse().ok());
    balance.ok_or(CheckoutError::Ledger(answer))
}

async fn converse(ledger: SocketAddr, line: &str) -> io::Result<String> {
    let mut stream = BufReader::new(TcpStream::connect(ledger).await?);
    let mut greeting = String::new();
    stream.read_line(&mut greeting).await?;
    if greeting.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "closed before a greeting",
        ));
    }
    stream.write_all(line.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_line(&mut answer).await?;
    Ok(answer)
}
