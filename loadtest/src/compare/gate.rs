//! Before anything is measured: does each target do what it is measured for?
//!
//! Invariant: a proxy that lets pass what no rule admits, or a caller without a certificate, is
//! never compared.

use std::cell::RefCell;
use std::rc::Rc;

use anyhow::{Context, ensure};
use http::{HeaderMap, Method};
use tokio::task::JoinSet;

use super::held;
use super::peer::{Inbound, Peer};
use crate::target::{Call, KeyExchange, Protocol, Target, TlsFiles};

/// What a rule admits, and what none does.
const ADMITTED: &str = "/bytes/100";
const REFUSED: &str = "/nobody/may";

/// Makes one call that must be answered and, through proxies, those that must be refused.
///
/// Returns the key exchange that the called side's proxy chose from what sidecars offer.
///
/// # Errors
///
/// When the target did otherwise.
pub(super) async fn check(peer: &Peer) -> anyhow::Result<Option<String>> {
    let name = &peer.name;
    let status = async |path: &str| status(&plain(peer, path)?).await;
    let admitted = status(ADMITTED).await;
    let admitted = admitted.with_context(|| format!("{name} does not answer"))?;
    ensure!(
        admitted == 200,
        "{name} answers {admitted} to what it should admit"
    );
    if peer.hops.is_empty() {
        return Ok(None);
    }
    let refused = status(REFUSED).await?;
    ensure!(
        refused == 403,
        "{name} answers {refused} to what no rule admits"
    );
    match &peer.inbound {
        Some(inbound) => called(name, inbound).await,
        None => Ok(None),
    }
}

/// The called side's proxy alone: with the caller's certificate, and without one.
async fn called(name: &str, inbound: &Inbound) -> anyhow::Result<Option<String>> {
    let mut call = inbound.call(ADMITTED, KeyExchange::Hybrid)?;
    let admitted = status(&call).await;
    let admitted = admitted.with_context(|| format!("{name}'s called side does not answer"))?;
    ensure!(
        admitted == 200,
        "{name}'s called side answers {admitted} to the caller's certificate"
    );
    let key_exchange = Target::prepare(&call).await?.key_exchange().await?;
    (call.tls.cert, call.tls.key) = (None, None);
    // Some refuse it only once a call has come, and in words.
    let refused = status(&call).await.map_or(true, |status| status >= 400);
    ensure!(
        refused,
        "{name}'s called side answers a caller without a certificate"
    );
    Ok(key_exchange)
}

fn plain(peer: &Peer, path: &str) -> anyhow::Result<Call> {
    Ok(Call {
        url: format!("http://{}{path}", peer.authority).parse()?,
        protocol: Protocol::Http1,
        method: Method::GET,
        headers: HeaderMap::new(),
        body: bytes::Bytes::new(),
        grpc_method: None,
        proxy: peer.via.clone(),
        tls: TlsFiles::default(),
    })
}

async fn status(call: &Call) -> anyhow::Result<u16> {
    let target = Target::prepare(call).await?;
    let tasks = Rc::new(RefCell::new(JoinSet::new()));
    Ok(held::open(&target, &tasks).await?.1)
}
