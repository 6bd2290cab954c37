//! What the documentation names, held against the code that has it.
//!
//! Sources are read as text: a name that a page has and no code, or the other way round, is found
//! without building what it belongs to.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    root.unwrap().to_owned()
}

fn read(path: &str) -> String {
    let text = std::fs::read_to_string(root().join(path));
    text.unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The files below a folder with this extension; none where there is no folder.
fn files_below(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .flat_map(|path| match path.extension() {
            _ if path.is_dir() => files_below(&path, extension),
            Some(found) if found == extension => vec![path],
            _ => Vec::new(),
        })
        .collect()
}

/// The text of every Rust file of one crate.
fn sources_of(folder: &Path) -> String {
    let folders = ["src", "tests"].map(|part| files_below(&folder.join(part), "rs"));
    let texts = folders.iter().flatten();
    texts
        .map(|path| std::fs::read_to_string(path).unwrap())
        .collect()
}

/// The text of every Rust file of ours.
fn sources() -> String {
    let entries = std::fs::read_dir(root()).unwrap();
    let folders = entries.map(|entry| entry.unwrap().path());
    folders
        .filter(|folder| folder.join("Cargo.toml").exists())
        .map(|folder| sources_of(&folder))
        .collect()
}

/// Each page of the documentation.
fn pages() -> Vec<(PathBuf, String)> {
    let mut paths = files_below(&root().join("docs"), "md");
    paths.extend(["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"].map(|name| root().join(name)));
    paths.sort();
    let text = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).unwrap();
        (path, text)
    };
    paths.into_iter().map(text).collect()
}

/// Every word of these characters that begins with `prefix`, whole.
fn words<'a>(text: &'a str, prefix: &str, is_part: fn(char) -> bool) -> BTreeSet<&'a str> {
    let starts = text.match_indices(prefix).map(|(at, _)| at);
    let whole =
        |at: &usize| !text[..*at].ends_with(|before: char| is_part(before) || before == '/');
    starts
        .filter(whole)
        .map(|at| {
            let rest = &text[at + prefix.len()..];
            let end = rest.find(|c: char| !is_part(c)).unwrap_or(rest.len());
            &text[at..at + prefix.len() + end]
        })
        .collect()
}

/// What is between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The reason codes of a source: the words that its functions `code` give.
fn codes(path: &str) -> BTreeSet<String> {
    let text = read(path);
    let functions = text.split("fn code(").skip(1);
    let bodies = functions.map(|function| function.split("\n    }\n").next().unwrap());
    let words = bodies.flat_map(|body| body.split("=> \"").skip(1));
    words
        .map(|word| word.split('"').next().unwrap().to_owned())
        .collect()
}

/// The codes in the first cells of the first table behind `heading`.
fn table(path: &str, heading: &str) -> BTreeSet<String> {
    let text = read(path);
    let (_, behind) = text.split_once(heading).expect(heading);
    let lines = behind.lines().skip_while(|line| !line.starts_with("|---"));
    let rows = lines.skip(1).take_while(|line| line.starts_with('|'));
    rows.flat_map(|row| {
        let cell = row.trim_start_matches('|').split(" | ").next().unwrap();
        quoted(cell).map(str::to_owned).collect::<Vec<_>>()
    })
    .collect()
}

#[test]
fn every_error_code_of_a_sidecar_is_explained_and_there_is_no_other() {
    let known = codes("proxy/src/error.rs");
    assert!(known.len() > 15, "the codes are not read: {known:?}");
    assert_eq!(known, table("docs/errors.md", "# Error codes"));
}

#[test]
fn every_reason_of_a_failed_handshake_is_explained_and_there_is_no_other() {
    let mut known = codes("mtls/src/verify.rs");
    known.extend(codes("mtls/src/handshake.rs"));
    assert!(known.len() > 30, "the codes are not read: {known:?}");
    assert_eq!(known, table("docs/errors.md", "## Handshakes"));
}

