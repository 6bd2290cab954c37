//! `sidegate-loadtest run` against a server that writes down what it did.
//!
//! Nothing here expects a machine at rest, but for the one test that says so: figures are held
//! against what the server itself saw, and against bounds that delays can only move further off.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    missing_docs,
    unreachable_pub,
    reason = "tests"
)]

use std::io::Read;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::server::{Behaviour, Seen, Server};

#[path = "run/server.rs"]
mod server;

fn command(arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sidegate-loadtest"));
    command
        .args(arguments.split_whitespace())
        .stdin(Stdio::null());
    command
}

fn run(arguments: &str) -> Output {
    command(&format!("run {arguments}")).output().unwrap()
}

#[track_caller]
fn measure(arguments: &str) -> Value {
    let output = run(&format!("{arguments} --output json"));
    let results: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    results["runs"][0].clone()
}

fn count(run: &Value, name: &str) -> u64 {
    run["counts"][name].as_u64().unwrap()
}

fn latency(run: &Value, name: &str) -> f64 {
    run["latency_us"][name].as_f64().unwrap()
}

#[track_caller]
fn check_counts(run: &Value, server: &Server) {
    let of = |name| count(run, name);
    assert_eq!(
        of("sent"),
        of("answered") + of("failed") + of("unfinished"),
        "{}",
        run["counts"]
    );
    assert_eq!(
        of("scheduled"),
        of("sent") + of("missed"),
        "{}",
        run["counts"]
    );
    let seen = server.seen().len() as u64;
    assert_eq!(
        of("sent") + of("warmup_sent"),
        seen,
        "the server saw {seen}: {}",
        run["counts"]
    );
    let statuses: u64 = run["statuses"]
        .as_object()
        .unwrap()
        .values()
        .map(|n| n.as_u64().unwrap())
        .sum();
    assert_eq!(statuses, of("answered"));
}

fn quantile(sorted: &[f64], quantile: f64) -> f64 {
    sorted[((sorted.len() as f64 * quantile).ceil() as usize).max(1) - 1]
}

/// What the server knows of the duration of each call, in microseconds, sorted: the least, from
/// arrival to answer, and the most, from the answer before it on the same connection to the
/// arrival of the one after it.
///
/// A first or last call of a connection has no neighbour; the run's own start and end stand in.
fn bounds(server: &Server) -> (Vec<f64>, Vec<f64>) {
    let seen = server.seen();
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    let (mut least, mut most) = (Vec::new(), Vec::new());
    for (number, call) in seen.iter().enumerate() {
        let answered = call.answered.unwrap();
        least.push(micros(answered - call.arrived));
        let same = |other: &&Seen| other.connection == call.connection;
        let before = seen[..number].iter().rfind(same);
        let after = seen[number + 1..].iter().find(same);
        let from = before.map_or(server.started, |before| before.answered.unwrap());
        let to = after.map_or_else(Instant::now, |after| after.arrived);
        most.push(micros(to - from));
    }
    least.sort_by(f64::total_cmp);
    most.sort_by(f64::total_cmp);
    (least, most)
}

/// 40 to 790 ms, in an order that is not that of their size.
fn slow() -> Server {
    let delays = (0..251)
        .map(|n| Duration::from_millis(40 + n * 97 % 251 * 3))
        .collect();
    Server::start(Behaviour {
        delays,
        ..Behaviour::default()
    })
}

const QUANTILES: [(&str, f64); 4] = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999)];

/// A run on a slow server of which nothing is lost.
#[track_caller]
fn measure_slow(arguments: &str) -> (Value, Server) {
    let server = slow();
    let run = measure(&format!(
        "--url {} --duration 4s --warmup 0s {arguments}",
        server.url()
    ));
    check_counts(&run, &server);
    assert_eq!(
        count(&run, "answered"),
        count(&run, "scheduled"),
        "{}",
        run["counts"]
    );
    (run, server)
}

/// No machine, however busy, makes a call shorter than it was in the server. What it adds shows
/// last in the middle, where half of all calls would have to be late.
#[track_caller]
fn check_open_loop(arguments: &str) {
    const LATE: f64 = 100_000.0;
    let (run, server) = measure_slow(arguments);
    let (least, _) = bounds(&server);
    for (name, at) in QUANTILES {
        let (told, exact) = (latency(&run, name), quantile(&least, at));
        assert!(told > exact * 0.99, "{name}: {told} for {exact}");
    }
    let (told, exact) = (latency(&run, "p50"), quantile(&least, 0.5));
    assert!(told < exact * 1.01 + LATE, "p50: {told} for {exact}");
}

