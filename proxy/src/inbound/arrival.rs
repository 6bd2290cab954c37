//! Where an inbound connection goes: what its caller asked the network for.
//!
//! Always true: with redirection a connection's target is the address that it was made to, on this
//! pod and on none of our own ports; nothing that the caller says afterwards changes it.

use std::net::SocketAddr;
use std::sync::Arc;

use sidegate_mesh::Verdict;
use sidegate_mesh::access_log::{Address, Direction, Protocol};
use tokio::io::DuplexStream;
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use super::Target;
use crate::call::empty_record;
use crate::error::RequestError;
use crate::original;
use crate::shared::Shared;

/// Connections of this sidecar to itself that wait to be accepted; more are refused.
const OWN_CALLS_MAX: usize = 64;

/// Buffered bytes each way of a connection of this sidecar to itself.
const OWN_BUFFER_BYTES: usize = 64 * 1024;

/// One connection of this sidecar to itself.
pub(super) struct OwnCall {
    pub(super) stream: DuplexStream,
    pub(super) original: SocketAddr,
}

/// Where one worker's outbound half hands calls to its own pod over: they are not redirected.
#[derive(Clone, Debug)]
pub struct OwnCalls(mpsc::Sender<OwnCall>);

/// The inbound half's end of [`OwnCalls`].
#[derive(Debug)]
pub struct OwnArrivals(mpsc::Receiver<OwnCall>);

/// A way from a worker's outbound half to its inbound half.
pub fn own_calls() -> (OwnCalls, OwnArrivals) {
    let (sender, receiver) = mpsc::channel(OWN_CALLS_MAX);
    (OwnCalls(sender), OwnArrivals(receiver))
}

impl OwnCalls {
    /// A connection to `original`, an address of this pod.
    ///
    /// # Errors
    ///
    /// [`RequestError::UpstreamConnect`] when the inbound half takes no more.
    pub fn connect(&self, original: SocketAddr) -> Result<DuplexStream, RequestError> {
        let (near, far) = tokio::io::duplex(OWN_BUFFER_BYTES);
        let call = OwnCall {
            stream: far,
            original,
        };
        let taken = self.0.try_send(call);
        taken.map_err(|error| RequestError::UpstreamConnect {
            detail: format!("this sidecar's own inbound side: {error}"),
        })?;
        Ok(near)
    }
}

impl OwnArrivals {
    /// The next one; for ever pending when there can be none.
    pub(super) async fn next(&mut self) -> OwnCall {
        match self.0.recv().await {
            Some(call) => call,
            None => std::future::pending().await,
        }
    }
}

/// The target of a connection that was redirected here.
///
/// # Errors
///
/// The reason as the log says it, and the address as far as it is known.
pub(super) fn target_of(
    shared: &Shared,
    stream: &TcpStream,
) -> Result<Target, (&'static str, Option<SocketAddr>)> {
    let original = shared.originals.of(stream);
    let original = original.map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => ("not_redirected", None),
        _ => ("original_destination", None),
    })?;
    target_at(shared, original)
}

/// The target that an original destination means.
///
/// # Errors
///
/// As [`target_of`].
pub(super) fn target_at(
    shared: &Shared,
    original: SocketAddr,
) -> Result<Target, (&'static str, Option<SocketAddr>)> {
    let address = original::canonical(original);
    match shared.own.refuses_inbound(address) {
        Some(reason) => Err((reason, Some(address))),
        None => Ok(Target {
            port: address.port(),
            address,
        }),
    }
}

/// Records a connection that goes nowhere.
pub(super) fn log_refused(
    shared: &Shared,
    from: SocketAddr,
    (reason, to): (&'static str, Option<SocketAddr>),
) {
    let mut record = empty_record(Direction::Inbound, shared.clock.now());
    record.protocol = Protocol::Tcp;
    record.source_address = Some(from.into());
    record.destination = Some(Arc::clone(shared.workload.id.text()));
    record.destination_address = to.map(Address::Socket);
    record.decision = Some(Verdict::Deny);
    record.error = Some("destination_refused");
    record.reason = Some(reason.into());
    shared.log.record(&record);
}
