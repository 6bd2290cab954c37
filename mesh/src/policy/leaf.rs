//! What the rules that share one pattern say, by caller, host and kind of request.
//!
//! Invariant: for one key an entry holds only methods that no earlier rule of that key holds, so
//! looking a key up costs no more however many rules share the pattern.

use std::collections::BTreeMap;

use super::symbols::Symbol;
use crate::fast_map::FastMap;

/// The place of a rule in the order in which matching rules are named: the lowest decides.
pub(super) type Rank = u32;

/// Later than every rule: no rule.
pub(super) const NO_RANK: Rank = Rank::MAX;

/// Whom, for which host and for which kind of request an entry concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) caller: Symbol,
    pub(super) host: Symbol,
    pub(super) kind: Symbol,
}

/// Callers that are no names.
pub(super) mod caller {
    pub(in crate::policy) const ANYONE: super::Symbol = 0;
    pub(in crate::policy) const UNAUTHENTICATED: super::Symbol = 1;
}

/// Hosts that are no names.
pub(super) mod host {
    /// The rule names no host.
    pub(in crate::policy) const ANY: super::Symbol = 0;
    /// The request names no host; only a Deny has entries for it.
    pub(in crate::policy) const ABSENT: super::Symbol = 1;
}

/// Kinds of request that are no upgrade tokens.
pub(super) mod kind {
    /// Any request at all: a Deny without upgrades.
    pub(in crate::policy) const ANY: super::Symbol = 0;
    /// A request without an upgrade: an Allow without upgrades.
    pub(in crate::policy) const PLAIN: super::Symbol = 1;
    /// A gRPC call: an Allow for grpc.
    pub(in crate::policy) const GRPC: super::Symbol = 2;
}

/// The methods that have a bit of their own.
const KNOWN: [&str; 9] = [
    "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH",
];

/// A set of methods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct MethodSet {
    known: u16,
    all: bool,
    other: Vec<Box<str>>,
}

impl MethodSet {
    pub(super) fn all() -> Self {
        Self {
            all: true,
            ..Self::default()
        }
    }

    pub(super) fn of<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        let mut set = Self::default();
        for name in names {
            match bit(name) {
                0 => set.other.push(name.into()),
                bit => set.known |= bit,
            }
        }
        set
    }

    fn is_empty(&self) -> bool {
        self.known == 0 && !self.all && self.other.is_empty()
    }

    /// Takes out what `earlier` already holds.
    fn subtract(&mut self, earlier: &Self) {
        if earlier.all {
            *self = Self::default();
        } else if !self.all {
            self.known &= !earlier.known;
            self.other.retain(|name| !earlier.other.contains(name));
        }
    }
}

/// The method of one request, looked up once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Method<'a> {
    text: &'a str,
    bit: u16,
    /// The same whatever the case: what a Deny compares.
    any_case_bit: u16,
}

impl<'a> Method<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        let bit = bit(text);
        let any_case_bit = if bit == 0 { bit_in_any_case(text) } else { bit };
        Self {
            text,
            bit,
            any_case_bit,
        }
    }

    fn is_in(self, set: &MethodSet, case: Case) -> bool {
        let bit = match case {
            Case::Exact => self.bit,
            Case::Any => self.any_case_bit,
        };
        let same = |name: &str| match case {
            Case::Exact => name == self.text,
            Case::Any => name.eq_ignore_ascii_case(self.text),
        };
        set.all || set.known & bit != 0 || set.other.iter().any(|name| same(name))
    }
}

/// How methods compare: exactly for an Allow, in any case for a Deny.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Case {
    Exact,
    Any,
}

fn bit(name: &str) -> u16 {
    KNOWN
        .iter()
        .position(|known| *known == name)
        .map_or(0, |at| 1 << at)
}

fn bit_in_any_case(name: &str) -> u16 {
    KNOWN
        .iter()
        .position(|known| known.eq_ignore_ascii_case(name))
        .map_or(0, |at| 1 << at)
}

/// The entries of one pattern while they are collected.
pub(super) type Entries = BTreeMap<Key, Vec<(Rank, MethodSet)>>;

/// Adds one rule's methods under `key`. Ranks come in rising order.
pub(super) fn add(entries: &mut Entries, key: Key, rank: Rank, mut methods: MethodSet) {
    let list = entries.entry(key).or_default();
    for (_, earlier) in list.iter() {
        methods.subtract(earlier);
    }
    if !methods.is_empty() {
        list.push((rank, methods));
    }
}

/// What the rules under one pattern say: by key, in the order of their ranks.
pub(super) type Leaf = FastMap<Key, Box<[(Rank, MethodSet)]>>;

/// What one request looks for in every leaf.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    pub(super) callers: &'a [Symbol],
    pub(super) hosts: &'a [Symbol],
    pub(super) kinds: &'a [Symbol],
    pub(super) method: Method<'a>,
    pub(super) case: Case,
}

/// The lowest rank in `leaf` that admits what is wanted; [`NO_RANK`] for none.
pub(super) fn find(leaf: &Leaf, wanted: &Wanted<'_>) -> Rank {
    let mut best = NO_RANK;
    if leaf.is_empty() {
        return best;
    }
    for &caller in wanted.callers {
        for &host in wanted.hosts {
            for &kind in wanted.kinds {
                let Some(rules) = leaf.get(&Key { caller, host, kind }) else {
                    continue;
                };
                let mut rules = rules.iter();
                let first = rules.find(|(_, methods)| wanted.method.is_in(methods, wanted.case));
                best = first.map_or(best, |(rank, _)| best.min(*rank));
            }
        }
    }
    best
}
