//! Bytes between two byte streams: what is not the mesh's to look into.
//!
//! Always true: each half ends on its own, so a half-closed connection stays half open; an abort on
//! one side is an abort on the other, never a clean end; what is in memory is one buffer each way.

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Buf, Bytes, BytesMut};
use futures_util::future::{Either, select};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};

use crate::call::ByteCounters;
use crate::error::RequestError;
use crate::wire::tunnel::{Abort, TunnelIdle, TunnelIo, idle_for};

/// Most bytes read at once, each way.
const CHUNK_BYTES: usize = 16 * 1024;

/// How a relay ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelayEnd {
    /// Both directions ended with a FIN.
    Clean,
    /// The caller's side was reset or failed.
    CallerAborted(io::ErrorKind),
    /// The other side was.
    UpstreamAborted(io::ErrorKind),
    /// Neither side moved a byte for the idle limit.
    Idle,
}

impl RelayEnd {
    /// What it means for a call.
    ///
    /// # Errors
    ///
    /// Who gave up, when it did not end well.
    pub fn outcome(self) -> Result<(), RequestError> {
        match self {
            Self::Clean => Ok(()),
            Self::CallerAborted(_) => Err(RequestError::PeerReset { reason: None }),
            Self::UpstreamAborted(kind) => Err(RequestError::UpstreamReset {
                reason: None,
                detail: kind.to_string(),
            }),
            Self::Idle => Err(RequestError::Idle),
        }
    }
}

/// Carries bytes both ways until both directions ended, or one was aborted. Dropping it before
/// resets both.
pub async fn relay<A, B>(
    caller: TunnelIo<A>,
    upstream: TunnelIo<B>,
    bytes: &ByteCounters,
    idle: &TunnelIdle,
) -> RelayEnd
where
    A: AsyncRead + AsyncWrite,
    B: AsyncRead + AsyncWrite,
{
    let aborts = [caller.abort, upstream.abort];
    // Until both halves have ended cleanly, every way out of here is an abort, also a drop.
    aborts.iter().for_each(Abort::arm);
    let (from_caller, to_caller) = tokio::io::split(caller.io);
    let (from_upstream, to_upstream) = tokio::io::split(upstream.io);
    let request = copy(caller.leading, from_caller, to_upstream, &bytes.request);
    let response = copy(upstream.leading, from_upstream, to_caller, &bytes.response);
    let both = async {
        // The halves are kept until both have ended: one that ended early must not close the other.
        match select(pin!(request), pin!(response)).await {
            Either::Left((request, response)) => {
                let request = request.map_err(of_request)?;
                Ok((request, response.await.map_err(of_response)?))
            }
            Either::Right((response, request)) => {
                let response = response.map_err(of_response)?;
                Ok((request.await.map_err(of_request)?, response))
            }
        }
    };
    tokio::select! {
        ended = both => match ended {
            Ok(_halves) => {
                aborts.iter().for_each(Abort::disarm);
                RelayEnd::Clean
            }
            Err(end) => end,
        },
        () = idle_for(idle, || bytes.total()) => RelayEnd::Idle,
    }
}

/// Which side of one direction failed.
enum Side {
    Reading(io::Error),
    Writing(io::Error),
}

fn of_request(side: Side) -> RelayEnd {
    match side {
        Side::Reading(error) => RelayEnd::CallerAborted(error.kind()),
        Side::Writing(error) => RelayEnd::UpstreamAborted(error.kind()),
    }
}

fn of_response(side: Side) -> RelayEnd {
    match side {
        Side::Reading(error) => RelayEnd::UpstreamAborted(error.kind()),
        Side::Writing(error) => RelayEnd::CallerAborted(error.kind()),
    }
}

/// One direction, to its FIN.
async fn copy<A: AsyncRead + AsyncWrite, B: AsyncRead + AsyncWrite>(
    leading: Bytes,
    mut reader: ReadHalf<A>,
    mut writer: WriteHalf<B>,
    count: &Arc<AtomicU64>,
) -> Result<(ReadHalf<A>, WriteHalf<B>), Side> {
    let mut rest = leading;
    let mut buffer = BytesMut::new();
    loop {
        while rest.has_remaining() {
            let written = write(&mut writer, &mut rest).await?;
            count.fetch_add(written as u64, Ordering::Relaxed);
        }
        buffer.reserve(CHUNK_BYTES);
        if reader.read_buf(&mut buffer).await.map_err(Side::Reading)? == 0 {
            break;
        }
        rest = buffer.split().freeze();
    }
    writer.shutdown().await.map_err(Side::Writing)?;
    Ok((reader, writer))
}

