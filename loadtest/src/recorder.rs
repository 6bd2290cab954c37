//! What one thread has seen.
//!
//! Invariant: `sent = answered + failed + unfinished` at every moment, for the measured calls; a
//! call belongs to the warm-up or to the measurement by its intended start.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;

use hdrhistogram::Histogram;

use crate::clock::Nanos;
use crate::failure::Failure;
use crate::http1::Answer;
use crate::schedule::Start;

/// Parts of the measurement whose percentiles are compared to tell noise.
pub(crate) const WINDOWS: usize = 10;
/// Most columns of the picture over time.
const SLOTS_MAX: u64 = 240;
/// Shortest column.
const SLOT_MIN: Nanos = 50_000_000;
/// Rows of the picture over time: four an octave, from 1 µs.
pub(crate) const ROWS: usize = 112;
/// A start this late counts as late.
const LATE: Nanos = 1_000_000;
const HIGHEST: Nanos = 3_600_000_000_000;

/// The measured part of a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) from: Nanos,
    pub(crate) to: Nanos,
}

impl Span {
    /// Width of one column of the picture over time.
    pub(crate) fn slot(&self) -> Nanos {
        ((self.to - self.from) / SLOTS_MAX).max(SLOT_MIN)
    }

    fn window(&self, at: Nanos) -> usize {
        let parts = WINDOWS as u64;
        let part = (at - self.from).saturating_mul(parts) / (self.to - self.from).max(1);
        usize::try_from(part.min(parts - 1)).unwrap_or(0)
    }
}

/// How many, of the measured calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) warmup_sent: u64,
    pub(crate) sent: u64,
    pub(crate) answered: u64,
    pub(crate) failed: u64,
    pub(crate) unfinished: u64,
    /// Found no free connection or stream at their intended start.
    pub(crate) queued: u64,
    /// Started more than 1 ms after their intended start.
    pub(crate) late: u64,
}

/// One part of the measurement.
#[derive(Clone, Debug)]
pub(crate) struct Window {
    pub(crate) answered: u64,
    pub(crate) latency: Histogram<u64>,
}

/// What other threads may read while the load runs.
#[derive(Debug, Default)]
pub(crate) struct Live {
    pub(crate) answered: AtomicU64,
    pub(crate) failed: AtomicU64,
    /// The first failure's words.
    pub(crate) first_failure: OnceLock<String>,
}

/// Everything recorded. Times are nanoseconds.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) span: Span,
    pub(crate) counts: Counts,
    /// From intended start to the answer's last byte.
    pub(crate) latency: Histogram<u64>,
    /// From actual start to the answer's last byte.
    pub(crate) service: Histogram<u64>,
    /// How late the pacer was.
    pub(crate) lag: Histogram<u64>,
    pub(crate) windows: Vec<Window>,
    /// Columns by intended start, rows by latency.
    pub(crate) timeline: Vec<[u32; ROWS]>,
    pub(crate) bytes: u64,
    pub(crate) statuses: BTreeMap<u16, u64>,
    pub(crate) grpc_statuses: BTreeMap<u16, u64>,
    /// By kind: how many, and the first one's words.
    pub(crate) errors: BTreeMap<&'static str, (u64, String)>,
    /// When the last measured call ended.
    pub(crate) last: Nanos,
}

/// Three significant digits from 64 ns on. Bounds are constants, so a histogram can be made.
fn histogram(digits: u8) -> Histogram<u64> {
    #[expect(
        clippy::expect_used,
        reason = "bounds and digits are constants that are valid"
    )]
    Histogram::new_with_bounds(100, HIGHEST, digits).expect("valid bounds")
}

impl Record {
    /// Nothing yet.
    pub(crate) fn new(span: Span) -> Self {
        let slots = (span.to - span.from).div_ceil(span.slot());
        let window = Window {
            answered: 0,
            latency: histogram(2),
        };
        Self {
            span,
            counts: Counts::default(),
            latency: histogram(3),
            service: histogram(3),
            lag: histogram(3),
            windows: vec![window; WINDOWS],
            timeline: vec![[0; ROWS]; usize::try_from(slots).unwrap_or(0)],
            bytes: 0,
            statuses: BTreeMap::new(),
            grpc_statuses: BTreeMap::new(),
            errors: BTreeMap::new(),
            last: span.from,
        }
    }

