//! The health port of a part of the control plane: is it ready, does it live, what did it count.
//!
//! Invariants: it only reads; connections and heads are bounded; an answer says what is missing in
//! words of the program, never in a caller's.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use sidegate_mesh::Clock;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::issue::BoxFuture;

/// Connections served at once.
const CONNECTIONS_MAX: usize = 32;
/// Longest request head.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of a request head.
const HEADER_BYTES_MAX: usize = 16 * 1024;
/// Pause after the system has refused to accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const OPENMETRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

/// What a health port tells of.
pub trait Health: Send + Sync + 'static {
    /// What is missing for it to be ready; nothing when it is.
    fn missing(&self) -> Vec<String>;

    /// Why only a new start can help; `None` as long as that is not so.
    fn stranded(&self) -> BoxFuture<'_, Option<String>> {
        Box::pin(std::future::ready(None))
    }

    /// The text that Prometheus reads.
    ///
    /// # Errors
    ///
    /// When a metric cannot be written down.
    fn metrics(&self) -> Result<String, std::fmt::Error>;

    /// A connection was turned away, because as many are open as may be.
    fn turned_away(&self);
}

/// Serves `/metrics`, `/livez` and `/readyz` until `cancel`.
pub async fn serve_health(
    listener: TcpListener,
    health: Arc<dyn Health>,
    clock: Arc<dyn Clock>,
    tracker: TaskTracker,
    cancel: CancellationToken,
) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let accepted = tokio::select! {
            () = cancel.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(error = %error, "health port cannot accept");
                clock.sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else {
            health.turned_away();
            continue;
        };
        let (serving, cancel) = (Arc::clone(&health), cancel.clone());
        tracker.spawn(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                () = serve_connection(stream, serving) => {}
            }
            drop(permit);
        });
    }
}

async fn serve_connection(stream: TcpStream, health: Arc<dyn Health>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let health = Arc::clone(&health);
        async move {
            let path = request.uri().path();
            let (status, text) = answer(request.method(), path, &*health).await;
            let is_metrics = status == StatusCode::OK && path == "/metrics";
            let mut response = Response::new(Full::new(Bytes::from(text)));
            *response.status_mut() = status;
            let content_type = if is_metrics { OPENMETRICS } else { TEXT };
            let headers = response.headers_mut();
            headers.insert(header::CONTENT_TYPE, content_type);
            Ok::<_, Infallible>(response)
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEADER_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!(error = %error, "health connection ended");
    }
}

async fn answer(method: &Method, path: &str, health: &dyn Health) -> (StatusCode, String) {
    let fine = |text: &str| (StatusCode::OK, text.to_owned());
    let unavailable = |text: String| (StatusCode::SERVICE_UNAVAILABLE, text);
    match (method, path) {
        (&Method::GET, "/livez") => match health.stranded().await {
            None => fine("alive\n"),
            Some(why) => unavailable(format!("not alive: {why}\n")),
        },
        (&Method::GET, "/readyz") => match health.missing() {
            missing if missing.is_empty() => fine("ready\n"),
            missing => unavailable(format!("not ready: {}\n", missing.join(", "))),
        },
        (&Method::GET, "/metrics") => match health.metrics() {
            Ok(text) => (StatusCode::OK, text),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        },
        (&Method::GET, _) => {
            let text = "there are /readyz, /livez and /metrics\n";
            (StatusCode::NOT_FOUND, text.to_owned())
        }
        _ => (StatusCode::METHOD_NOT_ALLOWED, "only GET\n".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Part {
        missing: Vec<String>,
        stranded: Option<String>,
    }

    impl Health for Part {
        fn missing(&self) -> Vec<String> {
            self.missing.clone()
        }

        fn stranded(&self) -> BoxFuture<'_, Option<String>> {
            Box::pin(std::future::ready(self.stranded.clone()))
        }

        fn metrics(&self) -> Result<String, std::fmt::Error> {
            Err(std::fmt::Error)
        }

        fn turned_away(&self) {}
    }

    #[tokio::test]
    async fn it_says_what_is_missing_and_only_reads() {
        let ask = async |part: &Part, method: Method, path: &str| {
            let (status, text) = answer(&method, path, part).await;
            (status.as_u16(), text)
        };
        let mut part = Part {
            missing: Vec::new(),
            stranded: None,
        };
        assert_eq!(
            ask(&part, Method::GET, "/livez").await,
            (200, "alive\n".to_owned())
        );
        assert_eq!(
            ask(&part, Method::GET, "/readyz").await,
            (200, "ready\n".to_owned())
        );
        part.missing = vec!["a key".to_owned(), "a list".to_owned()];
        part.stranded = Some("the roots have changed".to_owned());
        let not_ready = (503, "not ready: a key, a list\n".to_owned());
        assert_eq!(ask(&part, Method::GET, "/readyz").await, not_ready);
        let not_alive = (503, "not alive: the roots have changed\n".to_owned());
        assert_eq!(ask(&part, Method::GET, "/livez").await, not_alive);
        assert_eq!(ask(&part, Method::GET, "/metrics").await.0, 500);
        assert_eq!(ask(&part, Method::GET, "/").await.0, 404);
        assert_eq!(ask(&part, Method::POST, "/readyz").await.0, 405);
    }
}
