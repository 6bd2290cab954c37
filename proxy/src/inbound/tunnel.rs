//! Tunnels: opaque TCP, and WebSocket after its answer.
//!
//! Always true: where an opaque connection goes is the connection's own affair (the port that the
//! sidecar's address stands for, or `sidegate-port`), never `:authority`'s; a tunnel that is ended
//! from outside ends with a reset on both sides.

use std::sync::Arc;

use h2::RecvStream;
use http::{Request, Response, response};
use sidegate_mesh::access_log::Protocol;
use tokio::io::{AsyncRead, AsyncWrite};

use super::reply::Reply;
use super::request::{OPAQUE, admit, ended, has_protocol, register, target};
use super::session::Session;
use crate::application::Upgrade;
use crate::call::Call;
use crate::connections::Subject;
use crate::error::RequestError;
use crate::headers;
use crate::wire::tunnel::{TunnelBytes, TunnelEnd, TunnelIdle, TunnelIo, carry};

/// Whether a request opens a tunnel for opaque bytes.
pub(super) fn is_opaque<B>(request: &Request<B>) -> bool {
    has_protocol(request, OPAQUE)
}

/// One opaque connection: authorized by caller and port, then bytes.
pub(super) async fn handle_opaque(
    session: &Arc<Session>,
    request: Request<RecvStream>,
    reply: &mut Reply,
    call: &mut Call,
) -> Result<(), RequestError> {
    let shared = &session.inbound.shared;
    let (parts, recv) = request.into_parts();
    call.record().protocol = Protocol::Tcp;
    let named = headers::named_port(&parts.headers)?;
    let target = target(session, named)?;
    let subject = Subject::Opaque { port: target.port };
    // Registered before the first check: a policy change between the two would else be missed.
    let live = register(shared, &session.link, subject.clone(), call);
    let _permit = admit(shared, &session.link, &subject, call)?;
    call.record().destination_address = Some(target.address.into());
    let carried = async {
        call.forwarded();
        let connected = session.inbound.application.connect(target.address);
        let (io, _permit) = tokio::select! {
            connected = connected => connected?,
            error = reply.was_reset() => return Err(error),
        };
        let head = Response::new(()).into_parts().0;
        let abort = io.abort();
        let io = TunnelIo {
            io,
            leading: bytes::Bytes::new(),
            abort,
        };
        carry_both_ways(session, (io, head), recv, reply, call).await
    };
    let ending = tokio::select! {
        carried = carried => return carried,
        ending = live.live().ended() => ending,
    };
    Err(ended(shared, call, ending))
}

/// The bytes of a WebSocket behind its 101; `head` is the answer between the sidecars.
pub(super) async fn carry_upgrade(
    session: &Session,
    (upgrade, head): (Upgrade, response::Parts),
    recv: RecvStream,
    reply: &mut Reply,
    call: &mut Call,
) -> Result<(), RequestError> {
    let io = TunnelIo {
        io: upgrade.io,
        leading: bytes::Bytes::new(),
        abort: upgrade.abort,
    };
    carry_both_ways(session, (io, head), recv, reply, call).await
}

async fn carry_both_ways<IO>(
    session: &Session,
    (io, mut head): (TunnelIo<IO>, response::Parts),
    recv: RecvStream,
    reply: &mut Reply,
    call: &mut Call,
) -> Result<(), RequestError>
where
    IO: AsyncRead + AsyncWrite,
{
    let shared = &session.inbound.shared;
    head.extensions.clear();
    // Until it is carried, every way out is an abort.
    io.abort.arm();
    let stream = reply.head(head, false)?;
    let counters = call.counters();
    let bytes = TunnelBytes {
        from_wire: Arc::clone(&counters.request),
        to_wire: Arc::clone(&counters.response),
    };
    let idle = TunnelIdle {
        limit: shared.config.limits.stream_idle_timeout,
        clock: Arc::clone(&shared.clock),
    };
    match carry(io, stream, recv, &bytes, &idle).await {
        TunnelEnd::Clean => Ok(()),
        TunnelEnd::PeerReset(reason) => Err(RequestError::PeerReset { reason }),
        TunnelEnd::Aborted(kind) => Err(RequestError::UpstreamReset {
            reason: None,
            detail: kind.to_string(),
        }),
        TunnelEnd::Idle => Err(RequestError::Idle),
    }
}
