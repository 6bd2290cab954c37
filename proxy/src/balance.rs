//! Which endpoint a try goes to, and which are left alone for a while.
//!
//! The better of two random endpoints by a peak-sensitive moving average of the time to a response's
//! head, weighed by what is under way there. An endpoint that could not be reached is left for a
//! while that doubles; one that fails several times in a row is ejected as its service's
//! `outlierEjection` says. One that is about to end is left to the calls that it has. Where the
//! service asks for it, endpoints of our own zone come first for as long as most of them are well.
//!
//! Invariants: what is known of an endpoint is keyed by its address and identity, never by its place
//! in a list, and survives a new snapshot; it is one value for all workers; leaving endpoints alone
//! never leaves none: when all are, all are tried.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use sidegate_mesh::Clock;
use sidegate_mesh::routes::{Ejection, Endpoint, Route};

use crate::retry::Budget;

/// Services whose state is kept though nobody calls them at the moment.
const SERVICES_KEPT_MAX: usize = 1024;

/// Lists of endpoints that are remembered of one service: all of it, and single ones of its pods
/// that are called by their address.
const LISTS_KEPT_MAX: usize = 8;

/// What an endpoint that has not answered yet is assumed to take while it is being tried.
const LATENCY_DEFAULT: f64 = 0.03;

/// How fast an observation loses its weight.
const LATENCY_DECAY: f64 = 10.0;

/// First wait for an endpoint that could not be reached; it doubles up to the ejection's duration.
const UNREACHABLE_FIRST: Duration = Duration::from_secs(1);

/// What is known of every service that is called. One for the whole sidecar.
pub struct Services {
    services: Mutex<HashMap<Arc<str>, Arc<Service>>>,
    clock: Arc<dyn Clock>,
}

impl Services {
    /// Nothing is known yet.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self {
            services: Mutex::default(),
            clock,
        }
    }

    /// What is known of `route`'s service, with `route`'s endpoints; those of `zone` come first.
    pub fn target(&self, route: Arc<Route>, zone: Option<Arc<str>>) -> Target {
        let service = self.service(&route.service);
        let endpoints = service.endpoints(&route);
        Target {
            route,
            service,
            endpoints,
            zone,
            clock: Arc::clone(&self.clock),
        }
    }

    fn service(&self, name: &Arc<str>) -> Arc<Service> {
        let mut services = lock(&self.services);
        if let Some(service) = services.get(name) {
            return Arc::clone(service);
        }
        if services.len() >= SERVICES_KEPT_MAX {
            services.retain(|_, service| Arc::strong_count(service) > 1);
        }
        let service = Arc::new(Service::default());
        services.insert(Arc::clone(name), Arc::clone(&service));
        service
    }
}

impl std::fmt::Debug for Services {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Services")
            .field("services", &lock(&self.services).len())
            .finish_non_exhaustive()
    }
}

/// What is known of one service.
#[derive(Debug, Default)]
pub struct Service {
    /// What its retries may use.
    pub budget: Budget,
    /// The latest first.
    endpoints: Mutex<Vec<Aligned>>,
}

/// States in the order of a route's endpoints.
#[derive(Debug)]
struct Aligned {
    endpoints: Arc<[Endpoint]>,
    states: Arc<[Arc<EndpointState>]>,
}

impl Service {
    /// The states of `route`'s endpoints, in their order; those that were known stay as they are.
    fn endpoints(&self, route: &Route) -> Arc<[Arc<EndpointState>]> {
        let mut known = lock(&self.endpoints);
        let same = |aligned: &&Aligned| Arc::ptr_eq(&aligned.endpoints, &route.endpoints);
        if let Some(aligned) = known.iter().find(same) {
            return Arc::clone(&aligned.states);
        }
        let state = |endpoint: &Endpoint| {
            let mut pairs = known
                .iter()
                .flat_map(|old| old.endpoints.iter().zip(old.states.iter()));
            let same = |(known, _): &(&Endpoint, _)| {
                known.address == endpoint.address && known.identity == endpoint.identity
            };
            match pairs.find(same) {
                Some((_, state)) => Arc::clone(state),
                None => Arc::new(EndpointState::default()),
            }
        };
        let states: Arc<[_]> = route.endpoints.iter().map(state).collect();
        known.truncate(LISTS_KEPT_MAX - 1);
        known.insert(
            0,
            Aligned {
                endpoints: Arc::clone(&route.endpoints),
                states: Arc::clone(&states),
            },
        );
        states
    }
}

