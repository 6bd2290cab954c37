//! Time, as something that is passed in.
//!
//! Invariant: nothing in the workspace reads the real clock except one implementation of
//! [`Clock`], so that every expiry can be tested at the moment at which it happens.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime};

/// A future that ends when its moment has come.
pub type Sleep = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Where time comes from.
pub trait Clock: Send + Sync + 'static {
    /// The present.
    fn now(&self) -> SystemTime;

    /// Waits until [`Self::now`] is `deadline` or later; at once if it already is.
    fn sleep_until(&self, deadline: SystemTime) -> Sleep;

    /// Waits for `duration` from now.
    fn sleep(&self, duration: Duration) -> Sleep {
        self.sleep_until(self.now() + duration)
    }
}

/// A clock that moves only when a test says so. Clones share one time.
#[derive(Clone, Debug)]
pub struct ManualClock {
    state: Arc<Mutex<ManualState>>,
}

#[derive(Debug)]
struct ManualState {
    now: SystemTime,
    sleepers: Vec<(SystemTime, Waker)>,
}

impl ManualClock {
    /// A clock that stands at `now`.
    pub fn new(now: SystemTime) -> Self {
        Self {
            state: Arc::new(Mutex::new(ManualState {
                now,
                sleepers: Vec::new(),
            })),
        }
    }

    /// Moves time on and wakes everything whose moment has come.
    pub fn advance(&self, by: Duration) {
        let woken: Vec<Waker> = {
            let mut state = lock(&self.state);
            state.now += by;
            let now = state.now;
            let due = state
                .sleepers
                .extract_if(.., |(deadline, _)| *deadline <= now);
            due.map(|(_, waker)| waker).collect()
        };
        woken.into_iter().for_each(Waker::wake);
    }

    /// How many tasks wait for a later moment: a test can tell that a task has gone to sleep.
    pub fn sleepers(&self) -> usize {
        lock(&self.state).sleepers.len()
    }
}

impl Clock for ManualClock {
    fn now(&self) -> SystemTime {
        lock(&self.state).now
    }

    fn sleep_until(&self, deadline: SystemTime) -> Sleep {
        Box::pin(ManualSleep {
            state: Arc::clone(&self.state),
            deadline,
        })
    }
}

struct ManualSleep {
    state: Arc<Mutex<ManualState>>,
    deadline: SystemTime,
}

impl Future for ManualSleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let mut state = lock(&self.state);
        if state.now >= self.deadline {
            return Poll::Ready(());
        }
        let registered = state.sleepers.iter().any(|(deadline, waker)| {
            *deadline == self.deadline && waker.will_wake(context.waker())
        });
        if !registered {
            state
                .sleepers
                .push((self.deadline, context.waker().clone()));
        }
        Poll::Pending
    }
}

fn lock(state: &Mutex<ManualState>) -> MutexGuard<'_, ManualState> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sleeper_wakes_at_its_moment_and_not_before() {
        let clock = ManualClock::new(SystemTime::UNIX_EPOCH);
        let mut sleep = clock.sleep(Duration::from_secs(10));
        let mut context = Context::from_waker(Waker::noop());
        assert!(sleep.as_mut().poll(&mut context).is_pending());
        assert_eq!(clock.sleepers(), 1);
        clock.advance(Duration::from_millis(9_999));
        assert!(sleep.as_mut().poll(&mut context).is_pending());
        clock.advance(Duration::from_millis(1));
        assert!(sleep.as_mut().poll(&mut context).is_ready());
        assert_eq!(clock.sleepers(), 0);
    }
}