#[test]
fn percentiles_of_an_open_loop_are_the_servers_or_what_a_busy_machine_adds() {
    check_open_loop("--rate 300 --connections 400");
    check_open_loop("--rate 300 --connections 8 --streams 50 --protocol http2 --threads 2");
}

/// The next call of a connection begins when the last has ended, so the server's own clock bounds
/// every call from both sides, and with the calls their order: no percentile can be outside.
#[test]
fn percentiles_of_a_closed_loop_lie_within_what_the_server_saw() {
    let (run, server) = measure_slow("--closed --connections 20");
    let (least, most) = bounds(&server);
    for (name, at) in QUANTILES {
        let (told, low, high) = (
            latency(&run, name),
            quantile(&least, at),
            quantile(&most, at),
        );
        assert!(
            told > low * 0.99 && told < high * 1.01,
            "{name}: {told} is not from {low} to {high}"
        );
    }
}

/// What the two tests above cannot say on a busy machine. `recorder` has the same without a clock.
#[test]
#[ignore = "needs a machine at rest"]
fn percentiles_are_the_servers_within_one_percent_on_a_machine_at_rest() {
    for arguments in [
        "--rate 300 --connections 400",
        "--rate 300 --connections 8 --streams 50 --protocol http2 --threads 2",
        "--closed --connections 100",
    ] {
        let (run, server) = measure_slow(arguments);
        let (least, _) = bounds(&server);
        let deviations = QUANTILES.map(|(name, at)| latency(&run, name) / quantile(&least, at));
        assert!(
            deviations
                .iter()
                .all(|deviation| (deviation - 1.0).abs() < 0.01),
            "{arguments}: {deviations:?} {}",
            run["generator"]
        );
    }
}

/// The number after `word`.
#[track_caller]
fn figure(text: &str, word: &str) -> f64 {
    let (_, rest) = text
        .split_once(word)
        .unwrap_or_else(|| panic!("no {word} in {text}"));
    let rest = rest.trim_start();
    let end = rest
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(rest.len());
    rest[..end]
        .parse()
        .unwrap_or_else(|_| panic!("no number after {word} in {text}"))
}

/// Calls a second that a generator tells, over those that the server saw of it.
#[track_caller]
fn agreement(generator: impl Fn(&str) -> f64) -> f64 {
    let delays = [20, 60, 30, 50].map(Duration::from_millis).to_vec();
    let server = Server::start(Behaviour {
        delays,
        ..Behaviour::default()
    });
    let told = generator(&server.url());
    let seen = server.seen();
    let answered: Vec<Instant> = seen.iter().filter_map(|seen| seen.answered).collect();
    let took = *answered.iter().max().unwrap() - seen[0].arrived;
    told / (answered.len() as f64 / took.as_secs_f64())
}