    /// A call has started.
    pub(crate) fn begin(&mut self, start: &Start) {
        if start.intended < self.span.from {
            self.counts.warmup_sent += 1;
            return;
        }
        self.counts.sent += 1;
        self.counts.unfinished += 1;
        self.counts.queued += u64::from(start.queued);
        self.counts.late += u64::from(start.begun - start.intended > LATE);
    }

    /// The pacer made the call of `intended` due `lag` too late.
    pub(crate) fn lagged(&mut self, intended: Nanos, lag: Nanos) {
        if intended >= self.span.from {
            self.lag.saturating_record(lag);
        }
    }

    /// The call has ended at `end`.
    pub(crate) fn end(&mut self, start: &Start, end: Nanos, outcome: &Result<Answer, Failure>) {
        if start.intended < self.span.from {
            return;
        }
        self.counts.unfinished -= 1;
        self.last = self.last.max(end);
        match outcome {
            Ok(answer) => self.answered(start, end, answer),
            Err(failure) => {
                self.counts.failed += 1;
                let first = || (0, failure.to_string());
                self.errors.entry(failure.kind()).or_insert_with(first).0 += 1;
            }
        }
    }

    fn answered(&mut self, start: &Start, end: Nanos, answer: &Answer) {
        let latency = end - start.intended;
        self.counts.answered += 1;
        self.bytes += answer.bytes;
        *self.statuses.entry(answer.status).or_default() += 1;
        if let Some(status) = answer.grpc_status {
            *self.grpc_statuses.entry(status).or_default() += 1;
        }
        self.latency.saturating_record(latency);
        self.service.saturating_record(end - start.begun);
        let window = self.span.window(start.intended);
        if let Some(window) = self.windows.get_mut(window) {
            window.answered += 1;
            window.latency.saturating_record(latency);
        }
        let slot = usize::try_from((start.intended - self.span.from) / self.span.slot());
        let cell = slot.ok().and_then(|slot| self.timeline.get_mut(slot));
        if let Some(cell) = cell.and_then(|column| column.get_mut(row(latency))) {
            *cell += 1;
        }
    }

    /// Adds what another thread has seen of the same span.
    pub(crate) fn merge(&mut self, other: &Self) {
        let (mine, its) = (&mut self.counts, &other.counts);
        mine.warmup_sent += its.warmup_sent;
        mine.sent += its.sent;
        mine.answered += its.answered;
        mine.failed += its.failed;
        mine.unfinished += its.unfinished;
        mine.queued += its.queued;
        mine.late += its.late;
        add(&mut self.latency, &other.latency);
        add(&mut self.service, &other.service);
        add(&mut self.lag, &other.lag);
        for (mine, its) in self.windows.iter_mut().zip(&other.windows) {
            mine.answered += its.answered;
            add(&mut mine.latency, &its.latency);
        }
        for (mine, its) in self.timeline.iter_mut().zip(&other.timeline) {
            mine.iter_mut()
                .zip(its)
                .for_each(|(mine, its)| *mine += its);
        }
        self.bytes += other.bytes;
        for (status, count) in &other.statuses {
            *self.statuses.entry(*status).or_default() += count;
        }
        for (status, count) in &other.grpc_statuses {
            *self.grpc_statuses.entry(*status).or_default() += count;
        }
        for (kind, (count, example)) in &other.errors {
            let first = || (0, example.clone());
            self.errors.entry(kind).or_insert_with(first).0 += count;
        }
        self.last = self.last.max(other.last);
    }
}

fn add(mine: &mut Histogram<u64>, its: &Histogram<u64>) {
    // Every histogram has the same bounds, so nothing can be too large.
    mine.add(its).ok();
}

