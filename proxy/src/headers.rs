//! Heads of requests and responses, brought to the one form that is authorized and forwarded.
//!
//! Always true of a [`Head`]: its path is canonical and its authority is one; it has no hop-by-hop
//! field, none that `Connection` nominated, and no identity header, whoever sent it and in whatever
//! spelling. What hops need (`te`, `host`, `connection`, `upgrade`, our own headers) is written anew
//! from parsed values when a head leaves. Only a certificate speaks for the peer.

use bytes::{Bytes, BytesMut};
use http::header::{
    CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, EXPECT, HOST, SEC_WEBSOCKET_KEY, TE,
    TRANSFER_ENCODING, UPGRADE,
};
use http::uri::{PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version, request, response};
use sidegate_mesh::SpiffeId;
use sidegate_mesh::host::Authority;
use sidegate_mesh::path::CanonicalPath;

use crate::error::RequestError;
use crate::http1;
use crate::wire::{self, Spoken, WireLimits};

/// Names the immediate caller to the application: `URI=spiffe://…`.
pub const CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
/// The immediate caller's identity alone.
pub const CLIENT_ID: HeaderName = HeaderName::from_static("sidegate-client-id");

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const PROXY_AUTHORIZATION: HeaderName = HeaderName::from_static("proxy-authorization");
const PROXY_AUTHENTICATE: HeaderName = HeaderName::from_static("proxy-authenticate");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// Fields that concern one hop alone (RFC 9110, 7.6.1), and those of a proxy before us.
const HOP_BY_HOP: [HeaderName; 9] = [
    CONNECTION,
    KEEP_ALIVE,
    PROXY_CONNECTION,
    PROXY_AUTHORIZATION,
    PROXY_AUTHENTICATE,
    HTTP2_SETTINGS,
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// Fields that a trailer section must not carry, since they frame, route or authenticate a message
/// (RFC 9110, 6.5.1).
const NEVER_TRAILERS: [HeaderName; 6] = [
    CONTENT_LENGTH,
    HOST,
    CONTENT_TYPE,
    EXPECT,
    http::header::AUTHORIZATION,
    http::header::TRAILER,
];

/// Most bytes of values that are copied into one block, which each of them keeps: HPACK's table may
/// hold one of each of some fifty heads.
const TOGETHER_MAX: usize = 256;

/// Who sent a message to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// The application beside this sidecar: nothing of ours that it says is believed.
    Application,
    /// Another sidecar: it says what its application spoke, and which failures are its own.
    Sidecar,
}

/// What kind of call a request begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A request and its response.
    Http,
    /// A gRPC call, by its content type.
    Grpc,
    /// A WebSocket, from `Upgrade` or from an extended CONNECT.
    WebSocket,
}

/// A request's head in its one form.
#[derive(Clone, Debug)]
pub struct Head {
    /// The method; a WebSocket's is the GET that it was.
    pub method: Method,
    /// The path that is authorized and forwarded.
    pub path: CanonicalPath,
    /// The query, without its `?`.
    pub query: Option<String>,
    /// Host and port; absent only where HTTP/1.0 sent none.
    pub authority: Option<Authority>,
    /// The end-to-end fields, without `host`.
    pub headers: HeaderMap,
    /// The kind of call.
    pub kind: Kind,
    /// What the calling application spoke.
    pub spoken: Spoken,
    /// `sidegate-port` of another sidecar.
    pub port: Option<u16>,
    /// Whether the caller takes trailers: HTTP/2, or `TE: trailers`.
    pub te_trailers: bool,
    /// Whether the body waits for a 100.
    pub expects_continue: bool,
}

