//! What lives: every inbound connection and every call on it, so that it can be listed and ended.
//!
//! Always true: a call is here before its first check and until its end. Whatever is published
//! (a policy, a bundle, a revocation) is published before the calls are gone through; so a call
//! was either decided by what is new, or is found here. Each worker has its own registry; no call
//! waits for another worker's.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::SystemTime;

use serde::Serialize;
use sidegate_mesh::Decision;
use sidegate_mesh::fast_map::FastMap;
use sidegate_mtls::Peer;
use tokio::sync::Notify;

use crate::call::{ByteCounters, rfc3339};
use crate::headers::Head;

/// The registries of all workers. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Connections(Arc<Mutex<Vec<Weak<Registry>>>>);

impl Connections {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A registry for one more worker; it is listed for as long as the worker keeps it.
    pub fn worker(&self) -> Arc<Registry> {
        let registry = Arc::new(Registry::default());
        let mut workers = lock(&self.0);
        workers.retain(|worker| worker.strong_count() > 0);
        workers.push(Arc::downgrade(&registry));
        registry
    }

    /// Every connection of every worker with its calls, oldest first.
    pub fn list(&self) -> Vec<ConnectionSummary> {
        let workers: Vec<Arc<Registry>> = lock(&self.0).iter().filter_map(Weak::upgrade).collect();
        let links = workers.iter().flat_map(|worker| worker.links());
        let mut list: Vec<ConnectionSummary> = links.map(|link| link.summary()).collect();
        list.sort_by(|a, b| a.since.cmp(&b.since));
        list
    }
}

/// One connection, as the administration port shows it.
#[derive(Clone, Debug, Serialize)]
pub struct ConnectionSummary {
    /// The peer's identity, from its certificate; absent for a caller without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// Where it connected from.
    pub address: SocketAddr,
    /// Since when, RFC 3339.
    pub since: String,
    /// When it ends at the latest: the earlier end of the two certificates.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_after: Option<String>,
    /// Serial number of the peer's certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Epoch of the credentials under which it was authenticated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epoch: Option<u64>,
    /// The calls that run on it.
    pub calls: Vec<CallSummary>,
}

/// One running call, as the administration port shows it. Never its query or its fields.
#[derive(Clone, Debug, Serialize)]
pub struct CallSummary {
    /// The target port.
    pub port: u16,
    /// `tcp` for opaque bytes.
    pub method: String,
    /// Absent for opaque bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Since when, RFC 3339.
    pub since: String,
    /// Body bytes so far, both ways.
    pub bytes: u64,
}

/// The connections of one worker.
#[derive(Debug, Default)]
pub struct Registry {
    links: Mutex<FastMap<u64, Arc<Link>>>,
    next: AtomicU64,
}

impl Registry {
    /// Lists a connection for as long as the guard lives.
    pub fn register(self: &Arc<Self>, who: Who, address: SocketAddr, now: SystemTime) -> LinkGuard {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let link = Arc::new(Link {
            who,
            address,
            since: now,
            calls: Mutex::default(),
            next: AtomicU64::new(0),
            cut: OnceLock::new(),
            notify: Notify::new(),
            call_ended: Notify::new(),
        });
        lock(&self.links).insert(id, Arc::clone(&link));
        LinkGuard {
            registry: Arc::clone(self),
            id,
            link,
        }
    }

    /// Every connection now.
    pub fn links(&self) -> Vec<Arc<Link>> {
        lock(&self.links).values().map(Arc::clone).collect()
    }

    /// Ends every call that carried no byte between two visits for `visits` visits.
    pub fn end_idle(&self, visits: u64) {
        for link in self.links() {
            for call in link.calls() {
                if call.visit() >= visits {
                    call.end(Ending::Idle);
                }
            }
        }
    }
}

/// Who is at the other end of an inbound connection.
#[derive(Debug)]
pub enum Who {
    /// An identity of the mesh, by its certificate.
    Peer(Box<Peer>),
    /// A caller in plaintext, who may be anybody.
    Nobody {
        /// Whether the port is listed for such callers. Where it is not, only a workload that
        /// audits serves them.
        listed: bool,
    },
}

/// One inbound connection.
#[derive(Debug)]
pub struct Link {
    who: Who,
    address: SocketAddr,
    since: SystemTime,
    calls: Mutex<FastMap<u64, Arc<Live>>>,
    next: AtomicU64,
    cut: OnceLock<&'static str>,
    notify: Notify,
    call_ended: Notify,
}

impl Link {
    /// Who is at the other end.
    pub fn who(&self) -> &Who {
        &self.who
    }

    /// The identity at the other end, where there is one.
    pub fn peer(&self) -> Option<&Peer> {
        match &self.who {
            Who::Peer(peer) => Some(peer),
            Who::Nobody { .. } => None,
        }
    }

    /// Where it connected from.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Lists a call for as long as the guard lives. To be called before its first check.
    pub fn begin(
        self: &Arc<Self>,
        subject: Subject,
        bytes: Arc<ByteCounters>,
        now: SystemTime,
    ) -> LiveGuard {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let live = Arc::new(Live {
            subject,
            since: now,
            bytes,
            seen: AtomicU64::new(0),
            quiet: AtomicU64::new(0),
            ending: OnceLock::new(),
            notify: Notify::new(),
        });
        lock(&self.calls).insert(id, Arc::clone(&live));
        // Listed first, asked afterwards: whoever cuts the connection does it the other way round.
        if let Some(reason) = self.cut.get() {
            live.end(Ending::Certificate(reason));
        }
        LiveGuard {
            link: Arc::clone(self),
            id,
            live,
        }
    }

