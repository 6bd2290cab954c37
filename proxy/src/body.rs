//! Message bodies: one type for all that the hops carry.
//!
//! A [`Body`] is what hyper received, what an h2 stream received, a short text made here, or any
//! of these behind a wrapper. Nothing is buffered: a frame is taken from its source when the other
//! hop asks for it, and an h2 stream's window is given back only then.
//!
//! Invariant: a body ends with `None` only when its source ended cleanly. A reset, a lost connection
//! or a cut-off message is a [`BodyError`], so an abort is never seen as an end.

use std::any::Any;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::Reason;
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use tokio_util::sync::DropGuard;

/// Why a body did not end cleanly.
#[derive(Clone, Debug, thiserror::Error)]
pub enum BodyError {
    /// The other side reset its stream.
    #[error("the stream was reset: {0}")]
    Reset(Reason),
    /// The connection was lost, or the message on it was cut off or malformed.
    #[error("the connection failed: {0}")]
    Connection(Arc<str>),
    /// No frame came for longer than the idle limit.
    #[error("the body was idle for too long")]
    Idle,
    /// The sidecar itself ends the stream, for the reason that the peer is told.
    #[error("ended by the sidecar: {0}")]
    Ended(Reason),
}

impl BodyError {
    /// What the other hop is told when it is HTTP/2.
    ///
    /// A reset passes on as it came; a lost connection is `CANCEL`, because whoever was sending is
    /// no longer there.
    pub fn reset_reason(&self) -> Reason {
        match self {
            // NO_ERROR would read as a clean end of a message that was not complete.
            Self::Reset(Reason::NO_ERROR) | Self::Connection(_) | Self::Idle => Reason::CANCEL,
            Self::Reset(reason) | Self::Ended(reason) => *reason,
        }
    }
}

impl From<h2::Error> for BodyError {
    fn from(error: h2::Error) -> Self {
        match error.reason() {
            Some(reason) if error.is_reset() => Self::Reset(reason),
            _ => Self::Connection(error.to_string().into()),
        }
    }
}

impl From<hyper::Error> for BodyError {
    fn from(error: hyper::Error) -> Self {
        Self::Connection(error.to_string().into())
    }
}

/// A body of any origin.
pub enum Body {
    /// None at all.
    Empty,
    /// A short body made here.
    Full(Bytes),
    /// Received by hyper.
    Hyper(Incoming),
    /// Received on an h2 stream.
    H2(RecvBody),
    /// Any of these behind a wrapper.
    Boxed(BoxBody),
}

/// A body behind a pointer.
pub type BoxBody = Pin<Box<dyn HttpBody<Data = Bytes, Error = BodyError> + Send>>;

impl Body {
    /// Hides a wrapper's type.
    pub fn boxed<B>(body: B) -> Self
    where
        B: HttpBody<Data = Bytes, Error = BodyError> + Send + 'static,
    {
        Self::Boxed(Box::pin(body))
    }
}

impl From<&'static str> for Body {
    fn from(text: &'static str) -> Self {
        Self::from(Bytes::from_static(text.as_bytes()))
    }
}

impl From<String> for Body {
    fn from(text: String) -> Self {
        Self::from(Bytes::from(text))
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        if bytes.is_empty() {
            Self::Empty
        } else {
            Self::Full(bytes)
        }
    }
}

impl From<Incoming> for Body {
    fn from(body: Incoming) -> Self {
        if HttpBody::is_end_stream(&body) {
            Self::Empty
        } else {
            Self::Hyper(body)
        }
    }
}

