//! Asks a cluster for everything that is checked.
//!
//! Invariant: what may not be seen is a finding, not an error; what cannot be asked at all is an
//! error.

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::admissionregistration::v1::ValidatingAdmissionPolicyBinding;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, StatefulSet};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{DynamicObject, ListParams, PostParams};
use kube::{Api, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use sidegate_local::SystemClock;
use sidegate_mesh::Clock;
use sidegate_mesh::resource::{Kind, SYSTEM_NAMESPACE};

use super::Facts;
use super::finding::Finding;
use super::injected::{Certificate, Certs, Injected};
use crate::install::manifests::{self, BUNDLE};
use crate::kube::sidecars::Sidecar;
use crate::kube::{Cluster, Scope, is_missing, is_refused};

/// Where kubelets keep their leases.
const NODE_LEASES: &str = "kube-node-lease";

/// What every kind of check looks at.
pub(super) async fn cluster(cluster: &Cluster) -> anyhow::Result<Facts> {
    let client = cluster.client();
    let doing = "asking the cluster";
    let explain = |error| cluster.explain(error, doing);
    let version = client.apiserver_version().await.map_err(explain)?;
    let groups = client.list_api_groups().await.map_err(explain)?;
    let versions = groups.groups.into_iter().flat_map(|group| group.versions);
    let mut facts = Facts {
        version: version.git_version,
        served: versions.map(|version| version.group_version).collect(),
        now: SystemClock
            .now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| {
                i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
            }),
        ..Facts::default()
    };
    let nodes = list(cluster, &Api::all(cluster.client()), "nodes", &mut facts).await?;
    facts.nodes = nodes;
    let leases: Api<Lease> = Api::namespaced(cluster.client(), NODE_LEASES);
    facts.leases = list(cluster, &leases, "the nodes' leases", &mut facts).await?;
    let namespaces = Api::all(cluster.client());
    facts.namespaces = list(cluster, &namespaces, "namespaces", &mut facts).await?;
    let configs: Api<ConfigMap> = Api::namespaced(cluster.client(), "kube-system");
    facts.cilium = match configs.get_opt("cilium-config").await {
        Ok(config) => config,
        Err(error) if is_refused(&error) => None,
        Err(error) => return Err(cluster.explain(error, "looking for Cilium")),
    };
    Ok(facts)
}

/// The installation, and what it stands among.
pub(super) async fn installation(cluster: &Cluster, facts: &mut Facts) -> anyhow::Result<()> {
    let all = || cluster.client();
    facts.pods = list(cluster, &cluster.api(&Scope::All), "pods", facts).await?;
    facts.services = list(cluster, &cluster.api(&Scope::All), "services", facts).await?;
    let own = Scope::Namespace(SYSTEM_NAMESPACE.to_owned());
    facts.deployments = list(cluster, &cluster.api(&own), "deployments", facts).await?;
    facts.stateful_sets = list(cluster, &cluster.api(&own), "stateful sets", facts).await?;
    facts.definitions = list(cluster, &Api::all(all()), "resource definitions", facts).await?;
    facts.mutating = list(cluster, &Api::all(all()), "mutating webhooks", facts).await?;
    facts.validating = list(cluster, &Api::all(all()), "validating webhooks", facts).await?;
    facts.api_services = list(cluster, &Api::all(all()), "aggregated APIs", facts).await?;
    let bindings: Api<ValidatingAdmissionPolicyBinding> = Api::all(all());
    let bindings = list(cluster, &bindings, "admission policies", facts).await?;
    facts.bundle_bindings = bindings
        .into_iter()
        .filter(|binding| {
            let policy = binding
                .spec
                .as_ref()
                .and_then(|spec| spec.policy_name.as_deref());
            policy == Some(BUNDLE)
        })
        .collect();
    facts.bundles = bundles(cluster, facts).await?;
    for kind in Kind::ALL {
        let api = cluster.resources(kind, &Scope::All);
        let found = match api.list(&ListParams::default().limit(1)).await {
            // Without definitions there are no resources; the check of those says it.
            Err(error) if is_missing(&error) => Vec::new(),
            _ => list(cluster, &api, "Sidegate's resources", facts).await?,
        };
        facts.resources.extend(
            found
                .into_iter()
                .map(|object: DynamicObject| (kind, object)),
        );
    }
    Ok(())
}

async fn bundles(cluster: &Cluster, facts: &mut Facts) -> anyhow::Result<Vec<ConfigMap>> {
    let api: Api<ConfigMap> = cluster.api(&Scope::All);
    let named = ListParams::default().fields(&format!("metadata.name={BUNDLE}"));
    match api.list(&named).await {
        Ok(found) => Ok(found.items),
        Err(error) if is_refused(&error) => {
            facts.unseen.push(unseen("config maps"));
            Ok(Vec::new())
        }
        Err(error) => Err(cluster.explain(error, "looking for bundles")),
    }
}

