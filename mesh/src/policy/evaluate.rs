//! One decision: a few lookups, nothing allocated.

use super::compile::{PortTables, Table, Vocabulary};
use super::leaf::{Case, Method, NO_RANK, Rank, Wanted, host, kind};
use super::rule::Effect;
use super::symbols::{Symbol, UNKNOWN};
use super::trie::{EMPTY_SEGMENT, PathSymbols, PathView};
use super::{Ask, Caller, HttpAsk};
use crate::spiffe::TrustDomain;

/// The first rule of each action and mode that matches, by rank; [`NO_RANK`] for none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    pub(super) deny: Rank,
    pub(super) allow: Rank,
    pub(super) audit_deny: Rank,
    pub(super) audit_allow: Rank,
}

impl Found {
    /// No rule.
    pub(crate) fn nothing() -> Self {
        Self {
            deny: NO_RANK,
            allow: NO_RANK,
            audit_deny: NO_RANK,
            audit_allow: NO_RANK,
        }
    }

    /// Takes note of a rule that matches.
    pub(crate) fn note(&mut self, effect: Effect, audit: bool, rank: Rank) {
        let first = match (effect, audit) {
            (Effect::Deny, false) => &mut self.deny,
            (Effect::Allow, false) => &mut self.allow,
            (Effect::Deny, true) => &mut self.audit_deny,
            (Effect::Allow, true) => &mut self.audit_allow,
        };
        *first = rank.min(*first);
    }
}

/// Looks up the first rule of each action and mode that matches.
pub(super) fn find(
    tables: &PortTables,
    vocabulary: &Vocabulary,
    own: &TrustDomain,
    (caller, ask): (Caller<'_>, &Ask<'_>),
) -> Found {
    let (callers, known) = vocabulary.callers(caller, own);
    let callers = callers.get(..known).unwrap_or_default();
    match ask {
        Ask::Opaque => {
            let deny = |table: &Table| find_opaque(table, callers);
            let allow = |table: &Table| {
                let carried = tables.carries_opaque;
                if carried {
                    find_opaque(table, callers)
                } else {
                    NO_RANK
                }
            };
            find_in(tables, deny, allow)
        }
        Ask::Http(ask) => {
            let call = HttpCall::new(ask, vocabulary);
            let deny = |table: &Table| call.find_deny(table, callers);
            let allow = |table: &Table| call.find_allow(table, callers);
            find_in(tables, deny, allow)
        }
    }
}

fn find_in(
    tables: &PortTables,
    deny: impl Fn(&Table) -> Rank,
    allow: impl Fn(&Table) -> Rank,
) -> Found {
    let audit = tables.audit.as_deref();
    Found {
        deny: deny(&tables.deny),
        allow: allow(&tables.allow),
        audit_deny: audit.map_or(NO_RANK, |(table, _)| deny(table)),
        audit_allow: audit.map_or(NO_RANK, |(_, table)| allow(table)),
    }
}

fn find_opaque(table: &Table, callers: &[Symbol]) -> Rank {
    let ranks = callers.iter().filter_map(|caller| {
        let at = table
            .opaque
            .binary_search_by_key(caller, |(caller, _)| *caller)
            .ok()?;
        table.opaque.get(at).map(|(_, rank)| *rank)
    });
    ranks.min().unwrap_or(NO_RANK)
}

/// A request in the policy's own numbers.
struct HttpCall<'a> {
    path: PathSymbols,
    method: Method<'a>,
    host: Symbol,
    /// `None` for a request without an upgrade.
    upgrade: Option<Symbol>,
    /// A `POST` of gRPC's content type to a path of gRPC's form.
    grpc: bool,
}

impl<'a> HttpCall<'a> {
    fn new(ask: &HttpAsk<'a>, vocabulary: &Vocabulary) -> Self {
        let mut path = PathSymbols::new(UNKNOWN);
        for segment in ask.path.segments() {
            path.push(match segment {
                "" => EMPTY_SEGMENT,
                _ => vocabulary.segments.find(segment),
            });
        }
        Self {
            path,
            method: Method::new(ask.method),
            host: match ask.authority {
                None => host::ABSENT,
                Some(_) if vocabulary.hosts.is_empty() => UNKNOWN,
                Some(authority) => vocabulary.hosts.find(authority.host()),
            },
            upgrade: ask.upgrade.map(|token| vocabulary.upgrade(token)),
            grpc: ask.is_grpc_call(),
        }
    }

    fn find_allow(&self, table: &Table, callers: &[Symbol]) -> Rank {
        let kinds: &[Symbol] = match (&self.upgrade, self.grpc) {
            (Some(upgrade), _) => std::slice::from_ref(upgrade),
            (None, true) => &[kind::PLAIN, kind::GRPC],
            (None, false) => &[kind::PLAIN],
        };
        let hosts = [host::ANY, self.host];
        let known = if is_name(self.host) { 2 } else { 1 };
        let wanted = Wanted {
            callers,
            hosts: hosts.get(..known).unwrap_or_default(),
            kinds,
            method: self.method,
            case: Case::Exact,
        };
        table.http.find(PathView::whole(&self.path), &wanted)
    }

    fn find_deny(&self, table: &Table, callers: &[Symbol]) -> Rank {
        let kinds = [kind::ANY, self.upgrade.unwrap_or(UNKNOWN)];
        let hosts = [host::ANY, self.host];
        let known = |symbol| if symbol == UNKNOWN { 1 } else { 2 };
        let wanted = Wanted {
            callers,
            hosts: hosts.get(..known(self.host)).unwrap_or_default(),
            kinds: kinds.get(..known(kinds[1])).unwrap_or_default(),
            method: self.method,
            case: Case::Any,
        };
        table
            .http
            .find(PathView::without_trailing_slash(&self.path), &wanted)
    }
}

/// Whether a host's number stands for a name that some rule mentions.
fn is_name(host: Symbol) -> bool {
    host != UNKNOWN && host != host::ABSENT
}
