//! `sidegate status`: which resources are accepted, and on how many sidecars they are live.
//!
//! Always true: what a condition says counts only for the generation that it is about; an answer
//! about an earlier one is no answer.

mod wait;

use std::io::{self, Write};
use std::time::Duration;

use anyhow::bail;
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use kube::Api;
use kube::api::DynamicObject;
use serde::{Deserialize, Serialize};
use sidegate_mesh::access_log::escape;
use sidegate_mesh::resource::{Kind, SYSTEM_NAMESPACE};

use crate::kube::{Cluster, ClusterArgs, Scope, is_missing};
use crate::output::{Format, print_table};

const EXAMPLES: &str = "\
RESOURCE is KIND/NAME (authorizationpolicy, trafficpolicy, staticservice, or sgap, sgtp, sgss), or
NAME alone, of any kind. A resource is live on a sidecar when that has put its present generation
to use; it need only be live where it selects.

With --wait it returns 0 when all that was asked for is accepted and live everywhere, and 1 when
the time is over, saying what is missing. Without --wait it returns 0.

Examples:
  sidegate status -n shop
  sidegate status -A -o json
  kubectl apply -f orders.yaml && sidegate status -n shop sgap/orders --wait --timeout 30s";

/// Which version of which resource is live on how many sidecars.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct StatusArgs {
    /// Only these; default: all.
    #[arg(value_name = "RESOURCE")]
    resources: Vec<Named>,
    /// Namespace; default: the context's.
    #[arg(short, long, value_name = "NS")]
    namespace: Option<String>,
    /// All namespaces.
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    all_namespaces: bool,
    /// Return when all is accepted and live everywhere.
    #[arg(long)]
    wait: bool,
    /// How long to wait.
    #[arg(long, value_name = "TIME", default_value = "60s", requires = "wait", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// How it is printed.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// A resource that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Named {
    kind: Option<Kind>,
    name: String,
}

impl std::str::FromStr for Named {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let Some((kind, name)) = text.split_once('/') else {
            return Ok(Self {
                kind: None,
                name: text.to_owned(),
            });
        };
        let word = kind.to_ascii_lowercase();
        let word = word.split('.').next().unwrap_or_default();
        let is = |kind: &Kind| {
            let resource = crate::kube::api_resource(*kind);
            let singular = kind.as_str().to_ascii_lowercase();
            word == singular || word == resource.plural || word == short_name(*kind)
        };
        let kind = Kind::ALL.into_iter().find(is);
        let kind = kind.ok_or_else(|| {
            format!("`{text}`: no kind of resource; write sgap/NAME, sgtp/NAME or sgss/NAME")
        })?;
        Ok(Self {
            kind: Some(kind),
            name: name.to_owned(),
        })
    }
}

fn short_name(kind: Kind) -> &'static str {
    match kind {
        Kind::AuthorizationPolicy => "sgap",
        Kind::StaticService => "sgss",
        Kind::TrafficPolicy => "sgtp",
    }
}

impl Named {
    fn is(&self, state: &State) -> bool {
        self.kind.is_none_or(|kind| kind == state.kind) && self.name == state.name
    }
}

impl std::fmt::Display for Named {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.kind {
            Some(kind) => write!(f, "{}/{}", short_name(kind), self.name),
            None => f.write_str(&self.name),
        }
    }
}

/// What the cluster says of one resource.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct State {
    kind: Kind,
    namespace: String,
    name: String,
    generation: i64,
    /// `True`, `False`, or `Unknown` when nothing is said of this generation.
    accepted: String,
    /// Whether it is live on each sidecar that it concerns.
    live: bool,
    /// Sidecars on which this generation is live; absent when nothing is said of this generation.
    #[serde(skip_serializing_if = "Option::is_none")]
    live_on: Option<u64>,
    /// Sidecars that it concerns.
    #[serde(skip_serializing_if = "Option::is_none")]
    of: Option<u64>,
    /// Sidecars that refuse this generation.
    #[serde(skip_serializing_if = "Option::is_none")]
    refused_by: Option<u64>,
    reason: String,
    message: String,
}

/// The part of `status` that is needed here.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Told {
    observed_generation: Option<i64>,
    sidecars: Counts,
    conditions: Vec<Condition>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Counts {
    selected: Option<u64>,
    live: Option<u64>,
    refused: Option<u64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Condition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
    #[serde(default)]
    reason: String,
    #[serde(default)]
    message: String,
    observed_generation: Option<i64>,
}

