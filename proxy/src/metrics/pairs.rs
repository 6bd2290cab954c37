//! Requests and durations by caller and called: the only series that grow with the mesh.
//!
//! Invariant: the series in use never exceed the bound, except those whose identities are both
//! [`OTHER`]; a pair that somebody holds is never removed, so no count is lost.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use sidegate_mesh::Verdict;
use sidegate_mesh::access_log::{Direction, Protocol};

/// The identity under which whatever exceeds the bound is counted.
pub const OTHER: &str = "other";

/// 0.1 ms to 60 s, in seconds.
const BUCKETS: [f64; 18] = [
    0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0, 30.0, 60.0,
];

/// Series of one histogram: its buckets, `+Inf`, sum and count.
const HISTOGRAM_SERIES: usize = BUCKETS.len() + 3;

/// How a call ended.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// HTTP status that the caller saw.
    pub status: Option<u16>,
    /// gRPC status from the trailers.
    pub grpc_status: Option<u32>,
    /// What the policy decided.
    pub decision: Option<Verdict>,
    /// From the call's start to its end.
    pub duration: Duration,
}

/// The calls of one protocol between two identities.
#[derive(Debug)]
pub struct PairMetrics {
    pair: PairLabels,
    protocol: Protocol,
    /// A few, so that looking through them is quicker than hashing.
    counters: RwLock<Vec<(OutcomeLabels, Counter)>>,
    duration: Arc<Histogram>,
    shared: Arc<Shared>,
    used_in: AtomicU32,
}

impl PairMetrics {
    /// Counts one call that has ended.
    pub fn finish(&self, outcome: &Outcome) {
        self.used_in.store(
            self.shared.sweeps.load(Ordering::Relaxed),
            Ordering::Relaxed,
        );
        self.duration.observe(outcome.duration.as_secs_f64());
        self.counter(OutcomeLabels::of(outcome)).inc();
    }

    fn counter(&self, labels: OutcomeLabels) -> Counter {
        let known = self.counters.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(counter) = counter_of(&known, labels) {
            return counter;
        }
        drop(known);
        let mut known = self
            .counters
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(counter) = counter_of(&known, labels) {
            return counter;
        }
        let counted_as = if self.pair.is_other() || self.shared.reserve(1) {
            self.pair.clone()
        } else {
            PairLabels::other(self.pair.direction)
        };
        let counter = self
            .shared
            .requests
            .get_or_create_owned(&RequestLabels::new(counted_as, self.protocol, labels));
        known.push((labels, counter.clone()));
        counter
    }
}

