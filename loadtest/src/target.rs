//! What is called, and how a connection to it is made.
//!
//! Invariant: names are resolved and certificates read once, before the load; nothing of it can
//! fail while calls run.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::{BufMut, Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HOST, TE};
use http::uri::{Authority, Scheme};
use http::{HeaderMap, HeaderValue, Method, Request, Uri};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::failure::Failure;
use crate::tls;

/// A connection, plain or TLS.
pub(crate) trait Io: AsyncRead + AsyncWrite + Unpin {}
impl<T: AsyncRead + AsyncWrite + Unpin> Io for T {}

/// The protocol that calls are made in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Protocol {
    /// One call at a time on a connection.
    Http1,
    /// Multiplexed; without TLS with prior knowledge.
    Http2,
    /// gRPC, unary.
    Grpc,
}

impl Protocol {
    /// As on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Http1 => "http1",
            Self::Http2 => "http2",
            Self::Grpc => "grpc",
        }
    }
}

/// What the command line says about the call.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) url: Uri,
    pub(crate) protocol: Protocol,
    pub(crate) method: Method,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    /// `package.Service/Method`.
    pub(crate) grpc_method: Option<String>,
    pub(crate) proxy: Option<Authority>,
    pub(crate) tls: TlsFiles,
}

/// How the server is trusted, and who we are.
#[derive(Clone, Debug, Default)]
pub(crate) struct TlsFiles {
    pub(crate) insecure: bool,
    pub(crate) ca: Option<PathBuf>,
    pub(crate) cert: Option<PathBuf>,
    pub(crate) key: Option<PathBuf>,
    /// The one application protocol to offer, instead of that of HTTP/1 or HTTP/2.
    pub(crate) alpn: Option<String>,
    pub(crate) key_exchange: KeyExchange,
}

/// Which key exchanges are offered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum KeyExchange {
    /// The hybrid of X25519 and ML-KEM-768 first, then X25519, with a share for each.
    #[default]
    Hybrid,
    /// X25519 alone.
    X25519,
}

/// A call, ready to be made any number of times.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) protocol: Protocol,
    /// Host and port that connections go to, for messages.
    pub(crate) to: String,
    /// The whole HTTP/1 request, body included.
    pub(crate) bytes: Bytes,
    /// The HTTP/2 request.
    pub(crate) request: Request<()>,
    pub(crate) body: Bytes,
    address: SocketAddr,
    tls: Option<Tls>,
}

type Tls = (Arc<ClientConfig>, ServerName<'static>);

impl Target {
    /// Resolves names and reads certificates.
    ///
    /// # Errors
    ///
    /// When the URL cannot be called so, or a file or name cannot be read.
    pub(crate) async fn prepare(call: &Call) -> anyhow::Result<Self> {
        let url = Url::parse(&call.url)?;
        if call.proxy.is_some() && url.tls {
            bail!("-x forwards plain http:// URLs; an https:// URL would need a tunnel");
        }
        let (host, port) = match &call.proxy {
            Some(proxy) => (proxy.host().to_owned(), proxy.port_u16().unwrap_or(80)),
            None => (url.host.clone(), url.port),
        };
        let to = format!("{host}:{port}");
        let tls = if url.tls {
            let usual = if call.protocol == Protocol::Http1 {
                "http/1.1"
            } else {
                "h2"
            };
            let alpn = call.tls.alpn.as_deref().unwrap_or(usual);
            let name = ServerName::try_from(url.host.clone())
                .with_context(|| format!("{} is no name for TLS", url.host))?;
            Some((Arc::new(tls::client(&call.tls, alpn)?), name))
        } else {
            None
        };
        let request = h2_request(call, &url)?;
        Ok(Self {
            protocol: call.protocol,
            bytes: http1_bytes(call, &url),
            body: framed_body(call),
            request,
            address: resolve(&host, port).await?,
            to,
            tls,
        })
    }

    /// Opens a connection.
    ///
    /// # Errors
    ///
    /// [`Failure::Connect`], [`Failure::Tls`], or [`Failure::Timeout`] after `timeout`.
    pub(crate) async fn connect(&self, timeout: Duration) -> Result<Box<dyn Io>, Failure> {
        let opened = tokio::time::timeout(timeout, self.open()).await;
        opened.unwrap_or_else(|_| {
            Err(Failure::Connect {
                to: self.to.clone(),
                reason: format!("no connection within {} ms", timeout.as_millis()),
            })
        })
    }

    /// Makes one TLS handshake and returns the name of the key exchange that was agreed on; none
    /// without TLS.
    ///
    /// # Errors
    ///
    /// As [`Self::connect`].
    pub(crate) async fn key_exchange(&self) -> Result<Option<String>, Failure> {
        let Some(tls) = &self.tls else {
            return Ok(None);
        };
        let session = self.secure(self.dial().await?, tls).await?;
        let group = session.get_ref().1.negotiated_key_exchange_group();
        Ok(group.map(|group| format!("{:?}", group.name())))
    }

    async fn open(&self) -> Result<Box<dyn Io>, Failure> {
        let stream = self.dial().await?;
        match &self.tls {
            Some(tls) => Ok(Box::new(self.secure(stream, tls).await?)),
            None => Ok(Box::new(stream)),
        }
    }

    async fn dial(&self) -> Result<TcpStream, Failure> {
        let refused = |error: std::io::Error| Failure::Connect {
            to: self.to.clone(),
            reason: error.to_string(),
        };
        let stream = TcpStream::connect(self.address).await.map_err(refused)?;
        stream.set_nodelay(true).map_err(refused)?;
        Ok(stream)
    }

    async fn secure(
        &self,
        stream: TcpStream,
        (config, name): &Tls,
    ) -> Result<TlsStream<TcpStream>, Failure> {
        let connector = TlsConnector::from(Arc::clone(config));
        let session = connector.connect(name.clone(), stream).await;
        session.map_err(|error| Failure::Tls {
            to: self.to.clone(),
            reason: error.to_string(),
        })
    }
}

struct Url {
    tls: bool,
    host: String,
    port: u16,
    authority: String,
    path: String,
}

impl Url {
    fn parse(uri: &Uri) -> anyhow::Result<Self> {
        let tls = match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTP => false,
            Some(scheme) if *scheme == Scheme::HTTPS => true,
            _ => bail!("the URL {uri} does not begin with http:// or https://"),
        };
        let authority = uri.authority().context("the URL names no host")?;
        if authority.as_str().contains('@') {
            bail!("the URL carries a password; send it with --header");
        }
        let host = authority.host().trim_matches(['[', ']']).to_owned();
        Ok(Self {
            tls,
            host,
            port: authority.port_u16().unwrap_or(if tls { 443 } else { 80 }),
            authority: authority.as_str().to_owned(),
            path: uri
                .path_and_query()
                .map_or("/", |path| path.as_str())
                .to_owned(),
        })
    }
}

