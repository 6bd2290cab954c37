//! The configured bounds that are counted while the sidecar runs.
//!
//! Invariant: each bound is one atomic for the whole process, so that several workers never
//! multiply it; whatever was counted is given back when its [`Permit`] is dropped; each refusal is
//! counted in `sidegate_limit_refusals_total{limit}`.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus_client::metrics::counter::Counter;
use sidegate_mesh::access_log::Direction;

use crate::config::LimitsConfig;
use crate::metrics::Metrics;

/// Every bound that is counted. Clones share the counts.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Inbound connections at once.
    pub inbound_connections: Limit,
    /// Inbound connections at once of one peer identity.
    pub inbound_connections_per_peer: KeyedLimit,
    /// Outbound connections at once, those of bound ports included.
    pub outbound_connections: Limit,
    /// Inbound TLS handshakes that have not ended yet.
    pub handshakes: Limit,
    /// Outbound ones, apart from those: strangers that stall must keep no call from going out.
    pub upstream_handshakes: Limit,
    /// Inbound requests at once.
    pub inbound_requests: Limit,
    /// Outbound requests at once.
    pub outbound_requests: Limit,
    /// Connections to other sidecars.
    pub upstream_connections: Limit,
    /// Calls that wait for a connection to another sidecar.
    pub upstream_waiters: Limit,
    /// Connections to the application.
    pub application_connections: Limit,
    /// Connections to the administration port.
    pub admin_connections: Limit,
    /// Connections to the health port.
    pub health_connections: Limit,
    /// Probes and lifecycle hooks of the application.
    pub probes: Limit,
}

impl Limits {
    /// The bounds that `config` sets, with nothing in use.
    pub fn new(config: &LimitsConfig, metrics: &Metrics) -> Self {
        let limit = |name, max| Limit::new(max, metrics.limit_refusals(name));
        let per_peer = "inbound_connections_per_peer";
        Self {
            inbound_connections: limit("inbound_connections", config.inbound_connections_max),
            inbound_connections_per_peer: KeyedLimit::new(
                config.inbound_connections_per_peer_max,
                metrics.limit_refusals(per_peer),
            ),
            outbound_connections: limit("outbound_connections", config.outbound_connections_max),
            handshakes: limit("handshakes", config.handshakes_max),
            upstream_handshakes: limit("upstream_handshakes", config.handshakes_max),
            inbound_requests: limit("inbound_requests", config.inbound_requests_max),
            outbound_requests: limit("outbound_requests", config.outbound_requests_max),
            upstream_connections: limit("upstream_connections", config.upstream_connections_max),
            upstream_waiters: limit("upstream_waiters", config.upstream_waiters_max),
            application_connections: limit(
                "application_connections",
                config.application_connections_max,
            ),
            admin_connections: limit("admin_connections", config.admin_connections_max),
            health_connections: limit("health_connections", config.health_connections_max),
            probes: limit("probes", config.probes_max),
        }
    }

    /// Requests at once in one direction: a flood of calls to the application leaves its own calls
    /// room.
    pub fn in_flight(&self, direction: Direction) -> &Limit {
        match direction {
            Direction::Inbound => &self.inbound_requests,
            Direction::Outbound => &self.outbound_requests,
        }
    }
}

/// A bound on how many of something there are at once. Clones share the count.
#[derive(Clone, Debug)]
pub struct Limit(Arc<LimitState>);

#[derive(Debug)]
struct LimitState {
    max: u32,
    used: AtomicU32,
    refused: Counter,
}

impl Limit {
    /// At most `max`; `refused` counts what is turned away.
    pub fn new(max: u32, refused: Counter) -> Self {
        Self(Arc::new(LimitState {
            max,
            used: AtomicU32::new(0),
            refused,
        }))
    }

    /// One more, given back when the permit is dropped; `None`, and counted, when all are in use.
    pub fn try_acquire(&self) -> Option<Permit> {
        let more = |used| (used < self.0.max).then_some(used + 1);
        let taken = self
            .0
            .used
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
        if taken.is_err() {
            self.0.refused.inc();
            return None;
        }
        Some(Permit(Arc::clone(&self.0)))
    }

