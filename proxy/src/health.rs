//! The health port: is it ready, does it live, what did it count, and the application's probes.
//!
//! Invariant: ready means that calls are served as they should be: an SVID in date, a bundle that
//! it chains to, a complete snapshot, and no drain.

use std::sync::Arc;

use http::StatusCode;
use http::request::Parts;
use prometheus_client::registry::Registry;

use crate::metrics;
use crate::probes::Probes;
use crate::responder::{Answer, Reply, Respond, answer, refuse_writing, words};
use crate::shared::Shared;

/// Something without which the sidecar serves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Missing {
    /// No certificate of its own yet.
    Svid,
    /// Its certificate has ended, and no other came.
    SvidExpired,
    /// No bundle that its own certificate chains to.
    Bundle,
    /// In a cluster: no controller answered yet.
    Controller,
    /// The resources were not read yet.
    Snapshot,
    /// It drains.
    Draining,
}

impl Missing {
    /// The word in the answer of `/readyz`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Svid => "no SVID yet",
            Self::SvidExpired => "the SVID has expired",
            Self::Bundle => "no bundle that the SVID chains to",
            Self::Controller => "no controller answers yet",
            Self::Snapshot => "no complete snapshot of the resources yet",
            Self::Draining => "draining",
        }
    }
}

/// What is missing for the sidecar to be ready; nothing when it is.
pub fn missing(shared: &Shared) -> Vec<Missing> {
    let mut missing = Vec::new();
    match shared.credentials.current() {
        None => missing.extend([Missing::Svid, Missing::Bundle]),
        Some(credentials) if credentials.svid().not_after <= shared.clock.now() => {
            missing.push(Missing::SvidExpired);
        }
        Some(_) if shared.credentials.own_svid_is_trusted().is_err() => {
            missing.push(Missing::Bundle);
        }
        Some(_) => {}
    }
    if shared.state.current().is_none() {
        let destinations = shared.destinations.as_ref();
        if destinations.is_some_and(|destinations| !destinations.is_connected()) {
            missing.push(Missing::Controller);
        }
        missing.push(Missing::Snapshot);
    }
    if shared.drain.is_draining() {
        missing.push(Missing::Draining);
    }
    missing
}

/// Answers on the health port.
pub(crate) struct Health {
    pub(crate) shared: Arc<Shared>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) probes: Option<Arc<Probes>>,
}

impl Respond for Health {
    fn respond(&self, request: &Parts) -> Reply {
        if let Some(refusal) = refuse_writing(request) {
            return refusal.into();
        }
        let probes = self.probes.as_ref();
        if let Some(reply) = probes.and_then(|probes| probes.respond(request)) {
            return reply;
        }
        let answer = match request.uri.path() {
            "/readyz" => self.ready(),
            "/livez" => words(StatusCode::OK, "alive"),
            "/metrics" => self.metrics(),
            _ => words(
                StatusCode::NOT_FOUND,
                "there are /readyz, /livez and /metrics",
            ),
        };
        answer.into()
    }
}

impl Health {
    fn ready(&self) -> Answer {
        let missing = missing(&self.shared);
        if missing.is_empty() {
            return words(StatusCode::OK, "ready");
        }
        let missing: Vec<&str> = missing.into_iter().map(Missing::as_str).collect();
        let missing = format!("not ready: {}", missing.join(", "));
        words(StatusCode::SERVICE_UNAVAILABLE, missing)
    }

    fn metrics(&self) -> Answer {
        match metrics::text(&self.registry) {
            Ok(text) => answer(StatusCode::OK, metrics::CONTENT_TYPE, text),
            Err(error) => words(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        }
    }
}
