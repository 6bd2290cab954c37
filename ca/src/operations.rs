//! What an administrator may do to a running CA.
//!
//! Each change is checked, written to the ledger, and only then put into effect and published; one
//! at a time. Where replicas share their keys, it is also written there in between, and checked anew
//! when another replica was faster. The socket and the library's own callers come through here alike.
//!
//! Invariant: what is in effect is in the ledger of the replica that was asked, and survives a
//! restart.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use sidegate_mesh::spiffe::SpiffeId;
use sidegate_mtls::{BundleError, TrustUpdate};
use tonic::{Code, Status};
use zeroize::Zeroizing;

use crate::authority::{Root, unix_moment, unix_seconds};
use crate::digest::{Digest, NoRandomness, Serial, random, to_hex};
use crate::issuer::{ATTEMPTS, Issuer, OWN_LIFETIME_MIN, RenewalError};
use crate::key::Key;
use crate::keystore::KeyStoreError;
use crate::ledger::{Event, LedgerError, Token};
use crate::registry::{CONTROL_PLANE, RootState};

/// Longest life of a join token.
pub const TOKEN_LIFETIME_MAX: Duration = Duration::from_hours(24);

/// How far the clocks of two replicas may be apart, and a certificate be backdated.
const CLOCKS_APART: Duration = Duration::from_mins(10);

/// Most identities that one message names.
const NAMED_MAX: usize = 5;

/// Why an administrator's wish was not fulfilled. Nothing has changed then, unless said.
#[derive(Debug, thiserror::Error)]
pub enum OperationError {
    /// The wish makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// There is no such thing.
    #[error("{0}")]
    NotFound(String),
    /// Not now.
    #[error("{0}")]
    Precondition(String),
    /// A bound is reached.
    #[error("{0}")]
    Full(String),
    /// It cannot be recorded.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// Keys cannot be read or written.
    #[error(transparent)]
    Keys(#[from] KeyStoreError),
    /// It is recorded, but not all of it is in effect yet; the CA goes on trying.
    #[error("it is recorded, but not complete yet: {0}")]
    Incomplete(String),
}

impl OperationError {
    /// The only mapping from failure to gRPC status; every variant is listed so a new one must
    /// choose.
    pub fn status(&self) -> Status {
        let code = match self {
            Self::Invalid(_) => Code::InvalidArgument,
            Self::NotFound(_) => Code::NotFound,
            Self::Precondition(_) => Code::FailedPrecondition,
            Self::Full(_) => Code::ResourceExhausted,
            Self::Ledger(_) | Self::Keys(_) | Self::Incomplete(_) => Code::Unavailable,
        };
        Status::new(code, self.to_string())
    }
}

impl From<NoRandomness> for OperationError {
    fn from(error: NoRandomness) -> Self {
        Self::Incomplete(error.to_string())
    }
}

impl From<BundleError> for OperationError {
    fn from(error: BundleError) -> Self {
        Self::Incomplete(error.to_string())
    }
}

impl From<RenewalError> for OperationError {
    fn from(error: RenewalError) -> Self {
        Self::Incomplete(error.to_string())
    }
}

/// A new join token. The secret is nowhere else.
pub struct CreatedToken {
    /// Public part.
    pub id: String,
    /// All of it: `sgt_<id>_<secret>`.
    pub token: Zeroizing<String>,
    /// The identity that it proves.
    pub spiffe_id: SpiffeId,
    /// When it ends.
    pub expires: SystemTime,
}

impl std::fmt::Debug for CreatedToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CreatedToken")
            .field("id", &self.id)
            .field("spiffe_id", &self.spiffe_id)
            .finish_non_exhaustive()
    }
}

