//! The ledger's form on disk: JSON lines, each holding the hash of the line before.
//!
//! A line is the entry's JSON with one more member at its end, `"hash"`: the SHA-256 of the bytes
//! before it, closed with `}`. The entry holds the hash of its predecessor, so no line can be
//! changed, removed or moved without every later hash changing.
//!
//! Invariant: [`scan`] shows only entries whose chain holds from the first line on.

use std::io::{self, BufRead};
use std::path::Path;
use std::sync::Arc;

use super::{Entry, Event, Head, LedgerError};
use crate::digest::Digest;

const HASH_MEMBER: &str = ",\"hash\":\"";
/// `,"hash":"`, 64 digits, `"}`.
const SUFFIX_BYTES: usize = HASH_MEMBER.len() + 64 + 2;

/// Longest line that is read: a root in base64 is the longest thing that is written.
const LINE_BYTES_MAX: usize = 1 << 20;

/// What [`scan`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scanned {
    /// Where the chain ends.
    pub head: Head,
    /// Bytes that belong to the chain.
    pub valid_bytes: u64,
    /// Bytes behind them that a crash left: a line without its end, or blocks never filled.
    pub torn_bytes: u64,
}

/// Why one line is no part of the chain.
#[derive(Debug, thiserror::Error)]
enum LineError {
    #[error("the line is cut off")]
    Cut,
    #[error("the entry's hash is not that of its content; it was changed after it was written")]
    Hash,
    #[error("the entry does not follow the one before; a line was removed, added or moved")]
    Order,
    #[error("the entry cannot be understood ({0}); was it written by a newer version?")]
    Unknown(serde_json::Error),
}

impl Head {
    /// Before the first entry.
    pub const EMPTY: Self = Self {
        entries: 0,
        hash: Digest::ZERO,
    };

    /// Appends to `lines` the entry that follows, and moves on to it.
    ///
    /// # Errors
    ///
    /// When the event cannot be written as JSON; nothing has changed then.
    pub fn push(
        &mut self,
        lines: &mut Vec<u8>,
        time: u64,
        event: Event,
    ) -> Result<(), serde_json::Error> {
        let entry = Entry {
            index: self.entries,
            time,
            event,
            previous: self.hash,
        };
        let body = serde_json::to_vec(&entry)?;
        let hash = Digest::of(&body);
        let open = body.strip_suffix(b"}").unwrap_or(&body);
        lines.extend_from_slice(open);
        lines.extend_from_slice(format!("{HASH_MEMBER}{hash}\"}}\n").as_bytes());
        self.entries += 1;
        self.hash = hash;
        Ok(())
    }

    fn follow(&mut self, line: &[u8]) -> Result<Entry, LineError> {
        let at = line.len().checked_sub(SUFFIX_BYTES).ok_or(LineError::Cut)?;
        let (open, suffix) = line.split_at_checked(at).ok_or(LineError::Cut)?;
        let hash: Digest = suffix
            .strip_prefix(HASH_MEMBER.as_bytes())
            .and_then(|rest| rest.strip_suffix(b"\"}"))
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| digits.parse().ok())
            .ok_or(LineError::Cut)?;
        let body = [open, b"}"].concat();
        if Digest::of(&body) != hash {
            return Err(LineError::Hash);
        }
        let entry: Entry = serde_json::from_slice(&body).map_err(LineError::Unknown)?;
        if entry.index != self.entries || entry.previous != self.hash {
            return Err(LineError::Order);
        }
        self.entries += 1;
        self.hash = hash;
        Ok(entry)
    }
}

/// Reads a chain from its first line and shows each entry to `visit`.
///
/// What a crash may leave at the end is counted, not an error: a last line without its line feed,
/// or one with blocks that were never filled. Such a line was never acknowledged to anybody.
///
/// # Errors
///
/// [`LedgerError::Broken`] for anything else that is not the chain.
pub fn scan(
    path: &Path,
    mut input: impl BufRead,
    visit: &mut dyn FnMut(&Entry),
) -> Result<Scanned, LedgerError> {
    let mut scanned = Scanned {
        head: Head::EMPTY,
        valid_bytes: 0,
        torn_bytes: 0,
    };
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = read_line(&mut input, &mut line).map_err(|source| LedgerError::Read {
            path: path.to_owned(),
            source: Arc::new(source),
        })?;
        if read == 0 {
            return Ok(scanned);
        }
        let whole = line.pop_if(|last| *last == b'\n').is_some();
        let followed = if whole {
            scanned.head.follow(&line)
        } else {
            Err(LineError::Cut)
        };
        match followed {
            Ok(entry) => {
                visit(&entry);
                scanned.valid_bytes += read;
            }
            Err(_torn) if is_torn(whole, &line, &mut input) => {
                scanned.torn_bytes = read;
                return Ok(scanned);
            }
            Err(problem) => {
                return Err(LedgerError::Broken {
                    path: path.to_owned(),
                    line: scanned.head.entries + 1,
                    problem: problem.to_string(),
                });
            }
        }
    }
}

