//! How a record becomes a line.
//!
//! Always true: what is written is one object of JSON on one line. Words of ours need no escape;
//! every other text is looked through, and given to `serde_json` where a byte of it needs one.
//! Written by hand because each call writes a line: nothing is allocated for it.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use serde::Serializer as _;

use super::{Address, PATH_BYTES_MAX, Record, TEXT_BYTES_MAX, USER_AGENT_BYTES_MAX, cut, escape};
use crate::decision::Verdict;

/// A member's name as it stands in a line, behind the member before it.
macro_rules! name {
    ($name:literal) => {
        concat!(",\"", $name, "\":")
    };
}

/// Appends `record` to `line`, with its line feed.
pub(super) fn line(record: &Record, line: &mut Vec<u8>) {
    let mut members = Members(line);
    members.ours("{\"kind\":\"access\",\"time\":\"");
    timestamp(members.0, record.time);
    members.ours("\"");
    members.milliseconds(name!("duration_ms"), Some(record.duration));
    members.milliseconds(name!("upstream_ms"), record.upstream);
    members.word(name!("direction"), Some(record.direction.as_str()));
    members.word(name!("protocol"), Some(record.protocol.as_str()));
    ends(record, &mut members);
    request(record, &mut members);
    outcome(record, &mut members);
    members.ours("}\n");
}

fn ends(record: &Record, members: &mut Members<'_>) {
    members.whole(name!("source"), record.source.as_deref());
    members.whole(name!("destination"), record.destination.as_deref());
    let service = record.destination_service.as_deref();
    members.whole(name!("destination_service"), service);
    members.address(name!("source_address"), record.source_address);
    members.address(name!("destination_address"), record.destination_address);
}

fn request(record: &Record, members: &mut Members<'_>) {
    members.text(name!("method"), record.method.as_deref());
    members.text(name!("authority"), record.authority.as_deref());
    members.bounded(name!("path"), record.path.as_deref(), PATH_BYTES_MAX);
    if record.query {
        members.ours(concat!(name!("query"), "true"));
    }
    members.text(name!("grpc_service"), record.grpc_service.as_deref());
    members.text(name!("grpc_method"), record.grpc_method.as_deref());
    members.number(name!("grpc_status"), record.grpc_status.map(u64::from));
    members.text(name!("grpc_message"), record.grpc_message.as_deref());
    members.number(name!("status"), record.status.map(u64::from));
}

fn outcome(record: &Record, members: &mut Members<'_>) {
    members.word(name!("decision"), record.decision.map(Verdict::as_str));
    members.whole(name!("policy"), record.policy.as_deref());
    members.whole(name!("rule"), record.rule.as_deref());
    members.text(name!("reason"), record.reason.as_deref());
    members.whole(name!("decision_id"), record.decision_id.as_deref());
    members.whole(name!("audit"), record.audit.as_deref());
    members.number(name!("request_bytes"), Some(record.request_bytes));
    members.number(name!("response_bytes"), Some(record.response_bytes));
    members.word(name!("error"), record.error);
    if !record.flags.is_empty() {
        members.words(name!("flags"), &record.flags);
    }
    members.number(name!("attempts"), record.attempts.map(u64::from));
    members.word(name!("tls_version"), record.tls_version);
    members.number(name!("snapshot"), record.snapshot);
    members.text(name!("request_id"), record.request_id.as_deref());
    members.text(name!("trace_id"), record.trace_id.as_deref());
    let user_agent = record.user_agent.as_deref();
    members.bounded(name!("user_agent"), user_agent, USER_AGENT_BYTES_MAX);
}

/// A line as far as it is written. A member that is unknown is left out.
struct Members<'l>(&'l mut Vec<u8>);

