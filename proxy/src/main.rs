//! `sidegate-proxy`: the sidecar as a process.
//!
//! Invariant: only this file decides to exit, and with which code: 0 done, 1 failed, 2 wrong usage
//! or configuration.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use sidegate_mesh::diagnostics;
use sidegate_mtls::SystemClock;
use sidegate_proxy::config::Config;
use sidegate_proxy::sidecar::{Sidecar, StartError};
use sidegate_proxy::wait;
use tikv_jemallocator::Jemalloc;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{error, warn};

/// Calls allocate pieces of several KiB, which glibc's `malloc` is slow at and does not give back
/// after a burst: `docs/performance.md`. How it is set up stands in `.cargo/config.toml`.
#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

const FAILED: u8 = 1;
const WRONG_USAGE: u8 = 2;

/// The Sidegate sidecar.
#[derive(Debug, Parser)]
#[command(
    name = "sidegate-proxy",
    version,
    args_conflicts_with_subcommands = true,
    after_help = "Example: sidegate-proxy --config orders.yaml\n\nWithout --config the configuration \
                  is read from the environment, where the injector puts it: SIDEGATE_CONFIG, \
                  POD_NAME, POD_UID, POD_IPS, NODE_NAME."
)]
struct Cli {
    #[command(flatten)]
    run: Run,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Args, Debug)]
struct Run {
    /// The configuration, YAML; without it, `SIDEGATE_CONFIG` holds it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print the configuration with every default, secrets redacted, and exit.
    #[arg(long)]
    print_config: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Wait until a sidecar is ready.
    #[command(after_help = "Example: sidegate-proxy wait --timeout 30s")]
    Wait {
        /// How long at most.
        #[arg(long, default_value = "60s", value_parser = humantime::parse_duration)]
        timeout: Duration,
        /// What to ask.
        #[arg(long, default_value = "http://127.0.0.1:19021/readyz")]
        url: String,
    },
    /// Print the version.
    #[command(after_help = "Example: sidegate-proxy version -o json")]
    Version {
        /// How.
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    Table,
    Json,
    Yaml,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match (cli.command, cli.run.config) {
        (Some(Command::Wait { timeout, url }), _) => wait_for(&url, timeout),
        (Some(Command::Version { output }), _) => print(&version(output)),
        (None, file) => return run(file.as_deref(), cli.run.print_config),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(FAILED, &format!("{error:#}")),
    }
}

fn run(file: Option<&Path>, print_only: bool) -> ExitCode {
    let config = match file {
        Some(path) => Config::from_file(path),
        None if std::env::var_os("SIDEGATE_CONFIG").is_some() => {
            Config::from_environment(|name| std::env::var(name).ok())
        }
        None => return fail(WRONG_USAGE, "--config FILE is needed; see --help"),
    };
    let config = match config {
        Ok(config) => config,
        Err(error) => return fail(WRONG_USAGE, &format!("{:#}", anyhow::Error::new(error))),
    };
    if print_only {
        return match print(&config.to_yaml()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(FAILED, &format!("{error:#}")),
        };
    }
    if let Err(error) = diagnostics::install(&config.diagnostics.level, Arc::new(SystemClock)) {
        return fail(WRONG_USAGE, &format!("{:#}", anyhow::Error::new(error)));
    }
    hide_memory();
    let serve = || block_on(serve(config))?;
    match serve() {
        Ok(code) => code,
        Err(error) => {
            let usage = error.downcast_ref::<StartError>().is_some_and(is_usage);
            // A diagnostic, as everything from here on: whoever reads the stream expects JSON lines.
            error!(error = format!("{error:#}"), "sidecar failed");
            ExitCode::from(if usage { WRONG_USAGE } else { FAILED })
        }
    }
}

/// Whether the configuration is at fault, and not the moment.
fn is_usage(error: &StartError) -> bool {
    matches!(error, StartError::Config(_) | StartError::Workload(_))
}

/// Neither a core dump nor another process of the same user shall see keys.
fn hide_memory() {
    let hidden =
        rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    if let Err(error) = hidden {
        warn!(%error, "this process can be dumped");
    }
}

async fn serve(config: Config) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::new()?;
    let sidecar = Sidecar::start(config, Arc::new(SystemClock))?;
    loop {
        tokio::select! {
            asked = signals.next() => match asked {
                Asked::End => break,
                Asked::Reopen => sidecar.shared().log.reopen(),
            },
            failure = sidecar.failed() => return Err(failure.into()),
        }
    }
    tokio::select! {
        clean = sidecar.drain() => {
            if !clean {
                warn!("calls were cut at the end of the drain");
            }
            Ok(ExitCode::SUCCESS)
        }
        () = signals.end() => {
            warn!("second signal, exit without waiting for open calls");
            Ok(ExitCode::from(FAILED))
        }
        failure = sidecar.failed() => Err(failure.into()),
    }
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    /// To end: SIGTERM, SIGINT.
    End,
    /// To open the access log anew: SIGHUP.
    Reopen,
}

/// The signals that are heard.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        let of = |kind| signal(kind).context("signals cannot be received");
        Ok(Self {
            terminate: of(SignalKind::terminate())?,
            interrupt: of(SignalKind::interrupt())?,
            hang_up: of(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.terminate.recv() => Asked::End,
            _ = self.interrupt.recv() => Asked::End,
            _ = self.hang_up.recv() => Asked::Reopen,
        }
    }

    async fn end(&mut self) {
        while self.next().await != Asked::End {}
    }
}

fn wait_for(url: &str, timeout: Duration) -> anyhow::Result<()> {
    block_on(wait::until_ready(url, timeout))??;
    print("ready\n")
}

fn block_on<T>(future: impl Future<Output = T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("no runtime")?;
    let result = runtime.block_on(future);
    runtime.shutdown_background();
    Ok(result)
}

fn version(output: Output) -> String {
    let version = env!("CARGO_PKG_VERSION");
    match output {
        Output::Table => format!("sidegate-proxy {version}\n"),
        Output::Json => format!("{{\"name\":\"sidegate-proxy\",\"version\":\"{version}\"}}\n"),
        Output::Yaml => format!("name: sidegate-proxy\nversion: {version}\n"),
    }
}

fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).context("cannot print")?;
    out.flush().context("cannot print")
}

fn fail(code: u8, message: &str) -> ExitCode {
    // With standard error closed there is nobody to tell; the code still says it.
    drop(writeln!(std::io::stderr().lock(), "{message}"));
    ExitCode::from(code)
}
