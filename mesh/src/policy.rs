//! Authorization: who may call what of one workload.
//!
//! A [`Policy`] is compiled from the resources for one workload and never changes. A matching Deny
//! denies; otherwise a matching Allow allows; otherwise the call is denied, so a workload without
//! policies can't be called. Deny is wide where it could be evaded, Allow is narrow:
//!
//! - A Deny for grpc covers its path whatever the content type and the HTTP method; an Allow for
//!   grpc is for a `POST` of gRPC's content type. An Allow for http also admits a gRPC call: it
//!   names its method and path as well.
//! - A Deny ignores a `/` at the end of either path and the case of methods.
//! - A Deny without `upgrades` covers upgrades; an Allow without, `anything` included, never
//!   admits one, and an Allow with `upgrades` admits nothing else.
//! - A Deny with `hosts` also covers a request that names no host.
//! - On an opaque connection a Deny counts by its `from` alone, and a Deny for tcp covers requests
//!   too: what is spoken is the caller's choice.
//! - A Deny with a port name that does not resolve covers every port; an Allow only those ports
//!   that do.
//!
//! `hosts` compare by host alone: a port in either is left out.
//!
//! Invariant: this module is pure. It opens no socket, reads no clock and cannot fail at request
//! time; what does not compile denies, and an allowed call allocates nothing.

use std::sync::Arc;

use crate::decision::{Decision, Verdict};
use crate::explain::Explanation;
use crate::host::Authority;
use crate::path::CanonicalPath;
use crate::resource::Problem;
use crate::spiffe::{SpiffeId, TrustDomain};
use crate::store::ResourceSet;
use crate::workload::{Enforcement, Workload};

mod compile;
mod evaluate;
mod glob;
mod leaf;
mod lower;
mod rule;
mod symbols;
mod trie;
mod warn;

pub(crate) use evaluate::Found;
pub(crate) use glob::Glob;
pub(crate) use lower::name_forms;
pub use lower::selects;
pub use rule::Effect;
pub(crate) use rule::{From, HostName, Names, Ports, Rule, Selected, To, ToGrpc, ToHttp};
pub use warn::selecting_nothing;

/// The words of the log for why something was decided.
pub mod reason {
    /// A rule of an Allow matched.
    pub const ALLOWED: &str = "allowed by rule";
    /// A rule of a Deny matched.
    pub const DENIED: &str = "denied by rule";
    /// No rule of an Allow matched.
    pub const NO_RULE: &str = "no rule admits";
    /// No policy selects the workload, so nothing is allowed.
    pub const NO_POLICY: &str = "no policy selects the workload";
    /// A policy that did not compile denies, and has no earlier version.
    pub const BROKEN: &str = "a policy that does not compile denies";
    /// Opaque bytes on a port that http or grpc policies cover.
    pub const OPAQUE: &str = "the port carries no opaque bytes";
    /// A caller without an identity, on a port that is not listed for such.
    pub const NO_IDENTITY: &str = "plaintext refused";
}

/// Who calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller<'a> {
    /// The identity in the peer's certificate.
    Mesh(&'a SpiffeId),
    /// A plaintext caller on a port that is listed for such.
    Unauthenticated,
}

/// What is asked for.
#[derive(Clone, Debug)]
pub enum Ask<'a> {
    /// A request: HTTP, gRPC, or one that asks for an upgrade.
    Http(HttpAsk<'a>),
    /// A connection of opaque bytes.
    Opaque,
}

/// A request, in the form in which it is forwarded.
#[derive(Clone, Debug)]
pub struct HttpAsk<'a> {
    /// The method; `GET` for a WebSocket, however it came.
    pub method: &'a str,
    /// The path without its query.
    pub path: &'a CanonicalPath,
    /// The one authority; `None` only where HTTP/1.0 named none.
    pub authority: Option<&'a Authority>,
    /// The protocol to upgrade to, `websocket`.
    pub upgrade: Option<&'a str>,
    /// Whether the content type says gRPC.
    pub grpc: bool,
}

impl HttpAsk<'_> {
    /// Whether this is what an Allow for grpc admits: `POST`, gRPC's content type, gRPC's path.
    pub(crate) fn is_grpc_call(&self) -> bool {
        self.grpc && self.method == "POST" && self.path.grpc().is_some()
    }
}

/// Who may call what of one workload.
#[derive(Debug)]
pub struct Policy {
    trust_domain: TrustDomain,
    enforcement: Enforcement,
    selected: Vec<Selected>,
    labels: Vec<Label>,
    /// The policy, or its file, that did not compile and denies everything.
    broken: Option<Arc<str>>,
    tables: compile::Tables,
    vocabulary: compile::Vocabulary,
}

/// What the log calls a rule.
#[derive(Debug)]
struct Label {
    policy: Arc<str>,
    rule: Arc<str>,
    /// What is said of it when it only audits.
    audit: Arc<str>,
}