/// Brings a request's head to its one form. Its fields are taken out of `parts`.
///
/// # Errors
///
/// [`RequestError::BadRequest`] with a reason of the log for everything that two servers could
/// understand in two ways; [`RequestError::HeaderListTooLarge`] beyond `limits`;
/// [`RequestError::NotCarried`] for CONNECT.
pub fn sanitize(
    parts: &mut request::Parts,
    sender: Sender,
    limits: &WireLimits,
) -> Result<Head, RequestError> {
    if !limits.admit(&parts.headers, parts.uri.path().len()) {
        return Err(RequestError::HeaderListTooLarge);
    }
    let upgrade = requested_upgrade(parts)?;
    let (method, uri, version) = (&parts.method, &parts.uri, parts.version);
    let mut headers = std::mem::take(&mut parts.headers);
    check_scheme(uri)?;
    if !http1::is_method(method) {
        return Err(bad("method"));
    }
    let spoken = spoken(sender, version, &headers)?;
    let port = match sender {
        Sender::Application => None,
        Sender::Sidecar => named_port(&headers)?,
    };
    let authority = authority(uri, &headers, spoken)?;
    let te_trailers = lists(&headers, &TE, "trailers")
        || sender == Sender::Application && version == Version::HTTP_2;
    check_lengths(&headers, upgrade)?;
    headers.remove(HOST);
    strip(&mut headers, |_| false);
    check_h1(&headers)?;
    detach(&mut headers, version);
    // From here on only what is forwarded decides.
    let path = CanonicalPath::parse(uri.path()).map_err(|error| bad(error.code()))?;
    Ok(Head {
        method: if upgrade { Method::GET } else { method.clone() },
        query: query(uri)?,
        kind: kind(&headers, &path, upgrade)?,
        expects_continue: expects_continue(&headers)?,
        path,
        authority,
        headers,
        spoken,
        port,
        te_trailers,
    })
}

/// Brings a response's head to the form in which it is passed on.
///
/// Of another sidecar's response `sidegate-error` and `sidegate-decision` stay, so that a caller
/// can tell a refusal from an answer; an application's own are stripped.
pub fn sanitize_response(parts: &mut response::Parts, sender: Sender) {
    strip(&mut parts.headers, |name| keeps(name, sender));
    detach(&mut parts.headers, parts.version);
}

/// Brings trailers to the form in which they are passed on.
pub fn sanitize_trailers(trailers: &mut HeaderMap, sender: Sender) {
    strip(trailers, |name| keeps(name, sender));
    for name in &NEVER_TRAILERS {
        trailers.remove(name);
    }
}

/// Whether names and values are such as HTTP/1 can carry: asked again where they are written, so
/// that nothing that HTTP/2 let through becomes a line of its own.
///
/// # Errors
///
/// [`RequestError::BadRequest`] when one is not.
pub fn check_h1(headers: &HeaderMap) -> Result<(), RequestError> {
    // Without an early end, so that many bytes are looked at in one step.
    let control = |byte: u8| byte != b'\t' && byte.is_ascii_control();
    for (name, value) in headers {
        if !name.as_str().bytes().all(http1::is_token) {
            return Err(bad("header_name"));
        }
        let bytes = value.as_bytes().iter();
        if bytes.fold(0, |found, byte| found | u8::from(control(*byte))) != 0 {
            return Err(bad("header_value"));
        }
    }
    Ok(())
}

/// Whether this is an identity header in any spelling: `x-forwarded-client-cert`, `sidegate-*`,
/// `l5d-*`, each also with `_` for `-`, as many servers read one for the other.
pub fn is_identity(name: &HeaderName) -> bool {
    let mut bytes = name
        .as_str()
        .bytes()
        .map(|byte| if byte == b'_' { b'-' } else { byte });
    let mut starts = |prefix: &[u8]| {
        prefix
            .iter()
            .all(|expected| bytes.next() == Some(*expected))
    };
    match name.as_str().as_bytes().first() {
        Some(b's') => starts(b"sidegate-"),
        Some(b'l') => starts(b"l5d-"),
        Some(b'x') => starts(CLIENT_CERT.as_str().as_bytes()) && bytes.next().is_none(),
        _ => false,
    }
}

impl Head {
    /// Whether the call is gRPC.
    pub fn is_grpc(&self) -> bool {
        self.kind == Kind::Grpc
    }

