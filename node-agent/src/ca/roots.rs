//! Where the signing key lives: in a Secret of the user's if there is one, else in one that the first CA to start makes.
//! What all replicas do with it is in a third one, with the key that signs: the user may have replaced it by now.
//!
//! **Invariant:** a key is used only after it was read back from the API server, so that all replicas use the same.

use std::time::SystemTime;

use tracing::{info, warn};

use crate::ca::authority::Material;
use crate::ca::cluster::{ClusterError, Files, Store, Stored};
use crate::ca::rotation::State;

/// A CA that the user brings, in Istio's layout.
pub const USER_SECRET: &str = "cacerts";
/// Our own.
pub const OWN_SECRET: &str = "ambit-ca";
/// What signs now, and how far a rotation is.
pub const STATE_SECRET: &str = "ambit-ca-state";
/// Its file with what is no secret.
const RECORD_FILE: &str = "rotation.json";
/// On a CA's Secret: whether to use it as others are ready for it, or [`AT_ONCE`].
const ROTATION_ANNOTATION: &str = "ambit.io/rotation";
/// Whatever breaks: the old key may be in others' hands.
const AT_ONCE: &str = "immediate";
/// Where everyone reads the public roots.
pub const CONFIG_MAP: &str = "ambit-ca-root-cert";
/// The file in it.
pub const ROOT_FILE: &str = "root-cert.pem";

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum RootsError {
    /// The API server did not help.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The Secret has another layout.
    #[error(
        "Secret {secret} has no {file}, or it is not text; it must have ca-cert.pem, ca-key.pem, cert-chain.pem and \
         root-cert.pem"
    )]
    Layout {
        /// Its name.
        secret: &'static str,
        /// The first file that is missing.
        file: &'static str,
    },
    /// Somebody else wrote into the CA's state.
    #[error("Secret {STATE_SECRET}: {RECORD_FILE} cannot be read: {0}")]
    Record(String),
    /// No randomness, or no signature.
    #[error("cannot make a root: {0}")]
    Generate(#[from] rcgen::Error),
    /// Somebody deletes it as fast as it is made.
    #[error("Secret {OWN_SECRET} was there when it was created, and gone when it was read; who deletes it?")]
    Vanished,
}

/// A CA's Secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Its name.
    pub secret: &'static str,
    /// Its files.
    pub material: Material,
    /// Nothing is to be waited for.
    pub at_once: bool,
}

/// Reads the CA's files; makes them if there are none.
///
/// # Errors
/// When they cannot be read or made.
pub async fn load(store: &impl Store, trust_domain: &str, now: SystemTime) -> Result<Source, RootsError> {
    for secret in [USER_SECRET, OWN_SECRET] {
        if let Some(stored) = store.secret(secret).await? {
            return source(secret, stored);
        }
    }
    // One of several that start together wins the create; all of them, the winner too, use what is there then.
    if store.create_secret(OWN_SECRET, files(Material::generate(trust_domain, now)?)).await? {
        info!(secret = OWN_SECRET, trust_domain, "made a new root for the mesh");
    }
    let there = store.secret(OWN_SECRET).await?.ok_or(RootsError::Vanished)?;
    source(OWN_SECRET, there)
}

fn source(secret: &'static str, stored: Stored) -> Result<Source, RootsError> {
    let at_once = stored.annotations.get(ROTATION_ANNOTATION).is_some_and(|value| value == AT_ONCE);
    Ok(Source { secret, material: material(secret, stored.files)?, at_once })
}

/// Reads what all replicas do, and in which version; `None` before the first of them has said so.
///
/// # Errors
/// When it cannot be read, or is not what a CA has written.
pub async fn state(store: &impl Store) -> Result<Option<(State, String)>, RootsError> {
    let Some(mut stored) = store.secret(STATE_SECRET).await? else { return Ok(None) };
    let layout = RootsError::Layout { secret: STATE_SECRET, file: RECORD_FILE };
    let record = stored.files.remove(RECORD_FILE).ok_or(layout)?;
    let record = serde_json::from_slice(&record).map_err(|error| RootsError::Record(error.to_string()))?;
    Ok(Some((State { signing: material(STATE_SECRET, stored.files)?, record }, stored.version)))
}

/// Has all replicas do this, instead of what was read in that version; false: it was changed since.
///
/// # Errors
/// When it cannot be written.
pub async fn settle(store: &impl Store, state: &State, version: Option<&str>) -> Result<bool, RootsError> {
    let record = serde_json::to_vec(&state.record).map_err(|error| RootsError::Record(error.to_string()))?;
    let mut files = files(state.signing.clone());
    files.insert(RECORD_FILE.to_owned(), record);
    Ok(match version {
        Some(version) => store.replace_secret(STATE_SECRET, files, version).await?,
        None => store.create_secret(STATE_SECRET, files).await?,
    })
}

/// The roots that everyone can read.
///
/// # Errors
/// When they cannot be read.
pub async fn published(store: &impl Store) -> Result<Option<String>, ClusterError> {
    store.published(CONFIG_MAP, ROOT_FILE).await
}

/// Makes the ConfigMap say `roots`, where `there` is what it says.
///
/// # Errors
/// When it cannot be written.
pub async fn publish(store: &impl Store, there: Option<&str>, roots: &str) -> Result<(), ClusterError> {
    match there {
        Some(there) if there == roots => return Ok(()),
        Some(_) => {
            warn!(config_map = CONFIG_MAP, "the published roots are not those of the CA: replaced")
        }
        None => info!(config_map = CONFIG_MAP, "published the roots"),
    }
    store.publish(CONFIG_MAP, ROOT_FILE, roots).await
}

fn material(secret: &'static str, mut files: Files) -> Result<Material, RootsError> {
    let mut text = |file| {
        let bytes = files.remove(file).ok_or(RootsError::Layout { secret, file })?;
        String::from_utf8(bytes).map_err(|_| RootsError::Layout { secret, file })
    };
    Ok(Material {
        ca_cert: text("ca-cert.pem")?,
        ca_key: text("ca-key.pem")?,
        cert_chain: text("cert-chain.pem")?,
        root_cert: text(ROOT_FILE)?,
    })
}

fn files(material: Material) -> Files {
    let files = [
        ("ca-cert.pem", material.ca_cert),
        ("ca-key.pem", material.ca_key),
        ("cert-chain.pem", material.cert_chain),
        (ROOT_FILE, material.root_cert),
    ];
    files.into_iter().map(|(name, text)| (name.to_owned(), text.into_bytes())).collect()
}

#[cfg(test)]
mod tests;
