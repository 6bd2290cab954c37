//! A calling sidecar made by hand: h2 over mTLS, and nothing that would repair what it sends.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Method, Request, StatusCode};
use sidegate_mesh::{ManualClock, SpiffeId};
use sidegate_mtls::{Connector, CredentialStore, HandshakeError};
use sidegate_proxy::wire::WireLimits;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::support::{Sidecar, id, soon, store_with, trust};

/// An open connection of a peer.
pub struct Peer {
    pub send: SendRequest<Bytes>,
    pub driver: JoinHandle<Result<(), h2::Error>>,
}

/// A whole answer, or as much as came before its stream was reset.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
    pub trailers: Option<HeaderMap>,
    pub reset: Option<Reason>,
}

impl Answer {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    #[track_caller]
    pub fn header(&self, name: &str) -> &str {
        let value = self.headers.get(name);
        value
            .unwrap_or_else(|| panic!("no {name} in {:?}", self.headers))
            .to_str()
            .unwrap()
    }
}

impl Peer {
    /// A connection as `shop/web` and the like.
    pub async fn connect(sidecar: &Sidecar, who: &str) -> Self {
        let svid = sidecar.root.svid(&id(who));
        let store = store_with(&sidecar.clock, svid, trust(1, &[&sidecar.root], &[]));
        Self::with(sidecar.address, &store, &sidecar.clock)
            .await
            .unwrap()
    }

    pub async fn with(
        address: SocketAddr,
        store: &Arc<CredentialStore>,
        clock: &ManualClock,
    ) -> Result<Self, HandshakeError> {
        Self::over(address, store, clock, |_| {}).await
    }

    /// A connection that begins any number of streams at once.
    pub async fn unbounded(sidecar: &Sidecar, who: &str) -> Self {
        let svid = sidecar.root.svid(&id(who));
        let store = store_with(&sidecar.clock, svid, trust(1, &[&sidecar.root], &[]));
        let change = |builder: &mut h2::client::Builder| {
            builder.initial_max_send_streams(usize::MAX);
        };
        let peer = Self::over(sidecar.address, &store, &sidecar.clock, change).await;
        peer.unwrap()
    }

    async fn over(
        address: SocketAddr,
        store: &Arc<CredentialStore>,
        clock: &ManualClock,
        change: impl FnOnce(&mut h2::client::Builder),
    ) -> Result<Self, HandshakeError> {
        let tls = handshake(address, store, clock, &id("shop/orders")).await?;
        let limits = WireLimits {
            header_list_bytes_max: 1024 * 1024,
            ..WireLimits::default()
        };
        let mut builder = limits.client();
        builder.max_concurrent_reset_streams(100_000);
        change(&mut builder);
        let (send, connection) = builder
            .handshake(tls)
            .await
            .map_err(|error| HandshakeError::Io(std::io::Error::other(error)))?;
        Ok(Self {
            send,
            driver: tokio::spawn(connection),
        })
    }

    /// Begins a request; `end` when it has no body.
    pub async fn begin(
        &self,
        request: Request<()>,
        end: bool,
    ) -> Result<(ResponseFuture, SendStream<Bytes>), h2::Error> {
        let mut send = soon(self.send.clone().ready()).await?;
        send.send_request(request, end)
    }

    /// A request without a body, to its end.
    pub async fn call(&self, request: Request<()>) -> Result<Answer, h2::Error> {
        let (response, _stream) = self.begin(request, true).await?;
        whole(response).await
    }

    /// A request with a body, to its end.
    pub async fn call_with(&self, request: Request<()>, body: &[u8]) -> Result<Answer, h2::Error> {
        let (response, mut stream) = self.begin(request, false).await?;
        stream.send_data(Bytes::copy_from_slice(body), true)?;
        whole(response).await
    }
}

/// TLS to `expected` as whoever `store` says.
pub async fn handshake(
    address: SocketAddr,
    store: &Arc<CredentialStore>,
    clock: &ManualClock,
    expected: &SpiffeId,
) -> Result<tokio_rustls::client::TlsStream<TcpStream>, HandshakeError> {
    let tcp = TcpStream::connect(address).await.unwrap();
    let clock = Arc::new(clock.clone());
    let connector = Connector::new(Arc::clone(store), Duration::from_secs(5), clock);
    let (tls, _) = soon(connector.connect(tcp, expected)).await?;
    Ok(tls)
}

/// The answer to its end.
pub async fn whole(response: ResponseFuture) -> Result<Answer, h2::Error> {
    let (parts, mut recv) = soon(response).await?.into_parts();
    let mut answer = Answer {
        status: parts.status,
        headers: parts.headers,
        body: Bytes::new(),
        trailers: None,
        reset: None,
    };
    let mut body = Vec::new();
    let ended = soon(read_all(&mut recv, &mut body)).await;
    answer.body = body.into();
    match ended {
        Ok(trailers) => answer.trailers = trailers,
        Err(error) => answer.reset = Some(error.reason().unwrap_or(Reason::INTERNAL_ERROR)),
    }
    Ok(answer)
}

pub async fn read_all(
    recv: &mut RecvStream,
    body: &mut Vec<u8>,
) -> Result<Option<HeaderMap>, h2::Error> {
    while let Some(data) = recv.data().await {
        let data = data?;
        body.extend_from_slice(&data);
        recv.flow_control().release_capacity(data.len())?;
    }
    recv.trailers().await
}

/// The next bytes of a stream.
pub async fn next(recv: &mut RecvStream) -> Result<Option<Bytes>, h2::Error> {
    while let Some(data) = soon(recv.data()).await {
        let data = data?;
        recv.flow_control().release_capacity(data.len())?;
        // An empty frame only carries the end of the stream.
        if !data.is_empty() {
            return Ok(Some(data));
        }
    }
    Ok(None)
}

/// Waits until the peer resets the stream.
pub async fn reset_of(stream: &mut SendStream<Bytes>) -> Result<Reason, h2::Error> {
    soon(poll_fn(|context| stream.poll_reset(context))).await
}

/// A request of an HTTP/1.1 application to `orders.shop`.
pub fn request(method: Method, path: &str) -> Request<()> {
    Request::builder()
        .method(method)
        .uri(format!("http://orders.shop{path}"))
        .header("sidegate-protocol", "http/1.1")
        .body(())
        .unwrap()
}

pub fn get(path: &str) -> Request<()> {
    request(Method::GET, path)
}

pub fn post(path: &str) -> Request<()> {
    request(Method::POST, path)
}

/// A gRPC call of an application.
pub fn grpc(method: &str) -> Request<()> {
    Request::builder()
        .method(Method::POST)
        .uri(format!("http://orders.shop/shop.v1.Orders/{method}"))
        .header("sidegate-protocol", "h2")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .unwrap()
}

/// An extended CONNECT.
pub fn connect(protocol: &'static str, path: &str) -> Request<()> {
    let mut request = request(Method::CONNECT, path);
    let protocol = h2::ext::Protocol::from_static(protocol);
    request.extensions_mut().insert(protocol);
    request
}

/// What a sidecar sends for a WebSocket of its application.
pub fn websocket(path: &str) -> Request<()> {
    let mut request = connect("websocket", path);
    let headers = request.headers_mut();
    headers.insert("sec-websocket-version", "13".parse().unwrap());
    headers.insert(
        "sec-websocket-key",
        "dGhlIHNhbXBsZSBub25jZQ==".parse().unwrap(),
    );
    request
}
