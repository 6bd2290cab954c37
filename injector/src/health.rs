//! The health port: is it ready, does it live, what did it count.
//!
//! Invariants: ready means that a pod can be injected now; not alive means that only a new start
//! can help: our certificate has ended, and the roots that the CA is known by are others than those
//! that we started with.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use sidegate_mtls::{CredentialStore, IdentityStatus};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::ca_bundle::CaBundle;
use crate::connections::Connections;
use crate::metrics::{Metrics, Readings};
use crate::namespaces::NamespaceWatch;

/// Connections served at once.
const CONNECTIONS_MAX: usize = 32;
/// Longest request head.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What the health port looks at.
pub(crate) struct Health {
    pub(crate) store: Arc<CredentialStore>,
    pub(crate) identity: Arc<IdentityStatus>,
    pub(crate) namespaces: Arc<NamespaceWatch>,
    pub(crate) bundles: [Arc<CaBundle>; 2],
    pub(crate) connections: Arc<Connections>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) root_file: PathBuf,
    /// The root file as it was at the start.
    pub(crate) root: Vec<u8>,
    pub(crate) is_ending: AtomicBool,
}

impl Health {
    /// What is missing; empty when the injector is ready.
    fn missing(&self) -> Vec<String> {
        let mut missing = Vec::new();
        if self.is_ending.load(Ordering::Acquire) {
            missing.push("it ends".to_owned());
        }
        if let Err(error) = self.store.own_svid_is_trusted() {
            let why = self.identity.snapshot().last_error;
            let mut text = format!("no usable certificate: {error}");
            if let Some(why) = why {
                // Writing to a String cannot fail.
                write!(text, " ({why})").ok();
            }
            missing.push(text);
        }
        if !self.namespaces.is_synced() {
            missing.push("the namespaces are not known yet".to_owned());
        }
        if !self.bundles.iter().all(|bundle| bundle.is_settled()) {
            missing.push("the webhook configurations do not have our roots yet".to_owned());
        }
        missing
    }

    async fn is_stranded(&self) -> bool {
        if self.store.own_svid_is_trusted().is_ok() {
            return false;
        }
        let now = tokio::fs::read(&self.root_file).await;
        now.is_ok_and(|now| now != self.root)
    }

    async fn answer(&self, request: &Request<Incoming>) -> (StatusCode, String) {
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/livez") if self.is_stranded().await => {
                let text =
                    "the CA's roots have changed since the start, and the certificate has ended\n";
                (StatusCode::SERVICE_UNAVAILABLE, text.to_owned())
            }
            (&Method::GET, "/livez") => (StatusCode::OK, "ok\n".to_owned()),
            (&Method::GET, "/readyz") => match self.missing() {
                missing if missing.is_empty() => (StatusCode::OK, "ok\n".to_owned()),
                missing => (
                    StatusCode::SERVICE_UNAVAILABLE,
                    format!("{}\n", missing.join("\n")),
                ),
            },
            (&Method::GET, "/metrics") => match self.metrics.text(&self.readings()) {
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

    fn readings(&self) -> Readings {
        let current = self.store.current();
        Readings {
            connections: self.connections.len(),
            namespaces: self.namespaces.len(),
            not_after: current.map(|current| current.svid().not_after),
            renewals_failed: self.identity.snapshot().renewals_failed,
        }
    }
}

/// Serves until `cancel`.
pub(crate) async fn serve(
    listener: TcpListener,
    health: Arc<Health>,
    tracker: TaskTracker,
    cancel: CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let permit = tokio::select! {
            () = cancel.cancelled() => return,
            permit = Arc::clone(&slots).acquire_owned() => permit,
        };
        let accepted = tokio::select! {
            () = cancel.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (Ok(permit), Ok((stream, _))) = (permit, accepted) else {
            health.store.clock().sleep(Duration::from_millis(100)).await;
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

async fn serve_connection(stream: TcpStream, health: Arc<Health>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let health = Arc::clone(&health);
        async move {
            let (status, text) = health.answer(&request).await;
            let metrics = status == StatusCode::OK && request.uri().path() == "/metrics";
            let mut response = Response::new(Full::new(Bytes::from(text)));
            *response.status_mut() = status;
            let content_type = if metrics {
                OPENMETRICS
            } else {
                "text/plain; charset=utf-8"
            };
            let content_type = HeaderValue::from_static(content_type);
            response
                .headers_mut()
                .insert(header::CONTENT_TYPE, content_type);
            Ok::<_, Infallible>(response)
        }
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
