//! `sweep`: how latency, CPU and memory grow with the load and with what it meets.
//!
//! Invariant: within a series one thing grows, and a point is measured on every target before the
//! next point begins.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use http::{HeaderMap, Method};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::cli::{Sweep, Usage, threads_default};
use crate::compare::envoy::Duty;
use crate::compare::launch::{Launcher, Setup, TARGETS, is_envoy};
use crate::compare::peer::Peer;
use crate::compare::{BackendProcess, Folder, REPORT, SETTLE, Work, chosen, idle, put, told};
use crate::engine::Load;
use crate::results::{Results, Run};
use crate::summary::{self, OWN};
use crate::target::{Call, Protocol, Target, TlsFiles};
use crate::{progress, table};

/// The series whose knee is looked for.
pub(crate) const LOAD: &str = "load";
const CONNECTIONS: &str = "connections";
const IDLE: &str = "idle";
const PAYLOAD: &str = "payload";
const RULES: &str = "rules";
const LOG: &str = "log";
const MTLS: &str = "mtls";
const SERIES: &[&str] = &[LOAD, CONNECTIONS, IDLE, PAYLOAD, RULES, LOG, MTLS];

/// Shares of what a closed loop reached, in percent.
const RATES: &[u32] = &[10, 25, 50, 70, 80, 90, 100, 110];
/// Connections of the load series.
const LOAD_CONNECTIONS: u32 = 64;
/// Connections of the series in which something else grows.
const STEADY_CONNECTIONS: u32 = 16;
const ANSWER_BYTES: u32 = 100;

/// One point of a series.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Point {
    pub(crate) series: String,
    /// Connections, bytes, rules; 1 for on and 0 for off; in the load series calls a second, 0 for the closed
    /// loop.
    pub(crate) x: f64,
    pub(crate) target: String,
    /// The name of its run's load.
    pub(crate) load: String,
}

/// Where the latency of a target bends upwards.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Knee {
    pub(crate) target: String,
    /// The highest rate before it, in calls a second; none when the lowest is beyond it.
    pub(crate) before: Option<f64>,
    /// The first rate beyond it; none when there was none.
    pub(crate) beyond: Option<f64>,
}

/// A rate is beyond the knee when fewer than this share of its calls were answered…
const ANSWERED_MIN: f64 = 0.98;
/// …or its p99 is above so many times that of the lowest rate.
const P99_GROWTH_MAX: f64 = 5.0;

/// Runs the sweep.
///
/// # Errors
///
/// [`Usage`], or why a target could not be started or measured.
pub(crate) async fn sweep(mut options: Sweep) -> anyhow::Result<ExitCode> {
    options.output.report.get_or_insert_with(|| REPORT.into());
    let series = chosen(&options.series, SERIES, "series").map_err(Usage)?;
    let mut targets = chosen(&options.targets, TARGETS, "target").map_err(Usage)?;
    if options.duration < Duration::from_millis(100) {
        bail!(Usage(anyhow::anyhow!("--duration is below 100ms")));
    }
    let baseline = options.output.baseline()?;
    let mut tasks = JoinSet::new();
    let interrupt = progress::interrupt(&mut tasks)?;
    let folder = Folder::new(options.programs.work_dir.clone())?;
    let backend = BackendProcess::start()?;
    let mut notes = Vec::new();
    let starting = async {
        let at = (folder.path.clone(), backend.address);
        let launcher =
            Launcher::new((&options.programs, true), &mut targets, at, &mut notes).await?;
        let mut peers = Vec::new();
        for target in &targets {
            peers.push(launcher.start(target, "loads").await?);
        }
        tokio::time::sleep(SETTLE).await;
        peers.iter_mut().for_each(Peer::note_idle);
        anyhow::Ok((launcher, peers))
    };
    let (launcher, peers) = tokio::select! {
        started = starting => started?,
        () = told(interrupt.clone()) => bail!("interrupted before anything was measured"),
    };
    if targets.contains(&OWN) {
        notes.push("Sidegate's mutual TLS and access log cannot be turned off, so it has no point without them; Envoy (--targets) has.".to_owned());
    }
    for note in &notes {
        writeln!(io::stderr(), "{note}")?;
    }
    let mut sweeping = Sweeping {
        options: &options,
        peers: &peers,
        interrupt,
        runs: Vec::new(),
        points: Vec::new(),
        configurations: BTreeMap::new(),
    };
    for series in shown(series, &options.series, &targets) {
        sweeping.series(series, &launcher, &targets).await?;
    }
    let results = sweeping.results(notes);
    let fine = options
        .output
        .finish(&results, &text(&results), baseline.as_ref())?;
    let answered = results.runs.iter().all(|run| run.counts.answered > 0);
    Ok(if answered && fine {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Of what no target can do without there is nothing to show, unless it was asked for.
fn shown<'a>(mut series: Vec<&'a str>, asked: &[String], targets: &[&str]) -> Vec<&'a str> {
    if asked.is_empty() && !targets.iter().any(|target| is_envoy(target)) {
        series.retain(|series| !matches!(*series, LOG | MTLS));
    }
    series
}

struct Sweeping<'a> {
    options: &'a Sweep,
    peers: &'a [Peer],
    interrupt: watch::Receiver<bool>,
    runs: Vec<Run>,
    points: Vec<Point>,
    /// Of those that were started for a point. Policies of many rules, which differ in their length only, are left out.
    configurations: BTreeMap<String, String>,
}

