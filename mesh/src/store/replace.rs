//! One folder's files in place of what they were before.
//!
//! Invariant: each document ends as exactly one of these: in force; refused while the last good
//! version of its resource stays in force; refused as a second one of its resource; or a mark that
//! denies what it might have denied.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use super::{BrokenResource, Entry, Good, RESOURCES_PER_FOLDER_MAX};
use crate::resource::{
    Document, Known, Problem, Resource, ResourceKey, Severity, read_documents as read,
};

/// A file's path, and its text or why it could not be read.
pub(super) type File<'a> = (&'a str, Result<&'a str, &'a str>);

type Entries = BTreeMap<ResourceKey, Entry>;

/// A resource and the file of a document that was refused because another one stands for it.
pub(super) type Second = (ResourceKey, String);

/// What the store held before.
pub(super) struct Before<'a> {
    pub entries: &'a Entries,
    pub seconds: &'a BTreeSet<Second>,
}

/// What the store holds from now on.
pub(super) struct Replaced {
    pub entries: Entries,
    pub broken: Vec<BrokenResource>,
    pub seconds: BTreeSet<Second>,
    pub problems: Vec<Problem>,
}

/// One document as it was read.
struct Seen {
    file: String,
    line: usize,
    column: usize,
    known: Known,
    /// The key, when all of it could be read.
    key: Option<ResourceKey>,
    resource: Option<Resource>,
    problems: Vec<Problem>,
}

pub(super) fn replace(before: &Before<'_>, files: Vec<File<'_>>) -> Replaced {
    let seen = read_all(files);
    let claims = Claims::new(before, &seen);
    let mut replaced = Replaced {
        entries: before
            .entries
            .iter()
            .filter(|(key, _)| claims.held.contains(*key))
            .map(|(key, entry)| (key.clone(), stale(entry.clone())))
            .collect(),
        broken: Vec::new(),
        seconds: BTreeSet::new(),
        problems: Vec::new(),
    };
    let places: Vec<String> = seen.iter().map(Seen::place).collect();
    for (index, document) in seen.into_iter().enumerate() {
        let owner = document.key.as_ref().and_then(|key| claims.owner(key));
        match owner {
            Some(Owner::Document(owner)) if owner == index => {
                document.settle(before, &mut replaced);
            }
            Some(Owner::Document(owner)) => {
                let place = places.get(owner).cloned().unwrap_or_default();
                document.refuse_second(&place, &mut replaced);
            }
            Some(Owner::Held) => {
                let key = document
                    .key
                    .as_ref()
                    .and_then(|key| before.entries.get(key));
                let place = key.map(|entry| entry.file.clone()).unwrap_or_default();
                document.refuse_second(&place, &mut replaced);
            }
            None if claims.covered.contains(&index) => replaced.problems.extend(document.problems),
            None => document.mark(&mut replaced),
        }
    }
    replaced
}

fn stale(entry: Entry) -> Entry {
    Entry {
        is_stale: true,
        ..entry
    }
}

/// Whose version of a resource counts.
enum Owner {
    /// The document with this place in the list of all.
    Document(usize),
    /// The last good version of a file of which something can't be read.
    Held,
}

/// Which document or which last good version stands for each resource.
#[derive(Default)]
struct Claims {
    by_document: BTreeMap<ResourceKey, usize>,
    held: BTreeSet<ResourceKey>,
    /// Documents without a whole key that are taken for a newer version of a held resource.
    covered: BTreeSet<usize>,
}

impl Claims {
    fn new(before: &Before<'_>, seen: &[Seen]) -> Self {
        let mut claims = Self::default();
        // The file that a resource in force came from comes first: a second document of the same
        // name must not take over when the first one breaks. One that moved may.
        claims.claim(seen, |document, key| {
            let entry = before.entries.get(key);
            entry.is_some_and(|entry| entry.file == document.file)
        });
        claims.claim(seen, |document, key| {
            document.resource.is_some() && !before.seconds.contains(&document.second(key))
        });
        claims.hold(before.entries, seen);
        claims.claim(seen, |document, _| document.resource.is_some());
        claims.claim(seen, |_, _| true);
        claims
    }

    fn claim(&mut self, seen: &[Seen], may: impl Fn(&Seen, &ResourceKey) -> bool) {
        for (index, document) in seen.iter().enumerate() {
            if let Some(key) = &document.key
                && !self.held.contains(key)
                && may(document, key)
            {
                self.by_document.entry(key.clone()).or_insert(index);
            }
        }
    }

    /// Holds each resource that is missing from a file of which something was refused: only a file
    /// that is wholly good removes anything, since any other may have been cut off.
    fn hold(&mut self, before: &Entries, seen: &[Seen]) {
        let refused: BTreeSet<&str> = seen
            .iter()
            .filter(|document| document.resource.is_none())
            .map(|document| document.file.as_str())
            .collect();
        let missing = |(key, entry): &(&ResourceKey, &Entry)| {
            !self.by_document.contains_key(*key) && refused.contains(entry.file.as_str())
        };
        let missing: Vec<_> = before.iter().filter(missing).collect();
        self.cover(&missing, seen);
        self.held = missing.into_iter().map(|(key, _)| key.clone()).collect();
    }

