//! `compare`: the same calls direct and through each peer, interleaved and repeated.
//!
//! Invariant: every target lives for the whole comparison, and a repetition of a load visits all of
//! them before the next begins, so that what the machine does meanwhile touches all alike.

use std::io::{self, BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::sync::watch;
use tokio::task::JoinSet;

use self::launch::{EXTRA, Launcher, TARGETS};
use self::peer::Peer;
use self::plan::{IDLE, IDLE_SHORT, LOADS, Planned};
use crate::cli::{Compare, Usage};
use crate::engine::{self, Load, Observer};
use crate::goals;
use crate::plain;
use crate::progress::{self, Bar};
use crate::results::{self, IdleFacts, LoadFacts, Results, Run};
use crate::summary::{self, DIRECT};
use crate::table;
use crate::target::{Call, Target};
use crate::usage::{Cpu, of_process, resident_kib};

mod certificates;
pub(crate) mod envoy;
mod gate;
mod haproxy;
mod held;
pub(crate) mod idle;
pub(crate) mod launch;
pub(crate) mod limit;
mod nginx;
pub(crate) mod peer;
pub(crate) mod plan;
mod process;
mod sidegate;

/// Rules of the policy, of which the last admits the caller.
const RULES: usize = 20;
/// How long everything rests before idle memory is read.
pub(crate) const SETTLE: Duration = Duration::from_secs(2);
/// The folder of the report when none is named.
pub(crate) const REPORT: &str = "report";

/// Runs the comparison.
///
/// # Errors
///
/// [`Usage`], or why a target could not be started or measured.
pub(crate) async fn compare(mut options: Compare) -> anyhow::Result<ExitCode> {
    options.output.report.get_or_insert_with(|| REPORT.into());
    let mut plan = Plan::new(&options).map_err(Usage)?;
    if options.loads.iter().any(|load| load == "list") {
        for load in LOADS {
            writeln!(io::stdout(), "{:12}{}", load.short, load.name)?;
        }
        writeln!(io::stdout(), "{IDLE_SHORT:12}{IDLE}")?;
        return Ok(ExitCode::SUCCESS);
    }
    let baseline = options.output.baseline()?;
    let mut tasks = JoinSet::new();
    let interrupt = progress::interrupt(&mut tasks)?;
    let folder = Folder::new(options.programs.work_dir.clone())?;
    let backend = BackendProcess::start()?;
    let mut notes = Vec::new();
    let starting = async {
        let at = (folder.path.clone(), backend.address);
        let programs = (&options.programs, !options.targets.is_empty());
        let launcher = Launcher::new(programs, &mut plan.targets, at, &mut notes).await?;
        let peers = start(&plan, &launcher, &mut notes).await?;
        anyhow::Ok((launcher, peers))
    };
    let (launcher, peers) = tokio::select! {
        started = starting => started?,
        () = told(interrupt.clone()) => bail!("interrupted before anything was measured"),
    };
    let runs = measure(&plan, &peers, interrupt.clone()).await?;
    let idle = idle_connections(&plan, &launcher, interrupt.clone()).await?;
    if *interrupt.borrow() {
        notes.push("Interrupted: loads and repetitions are missing.".to_owned());
    }
    let mut results = Results::new("compare", runs);
    results.idle_connections = idle;
    results.metrics = summary::metrics(&results.runs, &results.idle_connections);
    results.ratios = summary::ratios(&results.runs, &results.idle_connections);
    results.goals = goals::judge(&results);
    results.notes = notes;
    for peer in &peers {
        results.configurations.extend(peer.configurations.clone());
        results.versions.extend(peer.versions.clone());
    }
    let answered = results.runs.iter().all(|run| run.counts.answered > 0);
    let fine = options
        .output
        .finish(&results, &text(&results), baseline.as_ref())?;
    let broken = match options.cpu_ratio_max {
        Some(max) => limit::broken(&results.ratios, max)?,
        None => Vec::new(),
    };
    for line in &broken {
        writeln!(io::stderr(), "{line}")?;
    }
    Ok(if answered && fine && broken.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

pub(crate) async fn told(mut interrupt: watch::Receiver<bool>) {
    interrupt.wait_for(|told| *told).await.ok();
}

/// What is measured on what.
struct Plan {
    loads: Vec<Planned>,
    /// Whether the memory of idle connections is measured.
    idle: bool,
    targets: Vec<&'static str>,
    repetitions: u32,
    duration: Duration,
    warmup: Duration,
}

impl Plan {
    fn new(options: &Compare) -> anyhow::Result<Self> {
        let names = LOADS.iter().map(|load| load.short);
        let names: Vec<&str> = names.chain([IDLE_SHORT]).collect();
        let chosen_loads = chosen(&options.loads, &names, "load")?;
        let mut targets = chosen(&options.targets, TARGETS, "target")?;
        if options.targets.is_empty() {
            let with = &options.with;
            chosen(with, EXTRA, "peer")?;
            targets
                .retain(|target| !EXTRA.contains(target) || with.iter().any(|with| with == target));
        }
        if !targets.contains(&DIRECT) {
            targets.insert(0, DIRECT);
        }
        anyhow::ensure!(
            (1..=100).contains(&options.repetitions),
            "--repetitions is not from 1 to 100"
        );
        anyhow::ensure!(
            options.duration >= Duration::from_millis(100),
            "--duration is below 100ms"
        );
        let loads = LOADS.iter().copied();
        Ok(Self {
            loads: loads
                .filter(|load| chosen_loads.contains(&load.short))
                .collect(),
            idle: chosen_loads.contains(&IDLE_SHORT),
            targets,
            repetitions: options.repetitions,
            duration: options.duration,
            warmup: options.warmup,
        })
    }

    /// How many measurements of loads there are, and how long everything takes.
    fn amount(&self, peers: &[Peer]) -> (u32, Duration) {
        let (mut count, mut time) = (0, Duration::ZERO);
        for load in &self.loads {
            let suited = peers.iter().filter(|peer| load.suits(peer)).count();
            let runs = self.repetitions * u32::try_from(suited).unwrap_or(u32::MAX);
            count += runs;
            time += load.takes(self.duration, self.warmup) * runs;
        }
        let called = peers.iter().filter(|peer| peer.inbound.is_some()).count();
        if self.idle {
            time += idle::TAKES * u32::try_from(called).unwrap_or(u32::MAX);
        }
        (count, time)
    }
}

/// The names that were given, all when none was.
pub(crate) fn chosen<'a>(
    given: &[String],
    names: &[&'a str],
    kind: &str,
) -> anyhow::Result<Vec<&'a str>> {
    let known = |name: &String| name == "list" || names.contains(&name.as_str());
    if let Some(unknown) = given.iter().find(|name| !known(name)) {
        bail!(
            "there is no {kind} {unknown}; there are {}",
            names.join(", ")
        );
    }
    let wanted = |name: &&&str| given.is_empty() || given.iter().any(|given| given == **name);
    Ok(names.iter().filter(wanted).copied().collect())
}

async fn start(
    plan: &Plan,
    launcher: &Launcher,
    notes: &mut Vec<String>,
) -> anyhow::Result<Vec<Peer>> {
    let mut peers = Vec::new();
    for target in &plan.targets {
        peers.push(launcher.start(target, "loads").await?);
    }
    tokio::time::sleep(SETTLE).await;
    peers.iter_mut().for_each(Peer::note_idle);
    let agreed = peers.iter().filter_map(|peer| {
        let key_exchange = peer.key_exchange.as_ref()?;
        Some(format!("{} {key_exchange}", peer.name))
    });
    let agreed: Vec<String> = agreed.collect();
    if !agreed.is_empty() {
        notes.push(format!(
            "Key exchange of a new connection: {}.",
            agreed.join(", ")
        ));
    }
    let (count, time) = plan.amount(&peers);
    notes.push(format!(
        "{count} measurements of {} loads on {} targets, {} times each: about {:.1} minutes.",
        plan.loads.len(),
        peers.len(),
        plan.repetitions,
        time.as_secs_f64() / 60.0
    ));
    for note in notes.iter() {
        writeln!(io::stderr(), "{note}")?;
    }
    Ok(peers)
}

/// Memory of idle connections, on proxies that are started for it.
async fn idle_connections(
    plan: &Plan,
    launcher: &Launcher,
    interrupt: watch::Receiver<bool>,
) -> anyhow::Result<Vec<IdleFacts>> {
    let mut found = Vec::new();
    for target in plan.targets.iter().filter(|target| **target != DIRECT) {
        if !plan.idle || *interrupt.borrow() {
            break;
        }
        let bar = Bar::new(&format!("{IDLE}: {target}"));
        let measured = async {
            let peer = launcher.start(target, "idle").await?;
            idle::measure(&peer, plan.repetitions).await
        };
        tokio::select! {
            measured = measured => found.extend(measured.with_context(|| format!("{IDLE}: {target}"))?),
            () = told(interrupt.clone()) => {}
        }
        drop(bar);
    }
    Ok(found)
}

async fn measure(
    plan: &Plan,
    peers: &[Peer],
    mut interrupt: watch::Receiver<bool>,
) -> anyhow::Result<Vec<Run>> {
    let mut runs = Vec::new();
    for load in &plan.loads {
        for repetition in 1..=plan.repetitions {
            for peer in peers {
                if !load.suits(peer) {
                    continue;
                }
                let what = format!(
                    "{}: {} ({repetition} of {})",
                    load.name, peer.name, plan.repetitions
                );
                let work = Work {
                    name: load.name,
                    call: load.call(peer)?,
                    amount: load.load(plan.duration, plan.warmup),
                    repetition,
                };
                let run = put(work, peer, &what, &mut interrupt).await;
                if *interrupt.borrow() {
                    // The run that was cut short would be compared with whole ones.
                    return Ok(runs);
                }
                runs.push(run.with_context(|| what)?);
            }
        }
    }
    Ok(runs)
}

/// One load for one target.
pub(crate) struct Work<'a> {
    pub(crate) name: &'a str,
    pub(crate) call: Call,
    pub(crate) amount: Load,
    pub(crate) repetition: u32,
}

/// Puts a load on `peer` and measures it and its proxies; `what` is on the progress bar.
///
/// # Errors
///
/// When the target cannot be reached, or nothing answers.
pub(crate) async fn put(
    work: Work<'_>,
    peer: &Peer,
    what: &str,
    interrupt: &mut watch::Receiver<bool>,
) -> anyhow::Result<Run> {
    let amount = work.amount;
    let target = Target::prepare(&work.call).await?;
    // Calls on new connections go to the called side's proxy alone.
    let first = if amount.new_connections {
        peer.hops.len().saturating_sub(1)
    } else {
        0
    };
    let mut watch = Watch::new(what, peer.hops.get(first..).unwrap_or_default());
    let outcome = engine::run(&target, amount, interrupt, &mut watch).await?;
    let facts = LoadFacts::new(work.name, &work.call, &amount);
    let mut run = Run::new(&peer.name, facts, work.repetition, &outcome);
    let used = watch
        .hops
        .iter()
        .zip(peer.hops.iter().zip(&peer.idle_kib).skip(first));
    let processes = used.map(|(hop, (process, idle))| {
        results::process(
            &process.name,
            hop.used,
            run.counts.answered,
            (*idle, hop.peak_kib),
        )
    });
    run.processes = processes.collect();
    Ok(run)
}

/// Reads what the hops use while a load runs.
struct Watch {
    bar: Bar,
    hops: Vec<Hop>,
}

struct Hop {
    pid: u32,
    before: Cpu,
    used: Cpu,
    peak_kib: u64,
}

impl Watch {
    fn new(what: &str, hops: &[process::Process]) -> Self {
        let hop = |process: &process::Process| Hop {
            pid: process.pid,
            before: Cpu::default(),
            used: Cpu::default(),
            peak_kib: 0,
        };
        Self {
            bar: Bar::new(what),
            hops: hops.iter().map(hop).collect(),
        }
    }
}

impl Observer for Watch {
    fn measuring(&mut self) {
        for hop in &mut self.hops {
            hop.before = of_process(hop.pid).unwrap_or_default();
        }
    }

    fn tick(&mut self, share: f64, answered: u64, failed: u64) {
        self.bar.tick(share, answered, failed);
        for hop in &mut self.hops {
            hop.peak_kib = hop.peak_kib.max(resident_kib(hop.pid).unwrap_or(0));
        }
    }

    fn measured(&mut self) {
        for hop in &mut self.hops {
            hop.used = of_process(hop.pid).unwrap_or_default().since(hop.before);
        }
    }
}

/// The backend, in a process of its own; it ends when its standard input does.
pub(crate) struct BackendProcess {
    pub(crate) address: SocketAddr,
    child: Child,
}

impl BackendProcess {
    /// Starts it.
    ///
    /// # Errors
    ///
    /// When it does not say where it listens.
    pub(crate) fn start() -> anyhow::Result<Self> {
        let mut child = std::process::Command::new(std::env::current_exe()?)
            .arg("backend")
            // It lives as long as we do: Ctrl-C is for us to understand.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the backend")?;
        let mut line = String::new();
        let out = child.stdout.take().context("the backend has no output")?;
        BufReader::new(out).read_line(&mut line)?;
        let address = line.trim().parse().context("the backend told no address")?;
        Ok(Self { address, child })
    }
}

impl Drop for BackendProcess {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        self.child.wait().ok();
    }
}