/// Each is held against what the server saw of it, so that a busy machine may be slower for one
/// than for another.
#[test]
fn figures_agree_with_those_of_wrk_and_h2load_on_the_same_server() {
    let output = |program: &str, arguments: &str, url: &str| {
        let output = Command::new(program)
            .args(arguments.split_whitespace())
            .arg(url)
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let own = agreement(|url| {
        let arguments = "--closed --connections 8 --duration 3s --warmup 0s";
        let run = measure(&format!("--url {url} {arguments}"));
        run["throughput"].as_f64().unwrap()
    });
    assert!((own - 1.0).abs() < 0.05, "{own}");
    let there = |program| Command::new(program).arg("--version").output().is_ok();
    if !there("wrk") || !there("h2load") {
        eprintln!("SKIPPED: no wrk and h2load (apt: wrk, nghttp2-client)");
        return;
    }
    let wrk = agreement(|url| figure(&output("wrk", "-t1 -c8 -d3s", url), "Requests/sec:"));
    let h2load = agreement(|url| {
        let told = output("h2load", "--h1 -t1 -c8 -D3", url);
        let (_, finished) = told.split_once("finished in ").unwrap();
        figure(finished, "s, ")
    });
    assert!((own / wrk - 1.0).abs() < 0.10, "{own} and wrk's {wrk}");
    assert!(
        (own / h2load - 1.0).abs() < 0.10,
        "{own} and h2load's {h2load}"
    );
}

fn stalling() -> Server {
    Server::start(Behaviour {
        stall: Some((Duration::from_millis(1500), Duration::from_millis(2500))),
        ..Behaviour::default()
    })
}

#[test]
fn stall_of_a_second_is_seen_in_an_open_loop_and_hidden_in_a_closed_one() {
    let server = stalling();
    let arguments = format!(
        "--url {} --duration 5s --warmup 0s --connections 4",
        server.url()
    );
    let open = measure(&format!("{arguments} --rate 400"));
    check_counts(&open, &server);
    // A fifth of the calls were intended in the stall, evenly: a tenth waited half of it or more,
    // and the p99 is a twentieth of the stall below its length. A busy machine only adds.
    assert!(latency(&open, "p90") > 0.45 * 1e6, "{}", open["latency_us"]);
    assert!(latency(&open, "p99") > 0.90 * 1e6, "{}", open["latency_us"]);
    assert!(latency(&open, "max") > 0.98 * 1e6, "{}", open["latency_us"]);
    assert!(count(&open, "queued") >= 300, "{}", open["counts"]);
    // 400 calls fell due within the stall, four had begun.
    assert!(count(&open, "late") >= 300, "{}", open["counts"]);

    let server = stalling();
    let closed = measure(&format!(
        "--url {} --duration 5s --warmup 0s --connections 4 --closed",
        server.url()
    ));
    check_counts(&closed, &server);
    let slow = server
        .seen()
        .iter()
        .filter(|seen| {
            seen.answered
                .is_some_and(|at| at - seen.arrived > Duration::from_millis(900))
        })
        .count();
    assert_eq!(slow, 4, "each connection waits once");
    assert!(
        latency(&closed, "max") > 0.98 * 1e6,
        "{}",
        closed["latency_us"]
    );
    assert!(
        latency(&closed, "p99") < 0.2 * 1e6,
        "{}",
        closed["latency_us"]
    );
    assert!(
        latency(&closed, "p999") < 0.9 * 1e6,
        "{}",
        closed["latency_us"]
    );
}

#[test]
fn stall_shows_in_the_picture_over_time() {
    let server = stalling();
    let run = measure(&format!(
        "--url {} --duration 5s --warmup 0s --connections 4 --rate 400",
        server.url()
    ));
    let cells = run["timeline"]["cells"].as_array().unwrap();
    // Row 68 is 131 ms.
    let slow = cells.iter().filter(|cell| cell[1].as_u64().unwrap() >= 68);
    let at =
        slow.map(|cell| cell[0].as_f64().unwrap() * run["timeline"]["column_ms"].as_f64().unwrap());
    let at: Vec<f64> = at.collect();
    assert!(at.iter().any(|ms| (1400.0..2400.0).contains(ms)), "{at:?}");
}

#[test]
fn failures_are_counted_by_kind_and_nothing_is_lost() {
    let server = Server::start(Behaviour {
        cut_every: Some(10),
        ..Behaviour::default()
    });
    let run = measure(&format!(
        "--url {} --duration 2s --warmup 500ms --rate 200",
        server.url()
    ));
    check_counts(&run, &server);
    let answered = server
        .seen()
        .iter()
        .filter(|seen| seen.answered.is_some())
        .count() as u64;
    // The warm-up's answers are in the server's count only: its calls are a fifth of all.
    assert!(count(&run, "answered") <= answered);
    assert_eq!(count(&run, "sent"), 400 - count(&run, "missed"));
    assert!(
        (39..=41).contains(&count(&run, "failed")),
        "{}",
        run["counts"]
    );
    assert_eq!(run["errors"][0]["kind"], "closed");
    assert_eq!(
        run["errors"][0]["count"].as_u64().unwrap(),
        count(&run, "failed")
    );
}

#[test]
fn call_that_is_never_answered_times_out_or_stays_unfinished() {
    let silent = || {
        Server::start(Behaviour {
            stall: Some((Duration::from_millis(300), Duration::from_hours(1))),
            ..Behaviour::default()
        })
    };
    let arguments = "--duration 1s --warmup 0s --rate 100 --connections 50 --timeout";
    let server = silent();
    let run = measure(&format!("--url {} {arguments} 200ms", server.url()));
    check_counts(&run, &server);
    assert_eq!(run["errors"][0]["kind"], "timeout");
    assert!(
        count(&run, "failed") > 0 && count(&run, "unfinished") == 0,
        "{}",
        run["counts"]
    );

    let server = silent();
    let run = measure(&format!("--url {} {arguments} 1h", server.url()));
    check_counts(&run, &server);
    assert!(
        count(&run, "unfinished") == 50 && count(&run, "failed") == 0,
        "{}",
        run["counts"]
    );
    assert!(count(&run, "missed") > 0, "{}", run["counts"]);
    let warnings = run["verdict"]["warnings"].to_string();
    assert!(warnings.contains("lower bounds"), "{warnings}");
}

#[test]
fn grpc_status_comes_from_the_trailers() {
    let server = Server::start(Behaviour::default());
    let run = measure(&format!(
        "--url {} --protocol grpc --grpc-method a.B/C --body-bytes 7 --duration 500ms --warmup 0s --rate 100 --connections 2",
        server.url()
    ));
    check_counts(&run, &server);
    assert_eq!(run["grpc_statuses"]["7"], run["counts"]["answered"]);
    // The message comes back with its prefix.
    assert_eq!(
        run["response_bytes"].as_u64().unwrap(),
        12 * count(&run, "answered")
    );
}

#[test]
fn proxy_gets_the_whole_url() {
    let server = Server::start(Behaviour::default());
    let arguments = format!(
        "--url http://orders.invalid/x -x {} --duration 300ms --warmup 0s --rate 50",
        server.address
    );
    for protocol in ["http1", "http2"] {
        let run = measure(&format!("{arguments} --protocol {protocol}"));
        assert_eq!(count(&run, "answered"), 15, "{run}");
    }
}

#[test]
fn ctrl_c_ends_with_what_there_is() {
    let server = Server::start(Behaviour::default());
    let mut child = command(&format!(
        "run --url {} --rate 200 --duration 1h --warmup 0s --output json",
        server.url()
    ))
    .stdout(Stdio::piped())
    .stderr(Stdio::piped())
    .spawn()
    .unwrap();
    let deadline = Instant::now() + Duration::from_mins(1);
    while server.seen().len() < 100 {
        assert!(Instant::now() < deadline, "no load within a minute");
        std::thread::yield_now();
    }
    let interrupted = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(interrupted.success());
    let mut text = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert!(child.wait().unwrap().success());
    let results: Value = serde_json::from_str(&text).unwrap();
    let run = &results["runs"][0];
    check_counts(run, &server);
    assert!(run["interrupted"].as_bool().unwrap());
    assert!(count(run, "answered") >= 99, "{}", run["counts"]);
    assert!(run["elapsed_s"].as_f64().unwrap() < 3600.0);
}

#[track_caller]
fn check_refused(arguments: &str, code: i32, words: &str) {
    let started = Instant::now();
    let output = run(arguments);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments}: {text}");
    assert!(text.contains(words), "{arguments}: {text}");
    assert!(output.stdout.is_empty(), "{arguments}");
    assert!(
        started.elapsed() < Duration::from_secs(20),
        "{arguments}: not at once"
    );
}

