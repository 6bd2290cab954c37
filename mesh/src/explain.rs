//! Why a call is allowed or denied: each rule, and the first predicate of it that failed.
//!
//! Invariant: the verdict is the one that [`Policy::authorize`] gives; a property test compares
//! them. This goes through the rules one by one and may allocate: it is for people.

use std::fmt::{self, Write as _};
use std::sync::Arc;

use serde::Serialize;

use crate::decision::{Decision, Verdict};
use crate::policy::{
    Ask, Caller, Effect, Found, From, Glob, HostName, HttpAsk, Names, Policy, Ports, Rule,
    Selected, To, ToGrpc, ToHttp,
};

/// Why one call is allowed or denied.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// Allowed or not.
    pub verdict: Verdict,
    /// Why, in the words of the log.
    pub reason: &'static str,
    /// `namespace/name` of the policy that decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<Arc<str>>,
    /// The rule that decided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<Arc<str>>,
    /// What policies in mode Audit would have said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit: Option<Arc<str>>,
    /// Each policy that selects the workload, by namespace and name.
    pub policies: Vec<PolicyExplanation>,
}

/// What one policy says about the call.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyExplanation {
    /// `namespace/name`.
    pub policy: Arc<str>,
    /// Which way it decides.
    pub action: Effect,
    /// Whether it is only evaluated beside, never counted.
    pub audit: bool,
    /// Each rule in its order.
    pub rules: Vec<RuleExplanation>,
}

/// What one rule says about the call.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RuleExplanation {
    /// Its name.
    pub rule: Arc<str>,
    /// Whether it matches.
    pub matched: bool,
    /// The first predicate that failed, with what was compared; absent when it matched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

impl Explanation {
    /// Whether the call would be served.
    pub fn is_served(&self) -> bool {
        self.verdict != Verdict::Deny
    }
}

pub(crate) fn explain(
    policy: &Policy,
    caller: Caller<'_>,
    port: u16,
    ask: &Ask<'_>,
) -> Explanation {
    let call = Call {
        caller,
        port,
        ask,
        trust_domain: policy.trust_domain().as_str(),
        carries_opaque: policy.carries_opaque(port),
    };
    let mut found = Found::nothing();
    let policies = policy
        .selected()
        .iter()
        .map(|selected| call.explain_policy(selected, &mut found))
        .collect();
    let refuses_opaque = matches!(ask, Ask::Opaque) && !call.carries_opaque;
    let decision = policy.decide(&found, refuses_opaque);
    let Decision {
        verdict,
        policy,
        rule,
        reason,
        audit,
    } = decision;
    Explanation {
        verdict,
        reason,
        policy,
        rule,
        audit,
        policies,
    }
}

/// One call, as every predicate sees it.
struct Call<'a> {
    caller: Caller<'a>,
    port: u16,
    ask: &'a Ask<'a>,
    trust_domain: &'a str,
    carries_opaque: bool,
}

/// A predicate's outcome: what failed, in a sentence.
type Outcome = Result<(), String>;

