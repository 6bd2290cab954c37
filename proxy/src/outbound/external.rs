//! Calls to what is not the mesh's: bytes as they are.
//!
//! Invariants: nothing is read before the other end is there, since it may speak first; the record
//! names the address and no destination; an abort passes on as one.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use sidegate_mesh::access_log::Protocol;
use tokio::net::TcpStream;

use super::Outbound;
use crate::call::Call;
use crate::error::RequestError;
use crate::relay::relay;
use crate::wire::tunnel::{Abortable, TunnelIdle, TunnelIo};

impl Outbound {
    /// Carries a connection to `at`, which the controller says is not the mesh's.
    pub(super) async fn pass(&self, io: Abortable, address: SocketAddr, at: SocketAddr) {
        let mut call = self.begin(address);
        call.record().protocol = Protocol::Tcp;
        call.record().destination_address = Some(at.into());
        // Until it has ended well, whatever closes the connection resets it.
        io.abort().arm();
        if let Err(error) = self.carry_to(io, at, &mut call).await {
            call.fail(&error);
        }
        call.finish();
    }

    async fn carry_to(
        &self,
        io: Abortable,
        at: SocketAddr,
        call: &mut Call,
    ) -> Result<(), RequestError> {
        let _permit = self.admit()?;
        call.forwarded();
        let called = self.dial(at).await;
        let called = called.map_err(|error| RequestError::UpstreamConnect {
            detail: error.to_string(),
        })?;
        let side = |io: Abortable| TunnelIo {
            abort: io.abort(),
            leading: Bytes::new(),
            io,
        };
        let idle = TunnelIdle {
            limit: self.shared.config.limits.stream_idle_timeout,
            clock: Arc::clone(&self.shared.clock),
        };
        let counters = call.counters();
        relay(side(io), side(called), &counters, &idle)
            .await
            .outcome()
    }

    async fn dial(&self, at: SocketAddr) -> io::Result<Abortable> {
        let stream = tokio::select! {
            stream = TcpStream::connect(at) => stream?,
            () = self.shared.clock.sleep(self.shared.config.limits.connect_timeout) => {
                return Err(io::ErrorKind::TimedOut.into());
            }
        };
        // A failure shows at the first write.
        drop(stream.set_nodelay(true));
        Ok(Abortable::new(stream))
    }
}
