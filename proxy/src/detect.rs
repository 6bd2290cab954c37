//! What a connection speaks, from its first bytes.
//!
//! Invariant: nothing is guessed. A connection is HTTP/2 only with the whole 24-byte preface, and
//! HTTP/1 only when it begins like a method, or, where other protocols of text may be spoken, like a
//! request line; the bytes that were read come first again.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use sidegate_mesh::Clock;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

/// What every HTTP/2 client sends first.
pub const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How long a connection of unknown protocol may stay silent before it is taken for one on which
/// the server speaks first.
pub const SILENCE: Duration = Duration::from_millis(100);

/// First byte of a TLS handshake record.
const TLS_HANDSHAKE: u8 = 0x16;

/// Longest method that a request line is waited for to show.
const METHOD_BYTES_MAX: usize = 32;

/// Room for the bytes that are read ahead at a time.
const READ_AHEAD_BYTES: usize = 2048;

/// What a connection speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detected {
    /// HTTP/2 with prior knowledge.
    Http2,
    /// HTTP/1, or what begins like it.
    Http1,
    /// TLS.
    Tls,
    /// Bytes that are none of these.
    Other,
    /// Nothing came in time.
    Silent,
    /// Closed without a byte.
    Closed,
}

/// What a connection may speak besides HTTP/2 and TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// HTTP/1: what begins like it is refused, with an answer, by the guard.
    Http,
    /// Anything, also another protocol that begins with letters.
    Anything,
}

/// Reads until it is clear what `io` speaks, at most for `timeout`.
///
/// # Errors
///
/// That of the connection.
pub async fn protocol<IO>(
    io: IO,
    clock: &dyn Clock,
    timeout: Duration,
    expected: Expected,
) -> io::Result<(Detected, Prefixed<IO>)>
where
    IO: AsyncRead + Unpin,
{
    let bytes = BytesMut::with_capacity(PREFACE.len());
    read_on((bytes, io), clock, timeout, expected).await
}

/// As [`protocol`], for a connection whose first bytes have already been read.
///
/// # Errors
///
/// That of the connection.
pub async fn protocol_of<IO>(
    io: Prefixed<IO>,
    clock: &dyn Clock,
    timeout: Duration,
    expected: Expected,
) -> io::Result<(Detected, Prefixed<IO>)>
where
    IO: AsyncRead + Unpin,
{
    if let Some(detected) = classify(io.prefix(), expected) {
        return Ok((detected, io));
    }
    let (bytes, io) = io.into_parts();
    read_on((BytesMut::from(bytes), io), clock, timeout, expected).await
}

async fn read_on<IO>(
    (mut bytes, mut io): (BytesMut, IO),
    clock: &dyn Clock,
    timeout: Duration,
    expected: Expected,
) -> io::Result<(Detected, Prefixed<IO>)>
where
    IO: AsyncRead + Unpin,
{
    let mut expired = clock.sleep(timeout);
    let detected = loop {
        bytes.reserve(PREFACE.len());
        let read = tokio::select! {
            read = io.read_buf(&mut bytes) => read?,
            () = &mut expired => break after_silence(&bytes),
        };
        if let Some(detected) = classify(&bytes, expected) {
            break detected;
        }
        if read == 0 {
            break if bytes.is_empty() {
                Detected::Closed
            } else {
                Detected::Other
            };
        }
    };
    Ok((detected, Prefixed::new(bytes.freeze(), io)))
}

/// A cut-off preface is no protocol; `P` alone may be the begin of a slow HTTP/1 head.
fn after_silence(bytes: &[u8]) -> Detected {
    if bytes.is_empty() {
        Detected::Silent
    } else {
        Detected::Http1
    }
}

/// What `bytes` are; `None` while that is not clear yet.
fn classify(bytes: &[u8], expected: Expected) -> Option<Detected> {
    let first = *bytes.first()?;
    if bytes.starts_with(PREFACE) {
        return Some(Detected::Http2);
    }
    if PREFACE.starts_with(bytes) {
        return None;
    }
    if first == TLS_HANDSHAKE {
        return Some(Detected::Tls);
    }
    let http = match expected {
        Expected::Anything => begins_request(bytes)?,
        // A method is a token; what is not quite one is refused, with an answer, by the guard.
        Expected::Http => first.is_ascii_graphic() || b"\r\n \t".contains(&first),
    };
    Some(if http {
        Detected::Http1
    } else {
        Detected::Other
    })
}

