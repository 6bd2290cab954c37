//! `sidegate authz test`: what the policies decide about one call, and why.
//!
//! Invariant: the decision is the sidecar's own: the same reading of files, the same compiler. A
//! resource that is refused counts as it does in a sidecar without an earlier version of it.

mod cluster;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use sidegate_mesh::explain::PolicyExplanation;
use sidegate_mesh::policy::Effect;
use sidegate_mesh::resource::Metadata;
use sidegate_mesh::store::ResourceStore;
use sidegate_mesh::{
    Ask, Authority, Caller, CanonicalPath, Enforcement, Explanation, HttpAsk, Policy, ResourceSet,
    Route, Routes, SpiffeId, TrustDomain, Verdict, Workload, WorkloadPort,
};

use crate::kube::{Cluster, ClusterArgs};
use crate::output::{Format, print_table};

/// Folders within folders that are read, as by a sidecar.
const DEPTH_MAX: usize = 8;

/// Authorization, tried without a call.
#[derive(Debug, clap::Args)]
pub(crate) struct AuthzArgs {
    #[command(subcommand)]
    command: AuthzCommand,
}

#[derive(Debug, clap::Subcommand)]
enum AuthzCommand {
    Test(TestArgs),
}

/// Decide one call and say why: each policy and rule that selects the workload, and the first
/// predicate that failed.
///
/// Exit codes: 0 the call is allowed, 1 it is denied, 2 wrong usage or configuration.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Without --dir and --resources a cluster is asked: for the pod that --to means, its labels and ports,
and for the policies of its namespace and of the mesh. --to is a service (orders, orders.shop,
orders.shop:80, svc/orders), a workload by any of its names (orders, shop/orders, deploy/orders,
pod/orders-0, sa/orders), or a SPIFFE ID.

Examples:
  sidegate authz test --from shop/web --to orders.shop --method GET --path /orders/7
  sidegate authz test -n shop --from jobs/batch --to deploy/ledger --tcp redis
  sidegate authz test --dir demo --from shop/web --to shop/orders --method GET --path /orders/7
  sidegate authz test --dir demo --from shop/web --to shop/inventory --grpc shop.v1.Inventory/Get
  sidegate authz test --resources policies --from jobs/batch --to shop/ledger --labels app=ledger --tcp 6379")]
#[command(group = clap::ArgGroup::new("call").required(true).args(["method", "grpc", "tcp"]))]
#[command(group(clap::ArgGroup::new("standalone").args(["dir", "resources"])
    .conflicts_with_all(["kubeconfig", "context", "namespace"])))]
