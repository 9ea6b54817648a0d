//! The signing key with the certificates that lead from it to the mesh's roots, read and checked as a whole.
//!
//! **Invariant:** what this type holds can sign certificates that peers with the same roots will verify; a key that does
//! not fit its certificate, or a chain that leads nowhere, never becomes one.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256,
};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use crate::ca::issue::{self, Times};
use crate::ca::rotation::{Candidate, Root};

/// How long a root of our own making is valid.
const ROOT_VALIDITY: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Certificates between the signing one and a root.
const MAX_CHAIN: usize = 8;

/// The four files of a CA Secret, in Istio's layout. The key is in it: never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Material {
    /// `ca-cert.pem`: the signing certificate.
    pub ca_cert: String,
    /// `ca-key.pem`: its private key.
    pub ca_key: String,
    /// `cert-chain.pem`: what leads to a root; may repeat the signing certificate and the root, may be empty.
    pub cert_chain: String,
    /// `root-cert.pem`: the roots that the mesh trusts.
    pub root_cert: String,
}

/// What signs.
pub struct Authority {
    pub(super) issuer: Issuer<'static, KeyPair>,
    /// The signing certificate and what follows it, roots excluded; PEM each.
    intermediates: Vec<String>,
    /// That certificates come with.
    roots: Vec<Vec<u8>>,
    anchor: Vec<u8>,
    not_before: SystemTime,
    not_after: SystemTime,
    lives: Vec<Life>,
    pub(super) times: Times,
}

/// From when to when a certificate is valid that no one but the user renews.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Life {
    /// Whose, in words.
    pub subject: String,
    /// Whether it is one of the roots.
    pub is_root: bool,
    /// First moment.
    pub from: SystemTime,
    /// Last moment.
    pub until: SystemTime,
}

/// Why the files of a Secret are no authority.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAuthority {
    /// A file that must hold certificates does not.
    #[error("{file} does not hold PEM certificates")]
    Certificates {
        /// Key of the Secret.
        file: &'static str,
    },
    /// The key is of no kind that we can sign with.
    #[error("ca-key.pem is not an unencrypted EC or RSA private key in PEM")]
    Key,
    /// They are not a pair.
    #[error("ca-key.pem is not the key of ca-cert.pem")]
    OtherKey,
    /// A leaf.
    #[error("ca-cert.pem is not a CA certificate: it may not sign others (basicConstraints, keyUsage)")]
    NotCa,
    /// Peers could not verify what it signs.
    #[error("ca-cert.pem does not lead to any of root-cert.pem through cert-chain.pem")]
    NoPath,
    /// Our writer of certificates would write another issuer name than this subject.
    #[error(
        "ca-cert.pem has a subject that cannot be repeated as issuer, such as one with repeated attributes"
    )]
    Subject,
    /// Expired.
    #[error("ca-cert.pem or a certificate above it expired at {0} (seconds since 1970)")]
    Expired(i64),
}

impl Authority {
    /// # Errors
    /// What is wrong with the files.
    pub fn new(material: &Material, now: SystemTime) -> Result<Self, InvalidAuthority> {
        let signing = certificates(&material.ca_cert, "ca-cert.pem")?;
        let roots = certificates(&material.root_cert, "root-cert.pem")?;
        let chain = match material.cert_chain.trim() {
            "" => Vec::new(),
            chain => certificates(chain, "cert-chain.pem")?,
        };
        let signing = &signing[0];
        let (certificate, key) = pair(signing, &material.ca_key)?;
        let path = path(signing, &chain, &roots)?;
        let not_before =
            path.iter().map(|der| parsed(der).map_or(0, |c| c.validity().not_before.timestamp()));
        let not_before = moment(not_before.max().unwrap_or(0));
        let not_after = path.iter().map(|der| parsed(der).map_or(0, |c| c.validity().not_after.timestamp()));
        let not_after = not_after.min().unwrap_or(0);
        if not_after <= seconds(now) {
            return Err(InvalidAuthority::Expired(not_after));
        }
        let issuer = Issuer::from_ca_cert_der(&signing.as_slice().into(), key)
            .map_err(|_| InvalidAuthority::Subject)?;
        let above = path.iter().filter(|der| !roots.contains(der)).map(|der| (der, false));
        let lives = above.chain(roots.iter().map(|der| (der, true)));
        let authority = Self {
            lives: lives.filter_map(|(der, is_root)| Some(life(&parsed(der)?, is_root))).collect(),
            issuer,
            intermediates: path.iter().filter(|der| !roots.contains(der)).map(|der| print(der)).collect(),
            anchor: path.into_iter().next_back().unwrap_or_default(),
            roots,
            not_before,
            not_after: moment(not_after),
            times: Times::default(),
        };
        authority.check_subject(&certificate)?;
        Ok(authority)
    }

    /// As a rotation sees it, with the files that it was read from.
    pub fn candidate(&self, material: Material) -> Candidate {
        Candidate {
            material,
            roots: self.roots.iter().map(|der| print(der)).collect(),
            anchor: print(&self.anchor),
            from: self.not_before,
            until: self.not_after,
        }
    }

    /// The same, for certificates that live as long as this says.
    #[must_use]
    pub fn with_times(self, times: Times) -> Self {
        Self { times, ..self }
    }