fn counter_of(known: &[(OutcomeLabels, Counter)], labels: OutcomeLabels) -> Option<Counter> {
    let found = known.iter().find(|(counted, _)| *counted == labels);
    found.map(|(_, counter)| counter.clone())
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PairLabels {
    direction: &'static str,
    source: Arc<str>,
    destination: Arc<str>,
}

impl PairLabels {
    fn other(direction: &'static str) -> Self {
        Self {
            direction,
            source: OTHER.into(),
            destination: OTHER.into(),
        }
    }

    fn is_other(&self) -> bool {
        &*self.source == OTHER && &*self.destination == OTHER
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct OutcomeLabels {
    status_class: &'static str,
    grpc_status: Option<u32>,
    decision: Option<Verdict>,
}

impl OutcomeLabels {
    fn of(outcome: &Outcome) -> Self {
        let status_class = match outcome.status.map(|status| status / 100) {
            Some(1) => "1xx",
            Some(2) => "2xx",
            Some(3) => "3xx",
            Some(4) => "4xx",
            Some(5) => "5xx",
            Some(_) => OTHER,
            None => "",
        };
        Self {
            status_class,
            // gRPC defines 0 to 16; an application may send any number, which is one series.
            grpc_status: outcome.grpc_status.map(|status| status.min(17)),
            decision: outcome.decision,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    direction: &'static str,
    protocol: &'static str,
    source: Arc<str>,
    destination: Arc<str>,
    status_class: &'static str,
    grpc_status: &'static str,
    decision: &'static str,
}

impl RequestLabels {
    fn new(pair: PairLabels, protocol: Protocol, outcome: OutcomeLabels) -> Self {
        const GRPC: [&str; 17] = [
            "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15",
            "16",
        ];
        let grpc_status = outcome.grpc_status.map_or("", |status| {
            GRPC.get(status as usize).copied().unwrap_or(OTHER)
        });
        Self {
            direction: pair.direction,
            protocol: protocol.as_str(),
            source: pair.source,
            destination: pair.destination,
            status_class: outcome.status_class,
            grpc_status,
            decision: outcome.decision.map_or("", Verdict::as_str),
        }
    }
}

#[derive(Clone, Debug)]
struct DurationBuckets;

impl MetricConstructor<Histogram> for DurationBuckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new(BUCKETS)
    }
}

type Known = HashMap<(PairLabels, Protocol), Arc<PairMetrics>>;

/// Every pair, and the bound on all of them.
#[derive(Debug)]
pub(super) struct Pairs {
    known: RwLock<Known>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    requests: Family<RequestLabels, Counter>,
    durations: Family<PairLabels, Histogram, DurationBuckets>,
    series: AtomicUsize,
    series_max: usize,
    sweeps: AtomicU32,
}

impl Shared {
    fn reserve(&self, series: usize) -> bool {
        let more = |used: usize| (used + series <= self.series_max).then_some(used + series);
        self.series
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, more)
            .is_ok()
    }
}

impl Pairs {
    pub(super) fn new(registry: &mut Registry, series_max: usize) -> Self {
        let shared = Shared {
            requests: Family::default(),
            durations: Family::new_with_constructor(DurationBuckets),
            series: AtomicUsize::new(0),
            series_max,
            sweeps: AtomicU32::new(0),
        };
        let requests = shared.requests.clone();
        registry.register("sidegate_requests", "Calls that have ended", requests);
        registry.register(
            "sidegate_request_duration_seconds",
            "Time from a call's start to its end",
            shared.durations.clone(),
        );
        Self {
            known: RwLock::default(),
            shared: Arc::new(shared),
        }
    }

    pub(super) fn get(
        &self,
        direction: Direction,
        protocol: Protocol,
        source: Option<&Arc<str>>,
        destination: Option<&Arc<str>>,
    ) -> Arc<PairMetrics> {
        let identity = |id: Option<&Arc<str>>| id.map_or_else(|| "".into(), Arc::clone);
        let pair = PairLabels {
            direction: direction.as_str(),
            source: identity(source),
            destination: identity(destination),
        };
        let key = (pair, protocol);
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(metrics) = known.get(&key) {
            return Arc::clone(metrics);
        }
        drop(known);
        self.add(key)
    }

    fn add(&self, key: (PairLabels, Protocol)) -> Arc<PairMetrics> {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(metrics) = known.get(&key) {
            return Arc::clone(metrics);
        }
        let (pair, protocol) = key;
        let duration = known
            .values()
            .find(|other| other.pair == pair)
            .map(|other| Arc::clone(&other.duration));
        // A pair over the bound is not remembered: the map is bounded as the series are.
        let (pair, duration) = match duration {
            Some(duration) => (pair, duration),
            None if self.shared.reserve(HISTOGRAM_SERIES) => {
                let duration = self.shared.durations.get_or_create_owned(&pair);
                (pair, Arc::new(duration))
            }
            None => {
                let other = PairLabels::other(pair.direction);
                if let Some(metrics) = known.get(&(other.clone(), protocol)) {
                    return Arc::clone(metrics);
                }
                let duration = self.shared.durations.get_or_create_owned(&other);
                (other, Arc::new(duration))
            }
        };
        let metrics = Arc::new(PairMetrics {
            pair: pair.clone(),
            protocol,
            counters: RwLock::default(),
            duration,
            shared: Arc::clone(&self.shared),
            used_in: AtomicU32::new(self.shared.sweeps.load(Ordering::Relaxed)),
        });
        known.insert((pair, protocol), Arc::clone(&metrics));
        metrics
    }

    pub(super) fn sweep(&self, sweeps: u32) -> usize {
        let now = self.shared.sweeps.fetch_add(1, Ordering::Relaxed) + 1;
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let departed = known
            .extract_if(|(pair, _), metrics| {
                let unused = now.wrapping_sub(metrics.used_in.load(Ordering::Relaxed)) > sweeps;
                !pair.is_other() && unused && Arc::strong_count(metrics) == 1
            })
            .map(|(_, metrics)| metrics);
        let departed: Vec<Arc<PairMetrics>> = departed.collect();
        let removed = departed.len();
        for metrics in departed {
            self.remove(&metrics);
        }
        removed
    }

    /// Removes the series of a pair that is out of the map and that nobody else holds.
    fn remove(&self, metrics: &PairMetrics) {
        let mut freed = 0;
        let counters = metrics
            .counters
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        for (outcome, _) in counters.iter() {
            let labels = RequestLabels::new(metrics.pair.clone(), metrics.protocol, *outcome);
            freed += usize::from(self.shared.requests.remove(&labels));
        }
        let last = Arc::strong_count(&metrics.duration) == 1;
        if last && self.shared.durations.remove(&metrics.pair) {
            freed += HISTOGRAM_SERIES;
        }
        self.shared.series.fetch_sub(freed, Ordering::AcqRel);
    }

    pub(super) fn series(&self) -> usize {
        self.shared.series.load(Ordering::Acquire)
    }
}
