//! Sidecars: which pods have one, and which of them a name means.
//!
//! Always true: a pod counts only when the injector marked it and its sidecar is a native one, so
//! that a container that merely bears the name shows nothing.

use std::collections::BTreeMap;

use anyhow::bail;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

use super::{Cluster, Scope};
use crate::plugin::Called;

/// The sidecar's container.
pub(crate) const CONTAINER: &str = "sidegate-proxy";

/// The annotation by which the injector marks what it did, with its version.
pub(crate) const INJECTED: &str = "sidegate.dev/injected";

/// A pod's sidecar.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a fact that the cluster says"
)]
pub(crate) struct Sidecar {
    pub(crate) namespace: String,
    pub(crate) pod: String,
    pub(crate) uid: String,
    pub(crate) service_account: String,
    pub(crate) labels: BTreeMap<String, String>,
    /// The injector's version.
    pub(crate) version: String,
    /// What made the pod, nearest first: kind and name.
    pub(crate) owners: Vec<(Owner, String)>,
    /// How often the sidecar was started again.
    pub(crate) restarts: i32,
    /// Whether its container runs now.
    pub(crate) running: bool,
    /// Whether the pod is ready.
    pub(crate) ready: bool,
    /// Whether the pod is being deleted.
    pub(crate) terminating: bool,
    /// Whether the pod has ended for good.
    pub(crate) ended: bool,
}

impl Sidecar {
    /// The sidecar of a pod, if it has one.
    pub(crate) fn of(pod: &Pod) -> Option<Self> {
        let metadata = &pod.metadata;
        let version = metadata.annotations.as_ref()?.get(INJECTED)?.clone();
        let spec = pod.spec.as_ref()?;
        let mut containers = spec.init_containers.iter().flatten();
        containers.find(|container| {
            container.name == CONTAINER && container.restart_policy.as_deref() == Some("Always")
        })?;
        let container = status(pod);
        let phase = pod
            .status
            .as_ref()
            .and_then(|status| status.phase.as_deref());
        Some(Self {
            namespace: metadata.namespace.clone()?,
            pod: metadata.name.clone()?,
            uid: metadata.uid.clone()?,
            service_account: spec
                .service_account_name
                .clone()
                .unwrap_or_else(|| "default".to_owned()),
            labels: metadata.labels.clone().unwrap_or_default(),
            version,
            owners: owners(pod),
            restarts: container.map_or(0, |status| status.restart_count),
            running: container.is_some_and(is_running),
            ready: is_ready(pod),
            terminating: metadata.deletion_timestamp.is_some(),
            ended: matches!(phase, Some("Succeeded" | "Failed")),
        })
    }

    /// `namespace/service-account`, as identities have it.
    pub(crate) fn workload(&self) -> String {
        format!("{}/{}", self.namespace, self.service_account)
    }

    /// `namespace/pod`.
    pub(crate) fn name(&self) -> String {
        format!("{}/{}", self.namespace, self.pod)
    }
}

fn status(pod: &Pod) -> Option<&ContainerStatus> {
    let statuses = pod.status.as_ref()?.init_container_statuses.as_ref()?;
    statuses.iter().find(|status| status.name == CONTAINER)
}

fn is_running(status: &ContainerStatus) -> bool {
    let state = status.state.as_ref();
    state.is_some_and(|state| state.running.is_some())
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_ref());
    let mut conditions = conditions.into_iter().flatten();
    conditions.any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// A kind of workload that makes pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    Deployment,
    ReplicaSet,
    StatefulSet,
    DaemonSet,
    Job,
    CronJob,
    ReplicationController,
}

/// What made a pod, read from the pod alone: a `ReplicaSet`'s name ends with the hash that its
/// Deployment gave it, a Job's with the minute for which its `CronJob` made it.
fn owners(pod: &Pod) -> Vec<(Owner, String)> {
    let references = pod.metadata.owner_references.as_ref();
    let mut references = references.into_iter().flatten();
    let Some(owner) = references.find(|owner| owner.controller == Some(true)) else {
        return Vec::new();
    };
    let hash = pod
        .metadata
        .labels
        .as_ref()
        .and_then(|labels| labels.get("pod-template-hash"));
    let Some(kind) = owner_kind(owner) else {
        return Vec::new();
    };
    let mut owners = vec![(kind, owner.name.clone())];
    let above = match (kind, hash) {
        (Owner::ReplicaSet, Some(hash)) => {
            let name = owner.name.strip_suffix(hash.as_str());
            name.and_then(|name| name.strip_suffix('-'))
                .map(|name| (Owner::Deployment, name))
        }
        (Owner::Job, _) => {
            let split = owner.name.rsplit_once('-');
            let minute =
                |text: &str| text.len() >= 8 && text.bytes().all(|byte| byte.is_ascii_digit());
            split
                .filter(|(_, end)| minute(end))
                .map(|(name, _)| (Owner::CronJob, name))
        }
        _ => None,
    };
    owners.extend(above.map(|(kind, name)| (kind, name.to_owned())));
    owners
}

fn owner_kind(owner: &OwnerReference) -> Option<Owner> {
    Some(match owner.kind.as_str() {
        "ReplicaSet" => Owner::ReplicaSet,
        "StatefulSet" => Owner::StatefulSet,
        "DaemonSet" => Owner::DaemonSet,
        "Job" => Owner::Job,
        "ReplicationController" => Owner::ReplicationController,
        _ => return None,
    })
}

