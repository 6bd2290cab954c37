//! A request's body that can be sent again.
//!
//! A call that was refused before it reached an application may be tried elsewhere, if its body is
//! still known. What the first try read is kept up to a bound; beyond it, or when the call is
//! [settled](Replay::settle), nothing is kept and no further try is possible.
//!
//! Invariants: at most [`KEPT_BYTES_MAX`] are kept for one call; each byte is read from the caller
//! once; only the newest reader reads.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::Reason;
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame};

use crate::body::{Body, BodyError};

/// Most bytes of one request's body that are kept for another try.
pub const KEPT_BYTES_MAX: usize = 64 * 1024;

/// A body and what was read of it. Clones share both.
#[derive(Clone, Debug)]
pub struct Replay(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    source: Body,
    kept: VecDeque<Bytes>,
    kept_bytes: usize,
    trailers: Option<HeaderMap>,
    /// The source has been read to its end.
    read: bool,
    /// Something was read that is not kept.
    spent: bool,
    /// Another try may come, so what is read is kept.
    keeping: bool,
    /// Number of the newest reader.
    newest: u32,
}

impl Replay {
    /// Nothing of `source` has been read yet.
    pub fn new(source: Body) -> Self {
        Self(Arc::new(Mutex::new(State {
            source,
            kept: VecDeque::new(),
            kept_bytes: 0,
            trailers: None,
            read: false,
            spent: false,
            keeping: true,
            newest: 0,
        })))
    }

    /// Whether [`Self::reader`] would give the whole body.
    pub fn is_whole(&self) -> bool {
        !self.lock().spent
    }

    /// A body that begins at the beginning; every earlier reader ends with an error. `None` when
    /// the beginning is not known any more.
    pub fn reader(&self) -> Option<Reader> {
        let mut state = self.lock();
        if state.spent {
            return None;
        }
        state.newest = state.newest.wrapping_add(1);
        Some(Reader {
            number: state.newest,
            state: Arc::clone(&self.0),
            at: 0,
        })
    }