/// Whether `bytes` begin like a request line: a method in capitals, a space, the begin of a target.
/// `None` while they may still.
fn begins_request(bytes: &[u8]) -> Option<bool> {
    let letter = |byte: &u8| byte.is_ascii_uppercase() || matches!(byte, b'-' | b'_');
    let Some(end) = bytes.iter().position(|byte| !letter(byte)) else {
        return (bytes.len() > METHOD_BYTES_MAX).then_some(false);
    };
    let (method, rest) = bytes.split_at(end);
    let Some(target) = rest.strip_prefix(b" ").filter(|_| !method.is_empty()) else {
        return Some(false);
    };
    let targets: [&[u8]; 4] = [b"/", b"*", b"http://", b"https://"];
    if method == b"CONNECT" || targets.iter().any(|begin| target.starts_with(begin)) {
        return Some(true);
    }
    let open = targets.iter().any(|begin| begin.starts_with(target));
    (!open).then_some(false)
}

/// A connection whose first bytes have already been read.
#[derive(Debug)]
pub struct Prefixed<IO> {
    prefix: Bytes,
    io: IO,
}

impl<IO> Prefixed<IO> {
    /// `prefix` is read before anything of `io`.
    pub fn new(prefix: Bytes, io: IO) -> Self {
        Self { prefix, io }
    }

    /// The connection.
    pub fn get_ref(&self) -> &IO {
        &self.io
    }

    /// The bytes that were read and not yet read again.
    pub fn prefix(&self) -> &[u8] {
        &self.prefix
    }

    /// The bytes that were read and not yet read again, and the connection.
    pub fn into_parts(self) -> (Bytes, IO) {
        (self.prefix, self.io)
    }
}

