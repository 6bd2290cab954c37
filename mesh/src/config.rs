//! How a program of the control plane reads its configuration: one YAML file, once.
//!
//! Invariant: an unknown field or an impossible value is an error that names the file or the field,
//! and says what to write instead.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::yaml;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The configuration file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not the YAML that is expected.
    #[error("{message}")]
    Syntax {
        /// `FILE:LINE:COLUMN: message`.
        message: String,
    },
    /// A value is impossible.
    #[error("{field}: {problem}; {help}")]
    Value {
        /// Name of the field, as in the file.
        field: Cow<'static, str>,
        /// What is wrong.
        problem: Cow<'static, str>,
        /// What to write instead.
        help: &'static str,
    },
}

impl ConfigError {
    /// A value that is impossible.
    pub fn value(
        field: impl Into<Cow<'static, str>>,
        problem: impl Into<Cow<'static, str>>,
        help: &'static str,
    ) -> Self {
        Self::Value {
            field: field.into(),
            problem: problem.into(),
            help,
        }
    }
}

/// Reads a YAML file; its values are still to be checked.
///
/// # Errors
///
/// [`ConfigError::Read`] and [`ConfigError::Syntax`].
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })?;
    serde_saphyr::from_str(&text).map_err(|error| ConfigError::Syntax {
        message: yaml::syntax_error(&path.display().to_string(), &error),
    })
}

/// Whether each of these fields is large enough for the program to serve anybody.
///
/// # Errors
///
/// [`ConfigError::Value`] for the first that is not.
pub fn check_enough(fields: &[(&'static str, bool)]) -> Result<(), ConfigError> {
    match fields.iter().find(|(_, enough)| !enough) {
        None => Ok(()),
        Some((field, _)) => Err(ConfigError::value(
            *field,
            "the value is too small to serve anybody",
            "leave it out to use the default",
        )),
    }
}
