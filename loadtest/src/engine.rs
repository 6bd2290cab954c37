//! Runs one load: threads, each with its own runtime, schedule and record.
//!
//! Invariant: every connection is open before the first call is due, so an unreachable target is
//! told at once and connecting is in no latency. Threads share nothing but the signal to go.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::clock::{Nanos, Timer, nanos, now};
use crate::recorder::{Live, Record, Span};
use crate::schedule::Pace;
use crate::target::Target;
use crate::usage::Cpu;

mod worker;

/// From the signal to go to the first call.
const RUN_UP: Nanos = 20_000_000;
/// How long calls that are open at the end may take to finish.
const GRACE_MAX: Duration = Duration::from_secs(2);
/// The same after Ctrl-C.
const GRACE_INTERRUPTED: Duration = Duration::from_millis(200);
/// This many failures and no answer: nothing answers there.
const FAILURES_TELLING: u64 = 50;

/// How much load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    /// Calls a second; none is a closed loop.
    pub(crate) rate: Option<f64>,
    pub(crate) connections: u32,
    /// Calls at once on a connection; 1 in HTTP/1.
    pub(crate) streams: u32,
    pub(crate) duration: Duration,
    pub(crate) warmup: Duration,
    pub(crate) timeout: Duration,
    pub(crate) threads: u32,
    /// A connection of its own for every call, opened within its latency.
    pub(crate) new_connections: bool,
}

/// Is told of the phases of a run.
pub(crate) trait Observer {
    /// The measurement begins.
    fn measuring(&mut self) {}
    /// Now and then; `share` of the whole load, warm-up included, is over.
    fn tick(&mut self, _share: f64, _answered: u64, _failed: u64) {}
    /// The measurement has ended.
    fn measured(&mut self) {}
}

/// What came of a run.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) record: Record,
    /// Due in the measurement and never started.
    pub(crate) missed: u64,
    /// Per generator thread, CPU during the measurement.
    pub(crate) generator: Vec<Cpu>,
    /// Measured time, in nanoseconds; shorter than asked for after Ctrl-C.
    pub(crate) elapsed: Nanos,
    pub(crate) interrupted: bool,
}

/// What every thread is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Signal {
    Connect,
    Go(Nanos),
    Stop,
}

struct Job {
    target: Target,
    load: Load,
    thread: u32,
    signal: watch::Receiver<Signal>,
    ready: mpsc::UnboundedSender<anyhow::Result<()>>,
    live: Arc<Live>,
}

struct Part {
    record: Record,
    missed: u64,
    cpu: Cpu,
}

/// Runs `load` against `target`, until its end or until `interrupt` is told to stop.
///
/// # Errors
///
/// When the target cannot be reached, or nothing of it answers.
pub(crate) async fn run(
    target: &Target,
    load: Load,
    interrupt: &mut watch::Receiver<bool>,
    observer: &mut dyn Observer,
) -> anyhow::Result<Outcome> {
    let (signal, told) = watch::channel(Signal::Connect);
    let (ready, mut connected) = mpsc::unbounded_channel();
    let live = Arc::new(Live::default());
    let threads: Vec<_> = (0..load.threads)
        .map(|thread| {
            let job = Job {
                target: target.clone(),
                load,
                thread,
                signal: told.clone(),
                ready: ready.clone(),
                live: Arc::clone(&live),
            };
            thread::Builder::new()
                .name(format!("load-{thread}"))
                .spawn(move || work(job))
        })
        .collect::<Result<_, _>>()
        .context("cannot start a thread")?;
    drop(ready);
    let controlled = control(&signal, &mut connected, load, interrupt, (&live, observer)).await;
    if controlled.is_err() {
        signal.send_replace(Signal::Stop);
    }
    let parts = tokio::task::spawn_blocking(move || {
        threads
            .into_iter()
            .map(|thread| {
                thread
                    .join()
                    .map_err(|_payload| anyhow!("a load thread panicked"))?
            })
            .collect::<anyhow::Result<Vec<Option<Part>>>>()
    });
    let (span, interrupted) = controlled?;
    outcome(parts.await??, span, interrupted)
}

/// Steers the threads; returns the span that was measured, and whether it was cut short.
async fn control(
    signal: &watch::Sender<Signal>,
    connected: &mut mpsc::UnboundedReceiver<anyhow::Result<()>>,
    load: Load,
    interrupt: &mut watch::Receiver<bool>,
    (live, observer): (&Live, &mut dyn Observer),
) -> anyhow::Result<(Span, bool)> {
    for _ in 0..load.threads {
        tokio::select! {
            ready = connected.recv() => ready.context("a load thread ended")??,
            _ = interrupt.wait_for(|told| *told) => bail!("interrupted before the load began"),
        }
    }
    let start = now() + RUN_UP;
    signal.send_replace(Signal::Go(start));
    let span = span(load, start);
    let timer = Timer::new()?;
    let mut measuring = false;
    loop {
        let next = (now() + 200_000_000).min(span.to);
        let next = if measuring { next } else { next.min(span.from) };
        tokio::select! {
            fired = timer.until(next) => fired?,
            _ = interrupt.wait_for(|told| *told) => {
                signal.send_replace(Signal::Stop);
                if measuring { observer.measured(); }
                let cut = Span { from: span.from, to: now().max(span.from) };
                return Ok((cut, true));
            }
        }
        let (answered, failed) = (live.answered.load(Relaxed), live.failed.load(Relaxed));
        if answered == 0 && failed >= FAILURES_TELLING {
            let first = live.first_failure.get().map_or("", String::as_str);
            bail!(
                "nothing answers: the first {failed} calls failed, the first of them so: {first}"
            );
        }
        let at = now();
        observer.tick(share(start, span.to, at), answered, failed);
        if !measuring && at >= span.from {
            measuring = true;
            observer.measuring();
        }
        if at >= span.to {
            observer.measured();
            return Ok((span, false));
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "for a progress bar")]
fn share(start: Nanos, end: Nanos, at: Nanos) -> f64 {
    at.saturating_sub(start) as f64 / (end - start).max(1) as f64
}

fn span(load: Load, start: Nanos) -> Span {
    let from = start + nanos(load.warmup);
    Span {
        from,
        to: from + nanos(load.duration),
    }
}

fn outcome(parts: Vec<Option<Part>>, span: Span, interrupted: bool) -> anyhow::Result<Outcome> {
    let mut parts = parts.into_iter().flatten();
    let first = parts.next().context("the load never began")?;
    let mut outcome = Outcome {
        record: first.record,
        missed: first.missed,
        generator: vec![first.cpu],
        elapsed: span.to - span.from,
        interrupted,
    };
    for part in parts {
        outcome.record.merge(&part.record);
        outcome.missed += part.missed;
        outcome.generator.push(part.cpu);
    }
    Ok(outcome)
}

/// One thread, from connecting to its last call; nothing when it never began.
fn work(job: Job) -> anyhow::Result<Option<Part>> {
    let options = tokio::runtime::LocalOptions::default();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build_local(options)?;
    let part = runtime.block_on(worker::run(job));
    // Connections that are still open are cut, not waited for.
    runtime.shutdown_background();
    part
}

fn pace(load: Load, thread: u32) -> Pace {
    match load.rate {
        Some(per_second) => Pace::Open {
            per_second,
            offset: thread,
            stride: load.threads,
        },
        None => Pace::Closed,
    }
}

type Tasks = Rc<RefCell<JoinSet<()>>>;
