//! `sidegate`: the command line of the mesh.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage or configuration.

#[allow(dead_code, reason = "the demo prints its log with it")]
mod logs;
mod output;
mod top;

use std::process::ExitCode;

use clap::Parser;

/// A zero-trust sidecar mesh: identity, policy and a log of every call.
#[derive(Parser)]
#[command(name = "sidegate", version)]
enum Cli {
    Logs(logs::LogsArgs),
    Top(top::TopArgs),
}

fn main() -> anyhow::Result<ExitCode> {
    let code = match Cli::parse() {
        Cli::Logs(arguments) => logs::run(&arguments),
        Cli::Top(arguments) => top::run(&arguments),
    };
    code.map(ExitCode::from)
}
