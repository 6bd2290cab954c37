//! What the sidecar counts. Names and labels are part of the interface.
//!
//! Invariants: the registry is passed in, since several sidecars run in one process; no label ever
//! holds a path, a host or a user agent; the number of series is bounded, and what exceeds the bound
//! is counted under `other`; handles are resolved once and kept, so that counting is one atomic.

mod exposition;
mod pairs;
mod process;

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use sidegate_mesh::access_log::{Direction, Protocol};

pub use exposition::{CONTENT_TYPE, text};
pub use pairs::{OTHER, Outcome, PairMetrics};

use pairs::Pairs;

/// Every metric of one sidecar.
#[derive(Debug)]
pub struct Metrics {
    /// Requests that run now, both directions.
    pub requests_in_flight: Gauge,
    /// Records of the access log that were dropped because its queue was full.
    pub access_log_dropped: Counter,
    /// Attempts to write the access log that failed.
    pub access_log_write_failures: Counter,
    /// Number of the snapshot in force; 0 before the first.
    pub snapshot_number: Gauge<u64, AtomicU64>,
    /// Changes of a resource, or of all of them, that were refused.
    pub snapshot_rejections: Counter,
    /// Renewals that put a new SVID into use.
    pub renewals_ok: Counter,
    /// Renewals that failed; the SVID before stays in use.
    pub renewals_failed: Counter,
    /// Destinations that the controller is asked about now.
    pub destinations: Gauge,
    /// Whether the controller's stream is open: 1 or 0.
    pub controller_connected: Gauge,
    certificate_not_after: process::Moment,
    connections: Family<ConnectionLabels, Gauge>,
    handshake_failures: Family<HandshakeLabels, Counter>,
    limit_refusals: Family<LimitLabels, Counter>,
    pairs: Pairs,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ConnectionLabels {
    direction: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HandshakeLabels {
    direction: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LimitLabels {
    limit: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RenewalLabels {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BuildLabels {
    version: &'static str,
}

impl Metrics {
    /// Registers every metric in `registry`; at most `series_max` series name peers.
    pub fn new(registry: &mut Registry, series_max: u32) -> Self {
        let renewals = Family::<RenewalLabels, Counter>::default();
        let renewal = |result| renewals.get_or_create_owned(&RenewalLabels { result });
        let metrics = Self {
            requests_in_flight: Gauge::default(),
            access_log_dropped: Counter::default(),
            access_log_write_failures: Counter::default(),
            snapshot_number: Gauge::default(),
            snapshot_rejections: Counter::default(),
            renewals_ok: renewal("ok"),
            renewals_failed: renewal("failed"),
            destinations: Gauge::default(),
            controller_connected: Gauge::default(),
            certificate_not_after: process::Moment::default(),
            connections: Family::default(),
            handshake_failures: Family::default(),
            limit_refusals: Family::default(),
            pairs: Pairs::new(registry, series_max as usize),
        };
        metrics.register(registry);
        registry.register(
            "sidegate_certificate_renewals",
            "Renewals of the workload certificate",
            renewals,
        );
        registry.register_collector(Box::new(metrics.certificate_not_after.clone()));
        registry.register_collector(Box::new(process::ProcessCollector));
        let build = Family::<BuildLabels, Gauge>::default();
        let version = env!("CARGO_PKG_VERSION");
        build.get_or_create(&BuildLabels { version }).set(1);
        registry.register(
            "sidegate_build_info",
            "The release that runs, always 1",
            build,
        );
        metrics
    }

    fn register(&self, registry: &mut Registry) {
        let in_flight = self.requests_in_flight.clone();
        registry.register(
            "sidegate_requests_in_flight",
            "Requests that run now",
            in_flight,
        );
        let open = self.connections.clone();
        registry.register(
            "sidegate_connections_open",
            "Connections that are open now",
            open,
        );
        registry.register(
            "sidegate_tls_handshake_failures",
            "TLS handshakes that failed, by reason",
            self.handshake_failures.clone(),
        );
        registry.register(
            "sidegate_snapshot_number",
            "Number of the snapshot in force, 0 before the first",
            self.snapshot_number.clone(),
        );
        registry.register(
            "sidegate_snapshot_rejections",
            "Changes of resources that were refused",
            self.snapshot_rejections.clone(),
        );
        registry.register(
            "sidegate_access_log_dropped",
            "Records of the access log that were dropped",
            self.access_log_dropped.clone(),
        );
        registry.register(
            "sidegate_access_log_write_failures",
            "Attempts to write the access log that failed",
            self.access_log_write_failures.clone(),
        );
        registry.register(
            "sidegate_destinations",
            "Destinations that the controller is asked about now",
            self.destinations.clone(),
        );
        registry.register(
            "sidegate_controller_connected",
            "Whether the stream to the controller is open, 1 or 0",
            self.controller_connected.clone(),
        );
        registry.register(
            "sidegate_limit_refusals",
            "What was turned away because a configured limit was reached",
            self.limit_refusals.clone(),
        );
    }

    /// The handle of all calls of one protocol between two identities. Keep it as long as the
    /// connection lives; when there are too many pairs, both identities become [`OTHER`].
    pub fn requests(
        &self,
        direction: Direction,
        protocol: Protocol,
        source: Option<&std::sync::Arc<str>>,
        destination: Option<&std::sync::Arc<str>>,
    ) -> std::sync::Arc<PairMetrics> {
        self.pairs.get(direction, protocol, source, destination)
    }

    /// Open connections in one direction.
    pub fn connections_open(&self, direction: Direction) -> Gauge {
        let direction = direction.as_str();
        self.connections
            .get_or_create_owned(&ConnectionLabels { direction })
    }

    /// Counts a failed handshake; `reason` is a code of the program, never a peer's words.
    pub fn handshake_failure(&self, direction: Direction, reason: &'static str) {
        let direction = direction.as_str();
        let labels = HandshakeLabels { direction, reason };
        self.handshake_failures.get_or_create(&labels).inc();
    }

    /// The counter of one limit's refusals, made when the limit is, so that it shows 0.
    pub fn limit_refusals(&self, limit: &'static str) -> Counter {
        self.limit_refusals
            .get_or_create_owned(&LimitLabels { limit })
    }

    /// The end of the certificate in use, seconds since 1970.
    pub fn set_certificate_not_after(&self, seconds: u64) {
        self.certificate_not_after.set(seconds);
    }

    /// Removes the series of pairs that nobody holds and that were not used since `sweeps` calls of
    /// this; called in even intervals. Returns how many pairs were removed.
    pub fn sweep(&self, sweeps: u32) -> usize {
        self.pairs.sweep(sweeps)
    }

    /// How many series name peers now.
    pub fn series(&self) -> usize {
        self.pairs.series()
    }
}

#[cfg(test)]
mod tests;
