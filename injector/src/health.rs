//! The health port: is it ready, does it live, what did it count.
//!
//! Invariants: ready means that a pod can be injected now; not alive means that only a new start
//! can help: our certificate has ended, and the roots that the CA is known by are others than those
//! that we started with.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sidegate_mtls::{BoxFuture, CredentialStore, IdentityStatus};

use crate::ca_bundle::CaBundle;
use crate::connections::Connections;
use crate::metrics::{Metrics, Readings};
use crate::namespaces::NamespaceWatch;

/// What the health port looks at.
pub(crate) struct Health {
    pub(crate) store: Arc<CredentialStore>,
    pub(crate) identity: Arc<IdentityStatus>,
    pub(crate) namespaces: Arc<NamespaceWatch>,
    pub(crate) bundles: [Arc<CaBundle>; 2],
    pub(crate) connections: Arc<Connections>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) root_file: PathBuf,
    /// The root file as it was at the start.
    pub(crate) root: Vec<u8>,
    pub(crate) is_ending: AtomicBool,
}

impl Health {
    async fn is_stranded(&self) -> bool {
        if self.store.own_svid_is_trusted().is_ok() {
            return false;
        }
        let now = tokio::fs::read(&self.root_file).await;
        now.is_ok_and(|now| now != self.root)
    }

    fn readings(&self) -> Readings {
        let current = self.store.current();
        Readings {
            connections: self.connections.len(),
            namespaces: self.namespaces.len(),
            not_after: current.map(|current| current.svid().not_after),
            renewals_failed: self.identity.snapshot().renewals_failed,
        }
    }
}

impl sidegate_mtls::Health for Health {
    fn missing(&self) -> Vec<String> {
        let mut missing = Vec::new();
        if self.is_ending.load(Ordering::Acquire) {
            missing.push("it ends".to_owned());
        }
        if let Err(error) = self.store.own_svid_is_trusted() {
            let why = self.identity.snapshot().last_error;
            let mut text = format!("no usable certificate: {error}");
            if let Some(why) = why {
                // Writing to a String cannot fail.
                write!(text, " ({why})").ok();
            }
            missing.push(text);
        }
        if !self.namespaces.is_synced() {
            missing.push("the namespaces are not known yet".to_owned());
        }
        if !self.bundles.iter().all(|bundle| bundle.is_settled()) {
            missing.push("the webhook configurations do not have our roots yet".to_owned());
        }
        missing
    }

    fn stranded(&self) -> BoxFuture<'_, Option<String>> {
        Box::pin(async {
            let why = "the CA's roots have changed since the start, and the certificate has ended";
            self.is_stranded().await.then(|| why.to_owned())
        })
    }

    fn metrics(&self) -> Result<String, std::fmt::Error> {
        self.metrics.text(&self.readings())
    }

    fn turned_away(&self) {
        self.metrics.connection_refused("health_connections_max");
    }
}
