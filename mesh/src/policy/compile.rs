//! From rules to tables: one set of tries for each port that a policy names, one for all others.

use std::collections::BTreeSet;

use super::Caller;
use super::glob::Glob;
use super::leaf::{Key, MethodSet, Rank, caller, host, kind};
use super::rule::{Effect, From, Names, Ports, Rule, Selected, To, ToHttp};
use super::symbols::{FIRST, Symbol, Symbols, UNKNOWN};
use super::trie::{Builder, Trie};
use crate::spiffe::TrustDomain;

/// The names that the rules of a workload mention, by sort.
#[derive(Debug, Default)]
pub(super) struct Vocabulary {
    pub(super) segments: Symbols,
    pub(super) hosts: Symbols,
    identities: Symbols,
    namespaces: Symbols,
    upgrades: Vec<Box<str>>,
}

impl Vocabulary {
    /// The numbers by which rules may know a caller: at most three, and how many.
    pub(super) fn callers(&self, caller: Caller<'_>, own: &TrustDomain) -> ([Symbol; 3], usize) {
        let Caller::Mesh(id) = caller else {
            return ([caller::UNAUTHENTICATED, UNKNOWN, UNKNOWN], 1);
        };
        let exact = even(self.identities.find(id.as_str()));
        let is_own = id.trust_domain() == own.as_str();
        let workload = id
            .workload()
            .filter(|_| is_own && !self.namespaces.is_empty());
        let namespace = workload.map_or(UNKNOWN, |(name, _)| odd(self.namespaces.find(name)));
        let anyone = if is_own { caller::ANYONE } else { UNKNOWN };
        let (mut known, mut count) = ([UNKNOWN; 3], 0);
        for symbol in [exact, anyone, namespace] {
            if let Some(slot) = known.get_mut(count).filter(|_| symbol != UNKNOWN) {
                *slot = symbol;
                count += 1;
            }
        }
        (known, count)
    }

    /// The number of an upgrade token in any case, or [`UNKNOWN`].
    pub(super) fn upgrade(&self, token: &str) -> Symbol {
        let at = self
            .upgrades
            .iter()
            .position(|name| name.eq_ignore_ascii_case(token));
        at.and_then(|at| Symbol::try_from(at).ok())
            .map_or(UNKNOWN, |at| at + FIRST)
    }

    fn intern_upgrade(&mut self, name: &str) -> Symbol {
        if self.upgrade(name) == UNKNOWN {
            self.upgrades.push(name.into());
        }
        self.upgrade(name)
    }

    fn intern_caller(&mut self, from: &From) -> Symbol {
        match from {
            From::Exact(id) => even(self.identities.intern(id.as_str())),
            From::Namespace(name) => odd(self.namespaces.intern(name)),
            From::Anyone => caller::ANYONE,
            From::Unauthenticated => caller::UNAUTHENTICATED,
        }
    }
}

/// Identities and namespaces share one range of numbers: even ones and odd ones.
fn even(symbol: Symbol) -> Symbol {
    symbol.checked_mul(2).unwrap_or(UNKNOWN)
}

fn odd(symbol: Symbol) -> Symbol {
    symbol.checked_mul(2).map_or(UNKNOWN, |even| even + 1)
}

/// What the rules of one action and mode say about one port.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) http: Trie,
    /// Who may, or may not, send opaque bytes; sorted by caller, one entry each.
    pub(super) opaque: Box<[(Symbol, Rank)]>,
}

impl Table {
    pub(super) fn is_empty(&self) -> bool {
        self.http.is_empty() && self.opaque.is_empty()
    }
}

/// Everything about one port.
#[derive(Debug)]
pub(super) struct PortTables {
    pub(super) deny: Table,
    pub(super) allow: Table,
    /// The same of the policies in mode Audit; absent when they say nothing.
    pub(super) audit: Option<Box<(Table, Table)>>,
    pub(super) carries_opaque: bool,
}

/// The tables by port.
#[derive(Debug)]
pub(super) struct Tables {
    /// Sorted by port.
    named: Box<[(u16, PortTables)]>,
    other: PortTables,
}

