//! YAML documents as trees that know where each value stands.
//!
//! Invariant: reading is bounded in depth and in nodes, aliases included, so no text makes it slow
//! or large; and nothing is read that another parser of the same file, kubectl's above all, may
//! read as something else: no tags, no merge keys, no key twice.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use serde_saphyr::granit_parser::{Event, Options, Parser, ScalarStyle, ScanError, Span};

use super::fault::{Fault, Mark, Step, shown};

/// Most values of one document, those that aliases repeat included.
pub const NODES_PER_DOCUMENT_MAX: usize = 500_000;

/// Deepest nesting of a document.
const DEPTH_MAX: usize = 32;

/// A value and where it stands. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Node {
    pub at: Mark,
    /// How many values it is, those inside included.
    size: usize,
    pub content: Arc<Content>,
}

pub(crate) enum Content {
    /// `plain` when it is not quoted: then it may be a number, a truth value or nothing.
    Scalar {
        text: String,
        plain: bool,
    },
    List(Vec<Node>),
    /// In the order of the text. A key that stands there twice is a fault of the document.
    Map(Vec<(Node, Node)>),
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "value at {}:{}", self.at.line, self.at.column)
    }
}

impl Node {
    pub(crate) fn new(at: Mark, content: Content) -> Self {
        let sizes: usize = match &content {
            Content::Scalar { .. } => 0,
            Content::List(list) => list.iter().map(|node| node.size).sum(),
            Content::Map(map) => map.iter().map(|(key, value)| key.size + value.size).sum(),
        };
        Self {
            at,
            size: sizes + 1,
            content: Arc::new(content),
        }
    }

    /// No value at all.
    fn nothing(at: Mark) -> Self {
        let text = String::new();
        Self::new(at, Content::Scalar { text, plain: true })
    }

    /// The same without its last scalar, entry or field, however deep that stands.
    pub(crate) fn without_last(&self) -> Self {
        let content = match &*self.content {
            Content::Scalar { .. } => return Self::nothing(self.at),
            Content::List(list) => {
                let mut list = list.clone();
                if let Some(last) = list.pop().filter(Node::has_parts) {
                    list.push(last.without_last());
                }
                Content::List(list)
            }
            Content::Map(map) => {
                let mut map = map.clone();
                if let Some((key, last)) = map.pop().filter(|(_, last)| last.has_parts()) {
                    map.push((key, last.without_last()));
                }
                Content::Map(map)
            }
        };
        Self::new(self.at, content)
    }

    fn has_parts(&self) -> bool {
        match &*self.content {
            Content::Scalar { .. } => false,
            Content::List(list) => !list.is_empty(),
            Content::Map(map) => !map.is_empty(),
        }
    }

    /// The text of a scalar.
    pub(crate) fn text(&self) -> Option<&str> {
        match &*self.content {
            Content::Scalar { text, .. } => Some(text),
            _ => None,
        }
    }

