//! `sidegate-injector`: the webhooks as a process.
//!
//! Invariant: only this file decides to exit: 0 done, 1 failed, 2 wrong usage or configuration.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::Parser;
use sidegate_injector::{Config, Injector};
use sidegate_mesh::clock::Clock;
use sidegate_mesh::diagnostics;
use sidegate_mtls::SystemClock;
use tokio::signal::unix::{SignalKind, signal};

const FAILED: u8 = 1;
const WRONG_USAGE: u8 = 2;

/// Threads that serve the API server.
const WORKERS: usize = 2;

/// Sidegate's webhooks: injects sidecars into pods, and validates resources.
#[derive(Debug, Parser)]
#[command(
    name = "sidegate-injector",
    version,
    after_help = "Example:\n  sidegate-injector --config /etc/sidegate/injector.yaml"
)]
struct Cli {
    /// Configuration file.
    #[arg(long, default_value = "/etc/sidegate/injector.yaml")]
    config: PathBuf,
    /// Prints the configuration with its defaults, and ends.
    #[arg(long)]
    print_config: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let config = match Config::load(&cli.config) {
        Ok(config) => config,
        Err(error) => return fail(WRONG_USAGE, &anyhow::Error::new(error)),
    };
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    if !cli.print_config {
        let level = diagnostics::level_from_env(config.log_level.as_str());
        if let Err(error) = diagnostics::install(&level, Arc::clone(&clock)) {
            return fail(WRONG_USAGE, &anyhow::Error::new(error));
        }
    }
    match run(&cli, config, clock) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(FAILED, &error),
    }
}

fn fail(code: u8, error: &anyhow::Error) -> ExitCode {
    // With standard error gone there is nobody to tell.
    writeln!(io::stderr(), "sidegate-injector: {error:#}").ok();
    ExitCode::from(code)
}

fn run(cli: &Cli, config: Config, clock: Arc<dyn Clock>) -> anyhow::Result<()> {
    if cli.print_config {
        let text = serde_saphyr::to_string(&config)?;
        return io::stdout()
            .write_all(text.as_bytes())
            .context("cannot print");
    }
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .build()?
        .block_on(serve_until_told(config, clock))
}

async fn serve_until_told(config: Config, clock: Arc<dyn Clock>) -> anyhow::Result<()> {
    // Before anything is started, so that no signal is missed.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let client = kube::Client::try_default().await;
    let client = client.context("this is not a pod of a cluster, and there is no kubeconfig")?;
    let injector = Injector::start(config, client, clock)
        .await
        .context("cannot start")?;
    tracing::info!(address = %injector.address(), "injector started");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("injector ends");
    injector.shutdown().await;
    Ok(())
}
