//! The three ways in which data is printed: a table for people, JSON and YAML for programs.
//!
//! Invariant: the three say the same, except that a table leaves out what only programs compare.

use std::fmt::Write;

use serde_json::{Map, Value};
use sidegate_ca::authority::unix_moment;

use crate::cli::Format;

/// Named values in the order in which they are shown.
#[derive(Clone, Default)]
pub(crate) struct Row {
    cells: Vec<Cell>,
}

#[derive(Clone)]
struct Cell {
    name: &'static str,
    value: Value,
    in_table: bool,
}

/// What a command prints.
pub(crate) enum Output {
    /// One thing with its properties.
    One(Row),
    /// A list of things of one kind.
    Many(Vec<Row>),
}

impl Row {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn text(self, name: &'static str, value: String) -> Self {
        self.cell(name, value.into(), true)
    }

    /// Left out of a table.
    pub(crate) fn detail(self, name: &'static str, value: String) -> Self {
        self.cell(name, value.into(), false)
    }

    pub(crate) fn number(self, name: &'static str, value: u64) -> Self {
        self.cell(name, value.into(), true)
    }

    pub(crate) fn flag(self, name: &'static str, value: bool) -> Self {
        self.cell(name, value.into(), true)
    }

    pub(crate) fn time(self, name: &'static str, unix_seconds: u64) -> Self {
        let moment = humantime::format_rfc3339_seconds(unix_moment(unix_seconds));
        self.cell(name, moment.to_string().into(), true)
    }

    pub(crate) fn list(self, name: &'static str, values: Vec<String>) -> Self {
        self.cell(name, values.into(), true)
    }

    pub(crate) fn rows(self, name: &'static str, rows: &[Self]) -> Self {
        let rows: Vec<Value> = rows.iter().map(Self::value).collect();
        self.cell(name, rows.into(), true)
    }

    fn cell(mut self, name: &'static str, value: Value, in_table: bool) -> Self {
        self.cells.push(Cell {
            name,
            value,
            in_table,
        });
        self
    }

    fn value(&self) -> Value {
        let members = self.cells.iter();
        let members = members.map(|cell| (cell.name.to_owned(), cell.value.clone()));
        Value::Object(members.collect::<Map<_, _>>())
    }

    fn shown(&self) -> impl Iterator<Item = &Cell> {
        self.cells.iter().filter(|cell| cell.in_table)
    }
}

impl Output {
    /// The text to print, with its last line feed.
    pub(crate) fn render(&self, format: Format) -> anyhow::Result<String> {
        let value = match self {
            Self::One(row) => row.value(),
            Self::Many(rows) => rows.iter().map(Row::value).collect(),
        };
        match format {
            Format::Json => Ok(serde_json::to_string_pretty(&value)? + "\n"),
            Format::Yaml => Ok(serde_saphyr::to_string(&value)?),
            Format::Table => Ok(match self {
                Self::One(row) => list(row),
                Self::Many(rows) => table(rows),
            }),
        }
    }
}

fn list(row: &Row) -> String {
    let width = row.shown().map(|cell| cell.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for cell in row.shown() {
        let lines = match &cell.value {
            Value::Array(values) if values.is_empty() => vec!["-".to_owned()],
            Value::Array(values) => values.iter().map(plain).collect(),
            value => vec![plain(value)],
        };
        for (number, line) in lines.iter().enumerate() {
            let name = if number == 0 { cell.name } else { "" };
            // Writing to a String cannot fail.
            writeln!(text, "{name:width$}  {line}").ok();
        }
    }
    text
}

fn table(rows: &[Row]) -> String {
    let Some(first) = rows.first() else {
        return "none\n".to_owned();
    };
    let heads: Vec<String> = first
        .shown()
        .map(|cell| cell.name.to_uppercase().replace('_', " "))
        .collect();
    let body = rows
        .iter()
        .map(|row| row.shown().map(|cell| plain(&cell.value)).collect());
    let lines: Vec<Vec<String>> = std::iter::once(heads).chain(body).collect();
    let mut widths: Vec<usize> = Vec::new();
    for line in &lines {
        widths.resize(widths.len().max(line.len()), 0);
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for line in &lines {
        let padded = line
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        let padded: Vec<String> = padded.collect();
        // Writing to a String cannot fail.
        writeln!(text, "{}", padded.join("  ").trim_end()).ok();
    }
    text
}

/// A value in one line; control characters, which only a hostile peer would send, are escaped.
fn plain(value: &Value) -> String {
    let text = match value {
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Object(members) => {
            let members = members
                .iter()
                .filter(|(_, value)| **value != Value::String(String::new()));
            let members = members.map(|(name, value)| format!("{name}={}", plain(value)));
            members.collect::<Vec<_>>().join(" ")
        }
        other => other.to_string(),
    };
    text.chars()
        .flat_map(|c| {
            if c.is_control() {
                c.escape_default().collect()
            } else {
                vec![c]
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Output {
        let row = |id: &str, n| {
            Row::new()
                .text("id", id.to_owned())
                .number("n", n)
                .detail("hash", "h".to_owned())
        };
        Output::Many(vec![row("long-name", 1), row("x", 22)])
    }

    #[test]
    fn a_table_is_aligned_and_leaves_details_out() {
        let text = rows().render(Format::Table).unwrap();
        assert_eq!(text, "ID         N\nlong-name  1\nx          22\n");
        assert_eq!(
            Output::Many(Vec::new()).render(Format::Table).unwrap(),
            "none\n"
        );
    }

    #[test]
    fn json_and_yaml_say_the_same() {
        let json: Value = serde_json::from_str(&rows().render(Format::Json).unwrap()).unwrap();
        let yaml: Value = serde_saphyr::from_str(&rows().render(Format::Yaml).unwrap()).unwrap();
        assert_eq!(json, yaml);
        assert_eq!(json[1]["n"], 22);
    }

    #[test]
    fn a_hostile_text_cannot_move_the_cursor() {
        let row = Row::new().text("refusal", "a\x1b[2J\nb".to_owned());
        let text = Output::One(row).render(Format::Table).unwrap();
        assert_eq!(text, "refusal  a\\u{1b}[2J\\nb\n");
    }
}
