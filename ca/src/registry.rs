//! What the CA knows: tokens, claims, certificates in date, revocations and roots.
//!
//! A registry is what the ledger says, replayed: [`Registry::apply`] is the only way in, at start
//! for every entry and later for each new one. The exceptions are reservations: between the check
//! of a request and its entry on disk, a [`Reservation`] keeps a second request from claiming the
//! same token, SVID or key.
//!
//! Invariant: one token, and one SVID, is claimed for one key only; one key is certified on one
//! piece of evidence only, until the certificate's end.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;
use std::time::SystemTime;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use sidegate_api::identity as proto;
use sidegate_mesh::spiffe::{SpiffeId, TrustDomain};
use sidegate_mtls::PeerCertificate;

use crate::authority::{Root, unix_seconds};
use crate::digest::{Digest, Serial};
use crate::issuance::{Attested, EvidenceError, Refusal};
use crate::ledger::{Entry, Event, Evidence, Issuance, Token};

/// Namespace of the control plane; no token names it and no renewal is for it.
pub const CONTROL_PLANE: &str = "sidegate-system";

/// Replayed entries after which what has expired is dropped.
const REPLAY_PRUNE: u64 = 1 << 16;

/// Everything that the ledger's entries add up to.
pub struct Registry {
    trust_domain: TrustDomain,
    created: Option<TrustDomain>,
    tokens: HashMap<String, TokenState>,
    by_evidence: HashMap<EvidenceKey, Claim<Digest>>,
    by_key: HashMap<Digest, Claim<Certified>>,
    intended: HashMap<Serial, Issuance>,
    live: HashMap<Serial, Issuance>,
    frozen: BTreeSet<Serial>,
    by_pod: HashMap<String, (Serial, u64)>,
    revoked_ids: BTreeMap<SpiffeId, u64>,
    revoked_serials: BTreeMap<Serial, u64>,
    roots: Vec<TrustedRoot>,
    sequence: u64,
    problems: Vec<String>,
}

/// A token and what has become of it.
#[derive(Clone, Debug)]
pub struct TokenState {
    /// As it was made.
    pub token: Token,
    /// Whether an administrator made it unusable.
    pub revoked: bool,
}

/// A root in the bundle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustedRoot {
    /// The certificate.
    pub root: Root,
    /// What it is to us.
    pub state: RootState,
    /// The bundle's sequence with which it came. Sequences follow the clock, so it came not later
    /// than that Unix time in seconds.
    pub added: u64,
}

/// What the replicas of a CA have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shared {
    /// The bundle's sequence.
    pub sequence: u64,
    /// The roots in the bundle, the active one first.
    pub roots: Vec<TrustedRoot>,
    /// Identities revoked, with the bundle's sequence from which on they are.
    pub revoked_ids: BTreeMap<SpiffeId, u64>,
    /// Serial numbers revoked, with the Unix time in seconds of the certificate's end.
    pub revoked_serials: BTreeMap<Serial, u64>,
}

/// What a trusted root is to this CA.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RootState {
    /// It signs.
    Active,
    /// It is published, and will sign.
    Prepared,
    /// It signed before; leaves under it are still in use.
    Retiring,
    /// An administrator added it; its key is elsewhere.
    Added,
}

impl RootState {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Prepared => "prepared",
            Self::Retiring => "retiring",
            Self::Added => "added",
        }
    }
}

/// What a claim is on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum EvidenceKey {
    Token(String),
    /// The SVID's key, not its serial number: a repeated renewal gives one key two SVIDs, and the
    /// two must not start two lines.
    Svid(Digest),
    /// A pod asks with the same token again and again, each time with a new key.
    Pod(String),
    Own,
}

/// What a key was certified on, and in which line of renewals. A repeated request belongs to the
/// line of the first.
#[derive(Clone)]
struct Certified {
    evidence: EvidenceKey,
    lineage: Serial,
}

impl PartialEq for Certified {
    fn eq(&self, other: &Self) -> bool {
        self.evidence == other.evidence
    }
}

struct Claim<T> {
    holder: T,
    /// Unix time in seconds until which it counts, that second included.
    until: u64,
    durable: bool,
    pending: u32,
}

