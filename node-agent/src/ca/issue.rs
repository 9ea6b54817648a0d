//! Signs: workload certificates for identities that were attested, and the CA's own serving certificate.
//!
//! **Invariant:** nothing is valid beyond the certificates above it; nothing but the public key comes from the caller.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mesh_core::identity::Identity;
use rcgen::string::Ia5String;
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber, SubjectPublicKeyInfo,
};

use crate::ca::authority::{Authority, print};
use crate::config;

/// How long what is signed is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::Args)]
#[group(skip)]
pub struct Times {
    /// Longest life of a certificate, and what a request without one gets, in seconds
    #[arg(long = "cert-lifetime", env = "AMBIT_CERT_LIFETIME", default_value = "86400s", value_parser = lifetime)]
    pub lifetime: Duration,
    /// What clocks may differ by, in seconds: certificates are valid from this long ago, for peers whose clock is
    /// behind, and what waits until certificates have expired waits this much longer
    #[arg(long = "clock-skew", env = "AMBIT_CLOCK_SKEW", default_value = "300s", value_parser = skew)]
    pub skew: Duration,
}

/// Shorter ones would be renewed all the time.
fn lifetime(text: &str) -> Result<Duration, String> {
    config::seconds_within(text, Duration::from_secs(5), 3650 * DAY)
}

fn skew(text: &str) -> Result<Duration, String> {
    config::seconds_within(text, Duration::ZERO, DAY)
}

const DAY: Duration = Duration::from_secs(24 * 3600);

impl Default for Times {
    fn default() -> Self {
        Self { lifetime: Duration::from_secs(24 * 3600), skew: Duration::from_secs(300) }
    }
}

/// A signed workload certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    /// PEM each: leaf, intermediates, and last all roots in one.
    pub cert_chain: Vec<String>,
    /// End of the leaf's validity.
    pub not_after: SystemTime,
}

/// A certificate for a server, with its key.
pub struct Serving {
    /// DER, leaf first, without roots.
    pub chain: Vec<Vec<u8>>,
    /// PKCS#8 DER.
    pub key: Vec<u8>,
    /// When a new one should be in place: half its life.
    pub renew_at: SystemTime,
}

/// Why nothing was signed.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// All that it could sign would be expired.
    #[error("the CA's own certificate has expired: replace the CA Secret")]
    Expired,
    /// The signature itself failed.
    #[error("signing failed: {0}")]
    Sign(#[from] rcgen::Error),
}

impl Authority {
    /// Signs a certificate for `key` that says `identity`; `validity` zero means the longest.
    ///
    /// # Errors
    /// When the authority has expired, or signing fails.
    pub fn issue(
        &self,
        key: &SubjectPublicKeyInfo,
        identity: &Identity,
        validity: Duration,
        now: SystemTime,
    ) -> Result<Issued, IssueError> {
        self.issue_named(key, identity, &[], validity, now)
    }

    /// The same for a server that clients know by DNS names, too.
    ///
    /// # Errors
    /// When the authority has expired, or signing fails.
    pub fn issue_named(
        &self,
        key: &SubjectPublicKeyInfo,
        identity: &Identity,
        names: &[String],
        validity: Duration,
        now: SystemTime,
    ) -> Result<Issued, IssueError> {
        let most = self.times.lifetime;
        let validity = if validity.is_zero() { most } else { validity.min(most) };
        let (mut params, not_after) = self.leaf(validity, now)?;
        let uri = Ia5String::try_from(identity.to_string())?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.subject_alt_names.extend(dns_names(names)?);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let leaf = self.sign(&params, key)?;
        let mut cert_chain = vec![print(&leaf)];
        cert_chain.extend_from_slice(self.intermediates());
        cert_chain.push(self.roots());
        Ok(Issued { cert_chain, not_after })
    }

    /// Makes a key and a certificate for the CA's own TLS server.
    ///
    /// # Errors
    /// When the authority has expired, or signing fails.
    pub fn serving(&self, names: &[String], now: SystemTime) -> Result<Serving, IssueError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let (mut params, not_after) = self.leaf(self.times.lifetime, now)?;
        params.subject_alt_names = dns_names(names)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let mut chain = vec![self.sign(&params, &key)?];
        chain.extend(
            self.intermediates().iter().filter_map(|pem| pem::parse(pem).ok()).map(pem::Pem::into_contents),
        );
        let life = not_after.duration_since(now).unwrap_or_default();
        Ok(Serving { chain, key: key.serialize_der(), renew_at: now + life / 2 })
    }

    fn leaf(
        &self,
        validity: Duration,
        now: SystemTime,
    ) -> Result<(CertificateParams, SystemTime), IssueError> {
        let not_after = (now + validity).min(self.not_after());
        if not_after <= now {
            return Err(IssueError::Expired);
        }
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        set_validity(&mut params, now - self.times.skew, not_after);
        params.serial_number = Some(serial());
        Ok((params, not_after))
    }

    fn sign(&self, params: &CertificateParams, key: &impl PublicKeyData) -> Result<Vec<u8>, IssueError> {
        Ok(params.signed_by(key, &self.issuer)?.der().to_vec())
    }
}

fn dns_names(names: &[String]) -> Result<Vec<SanType>, rcgen::Error> {
    names.iter().map(|name| Ok(SanType::DnsName(Ia5String::try_from(name.as_str())?))).collect()
}

/// In rcgen's calendar.
pub(super) fn set_validity(params: &mut CertificateParams, not_before: SystemTime, not_after: SystemTime) {
    let since_1970 = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default();
    params.not_before = rcgen::date_time_ymd(1970, 1, 1) + since_1970(not_before);
    params.not_after = rcgen::date_time_ymd(1970, 1, 1) + since_1970(not_after);
}

/// 127 random bits, positive and never zero (RFC 5280 4.1.2.2).
pub(super) fn serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] = bytes[0] & 0x3f | 0x40;
    SerialNumber::from_slice(&bytes)
}

#[cfg(test)]
mod tests;
