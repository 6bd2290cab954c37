//! Routes: which service an authority means, where it runs, and how it is called.
//!
//! Invariant: a route's endpoints each have the one identity that must answer there, and every
//! value of its [`Traffic`] is filled in, so nobody downstream knows a default.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use crate::host::{Authority, DEFAULT_PORT, ServiceName};
use crate::policy::name_forms;
pub use crate::resource::PortProtocol;
use crate::resource::{
    self, BalancingPolicy, EndpointIdentity, Kind, Problem, ResourceKey, RetryCondition,
    ServicePort, StaticService, TrafficPolicy,
};
use crate::spiffe::{SpiffeId, TrustDomain};
use crate::store::ResourceSet;
use crate::workload::Workload;

/// The services that a workload can call, by name and port.
#[derive(Debug, Default)]
pub struct Routes {
    /// By every host that means a service, from the workload's own namespace.
    by_host: HashMap<Box<str>, Arc<Service>>,
    by_name: HashMap<ServiceName, Arc<Service>>,
    /// Of every service that has a traffic policy, known here or not.
    traffic: HashMap<ServiceName, Arc<Traffic>>,
}

#[derive(Debug)]
struct Service {
    /// Sorted by port.
    ports: Box<[Arc<Route>]>,
}

/// One port of one service.
#[derive(Clone, Debug)]
pub struct Route {
    /// `orders.shop:80`, as the access log says it.
    pub service: Arc<str>,
    /// The service.
    pub name: ServiceName,
    /// The port that callers name.
    pub port: u16,
    /// What callers speak there.
    pub protocol: PortProtocol,
    /// The called workload's own port.
    pub target_port: u16,
    /// Where it runs; none at the moment when empty.
    pub endpoints: Arc<[Endpoint]>,
    /// How it is called.
    pub traffic: Arc<Traffic>,
}

/// One place where a service runs.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Endpoint {
    /// The inbound listener of its sidecar.
    pub address: SocketAddr,
    /// Who must answer there.
    pub identity: SpiffeId,
    /// The zone that it is in, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<Arc<str>>,
    /// It is about to end: it goes on with what it has, and is chosen only when there is no other.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub draining: bool,
}

impl Endpoint {
    /// An endpoint of which nothing else is known.
    pub fn new(address: SocketAddr, identity: SpiffeId) -> Self {
        Self {
            address,
            identity,
            zone: None,
            draining: false,
        }
    }
}

/// How a service is called.
///
/// Whatever this says, a call that never reached an application may be sent to another endpoint:
/// after a failed connection or a `REFUSED_STREAM`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Traffic {
    /// Longest time of a whole call until its response's head; `None`: no limit.
    pub timeout: Option<Duration>,
    /// Whether an HTTP request is tried again after it may have reached an application.
    pub retry: Option<Retry>,
    /// The same for a gRPC call.
    pub grpc_retry: Option<GrpcRetry>,
    /// When an endpoint that fails is left out.
    pub ejection: Ejection,
    /// By which rule an endpoint is chosen.
    pub balancing: BalancingPolicy,
    /// Whether endpoints of the caller's own zone come first.
    pub prefer_zone: bool,
}

/// When an HTTP request is tried again.
#[derive(Clone, Debug, PartialEq)]
pub struct Retry {
    /// How often it is tried again, at most.
    pub attempts: u32,
    /// After which failures.
    pub conditions: Vec<RetryCondition>,
    /// Which methods; never empty.
    pub methods: Vec<String>,
    /// Longest time of one try until its response's head.
    pub per_try_timeout: Option<Duration>,
    /// Retries as a fraction of requests, at most; 0 to 1.
    pub budget: f64,
}

impl Retry {
    /// Whether requests of this method are tried again.
    pub fn covers_method(&self, method: &str) -> bool {
        self.methods
            .iter()
            .any(|name| name == method || name == "*")
    }

    /// Whether this failure is one after which to try again.
    pub fn covers(&self, condition: RetryCondition) -> bool {
        self.conditions.contains(&condition)
    }

    /// Whether this status is one after which to try again.
    pub fn covers_status(&self, status: u16) -> bool {
        (matches!(status, 500..=599) && self.covers(RetryCondition::ServerError))
            || (matches!(status, 502..=504) && self.covers(RetryCondition::GatewayError))
    }
}

