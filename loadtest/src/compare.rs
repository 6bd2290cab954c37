//! `compare`: the same calls direct and through each peer, interleaved and repeated.
//!
//! Invariant: every target lives for the whole comparison, and a repetition of a load visits all of
//! them before the next begins, so that what the machine does meanwhile touches all alike.

use std::io::{self, BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::sync::watch;
use tokio::task::JoinSet;

use self::envoy::Mode;
use self::peer::Peer;
use self::plan::{LOADS, Planned, SHORT};
use crate::cli::{Compare, Usage};
use crate::engine::{self, Observer};
use crate::progress::{self, Bar};
use crate::results::{self, LoadFacts, Results, Run};
use crate::summary::{self, DIRECT};
use crate::table;
use crate::target::{Protocol, Target};
use crate::usage::{Cpu, of_process, resident_kib};

mod certificates;
mod envoy;
mod gate;
pub(crate) mod limit;
mod peer;
mod plan;
mod process;
mod sidegate;

/// Rules of the policy, of which the last admits the caller.
const RULES: usize = 20;
/// How long everything rests before idle memory is read.
const SETTLE: Duration = Duration::from_secs(2);
/// The folder of the report when none is named.
const REPORT: &str = "report";
const TARGETS: &[&str] = &["direct", "sidegate", "envoy-h1", "envoy-h2"];

/// Runs the comparison.
///
/// # Errors
///
/// [`Usage`], or why a target could not be started or measured.
pub(crate) async fn compare(mut options: Compare) -> anyhow::Result<ExitCode> {
    options.output.report.get_or_insert_with(|| REPORT.into());
    let plan = Plan::new(&options).map_err(Usage)?;
    if options.loads.iter().any(|load| load == "list") {
        for (short, load) in SHORT.iter().zip(LOADS) {
            writeln!(io::stdout(), "{short:8}{}", load.name)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let baseline = options.output.baseline()?;
    let mut tasks = JoinSet::new();
    let interrupt = progress::interrupt(&mut tasks)?;
    let folder = Folder::new(options.work_dir.clone())?;
    let backend = BackendProcess::start()?;
    let mut notes = Vec::new();
    let peers = tokio::select! {
        peers = start(&plan, &options, (&folder, backend.address), &mut notes) => peers?,
        () = told(interrupt.clone()) => bail!("interrupted before anything was measured"),
    };
    let runs = measure(&plan, &peers, interrupt.clone()).await?;
    if *interrupt.borrow() {
        notes.push("Interrupted: loads and repetitions are missing.".to_owned());
    }
    let mut results = Results::new("compare", runs);
    results.metrics = summary::metrics(&results.runs);
    results.ratios = summary::ratios(&results.runs);
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

async fn told(mut interrupt: watch::Receiver<bool>) {
    interrupt.wait_for(|told| *told).await.ok();
}

/// What is measured on what.
struct Plan {
    loads: Vec<Planned>,
    targets: Vec<&'static str>,
    repetitions: u32,
    duration: Duration,
    warmup: Duration,
}

impl Plan {
    fn new(options: &Compare) -> anyhow::Result<Self> {
        let loads = chosen(&options.loads, SHORT, "load", LOADS)?;
        let mut targets = chosen(&options.targets, TARGETS, "target", TARGETS)?;
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
        Ok(Self {
            loads,
            targets,
            repetitions: options.repetitions,
            duration: options.duration,
            warmup: options.warmup,
        })
    }
}

/// The items whose names were given, all when none was.
fn chosen<T: Copy>(
    given: &[String],
    names: &[&str],
    kind: &str,
    items: &[T],
) -> anyhow::Result<Vec<T>> {
    let known = |name: &String| name == "list" || names.contains(&name.as_str());
    if let Some(unknown) = given.iter().find(|name| !known(name)) {
        bail!(
            "there is no {kind} {unknown}; there are {}",
            names.join(", ")
        );
    }
    let pairs = names.iter().zip(items);
    let wanted =
        pairs.filter(|(name, _)| given.is_empty() || given.iter().any(|given| given == *name));
    Ok(wanted.map(|(_, item)| *item).collect())
}

async fn start(
    plan: &Plan,
    options: &Compare,
    (folder, backend): (&Folder, SocketAddr),
    notes: &mut Vec<String>,
) -> anyhow::Result<Vec<Peer>> {
    let mut peers = Vec::new();
    let wanted = plan
        .targets
        .iter()
        .any(|target| target.starts_with("envoy"));
    let envoy = if wanted {
        envoy::find(options.envoy.as_deref(), options.install_envoy)
            .await
            .map_err(Usage)?
    } else {
        None
    };
    for target in &plan.targets {
        let own = folder.path.join(target);
        match (*target, &envoy) {
            (DIRECT, _) => peers.push(Peer {
                name: DIRECT.to_owned(),
                authority: backend.to_string(),
                grpc: true,
                ..Peer::default()
            }),
            (summary::OWN, _) => {
                let (binaries, note) = sidegate::binaries(options.bin_dir.as_deref()).await?;
                notes.push(format!("Sidegate's binaries: {note}."));
                peers.push(sidegate::start(&binaries, &own, backend).await?);
            }
            (_, None) if options.targets.is_empty() => {
                notes.push(format!("{target} is left out: no binary was found. --envoy names one, --install-envoy installs one."));
            }
            (_, None) => bail!(
                "no binary for {target} was found; --envoy names one, --install-envoy installs one"
            ),
            ("envoy-h1", Some(binary)) => {
                peers.push(envoy::start(binary, &own, backend, Mode::Http1).await?);
            }
            (_, Some(binary)) => {
                peers.push(envoy::start(binary, &own, backend, Mode::Http2).await?);
            }
        }
    }
    for peer in &peers {
        gate::check(peer).await?;
    }
    tokio::time::sleep(SETTLE).await;
    peers.iter_mut().for_each(Peer::note_idle);
    for note in notes.iter() {
        writeln!(io::stderr(), "{note}")?;
    }
    Ok(peers)
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
                if load.protocol == Protocol::Grpc && !peer.grpc {
                    continue;
                }
                let what = format!(
                    "{}: {} ({repetition} of {})",
                    load.name, peer.name, plan.repetitions
                );
                let run = one((plan, load, repetition), peer, &what, &mut interrupt).await;
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

async fn one(
    (plan, load, repetition): (&Plan, &Planned, u32),
    peer: &Peer,
    what: &str,
    interrupt: &mut watch::Receiver<bool>,
) -> anyhow::Result<Run> {
    let call = load.call(peer)?;
    let amount = load.load(plan.duration, plan.warmup);
    let target = Target::prepare(&call).await?;
    let mut watch = Watch::new(what, peer);
    let outcome = engine::run(&target, amount, interrupt, &mut watch).await?;
    let facts = LoadFacts::new(load.name, &call, &amount);
    let mut run = Run::new(&peer.name, facts, repetition, &outcome);
    let used = watch.hops.iter().zip(&peer.hops).zip(&peer.idle_kib);
    let processes = used.map(|((hop, process), idle)| {
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
    fn new(what: &str, peer: &Peer) -> Self {
        let hop = |process: &process::Process| Hop {
            pid: process.pid,
            before: Cpu::default(),
            used: Cpu::default(),
            peak_kib: 0,
        };
        Self {
            bar: Bar::new(what),
            hops: peer.hops.iter().map(hop).collect(),
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
struct BackendProcess {
    address: SocketAddr,
    child: Child,
}

impl BackendProcess {
    fn start() -> anyhow::Result<Self> {
        let mut child = std::process::Command::new(std::env::current_exe()?)
            .arg("backend")
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
struct Folder {
    path: PathBuf,
    kept: bool,
}

impl Folder {
    fn new(named: Option<PathBuf>) -> anyhow::Result<Self> {
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
    parts.push(String::new());
    parts.join("\n")
}
