//! One inbound stream, from its head to its record.
//!
//! Always true: the order of [`handle_request`] is the order of the checks; one snapshot decides,
//! and the record names it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{HeaderMap, Request};
use sidegate_mesh::access_log::{Direction, Protocol};
use sidegate_mesh::routes::{Endpoint, Routes};

use super::reply::Reply;
use super::session::Session;
use super::{Target, exchange, tunnel};
use crate::authorize;
use crate::call::Call;
use crate::connections::{Ending, Link, LiveGuard, Subject};
use crate::error::RequestError;
use crate::grpc_timeout;
use crate::headers::{self, Head, Kind, Sender};
use crate::limits::Permit;
use crate::shared::Shared;
use crate::wire::{self, Spoken};

/// Serves one stream and writes its record.
pub(super) async fn serve(
    session: &Arc<Session>,
    request: Request<RecvStream>,
    respond: SendResponse<Bytes>,
) {
    let shared = &session.inbound.shared;
    let peer = session.link.peer();
    let mut call = begin(shared, &session.link);
    let mut reply = Reply::new(respond, peer.is_some());
    let outcome = if peer.is_some() && tunnel::is_opaque(&request) {
        // Apart, so that it takes no room in every other call.
        Box::pin(tunnel::handle_opaque(
            session, request, &mut reply, &mut call,
        ))
        .await
    } else {
        handle_request(session, request, &mut reply, &mut call).await
    };
    if let Err(error) = outcome {
        if matches!(error, RequestError::PeerReset { .. }) && !reply.has_head() {
            session.count_reset();
        }
        let told = reply.fail(&error);
        call.told(told.status, told.grpc_status);
        call.counters().add_response(told.bytes);
        call.fail(&error);
    }
    call.finish();
}

/// The record of a call that begins on `link`.
pub(super) fn begin(shared: &Arc<Shared>, link: &Link) -> Call {
    let mut call = Call::start(shared, Direction::Inbound);
    let peer = link.peer();
    call.between(peer.map(|peer| &peer.id), Some(&shared.workload.id));
    call.from_address(link.address());
    call.record().tls_version = peer.map(|peer| peer.tls_version);
    call
}

/// One request: what is forwarded is authorized, by one snapshot, before it is forwarded.
async fn handle_request(
    session: &Arc<Session>,
    request: Request<RecvStream>,
    reply: &mut Reply,
    call: &mut Call,
) -> Result<(), RequestError> {
    let shared = &session.inbound.shared;
    let (parts, body) = request.into_parts();
    let head = sanitize(session, parts, reply, call)?;
    let target = target(session, head.port)?;
    let subject = Subject::Request {
        port: target.port,
        head: Arc::clone(&head),
    };
    // Registered before the first check: a policy change between the two would else be missed.
    let live = register(shared, &session.link, subject.clone(), call);
    let _permit = admit(shared, &session.link, &subject, call)?;
    call.record().destination_address = Some(target.address.into());
    let deadline = head
        .is_grpc()
        .then(|| grpc_timeout::read(&head.headers))
        .flatten();
    let exchange = exchange::Exchange {
        session,
        head: &head,
        target,
    };
    tokio::select! {
        served = exchange.run(body, reply, call) => served,
        ending = live.live().ended() => Err(ended(shared, call, ending)),
        error = expire(session, deadline) => Err(error),
    }
}

fn sanitize(
    session: &Session,
    mut parts: http::request::Parts,
    reply: &mut Reply,
    call: &mut Call,
) -> Result<Arc<Head>, RequestError> {
    // Nothing of ours that a caller without an identity says is believed.
    let sender = match session.link.peer() {
        Some(_) => Sender::Sidecar,
        None => Sender::Application,
    };
    let protocol = claimed_protocol(&parts.headers, sender);
    reply.to(&parts.method);
    reply.speak_grpc(protocol == Protocol::Grpc);
    call.record().protocol = protocol;
    let head = headers::sanitize(&mut parts, sender, &session.inbound.limits)
        // Noted as it came, for whoever looks for an attacker.
        .inspect_err(|_| call.describe_refused(&parts))?;
    reply.speak_grpc(head.kind == Kind::Grpc);
    call.describe(&head);
    Ok(Arc::new(head))
}

