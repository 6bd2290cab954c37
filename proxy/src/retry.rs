//! Whether a call that failed is tried again.
//!
//! Without a policy only what is safe is tried again, elsewhere: a request that was never sent or
//! that the peer says it never looked at, and an idempotent one whose connection was lost before its
//! answer. A `TrafficPolicy` adds conditions, within its attempts and its budget.
//!
//! Invariants: a call is tried at most [`TRIES_MAX`] times; a call that may have reached an
//! application is repeated only if it is idempotent or its policy says so by method; the budget is
//! one value for all workers.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use http::{HeaderMap, Method, StatusCode};
use sidegate_mesh::resource::RetryCondition;
use sidegate_mesh::routes::Traffic;

use crate::error::RequestError;

/// Most tries of one call, the first included.
pub const TRIES_MAX: u32 = 11;

/// Most tries of one call without a policy.
const SAFE_TRIES_MAX: u32 = 5;

/// First pause before a retry that a policy asks for; it doubles.
const PAUSE_FIRST: Duration = Duration::from_millis(25);
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// How far a call came before it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It never left: no connection, no identity.
    Unsent,
    /// The peer says that it never looked at it: `REFUSED_STREAM`, or a GOAWAY below it.
    Refused,
    /// It may have reached an application.
    Sent,
}

/// What is asked about one call.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The method.
    pub method: &'a Method,
    /// `pkg.Svc/Method` of a gRPC call.
    pub grpc: Option<&'a str>,
}

/// How one try ended.
#[derive(Clone, Copy, Debug)]
pub enum Outcome<'a> {
    /// With the head of a response.
    Answer {
        /// Its status.
        status: StatusCode,
        /// Its fields; those of a trailers-only gRPC response have its status.
        headers: &'a HeaderMap,
    },
    /// Without one.
    Failure {
        /// How far it came.
        stage: Stage,
        /// Why it failed.
        error: &'a RequestError,
    },
}

/// What to do after a try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// This is the outcome.
    Settle,
    /// Try again after the pause; elsewhere, or at the same endpoint if there is no other.
    Again {
        /// How long to wait before.
        pause: Duration,
    },
}

/// One call's tries.
#[derive(Debug)]
pub struct Plan<'a> {
    traffic: &'a Traffic,
    budget: &'a Budget,
    subject: Subject<'a>,
    /// Retries that the policy asked for.
    asked: u32,
    tries: u32,
}

impl<'a> Plan<'a> {
    /// A call that is about to be tried for the first time.
    pub fn new(traffic: &'a Traffic, budget: &'a Budget, subject: Subject<'a>) -> Self {
        let share = match subject.grpc {
            Some(_) => traffic.grpc_retry.as_ref().map(|retry| retry.budget),
            None => traffic.retry.as_ref().map(|retry| retry.budget),
        };
        if let Some(share) = share {
            budget.deposit(share);
        }
        Self {
            traffic,
            budget,
            subject,
            asked: 0,
            tries: 1,
        }
    }

    /// How often the call was tried.
    pub fn tries(&self) -> u32 {
        self.tries
    }

    /// How long one try may take until its response's head.
    pub fn per_try_timeout(&self) -> Option<Duration> {
        let Some(method) = self.subject.grpc else {
            let retry = self.traffic.retry.as_ref()?;
            let covered = retry.covers_method(self.subject.method.as_str());
            return retry.per_try_timeout.filter(|_| covered);
        };
        let retry = self.traffic.grpc_retry.as_ref()?;
        let listed = retry.methods.iter().any(|listed| listed == method);
        retry.per_try_timeout.filter(|_| listed)
    }

    /// What to do after a try with this outcome. `replayable` says whether the body, if there is one,
    /// can be sent from its beginning; `untried` endpoints are left.
    pub fn after(&mut self, outcome: Outcome<'_>, replayable: bool, untried: usize) -> Next {
        if !replayable || self.tries >= TRIES_MAX {
            return Next::Settle;
        }
        if self.is_safe(outcome, untried) {
            // Everybody has refused it more than once: a moment later somebody may not.
            let pause = match self.tries {
                2.. if untried == 0 => pause(self.tries - 1),
                _ => Duration::ZERO,
            };
            self.tries += 1;
            return Next::Again { pause };
        }
        if self.is_asked(outcome) && self.asked < self.policy_attempts() && self.budget.withdraw() {
            self.asked += 1;
            self.tries += 1;
            return Next::Again {
                pause: pause(self.asked),
            };
        }
        Next::Settle
    }

