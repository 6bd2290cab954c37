//! The services of the shop, each a real server on an address of its own.

pub mod inventory;
pub mod ledger;
pub mod orders;
pub mod web;

use std::io;
use std::net::SocketAddr;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A service that runs until its shop ends.
#[derive(Clone, Debug)]
pub struct Running {
    /// Where it listens.
    pub address: SocketAddr,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Running {
    /// Stops accepting, lets open calls end, and returns when the server has gone.
    pub async fn stop(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Resolves when [`Self::stop`] was called.
    pub async fn stopping(&self) {
        self.stop.cancelled().await;
    }
}

/// Binds `listen` and serves with what `serve` makes of the listener and the signal to stop.
///
/// # Errors
///
/// The listener's error when `listen` cannot be bound.
async fn start<S, F>(listen: SocketAddr, serve: S) -> io::Result<Running>
where
    S: FnOnce(TcpListener, CancellationToken) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    start_on(TcpListener::bind(listen).await?, serve)
}

/// Serves with what `serve` makes of `listener` and the signal to stop.
///
/// # Errors
///
/// When the listener has no address.
fn start_on<S, F>(listener: TcpListener, serve: S) -> io::Result<Running>
where
    S: FnOnce(TcpListener, CancellationToken) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let running = Running {
        address: listener.local_addr()?,
        stop: CancellationToken::new(),
        tasks: TaskTracker::new(),
    };
    running.tasks.spawn(serve(listener, running.stop.clone()));
    Ok(running)
}
