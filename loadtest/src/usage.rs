//! What processes and threads have used, from `/proc`.

use std::fs;

/// CPU time of a thread or process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cpu {
    /// Nanoseconds on a CPU.
    pub(crate) ran: u64,
    /// Nanoseconds runnable, waiting for a CPU.
    pub(crate) waited: u64,
}

impl Cpu {
    /// Used since `earlier`.
    pub(crate) fn since(self, earlier: Self) -> Self {
        Self {
            ran: self.ran.saturating_sub(earlier.ran),
            waited: self.waited.saturating_sub(earlier.waited),
        }
    }
}

/// Of the calling thread.
pub(crate) fn of_this_thread() -> Cpu {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    parse(&text).unwrap_or_default()
}

/// Of every living thread of a process; none when it has ended.
pub(crate) fn of_process(pid: u32) -> Option<Cpu> {
    let mut total = Cpu::default();
    for task in fs::read_dir(format!("/proc/{pid}/task")).ok()? {
        let text = fs::read_to_string(task.ok()?.path().join("schedstat"));
        // A thread that has just ended has nothing to add.
        let cpu = text.ok().as_deref().and_then(parse).unwrap_or_default();
        total.ran += cpu.ran;
        total.waited += cpu.waited;
    }
    Some(total)
}

/// Resident memory of a process, in KiB.
pub(crate) fn resident_kib(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

fn parse(text: &str) -> Option<Cpu> {
    let mut fields = text.split_whitespace().map(str::parse);
    Some(Cpu {
        ran: fields.next()?.ok()?,
        waited: fields.next()?.ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedstat_gives_time_on_and_for_the_cpu() {
        let cpu = Cpu {
            ran: 12,
            waited: 34,
        };
        assert_eq!(parse("12 34 56\n"), Some(cpu));
        assert_eq!(parse(""), None);
    }

    #[test]
    fn this_process_uses_cpu_and_memory() {
        let before = of_this_thread();
        while of_this_thread().since(before).ran < 1_000_000 {}
        let own = std::process::id();
        assert!(of_process(own).unwrap().ran >= 1_000_000);
        assert!(resident_kib(own).unwrap() > 100);
        assert_eq!(of_process(u32::MAX), None);
    }
}
