//! HTTP/1 calls: the request is one prepared buffer, the answer is read to its last byte.
//!
//! Invariant: after an answer that is not `reusable`, or a failure, the connection is not used
//! again.

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::failure::Failure;
use crate::target::Io;

/// Longest head of an answer.
const HEAD_MAX: usize = 64 * 1024;
const HEADERS_MAX: usize = 128;
const READ_BYTES: usize = 16 * 1024;

/// A complete answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) grpc_status: Option<u16>,
    /// Bytes of the body.
    pub(crate) bytes: u64,
    /// Whether the connection takes another call.
    pub(crate) reusable: bool,
}

/// One connection.
pub(crate) struct Connection {
    io: Box<dyn Io>,
    buffer: BytesMut,
}

/// How the end of a body is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    Length(u64),
    Chunked,
    UntilClosed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    status: u16,
    framing: Framing,
    keep_alive: bool,
    bytes: usize,
}

impl Connection {
    /// An open connection.
    pub(crate) fn new(io: Box<dyn Io>) -> Self {
        Self {
            io,
            buffer: BytesMut::with_capacity(READ_BYTES),
        }
    }

    /// Sends `request` and reads the whole answer.
    ///
    /// # Errors
    ///
    /// [`Failure::Closed`], [`Failure::Io`], [`Failure::Protocol`].
    pub(crate) async fn call(
        &mut self,
        request: &[u8],
        head_only: bool,
    ) -> Result<Answer, Failure> {
        self.io.write_all(request).await?;
        self.io.flush().await?;
        let head = self.final_head(head_only).await?;
        let bytes = match head.framing {
            Framing::Length(length) => self.skip(length).await?,
            Framing::Chunked => self.skip_chunks().await?,
            Framing::UntilClosed => self.skip_all().await?,
        };
        Ok(Answer {
            status: head.status,
            grpc_status: None,
            bytes,
            reusable: head.keep_alive && head.framing != Framing::UntilClosed,
        })
    }

    async fn final_head(&mut self, head_only: bool) -> Result<Head, Failure> {
        loop {
            match parse_head(&self.buffer, head_only)? {
                Some(head) => {
                    self.buffer.advance(head.bytes);
                    if head.status >= 200 {
                        return Ok(head);
                    }
                }
                None if self.buffer.len() > HEAD_MAX => {
                    return Err(Failure::Protocol(format!("a head above {HEAD_MAX} bytes")));
                }
                None => self.fill().await?,
            }
        }
    }

    async fn fill(&mut self) -> Result<(), Failure> {
        self.buffer.reserve(READ_BYTES);
        match self.io.read_buf(&mut self.buffer).await? {
            0 => Err(Failure::Closed),
            _ => Ok(()),
        }
    }

    async fn skip(&mut self, length: u64) -> Result<u64, Failure> {
        let mut left = length;
        loop {
            let here = usize::try_from(left)
                .unwrap_or(usize::MAX)
                .min(self.buffer.len());
            self.buffer.advance(here);
            left -= here as u64;
            if left == 0 {
                return Ok(length);
            }
            self.fill().await?;
        }
    }

    async fn skip_chunks(&mut self) -> Result<u64, Failure> {
        let mut total = 0;
        loop {
            let parsed = httparse::parse_chunk_size(&self.buffer)
                .map_err(|_invalid| Failure::Protocol("not a chunk size".into()))?;
            let httparse::Status::Complete((head, size)) = parsed else {
                self.fill().await?;
                continue;
            };
            self.buffer.advance(head);
            if size == 0 {
                return self.skip_trailers().await.map(|()| total);
            }
            total += self.skip(size).await?;
            self.skip(2).await?;
        }
    }

    async fn skip_trailers(&mut self) -> Result<(), Failure> {
        loop {
            let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
            let parsed = httparse::parse_headers(&self.buffer, &mut headers)
                .map_err(|error| Failure::Protocol(error.to_string()))?;
            if let httparse::Status::Complete((bytes, _)) = parsed {
                self.buffer.advance(bytes);
                return Ok(());
            }
            self.fill().await?;
        }
    }

