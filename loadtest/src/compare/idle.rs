//! What an idle connection costs the called side's proxy in memory.
//!
//! Invariant: the proxies are started for this alone: memory that a load has left behind would
//! hide what connections take. Each sample is what a further batch takes while those before it
//! stay open.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::held::{self, Held};
use super::peer::Peer;
use crate::results::IdleFacts;
use crate::target::{KeyExchange, Target};
use crate::usage::resident_kib;

/// Opened first, and not counted: pools and buffers that come with the first calls.
const WARM: u32 = 100;
/// Opened for one sample.
const BATCH: u32 = 500;
/// Handshakes at once.
const OPENING_MAX: usize = 16;
/// Before memory is read.
const SETTLE: Duration = Duration::from_millis(300);
/// How long it takes for one target, starting included, as seen on two cores.
pub(super) const TAKES: Duration = Duration::from_secs(5);

/// Opens `samples` batches of connections to the proxy of `peer` that is called; nothing for a
/// target without one.
///
/// # Errors
///
/// When a connection cannot be made or its one call is not answered with 200.
pub(super) async fn measure(peer: &Peer, samples: u32) -> anyhow::Result<Option<IdleFacts>> {
    let (Some(inbound), Some(hop)) = (&peer.inbound, peer.hops.last()) else {
        return Ok(None);
    };
    let target = Target::prepare(&inbound.call("/bytes/100", KeyExchange::Hybrid)?).await?;
    let tasks = Rc::new(RefCell::new(JoinSet::new()));
    let resident = || resident_kib(hop.pid).with_context(|| format!("{} has ended", hop.name));
    let mut held = hold(&target, WARM, &tasks).await?;
    sleep(SETTLE).await;
    let mut before = resident()?;
    let mut bytes = Vec::new();
    for _ in 0..samples {
        held.extend(hold(&target, BATCH, &tasks).await?);
        sleep(SETTLE).await;
        let after = resident()?;
        bytes.push(grown(before, after) * 1024.0 / f64::from(BATCH));
        before = after;
    }
    Ok(Some(IdleFacts {
        target: peer.name.clone(),
        connections_per_sample: BATCH,
        bytes_per_connection: bytes,
    }))
}

/// KiB from `before` to `after`; below 0 when memory was given back.
#[expect(clippy::cast_precision_loss, reason = "memory below 2^53 KiB")]
fn grown(before: u64, after: u64) -> f64 {
    after as f64 - before as f64
}

/// Opens `count` connections, with one call on each.
///
/// # Errors
///
/// When a connection cannot be made or its call is not answered with 200.
pub(crate) async fn hold(
    target: &Target,
    count: u32,
    tasks: &Rc<RefCell<JoinSet<()>>>,
) -> anyhow::Result<Vec<Held>> {
    let opening = stream::iter(0..count).map(|_| async move {
        let (held, status) = held::open(target, tasks).await?;
        ensure!(status == 200, "an idle connection's call got {status}");
        Ok(held)
    });
    opening.buffer_unordered(OPENING_MAX).try_collect().await
}
