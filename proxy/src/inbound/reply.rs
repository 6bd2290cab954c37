//! The answering half of one stream.
//!
//! Always true: whatever state an answer is in, [`Reply::fail`] ends it so that the caller cannot
//! take it for a clean end: a whole response, gRPC trailers, or a reset.

use std::future::poll_fn;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, SendStream};
use http::{Response, response};

use crate::error::RequestError;
use crate::wire;

/// What the caller of a failed call was told.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Told {
    /// The HTTP status, when a head was sent now.
    pub(super) status: Option<u16>,
    /// The gRPC status, when one was sent now.
    pub(super) grpc_status: Option<u32>,
    /// Bytes of the body that was sent now.
    pub(super) bytes: usize,
}

/// The answering half of one stream.
pub(super) struct Reply {
    respond: SendResponse<Bytes>,
    stream: Option<SendStream<Bytes>>,
    /// Failures are told in gRPC's way.
    grpc: bool,
    /// The answer has no body, whatever it says: the request was a HEAD.
    bodiless: bool,
    /// The caller is a sidecar, which makes something of a reset stream.
    sidecar: bool,
}

impl Reply {
    /// `sidecar` says that the caller is one.
    pub(super) fn new(respond: SendResponse<Bytes>, sidecar: bool) -> Self {
        Self {
            respond,
            stream: None,
            grpc: false,
            bodiless: false,
            sidecar,
        }
    }

    /// The request's method, which says whether the answer may have a body.
    pub(super) fn to(&mut self, method: &http::Method) {
        self.bodiless = method == http::Method::HEAD;
    }

    /// From now on failures are told in gRPC's way.
    pub(super) fn speak_grpc(&mut self, grpc: bool) {
        self.grpc = grpc;
    }

    /// Whether a head was sent.
    pub(super) fn has_head(&self) -> bool {
        self.stream.is_some()
    }

    /// Passes an informational answer on.
    pub(super) fn informational(&mut self, head: Response<()>) {
        // A failure means that the stream has ended, which the next step reports.
        drop(self.respond.send_informational(head));
    }

    /// Sends the head; `end` when nothing follows it. Then the stream that the rest goes to.
    ///
    /// # Errors
    ///
    /// [`RequestError::PeerReset`] when the stream has ended.
    pub(super) fn head(
        &mut self,
        head: response::Parts,
        end: bool,
    ) -> Result<&mut SendStream<Bytes>, RequestError> {
        let response = Response::from_parts(head, ());
        let stream = self.respond.send_response(response, end);
        let stream = stream.map_err(|error| RequestError::PeerReset {
            reason: error.reason(),
        })?;
        Ok(self.stream.insert(stream))
    }

    /// Waits until the caller gives the call up.
    pub(super) async fn was_reset(&mut self) -> RequestError {
        let reset = match &mut self.stream {
            Some(stream) => poll_fn(|context| stream.poll_reset(context)).await,
            None => poll_fn(|context| self.respond.poll_reset(context)).await,
        };
        let reason = match reset {
            Ok(reason) => Some(reason),
            Err(error) => error.reason(),
        };
        RequestError::PeerReset { reason }
    }

    /// Ends the answer for `error`, in the way that fits how far it has got.
    pub(super) fn fail(&mut self, error: &RequestError) -> Told {
        match &mut self.stream {
            None => self.fail_before_head(error),
            Some(stream) if self.grpc && speaks_in_trailers(error) => {
                // A failure means that the stream has ended already.
                drop(stream.send_trailers(error.grpc_trailers()));
                Told {
                    grpc_status: Some(error.grpc_status()),
                    ..Told::default()
                }
            }
            Some(stream) => {
                stream.send_reset(error.reset_reason());
                Told::default()
            }
        }
    }

    fn fail_before_head(&mut self, error: &RequestError) -> Told {
        if let Some(reason) = reset_before_head(error, self.sidecar) {
            self.respond.send_reset(reason);
            return Told::default();
        }
        let (mut head, body) = error.to_response(self.grpc).into_parts();
        // Errors made here come without the client's protocol; nothing else may look like them.
        head.headers
            .entry(wire::ERROR)
            .or_insert_with(|| http::HeaderValue::from_static("unknown"));
        let end = body.is_empty() || self.bodiless;
        let told = Told {
            status: Some(head.status.as_u16()),
            grpc_status: self.grpc.then(|| error.grpc_status()),
            bytes: if end { 0 } else { body.len() },
        };
        if let Ok(stream) = self.head(head, end)
            && !end
        {
            drop(stream.send_data(body, true));
        }
        told
    }
}

/// The failures of a gRPC call that its trailers say; after any other, what was sent is not to be
/// trusted.
fn speaks_in_trailers(error: &RequestError) -> bool {
    matches!(
        error,
        RequestError::PolicyChanged { .. } | RequestError::Timeout { .. } | RequestError::Idle
    )
}

/// How a stream ends without any answer: where a sidecar may retry, where nobody listens, and where
/// the application reset its own stream.
fn reset_before_head(error: &RequestError, sidecar: bool) -> Option<Reason> {
    match error {
        RequestError::UpstreamConnect { .. } | RequestError::Draining => {
            sidecar.then_some(Reason::REFUSED_STREAM)
        }
        RequestError::PeerReset { .. }
        | RequestError::CertificateEnded { .. }
        | RequestError::UpstreamReset {
            reason: Some(_), ..
        } => Some(error.reset_reason()),
        _ => None,
    }
}