    /// Whether the call may be repeated without anybody having asked for it.
    fn is_safe(&self, outcome: Outcome<'_>, untried: usize) -> bool {
        if self.tries >= SAFE_TRIES_MAX {
            return false;
        }
        match outcome {
            Outcome::Failure { stage, error } => match stage {
                Stage::Unsent => untried > 0 && is_of_endpoint(error),
                // A connection that goes away is no reason to leave its endpoint: a second one may
                // do.
                Stage::Refused => true,
                Stage::Sent => {
                    let lost = matches!(error, RequestError::UpstreamReset { .. });
                    untried > 0 && lost && self.is_idempotent()
                }
            },
            // The other sidecar ended, and the call with it: a connection that was lost, in words.
            Outcome::Answer { headers, .. } => {
                untried > 0 && is_cut_by_sidecar(headers) && self.is_idempotent()
            }
        }
    }

    fn is_idempotent(&self) -> bool {
        self.subject.grpc.is_none() && self.subject.method.is_idempotent()
    }

    /// Whether the policy asks for a retry after this outcome.
    fn is_asked(&self, outcome: Outcome<'_>) -> bool {
        match self.subject.grpc {
            Some(method) => self.is_asked_of_grpc(method, outcome),
            None => self.is_asked_of_http(outcome),
        }
    }

    fn is_asked_of_http(&self, outcome: Outcome<'_>) -> bool {
        let Some(retry) = &self.traffic.retry else {
            return false;
        };
        if !retry.covers_method(self.subject.method.as_str()) {
            return false;
        }
        retry
            .conditions
            .iter()
            .any(|condition| is_met(*condition, outcome))
    }

    fn is_asked_of_grpc(&self, method: &str, outcome: Outcome<'_>) -> bool {
        let Some(retry) = &self.traffic.grpc_retry else {
            return false;
        };
        let code = match outcome {
            Outcome::Answer { status, headers } => grpc_code(status, headers),
            Outcome::Failure { error, .. } => Some(error.grpc_status()),
        };
        retry.methods.iter().any(|listed| listed == method)
            && code.is_some_and(|code| retry.codes.contains(&code))
    }

    fn policy_attempts(&self) -> u32 {
        let traffic = self.traffic;
        match self.subject.grpc {
            Some(_) => traffic
                .grpc_retry
                .as_ref()
                .map_or(0, |retry| retry.attempts),
            None => traffic.retry.as_ref().map_or(0, |retry| retry.attempts),
        }
    }
}

