//! A fault in a document, on its way out: where it is becomes known step by step.
//!
//! Invariant: the innermost place that is known stays; the path grows outwards.

use std::fmt;

use serde::de;

use super::suggest::{nearest, one_of};

/// A place in a text: line and column, both counted from 1, the column in characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Mark {
    pub line: u32,
    pub column: u32,
}

/// One step from a value into it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Key(String),
    Index(usize),
}

/// What is wrong, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub at: Option<Mark>,
    /// From the innermost step outwards.
    pub path: Vec<Step>,
    pub message: String,
    pub help: Option<String>,
}

impl Fault {
    pub(crate) fn new(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self {
            at: None,
            path: Vec::new(),
            message: message.into(),
            help: Some(help.into()),
        }
    }

    /// Says where it is, if nothing further inside has said so.
    pub(crate) fn at(mut self, mark: Mark) -> Self {
        self.at.get_or_insert(mark);
        self
    }

    /// Says what it is in.
    pub(crate) fn within(mut self, step: Step) -> Self {
        self.path.push(step);
        self
    }

    /// The path as text, `spec.rules[0].to`; `None` for the document itself.
    pub(crate) fn field(&self) -> Option<String> {
        (!self.path.is_empty()).then(|| path_text(self.path.iter().rev()))
    }
}

/// A path as text: `spec.rules[0].to`, or `metadata.labels["app.kubernetes.io/name"]`.
pub(crate) fn path_text<'a>(steps: impl Iterator<Item = &'a Step>) -> String {
    let plain = |key: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        !key.is_empty() && key.chars().all(allowed)
    };
    let mut text = String::new();
    for step in steps {
        match step {
            Step::Key(key) if plain(key) && text.is_empty() => text.push_str(key),
            Step::Key(key) if plain(key) => text = format!("{text}.{key}"),
            Step::Key(key) => text = format!("{text}[{key:?}]"),
            Step::Index(index) => text = format!("{text}[{index}]"),
        }
    }
    text
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.help {
            Some(help) => write!(f, "; {help}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Fault {}

impl de::Error for Fault {
    fn custom<T: fmt::Display>(text: T) -> Self {
        let text = text.to_string();
        let (message, help) = match text.split_once("; ") {
            Some((message, help)) => (message.to_owned(), Some(help.to_owned())),
            None => (text, None),
        };
        Self {
            at: None,
            path: Vec::new(),
            message,
            help,
        }
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        let help = match (nearest(field, expected), expected) {
            (Some(word), _) => format!("did you mean `{word}`?"),
            (None, []) => "write `{}`".to_owned(),
            (None, _) => format!("possible here: {}", one_of(expected)),
        };
        Self::new(format!("unknown field `{}`", shown(field)), help)
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        let help = match nearest(variant, expected) {
            Some(word) => format!("did you mean `{word}`?"),
            None => format!("possible here: {}", one_of(expected)),
        };
        Self::new(format!("`{}` is not possible here", shown(variant)), help)
    }

    fn missing_field(field: &'static str) -> Self {
        Self::new(format!("`{field}` is missing"), help_if_missing(field))
    }
}

/// What to write for a field that has no default.
fn help_if_missing(field: &str) -> &'static str {
    match field {
        "apiVersion" => "write `apiVersion: sidegate.dev/v1alpha1`",
        "metadata" => "write `metadata: { name: …, namespace: … }`",
        "namespace" => "name the namespace that it belongs to",
        "selector" => {
            "write `selector: { matchLabels: { … } }`, or `selector: {}` for every workload of the namespace"
        }
        "action" => "write `action: Allow` or `action: Deny`",
        "from" => "name the callers; `from: [{ anyone: {} }]` is any identity of the mesh",
        "to" => "name the calls; `to: [{ anything: {} }]` is all of them, on the policy's `ports`",
        "methods" => "name the methods; `methods: [\"*\"]` is every method",
        "paths" => "name the paths; `paths: [\"/**\"]` is every path",
        "rules" => "write at least one rule",
        _ => "add it",
    }
}

/// What was written, cut to what fits into a message.
pub(crate) fn shown(text: &str) -> String {
    const SHOWN_CHARS_MAX: usize = 60;
    let mut chars = text.chars();
    let mut cut: String = chars.by_ref().take(SHOWN_CHARS_MAX).collect();
    if chars.next().is_some() {
        cut.push('…');
    }
    cut.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}
