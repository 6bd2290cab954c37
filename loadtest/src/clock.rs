//! Time: one monotonic clock in nanoseconds, and a timer as precise as the kernel's.
//!
//! Invariant: every instant of the harness is a [`Nanos`] of `CLOCK_MONOTONIC`, so instants of
//! different threads compare. Tokio's own timer rounds to a millisecond and paces nothing here.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};
use tokio::io::unix::AsyncFd;

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub(crate) type Nanos = u64;

const SECOND: Nanos = 1_000_000_000;

/// The monotonic clock now.
pub(crate) fn now() -> Nanos {
    let time = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds * SECOND + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// `duration` in nanoseconds, at most `u64::MAX`.
pub(crate) fn nanos(duration: Duration) -> Nanos {
    u64::try_from(duration.as_nanos()).unwrap_or(Nanos::MAX)
}

/// The wall clock, as RFC 3339 in UTC.
pub(crate) fn wall() -> String {
    let now = clock_gettime(ClockId::Realtime);
    let at = time::OffsetDateTime::from_unix_timestamp(now.tv_sec)
        .unwrap_or(time::OffsetDateTime::UNIX_EPOCH);
    at.format(&time::format_description::well_known::Rfc3339)
        .unwrap_or_default()
}

/// A timerfd; it fires when the clock has passed the instant, without timer slack.
#[derive(Debug)]
pub(crate) struct Timer {
    fd: AsyncFd<OwnedFd>,
}

impl Timer {
    /// A timer of the current runtime.
    pub(crate) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let fd = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        #[expect(
            deprecated,
            reason = "sound here: an OwnedFd always names the same open descriptor; the successor is unsafe"
        )]
        let fd = AsyncFd::new(fd)?;
        Ok(Self { fd })
    }

    /// Waits until the clock has reached `at`; at once when it has.
    pub(crate) async fn until(&self, at: Nanos) -> io::Result<()> {
        if now() >= at {
            return Ok(());
        }
        let spec = Itimerspec {
            it_interval: timespec(0),
            it_value: timespec(at),
        };
        timerfd_settime(self.fd.get_ref(), TimerfdTimerFlags::ABSTIME, &spec)?;
        loop {
            let mut ready = self.fd.readable().await?;
            let mut expirations = [0; 8];
            let read = ready.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut expirations)?));
            if let Ok(done) = read {
                return done.map(|_| ());
            }
        }
    }
}

fn timespec(at: Nanos) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(at / SECOND).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(at % SECOND).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn timer_never_fires_early() {
        let timer = Timer::new().unwrap();
        for micros in [0, 50, 300, 2_500] {
            let at = now() + micros * 1_000;
            timer.until(at).await.unwrap();
            assert!(now() >= at, "{micros} µs");
        }
    }

    #[tokio::test]
    async fn timer_whose_wait_was_dropped_can_wait_again() {
        let timer = Timer::new().unwrap();
        let far = timer.until(now() + 3_600 * SECOND);
        drop(tokio::time::timeout(Duration::from_millis(1), far).await);
        let at = now() + 2_000_000;
        timer.until(at).await.unwrap();
        assert!(now() >= at);
    }
}
