//! `sidegate install`: everything that a cluster needs, as manifests.
//!
//! Invariants: nothing is asked of a cluster, and the same flags give the same bytes, so that the
//! output can be kept, compared and applied again. What is refused is refused before anything is
//! printed. `deploy/kubernetes` is this output with no flags.

pub(crate) mod manifests;
mod plan;
mod set;

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use sidegate_injector::PullPolicy;
use sidegate_mesh::TrustDomain;

use self::manifests::{Section, sections};
use self::plan::{Plan, Storage};

/// Exit code: wrong usage.
const WRONG_USAGE: u8 = 2;

/// Replicas of each part of the control plane with `--ha`.
const HA_REPLICAS: u32 = 2;

/// Prints the manifests of Sidegate for `kubectl apply -f -`.
///
/// It asks no cluster; `sidegate check --pre` says whether yours will do. Applying the same output
/// again changes nothing; that of a newer version is an upgrade.
#[derive(Args, Debug, Default)]
#[command(after_help = "\
Examples:
  sidegate install | kubectl apply -f -
  sidegate install --ha --ca-storage-class standard | kubectl apply -f -
  sidegate install --set proxy.memoryLimit=512Mi --set ca.leafLifetime=12h | kubectl diff -f -

`sidegate check` says when it is ready.")]
#[command(after_long_help = set::long_help())]
pub(crate) struct InstallArgs {
    /// Two replicas of each part, spread over nodes, with disruption budgets.
    #[arg(long)]
    ha: bool,
    /// Trust domain: the first part of every identity. It can't be changed later.
    #[arg(long, value_name = "NAME")]
    trust_domain: Option<TrustDomain>,
    /// Where the images come from; they are REGISTRY/proxy, REGISTRY/ca …
    #[arg(long, value_name = "REGISTRY")]
    image_registry: Option<String>,
    /// Tag of the images; default: this version.
    #[arg(long, value_name = "TAG")]
    image_tag: Option<String>,
    /// When nodes fetch images.
    #[arg(long, value_name = "POLICY", value_enum)]
    image_pull_policy: Option<Pull>,
    /// Keep the CA's log of certificates in volumes of this storage class; else it ends with its
    /// pod. Keys are in a Secret either way.
    #[arg(long, value_name = "NAME")]
    ca_storage_class: Option<String>,
    /// Tunes one thing; see --help for what there is. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Write a kustomize base into this folder instead of printing.
    #[arg(long, value_name = "DIR", conflicts_with = "output")]
    base: Option<PathBuf>,
    /// How it is printed.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Pull {
    #[value(name = "IfNotPresent")]
    IfNotPresent,
    #[value(name = "Always")]
    Always,
    #[value(name = "Never")]
    Never,
}

/// How manifests are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// YAML documents.
    #[default]
    Yaml,
    /// One JSON List.
    Json,
}

impl Output {
    /// Prints objects in their order.
    ///
    /// # Errors
    ///
    /// When they cannot be written.
    pub(crate) fn print(self, out: &mut impl Write, objects: &[Value]) -> anyhow::Result<()> {
        match self {
            Self::Yaml => out.write_all(to_yaml(objects)?.as_bytes())?,
            Self::Json => {
                let list = json!({ "apiVersion": "v1", "kind": "List", "items": objects });
                writeln!(out, "{}", serde_json::to_string_pretty(&list)?)?;
            }
        }
        Ok(())
    }
}

/// YAML documents, one an object.
fn to_yaml(objects: &[Value]) -> anyhow::Result<String> {
    let mut text = String::new();
    for object in objects {
        text.push_str("---\n");
        text.push_str(&serde_saphyr::to_string(object)?);
    }
    Ok(text)
}

/// Prints the manifests.
///
/// # Errors
///
/// When they cannot be written.
pub(crate) fn run(arguments: &InstallArgs) -> anyhow::Result<u8> {
    let plan = match arguments.plan() {
        Ok(plan) => plan,
        Err(wrong) => {
            // With standard error gone, the exit code still says it.
            drop(writeln!(io::stderr(), "sidegate: {wrong}"));
            return Ok(WRONG_USAGE);
        }
    };
    let sections = sections(&plan)?;
    if let Some(folder) = &arguments.base {
        write_base(folder, &sections)?;
        return Ok(0);
    }
    let objects = sections.into_iter().flat_map(|section| section.objects);
    let objects: Vec<Value> = objects.collect();
    arguments.output.print(&mut io::stdout().lock(), &objects)?;
    Ok(0)
}

/// The files of a kustomize base.
fn base(sections: &[Section]) -> anyhow::Result<Vec<(&'static str, String)>> {
    let mut kustomization =
        "# What `sidegate install` prints, for overlays; written by `sidegate install --base DIR`.\n\
         apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources:\n"
            .to_owned();
    let mut files = Vec::new();
    for section in sections {
        kustomization.push_str("  - ");
        kustomization.push_str(section.file);
        kustomization.push('\n');
        files.push((section.file, to_yaml(&section.objects)?));
    }
    files.push(("kustomization.yaml", kustomization));
    Ok(files)
}

fn write_base(folder: &Path, sections: &[Section]) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot make the folder {}", folder.display()))?;
    for (file, text) in base(sections)? {
        let path = folder.join(file);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

impl InstallArgs {
    fn plan(&self) -> Result<Plan, String> {
        let mut plan = Plan::default();
        if self.ha {
            plan.set_replicas(HA_REPLICAS);
        }
        if let Some(trust_domain) = &self.trust_domain {
            plan.injection.trust_domain = trust_domain.clone();
        }
        let images = &mut plan.injection.images;
        if let Some(registry) = &self.image_registry {
            registry
                .trim_end_matches('/')
                .clone_into(&mut images.registry);
        }
        if let Some(tag) = &self.image_tag {
            images.tag.clone_from(tag);
        }
        if let Some(pull) = self.image_pull_policy {
            images.pull_policy = match pull {
                Pull::IfNotPresent => PullPolicy::IfNotPresent,
                Pull::Always => PullPolicy::Always,
                Pull::Never => PullPolicy::Never,
            };
        }
        plan.ca_storage = self.ca_storage_class.as_deref().map(Storage::of_class);
        for assignment in &self.set {
            set::apply(assignment, &mut plan)?;
        }
        plan.check()?;
        Ok(plan)
    }
}

#[cfg(test)]
mod tests;
