//! `orders`: REST and WebSocket, with a few paths for looking inside a call.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::stream;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

use super::{Running, start};

/// Orders kept at once; a new one beyond that is refused with 507.
const ORDERS_MAX: usize = 10_000;
/// Longest answer of `GET /bytes/{n}`.
const BYTES_MAX: u64 = 1 << 30;
/// Longest wait of `GET /delay/{ms}`, in milliseconds.
const DELAY_MS_MAX: u64 = 60_000;
/// Events that a slow watcher may lag behind before it misses some.
const EVENTS_QUEUED_MAX: usize = 64;

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Order {
    id: u64,
    item: String,
    quantity: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NewOrder {
    item: String,
    #[serde(default = "one")]
    quantity: u64,
}

fn one() -> u64 {
    1
}

#[derive(Default)]
struct Store {
    orders: BTreeMap<u64, Order>,
    events: BTreeMap<u64, broadcast::Sender<Message>>,
}

type Shared = Arc<Mutex<Store>>;

fn lock(store: &Shared) -> MutexGuard<'_, Store> {
    store.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves `orders` on `listen`, with orders 1 to 9 on the books.
///
/// # Errors
///
/// The listener's error when `listen` cannot be bound.
pub async fn serve(listen: SocketAddr) -> io::Result<Running> {
    let router = router();
    start(listen, |listener, stop| async move {
        let served = axum::serve(listener, router)
            .with_graceful_shutdown(stop.cancelled_owned())
            .await;
        if let Err(error) = served {
            tracing::error!(%error, "orders ended");
        }
    })
    .await
}

fn router() -> Router {
    let mut store = Store::default();
    for (id, item) in (1..).zip([
        "pot", "cup", "milk", "sugar", "spoon", "tray", "tea", "cake", "jam",
    ]) {
        store.orders.insert(
            id,
            Order {
                id,
                item: item.to_owned(),
                quantity: 1,
            },
        );
    }
    Router::new()
        .route("/orders", get(list).post(create))
        .route("/orders/{id}", get(show))
        .route("/orders/{id}/events", get(events))
        .route("/headers", get(headers))
        .route("/bytes/{n}", get(bytes))
        .route("/echo", post(echo))
        .route("/status/{code}", get(status))
        .route("/delay/{ms}", get(delay))
        .route("/healthz", get(async || "ok\n"))
        .with_state(Arc::new(Mutex::new(store)))
}

async fn list(State(store): State<Shared>) -> Json<Vec<Order>> {
    Json(lock(&store).orders.values().cloned().collect())
}

async fn show(State(store): State<Shared>, Path(id): Path<u64>) -> Result<Json<Order>, StatusCode> {
    lock(&store)
        .orders
        .get(&id)
        .cloned()
        .map(Json)
        .ok_or(StatusCode::NOT_FOUND)
}

async fn create(State(store): State<Shared>, Json(new): Json<NewOrder>) -> Response {
    let mut store = lock(&store);
    if store.orders.len() >= ORDERS_MAX {
        return StatusCode::INSUFFICIENT_STORAGE.into_response();
    }
    let id = store.orders.keys().next_back().map_or(1, |last| last + 1);
    let order = Order {
        id,
        item: new.item,
        quantity: new.quantity,
    };
    store.orders.insert(id, order.clone());
    let location = [(header::LOCATION, format!("/orders/{id}"))];
    (StatusCode::CREATED, location, Json(order)).into_response()
}

/// An order's channel: every message reaches everybody who watches the order, its sender included.
async fn events(
    State(store): State<Shared>,
    Path(id): Path<u64>,
    upgrade: WebSocketUpgrade,
) -> Result<Response, StatusCode> {
    let sender = {
        let mut store = lock(&store);
        if !store.orders.contains_key(&id) {
            return Err(StatusCode::NOT_FOUND);
        }
        store
            .events
            .entry(id)
            .or_insert_with(|| broadcast::channel(EVENTS_QUEUED_MAX).0)
            .clone()
    };
    Ok(upgrade.on_upgrade(|socket| relay_events(socket, sender)))
}

async fn relay_events(mut socket: WebSocket, sender: broadcast::Sender<Message>) {
    let mut receiver = sender.subscribe();
    loop {
        tokio::select! {
            incoming = socket.recv() => match incoming {
                Some(Ok(message @ (Message::Text(_) | Message::Binary(_)))) => {
                    // Fails only without a receiver, and this task holds one.
                    drop(sender.send(message));
                }
                // A close is answered by the next read, which then ends.
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Close(_))) => {}
                Some(Err(_)) | None => return,
            },
            event = receiver.recv() => match event {
                Ok(message) => if socket.send(message).await.is_err() { return },
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return,
            },
        }
    }
}

/// What arrived, so that a caller can see what its sidecars did to a request.
async fn headers(headers: HeaderMap) -> Json<BTreeMap<String, String>> {
    let mut seen = BTreeMap::<String, String>::new();
    for (name, value) in &headers {
        let value = String::from_utf8_lossy(value.as_bytes());
        seen.entry(name.to_string())
            .and_modify(|all| {
                all.push_str(", ");
                all.push_str(&value);
            })
            .or_insert_with(|| value.into_owned());
    }
    Json(seen)
}

/// Streams `n` bytes without ever holding them at once.
async fn bytes(Path(n): Path<u64>) -> Result<Response, (StatusCode, String)> {
    const CHUNK: Bytes = Bytes::from_static(&[b'x'; 16 * 1024]);
    if n > BYTES_MAX {
        return Err((
            StatusCode::BAD_REQUEST,
            format!("at most {BYTES_MAX} bytes\n"),
        ));
    }
    let chunks = stream::unfold(n, |left| async move {
        if left == 0 {
            return None;
        }
        let chunk = CHUNK.slice(..CHUNK.len().min(usize::try_from(left).unwrap_or(usize::MAX)));
        let left = left - chunk.len() as u64;
        Some((Ok::<_, io::Error>(chunk), left))
    });
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_LENGTH, n.to_string()),
    ];
    Ok((headers, Body::from_stream(chunks)).into_response())
}

async fn echo(request: Request) -> Response {
    let content_type = request.headers().get(header::CONTENT_TYPE).cloned();
    let mut response = Response::new(request.into_body());
    if let Some(content_type) = content_type {
        response
            .headers_mut()
            .insert(header::CONTENT_TYPE, content_type);
    }
    response
}

async fn status(Path(code): Path<u16>) -> Response {
    match StatusCode::from_u16(code) {
        Ok(status) if code >= 200 => status.into_response(),
        _ => (StatusCode::BAD_REQUEST, "a code from 200 to 999\n").into_response(),
    }
}

async fn delay(Path(ms): Path<u64>) -> String {
    let ms = ms.min(DELAY_MS_MAX);
    tokio::time::sleep(Duration::from_millis(ms)).await;
    format!("waited {ms} ms\n")
}
