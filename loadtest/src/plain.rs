//! What the mesh costs, in sentences: the first screen of a report.
//!
//! Invariant: each sentence names the load that it is of, and says so when a generator spoiled it.

use crate::results::{IdleFacts, Results, Run};
use crate::summary::{self, Cell, DIRECT, OWN, Spread};
use crate::table::duration;

/// A sentence for each thing that a mesh costs and that was measured.
pub(crate) fn words(results: &Results) -> Vec<String> {
    let cells = summary::cells(&results.runs);
    let own = || cells.iter().filter(|cell| cell.target == OWN);
    let open = own().find(|cell| rate(cell).is_some());
    let steady = own().find(|cell| rate(cell).is_none() && !new_connections(cell));
    let handshake = own().find(|cell| new_connections(cell));
    let mut words = Vec::new();
    words.extend(open.and_then(|cell| latency(cell, &cells)));
    let cpu: Vec<String> = steady.into_iter().chain(open).filter_map(cpu).collect();
    if !cpu.is_empty() {
        words.push(format!(
            "A call costs each of the two sidecars on its way {}.",
            cpu.join(", ")
        ));
    }
    words.extend(memory(&results.runs));
    words.extend(handshake.and_then(|cell| {
        let used = cell_cpu(cell)?;
        Some(format!(
            "A new connection between sidecars, with its first call, costs the called one {} of CPU.",
            duration(used.median)
        ))
    }));
    let idle = results.idle_connections.iter();
    words.extend(
        idle.filter(|idle| idle.target == OWN)
            .filter_map(connection),
    );
    words
}

fn rate(cell: &Cell<'_>) -> Option<f64> {
    cell.runs.first()?.load.rate
}

fn new_connections(cell: &Cell<'_>) -> bool {
    cell.runs.iter().any(|run| run.load.new_connections)
}

fn latency(cell: &Cell<'_>, cells: &[Cell<'_>]) -> Option<String> {
    let direct = cells
        .iter()
        .find(|direct| direct.load == cell.load && direct.target == DIRECT)?;
    let added = |of: fn(&Run) -> f64| Some(duration(summary::added(cell, cells, of)?.median));
    let of_direct = |of: fn(&Run) -> f64| Some(duration(direct.spread(of)?.median));
    let p50: fn(&Run) -> f64 = |run| run.latency_us.p50;
    let p99: fn(&Run) -> f64 = |run| run.latency_us.p99;
    let doubt = if cell.conclusive() && direct.conclusive() {
        ""
    } else {
        " No conclusion: the generator was the bottleneck."
    };
    Some(format!(
        "A call takes {} longer in the middle and {} longer at the p99, where direct it takes {} and {} ({}).{doubt}",
        added(p50)?,
        added(p99)?,
        of_direct(p50)?,
        of_direct(p99)?,
        cell.load
    ))
}

fn cell_cpu(cell: &Cell<'_>) -> Option<Spread> {
    Spread::of(cell.runs.iter().filter_map(|run| summary::hop_cpu(run)))
}

fn cpu(cell: &Cell<'_>) -> Option<String> {
    let used = cell_cpu(cell)?;
    Some(format!("{} of CPU ({})", duration(used.median), cell.load))
}

fn memory(runs: &[Run]) -> Option<String> {
    let processes = || {
        let own = runs.iter().filter(|run| run.target == OWN);
        own.flat_map(|run| &run.processes)
    };
    let idle = processes().map(|process| process.rss_idle_kib).max()?;
    let peak = processes().map(|process| process.rss_peak_kib).max()?;
    Some(format!(
        "A sidecar takes {} MiB of memory idle, and at most {} MiB under these loads.",
        idle.div_ceil(1024),
        peak.div_ceil(1024)
    ))
}

fn connection(idle: &IdleFacts) -> Option<String> {
    let bytes = Spread::of(idle.bytes_per_connection.iter().copied())?;
    Some(format!(
        "An idle connection between sidecars takes {:.1} KiB of the called one's memory.",
        bytes.median / 1024.0
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::run;

    #[test]
    fn sentences_say_what_was_added_used_and_doubted() {
        let mut runs = vec![
            run("direct", 1, 100.0, &[]),
            run("sidegate", 1, 300.0, &[20.0, 30.0]),
        ];
        let told = |runs: &[Run]| words(&Results::new("compare", runs.to_vec()));
        assert_eq!(
            told(&runs),
            [
                "A call takes 200 µs longer in the middle and 400 µs longer at the p99, where direct it takes 100 µs and 200 µs (load).",
                "A call costs each of the two sidecars on its way 25 µs of CPU (load).",
                "A sidecar takes 5 MiB of memory idle, and at most 10 MiB under these loads.",
            ]
        );
        runs[0].verdict.conclusive = false;
        assert!(told(&runs)[0].ends_with("No conclusion: the generator was the bottleneck."));
        assert!(told(&runs[..1]).is_empty(), "nothing of the mesh");
    }
}
