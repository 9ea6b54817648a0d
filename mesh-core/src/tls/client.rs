//! The dialling end: always with a certificate, never with a host name, and only to identities that are expected.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsConnector, TlsStream};

use super::revocation::{Reporter, Revocations};
use super::verify::{self, ServerVerifier};
use super::{ALPN, CertificateFault, Stream, TlsError, provider};
use crate::certs::WorkloadCert;
use crate::identity::Identity;

/// The part of the configuration that is the same for all destinations; it believes nobody until
/// [`expecting`] says whom.
pub(crate) fn config(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
) -> Result<ClientConfig, rustls::Error> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ServerVerifier {
            roots,
            expected: Vec::new(),
            revocations: Revocations::default(),
        }))
        .with_client_auth_cert(chain, key)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// `config` for destinations that must have one of the identities `expected`. Cheap: keys and chain are shared.
pub(crate) fn expecting(
    config: &ClientConfig,
    roots: Arc<RootCertStore>,
    expected: Vec<Identity>,
    revocations: Revocations,
) -> ClientConfig {
    let mut config = config.clone();
    config.dangerous().set_certificate_verifier(Arc::new(ServerVerifier { roots, expected, revocations }));
    config
}

/// Handshakes as `certificate`'s identity, with a peer that proves to be one of `expected`; returns which one.
///
/// # Errors
/// When the peer is not. That it refuses us shows only later, see [`Stream::broken`].
pub async fn connect<IO: AsyncRead + AsyncWrite + Unpin>(
    io: IO,
    certificate: &WorkloadCert,
    expected: &[Identity],
) -> Result<(Stream<IO>, Identity), TlsError> {
    let config = certificate.client_config(expected);
    // An address is never sent as SNI; our verifier ignores it.
    let unused = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::UNSPECIFIED).into());
    let stream = TlsConnector::from(Arc::new(config)).connect(unused, io).await;
    let stream = stream.map_err(|error| TlsError::from_io(&error))?;
    let connection = stream.get_ref().1;
    if connection.alpn_protocol() != Some(ALPN) {
        return Err(TlsError::Incompatible("the peer did not choose h2".into()));
    }
    let leaf = connection.peer_certificates().and_then(<[_]>::first);
    let leaf = leaf.ok_or(TlsError::Peer(CertificateFault::NoCertificate))?;
    let peer = verify::expect_one_of(expected, leaf).map_err(TlsError::Peer)?;
    let presented = certificate.presented(connection.peer_certificates(), Reporter::Source);
    Ok((Stream::new(TlsStream::Client(stream), presented), peer))
}
