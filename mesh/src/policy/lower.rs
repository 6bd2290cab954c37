//! From the resources to the rules that concern one workload.

use std::sync::Arc;

use super::glob::Glob;
use super::leaf::{NO_RANK, Rank};
use super::rule::{Effect, From, HostName, Names, Ports, Rule, Selected, To, ToGrpc, ToHttp};
use crate::host::{Authority, ServiceName, service_of};
use crate::resource::{
    Action, AuthorizationPolicy, Kind, Metadata, Mode, PortRef, SYSTEM_NAMESPACE, Selector, Source,
    Target,
};
use crate::spiffe::{SpiffeId, TrustDomain};
use crate::store::ResourceSet;
use crate::workload::Workload;

/// The label by which a namespace selector finds a namespace by its name.
const NAMESPACE_NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// What concerns one workload.
pub(super) struct Lowered {
    pub(super) selected: Vec<Selected>,
    /// The resources of `selected`, in the same order.
    pub(super) resources: Vec<Arc<AuthorizationPolicy>>,
    /// A broken policy that denies everything.
    pub(super) broken: Option<Arc<str>>,
    /// A broken policy may have left every port open for http or grpc.
    pub(super) left_open: bool,
}

/// Picks and reads the policies that select `workload`.
pub(super) fn lower(set: &ResourceSet, workload: &Workload) -> Lowered {
    let mut resources: Vec<_> = set
        .policies
        .iter()
        .filter(|policy| selects(policy, workload))
        .map(Arc::clone)
        .collect();
    let name = |metadata: &Metadata| (metadata.namespace.clone(), metadata.name.clone());
    resources.sort_by_cached_key(|policy| name(&policy.metadata));
    let mut rank: Rank = 0;
    let selected = resources
        .iter()
        .map(|policy| lower_policy(policy, workload, &mut rank))
        .collect();
    Lowered {
        selected,
        resources,
        broken: denied_by_broken(set, workload),
        left_open: left_open_by_broken(set, workload),
    }
}

/// Whether a policy concerns a workload.
pub fn selects(policy: &AuthorizationPolicy, workload: &Workload) -> bool {
    let spec = &policy.spec;
    let in_namespace = if policy.metadata.namespace == SYSTEM_NAMESPACE {
        let selector = spec.namespace_selector.as_ref();
        selector.is_none_or(|selector| selects_namespace(selector, spec.action, workload))
    } else {
        policy.metadata.namespace == workload.namespace
    };
    in_namespace && spec.selector.matches(&workload.labels)
}

/// Standalone a namespace has its name and no other label. A Deny that asks for another one takes
/// the workload for selected: that it should be spared can't be known.
fn selects_namespace(selector: &Selector, action: Action, workload: &Workload) -> bool {
    selector
        .match_labels
        .iter()
        .all(|(key, value)| match key.as_str() {
            NAMESPACE_NAME_LABEL => *value == workload.namespace,
            _ => action == Action::Deny,
        })
}

fn lower_policy(policy: &AuthorizationPolicy, workload: &Workload, rank: &mut Rank) -> Selected {
    let spec = &policy.spec;
    let namespace = policy.metadata.namespace.as_str();
    let effect = match spec.action {
        Action::Allow => Effect::Allow,
        Action::Deny => Effect::Deny,
    };
    let rules = spec.rules.iter().enumerate().map(|(at, rule)| {
        let own_rank = *rank;
        *rank = rank.saturating_add(1).min(NO_RANK - 1);
        Rule {
            name: rule.name.clone().unwrap_or_else(|| at.to_string()).into(),
            rank: own_rank,
            from: rule
                .from
                .iter()
                .filter_map(|source| lower_source(source, namespace, &workload.trust_domain))
                .collect(),
            to: rule
                .to
                .iter()
                .map(|target| lower_target(target, namespace, workload))
                .collect(),
        }
    });
    Selected {
        name: format!("{namespace}/{}", policy.metadata.name).into(),
        effect,
        audit: spec.mode == Mode::Audit,
        rules: rules.collect(),
        ports: lower_ports(spec.ports.as_deref(), effect, workload),
    }
}

fn lower_ports(ports: Option<&[PortRef]>, effect: Effect, workload: &Workload) -> Ports {
    let Some(ports) = ports else {
        return Ports::Open;
    };
    let mut numbers = Vec::new();
    for port in ports {
        let before = numbers.len();
        numbers.extend(resolve_port(port, workload));
        if numbers.len() == before && effect == Effect::Deny {
            return Ports::Unresolved;
        }
    }
    numbers.sort_unstable();
    numbers.dedup();
    Ports::Named(numbers)
}

/// The numbers that a port of a policy means at this workload.
pub(super) fn resolve_port(port: &PortRef, workload: &Workload) -> Vec<u16> {
    match port {
        PortRef::Number(number) => vec![*number],
        PortRef::Name(name) => {
            let ports = workload.ports.iter();
            let named = ports.filter(|port| port.name.as_deref() == Some(name.as_str()));
            named.map(|port| port.port).collect()
        }
    }
}

