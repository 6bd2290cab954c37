//! The controller's metrics.
//!
//! Invariant: no label comes from a sidecar or from an object of the cluster. Kinds and reasons are
//! words of this crate, so the number of series is bounded by its source code.

use std::sync::atomic::AtomicI64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use crate::hub::Hub;

type Number = Gauge<i64, AtomicI64>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

/// Every metric.
#[derive(Default)]
pub(crate) struct Metrics {
    registry: Registry,
    connections_refused: Family<ReasonLabel, Counter>,
    handshake_failures: Family<ReasonLabel, Counter>,
    hellos_refused: Family<ReasonLabel, Counter>,
    streams_ended: Family<ReasonLabel, Counter>,
    responses: Counter,
    acknowledgements: Family<ResultLabel, Counter>,
    watch_events: Family<KindLabel, Counter>,
    watch_errors: Family<KindLabel, Counter>,
    synced: Family<KindLabel, Number>,
    lost: Family<KindLabel, Number>,
    status_writes: Family<ResultLabel, Counter>,
    event_writes: Family<ResultLabel, Counter>,
    reports: Family<ResultLabel, Counter>,
    /// Connections of sidecars and replicas.
    pub(crate) connections: Number,
    /// Whether this replica is the leader.
    pub(crate) leader: Number,
    gauges: Gauges,
}

/// Read off when somebody asks.
#[derive(Default)]
struct Gauges {
    sidecars: Number,
    destinations: Number,
    resources: Number,
    pods: Number,
    services: Number,
    acknowledgements: Number,
    entries: Number,
    subscriptions_refused: Number,
    events_dropped: Number,
}

