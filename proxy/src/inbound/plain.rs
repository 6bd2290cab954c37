//! Callers without an identity: an ingress without a sidecar, a Prometheus, and, where the workload
//! audits, everybody who is not in the mesh yet.
//!
//! Always true: such a call is authorized as nobody's, and again when the policy changes; its
//! record has no source; nothing of ours that it says is believed or passed on; what is not HTTP
//! enters only where the policy carries opaque bytes.

mod http1;

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use sidegate_mesh::access_log::Protocol;

use super::handshake::{Door, Plain};
use super::{Inbound, Target, permit_for, request, session};
use crate::authorize;
use crate::call::Call;
use crate::connections::{Link, LinkGuard, Subject, Who};
use crate::detect::{Detected, Prefixed};
use crate::error::RequestError;
use crate::limits::Permit;
use crate::relay::relay;
use crate::socket::Carrier;
use crate::wire::tunnel::{Abortable, TunnelIdle, TunnelIo};

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
        _ if opaque => serve_opaque(inbound, (caller, None), &link, target).await,
        Detected::Http1 => http1::serve(inbound, caller.io, &link, target).await,
        Detected::Http2 => {
            let carrier = Carrier::Plain(caller.io);
            session::run(inbound, &link, carrier, Some(target)).await;
        }
        Detected::Tls | Detected::Other | Detected::Silent => {
            serve_opaque(inbound, (caller, None), &link, target).await;
        }
        Detected::Closed => {}
    }
}

/// Opens a connection to the application for a caller that says nothing, where the policy would
/// serve it as bytes, and serves it when it is the application that speaks first. When it is the
/// caller, its connection comes back with what it said, and nothing has happened.
pub(super) async fn speak_first(
    inbound: &Arc<Inbound>,
    (mut io, door): (Prefixed<Abortable>, Door),
    address: SocketAddr,
    target: Target,
) -> Option<Prefixed<Abortable>> {
    let shared = &inbound.shared;
    let who = Who::Nobody {
        listed: door.listed,
    };
    let subject = Subject::Opaque { port: target.port };
    let served = shared.state.current().is_some_and(|snapshot| {
        let decision = authorize::decide(&snapshot.policy, &who, &subject);
        decision.is_served()
    });
    let mut upstream = None;
    if served {
        // Where it refuses, that is found out again, and recorded, once somebody has spoken.
        upstream = inbound.application.connect(target.address).await.ok();
    }
    let patience = if upstream.is_some() {
        shared.config.limits.connection_idle_timeout
    } else {
        shared.config.limits.handshake_timeout
    };
    let mut upstream = upstream.map(|(io, permit)| (Prefixed::new(Bytes::new(), io), permit));
    let application = async {
        match &mut upstream {
            Some((io, _)) => io.read_ahead().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        read = io.read_ahead() => match read {
            Ok(1..) => return Some(io),
            // Its half has ended, and the application's may follow.
            Ok(0) => {}
            Err(_) => return None,
        },
        _ = application => {}
        () = shared.clock.sleep(patience) => {}
    }
    let caller = Plain {
        io,
        spoken: Detected::Silent,
        listed: door.listed,
    };
    let _permit = permit_for(inbound, &address.ip().to_string().into())?;
    let link = inbound.registry.register(who, address, shared.clock.now());
    serve_opaque(inbound, (caller, upstream), &link, target).await;
    None
}

/// A connection to the application, with what it has said already.
type Upstream = (Prefixed<Abortable>, Permit);

/// Bytes as they are, where the policy carries such; a caller that is refused sees a reset.
async fn serve_opaque(
    inbound: &Arc<Inbound>,
    ends: (Plain, Option<Upstream>),
    link: &LinkGuard,
    target: Target,
) {
    let mut call = request::begin(&inbound.shared, link.link());
    call.record().protocol = Protocol::Tcp;
    ends.0.io.get_ref().abort().arm();
    if let Err(error) = carry(inbound, ends, link.link(), (target, &mut call)).await {
        call.fail(&error);
    }
    call.finish();
}

async fn carry(
    inbound: &Inbound,
    (caller, upstream): (Plain, Option<Upstream>),
    link: &Arc<Link>,
    (target, call): (Target, &mut Call),
) -> Result<(), RequestError> {
    let shared = &inbound.shared;
    let subject = Subject::Opaque { port: target.port };
    // Registered before the first check: a policy change between the two would else be missed.
    let live = request::register(shared, link, subject.clone(), call);
    let _permit = request::admit(shared, link, &subject, call)?;
    call.record().destination_address = Some(target.address.into());
    call.forwarded();
    let counters = call.counters();
    let carried = async {
        let (upstream, _permit) = if let Some(upstream) = upstream {
            upstream
        } else {
            let (io, permit) = inbound.application.connect(target.address).await?;
            (Prefixed::new(Bytes::new(), io), permit)
        };
        let idle = TunnelIdle {
            limit: shared.config.limits.stream_idle_timeout,
            clock: Arc::clone(&shared.clock),
        };
        relay(side(caller.io), side(upstream), &counters, &idle)
            .await
            .outcome()
    };
    let ending = tokio::select! {
        carried = carried => return carried,
        ending = live.live().ended() => ending,
    };
    Err(request::ended(shared, call, ending))
}

fn side(io: Prefixed<Abortable>) -> TunnelIo<Abortable> {
    let (leading, io) = io.into_parts();
    TunnelIo {
        abort: io.abort(),
        leading,
        io,
    }
}