impl Call<'_> {
    fn explain_policy(&self, policy: &Selected, found: &mut Found) -> PolicyExplanation {
        let explain_rule = |rule: &Rule| {
            let outcome = self.check_rule(policy, rule);
            if outcome.is_ok() {
                found.note(policy.effect, policy.audit, rule.rank);
            }
            RuleExplanation {
                rule: Arc::clone(&rule.name),
                matched: outcome.is_ok(),
                failed: outcome.err(),
            }
        };
        PolicyExplanation {
            policy: Arc::clone(&policy.name),
            action: policy.effect,
            audit: policy.audit,
            rules: policy.rules.iter().map(explain_rule).collect(),
        }
    }

    fn check_rule(&self, policy: &Selected, rule: &Rule) -> Outcome {
        self.check_port(&policy.ports)?;
        self.check_caller(&rule.from)?;
        match (self.ask, policy.effect) {
            // On opaque bytes a Deny counts by its `from` alone.
            (Ask::Opaque, Effect::Deny) => Ok(()),
            (Ask::Opaque, Effect::Allow) => self.check_opaque(&rule.to),
            (Ask::Http(ask), effect) => check_any(&rule.to, |to| check_to(to, ask, effect)),
        }
    }

    fn check_port(&self, ports: &Ports) -> Outcome {
        match ports {
            Ports::Open | Ports::Unresolved => Ok(()),
            Ports::Named(ports) if ports.contains(&self.port) => Ok(()),
            Ports::Named(ports) if ports.is_empty() => Err(format!(
                "port is {}, the policy's port names none of this workload",
                self.port
            )),
            Ports::Named(ports) => Err(format!("port {} is not in {}", self.port, list(ports))),
        }
    }

    fn check_caller(&self, from: &[From]) -> Outcome {
        if from.iter().any(|from| self.is_from(from)) {
            return Ok(());
        }
        let wanted = from
            .iter()
            .map(wanted_caller)
            .collect::<Vec<_>>()
            .join(" or ");
        let caller = match self.caller {
            Caller::Mesh(id) => id.as_str(),
            Caller::Unauthenticated => "unauthenticated",
        };
        Err(format!("caller is {caller}, rule wants {wanted}"))
    }

    fn is_from(&self, from: &From) -> bool {
        let Caller::Mesh(id) = self.caller else {
            return *from == From::Unauthenticated;
        };
        let own = id.trust_domain() == self.trust_domain;
        match from {
            From::Exact(wanted) => wanted == id,
            From::Namespace(name) => own && id.workload().is_some_and(|(ns, _)| *ns == **name),
            From::Anyone => own,
            From::Unauthenticated => false,
        }
    }

    fn check_opaque(&self, to: &[To]) -> Outcome {
        if !to.iter().any(|to| matches!(to, To::Tcp | To::Anything)) {
            return Err("call is opaque tcp, rule is for http or grpc".to_owned());
        }
        if !self.carries_opaque {
            return Err(format!(
                "port {} carries no opaque bytes: a policy names it for http or grpc",
                self.port
            ));
        }
        Ok(())
    }
}

fn wanted_caller(from: &From) -> String {
    match from {
        From::Exact(id) => id.to_string(),
        From::Namespace(name) => format!("any service account of namespace {name}"),
        From::Anyone => "any identity of this trust domain".to_owned(),
        From::Unauthenticated => "a plaintext caller".to_owned(),
    }
}

/// Matches when one target does; otherwise says what failed of each.
fn check_any(to: &[To], check: impl Fn(&To) -> Outcome) -> Outcome {
    let mut failed = Vec::new();
    for target in to {
        match check(target) {
            Ok(()) => return Ok(()),
            Err(why) => failed.push(why),
        }
    }
    if let [only] = failed.as_mut_slice() {
        return Err(std::mem::take(only));
    }
    let mut text = String::new();
    for (at, why) in failed.iter().enumerate() {
        let separator = if at == 0 { "" } else { "; " };
        // Writing to a string can't fail.
        let _written = write!(text, "{separator}to[{at}]: {why}");
    }
    Err(text)
}

fn check_to(to: &To, ask: &HttpAsk<'_>, effect: Effect) -> Outcome {
    match (to, effect) {
        (To::Http(http), _) => check_http(http, ask, effect),
        (To::Grpc(grpc), _) => check_grpc(grpc, ask, effect),
        (To::Tcp, Effect::Allow) => Err("call is a request, rule is for opaque tcp".to_owned()),
        (To::Tcp | To::Anything, Effect::Deny) => Ok(()),
        (To::Anything, Effect::Allow) => check_no_upgrade(ask),
    }
}