struct TestArgs {
    /// A demo's folder (`sidegate demo --dir DIR`): its resources, labels and trust domain.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// A folder of resource files, or one file.
    #[arg(long, value_name = "FOLDER")]
    resources: Option<PathBuf>,
    /// Namespace of --to in a cluster, where that names none; default: the context's.
    #[arg(short, long, value_name = "NS")]
    namespace: Option<String>,
    /// The caller: a SPIFFE ID, `namespace/service-account`, or `unauthenticated`.
    #[arg(long, value_name = "ID")]
    from: String,
    /// The called workload: `namespace/service-account`; in a cluster also a service or workload.
    #[arg(long, value_name = "WORKLOAD")]
    to: String,
    /// The called workload's labels, which selectors compare; default: those of the live pod, or
    /// of the demo's sidecar.
    #[arg(long, value_name = "K=V", value_delimiter = ',')]
    labels: Vec<String>,
    /// The called workload's own ports; default: those of the live pod's containers, or of the
    /// services that run there.
    #[arg(long, value_name = "NAME=PORT", value_delimiter = ',')]
    ports: Vec<String>,
    /// The mesh's trust domain; default: the cluster's or the demo's, or `mesh.local`.
    #[arg(long, value_name = "DOMAIN")]
    trust_domain: Option<String>,
    /// An HTTP request's method.
    #[arg(long, requires = "path")]
    method: Option<String>,
    /// An HTTP request's path.
    #[arg(long, requires = "method")]
    path: Option<String>,
    /// The host that the request names; default: none.
    #[arg(long)]
    host: Option<String>,
    /// The protocol to upgrade to, `websocket`.
    #[arg(long, value_name = "PROTOCOL", requires = "method")]
    upgrade: Option<String>,
    /// A gRPC call.
    #[arg(long, value_name = "PKG.SVC/METHOD")]
    grpc: Option<String>,
    /// Opaque bytes to a port of the workload.
    #[arg(long, value_name = "PORT")]
    tcp: Option<String>,
    /// The workload's own port that is called, by number or name; default: its only one.
    #[arg(long, value_name = "PORT|NAME", conflicts_with = "tcp")]
    port: Option<String>,
    /// How the decision is printed.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// Runs `sidegate authz`: 0 allowed, 1 denied, 2 wrong usage or configuration.
///
/// # Errors
///
/// When the decision cannot be printed.
pub(crate) fn run(arguments: &AuthzArgs) -> anyhow::Result<u8> {
    let AuthzCommand::Test(arguments) = &arguments.command;
    let mut notes = io::stderr().lock();
    match decide(arguments, &mut notes) {
        Ok(report) => {
            report.print(arguments.output, &mut io::stdout().lock())?;
            Ok(u8::from(report.decision.verdict != Verdict::Allow))
        }
        // A usage error must not look like a denial, whose exit code is 1.
        Err(error) => {
            writeln!(notes, "sidegate: {error:#}")?;
            Ok(2)
        }
    }
}

/// A decision with the call that it is about.
#[derive(Debug, Serialize)]
struct Report {
    from: String,
    to: String,
    port: u16,
    call: String,
    #[serde(flatten)]
    decision: Explanation,
}

fn decide(arguments: &TestArgs, notes: &mut impl Write) -> anyhow::Result<Report> {
    let world = if arguments.dir.is_some() || arguments.resources.is_some() {
        World::read(arguments)?
    } else {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let cluster = Cluster::connect(&arguments.cluster).await?;
            cluster::read(arguments, &cluster).await
        })?
    };
    decide_in(&world, arguments, notes)
}

fn decide_in(
    world: &World,
    arguments: &TestArgs,
    notes: &mut impl Write,
) -> anyhow::Result<Report> {
    for problem in &world.problems {
        writeln!(notes, "{problem}")?;
    }
    let caller = world.caller(&arguments.from)?;
    let workload = world.workload(arguments)?;
    let call = Call::parse(arguments)?;
    let behind_service = world.called.as_ref().and_then(|called| called.port);
    let port = call.port(arguments, &workload, behind_service)?;
    let (policy, warnings) = Policy::compile(&world.set, &workload);
    for warning in &warnings {
        writeln!(notes, "{warning}")?;
    }
    let from = caller
        .as_ref()
        .map_or(Caller::Unauthenticated, Caller::Mesh);
    Ok(Report {
        from: caller
            .as_ref()
            .map_or_else(|| "unauthenticated".to_owned(), SpiffeId::to_string),
        to: workload.id.to_string(),
        port,
        call: call.to_string(),
        decision: policy.explain(from, port, &call.ask()),
    })
}

/// What is known of the mesh.
struct World {
    trust_domain: TrustDomain,
    set: ResourceSet,
    /// What is wrong with resources, and what else should be known.
    problems: Vec<String>,
    sidecars: Vec<DemoSidecar>,
    /// The live workload of a cluster.
    called: Option<Called>,
}

/// What a cluster says of the called workload.
struct Called {
    workload: Workload,
    /// The workload's port behind the service that was named.
    port: Option<u16>,
}

/// The part of `demo.json` that is needed here.
#[derive(Deserialize)]
struct Demo {
    trust_domain: String,
    resources: PathBuf,
    sidecars: Vec<DemoSidecar>,
}

#[derive(Deserialize)]
struct DemoSidecar {
    workload: String,
    labels: BTreeMap<String, String>,
    #[serde(default)]
    ports: Vec<WorkloadPort>,
}

