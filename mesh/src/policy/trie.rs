//! Patterns as a trie over path segments.
//!
//! A path is read by an [`Automaton`] made of the trie, or where patterns fork too much for one, by
//! walking the trie itself.
//!
//! Invariant: a walk visits a node at most once for each position in the path, and allocates
//! nothing for a path of up to [`SEGMENTS_INLINE`] segments unless more than [`FORKS_INLINE`] forks
//! are open at once.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

mod automaton;

use self::automaton::Automaton;
use super::glob::{Glob, Segment};
use super::leaf::{self, Entries, Key, Leaf, MethodSet, NO_RANK, Rank, Wanted};
use super::symbols::{Symbol, Symbols, UNKNOWN};
use crate::fast_map::FastMap;

/// How many segments of a path fit without allocation.
const SEGMENTS_INLINE: usize = 32;

/// How many open forks fit without allocation.
const FORKS_INLINE: usize = 16;

/// The empty segment behind a trailing `/`, which `*` does not stand for.
pub(super) const EMPTY_SEGMENT: Symbol = 0;

type NodeId = u32;
const ROOT: NodeId = 0;
const NO_NODE: NodeId = NodeId::MAX;

/// A list that allocates only beyond `N` items.
#[derive(Debug)]
pub(super) struct InlineList<T, const N: usize> {
    inline: [T; N],
    len: usize,
    spilled: Vec<T>,
}

impl<T: Copy, const N: usize> InlineList<T, N> {
    pub(super) fn new(filler: T) -> Self {
        Self {
            inline: [filler; N],
            len: 0,
            spilled: Vec::new(),
        }
    }

    pub(super) fn push(&mut self, item: T) {
        match self.inline.get_mut(self.len) {
            Some(slot) => {
                *slot = item;
                self.len += 1;
            }
            None => self.spilled.push(item),
        }
    }

    fn pop(&mut self) -> Option<T> {
        if let Some(item) = self.spilled.pop() {
            return Some(item);
        }
        self.len = self.len.checked_sub(1)?;
        self.inline.get(self.len).copied()
    }

    fn get(&self, at: usize) -> Option<T> {
        if at < N {
            return (at < self.len).then(|| self.inline.get(at).copied())?;
        }
        self.spilled.get(at - N).copied()
    }

    fn len(&self) -> usize {
        self.len + self.spilled.len()
    }

    fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.inline
            .iter_mut()
            .take(self.len)
            .chain(&mut self.spilled)
    }
}

/// A path's segments as symbols of the policy.
pub(super) type PathSymbols = InlineList<Symbol, SEGMENTS_INLINE>;

/// The first segments of a path.
#[derive(Clone, Copy, Debug)]
pub(super) struct PathView<'a> {
    symbols: &'a PathSymbols,
    len: usize,
}

impl<'a> PathView<'a> {
    /// The path as it is.
    pub(super) fn whole(symbols: &'a PathSymbols) -> Self {
        Self {
            symbols,
            len: symbols.len(),
        }
    }

    /// The path without a `/` at its end.
    pub(super) fn without_trailing_slash(symbols: &'a PathSymbols) -> Self {
        let len = symbols.len();
        let last = len.checked_sub(1).and_then(|last| symbols.get(last));
        Self {
            symbols,
            len: len - usize::from(last == Some(EMPTY_SEGMENT)),
        }
    }

    fn get(&self, at: usize) -> Option<Symbol> {
        (at < self.len).then(|| self.symbols.get(at))?
    }
}

/// A trie while rules are added.
#[derive(Debug)]
pub(super) struct Builder {
    nodes: Vec<Growing>,
}

#[derive(Debug, Default)]
struct Growing {
    literal: BTreeMap<Symbol, NodeId>,
    one: Option<NodeId>,
    any: Option<NodeId>,
    /// Reached by `**`.
    is_any: bool,
    entries: Entries,
}

impl Builder {
    pub(super) fn new() -> Self {
        Self {
            nodes: vec![Growing::default()],
        }
    }

    /// Adds one rule's methods under a pattern, for each of its keys. Ranks come in rising order.
    pub(super) fn add(
        &mut self,
        glob: &Glob,
        segments: &mut Symbols,
        keys: &[Key],
        (rank, methods): (Rank, &MethodSet),
    ) {
        let mut at = ROOT;
        for segment in glob.segments() {
            at = self.child(at, segment, segments);
        }
        if let Some(node) = self.nodes.get_mut(at as usize) {
            for key in keys {
                leaf::add(&mut node.entries, *key, rank, methods.clone());
            }
        }
    }

