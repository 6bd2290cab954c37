//! `sidegate check`: what is wrong with a cluster, an installation or a namespace.
//!
//! Invariants: it changes nothing; whatever is not well has a remedy; what may not be seen is said
//! to be unseen, never taken for well. The checks themselves are pure and read [`Facts`].

mod cluster;
mod control_plane;
mod fetch;
mod finding;
mod injected;
mod namespace;
mod outside;
mod policies;

use std::io::{self, IsTerminal, Write};

use clap::Args;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingAdmissionPolicyBinding, ValidatingWebhookConfiguration,
};
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Pod, Service};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1::APIService;
use kube::api::DynamicObject;
use serde_json::Value;

use self::finding::{Finding, Level};
use self::injected::Certificate;
use crate::kube::{Cluster, ClusterArgs};
use crate::output::Format;

/// Exit code: nothing is wrong.
const DONE: u8 = 0;
/// Exit code: something is.
const FAILED: u8 = 1;

/// Checks a cluster before installation, the installation, or a namespace.
///
/// One line a check: ✔ well, ‼ look at it, ✘ wrong; exit code 1 when anything is wrong.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  sidegate check --pre       # can Sidegate be installed here?
  sidegate check             # does it work?
  sidegate check -n shop     # are the pods of a namespace in the mesh, and its policies live?")]
pub(crate) struct CheckArgs {
    /// Before installation: what the cluster must have, and what you must be allowed to do.
    #[arg(long, conflicts_with = "namespace")]
    pre: bool,
    /// A namespace of the mesh.
    #[arg(short, long, value_name = "NAMESPACE")]
    namespace: Option<String>,
    #[command(flatten)]
    cluster: ClusterArgs,
    /// How it is printed.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// Everything that is looked at, as it was fetched.
#[derive(Clone, Debug, Default)]
struct Facts {
    /// `v1.34.4`, as the API server says it.
    version: String,
    /// Groups and versions that are served: `admissionregistration.k8s.io/v1`.
    served: Vec<String>,
    /// What installing needs and the user may not.
    denied: Vec<String>,
    nodes: Vec<Node>,
    /// The nodes' leases, which carry the time of both clocks.
    leases: Vec<Lease>,
    namespaces: Vec<Namespace>,
    /// Of every namespace.
    pods: Vec<Pod>,
    services: Vec<Service>,
    /// `cilium-config` of kube-system.
    cilium: Option<ConfigMap>,
    definitions: Vec<CustomResourceDefinition>,
    /// Of the control plane.
    deployments: Vec<Deployment>,
    /// Of the control plane.
    stateful_sets: Vec<StatefulSet>,
    mutating: Vec<MutatingWebhookConfiguration>,
    validating: Vec<ValidatingWebhookConfiguration>,
    api_services: Vec<APIService>,
    bundle_bindings: Vec<ValidatingAdmissionPolicyBinding>,
    bundles: Vec<ConfigMap>,
    /// Our resources, with their kinds.
    resources: Vec<(sidegate_mesh::resource::Kind, DynamicObject)>,
    /// What makes pods in the namespace that is checked.
    workloads: Vec<Value>,
    /// What each running sidecar of that namespace says of its certificate.
    certificates: Vec<Certificate>,
    /// The time, in seconds since 1970.
    now: i64,
    /// What could not be seen.
    unseen: Vec<Finding>,
}

/// Prints what was found.
///
/// # Errors
///
/// When the cluster does not answer, or nothing can be printed.
pub(crate) fn run(arguments: &CheckArgs) -> anyhow::Result<u8> {
    let findings = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(check(arguments))?;
    let mut out = io::stdout().lock();
    match arguments.output {
        Format::Table => {
            let coloured = out.is_terminal() && std::env::var_os("NO_COLOR").is_none();
            out.write_all(finding::to_text(&findings, coloured).as_bytes())?;
        }
        other => other.print(&mut out, &findings)?,
    }
    let wrong = findings.iter().any(|it| it.level == Level::Wrong);
    Ok(if wrong { FAILED } else { DONE })
}

async fn check(arguments: &CheckArgs) -> anyhow::Result<Vec<Finding>> {
    let cluster = Cluster::connect(&arguments.cluster).await?;
    let mut facts = fetch::cluster(&cluster).await?;
    let mut findings = Vec::new();
    if arguments.pre {
        fetch::permissions(&cluster, &mut facts).await?;
        findings.extend(cluster::before(&facts));
    } else if let Some(name) = &arguments.namespace {
        fetch::installation(&cluster, &mut facts).await?;
        fetch::namespace(&cluster, name, &mut facts).await?;
        findings.extend(namespace::check(&facts, name));
        findings.extend(policies::check(&facts, Some(name)));
        findings.extend(outside::check(&facts, Some(name)));
    } else {
        fetch::installation(&cluster, &mut facts).await?;
        findings.extend(cluster::after(&facts));
        findings.extend(control_plane::check(&facts));
        findings.extend(namespace::overview(&facts));
        findings.extend(policies::check(&facts, None));
        findings.extend(outside::check(&facts, None));
    }
    findings.append(&mut facts.unseen);
    Ok(findings)
}