/// What one point puts on a target.
#[derive(Clone, Copy)]
struct Amount {
    rate: Option<f64>,
    connections: u32,
    answer_bytes: u32,
}

const STEADY: Amount = Amount {
    rate: None,
    connections: STEADY_CONNECTIONS,
    answer_bytes: ANSWER_BYTES,
};

impl Sweeping<'_> {
    fn results(self, mut notes: Vec<String>) -> Results {
        if *self.interrupt.borrow() {
            notes.push("Interrupted: points are missing.".to_owned());
        }
        let mut results = Results::new("sweep", self.runs);
        results.metrics = summary::metrics(&results.runs, &[]);
        results.knees = knees(&results.runs, &self.points);
        results.points = self.points;
        results.notes = notes;
        results.configurations = self.configurations;
        for peer in self.peers {
            results.configurations.extend(peer.configurations.clone());
            results.versions.extend(peer.versions.clone());
        }
        results
    }

    async fn series(
        &mut self,
        series: &'static str,
        launcher: &Launcher,
        targets: &[&str],
    ) -> anyhow::Result<()> {
        match series {
            LOAD => self.load().await,
            CONNECTIONS => self.connections().await,
            IDLE => self.idle().await,
            PAYLOAD => self.payload().await,
            LOG => self.without((LOG, Duty::Log), launcher).await,
            MTLS => self.without((MTLS, Duty::Mtls), launcher).await,
            _ => self.rules(launcher, targets).await,
        }
    }

    /// A closed loop first; then rates up to and above what it reached.
    async fn load(&mut self) -> anyhow::Result<()> {
        let closed = Amount {
            connections: LOAD_CONNECTIONS,
            ..STEADY
        };
        let mut reached = BTreeMap::new();
        for peer in self.peers {
            let name = format!("load: closed loop, {LOAD_CONNECTIONS} connections");
            self.point((LOAD, 0.0), &name, peer, closed).await?;
            let throughput = self.runs.last().map_or(0.0, |run| run.throughput);
            reached.insert(peer.name.as_str(), throughput);
        }
        for percent in RATES {
            for peer in self.peers {
                let reached = reached.get(peer.name.as_str()).copied().unwrap_or(0.0);
                let rate = (reached * f64::from(*percent) / 100.0).round();
                if rate < 1.0 {
                    continue;
                }
                // Each target has its own rates, so no name is shared and nothing is subtracted.
                let name = format!("load: {rate} calls/s");
                let amount = Amount {
                    rate: Some(rate),
                    ..closed
                };
                self.point((LOAD, rate), &name, peer, amount).await?;
            }
        }
        Ok(())
    }

    async fn connections(&mut self) -> anyhow::Result<()> {
        for connections in [1, 4, 16, 64, 256] {
            for peer in self.peers {
                let name = format!("connections: {connections}");
                let amount = Amount {
                    connections,
                    ..STEADY
                };
                let x = f64::from(connections);
                self.point((CONNECTIONS, x), &name, peer, amount).await?;
            }
        }
        Ok(())
    }

    /// Connections of applications that carry nothing stay open beside the load.
    async fn idle(&mut self) -> anyhow::Result<()> {
        for count in [0, 1_000, 5_000] {
            for peer in self.peers {
                let tasks = std::rc::Rc::default();
                let target = Target::prepare(&call(peer, ANSWER_BYTES)?).await?;
                let opening = idle::hold(&target, count, &tasks);
                let held = tokio::select! {
                    held = opening => held.with_context(|| format!("{count} idle connections to {}", peer.name))?,
                    () = told(self.interrupt.clone()) => return Ok(()),
                };
                let name = format!("idle connections: {count}");
                self.point((IDLE, f64::from(count)), &name, peer, STEADY)
                    .await?;
                drop(held);
            }
        }
        Ok(())
    }

    async fn payload(&mut self) -> anyhow::Result<()> {
        for answer_bytes in [0, 1 << 10, 16 << 10, 128 << 10, 1 << 20] {
            for peer in self.peers {
                let name = format!("payload: {answer_bytes} B");
                let amount = Amount {
                    answer_bytes,
                    ..STEADY
                };
                let x = f64::from(answer_bytes);
                self.point((PAYLOAD, x), &name, peer, amount).await?;
            }
        }
        Ok(())
    }

    /// Sidegate alone, started anew for each size of its policy.
    async fn rules(&mut self, launcher: &Launcher, targets: &[&str]) -> anyhow::Result<()> {
        for rules in [1_u32, 10, 100, 1_000, 10_000] {
            if !targets.contains(&OWN) || *self.interrupt.borrow() {
                return Ok(());
            }
            let name = format!("rules: {rules}");
            let purpose = format!("rules-{rules}");
            let setup = Setup {
                rules: usize::try_from(rules)?,
                ..Setup::default()
            };
            let starting = launcher.start_with(OWN, &purpose, setup);
            self.started((RULES, f64::from(rules)), &name, starting)
                .await?;
        }
        Ok(())
    }

    /// Each pair as it is, and Envoy's without one of its duties.
    async fn without(
        &mut self,
        (series, duty): (&'static str, Duty),
        launcher: &Launcher,
    ) -> anyhow::Result<()> {
        for peer in self.peers.iter().filter(|peer| !peer.hops.is_empty()) {
            let name = format!("{series}: on");
            self.point((series, 1.0), &name, peer, STEADY).await?;
        }
        for peer in self.peers.iter().filter(|peer| is_envoy(&peer.name)) {
            if *self.interrupt.borrow() {
                return Ok(());
            }
            let setup = Setup {
                without: Some(duty),
                ..Setup::default()
            };
            let purpose = format!("without-{series}");
            let starting = launcher.start_with(&peer.name, &purpose, setup);
            self.started((series, 0.0), &format!("{series}: off"), starting)
                .await?;
        }
        Ok(())
    }

    /// One point of a target that is started for it.
    async fn started(
        &mut self,
        at: (&str, f64),
        name: &str,
        starting: impl Future<Output = anyhow::Result<Peer>>,
    ) -> anyhow::Result<()> {
        let mut peer = tokio::select! {
            started = starting => started.context(name.to_owned())?,
            () = told(self.interrupt.clone()) => return Ok(()),
        };
        tokio::time::sleep(SETTLE).await;
        peer.note_idle();
        if is_envoy(&peer.name) {
            let named =
                |(file, text): (&String, &String)| (format!("{name}, {file}"), text.clone());
            self.configurations
                .extend(peer.configurations.iter().map(named));
        }
        self.point(at, name, &peer, STEADY).await
    }

    async fn point(
        &mut self,
        (series, x): (&str, f64),
        name: &str,
        peer: &Peer,
        amount: Amount,
    ) -> anyhow::Result<()> {
        if *self.interrupt.borrow() {
            return Ok(());
        }
        let work = Work {
            name,
            call: call(peer, amount.answer_bytes)?,
            amount: Load {
                rate: amount.rate,
                connections: amount.connections,
                streams: 1,
                duration: self.options.duration,
                warmup: self.options.warmup,
                timeout: Duration::from_secs(10),
                threads: threads_default(),
                new_connections: false,
            },
            repetition: 1,
        };
        let what = format!("{name}: {}", peer.name);
        let run = put(work, peer, &what, &mut self.interrupt).await;
        if *self.interrupt.borrow() {
            return Ok(());
        }
        self.runs.push(run.with_context(|| what)?);
        self.points.push(Point {
            series: series.to_owned(),
            x,
            target: peer.name.clone(),
            load: name.to_owned(),
        });
        Ok(())
    }
}

