//! A gRPC health check (`grpc.health.v1.Health/Check`) over HTTP/2 without TLS, as the kubelet makes
//! one. Its two messages have one field each, so they are written and read here.

use bytes::{BufMut, Bytes, BytesMut};
use h2::RecvStream;
use h2::client::SendRequest;
use http::header::{CONTENT_TYPE, HeaderValue, TE, USER_AGENT};
use http::{HeaderMap, Request, StatusCode};

use super::{Asker, Failure};
use crate::config::GrpcProbe;

const PATH: &str = "/grpc.health.v1.Health/Check";
/// `HealthCheckResponse.ServingStatus.SERVING`.
const SERVING: u64 = 1;
/// Bytes of an answer; more is nobody's health.
const ANSWER_BYTES_MAX: usize = 4096;
/// Length of what precedes each message: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;

/// Asks whether the service serves.
pub(super) async fn ask(asker: &Asker, probe: &GrpcProbe) -> Result<(), Failure> {
    let stream = asker.connect(probe.port).await?;
    let (sender, connection) = h2::client::handshake(stream).await?;
    let authority = asker.address(probe.port).to_string();
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        // Polled first, so that an answer wins over the end of its connection.
        biased;
        answer = check(sender, &authority, &probe.service) => answer,
        ended = &mut connection => match ended {
            Ok(()) => Err(Failure::Grpc("the connection was closed".to_owned())),
            Err(error) => Err(error.into()),
        },
    }
}

async fn check(sender: SendRequest<Bytes>, authority: &str, service: &str) -> Result<(), Failure> {
    let mut request = Request::post(format!("http://{authority}{PATH}")).body(())?;
    let headers = request.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(TE, HeaderValue::from_static("trailers"));
    headers.insert(USER_AGENT, HeaderValue::from_static(super::USER_AGENT));
    let mut sender = sender.ready().await?;
    let (answer, mut body) = sender.send_request(request, false)?;
    body.send_data(question(service), true)?;
    let (head, mut body) = answer.await?.into_parts();
    if head.status != StatusCode::OK {
        return Err(Failure::Status(head.status));
    }
    refuse(&head.headers)?;
    let message = read(&mut body).await?;
    if let Some(trailers) = body.trailers().await? {
        refuse(&trailers)?;
    }
    match serving_status(&message) {
        SERVING => Ok(()),
        status => Err(Failure::NotServing(status)),
    }
}

/// A status other than OK, in the head of an answer without a message or in its trailers.
fn refuse(headers: &HeaderMap) -> Result<(), Failure> {
    match headers.get("grpc-status") {
        Some(status) if status != "0" => {
            let status = String::from_utf8_lossy(status.as_bytes()).into_owned();
            Err(Failure::Grpc(status))
        }
        _ => Ok(()),
    }
}

/// `HealthCheckRequest { string service = 1; }`, as gRPC frames it.
fn question(service: &str) -> Bytes {
    let mut message = BytesMut::new();
    if !service.is_empty() {
        message.put_u8(0x0a);
        let mut length = service.len();
        loop {
            let seven = u8::try_from(length & 0x7f).unwrap_or_default();
            length >>= 7;
            if length == 0 {
                message.put_u8(seven);
                break;
            }
            message.put_u8(0x80 | seven);
        }
        message.put_slice(service.as_bytes());
    }
    let mut framed = BytesMut::with_capacity(PREFIX_BYTES + message.len());
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    framed.put_slice(&message);
    framed.freeze()
}

/// The first message of an answer, without what precedes it.
async fn read(body: &mut RecvStream) -> Result<Bytes, Failure> {
    let mut bytes = BytesMut::new();
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        bytes.put_slice(&data);
        if bytes.len() > ANSWER_BYTES_MAX {
            return Err(Failure::Grpc("too long an answer".to_owned()));
        }
    }
    match *bytes {
        [0, a, b, c, d, ref message @ ..] => {
            let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
            let message = message.get(..length).map(Bytes::copy_from_slice);
            message.ok_or_else(|| Failure::Grpc("a message that is cut off".to_owned()))
        }
        [] => Err(Failure::Grpc("no message".to_owned())),
        _ => Err(Failure::Grpc("a message that cannot be read".to_owned())),
    }
}

/// `HealthCheckResponse { ServingStatus status = 1; }`; what is absent is 0, UNKNOWN.
fn serving_status(message: &[u8]) -> u64 {
    match message {
        [0x08, varint @ ..] => {
            let mut value = 0;
            for (i, byte) in varint.iter().take(9).enumerate() {
                value |= u64::from(byte & 0x7f) << (7 * i);
                if byte & 0x80 == 0 {
                    break;
                }
            }
            value
        }
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_question_names_the_service() {
        assert_eq!(&*question(""), [0, 0, 0, 0, 0]);
        assert_eq!(&*question("ab"), [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
        let long = question(&"x".repeat(300));
        assert_eq!(&long[..8], [0, 0, 0, 1, 47, 0x0a, 0xac, 0x02]);
    }

    #[test]
    fn the_answer_is_a_number() {
        assert_eq!(serving_status(&[]), 0);
        assert_eq!(serving_status(&[0x08, 1]), SERVING);
        assert_eq!(serving_status(&[0x08, 0x81, 0x01]), 129);
        assert_eq!(serving_status(&[0x12, 1]), 0);
    }
}
