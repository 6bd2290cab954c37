//! A GET, as the kubelet makes one: no certificate is verified, redirections within the host are
//! followed, one to another host is a success, and so is any status from 200 to 399. A hook succeeds
//! with any answer.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{ACCEPT, CONNECTION, HOST, HeaderName, HeaderValue, LOCATION, USER_AGENT};
use http::uri::{PathAndQuery, Scheme, Uri};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;

use super::{Asker, Failure};
use crate::config::{HttpProbe, HttpScheme, ProbeKind};

/// As many as the kubelet follows.
const REDIRECTS_MAX: usize = 10;
/// As much of a body as the kubelet reads.
const BODY_BYTES_MAX: usize = 10 * 1024;

/// What TLS is spoken to the application.
pub(super) struct Tls(Option<TlsConnector>);

/// Where to ask next.
struct Place {
    scheme: HttpScheme,
    port: u16,
    path: PathAndQuery,
    /// The redirection named a host, which then is the `Host`.
    named: bool,
}

/// Asks once, and wherever that leads.
pub(super) async fn ask(asker: &Asker, probe: &HttpProbe, kind: ProbeKind) -> Result<(), Failure> {
    let path = probe.path_and_query();
    let mut place = Place {
        scheme: probe.scheme,
        port: probe.port,
        // The configuration's own check refuses another.
        path: path.unwrap_or_else(|| PathAndQuery::from_static("/")),
        named: false,
    };
    for _ in 0..REDIRECTS_MAX {
        let answer = get(asker, probe, &place).await?;
        match place.after(asker, &answer)? {
            Some(next) => place = next,
            None => return judge(answer.status(), kind),
        }
    }
    Err(Failure::Redirects(REDIRECTS_MAX))
}

fn judge(status: StatusCode, kind: ProbeKind) -> Result<(), Failure> {
    if kind.is_hook() || (200..400).contains(&status.as_u16()) {
        return Ok(());
    }
    Err(Failure::Status(status))
}

async fn get(asker: &Asker, probe: &HttpProbe, place: &Place) -> Result<Response<()>, Failure> {
    let address = asker.address(place.port);
    let stream = asker.connect(place.port).await?;
    let request = request(asker, probe, place)?;
    match place.scheme {
        HttpScheme::Http => exchange(stream, request).await,
        HttpScheme::Https => {
            let unsupported = || Failure::Tls {
                address,
                source: std::io::ErrorKind::Unsupported.into(),
            };
            let connector = asker.tls.0.as_ref().ok_or_else(unsupported)?;
            let name = ServerName::IpAddress(asker.ip.into());
            let stream = connector.connect(name, stream).await;
            let stream = stream.map_err(|source| Failure::Tls { address, source })?;
            exchange(stream, request).await
        }
    }
}

async fn exchange<IO>(io: IO, request: Request<Empty<Bytes>>) -> Result<Response<()>, Failure>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await?;
    let answer = async {
        let (head, body) = sender.send_request(request).await?.into_parts();
        read(body).await?;
        Ok(Response::from_parts(head, ()))
    };
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        // Polled first, so that an answer wins over the end of its connection.
        biased;
        answer = answer => answer,
        Err(error) = &mut connection => Err(error.into()),
    }
}

/// Reads a body, which must not break off before the kubelet would have looked away.
async fn read(mut body: Incoming) -> Result<(), hyper::Error> {
    let mut bytes = 0;
    while let Some(frame) = body.frame().await {
        bytes += frame?.data_ref().map_or(0, Bytes::len);
        if bytes > BODY_BYTES_MAX {
            break;
        }
    }
    Ok(())
}

fn request(
    asker: &Asker,
    probe: &HttpProbe,
    place: &Place,
) -> Result<Request<Empty<Bytes>>, http::Error> {
    let mut request = Request::get(place.path.as_str()).body(Empty::new())?;
    let headers = request.headers_mut();
    for header in &probe.headers {
        let name = HeaderName::from_bytes(header.name.as_bytes())?;
        let value = HeaderValue::from_str(&header.value)?;
        if name == HOST {
            headers.insert(name, value);
        } else {
            headers.append(name, value);
        }
    }
    let own_host = asker.address(place.port).to_string();
    if place.named || !headers.contains_key(HOST) {
        headers.insert(HOST, HeaderValue::from_str(&own_host)?);
    }
    let defaults = [(USER_AGENT, super::USER_AGENT), (ACCEPT, "*/*")];
    for (name, value) in defaults {
        headers
            .entry(name)
            .or_insert(HeaderValue::from_static(value));
    }
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    Ok(request)
}

