//! One workload's certificate with its key, checked once and turned into TLS configurations once.
//!
//! **Invariant:** a value of this type names its identity, leads to its own roots and fits its key; the key cannot be
//! read out of it.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::ResolvesServerCert;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::roots::Bundle;
use crate::identity::Identity;
use crate::tls::revocation::{Presented, Reporter, Revocations};
use crate::tls::{self, CertificateFault};

/// See the module.
#[derive(Clone)]
pub struct WorkloadCert {
    identity: Identity,
    chain: Vec<CertificateDer<'static>>,
    root_certificates: Vec<CertificateDer<'static>>,
    roots: Arc<RootCertStore>,
    revocations: Revocations,
    serial: String,
    not_before: SystemTime,
    not_after: SystemTime,
    server: Arc<ServerConfig>,
    client: ClientConfig,
}

/// Why a certificate cannot be a workload's.
#[derive(Clone, Debug, thiserror::Error)]
pub enum InvalidCert {
    /// It cannot be parsed.
    #[error("the certificate cannot be parsed: {0}")]
    Malformed(String),
    /// It names somebody else.
    #[error("the certificate is for {actual}, asked for was {expected}")]
    Identity {
        /// Whose was asked for.
        expected: Identity,
        /// Whose it is.
        actual: Identity,
    },
    /// Nothing to verify peers with.
    #[error("no root certificate came with the certificate")]
    NoRoots,
    /// Peers that trust the same roots would refuse it.
    #[error("the certificate does not verify against the roots that came with it: {0}")]
    Chain(CertificateFault),
    /// Key and certificate do not fit, or the key is of a kind that is not supported.
    #[error("the certificate cannot be used: {0}")]
    Unusable(String),
}

impl WorkloadCert {
    /// Checks and keeps a certificate: `chain` leaf first, `key` its private key, `roots` whom its holder trusts.
    ///
    /// # Errors
    /// When peers would refuse it.
    pub fn new(
        identity: Identity,
        key: PrivateKeyDer<'static>,
        chain: Vec<CertificateDer<'static>>,
        roots: Vec<CertificateDer<'static>>,
    ) -> Result<Self, InvalidCert> {
        let store = root_store(&roots)?;
        let leaf = chain.first().ok_or(InvalidCert::Chain(CertificateFault::NoCertificate))?;
        let actual = tls::verify::identity(leaf).map_err(InvalidCert::Chain)?;
        if actual != identity {
            return Err(InvalidCert::Identity { expected: identity, actual });
        }
        tls::verify::chain(&chain, &store, UnixTime::now()).map_err(InvalidCert::Chain)?;
        Self::unverified(identity, key, chain, roots)
    }

    /// Without the checks of name and chain: what a test's misbehaving peer uses.
    pub(crate) fn unverified(
        identity: Identity,
        key: PrivateKeyDer<'static>,
        chain: Vec<CertificateDer<'static>>,
        roots: Vec<CertificateDer<'static>>,
    ) -> Result<Self, InvalidCert> {
        let store = Arc::new(root_store(&roots)?);
        let leaf = chain.first().ok_or_else(|| InvalidCert::Malformed("it is empty".into()))?;
        let facts = facts(leaf)?;
        let unusable = |error: rustls::Error| InvalidCert::Unusable(error.to_string());
        let client = tls::client::config(chain.clone(), key.clone_key(), store.clone()).map_err(unusable)?;
        let trust_domain = identity.trust_domain().clone();
        let server =
            tls::server::config(chain.clone(), key, store.clone(), trust_domain).map_err(unusable)?;
        Ok(Self {
            identity,
            chain,
            root_certificates: roots,
            roots: store,
            revocations: Revocations::default(),
            serial: facts.serial,
            not_before: facts.not_before,
            not_after: facts.not_after,
            server: Arc::new(server),
            client,
        })
    }

