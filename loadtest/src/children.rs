//! The processes that we started, so that none outlives us.
//!
//! Invariant: each child leads a process group of its own. Ctrl-C in a terminal reaches us and not
//! the group, and ending the group ends what the child has started.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::{Child, Command};

static LEADERS: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

fn leaders() -> MutexGuard<'static, BTreeSet<u32>> {
    LEADERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A child's process group; it is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Group {
    leader: u32,
    killing: bool,
}

impl Group {
    /// Starts `command` as the leader of a group.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub(crate) fn spawn(command: &mut Command) -> std::io::Result<(Self, Child)> {
        // Nobody may be told to end everything between the start and the entry.
        let mut leaders = leaders();
        let child = command.process_group(0).kill_on_drop(true).spawn()?;
        let leader = child.id().unwrap_or(0);
        leaders.insert(leader);
        let group = Self {
            leader,
            killing: true,
        };
        Ok((group, child))
    }

    /// The leader has ended, and been waited for: its number may be somebody else's now.
    pub(crate) fn ended(mut self) {
        self.killing = false;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        leaders().remove(&self.leader);
        if self.killing {
            kill(self.leader);
        }
    }
}

/// Kills every group; for an end that waits for nothing.
pub(crate) fn kill_all() {
    leaders().iter().copied().for_each(kill);
}

fn kill(leader: u32) {
    let pid = i32::try_from(leader).ok().and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // One that has ended already is as good.
        kill_process_group(pid, Signal::KILL).ok();
    }
}