impl World {
    fn read(arguments: &TestArgs) -> anyhow::Result<Self> {
        let demo = arguments.dir.as_deref().map(read_demo).transpose()?;
        let trust_domain = match (&arguments.trust_domain, &demo) {
            (Some(name), _) => name,
            (None, Some(demo)) => &demo.trust_domain,
            (None, None) => "mesh.local",
        };
        let trust_domain = trust_domain
            .parse()
            .with_context(|| format!("`{trust_domain}` is no trust domain"))?;
        let folder = match (&arguments.resources, &demo) {
            (Some(folder), _) => folder.clone(),
            (None, Some(demo)) => demo.resources.clone(),
            (None, None) => bail!("give --dir or --resources"),
        };
        let mut store = ResourceStore::new();
        let problems = store.replace_folder(&read_files(&folder)?);
        Ok(Self {
            trust_domain,
            set: store.resources().clone(),
            problems: problems.iter().map(ToString::to_string).collect(),
            sidecars: demo.map(|demo| demo.sidecars).unwrap_or_default(),
            called: None,
        })
    }

    /// `None` for a plaintext caller.
    fn caller(&self, text: &str) -> anyhow::Result<Option<SpiffeId>> {
        match text {
            "unauthenticated" => Ok(None),
            _ => self.id(text).map(Some),
        }
    }

    /// A SPIFFE ID, or `namespace/service-account` of our own trust domain.
    fn id(&self, text: &str) -> anyhow::Result<SpiffeId> {
        let help = || format!("`{text}` is no identity: write `shop/web` or a whole SPIFFE ID");
        if text.contains("://") {
            return text.parse().with_context(help);
        }
        let (namespace, account) = text.split_once('/').with_context(help)?;
        SpiffeId::for_workload(&self.trust_domain, namespace, account).with_context(help)
    }

    fn workload(&self, arguments: &TestArgs) -> anyhow::Result<Workload> {
        if let Some(called) = &self.called {
            let mut workload = called.workload.clone();
            if !arguments.labels.is_empty() {
                workload.labels = labels(&arguments.labels)?;
            }
            if !arguments.ports.is_empty() {
                workload.ports = ports(&arguments.ports)?;
            }
            return Ok(workload);
        }
        let id = self.id(&arguments.to)?;
        let Some((namespace, account)) = id.workload() else {
            bail!("`{id}` is no workload: write `namespace/service-account`");
        };
        let known = format!("{namespace}/{account}");
        let sidecar = self
            .sidecars
            .iter()
            .find(|sidecar| sidecar.workload == known);
        let labels = if arguments.labels.is_empty() {
            sidecar
                .map(|sidecar| sidecar.labels.clone())
                .unwrap_or_default()
        } else {
            labels(&arguments.labels)?
        };
        let mut workload = Workload {
            namespace: namespace.to_owned(),
            id: id.clone(),
            trust_domain: self.trust_domain.clone(),
            labels,
            ports: sidecar
                .map(|sidecar| sidecar.ports.clone())
                .unwrap_or_default(),
            enforcement: Enforcement::Enforce,
        };
        if !arguments.ports.is_empty() {
            workload.ports = ports(&arguments.ports)?;
        } else if workload.ports.is_empty() {
            workload.ports = self.ports_of(&workload);
        }
        Ok(workload)
    }

    /// The ports of the services that run where this identity answers.
    fn ports_of(&self, workload: &Workload) -> Vec<WorkloadPort> {
        let (routes, _) = Routes::compile(&self.set, workload);
        let mut ports: Vec<WorkloadPort> = Vec::new();
        for route in routes.all() {
            let runs_there = |id: &SpiffeId| *id == workload.id;
            if !route
                .endpoints
                .iter()
                .any(|endpoint| runs_there(&endpoint.identity))
            {
                continue;
            }
            let port = WorkloadPort {
                name: self.port_name(route),
                port: route.target_port,
            };
            if !ports.contains(&port) {
                ports.push(port);
            }
        }
        ports
    }

    /// The name of a service's port.
    fn port_name(&self, route: &Route) -> Option<String> {
        let of_route = |metadata: &Metadata| {
            metadata.namespace == route.name.namespace && metadata.name == route.name.name
        };
        let mut services = self.set.services.iter();
        let service = services.find(|service| of_route(&service.metadata))?;
        let mut ports = service.spec.ports.iter();
        ports.find(|port| port.port == route.port)?.name.clone()
    }
}

fn read_demo(dir: &Path) -> anyhow::Result<Demo> {
    let path = dir.join("demo.json");
    let text = std::fs::read_to_string(&path).with_context(|| {
        format!(
            "{} cannot be read: is a demo running there?",
            path.display()
        )
    })?;
    serde_json::from_str(&text).with_context(|| format!("{} is no demo's", path.display()))
}

