//! The ledger: what this CA did, in the order in which it did it.
//!
//! Invariant: a future that [`Ledger::append`] returned ends well only when its entry is on disk.
//! Entries are in the order of the calls. So a CA that signs after [`Ledger::intend`] and answers
//! after [`Ledger::record`] hands out nothing that the ledger does not name.

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sidegate_mesh::spiffe::{SpiffeId, TrustDomain};

use crate::digest::{Digest, Serial};

pub mod chain;
pub mod file;

/// Ends with the entry's index once the entry is on disk.
pub type Written = Pin<Box<dyn Future<Output = Result<u64, LedgerError>> + Send>>;

/// Where a CA writes down what it does, before it does it.
pub trait Ledger: Send + Sync + 'static {
    /// Appends one entry. It is queued when this returns, even if the future is dropped.
    fn append(&self, event: Event) -> Written;

    /// Says that a certificate is about to be signed.
    fn intend(&self, issuance: Issuance) -> Written {
        self.append(Event::Intended(issuance))
    }

    /// Says that an intended certificate was signed and linted; it may leave afterwards.
    fn record(&self, serial: Serial, certificate_sha256: Digest) -> Written {
        self.append(Event::Issued {
            serial,
            certificate_sha256,
        })
    }

    /// Says that an intended certificate was not signed, or was destroyed before it left.
    fn refuse(&self, serial: Serial, reason: String) -> Written {
        self.append(Event::Refused { serial, reason })
    }

    /// Where the chain stands.
    fn head(&self) -> Head;

    /// Reads the whole chain from disk, checking it, and shows each entry to `visit`. Blocks.
    ///
    /// # Errors
    ///
    /// [`LedgerError::Broken`] where the chain does not hold, or does not reach [`Self::head`].
    fn read(&self, visit: &mut dyn FnMut(&Entry)) -> Result<Head, LedgerError>;
}

/// The last entry on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Number of entries.
    pub entries: u64,
    /// Hash of the last one; [`Digest::ZERO`] when there is none.
    pub hash: Digest,
}

/// One line of the ledger, without its own hash.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Entry {
    /// Position, from 0.
    pub index: u64,
    /// Unix time in milliseconds at which it was written.
    pub time: u64,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
    /// Hash of the entry before.
    pub previous: Digest,
}

/// What a CA writes down.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Event {
    /// The CA was made, with its first root.
    Created {
        /// The trust domain that it issues for.
        trust_domain: TrustDomain,
        /// The first root, DER in base64.
        root: String,
        /// The bundle's sequence.
        sequence: u64,
    },
    /// A certificate is about to be signed.
    Intended(Issuance),
    /// The certificate was signed; it leaves after this entry.
    Issued {
        /// As in the `intended` entry.
        serial: Serial,
        /// Of the DER certificate.
        certificate_sha256: Digest,
    },
    /// The certificate was not signed, or was destroyed before it left.
    Refused {
        /// As in the `intended` entry.
        serial: Serial,
        /// Why.
        reason: String,
    },
    /// One SVID was renewed with two different keys: nothing of its lineage is renewed any more.
    Frozen {
        /// Serial number of the lineage's first SVID.
        lineage: Serial,
        /// Whose it is.
        spiffe_id: SpiffeId,
        /// The SVID that was renewed twice.
        parent: Serial,
        /// The second key.
        public_key_sha256: Digest,
    },
    /// A join token was made.
    TokenCreated(Token),
    /// A join token was made unusable.
    TokenRevoked {
        /// The token.
        token: String,
    },
    /// An identity was revoked, with all of its certificates.
    IdentityRevoked {
        /// The identity.
        spiffe_id: SpiffeId,
        /// The bundle's sequence.
        sequence: u64,
    },
    /// One certificate was revoked.
    SerialRevoked {
        /// The certificate.
        serial: Serial,
        /// Unix time in seconds after which it would have been refused anyway.
        not_after: u64,
        /// The bundle's sequence.
        sequence: u64,
    },
    /// An identity is accepted again; what it held before is revoked by serial number.
    Reinstated {
        /// The identity.
        spiffe_id: SpiffeId,
        /// Its certificates, with the Unix time in seconds of their end.
        serials: Vec<(Serial, u64)>,
        /// The bundle's sequence.
        sequence: u64,
    },
    /// A root was put into the bundle.
    RootAdded {
        /// DER in base64.
        root: String,
        /// Whether its key is ours, so that it can become active.
        own: bool,
        /// The bundle's sequence.
        sequence: u64,
    },
    /// The CA signs under this root from now on.
    RootActivated {
        /// Of the DER certificate.
        sha256: Digest,
        /// Whether missing acknowledgements were overridden.
        forced: bool,
    },
    /// A root was taken out of the bundle.
    RootRemoved {
        /// Of the DER certificate.
        sha256: Digest,
        /// Whether certificates in date were overridden.
        forced: bool,
        /// The bundle's sequence.
        sequence: u64,
    },
    /// A change that the ledger names was not put into effect: the Secret refused it.
    Abandoned {
        /// The sequence that the change would have had.
        sequence: u64,
        /// Why.
        reason: String,
    },
    /// A line that a crash had cut off was removed at start. It had never been acknowledged.
    Repaired {
        /// Bytes removed.
        bytes: u64,
    },
}