/// A claim whose ledger entry is not on disk yet. Give it back with [`Registry::settle`].
#[must_use]
pub struct Reservation {
    evidence: EvidenceKey,
    key: Digest,
    /// The line of renewals that the certificate belongs to.
    pub lineage: Serial,
    /// Unix time in seconds that the certificate must not outlive, when the key has one already.
    pub not_after_max: Option<u64>,
}

impl Registry {
    /// Knows nothing yet.
    pub fn new(trust_domain: TrustDomain) -> Self {
        Self {
            trust_domain,
            created: None,
            tokens: HashMap::new(),
            by_evidence: HashMap::new(),
            by_key: HashMap::new(),
            intended: HashMap::new(),
            live: HashMap::new(),
            frozen: BTreeSet::new(),
            by_pod: HashMap::new(),
            revoked_ids: BTreeMap::new(),
            revoked_serials: BTreeMap::new(),
            roots: Vec::new(),
            sequence: 0,
            problems: Vec::new(),
        }
    }

    /// Takes in one entry at start.
    pub fn replay(&mut self, entry: &Entry, now: SystemTime) {
        self.apply(&entry.event);
        if entry.index % REPLAY_PRUNE == REPLAY_PRUNE - 1 {
            self.prune(now);
        }
    }

    /// What replayed entries made no sense; empty for a ledger of ours.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// The trust domain that certificates are issued for.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The trust domain that the ledger was made for.
    pub fn created_for(&self) -> Option<&TrustDomain> {
        self.created.as_ref()
    }

    /// Takes in what is on disk.
    pub fn apply(&mut self, event: &Event) {
        match event {
            Event::Created {
                trust_domain,
                root,
                sequence,
            } => {
                self.created = Some(trust_domain.clone());
                self.add_root(root, RootState::Active, *sequence);
                self.advance(*sequence);
            }
            Event::Intended(issuance) => self.apply_intended(issuance),
            Event::Issued { serial, .. } => self.apply_issued(*serial),
            Event::Refused { serial, .. } => drop(self.intended.remove(serial)),
            Event::Frozen { lineage, .. } => drop(self.frozen.insert(*lineage)),
            Event::TokenCreated(token) => {
                let state = TokenState {
                    token: token.clone(),
                    revoked: false,
                };
                self.tokens.insert(token.token.clone(), state);
            }
            Event::TokenRevoked { token } => {
                if let Some(state) = self.tokens.get_mut(token) {
                    state.revoked = true;
                }
            }
            Event::Abandoned { .. } | Event::Repaired { .. } => {}
            bundle => self.apply_bundle(bundle),
        }
    }

    fn apply_bundle(&mut self, event: &Event) {
        match event {
            Event::IdentityRevoked {
                spiffe_id,
                sequence,
            } => {
                self.revoked_ids.insert(spiffe_id.clone(), *sequence);
                self.advance(*sequence);
            }
            Event::SerialRevoked {
                serial,
                not_after,
                sequence,
            } => {
                self.revoked_serials.insert(*serial, *not_after);
                self.advance(*sequence);
            }
            Event::Reinstated {
                spiffe_id,
                serials,
                sequence,
            } => {
                self.revoked_ids.remove(spiffe_id);
                self.revoked_serials.extend(serials.iter().copied());
                self.advance(*sequence);
            }
            Event::RootAdded {
                root,
                own,
                sequence,
            } => {
                let state = if *own {
                    RootState::Prepared
                } else {
                    RootState::Added
                };
                self.add_root(root, state, *sequence);
                self.advance(*sequence);
            }
            Event::RootActivated { sha256, .. } => self.activate(*sha256),
            Event::RootRemoved {
                sha256, sequence, ..
            } => {
                self.roots.retain(|trusted| trusted.root.sha256 != *sha256);
                self.advance(*sequence);
            }
            _ => {}
        }
    }