impl State {
    fn of(kind: Kind, object: &DynamicObject) -> Self {
        let metadata = &object.metadata;
        let generation = metadata.generation.unwrap_or_default();
        let told = object.data.get("status").cloned().unwrap_or_default();
        // A status that cannot be read says nothing.
        let told: Told = serde_json::from_value(told).unwrap_or_default();
        let is_now = |of: Option<i64>| of.or(told.observed_generation) == Some(generation);
        let condition = |kind: &str| {
            let mut conditions = told.conditions.iter();
            conditions.find(|one| one.kind == kind && is_now(one.observed_generation))
        };
        let (accepted, live) = (condition("Accepted"), condition("Live"));
        let counts = is_now(None).then_some(&told.sidecars);
        let holds = |one: &&Condition| one.status == "True";
        let fails = |one: &&Condition| !holds(one);
        // What is wrong, then what is strange, then what is right.
        let said = (accepted.filter(fails))
            .or_else(|| live.filter(fails))
            .or_else(|| accepted.filter(|one| !one.message.is_empty()))
            .or_else(|| live.filter(|one| one.reason == "NoSidecars"))
            .or(accepted)
            .or(live);
        let (live_on, of) = (
            counts.and_then(|counts| counts.live),
            counts.and_then(|counts| counts.selected),
        );
        Self {
            kind,
            namespace: metadata.namespace.clone().unwrap_or_default(),
            name: metadata.name.clone().unwrap_or_default(),
            generation,
            accepted: accepted.map_or_else(|| "Unknown".to_owned(), |one| one.status.clone()),
            live: live.is_some_and(|one| one.status == "True") && live_on == of,
            live_on,
            of,
            refused_by: counts.and_then(|counts| counts.refused),
            reason: said.map_or_else(|| "NotSeenYet".to_owned(), |one| one.reason.clone()),
            message: said.map(|one| one.message.clone()).unwrap_or_default(),
        }
    }

    /// Whether this generation is accepted, and live wherever it concerns a sidecar.
    fn is_settled(&self) -> bool {
        self.accepted == "True" && self.live
    }

    fn key(&self) -> (Kind, String, String) {
        (self.kind, self.namespace.clone(), self.name.clone())
    }

    /// `AuthorizationPolicy shop/orders generation 3: 2 of 3 live, …`.
    fn words(&self) -> String {
        let parts = [self.reason.as_str(), &self.message];
        let why: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        let words = format!(
            "{} {}/{} generation {}: accepted {}, live {}, {}",
            self.kind,
            self.namespace,
            self.name,
            self.generation,
            self.accepted,
            self.live_words(),
            why.join(": ")
        );
        escape(&words).into_owned()
    }

    fn live_words(&self) -> String {
        match (self.live_on, self.of) {
            (Some(live), Some(of)) => format!("{live} of {of}"),
            _ => "-".to_owned(),
        }
    }

    fn cells(&self) -> Vec<String> {
        let why = if self.message.is_empty() {
            self.reason.clone()
        } else {
            format!("{}: {}", self.reason, self.message)
        };
        let cells = [
            self.kind.to_string(),
            self.namespace.clone(),
            self.name.clone(),
            self.generation.to_string(),
            self.accepted.clone(),
            self.live_words(),
            why,
        ];
        cells.iter().map(|cell| escape(cell).into_owned()).collect()
    }
}

/// A part of the control plane.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Part {
    name: &'static str,
    /// Replicas that are ready; absent when it is not there.
    #[serde(skip_serializing_if = "Option::is_none")]
    ready: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replicas: Option<i32>,
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.ready, self.replicas) {
            (Some(ready), Some(replicas)) => write!(f, "{} {ready}/{replicas} ready", self.name),
            _ => write!(f, "{} not there", self.name),
        }
    }
}

/// What is printed.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    /// Absent when we may not look.
    #[serde(skip_serializing_if = "Option::is_none")]
    control_plane: Option<Vec<Part>>,
    resources: Vec<State>,
}

/// Prints what the cluster says of resources, or waits until it says that they are live.
///
/// # Errors
///
/// When the cluster cannot be asked, or nothing can be printed.
pub(crate) fn run(arguments: &StatusArgs) -> anyhow::Result<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let code = runtime.block_on(async {
        let cluster = Cluster::connect(&arguments.cluster).await?;
        show(
            arguments,
            &cluster,
            &mut io::stdout().lock(),
            &mut io::stderr(),
        )
        .await
    });
    runtime.shutdown_background();
    code
}

