//! Files of resources: YAML with any number of documents, or JSON.
//!
//! Invariant: each document is read alone. What is wrong in one never changes what its neighbours
//! say, and of a refused one everything is kept that tells what it may have denied.

use serde_json::Value;

use super::authorization::{Action, AuthorizationPolicy, Mode, Selector};
use super::check::check;
use super::decode::decode;
use super::fault::{Fault, Mark, Step, shown};
use super::problem::{Problem, Severity};
use super::static_service::StaticService;
use super::suggest::{nearest, one_of};
use super::traffic::TrafficPolicy;
use super::tree::{self, Content, Node, Tree};
use super::{API_VERSION, Kind, Metadata, Resource, ResourceKey};
use crate::host::is_dns_label;

/// Largest file in bytes.
pub const FILE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Most documents of one file.
pub const DOCUMENTS_PER_FILE_MAX: usize = 2_000;

/// The fields of a document.
const DOCUMENT_FIELDS: [&str; 4] = ["apiVersion", "kind", "metadata", "spec"];

/// A value, and where its document starts.
#[derive(Clone, Debug)]
pub struct Located<T> {
    /// The file's path as it was given.
    pub file: String,
    /// The line of its first field, counted from 1.
    pub line: usize,
    /// The column of its first field, counted from 1.
    pub column: usize,
    /// The value.
    pub value: T,
    tree: Node,
}

impl<T> Located<T> {
    /// Where a field stands, line and column: `spec.rules[0].from`. For a field that is not there,
    /// the place of what it would be in.
    pub fn locate(&self, field: &str) -> (usize, usize) {
        let mark = self.tree.find(&steps_of(field));
        (mark.line as usize, mark.column as usize)
    }

    /// Says of a problem with this resource where it is.
    pub fn place(&self, problem: &mut Problem) {
        let field = problem.field.as_deref().unwrap_or_default();
        (problem.line, problem.column) = self.locate(field);
        problem.file.clone_from(&self.file);
    }
}

/// What can be said of a document, also of one that is refused.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Known {
    /// Its kind.
    pub kind: Option<Kind>,
    /// Its namespace.
    pub namespace: Option<String>,
    /// Its name.
    pub name: Option<String>,
    /// Of an authorization policy: what a match does.
    pub action: Option<Action>,
    /// Of an authorization policy: whether it counts.
    pub mode: Option<Mode>,
    /// Of an authorization policy: what it selects.
    pub selector: Option<Selector>,
}

impl Known {
    /// The whole key, when all of it is known.
    pub fn key(&self) -> Option<ResourceKey> {
        Some(ResourceKey {
            kind: self.kind?,
            namespace: self.namespace.clone()?,
            name: self.name.clone()?,
        })
    }

    /// Whether nothing that is known speaks against this key.
    pub fn may_be(&self, key: &ResourceKey) -> bool {
        self.kind.is_none_or(|kind| kind == key.kind)
            && self
                .namespace
                .as_ref()
                .is_none_or(|namespace| *namespace == key.namespace)
            && self.name.as_ref().is_none_or(|name| *name == key.name)
    }

    /// How many parts of the key are known.
    pub(crate) fn identifying(&self) -> usize {
        let parts = [
            self.kind.is_some(),
            self.namespace.is_some(),
            self.name.is_some(),
        ];
        parts.into_iter().filter(|known| *known).count()
    }

    fn of(root: &Node) -> Self {
        let name = |key: &str| {
            let value = root.get("metadata").and_then(|metadata| metadata.get(key));
            let text = value.and_then(|value| decode::<String>(value).ok());
            text.filter(|text| is_dns_label(text))
        };
        let spec = root.get("spec");
        let field = |key: &str| spec.and_then(|spec| spec.get(key));
        Self {
            kind: root
                .get("kind")
                .and_then(Node::text)
                .and_then(Kind::from_name),
            namespace: name("namespace"),
            name: name("name"),
            action: field("action").and_then(|action| decode(action).ok()),
            mode: field("mode").and_then(|mode| decode(mode).ok()),
            selector: field("selector").and_then(|selector| decode(selector).ok()),
        }
    }
}

