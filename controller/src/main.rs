//! `sidegate-controller`: serves until it is told to stop.
//!
//! Invariant: only this file decides to exit: 0 done, 1 failed, 2 wrong usage or configuration.

use std::io::{self, Write as _};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Parser;
use sidegate_controller::{Config, Controller, Surroundings};
use sidegate_mesh::clock::Clock;
use sidegate_mesh::diagnostics;
use sidegate_mtls::SystemClock;
use tokio::signal::unix::{SignalKind, signal};

/// Threads; the index is one lock, so more of them help little.
const WORKERS: usize = 2;

/// Tells each sidecar of a cluster what concerns it: policies, services, endpoints.
///
/// Example: sidegate-controller --config /etc/sidegate/controller.yaml
#[derive(Debug, Parser)]
#[command(name = "sidegate-controller", version)]
struct Arguments {
    /// The configuration; without one every default holds.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Prints the configuration as it was understood, and exits.
    #[arg(long)]
    print_config: bool,
    /// The name of this replica.
    #[arg(long, env = "POD_NAME", default_value = "sidegate-controller")]
    pod_name: String,
    /// The address at which the other replicas reach this one.
    #[arg(long, env = "POD_IP")]
    pod_ip: Option<IpAddr>,
}

/// Wrong usage or configuration, as opposed to a failure.
#[derive(Debug)]
struct Usage(anyhow::Error);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#}", self.0)
    }
}

impl std::error::Error for Usage {}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // With standard error gone there is nobody to tell.
            writeln!(io::stderr(), "sidegate-controller: {error:#}").ok();
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    let config = match &arguments.config {
        Some(path) => Config::load(path).map_err(|error| Usage(error.into()))?,
        None => Config::default(),
    };
    if arguments.print_config {
        write!(io::stdout(), "{}", serde_saphyr::to_string(&config)?)?;
        return Ok(());
    }
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let level = diagnostics::level_from_env("info");
    diagnostics::install(&level, Arc::clone(&clock)).map_err(|error| Usage(error.into()))?;
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .build()?
        .block_on(serve_until_told(config, arguments, clock))
}

async fn serve_until_told(
    config: Config,
    arguments: Arguments,
    clock: Arc<dyn Clock>,
) -> anyhow::Result<()> {
    // Before anything is started, so that no signal is missed.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let client = kube::Client::try_default()
        .await
        .context("cannot reach the cluster; set KUBECONFIG, or run in a pod")?;
    let surroundings = Surroundings {
        client,
        name: arguments.pod_name,
        address: arguments.pod_ip,
        clock,
    };
    let running = Controller::start(config, surroundings)
        .await
        .context("cannot start")?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    running.shutdown().await;
    Ok(())
}
