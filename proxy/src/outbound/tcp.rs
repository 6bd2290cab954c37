//! Bytes: opaque TCP where one destination is meant, and a WebSocket after its 101.
//!
//! Invariants: the destination is the connection's own; nothing of the application's bytes leaves
//! before the other sidecar has accepted the tunnel; an application whose tunnel failed sees a
//! reset, never a clean end.

use std::io;
use std::sync::Arc;
use std::sync::OnceLock;

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use http::{Method, Request, StatusCode, Uri, Version};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use sidegate_mesh::access_log::Protocol;
use tokio::io::AsyncWriteExt;

use super::destination::Destined;
use super::{Connection, Outbound, note_refusal};
use crate::call::Call;
use crate::detect::{self, Detected, Expected, Prefixed};
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

/// A tunnel that the other sidecar has accepted.
struct Open {
    send: SendStream<Bytes>,
    recv: RecvStream,
    held: (Held, Permit),
}

/// Who spoke first in a tunnel.
enum First {
    Called(Option<Result<Bytes, h2::Error>>),
    Caller(io::Result<usize>),
}

impl Outbound {
    /// Carries an opaque connection to where it goes.
    pub(super) async fn serve_tcp(
        self: &Arc<Self>,
        io: Prefixed<Abortable>,
        connection: Connection,
    ) {
        let mut call = self.begin(connection.address);
        call.record().protocol = Protocol::Tcp;
        // Until the tunnel has ended well, whatever closes the connection resets it.
        connection.abort.arm();
        match self.open_bytes(&mut call, &connection.destined).await {
            Ok(open) => self.carry_open(open, io, connection.abort, call).await,
            Err(error) => fail(call, &error),
        }
    }

    /// Carries a connection on which nobody has spoken if the application at the other end speaks
    /// first, or what its caller says after all is no HTTP. Else it comes back, to be served by
    /// what it says: the called side carries no bytes, or they are HTTP.
    pub(super) async fn try_tcp(
        self: &Arc<Self>,
        mut io: Prefixed<Abortable>,
        connection: Connection,
    ) -> Option<(Prefixed<Abortable>, Connection)> {
        let mut call = self.begin(connection.address);
        call.record().protocol = Protocol::Tcp;
        connection.abort.arm();
        let mut open = match self.open_bytes(&mut call, &connection.destined).await {
            Ok(open) => open,
            Err(error) => {
                let denied = error == RequestError::DeniedByPeer;
                fail(call, &error);
                if !denied {
                    return None;
                }
                connection.abort.disarm();
                return Some((io, connection));
            }
        };
        let first = tokio::select! {
            biased;
            said = open.recv.data() => First::Called(said),
            read = io.read_ahead() => First::Caller(read),
        };
        match first {
            First::Called(said) => {
                if let Err(error) = hand_on(said, &mut open.recv, &mut io, &call).await {
                    fail(call, &error);
                    return None;
                }
            }
            // An end without a word is an end, and goes to the other side as such.
            First::Caller(Ok(0) | Err(_)) => {}
            First::Caller(Ok(_)) => {
                let (clock, patience) = (&*self.shared.clock, self.guard.head_timeout);
                let detected = detect::protocol_of(io, clock, patience, Expected::Anything).await;
                let Ok((detected, read)) = detected else {
                    fail(call, &RequestError::PeerReset { reason: None });
                    return None;
                };
                if matches!(detected, Detected::Http1 | Detected::Http2) {
                    self.give_up(open, call);
                    connection.abort.disarm();
                    return Some((read, connection));
                }
                io = read;
            }
        }
        self.carry_open(open, io, connection.abort, call).await;
        None
    }

    /// Ends a tunnel in which nothing was said: it was opened for a caller that speaks HTTP.
    fn give_up(&self, open: Open, call: Call) {
        let clock = Arc::clone(&self.shared.clock);
        let patience = self.guard.head_timeout;
        self.shared.drain.tasks().spawn(async move {
            let Open {
                mut send,
                mut recv,
                held,
            } = open;
            if send.send_data(Bytes::new(), true).is_ok() {
                // The application closes in its turn; a tunnel that does not end is reset.
                let ended = async { while recv.data().await.is_some_and(|data| data.is_ok()) {} };
                tokio::select! {
                    () = ended => {}
                    () = clock.sleep(patience) => {}
                }
            }
            drop(held);
            call.finish();
        });
    }

    async fn open_bytes(&self, call: &mut Call, destined: &Destined) -> Result<Open, RequestError> {
        let (answer, permit) = self.open_tunnel(call, destined).await?;
        let Answer {
            send, recv, held, ..
        } = answer;
        let send = send.ok_or(RequestError::NotCarried { reason: "opaque" })?;
        Ok(Open {
            send,
            recv,
            held: (held, permit),
        })
    }

    async fn carry_open(&self, open: Open, io: Prefixed<Abortable>, abort: Abort, call: Call) {
        let Open { send, recv, held } = open;
        let (leading, io) = io.into_parts();
        self.carry(TunnelIo { io, leading, abort }, send, recv, call)
            .await;
        drop(held);
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

/// Gives the caller what the application said first.
async fn hand_on(
    said: Option<Result<Bytes, h2::Error>>,
    recv: &mut RecvStream,
    io: &mut Prefixed<Abortable>,
    call: &Call,
) -> Result<(), RequestError> {
    let said = match said {
        Some(Ok(said)) => said,
        Some(Err(error)) => return Err(reset(error.reason())),
        None => return Ok(()),
    };
    io.write_all(&said)
        .await
        .map_err(|_gone| RequestError::PeerReset { reason: None })?;
    call.counters().add_response(said.len());
    // A failure means that the stream is gone, which the next read reports.
    drop(recv.flow_control().release_capacity(said.len()));
    Ok(())
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