impl Issuer {
    /// Makes a join token.
    ///
    /// # Errors
    ///
    /// [`OperationError`] when a name is not allowed, the life is too long, or there are too many.
    pub async fn create_token(
        &self,
        namespace: &str,
        service_account: &str,
        lifetime: Option<Duration>,
    ) -> Result<CreatedToken, OperationError> {
        if self.cluster.is_some() {
            return Err(OperationError::Precondition(
                "in a cluster a join token is never evidence: a pod proves its identity with its \
                 service account's token; label its namespace `sidegate.dev/inject: enabled` and \
                 start it again"
                    .to_owned(),
            ));
        }
        let _held = self.change.lock().await;
        let invalid = |text: String| OperationError::Invalid(text);
        let trust_domain = &self.config.trust_domain;
        let id = SpiffeId::for_workload(trust_domain, namespace, service_account)
            .map_err(|error| invalid(format!("{namespace}/{service_account}: {error}")))?;
        if namespace == CONTROL_PLANE {
            return Err(invalid(format!(
                "a join token cannot name {CONTROL_PLANE}: its identities are the control plane's"
            )));
        }
        let lifetime = lifetime.unwrap_or(self.config.token_lifetime);
        if lifetime < Duration::from_secs(1) || lifetime > TOKEN_LIFETIME_MAX {
            return Err(invalid("a join token lives between 1s and 24h".to_owned()));
        }
        let now = self.clock.now();
        {
            let mut registry = self.registry();
            registry.prune(now);
            let max = self.config.limits.tokens_max;
            if registry.tokens(now).len() >= max {
                return Err(OperationError::Full(format!(
                    "there are {max} join tokens already; wait until some have expired"
                )));
            }
            if registry.revoked_ids().contains_key(&id) {
                return Err(OperationError::Precondition(format!(
                    "{id} is revoked; run `sidegate-ca reinstate {id}` first"
                )));
            }
        }
        let secret = Zeroizing::new(random::<32>()?);
        let secret = Zeroizing::new(to_hex(&*secret));
        let token = Token {
            token: to_hex(&random::<8>()?),
            spiffe_id: id.clone(),
            secret_sha256: Digest::of(secret.as_bytes()),
            expires: unix_seconds(now + lifetime),
        };
        let created = CreatedToken {
            token: Zeroizing::new(format!("sgt_{}_{}", token.token, &*secret)),
            id: token.token.clone(),
            spiffe_id: id,
            expires: unix_moment(token.expires),
        };
        self.write(Event::TokenCreated(token)).await?;
        tracing::info!(token = created.id, peer.id = %created.spiffe_id, "join token created");
        Ok(created)
    }

    /// Makes a token unusable.
    ///
    /// # Errors
    ///
    /// [`OperationError::NotFound`] when there is none with that id.
    pub async fn revoke_token(&self, id: &str) -> Result<(), OperationError> {
        let _held = self.change.lock().await;
        if !self.registry().has_token(id) {
            return Err(OperationError::NotFound(format!(
                "no join token {id}; `sidegate-ca token list` shows those that are not expired"
            )));
        }
        let token = id.to_owned();
        self.write(Event::TokenRevoked { token }).await?;
        tracing::info!(token = id, "join token revoked");
        Ok(())
    }

    /// Revokes an identity with all of its certificates; returns the bundle's sequence.
    ///
    /// # Errors
    ///
    /// [`OperationError`].
    pub async fn revoke_identity(&self, text: &str) -> Result<u64, OperationError> {
        let _held = self.change.lock().await;
        let spiffe_id = self.workload_id(text)?;
        let decide = || {
            if self.registry().revoked_ids().contains_key(&spiffe_id) {
                return Ok(None);
            }
            self.require_room(1)?;
            Ok(Some(Event::IdentityRevoked {
                spiffe_id: spiffe_id.clone(),
                sequence: self.next_sequence(),
            }))
        };
        let sequence = self.commit(decide, None).await?;
        tracing::warn!(peer.id = text, sequence, "identity revoked");
        Ok(sequence)
    }

    /// Revokes one certificate; returns the bundle's sequence.
    ///
    /// # Errors
    ///
    /// [`OperationError::NotFound`] when no certificate in date has that serial number.
    pub async fn revoke_serial(&self, text: &str) -> Result<u64, OperationError> {
        let _held = self.change.lock().await;
        let plain = text.replace(':', "").to_lowercase();
        let serial: Serial = plain.parse().map_err(|_hex| {
            OperationError::Invalid(format!("{text} is no serial number: 32 hexadecimal digits"))
        })?;
        let not_after = self.end_of(serial)?;
        let decide = || {
            let registry = self.registry();
            let revoked = registry.revoked_serials().any(|revoked| *revoked == serial);
            drop(registry);
            if revoked {
                return Ok(None);
            }
            self.require_room(1)?;
            Ok(Some(Event::SerialRevoked {
                serial,
                not_after,
                sequence: self.next_sequence(),
            }))
        };
        let sequence = self.commit(decide, None).await?;
        tracing::warn!(%serial, sequence, "certificate revoked");
        Ok(sequence)
    }

