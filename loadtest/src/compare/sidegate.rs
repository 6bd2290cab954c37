//! Sidegate as a target: a CA and two sidecars, from the real binaries.
//!
//! Default deny with twenty rules (or as many as a sweep asks for) of which the last admits the caller; access log on, into a
//! file; everything else as it is by default.

use std::fs;
use std::fs::OpenOptions;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::process::Command;

use super::peer::{Inbound, Peer};
use super::process::{Process, free_address, output};
use crate::children::Group;
use crate::target::{Protocol, TlsFiles};

const NAMESPACE: &str = "bench";
const PROXY: &str = "sidegate-proxy";
const CA: &str = "sidegate-ca";

/// Where the binaries are.
///
/// # Errors
///
/// When they are not there, or cannot be built.
pub(crate) async fn binaries(folder: Option<&Path>) -> anyhow::Result<(PathBuf, &'static str)> {
    let (folder, note) = match folder {
        Some(folder) => (folder.to_owned(), "as found in --bin-dir"),
        None => (build().await?, "built by deploy/binaries"),
    };
    for name in [PROXY, CA] {
        ensure!(
            folder.join(name).is_file(),
            "there is no {name} in {}",
            folder.display()
        );
    }
    Ok((folder.canonicalize()?, note))
}

async fn build() -> anyhow::Result<PathBuf> {
    let workspace = super::workspace()?;
    writeln!(
        std::io::stderr(),
        "building {PROXY} and {CA} by deploy/binaries; this takes minutes (--bin-dir uses what is there)"
    )?;
    let folder = workspace.join("target").join("binaries");
    let mut script = Command::new(workspace.join("deploy").join("binaries"));
    script.arg(&folder).args([PROXY, CA]);
    let started = Group::spawn(&mut script);
    let (group, mut child) =
        started.context("cannot run deploy/binaries; name the binaries with --bin-dir")?;
    let status = child.wait().await?;
    group.ended();
    ensure!(status.success(), "deploy/binaries failed");
    Ok(folder)
}

/// Starts CA and sidecars in front of `backend`, with a policy of so many rules.
///
/// # Errors
///
/// When one of them does not become ready.
pub(crate) async fn start(
    binaries: &Path,
    folder: &Path,
    backend: SocketAddr,
    rules: usize,
) -> anyhow::Result<Peer> {
    fs::create_dir_all(folder.join("resources"))?;
    let ca_address = free_address()?;
    let mut peer = Peer {
        name: crate::summary::OWN.to_owned(),
        authority: format!("called.{NAMESPACE}"),
        grpc: true,
        ..Peer::default()
    };
    let version = |name: &str| {
        let mut command = Command::new(binaries.join(name));
        command.arg("--version");
        command
    };
    peer.versions
        .insert(PROXY.into(), output(version(PROXY)).await?);
    let (front, behind) = (Addresses::free()?, Addresses::free()?);
    let texts = [
        ("ca.yaml", ca_config(ca_address, free_address()?)),
        ("caller.yaml", front.config("caller", ca_address, None)),
        (
            "called.yaml",
            behind.config("called", ca_address, Some(backend)),
        ),
        ("resources/called.yaml", resources(behind.inbound, rules)),
    ];
    for (name, text) in texts {
        fs::write(folder.join(name), &text)?;
        peer.configurations
            .insert(format!("sidegate: {name}"), text);
    }
    peer.others.push(authority(binaries, folder).await?);
    for (name, addresses) in [("caller", &front), ("called", &behind)] {
        token(binaries, folder, name).await?;
        let mut command = Command::new(binaries.join(PROXY));
        command
            .args(["--config", &format!("{name}.yaml")])
            .current_dir(folder);
        let mut sidecar = Process::start(name, command, folder)?;
        let health = addresses.health;
        sidecar.until(|| ready(binaries, health)).await?;
        peer.hops.push(sidecar);
    }
    peer.via = Some(front.outbound.to_string().parse()?);
    peer.inbound = Some(inbound(folder, behind.inbound));
    Ok(peer)
}

