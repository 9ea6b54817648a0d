//! The accepting end: as the identity of the pod whose listener accepted, for clients of the same trust domain.

use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WantsServerCert};
use rustls::{ConfigBuilder, RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsStream};

use super::revocation::{Reporter, Revocations};
use super::verify::{self, ClientVerifier};
use super::{ALPN, CertificateFault, Stream, TlsError, provider};
use crate::certs::WorkloadCert;
use crate::identity::{Identity, TrustDomain};

/// After a failed handshake the peer has this long to read why.
const ALERT_GRACE: Duration = Duration::from_secs(1);
/// And may send this much before it does, in bytes.
const ALERT_GRACE_LIMIT: usize = 64 * 1024;

/// The configuration of one certificate, the same for all clients.
pub(crate) fn config(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
    trust_domain: TrustDomain,
) -> Result<ServerConfig, rustls::Error> {
    let config = believing(roots, trust_domain, Revocations::default())?.with_single_cert(chain, key)?;
    Ok(only_h2_no_resumption(config))
}

/// `config`, made of the same certificate, for clients that nobody has revoked.
pub(crate) fn checking(
    config: &ServerConfig,
    roots: Arc<RootCertStore>,
    trust_domain: TrustDomain,
    revocations: Revocations,
) -> Result<ServerConfig, rustls::Error> {
    let builder = believing(roots, trust_domain, revocations)?;
    Ok(only_h2_no_resumption(builder.with_cert_resolver(config.cert_resolver.clone())))
}

fn believing(
    roots: Arc<RootCertStore>,
    trust_domain: TrustDomain,
    revocations: Revocations,
) -> Result<ConfigBuilder<ServerConfig, WantsServerCert>, rustls::Error> {
    let verifier = ClientVerifier::new(roots, trust_domain, revocations)
        .map_err(|error| rustls::Error::General(format!("roots cannot be used: {error}")))?;
    let builder =
        ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&rustls::version::TLS13])?;
    Ok(builder.with_client_cert_verifier(Arc::new(verifier)))
}

fn only_h2_no_resumption(mut config: ServerConfig) -> ServerConfig {
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config
}

/// Handshakes as `certificate`'s identity with a client that proves to be of its trust domain; returns who it is.
/// The caller bounds the time.
///
/// # Errors
/// When the client does not speak this protocol or is not believed; it is sent the alert that says so.
pub async fn accept<IO: AsyncRead + AsyncWrite + Unpin>(
    io: IO,
    certificate: &WorkloadCert,
) -> Result<(Stream<IO>, Identity), TlsError> {
    let accepting = TlsAcceptor::from(certificate.server_config()).accept(io).into_fallible();
    let stream = match accepting.await {
        Ok(stream) => stream,
        Err((error, io)) => {
            let _ = tokio::time::timeout(ALERT_GRACE, let_alert_arrive(io)).await;
            return Err(TlsError::from_io(&error));
        }
    };
    let connection = stream.get_ref().1;
    if connection.alpn_protocol() != Some(ALPN) {
        return Err(TlsError::Incompatible("the client did not ask for h2".into()));
    }
    let leaf = connection.peer_certificates().and_then(<[_]>::first);
    let leaf = leaf.ok_or(TlsError::Peer(CertificateFault::NoCertificate))?;
    let trust_domain = certificate.identity().trust_domain();
    let peer = verify::expect_trust_domain(trust_domain, leaf).map_err(TlsError::Peer)?;
    let presented = certificate.presented(connection.peer_certificates(), Reporter::Destination);
    Ok((Stream::new(TlsStream::Server(stream), presented), peer))
}

/// Closing a socket with unread bytes resets the connection, which can overtake the alert that tells the peer why.
async fn let_alert_arrive(mut io: impl AsyncRead + AsyncWrite + Unpin) {
    if io.shutdown().await.is_err() {
        return;
    }
    let mut ignored = [0; 1024];
    let mut total = 0;
    while total < ALERT_GRACE_LIMIT {
        match io.read(&mut ignored).await {
            Ok(0) | Err(_) => return,
            Ok(length) => total += length,
        }
    }
}
