//! Connections to other sidecars, shared by the streams of one worker.
//!
//! Invariants: a connection is used only for the address and identity it was made for and with the
//! credentials it was made with, which together are its key; it carries at most as many streams as
//! its peer allows; it ends by the earlier `not_after` of its two ends, and as soon as its peer is no
//! longer trusted; connections, and those who wait for one, are bounded and counted.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use http::Request;
use sidegate_mesh::fast_map::FastMap;
use sidegate_mesh::routes::Endpoint;
use sidegate_mesh::{Clock, SpiffeId};
use sidegate_mtls::{Connector, Peer};
use tokio::sync::Notify;

use crate::error::RequestError;
use crate::inbound::OwnCalls;
use crate::limits::Permit;
use crate::shared::Shared;
use crate::wire::WireLimits;

mod connection;

/// Longest wait for a peer's settings before a tunnel.
const SETTINGS_TIMEOUT: Duration = Duration::from_secs(5);

/// One worker's connections.
#[derive(Debug)]
pub struct Pool {
    pub(crate) shared: Arc<Shared>,
    connector: Connector,
    wire: WireLimits,
    /// By address: there are several of one while its identity or our credentials change.
    hosts: Mutex<FastMap<SocketAddr, Vec<Arc<Host>>>>,
    /// Takes the calls to this pod, which would not be redirected.
    own: Option<OwnCalls>,
}

/// What a connection is good for.
#[derive(Debug)]
struct Key {
    address: SocketAddr,
    identity: SpiffeId,
    epoch: u64,
}

/// The connections of one key.
#[derive(Debug)]
struct Host {
    key: Key,
    state: Mutex<HostState>,
    /// A stream has ended, or a connection was made or lost.
    changed: Notify,
}

#[derive(Debug, Default)]
struct HostState {
    connections: Vec<Arc<Connection>>,
    connecting: usize,
    waiting: usize,
    /// How many attempts to connect have failed, and how the last one did.
    failures: u64,
    failure: Option<RequestError>,
}

/// One connection as its users see it. It closes when the last of them has gone.
struct Connection {
    sender: SendRequest<Bytes>,
    active: AtomicUsize,
    peer: Arc<Peer>,
    /// Why it was cut, once it was.
    cut: OnceLock<RequestError>,
    /// When its last stream ended, while none is open.
    quiet_since: Mutex<SystemTime>,
    /// The peer's settings have come, and allow tunnels; or the connection has ended.
    tunnels: Notify,
    clock: Arc<dyn Clock>,
}

/// The right to one stream on a connection.
#[derive(Debug)]
pub struct Lease {
    slot: Slot,
}

/// One stream's place on its connection, held until the stream has ended.
#[derive(Debug)]
pub struct Slot {
    connection: Arc<Connection>,
    host: Arc<Host>,
}

enum Take {
    Lease(Lease),
    Wait,
    Failed(RequestError),
}

impl Pool {
    /// No connection yet; `own` takes calls to this pod.
    pub fn new(shared: Arc<Shared>, wire: WireLimits, own: Option<OwnCalls>) -> Arc<Self> {
        let connector = Connector::new(
            Arc::clone(&shared.credentials),
            shared.config.limits.handshake_timeout,
            Arc::clone(&shared.clock),
        );
        Arc::new(Self {
            shared,
            connector,
            wire,
            hosts: Mutex::default(),
            own,
        })
    }

    /// A stream on a connection to `endpoint`, made with the current credentials; waits for a new
    /// connection or for a place on one.
    ///
    /// # Errors
    ///
    /// [`RequestError`] when the endpoint can't be reached or is not who it must be, when there are
    /// no credentials, and when a bound is reached.
    pub async fn checkout(self: &Arc<Self>, endpoint: &Endpoint) -> Result<Lease, RequestError> {
        let host = self.host(endpoint)?;
        let seen = {
            let mut state = host.lock();
            if let Some(lease) = Self::lease(&host, &mut state) {
                return Ok(lease);
            }
            state.failures
        };
        let mut waiting = None;
        loop {
            let changed = host.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            match self.take(&host, seen) {
                Take::Lease(lease) => return Ok(lease),
                Take::Failed(error) => return Err(error),
                Take::Wait => {}
            }
            if waiting.is_none() {
                waiting = Some(Waiting::begin(self, &host)?);
            }
            changed.await;
        }
    }

