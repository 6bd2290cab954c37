//! Callers without an identity: an ingress without a sidecar, a Prometheus, and, where the workload
//! audits, everybody who is not in the mesh yet.
//!
//! Always true: such a call is authorized as nobody's, and again when the policy changes; its
//! record has no source; nothing of ours that it says is believed or passed on; what is not HTTP
//! enters only where the policy carries opaque bytes.

mod http1;

use std::net::SocketAddr;
use std::sync::Arc;

use sidegate_mesh::access_log::Protocol;

use super::handshake::Plain;
use super::{Inbound, Target, permit_for, request, session};
use crate::call::Call;
use crate::connections::{Link, LinkGuard, Subject, Who};
use crate::detect::Detected;
use crate::error::RequestError;
use crate::relay::relay;
use crate::socket::Carrier;
use crate::wire::tunnel::{TunnelIdle, TunnelIo};

/// Serves the connection to its end.
pub(super) async fn serve(
    inbound: &Arc<Inbound>,
    caller: Plain,
    address: SocketAddr,
    target: Target,
) {
    let shared = &inbound.shared;
    let Some(_permit) = permit_for(inbound, &address.ip().to_string().into()) else {
        return;
    };
    let who = Who::Nobody {
        listed: caller.listed,
    };
    let link = inbound.registry.register(who, address, shared.clock.now());
    let opaque = shared.config.opaque_ports.contains(&target.port);
    match caller.spoken {
        _ if opaque => serve_opaque(inbound, caller, &link, target).await,
        Detected::Http1 => http1::serve(inbound, caller.io, &link, target).await,
        Detected::Http2 => {
            let carrier = Carrier::Plain(caller.io);
            session::run(inbound, &link, carrier, Some(target)).await;
        }
        Detected::Tls | Detected::Other | Detected::Silent => {
            serve_opaque(inbound, caller, &link, target).await;
        }
        Detected::Closed => {}
    }
}

/// Bytes as they are, where the policy carries such; a caller that is refused sees a reset.
async fn serve_opaque(inbound: &Arc<Inbound>, caller: Plain, link: &LinkGuard, target: Target) {
    let shared = &inbound.shared;
    let mut call = request::begin(shared, link.link());
    call.record().protocol = Protocol::Tcp;
    let abort = caller.io.get_ref().abort();
    abort.arm();
    if let Err(error) = carry(inbound, caller, link.link(), (target, &mut call)).await {
        call.fail(&error);
    }
    call.finish();
}

async fn carry(
    inbound: &Inbound,
    caller: Plain,
    link: &Arc<Link>,
    (target, call): (Target, &mut Call),
) -> Result<(), RequestError> {
    let shared = &inbound.shared;
    let subject = Subject::Opaque { port: target.port };
    // Registered before the first check: a policy change between the two would else be missed.
    let live = request::register(shared, link, subject.clone(), call);
    let _permit = request::admit(shared, link, &subject, call)?;
    call.record().destination_address = Some(target.address.to_string());
    call.forwarded();
    let counters = call.counters();
    let carried = async {
        let (io, _permit) = inbound.application.connect(target.address).await?;
        let upstream = TunnelIo {
            abort: io.abort(),
            leading: bytes::Bytes::new(),
            io,
        };
        let (leading, io) = caller.io.into_parts();
        let caller = TunnelIo {
            abort: io.abort(),
            leading,
            io,
        };
        let idle = TunnelIdle {
            limit: shared.config.limits.stream_idle_timeout,
            clock: Arc::clone(&shared.clock),
        };
        relay(caller, upstream, &counters, &idle).await.outcome()
    };
    let ending = tokio::select! {
        carried = carried => return carried,
        ending = live.live().ended() => ending,
    };
    Err(request::ended(shared, call, ending))
}