    fn child(&mut self, at: NodeId, segment: &Segment, segments: &mut Symbols) -> NodeId {
        let next = NodeId::try_from(self.nodes.len()).unwrap_or(NO_NODE);
        let Some(node) = self.nodes.get_mut(at as usize) else {
            return at;
        };
        let child = match segment {
            Segment::One => *node.one.get_or_insert(next),
            Segment::Any => *node.any.get_or_insert(next),
            Segment::Literal(literal) if literal.is_empty() => {
                *node.literal.entry(EMPTY_SEGMENT).or_insert(next)
            }
            Segment::Literal(literal) => {
                let symbol = segments.intern(literal);
                *node.literal.entry(symbol).or_insert(next)
            }
        };
        if child == next {
            self.nodes.push(Growing {
                is_any: *segment == Segment::Any,
                ..Growing::default()
            });
        }
        child
    }

    /// The finished trie.
    pub(super) fn build(self) -> Trie {
        let mut nodes: Vec<Node> = self.nodes.into_iter().map(Node::new).collect();
        // A child's number is greater than its parent's, so one pass from the back sees children
        // before their parents.
        for at in (0..nodes.len()).rev() {
            let Some(node) = nodes.get(at) else { continue };
            let (mut callers, mut rank_min) = (node.callers, node.rank_min);
            for child in node
                .children()
                .filter_map(|child| nodes.get(child as usize))
            {
                callers |= child.callers;
                rank_min = rank_min.min(child.rank_min);
            }
            if let Some(node) = nodes.get_mut(at) {
                (node.callers, node.rank_min) = (callers, rank_min);
            }
        }
        Trie {
            automaton: Automaton::build(&nodes),
            nodes: nodes.into(),
        }
    }
}

/// Patterns, and what the rules under each say.
#[derive(Debug)]
pub(super) struct Trie {
    nodes: Box<[Node]>,
    /// The same, deterministic; absent where that would be too large.
    automaton: Option<Automaton>,
}

#[derive(Debug)]
struct Node {
    literal: FastMap<Symbol, NodeId>,
    one: NodeId,
    any: NodeId,
    /// Reached by `**`.
    is_any: bool,
    leaf: Leaf,
    /// One bit for some caller of each entry here.
    own_callers: u64,
    /// The lowest rank here.
    own_rank_min: Rank,
    /// One bit for some caller of each entry here or below: without it there is nothing to find.
    callers: u64,
    /// The lowest rank here or below.
    rank_min: Rank,
}

impl Node {
    fn new(growing: Growing) -> Self {
        let callers = growing.entries.keys().map(|key| caller_bit(key.caller));
        let ranks = growing.entries.values().flatten().map(|(rank, _)| *rank);
        let callers = callers.fold(0, |all, bit| all | bit);
        let rank_min = ranks.min().unwrap_or(NO_RANK);
        Self {
            callers,
            rank_min,
            own_callers: callers,
            own_rank_min: rank_min,
            is_any: growing.is_any,
            literal: growing.literal.into_iter().collect(),
            one: growing.one.unwrap_or(NO_NODE),
            any: growing.any.unwrap_or(NO_NODE),
            leaf: growing
                .entries
                .into_iter()
                .map(|(key, rules)| (key, rules.into()))
                .collect(),
        }
    }

    fn children(&self) -> impl Iterator<Item = NodeId> {
        let literal = self.literal.values().copied();
        literal.chain(
            [self.one, self.any]
                .into_iter()
                .filter(|child| *child != NO_NODE),
        )
    }

    fn has_children(&self) -> bool {
        self.one != NO_NODE || self.any != NO_NODE || !self.literal.is_empty()
    }

    fn literal(&self, symbol: Symbol) -> Option<NodeId> {
        if symbol == UNKNOWN || self.literal.is_empty() {
            return None;
        }
        self.literal.get(&symbol).copied()
    }
}

fn caller_bit(caller: Symbol) -> u64 {
    1 << (caller % 64)
}

/// A node to visit, and how many segments lie behind it.
#[derive(Clone, Copy, Debug)]
struct Step {
    node: NodeId,
    at: u32,
    /// At a `**`: what follows it is tried at each position from `at` to before this one. Zero at
    /// any other node.
    sweep_until: u32,
}

const NO_STEP: Step = Step {
    node: NO_NODE,
    at: 0,
    sweep_until: 0,
};

