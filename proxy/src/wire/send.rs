//! Sends a body on an h2 stream.
//!
//! Invariant: `END_STREAM` is sent only after the body ended cleanly; whatever cuts a body off
//! resets the stream. A frame is taken from the body only when the one before it has left, so a slow
//! reader slows its writer and nothing piles up. The first one, when it is small, does not wait for
//! its window, which a new stream has only once its head was sent: head and body are one write.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use h2::{Reason, SendStream};
use http::HeaderMap;
use http_body::{Body, Frame};

use crate::body::BodyError;

/// Most bytes of a body that are sent with its head.
const WITH_HEAD_BYTES_MAX: usize = 16 * 1024;

/// Why a body was not sent to its end.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The peer reset the stream; the body has not been read further.
    #[error("the peer reset the stream: {0}")]
    Reset(Reason),
    /// The connection is gone.
    #[error("the connection was lost")]
    Connection(#[source] h2::Error),
    /// The body failed, and the stream has been reset for it.
    #[error("the body could not be read")]
    Body(#[source] BodyError),
}

impl From<h2::Error> for SendError {
    fn from(error: h2::Error) -> Self {
        match error.reason() {
            Some(reason) if error.is_reset() => Self::Reset(reason),
            _ => Self::Connection(error),
        }
    }
}

/// Sends `body` to its end, trailers included.
///
/// The stream is borrowed: a caller that gives up drops the future and resets the stream.
///
/// # Errors
///
/// [`SendError`], whose variants say on which side the stream ended.
pub async fn send_body<B>(body: &mut B, stream: &mut SendStream<Bytes>) -> Result<(), SendError>
where
    B: Body<Data = Bytes, Error = BodyError> + Unpin,
{
    let mut first = true;
    loop {
        let next = poll_fn(|cx| poll_next(body, stream, cx)).await?;
        let Some(frame) = next else {
            stream.send_data(Bytes::new(), true)?;
            return Ok(());
        };
        match frame {
            Piece::Trailers(trailers) => {
                stream.send_trailers(trailers)?;
                return Ok(());
            }
            Piece::Data(data) => {
                let last = body.is_end_stream();
                if std::mem::take(&mut first) && data.len() <= WITH_HEAD_BYTES_MAX {
                    stream.send_data(data, last)?;
                } else {
                    send_data(stream, data, last).await?;
                }
                if last {
                    return Ok(());
                }
            }
        }
    }
}

/// Sends `data` as its window opens, and the end of the stream with its last byte if it is `last`.
///
/// # Errors
///
/// [`SendError`] when the stream or its connection ends first.
pub async fn send_data(
    stream: &mut SendStream<Bytes>,
    mut data: Bytes,
    last: bool,
) -> Result<(), SendError> {
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        let room = poll_fn(|cx| poll_room(stream, cx)).await?;
        let chunk = data.split_to(room.min(data.len()));
        stream.send_data(chunk, last && data.is_empty())?;
        if data.is_empty() {
            return Ok(());
        }
    }
    if last {
        stream.send_data(Bytes::new(), true)?;
    }
    Ok(())
}

enum Piece {
    Data(Bytes),
    Trailers(HeaderMap),
}

/// The body's next piece; an error as soon as the peer resets the stream, even while the body waits.
fn poll_next<B>(
    body: &mut B,
    stream: &mut SendStream<Bytes>,
    cx: &mut Context<'_>,
) -> Poll<Result<Option<Piece>, SendError>>
where
    B: Body<Data = Bytes, Error = BodyError> + Unpin,
{
    if let Poll::Ready(reset) = stream.poll_reset(cx) {
        return Poll::Ready(Err(reset.map_or_else(SendError::from, SendError::Reset)));
    }
    Pin::new(body).poll_frame(cx).map(|frame| match frame {
        None => Ok(None),
        Some(Ok(frame)) => Ok(Some(piece(frame))),
        Some(Err(error)) => {
            stream.send_reset(error.reset_reason());
            Err(SendError::Body(error))
        }
    })
}

fn piece(frame: Frame<Bytes>) -> Piece {
    match frame.into_data() {
        Ok(data) => Piece::Data(data),
        Err(frame) => Piece::Trailers(frame.into_trailers().unwrap_or_default()),
    }
}

/// How much may be sent now. A reset wakes this as well: capacity of a reset stream is an error or
/// `None`.
fn poll_room(
    stream: &mut SendStream<Bytes>,
    cx: &mut Context<'_>,
) -> Poll<Result<usize, SendError>> {
    loop {
        match stream.poll_capacity(cx) {
            Poll::Ready(Some(Ok(0))) => {}
            Poll::Ready(Some(Ok(room))) => return Poll::Ready(Ok(room)),
            Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error.into())),
            Poll::Ready(None) => return Poll::Ready(Err(closed(stream, cx))),
            Poll::Pending => {
                return match stream.poll_reset(cx) {
                    Poll::Ready(Ok(reason)) => Poll::Ready(Err(SendError::Reset(reason))),
                    Poll::Ready(Err(error)) => Poll::Ready(Err(error.into())),
                    Poll::Pending => Poll::Pending,
                };
            }
        }
    }
}

fn closed(stream: &mut SendStream<Bytes>, cx: &mut Context<'_>) -> SendError {
    match stream.poll_reset(cx) {
        Poll::Ready(Ok(reason)) => SendError::Reset(reason),
        Poll::Ready(Err(error)) => error.into(),
        Poll::Pending => SendError::Reset(Reason::CANCEL),
    }
}
