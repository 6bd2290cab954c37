//! HTTP/1 from the application, read by hyper behind the guard.
//!
//! Invariant: hyper sees only what the guard passed, and every refusal of the guard is answered and
//! on record.

use std::sync::Arc;

use http::{HeaderValue, Request, Response, Version, header};
use hyper::body::Incoming;

use super::{Caller, Connection, Outbound, leads_nowhere};
use crate::body::Body;
use crate::detect::Prefixed;
use crate::http1::{self, BAD_REQUEST, GuardHandle, Rejection, Serving};
use crate::refusal::{self, Form};
use crate::wire;
use crate::wire::tunnel::Abortable;

impl Outbound {
    /// Serves one connection to its end; a drain ends it after the request that runs.
    pub(super) async fn serve_http1(
        self: &Arc<Self>,
        io: Prefixed<Abortable>,
        connection: Connection,
    ) {
        let connection = Arc::new(connection);
        let answer = {
            let (this, connection) = (Arc::clone(self), Arc::clone(&connection));
            move |request, handle| {
                let (this, connection) = (Arc::clone(&this), Arc::clone(&connection));
                async move { this.answer(request, &handle, &connection).await }
            }
        };
        let serving = Serving {
            limits: self.guard,
            idle: self.shared.config.limits.connection_idle_timeout,
            clock: &self.shared.clock,
            drain: &self.shared.drain,
        };
        if let Some(rejection) = http1::serve(io, &serving, answer).await {
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
            destined: connection.destined.clone(),
            // hyper sends a 100 when the body is first read, and can send no other.
            interim: None,
            upgrade: gate.map(|gate| (hyper::upgrade::on(&mut request), gate)),
            abort: connection.abort.clone(),
            guard: Some(handle.clone()),
        };
        let mut response = self.handle_request(request.map(Body::from), caller).await;
        *response.version_mut() = Version::HTTP_11;
        // Whoever sends what could be read in two ways is not read any further.
        let code = response.headers().get(wire::ERROR);
        if code.is_some_and(|code| code == BAD_REQUEST) || leads_nowhere(&response) {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(header::CONNECTION, close);
        }
        response
    }

    fn refuse_head(&self, connection: &Connection, rejection: Rejection) -> Response<Body> {
        let error = http1::refused(rejection);
        let mut call = self.begin(connection.address);
        call.record().protocol = sidegate_mesh::access_log::Protocol::Http1;
        let mut response = refusal::respond(call, &error, Form::default());
        *response.status_mut() = rejection.status();
        response
    }
}
