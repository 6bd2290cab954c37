//! One target of a comparison, ready for load.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use http::uri::Authority;
use http::{HeaderMap, Method};

use super::process::Process;
use crate::target::{Call, KeyExchange, Protocol, TlsFiles};
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
    /// The called side's proxy, as the caller's would connect to it.
    pub(crate) inbound: Option<Inbound>,
    /// What that chose from the key exchanges that sidecars offer.
    pub(crate) key_exchange: Option<String>,
    pub(crate) configurations: BTreeMap<String, String>,
    pub(crate) versions: BTreeMap<String, String>,
}

/// The called side's proxy: the last of the hops, and what it takes to call it.
#[derive(Clone, Debug)]
pub(crate) struct Inbound {
    pub(crate) address: SocketAddr,
    pub(crate) protocol: Protocol,
    pub(crate) headers: HeaderMap,
    /// The caller's certificate.
    pub(crate) tls: TlsFiles,
}

impl Inbound {
    /// A GET of `path`.
    ///
    /// # Errors
    ///
    /// When the path makes no URL.
    pub(crate) fn call(&self, path: &str, key_exchange: KeyExchange) -> anyhow::Result<Call> {
        Ok(Call {
            url: format!("https://{}{path}", self.address).parse()?,
            protocol: self.protocol,
            method: Method::GET,
            headers: self.headers.clone(),
            body: bytes::Bytes::new(),
            grpc_method: None,
            proxy: None,
            tls: TlsFiles {
                key_exchange,
                ..self.tls.clone()
            },
        })
    }
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
