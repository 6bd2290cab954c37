//! The CA's metrics, and what its health port tells of.
//!
//! Invariant: no label comes from a caller. Reasons and evidence are words of this crate, so the
//! number of series is bounded by its source code.

use std::sync::atomic::{AtomicI64, AtomicU64};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use sidegate_mtls::Health;

use crate::authority::unix_seconds;
use crate::issuer::Issuer;

type Number = Gauge<i64, AtomicI64>;

/// Every metric, resolved once.
pub(crate) struct Metrics {
    registry: Registry,
    /// Certificates issued, by kind of evidence.
    issued: Family<EvidenceLabel, Counter>,
    /// Requests refused.
    refusals: Family<ReasonLabel, Counter>,
    /// Handshakes that failed.
    handshake_failures: Family<ReasonLabel, Counter>,
    /// Connections turned away before a handshake.
    connections_refused: Family<ReasonLabel, Counter>,
    /// Lineages frozen since the start.
    pub(crate) frozen_lineages: Counter<u64, AtomicU64>,
    /// Questions that the Kubernetes API did not answer well.
    kubernetes_failures: Family<WhatLabel, Counter>,
    /// Bundles written to namespaces.
    bundle_writes: Family<ResultLabel, Counter>,
    /// Connections of sidecars.
    pub(crate) connections: Number,
    gauges: Gauges,
}

