//! `sidegate demo`: the whole mesh on localhost.

use std::io::{self, IsTerminal, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use sidegate_examples::calls::{self, Outcome};
use sidegate_examples::mesh::{Description, LEDGER, Shop};
use sidegate_local::SystemClock;

use crate::logs;
use crate::output::{Format, print_table};

const EXAMPLE: &str = "Examples:
  sidegate demo                     runs until Ctrl-C and prints what to try
  sidegate demo --dir /tmp/mesh     keeps policies and logs where you can edit and read them
  sidegate demo --once              makes its calls, prints them and the log, and ends";

/// The whole mesh on localhost: CA, sidecars, the sample shop.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct DemoArgs {
    /// Make the calls, print them and the log, and exit 0 only if every call ended as it should.
    #[arg(long)]
    once: bool,
    /// Keep resources, logs and `demo.json` (every address) in DIR, instead of a folder that goes with the demo.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// How the calls are printed.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// Runs the demo to its end.
///
/// # Errors
///
/// When the folder cannot be used or a part of the mesh does not start.
pub(crate) fn run(arguments: &DemoArgs) -> anyhow::Result<u8> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let temporary = match &arguments.dir {
        Some(_) => None,
        None => Some(
            tempfile::Builder::new()
                .prefix("sidegate-demo-")
                .tempdir()?,
        ),
    };
    let dir = match (&arguments.dir, &temporary) {
        (Some(dir), _) => std::path::absolute(dir)?,
        (None, Some(temporary)) => temporary.path().to_owned(),
        (None, None) => std::env::temp_dir(),
    };
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let code = runtime.block_on(demo(arguments, &dir))?;
    Ok(code)
}

async fn demo(arguments: &DemoArgs, dir: &Path) -> anyhow::Result<u8> {
    let started = Instant::now();
    let shop = Shop::open(dir, Arc::new(SystemClock)).await?;
    let took_ms = started.elapsed().as_millis();
    let outcomes = calls::make_all(&shop).await?;
    let description = shop.describe();
    if arguments.once {
        // Closing drains the sidecars, and a drained sidecar has written its log.
        shop.close().await;
        print_calls(&outcomes, arguments.output)?;
        if arguments.output == Format::Table {
            print_log(dir)?;
        }
        return Ok(verdict(&outcomes));
    }
    shop.flush_logs().await;
    print_mesh(&description, took_ms)?;
    print_calls(&outcomes, Format::Table)?;
    print_log(dir)?;
    print_suggestions(&description, dir)?;
    // Written last: whoever waits for the file finds a mesh that works.
    shop.write_description(dir)?;
    stop_requested().await?;
    writeln!(io::stderr(), "\nending: open calls may finish")?;
    shop.close().await;
    Ok(verdict(&outcomes))
}

/// 0 when every call ended as it should, else 1.
fn verdict(outcomes: &[Outcome]) -> u8 {
    u8::from(!outcomes.iter().all(Outcome::is_expected))
}

async fn stop_requested() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted?,
        _asked = terminate.recv() => {}
    }
    Ok(())
}

fn print_mesh(description: &Description, took_ms: u128) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let count = description.sidecars.len();
    writeln!(
        out,
        "A CA and {count} sidecars are up after {took_ms} ms, trust domain {}.\n",
        description.trust_domain
    )?;
    let header = [
        "WORKLOAD",
        "OUTBOUND",
        "INBOUND",
        "ADMIN",
        "HEALTH",
        "APPLICATION",
    ];
    let rows = description.sidecars.iter().map(|sidecar| {
        let application = sidecar
            .application
            .map_or_else(|| "-".to_owned(), |at| at.to_string());
        vec![
            sidecar.workload.clone(),
            sidecar.outbound.to_string(),
            sidecar.inbound.to_string(),
            sidecar.admin.to_string(),
            sidecar.health.to_string(),
            application,
        ]
    });
    print_table(&mut out, &header, rows)?;
    writeln!(
        out,
        "\nca {}, its root {}",
        description.ca.address,
        description.ca.root.display()
    )
}

fn print_calls(outcomes: &[Outcome], format: Format) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    if format != Format::Table {
        return format.print(&mut out, &outcomes);
    }
    writeln!(out, "\nThe calls it made:\n")?;
    let rows = outcomes.iter().map(|outcome| {
        let mark = if outcome.is_expected() { "✔" } else { "✘" };
        let actual = if outcome.is_expected() {
            outcome.actual.clone()
        } else {
            format!("{} (expected: {})", outcome.actual, outcome.expected)
        };
        vec![
            mark.to_owned(),
            outcome.caller.to_owned(),
            outcome.call.to_owned(),
            actual,
            format!("{:.1}", outcome.ms),
        ]
    });
    print_table(&mut out, &["", "CALLER", "CALL", "OUTCOME", "MS"], rows)?;
    Ok(())
}

fn print_log(dir: &Path) -> anyhow::Result<()> {
    writeln!(io::stdout(), "\nThe log, as `sidegate logs` shows it:\n")?;
    logs::print_dir(dir)
}

/// Commands that work as pasted.
fn print_suggestions(description: &Description, dir: &Path) -> io::Result<()> {
    let outbound = |workload: &str| {
        let sidecar = description
            .sidecars
            .iter()
            .find(|sidecar| sidecar.workload == workload);
        sidecar.map_or_else(String::new, |sidecar| sidecar.outbound.to_string())
    };
    let (web, batch) = (outbound("shop/web"), outbound("jobs/batch"));
    let ledger = description
        .sidecars
        .iter()
        .find_map(|sidecar| sidecar.upstreams.get(LEDGER));
    let ledger_port = ledger.map_or(0, SocketAddr::port);
    let resources = description.resources.display();
    let dir = dir.display();
    let sidegate = program();
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "
Try, from another terminal:

  curl -x http://{web} http://orders.shop/orders/7            # as shop/web: 200
  curl -i -x http://{batch} http://orders.shop/orders/7         # as jobs/batch: 403, with a decision
  curl -x http://{web} http://orders.shop/headers             # what orders sees
  grpcurl -plaintext -authority inventory.shop {web} list
  grpcurl -plaintext -authority inventory.shop -d '{{\"sku\":\"tea\"}}' {web} shop.v1.Inventory/Get
  nc 127.0.0.1 {ledger_port}                                           # the ledger, as shop/web: it speaks first
  {sidegate} logs --dir {dir} -f
  {sidegate} logs --dir {dir} --denied
  {sidegate} top --dir {dir}
  {sidegate} authz test --dir {dir} --from jobs/batch --to shop/orders --method GET --path /orders/7
  $EDITOR {resources}/orders.yaml                  # live in under a second"
    )?;
    if io::stdout().is_terminal() {
        writeln!(out, "\nCtrl-C ends it.")?;
    }
    out.flush()
}

/// This program as a user may type it: by its path from here, or by its name when it lies elsewhere.
fn program() -> String {
    let path = std::env::current_exe().ok();
    let here = std::env::current_dir().ok();
    let below = path
        .zip(here)
        .and_then(|(path, here)| Some(path.strip_prefix(here).ok()?.to_owned()));
    below.map_or_else(|| "sidegate".to_owned(), |path| path.display().to_string())
}
