//! One service of the sample shop as a process, for `examples/standalone` and for containers.

use std::net::SocketAddr;

use anyhow::Context;
use clap::{Parser, Subcommand};
use sidegate_examples::shop::{Running, inventory, ledger, orders, web};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// Runs one service of the sample shop until SIGTERM or Ctrl-C.
#[derive(Parser)]
#[command(
    version,
    after_help = "Example:\n  sidegate-shop orders --listen 127.0.0.1:8081"
)]
struct Arguments {
    #[command(subcommand)]
    service: Service,
}

#[derive(Subcommand)]
enum Service {
    /// REST and WebSocket.
    Orders(Listen),
    /// gRPC with server reflection.
    Inventory(Listen),
    /// Opaque TCP; the server speaks first.
    Ledger(Listen),
    /// Calls the three others through its sidecar.
    Web {
        #[command(flatten)]
        listen: Listen,
        /// The outbound listener of its sidecar.
        #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:19001")]
        outbound: SocketAddr,
        /// The port of its sidecar that is bound to `ledger`.
        #[arg(long, value_name = "ADDRESS")]
        ledger: SocketAddr,
    },
}

#[derive(clap::Args)]
struct Listen {
    /// Where to listen; port 0 takes a free one, which is printed.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let running = start(Arguments::parse().service)
        .await
        .context("could not listen")?;
    announce(running.address)?;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        _asked = terminate.recv() => {}
        interrupted = tokio::signal::ctrl_c() => interrupted?,
    }
    running.stop().await;
    Ok(())
}

async fn start(service: Service) -> std::io::Result<Running> {
    match service {
        Service::Orders(at) => orders::serve(at.listen).await,
        Service::Inventory(at) => inventory::serve(at.listen).await,
        Service::Ledger(at) => ledger::serve(at.listen).await,
        Service::Web {
            listen,
            outbound,
            ledger,
        } => {
            let listener = TcpListener::bind(listen.listen).await?;
            web::serve(listener, web::Reach { outbound, ledger })
        }
    }
}

fn announce(address: SocketAddr) -> std::io::Result<()> {
    use std::io::Write;
    writeln!(std::io::stdout(), "listening on {address}")
}
