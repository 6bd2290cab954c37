//! Keepalive: finds out that the other end of a connection is gone though nothing says so.
//!
//! Invariant: at most one ping is under way on a connection.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{Either, select};
use h2::{Ping, PingPong};
use sidegate_mesh::Clock;

/// Pings every `interval`; returns when the peer did not answer within `timeout`, or when the
/// connection has ended. Runs beside the task that drives the connection.
pub async fn watch(
    mut ping_pong: PingPong,
    clock: Arc<dyn Clock>,
    interval: Duration,
    timeout: Duration,
) {
    loop {
        clock.sleep(interval).await;
        if ping_pong.send_ping(Ping::opaque()).is_err() {
            return;
        }
        let pong = poll_fn(|cx| ping_pong.poll_pong(cx));
        match select(std::pin::pin!(pong), clock.sleep(timeout)).await {
            Either::Left((Ok(_), _)) => {}
            Either::Left((Err(_), _)) | Either::Right(_) => return,
        }
    }
}
