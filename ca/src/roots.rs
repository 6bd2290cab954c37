//! The CA's files of roots and intermediate, and how they are brought in order after a crash.
//!
//! | file | what |
//! |---|---|
//! | `root.pem` | every root in the bundle, the active one first: what sidecars start with |
//! | `root.key` | key of the active root |
//! | `root-next.key` | key of a prepared root |
//! | `root-old.key` | key of a root that is retiring |
//! | `intermediate.pem`, `intermediate.key` | what signs leaves |
//! | `intermediate.new` | both of the next one, until they are in place |
//! | `ledger` | everything else |
//!
//! Invariant: which root is active is the ledger's word; a key file is believed for what its public
//! key is, not for its name.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use rustls_pki_types::CertificateDer;
use zeroize::Zeroizing;

use crate::authority::{
    self, Intermediate, IntermediateProblem, Root, RootProblem, certificates_of_pem,
};
use crate::digest::Digest;
use crate::key::Key;
use crate::registry::{Registry, RootState, TrustedRoot};
use crate::state::{StateError, StateFolder, Visibility};

/// The roots in the bundle.
pub const ROOT: &str = "root.pem";
/// Key of the active root.
pub const ROOT_KEY: &str = "root.key";
/// Key of the prepared root.
pub const ROOT_NEXT_KEY: &str = "root-next.key";
/// Key of the retiring root.
pub const ROOT_OLD_KEY: &str = "root-old.key";
/// What signs leaves.
pub const INTERMEDIATE: &str = "intermediate.pem";
/// Its key.
pub const INTERMEDIATE_KEY: &str = "intermediate.key";
/// The next one, until it is in place.
pub const INTERMEDIATE_NEW: &str = "intermediate.new";
/// Everything else.
pub const LEDGER: &str = "ledger";

/// Every file that a CA makes.
const PIECES: [&str; 8] = [
    ROOT,
    ROOT_KEY,
    ROOT_NEXT_KEY,
    ROOT_OLD_KEY,
    INTERMEDIATE,
    INTERMEDIATE_KEY,
    INTERMEDIATE_NEW,
    LEDGER,
];

/// Why roots or intermediate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RootsError {
    /// The folder refuses.
    #[error(transparent)]
    State(#[from] StateError),
    /// A root is not usable.
    #[error("{}: {problem}; restore the state folder from a backup, or start a new CA in an empty one and give its root.pem to every sidecar", path.display())]
    Root {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: RootProblem,
    },
    /// The intermediate is not usable.
    #[error("{}: {problem}; remove intermediate.pem and intermediate.key to have a new one made", path.display())]
    Intermediate {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: IntermediateProblem,
    },
    /// A piece is missing, damaged, or does not fit the others.
    #[error("{}: {problem}; {help}", path.display())]
    Piece {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        help: &'static str,
    },
    /// The ledger names no active root.
    #[error("the ledger names no active root")]
    NoActiveRoot,
}

const RESTORE: &str = "restore it from a backup; a CA never makes a second root by itself";

/// What a state folder holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing: the CA is to be made.
    Nothing,
    /// A whole CA.
    Everything,
}

/// Looks at what is there. What an unfinished first start left behind is removed.
///
/// # Errors
///
/// [`RootsError::Piece`] when something is missing.
pub fn look(folder: &StateFolder) -> Result<Found, RootsError> {
    if folder.in_first_start() {
        tracing::warn!("an earlier first start did not finish; beginning again");
        for piece in PIECES {
            folder.remove(piece)?;
        }
        folder.finish_first_start()?;
    }
    let present: Vec<&str> = PIECES
        .into_iter()
        .filter(|piece| folder.has(piece))
        .collect();
    let Some(witness) = present.first() else {
        return Ok(Found::Nothing);
    };
    for needed in [ROOT, ROOT_KEY, LEDGER] {
        if !present.contains(&needed) {
            return Err(RootsError::Piece {
                path: folder.path(needed),
                problem: format!("it is missing, although {witness} is there"),
                help: RESTORE,
            });
        }
    }
    Ok(Found::Everything)
}

