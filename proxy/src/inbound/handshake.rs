//! From a TCP connection to an authenticated peer, or to a caller whom a port takes without.
//!
//! Always true: whoever is refused leaves a record with the reason's code and with who tried, as
//! far as that is known; a claimed identity is never put where a proved one stands. Plaintext goes
//! on only where its port is listed for it or the workload audits, and there only after the first
//! bytes have shown that they are no sidecar's.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use sidegate_mesh::access_log::{Direction, Protocol};
use sidegate_mesh::{Enforcement, Verdict};
use sidegate_mtls::{HandshakeError, Hello, HelloReader, Peer};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

use super::{Inbound, Target};
use crate::call::empty_record;
use crate::connections::Link;
use crate::detect::{self, Detected, Expected, Prefixed, SILENCE};
use crate::limits::Permit;
use crate::shared::Shared;
use crate::socket::Socket;
use crate::wire::tunnel::Abortable;

/// First byte of a TLS handshake record.
const TLS_HANDSHAKE: u8 = 0x16;

/// The answer to whoever speaks HTTP without TLS.
const PLAINTEXT_ANSWER: &[u8] = b"HTTP/1.1 400 Bad Request\r\nsidegate-error: plaintext\r\n\
content-type: text/plain\r\ncontent-length: 45\r\nconnection: close\r\n\r\n\
plaintext refused: this port speaks mesh TLS\n";

/// What came first on a connection.
#[derive(Debug, PartialEq, Eq)]
enum First {
    Tls,
    Http,
    Other,
    Nothing,
}

/// Who came, and what the connection goes on with.
pub(super) enum Accepted {
    /// A sidecar.
    Mesh(Box<TlsStream<Socket>>, Box<Peer>),
    /// A caller without an identity.
    Plain(Plain),
    /// Somebody who has not said anything yet. Its application may be the one to speak first; where
    /// it is not, [`look`] again at what comes.
    Silent(Prefixed<Abortable>, Door),
}

/// A connection without an identity, where its port lets such callers in.
pub(super) struct Plain {
    pub(super) io: Prefixed<Abortable>,
    pub(super) spoken: Detected,
    /// Whether the port is listed for such callers.
    pub(super) listed: bool,
}

/// Whom a port lets in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Door {
    /// The port is listed for callers without an identity.
    pub(super) listed: bool,
    /// The workload refuses nobody.
    audits: bool,
    /// Opaque bytes may enter.
    opaque: bool,
}

impl Door {
    /// What holds for `target` at this moment; closed while nothing is known.
    fn of(shared: &Shared, target: Option<Target>) -> Self {
        let closed = Self {
            listed: false,
            audits: false,
            opaque: false,
        };
        let (Some(target), Some(snapshot)) = (target, shared.state.current()) else {
            return closed;
        };
        if shared.credentials.current().is_none() {
            return closed;
        }
        Self {
            listed: shared.config.plaintext_ports.contains(&target.port),
            audits: snapshot.policy.enforcement() == Enforcement::Audit,
            opaque: snapshot.policy.carries_opaque(target.port),
        }
    }

    fn is_open(self) -> bool {
        self.listed || self.audits
    }
}

/// Authenticates the peer within the bounds on handshakes, or finds that `target` takes callers
/// without an identity; `None` when it was refused, and logged.
pub(super) async fn accept(
    inbound: &Inbound,
    stream: TcpStream,
    address: SocketAddr,
    target: Option<Target>,
) -> Option<Accepted> {
    let shared = &inbound.shared;
    let door = Door::of(shared, target);
    if door.is_open() {
        let io = Prefixed::new(bytes::Bytes::new(), Abortable::new(stream));
        return look(inbound, io, address, door).await;
    }
    match first(shared, &stream).await {
        First::Tls => {}
        // Port scans and TCP health checks: nobody tried anything.
        First::Nothing => return None,
        kind @ (First::Http | First::Other) => {
            refuse_plaintext(shared, stream, address, kind).await;
            return None;
        }
    }
    authenticate(inbound, Socket::Tcp(stream), address).await
}

/// Authenticates whoever is at the other end of `socket`.
pub(super) async fn authenticate(
    inbound: &Inbound,
    socket: Socket,
    address: SocketAddr,
) -> Option<Accepted> {
    let shared = &inbound.shared;
    let since = shared.clock.now();
    // Only who has begun a handshake takes one of their places: silence costs a connection's.
    let _permit: Permit = shared.limits.handshakes.try_acquire()?;
    match inbound.acceptor.accept(socket).await {
        Ok((stream, peer)) => Some(Accepted::Mesh(Box::new(stream), Box::new(peer))),
        Err(error) => {
            log_failure(shared, address, since, &error);
            None
        }
    }
}

/// Looks at the first bytes of a connection to a port that takes callers without an identity.
pub(super) async fn look(
    inbound: &Inbound,
    io: Prefixed<Abortable>,
    address: SocketAddr,
    door: Door,
) -> Option<Accepted> {
    let clock = &*inbound.shared.clock;
    let patience = inbound.shared.config.limits.handshake_timeout;
    // A caller that lets the application speak first says nothing; a sidecar begins at once.
    let (silence, expected) = if door.opaque {
        (SILENCE, Expected::Anything)
    } else {
        (patience, Expected::Http)
    };
    let detected = detect::protocol_of(io, clock, silence, expected).await;
    let (spoken, mut io) = detected.ok()?;
    if spoken == Detected::Tls {
        let hello = tokio::select! {
            hello = read_hello(&mut io) => hello.ok()?,
            () = clock.sleep(patience) => return None,
        };
        if hello == Hello::Mesh {
            return authenticate(inbound, Socket::Looked(io), address).await;
        }
    }
    match spoken {
        Detected::Silent if door.opaque => Some(Accepted::Silent(io, door)),
        // A port scan or a TCP health check: nobody tried anything.
        Detected::Silent | Detected::Closed => None,
        _ => Some(Accepted::Plain(Plain {
            io,
            spoken,
            listed: door.listed,
        })),
    }
}

