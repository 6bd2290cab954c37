//! `sidegate validate`: checks resource files without a mesh.
//!
//! Invariant: it reads the files that a watched folder would, and says what a sidecar would say.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, ValueEnum};
use sidegate_mesh::validate::{Report, validate};

/// Deepest folder within folders.
const DEPTH_MAX: usize = 8;

/// Exit code: everything was good.
const DONE: u8 = 0;
/// Exit code: there are problems.
const FAILED: u8 = 1;
/// Exit code: a path that was named is not there.
const WRONG_USAGE: u8 = 2;

/// Checks resource files offline: unknown fields, impossible rules, rules that can never match.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  sidegate validate resources/
  sidegate validate policies.yaml services.yaml -o json")]
pub(crate) struct ValidateArgs {
    /// Files, or folders of .yaml, .yml and .json files; checked together.
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// How problems are printed.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
    /// Fail on warnings too.
    #[arg(long)]
    deny_warnings: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    /// One line a problem, `file:line:column` first.
    Table,
    /// One JSON object.
    Json,
    /// One YAML document.
    Yaml,
}

/// Prints what is wrong. Returns the exit code: 0 when nothing is, 1 when something is, 2 when a
/// path is not there.
///
/// # Errors
///
/// When the report can't be printed.
pub(crate) fn run(args: &ValidateArgs) -> anyhow::Result<u8> {
    let mut paths = BTreeSet::new();
    for path in &args.paths {
        if let Err(error) = find(path, &mut paths) {
            writeln!(io::stderr(), "error: {}: {error}", path.display())?;
            return Ok(WRONG_USAGE);
        }
    }
    let files: Vec<_> = paths
        .iter()
        .map(|path| (path.display().to_string(), read(path)))
        .collect();
    let report = validate(&files);
    let text = print(&report, args.output)?;
    write_all(&text)?;
    let counts = summary(&report);
    writeln!(io::stderr(), "{counts}")?;
    let is_good = report.errors() == 0 && !(args.deny_warnings && report.warnings() > 0);
    Ok(if is_good { DONE } else { FAILED })
}

fn write_all(text: &str) -> anyhow::Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        // Whoever reads may stop when it has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("the report can't be printed"),
    }
}

fn print(report: &Report, output: Output) -> anyhow::Result<String> {
    let mut text = String::new();
    match output {
        Output::Table => {
            for problem in &report.problems {
                writeln!(text, "{problem}")?;
            }
        }
        Output::Json => {
            text = serde_json::to_string_pretty(report)?;
            text.push('\n');
        }
        Output::Yaml => text = serde_saphyr::to_string(report)?,
    }
    Ok(text)
}

fn summary(report: &Report) -> String {
    let count = |number: usize, thing: &str| match number {
        1 => format!("1 {thing}"),
        _ => format!("{number} {thing}s"),
    };
    format!(
        "{}, {}: {}, {}",
        count(report.files, "file"),
        count(report.resources, "good resource"),
        count(report.errors(), "error"),
        count(report.warnings(), "warning"),
    )
}

fn read(path: &Path) -> Result<String, String> {
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    String::from_utf8(bytes).map_err(|_utf8| "it is not UTF-8 text".to_owned())
}

/// Adds a file, or the resource files of a folder.
fn find(path: &Path, found: &mut BTreeSet<PathBuf>) -> io::Result<()> {
    if !std::fs::metadata(path)?.is_dir() {
        found.insert(path.to_owned());
        return Ok(());
    }
    let before = found.len();
    find_in(path, 0, found)?;
    if found.len() == before {
        let kind = io::ErrorKind::NotFound;
        return Err(io::Error::new(
            kind,
            "the folder has no .yaml, .yml or .json file",
        ));
    }
    Ok(())
}

fn find_in(folder: &Path, depth: usize, found: &mut BTreeSet<PathBuf>) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let path = entry.path();
        match std::fs::metadata(&path) {
            Ok(kind) if kind.is_dir() && depth < DEPTH_MAX => find_in(&path, depth + 1, found)?,
            Ok(kind) if kind.is_dir() => {}
            _ if sidegate_mesh::resource::is_resource_file(&path) => drop(found.insert(path)),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "apiVersion: sidegate.dev/v1alpha1\nkind: StaticService\nmetadata: { name: a, namespace: b }\nspec: { ports: [{ port: 80 }], endpoints: [] }\n";

    fn check(files: &[(&str, &str)], path: &str, code: u8) -> Report {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let file = folder.path().join(name);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, text).unwrap();
        }
        let path = folder.path().join(path);
        let args = ValidateArgs {
            paths: vec![path.clone()],
            output: Output::Table,
            deny_warnings: false,
        };
        assert_eq!(run(&args).unwrap(), code);
        let mut paths = BTreeSet::new();
        drop(find(&path, &mut paths));
        let files: Vec<_> = paths
            .iter()
            .map(|path| (path.display().to_string(), read(path)))
            .collect();
        validate(&files)
    }

    #[test]
    fn a_folder_is_read_as_a_sidecar_reads_it() {
        let files = [
            ("a.yaml", GOOD),
            ("in/b.json", r#"{"kind":"x"}"#),
            ("in/.hidden.yaml", "x: ["),
            ("notes.txt", "x: ["),
        ];
        let report = check(&files, "", 1);
        assert_eq!((report.files, report.resources, report.errors()), (2, 1, 1));
    }

    #[test]
    fn the_exit_code_tells_good_from_bad_from_wrong_usage() {
        check(&[("a.yaml", GOOD)], "a.yaml", 0);
        check(&[("a.yaml", "")], "a.yaml", 1);
        check(&[("a.yaml", GOOD)], "b.yaml", 2);
        check(&[("a.txt", GOOD)], "", 2);
    }

    #[test]
    fn each_output_has_every_problem() {
        let files = [("a.yaml".to_owned(), Ok("kind: [".to_owned()))];
        let report = validate(&files);
        let table = print(&report, Output::Table).unwrap();
        assert!(table.starts_with("a.yaml:1:7: this is not YAML"), "{table}");
        let json: serde_json::Value =
            serde_json::from_str(&print(&report, Output::Json).unwrap()).unwrap();
        assert_eq!(json["problems"][0]["column"], 7);
        let yaml: serde_json::Value =
            serde_saphyr::from_str(&print(&report, Output::Yaml).unwrap()).unwrap();
        assert_eq!(json, yaml);
        assert_eq!(
            summary(&report),
            "1 file, 0 good resources: 1 error, 0 warnings"
        );
    }
}