    /// When the certificate with that serial number ends, in Unix seconds; at the latest, for one
    /// that another replica may have issued.
    fn end_of(&self, serial: Serial) -> Result<u64, OperationError> {
        let certificate = self.registry().certificate(&serial).cloned();
        let workload = certificate.filter(|known| known.spiffe_id.workload().is_some());
        if let Some(certificate) = workload {
            self.workload_id(certificate.spiffe_id.as_str())?;
            return Ok(certificate.not_after);
        }
        let signs = self.intermediate().has_serial(serial);
        if self.cluster.is_some() && !signs {
            let latest = self.clock.now() + self.config.leaf_lifetime.max(OWN_LIFETIME_MIN);
            return Ok(unix_seconds(latest));
        }
        Err(OperationError::NotFound(format!(
            "no certificate in date has serial number {serial}; `sidegate-ca issued` shows all"
        )))
    }

    /// Accepts an identity again. Its certificates of before stay revoked.
    ///
    /// # Errors
    ///
    /// [`OperationError::NotFound`] when it is not revoked.
    pub async fn reinstate(&self, text: &str) -> Result<u64, OperationError> {
        let _held = self.change.lock().await;
        let spiffe_id = self.workload_id(text)?;
        let decide = || {
            let since = self.registry().revoked_ids().get(&spiffe_id).copied();
            let since = since
                .ok_or_else(|| OperationError::NotFound(format!("{spiffe_id} is not revoked")))?;
            self.require_ended(since)?;
            let serials: Vec<(Serial, u64)> = {
                let registry = self.registry();
                let certificates = registry.certificates();
                let own = certificates.filter(|certificate| certificate.spiffe_id == spiffe_id);
                own.map(|certificate| (certificate.serial, certificate.not_after))
                    .collect()
            };
            self.require_room(serials.len())?;
            Ok(Some(Event::Reinstated {
                spiffe_id: spiffe_id.clone(),
                serials,
                sequence: self.next_sequence(),
            }))
        };
        let sequence = self.commit(decide, None).await?;
        tracing::warn!(peer.id = text, sequence, "identity reinstated");
        Ok(sequence)
    }

    /// Among replicas nobody knows every certificate of an identity, so its denylist entry stays
    /// until all of them have ended.
    fn require_ended(&self, since: u64) -> Result<(), OperationError> {
        if self.cluster.is_none() {
            return Ok(());
        }
        let end = unix_moment(since) + self.config.leaf_lifetime + CLOCKS_APART;
        if self.clock.now() >= end {
            return Ok(());
        }
        Err(OperationError::Precondition(format!(
            "its certificates of before may be in date until {}; reinstate it then, or give the \
             workload another service account",
            humantime::format_rfc3339_seconds(end)
        )))
    }

    // ---- Roots -------------------------------------------------------------------------------