/// The resource files of a folder, as a sidecar reads them; of a file, that one.
fn read_files(path: &Path) -> anyhow::Result<Vec<(String, String)>> {
    let mut files = Vec::new();
    if path.is_file() {
        files.push(read_file(path)?);
    } else {
        read_folder(path, 0, &mut files)?;
    }
    files.sort();
    Ok(files)
}

fn read_folder(
    folder: &Path,
    depth: usize,
    files: &mut Vec<(String, String)>,
) -> anyhow::Result<()> {
    let context = || format!("the folder {} cannot be read", folder.display());
    for entry in std::fs::read_dir(folder).with_context(context)? {
        let entry = entry.with_context(context)?;
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        if path.is_dir() && depth < DEPTH_MAX {
            read_folder(&path, depth + 1, files)?;
        } else if path.is_file() && sidegate_mesh::resource::is_resource_file(&path) {
            files.push(read_file(&path)?);
        }
    }
    Ok(())
}

fn read_file(path: &Path) -> anyhow::Result<(String, String)> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("{} cannot be read", path.display()))?;
    Ok((path.display().to_string(), text))
}

fn labels(texts: &[String]) -> anyhow::Result<BTreeMap<String, String>> {
    let pair = |text: &String| {
        let (key, value) = text.split_once('=')?;
        (!key.is_empty()).then(|| (key.to_owned(), value.to_owned()))
    };
    let help = |text: &String| format!("`{text}`: write it as in `--labels app=orders`");
    texts
        .iter()
        .map(|text| pair(text).with_context(|| help(text)))
        .collect()
}

/// `http=8080`, or `8080` for a port without a name.
fn ports(texts: &[String]) -> anyhow::Result<Vec<WorkloadPort>> {
    let port = |text: &String| {
        let (name, number) = match text.split_once('=') {
            Some((name, number)) => (Some(name.to_owned()), number),
            None => (None, text.as_str()),
        };
        let number: Option<u16> = number.parse().ok().filter(|port| *port > 0);
        let port =
            number.with_context(|| format!("`{text}`: write it as in `--ports http=8080`"))?;
        Ok(WorkloadPort { name, port })
    };
    texts.iter().map(port).collect()
}

/// The call that is tried.
enum Call {
    Request {
        method: String,
        path: CanonicalPath,
        authority: Option<Authority>,
        upgrade: Option<String>,
        grpc: bool,
    },
    Opaque,
}

impl Call {
    fn parse(arguments: &TestArgs) -> anyhow::Result<Self> {
        let (method, path, grpc) = match (&arguments.method, &arguments.path, &arguments.grpc) {
            (_, _, Some(name)) => ("POST", format!("/{}", name.trim_start_matches('/')), true),
            (Some(method), Some(path), _) => (method.as_str(), path.clone(), false),
            _ => return Ok(Self::Opaque),
        };
        // The query is no part of what is authorized.
        let path = path.split('?').next().unwrap_or_default();
        let path: CanonicalPath = path
            .parse()
            .with_context(|| format!("the path `{path}` is answered with 400"))?;
        if grpc && path.grpc().is_none() {
            bail!("`{path}` is no gRPC method: write it as in `--grpc shop.v1.Orders/Get`");
        }
        let authority = arguments.host.as_deref().map(str::parse).transpose();
        Ok(Self::Request {
            method: method.to_owned(),
            path,
            authority: authority.context("the host is answered with 400")?,
            upgrade: arguments.upgrade.clone(),
            grpc,
        })
    }

