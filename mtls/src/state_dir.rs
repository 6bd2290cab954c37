//! The state folder of a standalone sidecar: key, SVID and bundle, so that it can restart.
//!
//! Invariants: the folder is 0700 and ours alone, and one process at a time holds it; a file is
//! replaced as a whole (temporary file, fsync, rename, fsync of the folder), so a crash leaves the
//! old one or the new one.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use prost::Message as _;
use sidegate_api::identity::WatchBundleResponse;
use sidegate_mesh::spiffe::SpiffeId;

use crate::bundle::TrustUpdate;
use crate::certificate::sha256;
use crate::csr::WorkloadKey;
use crate::svid::{Svid, SvidError, key_from_pem, key_to_pem};

const SVID_FILE: &str = "svid.pem";
const PENDING_KEY_FILE: &str = "pending-key.pem";
const LOCK_FILE: &str = "lock";
const BUNDLE_PREFIX: &str = "bundle-";

/// Why the state folder cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// Others could read the keys in it.
    #[error("state folder {path} has mode {mode:04o}, it must be 0700: chmod 700 {path}")]
    Mode {
        /// The folder.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// It belongs to another user.
    #[error("state folder {path} belongs to user {owner}, not to user {user} who runs this")]
    Owner {
        /// The folder.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Who we are.
        user: u32,
    },
    /// It is a file or a link.
    #[error("state folder {path} is not a folder")]
    NotAFolder {
        /// The path.
        path: PathBuf,
    },
    /// Two processes would renew the same SVID with different keys.
    #[error("state folder {path} is in use by another process")]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// Reading or writing failed.
    #[error("state file {path}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("state file {path} is damaged; remove it to start anew with a join token")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// An open state folder; dropping it lets another process in.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    /// Tells bundles of one bootstrap trust from those of another.
    bundle_file: String,
    lock: File,
}

/// Closing the file is not enough: a process being started on another thread holds a copy of it
/// between its fork and its exec, and the lock with it (flock(2)).
impl Drop for StateDir {
    fn drop(&mut self) {
        if let Err(error) = self.lock.unlock() {
            tracing::warn!(%error, "the state folder is free only when this process has ended");
        }
    }
}