/// One document of a file that is not empty.
#[derive(Debug)]
pub(crate) struct Document {
    pub known: Known,
    /// At least one problem when it is refused.
    pub outcome: Result<Located<Resource>, Vec<Problem>>,
}

/// Reads every document of a file.
///
/// For each document there is either the resource or at least one problem, in the order of the
/// file. A file that is empty or beyond a bound is one problem.
pub fn parse_documents(file: &str, text: &str) -> Vec<Result<Located<Resource>, Problem>> {
    let mut results = Vec::new();
    read(file, text, |document| match document.outcome {
        Ok(resource) => results.push(Ok(resource)),
        Err(problems) => results.extend(problems.into_iter().map(Err)),
    });
    results
}

/// An object of a cluster as a folder would hold it: without its status, and without what the API
/// server and other people's tools write into `metadata`, which decides nothing.
///
/// Everything else stays, so that what is misspelt is still found. The name of an object that is only
/// to be made may be generated later; one of its shape stands in for it.
pub fn as_written(object: &Value) -> Value {
    let Some(object) = object.as_object() else {
        return object.clone();
    };
    let mut written = object.clone();
    written.remove("status");
    if let Some(metadata) = written.get_mut("metadata").and_then(Value::as_object_mut) {
        let generated = metadata.get("generateName").and_then(Value::as_str);
        // What the API server adds is five letters.
        let generated = generated.map(|prefix| Value::from(format!("{prefix}abcde")));
        metadata.retain(|field, _| matches!(field.as_str(), "namespace" | "name"));
        if let Some(generated) = generated {
            metadata.entry("name").or_insert(generated);
        }
    }
    Value::Object(written)
}

/// Reads one resource from JSON, as a cluster's API server has it and [`as_written`] gives it.
///
/// # Errors
///
/// Every problem that is known; they name fields, not lines.
pub fn parse_value(value: &Value) -> Result<Resource, Vec<Problem>> {
    parse_known(value).1
}

/// As [`parse_value`]; beside it stands what can be said of the resource, also of one that is
/// refused.
pub fn parse_known(value: &Value) -> (Known, Result<Resource, Vec<Problem>>) {
    let tree = Tree {
        root: Some(node_of(value)),
        fault: None,
        is_cut: false,
    };
    let document = document("", tree, Mark::default());
    let outcome = document.outcome.map(|located| located.value);
    (document.known, outcome)
}

/// Reads a file document by document, so that only one tree is kept at a time unless the visitor
/// keeps more.
pub(crate) fn read(file: &str, text: &str, mut visit: impl FnMut(Document)) {
    let mut whole_file = |message: String, help: &str| {
        visit(Document {
            known: Known::default(),
            outcome: Err(vec![Problem::of_file(file, message, help)]),
        });
    };
    if text.len() > FILE_BYTES_MAX {
        let message = format!(
            "the file has {} bytes, and at most {FILE_BYTES_MAX} are read",
            text.len()
        );
        return whole_file(message, "write several files");
    }
    let mut documents = 0;
    for (first_line, part) in parts(text) {
        for tree in tree::read(part, first_line) {
            if tree.root.is_none() && tree.fault.is_none() {
                continue;
            }
            documents += 1;
            if documents > DOCUMENTS_PER_FILE_MAX {
                let message = format!("the file has more than {DOCUMENTS_PER_FILE_MAX} documents");
                visit(refused(file, &message, first_line));
                return;
            }
            let start = Mark {
                line: u32::try_from(first_line).unwrap_or(u32::MAX),
                column: 1,
            };
            visit(document(file, tree, start));
        }
    }
    if documents == 0 {
        visit(Document {
            known: Known::default(),
            outcome: Err(vec![Problem::of_file(
                file,
                "the file is empty",
                "write a resource into it, or remove it; it may have been cut off",
            )]),
        });
    }
}

