//! The Secret that holds the CA's keys, and what its replicas have in common.
//!
//! | key | what |
//! |---|---|
//! | `root.pem` | every root in the bundle, the active one first |
//! | `root.key`, `root-next.key`, `root-old.key` | keys of the active, the prepared and the retiring root |
//! | `intermediate.pem`, `intermediate.key` | what signs leaves, in all replicas |
//! | `state.json` | sequence, the roots' states, revocations |
//!
//! Invariants: the Secret is created once, and never because it is missing from an installation
//! that has begun; a change names the version that it was made from, so of two replicas one is told
//! to look again; what is read is checked as a whole before any of it is used.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use futures_util::future::BoxFuture;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use sidegate_mesh::clock::Clock;
use sidegate_mesh::spiffe::{SpiffeId, TrustDomain};
use zeroize::{Zeroize, Zeroizing};

use crate::authority::{self, Intermediate, Root, RootProblem, certificates_of_pem};
use crate::config::Kubernetes;
use crate::digest::{Digest, NoRandomness, Serial};
use crate::key::Key;
use crate::keystore::{KeyStore, KeyStoreError, News};
use crate::kubernetes::{ApiError, FIELD_MANAGER, ask};
use crate::registry::{Registry, RootState, Shared, TrustedRoot};
use crate::roots::{INTERMEDIATE, INTERMEDIATE_KEY, ROOT, ROOT_KEY, ROOT_NEXT_KEY, ROOT_OLD_KEY};

/// What is common to the replicas, besides keys and certificates.
const STATE: &str = "state.json";
/// The form of [`STATE`] that this version writes and reads.
const STATE_VERSION: u32 = 1;
/// A Secret has at most 1 MiB; this leaves room for keys and certificates.
const STATE_BYTES_MAX: usize = 900 * 1024;

const NAMES: [&str; 7] = [
    ROOT,
    ROOT_KEY,
    ROOT_NEXT_KEY,
    ROOT_OLD_KEY,
    INTERMEDIATE,
    INTERMEDIATE_KEY,
    STATE,
];

/// Which key belongs to a root in that state; none for a root whose key is elsewhere.
fn key_name(state: RootState) -> Option<&'static str> {
    match state {
        RootState::Active => Some(ROOT_KEY),
        RootState::Prepared => Some(ROOT_NEXT_KEY),
        RootState::Retiring => Some(ROOT_OLD_KEY),
        RootState::Added => None,
    }
}