/// Read off when somebody asks.
#[derive(Default)]
struct Gauges {
    watchers: Number,
    unacknowledged: Number,
    sequence: Number,
    ledger_entries: Number,
    certificates: Number,
    tokens: Number,
    revocations: Number,
    root_not_after: Number,
    intermediate_not_after: Number,
    bundle_namespaces: Number,
    bundle_namespaces_behind: Number,
    keys_behind: Number,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EvidenceLabel {
    evidence: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WhatLabel {
    what: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

impl Metrics {
    /// All at zero.
    pub(crate) fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("sidegate_ca"),
            issued: Family::default(),
            refusals: Family::default(),
            handshake_failures: Family::default(),
            connections_refused: Family::default(),
            frozen_lineages: Counter::default(),
            kubernetes_failures: Family::default(),
            bundle_writes: Family::default(),
            connections: Number::default(),
            gauges: Gauges::default(),
        };
        metrics.register_counters();
        metrics.register_gauges();
        metrics.register_cluster_gauges();
        metrics
    }

    fn register_counters(&mut self) {
        let registry = &mut self.registry;
        let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The version that runs", version);
        registry.register(
            "issued",
            "Certificates issued to workloads",
            self.issued.clone(),
        );
        registry.register("refusals", "Requests refused", self.refusals.clone());
        let failures = self.handshake_failures.clone();
        registry.register("handshake_failures", "TLS handshakes that failed", failures);
        let refused = self.connections_refused.clone();
        registry.register("connections_refused", "Connections turned away", refused);
        let frozen = self.frozen_lineages.clone();
        registry.register("lineages_frozen", "SVIDs renewed with two keys", frozen);
        registry.register(
            "kubernetes_failures",
            "Questions that the Kubernetes API did not answer well",
            self.kubernetes_failures.clone(),
        );
        registry.register(
            "bundle_writes",
            "Bundles written to namespaces",
            self.bundle_writes.clone(),
        );
    }

    fn register_gauges(&mut self) {
        let Gauges {
            watchers,
            unacknowledged,
            sequence,
            ledger_entries,
            certificates,
            tokens,
            revocations,
            root_not_after,
            intermediate_not_after,
            ..
        } = &self.gauges;
        let gauges = [
            (
                "connections_open",
                "Connections of sidecars",
                &self.connections,
            ),
            ("watchers", "Open bundle streams", watchers),
            (
                "identities_unacknowledged",
                "Identities that have not put the current bundle to use",
                unacknowledged,
            ),
            (
                "bundle_sequence",
                "Sequence of the current bundle",
                sequence,
            ),
            ("ledger_entries", "Entries of the ledger", ledger_entries),
            ("certificates", "Certificates in date", certificates),
            ("tokens", "Join tokens that are not expired", tokens),
            ("revocations", "Entries of the denylist", revocations),
            (
                "root_not_after_timestamp_seconds",
                "End of the active root",
                root_not_after,
            ),
            (
                "intermediate_not_after_timestamp_seconds",
                "End of the intermediate",
                intermediate_not_after,
            ),
        ];
        for (name, help, gauge) in gauges {
            self.registry.register(name, help, gauge.clone());
        }
    }

    /// What only a CA in a cluster has something to say about.
    fn register_cluster_gauges(&mut self) {
        let gauges = &self.gauges;
        let cluster = [
            (
                "bundle_namespaces",
                "Namespaces that the bundle has to be in",
                &gauges.bundle_namespaces,
            ),
            (
                "bundle_namespaces_behind",
                "Namespaces in which the bundle is not as it should be",
                &gauges.bundle_namespaces_behind,
            ),
            (
                "keys_behind",
                "1 while the keys that replicas share cannot be read",
                &gauges.keys_behind,
            ),
        ];
        for (name, help, gauge) in cluster {
            self.registry.register(name, help, gauge.clone());
        }
    }

    /// Counts a certificate.
    pub(crate) fn issued(&self, evidence: &'static str) {
        let label = EvidenceLabel { evidence };
        self.issued.get_or_create_owned(&label).inc();
    }

    /// Counts a question that the Kubernetes API did not answer well.
    pub(crate) fn kubernetes_failed(&self, what: &'static str) {
        let label = WhatLabel { what };
        self.kubernetes_failures.get_or_create_owned(&label).inc();
    }

    /// Counts a bundle written, or not.
    pub(crate) fn bundle_written(&self, result: &'static str) {
        let label = ResultLabel { result };
        self.bundle_writes.get_or_create_owned(&label).inc();
    }

    /// In how many namespaces the bundle has to be, and in how many it is not as it should be.
    pub(crate) fn bundles(&self, namespaces: usize, behind: usize) {
        let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.gauges.bundle_namespaces.set(number(namespaces));
        self.gauges.bundle_namespaces_behind.set(number(behind));
    }

    /// Whether what replicas share can be read.
    pub(crate) fn keys_read(&self, read: bool) {
        self.gauges.keys_behind.set(i64::from(!read));
    }

    /// Counts a refusal.
    pub(crate) fn refused(&self, reason: &'static str) {
        let label = ReasonLabel { reason };
        self.refusals.get_or_create_owned(&label).inc();
    }

    /// Counts a failed handshake.
    pub(crate) fn handshake_failed(&self, reason: &'static str) {
        let label = ReasonLabel { reason };
        self.handshake_failures.get_or_create_owned(&label).inc();
    }

    /// Counts a connection that was turned away.
    pub(crate) fn connection_refused(&self, reason: &'static str) {
        let label = ReasonLabel { reason };
        self.connections_refused.get_or_create_owned(&label).inc();
    }

    /// The text that Prometheus reads.
    pub(crate) fn text(&self, issuer: &Issuer) -> Result<String, std::fmt::Error> {
        self.read_gauges(issuer);
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }

    fn read_gauges(&self, issuer: &Issuer) {
        let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let gauges = &self.gauges;
        let registry = issuer.registry();
        let watchers = issuer.watchers();
        let sequence = registry.sequence();
        let missing = watchers.missing(&registry, sequence, None).len();
        gauges.watchers.set(number(watchers.len()));
        gauges.unacknowledged.set(number(missing));
        gauges.sequence.set(sequence.cast_signed());
        gauges
            .ledger_entries
            .set(issuer.ledger.head().entries.cast_signed());
        gauges.certificates.set(number(registry.certificates_len()));
        gauges
            .tokens
            .set(number(registry.tokens(issuer.clock.now()).len()));
        gauges.revocations.set(number(registry.revocations()));
        let active = registry.root(crate::registry::RootState::Active);
        let root_end = active.map_or(0, |root| unix_seconds(root.not_after));
        gauges.root_not_after.set(root_end.cast_signed());
        let end = unix_seconds(issuer.intermediate().not_after);
        gauges.intermediate_not_after.set(end.cast_signed());
    }
}

impl Health for Issuer {
    fn missing(&self) -> Vec<String> {
        let trusted = self.store.own_svid_is_trusted();
        let error = trusted.err().map(|error| error.to_string());
        error.into_iter().collect()
    }

    fn metrics(&self) -> Result<String, std::fmt::Error> {
        self.metrics.text(self)
    }

    fn turned_away(&self) {
        self.metrics.connection_refused("health_connections_max");
    }
}
