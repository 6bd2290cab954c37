//! The small HTTP/1 server behind the administration and the health port.
//!
//! Invariants: it reads no body; connections are bounded in number, in the time that a head may take
//! and in their whole life; where strangers reach the port, those that ask nothing make room for
//! those that do; what it answers is never cached.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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

use crate::limits::{Limit, Permit};

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

/// How many connections there are, and for how long.
pub(crate) struct Bounds {
    /// At once.
    pub(crate) connections: Limit,
    /// Longest life of each.
    pub(crate) life_max: Duration,
    /// Whether a new one takes the place of the oldest that waits for a request, when there are too
    /// many. Otherwise it is closed.
    pub(crate) makes_room: bool,
}

/// Connections in the order in which they came.
#[derive(Default)]
struct Places(Mutex<Vec<Arc<Place>>>);

/// One connection's right to be.
struct Place {
    permit: Mutex<Option<Permit>>,
    answering: AtomicBool,
    taken: CancellationToken,
}

impl Places {
    fn enter(&self, permit: Permit) -> Arc<Place> {
        let place = Arc::new(Place {
            permit: Mutex::new(Some(permit)),
            answering: AtomicBool::new(false),
            taken: CancellationToken::new(),
        });
        self.lock().push(Arc::clone(&place));
        place
    }

    fn leave(&self, place: &Arc<Place>) {
        self.lock().retain(|other| !Arc::ptr_eq(other, place));
    }

    /// The permit of the oldest connection that has nothing to answer, which ends by that.
    fn take_one(&self) -> Option<Permit> {
        let mut places = self.lock();
        let idle = |place: &Arc<Place>| !place.answering.load(Ordering::Acquire);
        let at = places.iter().position(idle)?;
        let place = places.remove(at);
        place.taken.cancel();
        let mut permit = place.permit.lock().unwrap_or_else(PoisonError::into_inner);
        permit.take()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Place>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves `listener` until `stop`, then ends its connections.
pub(crate) async fn serve(
    listener: TcpListener,
    respond: Arc<dyn Respond>,
    bounds: Bounds,
    stop: CancellationToken,
) {
    let places = Arc::new(Places::default());
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
        // Beyond the limit one connection is closed, this one or an older one; the limit counts.
        let permit = bounds.connections.try_acquire();
        let room = || bounds.makes_room.then(|| places.take_one()).flatten();
        if let Some(permit) = permit.or_else(room) {
            let place = places.enter(permit);
            let connection = serve_connection(stream, Arc::clone(&respond), Arc::clone(&place));
            let connection = tokio::time::timeout(bounds.life_max, connection);
            let (stop, places) = (stop.clone(), Arc::clone(&places));
            tasks.spawn(async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = place.taken.cancelled() => debug!("connection made room for another"),
                    ended = connection => if ended.is_err() {
                        debug!("connection cut at the end of its longest life");
                    }
                }
                places.leave(&place);
            });
        }
    }
    tasks.close();
    tasks.wait().await;
}

async fn serve_connection(stream: TcpStream, respond: Arc<dyn Respond>, place: Arc<Place>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let (head, _body) = request.into_parts();
        let reply = respond.respond(&head);
        let place = Arc::clone(&place);
        place.answering.store(true, Ordering::Release);
        async move {
            let answer = match reply {
                Reply::Now(answer) => Ok(answer),
                Reply::Later(answer) => answer.await.ok_or(NoAnswer),
            };
            place.answering.store(false, Ordering::Release);
            answer
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
