//! The decision, slowly and obviously: straight from "What decides" of the interface.
//!
//! Shares no code with the compiled policy, only the resources' types and the reading of names.

use sidegate_mesh::policy::{Ask, Caller, HttpAsk};
use sidegate_mesh::resource::{
    Action, AuthorizationPolicy, Kind, Mode, PathPattern, PatternSegment, PortRef, Rule, Source,
    Target,
};
use sidegate_mesh::{
    Authority, BrokenResource, Enforcement, ResourceSet, Verdict, Workload, service_of,
};

/// What the reference says of one call.
#[derive(Debug, PartialEq, Eq)]
pub struct Expected {
    pub verdict: Verdict,
    pub policy: Option<String>,
    pub rule: Option<String>,
    pub audit: Option<String>,
}

pub struct Call<'a> {
    pub caller: Caller<'a>,
    pub port: u16,
    pub ask: Ask<'a>,
}

pub fn decide(set: &ResourceSet, workload: &Workload, call: &Call<'_>) -> Expected {
    let carried = carries_opaque(set, workload, call.port);
    let first = |action: Action, mode: Mode| {
        let mut found: Vec<(String, String, usize)> = Vec::new();
        for policy in &set.policies {
            if policy.spec.action != action || policy.spec.mode != mode {
                continue;
            }
            for (at, rule) in policy.spec.rules.iter().enumerate() {
                if matches(policy, rule, workload, call, carried) {
                    found.push((
                        policy.metadata.namespace.clone(),
                        policy.metadata.name.clone(),
                        at,
                    ));
                }
            }
        }
        let (namespace, name, at) = found.into_iter().min()?;
        let policy = set.policies.iter().find(|policy| {
            policy.metadata.namespace == namespace && policy.metadata.name == name
        })?;
        let rule = policy.spec.rules[at].name.clone();
        Some((
            format!("{namespace}/{name}"),
            rule.unwrap_or(at.to_string()),
        ))
    };
    let audit = audit_of(
        first(Action::Deny, Mode::Audit),
        first(Action::Allow, Mode::Audit),
    );
    let refusal = match workload.enforcement {
        Enforcement::Enforce => Verdict::Deny,
        Enforcement::Audit => Verdict::WouldDeny,
    };
    let (verdict, decided) = if matches!(call.ask, Ask::Opaque) && !carried {
        (Verdict::Deny, None)
    } else if let Some((policy, rule)) = first(Action::Deny, Mode::Enforce) {
        (refusal, Some((policy, Some(rule))))
    } else if let Some(broken) = set
        .broken
        .iter()
        .find(|broken| broken_denies(broken, workload))
    {
        (refusal, Some((broken.label(), None)))
    } else if let Some((policy, rule)) = first(Action::Allow, Mode::Enforce) {
        (Verdict::Allow, Some((policy, Some(rule))))
    } else {
        (refusal, None)
    };
    let (policy, rule) = match decided {
        Some((policy, rule)) => (Some(policy), rule),
        None => (None, None),
    };
    Expected {
        verdict,
        policy,
        rule,
        audit,
    }
}

fn audit_of(deny: Option<(String, String)>, allow: Option<(String, String)>) -> Option<String> {
    match (deny, allow) {
        (Some((policy, rule)), _) => Some(format!("deny {policy}/{rule}")),
        (None, Some((policy, rule))) => Some(format!("allow {policy}/{rule}")),
        (None, None) => None,
    }
}

/// "A port that any selecting policy names, or leaves open, for http or grpc never carries opaque
/// bytes, unless no http or grpc rule covers it and a `tcp` or `anything` rule names it."
pub fn carries_opaque(set: &ResourceSet, workload: &Workload, port: u16) -> bool {
    let counted = set
        .policies
        .iter()
        .filter(|policy| policy.spec.mode == Mode::Enforce && selects(policy, workload));
    let mut open_for_http = set
        .broken
        .iter()
        .any(|broken| broken_may_concern(broken, workload));
    let mut named_for_http = false;
    let mut named_for_bytes = false;
    for policy in counted {
        let targets = || policy.spec.rules.iter().flat_map(|rule| &rule.to);
        let http = targets().any(|to| matches!(to, Target::Http { .. } | Target::Grpc { .. }));
        let bytes = targets().any(|to| matches!(to, Target::Tcp {} | Target::Anything {}));
        if !covers_port(policy, workload, port) {
            continue;
        }
        if policy.spec.ports.is_none() {
            open_for_http |= http;
        } else {
            named_for_http |= http;
            let really_names = names_port(policy, workload, port);
            named_for_bytes |= bytes && really_names && policy.spec.action == Action::Allow;
        }
    }
    !named_for_http && (named_for_bytes || !open_for_http)
}