fn refused(file: &str, message: &str, line: usize) -> Document {
    let mut problem = Problem::of_file(file, message, "write several files");
    problem.line = line;
    Document {
        known: Known::default(),
        outcome: Err(vec![problem]),
    }
}

/// Reads one document. `start` is where it begins when nothing of it could be read.
fn document(file: &str, tree: Tree, start: Mark) -> Document {
    let root = tree
        .root
        .unwrap_or_else(|| Node::new(start, Content::Map(Vec::new())));
    let known = if tree.is_cut {
        Known::of(&root.without_last())
    } else {
        Known::of(&root)
    };
    let outcome = match tree.fault {
        Some(fault) => Err(vec![fault]),
        None => resource(&root).and_then(|resource| {
            let faults = check(&resource);
            if faults.is_empty() {
                Ok(resource)
            } else {
                Err(faults)
            }
        }),
    };
    let outcome = match outcome {
        Ok(value) => Ok(Located {
            file: file.to_owned(),
            line: root.at.line as usize,
            column: root.at.column as usize,
            value,
            tree: root,
        }),
        Err(faults) => {
            let problem = |fault| problem(file, &known, &root, fault);
            Err(faults.into_iter().map(problem).collect())
        }
    };
    Document { known, outcome }
}

fn problem(file: &str, known: &Known, root: &Node, fault: Fault) -> Problem {
    let steps: Vec<Step> = fault.path.iter().rev().cloned().collect();
    let at = fault.at.unwrap_or_else(|| root.find(&steps));
    Problem {
        file: file.to_owned(),
        line: at.line as usize,
        column: at.column as usize,
        resource: known.key(),
        field: fault.field(),
        message: fault.message,
        help: fault.help,
        severity: Severity::Error,
    }
}

fn resource(root: &Node) -> Result<Resource, Vec<Fault>> {
    let one = |fault: Fault| vec![fault];
    check_fields(root).map_err(one)?;
    let kind = check_header(root).map_err(one)?;
    let metadata: Metadata = part(root, "metadata").map_err(one)?;
    let resource = match kind {
        Kind::AuthorizationPolicy => Resource::AuthorizationPolicy(AuthorizationPolicy {
            metadata,
            spec: part(root, "spec").map_err(one)?,
        }),
        Kind::StaticService => Resource::StaticService(StaticService {
            metadata,
            spec: part(root, "spec").map_err(one)?,
        }),
        Kind::TrafficPolicy => Resource::TrafficPolicy(TrafficPolicy {
            metadata,
            spec: part(root, "spec").map_err(one)?,
        }),
    };
    Ok(resource)
}

fn part<T: serde::de::DeserializeOwned>(root: &Node, field: &'static str) -> Result<T, Fault> {
    let node = required(root, field)?;
    decode(node).map_err(|fault: Fault| fault.within(Step::Key(field.to_owned())))
}

fn required<'a>(root: &'a Node, field: &'static str) -> Result<&'a Node, Fault> {
    root.get(field).ok_or_else(|| {
        let fault: Fault = serde::de::Error::missing_field(field);
        fault.at(root.at)
    })
}

fn check_fields(root: &Node) -> Result<(), Fault> {
    let Content::Map(fields) = &*root.content else {
        let help = format!(
            "write {}",
            one_of(&DOCUMENT_FIELDS).replace(" or ", " and ")
        );
        return Err(Fault::new("a document is an object", help).at(root.at));
    };
    let unknown =
        |(key, _): &&(Node, Node)| key.text().is_none_or(|key| !DOCUMENT_FIELDS.contains(&key));
    let Some((key, _)) = fields.iter().find(unknown) else {
        return Ok(());
    };
    let name = key.text().unwrap_or_default();
    let fault = match name {
        "status" => Fault::new("`status` is written by the cluster", "remove it"),
        _ => serde::de::Error::unknown_field(name, &DOCUMENT_FIELDS),
    };
    Err(fault.at(key.at).within(Step::Key(shown(name))))
}

