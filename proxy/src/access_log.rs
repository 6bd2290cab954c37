//! The access log: one line for each call, written by one thread for all workers.
//!
//! Always true: recording never blocks a call; a record that finds no room is dropped and counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;

use sidegate_mesh::access_log::Record;
use tokio::sync::mpsc;

/// Where calls are recorded. Cheap to clone; one for each worker.
#[derive(Clone, Debug, Default)]
pub struct Handle {
    dropped: Arc<AtomicU64>,
    sink: Option<Sender<Record>>,
    collector: Option<mpsc::UnboundedSender<Record>>,
}

impl Handle {
    /// A log that keeps nothing and counts everything as dropped.
    pub fn discarding() -> Self {
        Self::default()
    }

    /// A log whose records `sink` receives as they are: for tests of what is recorded.
    pub fn to_channel(sink: Sender<Record>) -> Self {
        Self {
            sink: Some(sink),
            ..Self::default()
        }
    }

    /// A log that hands every record to `collector` instead of writing it: for tests.
    pub fn collecting(collector: mpsc::UnboundedSender<Record>) -> Self {
        Self {
            collector: Some(collector),
            ..Self::default()
        }
    }

    /// Queues `record`, or drops and counts it when there is no room.
    pub fn record(&self, record: &Record) {
        let sink = self.sink.as_ref();
        let collector = self.collector.as_ref();
        let sent = sink.is_some_and(|sink| sink.send(record.clone()).is_ok())
            || collector.is_some_and(|collector| collector.send(record.clone()).is_ok());
        if !sent {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}
