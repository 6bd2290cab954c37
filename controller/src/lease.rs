//! Which replica is the leader: the one that holds a Lease.
//!
//! Invariants: a leader that could not renew in time stops being one by its own clock, before
//! another one may take over; the moment of a foreign renewal is when this replica saw it, so clocks
//! need not agree; each change of holder raises the term, by which a word of an earlier leader is
//! told from one of the present one.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ObjectMeta, PostParams};
use sidegate_mesh::clock::Clock;
use tokio::sync::watch;

use crate::config;

/// Who holds the Lease, for the how-manieth time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Term {
    /// `NAME/ADDRESS:PORT` of the holder.
    pub holder: String,
    pub number: i32,
}

impl Term {
    /// Where the holder is reached.
    pub(crate) fn address(&self) -> Option<SocketAddr> {
        self.holder.rsplit_once('/')?.1.parse().ok()
    }
}

/// What this replica is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Leadership {
    /// Nobody knows.
    Unknown,
    /// Another one is the leader.
    Follower(Term),
    /// This one is.
    Leader {
        term: Term,
        /// Until when, unless it renews.
        until: SystemTime,
    },
}

impl Leadership {
    /// The term in which this replica is the leader at this moment.
    pub(crate) fn leads(&self, now: SystemTime) -> Option<&Term> {
        match self {
            Self::Leader { term, until } if now < *until => Some(term),
            _ => None,
        }
    }
}

/// Takes part in the election.
pub(crate) struct Elector {
    pub api: Api<Lease>,
    pub config: config::Lease,
    /// `NAME/ADDRESS:PORT` of this replica.
    pub identity: String,
    pub leadership: watch::Sender<Leadership>,
    pub clock: Arc<dyn Clock>,
    /// A foreign Lease as it was seen last, and when it was new.
    pub seen: Option<(Option<String>, SystemTime)>,
}

impl Elector {
    /// Renews, or looks, until it is dropped.
    pub(crate) async fn run(mut self) {
        loop {
            self.step().await;
            let interval = self.clock.sleep(self.config.interval);
            interval.await;
        }
    }

    /// One look at the Lease, and what follows from it.
    pub(crate) async fn step(&mut self) {
        let asked = self.clock.now();
        // A request that hangs must not hide that the Lease has ended.
        let bound = self.clock.sleep(self.config.duration / 3);
        let outcome = tokio::select! {
            outcome = self.look(asked) => outcome,
            () = bound => Err(Failure::Slow),
        };
        let next = match outcome {
            Ok(next) => next,
            Err(failure) => {
                tracing::warn!(error = %failure, "cannot look at the lease");
                let now = self.clock.now();
                match &*self.leadership.borrow() {
                    leading if leading.leads(now).is_some() => return,
                    Leadership::Follower(_) => return,
                    _ => Leadership::Unknown,
                }
            }
        };
        self.publish(next);
    }

    fn publish(&self, next: Leadership) {
        let now = self.clock.now();
        let term = |leadership: &Leadership| match leadership {
            Leadership::Leader { term, .. } | Leadership::Follower(term) => Some(term.clone()),
            Leadership::Unknown => None,
        };
        let before = self.leadership.borrow().clone();
        if before.leads(now).is_some() != next.leads(now).is_some() || term(&before) != term(&next)
        {
            let holder = term(&next).map(|term| term.holder);
            let leads = next.leads(now).is_some();
            tracing::info!(
                leader = leads,
                holder = holder.unwrap_or_default(),
                "leadership"
            );
        }
        self.leadership.send_if_modified(|known| {
            let differs = *known != next;
            *known = next;
            differs
        });
    }

