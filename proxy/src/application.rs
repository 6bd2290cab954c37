//! Connections to the application beside this sidecar.
//!
//! Always true: the application hears what the caller spoke; a request that was given up leaves no
//! half-sent message in a pool, because dropping its [`Exchange`] before the end aborts what it
//! ran on; and a connection to the application is made only to an address of the configuration.

mod body;
mod http1;
mod http2;
mod interims;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use h2::Reason;
use http::{HeaderMap, Request, Response, StatusCode, Version};
use sidegate_mesh::Clock;
use tokio::net::TcpStream;
use tokio_util::task::TaskTracker;

use crate::body::Body;
use crate::error::RequestError;
use crate::http1::GuardLimits;
use crate::limits::{Limit, Permit};
use crate::shared::Shared;
use crate::wire::WireLimits;
use crate::wire::tunnel::Abortable;

pub use body::{Progress, RequestBody};
pub use http1::{InUse, Upgrade};
pub use http2::Stream;
pub use interims::{Informational, Interims};

/// The connections of one worker to its application.
#[derive(Clone)]
pub struct Application {
    dialer: Dialer,
    http1: http1::Pool,
    http2: http2::Pool,
}

/// A request for the application.
pub struct Outgoing<F> {
    /// Where the application is.
    pub address: SocketAddr,
    /// Makes the head; asked again where a second sending does no harm.
    pub head: F,
    /// The body.
    pub body: Body,
}

/// The head and body of an application's answer, and what they came on.
pub struct Answer {
    /// The answer; an upgrade's has status 101 and an empty body.
    pub response: Response<Body>,
    /// To be kept until the response's body has been passed on.
    pub exchange: Exchange,
}

/// What one request runs on; dropped before [`Self::finish`], it is aborted, and the application
/// sees a connection or a stream that was reset.
pub enum Exchange {
    /// An HTTP/1 connection of its own until the end.
    Http1(InUse),
    /// A stream of an HTTP/2 connection.
    Http2(Stream),
}

impl Exchange {
    /// The response was passed on to its end, and the request's body was sent to its own.
    pub fn finish(self) {
        match self {
            Self::Http1(connection) => connection.release(),
            Self::Http2(stream) => stream.release(),
        }
    }

    /// The byte stream behind a 101.
    ///
    /// # Errors
    ///
    /// [`RequestError::UpstreamProtocol`] when there is none.
    pub async fn upgrade(self, response: Response<Body>) -> Result<Upgrade, RequestError> {
        match self {
            Self::Http1(connection) => connection.upgrade(response).await,
            Self::Http2(_) => Err(RequestError::UpstreamProtocol {
                detail: "101 over HTTP/2".to_owned(),
            }),
        }
    }
}

impl Application {
    /// No connection yet.
    pub fn new(shared: &Shared) -> Self {
        let limits = &shared.config.limits;
        let dialer = Dialer {
            permits: shared.limits.application_connections.clone(),
            timeout: limits.connect_timeout,
            idle_max: limits.application_idle_timeout,
            clock: Arc::clone(&shared.clock),
            tasks: TaskTracker::new(),
        };
        let guard = GuardLimits::from(limits);
        let wire = wire_limits(shared);
        Self {
            http1: http1::Pool::new(dialer.clone(), guard),
            http2: http2::Pool::new(dialer.clone(), wire),
            dialer,
        }
    }

    /// Sends a request in the version that its head has and waits for the head of its answer.
    /// Informational answers go to `interims` before.
    ///
    /// # Errors
    ///
    /// [`RequestError::UpstreamConnect`] when the application could not be reached and so saw
    /// nothing; that of the head; else why there is no answer.
    pub async fn send(
        &self,
        outgoing: Outgoing<impl Fn() -> Result<Request<()>, RequestError>>,
        interims: &Interims,
    ) -> Result<Answer, RequestError> {
        let head = (outgoing.head)()?;
        if head.version() == Version::HTTP_2 {
            self.http2.send(head, outgoing, interims).await
        } else {
            self.http1.send(head, outgoing, interims).await
        }
    }

    /// Opens a connection for opaque bytes.
    ///
    /// # Errors
    ///
    /// [`RequestError::UpstreamConnect`] when the application cannot be reached.
    pub async fn connect(&self, address: SocketAddr) -> Result<(Abortable, Permit), RequestError> {
        self.dialer.dial(address).await
    }

    /// Closes connections that were not used for a while. Called about once a second.
    pub fn close_idle(&self) {
        self.http1.close_idle();
        self.http2.close_idle();
    }
}

/// The bounds of every HTTP/2 connection of this sidecar.
pub fn wire_limits(shared: &Shared) -> WireLimits {
    WireLimits::from(&shared.config.limits)
}

/// Opens connections within the bound on all of them.
#[derive(Clone)]
struct Dialer {
    permits: Limit,
    timeout: Duration,
    /// Longest that an unused connection is kept.
    idle_max: Duration,
    clock: Arc<dyn Clock>,
    /// Not those that a drain waits for: an unused connection is no open call.
    tasks: TaskTracker,
}

impl Dialer {
    async fn dial(&self, address: SocketAddr) -> Result<(Abortable, Permit), RequestError> {
        let permit = self.permits.try_acquire().ok_or(RequestError::Overloaded {
            bound: "applicationConnectionsMax",
        })?;
        let connected = tokio::select! {
            connected = TcpStream::connect(address) => connected,
            () = self.clock.sleep(self.timeout) => Err(io::ErrorKind::TimedOut.into()),
        };
        let stream = connected.map_err(|error| RequestError::UpstreamConnect {
            detail: error.kind().to_string(),
        })?;
        // A failure means that the peer is gone already, which the first write reports.
        drop(stream.set_nodelay(true));
        Ok((Abortable::new(stream), permit))
    }
}

/// A response whose head may be passed on as informational: never 101, which only an upgrade has.
fn informational_head(status: StatusCode, headers: &HeaderMap) -> Option<Informational> {
    if !status.is_informational() || status == StatusCode::SWITCHING_PROTOCOLS {
        return None;
    }
    let mut response = Response::new(());
    *response.status_mut() = status;
    *response.headers_mut() = headers.clone();
    Some(response)
}

fn reset(reason: Option<Reason>, detail: &impl ToString) -> RequestError {
    RequestError::UpstreamReset {
        reason,
        detail: detail.to_string(),
    }
}
