//! `sidegate inject`: the injected manifest, offline.
//!
//! Invariants: a pod becomes what the webhook would make of it, by the same code; a document that
//! holds no workload comes out byte for byte as it went in; when one workload is refused, nothing
//! is printed, so that half a manifest is never applied.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use serde_json::Value;
use sidegate_injector::{
    NamespaceFacts, Outcome, Settings, Workload, annotations, inject_with, system_random,
    templates, uninject,
};
use sidegate_mesh::{TrustDomain, yaml};

#[cfg(test)]
mod tests;

/// Exit code: something was refused.
const FAILED: u8 = 1;
/// Exit code: what was named cannot be read.
const WRONG_USAGE: u8 = 2;

/// Largest manifest, in bytes.
const MANIFEST_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Prints a manifest with sidecars in its workloads, as the webhook would put them in.
///
/// Nothing is asked of a cluster. Namespaces that the manifest makes are taken as it makes them.
/// Injecting what was injected changes nothing.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  sidegate inject -f web.yaml | kubectl apply -f -
  sidegate inject -f web.yaml --namespace-annotation sidegate.dev/skip-inbound-ports=9100
  kubectl get deploy web -o yaml | sidegate inject -f - --uninject | kubectl apply -f -")]
pub(crate) struct InjectArgs {
    /// Manifest; `-` is standard input. May be repeated.
    #[arg(short, long, required = true, value_name = "FILE")]
    filename: Vec<PathBuf>,
    /// Take sidecars out again, and give probes back.
    #[arg(long)]
    uninject: bool,
    /// Namespace of what names none.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// A label of the namespaces. May be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    namespace_label: Vec<(String, String)>,
    /// An annotation of the namespaces. May be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    namespace_annotation: Vec<(String, String)>,
    /// What pods are injected with: the `injection` part of the injector's configuration.
    #[arg(long, value_name = "FILE")]
    settings: Option<PathBuf>,
    /// Trust domain of the mesh.
    #[arg(long, value_name = "NAME")]
    trust_domain: Option<TrustDomain>,
    /// Where the images come from; they are REGISTRY/proxy and REGISTRY/init.
    #[arg(long, value_name = "REGISTRY")]
    image_registry: Option<String>,
    /// Tag of the images; default: this version.
    #[arg(long, value_name = "TAG")]
    image_tag: Option<String>,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE")?;
    if key.is_empty() {
        return Err("the key is empty".to_owned());
    }
    Ok((key.to_owned(), value.to_owned()))
}

/// Prints the manifests. Returns the exit code: 0 when all is well, 1 when a workload is refused, 2
/// when something that was named cannot be read.
///
/// # Errors
///
/// When the manifests cannot be printed.
pub(crate) fn run(arguments: &InjectArgs) -> anyhow::Result<u8> {
    let change = match arguments.change() {
        Ok(change) => change,
        Err(error) => {
            writeln!(io::stderr(), "sidegate: {error:#}")?;
            return Ok(WRONG_USAGE);
        }
    };
    let mut printed = String::new();
    let mut notes = Notes::default();
    for path in &arguments.filename {
        let name = path.display().to_string();
        let text = match read(path) {
            Ok(text) => text,
            Err(error) => {
                writeln!(io::stderr(), "sidegate: {name}: {error:#}")?;
                return Ok(WRONG_USAGE);
            }
        };
        let changed = change.apply(&name, &text, &mut notes);
        if !printed.is_empty() && !changed.starts_with("---") {
            printed.push_str("---\n");
        }
        printed.push_str(&changed);
        if !printed.is_empty() && !printed.ends_with('\n') {
            printed.push('\n');
        }
    }
    for note in &notes.said {
        writeln!(io::stderr(), "{note}")?;
    }
    for fault in &notes.faults {
        writeln!(io::stderr(), "sidegate: {fault}")?;
    }
    if !notes.faults.is_empty() {
        return Ok(FAILED);
    }
    io::stdout().write_all(printed.as_bytes())?;
    Ok(0)
}