impl Trie {
    pub(super) fn is_empty(&self) -> bool {
        self.nodes
            .first()
            .is_none_or(|root| root.rank_min == NO_RANK)
    }

    /// The lowest rank of a rule whose pattern covers `path` and that admits what is wanted.
    pub(super) fn find(&self, path: PathView<'_>, wanted: &Wanted<'_>) -> Rank {
        if self.is_empty() {
            return NO_RANK;
        }
        let bits = wanted.callers.iter().map(|caller| caller_bit(*caller));
        let callers = bits.fold(0, |all, bit| all | bit);
        match &self.automaton {
            Some(automaton) => self.read(automaton, path, callers, wanted),
            None => self.walk(path, callers, wanted),
        }
    }

    fn read(
        &self,
        automaton: &Automaton,
        path: PathView<'_>,
        bits: u64,
        wanted: &Wanted<'_>,
    ) -> Rank {
        let mut best = NO_RANK;
        automaton.visit(path, (wanted.callers, bits), |id| {
            // They come by their lowest rank, so most of them need no look.
            let node = self.nodes.get(id as usize);
            let Some(node) = node.filter(|node| node.own_rank_min < best) else {
                return ControlFlow::Break(());
            };
            if node.own_callers & bits != 0 {
                best = best.min(leaf::find(&node.leaf, wanted));
            }
            ControlFlow::Continue(())
        });
        best
    }

    fn walk(&self, path: PathView<'_>, callers: u64, wanted: &Wanted<'_>) -> Rank {
        let mut walk = Walk {
            trie: self,
            path,
            wanted,
            callers,
            best: NO_RANK,
            open: InlineList::new(NO_STEP),
            swept: None,
        };
        let mut next = Some(Step {
            node: ROOT,
            ..NO_STEP
        });
        while let Some(step) = next.or_else(|| walk.open.pop()) {
            next = walk.visit(step);
        }
        walk.best
    }
}

struct Walk<'a> {
    trie: &'a Trie,
    path: PathView<'a>,
    wanted: &'a Wanted<'a>,
    callers: u64,
    best: Rank,
    open: InlineList<Step, FORKS_INLINE>,
    /// From which position on each `**` with something behind it is swept.
    swept: Option<InlineList<(NodeId, u32), FORKS_INLINE>>,
}

