//! Coming to an end: from serving, through draining, to closed.
//!
//! Invariants: phases only go forward; from the first moment of a drain the sidecar is not ready;
//! connections are accepted for a grace period, so that callers see a GOAWAY instead of a refused
//! connection; nothing outlives the deadline.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use sidegate_mesh::Clock;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

/// Where a sidecar is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Serving.
    Serving,
    /// No new request is begun; open ones go on.
    Draining {
        /// Until then connections are still accepted, and each is told to go away.
        accept_until: SystemTime,
        /// Then whatever is still open is cut.
        deadline: SystemTime,
    },
    /// Nothing is open any more, or nothing may be.
    Closed,
}

/// The phase, and the tasks that a drain waits for. Clones share it.
#[derive(Clone)]
pub struct Drain {
    phase: Arc<watch::Sender<Phase>>,
    /// The workload is about to end; until its drain it serves whoever comes.
    asked_to_leave: Arc<watch::Sender<bool>>,
    tasks: TaskTracker,
    clock: Arc<dyn Clock>,
}

impl std::fmt::Debug for Drain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Drain")
            .field("phase", &self.phase())
            .field("tasks", &self.tasks.len())
            .finish_non_exhaustive()
    }
}

impl Drain {
    /// Serving, with no task.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self {
            phase: Arc::new(watch::Sender::new(Phase::Serving)),
            asked_to_leave: Arc::new(watch::Sender::new(false)),
            tasks: TaskTracker::new(),
            clock,
        }
    }

    /// The tasks of open connections and calls. Spawn them here: a drain ends when all have ended.
    pub fn tasks(&self) -> &TaskTracker {
        &self.tasks
    }

    /// The phase now.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Whether a drain has begun, or has ended.
    pub fn is_draining(&self) -> bool {
        self.phase() != Phase::Serving
    }

    /// Follows the phase.
    pub fn subscribe(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Tells every caller to go away, and goes on serving whoever does not: the workload is about to
    /// end, and its drain has not begun yet.
    pub fn ask_to_leave(&self) {
        self.asked_to_leave.send_replace(true);
    }

    /// Whether callers have been told to go away.
    pub fn is_asked_to_leave(&self) -> bool {
        *self.asked_to_leave.borrow()
    }

    /// Waits for [`Self::ask_to_leave`].
    pub async fn asked_to_leave(&self) {
        let mut asked = self.asked_to_leave.subscribe();
        let asked = asked.wait_for(|asked| *asked).await.is_ok();
        debug_assert!(asked, "the sender lives as long as this borrow");
    }

    /// Begins a drain; a second time changes nothing.
    pub fn start(&self, grace: Duration, timeout: Duration) {
        let now = self.clock.now();
        self.phase.send_if_modified(|phase| {
            let begin = *phase == Phase::Serving;
            if begin {
                *phase = Phase::Draining {
                    accept_until: now + grace.min(timeout),
                    deadline: now + timeout,
                };
            }
            begin
        });
    }

    /// Ends everything at once, without waiting for anything.
    pub fn close(&self) {
        self.phase.send_replace(Phase::Closed);
    }

    /// Waits for the begin of a drain: refuse new requests, send GOAWAY, go on accepting.
    pub async fn draining(&self) {
        self.reached(|phase| *phase != Phase::Serving).await;
    }

    /// Waits for the end of the grace period: stop accepting, once the accept queue is empty.
    pub async fn accept_until(&self) {
        self.moment(|phase| match phase {
            Phase::Draining { accept_until, .. } => Some(accept_until),
            Phase::Serving | Phase::Closed => None,
        })
        .await;
    }

    /// Waits for the deadline, or for [`Self::close`]: cut what is still open.
    pub async fn deadline(&self) {
        self.moment(|phase| match phase {
            Phase::Draining { deadline, .. } => Some(deadline),
            Phase::Serving | Phase::Closed => None,
        })
        .await;
    }

    /// Waits for [`Phase::Closed`].
    pub async fn closed(&self) {
        self.reached(|phase| *phase == Phase::Closed).await;
    }

    /// Waits, after [`Self::start`], until every task has ended or the deadline has come, then
    /// closes. True when nothing had to be cut.
    pub async fn finish(&self) -> bool {
        self.draining().await;
        self.accept_until().await;
        self.tasks.close();
        let clean = tokio::select! {
            () = self.tasks.wait() => true,
            () = self.deadline() => self.tasks.is_empty(),
        };
        self.close();
        clean
    }

    /// Waits until the phase has begun that tells a moment, and then for that moment; [`Phase::Closed`]
    /// ends the wait at once.
    async fn moment(&self, of: impl Fn(Phase) -> Option<SystemTime>) {
        self.draining().await;
        let Some(moment) = of(self.phase()) else {
            return;
        };
        tokio::select! {
            () = self.clock.sleep_until(moment) => {}
            () = self.closed() => {}
        }
    }

    async fn reached(&self, is: impl Fn(&Phase) -> bool) {
        // The sender lives in `self`, so the channel cannot close while this waits.
        let reached = self
            .phase
            .subscribe()
            .wait_for(|phase| is(phase))
            .await
            .is_ok();
        debug_assert!(reached, "the phase's sender lives as long as this borrow");
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use sidegate_mesh::ManualClock;

    use super::*;

    fn drain() -> (Drain, ManualClock) {
        let clock = ManualClock::new(SystemTime::UNIX_EPOCH);
        (Drain::new(Arc::new(clock.clone())), clock)
    }

    #[test]
    fn a_drain_passes_grace_then_deadline() {
        let (drain, clock) = drain();
        assert!(drain.draining().now_or_never().is_none());
        drain.start(Duration::from_secs(1), Duration::from_secs(30));
        assert!(drain.draining().now_or_never().is_some());
        assert!(drain.accept_until().now_or_never().is_none());
        clock.advance(Duration::from_secs(1));
        assert!(drain.accept_until().now_or_never().is_some());
        assert!(drain.deadline().now_or_never().is_none());
        clock.advance(Duration::from_secs(29));
        assert!(drain.deadline().now_or_never().is_some());
    }

    #[test]
    fn callers_may_be_asked_to_leave_before_any_drain() {
        let (drain, _clock) = drain();
        assert!(drain.asked_to_leave().now_or_never().is_none());
        drain.ask_to_leave();
        assert!(drain.asked_to_leave().now_or_never().is_some());
        assert!(drain.is_asked_to_leave() && !drain.is_draining());
    }

    #[test]
    fn a_second_start_does_not_prolong_the_first() {
        let (drain, clock) = drain();
        drain.start(Duration::ZERO, Duration::from_secs(5));
        clock.advance(Duration::from_secs(4));
        drain.start(Duration::ZERO, Duration::from_secs(5));
        clock.advance(Duration::from_secs(1));
        assert!(drain.deadline().now_or_never().is_some());
    }

    #[test]
    fn closing_ends_every_wait_at_once() {
        let (drain, _clock) = drain();
        drain.start(Duration::from_mins(1), Duration::from_mins(1));
        drain.close();
        assert!(drain.accept_until().now_or_never().is_some());
        assert!(drain.deadline().now_or_never().is_some());
        drain.start(Duration::ZERO, Duration::ZERO);
        assert_eq!(drain.phase(), Phase::Closed, "phases only go forward");
    }

    #[tokio::test]
    async fn a_drain_ends_when_its_last_task_does() {
        let (drain, clock) = drain();
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        drain
            .tasks()
            .spawn(async move { ended.await.unwrap_or_default() });
        drain.start(Duration::ZERO, Duration::from_secs(30));
        let mut finish = Box::pin(drain.finish());
        assert!(futures_util::poll!(finish.as_mut()).is_pending());
        drop(end);
        assert!(finish.await, "nothing had to be cut");
        assert_eq!(drain.phase(), Phase::Closed);
        drop(clock);
    }

    #[tokio::test]
    async fn a_drain_ends_at_its_deadline_when_a_task_does_not() {
        let (drain, clock) = drain();
        drain.tasks().spawn(std::future::pending::<()>());
        drain.start(Duration::ZERO, Duration::from_secs(30));
        let mut finish = Box::pin(drain.finish());
        assert!(futures_util::poll!(finish.as_mut()).is_pending());
        clock.advance(Duration::from_secs(30));
        assert!(!finish.await, "a task had to be cut");
    }
}
