//! The state folder: what survives a restart, and who may read it.
//!
//! Invariant: while a [`StateFolder`] exists, the folder has mode 0700, is ours, and no other CA
//! process has it open. A file in it is whole or absent: it is written beside, synced, moved into
//! place, and the folder is synced. Nothing here ever replaces a file that was to be made once.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

const LOCK: &str = "lock";
const FIRST_START: &str = "first-start";
const TEMPORARY: &str = ".tmp-";

/// What may read a file besides its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Visibility {
    /// Mode 0600.
    Secret,
    /// Mode 0644, for those who are given the file.
    Public,
}

/// Why the state cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The operating system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Others may enter the folder or read a key.
    #[error("{} has mode {mode:04o}; keys need {expected:04o}: run `chmod {expected:o} {}`", path.display(), path.display())]
    Mode {
        /// The folder or file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
        /// The mode that it must have.
        expected: u32,
    },
    /// Somebody else owns the folder or a key.
    #[error("{} belongs to uid {owner}, and this process is uid {process}; run the CA as the owner", path.display())]
    Owner {
        /// The folder or file.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Our effective uid.
        process: u32,
    },
    /// Another CA has the folder open.
    #[error("another CA process uses {}; stop it first, or give this one its own stateDir", path.display())]
    Locked {
        /// The folder.
        path: PathBuf,
    },
    /// A piece is missing or there is one too many.
    #[error("{}: {problem}; {help}", path.display())]
    Piece {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
        /// What to do.
        help: &'static str,
    },
}

/// An open state folder.
#[derive(Debug)]
pub struct StateFolder {
    path: PathBuf,
    /// Held while the folder is ours; see [`Self::release`].
    lock: File,
}

impl StateFolder {
    /// Gives the folder free for another CA, whoever still holds this value.
    ///
    /// # Errors
    ///
    /// What the system says; the folder is then free when the process ends.
    pub fn release(&self) -> io::Result<()> {
        self.lock.unlock()
    }