fn check_no_upgrade(ask: &HttpAsk<'_>) -> Outcome {
    match ask.upgrade {
        Some(upgrade) => Err(format!(
            "call upgrades to {upgrade}, rule lists no upgrades"
        )),
        None => Ok(()),
    }
}

fn check_http(http: &ToHttp, ask: &HttpAsk<'_>, effect: Effect) -> Outcome {
    check_method(&http.methods, ask.method, effect)?;
    check_path(&http.paths, ask, effect)?;
    if let Some(hosts) = &http.hosts {
        check_host(hosts, ask, effect)?;
    }
    match (&http.upgrades, ask.upgrade) {
        (None, _) if effect == Effect::Deny => Ok(()),
        (None, _) => check_no_upgrade(ask),
        (Some(listed), Some(upgrade)) => {
            if listed.iter().any(|name| name.eq_ignore_ascii_case(upgrade)) {
                return Ok(());
            }
            Err(format!("upgrade {upgrade} is not in {}", list(listed)))
        }
        (Some(listed), None) => Err(format!("call is no upgrade, rule wants {}", list(listed))),
    }
}

fn check_grpc(grpc: &ToGrpc, ask: &HttpAsk<'_>, effect: Effect) -> Outcome {
    if effect == Effect::Deny {
        return check_path(&grpc.paths, ask, effect);
    }
    if !ask.grpc {
        return Err("content type is not gRPC's, rule is for grpc".to_owned());
    }
    if ask.method != "POST" {
        return Err(format!(
            "method {} is not POST, rule is for grpc",
            ask.method
        ));
    }
    check_no_upgrade(ask)?;
    let Some((service, method)) = ask.path.grpc() else {
        return Err(format!(
            "path {} is not of the form /service/method",
            ask.path
        ));
    };
    if *service != *grpc.service {
        return Err(format!(
            "grpc service is {service}, rule wants {}",
            grpc.service
        ));
    }
    match &grpc.methods {
        Names::Listed(names) if !names.iter().any(|name| **name == *method) => {
            Err(format!("grpc method {method} is not in {}", list(names)))
        }
        Names::All | Names::Listed(_) => Ok(()),
    }
}

fn check_method(methods: &Names, method: &str, effect: Effect) -> Outcome {
    let Names::Listed(names) = methods else {
        return Ok(());
    };
    let same = |name: &str| match effect {
        Effect::Allow => name == method,
        Effect::Deny => name.eq_ignore_ascii_case(method),
    };
    if names.iter().any(|name| same(name)) {
        return Ok(());
    }
    Err(format!("method {method} is not in {}", list(names)))
}

fn check_path(paths: &[Glob], ask: &HttpAsk<'_>, effect: Effect) -> Outcome {
    let mut segments: Vec<&str> = ask.path.segments().collect();
    if effect == Effect::Deny && segments.last() == Some(&"") {
        segments.pop();
    }
    let matches = |glob: &Glob| match effect {
        Effect::Allow => glob.matches(&segments),
        Effect::Deny => glob.clone().without_trailing_slash().matches(&segments),
    };
    if paths.iter().any(matches) {
        return Ok(());
    }
    Err(format!("path {} matches none of {}", ask.path, list(paths)))
}

fn check_host(hosts: &[HostName], ask: &HttpAsk<'_>, effect: Effect) -> Outcome {
    let Some(authority) = ask.authority else {
        return match effect {
            Effect::Deny => Ok(()),
            Effect::Allow => Err(format!("call names no host, rule wants {}", list(hosts))),
        };
    };
    let mut spellings = hosts.iter().flat_map(|host| &host.spellings);
    if spellings.any(|name| name == authority.host()) {
        return Ok(());
    }
    Err(format!(
        "host {} is not in {}",
        authority.host(),
        list(hosts)
    ))
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// `[GET, HEAD]`
fn list(items: &[impl fmt::Display]) -> String {
    let items: Vec<String> = items.iter().map(ToString::to_string).collect();
    format!("[{}]", items.join(", "))
}
