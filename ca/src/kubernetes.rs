//! The CA in a cluster: keys in a Secret, evidence from pods, the bundle in ConfigMaps.
//!
//! Invariants: an identity is given to a live pod only, looked at anew for each certificate; the
//! root is made once, and a bundle without its key is an error; what the API server says is asked
//! for with a bound, and no answer is never taken for a good one.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use tokio_util::sync::CancellationToken;

use crate::config::Kubernetes;
use crate::issuer::Issuer;
use crate::kubernetes::attest::Attestor;

pub mod attest;
pub mod bundle;
pub mod secret;
pub mod token;

/// Longest wait for one answer of the API server.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Whose changes ours are, for server-side apply.
pub(crate) const FIELD_MANAGER: &str = "sidegate-ca";

/// What a CA in a cluster has besides its keys.
pub(crate) struct Cluster {
    pub(crate) client: Client,
    pub(crate) settings: Kubernetes,
    pub(crate) attestor: Attestor,
}

/// Why the API server did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// There is no configuration for it: neither a pod's own, nor a kubeconfig.
    #[error("cannot tell where the Kubernetes API is: {0}")]
    Unknown(String),
    /// It refuses.
    #[error("the Kubernetes API refuses to {what}: {message}{}", remedy(*code, message))]
    Refused {
        /// What was asked.
        what: &'static str,
        /// The HTTP status.
        code: u16,
        /// Its words.
        message: String,
    },
    /// It cannot be reached, or its answer cannot be read.
    #[error("cannot {what}: the Kubernetes API does not answer: {message}")]
    Unreachable {
        /// What was asked.
        what: &'static str,
        /// What the network says.
        message: String,
    },
}

impl ApiError {
    /// The HTTP status, if there was an answer.
    pub(crate) fn code(&self) -> Option<u16> {
        match self {
            Self::Refused { code, .. } => Some(*code),
            Self::Unknown(_) | Self::Unreachable { .. } => None,
        }
    }

    pub(crate) fn is_not_found(&self) -> bool {
        self.code() == Some(404)
    }

    pub(crate) fn is_conflict(&self) -> bool {
        self.code() == Some(409)
    }

    /// Whether the same question may be answered a little later.
    pub(crate) fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Refused { code, .. } => *code == 429 || *code >= 500,
            Self::Unknown(_) => false,
        }
    }
}

/// RBAC says `cannot`; an admission policy or a namespace that ends has words of its own.
fn remedy(code: u16, message: &str) -> &'static str {
    if code == 401 || (code == 403 && message.contains(" cannot ")) {
        "; the CA's ServiceAccount lacks its Role: apply `sidegate install` again"
    } else {
        ""
    }
}

/// A client for the cluster that this process runs in, or that its kubeconfig names.
///
/// # Errors
///
/// [`ApiError::Unknown`].
pub(crate) async fn client() -> Result<Client, ApiError> {
    let unknown = |error: &dyn std::fmt::Display| ApiError::Unknown(error.to_string());
    let mut config = kube::Config::infer()
        .await
        .map_err(|error| unknown(&error))?;
    config.connect_timeout = Some(ANSWER_TIMEOUT);
    Client::try_from(config).map_err(|error| unknown(&error))
}

/// One question to the API server, with a bound.
///
/// # Errors
///
/// [`ApiError`].
pub(crate) async fn ask<T>(
    what: &'static str,
    question: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, ApiError> {
    let unreachable = |message: String| ApiError::Unreachable { what, message };
    match tokio::time::timeout(ANSWER_TIMEOUT, question).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(kube::Error::Api(status))) => Err(ApiError::Refused {
            what,
            code: status.code,
            message: status.message,
        }),
        Ok(Err(error)) => Err(unreachable(with_sources(&error))),
        Err(_elapsed) => Err(unreachable(format!(
            "no answer within {} s",
            ANSWER_TIMEOUT.as_secs()
        ))),
    }
}

/// Takes in what other replicas change, until `cancel`.
///
/// The Secret's version is read again and again rather than watched: a watch that has died in
/// silence would delay a revocation without anybody seeing it, and a read needs no permission that
/// the CA does not have anyway.
pub(crate) async fn follow(issuer: Arc<Issuer>, cancel: CancellationToken) {
    let Some(cluster) = issuer.cluster.as_ref().map(Arc::clone) else {
        return;
    };
    let mut failing = false;
    loop {
        let look = async {
            issuer.clock.sleep(cluster.settings.refresh_interval).await;
            issuer.follow().await
        };
        let looked = tokio::select! {
            () = cancel.cancelled() => return,
            looked = look => looked,
        };
        issuer.metrics.keys_read(looked.is_ok());
        match looked {
            Ok(()) if failing => tracing::info!("what replicas share can be read again"),
            Ok(()) => {}
            Err(error) => {
                issuer.metrics.kubernetes_failed("keys");
                if !failing {
                    tracing::error!(
                        error = %error,
                        "what replicas share cannot be read; this one goes on with what it has"
                    );
                }
                failing = true;
                continue;
            }
        }
        failing = false;
    }
}

fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