    /// How many are in use now.
    pub fn in_use(&self) -> u32 {
        self.0.used.load(Ordering::Acquire)
    }

    /// How many there may be.
    pub fn max(&self) -> u32 {
        self.0.max
    }

    /// How many were turned away so far.
    pub fn refused(&self) -> u64 {
        self.0.refused.get()
    }
}

/// The right to one of something; dropping it gives it back.
#[derive(Debug)]
#[must_use = "the permit is given back when it is dropped"]
pub struct Permit(Arc<LimitState>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.used.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The same bound for each key. Clones share the counts; a key that is not in use takes no memory.
#[derive(Clone, Debug)]
pub struct KeyedLimit(Arc<KeyedState>);

#[derive(Debug)]
struct KeyedState {
    max: u32,
    used: Mutex<HashMap<Arc<str>, u32>>,
    refused: Counter,
}

impl KeyedLimit {
    /// At most `max` of each key; `refused` counts what is turned away.
    pub fn new(max: u32, refused: Counter) -> Self {
        Self(Arc::new(KeyedState {
            max,
            used: Mutex::new(HashMap::new()),
            refused,
        }))
    }

    /// One more of `key`, given back when the permit is dropped; `None`, and counted, when all of
    /// this key are in use.
    pub fn try_acquire(&self, key: &Arc<str>) -> Option<KeyedPermit> {
        let mut used = self.0.lock();
        let count = used.entry(Arc::clone(key)).or_insert(0);
        if *count >= self.0.max {
            self.0.refused.inc();
            return None;
        }
        *count += 1;
        Some(KeyedPermit {
            state: Arc::clone(&self.0),
            key: Arc::clone(key),
        })
    }

    /// How many of `key` are in use now.
    pub fn in_use(&self, key: &str) -> u32 {
        self.0.lock().get(key).copied().unwrap_or_default()
    }
}

impl KeyedState {
    fn lock(&self) -> MutexGuard<'_, HashMap<Arc<str>, u32>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to one of a key's; dropping it gives it back.
#[derive(Debug)]
#[must_use = "the permit is given back when it is dropped"]
pub struct KeyedPermit {
    state: Arc<KeyedState>,
    key: Arc<str>,
}

impl Drop for KeyedPermit {
    fn drop(&mut self) {
        let mut used = self.state.lock();
        if let Some(count) = used.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                used.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_bites_counts_and_recovers() {
        let limit = Limit::new(2, Counter::default());
        let first = limit.try_acquire().unwrap();
        let _second = limit.try_acquire().unwrap();
        assert!(limit.try_acquire().is_none());
        assert_eq!((limit.in_use(), limit.refused()), (2, 1));
        drop(first);
        assert!(limit.try_acquire().is_some());
        assert_eq!(limit.in_use(), 1);
    }

    #[test]
    fn several_threads_never_multiply_a_limit() {
        let limit = Limit::new(10, Counter::default());
        let permits: Vec<Permit> = std::thread::scope(|scope| {
            let take = || {
                (0..100)
                    .filter_map(|_| limit.try_acquire())
                    .collect::<Vec<_>>()
            };
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(take)).collect();
            threads
                .into_iter()
                .flat_map(|thread| thread.join().unwrap())
                .collect()
        });
        assert_eq!(permits.len(), 10);
        assert_eq!(limit.refused(), 390);
    }

    #[test]
    fn one_peer_cannot_use_up_what_another_may_have() {
        let limit = KeyedLimit::new(1, Counter::default());
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        let permit = limit.try_acquire(&a).unwrap();
        assert!(limit.try_acquire(&a).is_none());
        let _other = limit.try_acquire(&b).unwrap();
        drop(permit);
        assert_eq!((limit.in_use("a"), limit.in_use("b")), (0, 1));
        assert_eq!(limit.0.lock().len(), 1, "a key out of use keeps no entry");
    }
}