    fn ask(&self) -> Ask<'_> {
        match self {
            Self::Opaque => Ask::Opaque,
            Self::Request {
                method,
                path,
                authority,
                upgrade,
                grpc,
            } => Ask::Http(HttpAsk {
                method,
                path,
                authority: authority.as_ref(),
                upgrade: upgrade.as_deref(),
                grpc: *grpc,
            }),
        }
    }

    fn port(
        &self,
        arguments: &TestArgs,
        workload: &Workload,
        behind_service: Option<u16>,
    ) -> anyhow::Result<u16> {
        let named = |wanted: &str| {
            let mut ports = workload.ports.iter();
            ports
                .find(|port| port.name.as_deref() == Some(wanted))
                .map(|port| port.port)
        };
        if let Some(text) = arguments.port.as_ref().or(arguments.tcp.as_ref()) {
            let number = text.parse().ok().filter(|port| *port > 0);
            return number.or_else(|| named(text)).with_context(|| {
                format!(
                    "no port of {} is named `{text}`: name it with --ports {text}=PORT",
                    workload.id
                )
            });
        }
        if let Some(port) = behind_service {
            return Ok(port);
        }
        let usual = match self {
            Self::Request { grpc: true, .. } => named("grpc").or_else(|| named("http")),
            _ => named("http"),
        };
        match (workload.ports.as_slice(), usual) {
            ([only], _) => Ok(only.port),
            (_, Some(port)) => Ok(port),
            ([], None) => Ok(sidegate_mesh::host::DEFAULT_PORT),
            _ => bail!("{} has several ports: choose one with --port", workload.id),
        }
    }
}

impl std::fmt::Display for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Opaque => f.write_str("opaque tcp"),
            Self::Request {
                grpc: true, path, ..
            } => write!(f, "gRPC {path}"),
            Self::Request {
                method,
                path,
                authority,
                upgrade,
                ..
            } => {
                write!(f, "{method} {path}")?;
                if let Some(authority) = authority {
                    write!(f, " to {authority}")?;
                }
                upgrade
                    .iter()
                    .try_for_each(|token| write!(f, " upgrading to {token}"))
            }
        }
    }
}

impl Report {
    fn print(&self, format: Format, out: &mut impl Write) -> anyhow::Result<()> {
        if format != Format::Table {
            return format.print(out, self);
        }
        let decision = &self.decision;
        let verdict = match decision.verdict {
            Verdict::Allow => "allow",
            Verdict::Deny => "DENY",
            Verdict::WouldDeny => "would DENY",
        };
        write!(out, "{verdict}  {}", decision.reason)?;
        match (&decision.policy, &decision.rule) {
            (Some(policy), Some(rule)) => writeln!(out, " {policy}/{rule}")?,
            (Some(policy), None) => writeln!(out, " {policy}")?,
            (None, _) => writeln!(out)?,
        }
        writeln!(out, "  from  {}", self.from)?;
        writeln!(out, "  to    {} port {}", self.to, self.port)?;
        writeln!(out, "  call  {}", self.call)?;
        if let Some(audit) = &decision.audit {
            writeln!(out, "  audit {audit}")?;
        }
        if !decision.policies.is_empty() {
            writeln!(out)?;
            let rows = decision.policies.iter().flat_map(rows);
            print_table(out, &["POLICY", "ACTION", "RULE", "RESULT"], rows)?;
        }
        Ok(())
    }
}

