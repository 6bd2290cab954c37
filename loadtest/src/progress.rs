//! The progress bar on standard error, and Ctrl-C.
//!
//! Invariant: on something that is no terminal nothing is drawn, and standard output is never
//! touched.

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::children;
use crate::engine::Observer;

const STEPS: u64 = 1_000;

/// One load's bar.
#[derive(Debug)]
pub(crate) struct Bar {
    bar: ProgressBar,
}

impl Bar {
    /// A bar that says `what` is being measured.
    pub(crate) fn new(what: &str) -> Self {
        let bar = ProgressBar::new(STEPS);
        let style = ProgressStyle::with_template("{prefix} {bar:30} {percent:>3} % {msg}");
        bar.set_style(style.unwrap_or_else(|_invalid| ProgressStyle::default_bar()));
        bar.set_prefix(what.to_owned());
        Self { bar }
    }
}

impl Observer for Bar {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a share of a thousand steps"
    )]
    fn tick(&mut self, share: f64, answered: u64, failed: u64) {
        self.bar.set_position((share * STEPS as f64) as u64);
        self.bar.set_message(match failed {
            0 => format!("{answered} answered"),
            failed => format!("{answered} answered, {failed} failed"),
        });
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Becomes true at the first Ctrl-C or SIGTERM; the second ends the process, and those that it
/// started, at once.
///
/// # Errors
///
/// When the signals cannot be listened for.
pub(crate) fn interrupt(tasks: &mut JoinSet<()>) -> anyhow::Result<watch::Receiver<bool>> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for Ctrl-C")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let (sender, receiver) = watch::channel(false);
    tasks.spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if sender.send_replace(true) {
                children::kill_all();
                std::process::exit(130);
            }
        }
    });
    Ok(receiver)
}
