//! `report`: runs that were made elsewhere, such as in pods, put together as one comparison.
//!
//! Invariant: only runs of one kind of load are put together; what a pod was measured on stays with
//! its run.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::ensure;

use crate::baseline;
use crate::cli::{Report, Usage};
use crate::results::{LoadFacts, Results, Run};
use crate::{plain, summary, table};

/// Reads the runs and writes the report.
///
/// # Errors
///
/// [`Usage`] when a file is not of a `run`, or of another load than the first.
pub(crate) fn report(options: &Report) -> anyhow::Result<ExitCode> {
    let baseline = options.output.baseline()?;
    let results = merged(options).map_err(Usage)?;
    let fine = options
        .output
        .finish(&results, &text(&results), baseline.as_ref())?;
    Ok(if fine {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn merged(options: &Report) -> anyhow::Result<Results> {
    let mut repetitions: BTreeMap<&str, u32> = BTreeMap::new();
    let mut runs: Vec<Run> = Vec::new();
    let mut whole: Option<Results> = None;
    let mut notes = Vec::new();
    for (target, file) in &options.runs {
        let results = baseline::read(file)?;
        let shown = file.display();
        ensure!(
            results.kind == "run" && results.runs.len() == 1,
            "{shown} is of `{}`, not of one `run`",
            results.kind
        );
        let repetition = repetitions.entry(target).or_default();
        *repetition += 1;
        for mut run in results.runs.clone() {
            run.load.name = name(&run.load);
            if let Some(first) = runs.first() {
                ensure!(
                    first.load.name == run.load.name,
                    "{shown} is of another load ({}) than the first ({})",
                    run.load.name,
                    first.load.name
                );
            }
            run.target.clone_from(target);
            run.repetition = *repetition;
            runs.push(run);
        }
        notes.push(format!(
            "{target} #{repetition}: {} on {} ({} cores), load average {}: {}",
            results.created,
            results.machine.cpu,
            results.machine.cores,
            results.machine.load_average,
            results.command.join(" ")
        ));
        whole.get_or_insert(results);
    }
    let machine = whole.map(|first| (first.machine, first.versions));
    let mut results = Results::new("compare", runs);
    if let Some((machine, versions)) = machine {
        (results.machine, results.versions) = (machine, versions);
    }
    results.metrics = summary::metrics(&results.runs, &[]);
    results.notes = notes;
    Ok(results)
}

/// What the load was, but for where it went.
fn name(load: &LoadFacts) -> String {
    let how = match load.rate {
        Some(rate) => format!("{rate} calls/s"),
        None => "closed loop".to_owned(),
    };
    let streams = if load.streams > 1 {
        format!(" × {} streams", load.streams)
    } else {
        String::new()
    };
    format!(
        "{} {}, {how}, {} connections{streams}, body of {} B",
        load.protocol, load.method, load.connections, load.body_bytes
    )
}

fn text(results: &Results) -> String {
    let mut parts = results.notes.clone();
    parts.push(String::new());
    parts.extend(plain::words(results));
    parts.push(String::new());
    parts.push(table::text(&table::cell_rows(&results.runs)));
    if results.runs.iter().any(|run| !run.verdict.conclusive) {
        parts.push("\n? the generator was the bottleneck: no conclusion".to_owned());
    }
    parts.push(String::new());
    parts.join("\n")
}