/// When a gRPC call is tried again.
#[derive(Clone, Debug, PartialEq)]
pub struct GrpcRetry {
    /// How often it is tried again, at most.
    pub attempts: u32,
    /// After which status codes, as numbers.
    pub codes: Vec<u32>,
    /// Which methods by full name, `shop.v1.Orders/Get`.
    pub methods: Vec<String>,
    /// Longest time of one try until its response's head.
    pub per_try_timeout: Option<Duration>,
    /// Retries as a fraction of calls, at most; 0 to 1.
    pub budget: f64,
}

impl GrpcRetry {
    /// Whether calls of `service/method` are tried again after this status.
    pub fn covers(&self, service: &str, method: &str, status: u32) -> bool {
        let called = |name: &String| name.split_once('/') == Some((service, method));
        self.codes.contains(&status) && self.methods.iter().any(called)
    }
}

/// When an endpoint that fails is left out for a while.
#[derive(Clone, Debug, PartialEq)]
pub struct Ejection {
    /// After how many failures one after the other.
    pub consecutive_failures: u32,
    /// For how long.
    pub duration: Duration,
    /// Largest fraction of the endpoints that is left out at once; 0 to 1.
    pub ejected_max: f64,
}

impl Default for Ejection {
    /// Five failures, ten seconds, at most half of the endpoints.
    fn default() -> Self {
        Self {
            consecutive_failures: 5,
            duration: Duration::from_secs(10),
            ejected_max: 0.5,
        }
    }
}

impl Routes {
    /// Compiles the services of `set` as `workload` names them.
    pub fn compile(set: &ResourceSet, workload: &Workload) -> (Self, Vec<Problem>) {
        let (traffic, problems) = traffic_by_service(set);
        let mut routes = Self::default();
        for resource in &set.services {
            let name = ServiceName {
                namespace: resource.metadata.namespace.clone(),
                name: resource.metadata.name.clone(),
            };
            let traffic = traffic.get(&name).cloned().unwrap_or_default();
            let service = compile_service(resource, &name, &traffic, &workload.trust_domain);
            let service = Arc::new(service);
            for host in name_forms(&name, &workload.namespace, &workload.trust_domain) {
                routes.by_host.insert(host.into(), Arc::clone(&service));
            }
            routes.by_name.insert(name, service);
        }
        routes.traffic = traffic;
        (routes, problems)
    }

    /// How a service is called: by its traffic policy, also where its endpoints come from elsewhere
    /// than the resources, as in a cluster.
    pub fn traffic(&self, name: &ServiceName) -> Arc<Traffic> {
        self.traffic.get(name).cloned().unwrap_or_default()
    }

    /// The route that an authority means.
    ///
    /// An authority without a port, or with port 80, means port 80 of the service; of a service
    /// that has one port only, that one.
    pub fn resolve(&self, authority: &Authority) -> Option<&Arc<Route>> {
        let service = self.by_host.get(authority.host())?;
        match authority.port() {
            Some(port) => service.port(port),
            None => service.port(DEFAULT_PORT).or_else(|| service.only_port()),
        }
    }

    /// The route of a service's port.
    pub fn service(&self, name: &ServiceName, port: u16) -> Option<&Arc<Route>> {
        self.by_name.get(name)?.port(port)
    }

    /// Whether an authority names a service of ours at all, whatever its port.
    pub fn knows(&self, authority: &Authority) -> bool {
        self.by_host.contains_key(authority.host())
    }

    /// Every route, by service and port.
    pub fn all(&self) -> Vec<&Arc<Route>> {
        let services = self.by_name.values();
        let mut routes: Vec<_> = services.flat_map(|service| service.ports.iter()).collect();
        routes.sort_by(|a, b| (&a.name, a.port).cmp(&(&b.name, b.port)));
        routes
    }
}

impl Service {
    fn port(&self, port: u16) -> Option<&Arc<Route>> {
        let at = self
            .ports
            .binary_search_by_key(&port, |route| route.port)
            .ok()?;
        self.ports.get(at)
    }

    fn only_port(&self) -> Option<&Arc<Route>> {
        match &*self.ports {
            [only] => Some(only),
            _ => None,
        }
    }
}

fn compile_service(
    resource: &StaticService,
    name: &ServiceName,
    traffic: &Arc<Traffic>,
    trust_domain: &TrustDomain,
) -> Service {
    let endpoints: Arc<[Endpoint]> = resource
        .spec
        .endpoints
        .iter()
        .filter_map(|endpoint| {
            let identity = identity_of(&endpoint.identity, &name.namespace, trust_domain)?;
            Some(Endpoint::new(endpoint.address, identity))
        })
        .collect();
    let route = |port: &ServicePort| {
        Arc::new(Route {
            service: format!("{name}:{}", port.port).into(),
            name: name.clone(),
            port: port.port,
            protocol: port.protocol,
            target_port: port.target_port.unwrap_or(port.port),
            endpoints: Arc::clone(&endpoints),
            traffic: Arc::clone(traffic),
        })
    };
    let mut ports: Vec<Arc<Route>> = resource.spec.ports.iter().map(route).collect();
    ports.sort_by_key(|route| route.port);
    Service {
        ports: ports.into(),
    }
}

