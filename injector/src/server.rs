//! HTTPS for the API server: TLS from the mesh's identity, HTTP/1.1 and HTTP/2.
//!
//! Invariants: each handshake shows the SVID of its moment, and its connection ends with it;
//! connections, handshakes, reviews, bytes and times are bounded; what is no review gets a status
//! that says so.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body as _, Incoming};
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use sidegate_mesh::clock::Clock;
use sidegate_mtls::{CredentialStore, HandshakeError, server_config_open};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Limits;
use crate::connections::{Connection, Connections, Guard};
use crate::metrics::{Metrics, Which};
use crate::webhook::{BadRequest, Webhook};

const ALPN_H2: &[u8] = b"h2";
const ALPN_HTTP1: &[u8] = b"http/1.1";
/// Largest request head.
const HEAD_BYTES_MAX: usize = 32 * 1024;
/// Pause after the system could not accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long an idle HTTP/2 connection goes without a ping.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// How long a connection may take to end after it was told to.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// What every connection shares.
pub(crate) struct Door {
    pub(crate) store: Arc<CredentialStore>,
    pub(crate) webhook: Webhook,
    pub(crate) limits: Limits,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) connections: Arc<Connections>,
    pub(crate) handshakes: Semaphore,
    pub(crate) reviews: Semaphore,
    pub(crate) tracker: TaskTracker,
}

/// Serves until `cancel`; open connections then end their reviews.
pub(crate) async fn serve(listener: TcpListener, door: Arc<Door>, cancel: CancellationToken) {
    loop {
        let accepted = tokio::select! {
            () = cancel.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => door.admit(stream, &cancel),
            Err(error) => {
                tracing::warn!(error = %error, "cannot accept");
                door.clock.sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

impl Door {
    fn admit(self: &Arc<Self>, stream: TcpStream, cancel: &CancellationToken) {
        let Some((guard, made_room)) = self.connections.enter() else {
            self.metrics.connection_refused("everybody_busy");
            return;
        };
        if made_room {
            self.metrics.connection_refused("idle_for_another");
        }
        let (door, cancel) = (Arc::clone(self), cancel.clone());
        self.tracker.spawn(async move {
            tokio::select! {
                () = guard.ended() => {}
                () = door.serve_connection(stream, &guard, cancel) => {}
            }
        });
    }

    async fn serve_connection(
        self: &Arc<Self>,
        stream: TcpStream,
        guard: &Guard,
        cancel: CancellationToken,
    ) {
        let handshake = self.handshake(stream);
        let (stream, not_after) = tokio::select! {
            () = cancel.cancelled() => return,
            done = handshake => match done {
                Ok(done) => done,
                Err(error) => {
                    self.metrics.handshake_failed(error.code());
                    return tracing::debug!(error = %error, "handshake failed");
                }
            },
        };
        // Nobody checks our certificate again on an open connection, so it ends with it.
        let end = async {
            tokio::select! {
                () = cancel.cancelled() => {}
                () = self.clock.sleep_until(not_after) => {}
            }
        };
        let is_h2 = stream.get_ref().1.alpn_protocol() == Some(ALPN_H2);
        let service = Reviews {
            door: Arc::clone(self),
            connection: Arc::clone(&guard.connection),
        };
        let ended = if is_h2 {
            self.serve_http2(stream, service, end).await
        } else {
            self.serve_http1(stream, service, end).await
        };
        if let Err(error) = ended {
            tracing::debug!(error = %error, "connection ended");
        }
    }

    async fn handshake(
        &self,
        stream: TcpStream,
    ) -> Result<(TlsStream<TcpStream>, SystemTime), HandshakeError> {
        let timeout = self.limits.handshake_timeout;
        let accept = async {
            let closed = |_| HandshakeError::Io(io::ErrorKind::BrokenPipe.into());
            let _permit = self.handshakes.acquire().await.map_err(closed)?;
            stream.set_nodelay(true).map_err(HandshakeError::Io)?;
            let credentials = self.store.current().ok_or(HandshakeError::NotReady)?;
            let config = server_config_open(&credentials, &[ALPN_H2, ALPN_HTTP1])?;
            let accept = TlsAcceptor::from(Arc::new(config)).accept(stream);
            let stream = accept.await.map_err(HandshakeError::Io)?;
            Ok((stream, credentials.svid().not_after))
        };
        tokio::select! {
            biased;
            done = accept => done,
            () = self.clock.sleep(timeout) => Err(HandshakeError::Timeout { after: timeout }),
        }
    }

    async fn serve_http1(
        &self,
        stream: TlsStream<TcpStream>,
        service: Reviews,
        end: impl Future<Output = ()>,
    ) -> hyper::Result<()> {
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.review_timeout)
            .max_buf_size(HEAD_BYTES_MAX)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        tokio::select! {
            ended = connection.as_mut() => return ended,
            () = end => {}
        }
        connection.as_mut().graceful_shutdown();
        self.close(connection).await
    }

    async fn serve_http2(
        &self,
        stream: TlsStream<TcpStream>,
        service: Reviews,
        end: impl Future<Output = ()>,
    ) -> hyper::Result<()> {
        let connection = hyper::server::conn::http2::Builder::new(Spawn(self.tracker.clone()))
            .timer(TokioTimer::new())
            .max_concurrent_streams(self.limits.streams_per_connection_max)
            .max_header_list_size(u32::try_from(HEAD_BYTES_MAX).unwrap_or(u32::MAX))
            .keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(self.limits.review_timeout)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        tokio::select! {
            ended = connection.as_mut() => return ended,
            () = end => {}
        }
        connection.as_mut().graceful_shutdown();
        self.close(connection).await
    }

    async fn close(
        &self,
        connection: impl Future<Output = hyper::Result<()>>,
    ) -> hyper::Result<()> {
        tokio::select! {
            ended = connection => ended,
            () = self.clock.sleep(CLOSE_TIMEOUT) => Ok(()),
        }
    }

    /// One request, from its head to its answer.
    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        match self.review(request).await {
            Ok(body) => respond(StatusCode::OK, "application/json", body),
            Err(refused) => {
                self.metrics.request_refused(refused.reason);
                respond(
                    refused.status,
                    "text/plain; charset=utf-8",
                    format!("{}\n", refused.message),
                )
            }
        }
    }

    async fn review(&self, request: Request<Incoming>) -> Result<String, Refused> {
        let which = route(&request)?;
        let Ok(_permit) = self.reviews.try_acquire() else {
            return Err(Refused::new(
                503,
                "busy",
                "too many reviews are in flight; try again",
            ));
        };
        let bounded = |what: &'static str| {
            let timeout = self.limits.review_timeout;
            let sleep = self.clock.sleep(timeout);
            async move {
                sleep.await;
                Refused::new(
                    if what == "body" { 408 } else { 503 },
                    "timeout",
                    "this takes too long",
                )
            }
        };
        let body = tokio::select! {
            body = self.body(request) => body?,
            refused = bounded("body") => return Err(refused),
        };
        tokio::select! {
            answer = self.webhook.review(which, &body) => {
                answer.map_err(|BadRequest(message)| Refused::new(400, "malformed", &message))
            }
            refused = bounded("answer") => Err(refused),
        }
    }

    async fn body(&self, request: Request<Incoming>) -> Result<Bytes, Refused> {
        let max = self.limits.body_bytes_max;
        let too_large = || {
            Refused::new(
                413,
                "too_large",
                &format!("a review has at most {max} bytes"),
            )
        };
        let announced = request.body().size_hint().lower();
        if announced > u64::try_from(max).unwrap_or(u64::MAX) {
            return Err(too_large());
        }
        match Limited::new(request.into_body(), max).collect().await {
            Ok(body) => Ok(body.to_bytes()),
            Err(error) if error.is::<LengthLimitError>() => Err(too_large()),
            Err(_) => Err(Refused::new(400, "cut_off", "the body was cut off")),
        }
    }
}

/// A request that gets no review's answer.
struct Refused {
    status: StatusCode,
    reason: &'static str,
    message: String,
}

impl Refused {
    fn new(status: u16, reason: &'static str, message: &str) -> Self {
        Self {
            status: StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_REQUEST),
            reason,
            message: message.to_owned(),
        }
    }
}

