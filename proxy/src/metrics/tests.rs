//! Names, labels, bounds and the text.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use sidegate_mesh::Verdict;
use sidegate_mesh::access_log::{Direction, Protocol};

use super::*;

fn metrics(series_max: u32) -> (Metrics, Registry) {
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry, series_max);
    (metrics, registry)
}

fn call(metrics: &Metrics, source: &str) {
    let (source, destination) = (
        Arc::from(source),
        Arc::from("spiffe://mesh.local/ns/shop/sa/orders"),
    );
    let pair = metrics.requests(
        Direction::Inbound,
        Protocol::Http1,
        Some(&source),
        Some(&destination),
    );
    pair.finish(&Outcome {
        status: Some(200),
        grpc_status: None,
        decision: Some(Verdict::Allow),
        duration: Duration::from_micros(1_200),
    });
}

#[test]
fn a_call_is_counted_under_the_names_of_the_interface() {
    let (metrics, registry) = metrics(1_000);
    call(&metrics, "spiffe://mesh.local/ns/shop/sa/web");
    let text = text(&registry).unwrap();
    let expected = "sidegate_requests_total{direction=\"inbound\",protocol=\"http/1.1\",\
        source=\"spiffe://mesh.local/ns/shop/sa/web\",\
        destination=\"spiffe://mesh.local/ns/shop/sa/orders\",status_class=\"2xx\",\
        grpc_status=\"\",decision=\"allow\"} 1\n";
    assert!(text.contains(expected), "{text}");
    let bucket = "sidegate_request_duration_seconds_bucket{le=\"0.0025\",direction=\"inbound\",\
        source=\"spiffe://mesh.local/ns/shop/sa/web\",\
        destination=\"spiffe://mesh.local/ns/shop/sa/orders\"} 1\n";
    assert!(text.contains(bucket), "{text}");
    assert!(
        text.contains("# TYPE sidegate_requests_total counter\n"),
        "{text}"
    );
}

#[test]
fn every_metric_of_the_interface_is_there() {
    let (metrics, registry) = metrics(1_000);
    call(&metrics, "a");
    metrics.handshake_failure(Direction::Inbound, "expired");
    metrics.connections_open(Direction::Outbound).inc();
    metrics.set_certificate_not_after(1_800_000_000);
    let text = text(&registry).unwrap();
    for sample in [
        "sidegate_requests_total{",
        "sidegate_request_duration_seconds_count{",
        "sidegate_requests_in_flight 0",
        "sidegate_connections_open{direction=\"outbound\"} 1",
        "sidegate_tls_handshake_failures_total{direction=\"inbound\",reason=\"expired\"} 1",
        "sidegate_certificate_not_after_timestamp_seconds 1800000000",
        "sidegate_certificate_renewals_total{result=\"ok\"} 0",
        "sidegate_certificate_renewals_total{result=\"failed\"} 0",
        "sidegate_snapshot_number 0",
        "sidegate_snapshot_rejections_total 0",
        "sidegate_access_log_dropped_total 0",
        "sidegate_build_info{version=\"",
        "process_cpu_seconds_total ",
        "process_start_time_seconds ",
        "process_resident_memory_bytes ",
        "process_virtual_memory_bytes ",
        "process_open_fds ",
        "process_max_fds ",
    ] {
        assert!(
            text.lines().any(|line| line.starts_with(sample)),
            "{sample}\n{text}"
        );
    }
}

#[test]
fn a_certificate_end_is_absent_until_there_is_one() {
    let (metrics, registry) = metrics(1_000);
    assert!(!text(&registry).unwrap().contains("not_after"));
    metrics.set_certificate_not_after(7);
    assert!(
        text(&registry)
            .unwrap()
            .contains("sidegate_certificate_not_after_timestamp_seconds 7\n")
    );
}

#[test]
fn a_flood_of_peers_is_counted_under_other() {
    let (metrics, registry) = metrics(100);
    for peer in 0..1_000 {
        call(
            &metrics,
            &format!("spiffe://mesh.local/ns/shop/sa/peer-{peer}"),
        );
    }
    assert!(metrics.series() <= 100, "{}", metrics.series());
    let text = text(&registry).unwrap();
    let of_pairs = |line: &&str| line.contains("source=");
    assert!(text.lines().filter(of_pairs).count() <= 100 + 30, "{text}");
    let total: u64 = text
        .lines()
        .filter(|line| line.starts_with("sidegate_requests_total{"))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
        .sum();
    assert_eq!(total, 1_000, "no call is lost");
    assert!(
        text.contains("source=\"other\",destination=\"other\""),
        "{text}"
    );
}

#[test]
fn the_series_of_a_departed_peer_are_removed() {
    let (metrics, registry) = metrics(1_000);
    call(&metrics, "departed");
    let held_source = Arc::from("held");
    let held = metrics.requests(
        Direction::Inbound,
        Protocol::Http1,
        Some(&held_source),
        None,
    );
    held.finish(&Outcome::default());
    assert_eq!(metrics.sweep(1), 0, "it was used in the interval before");
    call(&metrics, "stays");
    assert_eq!(metrics.sweep(1), 1);
    let shown = text(&registry).unwrap();
    assert!(!shown.contains("departed"), "{shown}");
    assert!(
        shown.contains("source=\"stays\"") && shown.contains("source=\"held\""),
        "{shown}"
    );
    drop(held);
    metrics.sweep(1);
    metrics.sweep(1);
    assert_eq!(metrics.series(), 0, "every series was given back");
}

#[test]
fn a_strange_grpc_status_is_one_series() {
    let (metrics, registry) = metrics(1_000);
    let pair = metrics.requests(Direction::Inbound, Protocol::Grpc, None, None);
    for grpc_status in [17, 4_000_000, u32::MAX] {
        pair.finish(&Outcome {
            grpc_status: Some(grpc_status),
            ..Outcome::default()
        });
    }
    let shown = text(&registry).unwrap();
    let strange = |line: &&str| line.contains("grpc_status=\"other\"");
    assert_eq!(shown.lines().filter(strange).count(), 1, "{shown}");
}

#[test]
fn promtool_accepts_the_text() {
    let (metrics, registry) = metrics(1_000);
    call(&metrics, "spiffe://mesh.local/ns/shop/sa/web");
    metrics.handshake_failure(Direction::Inbound, "expired");
    metrics.connections_open(Direction::Inbound).inc();
    metrics.set_certificate_not_after(1_800_000_000);
    let shown = text(&registry).unwrap();
    let spawned = std::process::Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn();
    let mut promtool = match spawned {
        Ok(promtool) => promtool,
        Err(error) => {
            eprintln!("SKIPPED: promtool does not run here ({error}); apt-get install prometheus");
            return;
        }
    };
    let mut input = promtool.stdin.take().unwrap();
    std::io::Write::write_all(&mut input, shown.as_bytes()).unwrap();
    drop(input);
    let output = promtool.wait_with_output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && words.is_empty(),
        "{words}\n{shown}"
    );
}