    /// Whether a connection to `endpoint` is open.
    pub fn is_connected(&self, endpoint: &Endpoint) -> bool {
        let host = self.host(endpoint);
        host.is_ok_and(|host| !host.lock().connections.is_empty())
    }

    /// How many connections are open or being made.
    pub fn connections(&self) -> usize {
        let hosts = lock(&self.hosts);
        hosts
            .values()
            .flatten()
            .map(|host| host.lock())
            .map(|host| host.connections.len() + host.connecting)
            .sum()
    }

    fn host(&self, endpoint: &Endpoint) -> Result<Arc<Host>, RequestError> {
        let epoch = self
            .shared
            .credentials
            .current()
            .ok_or(RequestError::NotReady)?
            .epoch();
        let mut hosts = lock(&self.hosts);
        let mut here = hosts.get(&endpoint.address).into_iter().flatten();
        let same =
            here.find(|host| host.key.epoch == epoch && host.key.identity == endpoint.identity);
        if let Some(host) = same {
            return Ok(Arc::clone(host));
        }
        // Hosts without connections are those of endpoints and credentials that are gone.
        hosts.retain(|_, here| {
            here.retain(|host| Arc::strong_count(host) > 1 || !host.lock().is_unused());
            !here.is_empty()
        });
        let host = Arc::new(Host {
            key: Key {
                address: endpoint.address,
                identity: endpoint.identity.clone(),
                epoch,
            },
            state: Mutex::default(),
            changed: Notify::new(),
        });
        let here = hosts.entry(endpoint.address).or_default();
        here.push(Arc::clone(&host));
        Ok(host)
    }

    /// A place on an open connection.
    fn lease(host: &Arc<Host>, state: &mut HostState) -> Option<Lease> {
        let connection = state.with_room()?;
        let slot = Slot::new(connection, host);
        Some(Lease { slot })
    }

    /// A place on a connection, or the begin of a new connection.
    fn take(self: &Arc<Self>, host: &Arc<Host>, seen: u64) -> Take {
        let mut state = host.lock();
        if let Some(lease) = Self::lease(host, &mut state) {
            return Take::Lease(lease);
        }
        let failed = state.failures > seen;
        if failed && state.connections.is_empty() && state.connecting == 0 {
            // Every waiter of this attempt fails with it; the next call tries again.
            return Take::Failed(state.failure.clone().unwrap_or(RequestError::NoEndpoint));
        }
        if failed || !self.is_worth_connecting(&state) {
            return Take::Wait;
        }
        match self.shared.limits.upstream_connections.try_acquire() {
            Some(permit) => {
                state.connecting += 1;
                self.connect(host, permit);
                Take::Wait
            }
            None if state.connections.is_empty() && state.connecting == 0 => {
                Take::Failed(RequestError::Overloaded {
                    bound: "upstreamConnectionsMax",
                })
            }
            None => Take::Wait,
        }
    }

    /// One attempt at a time per hundred waiters, within the bound.
    fn is_worth_connecting(&self, state: &HostState) -> bool {
        let max = self
            .shared
            .config
            .limits
            .upstream_connections_per_endpoint_max;
        let open = state.connections.len() + state.connecting;
        let room = usize::try_from(self.wire.streams_max)
            .unwrap_or(usize::MAX)
            .max(1);
        open < usize::try_from(max).unwrap_or(usize::MAX)
            && state.waiting >= state.connecting * room
    }

    /// Connects in a task of its own: it goes on when the call that began it is given up.
    fn connect(self: &Arc<Self>, host: &Arc<Host>, permit: Permit) {
        let (pool, host) = (Arc::clone(self), Arc::clone(host));
        let tasks = self.shared.drain.tasks().clone();
        tasks.spawn(async move { connection::run(pool, host, permit).await });
    }
}

impl Host {
    fn lock(&self) -> MutexGuard<'_, HostState> {
        lock(&self.state)
    }

    fn connected(&self, connection: &Arc<Connection>) {
        let mut state = self.lock();
        state.connecting -= 1;
        state.failure = None;
        state.connections.push(Arc::clone(connection));
        drop(state);
        self.changed.notify_waiters();
    }

    fn not_connected(&self, error: RequestError) {
        let mut state = self.lock();
        state.connecting -= 1;
        state.failures += 1;
        state.failure = Some(error);
        drop(state);
        self.changed.notify_waiters();
    }

    /// No further stream begins on `connection`; those that are open go on.
    fn retire(&self, connection: &Arc<Connection>) {
        self.lock()
            .connections
            .retain(|other| !Arc::ptr_eq(other, connection));
        self.changed.notify_waiters();
    }
}

