//! Counts the frames of an HTTP/2 connection that cost work and carry nothing.
//!
//! h2 answers every SETTINGS and every PING and tells nobody, so a peer that sends nothing else
//! keeps a worker busy while all the others wait (CVE-2019-9512, CVE-2019-9515). What h2 does count
//! itself (resets, empty DATA, CONTINUATION) is left to it.
//!
//! Always true: what is read is passed on unchanged; once the budget is spent, nothing more is read.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::SystemTime;

use sidegate_mesh::Clock;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;

/// Length of what a client sends before its first frame.
const PREFACE_BYTES: usize = 24;

/// Length of a frame's header.
const HEADER_BYTES: u8 = 9;

/// How often something may happen: a burst at once, then so often in each second.
#[derive(Debug)]
pub struct Budget {
    burst: u32,
    per_second: u32,
    left: u32,
    since: SystemTime,
}

impl Budget {
    /// `burst` at once, and `per_second` more in each second, never more than the burst.
    pub fn new((burst, per_second): (u32, u32), now: SystemTime) -> Self {
        Self {
            burst,
            per_second,
            left: burst,
            since: now,
        }
    }

    /// `count` less; false when so much was not left.
    pub fn spend(&mut self, count: u32, now: SystemTime) -> bool {
        let seconds = now.duration_since(self.since).unwrap_or_default().as_secs();
        if seconds > 0 {
            let seconds = u32::try_from(seconds).unwrap_or(u32::MAX);
            let more = self.per_second.saturating_mul(seconds);
            self.left = self.left.saturating_add(more).min(self.burst);
            self.since = now;
        }
        let spent = self.left.checked_sub(count);
        self.left = spent.unwrap_or_default();
        spent.is_some()
    }
}

/// Where the reading of a connection's frames stands.
#[derive(Debug)]
struct Frames {
    /// Bytes before the next header.
    skip: usize,
    /// The header's bytes so far, the last one lowest.
    header: u128,
    have: u8,
}

impl Frames {
    fn new() -> Self {
        Self {
            skip: PREFACE_BYTES,
            header: 0,
            have: 0,
        }
    }

    /// Reads on; how many frames began that carry nothing of a call.
    fn scan(&mut self, mut bytes: &[u8]) -> u32 {
        let mut idle = 0;
        while !bytes.is_empty() {
            let (skipped, rest) = bytes.split_at(self.skip.min(bytes.len()));
            self.skip -= skipped.len();
            bytes = rest;
            while let (true, Some((byte, rest))) = (self.skip == 0, bytes.split_first()) {
                bytes = rest;
                idle += u32::from(self.take(*byte));
            }
        }
        idle
    }

    /// Takes one byte of a header; true when it is the last one, of such a frame.
    fn take(&mut self, byte: u8) -> bool {
        self.header = self.header << 8 | u128::from(byte);
        self.have += 1;
        if self.have < HEADER_BYTES {
            return false;
        }
        let length = (self.header >> 48) & 0x00ff_ffff;
        let kind = (self.header >> 40) & 0xff;
        // 24 bits always fit.
        self.skip = usize::try_from(length).unwrap_or(usize::MAX);
        (self.header, self.have) = (0, 0);
        // DATA, HEADERS, RST_STREAM, WINDOW_UPDATE and CONTINUATION belong to calls.
        !matches!(kind, 0 | 1 | 3 | 8 | 9)
    }
}

/// A server's connection whose idle frames are counted.
pub struct Metered<IO> {
    io: IO,
    frames: Frames,
    budget: Budget,
    clock: Arc<dyn Clock>,
    exceeded: Arc<Notify>,
    stopped: bool,
}

impl<IO> Metered<IO> {
    /// Reads from `io` until `budget` is spent, which `exceeded` then tells.
    pub fn new(io: IO, budget: Budget, clock: Arc<dyn Clock>, exceeded: Arc<Notify>) -> Self {
        Self {
            io,
            frames: Frames::new(),
            budget,
            clock,
            exceeded,
            stopped: false,
        }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Metered<IO> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.stopped {
            // Whoever was told ends the connection.
            return Poll::Pending;
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.io).poll_read(cx, buf))?;
        let read = buf.filled().get(before..).unwrap_or_default();
        let idle = this.frames.scan(read);
        if idle > 0 && !this.budget.spend(idle, this.clock.now()) {
            this.stopped = true;
            this.exceeded.notify_one();
        }
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Metered<IO> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_budget_bites_and_recovers() {
        const RATE: (u32, u32) = (1_000, 100);
        let start = SystemTime::UNIX_EPOCH;
        let mut budget = Budget::new(RATE, start);
        assert!((0..RATE.0).all(|_| budget.spend(1, start)));
        assert!(!budget.spend(1, start));
        let later = start + Duration::from_secs(1);
        assert!((0..RATE.1).all(|_| budget.spend(1, later)));
        assert!(!budget.spend(1, later));
        let much_later = start + Duration::from_hours(1);
        assert!((0..RATE.0).all(|_| budget.spend(1, much_later)));
        assert!(!budget.spend(1, much_later), "never more than the burst");
    }

    #[test]
    fn frames_are_counted_however_they_are_cut_and_payloads_are_not_taken_for_them() {
        let ping = [0, 0, 8, 6, 0, 0, 0, 0, 0, 6, 6, 6, 6, 6, 6, 6, 6];
        let data = [0, 0, 4, 0, 0, 0, 0, 0, 1, 0, 0, 8, 6];
        let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
        let window = [0, 0, 4, 8, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        for frame in [&settings[..], &ping, &data, &window, &ping, &data] {
            sent.extend(frame);
        }
        for size in 1..=sent.len() {
            let mut frames = Frames::new();
            let idle: u32 = sent.chunks(size).map(|part| frames.scan(part)).sum();
            assert_eq!(idle, 3, "in parts of {size}");
            assert_eq!((frames.skip, frames.have), (0, 0));
        }
    }
}