    /// Opens the folder, making it if it is absent, and locks it.
    ///
    /// # Errors
    ///
    /// [`StateError`] when it has a wrong mode or owner, or another process has it.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        let create = DirBuilder::new().recursive(true).mode(0o700).create(path);
        create.map_err(io_error("create", path))?;
        let metadata = fs::metadata(path).map_err(io_error("read", path))?;
        if !metadata.is_dir() {
            let problem = io::Error::from(io::ErrorKind::NotADirectory);
            return Err(io_error("use", path)(problem));
        }
        check_access(path, &metadata, 0o700)?;
        let folder = Self {
            path: path.to_owned(),
            lock: lock(path)?,
        };
        folder.remove_temporaries()?;
        Ok(folder)
    }

    /// As [`Self::open`], for a folder of a volume that was mounted for this process alone: where
    /// the mount has widened the mode, it is narrowed again.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub fn open_volume(path: &Path) -> Result<Self, StateError> {
        let process = rustix::process::geteuid().as_raw();
        if let Ok(metadata) = fs::metadata(path)
            && metadata.is_dir()
            && metadata.uid() == process
        {
            let narrow = fs::Permissions::from_mode(0o700);
            fs::set_permissions(path, narrow).map_err(io_error("narrow", path))?;
        }
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        if let Some(parent) = parent.filter(|_| !path.exists()) {
            // Below a folder with the set-group-ID bit, which `fsGroup` makes, a new one has it.
            fs::create_dir_all(parent).map_err(io_error("create", parent))?;
            let create = DirBuilder::new().mode(0o700).create(path);
            create.map_err(io_error("create", path))?;
            let narrow = fs::Permissions::from_mode(0o700);
            fs::set_permissions(path, narrow).map_err(io_error("narrow", path))?;
        }
        Self::open(path)
    }

    /// The path of a file in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Whether the folder has that file.
    pub fn has(&self, name: &str) -> bool {
        self.path(name).symlink_metadata().is_ok()
    }

    /// Reads a secret file; `None` when it is absent.
    ///
    /// # Errors
    ///
    /// [`StateError`] when others may read it, or it cannot be read.
    pub fn read_secret(&self, name: &str) -> Result<Option<Zeroizing<Vec<u8>>>, StateError> {
        let path = self.path(name);
        match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("read", &path)(error)),
            Ok(metadata) => check_access(&path, &metadata, 0o600)?,
        }
        let bytes = fs::read(&path).map_err(io_error("read", &path))?;
        Ok(Some(Zeroizing::new(bytes)))
    }

    /// Reads a public file; `None` when it is absent.
    ///
    /// # Errors
    ///
    /// [`StateError::Io`].
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, StateError> {
        let path = self.path(name);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io_error("read", &path)(error)),
        }
    }

    /// Makes a file that must not exist yet.
    ///
    /// # Errors
    ///
    /// [`StateError::Io`], also when it exists: that file stays as it is.
    pub fn create(
        &self,
        name: &str,
        bytes: &[u8],
        visibility: Visibility,
    ) -> Result<(), StateError> {
        let path = self.path(name);
        let temporary = self.write_temporary(name, bytes, visibility)?;
        // A link, unlike a rename, fails when the target exists.
        let linked = fs::hard_link(&temporary, &path).map_err(io_error("create", &path));
        fs::remove_file(&temporary).map_err(io_error("remove", &temporary))?;
        linked?;
        self.sync()
    }

    /// Makes or replaces a file.
    ///
    /// # Errors
    ///
    /// [`StateError::Io`]; the former file, if any, stays.
    pub fn replace(
        &self,
        name: &str,
        bytes: &[u8],
        visibility: Visibility,
    ) -> Result<(), StateError> {
        let path = self.path(name);
        let temporary = self.write_temporary(name, bytes, visibility)?;
        fs::rename(&temporary, &path).map_err(io_error("replace", &path))?;
        self.sync()
    }

    /// Gives a file another name, replacing what had it.
    ///
    /// # Errors
    ///
    /// [`StateError::Io`].
    pub fn rename(&self, from: &str, to: &str) -> Result<(), StateError> {
        let from = self.path(from);
        fs::rename(&from, self.path(to)).map_err(io_error("rename", &from))?;
        self.sync()
    }

    /// Removes a file; absent is fine.
    ///
    /// # Errors
    ///
    /// [`StateError::Io`].
    pub fn remove(&self, name: &str) -> Result<(), StateError> {
        let path = self.path(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(io_error("remove", &path)(error))
            }
            _ => self.sync(),
        }
    }

    /// Marks that a first start has begun. Until [`Self::finish_first_start`] nothing that is in
    /// the folder has been shown to anybody, so a crash between the two may start again.
    ///
    /// # Errors
    ///
    /// [`StateError::Io`].
    pub fn begin_first_start(&self) -> Result<(), StateError> {
        self.create(FIRST_START, b"", Visibility::Secret)
    }

    /// Whether a first start began and never finished.
    pub fn in_first_start(&self) -> bool {
        self.has(FIRST_START)
    }

    /// Makes the first start final.
    ///
    /// # Errors
    ///
    /// [`StateError::Io`]; the CA must not serve then.
    pub fn finish_first_start(&self) -> Result<(), StateError> {
        self.remove(FIRST_START)
    }

    fn write_temporary(
        &self,
        name: &str,
        bytes: &[u8],
        visibility: Visibility,
    ) -> Result<PathBuf, StateError> {
        let path = self.path(&format!("{TEMPORARY}{name}"));
        let mode = match visibility {
            Visibility::Secret => 0o600,
            Visibility::Public => 0o644,
        };
        // What a failed attempt left behind is not worth keeping.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("remove", &path)(error));
            }
            _ => {}
        }
        let write = || -> io::Result<()> {
            let mut options = OpenOptions::new();
            let mut file = options
                .write(true)
                .create_new(true)
                .mode(mode)
                .open(&path)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().map_err(io_error("write", &path))?;
        Ok(path)
    }

    fn remove_temporaries(&self) -> Result<(), StateError> {
        let entries = fs::read_dir(&self.path).map_err(io_error("read", &self.path))?;
        for entry in entries {
            let entry = entry.map_err(io_error("read", &self.path))?;
            if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
                fs::remove_file(entry.path()).map_err(io_error("remove", &entry.path()))?;
            }
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), StateError> {
        let sync = File::open(&self.path).and_then(|folder| folder.sync_all());
        sync.map_err(io_error("sync", &self.path))
    }
}

/// Closing the file is not enough: a process being started on another thread holds a copy of it
/// between its fork and its exec, and the lock with it (flock(2)).
impl Drop for StateFolder {
    fn drop(&mut self) {
        if let Err(error) = self.release() {
            tracing::warn!(%error, "the state folder is free only when this process has ended");
        }
    }
}

