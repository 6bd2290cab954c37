//! One call's record while it runs.
//!
//! Always true: a [`Call`] that was started writes exactly one line, when it is dropped at the
//! latest; then with the flag `cut_off`, so a task that was aborted still leaves its record. The
//! same facts feed the metrics.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use sidegate_mesh::access_log::{Direction, Protocol, Record};

/// Body bytes of a call so far, shared with whatever carries them.
#[derive(Debug, Default)]
pub struct ByteCounters {
    /// From the caller.
    pub request: AtomicU64,
    /// To the caller.
    pub response: AtomicU64,
}

impl ByteCounters {
    /// Counts bytes from the caller.
    pub fn add_request(&self, bytes: usize) {
        self.request.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Counts bytes to the caller.
    pub fn add_response(&self, bytes: usize) {
        self.response.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Bytes both ways: what an idle limit watches.
    pub fn total(&self) -> u64 {
        self.request.load(Ordering::Relaxed) + self.response.load(Ordering::Relaxed)
    }
}

/// A record of something that begins at `now`, with nothing known yet.
pub fn empty_record(direction: Direction, now: SystemTime) -> Record {
    Record {
        kind: "access",
        time: rfc3339(now),
        duration_ms: 0.0,
        upstream_ms: None,
        direction,
        protocol: Protocol::Http2,
        source: None,
        destination: None,
        destination_service: None,
        source_address: None,
        destination_address: None,
        method: None,
        authority: None,
        path: None,
        query: false,
        grpc_service: None,
        grpc_method: None,
        grpc_status: None,
        grpc_message: None,
        status: None,
        decision: None,
        policy: None,
        rule: None,
        reason: None,
        decision_id: None,
        audit: None,
        request_bytes: 0,
        response_bytes: 0,
        error: None,
        flags: Vec::new(),
        attempts: None,
        tls_version: None,
        snapshot: None,
        request_id: None,
        trace_id: None,
        user_agent: None,
    }
}

/// RFC 3339 in UTC with microseconds.
pub fn rfc3339(time: SystemTime) -> String {
    let time = time::OffsetDateTime::from(time);
    let (year, month, day) = time.to_calendar_date();
    let (hour, minute, second, micros) = time.to_hms_micro();
    let month = u8::from(month);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_time_is_written_with_microseconds() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_000_042);
        assert_eq!(rfc3339(time), "2023-11-14T22:13:20.000042Z");
    }
}