    /// Whether there is no value: `~`, `null` or nothing at all.
    pub(crate) fn is_null(&self) -> bool {
        matches!(&*self.content, Content::Scalar { text, plain: true }
            if matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL"))
    }

    /// The value of a key that stands there exactly once.
    pub(crate) fn get(&self, key: &str) -> Option<&Node> {
        let Content::Map(map) = &*self.content else {
            return None;
        };
        let mut values = map.iter().filter(|(name, _)| name.text() == Some(key));
        match (values.next(), values.next()) {
            (Some((_, value)), None) => Some(value),
            _ => None,
        }
    }

    /// The place of what these steps lead to, or of the last value on the way that is there.
    pub(crate) fn find(&self, steps: &[Step]) -> Mark {
        let mut node = self;
        for step in steps {
            let inner = match (step, &*node.content) {
                (Step::Key(key), _) => node.get(key),
                (Step::Index(index), Content::List(list)) => list.get(*index),
                (Step::Index(_), _) => None,
            };
            match inner {
                Some(inner) => node = inner,
                None => break,
            }
        }
        node.at
    }
}

/// One document as far as it could be read.
pub(crate) struct Tree {
    /// `None` for an empty document.
    pub root: Option<Node>,
    /// What makes the document unusable. `root` then holds what came before it.
    pub fault: Option<Fault>,
    /// Whether the last value of `root` may be only the beginning of what was meant.
    pub is_cut: bool,
}

/// Reads the documents of a text whose first line has the number `first_line`.
///
/// Broken syntax ends the reading: the document with the fault is the last.
pub(crate) fn read(text: &str, first_line: usize) -> Vec<Tree> {
    let mut builder = Builder::new(first_line);
    let mut options = Options::default();
    options.strict_indentation = true;
    options.set_emit_comments(false);
    for event in Parser::new_from_str_with_options(text, options) {
        let step = match event {
            Ok((event, span)) => builder.event(event, span),
            Err(error) => Err(builder.broken(&error)),
        };
        if let Err(fault) = step {
            builder.abandon(fault);
            break;
        }
    }
    if let Some(last) = builder.trees.last_mut() {
        last.is_cut |= !text.ends_with(['\n', '\r']);
    }
    builder.trees
}

/// A list or an object that is being read.
struct Open {
    at: Mark,
    anchor: usize,
    list: Vec<Node>,
    /// `None` for a list.
    keys: Option<Keys>,
}

#[derive(Default)]
struct Keys {
    entries: Vec<(Node, Node)>,
    seen: HashSet<String>,
    /// A key whose value follows.
    pending: Option<Node>,
}

struct Builder {
    first_line: usize,
    trees: Vec<Tree>,
    open: Vec<Open>,
    root: Option<Node>,
    fault: Option<Fault>,
    anchors: HashMap<usize, Node>,
    /// Values of all documents of the text.
    nodes: usize,
    /// Whether the last event was a scalar, which a fault right behind it may have cut.
    after_scalar: bool,
}

impl Builder {
    fn new(first_line: usize) -> Self {
        Self {
            first_line,
            trees: Vec::new(),
            open: Vec::new(),
            root: None,
            fault: None,
            anchors: HashMap::new(),
            nodes: 0,
            after_scalar: false,
        }
    }

