//! The read side of a guard: what has been read, checked and not yet passed on.
//!
//! Always true: a message that arrives whole is checked where hyper's buffer holds it and never
//! copied. Only an incomplete head is held here, and nothing is held by an idle connection.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use sidegate_mesh::Clock;
use sidegate_mesh::clock::Sleep;
use tokio::io::ReadBuf;

use super::GuardLimits;
use super::checker::{Checker, Stop};

/// Bytes on their way from a socket to hyper.
pub(super) struct Reader {
    pub(super) checker: Checker,
    limits: GuardLimits,
    clock: Arc<dyn Clock>,
    /// `..sent` has been passed on, `sent..ready` may be, the rest is not yet checked.
    hold: Vec<u8>,
    sent: usize,
    ready: usize,
    /// Runs while a block is incomplete.
    timer: Option<Sleep>,
}

impl Reader {
    pub(super) fn new(checker: Checker, limits: GuardLimits, clock: Arc<dyn Clock>) -> Self {
        Self {
            checker,
            limits,
            clock,
            hold: Vec::new(),
            sent: 0,
            ready: 0,
            timer: None,
        }
    }

    /// The clock that the timer runs by.
    pub(super) fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// How many bytes wait to be checked.
    pub(super) fn held(&self) -> usize {
        self.hold.len() - self.ready
    }

    /// Puts held bytes that may pass into `buffer`; whether there were any.
    pub(super) fn deliver(&mut self, buffer: &mut ReadBuf<'_>) -> bool {
        let waiting = self.hold.get(self.sent..self.ready).unwrap_or_default();
        let bytes = waiting.len().min(buffer.remaining());
        buffer.put_slice(waiting.get(..bytes).unwrap_or_default());
        self.sent += bytes;
        if self.sent > 0 && self.sent == self.ready {
            self.hold.drain(..self.sent);
            (self.sent, self.ready) = (0, 0);
            if self.hold.is_empty() {
                self.hold = Vec::new();
            }
        }
        bytes > 0
    }

    /// Checks what was read into `buffer` behind `before`; leaves there what may pass.
    pub(super) fn absorb(&mut self, buffer: &mut ReadBuf<'_>, before: usize) -> Option<Stop> {
        let read = buffer.filled_mut().get_mut(before..).unwrap_or_default();
        if self.held() > 0 {
            self.hold.extend_from_slice(read);
            buffer.set_filled(before);
            return self.check_held();
        }
        let checked = self.checker.check(read);
        let rest = read.get(checked.pass..checked.len).unwrap_or_default();
        if !rest.is_empty() && keeps(checked.stop) {
            self.hold.extend_from_slice(rest);
        }
        buffer.set_filled(before + checked.pass);
        self.set_timer();
        checked.stop
    }

    /// Checks what is held, for a new reason.
    pub(super) fn check_held(&mut self) -> Option<Stop> {
        let unchecked = self.hold.get_mut(self.ready..).unwrap_or_default();
        let checked = self.checker.check(unchecked);
        self.hold.truncate(self.ready + checked.len);
        self.ready += checked.pass;
        if !keeps(checked.stop) {
            self.hold.truncate(self.ready);
        }
        self.set_timer();
        checked.stop
    }

    /// Holds what was read into `buffer` behind `before`, unchecked.
    pub(super) fn keep(&mut self, buffer: &mut ReadBuf<'_>, before: usize) {
        self.hold
            .extend_from_slice(buffer.filled().get(before..).unwrap_or_default());
        buffer.set_filled(before);
    }

    /// Passes `bytes` on in place of what is held.
    pub(super) fn replace(&mut self, bytes: &[u8]) {
        self.hold.truncate(self.ready);
        self.hold.extend_from_slice(bytes);
        (self.ready, self.timer) = (self.hold.len(), None);
    }

    /// Whether an incomplete block has had its time.
    pub(super) fn poll_late(&mut self, context: &mut Context<'_>) -> bool {
        match &mut self.timer {
            Some(timer) => Pin::new(timer).poll(context) == Poll::Ready(()),
            None => false,
        }
    }

    fn set_timer(&mut self) {
        if self.held() == 0 || !self.checker.wants_block() {
            self.timer = None;
        } else if self.timer.is_none() {
            self.timer = Some(self.clock.sleep(self.limits.head_timeout));
        }
    }
}

/// Whether what did not pass may still mean something.
fn keeps(stop: Option<Stop>) -> bool {
    matches!(stop, None | Some(Stop::Gate))
}
