//! The called workload and the policies of a cluster, as its sidecar has them.
//!
//! Always true: labels, ports, trust domain and enforcement are those of a live pod that has a
//! sidecar; a policy that cannot be read stays in its place, and denies what it might deny.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::{Container, Namespace, Pod, Service, ServicePort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::DynamicObject;
use kube::{Api, ResourceExt};
use serde::Deserialize;
use serde_json::Value;
use sidegate_mesh::resource::{API_VERSION, Kind, SYSTEM_NAMESPACE, as_written, parse_value};
use sidegate_mesh::store::ResourceStore;
use sidegate_mesh::yaml::from_json;
use sidegate_mesh::{Enforcement, Resource, ResourceSet, SpiffeId, Workload, WorkloadPort};

use super::{Called, TestArgs, World};
use crate::kube::sidecars::{CONTAINER, Selection, Sidecar};
use crate::kube::{Cluster, Scope, is_missing};

/// The annotation by which a namespace says whether refusals refuse.
const ENFORCEMENT: &str = "sidegate.dev/enforcement";

/// Labels that tell pods of one workload from one another; nobody selects by them.
const POD_LABELS: [&str; 4] = [
    "pod-template-hash",
    "controller-revision-hash",
    "statefulset.kubernetes.io/pod-name",
    "apps.kubernetes.io/pod-index",
];

/// Whom `--to` means.
#[derive(Debug, PartialEq, Eq)]
struct Target {
    namespace: Option<String>,
    name: Name,
    port: Option<String>,
}

#[derive(Debug, PartialEq, Eq)]
enum Name {
    /// A service, or what `WORKLOAD` means elsewhere.
    Any(String),
    /// A service only.
    Service(String),
    /// `KIND/NAME`.
    Workload(String),
}

impl Target {
    /// `orders`, `orders.shop`, `shop/orders`, `svc/orders`, `deploy/orders`, or a SPIFFE ID; but for
    /// the last each may end with the port of a service, `:80`.
    fn parse(text: &str) -> anyhow::Result<Self> {
        if text.contains("://") {
            let id: SpiffeId = text
                .parse()
                .with_context(|| format!("`{text}` is no SPIFFE ID"))?;
            let (namespace, account) = id
                .workload()
                .with_context(|| format!("`{text}` is no workload's SPIFFE ID"))?;
            return Ok(Self {
                namespace: Some(namespace.to_owned()),
                name: Name::Workload(format!("sa/{account}")),
                port: None,
            });
        }
        let (text, port) = match text.rsplit_once(':') {
            Some((text, port)) => (text, Some(port.to_owned())),
            None => (text, None),
        };
        let named = |namespace: Option<&str>, name: Name| Self {
            namespace: namespace.map(ToOwned::to_owned),
            name,
            port,
        };
        let Some((before, name)) = text.split_once('/') else {
            // `orders.shop.svc.cluster.local` is `orders.shop` too.
            let mut labels = text.splitn(3, '.');
            let name = labels.next().unwrap_or_default().to_owned();
            return Ok(named(labels.next(), Name::Any(name)));
        };
        Ok(match before {
            "svc" | "service" | "services" => named(None, Name::Service(name.to_owned())),
            _ if crate::kube::sidecars::is_kind(before) => {
                named(None, Name::Workload(text.to_owned()))
            }
            _ => named(Some(before), Name::Any(name.to_owned())),
        })
    }
}

