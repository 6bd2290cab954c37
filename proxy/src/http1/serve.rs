//! One HTTP/1 connection from its first request to its end, read by hyper behind the guard.
//!
//! Always true: hyper sees only what the guard passed; a drain ends the connection after the request
//! that runs; a refusal of the guard that no request carried is handed back, to be recorded.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use sidegate_mesh::Clock;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{GuardHandle, GuardLimits, Rejection, ServerGuard, server};
use crate::body::Body;
use crate::drain::Drain;
use crate::error::RequestError;

/// The code of [`RequestError::BadRequest`].
pub const BAD_REQUEST: &str = "bad_request";

/// What holds for a connection.
pub struct Serving<'a> {
    /// What one head may cost.
    pub limits: GuardLimits,
    /// How long it may be without a request.
    pub idle: Duration,
    /// The time.
    pub clock: &'a Arc<dyn Clock>,
    /// When to go away.
    pub drain: &'a Drain,
}

/// Serves `io` with `answer` to its end; the refusal that nobody has been told of yet, if any.
pub async fn serve<IO, F>(
    io: IO,
    serving: &Serving<'_>,
    answer: impl Fn(Request<Incoming>, GuardHandle) -> F,
) -> Option<Rejection>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Future<Output = Response<Body>>,
{
    let clock = Arc::clone(serving.clock);
    let (io, handle) = ServerGuard::new(io, serving.limits, clock);
    // Not awaited in a block of its own, which would move what is large once more.
    let service = service_fn(|request| answer(request, handle.clone()).map(Ok::<_, Infallible>));
    let served = server(serving.idle, &serving.limits)
        .serve_connection(TokioIo::new(io), service)
        .with_upgrades();
    let mut served = pin!(served);
    let mut draining = pin!(serving.drain.draining());
    let mut told = false;
    loop {
        tokio::select! {
            ended = served.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "connection ended");
                }
                break;
            }
            () = draining.as_mut(), if !told => {
                told = true;
                served.as_mut().graceful_shutdown();
            }
        }
    }
    handle.take_unreported()
}

/// A refusal of the guard, as the failure of a call.
pub fn refused(rejection: Rejection) -> RequestError {
    if rejection.status() == StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE {
        RequestError::HeaderListTooLarge
    } else {
        RequestError::BadRequest {
            reason: rejection.code(),
        }
    }
}

/// What a call failed with: a body that the guard refused looks like a caller that gave up.
pub fn cause(error: RequestError, guard: Option<&GuardHandle>) -> RequestError {
    let refusal = || {
        let guard = guard.filter(|guard| guard.rejection().is_some())?;
        guard.take_unreported()
    };
    match error {
        RequestError::PeerReset { .. } => refusal().map_or(error, refused),
        _ => error,
    }
}
