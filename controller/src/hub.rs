//! The one index of a replica, and who has to be woken when it changes.
//!
//! Invariant: the lock is held for one change or one look, never across a wait.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, watch};

use crate::index::{Index, SidecarId};

/// See the module. Shared by watches, streams and writers.
#[derive(Debug)]
pub(crate) struct Hub {
    index: Mutex<Index>,
    wakers: Mutex<HashMap<SidecarId, Arc<Notify>>>,
    changed: watch::Sender<()>,
}

impl Hub {
    pub(crate) fn new(index: Index) -> Self {
        Self {
            index: Mutex::new(index),
            wakers: Mutex::default(),
            changed: watch::Sender::new(()),
        }
    }

    /// Changes the index, and wakes those who have something to hear by it.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut Index) -> T) -> T {
        let (output, woken) = {
            let mut index = lock(&self.index);
            let output = change(&mut index);
            (output, index.take_woken())
        };
        if !woken.is_empty() {
            let wakers = lock(&self.wakers);
            for waker in woken.iter().filter_map(|id| wakers.get(id)) {
                waker.notify_one();
            }
        }
        self.changed.send_replace(());
        output
    }

    /// Looks at the index.
    pub(crate) fn look<T>(&self, look: impl FnOnce(&Index) -> T) -> T {
        look(&lock(&self.index))
    }

    /// Tells of each change; who is slow hears of the last one only.
    pub(crate) fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// What a sidecar's stream waits for.
    pub(crate) fn waker(&self, id: SidecarId) -> Arc<Notify> {
        let waker = Arc::new(Notify::new());
        lock(&self.wakers).insert(id, Arc::clone(&waker));
        // Something may have happened before there was a waker.
        waker.notify_one();
        waker
    }

    /// A stream has ended.
    pub(crate) fn disconnect(&self, id: SidecarId) {
        lock(&self.wakers).remove(&id);
        self.change(|index| index.disconnect(id));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
