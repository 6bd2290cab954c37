//! The tower layers of a call, each stack boxed once.
//!
//! This is the only place that knows tower. What a reader must see happen (authorization, routing,
//! retry) is not here.
//!
//! Invariant: a try passes timeout › outlier › balance › forward, in this order, so that a timeout
//! counts against the endpoint that was too slow.

use std::sync::Arc;
use std::time::Duration;

use sidegate_mesh::Clock;
use tower::layer::layer_fn;
use tower::util::BoxCloneSyncService;
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};

use crate::call::GRPC_STATUS;
use crate::error::RequestError;
use crate::forward::{self, Answer, Attempt, Failure};
use crate::pool::Pool;
use crate::retry::{Stage, grpc_code};

/// One try of an outbound call.
///
/// The attempt is boxed, since each layer hands it on.
pub type OutboundStack = BoxCloneSyncService<Box<Attempt>, Answer, Failure>;

/// Builds the stack of one worker's outbound calls.
pub fn outbound(pool: Arc<Pool>, clock: Arc<dyn Clock>) -> OutboundStack {
    let stack = ServiceBuilder::new()
        .layer(layer_fn(move |inner| {
            let clock = Arc::clone(&clock);
            service_fn(move |attempt| timeout(clone(&inner), Arc::clone(&clock), attempt))
        }))
        .layer(layer_fn(|inner| {
            service_fn(move |attempt| outlier(clone(&inner), attempt))
        }))
        .layer(layer_fn(|inner| {
            service_fn(move |attempt| balance(clone(&inner), attempt))
        }))
        .service(service_fn(move |attempt| {
            forward::dispatch(Arc::clone(&pool), attempt)
        }));
    BoxCloneSyncService::new(stack)
}

fn clone<S: Clone>(service: &S) -> S {
    service.clone()
}

/// Gives a try its time until the head of the response.
async fn timeout<S>(
    inner: S,
    clock: Arc<dyn Clock>,
    attempt: Box<Attempt>,
) -> Result<Answer, Failure>
where
    S: Service<Box<Attempt>, Response = Answer, Error = Failure>,
{
    let Some(limit) = attempt.timeout else {
        return inner.oneshot(attempt).await;
    };
    let (chosen, target) = (Arc::clone(&attempt.chosen), attempt.target.clone());
    tokio::select! {
        outcome = inner.oneshot(attempt) => outcome,
        () = clock.sleep(limit) => {
            if let Some(index) = chosen.get() {
                target.failed(*index);
            }
            Err(timed_out(limit))
        }
    }
}

fn timed_out(limit: Duration) -> Failure {
    let after_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
    Failure {
        error: RequestError::Timeout { after_ms },
        stage: Stage::Sent,
    }
}

/// Leaves out endpoints that fail, and learns from the outcome which do.
async fn outlier<S>(inner: S, mut attempt: Box<Attempt>) -> Result<Answer, Failure>
where
    S: Service<Box<Attempt>, Response = Answer, Error = Failure>,
{
    attempt.candidates = attempt.target.candidates(&attempt.tried);
    let (chosen, target) = (Arc::clone(&attempt.chosen), attempt.target.clone());
    let outcome = inner.oneshot(attempt).await;
    let Some(index) = chosen.get().copied() else {
        return outcome;
    };
    match &outcome {
        Ok(answer) => target.answered(index, is_failure(answer)),
        Err(failure) => match (&failure.error, failure.stage) {
            (RequestError::UpstreamConnect { .. } | RequestError::UpstreamIdentity { .. }, _) => {
                target.unreachable(index);
            }
            (
                RequestError::UpstreamReset { .. } | RequestError::UpstreamProtocol { .. },
                Stage::Sent,
            ) => {
                target.failed(index);
            }
            // The caller's own doing, a bound of ours, or a peer that drains in good order.
            _ => {}
        },
    }
    outcome
}

/// Whether an answer says that the endpoint, not the request, is at fault.
fn is_failure(answer: &Answer) -> bool {
    let head = &answer.head;
    if head.headers.contains_key(&GRPC_STATUS) {
        // UNAVAILABLE, INTERNAL and UNKNOWN in a trailers-only answer.
        return matches!(grpc_code(head.status, &head.headers), Some(2 | 13 | 14));
    }
    head.status.is_server_error()
}

/// Chooses the endpoint.
async fn balance<S>(inner: S, attempt: Box<Attempt>) -> Result<Answer, Failure>
where
    S: Service<Box<Attempt>, Response = Answer, Error = Failure>,
{
    match attempt.target.choose(&attempt.candidates) {
        Some(index) => {
            attempt.chosen.get_or_init(|| index);
            inner.oneshot(attempt).await
        }
        None => Err(Failure::unsent(RequestError::NoEndpoint)),
    }
}
