//! The loads that a comparison puts on every target.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Uri};

use super::peer::Peer;
use crate::engine::Load;
use crate::target::{Call, KeyExchange, Protocol, TlsFiles};

/// The gRPC method that the backend echoes.
const GRPC_METHOD: &str = "bench.Echo/Call";
/// What starting and ending one measurement adds to its time, as seen on two cores.
const AROUND: Duration = Duration::from_millis(150);

// Names of loads, by which goals and readers know them.
pub(crate) const C16: &str = "100 B, 16 connections";
pub(crate) const C64: &str = "100 B, 64 connections";
pub(crate) const C256: &str = "100 B, 256 connections";
pub(crate) const TEN_KIB: &str = "10 KiB, 16 connections";
pub(crate) const POST: &str = "POST 1 KiB, 16 connections";
pub(crate) const RATE_1000: &str = "1000 calls/s, 32 connections";
pub(crate) const RATE_2000: &str = "2000 calls/s, 32 connections";
pub(crate) const GRPC: &str = "gRPC, 16 connections × 16 streams";
pub(crate) const NEW: &str = "new mTLS connections";
pub(crate) const NEW_X25519: &str = "new mTLS connections, X25519";
/// Connections that carry nothing, which are no load on anything but memory.
pub(crate) const IDLE: &str = "idle mTLS connections";
/// The same for the command line.
pub(crate) const IDLE_SHORT: &str = "idle";

/// One load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Planned {
    /// For the command line.
    pub(crate) short: &'static str,
    pub(crate) name: &'static str,
    pub(crate) protocol: Protocol,
    /// Bytes of the answer, which the path asks for.
    answer_bytes: usize,
    body_bytes: usize,
    rate: Option<f64>,
    connections: u32,
    streams: u32,
    /// Every call on a new mutual-TLS connection to the called side's proxy, this offered.
    new_connections: Option<KeyExchange>,
}

const GET: Planned = Planned {
    short: "",
    name: "",
    protocol: Protocol::Http1,
    answer_bytes: 100,
    body_bytes: 0,
    rate: None,
    connections: 16,
    streams: 1,
    new_connections: None,
};

/// Every load, in the order of the report.
pub(crate) const LOADS: &[Planned] = &[
    Planned {
        short: "c16",
        name: C16,
        ..GET
    },
    Planned {
        short: "c64",
        name: C64,
        connections: 64,
        ..GET
    },
    Planned {
        short: "c256",
        name: C256,
        connections: 256,
        ..GET
    },
    Planned {
        short: "10k",
        name: TEN_KIB,
        answer_bytes: 10 * 1024,
        ..GET
    },
    Planned {
        short: "post",
        name: POST,
        body_bytes: 1024,
        ..GET
    },
    Planned {
        short: "rate",
        name: RATE_1000,
        rate: Some(1000.0),
        connections: 32,
        ..GET
    },
    Planned {
        short: "rate2k",
        name: RATE_2000,
        rate: Some(2000.0),
        connections: 32,
        ..GET
    },
    Planned {
        short: "grpc",
        name: GRPC,
        protocol: Protocol::Grpc,
        body_bytes: 100,
        streams: 16,
        ..GET
    },
    Planned {
        short: "tls",
        name: NEW,
        connections: 8,
        new_connections: Some(KeyExchange::Hybrid),
        ..GET
    },
    Planned {
        short: "tls-x25519",
        name: NEW_X25519,
        connections: 8,
        new_connections: Some(KeyExchange::X25519),
        ..GET
    },
];

impl Planned {
    /// Whether `peer` can be measured so.
    pub(crate) fn suits(&self, peer: &Peer) -> bool {
        (self.protocol != Protocol::Grpc || peer.grpc)
            && (self.new_connections.is_none() || peer.inbound.is_some())
    }

    /// The call to make of `peer`.
    ///
    /// # Errors
    ///
    /// When the peer's address makes no URL.
    pub(crate) fn call(&self, peer: &Peer) -> anyhow::Result<Call> {
        if let (Some(key_exchange), Some(inbound)) = (self.new_connections, &peer.inbound) {
            return inbound.call(&format!("/bytes/{}", self.answer_bytes), key_exchange);
        }
        let url: Uri = format!("http://{}/bytes/{}", peer.authority, self.answer_bytes).parse()?;
        let grpc = self.protocol == Protocol::Grpc;
        Ok(Call {
            url,
            protocol: self.protocol,
            method: if self.body_bytes > 0 {
                Method::POST
            } else {
                Method::GET
            },
            headers: HeaderMap::new(),
            body: Bytes::from(vec![b'x'; self.body_bytes]),
            grpc_method: grpc.then(|| GRPC_METHOD.to_owned()),
            proxy: peer.via.clone(),
            tls: TlsFiles::default(),
        })
    }

    /// How much of it.
    pub(crate) fn load(&self, duration: Duration, warmup: Duration) -> Load {
        let new_connections = self.new_connections.is_some();
        // The processor time of a handshake needs no long look: it has no tail that is judged.
        let part = if new_connections { 2 } else { 1 };
        Load {
            rate: self.rate,
            connections: self.connections,
            streams: self.streams,
            duration: duration / part,
            warmup: warmup / part,
            timeout: Duration::from_secs(10),
            threads: crate::cli::threads_default(),
            new_connections,
        }
    }

    /// How long one measurement takes.
    pub(crate) fn takes(&self, duration: Duration, warmup: Duration) -> Duration {
        let load = self.load(duration, warmup);
        load.duration + load.warmup + AROUND
    }
}