    /// `websocket` for a WebSocket.
    pub fn upgrade(&self) -> Option<&'static str> {
        (self.kind == Kind::WebSocket).then_some(wire::WEBSOCKET)
    }

    /// The path with its query.
    pub fn target(&self) -> String {
        match &self.query {
            Some(query) => format!("{}?{query}", self.path),
            None => self.path.as_str().to_owned(),
        }
    }

    /// The request as it goes to another sidecar; `port` is the target port's number. The fields are
    /// taken out of this head, so it is asked once.
    ///
    /// # Errors
    ///
    /// [`RequestError::BadRequest`] when the parts do not make a URI.
    pub fn to_wire(&mut self, port: Option<u16>) -> Result<Request<()>, RequestError> {
        let mut request = Request::new(());
        *request.version_mut() = Version::HTTP_2;
        *request.uri_mut() = self.uri()?;
        let mut headers = std::mem::take(&mut self.headers);
        headers.insert(
            wire::PROTOCOL,
            HeaderValue::from_static(self.spoken.as_str()),
        );
        if let Some(port) = port {
            headers.insert(wire::PORT, HeaderValue::from(port));
        }
        if self.te_trailers {
            headers.insert(TE, HeaderValue::from_static("trailers"));
        }
        *request.headers_mut() = headers;
        if self.kind == Kind::WebSocket {
            *request.method_mut() = Method::CONNECT;
            let protocol = h2::ext::Protocol::from_static(wire::WEBSOCKET);
            request.extensions_mut().insert(protocol);
        } else {
            *request.method_mut() = self.method.clone();
        }
        Ok(request)
    }

    /// The request as it goes to the application, with the caller's identity from its certificate.
    ///
    /// # Errors
    ///
    /// [`RequestError::BadRequest`] when a name or a value cannot be written.
    pub fn to_application(&self, caller: Option<&SpiffeId>) -> Result<Request<()>, RequestError> {
        let mut request = Request::new(());
        *request.method_mut() = self.method.clone();
        *request.version_mut() = self.spoken.version();
        let mut headers = self.headers.clone();
        if self.spoken == Spoken::H2 && self.kind != Kind::WebSocket {
            *request.uri_mut() = self.uri()?;
            if self.te_trailers {
                headers.insert(TE, HeaderValue::from_static("trailers"));
            }
        } else {
            let target = self.target();
            *request.uri_mut() = target.parse().ok().ok_or(bad("target"))?;
            self.write_h1(&mut request, &mut headers)?;
        }
        if let Some(caller) = caller {
            write_caller(&mut headers, caller)?;
        }
        check_h1(&headers)?;
        *request.headers_mut() = headers;
        Ok(request)
    }

    /// `host` and the fields of this hop.
    fn write_h1(
        &self,
        request: &mut Request<()>,
        headers: &mut HeaderMap,
    ) -> Result<(), RequestError> {
        if let Some(authority) = &self.authority {
            let host = HeaderValue::try_from(authority.to_string());
            headers.insert(HOST, host.ok().ok_or(bad("authority_host"))?);
        }
        if self.kind == Kind::WebSocket {
            *request.version_mut() = Version::HTTP_11;
            headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
            headers.insert(UPGRADE, HeaderValue::from_static(wire::WEBSOCKET));
            // A caller on HTTP/2 sends no key (RFC 8441, 5.1), and an application on HTTP/1.1 needs
            // one.
            if !headers.contains_key(SEC_WEBSOCKET_KEY) {
                headers.insert(SEC_WEBSOCKET_KEY, websocket_key());
            }
        } else if self.te_trailers && self.spoken == Spoken::Http11 {
            headers.insert(CONNECTION, HeaderValue::from_static("te"));
            headers.insert(TE, HeaderValue::from_static("trailers"));
        }
        Ok(())
    }

    fn uri(&self) -> Result<Uri, RequestError> {
        let target = PathAndQuery::try_from(self.target())
            .ok()
            .ok_or(bad("target"))?;
        let mut parts = http::uri::Parts::default();
        parts.path_and_query = Some(target);
        if let Some(authority) = &self.authority {
            parts.scheme = Some(Scheme::HTTP);
            let authority = authority.to_string().parse();
            parts.authority = Some(authority.ok().ok_or(bad("authority_host"))?);
        }
        Uri::from_parts(parts).ok().ok_or(bad("target"))
    }
}

fn bad(reason: &'static str) -> RequestError {
    RequestError::BadRequest { reason }
}

/// Whether the request asks for a WebSocket; CONNECT of any other kind is refused.
fn requested_upgrade(parts: &request::Parts) -> Result<bool, RequestError> {
    if parts.method == Method::CONNECT {
        let extensions = &parts.extensions;
        let h2 = extensions
            .get::<h2::ext::Protocol>()
            .map(h2::ext::Protocol::as_str);
        let protocol = h2.or_else(|| {
            let hyper = extensions.get::<hyper::ext::Protocol>();
            hyper.map(hyper::ext::Protocol::as_str)
        });
        return match protocol {
            Some(wire::WEBSOCKET) => Ok(true),
            Some(_) => Err(RequestError::NotCarried { reason: "upgrade" }),
            None => Err(RequestError::NotCarried { reason: "connect" }),
        };
    }
    // An Upgrade to anything else may be ignored (RFC 9110, 7.8), and is: `upgrade` is hop-by-hop.
    Ok(parts.method == Method::GET
        && parts.version == Version::HTTP_11
        && lists(&parts.headers, &CONNECTION, "upgrade")
        && lists(&parts.headers, &UPGRADE, wire::WEBSOCKET))
}