    /// Puts a root whose key is elsewhere into the bundle.
    ///
    /// # Errors
    ///
    /// [`OperationError`] when it is no root of our trust domain, or in the bundle already.
    pub async fn add_root(&self, pem: &str) -> Result<u64, OperationError> {
        let _held = self.change.lock().await;
        let invalid = |error: &dyn std::fmt::Display| {
            OperationError::Invalid(format!("not a root certificate in PEM: {error}"))
        };
        let der =
            CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| invalid(&error))?;
        let root = Root::check(&der, &self.config.trust_domain, self.clock.now());
        let root = root.map_err(|error| invalid(&error))?;
        self.publish_root(&root, None).await
    }

    /// Makes the next root and publishes it beside the active one.
    ///
    /// # Errors
    ///
    /// [`OperationError::Precondition`] when a rotation is under way.
    pub async fn prepare_root(&self) -> Result<u64, OperationError> {
        let _held = self.change.lock().await;
        self.take_in().await?;
        let key = Key::generate()?;
        let serial = Serial::random()?;
        let now = self.clock.now();
        let failed = |error: &dyn std::fmt::Display| OperationError::Incomplete(error.to_string());
        let der = Root::make(&self.config.trust_domain, &key, serial, now)
            .map_err(|error| failed(&error))?;
        let root = Root::check(&der, &self.config.trust_domain, now);
        let root = root.map_err(|error| failed(&error))?;
        let pem = key.to_pem()?;
        self.require_no_rotation()?;
        self.publish_root(&root, Some(&pem)).await
    }

    fn require_no_rotation(&self) -> Result<(), OperationError> {
        for (state, next) in [
            (RootState::Prepared, "activate it, or remove it, first"),
            (RootState::Retiring, "retire it first"),
        ] {
            if let Some(root) = self.registry().root(state) {
                return Err(OperationError::Precondition(format!(
                    "root {} is {} already; {next}",
                    root.sha256,
                    state.as_str()
                )));
            }
        }
        Ok(())
    }

    /// `key` comes with a root that is to sign one day.
    async fn publish_root(
        &self,
        root: &Root,
        key: Option<&Zeroizing<String>>,
    ) -> Result<u64, OperationError> {
        let own = key.is_some();
        let decide = || {
            if own {
                self.require_no_rotation()?;
            }
            let registry = self.registry();
            if registry
                .roots()
                .iter()
                .any(|known| known.root.sha256 == root.sha256)
            {
                return Err(OperationError::Precondition(format!(
                    "root {} is in the bundle already",
                    root.sha256
                )));
            }
            // Those who receive it must be able to take it.
            let mut message = registry.bundle();
            for bundle in &mut message.bundles {
                bundle.roots.push(root.der.to_vec());
            }
            TrustUpdate::new(message)
                .check(&self.config.trust_domain)
                .map_err(|error| OperationError::Invalid(error.to_string()))?;
            Ok(Some(Event::RootAdded {
                root: BASE64.encode(&root.der),
                own,
                sequence: registry.next_sequence(self.clock.now()),
            }))
        };
        let sequence = self.commit(decide, key).await?;
        tracing::warn!(root = %root.sha256, own, sequence, "root added");
        Ok(sequence)
    }

    /// Signs under the prepared root from now on.
    ///
    /// # Errors
    ///
    /// [`OperationError::Precondition`] unless every sidecar has acknowledged it, or with `force`.
    pub async fn activate_root(self: &Arc<Self>, force: bool) -> Result<u64, OperationError> {
        let _held = self.change.lock().await;
        let decide = || {
            let prepared = self.registry().root(RootState::Prepared).cloned();
            let prepared = prepared.ok_or_else(|| {
                OperationError::Precondition(
                    "no root is prepared; run `sidegate-ca root prepare` first".to_owned(),
                )
            })?;
            let waiting = self.waiting_for(&prepared);
            if let Some(waiting) = &waiting {
                if !force {
                    return Err(OperationError::Precondition(format!(
                        "{waiting}; wait for them, or override with --force"
                    )));
                }
                tracing::warn!(waiting, "root activated by force");
            }
            Ok(Some(Event::RootActivated {
                sha256: prepared.sha256,
                forced: waiting.is_some(),
            }))
        };
        let sequence = self.commit(decide, None).await?;
        tracing::warn!(sequence, "root activated");
        self.renew_intermediate().await?;
        self.renew_own().await?;
        Ok(sequence)
    }

    fn waiting_for(&self, prepared: &Root) -> Option<String> {
        let mut registry = self.registry();
        registry.prune(self.clock.now());
        let watchers = self.watchers();
        let sequence = registry.sequence();
        let missing = watchers.missing(&registry, sequence, Some(prepared.sha256));
        let anonymous = watchers.missing_anonymous(sequence);
        let named: Vec<&str> = missing
            .iter()
            .take(NAMED_MAX)
            .map(SpiffeId::as_str)
            .collect();
        let mut waiting = Vec::new();
        if !named.is_empty() {
            let more = if missing.len() > NAMED_MAX {
                ", …"
            } else {
                ""
            };
            waiting.push(format!(
                "{} identities have not acknowledged bundle {sequence}: {}{more}",
                missing.len(),
                named.join(", ")
            ));
        }
        if anonymous > 0 {
            waiting.push(format!(
                "{anonymous} callers without a certificate have not acknowledged bundle {sequence}"
            ));
        }
        let added = registry
            .roots()
            .into_iter()
            .find(|known| self.cluster.is_some() && known.root.sha256 == prepared.sha256);
        if let Some(added) = added {
            let end = unix_moment(added.added) + self.config.leaf_lifetime + CLOCKS_APART;
            if self.clock.now() < end {
                waiting.push(format!(
                    "certificates from before the root was prepared may be in date until {}",
                    humantime::format_rfc3339_seconds(end)
                ));
            }
        }
        (!waiting.is_empty()).then(|| waiting.join("; "))
    }

    /// Takes the former root out of the bundle.
    ///
    /// # Errors
    ///
    /// [`OperationError::Precondition`] while a certificate under it is in date, or with `force`.
    pub async fn retire_root(&self, force: bool) -> Result<u64, OperationError> {
        let retiring = self
            .registry()
            .root(RootState::Retiring)
            .map(|root| root.sha256);
        let retiring = retiring.ok_or_else(|| {
            OperationError::Precondition(
                "no root is retiring; `sidegate-ca root list` shows all".to_owned(),
            )
        })?;
        self.remove(retiring, force).await
    }

    /// Takes a root out of the bundle.
    ///
    /// # Errors
    ///
    /// [`OperationError::Precondition`] when it signs, or a certificate under it is in date.
    pub async fn remove_root(&self, text: &str) -> Result<u64, OperationError> {
        let sha256 = text.parse().map_err(|_hex| {
            OperationError::Invalid(format!("{text} is no SHA-256: 64 hexadecimal digits"))
        })?;
        self.remove(sha256, false).await
    }

    async fn remove(&self, sha256: Digest, force: bool) -> Result<u64, OperationError> {
        let _held = self.change.lock().await;
        let decide = || {
            let known = self.registry().roots();
            let known = known.iter().find(|known| known.root.sha256 == sha256);
            let state = known.map(|known| known.state).ok_or_else(|| {
                OperationError::NotFound(format!(
                    "no root {sha256} in the bundle; `sidegate-ca root list` shows all"
                ))
            })?;
            if state == RootState::Active {
                return Err(OperationError::Precondition(
                    "this root signs; activate another one first".to_owned(),
                ));
            }
            let in_use = self.in_use(sha256);
            if let Some(in_use) = &in_use
                && !force
            {
                return Err(OperationError::Precondition(format!(
                    "{in_use}; wait until then, or override with `root retire --force`"
                )));
            }
            Ok(Some(Event::RootRemoved {
                sha256,
                forced: in_use.is_some(),
                sequence: self.next_sequence(),
            }))
        };
        let sequence = self.commit(decide, None).await?;
        tracing::warn!(root = %sha256, sequence, "root removed");
        Ok(sequence)
    }

    /// What is still in use under a root.
    fn in_use(&self, sha256: Digest) -> Option<String> {
        if self.intermediate().root_sha256 == sha256 {
            return Some("the intermediate is not renewed under the new root yet".to_owned());
        }
        let mut registry = self.registry();
        registry.prune(self.clock.now());
        let revoked = |serial: &Serial| registry.revoked_serials().any(|other| other == serial);
        let ends: Vec<u64> = registry
            .certificates()
            .filter(|certificate| certificate.root_sha256 == sha256)
            .filter(|certificate| is_workload(&certificate.spiffe_id))
            .filter(|certificate| !registry.revoked_ids().contains_key(&certificate.spiffe_id))
            .filter(|certificate| !revoked(&certificate.serial))
            .map(|certificate| certificate.not_after)
            .collect();
        if self.cluster.is_some() {
            return self.in_use_among_replicas();
        }
        let last = ends.iter().max()?;
        Some(format!(
            "{} certificates under this root are in date, the last until {}",
            ends.len(),
            humantime::format_rfc3339_seconds(unix_moment(*last))
        ))
    }

    /// No replica knows what the others have issued under the former root. All of it has ended
    /// one leaf's life after the present intermediate began to sign.
    fn in_use_among_replicas(&self) -> Option<String> {
        let began = self.intermediate().not_before;
        let end = began + self.config.leaf_lifetime + CLOCKS_APART;
        (self.clock.now() < end).then(|| {
            format!(
                "certificates under this root may be in date until {}",
                humantime::format_rfc3339_seconds(end)
            )
        })
    }

    // ---- Steps ---------------------------------------------------------------------------------

    /// Decides on what is known now, and puts it into effect; decides anew when another replica was
    /// faster. Returns the bundle's sequence. Hold [`Self::change`].
    async fn commit(
        &self,
        decide: impl Fn() -> Result<Option<Event>, OperationError> + Send + Sync,
        next: Option<&Zeroizing<String>>,
    ) -> Result<u64, OperationError> {
        for _ in 0..ATTEMPTS {
            self.take_in().await?;
            let Some(event) = decide()? else {
                return Ok(self.registry().sequence());
            };
            if let Some(next) = next {
                self.keys.stage(next).await?;
            }
            match self.share(&event, next).await {
                Ok(()) => {}
                Err(OperationError::Keys(KeyStoreError::Conflict)) => continue,
                Err(error) => {
                    if next.is_some() {
                        self.settle().await?;
                    }
                    return Err(error);
                }
            }
            let sequence = self.publish()?;
            if is_about_roots(&event) {
                self.settle().await?;
            }
            return Ok(sequence);
        }
        Err(KeyStoreError::Conflict.into())
    }

    /// The ledger, then the keys that replicas share, then our own memory.
    async fn share(
        &self,
        event: &Event,
        next: Option<&Zeroizing<String>>,
    ) -> Result<(), OperationError> {
        self.ledger.append(event.clone()).await?;
        let after = self.registry().shared_after(event);
        if let Err(error) = self.keys.share(&after, next).await {
            let abandoned = Event::Abandoned {
                sequence: after.sequence,
                reason: error.to_string(),
            };
            self.ledger.append(abandoned).await?;
            return Err(error.into());
        }
        self.registry().apply(event);
        Ok(())
    }

    async fn settle(&self) -> Result<(), KeyStoreError> {
        let roots = self.registry().roots_only();
        self.keys.settle(roots).await
    }

    async fn write(&self, event: Event) -> Result<(), LedgerError> {
        self.ledger.append(event.clone()).await?;
        self.registry().apply(&event);
        Ok(())
    }

    fn next_sequence(&self) -> u64 {
        self.registry().next_sequence(self.clock.now())
    }

    fn require_room(&self, entries: usize) -> Result<(), OperationError> {
        let max = self.config.limits.revocations_max;
        let mut registry = self.registry();
        registry.prune(self.clock.now());
        if registry.revocations() + entries > max {
            return Err(OperationError::Full(format!(
                "the denylist has {max} entries already; revoke the identity instead of its \
                 serial numbers"
            )));
        }
        Ok(())
    }

    /// An identity of ours that an administrator may revoke.
    fn workload_id(&self, text: &str) -> Result<SpiffeId, OperationError> {
        let invalid =
            |problem: &dyn std::fmt::Display| OperationError::Invalid(format!("{text}: {problem}"));
        let id: SpiffeId = text.parse().map_err(|error| invalid(&error))?;
        if id.trust_domain() != self.config.trust_domain.as_str() {
            return Err(invalid(&format_args!(
                "this CA is of trust domain {}",
                self.config.trust_domain
            )));
        }
        if !is_workload(&id) {
            return Err(invalid(
                &"not a workload of the form spiffe://…/ns/NAMESPACE/sa/NAME",
            ));
        }
        Ok(id)
    }
}

fn is_about_roots(event: &Event) -> bool {
    matches!(
        event,
        Event::RootAdded { .. } | Event::RootActivated { .. } | Event::RootRemoved { .. }
    )
}

fn is_workload(id: &SpiffeId) -> bool {
    id.workload()
        .is_some_and(|(namespace, _)| namespace != CONTROL_PLANE)
}
