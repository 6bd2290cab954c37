//! Records as people and programs want to see them.
//!
//! Invariant: every text in here went through [`escape`] before it is printed.

use std::borrow::Cow;
use std::io::Write;

use serde::Serialize;
use sidegate_mesh::access_log::{Line, escape};

use super::filter::workload_of;
use super::source::Raw;
use crate::output::Format;

const HEADER: [&str; 9] = [
    "TIME", "DIR", "CALLER", "CALLED", "REQUEST", "STATUS", "DECISION", "MS", "BYTES",
];

/// Widths that the columns have before anything is known; the table of a short log looks the same.
const WIDTHS_MIN: [usize; 9] = [12, 3, 6, 6, 7, 6, 8, 2, 5];

/// Widest cell of each column, in characters; what is wider is cut.
const WIDTHS_MAX: [usize; 9] = [12, 4, 48, 48, 72, 20, 48, 12, 16];

/// Most characters of a broken line that are shown.
const BROKEN_CHARS_MAX: usize = 160;

/// One thing to show.
pub(crate) struct Entry {
    what: What,
    raw: Raw,
    /// RFC 3339, which sorts as text; empty for what has no time and stays where it was read.
    time: String,
}

enum What {
    Call(Box<Line>),
    Diagnostic(Box<Line>),
    Broken,
}

/// How a cell is painted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tone {
    Plain,
    Good,
    Warning,
    Bad,
}

impl Entry {
    pub(super) fn call(line: Line, raw: Raw) -> Self {
        let time = line.time.clone().unwrap_or_default();
        Self {
            what: What::Call(Box::new(line)),
            raw,
            time,
        }
    }

    pub(super) fn diagnostic(line: Line, raw: Raw) -> Self {
        let time = line.time.clone().unwrap_or_default();
        Self {
            what: What::Diagnostic(Box::new(line)),
            raw,
            time,
        }
    }

    pub(super) fn broken(raw: Raw) -> Self {
        Self {
            what: What::Broken,
            raw,
            time: String::new(),
        }
    }

    /// Where it belongs, RFC 3339; empty when nobody knows.
    pub(super) fn time(&self) -> &str {
        &self.time
    }

    /// The same, at `time` if it has none itself.
    pub(super) fn or_at(mut self, time: &str) -> Self {
        if self.time.is_empty() {
            time.clone_into(&mut self.time);
        }
        self
    }

    pub(super) fn into_raw(self) -> Raw {
        self.raw
    }
}

/// Prints entries in one form.
pub(crate) struct Printer<W> {
    out: W,
    format: Format,
    colours: bool,
    widths: [usize; 9],
    started: bool,
}

impl<W: Write> Printer<W> {
    pub(crate) fn new(out: W, format: Format, colours: bool) -> Self {
        Self {
            out,
            format,
            colours,
            widths: WIDTHS_MIN,
            started: false,
        }
    }

    /// Prints `entries` in the order of their times.
    ///
    /// # Errors
    ///
    /// When they cannot be written.
    pub(crate) fn print(&mut self, mut entries: Vec<Entry>) -> anyhow::Result<()> {
        sort(&mut entries);
        match self.format {
            Format::Table => self.print_table(&entries)?,
            Format::Json => {
                for entry in &entries {
                    writeln!(self.out, "{}", json(entry)?)?;
                }
            }
            Format::Yaml => {
                for entry in &entries {
                    writeln!(self.out, "---\n{}", yaml(entry)?)?;
                }
            }
        }
        self.out.flush()?;
        Ok(())
    }

    fn print_table(&mut self, entries: &[Entry]) -> anyhow::Result<()> {
        let rows: Vec<_> = entries.iter().map(row).collect();
        let cells = rows.iter().filter_map(|row| row.as_ref().ok());
        for (cells, _) in cells {
            for (width, cell) in self.widths.iter_mut().zip(cells) {
                *width = (*width).max(cell.chars().count());
            }
        }
        if !std::mem::replace(&mut self.started, true) {
            self.print_cells(&HEADER.map(ToOwned::to_owned), [Tone::Plain; 9])?;
        }
        for row in &rows {
            match row {
                Ok((cells, tones)) => self.print_cells(cells, *tones)?,
                Err(line) => {
                    let line = self.paint(line, Tone::Warning);
                    writeln!(self.out, "{line}")?;
                }
            }
        }
        Ok(())
    }

    fn print_cells(&mut self, cells: &[String; 9], tones: [Tone; 9]) -> anyhow::Result<()> {
        let mut line = String::new();
        for ((cell, width), tone) in cells.iter().zip(self.widths).zip(tones) {
            line.push_str(&self.paint(cell, tone));
            let blanks = (width + 2).saturating_sub(cell.chars().count());
            line.extend(std::iter::repeat_n(' ', blanks));
        }
        writeln!(self.out, "{}", line.trim_end())?;
        Ok(())
    }

