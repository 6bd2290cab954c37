//! The inbound half: other sidecars' calls, from their connection to the application's answer.
//!
//! Always true: nothing is served that did not come through mesh TLS, but for the ports that are
//! listed for plaintext and for a workload that audits, where who comes so has no identity; every
//! connection is listed before its first stream, and every stream before its first check; what is
//! refused is logged with its reason and counted. [`serve`] is one worker's.

mod arrival;
mod exchange;
mod handshake;
mod plain;
mod reply;
mod request;
mod session;
mod tunnel;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use sidegate_mesh::access_log::Direction;
use sidegate_mesh::policy::Policy;
use sidegate_mtls::Acceptor;
use tokio::net::{TcpListener, TcpStream};

pub use arrival::{OwnArrivals, OwnCalls, own_calls};

use crate::application::{Application, wire_limits};
use crate::authorize;
use crate::config::Destination;
use crate::connections::{Ending, Registry, Who};
use crate::http1::GuardLimits;
use crate::limits::KeyedPermit;
use crate::original;
use crate::shared::Shared;
use crate::socket::{Carrier, Socket};
use crate::wire::WireLimits;
use arrival::OwnCall;
use handshake::Accepted;

/// How often unused connections to the application are looked through.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// How many looks an idle limit is divided into; a call ends at most one of them late.
const IDLE_VISITS: u64 = 4;
/// Pause after the system has refused to accept, as when there are no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves one worker's inbound listener until the drain has ended.
///
/// From the begin of a drain every connection is told to go away; connections are still accepted
/// for the grace period, and those that the system has already accepted after it, so that no caller
/// meets a closed port with its call under way. Open calls go on until they end or the drain's
/// deadline comes. `own` brings the calls of this pod to itself.
pub async fn serve(listener: TcpListener, shared: Arc<Shared>, own: OwnArrivals) {
    let inbound = Arc::new(Inbound::new(shared));
    // While this lives a drain cannot end: what is in the accept queue is still to be served.
    let accepting = inbound.shared.drain.tasks().token();
    let life = async {
        accept_loop(listener, own, &inbound).await;
        drop(accepting);
        inbound.shared.drain.closed().await;
        for link in inbound.registry.links() {
            link.end_calls(&Ending::Drained);
        }
    };
    tokio::select! {
        () = life => {}
        () = recheck(&inbound) => {}
        () = sweep(&inbound) => {}
        () = end_idle(&inbound) => {}
    }
}

/// What all inbound connections of one worker share.
struct Inbound {
    shared: Arc<Shared>,
    registry: Arc<Registry>,
    application: Application,
    acceptor: Acceptor,
    limits: WireLimits,
    guard: GuardLimits,
    /// Whether a connection's own address says where it goes.
    redirected: bool,
}

/// One of the application's ports.
#[derive(Clone, Copy, Debug)]
struct Target {
    port: u16,
    address: SocketAddr,
}

impl Inbound {
    fn new(shared: Arc<Shared>) -> Self {
        let acceptor = Acceptor::new(
            Arc::clone(&shared.credentials),
            shared.config.limits.handshake_timeout,
            Arc::clone(&shared.clock),
        );
        Self {
            registry: shared.connections.worker(),
            application: Application::new(&shared),
            limits: wire_limits(&shared),
            guard: GuardLimits::from(&shared.config.limits),
            redirected: shared.config.destination() == Destination::Original,
            acceptor,
            shared,
        }
    }

    /// The port that a peer names, or the workload's only one.
    fn target(&self, named: Option<u16>) -> Option<Target> {
        let ports = &self.shared.config.ports;
        let found = match named {
            Some(number) => ports.iter().find(|port| port.port == number),
            None => ports.first().filter(|_| ports.len() == 1),
        };
        found.and_then(|port| {
            let address = port.address?;
            Some(Target {
                port: port.port,
                address,
            })
        })
    }
}

async fn accept_loop(listener: TcpListener, mut own: OwnArrivals, inbound: &Arc<Inbound>) {
    let drain = &inbound.shared.drain;
    // While this lives a drain cannot end: what is in the accept queue is still to be served.
    let _accepting = drain.tasks().token();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            call = own.next() => {
                begin(inbound, Arrival::Own(call));
                continue;
            }
            () = drain.accept_until() => break,
        };
        match accepted {
            Ok((stream, address)) => begin(inbound, Arrival::Tcp(stream, address)),
            Err(error) => pause_after(inbound, &error).await,
        }
    }
    // What the system has accepted already belongs to callers who believe in it.
    while let Some((stream, address)) = accept_now(&listener) {
        begin(inbound, Arrival::Tcp(stream, address));
    }
}

fn accept_now(listener: &TcpListener) -> Option<(TcpStream, SocketAddr)> {
    match pin!(listener.accept()).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(accepted) => accepted.ok(),
        Poll::Pending => None,
    }
}

async fn pause_after(inbound: &Inbound, error: &io::Error) {
    tracing::warn!(%error, retry_in = ?ACCEPT_PAUSE, "inbound connection not accepted");
    inbound.shared.clock.sleep(ACCEPT_PAUSE).await;
}

/// How a connection came.
enum Arrival {
    Tcp(TcpStream, SocketAddr),
    /// From this pod, which is not redirected.
    Own(OwnCall),
}

/// Takes a permit and serves the connection; without one it is closed, and counted by the limit.
fn begin(inbound: &Arc<Inbound>, arrival: Arrival) {
    let Some(permit) = inbound.shared.limits.inbound_connections.try_acquire() else {
        return;
    };
    let inbound = Arc::clone(inbound);
    let tasks = inbound.shared.drain.tasks().clone();
    tasks.spawn(async move {
        let open = inbound.shared.metrics.connections_open(Direction::Inbound);
        open.inc();
        match arrival {
            Arrival::Tcp(stream, address) => serve_connection(&inbound, stream, address).await,
            Arrival::Own(call) => serve_own(&inbound, call).await,
        }
        open.dec();
        drop(permit);
    });
}

