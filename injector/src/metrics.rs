//! The injector's metrics.
//!
//! Invariant: no label comes from a caller, so the number of series is bounded by this crate's
//! source code.

use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use std::time::{Duration, SystemTime};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

type Number = Gauge<i64, AtomicI64>;

/// Seconds; a review takes about half a millisecond.
const BUCKETS: [f64; 10] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0, 2.5, 5.0,
];

/// Which webhook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    /// Injection.
    Mutate,
    /// Validation.
    Validate,
}

impl Which {
    fn word(self) -> &'static str {
        match self {
            Self::Mutate => "mutate",
            Self::Validate => "validate",
        }
    }
}

/// What became of a review.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// A pod was injected.
    Patched,
    /// Nothing had to be done.
    Unchanged,
    /// A pod cannot be injected, and was let in.
    Skipped,
    /// A resource is good.
    Allowed,
    /// It is at fault.
    Refused,
    /// We could not tell.
    Failed,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Patched => "patched",
            Self::Unchanged => "unchanged",
            Self::Skipped => "skipped",
            Self::Allowed => "allowed",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WebhookLabel {
    webhook: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VerdictLabels {
    webhook: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WriteLabels {
    configuration: &'static str,
    result: &'static str,
}

/// Every metric.
pub(crate) struct Metrics {
    registry: Registry,
    admissions: Family<VerdictLabels, Counter>,
    duration: Family<WebhookLabel, Histogram, fn() -> Histogram>,
    requests_refused: Family<ReasonLabel, Counter>,
    connections_refused: Family<ReasonLabel, Counter>,
    handshake_failures: Family<ReasonLabel, Counter>,
    roots_written: Family<WriteLabels, Counter>,
    connections: Number,
    namespaces: Number,
    not_after: Number,
    renewals_failed: Number,
}

/// What is read off when somebody asks.
pub(crate) struct Readings {
    pub(crate) connections: usize,
    pub(crate) namespaces: usize,
    pub(crate) not_after: Option<SystemTime>,
    pub(crate) renewals_failed: u64,
}

impl Metrics {
    /// All at zero.
    pub(crate) fn new() -> Arc<Self> {
        let buckets: fn() -> Histogram = || Histogram::new(BUCKETS);
        let mut metrics = Self {
            registry: Registry::with_prefix("sidegate_injector"),
            admissions: Family::default(),
            duration: Family::new_with_constructor(buckets),
            requests_refused: Family::default(),
            connections_refused: Family::default(),
            handshake_failures: Family::default(),
            roots_written: Family::default(),
            connections: Number::default(),
            namespaces: Number::default(),
            not_after: Number::default(),
            renewals_failed: Number::default(),
        };
        metrics.register();
        Arc::new(metrics)
    }

    fn register(&mut self) {
        let registry = &mut self.registry;
        let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The version that runs", version);
        let help = "Reviews answered";
        registry.register("admissions", help, self.admissions.clone());
        let help = "Time from a review's body to its answer";
        registry.register("admission_duration_seconds", help, self.duration.clone());
        let help = "Requests that were no review, or came at a bound";
        registry.register("requests_refused", help, self.requests_refused.clone());
        let help = "Connections ended for others or not let in";
        registry.register(
            "connections_refused",
            help,
            self.connections_refused.clone(),
        );
        let help = "TLS handshakes that failed";
        registry.register("handshake_failures", help, self.handshake_failures.clone());
        let help = "Writes of the roots into webhook configurations";
        registry.register("roots_written", help, self.roots_written.clone());
        let gauges = [
            ("connections_open", "Open connections", &self.connections),
            ("namespaces", "Namespaces that are known", &self.namespaces),
            (
                "certificate_not_after_timestamp_seconds",
                "End of the injector's own certificate",
                &self.not_after,
            ),
            (
                "certificate_renewals_failed",
                "Renewals that failed",
                &self.renewals_failed,
            ),
        ];
        for (name, help, gauge) in gauges {
            registry.register(name, help, gauge.clone());
        }
    }

    /// Counts a review's answer.
    pub(crate) fn reviewed(&self, which: Which, verdict: Verdict, took: Duration) {
        self.count(which, verdict.word());
        let label = WebhookLabel {
            webhook: which.word(),
        };
        self.duration
            .get_or_create_owned(&label)
            .observe(took.as_secs_f64());
    }

    /// Counts what was sent to a webhook and is no review.
    pub(crate) fn malformed(&self, which: Which) {
        self.count(which, "malformed");
    }

    fn count(&self, which: Which, result: &'static str) {
        let webhook = which.word();
        self.admissions
            .get_or_create_owned(&VerdictLabels { webhook, result })
            .inc();
    }

    /// Counts a request that got no review's answer.
    pub(crate) fn request_refused(&self, reason: &'static str) {
        self.requests_refused
            .get_or_create_owned(&ReasonLabel { reason })
            .inc();
    }

    /// Counts a connection that had to go.
    pub(crate) fn connection_refused(&self, reason: &'static str) {
        self.connections_refused
            .get_or_create_owned(&ReasonLabel { reason })
            .inc();
    }

    /// Counts a failed handshake.
    pub(crate) fn handshake_failed(&self, reason: &'static str) {
        self.handshake_failures
            .get_or_create_owned(&ReasonLabel { reason })
            .inc();
    }

    /// Counts a write of the roots.
    pub(crate) fn roots_written(&self, configuration: &'static str, fine: bool) {
        let result = if fine { "ok" } else { "failed" };
        self.roots_written
            .get_or_create_owned(&WriteLabels {
                configuration,
                result,
            })
            .inc();
    }

    /// The text that Prometheus reads.
    pub(crate) fn text(&self, readings: &Readings) -> Result<String, std::fmt::Error> {
        let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.connections.set(number(readings.connections));
        self.namespaces.set(number(readings.namespaces));
        self.renewals_failed
            .set(i64::try_from(readings.renewals_failed).unwrap_or(i64::MAX));
        let end = readings
            .not_after
            .and_then(|end| end.duration_since(SystemTime::UNIX_EPOCH).ok());
        self.not_after
            .set(end.map_or(0, |end| i64::try_from(end.as_secs()).unwrap_or(i64::MAX)));
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