    fn apply_intended(&mut self, issuance: &Issuance) {
        let evidence = EvidenceKey::of(issuance);
        let token_ends = match &issuance.evidence {
            Evidence::JoinToken(token) => self.tokens.get(token).map(|state| state.token.expires),
            Evidence::Svid(parent) => self.live.get(parent).map(|parent| parent.not_after),
            Evidence::Pod(_) | Evidence::Own => None,
        };
        let key = issuance.public_key_sha256;
        if let EvidenceKey::Pod(uid) = &evidence {
            let of_pod = (issuance.lineage, issuance.not_after);
            self.by_pod.insert(uid.clone(), of_pod);
        }
        if evidence.is_used_up() {
            let until = token_ends.unwrap_or(issuance.not_after);
            make_durable(&mut self.by_evidence, evidence.clone(), key, until);
        }
        let certified = Certified {
            evidence,
            lineage: issuance.lineage,
        };
        make_durable(&mut self.by_key, key, certified, issuance.not_after);
        self.intended.insert(issuance.serial, issuance.clone());
    }

    fn apply_issued(&mut self, serial: Serial) {
        match self.intended.remove(&serial) {
            Some(issuance) => drop(self.live.insert(serial, issuance)),
            None => self
                .problems
                .push(format!("{serial} was issued but never intended")),
        }
    }

    fn add_root(&mut self, base64: &str, state: RootState, added: u64) {
        let der = BASE64.decode(base64).map_err(|error| error.to_string());
        let root = der.and_then(|der| {
            let der = CertificateDer::from(der);
            Root::parse(&der, &self.trust_domain).map_err(|error| error.to_string())
        });
        match root {
            Ok(root) => self.roots.push(TrustedRoot { root, state, added }),
            Err(problem) => self
                .problems
                .push(format!("a root of the ledger: {problem}")),
        }
    }

    fn activate(&mut self, sha256: Digest) {
        for trusted in &mut self.roots {
            if trusted.root.sha256 == sha256 {
                trusted.state = RootState::Active;
            } else if trusted.state == RootState::Active {
                trusted.state = RootState::Retiring;
            }
        }
    }

    fn advance(&mut self, sequence: u64) {
        self.sequence = self.sequence.max(sequence);
    }

    /// Forgets what has expired.
    pub fn prune(&mut self, now: SystemTime) {
        let now = unix_seconds(now);
        self.tokens.retain(|_, state| state.token.expires >= now);
        self.by_evidence.retain(|_, claim| claim.counts(now));
        self.by_key.retain(|_, claim| claim.counts(now));
        self.intended
            .retain(|_, issuance| issuance.not_after >= now);
        self.by_pod.retain(|_, (_, not_after)| *not_after >= now);
        self.live.retain(|_, issuance| issuance.not_after >= now);
        let lineages: BTreeSet<Serial> = self.live.values().map(|live| live.lineage).collect();
        self.frozen.retain(|lineage| lineages.contains(lineage));
        self.revoked_serials
            .retain(|_, not_after| *not_after >= now);
    }

    // ---- Attestation -----------------------------------------------------------------------

    /// What a join token proves.
    ///
    /// # Errors
    ///
    /// [`Refusal`] when it is unknown, expired or revoked, or its identity is revoked. That it was
    /// used is seen by [`Self::reserve`], which knows for which key.
    pub fn attest_token(&self, text: &str, now: SystemTime) -> Result<Attested, Refusal> {
        let mut parts = text.splitn(3, '_');
        let (prefix, id, secret) = (parts.next(), parts.next(), parts.next());
        let known = id.and_then(|id| self.tokens.get(id));
        let expected = known.map_or(Digest::ZERO, |state| state.token.secret_sha256);
        // Also for an unknown id, so that the time taken does not tell which ids exist.
        let secret = Digest::of(secret.unwrap_or_default().as_bytes());
        let same = verify_slices_are_equal(secret.as_bytes(), expected.as_bytes()).is_ok();
        let state = known.filter(|_| same && prefix == Some("sgt"));
        let state = state.ok_or(EvidenceError::TokenUnknown)?;
        if state.revoked {
            return Err(EvidenceError::TokenRevoked.into());
        }
        if state.token.expires < unix_seconds(now) {
            return Err(EvidenceError::TokenExpired.into());
        }
        self.require_not_revoked(&state.token.spiffe_id)?;
        Ok(Attested {
            id: state.token.spiffe_id.clone(),
            evidence: Evidence::JoinToken(state.token.token.clone()),
            lineage: None,
            key: None,
            dns_names: Vec::new(),
        })
    }