/// The status of a gRPC call whose response has only a head.
pub fn grpc_code(status: StatusCode, headers: &HeaderMap) -> Option<u32> {
    if status != StatusCode::OK {
        // What the protocol tells clients to make of a status that gRPC does not use.
        return Some(match status.as_u16() {
            400 => 13,
            401 => 16,
            403 => 7,
            404 => 12,
            429 | 502 | 503 | 504 => 14,
            _ => 2,
        });
    }
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

/// Whether an answer is another sidecar's, which ended before the application could answer. Only a
/// sidecar can say so: it strips the header from what its application says.
fn is_cut_by_sidecar(headers: &HeaderMap) -> bool {
    let code = headers.get(crate::wire::ERROR);
    code.is_some_and(|code| code == RequestError::DrainDeadline.code())
}

/// Whether a failure to send says something about the endpoint: a bound of our own does not.
fn is_of_endpoint(error: &RequestError) -> bool {
    matches!(
        error,
        RequestError::UpstreamConnect { .. } | RequestError::UpstreamIdentity { .. }
    )
}

fn is_met(condition: RetryCondition, outcome: Outcome<'_>) -> bool {
    match (condition, outcome) {
        (RetryCondition::ServerError, Outcome::Answer { status, .. }) => status.is_server_error(),
        (RetryCondition::GatewayError, Outcome::Answer { status, .. }) => {
            matches!(status.as_u16(), 502..=504)
        }
        // A failure would have been a 502, 503 or 504 made here.
        (
            RetryCondition::ServerError | RetryCondition::GatewayError,
            Outcome::Failure { error, .. },
        ) => error.status().is_server_error() && !matches!(error, RequestError::Timeout { .. }),
        (RetryCondition::ConnectFailure, Outcome::Failure { stage, error }) => {
            stage == Stage::Unsent && is_of_endpoint(error)
        }
        (RetryCondition::RefusedStream, Outcome::Failure { stage, .. }) => stage == Stage::Refused,
        (RetryCondition::Reset, Outcome::Failure { error, .. }) => {
            matches!(error, RequestError::UpstreamReset { .. })
        }
        (RetryCondition::Timeout, Outcome::Failure { error, .. }) => {
            matches!(error, RequestError::Timeout { .. })
        }
        (_, Outcome::Answer { .. }) => false,
    }
}

/// Doubling, with jitter, so that callers that failed together do not return together.
fn pause(retry: u32) -> Duration {
    let longest = PAUSE_FIRST
        .saturating_mul(1 << (retry - 1).min(8))
        .min(PAUSE_MAX);
    longest.mul_f64(0.5 + fastrand::f64() / 2.0)
}

/// What retries may use of a service: a share of its calls, and a little for quiet times.
#[derive(Debug)]
pub struct Budget {
    /// In thousandths of a retry.
    balance: AtomicI64,
}

/// A hundred retries.
const BUDGET_MAX: i64 = 100 * RETRY_COST;
/// Ten retries, so that a service that is rarely called can be retried at all.
const BUDGET_FIRST: i64 = 10 * RETRY_COST;
const RETRY_COST: i64 = 1000;

impl Default for Budget {
    fn default() -> Self {
        Self {
            balance: AtomicI64::new(BUDGET_FIRST),
        }
    }
}

impl Budget {
    /// One call more, of which the `share` (0 to 1) may be used for retries.
    pub fn deposit(&self, share: f64) {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the share is clamped, so the product is 0 to 1000"
        )]
        let more = (share.clamp(0.0, 1.0) * 1000.0) as i64;
        self.balance.fetch_add(more, Ordering::Relaxed);
        self.balance.fetch_min(BUDGET_MAX, Ordering::Relaxed);
    }

    /// Takes one retry; false when there is none left.
    pub fn withdraw(&self) -> bool {
        let less = |balance: i64| (balance >= RETRY_COST).then_some(balance - RETRY_COST);
        self.balance
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
            .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use sidegate_mesh::routes::{GrpcRetry, Retry};

    use super::*;

    fn reset() -> RequestError {
        RequestError::UpstreamReset {
            reason: None,
            detail: String::new(),
        }
    }

    fn connect() -> RequestError {
        RequestError::UpstreamConnect {
            detail: String::new(),
        }
    }

    struct Case<'a> {
        traffic: &'a Traffic,
        method: Method,
        grpc: Option<&'a str>,
        replayable: bool,
        untried: usize,
    }

    impl Case<'_> {
        #[track_caller]
        fn check(&self, outcome: Outcome<'_>, again: bool) {
            let budget = Budget::default();
            let subject = Subject {
                method: &self.method,
                grpc: self.grpc,
            };
            let mut plan = Plan::new(self.traffic, &budget, subject);
            let next = plan.after(outcome, self.replayable, self.untried);
            assert_eq!(next != Next::Settle, again, "{outcome:?}");
        }
    }

    fn get(traffic: &Traffic) -> Case<'_> {
        Case {
            traffic,
            method: Method::GET,
            grpc: None,
            replayable: true,
            untried: 1,
        }
    }

    fn post(traffic: &Traffic) -> Case<'_> {
        Case {
            method: Method::POST,
            ..get(traffic)
        }
    }

    fn failure(stage: Stage, error: &RequestError) -> Outcome<'_> {
        Outcome::Failure { stage, error }
    }

    #[test]
    fn what_never_reached_an_application_is_tried_elsewhere_whatever_its_method() {
        let traffic = Traffic::default();
        for case in [get(&traffic), post(&traffic)] {
            case.check(failure(Stage::Unsent, &connect()), true);
            case.check(failure(Stage::Refused, &reset()), true);
            case.check(failure(Stage::Unsent, &RequestError::NotReady), false);
            let overloaded = RequestError::Overloaded { bound: "x" };
            case.check(failure(Stage::Unsent, &overloaded), false);
        }
        let only = Case {
            untried: 0,
            ..post(&traffic)
        };
        only.check(failure(Stage::Unsent, &connect()), false);
        only.check(failure(Stage::Refused, &reset()), true);
    }

    #[test]
    fn a_call_that_everybody_refuses_is_tried_again_a_moment_later_and_not_for_ever() {
        let traffic = Traffic::default();
        let budget = Budget::default();
        let subject = Subject {
            method: &Method::POST,
            grpc: None,
        };
        let mut plan = Plan::new(&traffic, &budget, subject);
        let error = connect();
        let mut pauses = Vec::new();
        while let Next::Again { pause } = plan.after(failure(Stage::Refused, &error), true, 0) {
            pauses.push(pause);
        }
        assert_eq!(pauses.len(), 4, "{pauses:?}");
        assert!(
            pauses[0].is_zero(),
            "a connection that went away is no reason to wait"
        );
        assert!(pauses[1..].iter().all(|pause| *pause >= PAUSE_FIRST / 2));
        let mut plan = Plan::new(&traffic, &budget, subject);
        for _ in 0..4 {
            let next = plan.after(failure(Stage::Refused, &error), true, 1);
            let pause = Duration::ZERO;
            assert_eq!(next, Next::Again { pause }, "elsewhere it is tried at once");
        }
    }

    #[test]
    fn what_may_have_reached_an_application_is_repeated_only_if_idempotent() {
        let traffic = Traffic::default();
        get(&traffic).check(failure(Stage::Sent, &reset()), true);
        post(&traffic).check(failure(Stage::Sent, &reset()), false);
        let grpc = Case {
            grpc: Some("a.B/C"),
            ..post(&traffic)
        };
        grpc.check(failure(Stage::Sent, &reset()), false);
        let only = Case {
            untried: 0,
            ..get(&traffic)
        };
        only.check(failure(Stage::Sent, &reset()), false);
        let timeout = RequestError::Timeout { after_ms: 1 };
        get(&traffic).check(failure(Stage::Sent, &timeout), false);
    }

    #[test]
    fn a_call_that_ended_with_its_sidecar_is_repeated_only_if_idempotent() {
        let traffic = Traffic::default();
        let mut headers = HeaderMap::new();
        headers.insert(crate::wire::ERROR, "drain_deadline".parse().unwrap());
        get(&traffic).check(answer(503, &headers), true);
        post(&traffic).check(answer(503, &headers), false);
        headers.insert(crate::wire::ERROR, "denied".parse().unwrap());
        get(&traffic).check(answer(403, &headers), false);
    }

    #[test]
    fn a_body_that_cannot_be_sent_again_is_not() {
        let traffic = Traffic::default();
        let case = Case {
            replayable: false,
            ..get(&traffic)
        };
        case.check(failure(Stage::Unsent, &connect()), false);
        case.check(failure(Stage::Refused, &reset()), false);
    }

    fn answer(status: u16, headers: &HeaderMap) -> Outcome<'_> {
        Outcome::Answer {
            status: StatusCode::from_u16(status).unwrap(),
            headers,
        }
    }

    fn retry(conditions: &[RetryCondition]) -> Traffic {
        Traffic {
            retry: Some(Retry {
                attempts: 2,
                conditions: conditions.to_vec(),
                methods: vec!["GET".to_owned()],
                per_try_timeout: Some(Duration::from_secs(1)),
                budget: 0.2,
            }),
            ..Traffic::default()
        }
    }

    #[test]
    fn a_status_is_retried_only_as_the_policy_says() {
        let none = HeaderMap::new();
        let traffic = retry(&[RetryCondition::ServerError]);
        get(&traffic).check(answer(500, &none), true);
        get(&traffic).check(answer(499, &none), false);
        post(&traffic).check(answer(500, &none), false);
        get(&retry(&[RetryCondition::GatewayError])).check(answer(500, &none), false);
        get(&retry(&[RetryCondition::GatewayError])).check(answer(503, &none), true);
        get(&Traffic::default()).check(answer(500, &none), false);
    }

    #[test]
    fn a_grpc_code_is_retried_only_as_the_policy_says() {
        let traffic = Traffic {
            grpc_retry: Some(GrpcRetry {
                attempts: 1,
                codes: vec![14],
                methods: vec!["a.B/C".to_owned()],
                per_try_timeout: None,
                budget: 0.2,
            }),
            ..Traffic::default()
        };
        let case = |grpc| Case {
            grpc: Some(grpc),
            untried: 0,
            ..post(&traffic)
        };
        let mut headers = HeaderMap::new();
        headers.insert("grpc-status", 14.into());
        case("a.B/C").check(answer(200, &headers), true);
        case("a.B/D").check(answer(200, &headers), false);
        case("a.B/C").check(failure(Stage::Sent, &reset()), true);
        headers.insert("grpc-status", 5.into());
        case("a.B/C").check(answer(200, &headers), false);
        case("a.B/C").check(answer(200, &HeaderMap::new()), false);
    }

    #[test]
    fn attempts_end_and_so_does_the_budget() {
        let none = HeaderMap::new();
        let traffic = retry(&[RetryCondition::ServerError]);
        let budget = Budget::default();
        let subject = Subject {
            method: &Method::GET,
            grpc: None,
        };
        let mut used = 0;
        for call in 0..1000 {
            let mut plan = Plan::new(&traffic, &budget, subject);
            while plan.after(answer(500, &none), true, 1) != Next::Settle {
                used += 1;
            }
            assert!(plan.tries() <= 3, "call {call}");
        }
        // A fifth of a thousand calls, and the ten of the beginning.
        assert!((200..=211).contains(&used), "{used}");
    }

    #[test]
    fn workers_share_one_budget() {
        let budget = Budget::default();
        let taken: usize = std::thread::scope(|scope| {
            let take = || (0..100).filter(|_| budget.withdraw()).count();
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(take)).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .sum()
        });
        assert_eq!(taken, 10);
    }
}
