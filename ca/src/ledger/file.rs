//! The ledger as a file, written by a thread of its own.
//!
//! Entries that wait together are written and synced together, so a hundred issuances at once cost
//! two syncs and not two hundred.
//!
//! Invariant: the file holds the chain up to [`Ledger::head`] and nothing behind it. After a write
//! or a sync that failed, the file is cut back to that length before anything else is appended;
//! while that fails too, every append fails.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::SystemTime;

use sidegate_mesh::clock::Clock;
use tokio::sync::oneshot;

use super::{Entry, Event, Head, Ledger, LedgerError, Written, chain};

/// Entries that are synced together at most.
const BATCH_MAX: usize = 256;

/// What the ledger's thread needs from a file, so that a test can stand in for a failing disk.
trait Storage: Send + 'static {
    /// Appends all bytes.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Makes everything appended durable.
    fn sync(&mut self) -> io::Result<()>;
    /// Cuts off everything behind `bytes`.
    fn truncate(&mut self, bytes: u64) -> io::Result<()>;
}

impl Storage for File {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }

    fn truncate(&mut self, bytes: u64) -> io::Result<()> {
        self.set_len(bytes)?;
        self.sync_all()
    }
}

/// The ledger of one state folder.
pub struct FileLedger {
    path: PathBuf,
    head: Arc<Mutex<Head>>,
    jobs: Mutex<Option<SyncSender<Job>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Job {
    event: Event,
    done: oneshot::Sender<Result<u64, LedgerError>>,
}

impl FileLedger {
    /// Opens the ledger at `path`, which may be absent or empty, shows every entry to `visit`, and
    /// removes a torn last line; the second value is how many bytes that were.
    ///
    /// # Errors
    ///
    /// [`LedgerError`] when it cannot be read, or the chain is broken anywhere but at a torn end.
    pub fn open(
        path: &Path,
        clock: Arc<dyn Clock>,
        queue_max: usize,
        visit: &mut dyn FnMut(&Entry),
    ) -> Result<(Self, u64), LedgerError> {
        let read_error = |source| LedgerError::Read {
            path: path.to_owned(),
            source: Arc::new(source),
        };
        let mut options = OpenOptions::new();
        let mut file = options
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .map_err(read_error)?;
        let scanned = chain::scan(path, BufReader::new(&file), visit)?;
        if scanned.torn_bytes > 0 {
            file.truncate(scanned.valid_bytes).map_err(read_error)?;
        }
        let ledger = Self::start(
            path,
            file,
            clock,
            (scanned.head, scanned.valid_bytes, queue_max),
        );
        Ok((ledger.map_err(read_error)?, scanned.torn_bytes))
    }

    fn start(
        path: &Path,
        storage: impl Storage,
        clock: Arc<dyn Clock>,
        (head, length, queue_max): (Head, u64, usize),
    ) -> io::Result<Self> {
        let (jobs, queue) = mpsc::sync_channel(queue_max);
        let shared = Arc::new(Mutex::new(head));
        let mut writer = Writer {
            storage,
            clock,
            head,
            length,
            dirty: false,
            shared: Arc::clone(&shared),
        };
        let thread = std::thread::Builder::new()
            .name("ledger".to_owned())
            .spawn(move || writer.run(&queue))?;
        Ok(Self {
            path: path.to_owned(),
            head: shared,
            jobs: Mutex::new(Some(jobs)),
            thread: Mutex::new(Some(thread)),
        })
    }

    /// As [`Ledger::append`], for a thread that may block.
    ///
    /// # Errors
    ///
    /// As [`Ledger::append`].
    pub fn append_now(&self, event: Event) -> Result<u64, LedgerError> {
        let queued = self.queue(event)?;
        queued
            .blocking_recv()
            .map_err(|_gone| LedgerError::Closed)?
    }

    fn queue(
        &self,
        event: Event,
    ) -> Result<oneshot::Receiver<Result<u64, LedgerError>>, LedgerError> {
        let (done, written) = oneshot::channel();
        let jobs = lock(&self.jobs);
        let jobs = jobs.as_ref().ok_or(LedgerError::Closed)?;
        match jobs.try_send(Job { event, done }) {
            Ok(()) => Ok(written),
            Err(TrySendError::Full(_)) => Err(LedgerError::Busy),
            Err(TrySendError::Disconnected(_)) => Err(LedgerError::Closed),
        }
    }

    /// Writes what is queued, then ends the thread. Appending fails from now on. Blocks.
    pub fn close(&self) {
        lock(&self.jobs).take();
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the ledger's thread panicked");
        }
    }
}

impl Ledger for FileLedger {
    fn append(&self, event: Event) -> Written {
        let queued = self.queue(event);
        Box::pin(async move { queued?.await.map_err(|_gone| LedgerError::Closed)? })
    }

    fn head(&self) -> Head {
        *lock(&self.head)
    }

