//! HTTP/1 from the application, read by hyper behind the guard.
//!
//! Invariant: hyper sees only what the guard passed, and every refusal of the guard is answered and
//! on record.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;

use http::{HeaderValue, Request, Response, StatusCode, Version, header};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;

use super::{Caller, Connection, Outbound, respond};
use crate::body::Body;
use crate::detect::Prefixed;
use crate::error::RequestError;
use crate::http1::{self, GuardHandle, Rejection, ServerGuard};
use crate::wire;
use crate::wire::tunnel::Abortable;

/// The code of [`RequestError::BadRequest`].
const BAD_REQUEST: &str = "bad_request";

impl Outbound {
    /// Serves one connection to its end; a drain ends it after the request that runs.
    pub(super) async fn serve_http1(
        self: &Arc<Self>,
        io: Prefixed<Abortable>,
        connection: Connection,
    ) {
        let (io, handle) = ServerGuard::new(io, self.guard, Arc::clone(&self.shared.clock));
        let connection = Arc::new(connection);
        let service = {
            let (this, handle) = (Arc::clone(self), handle.clone());
            let connection = Arc::clone(&connection);
            service_fn(move |request| {
                let (this, handle) = (Arc::clone(&this), handle.clone());
                let connection = Arc::clone(&connection);
                async move { Ok::<_, Infallible>(this.answer(request, &handle, &connection).await) }
            })
        };
        let idle = self.shared.config.limits.connection_idle_timeout;
        let served = http1::server(idle, &self.guard)
            .serve_connection(TokioIo::new(io), service)
            .with_upgrades();
        let mut served = pin!(served);
        let mut draining = pin!(self.shared.drain.draining());
        let mut told = false;
        loop {
            tokio::select! {
                ended = served.as_mut() => {
                    if let Err(error) = ended {
                        tracing::debug!(peer.addr = %connection.address, %error, "connection ended");
                    }
                    break;
                }
                () = draining.as_mut(), if !told => {
                    told = true;
                    served.as_mut().graceful_shutdown();
                }
            }
        }
        if let Some(rejection) = handle.take_unreported() {
            drop(self.refuse_head(&connection, rejection));
        }
    }

    async fn answer(
        self: &Arc<Self>,
        mut request: Request<Incoming>,
        handle: &GuardHandle,
        connection: &Connection,
    ) -> Response<Body> {
        let gate = match handle.admit(&request) {
            Ok(gate) => gate,
            Err(rejection) => return self.refuse_head(connection, rejection),
        };
        let caller = Caller {
            address: connection.address,
            bound: connection.bound.clone(),
            // hyper sends a 100 when the body is first read, and can send no other.
            interim: None,
            upgrade: gate.map(|gate| (hyper::upgrade::on(&mut request), gate)),
            abort: connection.abort.clone(),
            guard: Some(handle.clone()),
        };
        let mut response = self.handle_request(request.map(Body::from), caller).await;
        *response.version_mut() = Version::HTTP_11;
        // Whoever sends what could be read in two ways is not read any further.
        if response
            .headers()
            .get(wire::ERROR)
            .is_some_and(|code| code == BAD_REQUEST)
        {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(header::CONNECTION, close);
        }
        response
    }

    fn refuse_head(&self, connection: &Connection, rejection: Rejection) -> Response<Body> {
        let error = refused(rejection);
        let mut call = self.begin(connection.address);
        call.record().protocol = sidegate_mesh::access_log::Protocol::Http1;
        let mut response = respond::refusal(call, &error, respond::Form::default());
        *response.status_mut() = rejection.status();
        response
    }
}

/// A refusal of the guard, as the failure of a call.
fn refused(rejection: Rejection) -> RequestError {
    if rejection.status() == StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE {
        RequestError::HeaderListTooLarge
    } else {
        RequestError::BadRequest {
            reason: rejection.code(),
        }
    }
}

/// What a call failed with: a body that the guard refused looks like a caller that gave up.
pub(super) fn cause(error: RequestError, guard: Option<&GuardHandle>) -> RequestError {
    let refusal = || {
        let guard = guard.filter(|guard| guard.rejection().is_some())?;
        guard.take_unreported()
    };
    match error {
        RequestError::PeerReset { .. } => refusal().map_or(error, refused),
        _ => error,
    }
}
