//! Reads certificate signing requests, which strangers send.
//!
//! **Invariant:** of a request only the public key is used, and only after its signature proved that the caller has the
//! private one; names come from the decision in `attest`.

use mesh_core::identity::Identity;
use rcgen::SubjectPublicKeyInfo;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY};
use x509_parser::prelude::FromDer;

/// Longest request in bytes; one for a P-256 key and a SPIFFE name has some 500.
pub const MAX_CSR: usize = 16 * 1024;

/// A request that proved that its sender has the private key.
#[derive(Debug)]
pub struct SigningRequest {
    /// An EC P-256 key.
    pub key: SubjectPublicKeyInfo,
    /// Subject alternative names in it, as text.
    names: Vec<String>,
}

/// Why a request is not signed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidCsr {
    /// Longer than anything honest.
    #[error("the CSR has {0} bytes, the limit is {MAX_CSR}")]
    TooLong(usize),
    /// Not PEM of the right kind.
    #[error("the CSR is not PEM of a CERTIFICATE REQUEST")]
    Pem,
    /// Not PKCS#10.
    #[error("the CSR is not DER of a PKCS#10 request")]
    Der,
    /// The sender does not have the key, or the bytes were changed.
    #[error("the CSR's signature does not fit its public key")]
    Signature,
    /// The mesh has one kind of key.
    #[error("the CSR's key is not EC P-256; only that kind is certified")]
    KeyKind,
    /// It asks for other names than the caller may have.
    #[error("the CSR asks for the names {found:?}, only {allowed} would be certified")]
    Names {
        /// In the request.
        found: Vec<String>,
        /// The caller's.
        allowed: Identity,
    },
}

impl InvalidCsr {
    /// Short name for metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::TooLong(_) => "csr_too_long",
            Self::Pem | Self::Der => "csr_malformed",
            Self::Signature => "csr_signature",
            Self::KeyKind => "csr_key_kind",
            Self::Names { .. } => "csr_names",
        }
    }
}

impl SigningRequest {
    /// # Errors
    /// When it is too long, malformed, not signed by its own key, or of another kind of key.
    pub fn from_pem(text: &str) -> Result<Self, InvalidCsr> {
        if text.len() > MAX_CSR {
            return Err(InvalidCsr::TooLong(text.len()));
        }
        let pem = pem::parse(text).map_err(|_| InvalidCsr::Pem)?;
        if !matches!(pem.tag(), "CERTIFICATE REQUEST" | "NEW CERTIFICATE REQUEST") {
            return Err(InvalidCsr::Pem);
        }
        let (rest, csr) = X509CertificationRequest::from_der(pem.contents()).map_err(|_| InvalidCsr::Der)?;
        if !rest.is_empty() {
            return Err(InvalidCsr::Der);
        }
        let key = p256_key(&csr)?;
        csr.verify_signature().map_err(|_| InvalidCsr::Signature)?;
        Ok(Self { key, names: names(&csr) })
    }

    /// The request may name the identity that will be certified, or nothing.
    ///
    /// # Errors
    /// When it names anything else.
    pub fn check_names(&self, allowed: &Identity) -> Result<(), InvalidCsr> {
        let allowed_name = format!("URI:{allowed}");
        if self.names.iter().all(|name| *name == allowed_name) {
            return Ok(());
        }
        let found = self.names.iter().take(MAX_NAMES).cloned().collect();
        Err(InvalidCsr::Names { found, allowed: allowed.clone() })
    }
}

fn p256_key(csr: &X509CertificationRequest<'_>) -> Result<SubjectPublicKeyInfo, InvalidCsr> {
    let key = &csr.certification_request_info.subject_pki;
    let curve = key.algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
    if key.algorithm.algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY || curve != Some(OID_EC_P256) {
        return Err(InvalidCsr::KeyKind);
    }
    SubjectPublicKeyInfo::from_der(key.raw).map_err(|_| InvalidCsr::KeyKind)
}

/// What it would be called.
fn names(csr: &X509CertificationRequest<'_>) -> Vec<String> {
    let extensions = csr.requested_extensions().into_iter().flatten();
    let alternative = extensions.filter_map(|extension| match extension {
        ParsedExtension::SubjectAlternativeName(names) => Some(&names.general_names),
        _ => None,
    });
    alternative.flatten().map(name).collect()
}

fn name(name: &GeneralName<'_>) -> String {
    match name {
        GeneralName::URI(uri) => format!("URI:{uri}"),
        other => other.to_string(),
    }
}

/// Names of a request that are told in its refusal.
const MAX_NAMES: usize = 8;

#[cfg(test)]
mod tests;
