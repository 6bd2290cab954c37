//! The health port: is it ready, does it live, what did it count.
//!
//! Invariant: ready means that a sidecar that comes now is served at once: every kind was listed, and
//! there is an SVID that is believed.

use std::sync::Arc;

use sidegate_mtls::{Health, serve_health};
use tokio::net::TcpListener;

use crate::shared::Shared;

/// Serves `/metrics`, `/livez` and `/readyz` until the controller stops.
pub(crate) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let (clock, tracker) = (Arc::clone(&shared.clock), shared.tracker.clone());
    let cancel = shared.cancel.clone();
    serve_health(listener, shared, clock, tracker, cancel).await;
}

impl Health for Shared {
    fn missing(&self) -> Vec<String> {
        let mut missing = Vec::new();
        if let Err(error) = self.store.own_svid_is_trusted() {
            missing.push(format!("no SVID that is believed ({error})"));
        }
        let kinds = self.synced.missing();
        if !kinds.is_empty() {
            missing.push(format!("not listed yet: {}", kinds.join(" ")));
        }
        missing
    }

    fn metrics(&self) -> Result<String, std::fmt::Error> {
        self.metrics.text(&self.hub)
    }

    fn turned_away(&self) {
        self.metrics.connection_refused("health_connections_max");
    }
}
