//! Bytes between one HTTP/2 stream and one byte stream: opaque TCP, and WebSocket after its answer.
//!
//! Always true: `END_STREAM` is FIN and a reset is a reset, in both directions. Each half ends on
//! its own, so a half-closed connection stays half open; an abort on either side is never seen as
//! a clean end on the other. Nothing is read that there is no room for: what is in memory is
//! bounded by the stream's windows.

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::{Either, select};
use h2::{Reason, RecvStream, SendStream};
use sidegate_mesh::Clock;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf, ReadHalf, WriteHalf};
use tokio::net::TcpStream;

use crate::wire::send::{SendError, send_data};

/// Most bytes read from the byte stream at once.
const CHUNK_BYTES: usize = 16 * 1024;

/// How a tunnel ended.
#[derive(Debug, PartialEq, Eq)]
pub enum TunnelEnd {
    /// Both directions ended with a FIN.
    Clean,
    /// The HTTP/2 side reset the stream.
    PeerReset(Option<Reason>),
    /// The byte stream was reset or failed.
    Aborted(io::ErrorKind),
    /// Neither side moved a byte for the idle limit.
    Idle,
}

/// Bytes that went each way, shared with whoever counts them.
#[derive(Clone, Debug, Default)]
pub struct TunnelBytes {
    /// From the HTTP/2 stream to the byte stream.
    pub from_wire: Arc<AtomicU64>,
    /// From the byte stream to the HTTP/2 stream.
    pub to_wire: Arc<AtomicU64>,
}

impl TunnelBytes {
    fn total(&self) -> u64 {
        self.from_wire.load(Ordering::Relaxed) + self.to_wire.load(Ordering::Relaxed)
    }
}

/// Makes the next close of an [`Abortable`] a reset (RST), whatever wraps it.
#[derive(Clone, Debug, Default)]
pub struct Abort(Arc<AtomicBool>);