/// `https` over plaintext is what gRPC clients with credentials of their own say; everything
/// between sidecars is encrypted anyway.
fn check_scheme(uri: &Uri) -> Result<(), RequestError> {
    match uri.scheme() {
        Some(scheme) if *scheme != Scheme::HTTP && *scheme != Scheme::HTTPS => {
            Err(bad("target_scheme"))
        }
        _ => Ok(()),
    }
}

fn spoken(sender: Sender, version: Version, headers: &HeaderMap) -> Result<Spoken, RequestError> {
    match sender {
        Sender::Application => Ok(Spoken::of(version)),
        Sender::Sidecar => match single(headers, &wire::PROTOCOL)? {
            Some(value) => Spoken::parse(value.as_bytes()).ok_or(bad("sidegate_protocol")),
            None => Ok(Spoken::H2),
        },
    }
}

/// The port that another sidecar names with `sidegate-port`, if it names one.
///
/// # Errors
///
/// [`RequestError::BadRequest`] when it names several, or none in its plain form.
pub fn named_port(headers: &HeaderMap) -> Result<Option<u16>, RequestError> {
    single(headers, &wire::PORT)?.map(parse_port).transpose()
}

/// Reads the value of `sidegate-port`.
///
/// # Errors
///
/// [`RequestError::BadRequest`] when it is not a port's number in its plain form.
pub fn parse_port(value: &HeaderValue) -> Result<u16, RequestError> {
    let text = value.to_str().ok().ok_or(bad("sidegate_port"))?;
    let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let port = text.parse().ok().filter(|port| plain && *port != 0);
    port.ok_or(bad("sidegate_port"))
}

/// The one authority of a request: of its target, of `host`, or of both when they are equal.
fn authority(
    uri: &Uri,
    headers: &HeaderMap,
    spoken: Spoken,
) -> Result<Option<Authority>, RequestError> {
    let parse = |text: &str| Authority::parse(text).map_err(|error| bad(error.code()));
    let of_target = uri
        .authority()
        .map(|target| parse(target.as_str()))
        .transpose()?;
    let host = single(headers, &HOST)?;
    let same = |host: &HeaderValue| {
        uri.authority()
            .is_some_and(|target| host == target.as_str())
    };
    let of_host = match host {
        Some(host) if same(host) => None,
        Some(host) => Some(parse(host.to_str().ok().ok_or(bad("authority_host"))?)?),
        None => None,
    };
    match (of_target, of_host) {
        (Some(target), Some(host)) if target != host => Err(bad("host_mismatch")),
        (None, None) if spoken != Spoken::Http10 => Err(bad("host_missing")),
        (target, host) => Ok(target.or(host)),
    }
}

fn query(uri: &Uri) -> Result<Option<String>, RequestError> {
    let Some(query) = uri.query() else {
        return Ok(None);
    };
    if query
        .bytes()
        .all(|byte| byte.is_ascii_graphic() && byte != b'#')
    {
        Ok(Some(query.to_owned()))
    } else {
        Err(bad("query_character"))
    }
}

fn kind(headers: &HeaderMap, path: &CanonicalPath, upgrade: bool) -> Result<Kind, RequestError> {
    if upgrade {
        return Ok(Kind::WebSocket);
    }
    if !is_grpc(headers)? {
        return Ok(Kind::Http);
    }
    match path.grpc() {
        Some(_) => Ok(Kind::Grpc),
        None => Err(bad("grpc_path")),
    }
}

/// Whether the content type is gRPC's: `application/grpc`, also with `+proto` and parameters.
fn is_grpc(headers: &HeaderMap) -> Result<bool, RequestError> {
    let Some(value) = single(headers, &CONTENT_TYPE)? else {
        return Ok(false);
    };
    Ok(is_grpc_type(value))
}

/// Whether a content type is gRPC's.
pub fn is_grpc_type(value: &HeaderValue) -> bool {
    const GRPC: &[u8] = b"application/grpc";
    let Some((start, rest)) = value.as_bytes().split_at_checked(GRPC.len()) else {
        return false;
    };
    start.eq_ignore_ascii_case(GRPC) && matches!(rest.first(), None | Some(b'+' | b';' | b' '))
}