fn is_torn(whole: bool, line: &[u8], input: &mut impl BufRead) -> bool {
    if line.len() >= LINE_BYTES_MAX {
        return false;
    }
    let last = input.fill_buf().is_ok_and(<[u8]>::is_empty);
    last && (!whole || line.contains(&0))
}

fn read_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<u64> {
    use io::Read;
    let bound = u64::try_from(LINE_BYTES_MAX).unwrap_or(u64::MAX);
    let read = input.by_ref().take(bound).read_until(b'\n', line)?;
    Ok(u64::try_from(read).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(n: u64) -> Event {
        Event::Repaired { bytes: n }
    }

    fn chain(entries: u64) -> Vec<u8> {
        let mut head = Head::EMPTY;
        let mut lines = Vec::new();
        for n in 0..entries {
            head.push(&mut lines, n, event(n)).unwrap();
        }
        lines
    }

    fn scan_bytes(bytes: &[u8]) -> Result<(Scanned, Vec<u64>), LedgerError> {
        let mut seen = Vec::new();
        let scanned = scan(Path::new("ledger"), bytes, &mut |entry| {
            seen.push(entry.index);
        })?;
        Ok((scanned, seen))
    }

    #[test]
    fn a_chain_is_read_as_it_was_written() {
        let lines = chain(5);
        let (scanned, seen) = scan_bytes(&lines).unwrap();
        assert_eq!(seen, [0, 1, 2, 3, 4]);
        assert_eq!(scanned.valid_bytes, lines.len() as u64);
        assert_eq!(scanned.torn_bytes, 0);
        for line in lines.split(|byte| *byte == b'\n').filter(|l| !l.is_empty()) {
            serde_json::from_slice::<serde_json::Value>(line).unwrap();
        }
    }

    #[test]
    fn a_cut_at_any_byte_is_a_torn_tail_and_loses_no_whole_line() {
        let lines = chain(3);
        let whole = |cut: usize| lines[..cut].split(|byte| *byte == b'\n').count() - 1;
        for cut in 0..lines.len() {
            let (scanned, seen) = scan_bytes(&lines[..cut]).unwrap();
            assert_eq!(seen.len(), whole(cut), "cut at {cut}");
            assert_eq!(scanned.valid_bytes + scanned.torn_bytes, cut as u64);
        }
    }

    #[test]
    fn a_changed_bit_anywhere_is_found() {
        let lines = chain(3);
        for at in 0..lines.len() {
            let mut changed = lines.clone();
            changed[at] ^= 1;
            let result = scan_bytes(&changed);
            let intact = result.is_ok_and(|(scanned, _)| scanned.torn_bytes == 0);
            assert!(!intact, "bit changed at byte {at}");
        }
    }

    #[test]
    fn a_line_removed_added_or_moved_is_found() {
        let lines = chain(3);
        let split: Vec<&[u8]> = lines.split_inclusive(|byte| *byte == b'\n').collect();
        for wrong in [
            [split[0], split[2]].concat(),
            [split[1], split[2]].concat(),
            [split[0], split[2], split[1]].concat(),
            [split[0], split[0], split[1]].concat(),
        ] {
            let error = scan_bytes(&wrong).unwrap_err();
            assert!(matches!(error, LedgerError::Broken { .. }), "{error}");
        }
    }

    #[test]
    fn blocks_that_were_never_filled_are_a_torn_tail_only_at_the_end() {
        let mut lines = chain(2);
        let good = lines.len() as u64;
        lines.extend_from_slice(&[0; 4096]);
        let (scanned, seen) = scan_bytes(&lines).unwrap();
        assert_eq!((scanned.valid_bytes, seen.len()), (good, 2));
        lines.push(b'\n');
        lines.extend_from_slice(&chain(1));
        assert!(scan_bytes(&lines).is_err(), "something follows");
    }
}
