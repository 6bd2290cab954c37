//! The access log under a million calls whose paths were made to break it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    missing_docs,
    reason = "tests"
)]

use std::time::SystemTime;

use sidegate_mesh::Verdict;
use sidegate_mesh::access_log::{Direction, Line, is_unsafe};
use sidegate_proxy::access_log::{Counters, start};
use sidegate_proxy::call::empty_record;
use sidegate_proxy::config::LogConfig;

/// Text with everything in it that ends lines, strings, colours or directions.
fn hostile(random: &mut fastrand::Rng) -> String {
    const BAD: [char; 16] = [
        '"', '\\', '\n', '\r', '\0', '\u{1b}', '\u{7f}', '\u{85}', '\u{9b}', '\u{2028}',
        '\u{202e}', '\u{2066}', '\u{feff}', '{', '}', 'é',
    ];
    let length = if random.u8(..) == 0 {
        3000
    } else {
        random.usize(..24)
    };
    (0..length)
        .map(|_| {
            if random.bool() {
                BAD[random.usize(..BAD.len())]
            } else {
                random.char(..)
            }
        })
        .collect()
}

async fn every_call_is_a_line_or_counted(calls: u64, room: usize) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.log");
    let config = LogConfig {
        path: Some(path.clone()),
        queue_records_max: room,
        denials_queue_max: room,
        ..LogConfig::default()
    };
    let log = start(&config, Counters::default()).unwrap();
    let seed = fastrand::u64(..);
    eprintln!("random seed: {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut record = empty_record(Direction::Inbound, SystemTime::UNIX_EPOCH);
    for _ in 0..calls {
        record.path = Some(hostile(&mut random));
        record.user_agent = Some(hostile(&mut random));
        let denied = random.u8(..10) == 0;
        record.decision = Some(if denied {
            Verdict::Deny
        } else {
            Verdict::Allow
        });
        log.record(&record);
    }
    assert!(log.flush().await);
    let (mut lines, mut logged, mut aggregated) = (0, 0, 0);
    let text = std::fs::read_to_string(&path).expect("UTF-8");
    for line in text.split_terminator('\n') {
        assert!(!line.contains(is_unsafe), "{line:?}");
        let read = Line::parse(line).unwrap_or_else(|error| panic!("{error}: {line:?}"));
        lines += 1;
        logged += read.calls();
        aggregated += u64::from(read.count.is_some());
    }
    let dropped = log.counters().dropped.get();
    eprintln!("{calls} calls: {lines} lines ({aggregated} of them sums), {dropped} dropped");
    assert_eq!(logged + dropped, calls);
    assert!(
        logged >= u64::try_from(room).unwrap(),
        "what had room was written"
    );
}

#[tokio::test]
async fn every_call_of_many_is_a_line_or_counted() {
    every_call_is_a_line_or_counted(20_000, 16_384).await;
    every_call_is_a_line_or_counted(20_000, 10).await;
}

#[tokio::test]
#[ignore = "a million calls; `.ci/run` runs it with --release"]
async fn every_call_of_a_million_is_a_line_or_counted() {
    every_call_is_a_line_or_counted(1_000_000, 16_384).await;
}

/// What the log costs a call, with a writer that keeps up or does not.
#[tokio::test]
#[ignore = "measures time; `.ci/run` runs it with --release"]
async fn recording_a_call_costs_less_than_two_microseconds() {
    let folder = tempfile::tempdir().unwrap();
    let config = LogConfig {
        path: Some(folder.path().join("a.log")),
        ..LogConfig::default()
    };
    let log = start(&config, Counters::default()).unwrap();
    let mut record = empty_record(Direction::Inbound, SystemTime::UNIX_EPOCH);
    record.source = Some("spiffe://mesh.local/ns/shop/sa/web".into());
    record.path = Some("/orders/7".to_owned());
    record.user_agent = Some("curl/8.5.0".to_owned());
    record.decision = Some(Verdict::Allow);
    let rounds = 100_000_u32;
    let mut best = std::time::Duration::MAX;
    for _ in 0..5 {
        let since = std::time::Instant::now();
        (0..rounds).for_each(|_| log.record(&record));
        best = best.min(since.elapsed() / rounds);
    }
    eprintln!("one record: {best:?}");
    if !cfg!(debug_assertions) {
        assert!(best < std::time::Duration::from_micros(2), "{best:?}");
    }
}
