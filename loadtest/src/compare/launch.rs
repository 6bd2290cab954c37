//! Which targets there are on this machine, and how each is started.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use tokio::process::Command;

use super::envoy::{self, Duty, Mode};
use super::peer::Peer;
use super::process::output;
use super::{RULES, gate, haproxy, nginx, sidegate};
use crate::cli::{Programs, Usage};
use crate::summary::{DIRECT, OWN};

/// Every target, in the order of the report.
pub(crate) const TARGETS: &[&str] = &[
    DIRECT,
    OWN,
    "envoy-h1",
    "envoy-h2",
    nginx::NAME,
    haproxy::NAME,
];
/// Whether a target can do without a [`Duty`]; it is one of the two modes of Envoy.
pub(crate) fn is_envoy(target: &str) -> bool {
    target.starts_with("envoy")
}

/// Those that are measured only with `--with` or `--targets`.
pub(crate) const EXTRA: &[&str] = &[nginx::NAME, haproxy::NAME];

/// How a target differs from what is compared; one that cannot differ in that way does not.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    /// Rules of Sidegate's policy.
    pub(crate) rules: usize,
    /// What a pair of Envoy does not do; Sidegate does all.
    pub(crate) without: Option<Duty>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            rules: RULES,
            without: None,
        }
    }
}

/// The binaries, and what they stand in front of.
pub(crate) struct Launcher {
    sidegate: Option<PathBuf>,
    envoy: Option<PathBuf>,
    /// Of the targets in [`EXTRA`], by name.
    extra: BTreeMap<&'static str, PathBuf>,
    folder: PathBuf,
    backend: SocketAddr,
}

impl Launcher {
    /// Finds, builds or installs what `targets` need. Unless they were `named`, targets whose binary is
    /// not there are taken out, and a note says so.
    ///
    /// # Errors
    ///
    /// When a target that was named cannot be had.
    pub(crate) async fn new(
        (programs, named): (&Programs, bool),
        targets: &mut Vec<&'static str>,
        (folder, backend): (PathBuf, SocketAddr),
        notes: &mut Vec<String>,
    ) -> anyhow::Result<Self> {
        let mut launcher = Self {
            sidegate: None,
            envoy: None,
            extra: BTreeMap::new(),
            folder,
            backend,
        };
        if targets.iter().any(|target| is_envoy(target)) {
            let found = envoy::find(programs.envoy.as_deref(), programs.install_envoy).await;
            launcher.envoy = found.map_err(Usage)?;
            if launcher.envoy.is_none() {
                let how = "--envoy names one, --install-envoy installs one";
                if named {
                    bail!(Usage(anyhow::anyhow!(
                        "no binary of Envoy was found; {how}"
                    )));
                }
                targets.retain(|target| !is_envoy(target));
                notes.push(format!("Envoy is left out: no binary was found. {how}."));
            }
        }
        for name in EXTRA.iter().filter(|name| targets.contains(name)) {
            let binary = packaged(name, programs.install_peers).await;
            launcher.extra.insert(name, binary.map_err(Usage)?);
        }
        if targets.contains(&OWN) {
            let (binaries, note) = sidegate::binaries(programs.bin_dir.as_deref()).await?;
            notes.push(format!("Sidegate's binaries: {note}."));
            launcher.sidegate = Some(binaries);
        }
        Ok(launcher)
    }

    /// Starts a target and makes sure that it does what it is measured for; its files are in a
    /// folder of the name `purpose`.
    ///
    /// # Errors
    ///
    /// When a process does not become ready, or lets pass what it should refuse.
    pub(crate) async fn start(&self, target: &str, purpose: &str) -> anyhow::Result<Peer> {
        self.start_with(target, purpose, Setup::default()).await
    }

    /// As [`Self::start`], set up in another way.
    ///
    /// # Errors
    ///
    /// As [`Self::start`].
    pub(crate) async fn start_with(
        &self,
        target: &str,
        purpose: &str,
        setup: Setup,
    ) -> anyhow::Result<Peer> {
        let folder = self.folder.join(purpose).join(target);
        let envoy = async |mode| {
            let binary = self.envoy.as_ref().context("no binary of Envoy")?;
            envoy::start(binary, &folder, self.backend, (mode, setup.without)).await
        };
        let mut peer = match target {
            DIRECT => Peer {
                name: DIRECT.to_owned(),
                authority: self.backend.to_string(),
                grpc: true,
                ..Peer::default()
            },
            OWN => {
                let binaries = self.sidegate.as_ref().context("no binaries of Sidegate")?;
                sidegate::start(binaries, &folder, self.backend, setup.rules).await?
            }
            "envoy-h1" => envoy(Mode::Http1).await?,
            "envoy-h2" => envoy(Mode::Http2).await?,
            other => {
                let binary = self.extra.get(other);
                let binary = binary.with_context(|| format!("no binary of {other}"))?;
                if other == nginx::NAME {
                    nginx::start(binary, &folder, self.backend).await?
                } else {
                    haproxy::start(binary, &folder, self.backend).await?
                }
            }
        };
        peer.key_exchange = gate::check(&peer).await?;
        Ok(peer)
    }
}

/// Where the packages of distributions put servers, which a user's PATH often lacks.
const SYSTEM: &[&str] = &["/usr/sbin", "/usr/local/sbin"];

/// The binary of a package of that name; installed first when that is asked for.
async fn packaged(name: &str, install: bool) -> anyhow::Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let find = || {
        std::env::split_paths(&path)
            .chain(SYSTEM.iter().map(|folder| Path::new(folder).to_owned()))
            .map(|folder| folder.join(name))
            .find(|file| file.is_file())
    };
    if let Some(found) = find() {
        return Ok(found);
    }
    if !install {
        bail!("no binary of {name} was found; --install-peers installs it by apt-get");
    }
    let mut apt = Command::new("apt-get");
    apt.args(["install", "--yes", "--no-install-recommends", name])
        .env("DEBIAN_FRONTEND", "noninteractive")
        // The package's own service is not started.
        .env("RUNLEVEL", "1");
    output(apt).await?;
    find().with_context(|| format!("the package {name} was installed, and holds no binary"))
}
