//! Small clients that reach a service through a sidecar, as an application would.
//!
//! Invariant: each opens a connection of its own to the address it is given, says whom it wants by
//! authority only, and knows nothing of the mesh.

use std::pin::pin;
use std::time::Duration;

use axum::http::{HeaderMap, Request, StatusCode, header};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, ToSocketAddrs};
use tokio_tungstenite::tungstenite;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

/// Whatever went wrong on the way.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// Largest HTTP answer that is read.
const ANSWER_BYTES_MAX: usize = 1024 * 1024;
/// Longest line that a TCP server may say.
const LINE_BYTES_MAX: u64 = 4096;
/// Longest wait for a gRPC connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// An HTTP answer, read whole.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
}

/// One HTTP/1.1 `GET` of `path` from `host`, sent to `address`.
///
/// # Errors
///
/// When the connection fails, or the answer breaks off or exceeds 1 MiB.
pub async fn get(
    address: impl ToSocketAddrs,
    host: &str,
    path: &str,
    headers: &[(&str, &str)],
) -> Result<Answer, Error> {
    let mut request = Request::get(path)
        .header(header::HOST, host)
        .header(header::USER_AGENT, "sidegate-shop");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    send(address, request.body(Full::default())?).await
}

/// Sends one HTTP/1.1 `request` to `address`.
///
/// # Errors
///
/// When the connection fails, or the answer breaks off or exceeds 1 MiB.
pub async fn send(
    address: impl ToSocketAddrs,
    request: Request<Full<Bytes>>,
) -> Result<Answer, Error> {
    let stream = connect(address).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let call = async {
        let (head, body) = sender.send_request(request).await?.into_parts();
        let body = Limited::new(body, ANSWER_BYTES_MAX)
            .collect()
            .await?
            .to_bytes();
        Ok(Answer {
            status: head.status,
            headers: head.headers,
            body,
        })
    };
    // The connection is driven beside the call, and dropped with it. One that ends first may have
    // left the whole answer behind.
    let mut call = pin!(call);
    tokio::select! {
        answered = call.as_mut() => answered,
        closed = connection => {
            closed?;
            call.await
        }
    }
}

/// A gRPC channel for `origin`, such as `http://inventory.shop`, over a connection to `address`.
///
/// # Errors
///
/// When the connection fails.
pub async fn channel(
    address: impl ToSocketAddrs + Clone + Send + Sync + 'static,
    origin: &str,
) -> Result<Channel, tonic::transport::Error> {
    // The origin becomes the authority; the connection goes to `address` whatever it says.
    let connect = service_fn(move |_origin| {
        let address = address.clone();
        async move { connect(address).await.map(TokioIo::new) }
    });
    Endpoint::from_shared(origin.to_owned())?
        .connect_timeout(CONNECT_TIMEOUT)
        .connect_with_connector(connect)
        .await
}

/// Opens a WebSocket at `url` (its host is the service) over a connection to `address`, sends
/// `message` and returns what comes back.
///
/// # Errors
///
/// `HTTP 403` and the like when the upgrade is refused; else what went wrong.
pub async fn websocket(
    address: impl ToSocketAddrs,
    url: &str,
    message: &str,
) -> Result<String, Error> {
    let stream = connect(address).await?;
    let (mut socket, _answer) = match tokio_tungstenite::client_async(url, stream).await {
        Err(tungstenite::Error::Http(answer)) => {
            return Err(format!("HTTP {}", answer.status().as_u16()).into());
        }
        connected => connected?,
    };
    socket.send(tungstenite::Message::text(message)).await?;
    let answer = socket.next().await.ok_or("closed before an answer")??;
    socket.close(None).await?;
    Ok(answer.into_text()?.to_string())
}

/// Connects to `address`, where the server speaks first, and says `lines`, each after the answer
/// to the one before. Returns the greeting and the answers, without line ends.
///
/// # Errors
///
/// When the connection fails, or is closed before an answer.
pub async fn converse(address: impl ToSocketAddrs, lines: &[&str]) -> std::io::Result<Vec<String>> {
    let mut stream = BufReader::new(connect(address).await?);
    let mut said = vec![hear(&mut stream).await?];
    for line in lines {
        stream.write_all(format!("{line}\r\n").as_bytes()).await?;
        said.push(hear(&mut stream).await?);
    }
    stream.shutdown().await?;
    Ok(said)
}

/// A call is several small writes; with Nagle's algorithm each may wait 40 ms for the one before.
async fn connect(address: impl ToSocketAddrs) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn hear(stream: &mut BufReader<TcpStream>) -> std::io::Result<String> {
    let mut line = String::new();
    stream.take(LINE_BYTES_MAX).read_line(&mut line).await?;
    if line.is_empty() {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    Ok(line.trim_end().to_owned())
}