fn matches(
    policy: &AuthorizationPolicy,
    rule: &Rule,
    workload: &Workload,
    call: &Call<'_>,
    carried: bool,
) -> bool {
    selects(policy, workload)
        && covers_port(policy, workload, call.port)
        && rule
            .from
            .iter()
            .any(|source| is_from(source, policy, workload, call.caller))
        && rule_concerns(policy, rule, workload, (&call.ask, carried))
}

fn rule_concerns(
    policy: &AuthorizationPolicy,
    rule: &Rule,
    workload: &Workload,
    (ask, carried): (&Ask<'_>, bool),
) -> bool {
    let own = &policy.metadata.namespace;
    match (ask, policy.spec.action) {
        (Ask::Opaque, Action::Deny) => true,
        (Ask::Opaque, Action::Allow) => {
            let bytes = |to: &Target| matches!(to, Target::Tcp {} | Target::Anything {});
            carried && rule.to.iter().any(bytes)
        }
        (Ask::Http(ask), Action::Deny) => rule.to.iter().any(|to| denied(to, ask, own, workload)),
        (Ask::Http(ask), Action::Allow) => rule.to.iter().any(|to| allowed(to, ask, own, workload)),
    }
}

/// Allow is narrow.
fn allowed(to: &Target, ask: &HttpAsk<'_>, own: &str, workload: &Workload) -> bool {
    match to {
        Target::Http {
            methods,
            paths,
            hosts,
            upgrades,
        } => {
            let method = methods.iter().any(|name| name == "*" || name == ask.method);
            let path: Vec<&str> = ask.path.segments().collect();
            let path = paths
                .iter()
                .any(|pattern| path_matches(pattern.segments(), &path));
            let host = match (hosts, ask.authority) {
                (None, _) => true,
                (Some(_), None) => false,
                (Some(hosts), Some(called)) => hosts
                    .iter()
                    .any(|host| same_host(host, own, called, workload)),
            };
            let upgrade = match ask.upgrade {
                None => upgrades.is_empty(),
                Some(token) => upgrades
                    .iter()
                    .any(|upgrade| upgrade.as_str() == token.to_lowercase()),
            };
            method && path && host && upgrade
        }
        Target::Grpc { service, methods } => {
            let called = ask.path.grpc();
            ask.grpc
                && ask.method == "POST"
                && ask.upgrade.is_none()
                && called.is_some_and(|(called, method)| {
                    called == service && methods.iter().any(|name| name == "*" || name == method)
                })
        }
        Target::Tcp {} => false,
        Target::Anything {} => ask.upgrade.is_none(),
    }
}

/// Deny is wide where it could be evaded.
fn denied(to: &Target, ask: &HttpAsk<'_>, own: &str, workload: &Workload) -> bool {
    let without_slash = |path: &str| path.strip_suffix('/').unwrap_or(path).to_owned();
    let called = without_slash(ask.path.as_str());
    match to {
        Target::Http {
            methods,
            paths,
            hosts,
            upgrades,
        } => {
            let method = methods
                .iter()
                .any(|name| name == "*" || name.to_lowercase() == ask.method.to_lowercase());
            let called: Vec<&str> = called.split('/').skip(1).collect();
            let path = paths.iter().any(|pattern| {
                let pattern = without_slash(pattern.as_str());
                let pattern: Vec<PatternSegment> = match pattern.as_str() {
                    "" => Vec::new(),
                    text => text.parse::<PathPattern>().unwrap().segments().to_vec(),
                };
                path_matches(&pattern, &called)
            });
            let host = match (hosts, ask.authority) {
                (None, _) | (Some(_), None) => true,
                (Some(hosts), Some(called)) => hosts
                    .iter()
                    .any(|host| same_host(host, own, called, workload)),
            };
            let upgrade = upgrades.is_empty()
                || ask.upgrade.is_some_and(|token| {
                    upgrades
                        .iter()
                        .any(|upgrade| upgrade.as_str() == token.to_lowercase())
                });
            method && path && host && upgrade
        }
        Target::Grpc { service, methods } => methods.iter().any(|method| {
            let called: Vec<&str> = called.split('/').skip(1).collect();
            called.len() == 2
                && called[0] == service
                && !called[1].is_empty()
                && (method == "*" || called[1] == method)
        }),
        Target::Tcp {} | Target::Anything {} => true,
    }
}

fn path_matches(pattern: &[PatternSegment], path: &[&str]) -> bool {
    match (pattern, path) {
        ([], []) => true,
        ([PatternSegment::Many, rest @ ..], _) => {
            (0..=path.len()).any(|skipped| path_matches(rest, &path[skipped..]))
        }
        ([PatternSegment::One, rest @ ..], [segment, path @ ..]) => {
            !segment.is_empty() && path_matches(rest, path)
        }
        ([PatternSegment::Literal(literal), rest @ ..], [segment, path @ ..]) => {
            **literal == **segment && path_matches(rest, path)
        }
        _ => false,
    }
}

/// Every name form of a service is one host; ports are left out.
fn same_host(host: &str, own: &str, called: &Authority, workload: &Workload) -> bool {
    let host: Authority = host.parse().unwrap();
    let meant = service_of(host.host(), own, &workload.trust_domain);
    match meant {
        Some(meant) => {
            let called = service_of(called.host(), &workload.namespace, &workload.trust_domain);
            called == Some(meant)
        }
        None => host.host() == called.host(),
    }
}

fn is_from(
    source: &Source,
    policy: &AuthorizationPolicy,
    workload: &Workload,
    caller: Caller<'_>,
) -> bool {
    let Caller::Mesh(id) = caller else {
        return *source == Source::Unauthenticated {};
    };
    let td = workload.trust_domain.as_str();
    match source {
        Source::Workload {
            service_account,
            namespace,
        } => {
            let namespace = namespace.as_ref().unwrap_or(&policy.metadata.namespace);
            id.as_str() == format!("spiffe://{td}/ns/{namespace}/sa/{service_account}")
        }
        Source::Namespace { name } => {
            let prefix = format!("spiffe://{td}/ns/{name}/sa/");
            let rest = id.as_str().strip_prefix(&prefix);
            rest.is_some_and(|rest| !rest.contains('/'))
        }
        Source::SpiffeId { id: wanted } => id == wanted,
        Source::Anyone {} => id.trust_domain() == td,
        Source::Unauthenticated {} => false,
    }
}

fn selects(policy: &AuthorizationPolicy, workload: &Workload) -> bool {
    let labels = policy
        .spec
        .selector
        .match_labels
        .iter()
        .all(|(key, value)| workload.labels.get(key) == Some(value));
    if policy.metadata.namespace != "sidegate-system" {
        return labels && policy.metadata.namespace == workload.namespace;
    }
    let Some(selector) = &policy.spec.namespace_selector else {
        return labels;
    };
    let deny = policy.spec.action == Action::Deny;
    let namespace = selector.match_labels.iter().all(|(key, value)| {
        if key == "kubernetes.io/metadata.name" {
            *value == workload.namespace
        } else {
            deny
        }
    });
    labels && namespace
}

fn covers_port(policy: &AuthorizationPolicy, workload: &Workload, port: u16) -> bool {
    let Some(ports) = &policy.spec.ports else {
        return true;
    };
    let unresolved = ports.iter().any(|wanted| match wanted {
        PortRef::Number(_) => false,
        PortRef::Name(name) => !workload
            .ports
            .iter()
            .any(|port| port.name.as_ref() == Some(name)),
    });
    (unresolved && policy.spec.action == Action::Deny) || names_port(policy, workload, port)
}

fn names_port(policy: &AuthorizationPolicy, workload: &Workload, port: u16) -> bool {
    let ports = policy.spec.ports.iter().flatten();
    ports.into_iter().any(|wanted| match wanted {
        PortRef::Number(number) => *number == port,
        PortRef::Name(name) => workload
            .ports
            .iter()
            .any(|own| own.name.as_ref() == Some(name) && own.port == port),
    })
}

/// "With none, an Allow gives nothing and a Deny denies the workloads that it selects (its
/// namespace, if that can't be read)."
fn broken_denies(broken: &BrokenResource, workload: &Workload) -> bool {
    broken_may_concern(broken, workload) && broken.action != Some(Action::Allow)
}

fn broken_may_concern(broken: &BrokenResource, workload: &Workload) -> bool {
    let policy = matches!(broken.kind, None | Some(Kind::AuthorizationPolicy));
    let counts = broken.mode != Some(Mode::Audit);
    let namespace = match broken.namespace.as_deref() {
        None | Some("sidegate-system") => true,
        Some(namespace) => namespace == workload.namespace,
    };
    let selected = match &broken.selector {
        None => true,
        Some(selector) => selector
            .match_labels
            .iter()
            .all(|(key, value)| workload.labels.get(key) == Some(value)),
    };
    policy && counts && namespace && selected
}