fn read(path: &Path) -> anyhow::Result<String> {
    let mut text = String::new();
    let read = if path == Path::new("-") {
        let mut stdin = io::stdin().lock().take(MANIFEST_BYTES_MAX + 1);
        stdin.read_to_string(&mut text)
    } else {
        let file = std::fs::File::open(path)?;
        file.take(MANIFEST_BYTES_MAX + 1).read_to_string(&mut text)
    };
    let bytes = read? as u64;
    anyhow::ensure!(
        bytes <= MANIFEST_BYTES_MAX,
        "it has more than {MANIFEST_BYTES_MAX} bytes"
    );
    Ok(text)
}

impl InjectArgs {
    fn change(&self) -> anyhow::Result<Change<'_>> {
        let mut settings = match &self.settings {
            None => Settings::default(),
            Some(path) => {
                let name = path.display().to_string();
                let text = std::fs::read_to_string(path).context(name.clone())?;
                serde_saphyr::from_str(&text)
                    .map_err(|error| anyhow::anyhow!(yaml::syntax_error(&name, &error)))?
            }
        };
        if let Some(trust_domain) = &self.trust_domain {
            settings.trust_domain = trust_domain.clone();
        }
        if let Some(registry) = &self.image_registry {
            settings.images.registry.clone_from(registry);
        }
        if let Some(tag) = &self.image_tag {
            settings.images.tag.clone_from(tag);
        }
        settings.check()?;
        Ok(Change {
            uninject: self.uninject,
            namespace: &self.namespace,
            labels: &self.namespace_label,
            annotations: &self.namespace_annotation,
            settings,
            random: &system_random,
        })
    }
}

/// What happened, for people.
#[derive(Debug, Default)]
struct Notes {
    said: Vec<String>,
    faults: Vec<String>,
}

/// What is done to each workload.
struct Change<'a> {
    uninject: bool,
    namespace: &'a str,
    labels: &'a [(String, String)],
    annotations: &'a [(String, String)],
    settings: Settings,
    random: &'a dyn Fn() -> Option<[u8; 32]>,
}

impl Change<'_> {
    /// A manifest, changed.
    fn apply(&self, file: &str, text: &str, notes: &mut Notes) -> String {
        let documents: Vec<_> = documents(text)
            .map(|(line, part)| (line, part, parse(file, line, part)))
            .collect();
        let namespaces = namespaces_in(
            documents
                .iter()
                .filter_map(|(_, _, value)| value.as_ref().ok()),
        );
        let mut changed = String::with_capacity(text.len());
        for (line, part, value) in documents {
            match value {
                Err(fault) => notes.faults.push(fault),
                Ok(before) => {
                    let mut after = before.clone();
                    let place = format!("{file}:{line}");
                    self.apply_to(&mut after, &place, &namespaces, notes);
                    if after == before {
                        changed.push_str(part);
                    } else {
                        changed.push_str(&print(part, &after, notes));
                    }
                }
            }
        }
        changed
    }

    fn apply_to(
        &self,
        document: &mut Value,
        place: &str,
        namespaces: &BTreeMap<String, NamespaceFacts>,
        notes: &mut Notes,
    ) {
        let mut visit = |workload: &Workload, template: &mut Value| {
            let namespace = workload.namespace.as_deref().unwrap_or(self.namespace);
            let name = format!("{} {namespace}/{}", workload.kind, workload.name);
            let facts = self.facts(namespace, namespaces);
            let outcome = if self.uninject {
                uninject(template)
            } else {
                inject_with(template, &facts, &self.settings, self.random)
            };
            match outcome {
                Err(refusal) => notes.faults.push(format!("{place}: {name}: {refusal}")),
                Ok(outcome) => {
                    let (patch, what) = match outcome {
                        Outcome::Unchanged => (None, "unchanged".to_owned()),
                        Outcome::Skipped { reason, patch } => {
                            (Some(patch), format!("not injected: {reason}"))
                        }
                        Outcome::Patched(patch) if self.uninject => {
                            (Some(patch), "sidecar taken out".to_owned())
                        }
                        Outcome::Patched(patch) => (Some(patch), "injected".to_owned()),
                    };
                    notes.said.push(format!("{name}: {what}"));
                    let patched = patch.map(|patch| json_patch::patch(template, &patch));
                    if let Some(Err(error)) = patched {
                        notes.faults.push(format!("{place}: {name}: {error}"));
                    }
                }
            }
            Ok::<_, std::convert::Infallible>(())
        };
        let Ok(()) = templates(document, &mut visit);
    }

    /// What the namespace says. Whoever injects by hand has asked for it, so it is labelled.
    fn facts(
        &self,
        namespace: &str,
        namespaces: &BTreeMap<String, NamespaceFacts>,
    ) -> NamespaceFacts {
        let mut facts = namespaces.get(namespace).cloned().unwrap_or_default();
        namespace.clone_into(&mut facts.name);
        facts.labels.extend(self.labels.iter().cloned());
        facts.annotations.extend(self.annotations.iter().cloned());
        let label = (annotations::INJECT.to_owned(), "enabled".to_owned());
        facts.labels.extend([label]);
        facts
    }
}

