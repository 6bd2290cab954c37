//! Names as numbers, so that a decision compares integers.
//!
//! Invariant: only a policy adds a name; a call only looks names up, so what a caller sends can
//! neither grow a table nor build a collision that was not in the policy.

use crate::fast_map::FastMap;

/// A name's number. Numbers below [`FIRST`] have a meaning of their own where they are used.
pub(super) type Symbol = u32;

/// The first number that a name gets.
pub(super) const FIRST: Symbol = 8;

/// What no table holds: a name that no policy mentions.
pub(super) const UNKNOWN: Symbol = Symbol::MAX;

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
