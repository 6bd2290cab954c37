//! Reads llhttp's test vectors: Markdown, with an `http` block and the parser's log of it.

use std::path::{Path, PathBuf};

/// One vector.
#[derive(Clone, Debug)]
pub struct Vector {
    /// `request/invalid.md: Headers separated by CR`
    pub name: String,
    /// `request`, `response-lenient-all` …
    pub kind: String,
    /// llhttp is told to pause, or to skip bodies: a test of its interface, not of HTTP.
    pub interface: bool,
    pub input: Vec<u8>,
    /// What the log's first error says.
    pub error: Option<String>,
    /// How many message heads the log completes.
    pub heads: usize,
}

/// Every vector of `shared/vectors/llhttp`, or `None` where that is not at hand.
pub fn all() -> Option<Vec<Vector>> {
    let root = root()?;
    let mut vectors = Vec::new();
    for folder in ["request", "response"] {
        let mut files: Vec<PathBuf> = std::fs::read_dir(root.join(folder))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        for file in files {
            let text = std::fs::read_to_string(&file).unwrap();
            let file = format!("{folder}/{}", file.file_name().unwrap().to_string_lossy());
            vectors.extend(parse(&file, &text));
        }
    }
    Some(vectors)
}

/// The vectors' folder: where `SIDEGATE_SHARED` says, or in the nearest `shared` above this crate.
fn root() -> Option<PathBuf> {
    let inside = |shared: PathBuf| shared.join("vectors/llhttp/test");
    let named = std::env::var_os("SIDEGATE_SHARED").map(PathBuf::from);
    let above = || Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    match named {
        Some(shared) => Some(inside(shared)).filter(|root| root.is_dir()),
        None => above()
            .map(|folder| inside(folder.join("shared")))
            .find(|root| root.is_dir()),
    }
}

fn parse(file: &str, text: &str) -> Vec<Vector> {
    let mut vectors: Vec<Vector> = Vec::new();
    let (mut heading, mut meta) = (String::new(), String::new());
    let mut block: Option<(String, String)> = None;
    for line in text.lines() {
        match (&mut block, line) {
            (Some((language, content)), "```") => {
                match language.as_str() {
                    "http" if meta.contains("\"type\"") => {
                        vectors.push(vector(file, &heading, &meta, content));
                    }
                    "log" => {
                        let last = vectors.last_mut().expect("a log without its input");
                        last.error = content.lines().find_map(error);
                        last.heads = content.matches("headers complete").count();
                    }
                    _ => {}
                }
                block = None;
            }
            (Some((_, content)), line) => {
                content.push_str(line);
                content.push('\n');
            }
            (None, line) if line.starts_with("```") => {
                block = Some((line[3..].to_owned(), String::new()));
            }
            (None, line) if line.starts_with('#') => {
                line.trim_start_matches('#').trim().clone_into(&mut heading);
            }
            (None, line) if line.trim_start().starts_with("<!-- meta=") => {
                line.clone_into(&mut meta);
            }
            _ => {}
        }
    }
    vectors
}

fn error(line: &str) -> Option<String> {
    let reason = line.split_once(" error code=")?.1.split_once("reason=")?.1;
    Some(reason.trim_matches('"').to_owned())
}

fn vector(file: &str, heading: &str, meta: &str, content: &str) -> Vector {
    let json = meta
        .trim()
        .trim_start_matches("<!-- meta=")
        .trim_end_matches("-->")
        .trim();
    let meta: serde_json::Value = serde_json::from_str(json).expect("a vector's meta");
    Vector {
        name: format!("{file}: {heading}"),
        kind: meta["type"].as_str().expect("a type").to_owned(),
        interface: meta.get("pause").is_some() || meta.get("skipBody").is_some(),
        input: input(content),
        error: None,
        heads: 0,
    }
}

/// The bytes of an `http` block, as llhttp's own runner makes them.
fn input(content: &str) -> Vec<u8> {
    let content = content.strip_suffix('\n').unwrap_or(content);
    let content = content.replace("\\\n", "").replace('\n', "\r\n");
    let mut bytes = Vec::new();
    let mut rest = content.as_bytes();
    while let Some((byte, tail)) = rest.split_first() {
        let (value, used) = if *byte == b'\\' {
            escape(tail)
        } else {
            (*byte, 0)
        };
        bytes.push(value);
        rest = &tail[used..];
    }
    bytes
}

fn escape(tail: &[u8]) -> (u8, usize) {
    let digits = |radix, from: usize, most: usize| {
        let text: String = tail
            .iter()
            .skip(from)
            .take(most)
            .map(|byte| char::from(*byte))
            .take_while(|digit| digit.is_digit(radix))
            .collect();
        let value = u8::from_str_radix(&text, radix).ok();
        value.map(|value| (value, from + text.len()))
    };
    match tail.first() {
        Some(b'r') => (b'\r', 1),
        Some(b'n') => (b'\n', 1),
        Some(b't') => (b'\t', 1),
        Some(b'f') => (0x0c, 1),
        Some(b'x') => digits(16, 1, 2).unwrap_or((b'\\', 0)),
        Some(b'0'..=b'7') => digits(8, 0, 3).unwrap_or((b'\\', 0)),
        _ => (b'\\', 0),
    }
}