/// A certificate that is about to be signed.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Issuance {
    /// Whose it is; the trust domain's own ID for an intermediate.
    pub spiffe_id: SpiffeId,
    /// Its serial number.
    pub serial: Serial,
    /// Of the DER `SubjectPublicKeyInfo`.
    pub public_key_sha256: Digest,
    /// Unix time in seconds.
    pub not_before: u64,
    /// Unix time in seconds.
    pub not_after: u64,
    /// What proved the identity.
    #[serde(with = "display")]
    pub evidence: Evidence,
    /// For a renewal, the key of the SVID that was renewed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub parent_key_sha256: Option<Digest>,
    /// DNS names besides the SPIFFE ID: the control plane's webhooks have some.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub dns_names: Vec<String>,
    /// Serial number of the first SVID in this line of renewals.
    pub lineage: Serial,
    /// The root that it is signed under.
    pub root_sha256: Digest,
}

/// What proved an identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// A join token, by its id.
    JoinToken(String),
    /// An SVID in date, by its serial number.
    Svid(Serial),
    /// A service account token, bound to a pod that was alive.
    Pod(PodEvidence),
    /// The CA itself.
    Own,
}

/// The pod that a token was bound to; its namespace is the identity's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodEvidence {
    /// Tells it from every other that ever was.
    pub uid: String,
    /// Its name.
    pub name: String,
    /// The node that it was on.
    pub node: String,
}

/// A join token, without its secret.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Token {
    /// Public part.
    pub token: String,
    /// The one identity that it proves.
    pub spiffe_id: SpiffeId,
    /// Of the secret part, which has 256 random bits.
    pub secret_sha256: Digest,
    /// Unix time in seconds.
    pub expires: u64,
}

/// Why the ledger could not do it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LedgerError {
    /// Nothing was written: the disk refused, is full, or cannot say that it has the bytes.
    #[error("the ledger cannot be written: {0}")]
    Write(Arc<std::io::Error>),
    /// Too many entries wait for the disk.
    #[error("the ledger's queue is full")]
    Busy,
    /// The CA is shutting down, or the ledger's thread has ended.
    #[error("the ledger is closed")]
    Closed,
    /// It cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The ledger.
        path: PathBuf,
        /// Why.
        source: Arc<std::io::Error>,
    },
    /// The chain does not hold. Nothing can repair that but a backup.
    #[error("{}:{line}: {problem}", path.display())]
    Broken {
        /// The ledger.
        path: PathBuf,
        /// Line, from 1.
        line: u64,
        /// What is wrong there.
        problem: String,
    },
}

impl std::fmt::Display for Evidence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::JoinToken(id) => write!(f, "join-token:{id}"),
            Self::Svid(serial) => write!(f, "svid:{serial}"),
            Self::Pod(PodEvidence { uid, name, node }) => write!(f, "pod:{uid}/{name}@{node}"),
            Self::Own => f.write_str("self"),
        }
    }
}

impl std::str::FromStr for Evidence {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(id) = text.strip_prefix("join-token:") {
            return Ok(Self::JoinToken(id.to_owned()));
        }
        if let Some(serial) = text.strip_prefix("svid:") {
            let serial = serial.parse().map_err(|_hex| "not a serial number")?;
            return Ok(Self::Svid(serial));
        }
        if let Some(pod) = text.strip_prefix("pod:") {
            let parts = pod.split_once('/').and_then(|(uid, rest)| {
                let (name, node) = rest.split_once('@')?;
                Some((uid, name, node))
            });
            let (uid, name, node) = parts.ok_or("not a pod")?;
            return Ok(Self::Pod(PodEvidence {
                uid: uid.to_owned(),
                name: name.to_owned(),
                node: node.to_owned(),
            }));
        }
        (text == "self")
            .then_some(Self::Own)
            .ok_or("unknown evidence")
    }
}

/// Text forms, where serde's own form would not be the one that people read.
mod display {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<T: Display, S: Serializer>(
        value: &T,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(super) fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}
