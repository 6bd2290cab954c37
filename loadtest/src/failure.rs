//! Why one call has no answer.

/// A call that was started and not answered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// No TCP connection.
    #[error("cannot connect to {to}: {reason}")]
    Connect {
        /// Host and port.
        to: String,
        /// The operating system's words.
        reason: String,
    },
    /// No TLS session.
    #[error("TLS handshake with {to} failed: {reason}")]
    Tls {
        /// Host and port.
        to: String,
        /// The TLS stack's words.
        reason: String,
    },
    /// No complete answer in time.
    #[error("no complete answer after {after_ms} ms")]
    Timeout {
        /// Milliseconds waited.
        after_ms: u128,
    },
    /// The connection ended before the answer did.
    #[error("connection closed before the answer was complete")]
    Closed,
    /// The operating system broke the connection.
    #[error("connection broke: {0}")]
    Io(std::io::Error),
    /// The peer reset the HTTP/2 stream or connection.
    #[error("reset by the peer: {0}")]
    Reset(h2::Error),
    /// What came is not the protocol that was asked for.
    #[error("not the protocol that was asked for: {0}")]
    Protocol(String),
}

impl Failure {
    /// The word under which it is counted.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Connect { .. } => "connect",
            Self::Tls { .. } => "tls",
            Self::Timeout { .. } => "timeout",
            Self::Closed => "closed",
            Self::Io(_) => "io",
            Self::Reset(_) => "reset",
            Self::Protocol(_) => "protocol",
        }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::UnexpectedEof => Self::Closed,
            _ => Self::Io(error),
        }
    }
}

impl From<h2::Error> for Failure {
    fn from(error: h2::Error) -> Self {
        if error.is_io() {
            return error.into_io().map_or(Self::Closed, Self::from);
        }
        if error.is_reset() || error.is_go_away() && error.is_remote() {
            return Self::Reset(error);
        }
        Self::Protocol(error.to_string())
    }
}
