//! The loads that a comparison puts on every target.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Uri};

use super::peer::Peer;
use crate::engine::Load;
use crate::target::{Call, Protocol, TlsFiles};

/// The gRPC method that the backend echoes.
const GRPC_METHOD: &str = "bench.Echo/Call";

/// One load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Planned {
    pub(crate) name: &'static str,
    pub(crate) protocol: Protocol,
    /// Bytes of the answer, which the path asks for.
    answer_bytes: usize,
    body_bytes: usize,
    rate: Option<f64>,
    connections: u32,
    streams: u32,
}

const GET: Planned = Planned {
    name: "",
    protocol: Protocol::Http1,
    answer_bytes: 100,
    body_bytes: 0,
    rate: None,
    connections: 16,
    streams: 1,
};

/// Every load, in the order of the report.
pub(crate) const LOADS: &[Planned] = &[
    Planned {
        name: "100 B, 16 connections",
        ..GET
    },
    Planned {
        name: "100 B, 64 connections",
        connections: 64,
        ..GET
    },
    Planned {
        name: "100 B, 256 connections",
        connections: 256,
        ..GET
    },
    Planned {
        name: "10 KiB, 16 connections",
        answer_bytes: 10 * 1024,
        ..GET
    },
    Planned {
        name: "POST 1 KiB, 16 connections",
        body_bytes: 1024,
        ..GET
    },
    Planned {
        name: "1000 calls/s, 32 connections",
        rate: Some(1000.0),
        connections: 32,
        ..GET
    },
    Planned {
        name: "gRPC, 16 connections × 16 streams",
        protocol: Protocol::Grpc,
        body_bytes: 100,
        streams: 16,
        ..GET
    },
];

/// Short names, for the command line.
pub(crate) const SHORT: &[&str] = &["c16", "c64", "c256", "10k", "post", "rate", "grpc"];

impl Planned {
    /// The call to make of `peer`.
    ///
    /// # Errors
    ///
    /// When the peer's address makes no URL.
    pub(crate) fn call(&self, peer: &Peer) -> anyhow::Result<Call> {
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
        Load {
            rate: self.rate,
            connections: self.connections,
            streams: self.streams,
            duration,
            warmup,
            timeout: Duration::from_secs(10),
            threads: crate::cli::threads_default(),
        }
    }
}
