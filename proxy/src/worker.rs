//! Listeners and worker threads.
//!
//! Invariants: the first bind of a listener is exclusive, so that two processes never share a port
//! silently; more than one worker shares it through `SO_REUSEPORT`; where IPv6 is off, IPv4 alone
//! does; a worker runs until the drain has closed.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::LocalBoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;
use tokio::task::LocalSet;

use crate::config::{Config, Destination, ServicePort};
use crate::drain::Phase;
use crate::inbound;
use crate::outbound::{BoundService, Outbound};
use crate::shared::Shared;

/// How long the calls that a drain's deadline cuts may take to say so.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;

/// A listener could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} (`{key}` of the configuration)")]
pub struct BindError {
    /// The key of the configuration.
    pub key: String,
    /// The address that it gives.
    pub address: SocketAddr,
    /// What the system said.
    pub source: io::Error,
}

/// The listeners of one worker.
#[derive(Debug)]
pub(crate) struct Listeners {
    inbound: StdListener,
    /// Of IPv4 and, where calls are redirected here, of IPv6.
    outbound: Vec<StdListener>,
    upstreams: Vec<(ServicePort, StdListener)>,
}

/// Where the sidecar listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// The application's own calls.
    pub outbound: SocketAddr,
    /// Other sidecars' calls.
    pub inbound: SocketAddr,
    /// Administration.
    pub admin: SocketAddr,
    /// Health and metrics.
    pub health: SocketAddr,
    /// Ports that are bound to one service.
    pub upstreams: Vec<(ServicePort, SocketAddr)>,
}

/// Every listener: those of each worker, administration and health.
#[derive(Debug)]
pub(crate) struct Bound {
    pub(crate) addresses: Addresses,
    pub(crate) workers: Vec<Listeners>,
    pub(crate) admin: StdListener,
    pub(crate) health: StdListener,
}

/// Opens every listener of `config`.
///
/// # Errors
///
/// [`BindError`] for the first that cannot be opened; the others are closed again.
pub(crate) fn bind(config: &Config) -> Result<Bound, BindError> {
    let workers = config.workers;
    let mut inbound = listen("inbound.address", config.inbound.address, workers)?;
    let mut outbound = listen("outbound.address", config.outbound.address, workers)?;
    let mut outbound_v6 = listen_v6(config, &outbound)?;
    let mut admin = listen("admin.address", config.admin.address, 1)?;
    let mut health = listen("health.address", config.health.address, 1)?;
    let mut upstreams = Vec::new();
    for (i, upstream) in config.upstreams.iter().enumerate() {
        let key = format!("upstreams.{i}.address");
        let group = listen(&key, upstream.address, workers)?;
        upstreams.push((upstream.service.clone(), group));
    }
    let addresses = Addresses {
        outbound: outbound.address,
        inbound: inbound.address,
        admin: admin.address,
        health: health.address,
        upstreams: upstreams
            .iter()
            .map(|(service, group)| (service.clone(), group.address))
            .collect(),
    };
    let mut of_workers = Vec::new();
    for _ in 0..workers {
        of_workers.push(Listeners {
            inbound: inbound.take()?,
            outbound: std::iter::once(&mut outbound)
                .chain(outbound_v6.as_mut())
                .map(Group::take)
                .collect::<Result<_, BindError>>()?,
            upstreams: upstreams
                .iter_mut()
                .map(|(service, group)| Ok((service.clone(), group.take()?)))
                .collect::<Result<_, BindError>>()?,
        });
    }
    Ok(Bound {
        addresses,
        workers: of_workers,
        admin: admin.take()?,
        health: health.take()?,
    })
}

/// The listeners of one address, one for each worker.
struct Group {
    key: String,
    address: SocketAddr,
    listeners: Vec<StdListener>,
}

impl Group {
    fn take(&mut self) -> Result<StdListener, BindError> {
        self.listeners.pop().ok_or_else(|| BindError {
            key: self.key.clone(),
            address: self.address,
            source: io::Error::other("one listener too few was opened"),
        })
    }
}