    /// Takes documents without a whole key for newer versions of what is missing, each for one: a
    /// document too many may be a new Deny.
    fn cover(&mut self, missing: &[(&ResourceKey, &Entry)], seen: &[Seen]) {
        let vague = seen
            .iter()
            .enumerate()
            .filter(|(_, document)| document.key.is_none());
        let mut vague: Vec<_> = vague.collect();
        vague.sort_by_key(|(_, document)| Reverse(document.known.identifying()));
        let mut told = BTreeSet::new();
        for (index, document) in vague {
            let may_be = |(key, entry): &&(&ResourceKey, &Entry)| {
                entry.file == document.file && document.known.may_be(key)
            };
            let mut candidates = missing.iter().filter(may_be);
            if candidates.any(|(key, _)| told.insert(*key)) {
                self.covered.insert(index);
            }
        }
    }

    fn owner(&self, key: &ResourceKey) -> Option<Owner> {
        if self.held.contains(key) {
            return Some(Owner::Held);
        }
        self.by_document.get(key).copied().map(Owner::Document)
    }
}

impl Seen {
    fn new(file: &str, document: Document) -> Self {
        let (line, column, resource, problems) = match document.outcome {
            Ok(located) => (
                located.line,
                located.column,
                Some(located.value),
                Vec::new(),
            ),
            Err(problems) => {
                let first = problems.first();
                let (line, column) = first.map_or((1, 1), |first| (first.line, first.column));
                (line, column, None, problems)
            }
        };
        Self {
            file: file.to_owned(),
            line,
            column,
            key: match &resource {
                Some(resource) => Some(resource.key()),
                None => document.known.key(),
            },
            known: document.known,
            resource,
            problems,
        }
    }

    fn second(&self, key: &ResourceKey) -> Second {
        (key.clone(), self.file.clone())
    }

    fn place(&self) -> String {
        format!("{}:{}:{}", self.file, self.line, self.column)
    }

    /// This document stands for its resource: in force, or with the last good version, or a mark.
    fn settle(mut self, before: &Before<'_>, replaced: &mut Replaced) {
        let Some(key) = self.key.take() else {
            return;
        };
        let last = before.entries.get(&key);
        let is_stale = self.resource.is_none();
        let good = match self.resource.take() {
            Some(resource) => Some(Good::keep(resource, last.map(|entry| &entry.good))),
            None => last.map(|entry| entry.good.clone()),
        };
        let Some(good) = good else {
            return self.mark(replaced);
        };
        let file = self.file;
        let entry = Entry {
            file,
            good,
            is_stale,
        };
        replaced.entries.insert(key, entry);
        replaced.problems.extend(self.problems);
    }

    /// Refuses a document because another one stands for its resource.
    fn refuse_second(self, other: &str, replaced: &mut Replaced) {
        replaced.problems.extend(self.problems);
        if self.resource.is_none() {
            return;
        }
        let name = self
            .key
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default();
        let second = |key: &ResourceKey| (key.clone(), self.file.clone());
        replaced.seconds.extend(self.key.as_ref().map(second));
        replaced.problems.push(Problem {
            file: self.file,
            line: self.line,
            column: self.column,
            resource: self.key,
            field: Some("metadata.name".to_owned()),
            message: format!("{name} is already in {other}, which stays in force"),
            help: Some("give one of them another name, or remove it".to_owned()),
            severity: Severity::Error,
        });
    }

    /// Leaves a mark that denies what this document might have denied.
    fn mark(self, replaced: &mut Replaced) {
        if let Some(problem) = self.problems.first() {
            let broken = BrokenResource::new(self.known, problem.clone());
            replaced.broken.push(broken);
        }
        replaced.problems.extend(self.problems);
    }
}

fn read_all(mut files: Vec<File<'_>>) -> Vec<Seen> {
    files.sort_by_key(|(path, _)| *path);
    let mut seen: Vec<Seen> = Vec::new();
    for (path, content) in files {
        match content {
            Ok(text) => read(path, text, |document| {
                let document = if seen.len() < RESOURCES_PER_FOLDER_MAX {
                    document
                } else {
                    beyond_bound(path, document)
                };
                seen.push(Seen::new(path, document));
            }),
            Err(reason) => seen.push(Seen::new(path, unreadable(path, reason))),
        }
    }
    seen
}

fn unreadable(path: &str, reason: &str) -> Document {
    let message = format!("the file can't be read: {reason}");
    let help = "make it a readable file of UTF-8 text, or remove it";
    Document {
        known: Known::default(),
        outcome: Err(vec![Problem::of_file(path, message, help)]),
    }
}

fn beyond_bound(path: &str, document: Document) -> Document {
    let message = format!("the folder has more than {RESOURCES_PER_FOLDER_MAX} resources");
    let mut problem = Problem::of_file(path, message, "remove some");
    if let Ok(located) = &document.outcome {
        (problem.line, problem.column) = (located.line, located.column);
    }
    problem.resource = document.known.key();
    Document {
        known: document.known,
        outcome: Err(vec![problem]),
    }
}
