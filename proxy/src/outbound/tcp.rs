//! Bytes: opaque TCP where one destination is meant, and a WebSocket after its 101.
//!
//! Invariants: the destination is the connection's own; nothing of the application's bytes leaves
//! before the other sidecar has accepted the tunnel; an application whose tunnel failed sees a
//! reset, never a clean end.

use std::sync::Arc;
use std::sync::OnceLock;

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use http::{Method, Request, StatusCode, Uri, Version};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use sidegate_mesh::access_log::Protocol;

use super::destination::Destined;
use super::{Connection, Outbound, note_refusal};
use crate::call::Call;
use crate::detect::Prefixed;
use crate::error::{RequestError, reason_words};
use crate::forward::{Answer, Held, Outgoing, Start};
use crate::limits::Permit;
use crate::wire;
use crate::wire::tunnel::{Abort, Abortable, TunnelBytes, TunnelEnd, TunnelIdle, TunnelIo, carry};

/// A WebSocket whose 101 is on its way to the application.
pub(super) struct Upgraded {
    pub(super) io: OnUpgrade,
    pub(super) abort: Abort,
    pub(super) send: SendStream<Bytes>,
    pub(super) recv: RecvStream,
}

impl Outbound {
    /// Carries an opaque connection to where it goes.
    pub(super) async fn serve_tcp(
        self: &Arc<Self>,
        io: Prefixed<Abortable>,
        connection: Connection,
    ) {
        if let Some((io, connection)) = self.try_tcp(io, connection).await {
            connection.abort.arm();
            drop(io);
        }
    }

    /// As [`Self::serve_tcp`]; the connection comes back, its first bytes aside, when the called
    /// side does not carry it.
    pub(super) async fn try_tcp(
        self: &Arc<Self>,
        io: Prefixed<Abortable>,
        connection: Connection,
    ) -> Option<(Abortable, Connection)> {
        let mut call = self.begin(connection.address);
        call.record().protocol = Protocol::Tcp;
        // Until the tunnel has ended well, whatever closes the connection resets it.
        connection.abort.arm();
        let (leading, io) = io.into_parts();
        match self.open_tunnel(&mut call, &connection.destined).await {
            Ok((answer, _permit)) => {
                let Answer {
                    send,
                    recv,
                    held: _held,
                    ..
                } = answer;
                let Some(send) = send else {
                    fail(call, &RequestError::NotCarried { reason: "opaque" });
                    return None;
                };
                let tunnel = TunnelIo {
                    io,
                    leading,
                    abort: connection.abort,
                };
                self.carry(tunnel, send, recv, call).await;
                None
            }
            Err(error) => {
                let denied = error == RequestError::DeniedByPeer;
                fail(call, &error);
                if !denied || !leading.is_empty() {
                    return None;
                }
                connection.abort.disarm();
                Some((io, connection))
            }
        }
    }

    async fn open_tunnel(
        &self,
        call: &mut Call,
        destined: &Destined,
    ) -> Result<(Answer, Permit), RequestError> {
        let permit = self.admit()?;
        let route = self.route_of(call, destined).await?;
        let port = destined.named_port(&route);
        // For the eye: the other side does not choose by it.
        let authority = match destined.original() {
            Some(at) => at.to_string(),
            None => route.service.to_string(),
        };
        let head = connect(&authority, port)?;
        let outgoing = Arc::new(Outgoing {
            head,
            method: Method::CONNECT,
            grpc: None,
            body: None,
            start: Start::AfterSuccess,
            interim: None,
            deadline: None,
            body_idle: self.shared.config.limits.request_body_idle_timeout,
            caller_failed: OnceLock::new(),
        });
        let target = self.target(route);
        let answer = self.call(call, &outgoing, &target, destined).await?;
        note_refusal(call, &answer.head);
        match answer.head.status {
            status if status.is_success() => Ok((answer, permit)),
            StatusCode::FORBIDDEN => Err(RequestError::DeniedByPeer),
            status => Err(RequestError::UpstreamReset {
                reason: None,
                detail: format!("the tunnel was refused with {}", status.as_u16()),
            }),
        }
    }

    /// Waits for the application to have its 101, then carries bytes.
    pub(super) async fn carry_upgraded(
        self: Arc<Self>,
        tunnel: Upgraded,
        call: Call,
        held: (Held, Permit),
    ) {
        let Upgraded {
            io,
            abort,
            mut send,
            recv,
        } = tunnel;
        let Ok(io) = io.await else {
            send.send_reset(h2::Reason::CANCEL);
            return fail(call, &RequestError::PeerReset { reason: None });
        };
        let tunnel = TunnelIo {
            io: TokioIo::new(io),
            leading: Bytes::new(),
            abort,
        };
        tokio::select! {
            () = self.carry(tunnel, send, recv, call) => {}
            () = self.shared.drain.deadline() => {}
        }
        drop(held);
    }

    async fn carry<IO>(
        &self,
        tunnel: TunnelIo<IO>,
        mut send: SendStream<Bytes>,
        recv: RecvStream,
        call: Call,
    ) where
        IO: tokio::io::AsyncRead + tokio::io::AsyncWrite,
    {
        let counters = call.counters();
        let bytes = TunnelBytes {
            from_wire: Arc::clone(&counters.response),
            to_wire: Arc::clone(&counters.request),
        };
        let idle = TunnelIdle {
            limit: self.shared.config.limits.stream_idle_timeout,
            clock: Arc::clone(&self.shared.clock),
        };
        match carry(tunnel, &mut send, recv, &bytes, &idle).await {
            TunnelEnd::Clean => call.finish(),
            TunnelEnd::PeerReset(reason) => fail(call, &reset(reason)),
            TunnelEnd::Aborted(_) => fail(call, &RequestError::PeerReset { reason: None }),
            TunnelEnd::Idle => fail(call, &RequestError::Idle),
        }
    }
}

fn reset(reason: Option<h2::Reason>) -> RequestError {
    let lost = || "the connection was lost".to_owned();
    RequestError::UpstreamReset {
        reason,
        detail: reason.map_or_else(lost, reason_words),
    }
}

/// The head of an opaque tunnel.
fn connect(authority: &str, port: Option<u16>) -> Result<Request<()>, RequestError> {
    let uri = Uri::builder()
        .scheme("http")
        .authority(authority)
        .path_and_query("/")
        .build();
    let Ok(uri) = uri else {
        return Err(RequestError::BadRequest { reason: "target" });
    };
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.version_mut() = Version::HTTP_2;
    *request.uri_mut() = uri;
    if let Some(port) = port {
        request.headers_mut().insert(wire::PORT, port.into());
    }
    request
        .extensions_mut()
        .insert(h2::ext::Protocol::from_static(wire::TCP));
    Ok(request)
}

fn fail(mut call: Call, error: &RequestError) {
    call.fail(error);
    call.finish();
}