/// One call's service: where it may go, and what is known of it.
#[derive(Clone)]
pub struct Target {
    /// The route that the call's snapshot names.
    pub route: Arc<Route>,
    /// What is known of the service.
    pub service: Arc<Service>,
    endpoints: Arc<[Arc<EndpointState>]>,
    /// The zone whose endpoints come first.
    zone: Option<Arc<str>>,
    clock: Arc<dyn Clock>,
}

impl Target {
    /// The endpoints that a try may go to: of those not yet tried the ones that are not left alone
    /// and not about to end, of our own zone where that has enough; when there are none of these,
    /// ones that are about to end; and then any.
    pub fn candidates(&self, tried: &[usize]) -> Vec<usize> {
        let now = self.clock.now();
        let untried = || (0..self.endpoints.len()).filter(|index| !tried.contains(index));
        let available = |index: &usize| {
            self.state(*index)
                .is_some_and(|state| state.is_available(now))
        };
        let mut candidates: Vec<usize> = untried().filter(available).collect();
        let lasting = |index: &usize| !self.is_draining(*index);
        if candidates.iter().any(lasting) {
            candidates.retain(lasting);
            self.prefer_zone(&mut candidates);
        }
        if candidates.is_empty() {
            untried().collect()
        } else {
            candidates
        }
    }

    /// Leaves those of our own zone, if at least half of what it has is among `candidates`: a few
    /// that are left of many must not carry the load of all.
    fn prefer_zone(&self, candidates: &mut Vec<usize>) {
        let Some(zone) = &self.zone else { return };
        let near = |index: &usize| {
            let endpoint = self.endpoint(*index);
            endpoint.is_some_and(|endpoint| endpoint.zone.as_ref() == Some(zone))
        };
        let lasting = (0..self.endpoints.len()).filter(|index| !self.is_draining(*index));
        let all = lasting.filter(near).count();
        let here = candidates.iter().filter(|index| near(index)).count();
        if here > 0 && here * 2 >= all {
            candidates.retain(near);
        }
    }

    fn is_draining(&self, index: usize) -> bool {
        self.endpoint(index)
            .is_some_and(|endpoint| endpoint.draining)
    }

    /// The places here of the endpoints that `other` has at `places`.
    pub fn places_of(&self, other: &Self, places: &[usize]) -> Vec<usize> {
        let place = |index: &usize| {
            let wanted = other.endpoint(*index)?;
            let same = |known: &Endpoint| {
                known.address == wanted.address && known.identity == wanted.identity
            };
            self.route.endpoints.iter().position(same)
        };
        places.iter().filter_map(place).collect()
    }

    /// The better of two random candidates; `None` when there is none.
    pub fn choose(&self, candidates: &[usize]) -> Option<usize> {
        let now = Instant::now();
        let cost = |index: usize| self.state(index).map_or(f64::MAX, |state| state.cost(now));
        match candidates {
            [] => None,
            [only] => Some(*only),
            _ => {
                let first = fastrand::usize(..candidates.len());
                let second = (first + fastrand::usize(1..candidates.len())) % candidates.len();
                let (first, second) = (*candidates.get(first)?, *candidates.get(second)?);
                Some(if cost(second) < cost(first) {
                    second
                } else {
                    first
                })
            }
        }
    }

    /// Where the endpoint is, and who must answer there.
    pub fn endpoint(&self, index: usize) -> Option<&Endpoint> {
        self.route.endpoints.get(index)
    }

    /// Counts a call to the endpoint until the guard is dropped.
    pub fn begin(&self, index: usize) -> Option<Load> {
        let state = Arc::clone(self.endpoints.get(index)?);
        state.pending.fetch_add(1, Ordering::Relaxed);
        Some(Load {
            state,
            begun: Instant::now(),
        })
    }

    /// The endpoint answered; `failed` says whether the answer counts as a failure.
    pub fn answered(&self, index: usize, failed: bool) {
        let Some(state) = self.state(index) else {
            return;
        };
        if failed {
            self.count_failure(state);
        } else {
            *lock(&state.health) = Health::default();
        }
    }

    /// The endpoint accepted a connection and then failed the call.
    pub fn failed(&self, index: usize) {
        if let Some(state) = self.state(index) {
            self.count_failure(state);
        }
    }

