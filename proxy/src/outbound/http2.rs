//! HTTP/2 from the application, with prior knowledge: also gRPC.
//!
//! The h2 crate itself, as between sidecars: it passes informational responses, tells an abort from
//! an end, and leaves a header list that is too large to us.
//!
//! Invariant: a stream that the application resets is reset upstream, and the other way round.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::{Request, Response};
use http_body::Body as _;

use super::{Caller, Connection, Outbound, leads_nowhere};
use crate::body::{Body, RecvBody};
use crate::detect::Prefixed;
use crate::forward::Interim;
use crate::wire::send::send_body;
use crate::wire::tunnel::Abortable;

/// How many streams a connection carries, and how many it has carried.
#[derive(Default)]
struct Streams {
    begun: AtomicU64,
    ended: AtomicU64,
}

impl Streams {
    fn is_idle(&self) -> bool {
        self.ended.load(Ordering::Acquire) == self.begun.load(Ordering::Acquire)
    }
}

/// One stream of a connection, until it is dropped.
struct Open(Arc<Streams>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, Ordering::AcqRel);
    }
}

impl Outbound {
    /// Serves one connection to its end; a drain lets the streams that run go on.
    pub(super) async fn serve_http2(
        self: &Arc<Self>,
        io: Prefixed<Abortable>,
        connection: Connection,
    ) {
        let limits = &self.shared.config.limits;
        let clock = &self.shared.clock;
        let handshake = self.wire.server().handshake::<_, Bytes>(io);
        let mut wire = tokio::select! {
            made = handshake => match made {
                Ok(wire) => wire,
                Err(error) => {
                    tracing::debug!(peer.addr = %connection.address, %error, "no HTTP/2");
                    return;
                }
            },
            () = clock.sleep(self.guard.head_timeout) => return,
        };
        let connection = Arc::new(connection);
        let streams = Arc::new(Streams::default());
        let mut draining = pin!(self.shared.drain.draining());
        let mut told = false;
        let mut seen = 0;
        let mut quiet = clock.sleep(limits.connection_idle_timeout);
        loop {
            tokio::select! {
                accepted = wire.accept() => match accepted {
                    Some(Ok((request, respond))) => {
                        self.begin_stream(request, respond, &connection, &streams);
                    }
                    Some(Err(error)) => {
                        tracing::debug!(peer.addr = %connection.address, %error, "connection ended");
                        return;
                    }
                    None => return,
                },
                () = connection.stale.notified() => wire.graceful_shutdown(),
                () = draining.as_mut(), if !told => {
                    told = true;
                    wire.graceful_shutdown();
                }
                () = &mut quiet => {
                    let begun = streams.begun.load(Ordering::Acquire);
                    if streams.is_idle() && begun == seen {
                        wire.graceful_shutdown();
                    }
                    seen = begun;
                    quiet = clock.sleep(limits.connection_idle_timeout);
                }
            }
        }
    }

    fn begin_stream(
        self: &Arc<Self>,
        request: Request<RecvStream>,
        respond: SendResponse<Bytes>,
        connection: &Arc<Connection>,
        streams: &Arc<Streams>,
    ) {
        streams.begun.fetch_add(1, Ordering::AcqRel);
        let open = Open(Arc::clone(streams));
        let (this, connection) = (Arc::clone(self), Arc::clone(connection));
        let tasks = self.shared.drain.tasks();
        // Boxed, since a task is moved several times before and after it runs, and this one is large.
        tasks.spawn(Box::pin(async move {
            tokio::select! {
                () = this.serve_stream(request, respond, &connection) => {}
                () = this.shared.drain.deadline() => {}
            }
            drop(open);
        }));
    }

    async fn serve_stream(
        self: &Arc<Self>,
        request: Request<RecvStream>,
        respond: SendResponse<Bytes>,
        connection: &Connection,
    ) {
        let (parts, recv) = request.into_parts();
        let body = RecvBody::new(recv, &parts.headers);
        let respond = Arc::new(Mutex::new(respond));
        let caller = Caller {
            address: connection.address,
            destined: connection.destined.clone(),
            interim: Some(Arc::new(Informational(Arc::clone(&respond)))),
            upgrade: None,
            abort: connection.abort.clone(),
            guard: None,
        };
        let request = Request::from_parts(parts, Body::from(body));
        let response = tokio::select! {
            response = self.handle_request(request, caller) => response,
            // Dropping the call is what resets it upstream.
            _ = poll_fn(|cx| lock(&respond).poll_reset(cx)) => return,
        };
        if leads_nowhere(&response) {
            connection.stale.notify_one();
        }
        send(response, &respond).await;
    }
}

/// Sends a response to its end. Whoever resets the stream meanwhile drops the body, and thereby
/// the call.
async fn send(response: Response<Body>, respond: &Mutex<SendResponse<Bytes>>) {
    let (head, mut body) = response.into_parts();
    let end = body.is_end_stream();
    let begun = lock(respond).send_response(Response::from_parts(head, ()), end);
    match begun {
        Ok(mut stream) if !end => {
            if let Err(error) = send_body(&mut body, &mut stream).await {
                tracing::debug!(%error, "response cut off");
            }
        }
        Ok(_) => {}
        Err(error) => {
            tracing::debug!(%error, "response not sent");
            lock(respond).send_reset(Reason::INTERNAL_ERROR);
        }
    }
}

/// Passes informational responses on.
struct Informational(Arc<Mutex<SendResponse<Bytes>>>);

impl Interim for Informational {
    fn send(&self, response: Response<()>) {
        let (mut parts, ()) = response.into_parts();
        crate::headers::sanitize_response(&mut parts, crate::headers::Sender::Sidecar);
        // A stream that is gone is noticed by whoever waits for its answer.
        drop(lock(&self.0).send_informational(Response::from_parts(parts, ())));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