impl Tables {
    pub(super) fn of(&self, port: u16) -> &PortTables {
        let at = self.named.binary_search_by_key(&port, |(port, _)| *port);
        let found = at.ok().and_then(|at| self.named.get(at));
        found.map_or(&self.other, |(_, tables)| tables)
    }
}

/// Indexes the rules.
pub(super) fn compile(selected: &[Selected], left_open: bool) -> (Tables, Vocabulary) {
    let mut vocabulary = Vocabulary::default();
    let named: BTreeSet<u16> = selected
        .iter()
        .flat_map(|policy| match &policy.ports {
            Ports::Named(ports) => ports.as_slice(),
            Ports::Open | Ports::Unresolved => &[],
        })
        .copied()
        .collect();
    let tables = Tables {
        named: named
            .into_iter()
            .map(|port| {
                (
                    port,
                    port_tables((selected, left_open), Some(port), &mut vocabulary),
                )
            })
            .collect(),
        other: port_tables((selected, left_open), None, &mut vocabulary),
    };
    (tables, vocabulary)
}

/// Whether a policy covers a port; `None` is any port that no policy names.
pub(super) fn covers(ports: &Ports, port: Option<u16>) -> bool {
    match (ports, port) {
        (Ports::Open | Ports::Unresolved, _) => true,
        (Ports::Named(ports), Some(port)) => ports.contains(&port),
        (Ports::Named(_), None) => false,
    }
}

fn port_tables(
    (selected, left_open): (&[Selected], bool),
    port: Option<u16>,
    vocabulary: &mut Vocabulary,
) -> PortTables {
    let mut table = |effect, audit| {
        let policies = selected
            .iter()
            .filter(|policy| policy.effect == effect && policy.audit == audit)
            .filter(|policy| covers(&policy.ports, port));
        build_table(effect, policies, vocabulary)
    };
    let deny = table(Effect::Deny, false);
    let allow = table(Effect::Allow, false);
    let audit = (table(Effect::Deny, true), table(Effect::Allow, true));
    let says_something = !audit.0.is_empty() || !audit.1.is_empty();
    PortTables {
        deny,
        allow,
        audit: says_something.then(|| Box::new(audit)),
        carries_opaque: carries_opaque(selected, left_open, port),
    }
}

/// Whether opaque bytes may enter a port at all.
///
/// A port named for http or grpc never carries them, nor one that a Deny for either may have meant
/// with a name that does not resolve. A policy without `ports` leaves a port open for http or
/// grpc; then it takes an Allow for `tcp` or `anything` that names the port. Of a port about which
/// no policy speaks, nothing is known that forbids it. `left_open` says that a policy that can't be
/// read may have left every port open.
pub(super) fn carries_opaque(
    selected: &[Selected],
    mut left_open: bool,
    port: Option<u16>,
) -> bool {
    let mut named_for_opaque = false;
    for policy in selected.iter().filter(|policy| !policy.audit) {
        if !covers(&policy.ports, port) {
            continue;
        }
        let has =
            |wanted: fn(&To) -> bool| policy.rules.iter().flat_map(|rule| &rule.to).any(wanted);
        let for_http = has(|to| matches!(to, To::Http(_) | To::Grpc(_)));
        let for_opaque = has(|to| matches!(to, To::Tcp | To::Anything));
        match policy.ports {
            Ports::Open => left_open |= for_http,
            Ports::Named(_) | Ports::Unresolved if for_http => return false,
            Ports::Named(_) => named_for_opaque |= for_opaque && policy.effect == Effect::Allow,
            Ports::Unresolved => {}
        }
    }
    named_for_opaque || !left_open
}

