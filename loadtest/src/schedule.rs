//! When calls start.
//!
//! Invariant: in an open loop call `n` of a thread is intended at `start + (offset + n × stride) ÷ rate`, whatever
//! the server does. A call that finds no free slot waits, and its latency counts from the
//! intended start all the same.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::task::{Poll, Waker};

use crate::clock::{Nanos, Timer, now};

/// How starts are chosen.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pace {
    /// The `offset`th of `stride` threads that together start `per_second` calls a second.
    Open {
        per_second: f64,
        offset: u32,
        stride: u32,
    },
    /// Each slot starts a call as soon as its last one has ended.
    Closed,
}

/// The start of one call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Start {
    /// When it should start.
    pub(crate) intended: Nanos,
    /// When it did.
    pub(crate) begun: Nanos,
    /// Whether it had to wait for a free connection or stream.
    pub(crate) queued: bool,
}

/// The calls of one thread.
#[derive(Debug)]
pub(crate) struct Schedule {
    pace: Pace,
    start: Nanos,
    end: Nanos,
    state: RefCell<State>,
}

#[derive(Debug, Default)]
struct State {
    due: u64,
    started: u64,
    idle: VecDeque<Waker>,
    over: bool,
}

impl Schedule {
    /// Calls from `start` up to `end`.
    pub(crate) fn new(pace: Pace, start: Nanos, end: Nanos) -> Self {
        Self {
            pace,
            start,
            end,
            state: RefCell::default(),
        }
    }

    /// The next call to make; none once the schedule has ended.
    pub(crate) async fn next(&self) -> Option<Start> {
        match self.pace {
            Pace::Closed => self.next_closed(),
            Pace::Open { .. } => self.next_open().await,
        }
    }

    fn next_closed(&self) -> Option<Start> {
        let begun = now();
        let open = begun < self.end && !self.state.borrow().over;
        open.then_some(Start {
            intended: begun,
            begun,
            queued: false,
        })
    }

    async fn next_open(&self) -> Option<Start> {
        let mut waited = false;
        poll_fn(|context| {
            let mut state = self.state.borrow_mut();
            if state.over {
                return Poll::Ready(None);
            }
            if state.started < state.due {
                let intended = self.intended(state.started);
                state.started += 1;
                return Poll::Ready(Some(Start {
                    intended,
                    begun: now(),
                    queued: !waited,
                }));
            }
            waited = true;
            state.idle.push_back(context.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// Makes calls due at their time, until the end; `lag` is told how late each became due.
    pub(crate) async fn run(
        &self,
        timer: &Timer,
        mut lag: impl FnMut(Nanos, Nanos),
    ) -> io::Result<()> {
        if let Pace::Open { .. } = self.pace {
            loop {
                let next = self.intended(self.state.borrow().due);
                if next >= self.end {
                    break;
                }
                timer.until(next).await?;
                self.release(&mut lag);
            }
        }
        timer.until(self.end).await
    }

    fn release(&self, lag: &mut impl FnMut(Nanos, Nanos)) {
        let at = now();
        let mut state = self.state.borrow_mut();
        loop {
            let intended = self.intended(state.due);
            if intended > at || intended >= self.end {
                return;
            }
            state.due += 1;
            lag(intended, at - intended);
            if let Some(slot) = state.idle.pop_front() {
                slot.wake();
            }
        }
    }

    /// Ends the schedule: no call starts any more.
    pub(crate) fn finish(&self) {
        let mut state = self.state.borrow_mut();
        state.over = true;
        state.idle.drain(..).for_each(Waker::wake);
    }

    /// Intended starts, from `from` on, of calls that became due and never started.
    pub(crate) fn missed(&self, from: Nanos) -> u64 {
        let state = self.state.borrow();
        let missed = (state.started..state.due).filter(|call| self.intended(*call) >= from);
        u64::try_from(missed.count()).unwrap_or(u64::MAX)
    }

    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a call's number stays below 2^53, and its start is positive"
    )]
    fn intended(&self, call: u64) -> Nanos {
        let Pace::Open {
            per_second,
            offset,
            stride,
        } = self.pace
        else {
            return self.start;
        };
        let overall = call as f64 * f64::from(stride) + f64::from(offset);
        self.start + (overall * 1e9 / per_second) as Nanos
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLI: Nanos = 1_000_000;

    #[test]
    fn threads_share_a_rate_without_gap_or_overlap() {
        let mut intended = Vec::new();
        for offset in 0..3 {
            let pace = Pace::Open {
                per_second: 1000.0,
                offset,
                stride: 3,
            };
            let schedule = Schedule::new(pace, 7, u64::MAX);
            intended.extend((0..4).map(|call| schedule.intended(call)));
        }
        intended.sort_unstable();
        let expected: Vec<Nanos> = (0..12).map(|call| 7 + call * MILLI).collect();
        assert_eq!(intended, expected);
    }

    #[tokio::test]
    async fn call_without_a_free_slot_keeps_its_intended_start() {
        let pace = Pace::Open {
            per_second: 1000.0,
            offset: 0,
            stride: 1,
        };
        let start = now();
        let schedule = Schedule::new(pace, start, start + 10 * MILLI);
        let mut lags = 0;
        // No slot asks meanwhile: all ten become due, and none starts.
        let timer = Timer::new().unwrap();
        schedule.run(&timer, |_, _| lags += 1).await.unwrap();
        assert_eq!((lags, schedule.missed(0)), (10, 10));
        assert_eq!(schedule.missed(start + 5 * MILLI), 5);
        for call in 0..10 {
            let next = schedule.next().await.unwrap();
            assert_eq!(next.intended, start + call * MILLI);
            assert!(next.queued && next.begun >= start + 10 * MILLI);
        }
        schedule.finish();
        assert!(schedule.next().await.is_none());
        assert_eq!(schedule.missed(0), 0);
    }

    #[tokio::test]
    async fn closed_loop_starts_at_once_and_ends_at_the_end() {
        let schedule = Schedule::new(Pace::Closed, now(), now() + 3_600_000 * MILLI);
        let first = schedule.next().await.unwrap();
        assert_eq!(first.intended, first.begun);
        let over = Schedule::new(Pace::Closed, 0, now());
        assert!(over.next().await.is_none());
    }
}