async fn resolve(host: &str, port: u16) -> anyhow::Result<SocketAddr> {
    let mut found = tokio::net::lookup_host((host, port))
        .await
        .with_context(|| format!("cannot resolve {host}"))?;
    found
        .next()
        .with_context(|| format!("{host} has no address"))
}

fn path(call: &Call, url: &Url) -> String {
    match &call.grpc_method {
        Some(method) => format!("/{}", method.trim_start_matches('/')),
        None => url.path.clone(),
    }
}

fn h2_request(call: &Call, url: &Url) -> anyhow::Result<Request<()>> {
    let scheme = if url.tls { "https" } else { "http" };
    let uri = format!("{scheme}://{}{}", url.authority, path(call, url));
    let grpc = call.protocol == Protocol::Grpc;
    let method = if grpc {
        Method::POST
    } else {
        call.method.clone()
    };
    let mut request = Request::builder().method(method).uri(uri).body(())?;
    let headers = request.headers_mut();
    if grpc {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(TE, HeaderValue::from_static("trailers"));
    } else if !call.body.is_empty() {
        headers.insert(CONTENT_LENGTH, call.body.len().into());
    }
    headers.extend(call.headers.clone());
    Ok(request)
}

/// The body as sent in HTTP/2: for gRPC one uncompressed message.
fn framed_body(call: &Call) -> Bytes {
    if call.protocol != Protocol::Grpc {
        return call.body.clone();
    }
    let mut framed = BytesMut::with_capacity(5 + call.body.len());
    framed.put_u8(0);
    framed.put_u32(u32::try_from(call.body.len()).unwrap_or(u32::MAX));
    framed.put_slice(&call.body);
    framed.freeze()
}

fn http1_bytes(call: &Call, url: &Url) -> Bytes {
    let mut bytes = BytesMut::new();
    bytes.put_slice(call.method.as_str().as_bytes());
    bytes.put_u8(b' ');
    if call.proxy.is_some() {
        bytes.put_slice(format!("http://{}", url.authority).as_bytes());
    }
    bytes.put_slice(url.path.as_bytes());
    bytes.put_slice(b" HTTP/1.1\r\n");
    let mut line = |name: &str, value: &[u8]| {
        bytes.put_slice(name.as_bytes());
        bytes.put_slice(b": ");
        bytes.put_slice(value);
        bytes.put_slice(b"\r\n");
    };
    if !call.headers.contains_key(HOST) {
        line("host", url.authority.as_bytes());
    }
    for (name, value) in &call.headers {
        line(name.as_str(), value.as_bytes());
    }
    if !call.body.is_empty() || [Method::POST, Method::PUT, Method::PATCH].contains(&call.method) {
        line("content-length", call.body.len().to_string().as_bytes());
    }
    bytes.put_slice(b"\r\n");
    bytes.put_slice(&call.body);
    bytes.freeze()
}

/// Reads a file that the command line names.
///
/// # Errors
///
/// Names the file.
pub(crate) fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
