//! `sidegate-loadtest sweep`, short: that everything is measured and written down.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    reason = "tests"
)]

use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn sweep(arguments: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sidegate-loadtest"))
        .arg("sweep")
        .args(arguments.split_whitespace())
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn every_point_has_its_run_and_the_load_its_picture() {
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report");
    let output = sweep(&format!(
        "--targets direct --series load,connections,idle,log --duration 100ms --warmup 0s --output json --report {}",
        report.display()
    ));
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    let results: Value = serde_json::from_slice(&output.stdout).unwrap();
    let points = results["points"].as_array().unwrap();
    let of = |series: &str| {
        points
            .iter()
            .filter(|point| point["series"] == series)
            .count()
    };
    assert_eq!((of("load"), of("connections"), of("idle")), (9, 5, 3));
    assert_eq!(of("log"), 0, "the backend has none to turn off");
    let runs = results["runs"].as_array().unwrap();
    assert_eq!(runs.len(), points.len());
    for (run, point) in runs.iter().zip(points) {
        assert_eq!(run["load"]["name"], point["load"]);
        assert!(run["counts"]["answered"].as_u64().unwrap() > 0, "{run}");
    }
    assert_eq!(results["knees"][0]["target"], "direct");
    let picture = std::fs::read_to_string(report.join("0-sweep-load.svg")).unwrap();
    assert_eq!(
        picture.matches("<circle").count(),
        16,
        "p50 and p99 of eight rates"
    );
    let page = std::fs::read_to_string(report.join("index.html")).unwrap();
    assert!(page.contains("The knee"));
}

#[test]
fn bad_flags_are_told_before_anything_starts() {
    let check = |arguments: &str, words: &str| {
        let output = sweep(arguments);
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments}: {told}");
        assert!(told.contains(words), "{arguments}: {told}");
    };
    check("--series weight", "there is no series weight");
    check("--targets linkerd", "there is no target linkerd");
    check("--duration 1ms", "--duration");
}