/// Reads until it is clear for whom the TLS of a connection is meant; what was read comes first
/// again.
async fn read_hello(io: &mut Prefixed<Abortable>) -> std::io::Result<Hello> {
    let mut reader = HelloReader::default();
    let mut seen = 0;
    loop {
        let hello = reader.read(io.prefix().get(seen..).unwrap_or_default());
        if hello != Hello::Incomplete {
            return Ok(hello);
        }
        seen = io.prefix().len();
        if io.read_ahead().await? == 0 {
            return Ok(Hello::Foreign);
        }
    }
}

/// Cuts a connection whose peer is no longer believed.
pub(super) fn retrust(shared: &Shared, link: &Arc<Link>) {
    let Some(credentials) = shared.credentials.current() else {
        return;
    };
    let Some(peer) = link.peer() else {
        return;
    };
    if credentials.epoch() == peer.epoch {
        return;
    }
    if let Err(error) = credentials.still_trusts(peer) {
        link.cut(error.code());
        log_cut(shared, link, error.code());
    }
}

/// Records that a connection was ended, and why; its calls have records of their own.
pub(super) fn log_cut(shared: &Shared, link: &Link, reason: &'static str) {
    let mut record = empty_record(Direction::Inbound, shared.clock.now());
    record.protocol = Protocol::Tcp;
    record.source = link.peer().map(|peer| Arc::clone(peer.id.text()));
    record.source_address = Some(link.address().into());
    record.destination = Some(Arc::clone(shared.workload.id.text()));
    record.decision = Some(Verdict::Deny);
    record.error = Some("connection_cut");
    record.reason = Some(reason.into());
    record.tls_version = link.peer().map(|peer| peer.tls_version);
    shared.log.record(&record);
}

async fn first(shared: &Shared, stream: &TcpStream) -> First {
    let mut byte = [0_u8; 1];
    let read = tokio::select! {
        read = stream.peek(&mut byte) => read,
        () = shared.clock.sleep(shared.config.limits.handshake_timeout) => Ok(0),
    };
    match read {
        Ok(0) | Err(_) => First::Nothing,
        Ok(_) => match byte {
            [TLS_HANDSHAKE] => First::Tls,
            [byte] if byte.is_ascii_graphic() => First::Http,
            _ => First::Other,
        },
    }
}

async fn refuse_plaintext(
    shared: &Shared,
    mut stream: TcpStream,
    address: SocketAddr,
    kind: First,
) {
    log_refusal(shared, address, shared.clock.now(), ("plaintext", None));
    if kind == First::Http {
        // Short enough for any socket's buffer; a peer that does not read it loses nothing.
        let answer = async {
            stream.write_all(PLAINTEXT_ANSWER).await?;
            stream.shutdown().await?;
            drain_briefly(&mut stream).await
        };
        tokio::select! {
            answered = answer => drop(answered),
            () = shared.clock.sleep(shared.config.limits.handshake_timeout) => {}
        }
    }
}

/// Reads a little of what is on its way: closing on unread bytes would reset the connection, and
/// the answer with it.
async fn drain_briefly(stream: &mut TcpStream) -> std::io::Result<()> {
    use tokio::io::AsyncReadExt;
    let mut scratch = [0_u8; 1024];
    for _ in 0..16 {
        if stream.read(&mut scratch).await? == 0 {
            break;
        }
    }
    Ok(())
}

fn log_failure(shared: &Shared, address: SocketAddr, since: SystemTime, error: &HandshakeError) {
    log_refusal(shared, address, since, (error.code(), error.claimed()));
}

/// Counts and records who was refused, and why.
fn log_refusal(
    shared: &Shared,
    address: SocketAddr,
    since: SystemTime,
    (code, claimed): (&'static str, Option<&str>),
) {
    shared.metrics.handshake_failure(Direction::Inbound, code);
    let mut record = empty_record(Direction::Inbound, since);
    record.protocol = Protocol::Tcp;
    record.source_address = Some(address.into());
    record.destination = Some(Arc::clone(shared.workload.id.text()));
    record.decision = Some(Verdict::Deny);
    record.error = Some("tls_handshake");
    record.reason = Some(match (code, claimed) {
        ("plaintext", _) => "plaintext refused".into(),
        (code, Some(claimed)) => format!("{code}, claimed {claimed}").into(),
        (code, None) => code.into(),
    });
    record.duration = shared.clock.now().duration_since(since).unwrap_or_default();
    shared.log.record(&record);
}

#[cfg(test)]
mod tests {
    use super::PLAINTEXT_ANSWER;

    #[test]
    fn the_answer_to_plaintext_has_the_length_that_it_says() {
        let text = String::from_utf8(PLAINTEXT_ANSWER.to_vec()).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(
            head.contains(&format!("content-length: {}", body.len())),
            "{}",
            body.len()
        );
    }
}
