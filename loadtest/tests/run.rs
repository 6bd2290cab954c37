//! `sidegate-loadtest run` against a server that writes down what it did.
//!
//! Nothing here expects a machine at rest: figures are compared with those of the server. Where a
//! busy machine can part the two (the 1 % of the percentiles, the 5 % of wrk and h2load) a miss is
//! measured again, at most `ATTEMPTS` times, and one hit is enough.
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
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::server::{Behaviour, Server};

#[path = "run/server.rs"]
mod server;

const ATTEMPTS: usize = 6;

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

/// Exact latencies of the server, in microseconds, sorted.
fn exact(server: &Server) -> Vec<f64> {
    let seen = server.seen();
    let took = seen
        .iter()
        .filter_map(|seen| Some(seen.answered? - seen.arrived));
    let mut took: Vec<f64> = took.map(|took| took.as_secs_f64() * 1e6).collect();
    took.sort_by(f64::total_cmp);
    took
}

/// Worst deviation of the told percentiles from the server's own.
fn deviation(arguments: &str) -> (f64, String) {
    // 40 to 790 ms, in an order that is not that of their size.
    let delays = (0..251)
        .map(|n| Duration::from_millis(40 + n * 97 % 251 * 3))
        .collect();
    let server = Server::start(Behaviour {
        delays,
        ..Behaviour::default()
    });
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
    let exact = exact(&server);
    let pairs = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999)];
    let deviations = pairs.map(|(name, at)| latency(&run, name) / quantile(&exact, at) - 1.0);
    let worst = deviations.map(f64::abs).into_iter().fold(0.0, f64::max);
    (worst, format!("{deviations:?} {}", run["generator"]))
}

#[track_caller]
fn check_percentiles(arguments: &str) {
    let mut told = Vec::new();
    for _ in 0..ATTEMPTS {
        let (worst, facts) = deviation(arguments);
        if worst < 0.01 {
            return;
        }
        told.push(facts);
    }
    panic!("never within 1 %: {told:#?}");
}

#[test]
fn percentiles_of_an_open_loop_are_the_servers_within_one_percent() {
    check_percentiles("--rate 300 --connections 400");
    check_percentiles("--rate 300 --connections 8 --streams 50 --protocol http2 --threads 2");
}

#[test]
fn percentiles_of_a_closed_loop_are_the_servers_within_one_percent() {
    check_percentiles("--closed --connections 100");
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

/// Calls a second of `wrk`, `h2load` and ours on the same server, each over eight connections.
fn throughputs() -> [f64; 3] {
    let delays = [20, 60, 30, 50].map(Duration::from_millis).to_vec();
    let server = Server::start(Behaviour {
        delays,
        ..Behaviour::default()
    });
    let other = |program: &str, arguments: &str| {
        let output = Command::new(program)
            .args(arguments.split_whitespace())
            .arg(server.url())
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let wrk = figure(&other("wrk", "-t1 -c8 -d3s"), "Requests/sec:");
    let h2load = other("h2load", "--h1 -t1 -c8 -D3");
    let (_, finished) = h2load.split_once("finished in ").unwrap();
    let h2load = figure(finished, "s, ");
    let run = measure(&format!(
        "--url {} --closed --connections 8 --duration 3s --warmup 0s",
        server.url()
    ));
    [wrk, h2load, run["throughput"].as_f64().unwrap()]
}

#[test]
fn figures_agree_with_those_of_wrk_and_h2load() {
    let there = |program| Command::new(program).arg("--version").output().is_ok();
    if !there("wrk") || !there("h2load") {
        eprintln!("SKIPPED: no wrk and h2load (apt: wrk, nghttp2-client)");
        return;
    }
    let mut told = Vec::new();
    for _ in 0..ATTEMPTS {
        let [wrk, h2load, own] = throughputs();
        if (own / wrk - 1.0).abs() < 0.05 && (own / h2load - 1.0).abs() < 0.05 {
            return;
        }
        told.push([wrk, h2load, own]);
    }
    panic!("never within 5 %: {told:?}");
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