#[test]
fn bad_flags_are_told_at_once() {
    check_refused("", 2, "--url");
    check_refused("--url ftp://x/", 2, "does not begin with http");
    check_refused(
        "--url http://127.0.0.1:1/ --rate 0",
        2,
        "--rate is not above 0",
    );
    check_refused(
        "--url http://127.0.0.1:1/ --rate 5 --closed",
        2,
        "cannot be used with",
    );
    check_refused(
        "--url http://127.0.0.1:1/ --connections 0",
        2,
        "--connections",
    );
    check_refused(
        "--url http://127.0.0.1:1/ --streams 4",
        2,
        "--streams needs",
    );
    check_refused(
        "--url http://127.0.0.1:1/ --duration forever",
        2,
        "--duration",
    );
    check_refused(
        "--url http://127.0.0.1:1/ --protocol grpc",
        2,
        "--grpc-method",
    );
    check_refused("--url http://127.0.0.1:1/ -H broken", 2, "name: value");
    check_refused("--url https://127.0.0.1:1/ -x 127.0.0.1:2", 2, "tunnel");
    check_refused(
        "--url https://127.0.0.1:1/ --ca /nowhere.pem",
        2,
        "/nowhere.pem",
    );
    check_refused("--url https://127.0.0.1:1/ --cert a.pem", 2, "--key");
    check_refused(
        "--url http://127.0.0.1:1/ --baseline /nowhere.json",
        2,
        "/nowhere.json",
    );
}

#[test]
fn unreachable_targets_are_told_at_once() {
    let unused = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    check_refused(&format!("--url http://{unused}/"), 1, "refused");
    let server = Server::start(Behaviour::default());
    check_refused(
        &format!("--url https://{}/ --insecure", server.address),
        1,
        "TLS handshake",
    );
    // A server that closes every connection at once.
    let closing = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = closing.local_addr().unwrap();
    std::thread::spawn(move || closing.incoming().for_each(drop));
    check_refused(&format!("--url http://{address}/"), 1, "nothing answers");
    check_refused(&format!("--url http://{address}/"), 1, "so: conn");
}