impl Metrics {
    /// All at zero.
    pub(crate) fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("sidegate_controller"),
            ..Self::default()
        };
        let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        metrics
            .registry
            .register("build", "The version that runs", version);
        metrics.register_reasons();
        metrics.register_kinds();
        metrics.register_gauges();
        metrics
    }

    fn register_reasons(&mut self) {
        let registry = &mut self.registry;
        let families = [
            (
                "connections_refused",
                "Connections turned away",
                &self.connections_refused,
            ),
            (
                "handshake_failures",
                "TLS handshakes that failed",
                &self.handshake_failures,
            ),
            (
                "hellos_refused",
                "Streams whose sidecar is not who it says",
                &self.hellos_refused,
            ),
            (
                "streams_ended",
                "Streams of sidecars that ended",
                &self.streams_ended,
            ),
        ];
        for (name, help, family) in families {
            registry.register(name, help, family.clone());
        }
        let families = [
            (
                "acknowledgements",
                "What sidecars said of resources",
                &self.acknowledgements,
            ),
            (
                "status_writes",
                "Writes of a resource's status",
                &self.status_writes,
            ),
            (
                "event_writes",
                "Events written to the cluster",
                &self.event_writes,
            ),
            (
                "reports",
                "Acknowledgements passed between replicas",
                &self.reports,
            ),
        ];
        for (name, help, family) in families {
            registry.register(name, help, family.clone());
        }
        registry.register(
            "responses",
            "Responses sent to sidecars",
            self.responses.clone(),
        );
    }

    fn register_kinds(&mut self) {
        let registry = &mut self.registry;
        let events = self.watch_events.clone();
        registry.register("watch_events", "Objects heard of", events);
        let errors = self.watch_errors.clone();
        registry.register("watch_errors", "Watches that broke off", errors);
        registry.register(
            "synced",
            "Whether a kind was listed once",
            self.synced.clone(),
        );
        let help = "Whether a kind's definition is gone; what was known of it stays in use";
        registry.register("source_lost", help, self.lost.clone());
    }

    fn register_gauges(&mut self) {
        let of = &self.gauges;
        let gauges = [
            (
                "connections_open",
                "Connections of sidecars and replicas",
                &self.connections,
            ),
            ("leader", "Whether this replica writes status", &self.leader),
            ("sidecars", "Sidecars that are connected", &of.sidecars),
            (
                "destinations",
                "Destinations that somebody follows",
                &of.destinations,
            ),
            ("resources", "Resources of Sidegate's own", &of.resources),
            ("pods", "Pods that are known", &of.pods),
            ("services", "Services that are known", &of.services),
            (
                "acknowledgements_known",
                "Acknowledgements that are kept",
                &of.acknowledgements,
            ),
            (
                "index_entries",
                "Entries of the index, which memory follows",
                &of.entries,
            ),
            (
                "subscriptions_refused",
                "Destinations that were one too many for a sidecar, since the start",
                &of.subscriptions_refused,
            ),
            (
                "events_dropped",
                "Events that found no room, since the start",
                &of.events_dropped,
            ),
        ];
        for (name, help, gauge) in gauges {
            self.registry.register(name, help, gauge.clone());
        }
    }

    pub(crate) fn connection_refused(&self, reason: &'static str) {
        self.connections_refused
            .get_or_create_owned(&ReasonLabel { reason })
            .inc();
    }

    pub(crate) fn handshake_failed(&self, reason: &'static str) {
        self.handshake_failures
            .get_or_create_owned(&ReasonLabel { reason })
            .inc();
    }

    pub(crate) fn hello_refused(&self, reason: &'static str) {
        self.hellos_refused
            .get_or_create_owned(&ReasonLabel { reason })
            .inc();
    }

    pub(crate) fn stream_ended(&self, reason: &'static str) {
        self.streams_ended
            .get_or_create_owned(&ReasonLabel { reason })
            .inc();
    }

    pub(crate) fn responded(&self) {
        self.responses.inc();
    }

    pub(crate) fn acknowledged(&self, result: &'static str) {
        self.acknowledgements
            .get_or_create_owned(&ResultLabel { result })
            .inc();
    }

    pub(crate) fn watched(&self, kind: &'static str) {
        self.watch_events
            .get_or_create_owned(&KindLabel { kind })
            .inc();
    }

    pub(crate) fn watch_broke(&self, kind: &'static str) {
        self.watch_errors
            .get_or_create_owned(&KindLabel { kind })
            .inc();
    }

    pub(crate) fn is_synced(&self, kind: &'static str, synced: bool) {
        self.synced
            .get_or_create_owned(&KindLabel { kind })
            .set(i64::from(synced));
    }

    pub(crate) fn is_lost(&self, kind: &'static str, lost: bool) {
        self.lost
            .get_or_create_owned(&KindLabel { kind })
            .set(i64::from(lost));
    }

    pub(crate) fn status_written(&self, result: &'static str) {
        self.status_writes
            .get_or_create_owned(&ResultLabel { result })
            .inc();
    }

    pub(crate) fn event_written(&self, result: &'static str) {
        self.event_writes
            .get_or_create_owned(&ResultLabel { result })
            .inc();
    }

    pub(crate) fn reported(&self, result: &'static str, number: usize) {
        let number = u64::try_from(number).unwrap_or(u64::MAX);
        self.reports
            .get_or_create_owned(&ResultLabel { result })
            .inc_by(number);
    }

    /// The text that Prometheus reads.
    pub(crate) fn text(&self, hub: &Hub) -> Result<String, std::fmt::Error> {
        let (size, refused, dropped) = hub.look(|index| {
            (
                index.size(),
                index.subscriptions_refused(),
                index.notes_dropped(),
            )
        });
        let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let of = &self.gauges;
        of.sidecars.set(number(size.sidecars));
        of.destinations.set(number(size.destinations));
        of.resources.set(number(size.resources));
        of.pods.set(number(size.pods));
        of.services.set(number(size.services));
        of.acknowledgements.set(number(size.acknowledgements));
        of.entries.set(number(size.entries));
        of.subscriptions_refused.set(refused.cast_signed());
        of.events_dropped.set(dropped.cast_signed());
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metrics")
    }
}
