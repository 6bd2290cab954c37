//! What a check found, and how it is printed.
//!
//! Invariant: what is not well carries a remedy.

use serde::Serialize;
use std::fmt::Write as _;

/// How well something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Level {
    /// As it should be.
    Well,
    /// May be meant, or will hurt later.
    Look,
    /// Does not work, or protects nothing.
    Wrong,
}

/// The outcome of one check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    pub(super) level: Level,
    /// What was checked.
    pub(super) check: &'static str,
    pub(super) message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) remedy: Option<String>,
}

/// Names that are listed before the rest is counted.
const NAMES_MAX: usize = 5;

impl Finding {
    pub(super) fn well(check: &'static str, message: impl Into<String>) -> Self {
        Self {
            level: Level::Well,
            check,
            message: message.into(),
            remedy: None,
        }
    }

    pub(super) fn look(
        check: &'static str,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            level: Level::Look,
            check,
            message: message.into(),
            remedy: Some(remedy.into()),
        }
    }

    pub(super) fn wrong(
        check: &'static str,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            level: Level::Wrong,
            ..Self::look(check, message, remedy)
        }
    }
}

/// Some names, and how many more there are.
pub(super) fn names<S: AsRef<str>>(all: &[S]) -> String {
    let shown: Vec<&str> = all.iter().take(NAMES_MAX).map(AsRef::as_ref).collect();
    let more = all.len().saturating_sub(NAMES_MAX);
    match more {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// One line a check, and its remedy below it.
pub(super) fn to_text(findings: &[Finding], coloured: bool) -> String {
    let width = findings.iter().map(|it| it.check.chars().count()).max();
    let width = width.unwrap_or_default();
    let mut text = String::new();
    for finding in findings {
        let (mark, colour) = match finding.level {
            Level::Well => ('✔', "32"),
            Level::Look => ('‼', "33"),
            Level::Wrong => ('✘', "31"),
        };
        let mark = if coloured {
            format!("\u{1b}[{colour}m{mark}\u{1b}[0m")
        } else {
            mark.to_string()
        };
        let (check, message) = (finding.check, &finding.message);
        let _written = writeln!(text, "{mark} {check:<width$}  {}", one_line(message));
        if let Some(remedy) = &finding.remedy {
            let _written = writeln!(text, "  {:<width$}  → {}", "", one_line(remedy));
        }
    }
    text
}

/// Objects' own words may hold anything; a check is one line, and no terminal's command.
fn one_line(text: &str) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_is_one_line_and_its_remedy_another() {
        let findings = [
            Finding::well("version", "v1.34.4"),
            Finding::wrong("pod security", "shop\nrefuses \u{1b}[2J", "label it"),
        ];
        assert_eq!(
            to_text(&findings, false),
            "✔ version       v1.34.4\n\
             ✘ pod security  shop refuses  [2J\n\
             \u{20}               → label it\n"
        );
        assert!(to_text(&findings, true).starts_with("\u{1b}[32m✔\u{1b}[0m version"));
    }

    #[test]
    fn a_long_list_is_cut_and_counted() {
        assert_eq!(names(&["a", "b"]), "a, b");
        assert_eq!(names(&["a"; 8]), "a, a, a, a, a and 3 more");
    }
}