async fn write<W: AsyncWrite>(writer: &mut WriteHalf<W>, rest: &mut Bytes) -> Result<usize, Side> {
    let written = poll_fn(|context| Pin::new(&mut *writer).poll_write(context, rest)).await;
    match written {
        Ok(0) => Err(Side::Writing(io::ErrorKind::WriteZero.into())),
        Ok(written) => {
            rest.advance(written);
            Ok(written)
        }
        Err(error) => Err(Side::Writing(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use sidegate_mesh::Clock;
    use sidegate_mtls::SystemClock;
    use tokio::net::{TcpListener, TcpStream};
    use tokio::task::JoinHandle;

    use super::*;
    use crate::wire::tunnel::Abortable;

    struct Pair {
        caller: TcpStream,
        upstream: TcpStream,
        bytes: Arc<ByteCounters>,
        end: JoinHandle<RelayEnd>,
    }

    async fn connection() -> (TcpStream, TunnelIo<Abortable>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap());
        let (client, accepted) = tokio::join!(client, listener.accept());
        let io = Abortable::new(accepted.unwrap().0);
        let abort = io.abort();
        let leading = Bytes::new();
        (client.unwrap(), TunnelIo { io, leading, abort })
    }

    async fn pair(limit: Duration) -> Pair {
        let (caller, mut a) = connection().await;
        let (upstream, b) = connection().await;
        a.leading = Bytes::from_static(b"first ");
        let bytes = Arc::new(ByteCounters::default());
        let idle = TunnelIdle {
            limit,
            clock: Arc::new(SystemClock) as Arc<dyn Clock>,
        };
        let end = {
            let bytes = Arc::clone(&bytes);
            #[expect(clippy::disallowed_methods, reason = "a test")]
            tokio::spawn(async move { relay(a, b, &bytes, &idle).await })
        };
        Pair {
            caller,
            upstream,
            bytes,
            end,
        }
    }

    const LONG: Duration = Duration::from_mins(1);

    #[tokio::test]
    async fn a_half_that_ends_leaves_the_other_open() {
        let mut pair = pair(LONG).await;
        pair.caller.write_all(b"request").await.unwrap();
        pair.caller.shutdown().await.unwrap();
        let mut text = String::new();
        pair.upstream.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "first request");
        pair.upstream.write_all(b"response").await.unwrap();
        drop(pair.upstream);
        text.clear();
        pair.caller.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "response");
        assert_eq!(pair.end.await.unwrap(), RelayEnd::Clean);
        assert_eq!(pair.bytes.request.load(Ordering::Relaxed), 13);
        assert_eq!(pair.bytes.response.load(Ordering::Relaxed), 8);
    }

    fn reset(stream: TcpStream) {
        socket2::SockRef::from(&stream)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        drop(stream);
    }

    #[tokio::test]
    async fn a_reset_is_a_reset_on_the_other_side() {
        let mut one = pair(LONG).await;
        let mut begin = [0; 6];
        one.upstream.read_exact(&mut begin).await.unwrap();
        reset(one.caller);
        let error = one.upstream.read(&mut begin).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        let aborted = RelayEnd::CallerAborted(io::ErrorKind::ConnectionReset);
        assert_eq!(one.end.await.unwrap(), aborted);

        let mut two = pair(LONG).await;
        two.upstream.read_exact(&mut begin).await.unwrap();
        reset(two.upstream);
        let error = two.caller.read(&mut begin).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        let aborted = RelayEnd::UpstreamAborted(io::ErrorKind::ConnectionReset);
        assert_eq!(two.end.await.unwrap(), aborted);
    }

    #[tokio::test]
    async fn silence_ends_it_with_a_reset() {
        let mut pair = pair(Duration::from_millis(20)).await;
        let mut begin = [0; 6];
        pair.upstream.read_exact(&mut begin).await.unwrap();
        assert_eq!(pair.end.await.unwrap(), RelayEnd::Idle);
        let error = pair.caller.read(&mut begin).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
}
