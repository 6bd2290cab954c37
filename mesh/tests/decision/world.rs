//! Small worlds to decide in: policies from YAML, workloads, calls.

use std::collections::BTreeMap;
use std::sync::Arc;

use sidegate_mesh::policy::{Ask, Caller, HttpAsk};
use sidegate_mesh::resource::{AuthorizationPolicy, Metadata, StaticService};
use sidegate_mesh::{
    Authority, CanonicalPath, Decision, Enforcement, Policy, ResourceSet, SpiffeId, Workload,
    WorkloadPort,
};

pub fn id(short: &str) -> SpiffeId {
    if short.starts_with("spiffe://") {
        return short.parse().unwrap();
    }
    let (namespace, account) = short.split_once('/').unwrap();
    format!("spiffe://mesh.local/ns/{namespace}/sa/{account}")
        .parse()
        .unwrap()
}

/// `shop/orders` with label `app: orders` and the ports http 8080, grpc 9090 and, unnamed, 6379.
pub fn workload(enforcement: Enforcement) -> Workload {
    let port = |name: Option<&str>, port| WorkloadPort {
        name: name.map(str::to_owned),
        port,
    };
    Workload {
        id: id("shop/orders"),
        trust_domain: "mesh.local".parse().unwrap(),
        namespace: "shop".to_owned(),
        labels: BTreeMap::from([("app".to_owned(), "orders".to_owned())]),
        ports: vec![
            port(Some("http"), 8080),
            port(Some("grpc"), 9090),
            port(None, 6379),
        ],
        enforcement,
    }
}

/// A policy of `shop` named `name`, or of the namespace before a `/`, from the YAML of its spec.
pub fn policy(name: &str, spec: &str) -> Arc<AuthorizationPolicy> {
    let (namespace, name) = name.split_once('/').unwrap_or(("shop", name));
    let spec = serde_saphyr::from_str(spec).unwrap_or_else(|error| panic!("{error}: {spec}"));
    Arc::new(AuthorizationPolicy {
        metadata: Metadata::new(namespace, name),
        spec,
    })
}

pub fn set(policies: &[(&str, &str)]) -> ResourceSet {
    ResourceSet {
        policies: policies
            .iter()
            .map(|(name, spec)| policy(name, spec))
            .collect(),
        ..ResourceSet::default()
    }
}

/// An Allow for everybody of `to`, on `rest` (ports, mode).
pub fn allow(rest: &str, to: &str) -> String {
    format!(
        "{{selector: {{}}, action: Allow, {rest} rules: [{{name: r, from: [{{anyone: {{}}}}], to: [{to}]}}]}}"
    )
}

pub fn deny(rest: &str, to: &str) -> String {
    format!(
        "{{selector: {{}}, action: Deny, {rest} rules: [{{name: r, from: [{{anyone: {{}}}}], to: [{to}]}}]}}"
    )
}

/// A request in words: `GET /x`, then any of `host=H`, `upgrade=U`, `grpc`.
pub struct Request {
    method: String,
    path: CanonicalPath,
    authority: Option<Authority>,
    upgrade: Option<String>,
    grpc: bool,
}

impl Request {
    pub fn new(text: &str) -> Self {
        let mut words = text.split(' ');
        let mut request = Self {
            method: words.next().unwrap().to_owned(),
            path: words.next().unwrap().parse().unwrap(),
            authority: None,
            upgrade: None,
            grpc: false,
        };
        for word in words {
            match word.split_once('=') {
                Some(("host", host)) => request.authority = Some(host.parse().unwrap()),
                Some(("upgrade", token)) => request.upgrade = Some(token.to_owned()),
                None if word == "grpc" => request.grpc = true,
                _ => panic!("{word}"),
            }
        }
        request
    }

    pub fn ask(&self) -> Ask<'_> {
        Ask::Http(HttpAsk {
            method: &self.method,
            path: &self.path,
            authority: self.authority.as_ref(),
            upgrade: self.upgrade.as_deref(),
            grpc: self.grpc,
        })
    }
}

/// Decides a call in words: a request as above, or `tcp`. The caller is `-` for plaintext.
pub fn decide_for(
    workload: &Workload,
    policies: &[(&str, &str)],
    (caller, port, call): (&str, u16, &str),
) -> Decision {
    let (policy, _) = Policy::compile(&set(policies), workload);
    let caller_id = (caller != "-").then(|| id(caller));
    let caller = caller_id
        .as_ref()
        .map_or(Caller::Unauthenticated, Caller::Mesh);
    if call == "tcp" {
        return policy.authorize(caller, port, &Ask::Opaque);
    }
    let request = Request::new(call);
    let decision = policy.authorize(caller, port, &request.ask());
    let explained = policy.explain(caller, port, &request.ask());
    assert_eq!(explained.verdict, decision.verdict, "{explained:?}");
    decision
}

pub fn decide(policies: &[(&str, &str)], call: (&str, u16, &str)) -> Decision {
    decide_for(&workload(Enforcement::Enforce), policies, call)
}

/// A service of `shop`, or of the namespace before a `/`.
pub fn service(name: &str, ports: &str, endpoints: &str) -> StaticService {
    let (namespace, name) = name.split_once('/').unwrap_or(("shop", name));
    let spec = format!("{{ports: {ports}, endpoints: {endpoints}}}");
    StaticService {
        metadata: Metadata::new(namespace, name),
        spec: serde_saphyr::from_str(&spec).unwrap(),
    }
}
