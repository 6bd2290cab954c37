//! Where a CA keeps its keys: a folder of its own, or a Secret that all replicas share.
//!
//! A change takes the same steps in both: [`KeyStore::stage`] › the ledger › [`KeyStore::share`] ›
//! the registry › publication › [`KeyStore::settle`]. In a folder the ledger says what is so, and
//! the files follow it; a Secret says what is so for every replica, and takes a change only from
//! one that knew what was there.
//!
//! Invariant: a root key is read anew for each use and kept by nobody; nothing here ever makes a
//! root, or replaces one that was not read.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use zeroize::Zeroizing;

use crate::authority::{Intermediate, Root};
use crate::key::Key;
use crate::kubernetes::secret::SecretError;
use crate::registry::{Registry, RootState, Shared};
use crate::roots::{self, ROOT_NEXT_KEY, RootsError};
use crate::state::{StateFolder, Visibility};

/// Why keys cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum KeyStoreError {
    /// The folder refuses.
    #[error(transparent)]
    Folder(#[from] RootsError),
    /// The Secret refuses.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// Another replica has changed it since it was last read.
    #[error("another replica was faster; try again")]
    Conflict,
    /// The work was not done to its end.
    #[error("the work on the keys was cut off: {0}")]
    CutOff(String),
}

/// What another replica has changed.
pub struct News {
    /// Roots and revocations, as they are now.
    pub shared: Shared,
    /// What signs, as it is now.
    pub intermediate: Option<Intermediate>,
}

/// Keys, and what goes with them.
pub trait KeyStore: Send + Sync + 'static {
    /// What has changed since the last look or the last own change. A folder has no news.
    fn news(&self) -> BoxFuture<'_, Result<Option<News>, KeyStoreError>>;

    /// The key of a root of ours.
    fn root_key<'a>(&'a self, root: &'a Root) -> BoxFuture<'a, Result<Key, KeyStoreError>>;

    /// Before the ledger: puts the next root's key where a crash cannot lose it.
    fn stage<'a>(&'a self, next: &'a Zeroizing<String>)
    -> BoxFuture<'a, Result<(), KeyStoreError>>;

    /// After the ledger: makes the change every replica's, all or nothing.
    /// [`KeyStoreError::Conflict`] when somebody changed it since [`Self::news`].
    fn share<'a>(
        &'a self,
        after: &'a Shared,
        next: Option<&'a Zeroizing<String>>,
    ) -> BoxFuture<'a, Result<(), KeyStoreError>>;

    /// After publication: brings what remains in order.
    fn settle(&self, roots: Registry) -> BoxFuture<'_, Result<(), KeyStoreError>>;

    /// Keeps what signs from now on. [`KeyStoreError::Conflict`] as in [`Self::share`].
    fn keep_intermediate<'a>(
        &'a self,
        intermediate: &'a Intermediate,
    ) -> BoxFuture<'a, Result<(), KeyStoreError>>;
}

/// Keys in the files of a state folder.
pub(crate) struct FolderKeys(Arc<StateFolder>);

impl FolderKeys {
    pub(crate) fn new(folder: Arc<StateFolder>) -> Self {
        Self(folder)
    }

    /// Works on the files where blocking is no harm.
    fn files<T: Send + 'static>(
        &self,
        work: impl FnOnce(&StateFolder) -> Result<T, RootsError> + Send + 'static,
    ) -> BoxFuture<'_, Result<T, KeyStoreError>> {
        let folder = Arc::clone(&self.0);
        Box::pin(async move {
            let done = tokio::task::spawn_blocking(move || work(&folder)).await;
            Ok(done.map_err(|error| KeyStoreError::CutOff(error.to_string()))??)
        })
    }
}

impl KeyStore for FolderKeys {
    fn news(&self) -> BoxFuture<'_, Result<Option<News>, KeyStoreError>> {
        Box::pin(async { Ok(None) })
    }

    fn root_key<'a>(&'a self, root: &'a Root) -> BoxFuture<'a, Result<Key, KeyStoreError>> {
        let root = root.clone();
        self.files(move |folder| roots::active_key(folder, &root))
    }

    fn stage<'a>(
        &'a self,
        next: &'a Zeroizing<String>,
    ) -> BoxFuture<'a, Result<(), KeyStoreError>> {
        let next = next.clone();
        self.files(move |folder| {
            Ok(folder.replace(ROOT_NEXT_KEY, next.as_bytes(), Visibility::Secret)?)
        })
    }

    fn share<'a>(
        &'a self,
        _after: &'a Shared,
        _next: Option<&'a Zeroizing<String>>,
    ) -> BoxFuture<'a, Result<(), KeyStoreError>> {
        Box::pin(async { Ok(()) })
    }

    fn settle(&self, roots: Registry) -> BoxFuture<'_, Result<(), KeyStoreError>> {
        self.files(move |folder| {
            if let Some(active) = roots.root(RootState::Active) {
                roots::active_key(folder, active)?;
            }
            roots::write_root_pem(folder, &roots.roots())?;
            roots::finish_rotation(folder, &roots)
        })
    }

    fn keep_intermediate<'a>(
        &'a self,
        intermediate: &'a Intermediate,
    ) -> BoxFuture<'a, Result<(), KeyStoreError>> {
        let pem = intermediate.key().to_pem();
        let der = intermediate.der.clone();
        Box::pin(async move {
            let pem = pem.map_err(|error| KeyStoreError::CutOff(error.to_string()))?;
            let save = move |folder: &StateFolder| roots::save_intermediate(folder, &der, &pem);
            self.files(save).await
        })
    }
}
