//! `sidegate-loadtest`: measures what a mesh costs its users.
//!
//! Invariant: only this file decides to exit, and with which code: 0 done, 1 failed, regressed or
//! nothing answered, 2 wrong usage. Data goes to standard output, all else to standard error.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use rustix::process::{Resource, getrlimit, setrlimit};

use crate::cli::{Cli, Command, Usage};

mod backend;
mod baseline;
mod children;
mod cli;
mod clock;
mod compare;
mod engine;
mod failure;
mod goals;
mod http1;
mod http2;
mod machine;
mod merge;
mod plain;
mod progress;
mod recorder;
mod reflection;
mod report;
mod results;
mod schedule;
mod summary;
mod sweep;
mod table;
mod target;
mod tls;
mod usage;
mod verdict;

fn main() -> ExitCode {
    let cli = Cli::parse();
    raise_files_max();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build_local(tokio::runtime::LocalOptions::default());
    let done = runtime.map_err(Into::into).and_then(|runtime| {
        let done = runtime.block_on(run(cli.command));
        runtime.shutdown_background();
        done
    });
    match done {
        Ok(code) => code,
        Err(error) => {
            // With standard error gone there is nobody to tell.
            writeln!(io::stderr(), "sidegate-loadtest: {error:#}").ok();
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}

/// As many open files as this user may have: thousands of connections are more than the usual 1024.
/// The proxies inherit it.
fn raise_files_max() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Where it cannot be raised, the connection that is one too many says so.
    setrlimit(Resource::Nofile, limit).ok();
}

async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Run(options) => cli::run(*options).await,
        Command::Compare(options) => compare::compare(*options).await,
        Command::Sweep(options) => sweep::sweep(*options).await,
        Command::Report(options) => merge::report(&options),
        Command::Backend(options) => backend::serve(options).await,
    }
}
