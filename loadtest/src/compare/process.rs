//! The processes of a comparison.
//!
//! Invariant: a child dies with its handle, and its output is in a file that an error names.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Output, Stdio};
use std::sync::atomic::AtomicU16;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

use crate::children::Group;

/// Longest wait for a process to be ready.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);
/// How much of a dead process's output is shown.
const TAIL_LINES: usize = 5;

/// A running child.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) name: String,
    pub(crate) pid: u32,
    #[expect(dead_code, reason = "ends the process when it is dropped")]
    group: Group,
    child: Child,
    output: std::path::PathBuf,
}

impl Process {
    /// Starts `command`; what it prints goes to `NAME.out` in `folder`.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub(crate) fn start(name: &str, mut command: Command, folder: &Path) -> anyhow::Result<Self> {
        let output = folder.join(format!("{name}.out"));
        let file =
            File::create(&output).with_context(|| format!("cannot write {}", output.display()))?;
        command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        let started = Group::spawn(&mut command);
        let (group, child) = started.with_context(|| format!("cannot start {name}"))?;
        let pid = child.id().context("the process has ended already")?;
        Ok(Self {
            name: name.to_owned(),
            pid,
            group,
            child,
            output,
        })
    }

    /// Waits until `command` succeeds.
    ///
    /// # Errors
    ///
    /// When the process ends before, or half a minute passes.
    pub(crate) async fn until(&mut self, command: impl Fn() -> Command) -> anyhow::Result<()> {
        self.wait(|| async {
            command()
                .output()
                .await
                .is_ok_and(|output| output.status.success())
        })
        .await
    }

    /// Waits until `address` accepts connections.
    ///
    /// # Errors
    ///
    /// As [`Self::until`].
    pub(crate) async fn listening(&mut self, address: SocketAddr) -> anyhow::Result<()> {
        self.wait(|| async { TcpStream::connect(address).await.is_ok() })
            .await
    }

    async fn wait<F: Future<Output = bool>>(
        &mut self,
        ready: impl Fn() -> F,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + READY_TIMEOUT;
        while !ready().await {
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended with {status}: {}", self.name, self.tail());
            }
            if Instant::now() > deadline {
                bail!(
                    "{} is not ready after {READY_TIMEOUT:?}: {}",
                    self.name,
                    self.tail()
                );
            }
            sleep(POLL).await;
        }
        Ok(())
    }

    fn tail(&self) -> String {
        let text = std::fs::read_to_string(&self.output).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(TAIL_LINES);
        lines.get(from..).unwrap_or_default().join("\n")
    }
}

/// Ports that are handed out: below those that the kernel gives to outgoing connections, since one
/// of these could take a port between here and the moment at which a process listens on it.
const PORTS: std::ops::Range<u16> = 20_000..32_000;
/// How many of them have been looked at.
static LOOKED_AT: AtomicU16 = AtomicU16::new(0);

/// A loopback address that is free, and that is handed out once.
///
/// # Errors
///
/// When none is left.
pub(crate) fn free_address() -> anyhow::Result<SocketAddr> {
    // Other harnesses on this machine begin elsewhere.
    let offset =
        u16::try_from(std::process::id() % u32::from(PORTS.end - PORTS.start)).unwrap_or(0);
    loop {
        let number = LOOKED_AT.fetch_add(1, Relaxed);
        if usize::from(number) >= PORTS.len() {
            bail!("no port is free from {} to {}", PORTS.start, PORTS.end);
        }
        let port = PORTS.start + (offset + number) % (PORTS.end - PORTS.start);
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        if TcpListener::bind(address).is_ok() {
            return Ok(address);
        }
    }
}

/// Runs a command to its end and returns what it printed.
///
/// # Errors
///
/// When it fails, with what it said.
pub(crate) async fn output(command: Command) -> anyhow::Result<String> {
    Ok(text(&run(command).await?.stdout))
}

/// As [`output`], with what it printed on standard error behind it.
///
/// # Errors
///
/// As [`output`].
pub(crate) async fn output_of_both(command: Command) -> anyhow::Result<String> {
    let output = run(command).await?;
    let both = [text(&output.stdout), text(&output.stderr)].concat();
    Ok(both)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
}

async fn run(mut command: Command) -> anyhow::Result<Output> {
    let what = format!("{:?}", command.as_std());
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let started = Group::spawn(&mut command);
    let (group, child) = started.with_context(|| format!("cannot run {what}"))?;
    let output = child.wait_with_output().await;
    group.ended();
    let output = output.with_context(|| format!("cannot run {what}"))?;
    if !output.status.success() {
        bail!("{what} failed: {}", text(&output.stderr));
    }
    Ok(output)
}