impl From<RecvBody> for Body {
    fn from(body: RecvBody) -> Self {
        Self::H2(body)
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "Body::Empty",
            Self::Full(_) => "Body::Full",
            Self::Hyper(_) => "Body::Hyper",
            Self::H2(_) => "Body::H2",
            Self::Boxed(_) => "Body::Boxed",
        })
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        match this {
            Self::Empty => Poll::Ready(None),
            Self::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                *this = Self::Empty;
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Self::Hyper(body) => Pin::new(body).poll_frame(cx).map_err(BodyError::from),
            Self::H2(body) => Pin::new(body).poll_frame(cx),
            Self::Boxed(body) => body.as_mut().poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Full(_) => false,
            Self::Hyper(body) => body.is_end_stream(),
            Self::H2(body) => body.is_end_stream(),
            Self::Boxed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Hyper(body) => body.size_hint(),
            Self::H2(body) => body.size_hint(),
            Self::Boxed(body) => body.size_hint(),
        }
    }
}

/// The receiving half of an h2 stream, as a body.
pub struct RecvBody {
    stream: h2::RecvStream,
    data_done: bool,
    ended: bool,
    /// From `content-length`, as far as it is known and not yet received.
    remaining: Option<u64>,
    /// Resets what the call still sends, unless the body ends cleanly first.
    cancel: Option<DropGuard>,
    /// Held until the body is dropped: the stream's place in the pool, a permit.
    held: Option<Box<dyn Any + Send>>,
}

impl RecvBody {
    /// Reads `stream`; `headers` are those of its head, for the length.
    pub fn new(stream: h2::RecvStream, headers: &HeaderMap) -> Self {
        let remaining = headers
            .get(http::header::CONTENT_LENGTH)
            .and_then(|value| value.to_str().ok())
            .and_then(|text| text.parse().ok());
        Self {
            ended: stream.is_end_stream(),
            data_done: false,
            stream,
            remaining,
            cancel: None,
            held: None,
        }
    }

    /// Keeps `held` for as long as the body lives.
    #[must_use]
    pub fn holding(mut self, held: impl Any + Send) -> Self {
        self.held = Some(Box::new(held));
        self
    }

    /// Lets `cancel` happen when the body is dropped before its clean end, and not after it.
    #[must_use]
    pub fn cancelling(mut self, cancel: Option<DropGuard>) -> Self {
        self.cancel = cancel;
        if self.ended {
            self.disarm();
        }
        self
    }

    fn disarm(&mut self) {
        if let Some(guard) = self.cancel.take() {
            drop(guard.disarm());
        }
    }

    /// The length is not that of a message: a tunnel, or an answer to HEAD.
    #[must_use]
    pub fn of_unknown_length(mut self) -> Self {
        self.remaining = None;
        self
    }

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BodyError>>> {
        let Some(data) = ready!(self.stream.poll_data(cx)) else {
            self.data_done = true;
            return Poll::Ready(None);
        };
        let data = data?;
        // The frame now belongs to the other hop, which polls only when it has room.
        self.stream.flow_control().release_capacity(data.len())?;
        self.remaining = self
            .remaining
            .map(|remaining| remaining.saturating_sub(data.len() as u64));
        Poll::Ready(Some(Ok(data)))
    }
}

impl HttpBody for RecvBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        if this.ended {
            return Poll::Ready(None);
        }
        if !this.data_done
            && let Some(data) = ready!(this.poll_data(cx))
        {
            this.ended = data.is_err();
            if this.stream.is_end_stream() && data.is_ok() {
                this.disarm();
            }
            return Poll::Ready(Some(data.map(Frame::data)));
        }
        let trailers = ready!(this.stream.poll_trailers(cx));
        this.ended = true;
        if trailers.is_ok() {
            this.disarm();
        }
        match trailers {
            Ok(trailers) => Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers)))),
            Err(error) => Poll::Ready(Some(Err(error.into()))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended || self.stream.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.remaining.map(SizeHint::with_exact).unwrap_or_default()
    }
}