    /// No other try will come: what was kept is forgotten once it is sent.
    pub fn settle(&self) {
        self.lock().keeping = false;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One try's view of the body.
#[derive(Debug)]
pub struct Reader {
    state: Arc<Mutex<State>>,
    number: u32,
    /// How many of the kept pieces this reader has passed on.
    at: usize,
}

impl HttpBody for Reader {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        let mut state = lock(&this.state);
        if state.newest != this.number {
            return Poll::Ready(Some(Err(BodyError::Ended(Reason::CANCEL))));
        }
        if let Some(data) = state.kept.get(this.at).cloned() {
            this.at += 1;
            state.forget_if_settled(this.at);
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        if state.read {
            let trailers = state.trailers.clone();
            // Trailers are passed on once: a reader that is asked again is at its end.
            if !state.keeping {
                state.trailers = None;
            }
            let first = std::mem::replace(&mut this.at, usize::MAX) != usize::MAX;
            return Poll::Ready(
                trailers
                    .filter(|_| first)
                    .map(|trailers| Ok(Frame::trailers(trailers))),
            );
        }
        let frame = ready!(state.poll_source(cx));
        if matches!(&frame, Some(Ok(frame)) if frame.is_data()) && state.keeping {
            this.at += 1;
        }
        if state.read {
            this.at = usize::MAX;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        let state = lock(&self.state);
        let behind = self.at < state.kept.len();
        let trailers = state.trailers.is_some() && self.at != usize::MAX;
        !behind && !trailers && (state.read || state.source.is_end_stream())
    }
}

impl State {
    fn poll_source(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = ready!(Pin::new(&mut self.source).poll_frame(cx));
        match &frame {
            None => self.read = true,
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.keep(data);
                } else if let Some(trailers) = frame.trailers_ref() {
                    self.read = true;
                    self.trailers = self.keeping.then(|| trailers.clone());
                }
            }
            // The caller is gone, or broke its own message: no try can send it whole.
            Some(Err(_)) => self.spend(),
        }
        Poll::Ready(frame)
    }

    fn keep(&mut self, data: &Bytes) {
        self.kept_bytes = self.kept_bytes.saturating_add(data.len());
        if self.keeping && self.kept_bytes <= KEPT_BYTES_MAX {
            self.kept.push_back(data.clone());
        } else {
            self.spend();
        }
    }

    /// Something is read that is not kept, so that there is nothing to begin again with.
    fn spend(&mut self) {
        self.spent = true;
        self.keeping = false;
        self.kept = VecDeque::new();
    }

    fn forget_if_settled(&mut self, passed: usize) {
        if !self.keeping && passed >= self.kept.len() {
            self.spend();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use http::HeaderValue;
    use http_body_util::{BodyExt, StreamBody};

    use super::*;

    fn body(pieces: &[&'static [u8]], trailers: bool) -> Body {
        let mut frames: Vec<Result<Frame<Bytes>, BodyError>> = pieces
            .iter()
            .map(|piece| Ok(Frame::data(Bytes::from_static(piece))))
            .collect();
        if trailers {
            let mut trailers = HeaderMap::new();
            trailers.insert("x-sum", HeaderValue::from_static("9"));
            frames.push(Ok(Frame::trailers(trailers)));
        }
        Body::boxed(StreamBody::new(futures_util::stream::iter(frames)))
    }

    fn read(reader: Reader) -> Result<(Bytes, bool), BodyError> {
        let collected = reader.collect().now_or_never().unwrap()?;
        let trailers = collected.trailers().is_some();
        Ok((collected.to_bytes(), trailers))
    }

    #[test]
    fn a_body_that_was_read_in_part_is_sent_again_whole() {
        let replay = Replay::new(body(&[b"one ", b"two ", b"three"], true));
        let mut first = replay.reader().unwrap();
        assert!(
            first
                .frame()
                .now_or_never()
                .unwrap()
                .unwrap()
                .unwrap()
                .is_data()
        );
        let second = replay.reader().unwrap();
        assert_eq!(read(second).unwrap(), ("one two three".into(), true));
        assert!(read(first).is_err(), "an abandoned try reads nothing more");
        let third = replay.reader().unwrap();
        assert_eq!(read(third).unwrap(), ("one two three".into(), true));
    }

    #[test]
    fn a_body_beyond_the_bound_is_sent_once_and_not_kept() {
        static LARGE: [u8; 40 * 1024] = [7; 40 * 1024];
        let replay = Replay::new(body(&[&LARGE, &LARGE], false));
        assert!(replay.is_whole());
        let (bytes, _) = read(replay.reader().unwrap()).unwrap();
        assert_eq!(bytes.len(), 80 * 1024);
        assert!(replay.reader().is_none());
        assert!(replay.lock().kept.is_empty());
    }

    #[test]
    fn a_settled_body_goes_on_where_it_is() {
        let replay = Replay::new(body(&[b"one ", b"two ", b"three"], true));
        drop(replay.reader().unwrap().frame().now_or_never().unwrap());
        let reader = replay.reader().unwrap();
        replay.settle();
        assert_eq!(read(reader).unwrap(), ("one two three".into(), true));
        assert!(replay.reader().is_none());
    }

    #[test]
    fn a_body_that_its_caller_cut_off_is_not_sent_again() {
        let cut = Body::boxed(StreamBody::new(futures_util::stream::iter([
            Ok(Frame::data(Bytes::from_static(b"x"))),
            Err(BodyError::Connection("gone".into())),
        ])));
        let replay = Replay::new(cut);
        assert!(read(replay.reader().unwrap()).is_err());
        assert!(!replay.is_whole());
    }

    #[test]
    fn the_end_is_known_with_the_last_piece() {
        let replay = Replay::new(Body::from("all"));
        let mut reader = replay.reader().unwrap();
        assert!(!reader.is_end_stream());
        drop(reader.frame().now_or_never().unwrap());
        assert!(reader.is_end_stream());
    }
}