fn lock(folder: &Path) -> Result<File, StateError> {
    let path = folder.join(LOCK);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    let file = options
        .mode(0o600)
        .open(&path)
        .map_err(io_error("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StateError::Locked {
            path: folder.to_owned(),
        }),
        Err(TryLockError::Error(error)) => Err(io_error("lock", &path)(error)),
    }
}

fn check_access(path: &Path, metadata: &fs::Metadata, expected: u32) -> Result<(), StateError> {
    let process = rustix::process::geteuid().as_raw();
    if metadata.uid() != process {
        return Err(StateError::Owner {
            path: path.to_owned(),
            owner: metadata.uid(),
            process,
        });
    }
    let mode = metadata.mode() & 0o7777;
    // A key that its owner may only read (0400) is as secret as one of mode 0600.
    let stricter_file = metadata.is_file() && mode & 0o7177 == 0;
    if mode == expected || stricter_file {
        return Ok(());
    }
    Err(StateError::Mode {
        path: path.to_owned(),
        mode,
        expected,
    })
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io {
        action,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(parent: &tempfile::TempDir) -> Result<StateFolder, StateError> {
        StateFolder::open(&parent.path().join("state"))
    }

    #[test]
    fn a_new_folder_is_for_its_owner_alone() {
        let parent = tempfile::tempdir().unwrap();
        let folder = open(&parent).unwrap();
        folder.create("key", b"k", Visibility::Secret).unwrap();
        let mode = |path: PathBuf| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!(mode(parent.path().join("state")), 0o700);
        assert_eq!(mode(folder.path("key")), 0o600);
    }

    #[test]
    fn a_wider_mode_is_refused_and_the_remedy_is_named() {
        let parent = tempfile::tempdir().unwrap();
        drop(open(&parent).unwrap());
        let path = parent.path().join("state");
        for mode in [0o750, 0o755, 0o777, 0o500] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = open(&parent).unwrap_err().to_string();
            assert!(error.contains("chmod 700"), "{mode:o}: {error}");
        }
    }

    #[test]
    fn a_volume_that_a_mount_has_widened_is_narrowed() {
        let parent = tempfile::tempdir().unwrap();
        // As `fsGroup` leaves it.
        fs::set_permissions(parent.path(), fs::Permissions::from_mode(0o2777)).unwrap();
        let path = parent.path().join("state");
        let mode = || fs::metadata(&path).unwrap().mode() & 0o7777;
        drop(StateFolder::open_volume(&path).unwrap());
        assert_eq!(mode(), 0o700);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o2770)).unwrap();
        drop(StateFolder::open_volume(&path).unwrap());
        assert_eq!(mode(), 0o700);
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let folder = open(&parent).unwrap();
        folder.create("key", b"k", Visibility::Secret).unwrap();
        let wide = fs::Permissions::from_mode(0o640);
        fs::set_permissions(folder.path("key"), wide).unwrap();
        let error = folder.read_secret("key").unwrap_err();
        assert!(
            matches!(error, StateError::Mode { mode: 0o640, .. }),
            "{error}"
        );
    }

    #[test]
    fn a_second_process_is_refused_until_the_first_is_gone() {
        let parent = tempfile::tempdir().unwrap();
        let first = open(&parent).unwrap();
        assert!(matches!(open(&parent), Err(StateError::Locked { .. })));
        // As a process does that is being started on another thread.
        let copy = first.lock.try_clone().unwrap();
        drop(first);
        open(&parent).unwrap();
        drop(copy);
    }

    #[test]
    fn what_is_made_once_is_never_replaced() {
        let parent = tempfile::tempdir().unwrap();
        let folder = open(&parent).unwrap();
        folder.create("root", b"first", Visibility::Public).unwrap();
        let second = folder.create("root", b"second", Visibility::Public);
        assert!(second.is_err());
        assert_eq!(folder.read("root").unwrap().unwrap(), b"first");
        folder
            .replace("root", b"third", Visibility::Public)
            .unwrap();
        assert_eq!(folder.read("root").unwrap().unwrap(), b"third");
    }

    #[test]
    fn half_written_files_are_cleared_away() {
        let parent = tempfile::tempdir().unwrap();
        let folder = open(&parent).unwrap();
        let leftover = folder.path(".tmp-root.key");
        fs::write(&leftover, b"half").unwrap();
        drop(folder);
        open(&parent).unwrap();
        assert!(!leftover.exists());
    }
}
