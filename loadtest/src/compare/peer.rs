//! One target of a comparison, ready for load.

use std::collections::BTreeMap;

use http::uri::Authority;

use super::process::Process;
use crate::usage::resident_kib;

/// A target with its processes.
#[derive(Debug, Default)]
pub(crate) struct Peer {
    pub(crate) name: String,
    /// Of the URL to call.
    pub(crate) authority: String,
    /// A forward proxy on the way.
    pub(crate) via: Option<Authority>,
    /// The proxies, in the order of the way; their CPU and memory are measured.
    pub(crate) hops: Vec<Process>,
    /// Whatever else must live.
    pub(crate) others: Vec<Process>,
    /// Resident memory of each hop before any load.
    pub(crate) idle_kib: Vec<u64>,
    /// Whether it carries gRPC.
    pub(crate) grpc: bool,
    pub(crate) configurations: BTreeMap<String, String>,
    pub(crate) versions: BTreeMap<String, String>,
}

impl Peer {
    /// Writes down what the hops use now.
    pub(crate) fn note_idle(&mut self) {
        let idle = self
            .hops
            .iter()
            .map(|hop| resident_kib(hop.pid).unwrap_or(0));
        self.idle_kib = idle.collect();
    }
}