fn call(peer: &Peer, answer_bytes: u32) -> anyhow::Result<Call> {
    Ok(Call {
        url: format!("http://{}/bytes/{answer_bytes}", peer.authority).parse()?,
        protocol: Protocol::Http1,
        method: Method::GET,
        headers: HeaderMap::new(),
        body: Bytes::new(),
        grpc_method: None,
        proxy: peer.via.clone(),
        tls: TlsFiles::default(),
    })
}

/// The run of a point.
pub(crate) fn run_of<'a>(runs: &'a [Run], point: &Point) -> Option<&'a Run> {
    runs.iter()
        .find(|run| run.target == point.target && run.load.name == point.load)
}

fn knees(runs: &[Run], points: &[Point]) -> Vec<Knee> {
    let mut rates: BTreeMap<&str, Vec<(f64, &Run)>> = BTreeMap::new();
    for point in points
        .iter()
        .filter(|point| point.series == LOAD && point.x > 0.0)
    {
        if let Some(run) = run_of(runs, point) {
            rates.entry(&point.target).or_default().push((point.x, run));
        }
    }
    let knees = rates.into_iter().filter_map(|(target, mut rates)| {
        rates.sort_by(|left, right| left.0.total_cmp(&right.0));
        let lowest = rates.first()?.1.latency_us.p99;
        let beyond = |(_, run): &(f64, &Run)| {
            answered_share(run) < ANSWERED_MIN || run.latency_us.p99 > P99_GROWTH_MAX * lowest
        };
        let first = rates.iter().position(beyond).unwrap_or(rates.len());
        let rate = |index: usize| rates.get(index).map(|(rate, _)| *rate);
        Some(Knee {
            target: target.to_owned(),
            before: first.checked_sub(1).and_then(rate),
            beyond: rate(first),
        })
    });
    knees.collect()
}