    /// The same, with these roots for the mesh.
    #[must_use]
    pub fn trusting(self, roots: &[Root]) -> Self {
        let roots =
            roots.iter().filter_map(|root| Some(pem::parse(&root.pem).ok()?.into_contents())).collect();
        Self { roots, ..self }
    }

    /// PEM of the roots, as published.
    pub fn roots(&self) -> String {
        self.roots.iter().map(|der| print(der)).collect()
    }

    /// PEM of what lies between a leaf and the roots, nearest first.
    pub fn intermediates(&self) -> &[String] {
        &self.intermediates
    }

    /// When the first certificate on the way to the root expires: nothing may be valid beyond.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// The certificates that nobody but the user renews: those on the way to the root, and all roots.
    pub fn lives(&self) -> &[Life] {
        &self.lives
    }

    /// A name that is read and written again may come out otherwise (two OUs, say), and peers compare bytes.
    fn check_subject(&self, certificate: &X509Certificate<'_>) -> Result<(), InvalidAuthority> {
        let probe = CertificateParams::default().signed_by(self.issuer.key(), &self.issuer);
        let probe = probe.map_err(|_| InvalidAuthority::Subject)?;
        let probe = parsed(probe.der()).ok_or(InvalidAuthority::Subject)?;
        if probe.issuer().as_raw() != certificate.subject().as_raw() {
            return Err(InvalidAuthority::Subject);
        }
        probe.verify_signature(Some(certificate.public_key())).map_err(|_| InvalidAuthority::OtherKey)
    }
}

impl Material {
    /// A new self-signed root, EC P-256.
    ///
    /// # Errors
    /// When the random source or the signature fails.
    pub fn generate(trust_domain: &str, now: SystemTime) -> Result<Self, rcgen::Error> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, trust_domain);
        params.distinguished_name.push(DnType::CommonName, "Ambit root");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        issue::set_validity(&mut params, now - Times::default().skew, now + ROOT_VALIDITY);
        params.serial_number = Some(issue::serial());
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self {
            ca_cert: certificate.clone(),
            ca_key: key.serialize_pem(),
            cert_chain: String::new(),
            root_cert: certificate,
        })
    }
}

impl std::fmt::Debug for Material {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Material").field("root_cert", &self.root_cert).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

fn life(certificate: &X509Certificate<'_>, is_root: bool) -> Life {
    let validity = certificate.validity();
    Life {
        subject: certificate.subject().to_string(),
        is_root,
        from: moment(validity.not_before.timestamp()),
        until: moment(validity.not_after.timestamp()),
    }
}

/// Of seconds since 1970; nothing is older than that.
fn moment(seconds: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds.max(0).unsigned_abs())
}

fn pair<'a>(der: &'a [u8], key: &str) -> Result<(X509Certificate<'a>, KeyPair), InvalidAuthority> {
    let certificate = parsed(der).ok_or(InvalidAuthority::Certificates { file: "ca-cert.pem" })?;
    let key = KeyPair::from_pem(key).map_err(|_| InvalidAuthority::Key)?;
    if certificate.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
        return Err(InvalidAuthority::OtherKey);
    }
    let may_sign = certificate.key_usage().ok().flatten().is_none_or(|usage| usage.value.key_cert_sign());
    if !certificate.is_ca() || !may_sign {
        return Err(InvalidAuthority::NotCa);
    }
    Ok((certificate, key))
}

/// From the signing certificate (first) to a root (last).
fn path(signing: &[u8], chain: &[Vec<u8>], roots: &[Vec<u8>]) -> Result<Vec<Vec<u8>>, InvalidAuthority> {
    let mut path = vec![signing.to_vec()];
    for _ in 0..=MAX_CHAIN {
        let last = &path[path.len() - 1];
        if roots.contains(last) {
            return Ok(path);
        }
        let above = roots.iter().chain(chain).find(|above| !path.contains(above) && signed(last, above));
        path.push(above.ok_or(InvalidAuthority::NoPath)?.clone());
    }
    Err(InvalidAuthority::NoPath)
}

fn signed(below: &[u8], above: &[u8]) -> bool {
    let (Some(below), Some(above)) = (parsed(below), parsed(above)) else { return false };
    below.issuer().as_raw() == above.subject().as_raw()
        && below.verify_signature(Some(above.public_key())).is_ok()
}

fn certificates(text: &str, file: &'static str) -> Result<Vec<Vec<u8>>, InvalidAuthority> {
    let invalid = InvalidAuthority::Certificates { file };
    let blocks = pem::parse_many(text).map_err(|_| invalid.clone())?;
    let is_certificate =
        |block: &pem::Pem| block.tag() == "CERTIFICATE" && parsed(block.contents()).is_some();
    if blocks.is_empty() || !blocks.iter().all(is_certificate) {
        return Err(invalid);
    }
    Ok(blocks.into_iter().map(pem::Pem::into_contents).collect())
}

fn parsed(der: &[u8]) -> Option<X509Certificate<'_>> {
    X509Certificate::from_der(der)
        .ok()
        .filter(|(rest, _)| rest.is_empty())
        .map(|(_, certificate)| certificate)
}

pub(super) fn print(der: &[u8]) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new("CERTIFICATE", der), config)
}

fn seconds(at: SystemTime) -> i64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests;
