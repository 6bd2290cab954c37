//! What the webhooks decide.
//!
//! Invariants: no side effects, so a dry run is answered like any other; what cannot be judged is
//! denied with a message; an operation that is not ours is let through untouched.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use crate::inject::annotations::drain_warning;
use crate::inject::{NamespaceFacts, Outcome, inject};
use crate::metrics::{Metrics, Verdict, Which};
use crate::namespaces::NamespaceError;
use crate::review::{Answer, Malformed, Review};
use crate::settings::Settings;
use crate::validate;

/// What is asked about a namespace is answered with this.
pub(crate) type FactsFuture<'a> =
    Pin<Box<dyn Future<Output = Result<Arc<NamespaceFacts>, NamespaceError>> + Send + 'a>>;

/// Where facts about namespaces come from.
pub(crate) trait Namespaces: Send + Sync + 'static {
    /// What the namespace says now, or said within a watch's delay.
    fn facts<'a>(&'a self, name: &'a str) -> FactsFuture<'a>;
}

/// Answers reviews.
pub(crate) struct Webhook {
    pub(crate) settings: Settings,
    pub(crate) namespaces: Arc<dyn Namespaces>,
    pub(crate) metrics: Arc<Metrics>,
}

/// A review that cannot be answered as one; the text is for whoever sent it.
pub(crate) struct BadRequest(pub(crate) String);

impl Webhook {
    /// The answer's body to a review's body.
    pub(crate) async fn review(&self, which: Which, body: &[u8]) -> Result<String, BadRequest> {
        let timer = std::time::Instant::now();
        let review = match Review::parse(body) {
            Ok(review) => review,
            Err(malformed) => return self.malformed(which, malformed),
        };
        let (answer, verdict) = match which {
            Which::Mutate => self.mutate(&review).await,
            Which::Validate => judge(&review),
        };
        self.metrics.reviewed(which, verdict, timer.elapsed());
        if let Answer::Denied(denial) = &answer {
            let (kind, namespace) = (&review.kind, &review.namespace);
            tracing::info!(
                kind,
                namespace,
                reason = denial.reason,
                error = denial.message,
                "refused"
            );
        }
        Ok(answer.to_json(&review.uid))
    }

    fn malformed(&self, which: Which, malformed: Malformed) -> Result<String, BadRequest> {
        self.metrics.malformed(which);
        let message = malformed.to_string();
        tracing::warn!(error = message, "malformed review");
        match malformed {
            Malformed::NoReview(message) => Err(BadRequest(message)),
            Malformed::Request { uid, .. } => {
                Ok(Answer::denied(400, "BadRequest", message).to_json(&uid))
            }
        }
    }

    async fn mutate(&self, review: &Review) -> (Answer, Verdict) {
        let is_new_pod = review.group.is_empty()
            && review.kind == "Pod"
            && review.operation == "CREATE"
            && review.sub_resource.is_empty();
        if !is_new_pod {
            return (Answer::unchanged(), Verdict::Unchanged);
        }
        let facts = match self.namespaces.facts(&review.namespace).await {
            Ok(facts) => facts,
            Err(error) => {
                let message = format!("the pod cannot be injected: {error}");
                return (
                    Answer::denied(500, "InternalError", message),
                    Verdict::Failed,
                );
            }
        };
        match inject(&review.object, &facts, &self.settings) {
            Ok(Outcome::Patched(patch)) => {
                let warning = drain_warning(&review.object, &facts);
                let warnings = warning.into_iter().collect();
                (Answer::Allowed { patch, warnings }, Verdict::Patched)
            }
            Ok(Outcome::Unchanged) => (Answer::unchanged(), Verdict::Unchanged),
            Ok(Outcome::Skipped { reason, patch }) => {
                let warnings = vec![format!("not injected: {reason}")];
                (Answer::Allowed { patch, warnings }, Verdict::Skipped)
            }
            Err(refusal) => {
                let answer = Answer::denied(403, "Forbidden", refusal.to_string());
                (answer, Verdict::Refused)
            }
        }
    }
}

fn judge(review: &Review) -> (Answer, Verdict) {
    let is_write = matches!(review.operation.as_str(), "CREATE" | "UPDATE");
    if !is_write || !review.sub_resource.is_empty() || review.group != validate::GROUP {
        return (Answer::unchanged(), Verdict::Unchanged);
    }
    match validate::judge(&review.object) {
        answer @ Answer::Allowed { .. } => (answer, Verdict::Allowed),
        answer @ Answer::Denied(_) => (answer, Verdict::Refused),
    }
}