/// One length at most, and none that an upgrade would leave in front of its bytes.
fn check_lengths(headers: &HeaderMap, upgrade: bool) -> Result<(), RequestError> {
    let length = single(headers, &CONTENT_LENGTH)?;
    let digits =
        |value: &HeaderValue| !value.is_empty() && value.as_bytes().iter().all(u8::is_ascii_digit);
    match length {
        Some(length) if !digits(length) => Err(bad("content_length")),
        Some(length) if upgrade && length != "0" => Err(bad("upgrade_with_body")),
        _ if upgrade && headers.contains_key(TRANSFER_ENCODING) => Err(bad("upgrade_with_body")),
        _ => Ok(()),
    }
}

fn expects_continue(headers: &HeaderMap) -> Result<bool, RequestError> {
    let expect = single(headers, &EXPECT)?;
    Ok(expect.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue")))
}

/// The value of a field that may stand there once.
fn single<'h>(
    headers: &'h HeaderMap,
    name: &HeaderName,
) -> Result<Option<&'h HeaderValue>, RequestError> {
    let mut values = headers.get_all(name).iter();
    let value = values.next();
    match values.next() {
        None => Ok(value),
        Some(_) if name == HOST => Err(bad("host_repeated")),
        Some(_) if name == CONTENT_LENGTH => Err(bad("content_length_repeated")),
        Some(_) => Err(bad("header_repeated")),
    }
}

/// Whether a list field, in any of its lines, names `token`; parameters aside.
fn lists(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    items(headers, name).any(|item| {
        let item = item.split(|byte| *byte == b';').next().unwrap_or_default();
        item.trim_ascii().eq_ignore_ascii_case(token.as_bytes())
    })
}

fn items<'h>(headers: &'h HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'h [u8]> {
    let values = headers.get_all(name).into_iter();
    values.flat_map(|value| {
        value
            .as_bytes()
            .split(|byte| *byte == b',')
            .map(<[u8]>::trim_ascii)
    })
}

/// Removes what concerns this hop alone, what `Connection` nominates, and every identity header
/// that `keep` does not name.
fn strip(headers: &mut HeaderMap, keep: impl Fn(&HeaderName) -> bool) {
    let nominated: Vec<HeaderName> = items(headers, &CONNECTION)
        .filter_map(|item| HeaderName::from_bytes(item).ok())
        .collect();
    let stripped = |name: &&HeaderName| {
        HOP_BY_HOP.contains(name) || nominated.contains(name) || is_identity(name) && !keep(name)
    };
    let stripped: Vec<HeaderName> = headers.keys().filter(stripped).cloned().collect();
    for name in stripped {
        headers.remove(name);
    }
}

/// Copies the values of an HTTP/1 head, which are pieces of the buffer that hyper read it into: the
/// HPACK table of the connection to the other sidecar keeps a value long after its call, and each
/// would keep its buffer. Of HTTP/2 h2 has copied them already.
fn detach(headers: &mut HeaderMap, version: Version) {
    if version == Version::HTTP_2 {
        return;
    }
    let total = headers.values().map(HeaderValue::len).sum();
    let mut block = (total <= TOGETHER_MAX).then(|| BytesMut::with_capacity(total));
    for value in headers.values_mut() {
        let copy = match &mut block {
            Some(block) => {
                block.extend_from_slice(value.as_bytes());
                block.split().freeze()
            }
            None => Bytes::copy_from_slice(value.as_bytes()),
        };
        // What was a value once is one again.
        if let Ok(mut copy) = HeaderValue::from_maybe_shared(copy) {
            copy.set_sensitive(value.is_sensitive());
            *value = copy;
        }
    }
}

fn keeps(name: &HeaderName, sender: Sender) -> bool {
    sender == Sender::Sidecar && (name == wire::ERROR || name == wire::DECISION)
}

fn write_caller(headers: &mut HeaderMap, caller: &SpiffeId) -> Result<(), RequestError> {
    let value = |text: &str| HeaderValue::from_str(text).ok().ok_or(bad("caller"));
    headers.insert(CLIENT_CERT, value(&format!("URI={caller}"))?);
    headers.insert(CLIENT_ID, value(caller.as_str())?);
    Ok(())
}

/// A `Sec-WebSocket-Key`: 16 random bytes in base64.
fn websocket_key() -> HeaderValue {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digit = |index: usize| DIGITS.get(index).copied().unwrap_or(b'A');
    let mut key: Vec<u8> = (0..21).map(|_| digit(fastrand::usize(..64))).collect();
    // The last of 22 digits has two bits of the 128.
    key.push(digit(fastrand::usize(..4) << 4));
    key.extend(b"==");
    HeaderValue::from_bytes(&key).unwrap_or_else(|_| HeaderValue::from_static(""))
}

#[cfg(test)]
mod tests;