fn build_table<'a>(
    effect: Effect,
    policies: impl Iterator<Item = &'a Selected>,
    vocabulary: &mut Vocabulary,
) -> Table {
    let mut http = Builder::new();
    let mut opaque: Vec<(Symbol, Rank)> = Vec::new();
    for rule in policies.flat_map(|policy| &policy.rules) {
        let callers: Vec<Symbol> = rule
            .from
            .iter()
            .map(|from| vocabulary.intern_caller(from))
            .collect();
        for to in &rule.to {
            add(&mut http, effect, (rule, &callers), to, vocabulary);
        }
        if concerns_opaque(effect, rule) {
            opaque.extend(callers.iter().map(|caller| (*caller, rule.rank)));
        }
    }
    opaque.sort_unstable();
    opaque.dedup_by_key(|(caller, _)| *caller);
    Table {
        http: http.build(),
        opaque: opaque.into(),
    }
}

/// On an opaque connection a Deny counts by its `from` alone.
pub(super) fn concerns_opaque(effect: Effect, rule: &Rule) -> bool {
    match effect {
        Effect::Deny => true,
        Effect::Allow => rule
            .to
            .iter()
            .any(|to| matches!(to, To::Tcp | To::Anything)),
    }
}

fn add(
    trie: &mut Builder,
    effect: Effect,
    (rule, callers): (&Rule, &[Symbol]),
    to: &To,
    vocabulary: &mut Vocabulary,
) {
    let Some(concern) = concern_of(to, effect, vocabulary) else {
        return;
    };
    let mut keys = Vec::new();
    for &caller in callers {
        for &host in &concern.hosts {
            let kinds = concern.kinds.iter();
            keys.extend(kinds.map(|&kind| Key { caller, host, kind }));
        }
    }
    for glob in concern.globs {
        let glob = match effect {
            Effect::Deny => glob.without_trailing_slash(),
            Effect::Allow => glob,
        };
        let methods = (rule.rank, &concern.methods);
        trie.add(&glob, &mut vocabulary.segments, &keys, methods);
    }
}

/// What a target says about requests, as the trie has it.
struct Concern {
    globs: Vec<Glob>,
    hosts: Vec<Symbol>,
    kinds: Vec<Symbol>,
    methods: MethodSet,
}

fn concern_of(to: &To, effect: Effect, vocabulary: &mut Vocabulary) -> Option<Concern> {
    let plain = match effect {
        Effect::Deny => kind::ANY,
        Effect::Allow => kind::PLAIN,
    };
    let on_any_host = |globs, kind, methods| Concern {
        globs,
        hosts: vec![host::ANY],
        kinds: vec![kind],
        methods,
    };
    Some(match (to, effect) {
        (To::Http(http), _) => Concern {
            globs: http.paths.clone(),
            hosts: hosts_of(http, effect, vocabulary),
            kinds: match &http.upgrades {
                None => vec![plain],
                Some(names) => {
                    let names = names.iter();
                    names.map(|name| vocabulary.intern_upgrade(name)).collect()
                }
            },
            methods: methods_of(&http.methods),
        },
        // A caller who leaves the content type out, or names another, is denied all the same.
        (To::Grpc(grpc), Effect::Deny) => {
            on_any_host(grpc.paths.clone(), kind::ANY, MethodSet::all())
        }
        (To::Grpc(grpc), Effect::Allow) => {
            on_any_host(grpc.paths.clone(), kind::GRPC, MethodSet::of(["POST"]))
        }
        (To::Tcp, Effect::Allow) => return None,
        // The caller chooses what to speak, so a Deny for bytes covers requests as well.
        (To::Tcp | To::Anything, _) => {
            on_any_host(vec![Glob::everything()], plain, MethodSet::all())
        }
    })
}

fn hosts_of(http: &ToHttp, effect: Effect, vocabulary: &mut Vocabulary) -> Vec<Symbol> {
    let Some(hosts) = &http.hosts else {
        return vec![host::ANY];
    };
    let spellings = hosts.iter().flat_map(|host| &host.spellings);
    let mut symbols: Vec<Symbol> = spellings
        .map(|name| vocabulary.hosts.intern(name))
        .collect();
    if effect == Effect::Deny {
        symbols.push(host::ABSENT);
    }
    symbols
}

fn methods_of(names: &Names) -> MethodSet {
    match names {
        Names::All => MethodSet::all(),
        Names::Listed(names) => MethodSet::of(names.iter().map(|name| &**name)),
    }
}