    async fn skip_all(&mut self) -> Result<u64, Failure> {
        let mut total = 0;
        loop {
            total += self.buffer.len() as u64;
            self.buffer.clear();
            self.buffer.reserve(READ_BYTES);
            if self.io.read_buf(&mut self.buffer).await? == 0 {
                return Ok(total);
            }
        }
    }
}

fn parse_head(bytes: &[u8], head_only: bool) -> Result<Option<Head>, Failure> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let parsed = response
        .parse(bytes)
        .map_err(|error| Failure::Protocol(error.to_string()))?;
    let httparse::Status::Complete(length) = parsed else {
        return Ok(None);
    };
    let status = response.code.unwrap_or(0);
    if status == 101 {
        return Err(Failure::Protocol("an upgrade that nobody asked for".into()));
    }
    let mut framing = Framing::UntilClosed;
    let mut keep_alive = response.version == Some(1);
    for header in response.headers.iter() {
        let name = header.name;
        if name.eq_ignore_ascii_case("content-length") && framing != Framing::Chunked {
            let text = std::str::from_utf8(header.value).unwrap_or("");
            let length = text.trim().parse();
            framing = Framing::Length(
                length.map_err(|_invalid| Failure::Protocol(format!("content-length {text:?}")))?,
            );
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            framing = Framing::Chunked;
        } else if name.eq_ignore_ascii_case("connection") {
            let value = header.value;
            keep_alive = !value.eq_ignore_ascii_case(b"close")
                && (keep_alive || value.eq_ignore_ascii_case(b"keep-alive"));
        }
    }
    if head_only || status < 200 || status == 204 || status == 304 {
        framing = Framing::Length(0);
    }
    Ok(Some(Head {
        status,
        framing,
        keep_alive,
        bytes: length,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn call(answers: &[&str], head_only: bool) -> Vec<Result<Answer, String>> {
        let (client, mut server) = tokio::io::duplex(1 << 16);
        for answer in answers {
            server.write_all(answer.as_bytes()).await.unwrap();
        }
        server.shutdown().await.unwrap();
        let mut connection = Connection::new(Box::new(client));
        let mut got = Vec::new();
        for _ in answers {
            let answer = connection.call(b"GET / HTTP/1.1\r\n\r\n", head_only).await;
            got.push(answer.map_err(|failure| failure.kind().to_owned()));
        }
        got
    }

    #[expect(clippy::unnecessary_wraps, reason = "compared with what calls return")]
    fn answer(status: u16, bytes: u64, reusable: bool) -> Result<Answer, String> {
        Ok(Answer {
            status,
            grpc_status: None,
            bytes,
            reusable,
        })
    }

    #[tokio::test]
    async fn answers_end_where_their_framing_says() {
        let length = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello";
        let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nA\r\n0123456789\r\n0\r\nx: y\r\n\r\n";
        let empty = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n";
        let last = "HTTP/1.1 403 Forbidden\r\n\r\nuntil closed";
        assert_eq!(
            call(&[length, chunked, empty, length, last], false).await,
            [
                answer(200, 5, true),
                answer(200, 13, true),
                answer(204, 0, true),
                answer(200, 5, true),
                answer(403, 12, false),
            ]
        );
    }

    #[tokio::test]
    async fn head_has_no_body_and_close_is_not_reusable() {
        let head = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5\r\n\r\n";
        assert_eq!(call(&[head], true).await, [answer(200, 0, false)]);
    }

    #[tokio::test]
    async fn cut_answer_is_closed_and_nonsense_is_protocol() {
        let cut = "HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nhello";
        assert_eq!(call(&[cut], false).await, [Err("closed".into())]);
        assert_eq!(call(&[""], false).await, [Err("closed".into())]);
        assert_eq!(
            call(&["SSH-2.0-x\r\n\r\n"], false).await,
            [Err("protocol".into())]
        );
        let length = "HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n";
        assert_eq!(call(&[length], false).await, [Err("protocol".into())]);
    }
}