async fn show(
    arguments: &StatusArgs,
    cluster: &Cluster,
    out: &mut impl Write,
    notes: &mut impl Write,
) -> anyhow::Result<u8> {
    let scope = cluster.scope(arguments.namespace.as_deref(), arguments.all_namespaces);
    let control_plane = control_plane(cluster).await?;
    if !arguments.wait {
        let resources = list(cluster, &scope, &arguments.resources).await?;
        let missing = missing(&arguments.resources, &resources);
        if !missing.is_empty() {
            bail!("{} not there, in {scope}", missing.join(", "));
        }
        Report {
            control_plane,
            resources,
        }
        .print(arguments.output, out)?;
        return Ok(0);
    }
    let waited = wait::until_live(cluster, &scope, arguments, notes).await?;
    let (resources, unsettled) = match waited {
        wait::Waited::Live(resources) => (resources, Vec::new()),
        wait::Waited::TimedOut(resources, missing) => (resources, missing),
    };
    Report {
        control_plane,
        resources,
    }
    .print(arguments.output, out)?;
    for words in &unsettled {
        writeln!(notes, "sidegate: {words}")?;
    }
    Ok(u8::from(!unsettled.is_empty()))
}

impl Report {
    fn print(&self, format: Format, out: &mut impl Write) -> anyhow::Result<()> {
        if format != Format::Table {
            return format.print(out, self);
        }
        if let Some(parts) = &self.control_plane {
            let parts: Vec<_> = parts.iter().map(ToString::to_string).collect();
            writeln!(out, "Control plane: {}\n", parts.join(", "))?;
        }
        let header = [
            "KIND",
            "NAMESPACE",
            "NAME",
            "GENERATION",
            "ACCEPTED",
            "LIVE",
            "REASON",
        ];
        print_table(out, &header, self.resources.iter().map(State::cells))?;
        Ok(())
    }
}

async fn list(cluster: &Cluster, scope: &Scope, named: &[Named]) -> anyhow::Result<Vec<State>> {
    let mut states = Vec::new();
    for kind in Kind::ALL {
        let doing = format!("listing {}", crate::kube::api_resource(kind).plural);
        let api = cluster.resources(kind, scope);
        let each = |object| states.push(State::of(kind, &object));
        cluster.list(&api, &doing, each).await?;
    }
    states.retain(|state| named.is_empty() || named.iter().any(|named| named.is(state)));
    states.sort_by_key(|state| (state.namespace.clone(), state.kind, state.name.clone()));
    Ok(states)
}

/// What was named and is not there.
fn missing(named: &[Named], states: &[State]) -> Vec<String> {
    let missing = named
        .iter()
        .filter(|named| !states.iter().any(|state| named.is(state)));
    missing.map(ToString::to_string).collect()
}

/// `None` when we may not look into the control plane's namespace.
async fn control_plane(cluster: &Cluster) -> anyhow::Result<Option<Vec<Part>>> {
    let deployments = Api::<Deployment>::namespaced(cluster.client(), SYSTEM_NAMESPACE);
    let sets = Api::<StatefulSet>::namespaced(cluster.client(), SYSTEM_NAMESPACE);
    let ca = sets.get("sidegate-ca").await.map(|set| {
        let status = set.status.unwrap_or_default();
        (
            status.ready_replicas,
            set.spec.and_then(|spec| spec.replicas),
        )
    });
    let mut answers = vec![("ca", ca)];
    for (name, deployment) in [
        ("controller", "sidegate-controller"),
        ("injector", "sidegate-injector"),
    ] {
        let found = deployments.get(deployment).await.map(|deployment| {
            let status = deployment.status.unwrap_or_default();
            (
                status.ready_replicas,
                deployment.spec.and_then(|spec| spec.replicas),
            )
        });
        answers.push((name, found));
    }
    let mut parts = Vec::new();
    for (name, answer) in answers {
        match answer {
            Ok((ready, replicas)) => parts.push(Part {
                name,
                ready: Some(ready.unwrap_or(0)),
                replicas: Some(replicas.unwrap_or(1)),
            }),
            Err(error) if is_missing(&error) => parts.push(Part {
                name,
                ready: None,
                replicas: None,
            }),
            Err(kube::Error::Api(status)) if status.code == 403 => return Ok(None),
            Err(error) => return Err(cluster.explain(error, "asking for the control plane")),
        }
    }
    Ok(Some(parts))
}

#[cfg(test)]
mod tests;
