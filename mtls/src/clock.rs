//! The one real clock of the workspace.

use std::time::{Duration, SystemTime};

use sidegate_mesh::clock::{Clock, Sleep};

/// Longest single sleep towards a wall-clock moment, so that a clock set forward, or a machine
/// that was suspended, is noticed.
const STEP_MAX: Duration = Duration::from_secs(30);

/// The machine's clock, with tokio's timers.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the implementation that everything else must go through"
    )]
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }

    fn sleep_until(&self, deadline: SystemTime) -> Sleep {
        Box::pin(async move {
            while let Ok(left) = deadline.duration_since(Self.now())
                && !left.is_zero()
            {
                tokio::time::sleep(left.min(STEP_MAX)).await;
            }
        })
    }

    // A duration is monotonic: setting the wall clock back must not stretch a handshake's timeout.
    fn sleep(&self, duration: Duration) -> Sleep {
        Box::pin(tokio::time::sleep(duration))
    }
}