#[test]
fn every_refusal_of_the_ca_in_a_cluster_is_explained() {
    let said = table("docs/ca-in-a-cluster.md", "## Refusals");
    let known = codes("ca/src/kubernetes/attest.rs");
    assert!(known.len() > 20, "the codes are not read: {known:?}");
    let silent: Vec<_> = known.difference(&said).collect();
    assert!(silent.is_empty(), "not explained: {silent:?}");
    let sources = sources_of(&root().join("ca"));
    let invented = said
        .iter()
        .filter(|code| !sources.contains(&format!("\"{code}\"")));
    assert_eq!(invented.collect::<Vec<_>>(), Vec::<&String>::new());
}

/// Whether some part of the control plane, or the sidecar, counts under this name.
fn is_metric(name: &str) -> bool {
    let name = name.strip_suffix("_total").unwrap_or(name);
    let sidecars = format!("\"{name}\"");
    let of_part = |part: &&str| {
        let own = name.strip_prefix(&format!("sidegate_{part}_"));
        let metrics = || read(&format!("{part}/src/metrics.rs"));
        own.is_some_and(|own| metrics().contains(&format!("\"{own}\"")))
    };
    sources_of(&root().join("proxy")).contains(&sidecars)
        || ["ca", "controller", "injector"].iter().any(of_part)
}

#[test]
fn every_metric_that_a_page_names_is_counted() {
    let is_part = |c: char| c.is_ascii_lowercase() || c == '_';
    let mut seen = 0;
    for (path, text) in pages() {
        for name in words(&text, "sidegate_", is_part) {
            assert!(is_metric(name), "{}: {name}", path.display());
            seen += 1;
        }
    }
    assert!(seen > 10, "only {seen} names were found");
}

#[test]
fn every_label_and_annotation_that_a_page_names_is_known() {
    let sources = sources();
    let is_part = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let mut seen = 0;
    for (path, text) in pages() {
        for key in words(&text, "sidegate.dev/", is_part) {
            let name = key
                .trim_end_matches('-')
                .trim_start_matches("sidegate.dev/");
            let known = sources.contains(&format!("\"{name}\""))
                || sources.contains(&format!("sidegate.dev/{name}\""));
            assert!(name.is_empty() || known, "{}: {key}", path.display());
            seen += 1;
        }
    }
    assert!(seen > 15, "only {seen} keys were found");
}

/// The anchor of a heading, as pages are linked to.
fn anchor(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = text
        .chars()
        .filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn every_link_between_pages_leads_somewhere() {
    let mut seen = 0;
    for (path, text) in pages() {
        let links = text.split("](").skip(1);
        for link in links.filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") {
                continue;
            }
            let (file, place) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => path.clone(),
                file => path.parent().unwrap().join(file),
            };
            let shown = format!("{}: {link}", path.display());
            assert!(target.exists(), "{shown}");
            if !place.is_empty() {
                let page = std::fs::read_to_string(&target).unwrap();
                let mut headings = page.lines().filter(|line| line.starts_with('#'));
                assert!(headings.any(|line| anchor(line) == place), "{shown}");
            }
            seen += 1;
        }
    }
    assert!(seen > 20, "only {seen} links were found");
}

#[test]
fn every_test_that_the_architecture_names_exists() {
    let page = read("ARCHITECTURE.md");
    let (_, invariants) = page.split_once("## Invariants").unwrap();
    // The last column of each row.
    let named: BTreeSet<&str> = invariants
        .lines()
        .filter_map(|line| line.strip_suffix(" |")?.rsplit(" | ").next())
        .flat_map(quoted)
        .collect();
    assert!(named.len() > 30, "the table is not read: {named:?}");
    let sources = sources();
    // `topic.check` is one on a cluster.
    let missing: Vec<&&str> = named
        .iter()
        .filter(|name| match name.split_once('.') {
            Some((topic, check)) => {
                let file = root()
                    .join("e2e/kubernetes")
                    .join(topic)
                    .with_extension("py");
                let text = std::fs::read_to_string(file).unwrap_or_default();
                !text.contains(&format!("@check\ndef {check}(cluster)"))
            }
            None => !sources.contains(&format!("fn {name}(")),
        })
        .collect();
    assert_eq!(
        missing,
        Vec::<&&str>::new(),
        "ARCHITECTURE.md names tests that are gone"
    );
}