/// Reads what decides about calls to `--to`.
///
/// # Errors
///
/// When the cluster cannot be asked, or no pod with a sidecar is meant.
pub(super) async fn read(arguments: &TestArgs, cluster: &Cluster) -> anyhow::Result<World> {
    let target = Target::parse(&arguments.to)?;
    let named = target
        .namespace
        .as_deref()
        .or(arguments.namespace.as_deref());
    let namespace = named.unwrap_or(cluster.default_namespace()).to_owned();
    let mut notes = Vec::new();
    let service = service(cluster, &namespace, &target).await?;
    let pods = pods(cluster, &namespace, (&target, service.as_ref())).await?;
    let pod = choose(&pods, &arguments.to, &mut notes)?;
    let facts = facts(cluster, &namespace).await?;
    let config = Config::of(pod);
    let trust_domain = match &arguments.trust_domain {
        Some(name) => name,
        None => &config.workload.trust_domain,
    };
    let trust_domain = trust_domain
        .parse()
        .with_context(|| format!("`{trust_domain}` is no trust domain"))?;
    let account = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.service_account_name.as_deref());
    let id = SpiffeId::for_workload(&trust_domain, &namespace, account.unwrap_or("default"))?;
    let workload = Workload {
        id,
        trust_domain: trust_domain.clone(),
        namespace: namespace.clone(),
        labels: pod.labels().clone(),
        ports: ports(pod),
        enforcement: config.workload.enforcement.unwrap_or(facts.enforcement),
    };
    let port = match &service {
        Some(service) => service_port(service, target.port.as_deref(), pod)?,
        None => match &target.port {
            Some(port) => bail!(
                "{}: there is no such service, so `:{port}` means nothing; use --port",
                arguments.to
            ),
            None => None,
        },
    };
    let (set, problems) = policies(cluster, &namespace, &facts.labels).await?;
    notes.extend(problems);
    notes.insert(0, format!("pod {namespace}/{}", pod.name_any()));
    Ok(World {
        trust_domain,
        set,
        problems: notes,
        sidecars: Vec::new(),
        called: Some(Called { workload, port }),
    })
}

async fn service(
    cluster: &Cluster,
    namespace: &str,
    target: &Target,
) -> anyhow::Result<Option<Service>> {
    let (name, must_be) = match &target.name {
        Name::Any(name) => (name, false),
        Name::Service(name) => (name, true),
        Name::Workload(_) => return Ok(None),
    };
    let services = Api::<Service>::namespaced(cluster.client(), namespace);
    match services.get(name).await {
        Ok(service) => Ok(Some(service)),
        Err(error) if is_missing(&error) && !must_be => Ok(None),
        Err(error) if is_missing(&error) => bail!("no service {namespace}/{name}"),
        Err(error) => Err(cluster.explain(error, "asking for the service")),
    }
}

/// The pods of a service, or of the workload of that name.
async fn pods(
    cluster: &Cluster,
    namespace: &str,
    (target, service): (&Target, Option<&Service>),
) -> anyhow::Result<Vec<Pod>> {
    let scope = Scope::Namespace(namespace.to_owned());
    let name = match &target.name {
        Name::Any(name) | Name::Service(name) | Name::Workload(name) => name,
    };
    let selector = match service {
        Some(service) => {
            let selector = service
                .spec
                .as_ref()
                .and_then(|spec| spec.selector.as_ref());
            let selector = selector.filter(|selector| !selector.is_empty());
            Some(selector.with_context(|| {
                format!("the service {namespace}/{name} selects no pods; name a workload")
            })?)
        }
        None => None,
    };
    let wanted = Selection::new(cluster, Some(name), Some(namespace), false)?.wanted;
    let is_meant = |pod: &Pod, sidecar: Option<&Sidecar>| match selector {
        Some(selector) => selector
            .iter()
            .all(|(key, value)| pod.labels().get(key) == Some(value)),
        None => sidecar.is_some_and(|sidecar| wanted.is(sidecar)),
    };
    let (mut pods, mut unmeshed) = (Vec::new(), 0);
    let api = cluster.api::<Pod>(&scope);
    cluster
        .list(&api, "listing pods", |pod: Pod| {
            let sidecar = Sidecar::of(&pod);
            if is_meant(&pod, sidecar.as_ref()) {
                match sidecar {
                    Some(sidecar) if !sidecar.ended => pods.push(pod),
                    Some(_) => {}
                    None => unmeshed += 1,
                }
            }
        })
        .await?;
    if pods.is_empty() && unmeshed > 0 {
        bail!(
            "no pod of {namespace}/{name} has a sidecar, so no policy decides about calls to it: is \
             the namespace labelled `sidegate.dev/inject: enabled`, and were its pods restarted since?"
        );
    }
    if pods.is_empty() {
        bail!(
            "no pod answers to `{name}` in {scope}: name a service, a workload, or a service account"
        );
    }
    Ok(pods)
}