fn lower_source(source: &Source, own: &str, trust_domain: &TrustDomain) -> Option<From> {
    Some(match source {
        Source::Workload {
            service_account,
            namespace,
        } => {
            let namespace = namespace.as_deref().unwrap_or(own);
            // A name that is none can't be a caller's: the resource's own check refuses it.
            From::Exact(SpiffeId::for_workload(trust_domain, namespace, service_account).ok()?)
        }
        Source::Namespace { name } => From::Namespace(name.as_str().into()),
        Source::SpiffeId { id } => From::Exact(id.clone()),
        Source::Anyone {} => From::Anyone,
        Source::Unauthenticated {} => From::Unauthenticated,
    })
}

fn lower_target(target: &Target, own: &str, workload: &Workload) -> To {
    match target {
        Target::Http {
            methods,
            paths,
            hosts,
            upgrades,
        } => To::Http(ToHttp {
            methods: lower_names(methods),
            paths: paths.iter().map(Glob::new).collect(),
            hosts: hosts.as_ref().map(|hosts| {
                let hosts = hosts.iter();
                hosts.map(|host| lower_host(host, own, workload)).collect()
            }),
            upgrades: (!upgrades.is_empty()).then(|| {
                upgrades
                    .iter()
                    .map(|upgrade| upgrade.as_str().into())
                    .collect()
            }),
        }),
        Target::Grpc { service, methods } => To::Grpc(ToGrpc {
            service: service.as_str().into(),
            methods: lower_names(methods),
            paths: methods
                .iter()
                .map(|method| Glob::grpc(service, method))
                .collect(),
        }),
        Target::Tcp {} => To::Tcp,
        Target::Anything {} => To::Anything,
    }
}

fn lower_names(names: &[String]) -> Names {
    if names.iter().any(|name| name == "*") {
        Names::All
    } else {
        Names::Listed(names.iter().map(|name| name.as_str().into()).collect())
    }
}

fn lower_host(text: &str, own: &str, workload: &Workload) -> HostName {
    // A host that is no authority can't be a request's either.
    let host = Authority::parse(text).map_or_else(
        |_| text.to_ascii_lowercase(),
        |authority| authority.host().to_owned(),
    );
    let spellings = match service_of(&host, own, &workload.trust_domain) {
        Some(service) => name_forms(&service, &workload.namespace, &workload.trust_domain),
        None => vec![host],
    };
    HostName {
        text: text.into(),
        spellings,
    }
}

/// Every host by which `own_namespace` may call a service: exactly those for which
/// [`service_of`] gives its name, in lower case and without a dot at the end.
pub(crate) fn name_forms(
    service: &ServiceName,
    own_namespace: &str,
    trust_domain: &TrustDomain,
) -> Vec<String> {
    let mut forms = vec![format!("{service}"), format!("{service}.svc")];
    for domain in ["cluster.local", trust_domain.as_str()] {
        forms.push(format!("{service}.svc.{domain}"));
    }
    if service.namespace == own_namespace {
        forms.push(service.name.clone());
    }
    forms.sort_unstable();
    forms.dedup();
    forms
}

/// The first policy that did not compile and may deny this workload.
fn denied_by_broken(set: &ResourceSet, workload: &Workload) -> Option<Arc<str>> {
    let mut broken = set.broken.iter();
    broken
        .find(|broken| broken.denies(workload))
        .map(|broken| broken.label().into())
}

/// Whether a broken Allow may have been for http or grpc here. It gives nothing, and it must not
/// open a port to opaque bytes by being gone.
fn left_open_by_broken(set: &ResourceSet, workload: &Workload) -> bool {
    set.broken.iter().any(|broken| {
        let may_be_policy = broken
            .kind
            .is_none_or(|kind| kind == Kind::AuthorizationPolicy);
        let namespace = broken.namespace.as_deref();
        let covers_namespace =
            namespace.is_none_or(|name| name == workload.namespace || name == SYSTEM_NAMESPACE);
        let selector = broken.selector.as_ref();
        let may_select = selector.is_none_or(|selector| selector.matches(&workload.labels));
        may_be_policy && broken.mode != Some(Mode::Audit) && covers_namespace && may_select
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_forms_of_a_name_are_those_that_mean_the_service() {
        let trust_domain: TrustDomain = "mesh.local".parse().unwrap();
        let labels = [
            "orders", "shop", "jobs", "svc", "cluster", "local", "mesh", "x",
        ];
        let service = ServiceName {
            namespace: "shop".to_owned(),
            name: "orders".to_owned(),
        };
        for own in ["shop", "jobs"] {
            let forms = name_forms(&service, own, &trust_domain);
            let mut means_it = 0;
            // Every host of up to five of these labels.
            for count in 1..=5_u32 {
                for mut number in 0..8_usize.pow(count) {
                    let mut host: Vec<&str> = Vec::new();
                    for _ in 0..count {
                        host.push(labels[number % 8]);
                        number /= 8;
                    }
                    let host = host.join(".");
                    let means = service_of(&host, own, &trust_domain).as_ref() == Some(&service);
                    assert_eq!(forms.contains(&host), means, "{host} in {own}");
                    means_it += usize::from(means);
                }
            }
            assert_eq!(means_it, forms.len());
        }
    }
}
