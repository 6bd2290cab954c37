//! Maps for what is looked up at every call.
//!
//! Invariant: no caller chooses a key: they are a policy's own names, numbers that count up, and
//! addresses that calls go to. Whoever writes policies or endpoints could make theirs collide, and
//! would slow down the calls to their own workload; what many tenants fill has the standard map.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// A map whose keys nobody else chooses.
pub type FastMap<K, V> = HashMap<K, V, BuildHasherDefault<FastHasher>>;

/// A short multiplicative hash, the same in every process.
#[derive(Default)]
pub struct FastHasher(u64);

impl FastHasher {
    fn add(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
}

impl Hasher for FastHasher {
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

    fn write_u64(&mut self, number: u64) {
        self.add(number);
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
    use std::hash::{BuildHasher, Hash};
    use std::net::SocketAddr;

    use super::*;

    /// How many of the low bits' and of the high bits' values the hashes of `keys` take.
    fn spread<K: Hash>(keys: impl Iterator<Item = K>) -> (usize, usize) {
        let build = BuildHasherDefault::<FastHasher>::default();
        let hashes: Vec<u64> = keys.map(|key| build.hash_one(key)).collect();
        let distinct = |part: fn(u64) -> u64| {
            let mut parts: Vec<u64> = hashes.iter().copied().map(part).collect();
            parts.sort_unstable();
            parts.dedup();
            parts.len()
        };
        (distinct(|hash| hash & 0x3ff), distinct(|hash| hash >> 57))
    }

    #[test]
    fn numbers_and_addresses_spread_over_buckets_and_groups() {
        let (buckets, groups) = spread(0..1024_u64);
        assert!(buckets > 600 && groups > 100, "{buckets} {groups}");
        let (buckets, groups) = spread(
            (0..1024_u16)
                .map(u16::to_be_bytes)
                .map(|[high, low]| SocketAddr::from(([10, 0, high, low], 15006))),
        );
        assert!(buckets > 500 && groups > 100, "{buckets} {groups}");
    }
}
