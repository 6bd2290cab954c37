//! HTTP/1 as a zero-trust proxy may read it: the guard that stands between a socket and hyper.
//!
//! hyper repairs what a mesh has to refuse: it erases the evidence of a smuggled request before a
//! service sees one, and answers its own 400s without a service ever hearing of them. So hyper
//! reads applications only through a guard, which checks each head and each byte of framing.
//!
//! Always true: what passes a guard has exactly one reading. A refused request head becomes one
//! internal request, which hyper hands to the service and which [`GuardHandle::admit`] answers
//! with the [`Rejection`]; a broken framing ends the read side with an error and the connection.
//!
//! Who watches the clock: the guard, from the first byte of a head to its last
//! ([`GuardLimits::head_timeout`]); hyper, while a connection is idle between two requests
//! ([`server`]); the caller, while a body stands still.

mod checker;
mod client;
mod framing;
mod guard;
mod head;
mod reader;
mod rejection;
mod serve;
mod syntax;

use std::time::Duration;

use crate::config::LimitsConfig;

pub use client::{ClientGuard, ClientHandle};
pub use guard::{GuardHandle, ServerGuard, UpgradeGate};
pub use rejection::{Reason, Rejection};
pub use serve::{BAD_REQUEST, Serving, cause, refused, serve};

/// Most bytes that hyper may buffer of one connection: more than any head that a guard passes.
const HYPER_BUFFER_BYTES_MAX: usize = 128 * 1024;

/// What one head may cost.
#[derive(Clone, Copy, Debug)]
pub struct GuardLimits {
    /// Most bytes of a head, request line and empty line included; also of a trailer section.
    pub head_bytes_max: usize,
    /// Most header fields of a head, and most trailer fields.
    pub headers_max: usize,
    /// Time from a head's first byte to its last.
    pub head_timeout: Duration,
}

impl From<&LimitsConfig> for GuardLimits {
    fn from(limits: &LimitsConfig) -> Self {
        Self {
            head_bytes_max: usize::try_from(limits.head_bytes_max).unwrap_or(usize::MAX),
            headers_max: usize::try_from(limits.headers_max).unwrap_or(usize::MAX),
            head_timeout: limits.head_timeout,
        }
    }
}

impl Default for GuardLimits {
    fn default() -> Self {
        Self {
            head_bytes_max: 64 * 1024,
            headers_max: 100,
            head_timeout: Duration::from_secs(10),
        }
    }
}

/// The settings of hyper's server that the guard counts on.
///
/// A connection without a request for `idle_timeout` is closed; hyper needs its timer for that.
pub fn server(idle_timeout: Duration, limits: &GuardLimits) -> hyper::server::conn::http1::Builder {
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder
        .timer(hyper_util::rt::TokioTimer::new())
        .header_read_timeout(idle_timeout)
        .max_headers(limits.headers_max.max(INTERNAL_HEADERS))
        .max_header_size(header_size(limits))
        .max_buf_size(HYPER_BUFFER_BYTES_MAX.max(limits.head_bytes_max * 2));
    builder
}

/// The settings of hyper's client that the guard counts on.
pub fn client(limits: &GuardLimits) -> hyper::client::conn::http1::Builder {
    let mut builder = hyper::client::conn::http1::Builder::new();
    builder
        .max_headers(limits.headers_max)
        .max_header_size(header_size(limits))
        .max_buf_size(HYPER_BUFFER_BYTES_MAX.max(limits.head_bytes_max * 2));
    builder
}

/// Whether this is a method as the guard reads one: in capitals, since a server that reads `get` as
/// GET would serve what a policy for GET refuses. HTTP/2 is held to the same.
pub(crate) fn is_method(method: &http::Method) -> bool {
    !matches!(
        syntax::check_method(method.as_str().as_bytes()),
        Err(Reason::Method)
    )
}

/// Whether a byte may stand in a field's name.
pub(crate) fn is_token(byte: u8) -> bool {
    syntax::is_token(byte)
}

/// Header fields of the internal request.
const INTERNAL_HEADERS: usize = 2;

/// hyper's own bound, out of the guard's way: it must be the guard that refuses, and says so.
fn header_size(limits: &GuardLimits) -> usize {
    limits.head_bytes_max.max(1024) + 1
}