    fn paint<'a>(&self, text: &'a str, tone: Tone) -> Cow<'a, str> {
        let code = match tone {
            Tone::Good => "32",
            Tone::Warning => "33",
            Tone::Bad => "31",
            Tone::Plain => return text.into(),
        };
        if self.colours {
            format!("\u{1b}[{code}m{text}\u{1b}[0m").into()
        } else {
            text.into()
        }
    }
}

/// By time. What has none stays behind what was read before it.
fn sort(entries: &mut [Entry]) {
    let mut last: Option<(std::sync::Arc<str>, String)> = None;
    for entry in entries.iter_mut() {
        match &last {
            Some((file, time)) if entry.time.is_empty() && *file == entry.raw.file => {
                entry.time.clone_from(time);
            }
            _ => {}
        }
        last = Some((std::sync::Arc::clone(&entry.raw.file), entry.time.clone()));
    }
    entries.sort_by(|one, other| one.time.cmp(&other.time));
}

/// The cells of an entry, or the line that stands for it.
fn row(entry: &Entry) -> Result<([String; 9], [Tone; 9]), String> {
    match &entry.what {
        What::Call(line) => Ok((cells(line), tones(line))),
        What::Diagnostic(line) => Err(diagnostic(line)),
        What::Broken => {
            let text: String = entry.raw.text.chars().take(BROKEN_CHARS_MAX).collect();
            let more = if text.len() < entry.raw.text.len() {
                "…"
            } else {
                ""
            };
            let (file, number) = (escape(&entry.raw.file), entry.raw.number);
            Err(format!(
                "broken line {file}:{number}: {}{more}",
                escape(&text)
            ))
        }
    }
}

fn cells(line: &Line) -> [String; 9] {
    let cells = [
        clock(line.time.as_deref().unwrap_or_default()),
        direction(line).to_owned(),
        caller(line),
        called(line),
        request(line),
        status(line),
        decision(line),
        line.duration_ms
            .map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1}")),
        line.response_bytes
            .map_or_else(|| "-".to_owned(), |bytes| bytes.to_string()),
    ];
    let mut widths = WIDTHS_MAX.into_iter();
    cells.map(|cell| fit(&escape(&cell), widths.next().unwrap_or(usize::MAX)))
}

fn fit(text: &str, max: usize) -> String {
    if text.chars().count() <= max {
        return text.to_owned();
    }
    text.chars()
        .take(max.saturating_sub(1))
        .chain(['…'])
        .collect()
}

/// `07:39:41.898` of an RFC 3339 time.
fn clock(time: &str) -> String {
    let clock = time.split_once('T').map_or(time, |(_, clock)| clock);
    clock.chars().take(WIDTHS_MIN[0]).collect()
}

fn direction(line: &Line) -> &str {
    match line.direction.as_deref() {
        Some("inbound") => "in",
        Some("outbound") => "out",
        Some(other) => other,
        None => "-",
    }
}

/// `shop/web` for a workload of the trust domain of `beside`, else the whole ID.
fn identity(id: &str, beside: Option<&str>) -> String {
    let domain = |id: &str| {
        id.strip_prefix("spiffe://")
            .and_then(|id| id.split_once('/'))
            .map(|(domain, _)| domain.to_owned())
    };
    let foreign = beside.is_some_and(|beside| domain(beside) != domain(id));
    match workload_of(id) {
        Some((namespace, account)) if !foreign => format!("{namespace}/{account}"),
        _ => id.to_owned(),
    }
}

pub(crate) fn caller(line: &Line) -> String {
    let beside = line.destination.as_deref();
    let id = line.source.as_deref().map(|id| identity(id, beside));
    id.or_else(|| line.source_address.clone())
        .unwrap_or_else(|| "-".to_owned())
}

pub(crate) fn called(line: &Line) -> String {
    let id = line.destination.as_deref().map(|id| identity(id, None));
    let name = id
        .or_else(|| line.destination_service.clone())
        .or_else(|| line.authority.clone());
    name.unwrap_or_else(|| "-".to_owned())
}

fn request(line: &Line) -> String {
    if let (Some(service), Some(method)) = (&line.grpc_service, &line.grpc_method) {
        return format!("{service}/{method}");
    }
    let query = if line.query { "?…" } else { "" };
    match (&line.method, &line.path, line.protocol.as_deref()) {
        (Some(method), Some(path), Some("websocket")) => {
            format!("{method} {path}{query} websocket")
        }
        (Some(method), Some(path), _) => format!("{method} {path}{query}"),
        (Some(method), None, _) => method.clone(),
        _ if line.error.as_deref() == Some("tls_handshake") => "handshake".to_owned(),
        (None, _, Some("tcp")) => "tcp".to_owned(),
        _ => "-".to_owned(),
    }
}

