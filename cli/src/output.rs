//! How data is printed: tables for people, JSON and YAML for programs.
//!
//! Invariant: data goes to standard output, everything else to standard error.

use std::io::{self, Write};

use serde::Serialize;

/// `-o`: the form in which data is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// Columns for people.
    #[default]
    Table,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
}

impl Format {
    /// Prints `data` as one JSON or YAML document; a table is the caller's own matter, so that it
    /// is printed as JSON here.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub(crate) fn print(self, out: &mut impl Write, data: &impl Serialize) -> anyhow::Result<()> {
        match self {
            Self::Yaml => write!(out, "{}", serde_saphyr::to_string(data)?)?,
            Self::Table | Self::Json => writeln!(out, "{}", serde_json::to_string_pretty(data)?)?,
        }
        Ok(())
    }
}

/// Prints `header` and `rows` in columns that are as wide as they must be, two spaces apart.
///
/// # Errors
///
/// When it cannot be written.
pub(crate) fn print_table(
    out: &mut impl Write,
    header: &[&str],
    rows: impl IntoIterator<Item = Vec<String>>,
) -> io::Result<()> {
    let mut table = vec![
        header
            .iter()
            .map(|&name| name.to_owned())
            .collect::<Vec<_>>(),
    ];
    table.extend(rows);
    let width = |column: usize| {
        let cells = table.iter().filter_map(|row| row.get(column));
        cells
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or_default()
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    for row in &table {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', width + 2 - cell.chars().count()));
        }
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut out = Vec::new();
        let rows = [
            vec!["a".to_owned(), "long cell".to_owned()],
            vec!["wider".to_owned(), "b".to_owned()],
        ];
        print_table(&mut out, &["X", "Y"], rows).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "X      Y\na      long cell\nwider  b\n"
        );
    }
}
