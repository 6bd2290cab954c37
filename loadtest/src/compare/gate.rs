//! Before anything is measured: does each target do what it is measured for?
//!
//! Invariant: a proxy that lets pass what no rule admits is never compared.

use std::time::Duration;

use anyhow::{Context, ensure};
use http::{HeaderMap, Method};

use super::peer::Peer;
use crate::http1::Connection;
use crate::target::{Call, Protocol, Target, TlsFiles};

/// What a rule admits, and what none does.
const ADMITTED: &str = "/bytes/100";
const REFUSED: &str = "/nobody/may";
const TIMEOUT: Duration = Duration::from_secs(10);

/// Makes one call that must be answered and, through proxies, one that must be refused.
///
/// # Errors
///
/// When the target did otherwise.
pub(super) async fn check(peer: &Peer) -> anyhow::Result<()> {
    let name = &peer.name;
    let admitted = status(peer, ADMITTED)
        .await
        .with_context(|| format!("{name} does not answer"))?;
    ensure!(
        admitted == 200,
        "{name} answers {admitted} to what it should admit"
    );
    if !peer.hops.is_empty() {
        let refused = status(peer, REFUSED).await?;
        ensure!(
            refused == 403,
            "{name} answers {refused} to what no rule admits"
        );
    }
    Ok(())
}

async fn status(peer: &Peer, path: &str) -> anyhow::Result<u16> {
    let call = Call {
        url: format!("http://{}{path}", peer.authority).parse()?,
        protocol: Protocol::Http1,
        method: Method::GET,
        headers: HeaderMap::new(),
        body: bytes::Bytes::new(),
        grpc_method: None,
        proxy: peer.via.clone(),
        tls: TlsFiles::default(),
    };
    let target = Target::prepare(&call).await?;
    let mut connection = Connection::new(target.connect(TIMEOUT).await?);
    let answer = tokio::time::timeout(TIMEOUT, connection.call(&target.bytes, false));
    Ok(answer.await.context("no answer in time")??.status)
}