/// Of the calls that were due in the measured time, those answered within it.
fn answered_share(run: &Run) -> f64 {
    let due = run.load.rate.unwrap_or(run.throughput);
    run.throughput / due
}

fn text(results: &Results) -> String {
    let mut parts = results.notes.clone();
    parts.push(String::new());
    parts.push(table::text(&table::cell_rows(&results.runs)));
    parts.push(String::new());
    parts.extend(results.knees.iter().map(knee));
    parts.push(String::new());
    parts.join("\n")
}

/// A knee in words.
pub(crate) fn knee(knee: &Knee) -> String {
    let rate = |rate: f64| format!("{rate:.0} calls/s");
    let target = &knee.target;
    match (knee.before, knee.beyond) {
        (Some(before), Some(beyond)) => format!(
            "the knee of {target} is between {} and {}",
            rate(before),
            rate(beyond)
        ),
        (None, Some(beyond)) => format!("the knee of {target} is below {}", rate(beyond)),
        (Some(before), None) => format!("{target} has no knee up to {}", rate(before)),
        (None, None) => format!("{target} was not measured at any rate"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::run;

    /// Rates with p99 (twice p50) and throughput; the knee before and beyond.
    #[track_caller]
    fn check(rates: &[(f64, f64, f64)], before: Option<f64>, beyond: Option<f64>) {
        let (mut runs, mut points) = (Vec::new(), Vec::new());
        for (rate, p50, throughput) in rates {
            let mut run = run("sidegate", 1, *p50, &[]);
            run.load.name = format!("load: {rate}");
            run.load.rate = Some(*rate);
            run.throughput = *throughput;
            points.push(Point {
                series: LOAD.into(),
                x: *rate,
                target: "sidegate".into(),
                load: run.load.name.clone(),
            });
            runs.push(run);
        }
        let expected = Knee {
            target: "sidegate".into(),
            before,
            beyond,
        };
        assert_eq!(knees(&runs, &points), [expected]);
    }

    #[test]
    fn knee_is_where_latency_grows_fivefold_or_calls_stay_behind() {
        let flat = (100.0, 200.0, 100.0);
        check(&[flat, (200.0, 900.0, 200.0)], Some(200.0), None);
        check(&[flat, (200.0, 1_100.0, 200.0)], Some(100.0), Some(200.0));
        check(&[flat, (200.0, 300.0, 190.0)], Some(100.0), Some(200.0));
        check(
            &[(100.0, 200.0, 50.0), (200.0, 300.0, 60.0)],
            None,
            Some(100.0),
        );
        // Back to calm above the knee is luck: the first rate beyond it counts.
        check(
            &[flat, (200.0, 2_000.0, 200.0), (300.0, 300.0, 300.0)],
            Some(100.0),
            Some(200.0),
        );
    }
}