impl HostState {
    /// The busiest connection that has room, so that idle ones can close.
    fn with_room(&mut self) -> Option<Arc<Connection>> {
        let room = |connection: &&Arc<Connection>| {
            connection.active() < connection.sender.current_max_send_streams()
        };
        let busiest = self
            .connections
            .iter()
            .filter(room)
            .max_by_key(|connection| connection.active());
        busiest.map(Arc::clone)
    }

    fn is_unused(&self) -> bool {
        self.connections.is_empty() && self.connecting == 0 && self.waiting == 0
    }
}

impl Connection {
    fn active(&self) -> usize {
        self.active.load(Ordering::Acquire)
    }

    /// A stream has ended.
    fn ended(&self) {
        if self.active.load(Ordering::Acquire) == 1 {
            // Noted first: whoever finds no stream open finds when the last one ended.
            *lock(&self.quiet_since) = self.clock.now();
        }
        self.active.fetch_sub(1, Ordering::AcqRel);
    }

    /// How long a stream has been missing; zero while one is open.
    fn quiet(&self) -> Duration {
        if self.active() > 0 {
            return Duration::ZERO;
        }
        let now = self.clock.now();
        now.duration_since(*lock(&self.quiet_since))
            .unwrap_or_default()
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("active", &self.active())
            .finish_non_exhaustive()
    }
}

impl Lease {
    /// Who is at the other end.
    pub fn peer(&self) -> &Arc<Peer> {
        &self.slot.connection.peer
    }

    /// Begins the stream.
    ///
    /// A tunnel waits until the peer's settings have come, as only they can allow it.
    ///
    /// # Errors
    ///
    /// That of h2, and the slot by which [`Slot::cut`] tells whether the connection was cut.
    pub async fn begin(
        self,
        request: Request<()>,
        end: bool,
    ) -> Result<(ResponseFuture, h2::SendStream<Bytes>, Slot), (h2::Error, Slot)> {
        let connection = Arc::clone(&self.slot.connection);
        let mut sender = connection.sender.clone();
        if request.extensions().get::<h2::ext::Protocol>().is_some() {
            let allowed = connection.tunnels.notified();
            tokio::pin!(allowed);
            allowed.as_mut().enable();
            if !sender.is_extended_connect_protocol_enabled() {
                // Bounded: a peer that does not allow tunnels says nothing at all.
                tokio::select! {
                    () = allowed => {}
                    () = connection.clock.sleep(SETTINGS_TIMEOUT) => {}
                }
            }
        }
        if let Err(error) = std::future::poll_fn(|cx| sender.poll_ready(cx)).await {
            return Err((error, self.retired()));
        }
        match sender.send_request(request, end) {
            Ok((response, stream)) => Ok((response, stream, self.slot)),
            Err(error) => Err((error, self.retired())),
        }
    }

    /// A connection that takes no request takes none ever after.
    fn retired(self) -> Slot {
        self.slot.host.retire(&self.slot.connection);
        self.slot
    }
}

impl Slot {
    fn new(connection: Arc<Connection>, host: &Arc<Host>) -> Self {
        connection.active.fetch_add(1, Ordering::AcqRel);
        Self {
            connection,
            host: Arc::clone(host),
        }
    }

    /// Why this sidecar cut the connection, if it did.
    pub fn cut(&self) -> Option<&RequestError> {
        self.connection.cut.get()
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &Arc<Peer> {
        &self.connection.peer
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.connection.ended();
        // One place for one waiter.
        self.host.changed.notify_one();
    }
}

/// One call that waits for a place.
struct Waiting {
    host: Arc<Host>,
    _permit: Permit,
}

impl Waiting {
    fn begin(pool: &Pool, host: &Arc<Host>) -> Result<Self, RequestError> {
        let permit = pool.shared.limits.upstream_waiters.try_acquire();
        let permit = permit.ok_or(RequestError::Overloaded {
            bound: "upstreamWaitersMax",
        })?;
        host.lock().waiting += 1;
        Ok(Self {
            host: Arc::clone(host),
            _permit: permit,
        })
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.host.lock().waiting -= 1;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
