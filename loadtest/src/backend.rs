//! The server that comparisons call: hyper, HTTP/1 and HTTP/2 on one port.
//!
//! `GET /bytes/N` answers N bytes; a POST is read to its end and answered with 100 bytes; a body
//! of `application/grpc` is echoed with `grpc-status: 0`.
//!
//! Invariant: it logs nothing, allocates no body twice, and ends with its standard input, so that
//! it never outlives the harness.

use std::convert::Infallible;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::LazyLock;
use std::thread;

use bytes::Bytes;
use futures_util::stream;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use crate::cli::Backend;

/// The largest answer.
const BYTES_MAX: usize = 1 << 20;
/// The answer when the path asks for nothing else.
const BYTES_DEFAULT: usize = 100;
const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0";

static PAYLOAD: LazyLock<Bytes> = LazyLock::new(|| Bytes::from(vec![b'x'; BYTES_MAX]));

type Body = BoxBody<Bytes, Infallible>;

/// Serves until standard input ends; the first line of standard output is the address.
///
/// # Errors
///
/// When it cannot listen.
pub(crate) async fn serve(options: Backend) -> anyhow::Result<ExitCode> {
    let listener = TcpListener::bind(options.listen).await?;
    writeln!(io::stdout(), "{}", listener.local_addr()?)?;
    let mut connections = JoinSet::new();
    let mut ended = input_ended();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (stream, _peer) = accepted?;
                stream.set_nodelay(true)?;
                // How a connection ends is the caller's business.
                connections.spawn(async move { connection(stream).await.ok() });
            }
            Some(_ended) = connections.join_next() => {}
            _ = &mut ended => return Ok(ExitCode::SUCCESS),
        }
    }
}

/// Resolves when standard input has ended.
fn input_ended() -> oneshot::Receiver<()> {
    let (sender, receiver) = oneshot::channel();
    thread::spawn(move || {
        io::copy(&mut io::stdin().lock(), &mut io::sink()).ok();
        sender.send(()).ok();
    });
    receiver
}

async fn connection(stream: TcpStream) -> anyhow::Result<()> {
    let mut first = [0; H2_PREFACE.len()];
    let length = stream.peek(&mut first).await?;
    let http2 = first
        .get(..length)
        .is_some_and(|first| H2_PREFACE.starts_with(first))
        && length > 0;
    let io = TokioIo::new(stream);
    if http2 {
        hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(16 << 20)
            .max_concurrent_streams(1024)
            .serve_connection(io, service_fn(answer))
            .await?;
    } else {
        hyper::server::conn::http1::Builder::new()
            .serve_connection(io, service_fn(answer))
            .await?;
    }
    Ok(())
}

async fn answer(request: Request<Incoming>) -> anyhow::Result<Response<Body>> {
    let grpc = request
        .headers()
        .get(CONTENT_TYPE)
        .is_some_and(|kind| kind == "application/grpc");
    let bytes = request
        .uri()
        .path()
        .strip_prefix("/bytes/")
        .and_then(|bytes| bytes.parse().ok());
    let bytes = bytes.unwrap_or(BYTES_DEFAULT).min(BYTES_MAX);
    let body = request.into_body().collect().await?.to_bytes();
    if grpc {
        return Ok(grpc_answer(body));
    }
    Ok(Response::new(Full::new(PAYLOAD.slice(..bytes)).boxed()))
}

fn grpc_answer(message: Bytes) -> Response<Body> {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let frames = [Ok(Frame::data(message)), Ok(Frame::trailers(trailers))];
    let mut response = Response::new(StreamBody::new(stream::iter(frames)).boxed());
    let kind = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}
