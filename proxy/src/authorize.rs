//! Authorization of inbound calls: asked once when a call begins, and again when the policy changes.
//!
//! Always true: both times the same facts are asked about in the same words, those of
//! [`Subject`], in which the call is forwarded.

use std::sync::Arc;

use sidegate_mesh::policy::{Ask, Caller, HttpAsk, Policy};
use sidegate_mesh::{Decision, SpiffeId};

use crate::connections::{Ending, Link, Subject};
use crate::error::RequestError;
use crate::headers::Head;

/// What `policy` says of `subject`, asked for by `caller`.
pub fn decide(policy: &Policy, caller: &SpiffeId, subject: &Subject) -> Decision {
    let caller = Caller::Mesh(caller);
    match subject {
        Subject::Request { port, head } => policy.authorize(caller, *port, &ask(head)),
        Subject::Opaque { port } => policy.authorize(caller, *port, &Ask::Opaque),
    }
}

/// Lets a served decision pass.
///
/// # Errors
///
/// [`RequestError::Denied`] with a fresh id, under which the log has policy and reason.
pub fn require_allowed(decision: &Decision) -> Result<(), RequestError> {
    if decision.is_served() {
        return Ok(());
    }
    Err(RequestError::Denied {
        decision_id: decision_id(),
    })
}

/// Ends every call of one connection that `policy` refuses now. All others go on.
pub fn recheck(link: &Link, policy: &Policy) {
    for call in link.calls() {
        let decision = decide(policy, &link.peer().id, call.subject());
        if !decision.is_served() {
            call.end(Ending::Denied(decision));
        }
    }
}

/// What the caller of a refused call is told, and what its record is found by.
pub fn decision_id() -> String {
    format!("{:016x}", fastrand::u64(..))
}

fn ask(head: &Arc<Head>) -> Ask<'_> {
    Ask::Http(HttpAsk {
        method: head.method.as_str(),
        path: &head.path,
        authority: head.authority.as_ref(),
        upgrade: head.upgrade(),
        grpc: head.is_grpc(),
    })
}
