//! Lines that wait for the writer.
//!
//! Always true: lines keep the order in which they were recorded; the room of allowed calls and
//! the room of refusals are counted apart, in records and in bytes; everything is bounded.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use sidegate_mesh::access_log::{Address, Record, timestamp};
use tokio::sync::oneshot;

/// Bytes of room for each record of room; a line may be longer while others are shorter.
const RECORD_BYTES: usize = 1024;

/// Room in bytes even where there is room for few records.
const BYTES_MIN: usize = 64 * 1024;

/// How many bytes make the writer write before its time.
const EAGER_BYTES: usize = 256 * 1024;

/// Most peers whose refusals are added up at once; further ones share one line.
const PEERS_MAX: usize = 1024;

/// How much may wait.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Room {
    /// Records of allowed calls.
    pub(super) records: usize,
    /// Refusals.
    pub(super) refusals: usize,
    /// Latest refusals that are kept for looking at.
    pub(super) kept: usize,
}

/// What waits for the writer.
#[derive(Debug)]
pub(super) struct Queue {
    room: Room,
    lines: Vec<u8>,
    allowed: Taken,
    refused: Taken,
    sums: HashMap<Peer, Sum>,
    kept: VecDeque<Box<str>>,
    requests: Requests,
    /// The writer sleeps for want of work and has not been woken.
    idle: bool,
    /// The writer waits for more and is to be woken early.
    eager: bool,
}

/// What is asked of the writer beside writing.
#[derive(Debug, Default)]
pub(super) struct Requests {
    pub(super) flushes: Vec<oneshot::Sender<bool>>,
    pub(super) reopen: bool,
    pub(super) closed: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Taken {
    records: usize,
    bytes: usize,
}

impl Taken {
    fn fits(&mut self, line: &[u8], records_max: usize) -> bool {
        let fits = self.records < records_max
            && self.bytes + line.len() <= records_max.saturating_mul(RECORD_BYTES).max(BYTES_MIN);
        if fits {
            self.records += 1;
            self.bytes += line.len();
        }
        fits
    }
}

/// Whose refusals are added up: who, about what, why.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Peer {
    source: Option<Arc<str>>,
    address: Option<IpAddr>,
    destination: Option<Arc<str>>,
    decision: Option<&'static str>,
    error: Option<&'static str>,
}

#[derive(Debug)]
struct Sum {
    first: Record,
    last_time: SystemTime,
    count: u64,
}

impl Queue {
    pub(super) fn new(room: Room) -> Self {
        Self {
            room,
            lines: Vec::new(),
            allowed: Taken::default(),
            refused: Taken::default(),
            sums: HashMap::new(),
            kept: VecDeque::new(),
            requests: Requests::default(),
            idle: false,
            eager: false,
        }
    }

    /// Takes the line of an allowed call if there is room.
    pub(super) fn push(&mut self, line: &[u8]) -> bool {
        let fits = self.allowed.fits(line, self.room.records);
        if fits {
            self.lines.extend_from_slice(line);
        }
        fits
    }

    /// Takes the line of a refusal, or adds the refusal to those of its peer.
    pub(super) fn push_refusal(&mut self, record: &Record, line: &[u8]) -> bool {
        if self.room.refusals == 0 {
            return false;
        }
        self.keep(line);
        if self.refused.fits(line, self.room.refusals) {
            self.lines.extend_from_slice(line);
        } else {
            self.add_up(record);
        }
        true
    }

    fn keep(&mut self, line: &[u8]) {
        if self.room.kept == 0 {
            return;
        }
        if self.kept.len() >= self.room.kept {
            self.kept.pop_front();
        }
        self.kept
            .push_back(String::from_utf8_lossy(line).trim_end().into());
    }

    fn add_up(&mut self, record: &Record) {
        let mut peer = Peer::of(record);
        if self.sums.len() >= PEERS_MAX && !self.sums.contains_key(&peer) {
            peer = Peer::default();
        }
        match self.sums.entry(peer) {
            Entry::Occupied(mut entry) => {
                let sum = entry.get_mut();
                sum.count += 1;
                sum.last_time = record.time;
            }
            Entry::Vacant(entry) => {
                let first = common(record, entry.key());
                entry.insert(Sum {
                    first,
                    last_time: record.time,
                    count: 1,
                });
            }
        }
    }