    fn read(&self, visit: &mut dyn FnMut(&Entry)) -> Result<Head, LedgerError> {
        // Taken first: what is appended meanwhile only makes the file longer.
        let head = self.head();
        let open = || -> io::Result<io::Take<File>> {
            let file = File::open(&self.path)?;
            let length = file.metadata()?.len();
            // No further: a line that is being written is not a torn one.
            Ok(file.take(length))
        };
        let file = open().map_err(|source| LedgerError::Read {
            path: self.path.clone(),
            source: Arc::new(source),
        })?;
        let mut reached = head.entries == 0;
        let mut follow = |entry: &Entry| {
            if entry.index < head.entries {
                visit(entry);
            }
            // The head's hash is what its successor calls `previous`.
            reached |= entry.index == head.entries && entry.previous == head.hash;
        };
        let scanned = chain::scan(&self.path, BufReader::new(file), &mut follow)?;
        if reached || scanned.head == head {
            return Ok(head);
        }
        Err(LedgerError::Broken {
            path: self.path.clone(),
            line: scanned.head.entries,
            problem: format!(
                "the chain ends here or is another one; the running CA has written {} entries",
                head.entries
            ),
        })
    }
}

impl Drop for FileLedger {
    fn drop(&mut self) {
        self.close();
    }
}

struct Writer<S> {
    storage: S,
    clock: Arc<dyn Clock>,
    head: Head,
    /// Length of the file up to and including the head.
    length: u64,
    /// Whether something may lie behind `length`.
    dirty: bool,
    shared: Arc<Mutex<Head>>,
}

impl<S: Storage> Writer<S> {
    fn run(&mut self, queue: &Receiver<Job>) {
        while let Ok(first) = queue.recv() {
            let mut batch = vec![first];
            batch.extend(queue.try_iter().take(BATCH_MAX - 1));
            self.write_batch(batch);
        }
    }

    fn write_batch(&mut self, batch: Vec<Job>) {
        let mut next = self.head;
        let mut lines = Vec::new();
        let time = unix_milliseconds(self.clock.now());
        let mut waiting = Vec::with_capacity(batch.len());
        for Job { event, done } in batch {
            let index = next.entries;
            let pushed = next.push(&mut lines, time, event);
            waiting.push((done, pushed.map(|()| index)));
        }
        let written = self.write(&lines, next);
        for (done, pushed) in waiting {
            let answer = match (&written, pushed) {
                (Err(error), _) => Err(LedgerError::Write(Arc::clone(error))),
                (Ok(()), Ok(index)) => Ok(index),
                (Ok(()), Err(json)) => Err(LedgerError::Write(Arc::new(json.into()))),
            };
            // Whoever asked may have gone; the entry stands all the same.
            done.send(answer).ok();
        }
    }

    fn write(&mut self, lines: &[u8], next: Head) -> Result<(), Arc<io::Error>> {
        let result = self.try_write(lines);
        if let Err(error) = result {
            tracing::error!(error = %error, "ledger cannot be written; nothing is signed until it can");
            // Best effort now; `try_write` insists on it before the next line.
            self.cut_back().ok();
            return Err(Arc::new(error));
        }
        self.length += u64::try_from(lines.len()).unwrap_or(u64::MAX);
        self.head = next;
        *lock(&self.shared) = next;
        Ok(())
    }

    fn try_write(&mut self, lines: &[u8]) -> io::Result<()> {
        self.cut_back()?;
        self.dirty = true;
        self.storage.append(lines)?;
        self.storage.sync()?;
        self.dirty = false;
        Ok(())
    }

    /// After a failed sync the kernel may have dropped the pages and call the next sync a success.
    /// Everything up to `length` was synced before; what is behind must go before it is trusted.
    fn cut_back(&mut self) -> io::Result<()> {
        if self.dirty {
            self.storage.truncate(self.length)?;
            self.dirty = false;
        }
        Ok(())
    }
}

