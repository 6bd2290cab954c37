//! Informational (1xx) answers on their way from the application to the caller.
//!
//! Always true: few wait at once, more are dropped, since nothing final depends on one; they are
//! taken in the order in which they came. A request without any, as nearly all are, keeps nothing.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use http::Response;

/// Most answers of one request that wait to be passed on.
const WAITING_MAX: usize = 8;

/// An informational (1xx) response.
pub type Informational = Response<()>;

/// The informational answers of one request. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Interims(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Informational>,
    waker: Option<Waker>,
}

impl Interims {
    /// Adds one, unless too many wait.
    pub fn add(&self, head: Informational) {
        let mut state = self.lock();
        if state.waiting.len() >= WAITING_MAX {
            return;
        }
        state.waiting.push_back(head);
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Waits for the next one. One task waits at a time.
    pub async fn next(&self) -> Informational {
        poll_fn(|context| self.poll_next(context)).await
    }

    fn poll_next(&self, context: &mut Context<'_>) -> Poll<Informational> {
        let mut state = self.lock();
        if let Some(head) = state.waiting.pop_front() {
            return Poll::Ready(head);
        }
        match &mut state.waker {
            Some(waker) => waker.clone_from(context.waker()),
            None => state.waker = Some(context.waker().clone()),
        }
        Poll::Pending
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use http::StatusCode;

    use super::*;

    fn head(status: u16) -> Informational {
        let mut head = Response::new(());
        *head.status_mut() = StatusCode::from_u16(status).unwrap();
        head
    }

    #[test]
    fn they_are_taken_in_order_and_too_many_are_dropped() {
        let interims = Interims::default();
        for status in (100..).take(WAITING_MAX + 1) {
            interims.add(head(status));
        }
        for status in (100..).take(WAITING_MAX) {
            let next = interims.next().now_or_never().unwrap();
            assert_eq!(next.status(), status);
        }
        assert!(interims.next().now_or_never().is_none());
    }

    #[tokio::test]
    async fn who_waits_is_woken() {
        let interims = Interims::default();
        let other = interims.clone();
        let (next, ()) = tokio::join!(interims.next(), async move { other.add(head(103)) });
        assert_eq!(next.status(), 103);
    }
}
