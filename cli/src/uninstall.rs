//! `sidegate uninstall`: what of Sidegate is in a cluster, in the order in which it must go.
//!
//! Webhooks first, so that no pod gets a sidecar that would find nobody; then the injector and the
//! controller, the CA, the resource definitions, and the rest. A controller that still ran when the
//! definitions go would see every policy vanish.
//!
//! Invariants: only what `sidegate install` makes is named, and only what is there; without
//! `--force` nothing is printed or deleted while meshed pods exist.

mod order;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod};
use kube::api::{DeleteParams, DynamicObject, ListParams, PropagationPolicy};
use kube::{Api, ResourceExt};
use serde_json::Value;
use tokio::time::Instant;

use self::order::{Reference, Step};
use crate::install::Output;
use crate::install::manifests::BUNDLE;
use crate::kube::sidecars::Sidecar;
use crate::kube::{Cluster, ClusterArgs, Scope, is_missing};

/// How often it is asked whether something is gone.
const POLL: Duration = Duration::from_millis(500);

/// Prints what of Sidegate is in the cluster, for `kubectl delete -f -`, in the order in which it
/// must go.
///
/// Refuses while meshed pods exist: their sidecars go on until their SVID expires, and then refuse
/// every call. Take the label off their namespaces and restart them first.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  sidegate uninstall | kubectl delete -f -
  sidegate uninstall --delete      # itself, each step when the one before is gone

Nothing is left behind but the label sidegate.dev/inject of your namespaces.")]
pub(crate) struct UninstallArgs {
    #[command(flatten)]
    cluster: ClusterArgs,
    /// Also while meshed pods exist; they go on until their SVID expires.
    #[arg(long)]
    force: bool,
    /// Delete it instead of printing it, each step when the one before is gone.
    #[arg(long, conflicts_with = "output")]
    delete: bool,
    /// Longest wait for one step of --delete.
    #[arg(long, value_name = "DURATION", default_value = "2m", requires = "delete",
          value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// How it is printed.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// Prints or deletes.
///
/// # Errors
///
/// While meshed pods exist without `--force`, when the cluster does not answer, or when something
/// does not go.
pub(crate) fn run(arguments: &UninstallArgs) -> anyhow::Result<u8> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(uninstall(arguments))?;
    Ok(0)
}

async fn uninstall(arguments: &UninstallArgs) -> anyhow::Result<()> {
    let cluster = Cluster::connect(&arguments.cluster).await?;
    let meshed = meshed_pods(&cluster).await?;
    if let Some(refusal) = refusal(&meshed) {
        if !arguments.force {
            bail!(refusal);
        }
        say(&format!(
            "{} meshed pods go on until their SVID expires",
            count(&meshed)
        ));
    }
    let steps = existing(&cluster).await?;
    if arguments.delete {
        for step in &steps {
            delete(&cluster, step, arguments.timeout).await?;
        }
        say("Sidegate is gone");
    } else {
        let references = steps.iter().flat_map(|step| &step.objects);
        let objects: Vec<Value> = references.map(Reference::to_manifest).collect();
        if !objects.is_empty() {
            arguments.output.print(&mut io::stdout().lock(), &objects)?;
        }
    }
    hint_at_labels(&cluster).await
}

/// Meshed pods that have not ended, by namespace.
async fn meshed_pods(cluster: &Cluster) -> anyhow::Result<BTreeMap<String, usize>> {
    let mut pods = BTreeMap::new();
    let api: Api<Pod> = cluster.api(&Scope::All);
    cluster
        .list(&api, "looking for meshed pods", |pod| {
            if let Some(sidecar) = Sidecar::of(&pod).filter(|sidecar| !sidecar.ended) {
                *pods.entry(sidecar.namespace).or_default() += 1;
            }
        })
        .await?;
    Ok(pods)
}

fn count(meshed: &BTreeMap<String, usize>) -> usize {
    meshed.values().sum()
}

/// Why not, while there are meshed pods.
fn refusal(meshed: &BTreeMap<String, usize>) -> Option<String> {
    if meshed.is_empty() {
        return None;
    }
    let namespaces = meshed.iter().map(|(name, pods)| format!("{name} ({pods})"));
    let namespaces: Vec<String> = namespaces.collect();
    Some(format!(
        "there are {} meshed pods, in {}: their calls go on until their SVID expires, and fail \
         then. Take the label off each namespace (`kubectl label namespace NAME \
         sidegate.dev/inject-`) and restart its workloads (`kubectl rollout restart deployment -n \
         NAME`) first, or say --force",
        count(meshed),
        namespaces.join(", ")
    ))
}

