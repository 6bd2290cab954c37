//! Whose address is whose: what the controller says of the destinations that the application calls.
//!
//! A destination is subscribed to when it is called for the first time, and no longer once nobody
//! has called it for a while, so that memory follows what the application really does.
//!
//! Invariants: an address is meshed or external only by the controller's positive word, and what
//! was said stays in force while the controller is gone; a wait for its word ends after a second;
//! the number of destinations is bounded, and what exceeds the bound is counted.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use sidegate_mesh::{Clock, Route, ServiceName, Traffic};
use tokio::sync::{Notify, watch};

use crate::config::LimitsConfig;
use crate::metrics::Metrics;

/// Longest wait for the controller's word.
const WAIT_MAX: Duration = Duration::from_secs(1);
/// A destination that was called within this time makes no room for another one.
const KEPT_MIN: Duration = Duration::from_secs(10);

/// What a destination is.
#[derive(Clone, Debug)]
pub enum Destination {
    /// A service of the mesh, or one pod of it: called over mutual TLS, or not at all.
    Meshed(Arc<Route>),
    /// Not the mesh's: bytes pass as they are.
    External {
        /// Whether the namespace forbids such calls.
        refused: bool,
    },
}

/// Nobody knows whose address it is: no controller answered in time, the controller does not know
/// either, or there is no room for another destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the destination is unknown")]
pub struct DestinationUnknown;

/// The controller's word about one destination.
#[derive(Clone, Debug)]
pub enum Answer {
    /// It is known.
    Known(Destination),
    /// It is not known, or not yet.
    Unknown,
}

/// What the stream to the controller has to say next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Change {
    /// This destination is called.
    Subscribe(SocketAddr),
    /// This one is not called any more.
    Unsubscribe(SocketAddr),
}

/// Every destination of one sidecar. All workers share it.
pub struct Destinations {
    table: Mutex<Table>,
    changed: Notify,
    zone: ArcSwapOption<Arc<str>>,
    connected: AtomicBool,
    bounds: Bounds,
    clock: Arc<dyn Clock>,
    refused: Counter,
    known: Gauge,
}

struct Bounds {
    destinations: usize,
    idle: Duration,
}

#[derive(Default)]
struct Table {
    entries: HashMap<SocketAddr, Entry>,
    /// Where what the controller was told may differ from the entries.
    untold: BTreeSet<SocketAddr>,
    /// Which entry the controller was told of.
    told: HashMap<SocketAddr, u64>,
    /// The number of the last entry.
    last: u64,
}

struct Entry {
    number: u64,
    /// `None`: the controller has said nothing yet.
    answer: watch::Sender<Option<Answer>>,
    used: SystemTime,
    waiting: usize,
}

impl Destinations {
    /// Knows no destination yet.
    pub fn new(limits: &LimitsConfig, metrics: &Metrics, clock: Arc<dyn Clock>) -> Self {
        Self {
            table: Mutex::default(),
            changed: Notify::new(),
            zone: ArcSwapOption::empty(),
            connected: AtomicBool::new(false),
            bounds: Bounds {
                destinations: limits.destinations_max as usize,
                idle: limits.destination_idle_timeout,
            },
            clock,
            refused: metrics.limit_refusals("destinations"),
            known: metrics.destinations.clone(),
        }
    }

    /// What `original` is, the address that the application connected to. Subscribes on first use,
    /// and waits up to a second for the controller's word.
    ///
    /// # Errors
    ///
    /// [`DestinationUnknown`] when there is no such word in time.
    pub async fn resolve(&self, original: SocketAddr) -> Result<Destination, DestinationUnknown> {
        if let Some(known) = self.current(original) {
            return Ok(known);
        }
        let waiting = Waiting::begin(self, original).ok_or(DestinationUnknown)?;
        let mut answers = waiting.answers.clone();
        let known = async {
            let known = answers.wait_for(|answer| matches!(answer, Some(Answer::Known(_))));
            match known.await.as_deref() {
                Ok(Some(Answer::Known(destination))) => Ok(destination.clone()),
                // The entry is gone; whoever asks again makes another.
                _ => Err(DestinationUnknown),
            }
        };
        tokio::select! {
            biased;
            known = known => known,
            () = self.clock.sleep(WAIT_MAX) => Err(DestinationUnknown),
        }
    }