    /// The endpoint could not be reached, or could not prove its identity.
    pub fn unreachable(&self, index: usize) {
        let Some(state) = self.state(index) else {
            return;
        };
        let longest = self.route.traffic.ejection.duration;
        let mut health = lock(&state.health);
        health.unreachable = health.unreachable.saturating_add(1);
        let factor = 1_u32 << (health.unreachable - 1).min(16);
        let wait = UNREACHABLE_FIRST.saturating_mul(factor).min(longest);
        health.left_until = Some(self.clock.now() + wait);
    }

    fn count_failure(&self, state: &EndpointState) {
        let ejection = &self.route.traffic.ejection;
        let now = self.clock.now();
        let left = self
            .endpoints
            .iter()
            .filter(|other| !other.is_available(now));
        let full = !may_eject(ejection, left.count(), self.endpoints.len());
        let mut health = lock(&state.health);
        health.failures = health.failures.saturating_add(1);
        if health.failures >= ejection.consecutive_failures && !full {
            health.failures = 0;
            health.left_until = Some(now + ejection.duration);
        }
    }

    fn state(&self, index: usize) -> Option<&EndpointState> {
        self.endpoints.get(index).map(Arc::as_ref)
    }
}

/// Whether one more endpoint may be left out. One always may: a share of a few endpoints is often
/// less than one.
fn may_eject(ejection: &Ejection, left_out: usize, endpoints: usize) -> bool {
    let count = |number: usize| f64::from(u32::try_from(number).unwrap_or(u32::MAX));
    left_out == 0 || count(left_out + 1) <= ejection.ejected_max * count(endpoints)
}

/// What is known of one endpoint.
#[derive(Debug)]
pub struct EndpointState {
    pending: AtomicUsize,
    latency: Mutex<Latency>,
    health: Mutex<Health>,
}

impl Default for EndpointState {
    fn default() -> Self {
        Self {
            pending: AtomicUsize::new(0),
            latency: Mutex::new(Latency {
                seconds: LATENCY_DEFAULT,
                at: None,
            }),
            health: Mutex::default(),
        }
    }
}

#[derive(Debug, Default)]
struct Health {
    /// Failures one after the other.
    failures: u32,
    /// Failures to connect one after the other.
    unreachable: u32,
    left_until: Option<SystemTime>,
}

#[derive(Debug)]
struct Latency {
    seconds: f64,
    /// When it was last observed, if it ever was.
    at: Option<Instant>,
}

impl EndpointState {
    fn is_available(&self, now: SystemTime) -> bool {
        lock(&self.health)
            .left_until
            .is_none_or(|until| until <= now)
    }

    /// An endpoint of which nothing is known costs nothing until somebody tries it: it is tried
    /// early, and not flooded.
    fn cost(&self, now: Instant) -> f64 {
        let pending = u32::try_from(self.pending.load(Ordering::Relaxed)).unwrap_or(u32::MAX);
        let latency = lock(&self.latency);
        if latency.at.is_none() && pending == 0 {
            return 0.0;
        }
        latency.decayed(now) * f64::from(pending.saturating_add(1))
    }
}

impl Latency {
    /// The average as it is worth now: without news it sinks, so that a slow endpoint is tried again.
    fn decayed(&self, now: Instant) -> f64 {
        self.seconds * self.weight(now)
    }

    /// What the past still weighs. An assumption does not fade: endpoints of which nothing is known
    /// are equal.
    fn weight(&self, now: Instant) -> f64 {
        let age = |at| now.saturating_duration_since(at).as_secs_f64();
        self.at.map_or(1.0, |at| (-age(at) / LATENCY_DECAY).exp())
    }

    fn observe(&mut self, seconds: f64, now: Instant) {
        let old = self.decayed(now);
        // A peak counts at once; what is better counts as much as time has passed.
        if seconds > old || self.at.is_none() {
            self.seconds = seconds;
        } else {
            let weight = self.weight(now);
            self.seconds = self.seconds * weight + seconds * (1.0 - weight);
        }
        self.at = Some(now);
    }
}

/// A call under way at an endpoint.
#[derive(Debug)]
pub struct Load {
    state: Arc<EndpointState>,
    begun: Instant,
}