/// What the caller's sidecar needs to call the other: its own SVID, which is in its state folder.
fn inbound(folder: &Path, address: SocketAddr) -> Inbound {
    let svid = folder.join("caller-state").join("svid.pem");
    let spoken = HeaderName::from_static("sidegate-protocol");
    Inbound {
        address,
        protocol: Protocol::Http2,
        headers: HeaderMap::from_iter([(spoken, HeaderValue::from_static("http/1.1"))]),
        tls: TlsFiles {
            // Sidecars know each other by SPIFFE ID; the generator only has to be let in.
            insecure: true,
            cert: Some(svid.clone()),
            key: Some(svid),
            alpn: Some("sidegate/1".to_owned()),
            ..TlsFiles::default()
        },
    }
}

async fn authority(binaries: &Path, folder: &Path) -> anyhow::Result<Process> {
    let command = |arguments: &[&str]| {
        let mut command = Command::new(binaries.join(CA));
        command
            .args(arguments)
            .args(["--config", "ca.yaml"])
            .current_dir(folder);
        command
    };
    let mut ca = Process::start("ca", command(&["serve"]), folder)?;
    ca.until(|| command(&["token", "list"])).await?;
    Ok(ca)
}

async fn token(binaries: &Path, folder: &Path, account: &str) -> anyhow::Result<()> {
    let mut command = Command::new(binaries.join(CA));
    command
        .args([
            "token",
            "create",
            "--config",
            "ca.yaml",
            "--namespace",
            NAMESPACE,
        ])
        .args(["--service-account", account])
        .current_dir(folder);
    let token = output(command).await?;
    let file = folder.join(format!("{account}.token"));
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(file)?;
    Ok(file.write_all(token.as_bytes())?)
}

fn ready(binaries: &Path, health: SocketAddr) -> Command {
    let mut command = Command::new(binaries.join(PROXY));
    command.args([
        "wait",
        "--timeout",
        "1s",
        "--url",
        &format!("http://{health}/readyz"),
    ]);
    command
}

struct Addresses {
    outbound: SocketAddr,
    inbound: SocketAddr,
    admin: SocketAddr,
    health: SocketAddr,
}

impl Addresses {
    fn free() -> anyhow::Result<Self> {
        Ok(Self {
            outbound: free_address()?,
            inbound: free_address()?,
            admin: free_address()?,
            health: free_address()?,
        })
    }

    fn config(&self, account: &str, ca: SocketAddr, application: Option<SocketAddr>) -> String {
        let ports = application.map_or_else(
            || "[]".to_owned(),
            |address| format!("[{{ name: http, port: 80, address: \"{address}\" }}]"),
        );
        format!(
            "workload: {{ trustDomain: mesh.local, namespace: {NAMESPACE}, serviceAccount: {account}, labels: {{ app: {account} }} }}
ca: {{ address: \"{ca}\", root: ca/root.pem, joinTokenFile: {account}.token }}
resources: resources
ports: {ports}
outbound: {{ address: \"{}\" }}
inbound: {{ address: \"{}\" }}
admin: {{ address: \"{}\" }}
health: {{ address: \"{}\" }}
log: {{ path: {account}.log }}
state: {account}-state
",
            self.outbound, self.inbound, self.admin, self.health
        )
    }
}

fn ca_config(address: SocketAddr, metrics: SocketAddr) -> String {
    format!(
        "trustDomain: mesh.local\nstateDir: ca\naddress: {address}\nmetricsAddress: {metrics}\n"
    )
}

fn resources(inbound: SocketAddr, rules: usize) -> String {
    let rule = |number: usize| {
        format!(
            "    - name: other-{number}
      from: [{{ workload: {{ serviceAccount: other-{number} }} }}]
      to: [{{ http: {{ methods: [GET, POST], paths: [\"/other-{number}/**\"] }} }}]
"
        )
    };
    let others: String = (1..rules).map(rule).collect();
    format!(
        "apiVersion: sidegate.dev/v1alpha1
kind: StaticService
metadata: {{ name: called, namespace: {NAMESPACE} }}
spec:
  ports: [{{ name: http, port: 80, protocol: auto }}]
  endpoints: [{{ address: \"{inbound}\", identity: {{ workload: {{ serviceAccount: called }} }} }}]
---
apiVersion: sidegate.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {{ name: called, namespace: {NAMESPACE} }}
spec:
  selector: {{ matchLabels: {{ app: called }} }}
  ports: [http]
  action: Allow
  rules:
{others}    - name: caller
      from: [{{ workload: {{ serviceAccount: caller }} }}]
      to:
        - http: {{ methods: [GET, POST], paths: [\"/bytes/**\"] }}
        - grpc: {{ service: bench.Echo, methods: [Call] }}
"
    )
}