/// `None` for a name that is none, which the resource's own check refuses.
fn identity_of(
    identity: &EndpointIdentity,
    own: &str,
    trust_domain: &TrustDomain,
) -> Option<SpiffeId> {
    match identity {
        EndpointIdentity::SpiffeId { id } => Some(id.clone()),
        EndpointIdentity::Workload {
            service_account,
            namespace,
        } => {
            let namespace = namespace.as_deref().unwrap_or(own);
            SpiffeId::for_workload(trust_domain, namespace, service_account).ok()
        }
    }
}

/// One traffic policy for each service: the first by name. Each further one is a problem, and so
/// is one for a service that does not exist.
fn traffic_by_service(set: &ResourceSet) -> (HashMap<ServiceName, Arc<Traffic>>, Vec<Problem>) {
    let mut policies: Vec<&Arc<TrafficPolicy>> = set.traffic.iter().collect();
    policies.sort_by(|a, b| {
        let key = |policy: &TrafficPolicy| {
            (
                policy.metadata.namespace.clone(),
                policy.metadata.name.clone(),
            )
        };
        key(a).cmp(&key(b))
    });
    let mut by_service: HashMap<ServiceName, (&str, Arc<Traffic>)> = HashMap::new();
    let mut problems = Vec::new();
    for policy in policies {
        let metadata = &policy.metadata;
        let service = ServiceName {
            namespace: metadata.namespace.clone(),
            name: policy.spec.service.clone(),
        };
        let mut warn = |message: String, help: &str| {
            let key = ResourceKey {
                kind: Kind::TrafficPolicy,
                namespace: metadata.namespace.clone(),
                name: metadata.name.clone(),
            };
            problems.push(Problem::warning(key, "spec.service", message, help));
        };
        if let Some((first, _)) = by_service.get(&service) {
            warn(
                format!(
                    "{service} already has the traffic policy `{first}`, so this one does nothing"
                ),
                "write one traffic policy for each service",
            );
            continue;
        }
        let exists = set.services.iter().any(|found| {
            found.metadata.namespace == service.namespace && found.metadata.name == service.name
        });
        // In a cluster no service is a resource of ours, and this is not for us to judge.
        if !exists && !set.services.is_empty() {
            warn(
                format!("there is no service {service}"),
                "write the name of a service of the policy's own namespace",
            );
        }
        let traffic = Arc::new(compile_traffic(policy));
        by_service.insert(service, (&metadata.name, traffic));
    }
    let traffic = by_service
        .into_iter()
        .map(|(name, (_, traffic))| (name, traffic));
    (traffic.collect(), problems)
}

fn compile_traffic(policy: &TrafficPolicy) -> Traffic {
    let spec = &policy.spec;
    let balancing = spec.load_balancing.clone().unwrap_or_default();
    Traffic {
        timeout: spec.timeout,
        retry: spec.retry.as_ref().map(compile_retry),
        grpc_retry: spec.grpc_retry.as_ref().map(compile_grpc_retry),
        ejection: spec
            .outlier_ejection
            .as_ref()
            .map_or_else(Ejection::default, |ejection| Ejection {
                consecutive_failures: ejection.consecutive_failures,
                duration: ejection.duration,
                ejected_max: ejection.max_ejected.fraction(),
            }),
        balancing: balancing.policy,
        prefer_zone: balancing.prefer_zone,
    }
}

fn compile_retry(retry: &resource::Retry) -> Retry {
    Retry {
        attempts: retry.attempts,
        conditions: retry.conditions.clone(),
        methods: retry.methods.clone(),
        per_try_timeout: retry.per_try_timeout,
        budget: retry.budget.fraction(),
    }
}

fn compile_grpc_retry(retry: &resource::GrpcRetry) -> GrpcRetry {
    GrpcRetry {
        attempts: retry.attempts,
        codes: retry.codes.iter().map(|code| code.number()).collect(),
        methods: retry.methods.clone(),
        per_try_timeout: retry.per_try_timeout,
        budget: retry.budget.fraction(),
    }
}