impl StateDir {
    /// Opens the folder, and makes it with mode 0700 when it is not there.
    ///
    /// `bootstrap` is the content of the bootstrap trust file: a bundle that was kept is used
    /// only with the bootstrap trust that it grew from, so replacing that file is enough to trust
    /// a CA that was set up anew.
    ///
    /// # Errors
    ///
    /// [`StateError`] when others could read it, or another process uses it.
    pub fn open(path: &Path, bootstrap: &[u8]) -> Result<Self, StateError> {
        let failed = |source| StateError::Io {
            path: path.to_owned(),
            source,
        };
        match DirBuilder::new().recursive(true).mode(0o700).create(path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed(error)),
        }
        check_folder(path, &fs::symlink_metadata(path).map_err(failed)?)?;
        let lock_path = path.join(LOCK_FILE);
        let lock = private_file(&lock_path, false).map_err(failed)?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => StateError::InUse {
                path: path.to_owned(),
            },
            TryLockError::Error(source) => failed(source),
        })?;
        let hash = sha256(bootstrap);
        // Eight bytes are enough to tell one file's trust from another's.
        let tag = u64::from_be_bytes(std::array::from_fn(|index| {
            hash.get(index).copied().unwrap_or_default()
        }));
        Ok(Self {
            path: path.to_owned(),
            bundle_file: format!("{BUNDLE_PREFIX}{tag:016x}.pb"),
            lock,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The SVID of the last run, whether or not it is still in date.
    ///
    /// # Errors
    ///
    /// [`StateError::Damaged`] when the file holds something else, or somebody else's SVID.
    pub fn load_svid(&self, expected: &SpiffeId) -> Result<Option<Svid>, StateError> {
        let Some(pem) = self.read(SVID_FILE)? else {
            return Ok(None);
        };
        Svid::from_pem(&pem, expected)
            .map(Some)
            .map_err(|error| self.damaged(SVID_FILE, error))
    }

    /// Keeps `svid`, with its key, in the place of the last one.
    ///
    /// # Errors
    ///
    /// [`StateError::Io`]; the last one stays.
    pub fn store_svid(&self, svid: &Svid) -> Result<(), StateError> {
        self.write(SVID_FILE, svid.to_pem().as_bytes())
    }

    /// The key that a certificate was asked for when the last run ended, if its answer was lost.
    ///
    /// # Errors
    ///
    /// [`StateError::Damaged`] when the file holds something else.
    pub fn load_pending_key(&self) -> Result<Option<WorkloadKey>, StateError> {
        let Some(pem) = self.read(PENDING_KEY_FILE)? else {
            return Ok(None);
        };
        key_from_pem(&pem)
            .map(Some)
            .map_err(|error: SvidError| self.damaged(PENDING_KEY_FILE, error))
    }

    /// Keeps the key before it is sent: the CA freezes an identity that asks twice with different
    /// keys, so an answer that is lost in a crash must be asked for again with the same one.
    ///
    /// # Errors
    ///
    /// [`StateError::Io`].
    pub fn store_pending_key(&self, key: &WorkloadKey) -> Result<(), StateError> {
        self.write(PENDING_KEY_FILE, key_to_pem(key).as_bytes())
    }

    /// Forgets the pending key.
    ///
    /// # Errors
    ///
    /// [`StateError::Io`]; that it is not there is fine.
    pub fn remove_pending_key(&self) -> Result<(), StateError> {
        self.remove(PENDING_KEY_FILE)
    }

    /// The last bundle that was put to use and grew from this bootstrap trust.
    ///
    /// # Errors
    ///
    /// [`StateError::Damaged`] when the file holds something else.
    pub fn load_bundle(&self) -> Result<Option<TrustUpdate>, StateError> {
        let Some(bytes) = self.read(&self.bundle_file)? else {
            return Ok(None);
        };
        WatchBundleResponse::decode(bytes.as_slice())
            .map(|message| Some(TrustUpdate::new(message)))
            .map_err(|error| self.damaged(&self.bundle_file, error))
    }

    /// Keeps a bundle in the place of the last one.
    ///
    /// # Errors
    ///
    /// [`StateError::Io`]; the last one stays.
    pub fn store_bundle(&self, update: &TrustUpdate) -> Result<(), StateError> {
        self.write(&self.bundle_file, &update.message().encode_to_vec())?;
        self.remove_bundles_of_other_bootstraps()
    }

    fn remove_bundles_of_other_bootstraps(&self) -> Result<(), StateError> {
        let entries = fs::read_dir(&self.path).map_err(|source| self.io("", source))?;
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(BUNDLE_PREFIX) && name != self.bundle_file {
                self.remove(&name)?;
            }
        }
        Ok(())
    }

    fn read(&self, name: &str) -> Result<Option<zeroize::Zeroizing<Vec<u8>>>, StateError> {
        match fs::read(self.path.join(name)) {
            Ok(bytes) => Ok(Some(zeroize::Zeroizing::new(bytes))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(self.io(name, source)),
        }
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), StateError> {
        let temporary = self.path.join(format!(".{name}.new"));
        let target = self.path.join(name);
        let replace = || -> io::Result<()> {
            let mut file = private_file(&temporary, true)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, &target)?;
            File::open(&self.path)?.sync_all()
        };
        replace().map_err(|source| self.io(name, source))
    }

    fn remove(&self, name: &str) -> Result<(), StateError> {
        match fs::remove_file(self.path.join(name)) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(source) => Err(self.io(name, source)),
        }
    }

    fn io(&self, name: &str, source: io::Error) -> StateError {
        StateError::Io {
            path: self.path.join(name),
            source,
        }
    }

    fn damaged(
        &self,
        name: &str,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> StateError {
        StateError::Damaged {
            path: self.path.join(name),
            source: Box::new(source),
        }
    }
}

fn check_folder(path: &Path, metadata: &fs::Metadata) -> Result<(), StateError> {
    if !metadata.is_dir() {
        return Err(StateError::NotAFolder {
            path: path.to_owned(),
        });
    }
    let user = rustix::process::geteuid().as_raw();
    if metadata.uid() != user {
        return Err(StateError::Owner {
            path: path.to_owned(),
            owner: metadata.uid(),
            user,
        });
    }
    let mode = metadata.mode() & 0o7777;
    if mode != 0o700 {
        return Err(StateError::Mode {
            path: path.to_owned(),
            mode,
        });
    }
    Ok(())
}

fn private_file(path: &Path, truncate: bool) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(truncate)
        .mode(0o600)
        .open(path)
}
