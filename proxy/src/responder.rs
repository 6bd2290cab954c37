//! The small HTTP/1 server behind the administration and the health port.
//!
//! Invariants: it reads no body; connections are bounded in number, in the time that a head may take
//! and in their whole life; what it answers is never cached.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use http::request::Parts;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::debug;

use crate::limits::Limit;

/// Longest wait for a head, the first and each later one.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest life of a connection of which nothing else is known, so that one that reads slowly holds
/// its place no longer.
pub(crate) const CONNECTION_LIFE_MAX: Duration = Duration::from_mins(2);
/// Bytes of a head.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Pause after a failed accept, such as with no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What is answered.
pub(crate) type Answer = Response<Full<Bytes>>;

/// When it is answered.
pub(crate) enum Reply {
    /// From memory.
    Now(Answer),
    /// When something was found out; `None` closes the connection without a word.
    Later(BoxFuture<'static, Option<Answer>>),
}

impl From<Answer> for Reply {
    fn from(answer: Answer) -> Self {
        Self::Now(answer)
    }
}

/// Answers one request.
pub(crate) trait Respond: Send + Sync + 'static {
    /// The answer; only the head is given, a body is thrown away.
    fn respond(&self, request: &Parts) -> Reply;
}

/// The connection is to be closed without an answer.
#[derive(Debug, thiserror::Error)]
#[error("no answer is given")]
struct NoAnswer;

/// Serves `listener` until `stop`, then ends its connections, of which none lives longer than
/// `life_max`.
pub(crate) async fn serve(
    listener: TcpListener,
    respond: Arc<dyn Respond>,
    connections: Limit,
    life_max: Duration,
    stop: CancellationToken,
) {
    let tasks = TaskTracker::new();
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                debug!(%error, "accept failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Beyond the limit a connection is closed at once, which the limit has counted.
        if let Some(permit) = connections.try_acquire() {
            let connection = serve_connection(stream, Arc::clone(&respond));
            let stop = stop.clone();
            tasks.spawn(async move {
                let connection = tokio::time::timeout(life_max, connection);
                if let Some(Err(_)) = stop.run_until_cancelled(connection).await {
                    debug!("connection cut at the end of its longest life");
                }
                drop(permit);
            });
        }
    }
    tasks.close();
    tasks.wait().await;
}

async fn serve_connection(stream: TcpStream, respond: Arc<dyn Respond>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let (head, _body) = request.into_parts();
        let reply = respond.respond(&head);
        async move {
            match reply {
                Reply::Now(answer) => Ok(answer),
                Reply::Later(answer) => answer.await.ok_or(NoAnswer),
            }
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        debug!(%error, "connection ended");
    }
}

/// An answer of `content_type`.
pub(crate) fn answer(status: StatusCode, content_type: &'static str, body: String) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body)));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    answer
}

/// An answer without a body.
pub(crate) fn empty(status: StatusCode) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::new()));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}

/// A short answer in words.
pub(crate) fn words(status: StatusCode, words: impl Into<String>) -> Answer {
    let mut words = words.into();
    words.push('\n');
    answer(status, "text/plain; charset=utf-8", words)
}

/// The refusal of everything but reading; `None` when the request reads.
pub(crate) fn refuse_writing(request: &Parts) -> Option<Answer> {
    if request.method == Method::GET || request.method == Method::HEAD {
        return None;
    }
    let mut answer = words(StatusCode::METHOD_NOT_ALLOWED, "only GET");
    answer
        .headers_mut()
        .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    Some(answer)
}
