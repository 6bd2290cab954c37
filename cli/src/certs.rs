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
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::output::{Format, print_table};

/// Identities, issuers, time left, renewals.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  sidegate certs --dir /tmp/mesh\n  sidegate certs shop/web --dir /tmp/mesh --pem"
)]
pub(crate) struct CertsArgs {
    /// Only this workload: namespace/service-account, or just its service account.
    workload: Option<String>,
    /// Folder of a running `sidegate demo --dir DIR`.
    #[arg(long, value_name = "DIR", required_unless_present = "admin")]
    dir: Option<PathBuf>,
    /// Administration address of one sidecar, instead of a folder.
    #[arg(long, value_name = "ADDRESS", conflicts_with = "dir")]
    admin: Option<SocketAddr>,
    /// Print the certificate chains as PEM, leaf first.
    #[arg(long)]
    pem: bool,
    /// How they are printed.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
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

/// Asks every sidecar and prints what they hold.
///
/// # Errors
///
/// When the folder holds no running demo, or a sidecar does not answer.
pub(crate) fn run(arguments: &CertsArgs) -> anyhow::Result<u8> {
    let sidecars = sidecars(arguments)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut all = Vec::new();
    for (workload, admin) in sidecars {
        let certs = runtime.block_on(ask(admin)).with_context(|| {
            format!("the sidecar of {workload} at {admin} does not answer; is it running?")
        })?;
        all.push((workload, certs));
    }
    let mut out = io::stdout().lock();
    if arguments.pem {
        for certificate in all
            .iter()
            .filter_map(|(_, certs)| certs.certificate.as_ref())
        {
            write!(out, "# {}\n{}", certificate.id, certificate.pem)?;
        }
        return Ok(0);
    }
    if arguments.output != Format::Table {
        let by_workload: std::collections::BTreeMap<_, _> = all.into_iter().collect();
        arguments.output.print(&mut out, &by_workload)?;
        return Ok(0);
    }
    let now = SystemClock.now();
    let header = [
        "WORKLOAD",
        "ID",
        "SERIAL",
        "ENDS IN",
        "NEXT RENEWAL",
        "RENEWED",
        "FAILED",
    ];
    print_table(
        &mut out,
        &header,
        all.iter()
            .map(|(workload, certs)| row(workload, certs, now)),
    )?;
    for (workload, certs) in &all {
        if let Some(error) = &certs.renewals.last_error {
            writeln!(out, "{workload}: the last renewal failed: {error}")?;
        }
    }
    Ok(0)
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
        certificate.map_or_else(|| "-".to_owned(), |held| field(held).clone())
    };
    vec![
        workload.to_owned(),
        of(|held| &held.id),
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
        return moment.to_owned();
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

    #[test]
    fn time_left_is_whole_seconds_and_an_end_is_said() {
        let now = SystemTime::UNIX_EPOCH;
        assert_eq!(left("1970-01-01T01:00:05.9Z", now), "1h 5s");
        assert_eq!(left("1969-12-31T23:59:59Z", now), "ended");
    }
}
