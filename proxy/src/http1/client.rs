//! The guard on the client side: what an application's responses must be before hyper reads them.
//!
//! Always true: a response passes only when it answers the request that [`ClientHandle::begin`]
//! announced; bytes that answer nothing end the connection and are never taken for the answer to
//! the next request.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use http::Method;
use sidegate_mesh::Clock;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::GuardLimits;
use super::checker::{Checker, Question, Stop};
use super::reader::Reader;
use super::rejection::{Reason, Rejection};

/// A connection to an application, as hyper's client may read it.
///
/// Read through [`super::client`], and announce every request with [`ClientHandle::begin`].
pub struct ClientGuard<IO> {
    io: IO,
    reader: Reader,
    shared: Arc<Mutex<Shared>>,
}

/// What the sender of requests tells the guard.
#[derive(Clone)]
pub struct ClientHandle {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Announced, and no byte of it sent yet.
    question: Option<Question>,
    rejection: Option<Rejection>,
}

impl<IO> ClientGuard<IO> {
    /// Guards `io`; the handle belongs to whoever sends the requests.
    pub fn new(io: IO, limits: GuardLimits, clock: Arc<dyn Clock>) -> (Self, ClientHandle) {
        let shared = Arc::new(Mutex::new(Shared::default()));
        let guard = Self {
            io,
            reader: Reader::new(Checker::responses(limits), limits, clock),
            shared: Arc::clone(&shared),
        };
        (guard, ClientHandle { shared })
    }

    fn fail(&mut self, rejection: Rejection) -> io::Error {
        self.reader.checker.fail(rejection);
        lock(&self.shared).rejection.get_or_insert(rejection);
        rejection.into()
    }
}

impl<IO: AsyncRead + Unpin> ClientGuard<IO> {
    /// Before the first byte of a request: nothing may have arrived that answers none.
    fn poll_begin(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        let Some(question) = lock(&self.shared).question.take() else {
            return Ok(());
        };
        if let Some(rejection) = self.reader.checker.failure() {
            return Err(rejection.into());
        }
        let mut scratch = [0; 1];
        let mut buffer = ReadBuf::new(&mut scratch);
        match Pin::new(&mut self.io).poll_read(context, &mut buffer) {
            Poll::Pending => {}
            Poll::Ready(Err(error)) => return Err(error),
            Poll::Ready(Ok(())) if buffer.filled().is_empty() => {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            Poll::Ready(Ok(())) => return Err(self.fail(Reason::UnsolicitedResponse.into())),
        }
        self.reader.checker.expect(question);
        Ok(())
    }

    /// Reads once. `Ready(Ok(true))` when there is something to pass on or the end is reached.
    fn poll_more(
        &mut self,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<bool>> {
        if let Some(rejection) = self.reader.checker.failure() {
            return Poll::Ready(Err(rejection.into()));
        }
        let before = buffer.filled().len();
        match Pin::new(&mut self.io).poll_read(context, buffer) {
            Poll::Ready(read) => read?,
            Poll::Pending if self.reader.poll_late(context) => {
                return Poll::Ready(Err(self.fail(Reason::HeadTimeout.into())));
            }
            Poll::Pending => return Poll::Pending,
        }
        if buffer.filled().len() == before {
            if let Some(reason) = self.reader.checker.end(self.reader.held()) {
                // hyper reports the missing bytes itself, as it does for a reset.
                lock(&self.shared).rejection.get_or_insert(reason.into());
            }
            return Poll::Ready(Ok(true));
        }
        if let Some(Stop::Reject(rejection) | Stop::Fail(rejection)) =
            self.reader.absorb(buffer, before)
        {
            let error = self.fail(rejection);
            if buffer.filled().len() == before {
                return Poll::Ready(Err(error));
            }
        }
        Poll::Ready(Ok(buffer.filled().len() > before))
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for ClientGuard<IO> {
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
                Poll::Ready(Ok(false)) => {}
                Poll::Ready(Ok(true)) => return Poll::Ready(Ok(())),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for ClientGuard<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        this.poll_begin(context)?;
        Pin::new(&mut this.io).poll_write(context, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        this.poll_begin(context)?;
        Pin::new(&mut this.io).poll_write_vectored(context, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

impl ClientHandle {
    /// Announces a request; to be called before hyper is given it, and not before the response to
    /// the one before has ended. `upgrade` says whether the request asks for an upgrade, that is,
    /// whether the application may answer 101.
    pub fn begin(&self, method: &Method, upgrade: bool) {
        lock(&self.shared).question = Some(Question {
            head: method == Method::HEAD,
            upgrade,
        });
    }

    /// Why the connection is of no further use, once it is not.
    pub fn rejection(&self) -> Option<Rejection> {
        lock(&self.shared).rejection
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