impl Load {
    /// The head of the response has come, or the endpoint has failed the call: how fast it fails
    /// counts as well, since otherwise one that always fails would stay unknown.
    pub fn observe(&self) {
        let now = Instant::now();
        let seconds = now.saturating_duration_since(self.begun).as_secs_f64();
        lock(&self.state.latency).observe(seconds, now);
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.state.pending.fetch_sub(1, Ordering::Relaxed);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use sidegate_mesh::ManualClock;
    use sidegate_mesh::host::ServiceName;
    use sidegate_mesh::routes::{PortProtocol, Traffic};

    use super::*;

    fn endpoint(port: u16, account: &str) -> Endpoint {
        let identity = format!("spiffe://mesh.local/ns/shop/sa/{account}");
        Endpoint::new(([127, 0, 0, 1], port).into(), identity.parse().unwrap())
    }

    fn route(endpoints: &[Endpoint], ejection: Ejection) -> Arc<Route> {
        Arc::new(Route {
            service: "orders.shop:80".into(),
            name: ServiceName {
                namespace: "shop".to_owned(),
                name: "orders".to_owned(),
            },
            port: 80,
            protocol: PortProtocol::Auto,
            target_port: 80,
            endpoints: endpoints.into(),
            traffic: Arc::new(Traffic {
                ejection,
                ..Traffic::default()
            }),
        })
    }

    fn orders(count: u16) -> Arc<Route> {
        let endpoints: Vec<_> = (1..=count).map(|port| endpoint(port, "orders")).collect();
        route(&endpoints, Ejection::default())
    }

    fn services() -> (Services, ManualClock) {
        let clock = ManualClock::new(SystemTime::UNIX_EPOCH);
        (Services::new(Arc::new(clock.clone())), clock)
    }

    #[test]
    fn an_endpoint_that_could_not_be_reached_is_left_for_a_while_that_doubles() {
        let (services, clock) = services();
        let target = services.target(orders(2), None);
        assert_eq!(target.candidates(&[]), [0, 1]);
        target.unreachable(0);
        assert_eq!(target.candidates(&[]), [1]);
        clock.advance(Duration::from_secs(1));
        assert_eq!(target.candidates(&[]), [0, 1]);
        target.unreachable(0);
        clock.advance(Duration::from_secs(1));
        assert_eq!(target.candidates(&[]), [1]);
        clock.advance(Duration::from_secs(1));
        assert_eq!(target.candidates(&[]), [0, 1]);
        target.answered(0, false);
        target.unreachable(0);
        clock.advance(Duration::from_secs(1));
        assert_eq!(
            target.candidates(&[]),
            [0, 1],
            "an answer forgets earlier failures"
        );
    }

    #[test]
    fn an_endpoint_that_is_about_to_end_is_tried_when_no_other_is_well() {
        let (services, _clock) = services();
        let mut endpoints: Vec<_> = (1..=3).map(|port| endpoint(port, "orders")).collect();
        endpoints[0].draining = true;
        let target = services.target(route(&endpoints, Ejection::default()), None);
        assert_eq!(target.candidates(&[]), [1, 2]);
        assert_eq!(target.candidates(&[1]), [2]);
        assert_eq!(target.candidates(&[1, 2]), [0]);
        target.unreachable(1);
        assert_eq!(target.candidates(&[]), [2]);
        target.unreachable(2);
        assert_eq!(target.candidates(&[]), [0], "it still serves");
    }

    #[test]
    fn endpoints_of_our_own_zone_come_first_while_most_of_them_are_well() {
        let (services, _clock) = services();
        let zones = ["a", "a", "a", "a", "b", "b"];
        let endpoints: Vec<_> = (1..)
            .zip(zones)
            .map(|(port, zone)| Endpoint {
                zone: Some(zone.into()),
                ..endpoint(port, "orders")
            })
            .collect();
        let known = route(&endpoints, Ejection::default());
        let near = |zone: &str| services.target(Arc::clone(&known), Some(zone.into()));
        assert_eq!(near("a").candidates(&[]), [0, 1, 2, 3]);
        assert_eq!(near("b").candidates(&[]), [4, 5]);
        assert_eq!(
            near("c").candidates(&[]),
            [0, 1, 2, 3, 4, 5],
            "none is near"
        );
        assert_eq!(
            near("b").candidates(&[4, 5]),
            [0, 1, 2, 3],
            "all near ones were tried"
        );
        near("a").unreachable(0);
        near("a").unreachable(1);
        assert_eq!(near("a").candidates(&[]), [2, 3], "half of them are enough");
        near("a").unreachable(2);
        assert_eq!(
            near("a").candidates(&[]),
            [3, 4, 5],
            "one must not carry the load of four"
        );
    }

    #[test]
    fn what_is_known_of_a_pod_is_known_however_it_is_called() {
        let (services, _clock) = services();
        let endpoints: Vec<_> = (1..=3).map(|port| endpoint(port, "orders")).collect();
        let all = route(&endpoints, Ejection::default());
        let one = route(&endpoints[1..2], Ejection::default());
        let target = services.target(Arc::clone(&all), None);
        services.target(Arc::clone(&one), None).unreachable(0);
        assert_eq!(target.candidates(&[]), [0, 2]);
        assert_eq!(services.target(all, None).candidates(&[]), [0, 2]);
        assert_eq!(target.places_of(&services.target(one, None), &[0]), [1]);
    }

    #[test]
    fn when_all_are_left_alone_all_are_tried() {
        let (services, _clock) = services();
        let target = services.target(orders(2), None);
        target.unreachable(0);
        target.unreachable(1);
        assert_eq!(target.candidates(&[]), [0, 1]);
        assert_eq!(target.candidates(&[1]), [0]);
        assert!(target.candidates(&[0, 1]).is_empty());
    }

    #[test]
    fn an_endpoint_is_ejected_after_failures_one_after_the_other() {
        let (services, clock) = services();
        let target = services.target(orders(4), None);
        for _ in 0..4 {
            target.answered(2, true);
        }
        target.answered(2, false);
        for _ in 0..4 {
            target.failed(2);
        }
        assert_eq!(target.candidates(&[]), [0, 1, 2, 3]);
        target.failed(2);
        assert_eq!(target.candidates(&[]), [0, 1, 3]);
        clock.advance(Duration::from_secs(10));
        assert_eq!(target.candidates(&[]), [0, 1, 2, 3]);
    }

    #[test]
    fn no_more_than_the_share_is_ejected() {
        let (services, _clock) = services();
        let target = services.target(orders(4), None);
        for index in 0..4 {
            for _ in 0..5 {
                target.failed(index);
            }
        }
        assert_eq!(target.candidates(&[]), [2, 3]);
    }

    #[test]
    fn what_is_known_survives_a_new_list_and_never_another_identity() {
        let (services, _clock) = services();
        let [a, b, c] = [
            endpoint(1, "orders"),
            endpoint(2, "orders"),
            endpoint(3, "orders"),
        ];
        let first = services.target(route(&[a.clone(), b.clone()], Ejection::default()), None);
        first.unreachable(1);
        let second = services.target(route(&[c, b, a], Ejection::default()), None);
        assert_eq!(
            second.candidates(&[]),
            [0, 2],
            "the second endpoint is now in the middle"
        );
        let renamed = [endpoint(1, "orders"), endpoint(2, "other")];
        let third = services.target(route(&renamed, Ejection::default()), None);
        assert_eq!(
            third.candidates(&[]),
            [0, 1],
            "another identity is another endpoint"
        );
    }

    #[test]
    fn the_busy_endpoint_is_avoided() {
        let (services, _clock) = services();
        let target = services.target(orders(2), None);
        let _load: Vec<_> = (0..10).map(|_| target.begin(0).unwrap()).collect();
        for _ in 0..100 {
            assert_eq!(target.choose(&[0, 1]), Some(1));
        }
    }

    #[test]
    fn an_unknown_endpoint_is_tried_first_and_by_one_call_at_a_time() {
        let (services, _clock) = services();
        let target = services.target(orders(2), None);
        let known = target.begin(0).unwrap();
        known.observe();
        drop(known);
        assert_eq!(target.choose(&[0, 1]), Some(1));
        let _trying = target.begin(1).unwrap();
        assert_eq!(target.choose(&[0, 1]), Some(0));
    }

    #[test]
    fn a_peak_counts_at_once_and_fades() {
        let begin = Instant::now();
        let mut latency = Latency {
            seconds: 0.01,
            at: Some(begin),
        };
        latency.observe(1.0, begin);
        assert!((latency.decayed(begin) - 1.0).abs() < 1e-9);
        let later = begin + Duration::from_mins(1);
        assert!(latency.decayed(later) < 0.01);
    }

    #[test]
    fn every_endpoint_is_chosen() {
        let (services, _clock) = services();
        let target = services.target(orders(3), None);
        let candidates = target.candidates(&[]);
        let mut seen = [0; 3];
        for _ in 0..300 {
            seen[target.choose(&candidates).unwrap()] += 1;
        }
        assert!(seen.iter().all(|count| *count > 0), "{seen:?}");
    }
}
