//! `sidegate certs`: identities, issuers, time left and renewals, as the sidecars say them.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::SystemTime;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use sidegate_examples::client;
use sidegate_local::SystemClock;
use sidegate_mesh::Clock;
use sidegate_mesh::access_log::escape;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::kube::sidecars::Selection;
use crate::kube::{Cluster, ClusterArgs};
use crate::output::{Format, print_table};

/// How much of an issuer's key ID tells it from others in a table.
const KEY_ID_CHARS: usize = 8;

/// Identities, issuers, time left, renewals.
#[derive(clap::Args)]
#[command(after_help = "\
Without --dir and --admin, the sidecars of a cluster are asked through port-forwards: those of the
context's namespace, of -n NS, or with -A of all; WORKLOAD is meant as by `sidegate logs`.

Examples:
  sidegate certs -A
  sidegate certs deploy/orders -n shop --pem
  sidegate certs shop/web --dir /tmp/mesh")]
#[command(group(clap::ArgGroup::new("standalone").args(["dir", "admin"])
    .conflicts_with_all(["kubeconfig", "context", "all_namespaces", "namespace"])))]
pub(crate) struct CertsArgs {
    /// Only this workload, by any of its names; from a folder, namespace/service-account, or just
    /// its service account.
    workload: Option<String>,
    /// Namespace whose sidecars are asked; default: the context's.
    #[arg(short, long, value_name = "NS")]
    namespace: Option<String>,
    /// The sidecars of all namespaces.
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    all_namespaces: bool,
    /// Folder of a running `sidegate demo --dir DIR`.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Administration address of one sidecar, instead of a folder.
    #[arg(long, value_name = "ADDRESS")]
    admin: Option<SocketAddr>,
    /// Print the certificate chains as PEM, leaf first.
    #[arg(long)]
    pem: bool,
    /// How they are printed.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// The part of `demo.json` that is needed here.
#[derive(Deserialize)]
struct Demo {
    sidecars: Vec<DemoSidecar>,
}

#[derive(Deserialize)]
struct DemoSidecar {
    workload: String,
    admin: SocketAddr,
}

/// What `GET /certs` of a sidecar's administration answers.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Certs {
    certificate: Option<Certificate>,
    bundle: Option<serde_json::Value>,
    renewals: Renewals,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Certificate {
    id: String,
    serial: String,
    not_before: String,
    not_after: String,
    issuer_key_id: String,
    pem: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Renewals {
    ok: u64,
    failed: u64,
    last_error: Option<String>,
    next: Option<String>,
}

/// Asks every sidecar and prints what they hold. Returns 1 when some did not answer.
///
/// # Errors
///
/// When the folder holds no running demo, the cluster cannot be asked, or nothing can be printed.
pub(crate) fn run(arguments: &CertsArgs) -> anyhow::Result<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let standalone = arguments.dir.is_some() || arguments.admin.is_some();
    let held = runtime.block_on(async {
        if standalone {
            let certs = of_standalone(arguments).await?;
            return Ok(Held {
                certs,
                failures: Vec::new(),
            });
        }
        of_cluster(arguments, &Cluster::connect(&arguments.cluster).await?).await
    });
    let held: Held = held?;
    held.print(arguments, &mut io::stdout().lock())?;
    for failure in &held.failures {
        writeln!(io::stderr(), "sidegate: {failure:#}")?;
    }
    Ok(u8::from(!held.failures.is_empty()))
}

/// What the sidecars said, each by its workload or pod.
struct Held {
    certs: Vec<(String, Certs)>,
    failures: Vec<anyhow::Error>,
}

impl Held {
    fn print(&self, arguments: &CertsArgs, out: &mut impl Write) -> anyhow::Result<()> {
        if arguments.pem {
            let certs = self.certs.iter();
            for certificate in certs.filter_map(|(_, certs)| certs.certificate.as_ref()) {
                write!(out, "# {}\n{}", certificate.id, certificate.pem)?;
            }
            return Ok(());
        }
        if arguments.output != Format::Table {
            let certs = self.certs.iter().map(|(name, certs)| (name, certs));
            let by_name: std::collections::BTreeMap<_, _> = certs.collect();
            return arguments.output.print(out, &by_name);
        }
        let now = SystemClock.now();
        let header = [
            "WORKLOAD",
            "ID",
            "ISSUER",
            "SERIAL",
            "ENDS IN",
            "NEXT RENEWAL",
            "RENEWED",
            "FAILED",
        ];
        let rows = self.certs.iter().map(|(name, certs)| row(name, certs, now));
        print_table(out, &header, rows)?;
        for (name, certs) in &self.certs {
            if let Some(error) = &certs.renewals.last_error {
                let error = escape(error);
                writeln!(out, "{name}: the last renewal failed: {error}")?;
            }
        }
        Ok(())
    }
}

async fn of_cluster(arguments: &CertsArgs, cluster: &Cluster) -> anyhow::Result<Held> {
    let selection = Selection::new(
        cluster,
        arguments.workload.as_deref(),
        arguments.namespace.as_deref(),
        arguments.all_namespaces,
    )?;
    let mut sidecars = cluster.some_sidecars(&selection).await?;
    // What has ended answers no more.
    sidecars.retain(|sidecar| !sidecar.ended);
    let answers = cluster.ask_all::<Certs>(&sidecars, "/certs").await;
    let mut held = Held {
        certs: Vec::new(),
        failures: Vec::new(),
    };
    for (sidecar, answer) in sidecars.iter().zip(answers) {
        match answer {
            Ok(certs) => held.certs.push((sidecar.name(), certs)),
            Err(error) => held.failures.push(error),
        }
    }
    Ok(held)
}

async fn of_standalone(arguments: &CertsArgs) -> anyhow::Result<Vec<(String, Certs)>> {
    let mut all = Vec::new();
    for (workload, admin) in sidecars(arguments)? {
        let certs = ask(admin).await.with_context(|| {
            format!("the sidecar of {workload} at {admin} does not answer; is it running?")
        })?;
        all.push((workload, certs));
    }
    Ok(all)
}

fn sidecars(arguments: &CertsArgs) -> anyhow::Result<Vec<(String, SocketAddr)>> {
    if let Some(admin) = arguments.admin {
        return Ok(vec![(
            arguments
                .workload
                .clone()
                .unwrap_or_else(|| admin.to_string()),
            admin,
        )]);
    }
    let file = arguments.dir.clone().unwrap_or_default().join("demo.json");
    let text = std::fs::read(&file).with_context(|| {
        format!(
            "cannot read {}; does `sidegate demo --dir` run there?",
            file.display()
        )
    })?;
    let demo: Demo = serde_json::from_slice(&text)
        .with_context(|| format!("{} is not what the demo writes", file.display()))?;
    let wanted = |sidecar: &DemoSidecar| match &arguments.workload {
        None => true,
        Some(name) => {
            sidecar.workload == *name
                || sidecar
                    .workload
                    .split_once('/')
                    .is_some_and(|(_, account)| account == name)
        }
    };
    let found: Vec<_> = demo
        .sidecars
        .into_iter()
        .filter(wanted)
        .map(|sidecar| (sidecar.workload, sidecar.admin))
        .collect();
    if found.is_empty() {
        bail!(
            "no workload {} in {}",
            arguments.workload.as_deref().unwrap_or("at all"),
            file.display()
        );
    }
    Ok(found)
}

async fn ask(admin: SocketAddr) -> Result<Certs, anyhow::Error> {
    let answer = client::get(admin, &admin.to_string(), "/certs", &[])
        .await
        .map_err(anyhow::Error::from_boxed)?;
    if !answer.status.is_success() {
        bail!("HTTP {}", answer.status);
    }
    Ok(serde_json::from_slice(&answer.body)?)
}

fn row(workload: &str, certs: &Certs, now: SystemTime) -> Vec<String> {
    let certificate = certs.certificate.as_ref();
    let of = |field: fn(&Certificate) -> &String| {
        certificate.map_or_else(|| "-".to_owned(), |held| escape(field(held)).into_owned())
    };
    vec![
        workload.to_owned(),
        of(|held| &held.id),
        of(|held| &held.issuer_key_id)
            .chars()
            .take(KEY_ID_CHARS)
            .collect(),
        of(|held| &held.serial),
        certificate.map_or_else(|| "-".to_owned(), |held| left(&held.not_after, now)),
        certs
            .renewals
            .next
            .as_deref()
            .map_or_else(|| "-".to_owned(), |next| format!("in {}", left(next, now))),
        certs.renewals.ok.to_string(),
        certs.renewals.failed.to_string(),
    ]
}

/// Time from `now` to `moment`, which is RFC 3339, to the second.
fn left(moment: &str, now: SystemTime) -> String {
    let Ok(moment) = OffsetDateTime::parse(moment, &Rfc3339) else {
        return escape(moment).into_owned();
    };
    match SystemTime::from(moment).duration_since(now) {
        Ok(left) => {
            humantime::format_duration(std::time::Duration::from_secs(left.as_secs())).to_string()
        }
        Err(_) => "ended".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::fake::{Fake, pod};

    #[test]
    fn time_left_is_whole_seconds_and_an_end_is_said() {
        let now = SystemTime::UNIX_EPOCH;
        assert_eq!(left("1970-01-01T01:00:05.9Z", now), "1h 5s");
        assert_eq!(left("1969-12-31T23:59:59Z", now), "ended");
    }

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        certs: CertsArgs,
    }

    fn arguments(line: &str) -> CertsArgs {
        let words = std::iter::once("certs").chain(line.split_whitespace());
        <Command as clap::Parser>::try_parse_from(words)
            .unwrap()
            .certs
    }

    #[tokio::test]
    async fn sidecars_of_a_cluster_say_what_they_hold() {
        let fake = Fake::start().await;
        fake.put("pods", pod("shop", "web-0", "web"));
        fake.put("pods", pod("shop", "orders-0", "orders"));
        let certs = serde_json::json!({
            "certificate": {
                "id": "spiffe://m/ns/shop/sa/web", "serial": "17", "notBefore": "2026-11-24T07:00:00Z",
                "notAfter": "2026-11-24T08:00:00Z", "issuerKeyId": "aabbccddeeff", "pem": "PEM\n",
            },
            "bundle": null,
            "renewals": { "ok": 2, "failed": 1, "lastError": "no answer", "next": null },
        });
        fake.page(("shop", "web-0"), "/certs", certs);
        let print = async |line: &str| {
            let arguments = arguments(line);
            let held = of_cluster(&arguments, &fake.cluster()).await.unwrap();
            let mut out = Vec::new();
            held.print(&arguments, &mut out).unwrap();
            let failures: Vec<_> = held
                .failures
                .iter()
                .map(|error| format!("{error:#}"))
                .collect();
            (String::from_utf8(out).unwrap(), failures.join("\n"))
        };
        let (table, failures) = print("-A").await;
        assert!(
            table.contains("shop/web-0  spiffe://m/ns/shop/sa/web  aabbccdd  17      ended    -             2        1"),
            "{table}"
        );
        assert!(
            table.ends_with("shop/web-0: the last renewal failed: no answer\n"),
            "{table}"
        );
        assert!(failures.contains("shop/orders-0"), "{failures}");
        assert!(failures.contains("connection refused"), "{failures}");
        let (pem, failures) = print("sa/web --pem").await;
        assert_eq!(
            (pem.as_str(), failures.as_str()),
            ("# spiffe://m/ns/shop/sa/web\nPEM\n", "")
        );
    }
}
