//! A request's body on its way to the application.
//!
//! Always true: whether the body was sent to its end, or why it was not, is known to whoever holds
//! its [`Progress`], also after hyper has taken the body away.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use sidegate_mesh::Clock;
use sidegate_mesh::clock::Sleep;
use tokio::sync::Notify;

use crate::body::{Body, BodyError};
use crate::call::ByteCounters;
use crate::headers::{Sender, sanitize_trailers};

/// How far a request's body has got.
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicBool,
    watched: AtomicBool,
    failure: OnceLock<BodyError>,
    notify: Notify,
}

impl Progress {
    /// Waits until the body was sent to its end, failed, or was dropped.
    pub async fn done(&self) {
        while !self.is_done() {
            self.notify.notified().await;
        }
    }

    /// Whether the body was sent to its end, failed, or was dropped.
    pub fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }

    /// Why the body could not be read to its end.
    pub fn failure(&self) -> Option<&BodyError> {
        self.failure.get()
    }

    /// From now on, or from now on no longer, a pause in the body is a failure.
    pub fn watch_pauses(&self, watch: bool) {
        self.watched.store(watch, Ordering::Release);
    }

    fn end(&self) {
        self.done.store(true, Ordering::Release);
        self.notify.notify_one();
    }
}

/// A request's body: counted, watched for pauses, its trailers cleaned.
pub struct RequestBody {
    inner: Body,
    bytes: Arc<ByteCounters>,
    progress: Arc<Progress>,
    pause_max: Duration,
    clock: Arc<dyn Clock>,
    pause: Option<Sleep>,
}

impl RequestBody {
    /// Passes `inner` on; no pause longer than `pause_max` while they are watched.
    pub fn wrap(
        inner: Body,
        bytes: Arc<ByteCounters>,
        pause_max: Duration,
        clock: Arc<dyn Clock>,
    ) -> (Body, Arc<Progress>) {
        let progress = Arc::new(Progress::default());
        if inner.is_end_stream() {
            progress.end();
            return (Body::Empty, progress);
        }
        let body = Self {
            inner,
            bytes,
            progress: Arc::clone(&progress),
            pause_max,
            clock,
            pause: None,
        };
        (Body::boxed(body), progress)
    }

    fn poll_pause(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if !self.progress.watched.load(Ordering::Acquire) {
            self.pause = None;
            return Poll::Pending;
        }
        let (clock, pause_max) = (&self.clock, self.pause_max);
        let pause = self.pause.get_or_insert_with(|| clock.sleep(pause_max));
        pause.as_mut().poll(context)
    }

    fn fail(&self, error: BodyError) -> BodyError {
        self.progress.failure.get_or_init(|| error.clone());
        self.progress.end();
        error
    }
}

impl HttpBody for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        let frame = match Pin::new(&mut this.inner).poll_frame(context) {
            Poll::Ready(frame) => frame,
            Poll::Pending => {
                ready!(this.poll_pause(context));
                return Poll::Ready(Some(Err(this.fail(BodyError::Idle))));
            }
        };
        this.pause = None;
        match frame {
            None => {
                this.progress.end();
                Poll::Ready(None)
            }
            Some(Err(error)) => Poll::Ready(Some(Err(this.fail(error)))),
            Some(Ok(mut frame)) => {
                if let Some(data) = frame.data_ref() {
                    this.bytes.add_request(data.len());
                } else if let Some(trailers) = frame.trailers_mut() {
                    sanitize_trailers(trailers, Sender::Application);
                }
                if this.inner.is_end_stream() {
                    this.progress.end();
                }
                Poll::Ready(Some(Ok(frame)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        self.progress.end();
    }
}
