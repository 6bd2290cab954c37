//! `sidegate-loadtest compare`, short: that everything is measured and written down.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    missing_docs,
    reason = "tests"
)]

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const SHORT: &str = "--repetitions 2 --duration 300ms --warmup 100ms";

fn compare(arguments: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sidegate-loadtest"))
        .arg("compare")
        .args(arguments.split_whitespace())
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[track_caller]
fn measure(arguments: &str) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let elsewhere = if arguments.contains("--report") {
        ""
    } else {
        "--report"
    };
    let report = if elsewhere.is_empty() {
        String::new()
    } else {
        folder.path().display().to_string()
    };
    let report = format!("{elsewhere} {report}");
    let length = if arguments.contains("--duration") {
        ""
    } else {
        SHORT
    };
    let output = compare(&format!("{arguments} {length} {report} --output json"));
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[track_caller]
fn check_answered(run: &Value) {
    let answered = &run["counts"]["answered"];
    assert!(answered.as_u64().unwrap() > 0, "{run}");
    assert_eq!(
        run["statuses"],
        serde_json::json!({ "200": answered }),
        "{}",
        run["target"]
    );
    assert_eq!(run["errors"], serde_json::json!([]));
}

#[test]
fn report_holds_every_load_and_needs_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report");
    let results = measure(&format!("--targets direct --report {}", report.display()));
    let runs = results["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 16, "eight loads of calls, twice");
    runs.iter().for_each(check_answered);
    let grpc = runs.iter().filter(|run| run["load"]["protocol"] == "grpc");
    assert!(grpc.clone().count() == 2);
    for run in grpc {
        assert_eq!(
            run["grpc_statuses"],
            serde_json::json!({ "0": run["counts"]["answered"] })
        );
    }
    let written: Value =
        serde_json::from_slice(&std::fs::read(report.join("results.json")).unwrap()).unwrap();
    assert_eq!(written, results);
    let page = std::fs::read_to_string(report.join("index.html")).unwrap();
    assert!(
        page.matches("<svg ").count() >= 25,
        "a curve for each load, a picture for each run, latency against throughput"
    );
    for fetched in ["src=", "href=", "@import", "url(", "<script"] {
        assert!(!page.contains(fetched), "{fetched}");
    }
    assert!(page.contains("prefers-color-scheme:dark"));
}

/// Binaries of the workspace stand beside our own when the whole of it is tested.
#[test]
fn sidecars_are_measured_with_their_cpu_and_memory() {
    let folder = Path::new(env!("CARGO_BIN_EXE_sidegate-loadtest"))
        .parent()
        .unwrap();
    if !["sidegate-proxy", "sidegate-ca"]
        .iter()
        .all(|name| folder.join(name).is_file())
    {
        eprintln!(
            "SKIPPED: no sidegate-proxy and sidegate-ca in {}",
            folder.display()
        );
        return;
    }
    // 256 calls at once of binaries that are not optimized: on a busy machine one takes a second.
    let results = measure(&format!(
        "--targets sidegate --loads c16,grpc,tls,idle --repetitions 1 --duration 3s --warmup 1s --bin-dir {}",
        folder.display()
    ));
    let runs = results["runs"].as_array().unwrap();
    assert_eq!(
        runs.len(),
        5,
        "two loads on two targets, one on the sidecar"
    );
    runs.iter().for_each(check_answered);
    for run in runs.iter().filter(|run| run["target"] == "sidegate") {
        let hops = run["processes"].as_array().unwrap();
        let new = run["load"]["new_connections"].as_bool().unwrap();
        assert_eq!(hops.len(), if new { 1 } else { 2 });
        for hop in hops {
            assert!(hop["cpu_us_per_request"].as_f64().unwrap() > 1.0, "{hop}");
            assert!(hop["rss_idle_kib"].as_u64().unwrap() > 1024, "{hop}");
            assert!(
                hop["rss_peak_kib"].as_u64() >= hop["rss_idle_kib"].as_u64(),
                "{hop}"
            );
        }
    }
    let idle = &results["idle_connections"][0];
    assert_eq!(idle["target"], "sidegate");
    let bytes = idle["bytes_per_connection"][0].as_f64().unwrap();
    assert!((1024.0..1e6).contains(&bytes), "{idle}");
    let notes = results["notes"].to_string();
    assert!(notes.contains("sidegate X25519MLKEM768"), "{notes}");
    let outcome = |what: &str| {
        let goals = results["goals"].as_array().unwrap();
        let goal = goals.iter().find(|goal| goal["what"] == what).unwrap();
        goal["outcome"].clone()
    };
    assert_eq!(outcome("CPU per request and hop"), "not-measured");
    assert_ne!(outcome("memory of a connection"), "not-measured");
    let configurations = results["configurations"].as_object().unwrap();
    let policy = configurations["sidegate: resources/called.yaml"]
        .as_str()
        .unwrap();
    assert_eq!(policy.matches("- name: ").count(), 20, "rules");
}

#[track_caller]
fn check_refused(arguments: &str, words: &str) {
    let output = compare(arguments);
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments}: {told}");
    assert!(told.contains(words), "{arguments}: {told}");
}

#[test]
fn bad_flags_are_told_before_anything_starts() {
    check_refused("--targets linkerd", "there is no target linkerd");
    check_refused("--loads huge", "there is no load huge");
    check_refused("--repetitions 0", "--repetitions");
    check_refused(
        "--targets envoy-h1 --envoy /nowhere/envoy",
        "/nowhere/envoy",
    );
    check_refused("--with envoy", "there is no peer envoy");
    check_refused("--baseline /nowhere.json", "/nowhere.json");
}

/// Processes whose parent is `parent`.
fn children_of(parent: u32) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let child = |entry: std::fs::DirEntry| {
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        let (_, rest) = stat.rsplit_once(") ")?;
        let of: u32 = rest.split(' ').nth(1)?.parse().ok()?;
        (of == parent).then(|| entry.file_name().to_str()?.parse().ok())?
    };
    processes.filter_map(child).collect()
}

#[test]
fn second_interrupt_leaves_no_process_behind() {
    let folder = tempfile::tempdir().unwrap();
    // Stands for a proxy that never becomes ready and ends by itself only much later.
    let binary = folder.path().join("envoy");
    let script =
        "#!/bin/sh\n[ \"$1\" = --version ] && exit\ntouch \"$0.started\"\nsleep 1000 & wait\n";
    std::fs::write(&binary, script).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&binary, mode).unwrap();
    let mut harness = Command::new(env!("CARGO_BIN_EXE_sidegate-loadtest"))
        .args(["compare", "--targets", "envoy-h1", "--envoy"])
        .arg(&binary)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_mins(1);
    while !binary.with_extension("started").exists() {
        assert!(Instant::now() < deadline, "never started");
        std::thread::yield_now();
    }
    let children = children_of(harness.id());
    assert!(children.len() >= 2, "backend and proxy: {children:?}");
    let below: Vec<u32> = children
        .iter()
        .flat_map(|child| children_of(*child))
        .collect();
    // The first may end it already: nothing was measured. Two at once are the worst.
    for _ in 0..2 {
        Command::new("kill")
            .arg(harness.id().to_string())
            .status()
            .unwrap();
    }
    assert!(!harness.wait().unwrap().success());
    let alive = |pid: &&u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // A zombie waits for whoever adopted it.
        stat.rsplit_once(") ")
            .is_some_and(|(_, rest)| !rest.starts_with('Z'))
    };
    while let Some(alive) = children.iter().chain(&below).find(alive) {
        assert!(Instant::now() < deadline, "{alive} lives on");
        std::thread::yield_now();
    }
}
