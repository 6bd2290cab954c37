//! How often certificates are issued: for one identity, and overall.
//!
//! Invariant: the map of identities is bounded by the identities that were attested within the
//! last minute or two; an attacker without evidence adds nothing to it.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use sidegate_mesh::spiffe::SpiffeId;

use crate::config::Limits;

const WINDOW: Duration = Duration::from_mins(1);

/// Token buckets that hold a minute's worth and refill steadily.
pub struct IssuanceLimits {
    per_identity: f64,
    overall: Bucket,
    overall_max: f64,
    identities: HashMap<SpiffeId, Bucket>,
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
            per_identity: f64::from(limits.issuances_per_identity_per_minute),
            overall: Bucket {
                tokens: overall_max,
                at: now,
            },
            overall_max,
            identities: HashMap::new(),
            swept: now,
        }
    }

    /// Takes one issuance for `id`.
    ///
    /// # Errors
    ///
    /// [`Wait`]; nothing was taken then.
    pub fn take(&mut self, id: &SpiffeId, now: SystemTime) -> Result<(), Wait> {
        self.sweep(now);
        let full = Bucket {
            tokens: self.per_identity,
            at: now,
        };
        let mut own = *self.identities.get(id).unwrap_or(&full);
        own.take(self.per_identity, now)
            .map_err(|wait| Wait { own: true, wait })?;
        let overall = self.overall.take(self.overall_max, now);
        overall.map_err(|wait| Wait { own: false, wait })?;
        self.identities.insert(id.clone(), own);
        Ok(())
    }

    /// A bucket that has filled up again says nothing.
    fn sweep(&mut self, now: SystemTime) {
        if now.duration_since(self.swept).unwrap_or_default() < WINDOW {
            return;
        }
        self.swept = now;
        self.identities
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
    fn identities_that_are_quiet_are_forgotten() {
        let mut limits = limits(2, 100_000);
        let now = SystemTime::UNIX_EPOCH;
        for n in 0..1000 {
            limits.take(&id(&format!("w{n}")), now).unwrap();
        }
        limits.take(&id("late"), now + WINDOW * 2).unwrap();
        assert_eq!(limits.identities.len(), 1);
    }
}