/// Which sidecars are meant, within the namespaces that are looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    kind: Option<WantedKind>,
    /// Every sidecar when absent.
    name: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WantedKind {
    Pod,
    ServiceAccount,
    Owner(Owner),
}

impl WantedKind {
    /// A kind by its name, its plural or its short name, as kubectl takes them.
    fn parse(text: &str) -> Option<Self> {
        Some(match text.to_ascii_lowercase().as_str() {
            "pod" | "pods" | "po" => Self::Pod,
            "serviceaccount" | "serviceaccounts" | "sa" => Self::ServiceAccount,
            "deployment" | "deployments" | "deploy" => Self::Owner(Owner::Deployment),
            "replicaset" | "replicasets" | "rs" => Self::Owner(Owner::ReplicaSet),
            "statefulset" | "statefulsets" | "sts" => Self::Owner(Owner::StatefulSet),
            "daemonset" | "daemonsets" | "ds" => Self::Owner(Owner::DaemonSet),
            "job" | "jobs" => Self::Owner(Owner::Job),
            "cronjob" | "cronjobs" | "cj" => Self::Owner(Owner::CronJob),
            "replicationcontroller" | "replicationcontrollers" | "rc" => {
                Self::Owner(Owner::ReplicationController)
            }
            _ => return None,
        })
    }
}

/// Whether a word is that of a kind in `KIND/NAME`.
pub(crate) fn is_kind(word: &str) -> bool {
    WantedKind::parse(word).is_some()
}

impl Wanted {
    /// Reads WORKLOAD: `NAME`, `KIND/NAME` as kubectl has it, or `NAMESPACE/NAME`; gives the
    /// namespace that it names, too.
    pub(crate) fn parse(workload: Option<&str>) -> (Self, Option<String>) {
        let Some(text) = workload else {
            return (Self::default(), None);
        };
        let named = |kind, name: &str| Self {
            kind,
            name: Some(name.to_owned()),
        };
        match text.split_once('/') {
            None => (named(None, text), None),
            Some((before, name)) => match WantedKind::parse(before) {
                Some(kind) => (named(Some(kind), name), None),
                None => (named(None, name), Some(before.to_owned())),
            },
        }
    }

    /// Whether every sidecar is meant.
    pub(crate) fn is_all(&self) -> bool {
        self.name.is_none()
    }

    /// Whether this sidecar is meant.
    pub(crate) fn is(&self, sidecar: &Sidecar) -> bool {
        let Some(name) = &self.name else {
            return true;
        };
        let owned = |kind: Option<Owner>| {
            let mut owners = sidecar.owners.iter();
            owners.any(|(of, owner)| kind.is_none_or(|kind| kind == *of) && owner == name)
        };
        match self.kind {
            Some(WantedKind::Pod) => sidecar.pod == *name,
            Some(WantedKind::ServiceAccount) => sidecar.service_account == *name,
            Some(WantedKind::Owner(kind)) => owned(Some(kind)),
            None => sidecar.pod == *name || sidecar.service_account == *name || owned(None),
        }
    }
}

/// A selection of a command: the sidecars of WORKLOAD, in `-n NS`, in the context's namespace, or
/// with `-A` everywhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Selection {
    pub(crate) scope: Scope,
    pub(crate) wanted: Wanted,
}

impl Selection {
    /// # Errors
    ///
    /// When WORKLOAD names a namespace and `-n` another.
    pub(crate) fn new(
        cluster: &Cluster,
        workload: Option<&str>,
        namespace: Option<&str>,
        all: bool,
    ) -> anyhow::Result<Self> {
        let (wanted, of) = Wanted::parse(workload);
        if let (Some(of), Some(namespace)) = (of.as_deref(), namespace)
            && of != namespace
        {
            bail!("WORKLOAD names the namespace {of}, and --namespace another");
        }
        let scope = match of {
            Some(of) => Scope::Namespace(of),
            None => cluster.scope(namespace, all),
        };
        Ok(Self { scope, wanted })
    }

    /// What was meant, in words.
    pub(crate) fn words(&self) -> String {
        match &self.wanted.name {
            Some(name) => format!("`{name}` in {}", self.scope),
            None => self.scope.to_string(),
        }
    }
}

impl Cluster {
    /// The sidecars that are meant, by namespace and pod.
    ///
    /// # Errors
    ///
    /// When pods cannot be listed.
    pub(crate) async fn sidecars(&self, selection: &Selection) -> anyhow::Result<Vec<Sidecar>> {
        let api = self.api::<Pod>(&selection.scope);
        let mut sidecars = Vec::new();
        self.list(&api, "listing pods", |pod: Pod| {
            sidecars.extend(Sidecar::of(&pod).filter(|sidecar| selection.wanted.is(sidecar)));
        })
        .await?;
        sidecars
            .sort_by(|one, other| (&one.namespace, &one.pod).cmp(&(&other.namespace, &other.pod)));
        Ok(sidecars)
    }

    /// The same, and an error when there is none.
    ///
    /// # Errors
    ///
    /// When pods cannot be listed, or none is meant.
    pub(crate) async fn some_sidecars(
        &self,
        selection: &Selection,
    ) -> anyhow::Result<Vec<Sidecar>> {
        let sidecars = self.sidecars(selection).await?;
        if sidecars.is_empty() {
            bail!(
                "no sidecar of {}: is the namespace labelled `sidegate.dev/inject: enabled`, and \
                 were its pods restarted since? `{} check` says more",
                selection.words(),
                Called::now().command()
            );
        }
        Ok(sidecars)
    }
}
