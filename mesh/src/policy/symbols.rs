//! Names as numbers, so that a decision compares integers.
//!
//! Invariant: only a policy adds a name; a call only looks names up, so what a caller sends can
//! neither grow a table nor build a collision that was not in the policy.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// A name's number. Numbers below [`FIRST`] have a meaning of their own where they are used.
pub(super) type Symbol = u32;

/// The first number that a name gets.
pub(super) const FIRST: Symbol = 8;

/// What no table holds: a name that no policy mentions.
pub(super) const UNKNOWN: Symbol = Symbol::MAX;

/// A map from what a policy holds.
pub(super) type FastMap<K, V> = HashMap<K, V, BuildHasherDefault<NameHasher>>;

/// The names of one sort that the policies mention.
#[derive(Clone, Debug, Default)]
pub(super) struct Symbols {
    numbers: FastMap<Box<str>, Symbol>,
}

impl Symbols {
    /// The number of `name`, a new one when it is new.
    pub(super) fn intern(&mut self, name: &str) -> Symbol {
        if let Some(number) = self.numbers.get(name) {
            return *number;
        }
        let next = Symbol::try_from(self.numbers.len()).unwrap_or(UNKNOWN - FIRST - 1) + FIRST;
        self.numbers.insert(name.into(), next);
        next
    }

    /// The number of `name`, or [`UNKNOWN`].
    pub(super) fn find(&self, name: &str) -> Symbol {
        self.numbers.get(name).copied().unwrap_or(UNKNOWN)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }
}

/// A short multiplicative hash: the keys are a policy's own, so nobody gains by a collision.
#[derive(Default)]
pub(super) struct NameHasher(u64);

impl NameHasher {
    fn add(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
}

impl Hasher for NameHasher {
    fn write(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.add(u64::from_le_bytes(*word));
        }
        let mut last = [0_u8; 8];
        for (to, from) in last.iter_mut().zip(rest) {
            *to = *from;
        }
        self.add(u64::from_le_bytes(last));
    }

    fn write_u32(&mut self, number: u32) {
        self.add(u64::from(number));
    }

    fn write_u8(&mut self, byte: u8) {
        self.add(u64::from(byte));
    }

    fn finish(&self) -> u64 {
        // The table takes its group from the high bits and its bucket from the low ones.
        self.0 ^ (self.0 >> 32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_keeps_its_number_and_an_unknown_one_has_none() {
        let mut symbols = Symbols::default();
        let orders = symbols.intern("orders");
        assert_ne!(symbols.intern("order"), orders);
        assert_eq!(symbols.intern("orders"), orders);
        assert_eq!(symbols.find("orders"), orders);
        assert_eq!(symbols.find("ordersx"), UNKNOWN);
        assert!(orders >= FIRST);
    }
}
