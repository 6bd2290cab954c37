//! What is in force now: the current snapshot of policy and routes.
//!
//! Invariant: a snapshot is published whole and never changed; whoever decides something loads it
//! once and uses that one for the decision, the routing and the log line.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use sidegate_mesh::Snapshot;
use tokio::sync::watch;

/// The current snapshot. Clones share it.
#[derive(Clone, Debug)]
pub struct State {
    current: Arc<ArcSwapOption<Snapshot>>,
    number: Arc<watch::Sender<u64>>,
}

impl Default for State {
    fn default() -> Self {
        Self::new()
    }
}

impl State {
    /// No snapshot yet: not ready, and everything is denied.
    pub fn new() -> Self {
        Self {
            current: Arc::new(ArcSwapOption::empty()),
            number: Arc::new(watch::Sender::new(0)),
        }
    }

    /// The snapshot in force; `None` before the first complete one.
    pub fn current(&self) -> Option<Arc<Snapshot>> {
        self.current.load_full()
    }

    /// Makes `next` what every later decision uses, then wakes whoever follows.
    pub fn publish(&self, next: Arc<Snapshot>) {
        let number = next.number;
        self.current.store(Some(next));
        self.number.send_replace(number);
    }

    /// Follows the number of the snapshot in force; 0 before the first.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.number.subscribe()
    }
}
