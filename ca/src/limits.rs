//! How often certificates are issued: for one identity, and overall; and, in a cluster, how often a
//! pod or an address may ask.
//!
//! Invariant: each map has a bound and forgets whoever was quiet for a minute or two. The identities
//! in it were attested, so an attacker without evidence adds nothing to that one.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, SystemTime};

use sidegate_mesh::spiffe::SpiffeId;

use crate::config::Limits;

const WINDOW: Duration = Duration::from_mins(1);

/// How often certificates are issued: for one identity, and for all together.
pub struct IssuanceLimits {
    overall: Bucket,
    overall_max: f64,
    identities: Buckets<SpiffeId>,
}

/// Token buckets, one a key, that hold a minute's worth and refill steadily.
pub struct Buckets<K> {
    per_minute: f64,
    keys_max: usize,
    by_key: HashMap<K, Bucket>,
    swept: SystemTime,
}

/// Why an issuance has to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    /// Whether it was the identity's own limit.
    pub own: bool,
    /// How long until one is free.
    pub wait: Duration,
}

#[derive(Clone, Copy)]
struct Bucket {
    tokens: f64,
    at: SystemTime,
}

impl IssuanceLimits {
    /// Full buckets.
    pub fn new(limits: &Limits, now: SystemTime) -> Self {
        let overall_max = f64::from(limits.issuances_per_minute);
        Self {
            overall: Bucket {
                tokens: overall_max,
                at: now,
            },
            overall_max,
            identities: Buckets::new(
                limits.issuances_per_identity_per_minute,
                limits.certificates_max,
                now,
            ),
        }
    }

    /// Takes one issuance for `id`.
    ///
    /// # Errors
    ///
    /// [`Wait`]; nothing was taken then.
    pub fn take(&mut self, id: &SpiffeId, now: SystemTime) -> Result<(), Wait> {
        let own = self.identities.taken(id, now);
        let own = own.map_err(|wait| Wait { own: true, wait })?;
        let overall = self.overall.take(self.overall_max, now);
        overall.map_err(|wait| Wait { own: false, wait })?;
        self.identities.by_key.insert(id.clone(), own);
        Ok(())
    }
}

impl<K: Clone + Eq + Hash> Buckets<K> {
    /// Full buckets, of which at most `keys_max` are remembered.
    pub fn new(per_minute: u32, keys_max: usize, now: SystemTime) -> Self {
        Self {
            per_minute: f64::from(per_minute),
            keys_max,
            by_key: HashMap::new(),
            swept: now,
        }
    }

    /// Takes one for `key`.
    ///
    /// # Errors
    ///
    /// How long until one is free; nothing was taken then.
    pub fn take(&mut self, key: &K, now: SystemTime) -> Result<(), Duration> {
        let bucket = self.taken(key, now)?;
        self.by_key.insert(key.clone(), bucket);
        Ok(())
    }

    /// The bucket of `key` with one less in it, not put back yet.
    fn taken(&mut self, key: &K, now: SystemTime) -> Result<Bucket, Duration> {
        self.sweep(now);
        let known = self.by_key.get(key).copied();
        if known.is_none() && self.by_key.len() >= self.keys_max {
            return Err(WINDOW);
        }
        let mut bucket = known.unwrap_or(Bucket {
            tokens: self.per_minute,
            at: now,
        });
        bucket.take(self.per_minute, now)?;
        Ok(bucket)
    }

    /// A bucket that has filled up again says nothing.
    fn sweep(&mut self, now: SystemTime) {
        if now.duration_since(self.swept).unwrap_or_default() < WINDOW {
            return;
        }
        self.swept = now;
        self.by_key
            .retain(|_, bucket| now.duration_since(bucket.at).unwrap_or_default() < WINDOW);
    }
}

impl Bucket {
    fn take(&mut self, max: f64, now: SystemTime) -> Result<(), Duration> {
        let rate = max / WINDOW.as_secs_f64();
        let passed = now.duration_since(self.at).unwrap_or_default();
        let tokens = (self.tokens + passed.as_secs_f64() * rate).min(max);
        if tokens < 1.0 {
            return Err(Duration::from_secs_f64((1.0 - tokens) / rate));
        }
        *self = Self {
            tokens: tokens - 1.0,
            at: now,
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(own: u32, overall: u32) -> IssuanceLimits {
        let limits = Limits {
            issuances_per_identity_per_minute: own,
            issuances_per_minute: overall,
            ..Limits::default()
        };
        IssuanceLimits::new(&limits, SystemTime::UNIX_EPOCH)
    }

    fn id(name: &str) -> SpiffeId {
        format!("spiffe://mesh.local/ns/shop/sa/{name}")
            .parse()
            .unwrap()
    }

    #[test]
    fn one_identity_cannot_use_up_what_others_need() {
        let mut limits = limits(2, 100);
        let now = SystemTime::UNIX_EPOCH;
        limits.take(&id("web"), now).unwrap();
        limits.take(&id("web"), now).unwrap();
        let wait = limits.take(&id("web"), now).unwrap_err();
        assert!(wait.own);
        assert_eq!(wait.wait, Duration::from_secs(30));
        limits.take(&id("orders"), now).unwrap();
        limits.take(&id("web"), now + wait.wait).unwrap();
    }

    #[test]
    fn all_together_are_limited_too() {
        let mut limits = limits(2, 3);
        let now = SystemTime::UNIX_EPOCH;
        for name in ["a", "b", "c"] {
            limits.take(&id(name), now).unwrap();
        }
        assert!(!limits.take(&id("d"), now).unwrap_err().own);
    }

    #[test]
    fn strangers_beyond_what_is_remembered_wait() {
        let now = SystemTime::UNIX_EPOCH;
        let mut buckets = Buckets::new(2, 2, now);
        buckets.take(&1, now).unwrap();
        buckets.take(&2, now).unwrap();
        assert_eq!(buckets.take(&3, now), Err(WINDOW));
        buckets.take(&1, now).unwrap();
        buckets.take(&3, now + WINDOW * 2).unwrap();
    }

    #[test]
    fn identities_that_are_quiet_are_forgotten() {
        let mut limits = limits(2, 100_000);
        let now = SystemTime::UNIX_EPOCH;
        for n in 0..1000 {
            limits.take(&id(&format!("w{n}")), now).unwrap();
        }
        limits.take(&id("late"), now + WINDOW * 2).unwrap();
        assert_eq!(limits.identities.by_key.len(), 1);
    }
}
