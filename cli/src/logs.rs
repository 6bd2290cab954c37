//! `sidegate logs`: calls, as the sidecars wrote them down.
//!
//! Invariants: no byte that a peer chose steers the terminal; a line that cannot be read is shown
//! as such and never left out.

mod cluster;
mod denials;
pub(crate) mod filter;
mod glob;
pub(crate) mod show;
pub(crate) mod source;

use std::fs::File;
use std::io::{self, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use time::OffsetDateTime;

use crate::kube::ClusterArgs;
use crate::output::Format;
use filter::{Filter, Status};
use show::{Entry, Printer};
use source::{Folder, Raw};

/// Longest time from a line's arrival in a file to its appearance with `-f`.
const POLL: Duration = Duration::from_millis(200);

const EXAMPLES: &str = "\
Without --dir and --file, the sidecars of a cluster are asked, as kubectl would: those of the
context's namespace, of -n NS, or with -A of all. WORKLOAD is a service account, a pod, or a
Deployment, StatefulSet, DaemonSet, ReplicaSet, Job or CronJob; KIND/NAME, such as deploy/orders
or sa/orders, takes one kind only, and NS/NAME says the namespace.

A call is written down by both its sidecars; the called side is authoritative. Of a whole folder or
namespace each call is shown once: inbound records, and outbound ones of calls that failed before a
called side could write them down, that left the mesh, or whose called side is in another namespace.
With WORKLOAD, or from one file, all records are shown. Times are UTC.

Calls are shown in the order of their starts. With -f they are shown when they end, in order within
half a second. With --denied the refusals that the sidecars remember are shown too, since a node
throws old logs away.

Examples:
  sidegate logs -n shop -f --denied                    refusals in a namespace as they happen
  sidegate logs deploy/orders -n shop --status 5xx --slower-than 50ms
  sidegate logs -A --since 10m --from jobs/batch
  sidegate logs --dir /tmp/mesh                        every call of a demo, newest last
  sidegate logs --dir /tmp/mesh --from shop/web --path '/orders/**' --since 10m
  kubectl logs deploy/orders -c sidegate-proxy | sidegate logs --file -";

/// Calls: who called what, what was decided, how it ended.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
#[command(group(clap::ArgGroup::new("log").args(["dir", "file"])
    .conflicts_with_all(["kubeconfig", "context", "all_namespaces"])))]
#[expect(clippy::struct_excessive_bools, reason = "switches of a command line")]
pub(crate) struct LogsArgs {
    /// Only records of this workload's sidecars, by any of its names; from a folder, its service
    /// account, or namespace/account.
    workload: Option<String>,
    /// Namespace of WORKLOAD; without WORKLOAD, only records of this namespace's sidecars.
    #[arg(short, long, value_name = "NS")]
    namespace: Option<String>,
    /// The sidecars of all namespaces.
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    all_namespaces: bool,
    /// Go on with new calls, through rotations and restarts, into new files and pods, until Ctrl-C.
    #[arg(short, long)]
    follow: bool,
    /// Only calls that started within this time, such as `10m`.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    since: Option<Duration>,
    /// Only calls that were denied, or would have been.
    #[arg(long)]
    denied: bool,
    /// Only calls that failed: errors, 5xx, gRPC statuses other than OK, refusals.
    #[arg(long)]
    errors: bool,
    /// Only calls of this caller: SPIFFE ID, namespace/account or service account.
    #[arg(long, value_name = "ID")]
    from: Option<String>,
    /// Only calls to this identity, or to a service such as `orders.shop:80`.
    #[arg(long, value_name = "ID")]
    to: Option<String>,
    /// Only this HTTP or gRPC method; may be repeated.
    #[arg(long, value_name = "M")]
    method: Vec<String>,
    /// Only paths like this: `*` is one segment or a part of one, `**` any number of segments.
    #[arg(long, value_name = "GLOB")]
    path: Option<String>,
    /// Only this outcome: `404`, `5xx`, `grpc:7` or `grpc:NOT_FOUND`; may be repeated.
    #[arg(long, value_name = "STATUS")]
    status: Vec<Status>,
    /// Only calls that took longer, such as `50ms`.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    slower_than: Option<Duration>,
    /// Which side's records; `auto` is said below.
    #[arg(long, value_enum, default_value_t)]
    direction: Side,
    /// Show what the sidecars say about themselves, too.
    #[arg(long)]
    diagnostics: bool,
    /// Folder of `sidegate demo --dir DIR`; its logs are DIR/logs/*.log.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// One file; `-` is standard input.
    #[arg(long, value_name = "F")]
    file: Option<PathBuf>,
    /// How they are printed; JSON is one object a line.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// Whose records are shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Side {
    /// Each call once, or all records of one workload or file.
    #[default]
    Auto,
    /// Those of the called sides.
    In,
    /// Those of the calling sides.
    Out,
    /// All.
    All,
}