    /// What the SVID of a verified caller proves.
    ///
    /// # Errors
    ///
    /// [`Refusal`] when this CA did not issue it, it is the control plane's, or it is revoked or of
    /// a frozen lineage.
    pub fn attest_svid(&self, peer: &PeerCertificate) -> Result<Attested, Refusal> {
        let serial = Serial::from_bytes(peer.serial.as_bytes());
        let issued = serial.and_then(|serial| self.live.get(&serial));
        let issued = issued
            .filter(|issued| issued.spiffe_id == peer.id)
            .filter(|issued| issued.public_key_sha256.as_bytes() == peer.public_key_sha256)
            .ok_or(EvidenceError::NotIssuedHere)?;
        if peer.id.workload().is_none_or(|(ns, _)| ns == CONTROL_PLANE) {
            return Err(Refusal::Denied(
                "an identity of the control plane is not renewed here",
            ));
        }
        self.require_not_revoked(&peer.id)?;
        if self.revoked_serials.contains_key(&issued.serial) {
            return Err(Refusal::Denied(
                "the certificate is revoked; use a new join token",
            ));
        }
        if self.frozen.contains(&issued.lineage) {
            return Err(Refusal::Frozen);
        }
        Ok(Attested {
            id: peer.id.clone(),
            evidence: Evidence::Svid(issued.serial),
            lineage: Some(issued.lineage),
            key: Some(issued.public_key_sha256),
            dns_names: Vec::new(),
        })
    }

    fn require_not_revoked(&self, id: &SpiffeId) -> Result<(), Refusal> {
        if self.revoked_ids.contains_key(id) {
            return Err(Refusal::Denied("the identity is revoked"));
        }
        Ok(())
    }

    // ---- Claims ----------------------------------------------------------------------------

    /// Claims evidence and key for each other, until [`Self::settle`]. `serial` starts a line of
    /// renewals if there is none.
    ///
    /// # Errors
    ///
    /// [`Refusal`] when either is claimed for another, or the key may not be certified at all.
    /// [`Refusal::Forked`] asks the caller to freeze the lineage.
    pub fn reserve(
        &mut self,
        attested: &Attested,
        (key, serial): (Digest, Serial),
        now: SystemTime,
    ) -> Result<Reservation, Refusal> {
        let now = unix_seconds(now);
        let mut roots = self
            .roots
            .iter()
            .map(|trusted| trusted.root.public_key_sha256);
        if attested.key == Some(key) || roots.any(|root| root == key) {
            return Err(Refusal::KeyNotFresh);
        }
        // Once more, under the lock that the claim is made under: an administrator may have come
        // between attestation and claim.
        self.require_not_revoked(&attested.id)?;
        if let Evidence::Svid(parent) = attested.evidence
            && self.revoked_serials.contains_key(&parent)
        {
            return Err(Refusal::Denied(
                "the certificate is revoked; use a new join token",
            ));
        }
        if attested
            .lineage
            .is_some_and(|lineage| self.frozen.contains(&lineage))
        {
            return Err(Refusal::Frozen);
        }
        let evidence = EvidenceKey::of_attested(attested);
        let by_key = self.by_key.get(&key).filter(|claim| claim.counts(now));
        if by_key.is_some_and(|claim| claim.holder.evidence != evidence) {
            return Err(Refusal::KeyNotFresh);
        }
        let not_after_max = by_key
            .filter(|claim| claim.durable)
            .map(|claim| claim.until);
        let lineage = by_key.map(|claim| claim.holder.lineage);
        let lineage = lineage
            .or(attested.lineage)
            .or_else(|| self.lineage_of_pod(&evidence))
            .unwrap_or(serial);
        let by_evidence = self
            .by_evidence
            .get(&evidence)
            .filter(|claim| claim.counts(now));
        match by_evidence {
            Some(claim) if claim.holder == key => {}
            Some(claim) if !claim.durable => return Err(Refusal::Concurrent),
            Some(_) if attested.key.is_some() => return Err(Refusal::Forked),
            Some(_) => return Err(EvidenceError::TokenUsed.into()),
            None => {}
        }
        if evidence.is_used_up() {
            add_pending(&mut self.by_evidence, evidence.clone(), key, now);
        }
        let certified = Certified {
            evidence: evidence.clone(),
            lineage,
        };
        add_pending(&mut self.by_key, key, certified, now);
        Ok(Reservation {
            evidence,
            key,
            lineage,
            not_after_max,
        })
    }