    /// Every call now.
    pub fn calls(&self) -> Vec<Arc<Live>> {
        lock(&self.calls).values().map(Arc::clone).collect()
    }

    /// Whether no call runs.
    pub fn is_idle(&self) -> bool {
        lock(&self.calls).is_empty()
    }

    /// How many calls began so far.
    pub fn begun(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// Ends the connection and every call on it: its certificate ended or is no longer believed.
    pub fn cut(&self, reason: &'static str) {
        if self.cut.set(reason).is_ok() {
            for call in self.calls() {
                call.end(Ending::Certificate(reason));
            }
            self.notify.notify_one();
        }
    }

    /// Ends every call, for `ending`.
    pub fn end_calls(&self, ending: &Ending) {
        for call in self.calls() {
            call.end(ending.clone());
        }
    }

    /// Waits until the connection is cut.
    pub async fn was_cut(&self) -> &'static str {
        loop {
            if let Some(reason) = self.cut.get() {
                return reason;
            }
            self.notify.notified().await;
        }
    }

    /// Waits until a call has ended, perhaps one that ended before. One task waits at a time.
    pub async fn call_ended(&self) {
        self.call_ended.notified().await;
    }

    fn summary(&self) -> ConnectionSummary {
        let mut calls = self.calls();
        calls.sort_by_key(|call| call.since);
        ConnectionSummary {
            peer: self.peer().map(|peer| peer.id.to_string()),
            address: self.address,
            since: rfc3339(self.since),
            not_after: self.peer().map(|peer| rfc3339(peer.not_after)),
            serial: self.peer().map(|peer| peer.serial.to_string()),
            epoch: self.peer().map(|peer| peer.epoch),
            calls: calls.iter().map(|call| call.summary()).collect(),
        }
    }
}

/// Keeps a connection listed.
#[derive(Debug)]
pub struct LinkGuard {
    registry: Arc<Registry>,
    id: u64,
    link: Arc<Link>,
}

impl LinkGuard {
    /// The connection.
    pub fn link(&self) -> &Arc<Link> {
        &self.link
    }
}

impl Drop for LinkGuard {
    fn drop(&mut self) {
        lock(&self.registry.links).remove(&self.id);
    }
}

/// What a call asks for, in the form in which it was authorized.
#[derive(Clone, Debug)]
pub enum Subject {
    /// A request to one of the workload's ports.
    Request {
        /// The target port.
        port: u16,
        /// Its head.
        head: Arc<Head>,
    },
    /// Opaque bytes to one of the workload's ports.
    Opaque {
        /// The target port.
        port: u16,
    },
}

/// Why a call is ended from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The policy in force now refuses it.
    Denied(Decision),
    /// The peer's certificate ended or is no longer believed; the reason's code.
    Certificate(&'static str),
    /// It carried no byte for the idle limit.
    Idle,
    /// The drain's deadline has come.
    Drained,
    /// The peer resets its calls faster than anybody has reason to.
    Flood,
}

/// One running call.
#[derive(Debug)]
pub struct Live {
    subject: Subject,
    since: SystemTime,
    bytes: Arc<ByteCounters>,
    seen: AtomicU64,
    quiet: AtomicU64,
    ending: OnceLock<Ending>,
    notify: Notify,
}

impl Live {
    /// What it asks for.
    pub fn subject(&self) -> &Subject {
        &self.subject
    }

    /// Asks the call to end; the first reason counts.
    pub fn end(&self, ending: Ending) {
        if self.ending.set(ending).is_ok() {
            self.notify.notify_one();
        }
    }

    /// Waits until the call is asked to end. One task waits at a time.
    pub async fn ended(&self) -> Ending {
        loop {
            if let Some(ending) = self.ending.get() {
                return ending.clone();
            }
            self.notify.notified().await;
        }
    }

    /// How many visits in a row, this one included, found no new byte.
    fn visit(&self) -> u64 {
        let total = self.bytes.total();
        // `seen` starts at 0 as the bytes do, so a call that never moves one is idle as well.
        if self.seen.swap(total, Ordering::Relaxed) == total {
            self.quiet.fetch_add(1, Ordering::Relaxed) + 1
        } else {
            self.quiet.store(0, Ordering::Relaxed);
            0
        }
    }

    fn summary(&self) -> CallSummary {
        let (port, method, path) = match &self.subject {
            Subject::Request { port, head } => {
                (*port, head.method.to_string(), Some(head.path.to_string()))
            }
            Subject::Opaque { port } => (*port, "tcp".to_owned(), None),
        };
        CallSummary {
            port,
            method,
            path,
            since: rfc3339(self.since),
            bytes: self.bytes.total(),
        }
    }
}

/// Keeps a call listed.
#[derive(Debug)]
pub struct LiveGuard {
    link: Arc<Link>,
    id: u64,
    live: Arc<Live>,
}

impl LiveGuard {
    /// The call.
    pub fn live(&self) -> &Arc<Live> {
        &self.live
    }
}

impl Drop for LiveGuard {
    fn drop(&mut self) {
        lock(&self.link.calls).remove(&self.id);
        self.link.call_ended.notify_one();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
