//! What a workload asks of whoever issues its certificates.
//!
//! Invariant: this trait knows no transport. The CA's client implements it with gRPC, tests with a
//! CA in the same process.

use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use futures_util::Stream;
use rustls_pki_types::CertificateDer;
use tokio::sync::mpsc;
use zeroize::Zeroizing;

use crate::bundle::TrustUpdate;
use crate::svid::Svid;
use crate::verify::Verifier;

/// A future on the heap, so that the trait can be a trait object.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A join token: a secret that proves once who a new workload is.
#[derive(Clone)]
pub struct JoinToken(Zeroizing<String>);

impl JoinToken {
    /// The token as the CA printed it.
    pub fn new(token: impl Into<String>) -> Self {
        Self(Zeroizing::new(token.into()))
    }

    /// The secret, to be sent to the CA and nobody else.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JoinToken(redacted)")
    }
}

/// What proves who this workload is, as long as it has no SVID to prove it with.
#[derive(Clone, Debug)]
pub enum Evidence {
    /// Nothing: only an SVID from an earlier run will do.
    None,
    /// Standalone: used once, then the current SVID is the evidence.
    JoinToken(JoinToken),
    /// In a cluster: a token for the audience `sidegate-ca`, read anew for each request.
    ServiceAccountToken(PathBuf),
}

/// One request for a certificate.
#[derive(Clone, Debug)]
pub struct IssueRequest {
    /// PKCS#10, DER. A request that is repeated because its answer was lost is the same bytes.
    pub csr: Vec<u8>,
    /// The SVID to renew; `None` asks with the first evidence.
    pub current: Option<Arc<Svid>>,
    /// What decides whether the issuer is believed.
    pub verifier: Arc<Verifier>,
}

/// How a bundle stream begins.
#[derive(Clone, Debug)]
pub struct BundleWatch {
    /// The SVID to show, if there is one; the bundle is public.
    pub current: Option<Arc<Svid>>,
    /// What decides whether the issuer is believed.
    pub verifier: Arc<Verifier>,
    /// What is in use now.
    pub acknowledgement: Acknowledgement,
}

/// What became of a bundle here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Acknowledgement {
    /// The last sequence put to use; 0 before the first.
    pub sequence: u64,
    /// SHA-256 of each root in use, of our own trust domain.
    pub root_sha256: Vec<[u8; 32]>,
    /// Authority key identifier of our leaf; empty without one.
    pub leaf_issuer_key_id: Vec<u8>,
    /// Why the last bundle was not put to use; empty when it was.
    pub refusal: String,
}

/// Bundles in one direction, acknowledgements in the other.
pub struct BundleStream {
    /// Each bundle as it comes; ends with an error or when the issuer ends it.
    pub updates: Pin<Box<dyn Stream<Item = Result<TrustUpdate, IssueError>> + Send>>,
    /// Where to report what became of them.
    pub acknowledgements: mpsc::Sender<Acknowledgement>,
}

impl fmt::Debug for BundleStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BundleStream")
    }
}

/// Why there is no certificate, or no bundle. The old ones stay in use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IssueError {
    /// The CA cannot be reached.
    #[error("the CA at {address} cannot be reached")]
    Unreachable {
        /// Where it should be.
        address: String,
        /// What the network says.
        #[source]
        source: std::io::Error,
    },
    /// What answers is not the CA. Nothing was sent to it.
    #[error("what answers at {address} is not the CA")]
    NotTheCa {
        /// Where it answered.
        address: String,
        /// What is wrong with it.
        #[source]
        source: crate::handshake::HandshakeError,
    },
    /// The CA refused, and says why.
    #[error("the CA refused with {code}: {message}")]
    Refused {
        /// gRPC's name for it.
        code: &'static str,
        /// The CA's words.
        message: String,
        /// Whether another key could help where the same one will not.
        wants_new_key: bool,
    },
    /// The CA, or the connection to it, failed.
    #[error("the call to the CA failed: {0}")]
    Failed(String),
    /// The CA took too long.
    #[error("the CA did not answer within {after_ms} ms")]
    Timeout {
        /// The bound.
        after_ms: u128,
    },
    /// There is nothing to prove with who we are.
    #[error("{0}")]
    NoEvidence(String),
}

/// Issues certificates and tells about roots.
pub trait Issue: Send + Sync + 'static {
    /// Asks for a certificate; the answer is the chain, DER, leaf first, without the root. Nothing
    /// of it is believed before our own verifier has seen it.
    fn issue(
        &self,
        request: IssueRequest,
    ) -> BoxFuture<'_, Result<Vec<CertificateDer<'static>>, IssueError>>;

    /// Follows the bundle.
    fn watch_bundle(&self, watch: BundleWatch) -> BoxFuture<'_, Result<BundleStream, IssueError>>;
}
