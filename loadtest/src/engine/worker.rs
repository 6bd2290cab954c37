//! One thread of a load.
//!
//! Invariant: a slot is one call at a time: a connection in HTTP/1, a stream in HTTP/2.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream};
use http::Method;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::{GRACE_INTERRUPTED, GRACE_MAX, Job, Part, Signal, Tasks, pace, span};
use crate::clock::{Nanos, Timer, now};
use crate::failure::Failure;
use crate::http1::{Answer, Connection};
use crate::http2::Shared;
use crate::recorder::{Live, Record};
use crate::schedule::Schedule;
use crate::target::{Protocol, Target};
use crate::usage::{Cpu, of_this_thread};

/// Handshakes at once, per thread.
const OPENING_MAX: usize = 32;
/// Longest wait for one connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a slot rests after it could not connect.
const REST: Duration = Duration::from_millis(50);

enum Opened {
    Own(Connection),
    Shared(Rc<Shared>),
}

struct Context {
    target: Target,
    schedule: Schedule,
    record: RefCell<Record>,
    live: Arc<Live>,
    timeout: Duration,
    new_connections: bool,
}

/// Connects, says so, waits for the signal, and makes its share of the calls.
pub(super) async fn run(job: Job) -> anyhow::Result<Option<Part>> {
    let connections: Tasks = Rc::new(RefCell::new(JoinSet::new()));
    let mut signal = job.signal.clone();
    let opened = tokio::select! {
        opened = open(&job, &connections) => opened,
        _ = signal.wait_for(|told| *told == Signal::Stop) => return Ok(None),
    };
    let opened = match opened {
        Ok(opened) => opened,
        Err(failure) => {
            job.ready.send(Err(failure.into())).ok();
            return Ok(None);
        }
    };
    if job.ready.send(Ok(())).is_err() {
        return Ok(None);
    }
    let start = match signal.wait_for(|told| *told != Signal::Connect).await {
        Ok(told) => *told,
        Err(_closed) => return Ok(None),
    };
    match start {
        Signal::Go(start) => load(&job, opened, start, signal).await.map(Some),
        Signal::Connect | Signal::Stop => Ok(None),
    }
}

async fn open(job: &Job, tasks: &Tasks) -> Result<Vec<Opened>, Failure> {
    let (threads, target) = (job.load.threads, &job.target);
    let mine = (0..job.load.connections).filter(|number| number % threads == job.thread);
    let open_one = |_number| async move {
        Ok(match target.protocol {
            Protocol::Http1 => Opened::Own(Connection::new(target.connect(CONNECT_TIMEOUT).await?)),
            Protocol::Http2 | Protocol::Grpc => {
                let shared = Shared::open(target, CONNECT_TIMEOUT, Rc::clone(tasks)).await?;
                Opened::Shared(Rc::new(shared))
            }
        })
    };
    let opening = stream::iter(mine)
        .map(open_one)
        .buffer_unordered(OPENING_MAX);
    opening.try_collect().await
}

async fn load(
    job: &Job,
    opened: Vec<Opened>,
    start: Nanos,
    mut signal: watch::Receiver<Signal>,
) -> anyhow::Result<Part> {
    let span = span(job.load, start);
    let context = Rc::new(Context {
        target: job.target.clone(),
        schedule: Schedule::new(pace(job.load, job.thread), start, span.to),
        record: RefCell::new(Record::new(span)),
        live: Arc::clone(&job.live),
        timeout: job.load.timeout,
        new_connections: job.load.new_connections,
    });
    let timer = Timer::new()?;
    timer.until(start).await?;
    let mut slots = JoinSet::new();
    for opened in opened {
        match opened {
            Opened::Own(own) => {
                slots.spawn_local(call_alone(Rc::clone(&context), own));
            }
            Opened::Shared(shared) => {
                for _ in 0..job.load.streams {
                    slots.spawn_local(call_shared(Rc::clone(&context), Rc::clone(&shared)));
                }
            }
        }
    }
    let before = Rc::new(Cell::new(of_this_thread()));
    let mut background = JoinSet::new();
    let (mark, marking) = (Rc::clone(&before), Timer::new()?);
    background.spawn_local(async move {
        marking.until(span.from).await.ok();
        mark.set(of_this_thread());
    });
    let lag = |intended, lag| context.record.borrow_mut().lagged(intended, lag);
    let interrupted = tokio::select! {
        ran = context.schedule.run(&timer, lag) => ran.map(|()| false)?,
        _ = signal.wait_for(|told| *told == Signal::Stop) => true,
    };
    context.schedule.finish();
    let missed = context.schedule.missed(span.from);
    let cpu: Cpu = of_this_thread().since(before.get());
    let grace = if interrupted {
        GRACE_INTERRUPTED
    } else {
        GRACE_MAX.min(job.load.timeout)
    };
    let finish = async { while slots.join_next().await.is_some() {} };
    // What has not ended by then is counted as unfinished.
    tokio::time::timeout(grace, finish).await.ok();
    slots.shutdown().await;
    let record = context.record.borrow().clone();
    Ok(Part {
        record,
        missed,
        cpu,
    })
}

impl Context {
    fn ended(&self, start: &crate::schedule::Start, outcome: &Result<Answer, Failure>) {
        let counter = match outcome {
            Ok(_) => &self.live.answered,
            Err(failure) => {
                self.live.first_failure.get_or_init(|| failure.to_string());
                &self.live.failed
            }
        };
        counter.fetch_add(1, Relaxed);
        self.record.borrow_mut().end(start, now(), outcome);
    }

    async fn in_time<T>(
        &self,
        call: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let ended = tokio::time::timeout(self.timeout, call).await;
        ended.unwrap_or_else(|_| {
            Err(Failure::Timeout {
                after_ms: self.timeout.as_millis(),
            })
        })
    }
}

async fn call_alone(context: Rc<Context>, own: Connection) {
    let mut own = (!context.new_connections).then_some(own);
    let head_only = context.target.request.method() == Method::HEAD;
    while let Some(start) = context.schedule.next().await {
        context.record.borrow_mut().begin(&start);
        let outcome = context
            .in_time(async {
                let mut connection = match own.take() {
                    Some(connection) => connection,
                    None => Connection::new(context.target.connect(CONNECT_TIMEOUT).await?),
                };
                let answer = connection.call(&context.target.bytes, head_only).await?;
                Ok((answer, connection))
            })
            .await;
        let outcome = outcome.map(|(answer, connection)| {
            own = (answer.reusable && !context.new_connections).then_some(connection);
            answer
        });
        context.ended(&start, &outcome);
        rest(&outcome).await;
    }
}

async fn call_shared(context: Rc<Context>, shared: Rc<Shared>) {
    while let Some(start) = context.schedule.next().await {
        context.record.borrow_mut().begin(&start);
        if context.new_connections {
            shared.forget().await;
        }
        let call = shared.call(&context.target, CONNECT_TIMEOUT);
        let outcome = context.in_time(call).await;
        context.ended(&start, &outcome);
        rest(&outcome).await;
    }
}

/// A server that refuses connections is not hammered as fast as the machine can.
async fn rest(outcome: &Result<Answer, Failure>) {
    if let Err(Failure::Connect { .. } | Failure::Tls { .. }) = outcome {
        tokio::time::sleep(REST).await;
    }
}
