//! What every worker and the control thread share.
//!
//! Invariant: everything here is immutable, atomic, or swapped as a whole; nothing is per worker.

use std::sync::Arc;

use sidegate_mesh::{Clock, Workload};
use sidegate_mtls::CredentialStore;

use crate::access_log;
use crate::balance::Services;
use crate::config::Config;
use crate::connections::Connections;
use crate::destinations::Destinations;
use crate::drain::Drain;
use crate::limits::Limits;
use crate::metrics::Metrics;
use crate::original::{Originals, Own};
use crate::state::State;

/// One sidecar's shared values.
pub struct Shared {
    /// What it was told.
    pub config: Arc<Config>,
    /// Whom it stands beside.
    pub workload: Arc<Workload>,
    /// The snapshot in force.
    pub state: State,
    /// What it shows to peers, and whom it trusts.
    pub credentials: Arc<CredentialStore>,
    /// The bounds that are counted.
    pub limits: Limits,
    /// What it counts.
    pub metrics: Arc<Metrics>,
    /// Where calls are recorded.
    pub log: access_log::Handle,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Where it is in its life.
    pub drain: Drain,
    /// What is open now.
    pub connections: Connections,
    /// What is known of the services that are called.
    pub services: Services,
    /// Whose addresses are whose; only where calls are known by the address that they were made to.
    pub destinations: Option<Arc<Destinations>>,
    /// Where connections were going before they were redirected here.
    pub originals: Arc<dyn Originals>,
    /// The pod's addresses and this sidecar's ports.
    pub own: Own,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("workload", &self.workload.id)
            .field("drain", &self.drain)
            .finish_non_exhaustive()
    }
}
