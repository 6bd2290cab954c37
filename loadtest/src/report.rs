//! The report: `index.html`, which needs nothing else, the pictures apart, and `results.json`.
//!
//! Invariant: nothing in it is fetched from anywhere, and every text that came from outside is
//! escaped.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Context;

use crate::compare::plan::{C16, C64, C256};
use crate::results::{Results, Run};
use crate::summary::{self, Cell, Spread};
use crate::{plain, sweep, table, verdict};

mod svg;

const STYLE: &str = "
:root{color-scheme:light dark;--fg:#1b1f24;--bg:#fff;--soft:#6a737d;--line:#d0d7de;--panel:#f6f8fa}
@media(prefers-color-scheme:dark){:root{--fg:#e6edf3;--bg:#0d1117;--soft:#8b949e;--line:#30363d;--panel:#161b22}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--fg);background:var(--bg);max-width:72rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.5rem}h3{font-size:1rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.25rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){text-align:left}
.scroll{overflow-x:auto}.note{background:var(--panel);border-left:4px solid #bf8700;padding:.4rem .8rem;margin:.4rem 0}
.bad{border-left-color:#cf222e}.soft{color:var(--soft);font-size:.85rem}
pre{background:var(--panel);padding:.8rem;overflow-x:auto;font-size:.8rem}svg{max-width:100%;height:auto}
";

/// Writes the report into `folder`, which is made when it is not there.
///
/// # Errors
///
/// Names the file that could not be written.
pub(crate) fn write(folder: &Path, results: &Results) -> anyhow::Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let pictures = pictures(results);
    for (name, (_, svg)) in &pictures {
        save(folder, &format!("{name}.svg"), svg)?;
    }
    save(folder, "results.json", &serde_json::to_string(results)?)?;
    save(folder, "index.html", &page(results, &pictures))
}

fn save(folder: &Path, name: &str, text: &str) -> anyhow::Result<()> {
    let file = folder.join(name);
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
}

/// File name, then title and picture.
type Pictures = BTreeMap<String, (String, String)>;

/// Latency against throughput: the closed loops of a comparison that differ in nothing but their
/// connections, for each target.
fn throughput_picture(results: &Results, pictures: &mut Pictures) {
    let same =
        |run: &&Run| [C16, C64, C256].contains(&run.load.name.as_str()) && run.counts.answered > 0;
    let cells = summary::cells(&results.runs);
    let mut lines: Vec<svg::Line> = Vec::new();
    for cell in &cells {
        let runs = || cell.runs.iter().copied().filter(same);
        let (Some(at), Some(latency)) = (
            Spread::of(runs().map(|run| run.throughput)),
            Spread::of(runs().map(|run| run.latency_us.p50)),
        ) else {
            continue;
        };
        let point = (at.median, latency.median);
        match lines.iter_mut().find(|(name, _)| name == cell.target) {
            Some((_, points)) => points.push(point),
            None => lines.push((cell.target.to_owned(), vec![point])),
        }
    }
    if lines.iter().any(|(_, points)| points.len() > 1) {
        let title = "Latency (p50) against throughput: 100 B at 16, 64 and 256 connections";
        pictures.insert(
            "0-throughput".to_owned(),
            (title.to_owned(), svg::lines(&lines, "calls/s")),
        );
    }
}

/// What grows with what, for each series of a sweep.
fn sweep_pictures(results: &Results, pictures: &mut Pictures) {
    let mut series: Vec<&str> = results.points.iter().map(|p| p.series.as_str()).collect();
    series.dedup();
    for name in series {
        let (mut latency, mut cpu) = (Vec::new(), Vec::new());
        let mut targets: Vec<&str> = results.points.iter().map(|p| p.target.as_str()).collect();
        targets.sort_unstable();
        targets.dedup();
        for target in targets {
            let points = results.points.iter();
            let points = points.filter(|point| point.series == name && point.target == target);
            let mut runs: Vec<(f64, &Run)> = points
                .filter_map(|point| Some((point.x, sweep::run_of(&results.runs, point)?)))
                .filter(|(x, _)| name != sweep::LOAD || *x > 0.0)
                .collect();
            runs.sort_by(|left, right| left.0.total_cmp(&right.0));
            // Latency over what was answered: beyond the knee it turns back, or straight up.
            let at = |x: f64, run: &Run| {
                if name == sweep::LOAD {
                    run.throughput
                } else {
                    x
                }
            };
            let line = |of: fn(&Run) -> Option<f64>| -> Vec<(f64, f64)> {
                let points = runs.iter();
                points
                    .filter_map(|(x, run)| Some((at(*x, run), of(run)?)))
                    .collect()
            };
            latency.push((
                format!("{target} p50"),
                line(|run| Some(run.latency_us.p50)),
            ));
            latency.push((
                format!("{target} p99"),
                line(|run| Some(run.latency_us.p99)),
            ));
            let used = line(summary::hop_cpu);
            if !used.is_empty() {
                cpu.push((target.to_owned(), used));
            }
        }
        let unit = match name {
            sweep::LOAD => "calls/s",
            "payload" => "B",
            _ => "",
        };
        let title = format!("Latency, p50 and p99, by {name}");
        let picture = svg::lines(&latency, unit);
        pictures.insert(format!("0-sweep-{name}"), (title, picture));
        if !cpu.is_empty() {
            let title = format!("CPU per request and hop, by {name}");
            let picture = svg::lines(&cpu, unit);
            pictures.insert(format!("0-sweep-{name}-cpu"), (title, picture));
        }
    }
}

fn pictures(results: &Results) -> Pictures {
    let mut pictures = Pictures::new();
    sweep_pictures(results, &mut pictures);
    throughput_picture(results, &mut pictures);
    let cells = summary::cells(&results.runs);
    let mut loads: Vec<&str> = cells.iter().map(|cell| cell.load).collect();
    loads.dedup();
    for (number, load) in loads.iter().enumerate() {
        let cells: Vec<&Cell<'_>> = cells.iter().filter(|cell| cell.load == *load).collect();
        let curves: Vec<_> = cells
            .iter()
            .map(|cell| (cell.target.to_owned(), merged(cell)))
            .collect();
        let picture = svg::percentiles(&curves);
        pictures.insert(
            format!("1-percentiles-{number:02}"),
            (format!("Latency by percentile: {load}"), picture),
        );
        let cpu = bars(&cells, summary::hop_cpu);
        if !cpu.is_empty() {
            let picture = svg::bars(&cpu, "µs");
            pictures.insert(
                format!("2-cpu-{number:02}"),
                (format!("CPU µs per request and hop: {load}"), picture),
            );
        }
    }
    let memory = memory(&cells);
    if !memory.is_empty() {
        let title = "Resident memory per proxy, MiB".to_owned();
        pictures.insert("3-memory".to_owned(), (title, svg::bars(&memory, "MiB")));
    }
    for (number, run) in results.runs.iter().enumerate() {
        let title = format!(
            "{}: {} (repetition {})",
            run.load.name, run.target, run.repetition
        );
        pictures.insert(
            format!("4-time-{number:03}"),
            (title, svg::heat(&run.timeline)),
        );
    }
    pictures
}

fn merged(cell: &Cell<'_>) -> Vec<(f64, u64)> {
    let mut all: Vec<(f64, u64)> = cell
        .runs
        .iter()
        .flat_map(|run| run.histogram.iter().copied())
        .collect();
    all.sort_by(|left, right| left.0.total_cmp(&right.0));
    all
}

fn bars(cells: &[&Cell<'_>], of: fn(&Run) -> Option<f64>) -> Vec<(String, Spread)> {
    let bars = cells.iter().filter_map(|cell| {
        let spread = Spread::of(cell.runs.iter().filter_map(|run| of(run)))?;
        Some((cell.target.to_owned(), spread))
    });
    bars.collect()
}

/// Idle and highest memory of each target over every load.
#[expect(clippy::cast_precision_loss, reason = "memory below 2^53 KiB")]
fn memory(cells: &[Cell<'_>]) -> Vec<(String, Spread)> {
    let mut bars: Vec<(String, Vec<f64>)> = Vec::new();
    let processes = cells.iter().flat_map(|cell| {
        let processes = cell.runs.iter().flat_map(|run| &run.processes);
        processes.map(|process| (cell.target, process))
    });
    for (target, process) in processes {
        let figures = [
            ("idle", process.rss_idle_kib),
            ("peak", process.rss_peak_kib),
        ];
        for (word, kib) in figures {
            let name = format!("{target} {word}");
            let mib = kib as f64 / 1024.0;
            match bars.iter_mut().find(|(known, _)| *known == name) {
                Some((_, samples)) => samples.push(mib),
                None => bars.push((name, vec![mib])),
            }
        }
    }
    let spread = |(name, samples): (String, Vec<f64>)| Some((name, Spread::of(samples)?));
    bars.into_iter().filter_map(spread).collect()
}

fn page(results: &Results, pictures: &Pictures) -> String {
    let mut sections = vec![format!(
        "<h1>What it costs</h1><p class=\"soft\">{} · {} · {} cores, {} MiB · Linux {} {} · load average {}</p>",
        escape(&results.created),
        escape(&results.machine.cpu),
        results.machine.cores,
        results.machine.memory_mib,
        escape(&results.machine.kernel),
        escape(&results.machine.architecture),
        escape(&results.machine.load_average),
    )];
    if results.kind == "compare" {
        sections.push(list(&plain::words(results)));
    }
    sections.extend(
        results
            .notes
            .iter()
            .map(|note| format!("<p class=\"note\">{}</p>", escape(note))),
    );
    sections.extend(doubts(&results.runs));
    if !results.goals.is_empty() {
        sections
            .push("<h2>Targets: Sidegate over Envoy's best mode in the same run</h2>".to_owned());
        sections.push(html(&table::goal_rows(&results.goals)));
    }
    if !results.knees.is_empty() {
        let knees: Vec<String> = results.knees.iter().map(sweep::knee).collect();
        sections.push("<h2>The knee</h2>".to_owned());
        sections.push(list(&knees));
    }
    if !results.ratios.is_empty() {
        sections.push("<h2>Against the peer's best mode</h2>".to_owned());
        sections.push(html(&table::ratio_rows(&results.ratios)));
    }
    sections.push("<h2>Figures</h2>".to_owned());
    sections.push(html(&table::cell_rows(&results.runs)));
    for (_, (title, svg)) in pictures.iter().filter(|(name, _)| !name.starts_with('4')) {
        sections.push(format!("<h3>{}</h3>{svg}", escape(title)));
    }
    sections.push("<h2>Over time</h2><p class=\"soft\">Calls by intended start and latency: a stall is a slope.</p>".to_owned());
    for (_, (title, svg)) in pictures.iter().filter(|(name, _)| name.starts_with('4')) {
        sections.push(format!(
            "<details{}><summary>{}</summary>{svg}</details>",
            if results.runs.len() == 1 { " open" } else { "" },
            escape(title)
        ));
    }
    sections.push("<h2>Every run</h2>".to_owned());
    sections.push(html(&table::run_rows(&results.runs)));
    sections.push(facts(results));
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\"><title>sidegate-loadtest</title><style>{STYLE}{}</style></head><body>{}</body></html>\n",
        svg::STYLE,
        sections.concat()
    )
}

fn list(sentences: &[String]) -> String {
    let items = sentences.iter();
    let items: Vec<String> = items
        .map(|words| format!("<li>{}</li>", escape(words)))
        .collect();
    if items.is_empty() {
        return String::new();
    }
    format!("<ul>{}</ul>", items.concat())
}

fn doubts(runs: &[Run]) -> Vec<String> {
    let doubtful = runs
        .iter()
        .filter(|run| !run.verdict.conclusive || !run.verdict.warnings.is_empty());
    let note = |run: &Run| {
        let mut said: Vec<String> = run.verdict.reasons.clone();
        said.extend(run.verdict.warnings.iter().cloned());
        let class = if run.verdict.conclusive {
            "note"
        } else {
            "note bad"
        };
        let word = if run.verdict.conclusive {
            ""
        } else {
            "no conclusion on latency and throughput: "
        };
        format!(
            "<p class=\"{class}\">{} {} #{}: {word}{}</p>",
            escape(&run.target),
            escape(&run.load.name),
            run.repetition,
            escape(&said.join("; "))
        )
    };
    let notes: Vec<String> = doubtful.map(note).collect();
    if notes.len() <= 3 {
        return notes;
    }
    let count = notes.len();
    vec![format!(
        "<details><summary>{count} of {} runs carry a warning</summary>{}</details>",
        runs.len(),
        notes.concat()
    )]
}

fn facts(results: &Results) -> String {
    let command = results.command.join(" ");
    let versions: Vec<String> = results
        .versions
        .iter()
        .map(|(name, version)| format!("{name} {version}"))
        .collect();
    let text = format!(
        "<h2>How it was measured</h2><pre>{}</pre><pre>{}</pre><p class=\"soft\">{} The same figures, and every histogram, are in results.json beside this page.</p>",
        escape(&command),
        escape(&versions.join("\n")),
        escape(verdict::RULES),
    );
    let configurations = results.configurations.iter().map(|(name, text)| {
        let (name, text) = (escape(name), escape(text));
        format!("<details><summary>{name}</summary><pre>{text}</pre></details>")
    });
    std::iter::once(text).chain(configurations).collect()
}

fn html(rows: &[Vec<String>]) -> String {
    let row = |tag: &str, cells: &Vec<String>| {
        let cells: Vec<String> = cells
            .iter()
            .map(|cell| format!("<{tag}>{}</{tag}>", escape(cell)))
            .collect();
        format!("<tr>{}</tr>", cells.concat())
    };
    let mut rows = rows.iter();
    let head = rows
        .next()
        .map_or_else(String::new, |cells| row("th", cells));
    let body: Vec<String> = rows.map(|cells| row("td", cells)).collect();
    format!(
        "<div class=\"scroll\"><table>{head}{}</table></div>",
        body.concat()
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_is_self_contained_and_escapes_what_it_is_told() {
        let mut results = Results::new("run", Vec::new());
        results.command = vec!["--url".into(), "http://x/<script>".into()];
        let page = page(&results, &pictures(&results));
        assert!(page.contains("&lt;script&gt;") && !page.contains("<script"));
        let fetched = ["src=", "href=", "@import", "url("];
        assert!(fetched.iter().all(|word| !page.contains(word)));
    }
}