/// What watches a body pass: counters, limits, the call's record.
pub trait Watch: Send + Unpin + 'static {
    /// `bytes` of data pass.
    fn data(&mut self, bytes: usize);

    /// Trailers pass; they may be changed.
    fn trailers(&mut self, trailers: &mut HeaderMap) {
        let _ = trailers;
    }

    /// The body ended cleanly. Called at most once, and never after [`Self::failed`].
    fn ended(&mut self) {}

    /// The body failed. Called at most once. A body that is dropped before it ended calls neither.
    fn failed(&mut self, error: &BodyError) {
        let _ = error;
    }
}

/// A body that is watched.
pub struct Watched<W, B = Body> {
    body: B,
    watch: W,
    done: bool,
}

impl<W: Watch, B: HttpBody> Watched<W, B> {
    /// Watches `body`. A body that is already at its end is reported as ended at once.
    pub fn new(body: B, mut watch: W) -> Self {
        let done = body.is_end_stream();
        if done {
            watch.ended();
        }
        Self { body, watch, done }
    }
}

impl<W, B> HttpBody for Watched<W, B>
where
    W: Watch,
    B: HttpBody<Data = Bytes, Error = BodyError> + Unpin,
{
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        if this.done {
            return Poll::Ready(None);
        }
        let mut frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        match &mut frame {
            None => this.done = true,
            Some(Err(error)) => {
                this.watch.failed(error);
                this.done = true;
                return Poll::Ready(frame);
            }
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    this.watch.data(data.len());
                } else if let Some(trailers) = frame.trailers_mut() {
                    this.watch.trailers(trailers);
                    this.done = true;
                }
            }
        }
        // A consumer that asks `is_end_stream` does not poll again for the final `None`.
        this.done = this.done || this.body.is_end_stream();
        if this.done {
            this.watch.ended();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.done
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use http_body_util::BodyExt;

    use super::*;

    #[derive(Clone, Default)]
    struct Notes(Arc<Mutex<Vec<String>>>);

    impl Watch for Notes {
        fn data(&mut self, bytes: usize) {
            self.0.lock().unwrap().push(format!("data {bytes}"));
        }
        fn ended(&mut self) {
            self.0.lock().unwrap().push("ended".to_owned());
        }
        fn failed(&mut self, error: &BodyError) {
            self.0.lock().unwrap().push(format!("failed {error}"));
        }
    }

    fn now<T>(future: impl Future<Output = T>) -> T {
        futures_util::FutureExt::now_or_never(future).expect("the future waits for nothing")
    }

    #[test]
    fn a_watched_body_reports_its_data_and_one_end() {
        let notes = Notes::default();
        let body = Watched::new(Body::from("seven b"), notes.clone());
        assert_eq!(now(body.collect()).unwrap().to_bytes(), "seven b");
        assert_eq!(*notes.0.lock().unwrap(), ["data 7", "ended"]);
    }

    #[test]
    fn an_empty_watched_body_has_ended_before_it_is_polled() {
        let notes = Notes::default();
        let body = Watched::new(Body::Empty, notes.clone());
        assert!(body.is_end_stream());
        assert_eq!(*notes.0.lock().unwrap(), ["ended"]);
    }

    #[test]
    fn a_failed_body_is_never_reported_as_ended() {
        let notes = Notes::default();
        let stream = futures_util::stream::iter([
            Ok(Frame::data(Bytes::from_static(b"x"))),
            Err(BodyError::Reset(Reason::INTERNAL_ERROR)),
        ]);
        let body = Body::boxed(http_body_util::StreamBody::new(stream));
        let failed = now(Watched::new(body, notes.clone()).collect());
        assert!(matches!(failed, Err(BodyError::Reset(_))));
        let notes = notes.0.lock().unwrap();
        assert_eq!(notes.len(), 2);
        assert!(notes.iter().all(|note| note != "ended"));
    }

    #[test]
    fn a_reset_without_an_error_is_not_passed_on_as_a_clean_end() {
        let reason = BodyError::Reset(Reason::NO_ERROR).reset_reason();
        assert_eq!(reason, Reason::CANCEL);
    }
}