/// Which webhook a request is for.
fn route(request: &Request<Incoming>) -> Result<Which, Refused> {
    let which = match request.uri().path() {
        "/mutate" => Which::Mutate,
        "/validate" => Which::Validate,
        _ => return Err(Refused::new(404, "path", "there are /mutate and /validate")),
    };
    if request.method() != Method::POST {
        return Err(Refused::new(405, "method", "only POST"));
    }
    let content_type = request.headers().get(header::CONTENT_TYPE);
    let content_type = content_type
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let media_type = content_type.split(';').next().unwrap_or_default().trim();
    if !media_type.eq_ignore_ascii_case("application/json") {
        return Err(Refused::new(
            415,
            "content_type",
            "a review is application/json",
        ));
    }
    Ok(which)
}

fn respond(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let content_type = HeaderValue::from_static(content_type);
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, content_type);
    response
}

/// Answers the requests of one connection.
struct Reviews {
    door: Arc<Door>,
    connection: Arc<Connection>,
}

impl Service<Request<Incoming>> for Reviews {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let door = Arc::clone(&self.door);
        let busy = Guard::busy(&door.connections, &self.connection);
        Box::pin(async move {
            let response = door.answer(request).await;
            drop(busy);
            Ok(response)
        })
    }
}

/// Runs the streams of HTTP/2 where shutdown waits for them.
#[derive(Clone)]
struct Spawn(TaskTracker);

impl<F> hyper::rt::Executor<F> for Spawn
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, future: F) {
        self.0.spawn(future);
    }
}