fn check_header(root: &Node) -> Result<Kind, Fault> {
    let node = required(root, "apiVersion")?;
    let within = |field: &str| Step::Key(field.to_owned());
    let version: String =
        decode(node).map_err(|fault: Fault| fault.within(within("apiVersion")))?;
    if version != API_VERSION {
        let message = format!(
            "`{}` is not an API version that is known here",
            shown(&version)
        );
        let fault = Fault::new(message, format!("write `{API_VERSION}`"));
        return Err(fault.at(node.at).within(within("apiVersion")));
    }
    let node = required(root, "kind")?;
    let name: String = decode(node).map_err(|fault: Fault| fault.within(within("kind")))?;
    Kind::from_name(&name).ok_or_else(|| {
        let kinds = Kind::ALL.map(Kind::as_str);
        let help = match nearest(&name, &kinds) {
            Some(kind) => format!("did you mean `{kind}`?"),
            None => format!("possible here: {}", one_of(&kinds)),
        };
        let fault = Fault::new(format!("there is no kind `{}`", shown(&name)), help);
        fault.at(node.at).within(within("kind"))
    })
}

/// Cuts a file at its `---` and `...` lines, each part with the number of its first line.
///
/// YAML ends every value at such a line, whatever the value, so a part that is broken can't reach
/// into the next. A part of comments and directives alone stays with the document that follows.
fn parts(text: &str) -> Vec<(usize, &str)> {
    let mut parts = Vec::new();
    let (mut start, mut at) = (0, 0);
    let (mut first_line, mut line_number) = (1, 1);
    let mut has_content = false;
    for line in text.split_inclusive('\n') {
        if is_marked(line, "---") && has_content {
            parts.push((first_line, text.get(start..at).unwrap_or_default()));
            (start, first_line, has_content) = (at, line_number, false);
        }
        has_content |= is_content(line);
        at += line.len();
        line_number += line_breaks(line);
        if is_marked(line, "...") && has_content {
            parts.push((first_line, text.get(start..at).unwrap_or_default()));
            (start, first_line, has_content) = (at, line_number, false);
        }
    }
    parts.push((first_line, text.get(start..).unwrap_or_default()));
    parts
}

/// Whether a line is a marker: `---` starts a document, `...` ends one.
fn is_marked(line: &str, marker: &str) -> bool {
    let rest = line.strip_prefix(marker);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
}

/// Whether a line is more than a comment or a directive before a document.
fn is_content(line: &str) -> bool {
    let line = line.trim();
    !(line.is_empty() || line.starts_with('#') || line.starts_with('%'))
}

/// How many lines end in a text, as YAML counts: at LF, at CR, and once at both together.
fn line_breaks(text: &str) -> usize {
    let feeds = text.matches('\n').count();
    let returns = text.matches('\r').count();
    feeds + returns - text.matches("\r\n").count()
}

/// The steps of a path such as `spec.rules[0].to[1].http`.
fn steps_of(field: &str) -> Vec<Step> {
    let parts = field.split(['.', '[', ']']).filter(|part| !part.is_empty());
    let step = |part: &str| match part.parse() {
        Ok(index) => Step::Index(index),
        Err(_) => Step::Key(part.to_owned()),
    };
    parts.map(step).collect()
}

fn node_of(value: &Value) -> Node {
    let scalar = |text: String, plain| Content::Scalar { text, plain };
    let content = match value {
        Value::Null => scalar("null".to_owned(), true),
        Value::Bool(value) => scalar(value.to_string(), true),
        Value::Number(number) => scalar(number.to_string(), true),
        Value::String(text) => scalar(text.clone(), false),
        Value::Array(list) => Content::List(list.iter().map(node_of).collect()),
        Value::Object(map) => {
            let entry = |(key, value): (&String, &Value)| {
                let key = Node::new(Mark::default(), scalar(key.clone(), false));
                (key, node_of(value))
            };
            Content::Map(map.iter().map(entry).collect())
        }
    };
    Node::new(Mark::default(), content)
}