    async fn look(&mut self, asked: SystemTime) -> Result<Leadership, Failure> {
        let Some(lease) = self.api.get_opt(&self.config.name).await? else {
            let spec = self.held_spec(asked, 0, asked);
            let lease = Lease {
                metadata: ObjectMeta {
                    name: Some(self.config.name.clone()),
                    ..Default::default()
                },
                spec: Some(spec),
            };
            let created = self.api.create(&PostParams::default(), &lease).await;
            return self.held(created, asked);
        };
        let spec = lease.spec.clone().unwrap_or_default();
        let number = spec.lease_transitions.unwrap_or_default();
        let holder = spec.holder_identity.clone().unwrap_or_default();
        let leads = self.leadership.borrow().leads(asked).cloned();
        if holder == self.identity && leads.is_some_and(|term| term.number == number) {
            let acquired = spec
                .acquire_time
                .as_ref()
                .map_or(asked, |time| time.0.into());
            let spec = self.held_spec(asked, number, acquired);
            return self.replace(lease, spec, asked).await;
        }
        if holder != self.identity && !holder.is_empty() && !self.has_ended(&lease, asked) {
            return Ok(Leadership::Follower(Term { holder, number }));
        }
        let spec = self.held_spec(asked, number.saturating_add(1), asked);
        self.replace(lease, spec, asked).await
    }

    /// Whether nobody has renewed a foreign Lease for its whole duration, as seen from here.
    fn has_ended(&mut self, lease: &Lease, now: SystemTime) -> bool {
        let version = lease.metadata.resource_version.clone();
        let since = match &self.seen {
            Some((seen, since)) if *seen == version => *since,
            _ => now,
        };
        self.seen = Some((version, since));
        let spec = lease.spec.as_ref();
        let said = spec.and_then(|spec| spec.lease_duration_seconds);
        let said = said
            .and_then(|seconds| u64::try_from(seconds).ok())
            .map(Duration::from_secs);
        let duration = said
            .unwrap_or(self.config.duration)
            .max(self.config.duration);
        now.duration_since(since).unwrap_or_default() >= duration
    }

    async fn replace(
        &self,
        mut lease: Lease,
        spec: LeaseSpec,
        asked: SystemTime,
    ) -> Result<Leadership, Failure> {
        // The version that was read goes along, so two replicas cannot both take it.
        lease.spec = Some(spec);
        let name = &self.config.name;
        let replaced = self.api.replace(name, &PostParams::default(), &lease).await;
        self.held(replaced, asked)
    }

    fn held(
        &self,
        written: Result<Lease, kube::Error>,
        asked: SystemTime,
    ) -> Result<Leadership, Failure> {
        match written {
            Ok(lease) => {
                let number = lease.spec.and_then(|spec| spec.lease_transitions);
                Ok(Leadership::Leader {
                    term: Term {
                        holder: self.identity.clone(),
                        number: number.unwrap_or_default(),
                    },
                    until: asked + self.config.duration - self.config.interval,
                })
            }
            // Somebody was faster; the next look tells who.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(Leadership::Unknown),
            Err(error) => Err(error.into()),
        }
    }

    fn held_spec(&self, now: SystemTime, number: i32, acquired: SystemTime) -> LeaseSpec {
        let time = |moment: SystemTime| Timestamp::try_from(moment).ok().map(MicroTime);
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(self.config.duration.as_secs()).ok(),
            acquire_time: time(acquired),
            renew_time: time(now),
            lease_transitions: Some(number),
            ..Default::default()
        }
    }
}

/// Gives the Lease back, so that another replica need not wait for its end.
pub(crate) async fn release(api: &Api<Lease>, name: &str, term: &Term) {
    let released = async {
        let Some(mut lease) = api.get_opt(name).await? else {
            return Ok(());
        };
        let spec = lease.spec.get_or_insert_default();
        let is_ours = spec.holder_identity.as_deref() == Some(term.holder.as_str())
            && spec.lease_transitions.unwrap_or_default() == term.number;
        if is_ours {
            spec.holder_identity = Some(String::new());
            api.replace(name, &PostParams::default(), &lease).await?;
        }
        Ok::<_, kube::Error>(())
    };
    if let Err(error) = released.await {
        tracing::warn!(error = %error, "the lease was not given back");
    }
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Kube(#[from] kube::Error),
    #[error("the API server takes too long")]
    Slow,
}