fn status(line: &Line) -> String {
    match (line.grpc_status, line.status) {
        (Some(status), _) => Line::grpc_code(status).to_owned(),
        (None, Some(status)) => status.to_string(),
        (None, None) => "-".to_owned(),
    }
}

/// What was decided and by what, then what went wrong, then how many calls that were.
fn decision(line: &Line) -> String {
    let word = match line.decision.as_deref() {
        Some("deny") => "DENY",
        Some("would_deny") => "would-deny",
        Some(other) => other,
        None => "",
    };
    let why = match (rule(line), &line.reason) {
        (Some(rule), _) => rule,
        (None, Some(reason)) => reason.clone(),
        (None, None) => String::new(),
    };
    // A refusal by policy has no other error than itself.
    let error = line
        .error
        .as_deref()
        .filter(|error| *error != "denied")
        .unwrap_or_default();
    let count = line
        .count
        .map(|count| format!("×{count}"))
        .unwrap_or_default();
    let cut_off = if line.flags.iter().any(|flag| flag == "cut_off") {
        "cut off"
    } else {
        ""
    };
    let parts = if word == "allow" {
        [word, &why, error, cut_off, &count]
    } else {
        [word, error, &why, cut_off, &count]
    };
    let shown: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    if shown.is_empty() {
        "-".to_owned()
    } else {
        shown.join(" ")
    }
}

/// `orders/readers`, with its namespace where that is not the called side's.
fn rule(line: &Line) -> Option<String> {
    let policy = line.policy.as_deref()?;
    let namespace = line
        .destination
        .as_deref()
        .and_then(workload_of)
        .map(|(namespace, _)| namespace);
    let short = policy
        .split_once('/')
        .filter(|(of, _)| Some(*of) == namespace)
        .map(|(_, name)| name);
    let policy = short.unwrap_or(policy);
    Some(
        line.rule
            .as_deref()
            .map_or_else(|| policy.to_owned(), |rule| format!("{policy}/{rule}")),
    )
}

fn tones(line: &Line) -> [Tone; 9] {
    let decision = match line.decision.as_deref() {
        Some("allow") if line.error.is_none() => Tone::Good,
        Some("would_deny") => Tone::Warning,
        Some("deny") => Tone::Bad,
        _ if line.error.is_some() => Tone::Bad,
        _ => Tone::Plain,
    };
    let status = match (line.grpc_status, line.status) {
        (Some(0), _) => Tone::Good,
        (Some(_), _) | (None, Some(500..)) => Tone::Bad,
        (None, Some(400..500)) => Tone::Warning,
        (None, Some(_)) => Tone::Good,
        (None, None) => Tone::Plain,
    };
    let plain = Tone::Plain;
    [
        plain, plain, plain, plain, plain, status, decision, plain, plain,
    ]
}

fn diagnostic(line: &Line) -> String {
    let time = clock(line.time.as_deref().unwrap_or_default());
    let (level, message) = (line.level.as_deref(), line.message.as_deref());
    format!(
        "{}  {}  {}",
        escape(&time),
        escape(level.unwrap_or("diagnostic")),
        escape(message.unwrap_or_default())
    )
}

/// What a line that cannot be read becomes where others are JSON.
#[derive(Serialize)]
struct Broken<'a> {
    kind: &'static str,
    file: &'a str,
    line: u64,
    text: &'a str,
}

impl<'a> Broken<'a> {
    fn of(raw: &'a Raw) -> Self {
        Self {
            kind: "broken",
            file: &raw.file,
            line: raw.number,
            text: &raw.text,
        }
    }
}

/// The line as it was written, with what JSON may carry and a terminal should not.
fn json(entry: &Entry) -> anyhow::Result<String> {
    let text = match &entry.what {
        What::Broken => serde_json::to_string(&Broken::of(&entry.raw))?,
        What::Call(_) | What::Diagnostic(_) => entry.raw.text.clone(),
    };
    Ok(escape(&text).into_owned())
}

fn yaml(entry: &Entry) -> anyhow::Result<String> {
    // JSON first: what it escapes stays escaped text in YAML.
    let value: serde_json::Value = serde_json::from_str(&json(entry)?)?;
    let text = serde_saphyr::to_string(&value)?;
    let lines = text.trim_end().split('\n').map(escape).collect::<Vec<_>>();
    Ok(lines.join("\n"))
}