    /// The certificates of one pod are one line, each attested anew.
    fn lineage_of_pod(&self, evidence: &EvidenceKey) -> Option<Serial> {
        match evidence {
            EvidenceKey::Pod(uid) => self.by_pod.get(uid).map(|(lineage, _)| *lineage),
            EvidenceKey::Token(_) | EvidenceKey::Svid(_) | EvidenceKey::Own => None,
        }
    }

    /// Ends a reservation. `written` is the entry that is on disk now; without it, what was
    /// claimed is free again, unless an earlier request holds it.
    pub fn settle(&mut self, reservation: Reservation, written: Option<&Event>) {
        let Reservation { evidence, key, .. } = reservation;
        if let Some(event) = written {
            self.apply(event);
        }
        if evidence.is_used_up() {
            drop_pending(&mut self.by_evidence, &evidence);
        }
        drop_pending(&mut self.by_key, &key);
    }

    /// Freezes at once; the entry follows.
    pub fn freeze(&mut self, lineage: Serial) {
        self.frozen.insert(lineage);
    }

    // ---- Tokens ----------------------------------------------------------------------------

    /// Tokens that are not expired, with whether they were used, sorted by their end.
    pub fn tokens(&self, now: SystemTime) -> Vec<(TokenState, bool)> {
        let seconds = unix_seconds(now);
        let valid = self
            .tokens
            .values()
            .filter(|state| state.token.expires >= seconds);
        let mut tokens: Vec<_> = valid
            .map(|state| {
                let claim = EvidenceKey::Token(state.token.token.clone());
                (state.clone(), self.by_evidence.contains_key(&claim))
            })
            .collect();
        tokens.sort_by_key(|(state, _)| (state.token.expires, state.token.token.clone()));
        tokens
    }

    /// Whether there is such a token.
    pub fn has_token(&self, id: &str) -> bool {
        self.tokens.contains_key(id)
    }

    // ---- Bundle ----------------------------------------------------------------------------

    /// What all replicas have in common.
    pub fn shared(&self) -> Shared {
        Shared {
            sequence: self.sequence,
            roots: self.roots(),
            revoked_ids: self.revoked_ids.clone(),
            revoked_serials: self.revoked_serials.clone(),
        }
    }

    /// What all replicas have in common once `event` is in effect.
    pub fn shared_after(&self, event: &Event) -> Shared {
        let mut after = Self::new(self.trust_domain.clone());
        after.adopt(self.shared());
        after.apply(event);
        after.shared()
    }

    /// Takes in what another replica, or the Secret, says. The sequence never falls.
    pub fn adopt(&mut self, shared: Shared) {
        self.advance(shared.sequence);
        self.roots = shared.roots;
        self.revoked_ids = shared.revoked_ids;
        self.revoked_serials = shared.revoked_serials;
    }

    /// A registry that knows the same roots and nothing else.
    pub(crate) fn roots_only(&self) -> Self {
        Self {
            roots: self.roots.clone(),
            ..Self::new(self.trust_domain.clone())
        }
    }

    /// The bundle's sequence.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The sequence of the next change. It follows the clock, so that a CA restored from a backup
    /// does not publish under a number that its clients have left behind.
    pub fn next_sequence(&self, now: SystemTime) -> u64 {
        (self.sequence + 1).max(unix_seconds(now))
    }

    /// The roots in the bundle, the active one first.
    pub fn roots(&self) -> Vec<TrustedRoot> {
        let mut roots = self.roots.clone();
        roots.sort_by_key(|trusted| trusted.state != RootState::Active);
        roots
    }

    /// The root in that state.
    pub fn root(&self, state: RootState) -> Option<&Root> {
        let mut roots = self.roots.iter();
        roots
            .find(|trusted| trusted.state == state)
            .map(|trusted| &trusted.root)
    }

    /// Identities revoked, with the bundle's sequence from which on they are.
    pub fn revoked_ids(&self) -> &BTreeMap<SpiffeId, u64> {
        &self.revoked_ids
    }

    /// Serial numbers revoked.
    pub fn revoked_serials(&self) -> impl Iterator<Item = &Serial> {
        self.revoked_serials.keys()
    }

    /// Entries of the denylist.
    pub fn revocations(&self) -> usize {
        self.revoked_ids.len() + self.revoked_serials.len()
    }

