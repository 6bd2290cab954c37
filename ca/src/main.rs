//! `sidegate-ca`: serves, or asks a running CA.
//!
//! Invariant: only this file decides to exit: 0 done, 1 failed, 2 wrong usage or configuration.

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::Parser;
use sidegate_ca::{Ca, Config};
use sidegate_mesh::clock::Clock;
use sidegate_mesh::diagnostics;
use sidegate_mtls::SystemClock;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::{Cli, Command, Serve};

mod cli;

/// Threads that serve sidecars; signing is a matter of microseconds.
const WORKERS: usize = 2;

/// Wrong usage or configuration, as opposed to a failure.
#[derive(Debug)]
pub(crate) struct Usage(pub(crate) anyhow::Error);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#}", self.0)
    }
}

impl std::error::Error for Usage {}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // With standard error gone there is nobody to tell.
            writeln!(io::stderr(), "sidegate-ca: {error:#}").ok();
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Serve(options) => serve(&options),
        command => tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?
            .block_on(cli::run(command)),
    }
}

fn serve(options: &Serve) -> anyhow::Result<()> {
    let config = Config::load(&options.config).map_err(|error| Usage(error.into()))?;
    if options.print_config {
        return cli::write_out(&serde_saphyr::to_string(&config)?);
    }
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let level = diagnostics::level_from_env("info");
    diagnostics::install(&level, Arc::clone(&clock)).map_err(|error| Usage(error.into()))?;
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
    let running = tokio::select! {
        started = Ca::start(config, clock) => started.context("cannot start")?,
        // In a cluster a start may wait for the API server.
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    running.shutdown().await;
    Ok(())
}
