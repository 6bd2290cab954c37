//! What every task of a controller shares.

use std::sync::Arc;

use sidegate_mesh::clock::Clock;
use sidegate_mesh::spiffe::SpiffeId;
use sidegate_mtls::CredentialStore;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::hub::Hub;
use crate::lease::Leadership;
use crate::metrics::Metrics;
use crate::watches::Synced;

/// See the module.
pub(crate) struct Shared {
    pub config: Config,
    /// The identity of every replica.
    pub id: SpiffeId,
    pub store: Arc<CredentialStore>,
    pub clock: Arc<dyn Clock>,
    pub hub: Hub,
    pub metrics: Metrics,
    pub synced: Synced,
    pub leadership: watch::Sender<Leadership>,
    pub tracker: TaskTracker,
    /// Told once: stop.
    pub cancel: CancellationToken,
}

impl Shared {
    /// Runs a task until the controller stops.
    pub(crate) fn spawn(self: &Arc<Self>, task: impl Future<Output = ()> + Send + 'static) {
        let cancel = self.cancel.clone();
        self.tracker.spawn(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                () = task => {}
            }
        });
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}