    /// What is sent to every sidecar.
    pub fn bundle(&self) -> proto::WatchBundleResponse {
        let roots = self.roots();
        proto::WatchBundleResponse {
            sequence: self.sequence,
            bundles: vec![proto::TrustDomainBundle {
                trust_domain: self.trust_domain.to_string(),
                roots: roots
                    .iter()
                    .map(|trusted| trusted.root.der.to_vec())
                    .collect(),
            }],
            revocations: Some(proto::Revocations {
                spiffe_ids: self.revoked_ids.keys().map(ToString::to_string).collect(),
                serials: self
                    .revoked_serials()
                    .map(|s| s.as_bytes().to_vec())
                    .collect(),
            }),
            refresh_hint_seconds: 300,
        }
    }

    // ---- Certificates ----------------------------------------------------------------------

    /// Certificates in date that were handed out, or may have been.
    pub fn certificates(&self) -> impl Iterator<Item = &Issuance> {
        self.live.values().chain(self.intended.values())
    }

    /// Certificates in date that were handed out.
    pub fn issued(&self) -> impl Iterator<Item = &Issuance> {
        self.live.values()
    }

    /// How many certificates are remembered.
    pub fn certificates_len(&self) -> usize {
        self.live.len() + self.intended.len()
    }

    /// One certificate in date.
    pub fn certificate(&self, serial: &Serial) -> Option<&Issuance> {
        self.live.get(serial).or_else(|| self.intended.get(serial))
    }

    /// Lineages that are renewed no more.
    pub fn frozen(&self) -> &BTreeSet<Serial> {
        &self.frozen
    }
}

impl EvidenceKey {
    fn of(issuance: &Issuance) -> Self {
        match (&issuance.evidence, issuance.parent_key_sha256) {
            (Evidence::JoinToken(token), _) => Self::Token(token.clone()),
            (Evidence::Svid(_), Some(key)) => Self::Svid(key),
            (Evidence::Pod(pod), _) => Self::Pod(pod.uid.clone()),
            _ => Self::Own,
        }
    }

    fn of_attested(attested: &Attested) -> Self {
        match (&attested.evidence, attested.key) {
            (Evidence::JoinToken(token), _) => Self::Token(token.clone()),
            (Evidence::Svid(_), Some(key)) => Self::Svid(key),
            (Evidence::Pod(pod), _) => Self::Pod(pod.uid.clone()),
            _ => Self::Own,
        }
    }
}

impl EvidenceKey {
    /// Whether the evidence is good for one key only.
    fn is_used_up(&self) -> bool {
        match self {
            Self::Token(_) | Self::Svid(_) => true,
            Self::Pod(_) | Self::Own => false,
        }
    }
}

impl<T> Claim<T> {
    fn counts(&self, now: u64) -> bool {
        self.pending > 0 || self.until >= now
    }
}

fn make_durable<K: Hash + Eq, T: PartialEq>(
    claims: &mut HashMap<K, Claim<T>>,
    on: K,
    holder: T,
    until: u64,
) {
    match claims.get_mut(&on) {
        Some(claim) if claim.holder == holder => {
            claim.until = if claim.durable {
                claim.until.max(until)
            } else {
                until
            };
            claim.durable = true;
        }
        // A claim that had expired, met again in a replay.
        _ => {
            let claim = Claim {
                holder,
                until,
                durable: true,
                pending: 0,
            };
            claims.insert(on, claim);
        }
    }
}

fn add_pending<K: Hash + Eq, T>(claims: &mut HashMap<K, Claim<T>>, on: K, holder: T, now: u64) {
    match claims.get_mut(&on) {
        Some(claim) if claim.counts(now) => claim.pending += 1,
        _ => {
            let claim = Claim {
                holder,
                until: now,
                durable: false,
                pending: 1,
            };
            claims.insert(on, claim);
        }
    }
}

fn drop_pending<K: Hash + Eq, T>(claims: &mut HashMap<K, Claim<T>>, on: &K) {
    let Some(claim) = claims.get_mut(on) else {
        return;
    };
    claim.pending = claim.pending.saturating_sub(1);
    if claim.pending == 0 && !claim.durable {
        claims.remove(on);
    }
}
