//! The ledger's entries put together: one line a certificate.
//!
//! Invariant: memory holds only certificates whose outcome has not been read yet.

use std::collections::BTreeMap;

use crate::digest::Serial;
use crate::ledger::{Entry, Event, Issuance};

/// What has become of an intended certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// A crash came between; it never left.
    Intended,
    /// It was handed out.
    Issued,
    /// It was not signed, or destroyed.
    Refused,
}

/// One certificate.
#[derive(Clone, Debug)]
pub struct Issued {
    /// Position of its `intended` entry.
    pub index: u64,
    /// Unix time in milliseconds of its last entry.
    pub time: u64,
    /// Who, which key, until when.
    pub issuance: Issuance,
    /// What has become of it.
    pub state: State,
}

/// Reads a ledger entry by entry and shows each certificate once its outcome is known.
pub struct Listing<F> {
    only: Option<String>,
    open: BTreeMap<Serial, Issued>,
    show: F,
}

impl<F: FnMut(Issued)> Listing<F> {
    /// Shows every certificate, or only one identity's.
    pub fn new(only: Option<String>, show: F) -> Self {
        Self {
            only,
            open: BTreeMap::new(),
            show,
        }
    }

    /// Takes in the next entry.
    pub fn take(&mut self, entry: &Entry) {
        match &entry.event {
            Event::Intended(issuance) if self.wanted(issuance) => {
                let issued = Issued {
                    index: entry.index,
                    time: entry.time,
                    issuance: issuance.clone(),
                    state: State::Intended,
                };
                self.open.insert(issuance.serial, issued);
            }
            Event::Issued { serial, .. } => self.end(serial, entry.time, State::Issued),
            Event::Refused { serial, .. } => self.end(serial, entry.time, State::Refused),
            _ => {}
        }
    }

    /// Shows what has no outcome.
    pub fn finish(mut self) {
        let mut rest: Vec<Issued> = std::mem::take(&mut self.open).into_values().collect();
        rest.sort_by_key(|issued| issued.index);
        rest.into_iter().for_each(&mut self.show);
    }

    fn wanted(&self, issuance: &Issuance) -> bool {
        let wanted = self.only.as_deref();
        wanted.is_none_or(|only| only == issuance.spiffe_id.as_str())
    }

    fn end(&mut self, serial: &Serial, time: u64, state: State) {
        if let Some(issued) = self.open.remove(serial) {
            (self.show)(Issued {
                time,
                state,
                ..issued
            });
        }
    }
}