impl Place {
    /// Where an answer leads; `None` when it is the last one.
    fn after(&self, asker: &Asker, answer: &Response<()>) -> Result<Option<Self>, Failure> {
        if !matches!(answer.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
            return Ok(None);
        }
        let Some(location) = answer.headers().get(LOCATION) else {
            return Ok(None);
        };
        let text = String::from_utf8_lossy(location.as_bytes());
        let text = text.split('#').next().unwrap_or_default();
        let place = self.join(asker, text);
        place
            .ok_or_else(|| Failure::Location(text.to_owned()))
            .map(|place| match place {
                Next::Here(place) => Some(place),
                Next::Elsewhere => None,
            })
    }

    fn join(&self, asker: &Asker, text: &str) -> Option<Next> {
        if let Some(rest) = text.strip_prefix("//") {
            let scheme = if self.scheme == HttpScheme::Https {
                "https"
            } else {
                "http"
            };
            return Self::absolute(asker, &format!("{scheme}://{rest}"));
        }
        if text.contains("://") {
            return Self::absolute(asker, text);
        }
        let path = self.path.path();
        let joined = if text.starts_with('/') {
            text.to_owned()
        } else if text.starts_with('?') || text.is_empty() {
            format!("{path}{text}")
        } else {
            let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
            format!("{folder}/{text}")
        };
        Some(Next::Here(Self {
            scheme: self.scheme,
            port: self.port,
            path: without_dots(&joined).parse().ok()?,
            named: self.named,
        }))
    }

    fn absolute(asker: &Asker, text: &str) -> Option<Next> {
        let uri: Uri = text.parse().ok()?;
        let host = uri.host()?.trim_start_matches('[').trim_end_matches(']');
        if host.parse() != Ok(asker.ip) {
            return Some(Next::Elsewhere);
        }
        let scheme = match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTP => HttpScheme::Http,
            Some(scheme) if *scheme == Scheme::HTTPS => HttpScheme::Https,
            _ => return None,
        };
        let usual = if scheme == HttpScheme::Https { 443 } else { 80 };
        let path = uri.path_and_query().cloned();
        Some(Next::Here(Self {
            scheme,
            port: uri.port_u16().unwrap_or(usual),
            path: path.unwrap_or_else(|| PathAndQuery::from_static("/")),
            named: true,
        }))
    }
}

enum Next {
    Here(Place),
    Elsewhere,
}

/// A path without its `.` and `..` segments.
fn without_dots(path: &str) -> String {
    let (path, query) = match path.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (path, None),
    };
    let mut segments: Vec<&str> = Vec::new();
    for segment in path.split('/').skip(1) {
        match segment {
            "." => {}
            ".." => drop(segments.pop()),
            _ => segments.push(segment),
        }
    }
    if matches!(path.rsplit('/').next(), Some("." | "..")) {
        segments.push("");
    }
    let mut path = format!("/{}", segments.join("/"));
    if let Some(query) = query {
        path.push('?');
        path.push_str(query);
    }
    path
}

impl Tls {
    /// TLS 1.2 and 1.3, and any certificate: what an application shows to the kubelet is seldom
    /// anything that could be verified, and the bytes do not leave the pod.
    pub(super) fn new() -> Self {
        let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()));
        let builder = builder.with_safe_default_protocol_versions().ok();
        Self(builder.map(|builder| {
            let mut config = builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(AnyCertificate))
                .with_no_client_auth();
            config.resumption = rustls::client::Resumption::disabled();
            TlsConnector::from(Arc::new(config))
        }))
    }
}

/// Verifies nothing.
#[derive(Debug)]
struct AnyCertificate;

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}