impl<IO: AsyncRead + Unpin> Prefixed<IO> {
    /// Reads further bytes ahead of whoever reads next; how many they were, none at the end.
    ///
    /// # Errors
    ///
    /// That of the connection.
    pub async fn read_ahead(&mut self) -> io::Result<usize> {
        let mut more = BytesMut::with_capacity(READ_AHEAD_BYTES);
        // Nothing is lost when this is given up: what was not read is not taken.
        let read = self.io.read_buf(&mut more).await?;
        if self.prefix.is_empty() {
            self.prefix = more.freeze();
        } else {
            let mut bytes = BytesMut::from(std::mem::take(&mut self.prefix));
            bytes.extend_from_slice(&more);
            self.prefix = bytes.freeze();
        }
        Ok(read)
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Prefixed<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() {
            return Pin::new(&mut self.io).poll_read(cx, buffer);
        }
        let length = self.prefix.len().min(buffer.remaining());
        buffer.put_slice(self.prefix.get(..length).unwrap_or_default());
        self.prefix.advance(length);
        if self.prefix.is_empty() {
            // Gives the shared memory back.
            self.prefix = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Prefixed<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use sidegate_mesh::ManualClock;
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[track_caller]
    fn check(bytes: &[u8], detected: Option<Detected>) {
        let found = classify(bytes, Expected::Http);
        assert_eq!(found, detected, "{}", bytes.escape_ascii());
    }

    #[test]
    fn where_anything_may_be_spoken_only_a_request_line_is_http() {
        use Detected::{Http1, Other, Tls};
        for (bytes, detected) in [
            (&b"GET / HTTP/1.1"[..], Some(Http1)),
            (b"M-SEARCH * HTTP/1.1", Some(Http1)),
            (b"GET http://orders/ HTTP/1.1", Some(Http1)),
            (b"CONNECT orders:80 HTTP/1.1", Some(Http1)),
            (b"PRI /", Some(Http1)),
            (b"G", None),
            (b"GET", None),
            (b"GET ", None),
            (b"GET htt", None),
            // Redis, memcached, IRC, SSH, AMQP, and a method that never ends.
            (b"PING\r\n", Some(Other)),
            (b"*1\r\n$4\r\nPING\r\n", Some(Other)),
            (b"get key\r\n", Some(Other)),
            (b"NICK somebody\r\n", Some(Other)),
            (b"SSH-2.0-OpenSSH", Some(Other)),
            (b"AMQP\0\0\x09\x01", Some(Other)),
            (&[b'A'; METHOD_BYTES_MAX + 1], Some(Other)),
            (b"\0", Some(Other)),
            (b" GET /", Some(Other)),
            (b"\x16\x03\x01", Some(Tls)),
            (b"PRI * HTTP/2.0\r\n", None),
        ] {
            let found = classify(bytes, Expected::Anything);
            assert_eq!(found, detected, "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn only_the_whole_preface_is_http2() {
        check(PREFACE, Some(Detected::Http2));
        check(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0",
            Some(Detected::Http2),
        );
        for length in 1..PREFACE.len() {
            check(&PREFACE[..length], None);
        }
        check(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\rX", Some(Detected::Http1));
        check(b"PUT /", Some(Detected::Http1));
    }

    #[test]
    fn what_is_not_http_is_not_taken_for_it() {
        check(b"\x16\x03\x01", Some(Detected::Tls));
        check(b"\0", Some(Detected::Other));
        check(b"\xff", Some(Detected::Other));
        check(b"", None);
    }

    async fn detect(parts: &[&[u8]], close: bool) -> (Detected, Vec<u8>) {
        let clock = ManualClock::new(SystemTime::UNIX_EPOCH);
        let (mut client, server) = tokio::io::duplex(64);
        let send = async {
            for part in parts {
                client.write_all(part).await.unwrap();
                tokio::task::yield_now().await;
            }
            if close {
                client.shutdown().await.unwrap();
            }
        };
        let detect = protocol(server, &clock, Duration::from_secs(1), Expected::Http);
        let ((), detected) = tokio::join!(send, detect);
        let (detected, mut io) = detected.unwrap();
        client.shutdown().await.unwrap();
        let mut rest = Vec::new();
        io.read_to_end(&mut rest).await.unwrap();
        (detected, rest)
    }

    #[tokio::test]
    async fn the_bytes_that_were_looked_at_come_first_again() {
        let (detected, rest) =
            detect(&[b"PRI * HT", b"TP/2.0\r\n\r\n", b"SM\r\n\r\nrest"], false).await;
        assert_eq!(detected, Detected::Http2);
        assert_eq!(rest, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nrest");
        let (detected, rest) = detect(&[b"P", b"OST / HTTP/1.1\r\n"], false).await;
        assert_eq!(detected, Detected::Http1);
        assert_eq!(rest, b"POST / HTTP/1.1\r\n");
    }

    #[tokio::test]
    async fn what_is_read_ahead_comes_first_and_a_wait_for_it_may_be_given_up() {
        let (mut client, server) = tokio::io::duplex(64);
        let mut io = Prefixed::new(Bytes::from_static(b"a"), server);
        {
            let mut wait = std::pin::pin!(io.read_ahead());
            assert!(futures_util::poll!(wait.as_mut()).is_pending());
        }
        client.write_all(b"bc").await.unwrap();
        assert_eq!(io.read_ahead().await.unwrap(), 2);
        assert_eq!(io.prefix(), b"abc");
        let clock = ManualClock::new(SystemTime::UNIX_EPOCH);
        let (detected, mut io) = protocol_of(io, &clock, Duration::from_secs(1), Expected::Http)
            .await
            .unwrap();
        assert_eq!(detected, Detected::Http1);
        client.write_all(b"d").await.unwrap();
        drop(client);
        let mut rest = Vec::new();
        io.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"abcd");
    }

    #[tokio::test]
    async fn a_connection_that_says_nothing_is_told_apart_from_one_that_was_closed() {
        assert_eq!(detect(&[], true).await.0, Detected::Closed);
        assert_eq!(detect(&[b"PRI"], true).await.0, Detected::Other);
        let clock = ManualClock::new(SystemTime::UNIX_EPOCH);
        let (_client, server) = tokio::io::duplex(64);
        let mut detect = std::pin::pin!(protocol(
            server,
            &clock,
            Duration::from_secs(1),
            Expected::Http
        ));
        assert!(futures_util::poll!(detect.as_mut()).is_pending());
        clock.advance(Duration::from_secs(1));
        assert_eq!(detect.await.unwrap().0, Detected::Silent);
    }
}
