//! The health port: is it ready, does it live, what did it count.
//!
//! Invariant: ready means that a sidecar that comes now is served at once: every kind was listed, and
//! there is an SVID that is believed.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::shared::Shared;

/// Connections served at once.
const CONNECTIONS_MAX: usize = 32;
/// Longest request head.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves `/metrics`, `/livez` and `/readyz`, also while the controller drains.
pub(crate) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(error = %error, "health port cannot accept");
                shared.clock.sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else {
            shared.metrics.connection_refused("health_connections_max");
            continue;
        };
        let serving = Arc::clone(&shared);
        shared.spawn(async move {
            serve_connection(stream, serving).await;
            drop(permit);
        });
    }
}

async fn serve_connection(stream: TcpStream, shared: Arc<Shared>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let answer = answer(&request, &shared);
        async move { Ok::<_, Infallible>(answer) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(16 * 1024)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!(error = %error, "health connection ended");
    }
}

fn answer(request: &Request<Incoming>, shared: &Shared) -> Response<Full<Bytes>> {
    let path = request.uri().path();
    let (status, body) = match (request.method(), path) {
        (&Method::GET, "/livez") => (StatusCode::OK, "alive\n".to_owned()),
        (&Method::GET, "/readyz") => match missing(shared) {
            missing if missing.is_empty() => (StatusCode::OK, "ready\n".to_owned()),
            missing => {
                let words = format!("not ready: {}\n", missing.join(", "));
                (StatusCode::SERVICE_UNAVAILABLE, words)
            }
        },
        (&Method::GET, "/metrics") => match shared.metrics.text(&shared.hub) {
            Ok(text) => (StatusCode::OK, text),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        },
        (&Method::GET, _) => {
            let words = "there are /readyz, /livez and /metrics\n";
            (StatusCode::NOT_FOUND, words.to_owned())
        }
        _ => (StatusCode::METHOD_NOT_ALLOWED, "only GET\n".to_owned()),
    };
    let content_type = HeaderValue::from_static(if path == "/metrics" {
        "application/openmetrics-text; version=1.0.0; charset=utf-8"
    } else {
        "text/plain; charset=utf-8"
    });
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, content_type);
    response
}

/// What is missing for the controller to be ready; nothing when it is.
fn missing(shared: &Shared) -> Vec<String> {
    let mut missing = Vec::new();
    if let Err(error) = shared.store.own_svid_is_trusted() {
        missing.push(format!("no SVID that is believed ({error})"));
    }
    let kinds = shared.synced.missing();
    if !kinds.is_empty() {
        missing.push(format!("not listed yet: {}", kinds.join(" ")));
    }
    if shared.cancel.is_cancelled() {
        missing.push("draining".to_owned());
    }
    missing
}