    fn event(&mut self, event: Event<'_>, span: Span) -> Result<(), Fault> {
        let at = self.mark(&span.start);
        self.after_scalar = matches!(event, Event::Scalar(..));
        if event.tag().is_some() {
            self.note(
                Fault::new(
                    "tags such as `!!str` are not read",
                    "remove it; a value in quotes is a text",
                )
                .at(at),
            );
        }
        match event {
            Event::Scalar(text, style, anchor, _) => {
                let plain = style == ScalarStyle::Plain;
                let text = text.into_owned();
                let node = Node::new(at, Content::Scalar { text, plain });
                self.finished(node, anchor)
            }
            Event::SequenceStart(_, anchor, _) => self.start(at, anchor, None),
            Event::MappingStart(_, anchor, _) => self.start(at, anchor, Some(Keys::default())),
            Event::SequenceEnd | Event::MappingEnd => self.end(),
            Event::Alias(anchor) => self.alias(at, anchor),
            Event::DocumentEnd => {
                self.finish_document();
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn start(&mut self, at: Mark, anchor: usize, keys: Option<Keys>) -> Result<(), Fault> {
        if self.open.len() >= DEPTH_MAX {
            return Err(Fault::new(
                format!("the document is nested more than {DEPTH_MAX} levels deep"),
                "no resource needs that",
            )
            .at(at));
        }
        self.open.push(Open {
            at,
            anchor,
            list: Vec::new(),
            keys,
        });
        Ok(())
    }

    fn end(&mut self) -> Result<(), Fault> {
        let Some(open) = self.open.pop() else {
            return Ok(());
        };
        let anchor = open.anchor;
        self.finished(open.close(), anchor)
    }

    fn alias(&mut self, at: Mark, anchor: usize) -> Result<(), Fault> {
        match self.anchors.get(&anchor) {
            Some(node) => {
                let node = Node { at, ..node.clone() };
                self.finished(node, 0)
            }
            None => {
                Err(Fault::new("an alias repeats what it stands in", "write the value out").at(at))
            }
        }
    }

    /// Puts a whole value where it belongs.
    fn finished(&mut self, node: Node, anchor: usize) -> Result<(), Fault> {
        // `nodes` bounds what is kept, `size` what is read: an alias is kept once and read each time.
        self.nodes += 1;
        if self.nodes.max(node.size) > NODES_PER_DOCUMENT_MAX {
            return Err(Fault::new(
                format!("the document has more than {NODES_PER_DOCUMENT_MAX} values"),
                "write several resources, and repeat less by aliases",
            )
            .at(node.at));
        }
        if anchor > 0 {
            self.anchors.insert(anchor, node.clone());
        }
        let Some(open) = self.open.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        if let Some(fault) = open.push(node) {
            self.note(fault);
        }
        Ok(())
    }

    /// Keeps the first fault; reading goes on, because what follows says what is denied.
    fn note(&mut self, fault: Fault) {
        self.fault.get_or_insert(fault);
    }

    fn finish_document(&mut self) {
        self.trees.push(Tree {
            root: self.root.take().filter(|root| !root.is_null()),
            fault: self.fault.take(),
            is_cut: false,
        });
        self.anchors.clear();
    }

    /// Ends the reading. What is kept is the document itself and its `metadata` and `spec` so far;
    /// of what stands open further inside, which may be half of what was meant, only a place.
    fn abandon(&mut self, fault: Fault) {
        self.note(fault);
        let is_cut = self.after_scalar || self.open.len() > 2;
        let inside = self.open.get(2).map(|open| open.at);
        self.open.truncate(2);
        if let (Some(at), Some(open)) = (inside, self.open.last_mut()) {
            drop(open.push(Node::nothing(at)));
        }
        while let Some(mut open) = self.open.pop() {
            if open
                .keys
                .as_ref()
                .is_some_and(|keys| keys.pending.is_some())
            {
                drop(open.push(Node::nothing(open.at)));
            }
            let node = open.close();
            match self.open.last_mut() {
                Some(outer) => drop(outer.push(node)),
                None => self.root = Some(node),
            }
        }
        self.finish_document();
        if let Some(last) = self.trees.last_mut() {
            last.is_cut = is_cut;
        }
    }

    fn broken(&self, error: &ScanError) -> Fault {
        let message = format!("this is not YAML: {}", shown(&error.info()));
        Fault::new(
            message,
            "check indentation, quotes and brackets here and just before",
        )
        .at(self.mark(error.marker()))
    }

    fn mark(&self, marker: &serde_saphyr::granit_parser::Marker) -> Mark {
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Mark {
            line: number(marker.line().saturating_sub(1) + self.first_line),
            column: number(marker.col() + 1),
        }
    }
}

impl Open {
    /// Adds a key, a value or an entry. Returns what is wrong with it.
    fn push(&mut self, node: Node) -> Option<Fault> {
        let Some(keys) = &mut self.keys else {
            self.list.push(node);
            return None;
        };
        if let Some(key) = keys.pending.take() {
            keys.entries.push((key, node));
            return None;
        }
        let fault = keys.fault_of_key(&node);
        keys.pending = Some(node);
        fault
    }

    fn close(self) -> Node {
        let content = match self.keys {
            Some(keys) => Content::Map(keys.entries),
            None => Content::List(self.list),
        };
        Node::new(self.at, content)
    }
}

impl Keys {
    fn fault_of_key(&mut self, key: &Node) -> Option<Fault> {
        let fault = match key.text() {
            None => Fault::new("a key is a list or an object", "write a word as the key"),
            Some("<<") => Fault::new("merge keys (`<<`) are not read", "write the fields out"),
            Some(text) if !self.seen.insert(text.to_owned()) => Fault::new(
                format!("`{}` is written twice", shown(text)),
                "keep one of them",
            ),
            Some(_) => return None,
        };
        Some(fault.at(key.at))
    }
}