/// Makes the first root and its key.
///
/// # Errors
///
/// [`RootsError`], also when either exists: nothing is replaced.
pub fn create_root(
    folder: &StateFolder,
    root: &CertificateDer<'_>,
    key: &Zeroizing<String>,
) -> Result<(), RootsError> {
    folder.create(ROOT_KEY, key.as_bytes(), Visibility::Secret)?;
    folder.create(ROOT, authority::to_pem(root).as_bytes(), Visibility::Public)?;
    Ok(())
}

/// Checks the roots' files against each other and against the ledger, and finishes what a crash
/// has interrupted.
///
/// # Errors
///
/// [`RootsError`], which says which file and what to do.
pub fn check(folder: &StateFolder, registry: &Registry, now: SystemTime) -> Result<(), RootsError> {
    let path = folder.path(ROOT);
    let pem = folder.read(ROOT)?.unwrap_or_default();
    let certificates = certificates_of_pem(&path, &pem).map_err(|problem| RootsError::Piece {
        path: path.clone(),
        problem,
        help: RESTORE,
    })?;
    let active = registry
        .root(RootState::Active)
        .ok_or(RootsError::NoActiveRoot)?;
    let listed = certificates
        .iter()
        .any(|der| Digest::of(der) == active.sha256);
    let first = match certificates.into_iter().next() {
        Some(first) if !listed => first,
        _ => active.der.clone(),
    };
    let root = Root::check(&first, registry.trust_domain(), now);
    let root = root.map_err(|problem| RootsError::Root {
        path: path.clone(),
        problem,
    })?;
    finish_activation(folder, active)?;
    key_for(folder, &root)?;
    if !listed {
        return Err(RootsError::Piece {
            path,
            problem: "it is not the root that the ledger was made with".to_owned(),
            help: RESTORE,
        });
    }
    finish_rotation(folder, registry)?;
    write_root_pem(folder, &registry.roots())
}

/// The active root's key, read anew: it is not kept in memory.
///
/// # Errors
///
/// [`RootsError`].
pub fn active_key(folder: &StateFolder, root: &Root) -> Result<Key, RootsError> {
    finish_activation(folder, root)?;
    key_for(folder, root)
}

/// `root.key`, if it is the key of `root`.
fn key_for(folder: &StateFolder, root: &Root) -> Result<Key, RootsError> {
    let key = read_key(folder, ROOT_KEY)?;
    if key.public_key_sha256() == root.public_key_sha256 {
        return Ok(key);
    }
    Err(RootsError::Piece {
        path: folder.path(ROOT_KEY),
        problem: "it does not match the certificate in root.pem".to_owned(),
        help: RESTORE,
    })
}

fn read_key(folder: &StateFolder, name: &str) -> Result<Key, RootsError> {
    let piece = |problem: &dyn std::fmt::Display| RootsError::Piece {
        path: folder.path(name),
        problem: problem.to_string(),
        help: RESTORE,
    };
    let pem = folder
        .read_secret(name)?
        .ok_or_else(|| piece(&"it is missing"))?;
    Key::from_pem(&pem).map_err(|error| piece(&error))
}

/// After an activation the next key becomes the active one. The former is copied first, so that
/// `root.key` is there at every moment.
fn finish_activation(folder: &StateFolder, active: &Root) -> Result<(), RootsError> {
    if !folder.has(ROOT_NEXT_KEY) {
        return Ok(());
    }
    let next = read_key(folder, ROOT_NEXT_KEY)?;
    if next.public_key_sha256() != active.public_key_sha256 {
        return Ok(());
    }
    if let Some(former) = folder.read_secret(ROOT_KEY)? {
        folder.replace(ROOT_OLD_KEY, &former, Visibility::Secret)?;
    }
    folder.rename(ROOT_NEXT_KEY, ROOT_KEY)?;
    Ok(())
}

/// Removes keys that no root in the bundle has. A prepared root is in the ledger before anybody
/// sees it, so such a key never signed anything that is believed.
///
/// # Errors
///
/// [`RootsError`].
pub fn finish_rotation(folder: &StateFolder, registry: &Registry) -> Result<(), RootsError> {
    for (name, state) in [
        (ROOT_NEXT_KEY, RootState::Prepared),
        (ROOT_OLD_KEY, RootState::Retiring),
    ] {
        if folder.has(name) && registry.root(state).is_none() {
            tracing::warn!(
                file = name,
                "removing the key of a root that is not in the bundle"
            );
            folder.remove(name)?;
        }
    }
    Ok(())
}