/// Cuts a manifest at its `---` lines, each part with the number of its first line. A part keeps
/// its own `---`, and the comments and directives before it.
fn documents(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut rest = text;
    let mut line = 1;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (mut end, mut has_content) = (0, false);
        for each in rest.split_inclusive('\n') {
            if has_content && is_marker(each) {
                break;
            }
            has_content |= is_content(each);
            end += each.len();
        }
        let (part, after) = rest.split_at_checked(end)?;
        rest = after;
        let first = line;
        line += part.matches('\n').count();
        Some((first, part))
    })
}

fn is_marker(line: &str) -> bool {
    let rest = line.strip_prefix("---");
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
}

/// Whether a line is more than a comment or a directive before a document.
fn is_content(line: &str) -> bool {
    let line = line.trim();
    !(line.is_empty() || line.starts_with('#') || line.starts_with('%'))
}

/// Reads a document as kubectl does: YAML 1.1, in which `yes` is true and `0644` is octal.
fn parse(file: &str, first_line: usize, part: &str) -> Result<Value, String> {
    let options = serde_saphyr::options! { legacy_octal_numbers: true };
    serde_saphyr::from_str_with_options(part, options).map_err(|error| {
        let text = yaml::syntax_error("", &error);
        let mut parts = text.trim_start_matches(':').splitn(3, ':');
        let (line, column) = (parts.next().unwrap_or("1"), parts.next().unwrap_or("1"));
        let line = line.parse().unwrap_or(1) + first_line - 1;
        format!(
            "{file}:{line}:{column}:{}",
            parts.next().unwrap_or_default()
        )
    })
}

/// The namespaces that the documents make.
fn namespaces_in<'v>(
    documents: impl Iterator<Item = &'v Value>,
) -> BTreeMap<String, NamespaceFacts> {
    let mut namespaces = BTreeMap::new();
    for document in documents {
        let items = document.get("items").and_then(Value::as_array);
        let all = items.into_iter().flatten().chain([document]);
        for object in
            all.filter(|object| object.get("kind").and_then(Value::as_str) == Some("Namespace"))
        {
            let texts = |field: &str| {
                let map = object
                    .pointer(&format!("/metadata/{field}"))
                    .and_then(Value::as_object);
                let text = |(key, value): (&String, &Value)| {
                    Some((key.clone(), value.as_str()?.to_owned()))
                };
                map.into_iter().flatten().filter_map(text).collect()
            };
            let name = object
                .pointer("/metadata/name")
                .and_then(Value::as_str)
                .unwrap_or_default();
            let facts = NamespaceFacts {
                name: name.to_owned(),
                labels: texts("labels"),
                annotations: texts("annotations"),
            };
            namespaces.insert(name.to_owned(), facts);
        }
    }
    namespaces
}

/// A changed document: JSON where it was JSON, else YAML.
fn print(before: &str, after: &Value, notes: &mut Notes) -> String {
    let separator = match before.split_inclusive('\n').find(|line| is_marker(line)) {
        Some(_) => "---\n",
        None => "",
    };
    let is_json = before.trim_start().starts_with('{');
    let printed = if is_json {
        serde_json::to_string_pretty(after).map_err(anyhow::Error::new)
    } else {
        serde_saphyr::to_string(after).map_err(anyhow::Error::new)
    };
    match printed {
        Ok(mut text) => {
            if !text.ends_with('\n') {
                text.push('\n');
            }
            format!("{separator}{text}")
        }
        Err(error) => {
            notes.faults.push(format!("cannot print: {error:#}"));
            String::new()
        }
    }
}
