//! Whom to believe: the chain by rustls's webpki, the name by SPIFFE; host names play no part.
//!
//! **Invariant:** a name is read only from a certificate whose chain, validity and purpose were verified before.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, VerifierBuilderError, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, PeerMisbehaved,
    RootCertStore, SignatureScheme,
};
use x509_parser::extensions::GeneralName;

use super::fault::CertificateFault;
use super::provider;
use super::revocation::{Reporter, Revocations};
use crate::identity::{Identity, TrustDomain};

/// The SPIFFE identity that a certificate names. Names of other kinds do not count, but another URI spoils it (SPIFFE
/// X509-SVID 2), where Istio's proxies take the first that they can read: the two ends of a connection, or a proxy and an
/// auditor, must not read different names in one certificate.
///
/// # Errors
/// When it has no URI name, more than one, or one that is no workload's.
pub fn identity(certificate: &CertificateDer<'_>) -> Result<Identity, CertificateFault> {
    let unreadable = |_| CertificateFault::NoIdentity;
    let (_, parsed) =
        x509_parser::parse_x509_certificate(certificate).map_err(|_| CertificateFault::NoIdentity)?;
    let names = parsed.subject_alternative_name().map_err(unreadable)?;
    let names = names.map(|names| &names.value.general_names[..]).unwrap_or_default();
    let mut uris = names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    match (uris.next(), uris.count()) {
        (None, _) => Err(CertificateFault::NoIdentity),
        (Some(uri), 0) => uri.parse().map_err(CertificateFault::BadIdentity),
        (Some(_), more) => Err(CertificateFault::SeveralNames(more + 1)),
    }
}

/// When the time of a certificate is over, if that can be said.
pub fn not_after(certificate: &CertificateDer<'_>) -> Option<SystemTime> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let seconds = u64::try_from(parsed.validity().not_after.timestamp()).ok()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

/// Verifies that `chain` (leaf first) leads to one of `roots` now and may serve; says nothing about names.
///
/// # Errors
/// With what is wrong with it.
pub fn chain(
    chain: &[CertificateDer<'_>],
    roots: &RootCertStore,
    now: UnixTime,
) -> Result<(), CertificateFault> {
    let (leaf, intermediates) = chain.split_first().ok_or(CertificateFault::NoCertificate)?;
    server_chain(leaf, intermediates, roots, now).map_err(|error| match &error {
        Error::InvalidCertificate(error) => error.into(),
        other => CertificateFault::Other(other.to_string()),
    })
}

fn server_chain(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    roots: &RootCertStore,
    now: UnixTime,
) -> Result<(), Error> {
    let leaf = ParsedCertificate::try_from(leaf)?;
    let algorithms = provider().signature_verification_algorithms;
    verify_server_cert_signed_by_trust_anchor(&leaf, roots, intermediates, now, algorithms.all)
        .map_err(unknown_issuer)
}

/// Two meshes' roots often have the same subject; then a certificate of the other one shows as badly signed by ours.
fn unknown_issuer(error: Error) -> Error {
    match error {
        Error::InvalidCertificate(CertificateError::BadSignature) => CertificateError::UnknownIssuer.into(),
        other => other,
    }
}

fn refuse(fault: CertificateFault) -> Error {
    Error::InvalidCertificate(match fault {
        // Has an alert of its own.
        CertificateFault::Revoked => CertificateError::Revoked,
        fault => CertificateError::Other(OtherError(Arc::new(fault))),
    })
}

/// What a client demands: the server's name must be one of `expected`. Nobody is expected, nobody is believed.
#[derive(Debug)]
pub(super) struct ServerVerifier {
    pub(super) roots: Arc<RootCertStore>,
    pub(super) expected: Vec<Identity>,
    pub(super) revocations: Revocations,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        server_chain(leaf, intermediates, &self.roots, now)?;
        self.revocations.check(leaf, intermediates, &self.roots, Reporter::Source).map_err(refuse)?;
        expect_one_of(&self.expected, leaf).map_err(refuse)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerMisbehaved(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

/// The server's name, if it is expected.
pub(super) fn expect_one_of(
    expected: &[Identity],
    leaf: &CertificateDer<'_>,
) -> Result<Identity, CertificateFault> {
    let actual = identity(leaf)?;
    if expected.contains(&actual) {
        return Ok(actual);
    }
    Err(CertificateFault::WrongIdentity { expected: expected.to_vec(), actual })
}

/// What a server demands: a certificate with a name of its own trust domain. What that name may do is policy, later.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    roots: Arc<RootCertStore>,
    trust_domain: TrustDomain,
    revocations: Revocations,
}

impl ClientVerifier {
    pub(super) fn new(
        roots: Arc<RootCertStore>,
        trust_domain: TrustDomain,
        revocations: Revocations,
    ) -> Result<Self, VerifierBuilderError> {
        let chain = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider())
            // Clients have one certificate to offer; the list would only make the handshake longer.
            .clear_root_hint_subjects()
            .build()?;
        Ok(Self { chain, roots, trust_domain, revocations })
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(leaf, intermediates, now).map_err(unknown_issuer)?;
        self.revocations.check(leaf, intermediates, &self.roots, Reporter::Destination).map_err(refuse)?;
        expect_trust_domain(&self.trust_domain, leaf).map_err(refuse)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// The client's name, if it is of `expected`: the identity that policy is asked about.
pub(super) fn expect_trust_domain(
    expected: &TrustDomain,
    leaf: &CertificateDer<'_>,
) -> Result<Identity, CertificateFault> {
    let actual = identity(leaf)?;
    if actual.trust_domain() == expected {
        return Ok(actual);
    }
    Err(CertificateFault::WrongTrustDomain { expected: expected.clone(), actual })
}