async fn serve_connection(inbound: &Arc<Inbound>, stream: TcpStream, address: SocketAddr) {
    // A failure means that the peer is gone already, which the first read reports.
    drop(stream.set_nodelay(true));
    let mut target = None;
    if inbound.redirected {
        match arrival::target_of(&inbound.shared, &stream) {
            Ok(found) => target = Some(found),
            Err(refusal) => return arrival::log_refused(&inbound.shared, address, refusal),
        }
    }
    let address = original::canonical(address);
    // Boxed here and below, so that an idle connection holds nothing of what it is done with.
    let mut accepted = Box::pin(handshake::accept(inbound, stream, address, target)).await;
    if let (Some(Accepted::Silent(..)), Some(target)) = (&accepted, target) {
        accepted = Box::pin(listen(inbound, accepted, address, target)).await;
    }
    serve_accepted(inbound, accepted, address, target).await;
}

/// Lets the application speak first to a caller that says nothing; who comes when it is the caller
/// that speaks after all.
async fn listen(
    inbound: &Arc<Inbound>,
    accepted: Option<Accepted>,
    address: SocketAddr,
    target: Target,
) -> Option<Accepted> {
    let Some(Accepted::Silent(io, door)) = accepted else {
        return accepted;
    };
    let spoken = plain::speak_first(inbound, (io, door), address, target).await?;
    handshake::look(inbound, spoken, address, door).await
}

/// A call of this pod to itself: its own identity is the caller, and the policy holds.
async fn serve_own(inbound: &Arc<Inbound>, call: OwnCall) {
    let address = SocketAddr::new(call.original.ip(), 0);
    let target = match arrival::target_at(&inbound.shared, call.original) {
        Ok(target) => Some(target),
        Err(refusal) => return arrival::log_refused(&inbound.shared, address, refusal),
    };
    let socket = Socket::Own(call.stream);
    let accepted = Box::pin(handshake::authenticate(inbound, socket, address)).await;
    serve_accepted(inbound, accepted, address, target).await;
}

async fn serve_accepted(
    inbound: &Arc<Inbound>,
    accepted: Option<Accepted>,
    address: SocketAddr,
    target: Option<Target>,
) {
    let (stream, peer) = match (accepted, target) {
        (Some(Accepted::Mesh(stream, peer)), _) => (stream, peer),
        (Some(Accepted::Plain(caller)), Some(target)) => {
            return Box::pin(plain::serve(inbound, caller, address, target)).await;
        }
        (Some(Accepted::Plain(_)), None) | (Some(Accepted::Silent(..)) | None, _) => return,
    };
    let Some(_permit) = permit_for(inbound, peer.id.text()) else {
        return;
    };
    let who = Who::Peer(peer);
    let now = inbound.shared.clock.now();
    let link = inbound.registry.register(who, address, now);
    // Registered first: trust that was withdrawn since the handshake is noticed here or by the
    // recheck, never by neither.
    handshake::retrust(&inbound.shared, link.link());
    Box::pin(session::run(inbound, &link, Carrier::Mesh(stream), target)).await;
}

/// One of the connections that a peer may have at once.
fn permit_for(inbound: &Inbound, peer: &Arc<str>) -> Option<KeyedPermit> {
    let per_peer = &inbound.shared.limits.inbound_connections_per_peer;
    per_peer.try_acquire(peer)
}

/// Goes through every live call when the policy changes, and through every peer when the
/// credentials do.
async fn recheck(inbound: &Inbound) {
    let mut snapshots = inbound.shared.state.subscribe();
    let mut epochs = inbound.shared.credentials.subscribe();
    let mut enforced: Option<Arc<Policy>> = None;
    loop {
        enforced = recheck_policy(inbound, enforced).await;
        tokio::select! {
            changed = snapshots.changed() => if changed.is_err() { break },
            changed = epochs.changed() => {
                if changed.is_err() {
                    break;
                }
                recheck_trust(inbound).await;
            }
        }
    }
    // The publisher is gone, and with it every further change.
    std::future::pending::<()>().await;
}

/// Does nothing when only endpoints changed: the policy is the same one.
async fn recheck_policy(inbound: &Inbound, enforced: Option<Arc<Policy>>) -> Option<Arc<Policy>> {
    let Some(snapshot) = inbound.shared.state.current() else {
        return enforced;
    };
    let same = enforced.is_some_and(|policy| Arc::ptr_eq(&policy, &snapshot.policy));
    if !same {
        for link in inbound.registry.links() {
            authorize::recheck(&link, &snapshot.policy);
            // Thousands of connections must not hold up the calls of one worker.
            tokio::task::yield_now().await;
        }
    }
    Some(Arc::clone(&snapshot.policy))
}

async fn recheck_trust(inbound: &Inbound) {
    for link in inbound.registry.links() {
        handshake::retrust(&inbound.shared, &link);
        tokio::task::yield_now().await;
    }
}

async fn sweep(inbound: &Inbound) {
    loop {
        inbound.shared.clock.sleep(SWEEP_INTERVAL).await;
        inbound.application.close_idle();
    }
}

async fn end_idle(inbound: &Inbound) {
    let limit = inbound.shared.config.limits.stream_idle_timeout;
    let visits = u32::try_from(IDLE_VISITS).unwrap_or(1);
    loop {
        inbound.shared.clock.sleep(limit / visits).await;
        inbound.registry.end_idle(IDLE_VISITS);
    }
}