impl Abort {
    /// From now on the connection closes with RST instead of FIN.
    pub fn arm(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// The connection closes with FIN again.
    pub fn disarm(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// A TCP connection that closes with RST once its [`Abort`] was armed.
#[derive(Debug)]
pub struct Abortable {
    stream: TcpStream,
    abort: Abort,
}

impl Abortable {
    /// Wraps `stream`; it closes with FIN until the handle is armed.
    pub fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            abort: Abort::default(),
        }
    }

    /// The handle that decides how this connection closes.
    pub fn abort(&self) -> Abort {
        self.abort.clone()
    }

    /// The connection itself.
    pub fn tcp(&self) -> &TcpStream {
        &self.stream
    }
}

impl Drop for Abortable {
    fn drop(&mut self) {
        if self.abort.0.load(Ordering::Relaxed) {
            // Closing with a zero linger time is what sends RST. If it fails, the socket is
            // already gone and there is nobody left to tell.
            drop(socket2::SockRef::from(&self.stream).set_linger(Some(Duration::ZERO)));
        }
    }
}

impl AsyncRead for Abortable {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Abortable {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// The byte-stream side of a tunnel.
#[derive(Debug)]
pub struct TunnelIo<IO> {
    /// Where bytes come from and go to.
    pub io: IO,
    /// Bytes that were read from `io` before the tunnel began; they come first.
    pub leading: Bytes,
    /// Armed before `io` is dropped when the HTTP/2 side aborted.
    pub abort: Abort,
}

/// The idle limit of a tunnel and the clock that measures it.
#[derive(Clone)]
pub struct TunnelIdle {
    /// Longest time without a byte in either direction; it ends at most a quarter later.
    pub limit: Duration,
    /// The clock.
    pub clock: Arc<dyn Clock>,
}

/// Carries bytes both ways until both directions ended, or one was aborted.
///
/// On an abort by the byte stream the HTTP/2 stream is reset with `CANCEL`; on a reset by the
/// HTTP/2 side the byte stream is closed with RST. Dropping this future does neither cleanly: arm
/// the [`Abort`] first, and reset the stream.
pub async fn carry<IO>(
    tunnel: TunnelIo<IO>,
    send: &mut SendStream<Bytes>,
    recv: RecvStream,
    bytes: &TunnelBytes,
    idle: &TunnelIdle,
) -> TunnelEnd
where
    IO: AsyncRead + AsyncWrite,
{
    let TunnelIo { io, leading, abort } = tunnel;
    // Until both halves have ended cleanly, every way out of here is an abort, also a drop.
    abort.arm();
    let (reader, writer) = tokio::io::split(io);
    let both = both_ways(
        wire_to_io(recv, writer, &bytes.from_wire),
        io_to_wire(leading, reader, send, &bytes.to_wire),
    );
    let end = tokio::select! {
        result = both => match result {
            // The halves are dropped only now: one that ended early must not close the other.
            Ok(_halves) => {
                abort.disarm();
                TunnelEnd::Clean
            }
            Err(end) => end,
        },
        () = idle_for(idle, || bytes.total()) => TunnelEnd::Idle,
    };
    if end != TunnelEnd::Clean {
        send.send_reset(Reason::CANCEL);
    }
    end
}

/// Runs both directions until both ended, or either failed.
///
/// Where the byte stream ended first, the stream's reset is still watched: a direction that waits
/// for room in the byte stream reads nothing, and would not notice it.
async fn both_ways<'s, W, R>(
    inward: impl Future<Output = Result<W, TunnelEnd>>,
    outward: impl Future<Output = Result<(R, &'s mut SendStream<Bytes>), TunnelEnd>>,
) -> Result<(W, R), TunnelEnd> {
    match select(pin!(inward), pin!(outward)).await {
        Either::Left((writer, outward)) => {
            let writer = writer?;
            let (reader, _send) = outward.await?;
            Ok((writer, reader))
        }
        Either::Right((outcome, inward)) => {
            let (reader, send) = outcome?;
            tokio::select! {
                writer = inward => Ok((writer?, reader)),
                reason = reset(send) => Err(TunnelEnd::PeerReset(reason)),
            }
        }
    }
}

/// Ends when `total` stood still for the limit.
pub(crate) async fn idle_for(idle: &TunnelIdle, total: impl Fn() -> u64) {
    let step = (idle.limit / 4).max(Duration::from_millis(1));
    let mut seen = total();
    let mut quiet = Duration::ZERO;
    while quiet < idle.limit {
        idle.clock.sleep(step).await;
        let now = total();
        quiet = if now == seen {
            quiet + step
        } else {
            Duration::ZERO
        };
        seen = now;
    }
}

async fn wire_to_io<IO: AsyncRead + AsyncWrite>(
    mut recv: RecvStream,
    mut writer: WriteHalf<IO>,
    count: &AtomicU64,
) -> Result<WriteHalf<IO>, TunnelEnd> {
    while let Some(data) = recv.data().await {
        let data = data.map_err(|error| reset_by_peer(&error))?;
        let length = data.len();
        writer
            .write_all(&data)
            .await
            .map_err(|error| aborted(&error))?;
        count.fetch_add(length as u64, Ordering::Relaxed);
        // A failure means that the stream is gone, which the next read reports.
        drop(recv.flow_control().release_capacity(length));
    }
    recv.trailers()
        .await
        .map_err(|error| reset_by_peer(&error))?;
    writer.shutdown().await.map_err(|error| aborted(&error))?;
    Ok(writer)
}

async fn io_to_wire<'s, IO: AsyncRead + AsyncWrite>(
    leading: Bytes,
    mut reader: ReadHalf<IO>,
    send: &'s mut SendStream<Bytes>,
    count: &AtomicU64,
) -> Result<(ReadHalf<IO>, &'s mut SendStream<Bytes>), TunnelEnd> {
    forward(send, leading, count).await?;
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(CHUNK_BYTES);
        let read = tokio::select! {
            read = reader.read_buf(&mut buffer) => read.map_err(|error| aborted(&error))?,
            reason = reset(send) => return Err(TunnelEnd::PeerReset(reason)),
        };
        if read == 0 {
            break;
        }
        forward(send, buffer.split().freeze(), count).await?;
    }
    send.send_data(Bytes::new(), true)
        .map_err(|error| reset_by_peer(&error))?;
    Ok((reader, send))
}

async fn forward(
    send: &mut SendStream<Bytes>,
    data: Bytes,
    count: &AtomicU64,
) -> Result<(), TunnelEnd> {
    let length = data.len() as u64;
    match send_data(send, data, false).await {
        Ok(()) => {
            count.fetch_add(length, Ordering::Relaxed);
            Ok(())
        }
        Err(SendError::Reset(reason)) => Err(TunnelEnd::PeerReset(Some(reason))),
        Err(SendError::Connection(_) | SendError::Body(_)) => Err(TunnelEnd::PeerReset(None)),
    }
}

async fn reset(send: &mut SendStream<Bytes>) -> Option<Reason> {
    poll_fn(|context| send.poll_reset(context)).await.ok()
}

fn reset_by_peer(error: &h2::Error) -> TunnelEnd {
    TunnelEnd::PeerReset(error.reason())
}

fn aborted(error: &io::Error) -> TunnelEnd {
    TunnelEnd::Aborted(error.kind())
}