/// The pod that is asked about: ready before not, then the newest. Notes when pods differ.
fn choose<'a>(pods: &'a [Pod], to: &str, notes: &mut Vec<String>) -> anyhow::Result<&'a Pod> {
    let rank = |pod: &&Pod| {
        let sidecar = Sidecar::of(pod);
        let ready = sidecar
            .as_ref()
            .is_some_and(|sidecar| sidecar.ready && !sidecar.terminating);
        (ready, pod.creation_timestamp().map(|time| time.0))
    };
    let chosen = pods.iter().max_by_key(rank).context("no pod is meant")?;
    let kind = |pod: &Pod| {
        let mut labels = pod.labels().clone();
        labels.retain(|key, _| !POD_LABELS.contains(&key.as_str()));
        let account = pod
            .spec
            .as_ref()
            .and_then(|spec| spec.service_account_name.clone());
        let ports: BTreeSet<_> = ports(pod)
            .into_iter()
            .map(|port| (port.name, port.port))
            .collect();
        (labels, account, ports)
    };
    if pods.iter().any(|pod| kind(pod) != kind(chosen)) {
        notes.push(format!(
            "{} pods answer to `{to}`, and they differ in labels, ports or service account; the newest \
             is asked about: choose with pod/NAME",
            pods.len()
        ));
    }
    Ok(chosen)
}

/// The part of the sidecar's configuration, fixed at injection, that is needed here.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    workload: Own,
}

#[derive(Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Own {
    trust_domain: String,
    enforcement: Option<Enforcement>,
}

impl Default for Own {
    fn default() -> Self {
        Self {
            trust_domain: "cluster.local".to_owned(),
            enforcement: None,
        }
    }
}

impl Config {
    fn of(pod: &Pod) -> Self {
        let containers = pod
            .spec
            .as_ref()
            .and_then(|spec| spec.init_containers.as_ref());
        let mut containers = containers.into_iter().flatten();
        let sidecar = containers.find(|container| container.name == CONTAINER);
        let mut env = sidecar
            .iter()
            .flat_map(|sidecar| sidecar.env.iter().flatten());
        let text = env.find(|variable| variable.name == "SIDEGATE_CONFIG");
        let text = text.and_then(|variable| variable.value.as_deref());
        text.and_then(|text| serde_saphyr::from_str(text).ok())
            .unwrap_or_default()
    }
}

/// The TCP ports of a pod's own containers.
fn ports(pod: &Pod) -> Vec<WorkloadPort> {
    let Some(spec) = &pod.spec else {
        return Vec::new();
    };
    let native = |container: &&Container| {
        container.restart_policy.as_deref() == Some("Always") && container.name != CONTAINER
    };
    let native = spec.init_containers.iter().flatten().filter(native);
    let ports = spec
        .containers
        .iter()
        .chain(native)
        .flat_map(|container| container.ports.iter().flatten());
    let tcp = ports.filter(|port| {
        port.protocol
            .as_deref()
            .is_none_or(|protocol| protocol == "TCP")
    });
    let port = |port: &k8s_openapi::api::core::v1::ContainerPort| {
        Some(WorkloadPort {
            name: port.name.clone(),
            port: port.container_port.try_into().ok()?,
        })
    };
    tcp.filter_map(port).collect()
}

/// The pod's port behind a port of a service; of a service's only one when none is named.
fn service_port(service: &Service, named: Option<&str>, pod: &Pod) -> anyhow::Result<Option<u16>> {
    let all = service
        .spec
        .as_ref()
        .and_then(|spec| spec.ports.as_deref())
        .unwrap_or_default();
    let is = |port: &&ServicePort| {
        named.is_none_or(|named| {
            port.name.as_deref() == Some(named) || port.port.to_string() == named
        })
    };
    let mut found = all.iter().filter(is);
    let (port, more) = (found.next(), found.next());
    let Some(port) = port else {
        let known: Vec<_> = all.iter().map(|port| port.port.to_string()).collect();
        let (service, named) = (service.name_any(), named.unwrap_or_default());
        bail!(
            "the service {service} has no port `{named}`, only: {}",
            known.join(", ")
        );
    };
    if named.is_none() && more.is_some() {
        return Ok(None);
    }
    let number = match &port.target_port {
        None => u16::try_from(port.port).ok(),
        Some(IntOrString::Int(number)) => u16::try_from(*number).ok(),
        Some(IntOrString::String(name)) => {
            let mut own = ports(pod).into_iter();
            own.find(|own| own.name.as_deref() == Some(name))
                .map(|own| own.port)
        }
    };
    let number = number.with_context(|| {
        format!(
            "the pod {} has no port for port {} of the service",
            pod.name_any(),
            port.port
        )
    })?;
    Ok(Some(number))
}