    /// Whether the writer has to be woken for what was just taken.
    pub(super) fn take_wake(&mut self) -> bool {
        let eager = self.eager && self.lines.len() >= EAGER_BYTES;
        let wake = (self.idle && self.has_work()) || eager;
        if wake {
            (self.idle, self.eager) = (false, false);
        }
        wake
    }

    pub(super) fn has_work(&self) -> bool {
        !self.lines.is_empty() || !self.sums.is_empty() || self.is_urgent()
    }

    /// Whether somebody waits for the writer.
    pub(super) fn is_urgent(&self) -> bool {
        let requests = &self.requests;
        !requests.flushes.is_empty() || requests.reopen || requests.closed
    }

    /// The writer is about to sleep until there is work.
    pub(super) fn set_idle(&mut self) {
        self.idle = true;
    }

    /// The writer is about to wait for more, unless there is much already.
    pub(super) fn set_eager(&mut self) -> bool {
        self.eager = self.lines.len() < EAGER_BYTES;
        self.eager
    }

    /// Hands over all lines that wait; `spent` is memory to be used again.
    pub(super) fn take_lines(&mut self, spent: Vec<u8>) -> Vec<u8> {
        let mut lines = std::mem::replace(&mut self.lines, spent);
        let mut sums: Vec<Sum> = self.sums.drain().map(|(_, sum)| sum).collect();
        sums.sort_by_key(|sum| sum.first.time);
        for sum in &sums {
            sum.write_line(&mut lines);
        }
        (self.allowed, self.refused) = (Taken::default(), Taken::default());
        lines
    }

    /// Hands over what is asked of the writer, which is awake now.
    pub(super) fn take_requests(&mut self) -> Requests {
        (self.idle, self.eager) = (false, false);
        let closed = self.requests.closed;
        Requests {
            closed,
            ..std::mem::take(&mut self.requests)
        }
    }

    pub(super) fn refusals_kept(&self) -> Vec<String> {
        self.kept.iter().map(ToString::to_string).collect()
    }

    pub(super) fn ask_flush(&mut self, done: oneshot::Sender<bool>) {
        self.requests.flushes.push(done);
    }

    pub(super) fn ask_reopen(&mut self) {
        self.requests.reopen = true;
    }

    pub(super) fn close(&mut self) {
        self.requests.closed = true;
    }
}

impl Peer {
    fn of(record: &Record) -> Self {
        // Without the port, which differs for each connection of one peer.
        let address = record.source_address.map(|address| match address {
            Address::Socket(address) => address.ip(),
            Address::Host(address) => address,
        });
        Self {
            source: record.source.clone(),
            address,
            destination: record.destination.clone(),
            decision: record.decision.map(sidegate_mesh::Verdict::as_str),
            error: record.error,
        }
    }
}

impl Sum {
    fn write_line(&self, lines: &mut Vec<u8>) {
        self.first.write_line(lines);
        // Further members behind those of the record; both values are ours and need no escape.
        lines.truncate(lines.len().saturating_sub(b"}\n".len()));
        let more = format!(
            ",\"count\":{},\"last_time\":\"{}\"}}\n",
            self.count,
            timestamp(self.last_time)
        );
        lines.extend_from_slice(more.as_bytes());
    }
}

/// What the refusals of one peer have in common, as far as `record` tells it.
fn common(record: &Record, peer: &Peer) -> Record {
    Record {
        source: peer.source.clone(),
        source_address: peer.address.map(Address::Host),
        destination: peer.destination.clone(),
        error: peer.error,
        flags: vec!["aggregated"],
        duration: Duration::ZERO,
        upstream: None,
        destination_address: None,
        method: None,
        authority: None,
        path: None,
        query: false,
        grpc_service: None,
        grpc_method: None,
        grpc_message: None,
        decision_id: None,
        request_bytes: 0,
        response_bytes: 0,
        attempts: None,
        request_id: None,
        trace_id: None,
        user_agent: None,
        ..record.clone()
    }
}