/// What one namespace has besides.
pub(super) async fn namespace(
    cluster: &Cluster,
    name: &str,
    facts: &mut Facts,
) -> anyhow::Result<()> {
    let scope = Scope::Namespace(name.to_owned());
    workloads::<Deployment>(cluster, &scope, facts).await?;
    workloads::<StatefulSet>(cluster, &scope, facts).await?;
    workloads::<DaemonSet>(cluster, &scope, facts).await?;
    workloads::<Job>(cluster, &scope, facts).await?;
    workloads::<CronJob>(cluster, &scope, facts).await?;
    let injected = facts.pods.iter().filter_map(Injected::of);
    let sidecars: Vec<Sidecar> = injected
        .map(|pod| pod.sidecar)
        .filter(|sidecar| sidecar.namespace == name && sidecar.running && !sidecar.terminating)
        .collect();
    let answers: Vec<anyhow::Result<Certs>> = cluster.ask_all(&sidecars, "/certs").await;
    let certificate = |(sidecar, answer): (Sidecar, anyhow::Result<Certs>)| Certificate {
        pod: sidecar.pod,
        answer: answer.map_err(|error| format!("{error:#}")),
    };
    facts.certificates = sidecars.into_iter().zip(answers).map(certificate).collect();
    Ok(())
}

/// What makes pods, as it is written; what another workload made is that one's own.
async fn workloads<K>(cluster: &Cluster, scope: &Scope, facts: &mut Facts) -> anyhow::Result<()>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    K: Clone + DeserializeOwned + Serialize + std::fmt::Debug,
{
    let found: Vec<K> = list(cluster, &cluster.api(scope), "workloads", facts).await?;
    for workload in found.iter().filter(|it| it.owner_references().is_empty()) {
        let value: Value = serde_json::to_value(workload)?;
        facts.workloads.push(value);
    }
    Ok(())
}

/// What installing needs and the user may not.
pub(super) async fn permissions(cluster: &Cluster, facts: &mut Facts) -> anyhow::Result<()> {
    let api: Api<SelfSubjectAccessReview> = Api::all(cluster.client());
    for (group, resource, namespaced) in wanted()? {
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(ResourceAttributes {
                    group: Some(group),
                    resource: Some(resource.clone()),
                    verb: Some("create".to_owned()),
                    namespace: namespaced.then(|| SYSTEM_NAMESPACE.to_owned()),
                    ..ResourceAttributes::default()
                }),
                ..SelfSubjectAccessReviewSpec::default()
            },
            ..SelfSubjectAccessReview::default()
        };
        let answer = api.create(&PostParams::default(), &review).await;
        let answer = answer.map_err(|error| cluster.explain(error, "asking what you may do"))?;
        if !answer.status.is_some_and(|status| status.allowed) {
            facts.denied.push(format!("create {resource}"));
        }
    }
    Ok(())
}

/// Each type that is installed: group, plural, and whether it is in a namespace.
fn wanted() -> anyhow::Result<Vec<(String, String, bool)>> {
    let mut wanted: Vec<(String, String, bool)> = manifests::everything()?
        .iter()
        .map(|object| {
            let resource = manifests::resource_of(object);
            let namespaced = object.pointer("/metadata/namespace").is_some();
            (resource.group, resource.plural, namespaced)
        })
        .collect();
    wanted.sort();
    wanted.dedup();
    Ok(wanted)
}

async fn list<K>(
    cluster: &Cluster,
    api: &Api<K>,
    what: &'static str,
    facts: &mut Facts,
) -> anyhow::Result<Vec<K>>
where
    K: Clone + DeserializeOwned + std::fmt::Debug,
{
    let mut found = Vec::new();
    // The first page alone shows whether it may be seen, in kube's own words.
    match api.list(&ListParams::default().limit(1)).await {
        Err(error) if is_refused(&error) => {
            facts.unseen.push(unseen(what));
            return Ok(found);
        }
        _ => {
            let doing = format!("listing {what}");
            cluster
                .list(api, &doing, |object| found.push(object))
                .await?;
        }
    }
    Ok(found)
}

fn unseen(what: &'static str) -> Finding {
    Finding::look(
        "sight",
        format!("you may not see {what}, so what depends on them was not checked"),
        "ask whoever runs the cluster to let you list them",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_that_is_installed_is_asked_for() {
        let wanted = wanted().unwrap();
        let has = |group: &str, plural: &str, namespaced: bool| {
            wanted.contains(&(group.to_owned(), plural.to_owned(), namespaced))
        };
        assert!(has("", "namespaces", false));
        assert!(has("apps", "statefulsets", true));
        assert!(has("networking.k8s.io", "networkpolicies", true));
        assert!(has("rbac.authorization.k8s.io", "clusterroles", false));
        assert!(has("policy", "poddisruptionbudgets", true));
        assert_eq!(wanted.len(), 17, "{wanted:?}");
    }
}
