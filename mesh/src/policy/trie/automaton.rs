//! A trie made deterministic: one state for each set of nodes that a path can reach, so a path is
//! read once whatever the patterns fork.
//!
//! Invariant: it finds what walking the trie finds. It is given up while it is built, and the trie
//! is walked, where patterns fork so much that it would be large: its size is bounded by the
//! trie's.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::ControlFlow;

use super::{EMPTY_SEGMENT, NO_NODE, NO_RANK, Node, NodeId, PathView, ROOT};
use crate::fast_map::FastMap;
use crate::policy::symbols::{Symbol, UNKNOWN};

/// What a bound grants beyond a multiple of the trie's nodes.
const ALLOWANCE: usize = 524_288;
/// States, nodes in states and transitions for each node of the trie, at most.
const PER_NODE_MAX: usize = 8;

/// How many leaves of a state are tried one by one.
const LEAVES_INLINE: usize = 8;

type StateId = u32;
const DEAD: StateId = StateId::MAX;

#[derive(Debug)]
pub(super) struct Automaton {
    /// The first is where each path starts.
    states: Box<[State]>,
}

#[derive(Debug)]
struct State {
    next: FastMap<Symbol, StateId>,
    /// After a segment that `next` does not list.
    other: StateId,
    /// After the empty segment behind a trailing `/`.
    empty: StateId,
    /// One bit for some caller of each entry here or later.
    callers: u64,
    /// The nodes whose entries hold when the path ends here, by the lowest rank of each.
    leaves: Box<[NodeId]>,
    /// The same by caller, where there are more than [`LEAVES_INLINE`].
    by_caller: Option<FastMap<Symbol, Box<[NodeId]>>>,
}

impl Automaton {
    /// `None` when it would be too large.
    pub(super) fn build(nodes: &[Node]) -> Option<Self> {
        let mut growing = Growing {
            nodes,
            ids: HashMap::new(),
            sets: Vec::new(),
            left: nodes.len() * PER_NODE_MAX + ALLOWANCE,
        };
        growing.state_of(vec![ROOT])?;
        let mut states = Vec::new();
        while let Some(set) = growing.sets.get(states.len()).cloned() {
            states.push(growing.grow(&set)?);
        }
        Some(Self {
            states: states.into(),
        })
    }

    /// The state after the path; `None` when nothing there concerns any of `callers`.
    fn read(&self, path: PathView<'_>, callers: u64) -> Option<&State> {
        let mut state = self.states.first()?;
        for at in 0..path.len {
            let next = match path.get(at) {
                Some(EMPTY_SEGMENT) => state.empty,
                Some(UNKNOWN) | None => state.other,
                Some(symbol) => state.next.get(&symbol).copied().unwrap_or(state.other),
            };
            state = self.states.get(next as usize)?;
            if state.callers & callers == 0 {
                return None;
            }
        }
        Some(state)
    }

    /// Calls `visit` with the nodes whose patterns cover the path and that may concern a caller,
    /// by the lowest rank of each, until it says to stop.
    pub(super) fn visit(
        &self,
        path: PathView<'_>,
        (callers, bits): (&[Symbol], u64),
        mut visit: impl FnMut(NodeId) -> ControlFlow<()>,
    ) {
        let Some(state) = self.read(path, bits) else {
            return;
        };
        let mut visit_all = |nodes: &[NodeId]| nodes.iter().copied().try_for_each(&mut visit);
        // To stop ends one list only: each list has its own order of ranks.
        match &state.by_caller {
            None => drop_flow(visit_all(&state.leaves)),
            Some(by_caller) => {
                for nodes in callers.iter().filter_map(|caller| by_caller.get(caller)) {
                    drop_flow(visit_all(nodes));
                }
            }
        }
    }
}

/// Both ways to end are an end.
fn drop_flow(_: ControlFlow<()>) {}

