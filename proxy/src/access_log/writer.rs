//! The thread that writes.
//!
//! Always true: a line is in the file whole or not at all, once what was begun can be ended; the
//! queue fills and drops while the file cannot be written, and the calls do not notice.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tracing::{error, info};

use super::Shared;
use super::queue::Requests;

/// Memory for lines that is not given back between two writes.
const SPARE_BYTES_MAX: usize = 256 * 1024;

/// Where lines go.
pub(super) enum Target {
    Stdout,
    File { path: PathBuf, file: Option<File> },
}

impl Target {
    /// # Errors
    ///
    /// When the file cannot be opened for appending.
    pub(super) fn open(path: Option<&Path>) -> io::Result<Self> {
        let Some(path) = path else {
            return Ok(Self::Stdout);
        };
        let file = open(path)?;
        Ok(Self::File {
            path: path.to_owned(),
            file: Some(file),
        })
    }

    /// Makes sure that the open file is the one that the path names now. `true` when it is
    /// another one than before.
    fn renew(&mut self, force: bool) -> io::Result<bool> {
        let Self::File { path, file } = self else {
            return Ok(false);
        };
        if !force && file.as_ref().is_some_and(|file| is_at(file, path)) {
            return Ok(false);
        }
        *file = None;
        *file = Some(open(path)?);
        Ok(true)
    }

    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        match self {
            Self::Stdout => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(lines)?;
                stdout.flush()?;
                Ok(lines.len())
            }
            Self::File {
                file: Some(file), ..
            } => file.write(lines),
            Self::File { file: None, .. } => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn name(&self) -> String {
        match self {
            Self::Stdout => "standard output".to_owned(),
            Self::File { path, .. } => path.display().to_string(),
        }
    }
}

/// Writes what a queue holds.
pub(super) struct Writer {
    shared: Arc<Shared>,
    target: Target,
    interval: Duration,
    /// Lines that were taken and are not yet written, from `written` on.
    pending: Vec<u8>,
    written: usize,
    spent: Vec<u8>,
    failing: bool,
    dropped_before: u64,
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>, target: Target, interval: Duration) -> Self {
        Self {
            shared,
            target,
            // Half of the time is for gathering, half for a busy machine.
            interval: interval / 2,
            pending: Vec::new(),
            written: 0,
            spent: Vec::new(),
            failing: false,
            dropped_before: 0,
        }
    }

    /// As if a write of `lines` had been cut off.
    #[cfg(test)]
    pub(super) fn begin_for_tests(&mut self, lines: &[u8], written: usize) {
        (self.pending, self.written) = (lines.to_vec(), written);
    }

    /// Writes until the last handle is gone.
    pub(super) fn run(mut self) {
        loop {
            let requests = self.wait();
            let outcome = self.write(requests.reopen);
            self.report(outcome.as_ref().err());
            for done in requests.flushes {
                // Whoever asked may have given up.
                done.send(outcome.is_ok()).ok();
            }
            if requests.closed {
                return;
            }
        }
    }

    /// Waits for work, then a little for more of it, or for better times.
    fn wait(&self) -> Requests {
        let mut queue = self.shared.lock();
        while self.pending.is_empty() && !queue.has_work() {
            queue.set_idle();
            let woken = self.shared.wake.wait(queue);
            queue = woken.unwrap_or_else(PoisonError::into_inner);
        }
        if !queue.is_urgent() && (self.failing || queue.set_eager()) {
            let woken = self.shared.wake.wait_timeout(queue, self.interval);
            queue = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        queue.take_requests()
    }

    /// Writes what could not be written before, and only then takes more from the queue, whose
    /// bounds are the bounds of what is lost when times stay bad.
    pub(super) fn write(&mut self, reopen: bool) -> io::Result<()> {
        self.write_pending(reopen)?;
        let spent = std::mem::take(&mut self.spent);
        self.pending = self.shared.lock().take_lines(spent);
        self.write_pending(false)
    }

    fn write_pending(&mut self, reopen: bool) -> io::Result<()> {
        if self.target.renew(reopen)? {
            // What was begun in the file before is torn there; the new one gets the whole line.
            let begun = self.pending.get(..self.written).unwrap_or_default();
            self.written = begun
                .iter()
                .rposition(|byte| *byte == b'\n')
                .map_or(0, |at| at + 1);
        }
        while let Some(rest) = self
            .pending
            .get(self.written..)
            .filter(|rest| !rest.is_empty())
        {
            match self.target.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(bytes) => self.written += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.written = 0;
        let mut spent = std::mem::take(&mut self.pending);
        if spent.capacity() <= SPARE_BYTES_MAX && spent.capacity() > self.spent.capacity() {
            spent.clear();
            self.spent = spent;
        }
        Ok(())
    }

    /// Says once that the log fails, and once that it works again.
    fn report(&mut self, failure: Option<&io::Error>) {
        let dropped = self.shared.counters.dropped.get();
        if let Some(failure) = failure {
            self.shared.counters.write_failures.inc();
            if !std::mem::replace(&mut self.failing, true) {
                self.dropped_before = dropped;
                error!(log = self.target.name(), error = %failure, "access log cannot be written");
            }
        } else if std::mem::take(&mut self.failing) {
            let dropped = dropped - self.dropped_before;
            info!(
                log = self.target.name(),
                dropped, "access log is written again"
            );
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    let open = || {
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o640)
            .open(path)
    };
    match (open(), path.parent()) {
        (Err(error), Some(folder)) if error.kind() == io::ErrorKind::NotFound => {
            std::fs::create_dir_all(folder)?;
            open()
        }
        (opened, _) => opened,
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(open), Ok(named)) => (open.dev(), open.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}
