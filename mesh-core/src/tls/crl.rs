//! Certificate revocation lists (RFC 5280 5): what they revoke. Pure: bytes in, a verdict out.
//!
//! A list counts for the certificates of the issuer that signed it, whoever else has the same name: after a change of
//! roots both often have. What no list speaks of is allowed, and a list whose time is over still counts.

mod der;

use std::collections::HashSet;

use rustls::RootCertStore;
use rustls::pki_types::CertificateRevocationListDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::extensions::ParsedExtension;
use x509_parser::oid_registry::OID_X509_EXT_DELTA_CRL_INDICATOR;
use x509_parser::parse_x509_crl;

use self::der::{Certificate, Signed};
use super::provider;

/// Why a file holds no lists that can be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidCrl {
    /// Neither PEM nor DER.
    #[error("it holds no certificate revocation list, neither as PEM (BEGIN X509 CRL) nor as DER")]
    None,
    /// PEM that breaks off or is not base64.
    #[error("its PEM is damaged: {0}")]
    Pem(String),
    /// Not what RFC 5280 says.
    #[error("list {number} cannot be read: {error}")]
    Malformed {
        /// From 1.
        number: usize,
        /// What is wrong.
        error: String,
    },
    /// Taken for a whole list of its issuer it would allow what it should not.
    #[error("list {number} is {what}, which is not supported")]
    Unsupported {
        /// From 1.
        number: usize,
        /// Which kind.
        what: &'static str,
    },
}

/// The lists that are in force.
#[derive(Debug, Default)]
pub struct Lists(Vec<List>);

#[derive(Debug)]
struct List {
    der: CertificateRevocationListDer<'static>,
    /// Content of the DER of its issuer's name.
    issuer: Box<[u8]>,
    /// Without leading zeros.
    serials: HashSet<Box<[u8]>>,
    facts: Facts,
}

/// One list, for `/config_dump`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Facts {
    /// Its name.
    pub issuer: String,
    /// How many certificates it revokes.
    pub revoked: usize,
    /// When it was made, in seconds since the epoch.
    pub this_update: i64,
    /// When the next one should have come, in seconds since the epoch.
    pub next_update: Option<i64>,
}

/// A certificate that is revoked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revoked {
    /// Hexadecimal.
    pub serial: String,
    /// Name of the issuer of certificate and list.
    pub issuer: String,
}

impl Lists {
    /// Reads a file: lists as PEM, one after the other, or one as DER.
    ///
    /// # Errors
    /// When one of them cannot be used; then none is.
    pub fn parse(file: &[u8]) -> Result<Self, InvalidCrl> {
        let lists = if file.first() == Some(&der::SEQUENCE) {
            vec![CertificateRevocationListDer::from(file.to_vec())]
        } else {
            let lists: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(file).collect();
            lists.map_err(|error| InvalidCrl::Pem(error.to_string()))?
        };
        if lists.is_empty() {
            return Err(InvalidCrl::None);
        }
        lists
            .into_iter()
            .zip(1..)
            .map(|(der, number)| List::new(der, number))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// What each says of itself.
    pub fn facts(&self) -> impl Iterator<Item = &Facts> {
        self.0.iter().map(|list| &list.facts)
    }

    /// The first certificate of `chain` (DER, leaf first, as a peer presents it) that is revoked. A list's issuer is
    /// looked for among the chain and `roots`, which the caller has verified to be a path.
    pub fn revoked<'a>(
        &self,
        chain: impl Iterator<Item = &'a [u8]>,
        roots: &RootCertStore,
    ) -> Option<Revoked> {
        if self.0.is_empty() {
            return None;
        }
        // What cannot be read is not a part of the path, which was verified by a stricter reader.
        let chain: Vec<Certificate<'_>> = chain.filter_map(Certificate::read).collect();
        let issuers = || {
            let roots = roots.roots.iter();
            let roots = roots.map(|root| (root.subject.as_ref(), root.subject_public_key_info.as_ref()));
            chain.iter().map(|certificate| (certificate.subject, certificate.key)).chain(roots)
        };
        chain.iter().find_map(|certificate| {
            let keys = || issuers().filter(|(name, _)| *name == certificate.issuer).map(|(_, key)| key);
            let list = self.0.iter().find(|list| {
                list.names(certificate) && keys().any(|key| list.is_signed_by(key) == Some(true))
            })?;
            let serial: String = certificate.serial.iter().map(|byte| format!("{byte:02x}")).collect();
            Some(Revoked { serial, issuer: list.facts.issuer.clone() })
        })
    }
}

impl List {
    fn new(der: CertificateRevocationListDer<'static>, number: usize) -> Result<Self, InvalidCrl> {
        let malformed = |error: String| InvalidCrl::Malformed { number, error };
        let (rest, parsed) = parse_x509_crl(&der).map_err(|error| malformed(error.to_string()))?;
        for extension in parsed.extensions() {
            let what = match extension.parsed_extension() {
                _ if extension.oid == OID_X509_EXT_DELTA_CRL_INDICATOR => "a delta list",
                ParsedExtension::IssuingDistributionPoint(point) if point.indirect_crl => "an indirect list",
                ParsedExtension::ParseError { error } => return Err(malformed(error.to_string())),
                _ => continue,
            };
            return Err(InvalidCrl::Unsupported { number, what });
        }
        let signed = Signed::read(&der).filter(|_| rest.is_empty());
        let list = signed.as_ref().and_then(|signed| der::List::read(signed.content));
        let list = list.ok_or_else(|| malformed("it has another structure than RFC 5280 says".to_owned()))?;
        let facts = Facts {
            issuer: parsed.issuer().to_string(),
            revoked: list.serials.len(),
            this_update: parsed.last_update().timestamp(),
            next_update: parsed.next_update().map(|at| at.timestamp()),
        };
        let (issuer, serials) = (list.issuer.into(), list.serials.into_iter().map(Into::into).collect());
        Ok(Self { der, issuer, serials, facts })
    }

    fn names(&self, certificate: &Certificate<'_>) -> bool {
        *self.issuer == *certificate.issuer && self.serials.contains(certificate.serial)
    }

    /// `key` is the content of a SubjectPublicKeyInfo.
    fn is_signed_by(&self, key: &[u8]) -> Option<bool> {
        let signed = Signed::read(&self.der)?;
        let (key_algorithm, key) = der::public_key(key)?;
        let verified = provider().signature_verification_algorithms.all.iter().any(|algorithm| {
            algorithm.public_key_alg_id().as_ref() == key_algorithm
                && algorithm.signature_alg_id().as_ref() == signed.algorithm
                && algorithm.verify_signature(key, signed.whole, signed.signature).is_ok()
        });
        Some(verified)
    }
}

#[cfg(test)]
mod tests;
