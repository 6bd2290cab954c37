//! Authorization of inbound calls: asked once when a call begins, and again when the policy changes.
//!
//! Always true: both times the same facts are asked about in the same words, those of
//! [`Subject`], in which the call is forwarded; a caller without an identity is asked about as such,
//! and on a port that is not listed for such callers none is ever allowed, only served by a
//! workload that audits.

use std::sync::Arc;

use sidegate_mesh::Decision;
use sidegate_mesh::policy::{Ask, Caller, HttpAsk, Policy};

use crate::connections::{Ending, Link, Subject, Who};
use crate::error::RequestError;
use crate::headers::Head;

/// What `policy` says of `subject`, asked for by `who`.
pub fn decide(policy: &Policy, who: &Who, subject: &Subject) -> Decision {
    let (port, ask) = match subject {
        Subject::Request { port, head } => (*port, ask(head)),
        Subject::Opaque { port } => (*port, Ask::Opaque),
    };
    match who {
        Who::Peer(peer) => policy.authorize(Caller::Mesh(&peer.id), port, &ask),
        Who::Nobody { listed: true } => policy.authorize(Caller::Unauthenticated, port, &ask),
        Who::Nobody { listed: false } => policy.without_identity(port, &ask),
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
        let decision = decide(policy, link.who(), call.subject());
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