struct Growing<'a> {
    nodes: &'a [Node],
    ids: HashMap<Vec<NodeId>, StateId>,
    sets: Vec<Vec<NodeId>>,
    /// How much more may be stored.
    left: usize,
}

impl<'a> Growing<'a> {
    fn node(&self, id: NodeId) -> Option<&'a Node> {
        self.nodes.get(id as usize)
    }

    /// The state of a set of nodes and of the `**` that follow them; `None` beyond the bound.
    fn state_of(&mut self, mut set: Vec<NodeId>) -> Option<StateId> {
        let mut at = 0;
        while let Some(id) = set.get(at) {
            let any = self.node(*id).map_or(NO_NODE, |node| node.any);
            if any != NO_NODE && !set.contains(&any) {
                set.push(any);
            }
            at += 1;
        }
        set.sort_unstable();
        set.dedup();
        if set.is_empty() {
            return Some(DEAD);
        }
        if let Some(id) = self.ids.get(&set) {
            return Some(*id);
        }
        self.left = self.left.checked_sub(set.len() + 1)?;
        let id = StateId::try_from(self.sets.len()).ok()?;
        self.sets.push(set.clone());
        self.ids.insert(set, id);
        Some(id)
    }

    fn grow(&mut self, set: &[NodeId]) -> Option<State> {
        let nodes: Vec<(NodeId, &Node)> = set
            .iter()
            .filter_map(|id| Some((*id, self.node(*id)?)))
            .collect();
        let symbols: BTreeSet<Symbol> = nodes
            .iter()
            .flat_map(|(_, node)| node.literal.keys().copied())
            .filter(|symbol| *symbol != EMPTY_SEGMENT)
            .collect();
        self.left = self.left.checked_sub(symbols.len())?;
        let mut next = FastMap::default();
        for symbol in symbols {
            next.insert(symbol, self.state_of(after(&nodes, Some(symbol)))?);
        }
        let mut leaves: Vec<(NodeId, &Node)> = nodes.clone();
        leaves.retain(|(_, node)| node.own_rank_min != NO_RANK);
        leaves.sort_by_key(|(_, node)| node.own_rank_min);
        let leaves: Box<[NodeId]> = leaves.into_iter().map(|(id, _)| id).collect();
        Some(State {
            next,
            other: self.state_of(after(&nodes, None))?,
            empty: self.state_of(after(&nodes, Some(EMPTY_SEGMENT)))?,
            callers: nodes.iter().fold(0, |all, (_, node)| all | node.callers),
            by_caller: self.by_caller(&leaves),
            leaves,
        })
    }

    /// `None` where trying each is as good, or where this would be too large.
    fn by_caller(&mut self, leaves: &[NodeId]) -> Option<FastMap<Symbol, Box<[NodeId]>>> {
        if leaves.len() <= LEAVES_INLINE {
            return None;
        }
        let mut lists: BTreeMap<Symbol, Vec<NodeId>> = BTreeMap::new();
        let mut left = self.left;
        for id in leaves {
            let callers = self.node(*id)?.leaf.keys().map(|key| key.caller);
            for caller in callers {
                let list = lists.entry(caller).or_default();
                if list.last() != Some(id) {
                    left = left.checked_sub(1)?;
                    list.push(*id);
                }
            }
        }
        self.left = left;
        let lists = lists.into_iter();
        Some(lists.map(|(caller, list)| (caller, list.into())).collect())
    }
}

/// The nodes that one segment leads to; `None` is a segment that no node lists.
fn after(nodes: &[(NodeId, &Node)], segment: Option<Symbol>) -> Vec<NodeId> {
    let mut set = Vec::new();
    for (id, node) in nodes {
        let literal = segment.and_then(|symbol| node.literal.get(&symbol));
        set.extend(literal);
        if node.one != NO_NODE && segment != Some(EMPTY_SEGMENT) {
            set.push(node.one);
        }
        if node.is_any {
            set.push(*id);
        }
    }
    set
}
