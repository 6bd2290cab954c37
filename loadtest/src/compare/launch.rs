//! Which targets there are on this machine, and how each is started.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, bail};

use super::envoy::{self, Mode};
use super::peer::Peer;
use super::{gate, sidegate};
use crate::cli::{Compare, Usage};
use crate::summary::{DIRECT, OWN};

/// Every target, in the order of the report.
pub(super) const TARGETS: &[&str] = &[DIRECT, OWN, "envoy-h1", "envoy-h2"];

/// The binaries, and what they stand in front of.
pub(super) struct Launcher {
    sidegate: Option<PathBuf>,
    envoy: Option<PathBuf>,
    folder: PathBuf,
    backend: SocketAddr,
}

impl Launcher {
    /// Finds, builds or installs what `targets` need. Targets that nobody named and whose binary is
    /// not there are taken out, and a note says so.
    ///
    /// # Errors
    ///
    /// When a target that was named cannot be had.
    pub(super) async fn new(
        options: &Compare,
        targets: &mut Vec<&'static str>,
        (folder, backend): (PathBuf, SocketAddr),
        notes: &mut Vec<String>,
    ) -> anyhow::Result<Self> {
        let mut launcher = Self {
            sidegate: None,
            envoy: None,
            folder,
            backend,
        };
        if targets.iter().any(|target| target.starts_with("envoy")) {
            let found = envoy::find(options.envoy.as_deref(), options.install_envoy).await;
            launcher.envoy = found.map_err(Usage)?;
            if launcher.envoy.is_none() {
                let how = "--envoy names one, --install-envoy installs one";
                if !options.targets.is_empty() {
                    bail!(Usage(anyhow::anyhow!(
                        "no binary of Envoy was found; {how}"
                    )));
                }
                targets.retain(|target| !target.starts_with("envoy"));
                notes.push(format!("Envoy is left out: no binary was found. {how}."));
            }
        }
        if targets.contains(&OWN) {
            let (binaries, note) = sidegate::binaries(options.bin_dir.as_deref()).await?;
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
    pub(super) async fn start(&self, target: &str, purpose: &str) -> anyhow::Result<Peer> {
        let folder = self.folder.join(purpose).join(target);
        let envoy = || self.envoy.as_ref().context("no binary of Envoy");
        let mut peer = match target {
            DIRECT => Peer {
                name: DIRECT.to_owned(),
                authority: self.backend.to_string(),
                grpc: true,
                ..Peer::default()
            },
            OWN => {
                let binaries = self.sidegate.as_ref().context("no binaries of Sidegate")?;
                sidegate::start(binaries, &folder, self.backend).await?
            }
            "envoy-h1" => envoy::start(envoy()?, &folder, self.backend, Mode::Http1).await?,
            "envoy-h2" => envoy::start(envoy()?, &folder, self.backend, Mode::Http2).await?,
            _ => bail!("there is no target {target}"),
        };
        peer.key_exchange = gate::check(&peer).await?;
        Ok(peer)
    }
}
