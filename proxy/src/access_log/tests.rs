use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use sidegate_mesh::Verdict;
use sidegate_mesh::access_log::{Direction, Line};

use super::*;
use crate::call::empty_record;

fn record(path: &str) -> Record {
    let mut record = empty_record(Direction::Inbound, SystemTime::UNIX_EPOCH);
    record.path = Some(path.to_owned());
    record.decision = Some(Verdict::Allow);
    record
}

fn denial(source: &str, port: u16) -> Record {
    let mut record = record("/secret");
    record.decision = Some(Verdict::Deny);
    record.source = Some(source.into());
    record.source_address = Some(SocketAddr::from(([127, 0, 0, 1], port)).into());
    record.reason = Some("no rule admits".into());
    record
}

fn config(path: &Path) -> LogConfig {
    LogConfig {
        path: Some(path.to_owned()),
        ..LogConfig::default()
    }
}

fn room(records: usize, refusals: usize) -> Room {
    Room {
        records,
        refusals,
        kept: 4,
    }
}

fn lines(path: &Path) -> Vec<Line> {
    let text = fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| Line::parse(line).expect(line))
        .collect()
}

fn paths(path: &Path) -> Vec<String> {
    lines(path)
        .into_iter()
        .filter_map(|line| line.path)
        .collect()
}

/// What a writer would take now.
fn waiting(handle: &Handle) -> Vec<Line> {
    let taken = handle.shared.lock().take_lines(Vec::new());
    let text = String::from_utf8(taken).unwrap();
    text.lines()
        .map(|line| Line::parse(line).expect(line))
        .collect()
}

#[tokio::test]
async fn lines_are_appended_in_order_to_a_file_that_others_cannot_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("logs/a.log");
    for run in 0..2 {
        let log = start(&config(&path), Counters::default()).unwrap();
        for call in 0..3 {
            log.record(&record(&format!("/{run}/{call}")));
        }
        assert!(log.flush().await);
    }
    assert_eq!(
        paths(&path),
        ["/0/0", "/0/1", "/0/2", "/1/0", "/1/1", "/1/2"]
    );
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o640
    );
}

#[test]
fn lines_are_written_without_being_asked_for_and_when_the_log_is_closed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.log");
    let log = start(&config(&path), Counters::default()).unwrap();
    let appear = |count: usize| {
        let since = Instant::now();
        while paths(&path).len() < count {
            assert!(since.elapsed() < Duration::from_secs(30), "never written");
            std::thread::yield_now();
        }
    };
    log.record(&record("/1"));
    appear(1);
    log.record(&record("/2"));
    appear(2);
    log.record(&record("/3"));
    drop(log);
    appear(3);
}

#[test]
fn a_full_queue_drops_and_counts() {
    let log = Handle::new(room(10, 10), Counters::default());
    for _ in 0..15 {
        log.record(&record("/"));
    }
    assert_eq!(log.counters().dropped.get(), 5);
    assert_eq!(waiting(&log).len(), 10);
    log.record(&record("/"));
    assert_eq!(waiting(&log).len(), 1, "there is room again");
}

#[test]
fn the_queue_is_bounded_in_bytes_too() {
    let log = Handle::new(room(100, 0), Counters::default());
    for _ in 0..100 {
        log.record(&record(&"\u{1}".repeat(2048)));
    }
    let dropped = log.counters().dropped.get();
    let bytes = log.shared.lock().take_lines(Vec::new()).len();
    assert!(bytes <= 100 * 1024, "{bytes}");
    assert!(dropped > 80, "{dropped}");
}

#[test]
fn a_flood_of_allowed_calls_hides_no_refusal() {
    let log = Handle::new(room(10, 3), Counters::default());
    for _ in 0..1_000 {
        log.record(&record("/"));
    }
    log.record(&denial("spiffe://t/ns/a/sa/b", 1));
    let mut would = record("/");
    would.decision = Some(Verdict::WouldDeny);
    log.record(&would);
    let mut handshake = record("/");
    (handshake.decision, handshake.error) = (None, Some("tls_handshake"));
    log.record(&handshake);
    let refusals = waiting(&log).split_off(10);
    assert_eq!(refusals.len(), 3);
    assert_eq!(log.counters().dropped.get(), 990);
}

