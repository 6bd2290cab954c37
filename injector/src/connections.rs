//! The open connections, and which of them has to go when there are too many.
//!
//! Anybody in the cluster may connect, because the API server shows no certificate. So a full house
//! turns out whoever has been idle longest, and the API server always gets in.
//!
//! Invariant: at most so many are open, and one with a review in flight is never ended for another.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

/// Every open connection.
pub(crate) struct Connections {
    max: usize,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    next: u64,
    open: HashMap<u64, Arc<Connection>>,
}

/// One open connection.
pub(crate) struct Connection {
    id: u64,
    /// The table's count when something last happened on it: a clock that needs no clock.
    touched: AtomicU64,
    in_flight: AtomicUsize,
    ended: CancellationToken,
}

/// Keeps the connection in the table.
pub(crate) struct Guard {
    pub(crate) connection: Arc<Connection>,
    connections: Arc<Connections>,
}

/// Says that a review is in flight.
pub(crate) struct Busy(Arc<Connection>);

impl Connections {
    pub(crate) fn new(max: usize) -> Arc<Self> {
        Arc::new(Self {
            max,
            table: Mutex::default(),
        })
    }

    /// Lets one more in; `None` when everybody is busy. The second value says that another had to
    /// go for it.
    pub(crate) fn enter(self: &Arc<Self>) -> Option<(Guard, bool)> {
        let mut table = self.table();
        let is_full = table.open.len() >= self.max;
        if is_full {
            let idle = table
                .open
                .values()
                .filter(|open| open.in_flight.load(Ordering::Acquire) == 0);
            let longest = idle.min_by_key(|open| open.touched.load(Ordering::Relaxed))?;
            let longest = Arc::clone(longest);
            longest.ended.cancel();
            table.open.remove(&longest.id);
        }
        table.next += 1;
        let connection = Arc::new(Connection {
            id: table.next,
            touched: AtomicU64::new(table.next),
            in_flight: AtomicUsize::new(0),
            ended: CancellationToken::new(),
        });
        table.open.insert(connection.id, Arc::clone(&connection));
        let connections = Arc::clone(self);
        Some((
            Guard {
                connection,
                connections,
            },
            is_full,
        ))
    }

    /// How many are open.
    pub(crate) fn len(&self) -> usize {
        self.table().open.len()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Guard {
    /// Ends when the connection has to go.
    pub(crate) async fn ended(&self) {
        self.connection.ended.cancelled().await;
    }

    /// Notes that something is being done on it.
    pub(crate) fn busy(connections: &Connections, connection: &Arc<Connection>) -> Busy {
        let mut table = connections.table();
        table.next += 1;
        connection.touched.store(table.next, Ordering::Relaxed);
        connection.in_flight.fetch_add(1, Ordering::AcqRel);
        Busy(Arc::clone(connection))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.connections.table().open.remove(&self.connection.id);
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_idle_goes_and_the_busy_stay() {
        let connections = Connections::new(2);
        let (first, _) = connections.enter().unwrap();
        let (second, made_room) = connections.enter().unwrap();
        assert!(!made_room);
        // The first was used after the second came, so the second is idle longest.
        drop(Guard::busy(&connections, &first.connection));
        let (third, made_room) = connections.enter().unwrap();
        assert!(
            made_room
                && second.connection.ended.is_cancelled()
                && !first.connection.ended.is_cancelled()
        );
        assert_eq!(connections.len(), 2);
        let busy = [
            Guard::busy(&connections, &first.connection),
            Guard::busy(&connections, &third.connection),
        ];
        assert!(connections.enter().is_none(), "nobody is idle");
        drop(busy);
        drop((first, second));
        assert_eq!(connections.len(), 1);
        assert!(connections.enter().is_some_and(|(_, made_room)| !made_room));
    }
}