/// Redirected calls arrive at the loopback address of their own family, so there are two. The port
/// is the same; where there is no IPv6, no call comes by it.
fn listen_v6(config: &Config, outbound: &Group) -> Result<Option<Group>, BindError> {
    let redirected = config.destination() == Destination::Original;
    if !redirected || outbound.address.ip() != Ipv4Addr::LOCALHOST {
        return Ok(None);
    }
    let address = SocketAddr::from((Ipv6Addr::LOCALHOST, outbound.address.port()));
    match listen("outbound.address", address, config.workers) {
        Ok(group) => Ok(Some(group)),
        Err(error) if is_without_v6(&error.source) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the system has no IPv6, or no address of it.
fn is_without_v6(error: &io::Error) -> bool {
    const EAFNOSUPPORT: i32 = 97;
    error.kind() == io::ErrorKind::AddrNotAvailable || error.raw_os_error() == Some(EAFNOSUPPORT)
}

/// Listens, for both families where `address` is any of IPv6; where there is no IPv6, for the other.
fn listen(key: &str, address: SocketAddr, workers: usize) -> Result<Group, BindError> {
    let v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
    match listen_at(key, address, workers) {
        Err(error) if address.ip() == Ipv6Addr::UNSPECIFIED && is_without_v6(&error.source) => {
            listen_at(key, v4, workers)
        }
        done => done,
    }
}

fn listen_at(key: &str, address: SocketAddr, workers: usize) -> Result<Group, BindError> {
    let failed = |source| BindError {
        key: key.to_owned(),
        address,
        source,
    };
    let first = open(address, false).map_err(failed)?;
    let bound = first.local_addr().map_err(failed)?;
    let mut listeners = vec![first];
    if workers > 1 {
        // Bound alone; only now may others join, and only ours are about to.
        let first = listeners.pop().map(Socket::from).into_iter();
        for first in first {
            first.set_reuse_port(true).map_err(failed)?;
            listeners.push(first.into());
        }
        for _ in 1..workers {
            listeners.push(open(bound, true).map_err(failed)?);
        }
    }
    Ok(Group {
        key: key.to_owned(),
        address: bound,
        listeners,
    })
}

fn open(address: SocketAddr, shared: bool) -> io::Result<StdListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    // Otherwise the connections of a process that just ended keep the port for a minute.
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    socket.set_nonblocking(true)?;
    if address.is_ipv6() {
        // Whatever the system's own default is: any address of IPv6 means any of IPv4 too.
        socket.set_only_v6(address.ip() != Ipv6Addr::UNSPECIFIED)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Serves `listeners` on this thread until the drain has closed.
///
/// # Errors
///
/// Why the worker could not go on.
pub(crate) fn run(listeners: Listeners, shared: &Arc<Shared>) -> Result<(), String> {
    // The first handshake of a thread would otherwise stall for it.
    sidegate_mtls::warm_up(shared.credentials.provider());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    let ended = LocalSet::new().block_on(&runtime, serve(listeners, shared));
    // Whatever the drain left open is cut here.
    runtime.shutdown_background();
    ended
}

async fn serve(listeners: Listeners, shared: &Arc<Shared>) -> Result<(), String> {
    let failed = |error: io::Error| error.to_string();
    let inbound = TcpListener::from_std(listeners.inbound).map_err(failed)?;
    let (own, arrivals) = inbound::own_calls();
    let calls = Outbound::new(Arc::clone(shared), Some(own));
    let mut all: FuturesUnordered<LocalBoxFuture<'_, ()>> = FuturesUnordered::new();
    all.push(inbound::serve(inbound, Arc::clone(shared), arrivals).boxed_local());
    for listener in listeners.outbound {
        let listener = TcpListener::from_std(listener).map_err(failed)?;
        all.push(accept(&calls, shared, listener, None).boxed_local());
    }
    for (service, listener) in listeners.upstreams {
        let listener = TcpListener::from_std(listener).map_err(failed)?;
        let bound = Some(BoundService::from(&service));
        all.push(accept(&calls, shared, listener, bound).boxed_local());
    }
    let watched = async {
        while let Some(()) = all.next().await {
            // A listener ends at the end of a drain's grace period, and never before.
            if !shared.drain.is_draining() {
                return "a listener ended".to_owned();
            }
        }
        std::future::pending().await
    };
    tokio::select! {
        () = ended(shared) => Ok(()),
        ended = watched => Err(ended),
    }
}

/// Waits until the drain has closed, and then a little for what its deadline cuts to say so, to its
/// peer and in its record. Who closes without a drain wants an end at once.
async fn ended(shared: &Shared) {
    let drain = &shared.drain;
    drain.draining().await;
    let graceful = drain.phase() != Phase::Closed;
    drain.closed().await;
    if graceful {
        tokio::select! {
            () = drain.tasks().wait() => {}
            () = shared.clock.sleep(LAST_WORDS) => {}
        }
    }
}

/// Accepts the application's connections. While this lives a drain cannot end: what is in the
/// accept queue is still to be served.
async fn accept(
    calls: &Arc<Outbound>,
    shared: &Shared,
    listener: TcpListener,
    bound: Option<BoundService>,
) {
    let _accepting = shared.drain.tasks().token();
    Arc::clone(calls).serve(listener, bound).await;
}