/// Writes the roots of the bundle, unless the file says so already.
///
/// # Errors
///
/// [`RootsError`].
pub fn write_root_pem(folder: &StateFolder, roots: &[TrustedRoot]) -> Result<(), RootsError> {
    let pem: String = roots
        .iter()
        .map(|trusted| authority::to_pem(&trusted.root.der))
        .collect();
    if folder
        .read(ROOT)?
        .is_none_or(|present| present != pem.as_bytes())
    {
        folder.replace(ROOT, pem.as_bytes(), Visibility::Public)?;
    }
    Ok(())
}

/// Puts an intermediate and its key in place, in a way that a crash cannot leave half done.
///
/// # Errors
///
/// [`RootsError`].
pub fn save_intermediate(
    folder: &StateFolder,
    der: &CertificateDer<'_>,
    key: &Zeroizing<String>,
) -> Result<(), RootsError> {
    let mut both = Zeroizing::new(authority::to_pem(der));
    both.push_str(key);
    folder.replace(INTERMEDIATE_NEW, both.as_bytes(), Visibility::Secret)?;
    install_intermediate(folder)
}

fn install_intermediate(folder: &StateFolder) -> Result<(), RootsError> {
    let Some(both) = folder.read_secret(INTERMEDIATE_NEW)? else {
        return Ok(());
    };
    let path = folder.path(INTERMEDIATE_NEW);
    let certificates = certificates_of_pem(&path, &both).ok();
    let key = Key::from_pem(&both).ok().and_then(|key| key.to_pem().ok());
    let first = certificates.as_ref().and_then(|all| all.first());
    let (Some(der), Some(key)) = (first, key) else {
        return Err(RootsError::Piece {
            path,
            problem: "it does not hold a certificate and a key".to_owned(),
            help: "remove it",
        });
    };
    let pem = authority::to_pem(der);
    folder.replace(INTERMEDIATE_KEY, key.as_bytes(), Visibility::Secret)?;
    folder.replace(INTERMEDIATE, pem.as_bytes(), Visibility::Public)?;
    folder.remove(INTERMEDIATE_NEW)?;
    Ok(())
}

/// The intermediate of the folder; `None` when another has to be made: there is none, half of its
/// life is over, or the active root did not sign it.
///
/// # Errors
///
/// [`RootsError`] when it is damaged.
pub fn load_intermediate(
    folder: &Arc<StateFolder>,
    registry: &Registry,
    now: SystemTime,
) -> Result<Option<Intermediate>, RootsError> {
    install_intermediate(folder)?;
    match (folder.has(INTERMEDIATE), folder.has(INTERMEDIATE_KEY)) {
        (false, false) => return Ok(None),
        (true, true) => {}
        (has_certificate, _) => {
            let missing = if has_certificate {
                INTERMEDIATE_KEY
            } else {
                INTERMEDIATE
            };
            return Err(RootsError::Piece {
                path: folder.path(missing),
                problem: "it is missing, although its other half is there".to_owned(),
                help: "remove intermediate.pem and intermediate.key to have a new one made",
            });
        }
    }
    let key = read_key(folder, INTERMEDIATE_KEY)?;
    let path = folder.path(INTERMEDIATE);
    let pem = folder.read(INTERMEDIATE)?.unwrap_or_default();
    let unusable = |problem| RootsError::Intermediate {
        path: path.clone(),
        problem,
    };
    let certificates = certificates_of_pem(&path, &pem)
        .map_err(|problem| unusable(IntermediateProblem::Unusable(problem)))?;
    let Some(der) = certificates.into_iter().next() else {
        return Ok(None);
    };
    let roots: Vec<Root> = registry
        .roots()
        .into_iter()
        .map(|trusted| trusted.root)
        .collect();
    let trust_domain = registry.trust_domain();
    let intermediate = Intermediate::load(&der, key, trust_domain, &roots).map_err(unusable)?;
    let active = registry.root(RootState::Active).map(|root| root.sha256);
    let current = active == Some(intermediate.root_sha256) && now < intermediate.half_life();
    Ok(current.then_some(intermediate))
}
