//! What a policy decides about one call.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Allowed or not, as the access log says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Served.
    Allow,
    /// Refused.
    Deny,
    /// Served because the workload only audits; it would have been refused.
    WouldDeny,
}

impl Verdict {
    /// The word used in logs, tables and metric labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::WouldDeny => "would_deny",
        }
    }
}

/// A verdict and who is answerable for it. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Allowed or not.
    pub verdict: Verdict,
    /// `namespace/name` of the policy that decided; absent when none matched.
    pub policy: Option<Arc<str>>,
    /// Name of the rule that decided.
    pub rule: Option<Arc<str>>,
    /// Why, in the words of the access log: `no rule admits`, `denied by rule` …
    pub reason: &'static str,
    /// What policies in mode Audit would have said; logged, never counted.
    pub audit: Option<Arc<str>>,
}

impl Decision {
    /// Whether the call is served.
    pub fn is_served(&self) -> bool {
        self.verdict != Verdict::Deny
    }
}