    /// For peers whose certificates are not revoked.
    ///
    /// # Errors
    /// When it was no workload's certificate to begin with.
    pub fn checking(mut self, revocations: &Revocations) -> Result<Self, InvalidCert> {
        if revocations.are_configured() {
            let (roots, trust_domain) = (self.roots.clone(), self.identity.trust_domain().clone());
            let server = tls::server::checking(&self.server, roots, trust_domain, revocations.clone());
            self.server = Arc::new(server.map_err(|error| InvalidCert::Unusable(error.to_string()))?);
            self.revocations = revocations.clone();
        }
        Ok(self)
    }

    /// The same with the mesh's roots as `bundle` has them, and whether peers with these roots take it.
    ///
    /// # Errors
    /// When nobody could be verified with these roots.
    pub fn trusting(&self, bundle: &Bundle) -> Result<(Self, bool), InvalidCert> {
        let mut cert = self.clone();
        let roots = bundle.with(&self.root_certificates);
        if roots != self.root_certificates {
            let store = Arc::new(root_store(&roots)?);
            let (trust_domain, revocations) =
                (self.identity.trust_domain().clone(), self.revocations.clone());
            let server = tls::server::checking(&self.server, store.clone(), trust_domain, revocations);
            cert.server = Arc::new(server.map_err(|error| InvalidCert::Unusable(error.to_string()))?);
            (cert.root_certificates, cert.roots) = (roots, store);
        }
        let taken = tls::verify::chain(&cert.chain, &cert.roots, UnixTime::now()).is_ok();
        Ok((cert, taken))
    }

    /// What a peer has presented in a handshake with this certificate, if it may be revoked later.
    pub(crate) fn presented(
        &self,
        chain: Option<&[CertificateDer<'static>]>,
        reporter: Reporter,
    ) -> Option<Presented> {
        self.revocations.presented(chain, &self.roots, reporter)
    }

    /// Whose it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Serial number, hexadecimal.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// Start of its time.
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// End of its time.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// PEM, leaf first.
    pub fn chain_pem(&self) -> String {
        to_pem(&self.chain)
    }

    /// Whom its holder trusts.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.root_certificates
    }

    /// PEM.
    pub fn roots_pem(&self) -> String {
        to_pem(&self.root_certificates)
    }

    /// To serve with it clients that need no certificate.
    pub fn resolver(&self) -> Arc<dyn ResolvesServerCert> {
        self.server.cert_resolver.clone()
    }

    pub(crate) fn server_config(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    pub(crate) fn client_config(&self, expected: &[Identity]) -> ClientConfig {
        tls::client::expecting(&self.client, self.roots.clone(), expected.to_vec(), self.revocations.clone())
    }
}

/// Without keys: it is logged.
impl fmt::Debug for WorkloadCert {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkloadCert")
            .field("identity", &self.identity)
            .field("serial", &self.serial)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

struct Facts {
    serial: String,
    not_before: SystemTime,
    not_after: SystemTime,
}

fn facts(leaf: &CertificateDer<'_>) -> Result<Facts, InvalidCert> {
    let (_, parsed) = x509_parser::parse_x509_certificate(leaf)
        .map_err(|error| InvalidCert::Malformed(error.to_string()))?;
    let time = |at: x509_parser::time::ASN1Time| {
        let seconds = u64::try_from(at.timestamp()).unwrap_or(0);
        SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).unwrap_or(SystemTime::UNIX_EPOCH)
    };
    Ok(Facts {
        serial: format!("{:x}", parsed.serial),
        not_before: time(parsed.validity().not_before),
        not_after: time(parsed.validity().not_after),
    })
}

fn root_store(roots: &[CertificateDer<'static>]) -> Result<RootCertStore, InvalidCert> {
    let mut store = RootCertStore::empty();
    let (added, _) = store.add_parsable_certificates(roots.iter().cloned());
    if added == 0 {
        return Err(InvalidCert::NoRoots);
    }
    Ok(store)
}

fn to_pem(certificates: &[CertificateDer<'static>]) -> String {
    let blocks: Vec<_> =
        certificates.iter().map(|certificate| pem::Pem::new("CERTIFICATE", certificate.to_vec())).collect();
    pem::encode_many_config(&blocks, pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF))
}
