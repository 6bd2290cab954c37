//! Applications at a pod's own address.

use std::convert::Infallible;
use std::net::SocketAddr;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// Serves each connection to `at` with `serve`; it listens when this returns.
pub async fn raw<F, T>(at: SocketAddr, serve: F) -> JoinHandle<()>
where
    F: Fn(TcpStream) -> T + Send + Sync + 'static,
    T: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind(at).await.unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream));
        }
    })
}

/// HTTP/1.1 that says its name, and what it saw of the request.
pub async fn http(at: SocketAddr, name: &'static str) -> JoinHandle<()> {
    raw(at, move |stream| async move {
        let service = service_fn(move |request| answer(request, name));
        let connection = hyper::server::conn::http1::Builder::new()
            .serve_connection(TokioIo::new(stream), service);
        drop(connection.await);
    })
    .await
}

async fn answer(
    request: Request<Incoming>,
    name: &str,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let body = body
        .collect()
        .await
        .map(http_body_util::Collected::to_bytes);
    let mut text = format!(
        "{name} {} {} {}\n",
        head.method,
        head.uri,
        String::from_utf8_lossy(&body.unwrap_or_default())
    );
    for (name, value) in &head.headers {
        text += &format!("{name}: {}\n", value.to_str().unwrap());
    }
    Ok(Response::new(Full::new(text.into())))
}

/// HTTP/2 whose every answer is a gRPC one with status 0.
pub async fn grpc(at: SocketAddr) -> JoinHandle<()> {
    raw(at, |stream| async move {
        let Ok(mut connection) = h2::server::handshake(stream).await else {
            return;
        };
        while let Some(Ok((_, mut respond))) = connection.accept().await {
            let head = Response::builder()
                .header("content-type", "application/grpc")
                .header("grpc-status", "0");
            drop(respond.send_response(head.body(()).unwrap(), true));
        }
    })
    .await
}

/// Speaks first, then echoes until the end.
pub async fn greeter(at: SocketAddr) -> JoinHandle<()> {
    raw(at, |mut stream| async move {
        if stream.write_all(b"hello ").await.is_ok() {
            echo_on(stream).await;
        }
    })
    .await
}

/// Echoes until the end.
pub async fn echo(at: SocketAddr) -> JoinHandle<()> {
    raw(at, echo_on).await
}

async fn echo_on(mut stream: TcpStream) {
    let (mut reader, mut writer) = stream.split();
    if tokio::io::copy(&mut reader, &mut writer).await.is_ok() {
        drop(writer.shutdown().await);
    }
}

/// Switches to a WebSocket and echoes what follows.
pub async fn websocket(at: SocketAddr) -> JoinHandle<()> {
    raw(at, |mut stream| async move {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            if stream.read(&mut byte).await.unwrap_or(0) == 0 {
                return;
            }
            head.push(byte[0]);
        }
        let answer = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n\
                      upgrade: websocket\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
        if stream.write_all(answer.as_bytes()).await.is_ok() {
            echo_on(stream).await;
        }
    })
    .await
}
