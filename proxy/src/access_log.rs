//! The access log: one line for each call, written by one thread for all workers.
//!
//! Always true: recording never waits for the disk. A record that finds no room is dropped and
//! counted; refusals have room of their own, and when that is full they are added up per peer, so
//! that no flood of allowed calls hides one, and no flood of refused ones loses count.

mod queue;
mod writer;

use std::cell::RefCell;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use prometheus_client::metrics::counter::Counter;
use sidegate_mesh::access_log::Record;
use tokio::sync::oneshot;

use crate::config::LogConfig;
use queue::{Queue, Room};
use writer::{Target, Writer};

thread_local! {
    /// Where a worker formats its lines: memory that is used again, and nothing that is kept.
    static LINE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// What the log counts about itself.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Records that found no room: `sidegate_access_log_dropped_total`.
    pub dropped: Counter,
    /// Attempts to write that failed.
    pub write_failures: Counter,
}

/// Where calls are recorded. Cheap to clone, shared by all workers.
///
/// When the last one is dropped, the writer writes what it has and ends.
#[derive(Clone)]
pub struct Handle {
    shared: Arc<Shared>,
    _open: Arc<Open>,
    /// Where a test takes the records, instead of a queue.
    tap: Option<Arc<Tap>>,
}

/// Takes a record; `false` when nobody listens any more.
type Tap = dyn Fn(&Record) -> bool + Send + Sync;

/// What handles and the writer share.
#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
    counters: Counters,
}

/// Closes the log when the last handle goes.
#[derive(Debug)]
struct Open(Arc<Shared>);

/// Starts the writer of the access log that `config` describes.
///
/// # Errors
///
/// When the file cannot be opened for appending, or the system gives no thread. Later troubles
/// with the file are survived, reported as diagnostics and recovered from.
pub fn start(config: &LogConfig, counters: Counters) -> io::Result<Handle> {
    let target = Target::open(config.path.as_deref())?;
    let room = Room {
        records: config.queue_records_max,
        refusals: config.denials_queue_max,
        kept: config.denials_kept_max,
    };
    let handle = Handle::new(room, counters);
    let writer = Writer::new(Arc::clone(&handle.shared), target, config.flush_interval);
    std::thread::Builder::new()
        .name("sidegate-log".to_owned())
        .spawn(move || writer.run())?;
    Ok(handle)
}

impl Handle {
    /// A log that keeps nothing and counts everything as dropped.
    pub fn discarding() -> Self {
        Self::new(Room::default(), Counters::default())
    }

    /// A log whose records `sink` receives as they are: for tests of what is recorded.
    pub fn to_channel(sink: std::sync::mpsc::Sender<Record>) -> Self {
        Self::tapped(move |record| sink.send(record.clone()).is_ok())
    }

    /// A log that hands every record to `collector` instead of writing it: for tests that wait.
    pub fn collecting(collector: tokio::sync::mpsc::UnboundedSender<Record>) -> Self {
        Self::tapped(move |record| collector.send(record.clone()).is_ok())
    }

    fn tapped(tap: impl Fn(&Record) -> bool + Send + Sync + 'static) -> Self {
        Self {
            tap: Some(Arc::new(tap)),
            ..Self::discarding()
        }
    }

    fn new(room: Room, counters: Counters) -> Self {
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue::new(room)),
            wake: Condvar::new(),
            counters,
        });
        Self {
            _open: Arc::new(Open(Arc::clone(&shared))),
            shared,
            tap: None,
        }
    }

    /// Queues `record`, or drops and counts it when there is no room.
    pub fn record(&self, record: &Record) {
        let kept = match &self.tap {
            Some(tap) => tap(record),
            None => LINE.with_borrow_mut(|line| {
                line.clear();
                record.write_line(line);
                self.queue(record, line)
            }),
        };
        if !kept {
            self.shared.counters.dropped.inc();
        }
    }

    fn queue(&self, record: &Record, line: &[u8]) -> bool {
        let mut queue = self.shared.lock();
        let kept = if record.is_refusal() {
            queue.push_refusal(record, line)
        } else {
            queue.push(line)
        };
        let wake = queue.take_wake();
        drop(queue);
        if wake {
            self.shared.wake.notify_one();
        }
        kept
    }

    /// What the log counts about itself.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// The latest refusals as lines of JSON, oldest first.
    pub fn denials(&self) -> Vec<String> {
        self.shared.lock().refusals_kept()
    }

    /// Writes everything recorded so far. `true` when it is in the file; `false` when the file
    /// cannot be written at the moment, and then it waits for better times.
    pub async fn flush(&self) -> bool {
        let (done, wait) = oneshot::channel();
        self.shared.lock().ask_flush(done);
        self.shared.wake.notify_one();
        wait.await.unwrap_or(false)
    }

    /// Opens the file anew at the next write, as after a rotation; for SIGHUP. A file that was
    /// moved or removed is noticed without it.
    pub fn reopen(&self) {
        self.shared.lock().ask_reopen();
        self.shared.wake.notify_one();
    }
}

impl Default for Handle {
    fn default() -> Self {
        Self::discarding()
    }
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handle")
            .field("counters", &self.shared.counters)
            .finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.lock().close();
        self.0.wake.notify_one();
    }
}

#[cfg(test)]
mod tests;