#[test]
fn a_flood_of_refusals_is_added_up_per_peer_and_loses_no_count() {
    let log = Handle::new(room(10, 5), Counters::default());
    for call in 0..100 {
        log.record(&denial("spiffe://t/ns/a/sa/one", call));
        log.record(&denial("spiffe://t/ns/a/sa/two", call));
    }
    log.record(&record("/allowed"));
    let lines = waiting(&log);
    let refusals: Vec<_> = lines
        .iter()
        .filter(|line| line.decision.as_deref() == Some("deny"))
        .collect();
    assert_eq!(
        refusals.len(),
        7,
        "five alone, then one for each of two peers"
    );
    assert_eq!(refusals.iter().map(|line| line.calls()).sum::<u64>(), 200);
    for sum in &refusals[5..] {
        assert_eq!(sum.flags, ["aggregated"]);
        assert_eq!(
            sum.source_address.as_deref(),
            Some("127.0.0.1"),
            "whatever the port"
        );
        assert!(sum.last_time.is_some() && sum.path.is_none(), "{sum:?}");
        assert!((97..=98).contains(&sum.calls()), "{sum:?}");
    }
    assert_eq!(log.counters().dropped.get(), 0);
    assert_eq!(lines.len(), 8, "and the allowed call is there");
}

#[test]
fn peers_beyond_their_bound_share_a_line() {
    let log = Handle::new(room(1, 1), Counters::default());
    for peer in 0..5_000 {
        log.record(&denial(&format!("spiffe://t/ns/a/sa/{peer}"), 1));
    }
    let lines = waiting(&log);
    assert!(lines.len() <= 1_026, "{}", lines.len());
    assert_eq!(lines.iter().map(Line::calls).sum::<u64>(), 5_000);
}

#[test]
fn the_latest_refusals_are_kept_for_looking_at() {
    let log = Handle::new(room(10, 100), Counters::default());
    for call in 0..10 {
        log.record(&record("/allowed"));
        log.record(&denial(&format!("spiffe://t/ns/a/sa/{call}"), 1));
    }
    let kept: Vec<_> = log
        .denials()
        .iter()
        .map(|line| Line::parse(line).unwrap().source.unwrap())
        .collect();
    assert_eq!(
        kept,
        (6..10)
            .map(|call| format!("spiffe://t/ns/a/sa/{call}"))
            .collect::<Vec<_>>()
    );
}

#[tokio::test]
async fn a_rotated_file_is_opened_anew() {
    let folder = tempfile::tempdir().unwrap();
    let (path, old) = (folder.path().join("a.log"), folder.path().join("a.log.1"));
    let log = start(&config(&path), Counters::default()).unwrap();
    log.record(&record("/before"));
    assert!(log.flush().await);
    fs::rename(&path, &old).unwrap();
    log.record(&record("/behind"));
    assert!(log.flush().await);
    assert_eq!(
        (paths(&old), paths(&path)),
        (vec!["/before".to_owned()], vec!["/behind".to_owned()])
    );
    log.reopen();
    log.record(&record("/asked"));
    assert!(log.flush().await);
    assert_eq!(paths(&path), ["/behind", "/asked"]);
}

#[tokio::test]
async fn a_folder_that_vanished_is_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("logs/a.log");
    let log = start(&config(&path), Counters::default()).unwrap();
    log.record(&record("/lost with its file"));
    assert!(log.flush().await);
    fs::remove_dir_all(path.parent().unwrap()).unwrap();
    log.record(&record("/new"));
    assert!(log.flush().await);
    assert_eq!(paths(&path), ["/new"]);
    assert_eq!(log.counters().write_failures.get(), 0);
}

#[tokio::test]
async fn a_full_disk_is_survived_and_its_lines_are_written_later() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.log");
    std::os::unix::fs::symlink("/dev/full", &path).unwrap();
    let config = LogConfig {
        queue_records_max: 10,
        ..config(&path)
    };
    let log = start(&config, Counters::default()).unwrap();
    log.record(&record("/kept"));
    assert!(!log.flush().await, "nothing can be written");
    assert!(log.counters().write_failures.get() > 0);
    for _ in 0..15 {
        log.record(&record("/later"));
    }
    assert_eq!(log.counters().dropped.get(), 5, "the queue keeps its bound");
    fs::remove_file(&path).unwrap();
    assert!(log.flush().await, "there is room again");
    let written = paths(&path);
    assert_eq!((written.len(), written[0].as_str()), (11, "/kept"));
}

#[test]
fn a_log_that_cannot_be_opened_is_an_error_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    assert!(start(&config(folder.path()), Counters::default()).is_err());
}

#[test]
fn a_line_torn_by_a_rotation_is_whole_in_the_new_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.log");
    let handle = Handle::discarding();
    let target = Target::open(Some(&path)).unwrap();
    let mut writer = Writer::new(Arc::clone(&handle.shared), target, Duration::ZERO);
    writer.begin_for_tests(b"one\ntwo\nthree\n", 6);
    fs::rename(&path, folder.path().join("a.log.1")).unwrap();
    writer.write(false).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "two\nthree\n");
}

#[test]
fn a_discarding_log_counts_what_it_drops() {
    let log = Handle::discarding();
    log.record(&record("/"));
    log.record(&denial("spiffe://t/ns/a/sa/b", 1));
    assert_eq!(log.counters().dropped.get(), 2);
}