/// Why the Secret cannot be used. Nothing is made anew then.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The API server does not do it.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// It is gone, although the installation has begun.
    #[error(
        "{secret} is missing, although {witness} says that this installation has begun; restore the Secret from a backup (`kubectl apply -f BACKUP`). A CA never makes a second root by itself: to begin again, with new certificates for every pod, {again}"
    )]
    Missing {
        /// The Secret.
        secret: String,
        /// What says that it was there.
        witness: String,
        /// How to begin again.
        again: String,
    },
    /// A piece of it is missing, damaged, or another's.
    #[error("{secret}, key {key}: {problem}; restore the Secret from a backup")]
    Piece {
        /// The Secret.
        secret: String,
        /// Which of its keys.
        key: String,
        /// What is wrong.
        problem: String,
    },
    /// It is another CA's now.
    #[error(
        "{secret} holds the roots of another CA, none of which is ours; restore the Secret from a backup of this installation"
    )]
    Foreign {
        /// The Secret.
        secret: String,
    },
    /// It would be larger than a Secret may be.
    #[error(
        "{secret} would have {bytes} bytes of revocations, more than a Secret may hold; revoke identities instead of serial numbers"
    )]
    TooLarge {
        /// The Secret.
        secret: String,
        /// How many.
        bytes: usize,
    },
    /// A key could not be made or written out.
    #[error(transparent)]
    Random(#[from] NoRandomness),
    /// The cryptographic library refused.
    #[error("signing failed: {0}")]
    Sign(#[from] rcgen::Error),
    /// The root that was made is not one that we take.
    #[error("the new root failed its own check: {0}")]
    Root(RootProblem),
}

/// What a Secret holds, checked.
pub struct Stored {
    /// Roots, revocations and the bundle's sequence.
    pub shared: Shared,
    /// By the SHA-256 of the public key.
    keys: BTreeMap<Digest, Key>,
    /// What signs; absent before the first, and after its root was removed.
    intermediate: Option<Intermediate>,
}

/// A problem with one key of the Secret.
type Problem = (String, String);

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct State {
    version: u32,
    trust_domain: TrustDomain,
    sequence: u64,
    roots: Vec<RootEntry>,
    revoked_identities: BTreeMap<SpiffeId, u64>,
    revoked_serials: BTreeMap<Serial, u64>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct RootEntry {
    sha256: Digest,
    state: RootState,
    added: u64,
}

impl Stored {
    /// Makes a CA's first root.
    fn first(trust_domain: &TrustDomain, now: SystemTime) -> Result<Self, SecretError> {
        let key = Key::generate()?;
        let der = Root::make(trust_domain, &key, Serial::random()?, now)?;
        let root = Root::check(&der, trust_domain, now).map_err(SecretError::Root)?;
        let registry = Registry::new(trust_domain.clone());
        let sequence = registry.next_sequence(now);
        Ok(Self {
            keys: BTreeMap::from([(root.public_key_sha256, key)]),
            shared: Shared {
                sequence,
                roots: vec![TrustedRoot {
                    root,
                    state: RootState::Active,
                    added: sequence,
                }],
                revoked_ids: BTreeMap::new(),
                revoked_serials: BTreeMap::new(),
            },
            intermediate: None,
        })
    }

    /// Reads and checks all of it.
    fn decode(
        data: &BTreeMap<String, ByteString>,
        trust_domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<Self, Problem> {
        let unknown = data.keys().find(|key| !NAMES.contains(&key.as_str()));
        if let Some(key) = unknown {
            return Err((key.clone(), "a CA knows no such key".to_owned()));
        }
        let state = decode_state(data, trust_domain)?;
        let roots = decode_roots(data, &state, trust_domain, now)?;
        let keys = decode_keys(data, &roots)?;
        let intermediate = decode_intermediate(data, &roots, trust_domain)?;
        Ok(Self {
            shared: Shared {
                sequence: state.sequence,
                roots,
                revoked_ids: state.revoked_identities,
                revoked_serials: state.revoked_serials,
            },
            keys,
            intermediate,
        })
    }

    fn encode(
        &self,
        place: &str,
        trust_domain: &TrustDomain,
    ) -> Result<BTreeMap<String, ByteString>, SecretError> {
        let entry = |known: &TrustedRoot| RootEntry {
            sha256: known.root.sha256,
            state: known.state,
            added: known.added,
        };
        let state = State {
            version: STATE_VERSION,
            trust_domain: trust_domain.clone(),
            sequence: self.shared.sequence,
            roots: self.shared.roots.iter().map(entry).collect(),
            revoked_identities: self.shared.revoked_ids.clone(),
            revoked_serials: self.shared.revoked_serials.clone(),
        };
        let piece = |error: &dyn std::fmt::Display| SecretError::Piece {
            secret: place.to_owned(),
            key: STATE.to_owned(),
            problem: error.to_string(),
        };
        let state = serde_json::to_vec(&state).map_err(|error| piece(&error))?;
        if state.len() > STATE_BYTES_MAX {
            return Err(SecretError::TooLarge {
                secret: place.to_owned(),
                bytes: state.len(),
            });
        }
        let mut data = BTreeMap::from([(STATE.to_owned(), ByteString(state))]);
        let roots = &self.shared.roots;
        let pem: String = roots
            .iter()
            .map(|r| authority::to_pem(&r.root.der))
            .collect();
        data.insert(ROOT.to_owned(), ByteString(pem.into_bytes()));
        for known in roots {
            let key = self.keys.get(&known.root.public_key_sha256);
            if let (Some(name), Some(key)) = (key_name(known.state), key) {
                data.insert(name.to_owned(), secret_bytes(key)?);
            }
        }
        let of_ours = |i: &&Intermediate| roots.iter().any(|r| r.root.sha256 == i.root_sha256);
        if let Some(intermediate) = self.intermediate.as_ref().filter(of_ours) {
            let pem = authority::to_pem(&intermediate.der);
            data.insert(INTERMEDIATE.to_owned(), ByteString(pem.into_bytes()));
            let key = secret_bytes(intermediate.key())?;
            data.insert(INTERMEDIATE_KEY.to_owned(), key);
        }
        Ok(data)
    }
}

fn secret_bytes(key: &Key) -> Result<ByteString, NoRandomness> {
    Ok(ByteString(key.to_pem()?.as_bytes().to_vec()))
}

fn problem(key: &str, text: impl std::fmt::Display) -> Problem {
    (key.to_owned(), text.to_string())
}

fn piece<'a>(data: &'a BTreeMap<String, ByteString>, key: &str) -> Result<&'a [u8], Problem> {
    let bytes = data.get(key).map(|bytes| bytes.0.as_slice());
    bytes.ok_or_else(|| problem(key, "it is missing"))
}

fn decode_state(
    data: &BTreeMap<String, ByteString>,
    trust_domain: &TrustDomain,
) -> Result<State, Problem> {
    let state = serde_json::from_slice::<State>(piece(data, STATE)?);
    let state = state.map_err(|error| problem(STATE, error))?;
    if state.version != STATE_VERSION {
        let text = format!("form {} is a newer version's", state.version);
        return Err(problem(STATE, text));
    }
    if state.trust_domain != *trust_domain {
        let found = &state.trust_domain;
        let text = format!(
            "it is trust domain {found}'s, and the configuration says {trust_domain}; change \
             trustDomain, or"
        );
        return Err(problem(STATE, text));
    }
    for once in [RootState::Active, RootState::Prepared, RootState::Retiring] {
        let count = state.roots.iter().filter(|root| root.state == once).count();
        if count > 1 || (once == RootState::Active && count == 0) {
            return Err(problem(
                STATE,
                format!("{count} roots are {}", once.as_str()),
            ));
        }
    }
    Ok(state)
}

fn decode_roots(
    data: &BTreeMap<String, ByteString>,
    state: &State,
    trust_domain: &TrustDomain,
    now: SystemTime,
) -> Result<Vec<TrustedRoot>, Problem> {
    let certificates = certificates_of_pem(Path::new(ROOT), piece(data, ROOT)?);
    let certificates = certificates.map_err(|text| problem(ROOT, text))?;
    let listed: BTreeSet<Digest> = state.roots.iter().map(|entry| entry.sha256).collect();
    let present: BTreeSet<Digest> = certificates.iter().map(|der| Digest::of(der)).collect();
    if listed != present || certificates.len() != state.roots.len() {
        let text = format!("its certificates are not those that {STATE} names");
        return Err(problem(ROOT, text));
    }
    let mut roots = Vec::new();
    for entry in &state.roots {
        let der = certificates
            .iter()
            .find(|der| Digest::of(der) == entry.sha256);
        let der = der
            .cloned()
            .ok_or_else(|| problem(ROOT, "a root is missing"))?;
        let root = if entry.state == RootState::Active {
            Root::check(&der, trust_domain, now)
        } else {
            Root::parse(&der, trust_domain)
        };
        roots.push(TrustedRoot {
            root: root.map_err(|error| problem(ROOT, error))?,
            state: entry.state,
            added: entry.added,
        });
    }
    Ok(roots)
}

fn decode_keys(
    data: &BTreeMap<String, ByteString>,
    roots: &[TrustedRoot],
) -> Result<BTreeMap<Digest, Key>, Problem> {
    let mut keys = BTreeMap::new();
    for name in [ROOT_KEY, ROOT_NEXT_KEY, ROOT_OLD_KEY] {
        let mut owners = roots.iter().filter(|r| key_name(r.state) == Some(name));
        let (owner, bytes) = match (owners.next(), data.get(name)) {
            (None, None) => continue,
            (None, Some(_)) => return Err(problem(name, "no root has such a key")),
            (Some(_), None) => return Err(problem(name, "it is missing")),
            (Some(owner), Some(bytes)) => (owner, bytes),
        };
        let key = Key::from_pem(&bytes.0).map_err(|error| problem(name, error))?;
        if key.public_key_sha256() != owner.root.public_key_sha256 {
            let text = format!("it is not the key of the {} root", owner.state.as_str());
            return Err(problem(name, text));
        }
        keys.insert(owner.root.public_key_sha256, key);
    }
    Ok(keys)
}

fn decode_intermediate(
    data: &BTreeMap<String, ByteString>,
    roots: &[TrustedRoot],
    trust_domain: &TrustDomain,
) -> Result<Option<Intermediate>, Problem> {
    if !data.contains_key(INTERMEDIATE) && !data.contains_key(INTERMEDIATE_KEY) {
        return Ok(None);
    }
    let certificates = certificates_of_pem(Path::new(INTERMEDIATE), piece(data, INTERMEDIATE)?);
    let certificates = certificates.map_err(|text| problem(INTERMEDIATE, text))?;
    let [der]: [CertificateDer<'static>; 1] = certificates
        .try_into()
        .map_err(|_several: Vec<_>| problem(INTERMEDIATE, "it holds more than one certificate"))?;
    let key = Key::from_pem(piece(data, INTERMEDIATE_KEY)?);
    let key = key.map_err(|error| problem(INTERMEDIATE_KEY, error))?;
    let roots: Vec<Root> = roots.iter().map(|known| known.root.clone()).collect();
    let loaded = Intermediate::load(&der, key, trust_domain, &roots);
    loaded
        .map(Some)
        .map_err(|error| problem(INTERMEDIATE, error))
}

#[derive(Default)]
struct Known {
    version: Option<String>,
    /// Empty before the first.
    roots: BTreeSet<Digest>,
}

impl Known {
    /// Whether it is the same CA: one root at least has stayed.
    fn is_same_ca(&self, stored: &Stored) -> bool {
        let mut roots = stored.shared.roots.iter();
        self.roots.is_empty() || roots.any(|known| self.roots.contains(&known.root.sha256))
    }
}

/// The keys of a CA in a cluster.
pub struct SecretKeys {
    secrets: Api<Secret>,
    bundles: Api<ConfigMap>,
    settings: Kubernetes,
    trust_domain: TrustDomain,
    clock: Arc<dyn Clock>,
    /// What this replica has taken in.
    known: Mutex<Known>,
}

impl SecretKeys {
    /// Asks nobody yet.
    pub fn new(
        client: Client,
        settings: &Kubernetes,
        trust_domain: &TrustDomain,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self {
            secrets: Api::namespaced(client.clone(), &settings.namespace),
            bundles: Api::namespaced(client, &settings.namespace),
            settings: settings.clone(),
            trust_domain: trust_domain.clone(),
            clock,
            known: Mutex::default(),
        }
    }

    /// What the Secret holds; makes it the first time. `ledger` is this replica's own, when it
    /// says that the CA was made before.
    ///
    /// # Errors
    ///
    /// [`SecretError::Missing`] when anything says that the installation has begun, and the Secret
    /// is not there.
    pub async fn open(&self, ledger: Option<&Path>) -> Result<Stored, SecretError> {
        // First the witness: what it testifies to was there before it.
        let name = &self.settings.bundle_config_map;
        let bundle = ask("read the published bundle", self.bundles.get_opt(name)).await?;
        if let Some(stored) = self.read().await? {
            return Ok(stored);
        }
        let namespace = &self.settings.namespace;
        if bundle.is_some() {
            return Err(self.missing(
                format!("ConfigMap {namespace}/{name}"),
                format!("run `kubectl delete configmap {name} -n {namespace}`"),
            ));
        }
        if let Some(path) = ledger {
            return Err(self.missing(
                format!("the ledger {}", path.display()),
                "delete the replicas' volumes".to_owned(),
            ));
        }
        let first = Stored::first(&self.trust_domain, self.clock.now())?;
        match self.create(&first).await {
            Ok(()) => {
                tracing::info!(
                    trust_domain = %self.trust_domain,
                    secret = self.place(),
                    "new certificate authority"
                );
                Ok(first)
            }
            // Another replica was faster: its root is the only one.
            Err(SecretError::Api(error)) if error.is_conflict() => {
                let theirs = self.read().await?;
                theirs.ok_or(SecretError::Api(error))
            }
            Err(error) => Err(error),
        }
    }

    fn missing(&self, witness: String, again: String) -> SecretError {
        SecretError::Missing {
            secret: self.place(),
            witness,
            again,
        }
    }

    fn place(&self) -> String {
        format!(
            "Secret {}/{}",
            self.settings.namespace, self.settings.secret
        )
    }

    async fn create(&self, stored: &Stored) -> Result<(), SecretError> {
        let labels = [
            ("app.kubernetes.io/managed-by", FIELD_MANAGER),
            ("app.kubernetes.io/part-of", "sidegate"),
        ];
        let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let secret = Secret {
            metadata: ObjectMeta {
                name: Some(self.settings.secret.clone()),
                namespace: Some(self.settings.namespace.clone()),
                labels: Some(labels.into()),
                ..ObjectMeta::default()
            },
            type_: Some("Opaque".to_owned()),
            data: Some(stored.encode(&self.place(), &self.trust_domain)?),
            ..Secret::default()
        };
        let params = params();
        let created = ask(
            "create the Secret of keys",
            self.secrets.create(&params, &secret),
        )
        .await;
        clear(secret);
        let created = created?;
        self.remember(created.metadata.resource_version.clone(), stored);
        clear(created);
        Ok(())
    }

    /// Reads and checks the Secret, and remembers its version; `None` when there is none.
    async fn read(&self) -> Result<Option<Stored>, SecretError> {
        let get = self.secrets.get_opt(&self.settings.secret);
        let Some(secret) = ask("read the Secret of keys", get).await? else {
            return Ok(None);
        };
        let version = secret.metadata.resource_version.clone();
        let stored = self.decode(&secret);
        clear(secret);
        let stored = stored?;
        if !self.known().is_same_ca(&stored) {
            return Err(SecretError::Foreign {
                secret: self.place(),
            });
        }
        self.remember(version, &stored);
        Ok(Some(stored))
    }

    fn decode(&self, secret: &Secret) -> Result<Stored, SecretError> {
        let none = BTreeMap::new();
        let data = secret.data.as_ref().unwrap_or(&none);
        let decoded = Stored::decode(data, &self.trust_domain, self.clock.now());
        decoded.map_err(|(key, problem)| SecretError::Piece {
            secret: self.place(),
            key,
            problem,
        })
    }

    fn remember(&self, version: Option<String>, stored: &Stored) {
        let roots = stored.shared.roots.iter();
        *self.known() = Known {
            version,
            roots: roots.map(|known| known.root.sha256).collect(),
        };
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn gone(&self) -> SecretError {
        self.missing(
            "this replica".to_owned(),
            "uninstall and install again".to_owned(),
        )
    }

    /// Changes what is there, if it is what this replica has taken in.
    async fn change(
        &self,
        change: impl FnOnce(&mut Stored) -> Result<(), SecretError> + Send,
    ) -> Result<(), KeyStoreError> {
        let get = self.secrets.get_opt(&self.settings.secret);
        let found = ask("read the Secret of keys", get).await;
        let found = found.map_err(SecretError::from)?;
        let mut secret = found.ok_or_else(|| self.gone())?;
        if secret.metadata.resource_version != self.known().version {
            clear(secret);
            return Err(KeyStoreError::Conflict);
        }
        let mut stored = self.decode(&secret)?;
        change(&mut stored)?;
        let data = stored.encode(&self.place(), &self.trust_domain)?;
        clear_data(secret.data.replace(data));
        let params = params();
        let name = &self.settings.secret;
        let replace = self.secrets.replace(name, &params, &secret);
        let replaced = ask("write the Secret of keys", replace).await;
        clear(secret);
        match replaced {
            Ok(replaced) => {
                self.remember(replaced.metadata.resource_version.clone(), &stored);
                clear(replaced);
                Ok(())
            }
            Err(error) if error.is_conflict() => Err(KeyStoreError::Conflict),
            Err(error) if error.is_not_found() => Err(self.gone().into()),
            Err(error) => Err(SecretError::from(error).into()),
        }
    }

    async fn look(&self) -> Result<Option<News>, KeyStoreError> {
        let get = self.secrets.get_metadata_opt(&self.settings.secret);
        let found = ask("look at the Secret of keys", get).await;
        let found = found.map_err(SecretError::from)?;
        let found = found.ok_or_else(|| self.gone())?;
        if found.metadata.resource_version == self.known().version {
            return Ok(None);
        }
        let stored = self.read().await?.ok_or_else(|| self.gone())?;
        let news = News {
            shared: stored.shared,
            intermediate: stored.intermediate,
        };
        tracing::debug!(
            sequence = news.shared.sequence,
            "the Secret of keys has changed"
        );
        Ok(Some(news))
    }

    async fn key_of(&self, root: &Root) -> Result<Key, KeyStoreError> {
        let get = self.secrets.get_opt(&self.settings.secret);
        let found = ask("read the Secret of keys", get).await;
        let secret = found.map_err(SecretError::from)?;
        let secret = secret.ok_or_else(|| self.gone())?;
        let stored = self.decode(&secret);
        clear(secret);
        let key = stored?.keys.remove(&root.public_key_sha256);
        let key = key.ok_or_else(|| SecretError::Piece {
            secret: self.place(),
            key: ROOT_KEY.to_owned(),
            problem: format!("it is not the key of root {}", root.sha256),
        });
        Ok(key?)
    }
}

impl Stored {
    /// The intermediate, taken out.
    pub fn take_intermediate(&mut self) -> Option<Intermediate> {
        self.intermediate.take()
    }
}

impl KeyStore for SecretKeys {
    fn news(&self) -> BoxFuture<'_, Result<Option<News>, KeyStoreError>> {
        Box::pin(self.look())
    }

    fn root_key<'a>(&'a self, root: &'a Root) -> BoxFuture<'a, Result<Key, KeyStoreError>> {
        Box::pin(self.key_of(root))
    }

    fn stage<'a>(
        &'a self,
        _next: &'a Zeroizing<String>,
    ) -> BoxFuture<'a, Result<(), KeyStoreError>> {
        // The key goes into the Secret together with its root.
        Box::pin(async { Ok(()) })
    }

    fn share<'a>(
        &'a self,
        after: &'a Shared,
        next: Option<&'a Zeroizing<String>>,
    ) -> BoxFuture<'a, Result<(), KeyStoreError>> {
        Box::pin(self.change(move |stored| {
            if let Some(next) = next {
                let key = Key::from_pem(next.as_bytes()).map_err(|_ours| NoRandomness)?;
                stored.keys.insert(key.public_key_sha256(), key);
            }
            stored.shared = after.clone();
            Ok(())
        }))
    }

    fn settle(&self, _roots: Registry) -> BoxFuture<'_, Result<(), KeyStoreError>> {
        Box::pin(async { Ok(()) })
    }

    fn keep_intermediate<'a>(
        &'a self,
        intermediate: &'a Intermediate,
    ) -> BoxFuture<'a, Result<(), KeyStoreError>> {
        Box::pin(self.change(move |stored| {
            let roots: Vec<Root> = stored.shared.roots.iter().map(|r| r.root.clone()).collect();
            let pem = intermediate.key().to_pem()?;
            let key = Key::from_pem(pem.as_bytes()).map_err(|_ours| NoRandomness)?;
            let trust_domain = &self.trust_domain;
            let again = Intermediate::load(&intermediate.der, key, trust_domain, &roots);
            stored.intermediate = Some(again.map_err(|problem| SecretError::Piece {
                secret: self.place(),
                key: INTERMEDIATE.to_owned(),
                problem: problem.to_string(),
            })?);
            Ok(())
        }))
    }
}

fn params() -> PostParams {
    PostParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PostParams::default()
    }
}

/// Clears what may be a key from memory.
fn clear(secret: Secret) {
    clear_data(secret.data);
}

fn clear_data(data: Option<BTreeMap<String, ByteString>>) {
    for mut bytes in data.into_iter().flat_map(BTreeMap::into_values) {
        bytes.0.zeroize();
    }
}