/// Every step, with what of it is in the cluster; steps with nothing are left out.
async fn existing(cluster: &Cluster) -> anyhow::Result<Vec<Step>> {
    let mut steps = order::steps(bundles(cluster).await?)?;
    for step in &mut steps {
        let mut there = Vec::new();
        for reference in std::mem::take(&mut step.objects) {
            if exists(cluster, &reference).await? {
                there.push(reference);
            }
        }
        step.objects = there;
    }
    steps.retain(|step| !step.objects.is_empty());
    Ok(steps)
}

/// The namespaces that have a bundle.
async fn bundles(cluster: &Cluster) -> anyhow::Result<Vec<String>> {
    let api: Api<ConfigMap> = cluster.api(&Scope::All);
    let parameters = ListParams::default().fields(&format!("metadata.name={BUNDLE}"));
    let doing = "looking for bundles";
    let found = api.list(&parameters).await;
    let found = found.map_err(|error| cluster.explain(error, doing))?;
    Ok(found
        .items
        .iter()
        .filter_map(ResourceExt::namespace)
        .collect())
}

fn api(cluster: &Cluster, reference: &Reference) -> Api<DynamicObject> {
    let resource = reference.resource();
    match &reference.namespace {
        Some(namespace) => Api::namespaced_with(cluster.client(), namespace, &resource),
        None => Api::all_with(cluster.client(), &resource),
    }
}

async fn exists(cluster: &Cluster, reference: &Reference) -> anyhow::Result<bool> {
    match api(cluster, reference).get_metadata(&reference.name).await {
        Ok(_) => Ok(true),
        Err(error) if is_missing(&error) => Ok(false),
        Err(error) => Err(cluster.explain(error, &format!("looking for {reference}"))),
    }
}

/// Deletes what a step names, and waits until it is gone, its pods included.
async fn delete(cluster: &Cluster, step: &Step, timeout: Duration) -> anyhow::Result<()> {
    say(&format!("deleting {}", step.title));
    let parameters = DeleteParams {
        // Gone means: what it owns is gone, too.
        propagation_policy: Some(PropagationPolicy::Foreground),
        ..DeleteParams::default()
    };
    for reference in &step.objects {
        match api(cluster, reference)
            .delete(&reference.name, &parameters)
            .await
        {
            Ok(_) => {}
            Err(error) if is_missing(&error) => {}
            Err(error) => return Err(cluster.explain(error, &format!("deleting {reference}"))),
        }
    }
    let deadline = Instant::now() + timeout;
    for reference in &step.objects {
        while exists(cluster, reference).await? {
            if Instant::now() >= deadline {
                bail!(
                    "{reference} is still there after {}; see `kubectl describe {reference}`, and \
                     run this again",
                    humantime::format_duration(timeout)
                );
            }
            tokio::time::sleep(POLL).await;
        }
    }
    Ok(())
}

/// The label is the user's own, so it is named and left.
async fn hint_at_labels(cluster: &Cluster) -> anyhow::Result<()> {
    let api: Api<Namespace> = Api::all(cluster.client());
    let parameters = ListParams::default().labels("sidegate.dev/inject");
    let labelled = api.list(&parameters).await;
    let labelled = labelled.context("looking for labelled namespaces")?;
    let names: Vec<String> = labelled.items.iter().map(ResourceExt::name_any).collect();
    if !names.is_empty() {
        say(&format!(
            "still labelled: {}; `kubectl label namespace {} sidegate.dev/inject-` takes it off",
            names.join(", "),
            names.join(" ")
        ));
    }
    Ok(())
}

fn say(line: &str) {
    // Progress; with standard error gone nobody waits for it.
    drop(writeln!(io::stderr(), "{line}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meshed_pods_refuse_with_what_becomes_of_them() {
        let meshed = BTreeMap::from([("jobs".to_owned(), 1), ("shop".to_owned(), 4)]);
        let refusal = refusal(&meshed).unwrap();
        for expected in [
            "5 meshed pods",
            "jobs (1), shop (4)",
            "until their SVID expires",
            "--force",
        ] {
            assert!(refusal.contains(expected), "{refusal}");
        }
        assert_eq!(super::refusal(&BTreeMap::new()), None);
    }
}