    /// What is known of `original` at this moment, without a wait; `None` when that is nothing.
    pub fn current(&self, original: SocketAddr) -> Option<Destination> {
        let now = self.clock.now();
        let mut table = self.table();
        let entry = table.entries.get_mut(&original)?;
        entry.used = now;
        match &*entry.answer.borrow() {
            Some(Answer::Known(destination)) => Some(destination.clone()),
            Some(Answer::Unknown) | None => None,
        }
    }

    /// The zone that this sidecar runs in, where the controller said one.
    pub fn zone(&self) -> Option<Arc<str>> {
        self.zone.load().as_deref().cloned()
    }

    /// The zone that this sidecar runs in.
    pub(crate) fn set_zone(&self, zone: Option<Arc<str>>) {
        self.zone.store(zone.map(Arc::new));
    }

    /// The controller's word about `original`. Nothing when nobody calls it any more.
    pub fn update(&self, original: SocketAddr, answer: Answer) {
        if let Some(entry) = self.table().entries.get(&original) {
            entry.answer.send_replace(Some(answer));
        }
    }

    /// Whether a controller answers now.
    pub(crate) fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Acquire)
    }

    /// Whether a controller answers. One that comes knows of no subscription: it will be told all.
    pub(crate) fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::Release);
        if connected {
            let mut table = self.table();
            table.told.clear();
            table.untold = table.entries.keys().copied().collect();
            drop(table);
            self.changed.notify_one();
        }
    }

    /// Gives each meshed destination the traffic policy that `traffic` finds for its service.
    pub(crate) fn set_traffic(&self, traffic: impl Fn(&ServiceName) -> Arc<Traffic>) {
        for entry in self.table().entries.values() {
            entry.answer.send_if_modified(|answer| {
                let Some(Answer::Known(Destination::Meshed(route))) = answer else {
                    return false;
                };
                let traffic = traffic(&route.name);
                let same = traffic == route.traffic;
                if !same {
                    *route = Arc::new(Route {
                        traffic,
                        ..Route::clone(route)
                    });
                }
                !same
            });
        }
    }

    /// Waits for something that the controller has to be told, and takes it.
    pub(crate) async fn next_change(&self) -> Change {
        loop {
            let changed = self.changed.notified();
            if let Some(change) = self.table().next_change() {
                return change;
            }
            changed.await;
        }
    }

    /// Every destination, for whoever must know which ones a controller still has to answer.
    pub(crate) fn all(&self) -> BTreeSet<SocketAddr> {
        self.table().entries.keys().copied().collect()
    }

    /// Every destination with what is known of it, by address.
    pub(crate) fn list(&self) -> Vec<(SocketAddr, Option<Answer>)> {
        let table = self.table();
        let entry = |(at, entry): (&SocketAddr, &Entry)| (*at, entry.answer.borrow().clone());
        let mut list: Vec<_> = table.entries.iter().map(entry).collect();
        list.sort_by_key(|(at, _)| *at);
        list
    }

    /// Forgets what nobody has called for the idle time. Called in even intervals.
    pub(crate) fn sweep(&self) {
        let now = self.clock.now();
        let mut table = self.table();
        let idle: Vec<SocketAddr> = table
            .entries
            .iter()
            .filter(|(_, entry)| entry.is_unused(now, self.bounds.idle))
            .map(|(at, _)| *at)
            .collect();
        for at in idle {
            self.remove(&mut table, at);
        }
    }

    /// Makes an entry where there is none; false when there is no room.
    fn enter(&self, table: &mut Table, at: SocketAddr) -> bool {
        if table.entries.contains_key(&at) {
            return true;
        }
        let now = self.clock.now();
        if table.entries.len() >= self.bounds.destinations {
            // Without a controller nothing that is known makes room for what can't be known.
            let connected = self.is_connected();
            let oldest = table.entries.iter().min_by_key(|(_, entry)| entry.used);
            let oldest = oldest.filter(|(_, entry)| connected && entry.is_unused(now, KEPT_MIN));
            let Some(oldest) = oldest.map(|(at, _)| *at) else {
                self.refused.inc();
                return false;
            };
            self.remove(table, oldest);
        }
        table.last += 1;
        let entry = Entry {
            number: table.last,
            answer: watch::Sender::new(None),
            used: now,
            waiting: 0,
        };
        table.entries.insert(at, entry);
        self.tell(table, at);
        true
    }

    fn remove(&self, table: &mut Table, at: SocketAddr) {
        table.entries.remove(&at);
        self.tell(table, at);
    }

    fn tell(&self, table: &mut Table, at: SocketAddr) {
        table.untold.insert(at);
        self.known
            .set(i64::try_from(table.entries.len()).unwrap_or(i64::MAX));
        self.changed.notify_one();
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn next_change(&mut self) -> Option<Change> {
        loop {
            let at = *self.untold.first()?;
            let (told, entry) = (self.told.get(&at), self.entries.get(&at));
            match (told, entry) {
                (None, Some(entry)) => {
                    self.told.insert(at, entry.number);
                    self.untold.remove(&at);
                    return Some(Change::Subscribe(at));
                }
                // Another entry than the one that was told of waits for an answer of its own.
                (Some(told), entry) if entry.is_none_or(|entry| entry.number != *told) => {
                    self.told.remove(&at);
                    return Some(Change::Unsubscribe(at));
                }
                _ => {
                    self.untold.remove(&at);
                }
            }
        }
    }
}