/// What a head that may be refused yet seems to be.
fn claimed_protocol(headers: &HeaderMap, sender: Sender) -> Protocol {
    let content_type = headers.get(http::header::CONTENT_TYPE);
    let spoken = headers
        .get(wire::PROTOCOL)
        .map(|value| Spoken::parse(value.as_bytes()));
    match spoken {
        _ if content_type.is_some_and(headers::is_grpc_type) => Protocol::Grpc,
        Some(Some(Spoken::Http10 | Spoken::Http11)) if sender == Sender::Sidecar => Protocol::Http1,
        _ => Protocol::Http2,
    }
}

pub(super) fn target(session: &Session, named: Option<u16>) -> Result<Target, RequestError> {
    // Where the address says it, nothing that the caller says does.
    let found = session.target.or_else(|| session.inbound.target(named));
    found.ok_or(RequestError::DestinationUnknown)
}

pub(super) fn register(
    shared: &Shared,
    link: &Arc<Link>,
    subject: Subject,
    call: &Call,
) -> LiveGuard {
    link.begin(subject, call.counters(), shared.clock.now())
}

/// Authorization, then the bound on requests in flight.
pub(super) fn admit(
    shared: &Shared,
    link: &Link,
    subject: &Subject,
    call: &mut Call,
) -> Result<Permit, RequestError> {
    // One load per request: the decision and the log line must name the same policy.
    let snapshot = shared.state.current().ok_or(RequestError::NotReady)?;
    let decision = authorize::decide(&snapshot.policy, link.who(), subject);
    call.decided(&decision, snapshot.number);
    if let Subject::Request { port, head } = subject {
        call.record().destination_service = called(&snapshot.routes, head, *port, shared);
    }
    authorize::require_allowed(&decision)?;
    let in_flight = shared.limits.in_flight(Direction::Inbound);
    in_flight.try_acquire().ok_or(RequestError::Overloaded {
        bound: "inboundRequestsMax",
    })
}

/// The service that the caller named, where this workload is behind that service's port: what a
/// caller only says is never put where a fact stands.
fn called(routes: &Routes, head: &Head, port: u16, shared: &Shared) -> Option<Arc<str>> {
    let route = routes.resolve(head.authority.as_ref()?)?;
    let ours = |endpoint: &Endpoint| endpoint.identity == shared.workload.id;
    let here = route.target_port == port && route.endpoints.iter().any(ours);
    here.then(|| Arc::clone(&route.service))
}

/// What a call that is ended from outside fails with; the record names the policy that refuses now.
pub(super) fn ended(shared: &Shared, call: &mut Call, ending: Ending) -> RequestError {
    match ending {
        Ending::Denied(decision) => {
            let number = shared.state.current().map(|now| now.number);
            call.decided(&decision, number.unwrap_or_default());
            RequestError::PolicyChanged {
                decision_id: authorize::decision_id(),
            }
        }
        Ending::Certificate(reason) => RequestError::CertificateEnded { reason },
        Ending::Idle => RequestError::Idle,
        Ending::Drained => RequestError::DrainDeadline,
        Ending::Flood => RequestError::Overloaded { bound: "resets" },
    }
}

async fn expire(session: &Session, deadline: Option<Duration>) -> RequestError {
    let Some(after) = deadline else {
        return std::future::pending().await;
    };
    session.inbound.shared.clock.sleep(after).await;
    RequestError::Timeout {
        after_ms: u64::try_from(after.as_millis()).unwrap_or(u64::MAX),
    }
}

/// Whether the `:protocol` of a request is `name`.
pub(super) fn has_protocol<B>(request: &Request<B>, name: &str) -> bool {
    let protocol = request.extensions().get::<h2::ext::Protocol>();
    request.method() == http::Method::CONNECT && protocol.is_some_and(|p| p.as_str() == name)
}

/// The `:protocol` of opaque bytes.
pub(super) const OPAQUE: &str = wire::TCP;