fn rows(policy: &PolicyExplanation) -> impl Iterator<Item = Vec<String>> {
    let action = match policy.action {
        Effect::Allow => "Allow",
        Effect::Deny => "Deny",
    };
    let action = format!("{action}{}", if policy.audit { " (Audit)" } else { "" });
    policy.rules.iter().map(move |rule| {
        let result = rule.failed.clone().unwrap_or_else(|| "matched".to_owned());
        vec![
            policy.policy.to_string(),
            action.clone(),
            rule.rule.to_string(),
            result,
        ]
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::{Value, json};

    use super::*;
    use crate::kube::fake::{Fake, pod};

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        authz: AuthzArgs,
    }

    const RESOURCES: &str = "
apiVersion: sidegate.dev/v1alpha1
kind: AuthorizationPolicy
metadata: { name: orders, namespace: shop }
spec:
  selector: { matchLabels: { app: orders } }
  ports: [http]
  action: Allow
  rules:
    - name: readers
      from: [{ workload: { serviceAccount: web } }]
      to:
        - http: { methods: [GET, HEAD], paths: ['/orders/*'] }
        - grpc: { service: shop.v1.Orders, methods: [Get] }
---
apiVersion: sidegate.dev/v1alpha1
kind: StaticService
metadata: { name: orders, namespace: shop }
spec:
  ports: [{ name: http, port: 80, targetPort: 8080 }, { name: redis, port: 6379, protocol: tcp }]
  endpoints: [{ address: '127.0.0.1:21006', identity: { workload: { serviceAccount: orders } } }]
";

    /// Runs `sidegate authz test` with these words; gives the exit code, the data and the notes.
    fn run(words: &str) -> (u8, String, String) {
        let folder = tempfile::tempdir().unwrap();
        let resources = folder.path().join("resources");
        std::fs::create_dir(&resources).unwrap();
        std::fs::write(resources.join("all.yaml"), RESOURCES).unwrap();
        std::fs::write(resources.join("notes.txt"), "not a resource").unwrap();
        let demo = serde_json::json!({
            "trust_domain": "demo.local",
            "resources": resources,
            "sidecars": [{"workload": "shop/orders", "labels": {"app": "orders"}, "id": "x"}],
        });
        std::fs::write(folder.path().join("demo.json"), demo.to_string()).unwrap();
        let dir = folder.path().display().to_string();
        let words = words.replace("DIR", &dir);
        let cli =
            Cli::try_parse_from(["authz", "test"].into_iter().chain(words.split(' '))).unwrap();
        let AuthzCommand::Test(arguments) = &cli.authz.command;
        let mut notes = Vec::new();
        let decided = decide(arguments, &mut notes);
        told(arguments, decided, notes)
    }

    /// The exit code, the data and the notes.
    fn told(
        arguments: &TestArgs,
        decided: anyhow::Result<Report>,
        mut notes: Vec<u8>,
    ) -> (u8, String, String) {
        let mut out = Vec::new();
        let code = match decided {
            Ok(report) => {
                report.print(arguments.output, &mut out).unwrap();
                u8::from(report.decision.verdict != Verdict::Allow)
            }
            Err(error) => {
                writeln!(notes, "{error:#}").unwrap();
                2
            }
        };
        let [out, notes] = [out, notes].map(|bytes| String::from_utf8(bytes).unwrap());
        (code, out, notes)
    }

    const DEMO: &str = "--dir DIR --from shop/web --to shop/orders";

    #[test]
    fn an_allowed_call_names_its_rule_and_exits_with_0() {
        let (code, out, _) = run(&format!("{DEMO} --method GET --path /orders/7?x=1"));
        assert_eq!(code, 0, "{out}");
        assert_eq!(
            out,
            "allow  allowed by rule shop/orders/readers
  from  spiffe://demo.local/ns/shop/sa/web
  to    spiffe://demo.local/ns/shop/sa/orders port 8080
  call  GET /orders/7

POLICY       ACTION  RULE     RESULT
shop/orders  Allow   readers  matched
"
        );
        let (code, ..) = run(&format!("{DEMO} --grpc shop.v1.Orders/Get"));
        assert_eq!(code, 0);
    }

    #[test]
    fn a_denied_call_says_why_and_exits_with_1() {
        let (code, out, _) = run(&format!("{DEMO} --method POST --path /orders/7"));
        assert_eq!(code, 1);
        assert!(out.starts_with("DENY  no rule admits\n"), "{out}");
        assert!(
            out.contains("to[0]: method POST is not in [GET, HEAD]"),
            "{out}"
        );
        let (code, out, _) = run(&format!("{DEMO} --tcp 6379"));
        assert_eq!(code, 1);
        assert!(out.contains("port 6379 is not in [8080]"), "{out}");
        let (code, out, _) =
            run("--dir DIR --from unauthenticated --to shop/orders --method GET --path /orders/7");
        assert_eq!(code, 1);
        assert!(out.contains("caller is unauthenticated"), "{out}");
    }

    #[test]
    fn labels_and_ports_are_given_where_no_demo_knows_them() {
        let call = "--from shop/web --to shop/orders --method GET --path /orders/7";
        let (code, out, _) = run(&format!("--resources DIR/resources {call}"));
        assert_eq!(code, 1, "{out}");
        assert!(out.contains("no policy selects the workload"), "{out}");
        let (code, out, _) = run(&format!(
            "--resources DIR/resources/all.yaml {call} --labels app=orders"
        ));
        assert_eq!(code, 0, "{out}");
        let (code, out, notes) = run(&format!(
            "--resources DIR/resources {call} --labels app=orders --ports web=1"
        ));
        assert_eq!(code, 1, "{out}");
        assert!(
            notes.contains("is named `http`, so this Allow gives nothing"),
            "{notes}"
        );
    }

    #[test]
    fn the_decision_is_data_too() {
        let (code, out, _) = run(&format!("{DEMO} --method POST --path /x -o json"));
        let data: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(code, 1);
        assert_eq!(data["verdict"], "deny");
        assert_eq!(data["policies"][0]["rules"][0]["matched"], false);
        assert_eq!(data["port"], 8080);
        let (_, yaml, _) = run(&format!("{DEMO} --method POST --path /x -o yaml"));
        let same: Value = serde_saphyr::from_str(&yaml).unwrap();
        assert_eq!(same, data);
    }

    #[test]
    fn what_cannot_be_a_call_is_wrong_usage() {
        for (words, says) in [
            ("--method GET --path /a/../b", "is answered with 400"),
            ("--method GET --path /x --host a@b", "is answered with 400"),
            ("--method GET --path /x --port nope", "--ports nope=PORT"),
            ("--method GET --path /x --labels app", "--labels app=orders"),
            ("--grpc nothing", "is no gRPC method"),
        ] {
            let (code, out, notes) = run(&format!("{DEMO} {words}"));
            assert_eq!((code, out.as_str()), (2, ""), "{words}");
            assert!(notes.contains(says), "{words}: {notes}");
        }
        let (code, _, notes) = run("--dir DIR/none --from shop/web --to shop/orders --tcp 1");
        assert_eq!(code, 2);
        assert!(notes.contains("is a demo running there?"), "{notes}");
        let words = [
            "authz", "test", "--dir", "x", "--from", "a/b", "--to", "a/b",
        ];
        assert!(Cli::try_parse_from(words).is_err(), "no call");
    }

    async fn cluster() -> Fake {
        let fake = Fake::start().await;
        let namespace = |name: &str, audit: bool| {
            json!({ "metadata": {
                "name": name,
                "labels": { "team": name },
                "annotations": if audit { json!({ "sidegate.dev/enforcement": "audit" }) } else { json!({}) },
            } })
        };
        fake.put("namespaces", namespace("shop", false));
        fake.put("namespaces", namespace("jobs", true));
        for (of, name) in [("shop", "orders-0"), ("jobs", "orders-1")] {
            let mut pod = pod(of, name, "orders");
            let config = r#"{"workload":{"trustDomain":"demo.local"},"ports":[]}"#;
            pod["spec"]["initContainers"][0]["env"] =
                json!([{ "name": "SIDEGATE_CONFIG", "value": config }]);
            pod["spec"]["containers"][0]["ports"] = json!([
                { "name": "http", "containerPort": 8080 }, { "name": "redis", "containerPort": 6379 },
                { "name": "dns", "containerPort": 53, "protocol": "UDP" },
            ]);
            fake.put("pods", pod);
        }
        let service = json!({
            "metadata": { "namespace": "shop", "name": "orders" },
            "spec": {
                "selector": { "app": "orders" },
                "ports": [{ "name": "web", "port": 80, "targetPort": "http" }, { "name": "redis", "port": 6379 }],
            },
        });
        fake.put("services", service);
        let policy = RESOURCES.split("---").next().unwrap();
        let mut policy: Value = serde_saphyr::from_str(policy).unwrap();
        policy["metadata"]["uid"] = "u".into();
        policy["metadata"]["managedFields"] = json!([{}]);
        policy["status"] = json!({ "live": "1 of 1" });
        fake.put("authorizationpolicies", policy);
        fake
    }

    async fn ask(fake: &Fake, words: &str) -> (u8, String, String) {
        let words = ["authz", "test"].into_iter().chain(words.split(' '));
        let AuthzCommand::Test(arguments) = Cli::try_parse_from(words).unwrap().authz.command;
        let mut notes = Vec::new();
        let decided = match cluster::read(&arguments, &fake.cluster()).await {
            Ok(world) => decide_in(&world, &arguments, &mut notes),
            Err(error) => Err(error),
        };
        told(&arguments, decided, notes)
    }

    const GET: &str = "--from shop/web --method GET --path /orders/7";

    #[tokio::test]
    async fn a_cluster_knows_the_called_pod_and_its_policies() {
        let fake = cluster().await;
        for to in [
            "orders:80",
            "orders.shop:web",
            "shop/orders",
            "svc/orders",
            "pod/orders-0",
            "spiffe://demo.local/ns/shop/sa/orders",
        ] {
            let (code, out, notes) = ask(&fake, &format!("{GET} --to {to}")).await;
            assert_eq!(code, 0, "{to}: {out}{notes}");
            assert!(
                out.contains("from  spiffe://demo.local/ns/shop/sa/web"),
                "{out}"
            );
            assert!(
                out.contains("to    spiffe://demo.local/ns/shop/sa/orders port 8080"),
                "{out}"
            );
            assert_eq!(notes, "pod shop/orders-0\n");
        }
        let (code, out, _) = ask(&fake, "--from shop/web --to orders --tcp redis").await;
        assert_eq!(code, 1);
        assert!(out.contains("port 6379 is not in [8080]"), "{out}");
        let (code, out, _) = ask(&fake, &format!("{GET} --to orders --labels app=other")).await;
        assert_eq!(code, 1);
        assert!(out.contains("no policy selects the workload"), "{out}");
    }

    #[tokio::test]
    async fn a_namespace_in_audit_would_deny() {
        let fake = cluster().await;
        let (code, out, _) = ask(&fake, &format!("{GET} -n jobs --to orders")).await;
        assert_eq!(code, 1);
        assert!(
            out.starts_with("would DENY  no policy selects the workload"),
            "{out}"
        );
    }

    #[tokio::test]
    async fn mesh_wide_and_broken_policies_count_as_in_a_sidecar() {
        let fake = cluster().await;
        let deny = |name: &str, spec: Value| {
            json!({
                "apiVersion": "sidegate.dev/v1alpha1", "kind": "AuthorizationPolicy",
                "metadata": { "namespace": "sidegate-system", "name": name }, "spec": spec,
            })
        };
        let spec = |team: &str| {
            json!({
                "selector": {}, "namespaceSelector": { "matchLabels": { "team": team } }, "action": "Deny",
                "rules": [{ "name": "all", "from": [{ "anyone": {} }], "to": [{ "http": { "methods": ["*"], "paths": ["/**"] } }] }],
            })
        };
        fake.put("authorizationpolicies", deny("spares-us", spec("jobs")));
        let asked = format!("{GET} --to orders");
        assert_eq!(ask(&fake, &asked).await.0, 0);
        fake.put("authorizationpolicies", deny("meant", spec("shop")));
        let (code, out, _) = ask(&fake, &asked).await;
        assert_eq!(code, 1);
        assert!(out.contains("sidegate-system/meant"), "{out}");
        fake.remove("authorizationpolicies", "sidegate-system", "meant");
        let mut broken = spec("shop");
        broken["acton"] = "Deny".into();
        fake.put("authorizationpolicies", deny("broken", broken));
        let (code, _, notes) = ask(&fake, &asked).await;
        assert_eq!(code, 1, "{notes}");
        assert!(
            notes.contains("AuthorizationPolicy sidegate-system/broken: spec.acton: "),
            "{notes}"
        );
    }

    #[tokio::test]
    async fn whom_a_cluster_does_not_know_is_wrong_usage() {
        let fake = cluster().await;
        let mut plain = pod("shop", "plain", "plain");
        plain["metadata"]["annotations"] = json!({});
        fake.put("pods", plain);
        let service = json!({
            "metadata": { "namespace": "shop", "name": "plain" },
            "spec": { "selector": { "app": "plain" }, "ports": [{ "port": 80 }] },
        });
        fake.put("services", service);
        for (to, says) in [
            ("plain", "no pod of shop/plain has a sidecar"),
            ("nobody", "no pod answers to `nobody` in the namespace shop"),
            ("svc/nobody", "no service shop/nobody"),
            (
                "orders:81",
                "the service orders has no port `81`, only: 80, 6379",
            ),
            ("orders", "has several ports"),
        ] {
            let call = if to == "orders" {
                "--from shop/web --method GET --path /orders/7 --ports a=1,b=2"
            } else {
                GET
            };
            let (code, out, notes) = ask(&fake, &format!("{call} --to {to}")).await;
            assert_eq!((code, out.as_str()), (2, ""), "{to}");
            assert!(notes.contains(says), "{to}: {notes}");
        }
    }
}