impl Policy {
    /// Compiles what `set` says about `workload`, and warns about what can't be meant so.
    pub fn compile(set: &ResourceSet, workload: &Workload) -> (Self, Vec<Problem>) {
        let lowered = lower::lower(set, workload);
        let problems = warn::warnings(&lowered, workload);
        let (tables, vocabulary) = compile::compile(&lowered.selected, lowered.left_open);
        let labels = lowered.selected.iter().flat_map(Label::of_policy).collect();
        let policy = Self {
            trust_domain: workload.trust_domain.clone(),
            enforcement: workload.enforcement,
            selected: lowered.selected,
            labels,
            broken: lowered.broken,
            tables,
            vocabulary,
        };
        (policy, problems)
    }

    /// Decides one call to the workload's own port `port`.
    pub fn authorize(&self, caller: Caller<'_>, port: u16, ask: &Ask<'_>) -> Decision {
        let tables = self.tables.of(port);
        let own = &self.trust_domain;
        let found = evaluate::find(tables, &self.vocabulary, own, (caller, ask));
        self.decide(&found, matches!(ask, Ask::Opaque) && !tables.carries_opaque)
    }

    /// Decides a call without an identity to a port that is not listed for such: no policy can
    /// allow it. A workload that audits serves it where it would serve any other caller.
    pub fn without_identity(&self, port: u16, ask: &Ask<'_>) -> Decision {
        let decision = self.authorize(Caller::Unauthenticated, port, ask);
        if decision.reason == reason::OPAQUE {
            return decision;
        }
        Decision {
            verdict: self.refusal(),
            policy: None,
            rule: None,
            reason: reason::NO_IDENTITY,
            audit: decision.audit,
        }
    }

    /// Whether refusals refuse, or are only logged.
    pub fn enforcement(&self) -> Enforcement {
        self.enforcement
    }

    /// What a refusal comes to in this workload.
    fn refusal(&self) -> Verdict {
        match self.enforcement {
            Enforcement::Enforce => Verdict::Deny,
            Enforcement::Audit => Verdict::WouldDeny,
        }
    }

    /// Whether opaque bytes may enter the workload's own port `port` at all. False on a port that
    /// a policy names for http or grpc; then a connection that is not HTTP is refused.
    pub fn carries_opaque(&self, port: u16) -> bool {
        self.tables.of(port).carries_opaque
    }

    /// Goes through each policy that selects the workload and each of its rules, and says what
    /// matched or which predicate failed first. The verdict is that of [`Self::authorize`].
    pub fn explain(&self, caller: Caller<'_>, port: u16, ask: &Ask<'_>) -> Explanation {
        crate::explain::explain(self, caller, port, ask)
    }

    pub(crate) fn selected(&self) -> &[Selected] {
        &self.selected
    }

    pub(crate) fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The verdict that follows from the rules that matched; the only place that orders them.
    pub(crate) fn decide(&self, found: &Found, refuses_opaque: bool) -> Decision {
        let audit = self
            .label(found.audit_deny)
            .or_else(|| self.label(found.audit_allow));
        let audit = audit.map(|label| Arc::clone(&label.audit));
        let denied = self.label(found.deny);
        let (policy, rule, reason) = if refuses_opaque {
            // Also where only audited: bytes that can't be read as HTTP never pass for it.
            return Decision {
                verdict: Verdict::Deny,
                policy: None,
                rule: None,
                reason: reason::OPAQUE,
                audit,
            };
        } else if let Some(label) = denied {
            (Some(&label.policy), Some(&label.rule), reason::DENIED)
        } else if let Some(policy) = &self.broken {
            (Some(policy), None, reason::BROKEN)
        } else if let Some(label) = self.label(found.allow) {
            return Decision {
                verdict: Verdict::Allow,
                policy: Some(Arc::clone(&label.policy)),
                rule: Some(Arc::clone(&label.rule)),
                reason: reason::ALLOWED,
                audit,
            };
        } else if self.selected.is_empty() {
            (None, None, reason::NO_POLICY)
        } else {
            (None, None, reason::NO_RULE)
        };
        Decision {
            verdict: self.refusal(),
            policy: policy.map(Arc::clone),
            rule: rule.map(Arc::clone),
            reason,
            audit,
        }
    }

    fn label(&self, rank: leaf::Rank) -> Option<&Label> {
        self.labels.get(usize::try_from(rank).ok()?)
    }
}

impl Label {
    fn of_policy(policy: &Selected) -> impl Iterator<Item = Self> {
        let word = match policy.effect {
            Effect::Allow => "allow",
            Effect::Deny => "deny",
        };
        policy.rules.iter().map(move |rule| Self {
            policy: Arc::clone(&policy.name),
            rule: Arc::clone(&rule.name),
            audit: format!("{word} {}/{}", policy.name, rule.name).into(),
        })
    }
}