fn unix_milliseconds(time: SystemTime) -> u64 {
    let since = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use sidegate_mesh::clock::ManualClock;

    use super::*;

    fn clock() -> Arc<dyn Clock> {
        Arc::new(ManualClock::new(SystemTime::UNIX_EPOCH))
    }

    fn open(path: &Path) -> Result<(FileLedger, u64, usize), LedgerError> {
        let mut seen = 0;
        let (ledger, torn) = FileLedger::open(path, clock(), 1024, &mut |_| seen += 1)?;
        Ok((ledger, torn, seen))
    }

    fn event(bytes: u64) -> Event {
        Event::Repaired { bytes }
    }

    #[tokio::test]
    async fn entries_survive_a_restart_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger");
        let (ledger, _, _) = open(&path).unwrap();
        let written: Vec<Written> = (0..500).map(|n| ledger.append(event(n))).collect();
        for (n, written) in written.into_iter().enumerate() {
            assert_eq!(written.await.unwrap(), n as u64);
        }
        let head = ledger.head();
        drop(ledger);
        let (again, torn, seen) = open(&path).unwrap();
        assert_eq!((again.head(), torn, seen), (head, 0, 500));
        assert_eq!(again.read(&mut |_| {}).unwrap(), head);
    }

    #[tokio::test]
    async fn a_torn_tail_is_cut_off_and_reported() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger");
        let (ledger, _, _) = open(&path).unwrap();
        ledger.append(event(1)).await.unwrap();
        drop(ledger);
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"index\":1,\"ti").unwrap();
        let (ledger, torn, seen) = open(&path).unwrap();
        assert_eq!((torn, seen), (14, 1));
        ledger.append(event(2)).await.unwrap();
        assert_eq!(ledger.read(&mut |_| {}).unwrap().entries, 2);
    }

    #[tokio::test]
    async fn damage_elsewhere_is_refused_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger");
        let (ledger, _, _) = open(&path).unwrap();
        ledger.append(event(1)).await.unwrap();
        ledger.append(event(2)).await.unwrap();
        drop(ledger);
        let damaged =
            std::fs::read_to_string(&path)
                .unwrap()
                .replacen("\"bytes\":1", "\"bytes\":7", 1);
        std::fs::write(&path, &damaged).unwrap();
        let error = open(&path).err().unwrap();
        assert!(
            matches!(error, LedgerError::Broken { line: 1, .. }),
            "{error}"
        );
        assert_eq!(std::fs::read_to_string(&path).unwrap(), damaged);
    }

    #[tokio::test]
    async fn a_chain_cut_while_the_ca_runs_does_not_verify() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger");
        let (ledger, _, _) = open(&path).unwrap();
        ledger.append(event(1)).await.unwrap();
        let first = std::fs::metadata(&path).unwrap().len();
        ledger.append(event(2)).await.unwrap();
        ledger.read(&mut |_| {}).unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(first).unwrap();
        let error = ledger.read(&mut |_| {}).unwrap_err();
        assert!(matches!(error, LedgerError::Broken { .. }), "{error}");
    }

    /// A disk that fails when told to, and leaves half a line behind when it does.
    struct FailingDisk {
        bytes: Arc<Mutex<Vec<u8>>>,
        failing: Arc<Mutex<Option<Failing>>>,
    }

    #[derive(Clone, Copy, PartialEq)]
    enum Failing {
        Write,
        Sync,
        Everything,
    }

    impl Storage for FailingDisk {
        fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
            let failing = *lock(&self.failing);
            if matches!(failing, Some(Failing::Write | Failing::Everything)) {
                lock(&self.bytes).extend_from_slice(&bytes[..bytes.len() / 2]);
                return Err(io::ErrorKind::StorageFull.into());
            }
            lock(&self.bytes).extend_from_slice(bytes);
            Ok(())
        }

        fn sync(&mut self) -> io::Result<()> {
            match *lock(&self.failing) {
                Some(Failing::Sync | Failing::Everything) => Err(io::Error::other("sync")),
                _ => Ok(()),
            }
        }

        fn truncate(&mut self, bytes: u64) -> io::Result<()> {
            if *lock(&self.failing) == Some(Failing::Everything) {
                return Err(io::Error::other("truncate"));
            }
            lock(&self.bytes).truncate(usize::try_from(bytes).unwrap());
            Ok(())
        }
    }

    #[tokio::test]
    async fn after_a_failed_write_or_sync_the_chain_goes_on_without_a_trace() {
        for failure in [Failing::Write, Failing::Sync, Failing::Everything] {
            let bytes = Arc::new(Mutex::new(Vec::new()));
            let failing = Arc::new(Mutex::new(None));
            let disk = FailingDisk {
                bytes: Arc::clone(&bytes),
                failing: Arc::clone(&failing),
            };
            let path = Path::new("ledger");
            let ledger = FileLedger::start(path, disk, clock(), (Head::EMPTY, 0, 16)).unwrap();
            ledger.append(event(1)).await.unwrap();
            *lock(&failing) = Some(failure);
            for _ in 0..3 {
                let error = ledger.append(event(2)).await.unwrap_err();
                assert!(matches!(error, LedgerError::Write(_)), "{error}");
            }
            *lock(&failing) = None;
            assert_eq!(ledger.append(event(3)).await.unwrap(), 1);
            let written = lock(&bytes).clone();
            let scanned = chain::scan(path, written.as_slice(), &mut |_| {}).unwrap();
            assert_eq!((scanned.head, scanned.torn_bytes), (ledger.head(), 0));
        }
    }

    #[tokio::test]
    async fn nothing_is_appended_after_the_close() {
        let folder = tempfile::tempdir().unwrap();
        let (ledger, _, _) = open(&folder.path().join("ledger")).unwrap();
        ledger.close();
        let error = ledger.append(event(1)).await.unwrap_err();
        assert!(matches!(error, LedgerError::Closed), "{error}");
    }
}