impl Entry {
    fn is_unused(&self, now: SystemTime, idle: Duration) -> bool {
        let since = now.duration_since(self.used).unwrap_or_default();
        self.waiting == 0 && since >= idle
    }
}

/// Somebody who waits for the controller's word; what he waits for is not forgotten.
struct Waiting<'a> {
    destinations: &'a Destinations,
    at: SocketAddr,
    answers: watch::Receiver<Option<Answer>>,
}

impl<'a> Waiting<'a> {
    /// `None` when there is no room for another destination.
    fn begin(destinations: &'a Destinations, at: SocketAddr) -> Option<Self> {
        let mut table = destinations.table();
        if !destinations.enter(&mut table, at) {
            return None;
        }
        let entry = table.entries.get_mut(&at)?;
        entry.waiting += 1;
        Some(Self {
            destinations,
            at,
            answers: entry.answer.subscribe(),
        })
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(entry) = self.destinations.table().entries.get_mut(&self.at) {
            entry.waiting = entry.waiting.saturating_sub(1);
        }
    }
}

impl std::fmt::Debug for Destinations {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Destinations")
            .field("known", &self.table().entries.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use prometheus_client::registry::Registry;
    use sidegate_mesh::ManualClock;

    use super::*;

    fn destinations(max: u32) -> (Destinations, ManualClock) {
        let clock = ManualClock::new(SystemTime::UNIX_EPOCH);
        let limits = LimitsConfig {
            destinations_max: max,
            destination_idle_timeout: Duration::from_mins(5),
            ..LimitsConfig::default()
        };
        let metrics = Metrics::new(&mut Registry::default(), 100);
        let destinations = Destinations::new(&limits, &metrics, Arc::new(clock.clone()));
        destinations.set_connected(true);
        (destinations, clock)
    }

    fn at(last: u8) -> SocketAddr {
        SocketAddr::from(([10, 96, 0, last], 80))
    }

    fn external() -> Answer {
        Answer::Known(Destination::External { refused: false })
    }

    /// Calls it, and has it answered.
    fn call(destinations: &Destinations, at: SocketAddr) -> bool {
        let mut call = std::pin::pin!(destinations.resolve(at));
        let first = call.as_mut().now_or_never();
        first.map_or_else(
            || {
                destinations.update(at, external());
                call.now_or_never().is_some_and(|answer| answer.is_ok())
            },
            |answer| answer.is_ok(),
        )
    }

    fn told(destinations: &Destinations) -> Vec<Change> {
        std::iter::from_fn(|| destinations.next_change().now_or_never()).collect()
    }

    #[test]
    fn a_call_waits_for_the_word_that_it_is_known_and_no_longer_than_a_second() {
        let (destinations, clock) = destinations(10);
        let mut call = std::pin::pin!(destinations.resolve(at(1)));
        assert!(call.as_mut().now_or_never().is_none());
        destinations.update(at(1), Answer::Unknown);
        assert!(call.as_mut().now_or_never().is_none(), "not known yet");
        clock.advance(Duration::from_millis(999));
        assert!(call.as_mut().now_or_never().is_none());
        clock.advance(Duration::from_millis(1));
        assert!(matches!(call.now_or_never(), Some(Err(DestinationUnknown))));
        assert!(destinations.current(at(1)).is_none());
        destinations.update(at(1), external());
        assert!(
            destinations.current(at(1)).is_some(),
            "it is still followed"
        );
    }

    #[test]
    fn the_word_of_the_controller_ends_the_wait_at_once() {
        let (destinations, _clock) = destinations(10);
        let mut call = std::pin::pin!(destinations.resolve(at(1)));
        assert!(call.as_mut().now_or_never().is_none());
        destinations.update(at(1), external());
        assert!(matches!(
            call.now_or_never(),
            Some(Ok(Destination::External { refused: false }))
        ));
    }

    #[test]
    fn what_is_not_called_any_more_is_forgotten_and_told() {
        let (destinations, clock) = destinations(10);
        assert!(call(&destinations, at(1)) && call(&destinations, at(2)));
        assert_eq!(
            told(&destinations),
            [Change::Subscribe(at(1)), Change::Subscribe(at(2))]
        );
        clock.advance(Duration::from_mins(4));
        assert!(destinations.current(at(1)).is_some());
        clock.advance(Duration::from_mins(2));
        destinations.sweep();
        assert_eq!(told(&destinations), [Change::Unsubscribe(at(2))]);
        assert!(destinations.current(at(1)).is_some());
        assert!(destinations.current(at(2)).is_none());
    }

    #[test]
    fn what_is_called_again_before_it_was_told_gets_an_answer_of_its_own() {
        let (destinations, clock) = destinations(10);
        assert!(call(&destinations, at(1)));
        told(&destinations);
        clock.advance(Duration::from_mins(6));
        destinations.sweep();
        assert!(call(&destinations, at(1)));
        assert_eq!(
            told(&destinations),
            [Change::Unsubscribe(at(1)), Change::Subscribe(at(1))]
        );
        clock.advance(Duration::from_mins(6));
        assert!(call(&destinations, at(3)));
        destinations.sweep();
        assert_eq!(
            told(&destinations),
            [Change::Unsubscribe(at(1)), Change::Subscribe(at(3))]
        );
    }

    #[test]
    fn the_bound_holds_and_makes_room_only_for_what_is_called_less() {
        let (destinations, clock) = destinations(2);
        assert!(call(&destinations, at(1)) && call(&destinations, at(2)));
        assert!(!call(&destinations, at(3)), "both were just called");
        assert_eq!(destinations.refused.get(), 1);
        clock.advance(KEPT_MIN);
        assert!(destinations.current(at(2)).is_some());
        assert!(call(&destinations, at(3)));
        assert!(destinations.current(at(1)).is_none());
        assert!(destinations.current(at(2)).is_some());
        assert_eq!(destinations.known.get(), 2);
        clock.advance(Duration::from_mins(1));
        destinations.set_connected(false);
        assert!(!call(&destinations, at(4)), "nobody could say what it is");
        assert!(destinations.current(at(2)).is_some() && destinations.current(at(3)).is_some());
    }

    #[test]
    fn what_somebody_waits_for_is_not_forgotten() {
        let (destinations, clock) = destinations(1);
        let mut waiting = std::pin::pin!(destinations.resolve(at(1)));
        assert!(waiting.as_mut().now_or_never().is_none());
        clock.advance(Duration::from_hours(1));
        destinations.sweep();
        assert!(!call(&destinations, at(2)));
        destinations.update(at(1), external());
        assert!(waiting.now_or_never().is_some_and(|answer| answer.is_ok()));
    }

    #[test]
    fn a_new_controller_is_told_everything() {
        let (destinations, _clock) = destinations(10);
        assert!(call(&destinations, at(1)) && call(&destinations, at(2)));
        told(&destinations);
        destinations.set_connected(false);
        assert!(destinations.current(at(1)).is_some(), "what was said stays");
        destinations.set_connected(true);
        assert_eq!(
            told(&destinations),
            [Change::Subscribe(at(1)), Change::Subscribe(at(2))]
        );
    }
}
