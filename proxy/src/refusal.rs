//! Calls that fail here: the response, in the form that the caller understands, and the record.
//!
//! Always true: what the caller is told is what the record says that it was told.

use bytes::Bytes;
use http::{Method, Response};

use crate::body::Body;
use crate::call::Call;
use crate::error::RequestError;
use crate::headers;

/// In which form a caller is told of a failure.
#[derive(Clone, Copy, Debug, Default)]
pub struct Form {
    /// In gRPC's way.
    pub grpc: bool,
    /// Without a body, as the answer to a HEAD is.
    pub bodiless: bool,
}

impl Form {
    /// The form for the caller of this request.
    pub fn of(request: &http::request::Parts) -> Self {
        let content_type = request.headers.get(http::header::CONTENT_TYPE);
        Self {
            grpc: content_type.is_some_and(headers::is_grpc_type),
            bodiless: request.method == Method::HEAD,
        }
    }
}

/// The response to a call that failed here, whose record is written.
pub fn respond(mut call: Call, error: &RequestError, form: Form) -> Response<Body> {
    let grpc = form.grpc;
    call.fail(error);
    let mut response = error.to_response(grpc);
    if form.bodiless {
        *response.body_mut() = Bytes::new();
    }
    call.told(
        Some(response.status().as_u16()),
        grpc.then(|| error.grpc_status()),
    );
    call.counters().add_response(response.body().len());
    call.finish();
    response.map(Body::from)
}