/// What a namespace says.
struct Facts {
    labels: BTreeMap<String, String>,
    enforcement: Enforcement,
}

async fn facts(cluster: &Cluster, namespace: &str) -> anyhow::Result<Facts> {
    let namespaces = Api::<Namespace>::all(cluster.client());
    let found = namespaces.get(namespace).await;
    let found = found.map_err(|error| cluster.explain(error, "asking for the namespace"))?;
    let audits = found
        .annotations()
        .get(ENFORCEMENT)
        .is_some_and(|how| how == "audit");
    Ok(Facts {
        labels: found.labels().clone(),
        enforcement: if audits {
            Enforcement::Audit
        } else {
            Enforcement::Enforce
        },
    })
}

/// The policies of a namespace and those of the whole mesh, and what is wrong with them.
async fn policies(
    cluster: &Cluster,
    namespace: &str,
    labels: &BTreeMap<String, String>,
) -> anyhow::Result<(ResourceSet, Vec<String>)> {
    let kind = Kind::AuthorizationPolicy;
    let mut texts = Vec::new();
    let namespaces = BTreeSet::from([namespace, SYSTEM_NAMESPACE]);
    for namespace in namespaces {
        let scope = Scope::Namespace(namespace.to_owned());
        let api = cluster.resources(kind, &scope);
        let doing = format!("listing policies of {scope}");
        cluster
            .list(&api, &doing, |object| {
                texts.extend(text_of(&object, labels));
            })
            .await?;
    }
    let mut store = ResourceStore::new();
    let problems = store.replace_folder(&texts);
    let words = problems.iter().map(|problem| {
        let field = problem.field.as_deref().unwrap_or("it");
        let help = problem
            .help
            .as_deref()
            .map(|help| format!("; {help}"))
            .unwrap_or_default();
        format!("{}: {field}: {}{help}", problem.file, problem.message)
    });
    Ok((store.resources().clone(), words.collect()))
}

/// A policy as the store reads it, unless it is mesh-wide and spares a namespace of these labels.
fn text_of(object: &DynamicObject, labels: &BTreeMap<String, String>) -> Option<(String, String)> {
    let place = format!(
        "{} {}/{}",
        Kind::AuthorizationPolicy,
        object.namespace().unwrap_or_default(),
        object.name_any()
    );
    let mut value = serde_json::to_value(object).ok()?;
    let fields = value.as_object_mut()?;
    fields.insert("apiVersion".to_owned(), API_VERSION.into());
    fields.insert("kind".to_owned(), Kind::AuthorizationPolicy.as_str().into());
    let mut value = as_written(&value);
    // One that cannot be read stays in its place and is refused.
    if let Ok(Resource::AuthorizationPolicy(policy)) = parse_value(&value)
        && let Some(selector) = &policy.spec.namespace_selector
    {
        if !selector.matches(labels) {
            return None;
        }
        let spec = value.get_mut("spec").and_then(Value::as_object_mut);
        spec.map(|spec| spec.remove("namespaceSelector"));
    }
    Some((place, from_json(&value.to_string())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_called_workload_has_many_names() {
        let check = |text: &str, namespace: Option<&str>, name: Name, port: Option<&str>| {
            let expected = Target {
                namespace: namespace.map(str::to_owned),
                name,
                port: port.map(str::to_owned),
            };
            assert_eq!(Target::parse(text).unwrap(), expected, "{text}");
        };
        let orders = || Name::Any("orders".to_owned());
        check("orders", None, orders(), None);
        check("orders:http", None, orders(), Some("http"));
        check(
            "orders.shop.svc.cluster.local:80",
            Some("shop"),
            orders(),
            Some("80"),
        );
        check("shop/orders", Some("shop"), orders(), None);
        check(
            "svc/orders:80",
            None,
            Name::Service("orders".to_owned()),
            Some("80"),
        );
        check(
            "deploy/orders",
            None,
            Name::Workload("deploy/orders".to_owned()),
            None,
        );
        let id = "spiffe://cluster.local/ns/shop/sa/orders";
        check(
            id,
            Some("shop"),
            Name::Workload("sa/orders".to_owned()),
            None,
        );
        assert!(Target::parse("spiffe://cluster.local").is_err());
    }
}