#[test]
fn regression_against_a_baseline_exits_with_one() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("results.json");
    let measured = |delay: u64, rest: &str| {
        let server = Server::start(Behaviour {
            delays: vec![Duration::from_millis(delay)],
            ..Behaviour::default()
        });
        run(&format!(
            "--url {} --rate 100 --connections 100 --duration 2s --warmup 0s {rest}",
            server.url()
        ))
    };
    let before = measured(200, "--output json");
    std::fs::write(&file, &before.stdout).unwrap();
    let baseline = format!("--baseline {}", file.display());
    let slower = measured(600, &baseline);
    assert_eq!(slower.status.code(), Some(1), "{slower:?}");
    assert!(
        String::from_utf8_lossy(&slower.stdout).contains("REGRESSION"),
        "{slower:?}"
    );
    let faster = measured(100, &baseline);
    assert_eq!(faster.status.code(), Some(0), "{faster:?}");
    let other = measured(200, &format!("{baseline} --protocol http2"));
    assert_eq!(other.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&other.stderr).contains("another load"),
        "{other:?}"
    );
}

/// `--run TARGET=FILE` of a run of half a second on a server that answers after `delay_ms`.
fn run_apart(folder: &Path, number: usize, target: &str, delay_ms: u64, rate: u32) -> [String; 2] {
    let server = Server::start(Behaviour {
        delays: vec![Duration::from_millis(delay_ms)],
        ..Behaviour::default()
    });
    let output = run(&format!(
        "--url {} --rate {rate} --connections 50 --duration 500ms --warmup 0s --output json",
        server.url()
    ));
    let file = folder.join(format!("{number}.json"));
    std::fs::write(&file, output.stdout).unwrap();
    ["--run".to_owned(), format!("{target}={}", file.display())]
}

#[test]
fn yaml_holds_what_json_does() {
    let server = Server::start(Behaviour::default());
    let arguments = "--rate 100 --connections 2 --duration 200ms --warmup 0s";
    let output = run(&format!("--url {} {arguments} -o yaml", server.url()));
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let results: Value = serde_saphyr::from_str(&text).unwrap();
    assert_eq!(results["schema"], "sidegate-loadtest/1");
    check_counts(&results["runs"][0], &server);
}

#[test]
fn runs_made_apart_are_put_together_with_what_was_added() {
    let folder = tempfile::tempdir().unwrap();
    let order = ["direct", "sidegate", "direct", "sidegate"];
    let mut arguments: Vec<String> = Vec::new();
    for (number, target) in order.iter().enumerate() {
        let delay_ms = if *target == "direct" { 100 } else { 300 };
        arguments.extend(run_apart(folder.path(), number, target, delay_ms, 50));
    }
    let report = |arguments: &[String]| {
        let report = folder.path().join("report").display().to_string();
        command(&format!("report {}", arguments.join(" ")))
            .args(["--output", "json", "--report", &report])
            .output()
            .unwrap()
    };
    let same = report(&arguments);
    assert!(same.status.success(), "{same:?}");
    assert!(folder.path().join("report/index.html").is_file());
    let results: Value = serde_json::from_slice(&same.stdout).unwrap();
    let named = |run: &Value| (run["target"].clone(), run["repetition"].clone());
    let named: Vec<_> = results["runs"]
        .as_array()
        .unwrap()
        .iter()
        .map(named)
        .collect();
    let expected = order.iter().zip([1, 1, 2, 2]);
    let expected: Vec<_> = expected
        .map(|(target, number)| (Value::from(*target), Value::from(number)))
        .collect();
    assert_eq!(named, expected);
    let mut metrics = results["metrics"].as_array().unwrap().iter();
    let added = metrics.find(|metric| metric["name"].to_string().contains("added p50"));
    for sample in added.unwrap()["samples"].as_array().unwrap() {
        // 200 ms between the servers; the rest is what a busy machine adds to either.
        let sample = sample.as_f64().unwrap();
        assert!((50_000.0..350_000.0).contains(&sample), "{sample}");
    }

    arguments.extend(run_apart(folder.path(), order.len(), "direct", 100, 60));
    let other = report(&arguments);
    assert_eq!(other.status.code(), Some(2));
    let told = String::from_utf8_lossy(&other.stderr);
    assert!(
        told.contains("is of another load (http1 GET, 60 calls/s"),
        "{told}"
    );
}
