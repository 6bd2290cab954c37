//! The guard on the server side: what an application's requests must be before hyper reads them.
//!
//! Always true: a peer cannot make hyper see the internal request, because its method is refused
//! like any other that is not an upper-case token; and hyper sees nothing behind it.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use http::Request;
use http::header::UPGRADE;
use sidegate_mesh::Clock;
use sidegate_mesh::clock::Sleep;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::GuardLimits;
use super::checker::{Checker, Stop};
use super::reader::Reader;
use super::rejection::{Reason, Rejection};

/// What hyper reads in place of a refused head. The method is a token, so that hyper takes it, and
/// no upper-case one, so that the guard would never pass it on.
const INTERNAL_REQUEST: &[u8] =
    b"sidegate-refused / HTTP/1.1\r\nhost: refused.invalid\r\nconnection: close\r\n\r\n";

/// The method of [`INTERNAL_REQUEST`].
const INTERNAL_METHOD: &str = "sidegate-refused";

/// How much of what a refused peer goes on sending is read, so that the refusal is not lost in a
/// connection reset, and for how long.
const LINGER_BYTES_MAX: usize = 256 * 1024;
const LINGER_TIME: Duration = Duration::from_secs(1);

/// Most bytes that wait behind an upgrade until it is decided.
const EARLY_BYTES_MAX: usize = 4 * 1024;

/// A connection from an application, as hyper's server may read it.
///
/// Read through [`super::server`] and ask [`GuardHandle::admit`] first for every request.
pub struct ServerGuard<IO> {
    io: IO,
    reader: Reader,
    shared: Arc<Mutex<Shared>>,
    linger: Linger,
}

/// What the service asks of the guard, out of the peer's reach.
#[derive(Clone)]
pub struct GuardHandle {
    shared: Arc<Mutex<Shared>>,
}

/// Whether an upgrade takes place. Dropped, it does not, and requests may follow.
#[must_use = "dropping it declines the upgrade"]
pub struct UpgradeGate {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    rejection: Option<Rejection>,
    reported: bool,
    decision: Option<Upgrade>,
    early: bool,
    waker: Option<Waker>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Upgrade {
    Accepted,
    Declined,
}

/// The end of a connection whose last request was refused.
enum Linger {
    No,
    Due,
    Until { timer: Sleep, bytes: usize },
}

impl<IO> ServerGuard<IO> {
    /// Guards `io`; the handle belongs to the service.
    pub fn new(io: IO, limits: GuardLimits, clock: Arc<dyn Clock>) -> (Self, GuardHandle) {
        let shared = Arc::new(Mutex::new(Shared::default()));
        let guard = Self {
            io,
            reader: Reader::new(Checker::requests(limits), limits, clock),
            shared: Arc::clone(&shared),
            linger: Linger::No,
        };
        (guard, GuardHandle { shared })
    }

    /// Refuses the head that is being read.
    fn reject(&mut self, rejection: Rejection) {
        self.fail(rejection);
        self.reader.replace(INTERNAL_REQUEST);
        self.linger = Linger::Due;
    }

    /// Notes why the connection is of no further use.
    fn fail(&mut self, rejection: Rejection) {
        self.reader.checker.fail(rejection);
        lock(&self.shared).rejection.get_or_insert(rejection);
    }

    fn stop(&mut self, stop: Option<Stop>) {
        match stop {
            Some(Stop::Reject(rejection)) => self.reject(rejection),
            Some(Stop::Fail(rejection)) => self.fail(rejection),
            Some(Stop::Gate | Stop::Over) | None => {}
        }
    }

    /// Goes through the gate if the upgrade has been decided.
    fn poll_gate(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let decision = {
            let mut shared = lock(&self.shared);
            shared.early |= self.reader.held() > 0;
            let decision = shared.decision.take();
            match decision {
                None => shared.waker = Some(context.waker().clone()),
                Some(_) => shared.early = false,
            }
            decision
        };
        match decision {
            None => return Poll::Pending,
            Some(Upgrade::Accepted) => self.reader.checker.pass_all(),
            Some(Upgrade::Declined) => self.reader.checker.resume(),
        }
        let stop = self.reader.check_held();
        self.stop(stop);
        Poll::Ready(())
    }

