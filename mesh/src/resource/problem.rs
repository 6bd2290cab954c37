//! What is wrong with a resource, where, and what to write instead.
//!
//! Invariant: the validating command, a watched folder and a cluster's webhook say the same,
//! because all of them print this.

use std::fmt;

use serde::Serialize;

use super::ResourceKey;

/// Whether a resource is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// It is refused.
    Error,
    /// It is accepted, but it is probably not what was meant.
    Warning,
}

/// One thing that is wrong. Displayed as `file:line:column: message; help`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Problem {
    /// The file's path as it was given; empty when the resource came from no file.
    pub file: String,
    /// The line, counted from 1; 0 when there is none.
    pub line: usize,
    /// The column in characters, counted from 1; 0 when there is none.
    pub column: usize,
    /// The resource, when as much could be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resource: Option<ResourceKey>,
    /// The field: `spec.rules[0].to[1].http.methods`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// What is wrong.
    pub message: String,
    /// What to write instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
    /// Whether the resource is refused.
    pub severity: Severity,
}

impl Problem {
    /// An error about a whole file.
    pub fn of_file(file: &str, message: impl Into<String>, help: impl Into<String>) -> Self {
        Self {
            file: file.to_owned(),
            line: 1,
            column: 1,
            resource: None,
            field: None,
            message: message.into(),
            help: Some(help.into()),
            severity: Severity::Error,
        }
    }

    /// A warning about a resource that was accepted; its place in a file is found later (see
    /// [`super::Located::locate`]).
    pub fn warning(
        resource: ResourceKey,
        field: impl Into<String>,
        message: impl Into<String>,
        help: impl Into<String>,
    ) -> Self {
        Self {
            file: String::new(),
            line: 0,
            column: 0,
            resource: Some(resource),
            field: Some(field.into()),
            message: message.into(),
            help: Some(help.into()),
            severity: Severity::Warning,
        }
    }

    /// What is wrong and what to do, as `message; help`.
    pub fn words(&self) -> String {
        match &self.help {
            Some(help) => format!("{}; {help}", self.message),
            None => self.message.clone(),
        }
    }

    /// The same with its field, `field: message; help`, for an object that is in no file: a place
    /// in a text that nobody wrote says nothing.
    pub fn sentence(&self) -> String {
        match &self.field {
            Some(field) => format!("{field}: {}", self.words()),
            None => self.words(),
        }
    }

    /// Whether the resource is refused.
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.file.is_empty() {
            write!(f, "{}:", self.file)?;
        }
        if self.line > 0 {
            write!(f, "{}:{}: ", self.line, self.column)?;
        } else if let Some(resource) = &self.resource {
            write!(f, "{resource}: ")?;
        }
        if self.severity == Severity::Warning {
            f.write_str("warning: ")?;
        }
        f.write_str(&self.words())
    }
}

/// What is wrong with one value, before it is known where it stands. Its text is `message; help`:
/// the decoder takes it apart again at the first `; `, and any other deserializer shows it whole.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}; {help}")]
pub(crate) struct Invalid {
    /// What is wrong; without `; `.
    pub message: String,
    /// What to write instead.
    pub help: String,
}

impl Invalid {
    pub(crate) fn new(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self {
            message: message.into().replace("; ", ", "),
            help: help.into(),
        }
    }
}