impl Members<'_> {
    fn ours(&mut self, text: &'static str) {
        self.0.extend_from_slice(text.as_bytes());
    }

    /// One of our own words, which are plain.
    fn word(&mut self, name: &'static str, word: Option<&'static str>) {
        let Some(word) = word else { return };
        self.ours(name);
        self.0.push(b'"');
        self.ours(word);
        self.0.push(b'"');
    }

    fn words(&mut self, name: &'static str, words: &[&'static str]) {
        self.ours(name);
        let mut before = b'[';
        for word in words {
            self.0.push(before);
            self.0.push(b'"');
            self.ours(word);
            self.0.push(b'"');
            before = b',';
        }
        self.0.push(b']');
    }

    /// A text that no peer chose.
    fn whole(&mut self, name: &'static str, text: Option<&str>) {
        self.bounded(name, text, usize::MAX);
    }

    fn text(&mut self, name: &'static str, text: Option<&str>) {
        self.bounded(name, text, TEXT_BYTES_MAX);
    }

    fn bounded(&mut self, name: &'static str, text: Option<&str>, max: usize) {
        let Some(text) = text else { return };
        self.ours(name);
        string(self.0, cut(text, max));
    }

    fn address(&mut self, name: &'static str, address: Option<Address>) {
        let Some(address) = address else { return };
        self.ours(name);
        self.0.push(b'"');
        match address {
            Address::Socket(SocketAddr::V4(address)) => {
                ipv4(self.0, address.ip().octets());
                self.0.push(b':');
                number(self.0, u64::from(address.port()));
            }
            Address::Host(IpAddr::V4(address)) => ipv4(self.0, address.octets()),
            // Digits, letters, colons and brackets; a scope is a number.
            other => self.0.extend_from_slice(other.to_string().as_bytes()),
        }
        self.0.push(b'"');
    }

    fn number(&mut self, name: &'static str, value: Option<u64>) {
        let Some(value) = value else { return };
        self.ours(name);
        number(self.0, value);
    }

    /// Milliseconds with microseconds, of which zeros at the end are left out.
    fn milliseconds(&mut self, name: &'static str, value: Option<Duration>) {
        let Some(value) = value else { return };
        self.ours(name);
        let micros = value.saturating_add(Duration::from_nanos(500)).as_micros();
        let micros = u64::try_from(micros).unwrap_or(u64::MAX);
        number(self.0, micros / 1000);
        self.0.push(b'.');
        digits(self.0, micros % 1000, 3);
        for _ in 0..2 {
            if self.0.last() == Some(&b'0') {
                self.0.pop();
            }
        }
    }
}

/// RFC 3339 in UTC with microseconds.
pub(super) fn timestamp(line: &mut Vec<u8>, time: SystemTime) {
    let time = time::OffsetDateTime::from(time);
    let (year, month, day) = time.to_calendar_date();
    let (hour, minute, second, micros) = time.to_hms_micro();
    // Nothing here was before the year 0.
    digits(line, u64::try_from(year).unwrap_or_default(), 4);
    for (before, part) in [
        (b'-', u8::from(month)),
        (b'-', day),
        (b'T', hour),
        (b':', minute),
        (b':', second),
    ] {
        line.push(before);
        digits(line, u64::from(part), 2);
    }
    line.push(b'.');
    digits(line, u64::from(micros), 6);
    line.push(b'Z');
}

fn ipv4(line: &mut Vec<u8>, octets: [u8; 4]) {
    let [first, rest @ ..] = octets;
    number(line, u64::from(first));
    for octet in rest {
        line.push(b'.');
        number(line, u64::from(octet));
    }
}

fn number(line: &mut Vec<u8>, value: u64) {
    line.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
}

/// `value` with at least `width` digits, at most 20.
fn digits(line: &mut Vec<u8>, value: u64, width: usize) {
    const ZEROS: &[u8; 20] = b"00000000000000000000";
    let mut buffer = itoa::Buffer::new();
    let text = buffer.format(value);
    let zeros = width.saturating_sub(text.len());
    line.extend_from_slice(ZEROS.get(..zeros).unwrap_or(ZEROS));
    line.extend_from_slice(text.as_bytes());
}

/// `text` in quotes, with every unsafe character escaped.
fn string(line: &mut Vec<u8>, text: &str) {
    // Without an early end, so that many bytes are looked at in one step.
    let special = |byte: u8| !(0x20..0x7f).contains(&byte) || byte == b'"' || byte == b'\\';
    let plain = !text.bytes().fold(false, |any, byte| any | special(byte));
    if plain {
        line.push(b'"');
        line.extend_from_slice(text.as_bytes());
        line.push(b'"');
        return;
    }
    let before = line.len();
    let mut serializer = serde_json::Serializer::with_formatter(&mut *line, escape::Escaped);
    if serializer.serialize_str(text).is_err() {
        // Memory takes every byte; if it did not, the line would still be one.
        line.truncate(before);
        line.extend_from_slice(b"\"\"");
    }
}