    fn refused(&self) -> bool {
        !matches!(self.linger, Linger::No)
    }
}

impl<IO: AsyncRead + Unpin> ServerGuard<IO> {
    /// Reads once. `Ready(Ok(true))` when there is something to pass on or the end is reached.
    fn poll_more(
        &mut self,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<bool>> {
        if self.refused() {
            // Nothing follows the internal request; hyper closes behind its answer.
            return Poll::Pending;
        }
        if let Some(rejection) = self.reader.checker.failure() {
            return Poll::Ready(Err(rejection.into()));
        }
        if self.reader.checker.at_gate() {
            if self.poll_gate(context).is_ready() {
                return Poll::Ready(Ok(false));
            }
            if self.reader.held() >= EARLY_BYTES_MAX {
                return Poll::Pending;
            }
        }
        let before = buffer.filled().len();
        match Pin::new(&mut self.io).poll_read(context, buffer) {
            Poll::Ready(read) => read?,
            Poll::Pending if self.reader.poll_late(context) => {
                self.late();
                return Poll::Ready(Ok(false));
            }
            Poll::Pending => return Poll::Pending,
        }
        if buffer.filled().len() == before {
            return self.ended();
        }
        if self.reader.checker.at_gate() {
            self.reader.keep(buffer, before);
            lock(&self.shared).early = true;
            return Poll::Ready(Ok(false));
        }
        let stop = self.reader.absorb(buffer, before);
        self.stop(stop);
        Poll::Ready(Ok(buffer.filled().len() > before))
    }

    fn late(&mut self) {
        if self.reader.checker.end(self.reader.held()) == Some(Reason::IncompleteHead) {
            self.reject(Reason::HeadTimeout.into());
        } else {
            self.fail(Reason::HeadTimeout.into());
        }
    }

    fn ended(&mut self) -> Poll<io::Result<bool>> {
        match self.reader.checker.end(self.reader.held()) {
            Some(Reason::IncompleteHead) => {
                self.reject(Reason::IncompleteHead.into());
                Poll::Ready(Ok(false))
            }
            Some(reason) => {
                // hyper reports the missing bytes itself, as it does for a reset.
                lock(&self.shared).rejection.get_or_insert(reason.into());
                Poll::Ready(Ok(true))
            }
            None => Poll::Ready(Ok(true)),
        }
    }

    /// Reads what a refused peer still sends, for a while.
    fn poll_linger(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if let Linger::Due = self.linger {
            let timer = self.reader.clock().sleep(LINGER_TIME);
            self.linger = Linger::Until { timer, bytes: 0 };
        }
        let Linger::Until { timer, bytes } = &mut self.linger else {
            return Poll::Ready(());
        };
        let mut scratch = [0; 2048];
        loop {
            let mut buffer = ReadBuf::new(&mut scratch);
            match Pin::new(&mut self.io).poll_read(context, &mut buffer) {
                Poll::Pending => return timer.as_mut().poll(context),
                Poll::Ready(Err(_)) => return Poll::Ready(()),
                Poll::Ready(Ok(())) => *bytes += buffer.filled().len(),
            }
            if buffer.filled().is_empty() || *bytes > LINGER_BYTES_MAX {
                return Poll::Ready(());
            }
        }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for ServerGuard<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if this.reader.deliver(buffer) || buffer.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            match this.poll_more(context, buffer) {
                // What follows the last message means nothing, but its end does.
                Poll::Ready(Ok(false)) => {}
                Poll::Ready(Ok(true)) => return Poll::Ready(Ok(())),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for ServerGuard<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if !matches!(this.linger, Linger::Until { .. }) {
            match Pin::new(&mut this.io).poll_shutdown(context) {
                Poll::Ready(Ok(())) => {}
                other => return other,
            }
        }
        this.poll_linger(context).map(Ok)
    }
}

impl GuardHandle {
    /// Whether the service may answer `request`; to be asked first, for every request.
    ///
    /// `Ok(Some(gate))` when the request asks for an upgrade: nothing that the peer sends behind
    /// it is read as a request, or passed on, before the gate is accepted or dropped.
    ///
    /// # Errors
    ///
    /// The reason, when `request` stands for a head that was refused. Answer with its status; the
    /// connection closes behind that.
    pub fn admit<B>(&self, request: &Request<B>) -> Result<Option<UpgradeGate>, Rejection> {
        if request.method().as_str() == INTERNAL_METHOD {
            let mut shared = lock(&self.shared);
            shared.reported = true;
            return Err(shared.rejection.unwrap_or(Reason::RequestLine.into()));
        }
        let upgrade = request.headers().contains_key(UPGRADE);
        Ok(upgrade.then(|| UpgradeGate {
            shared: Arc::clone(&self.shared),
        }))
    }

    /// Why the connection is of no further use, once it is not: a refused head, or a body that
    /// broke off or broke its framing.
    pub fn rejection(&self) -> Option<Rejection> {
        lock(&self.shared).rejection
    }

    /// The rejection that no request has carried to the service, once: ask when the connection
    /// has ended, so that every refusal is logged. A body that broke off is none: its call tells.
    pub fn take_unreported(&self) -> Option<Rejection> {
        let mut shared = lock(&self.shared);
        let reported = std::mem::replace(&mut shared.reported, true);
        let refusal = |rejection: &Rejection| rejection.reason != Reason::IncompleteBody;
        shared.rejection.filter(|_| !reported).filter(refusal)
    }
}

impl UpgradeGate {
    /// Lets everything pass from here on. To be called before the 101 is sent.
    ///
    /// # Errors
    ///
    /// [`Reason::UpgradeEarlyData`] when the peer did not wait; answer with its status.
    pub fn accept(self) -> Result<(), Rejection> {
        let mut shared = lock(&self.shared);
        if shared.early {
            return Err(Reason::UpgradeEarlyData.into());
        }
        shared.decision = Some(Upgrade::Accepted);
        Ok(())
    }
}

impl Drop for UpgradeGate {
    fn drop(&mut self) {
        let waker = {
            let mut shared = lock(&self.shared);
            shared.decision.get_or_insert(Upgrade::Declined);
            shared.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