/// Prints the calls that the arguments ask for.
///
/// # Errors
///
/// When there is no log, or it cannot be read.
pub(crate) fn run(arguments: &LogsArgs) -> anyhow::Result<u8> {
    let stdout = io::stdout();
    let colours =
        stdout.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|no| no.is_empty());
    let mut printer = Printer::new(stdout.lock(), arguments.output, colours);
    if arguments.dir.is_none() && arguments.file.is_none() {
        return cluster::run(arguments, &mut printer);
    }
    quiet(show_calls(
        arguments,
        &mut printer,
        OffsetDateTime::now_utc(),
    ))?;
    Ok(0)
}

/// Prints every call of `dir` once, as a table: what the demo ends with.
///
/// # Errors
///
/// When there is no log, or it cannot be read.
pub(crate) fn print_dir(dir: &Path) -> anyhow::Result<()> {
    let mut printer = Printer::new(io::stdout().lock(), Format::Table, false);
    let filter = Filter::each_call_once();
    let mut folder = Folder::open(&dir.join("logs"))?;
    let entries = read_folder(&mut folder, &filter, true)?;
    quiet(printer.print(entries))
}

fn show_calls(
    arguments: &LogsArgs,
    printer: &mut Printer<impl Write>,
    now: OffsetDateTime,
) -> anyhow::Result<()> {
    let filter = Filter::new(arguments, now)?;
    match (&arguments.dir, &arguments.file) {
        (Some(dir), _) => show_folder(&dir.join("logs"), arguments.follow, &filter, printer),
        (None, Some(file)) if file.as_os_str() == "-" => {
            let lines = source::lines(BufReader::new(io::stdin().lock()), "stdin");
            show_stream(lines, arguments.follow, &filter, printer)
        }
        (None, Some(file)) => show_file(file, arguments.follow, &filter, printer),
        (None, None) => Ok(()),
    }
}

fn show_folder(
    dir: &Path,
    follow: bool,
    filter: &Filter,
    printer: &mut Printer<impl Write>,
) -> anyhow::Result<()> {
    let mut folder = Folder::open(dir)?;
    if !follow {
        return printer.print(read_folder(&mut folder, filter, true)?);
    }
    loop {
        printer.print(read_folder(&mut folder, filter, false)?)?;
        std::thread::sleep(POLL);
    }
}

fn show_file(
    path: &Path,
    follow: bool,
    filter: &Filter,
    printer: &mut Printer<impl Write>,
) -> anyhow::Result<()> {
    let name = path.display().to_string();
    if follow {
        let mut folder = Folder::of_file(path)?;
        loop {
            printer.print(read_folder(&mut folder, filter, false)?)?;
            std::thread::sleep(POLL);
        }
    }
    let file = File::open(path).with_context(|| format!("cannot read {name}"))?;
    show_stream(
        source::lines(BufReader::new(file), &name),
        false,
        filter,
        printer,
    )
}

/// A stream that ends is sorted; one that is followed is shown as it comes.
fn show_stream(
    lines: impl Iterator<Item = io::Result<Raw>>,
    follow: bool,
    filter: &Filter,
    printer: &mut Printer<impl Write>,
) -> anyhow::Result<()> {
    let mut entries = Vec::new();
    for raw in lines {
        entries.extend(filter.entry(raw?));
        if follow {
            printer.print(std::mem::take(&mut entries))?;
        }
    }
    printer.print(entries)
}

fn read_folder(folder: &mut Folder, filter: &Filter, finish: bool) -> anyhow::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    folder.read(finish, |raw| entries.extend(filter.entry(raw)))?;
    Ok(entries)
}

/// Whoever reads us (`head`, a pager) has had enough: that is no failure.
fn quiet(result: anyhow::Result<()>) -> anyhow::Result<()> {
    let broken = |error: &anyhow::Error| {
        let io = |cause: &io::Error| cause.kind() == io::ErrorKind::BrokenPipe;
        error
            .chain()
            .any(|cause| cause.downcast_ref().is_some_and(io))
    };
    match result {
        Err(error) if broken(&error) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests;
