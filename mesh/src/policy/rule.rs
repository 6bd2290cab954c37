//! The rules that concern one workload, in plain words: what [`super::compile`] indexes and what
//! [`crate::explain`] goes through one by one.
//!
//! Invariant: everything that depends on the workload alone is settled here: selection, port
//! names, identities written in full, and the spellings of a service's name. Policies stand in the
//! order of namespace and name, rules in their own order, and each rule's rank follows that order.

use std::sync::Arc;

use super::glob::Glob;
use super::leaf::Rank;
use crate::spiffe::SpiffeId;

/// Which way a policy decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
pub enum Effect {
    /// It denies what it matches; this comes first.
    Deny,
    /// It allows what it matches.
    Allow,
}

/// A policy that selects the workload.
#[derive(Debug)]
pub(crate) struct Selected {
    /// `namespace/name`.
    pub(crate) name: Arc<str>,
    pub(crate) effect: Effect,
    /// In mode Audit: evaluated beside, never counted.
    pub(crate) audit: bool,
    pub(crate) ports: Ports,
    pub(crate) rules: Vec<Rule>,
}

/// The ports that a policy covers, of this workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ports {
    /// It names none.
    Open,
    /// A Deny with a port name that does not resolve.
    Unresolved,
    /// These: what of the policy's list resolves.
    Named(Vec<u16>),
}

/// One rule.
#[derive(Debug)]
pub(crate) struct Rule {
    pub(crate) name: Arc<str>,
    pub(crate) rank: Rank,
    pub(crate) from: Vec<From>,
    pub(crate) to: Vec<To>,
}

/// Whom a rule concerns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum From {
    /// This identity.
    Exact(SpiffeId),
    /// Each service account of this namespace of our own trust domain.
    Namespace(Box<str>),
    /// Each identity of our own trust domain.
    Anyone,
    /// A plaintext caller.
    Unauthenticated,
}

/// What a rule concerns.
#[derive(Clone, Debug)]
pub(crate) enum To {
    Http(ToHttp),
    Grpc(ToGrpc),
    Tcp,
    Anything,
}

#[derive(Clone, Debug)]
pub(crate) struct ToHttp {
    pub(crate) methods: Names,
    pub(crate) paths: Vec<Glob>,
    /// As written, with every spelling that counts as the same.
    pub(crate) hosts: Option<Vec<HostName>>,
    /// In lower case.
    pub(crate) upgrades: Option<Vec<Box<str>>>,
}

#[derive(Clone, Debug)]
pub(crate) struct ToGrpc {
    pub(crate) service: Box<str>,
    pub(crate) methods: Names,
    /// The same as path patterns.
    pub(crate) paths: Vec<Glob>,
}

/// Every name, or the listed ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Names {
    All,
    Listed(Vec<Box<str>>),
}

/// A host of a rule.
#[derive(Clone, Debug)]
pub(crate) struct HostName {
    /// As written.
    pub(crate) text: Box<str>,
    /// Each host of an authority that it means, in lower case.
    pub(crate) spellings: Vec<String>,
}