/// Where configurations and logs go; removed afterwards unless it was named.
pub(crate) struct Folder {
    pub(crate) path: PathBuf,
    kept: bool,
}

impl Folder {
    /// The folder that was named, else one of our own.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub(crate) fn new(named: Option<PathBuf>) -> anyhow::Result<Self> {
        let kept = named.is_some();
        let own = || std::env::temp_dir().join(format!("sidegate-loadtest-{}", std::process::id()));
        let path = named.unwrap_or_else(own);
        std::fs::create_dir_all(&path)
            .with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self {
            path: path.canonicalize()?,
            kept,
        })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.kept {
            std::fs::remove_dir_all(&self.path).ok();
        }
    }
}

/// The folder of the workspace that this is run in.
fn workspace() -> anyhow::Result<PathBuf> {
    let here = std::env::current_dir()?;
    let workspace = |folder: &&Path| {
        folder.join("proxy/Cargo.toml").is_file() && folder.join("Cargo.toml").is_file()
    };
    let found = here.ancestors().find(workspace);
    Ok(found.context("this is not run inside Sidegate's source tree; name the binaries with --bin-dir and --envoy")?.to_owned())
}

fn text(results: &Results) -> String {
    let mut parts = results.notes.clone();
    parts.push(String::new());
    parts.extend(plain::words(results));
    parts.push(String::new());
    parts.push(table::text(&table::cell_rows(&results.runs)));
    if !results.ratios.is_empty() {
        parts.push("\nSidegate over Envoy's best mode; ranges are over repetitions".to_owned());
        parts.push(table::text(&table::ratio_rows(&results.ratios)));
    }
    if results.runs.iter().any(|run| !run.verdict.conclusive) {
        parts.push(
            "\n? the generator was the bottleneck: no conclusion on latency and throughput; CPU and memory hold"
                .to_owned(),
        );
    }
    if !results.goals.is_empty() {
        parts.push("\nTargets: Sidegate over Envoy's best mode in the same run; ranges are over repetitions".to_owned());
        parts.push(table::text(&table::goal_rows(&results.goals)));
    }
    parts.push(String::new());
    parts.join("\n")
}