impl Walk<'_> {
    /// Visits one node; returns the way on and notes a second one.
    fn visit(&mut self, step: Step) -> Option<Step> {
        let node = self.trie.nodes.get(step.node as usize)?;
        if !self.may_find(node) {
            return None;
        }
        let at = step.at as usize;
        if step.sweep_until > 0 {
            // Later positions wait as one step, however long the path is.
            if step.at + 1 < step.sweep_until {
                self.open.push(Step {
                    at: step.at + 1,
                    ..step
                });
            }
        } else if at == self.path.len {
            self.best = self.best.min(leaf::find(&node.leaf, self.wanted));
        }
        if node.any != NO_NODE {
            self.enter_any(node.any, step.at);
        }
        let segment = self.path.get(at)?;
        let to = |node| Step {
            node,
            at: step.at + 1,
            sweep_until: 0,
        };
        let literal = node.literal(segment);
        let one = Some(node.one).filter(|child| *child != NO_NODE && segment != EMPTY_SEGMENT);
        if let (Some(_), Some(one)) = (literal, one) {
            self.open.push(to(one));
        }
        literal.or(one).map(to)
    }

    /// A `**` covers whatever is left, and what follows it may begin here or later.
    fn enter_any(&mut self, any: NodeId, at: u32) {
        let Some(node) = self.trie.nodes.get(any as usize) else {
            return;
        };
        if !self.may_find(node) {
            return;
        }
        self.best = self.best.min(leaf::find(&node.leaf, self.wanted));
        if !node.has_children() {
            return;
        }
        let end = u32::try_from(self.path.len).unwrap_or(u32::MAX - 1) + 1;
        let swept = self
            .swept
            .get_or_insert_with(|| InlineList::new((NO_NODE, 0)));
        let before = swept.iter_mut().find(|(node, _)| *node == any);
        // What lies behind an earlier visit has been tried from there on.
        let until = before.map(|(_, from)| std::mem::replace(from, at.min(*from)));
        if until.is_none() {
            swept.push((any, at));
        }
        let until = until.unwrap_or(end);
        if at < until {
            self.open.push(Step {
                node: any,
                at,
                sweep_until: until,
            });
        }
    }

    fn may_find(&self, node: &Node) -> bool {
        node.callers & self.callers != 0 && node.rank_min < self.best
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::super::leaf::{Case, Method, caller, host, kind};
    use super::*;
    use crate::path::CanonicalPath;

    const KEY: Key = Key {
        caller: caller::ANYONE,
        host: host::ANY,
        kind: kind::PLAIN,
    };

    fn trie(patterns: &[String]) -> (Trie, Symbols, Vec<Glob>) {
        let mut builder = Builder::new();
        let mut symbols = Symbols::default();
        let mut globs = Vec::new();
        for (rank, pattern) in (0..).zip(patterns) {
            let glob = Glob::new(&pattern.parse().unwrap());
            builder.add(&glob, &mut symbols, &[KEY], (rank, &MethodSet::all()));
            globs.push(glob);
        }
        (builder.build(), symbols, globs)
    }

    fn symbols_of(path: &CanonicalPath, symbols: &Symbols) -> PathSymbols {
        let mut list = PathSymbols::new(UNKNOWN);
        for segment in path.segments() {
            let known = symbols.find(segment);
            list.push(if segment.is_empty() {
                EMPTY_SEGMENT
            } else {
                known
            });
        }
        list
    }

    fn wanted() -> Wanted<'static> {
        Wanted {
            callers: &[caller::ANYONE],
            hosts: &[host::ANY],
            kinds: &[kind::PLAIN],
            method: Method::new("GET"),
            case: Case::Exact,
        }
    }

    fn path() -> impl Strategy<Value = String> {
        let random = vec(select(vec!["a", "b", "c", "x"]), 0..6);
        (random, any::<bool>()).prop_map(|(segments, slash)| {
            let slash = if slash && !segments.is_empty() {
                "/"
            } else {
                ""
            };
            format!("/{}{slash}", segments.join("/"))
        })
    }

    fn pattern() -> impl Strategy<Value = String> {
        let random = vec(select(vec!["a", "b", "*", "**"]), 0..6);
        (random, any::<bool>()).prop_filter_map("no pattern", |(segments, slash)| {
            let slash = if slash && !segments.is_empty() {
                "/"
            } else {
                ""
            };
            let text = format!("/{}{slash}", segments.join("/"));
            text.parse::<crate::resource::PathPattern>().ok()?;
            Some(text)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: 2_000, ..ProptestConfig::default() })]

        #[test]
        fn reading_walking_and_trying_each_pattern_find_the_same(
            patterns in vec(pattern(), 1..12),
            paths in vec(path(), 8),
        ) {
            let (trie, symbols, globs) = trie(&patterns);
            let callers = caller_bit(caller::ANYONE);
            for path in paths {
                let path: CanonicalPath = path.parse().unwrap();
                let list = symbols_of(&path, &symbols);
                let view = PathView::whole(&list);
                let segments: Vec<&str> = path.segments().collect();
                let first = globs.iter().position(|glob| glob.matches(&segments));
                let first = first.map_or(NO_RANK, |at| Rank::try_from(at).unwrap());
                prop_assert!(trie.automaton.is_some());
                prop_assert_eq!(trie.find(view, &wanted()), first, "{}", path);
                prop_assert_eq!(trie.walk(view, callers, &wanted()), first, "{}", path);
            }
        }
    }

    #[test]
    fn patterns_that_fork_too_much_are_walked() {
        // One state for each set of these that a path has passed would be too many.
        let patterns: Vec<String> = (0..200).map(|at| format!("/**/s{at}/**/end")).collect();
        let (trie, symbols, _) = trie(&patterns);
        assert!(trie.automaton.is_none());
        for (path, rank) in [
            ("/s7/s3/end", 3),
            ("/x/s7/y/end", 7),
            ("/s7/end/x", NO_RANK),
            ("/end/s7", NO_RANK),
        ] {
            let list = symbols_of(&path.parse().unwrap(), &symbols);
            assert_eq!(trie.find(PathView::whole(&list), &wanted()), rank, "{path}");
        }
    }

    #[test]
    fn a_long_path_is_swept_in_linear_time() {
        let patterns: Vec<String> = (0..200).map(|at| format!("/**/a/**/b{at}")).collect();
        let (trie, symbols, _) = trie(&patterns);
        let path = "/a".repeat(20_000);
        let list = symbols_of(&path.parse().unwrap(), &symbols);
        let view = PathView::whole(&list);
        let callers = caller_bit(caller::ANYONE);
        // Quadratic, this would visit 200 million nodes; a test in the debug profile would hang.
        assert_eq!(trie.walk(view, callers, &wanted()), NO_RANK);
    }
}
