//! `web`: calls the three others, each at the address that it was given.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use tokio::net::TcpListener;

use super::{Running, start_on};
use crate::client;
use crate::proto::GetRequest;
use crate::proto::inventory_client::InventoryClient;

/// Longest wait for one of the three services.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// How `web` reaches the others: `HOST:PORT` each.
///
/// In a cluster these are the services' own names, and the pod's sidecar takes the connections
/// wherever they go. Elsewhere they are listeners of its sidecar: HTTP and gRPC say the service by
/// authority, and one port is bound to `ledger`.
#[derive(Clone, Debug)]
pub struct Reach {
    /// Where `orders` is asked.
    pub orders: String,
    /// Where `inventory` is asked.
    pub inventory: String,
    /// Where `ledger` is asked.
    pub ledger: String,
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
    fn unreachable(service: &'static str) -> impl FnOnce(client::Error) -> Self {
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

/// Serves `web` on `listener`, which is bound already: its sidecar must know the address first.
///
/// # Errors
///
/// When the listener has no address.
pub fn serve(listener: TcpListener, reach: Reach) -> io::Result<Running> {
    let router = Router::new()
        .route("/checkout/{id}", get(checkout))
        .route("/healthz", get(async || "ok\n"))
        .with_state(Arc::new(reach));
    start_on(listener, |listener, stop| async move {
        let served = axum::serve(listener, router)
            .with_graceful_shutdown(stop.cancelled_owned())
            .await;
        if let Err(error) = served {
            tracing::error!(%error, "web ended");
        }
    })
}

async fn checkout(
    State(reach): State<Arc<Reach>>,
    Path(id): Path<u64>,
) -> Result<Json<Checkout>, CheckoutError> {
    let order = within("orders", order(&reach.orders, id)).await?;
    let item = order
        .get("item")
        .and_then(|item| item.as_str())
        .unwrap_or_default();
    let in_stock = within("inventory", in_stock(&reach.inventory, item)).await?;
    let balance = within("ledger", book(&reach.ledger, item)).await?;
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

async fn order(address: &str, id: u64) -> Result<serde_json::Value, CheckoutError> {
    let unreachable = CheckoutError::unreachable("orders");
    let answer = client::get(address, "orders.shop", &format!("/orders/{id}"), &[])
        .await
        .map_err(unreachable)?;
    if answer.status != StatusCode::OK {
        return Err(CheckoutError::Orders(answer.status));
    }
    serde_json::from_slice(&answer.body)
        .map_err(|error| CheckoutError::unreachable("orders")(error.into()))
}

async fn in_stock(address: &str, sku: &str) -> Result<u64, CheckoutError> {
    let channel = client::channel(address.to_owned(), "http://inventory.shop")
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
async fn book(address: &str, item: &str) -> Result<i64, CheckoutError> {
    let said = client::converse(address, &[&format!("ADD {item} 1")])
        .await
        .map_err(|error| CheckoutError::unreachable("ledger")(error.into()))?;
    let answer = said.into_iter().nth(1).unwrap_or_default();
    let balance = answer
        .strip_prefix("250 ")
        .and_then(|balance| balance.trim().parse().ok());
    balance.ok_or(CheckoutError::Ledger(answer))
}
