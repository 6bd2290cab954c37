//! Where lines come from: streams, files, and folders in which files come, grow, turn and go.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;

/// Longest line that is read whole; a longer one is cut, and so shown as broken.
pub(crate) const LINE_BYTES_MAX: u64 = 1024 * 1024;

/// A line and where it stands.
#[derive(Clone, Debug)]
pub(crate) struct Raw {
    /// The file's name.
    pub(crate) file: Arc<str>,
    /// Counted from 1.
    pub(crate) number: u64,
    /// The line, without its end.
    pub(crate) text: String,
}

/// The lines of a stream that ends.
pub(crate) fn lines(reader: impl BufRead, name: &str) -> impl Iterator<Item = io::Result<Raw>> {
    let mut lines = Lines::new(reader, name.into());
    std::iter::from_fn(move || match lines.next() {
        Ok(None) => lines.finish().map(Ok),
        other => other.transpose(),
    })
}

/// The `*.log` files of a folder, or one file, read on from where they were left.
pub(crate) struct Folder {
    path: PathBuf,
    only: Option<PathBuf>,
    tails: BTreeMap<PathBuf, Tail>,
    /// How much of the end of a file is read at first; all of it when absent.
    end_bytes: Option<u64>,
}

impl Folder {
    /// # Errors
    ///
    /// When the folder cannot be read, or has no log.
    pub(crate) fn open(folder: &Path) -> anyhow::Result<Self> {
        let folder = Self {
            path: folder.to_owned(),
            only: None,
            tails: BTreeMap::new(),
            end_bytes: None,
        };
        let shown = folder.path.display();
        let paths = folder
            .paths()
            .with_context(|| format!("cannot read {shown}; is the mesh running with --dir?"))?;
        anyhow::ensure!(!paths.is_empty(), "no *.log in {shown}");
        Ok(folder)
    }

    /// One file, whatever its name.
    ///
    /// # Errors
    ///
    /// When there is no such file.
    pub(crate) fn of_file(path: &Path) -> anyhow::Result<Self> {
        fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self {
            path: path.parent().unwrap_or(path).to_owned(),
            only: Some(path.to_owned()),
            tails: BTreeMap::new(),
            end_bytes: None,
        })
    }

    /// Starts this near the end of each file.
    pub(crate) fn near_end(mut self, bytes: u64) -> Self {
        self.end_bytes = Some(bytes);
        self
    }

    /// Gives `each` every line that has come since the last time; with `finish`, also those that
    /// have no end yet.
    ///
    /// # Errors
    ///
    /// When a file that is there cannot be read.
    pub(crate) fn read(&mut self, finish: bool, mut each: impl FnMut(Raw)) -> anyhow::Result<()> {
        for path in self.paths()? {
            let shown = path.display().to_string();
            self.read_path(path, finish, &mut each)
                .with_context(|| format!("cannot read {shown}"))?;
        }
        // What remains of a file that went away.
        self.tails.retain(|path, tail| {
            let gone = !path.exists();
            if gone {
                tail.lines.drain(&mut each).ok();
                tail.lines.finish().into_iter().for_each(&mut each);
            }
            !gone
        });
        Ok(())
    }

    fn read_path(
        &mut self,
        path: PathBuf,
        finish: bool,
        each: &mut impl FnMut(Raw),
    ) -> io::Result<()> {
        let now = match fs::metadata(&path) {
            Ok(now) => now,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        if let Some(tail) = self.tails.get_mut(&path) {
            tail.lines.drain(each)?;
            if !tail.is_turned(&now)? {
                return Ok(());
            }
            tail.lines.finish().into_iter().for_each(&mut *each);
        }
        let start = match self.end_bytes {
            Some(bytes) if !self.tails.contains_key(&path) => now.len().saturating_sub(bytes),
            _ => 0,
        };
        let mut tail = Tail::open(&path, start)?;
        tail.lines.drain(each)?;
        if finish {
            tail.lines.finish().into_iter().for_each(&mut *each);
        }
        self.tails.insert(path, tail);
        Ok(())
    }

    fn paths(&self) -> io::Result<Vec<PathBuf>> {
        if let Some(only) = &self.only {
            return Ok(vec![only.clone()]);
        }
        let mut paths = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "log") {
                paths.push(path);
            }
        }
        paths.sort();
        Ok(paths)
    }
}

/// One open file.
struct Tail {
    lines: Lines<BufReader<File>>,
    place: (u64, u64),
}

impl Tail {
    fn open(path: &Path, start: u64) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let metadata = file.metadata()?;
        file.seek(SeekFrom::Start(start.saturating_sub(1)))?;
        let mut reader = BufReader::new(file);
        if start > 0 {
            // Up to the end of the line in whose middle that is.
            reader.read_until(b'\n', &mut Vec::new())?;
        }
        let name = path.file_name().unwrap_or(path.as_os_str());
        let lines = Lines::new(reader, name.to_string_lossy().as_ref().into());
        Ok(Self {
            lines,
            place: (metadata.dev(), metadata.ino()),
        })
    }

    /// Whether the path names another file now, or this one was cut down.
    fn is_turned(&mut self, now: &Metadata) -> io::Result<bool> {
        let position = self.lines.reader.stream_position()?;
        Ok(self.place != (now.dev(), now.ino()) || now.len() < position)
    }
}

/// Lines of a reader that may go on behind its end.
struct Lines<R> {
    reader: R,
    name: Arc<str>,
    number: u64,
    partial: Vec<u8>,
}

impl<R: BufRead> Lines<R> {
    fn new(reader: R, name: Arc<str>) -> Self {
        Self {
            reader,
            name,
            number: 0,
            partial: Vec::new(),
        }
    }

    /// The next whole line that is not empty; `None` at the end for now.
    fn next(&mut self) -> io::Result<Option<Raw>> {
        loop {
            let room = LINE_BYTES_MAX.saturating_sub(self.partial.len() as u64);
            let read = (&mut self.reader)
                .take(room)
                .read_until(b'\n', &mut self.partial)?;
            let ended = self.partial.last() == Some(&b'\n');
            let full = self.partial.len() as u64 >= LINE_BYTES_MAX;
            if !ended && !full {
                if read == 0 {
                    return Ok(None);
                }
                continue;
            }
            if let Some(raw) = self.finish() {
                return Ok(Some(raw));
            }
        }
    }

    /// What has been read of a line, as a line.
    fn finish(&mut self) -> Option<Raw> {
        if self.partial.is_empty() {
            return None;
        }
        self.number += 1;
        let text = String::from_utf8_lossy(&self.partial)
            .trim_end_matches(['\n', '\r'])
            .to_owned();
        self.partial.clear();
        (!text.trim().is_empty()).then(|| Raw {
            file: Arc::clone(&self.name),
            number: self.number,
            text,
        })
    }

    fn drain(&mut self, each: &mut impl FnMut(Raw)) -> io::Result<()> {
        while let Some(raw) = self.next()? {
            each(raw);
        }
        Ok(())
    }
}
