//! What an issuance needs, and every way in which it is refused.
//!
//! Invariant: an [`Attested`] identity comes from evidence that was checked, never from a request.

use sidegate_mesh::spiffe::SpiffeId;
use sidegate_mtls::VerifyError;
use tonic::{Code, Status};

use crate::csr::CsrError;
use crate::digest::{Digest, Serial};
use crate::kubernetes::attest::Unattested;
use crate::ledger::{Evidence, LedgerError};
use crate::limits::Wait;

/// An identity that evidence has proved.
#[derive(Clone, Debug)]
pub struct Attested {
    /// Who it is.
    pub id: SpiffeId,
    /// What proved it.
    pub evidence: Evidence,
    /// For a renewal, the line that it continues.
    pub lineage: Option<Serial>,
    /// The key of the SVID that was shown; it may not be certified again.
    pub key: Option<Digest>,
    /// DNS names of the identity, from the CA's own table.
    pub dns_names: Vec<String>,
}

/// Why evidence proves nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EvidenceError {
    /// The request has none.
    #[error("the request carries no evidence; send a join token or show the current SVID")]
    Missing,
    /// Evidence of a cluster.
    #[error(
        "this CA is not in a cluster, so it does not take service account tokens; send a join token"
    )]
    NotInACluster,
    /// Evidence of a CA outside of a cluster.
    #[error(
        "in a cluster only the service account token of a pod is evidence; mount a projected one"
    )]
    InACluster,
    /// No such token, or its secret is wrong.
    #[error("unknown join token; make one with `sidegate-ca token create`")]
    TokenUnknown,
    /// The token's time is over.
    #[error("the join token has expired; make one with `sidegate-ca token create`")]
    TokenExpired,
    /// An administrator took it back.
    #[error("the join token was revoked; make one with `sidegate-ca token create`")]
    TokenRevoked,
    /// It was used for another key.
    #[error("the join token was used with another key; make one with `sidegate-ca token create`")]
    TokenUsed,
    /// The caller showed no certificate.
    #[error("renewal needs the current SVID in the TLS handshake, and none was shown")]
    NoCertificate,
    /// The certificate shown is not believed, now.
    #[error("the certificate shown is not valid: {0}")]
    Certificate(VerifyError),
    /// Valid, but not in this CA's ledger.
    #[error("the certificate shown was not issued by this CA, or its renewal is long past")]
    NotIssuedHere,
}

/// Why a certificate was not issued.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Refusal {
    /// The request itself is not acceptable.
    #[error(transparent)]
    Csr(#[from] CsrError),
    /// The evidence proves nothing.
    #[error(transparent)]
    Evidence(#[from] EvidenceError),
    /// The token of a pod proves nothing.
    #[error(transparent)]
    Pod(#[from] Unattested),
    /// The key is the shown SVID's, a CA's, or was certified before.
    #[error("the key was used before; every certificate needs a new key")]
    KeyNotFresh,
    /// The shown SVID was renewed with another key before.
    #[error(
        "this SVID was renewed with another key before, so its lineage is frozen now; use a new join token"
    )]
    Forked,
    /// The lineage was frozen earlier.
    #[error("the lineage of this SVID is frozen; use a new join token")]
    Frozen,
    /// The identity may not have a certificate.
    #[error("{0}")]
    Denied(&'static str),
    /// Too many certificates in a short time.
    #[error("too many certificates {}; try again in {} s", if wait.own { "for this identity" } else { "for all identities" }, wait.wait.as_secs() + 1)]
    Limit {
        /// Whose limit, and for how long.
        wait: Wait,
    },
    /// A bound of the CA's memory is reached.
    #[error("the CA keeps track of as many {0} as it may")]
    Full(&'static str),
    /// The same evidence is just being used with another key.
    #[error("the same evidence is being used with another key right now; try again")]
    Concurrent,
    /// The issuance cannot be recorded.
    #[error("cannot record the issuance, so nothing is signed: {0}")]
    Ledger(#[from] LedgerError),
    /// The CA cannot sign now.
    #[error("the CA cannot sign now: {0}")]
    Unavailable(String),
    /// Our own verifier refuses what we made. It was destroyed.
    #[error("the certificate failed its own check and was destroyed: {0}")]
    Lint(String),
}

impl Refusal {
    /// The reason's code, as log and metrics show it.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Csr(CsrError::Malformed) => "csr_malformed",
            Self::Csr(CsrError::Algorithm) => "key_algorithm",
            Self::Csr(CsrError::Signature) => "csr_signature",
            Self::Evidence(evidence) => evidence.code(),
            Self::Pod(unattested) => unattested.code(),
            Self::KeyNotFresh => "key_not_fresh",
            Self::Forked => "lineage_forked",
            Self::Frozen => "lineage_frozen",
            Self::Denied(_) => "denied",
            Self::Limit { wait } if wait.own => "limit_identity",
            Self::Limit { .. } => "limit_overall",
            Self::Full(_) => "full",
            Self::Concurrent => "concurrent",
            Self::Ledger(_) => "ledger",
            Self::Unavailable(_) => "unavailable",
            Self::Lint(_) => "lint",
        }
    }

    /// The only mapping from refusal to gRPC status; every variant is listed so a new one must
    /// choose.
    pub fn status(&self) -> Status {
        let code = match self {
            Self::Csr(_)
            | Self::KeyNotFresh
            | Self::Evidence(
                EvidenceError::Missing | EvidenceError::NotInACluster | EvidenceError::InACluster,
            ) => Code::InvalidArgument,
            Self::Pod(unattested) => unattested.grpc(),
            Self::Evidence(_) => Code::Unauthenticated,
            Self::Forked | Self::Frozen | Self::Denied(_) => Code::PermissionDenied,
            Self::Limit { .. } | Self::Full(_) => Code::ResourceExhausted,
            Self::Concurrent | Self::Ledger(_) | Self::Unavailable(_) => Code::Unavailable,
            Self::Lint(_) => Code::Internal,
        };
        Status::new(code, self.to_string())
    }
}

impl EvidenceError {
    /// The reason's code, as log and metrics show it.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Missing => "evidence_missing",
            Self::NotInACluster | Self::InACluster => "evidence_unsupported",
            Self::TokenUnknown => "token_unknown",
            Self::TokenExpired => "token_expired",
            Self::TokenRevoked => "token_revoked",
            Self::TokenUsed => "token_used",
            Self::NoCertificate => "no_certificate",
            Self::Certificate(_) => "certificate_invalid",
            Self::NotIssuedHere => "not_issued_here",
        }
    }
}
