//! Where the signing key lives: in a Secret of the user's if there is one, else in one that the first CA to start makes.
//!
//! **Invariant:** a key is used only after it was read back from the API server, so that all replicas use the same.

use std::time::SystemTime;

use tracing::{info, warn};

use crate::ca::authority::Material;
use crate::ca::cluster::{ClusterError, Files, Store};

/// A CA that the user brings, in Istio's layout.
pub const USER_SECRET: &str = "cacerts";
/// Our own.
pub const OWN_SECRET: &str = "ambit-ca";
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
    /// No randomness, or no signature.
    #[error("cannot make a root: {0}")]
    Generate(#[from] rcgen::Error),
    /// Somebody deletes it as fast as it is made.
    #[error("Secret {OWN_SECRET} was there when it was created, and gone when it was read; who deletes it?")]
    Vanished,
}

/// Reads the CA's files, and which Secret they are from; makes them if there are none.
///
/// # Errors
/// When they cannot be read or made.
pub async fn load(
    store: &impl Store,
    trust_domain: &str,
    now: SystemTime,
) -> Result<(&'static str, Material), RootsError> {
    for secret in [USER_SECRET, OWN_SECRET] {
        if let Some(files) = store.secret(secret).await? {
            return Ok((secret, material(secret, files)?));
        }
    }
    // One of several that start together wins the create; all of them, the winner too, use what is there then.
    if store.create_secret(OWN_SECRET, files(Material::generate(trust_domain, now)?)).await? {
        info!(secret = OWN_SECRET, trust_domain, "made a new root for the mesh");
    }
    let there = store.secret(OWN_SECRET).await?.ok_or(RootsError::Vanished)?;
    Ok((OWN_SECRET, material(OWN_SECRET, there)?))
}

/// Makes the ConfigMap say `roots`.
///
/// # Errors
/// When it cannot be read or written.
pub async fn publish(store: &impl Store, roots: &str) -> Result<(), ClusterError> {
    let there = store.published(CONFIG_MAP, ROOT_FILE).await?;
    match there {
        Some(there) if there == roots => return Ok(()),
        Some(_) => {
            warn!(config_map = CONFIG_MAP, "the published roots are not those of the CA's Secret: replaced")
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