/// The row of a latency in the picture over time.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a row is small and positive"
)]
pub(crate) fn row(latency: Nanos) -> usize {
    let octaves = (latency.max(1_000) as f64 / 1_000.0).log2();
    ((octaves * 4.0) as usize).min(ROWS - 1)
}

#[cfg(test)]
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "tests"
)]
mod tests {
    use super::*;

    const SPAN: Span = Span {
        from: 1_000_000_000,
        to: 11_000_000_000,
    };

    fn start(intended: Nanos) -> Start {
        Start {
            intended,
            begun: intended + 10_000,
            queued: false,
        }
    }

    #[expect(clippy::unnecessary_wraps, reason = "recorded like what calls return")]
    fn answer() -> Result<Answer, Failure> {
        Ok(Answer {
            status: 200,
            grpc_status: None,
            bytes: 3,
            reusable: true,
        })
    }

    /// A xorshift, so that the sample is always the same.
    fn sample(count: u64) -> Vec<Nanos> {
        let mut state = 0x9E37_79B9_7F4A_7C15_u64;
        (0..count)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                // From 20 µs to 20 s, evenly over the logarithm.
                let share = (state >> 11) as f64 / (1_u64 << 53) as f64;
                (20_000.0 * 1e6_f64.powf(share)) as Nanos
            })
            .collect()
    }

    #[test]
    fn percentiles_of_known_latencies_are_right_within_one_percent() {
        let mut latencies = sample(200_000);
        let (mut left, mut right) = (Record::new(SPAN), Record::new(SPAN));
        for (number, latency) in latencies.iter().enumerate() {
            let start = start(SPAN.from + number as u64 * 50_000);
            let record = if number % 3 == 0 {
                &mut left
            } else {
                &mut right
            };
            record.begin(&start);
            record.end(&start, start.intended + latency, &answer());
        }
        left.merge(&right);
        latencies.sort_unstable();
        for quantile in [0.001, 0.5, 0.9, 0.99, 0.999, 0.9999] {
            let exact = latencies[(200_000.0 * quantile) as usize - 1] as f64;
            let told = left.latency.value_at_quantile(quantile) as f64;
            assert!(
                (told / exact - 1.0).abs() < 0.01,
                "{quantile}: {told} for {exact}"
            );
        }
        assert_eq!(left.latency.len(), 200_000);
        let wait = left.latency.min() - left.service.min();
        assert!(
            (9_000..11_000).contains(&wait),
            "the wait for a slot is in the latency only: {wait}"
        );
        let drawn: u64 = left
            .timeline
            .iter()
            .flatten()
            .map(|cell| u64::from(*cell))
            .sum();
        assert_eq!(drawn, 200_000);
        let windows: Vec<u64> = left.windows.iter().map(|window| window.answered).collect();
        assert_eq!(windows, [20_000; WINDOWS]);
    }

    #[test]
    fn counts_add_up_and_leave_the_warm_up_out() {
        let mut record = Record::new(SPAN);
        let warm = start(SPAN.from - 1);
        record.begin(&warm);
        record.end(&warm, SPAN.from + 50_000, &answer());
        let calls = [start(SPAN.from), start(SPAN.from + 1), start(SPAN.from + 2)];
        for start in &calls {
            record.begin(start);
        }
        record.end(&calls[0], SPAN.from + 90_000, &answer());
        record.end(&calls[1], SPAN.from + 90_000, &Err(Failure::Closed));
        let expected = Counts {
            warmup_sent: 1,
            sent: 3,
            answered: 1,
            failed: 1,
            unfinished: 1,
            queued: 0,
            late: 0,
        };
        assert_eq!(record.counts, expected);
        assert_eq!(record.latency.len(), 1);
        assert_eq!(record.errors["closed"].0, 1);
    }

    #[test]
    fn rows_rise_with_the_latency_and_never_leave_the_picture() {
        let rows: Vec<usize> = [0, 1_000, 2_000, 1_000_000, HIGHEST * 9].map(row).into();
        assert_eq!(rows, [0, 0, 4, 39, ROWS - 1]);
    }
}
