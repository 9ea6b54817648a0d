//! An HBONE client of our own making, that presents whatever certificate a scenario wants and checks nothing: what an
//! attacker would write. Its connections come from a pod's network namespace, but from no process of the pod, so
//! that they are not captured.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use rcgen::{CertificateParams, DnType, IsCa, Issuer, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::lab::{Lab, PodRef};

/// A certificate authority: the mesh's own, or one that nobody trusts.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
}

/// A certificate with its chain and key.
pub struct Credentials {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

/// How the server took it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The TLS handshake or the connection was refused, with this error on our side.
    Refused(String),
    /// The CONNECT was answered with this status.
    Status(u16),
}

impl Authority {
    /// A fresh root.
    pub fn foreign() -> anyhow::Result<Self> {
        Self::valid(1975, 4096)
    }

    /// A root that is valid from one year to another.
    pub fn valid(from: i32, until: i32) -> anyhow::Result<Self> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name.push(DnType::CommonName, "a root of somebody else");
        parameters.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        parameters.not_before = rcgen::date_time_ymd(from, 1, 1);
        parameters.not_after = rcgen::date_time_ymd(until, 1, 1);
        let certificate = parameters.self_signed(&key)?.der().clone();
        Ok(Self { issuer: Issuer::new(parameters, key), certificate })
    }

    /// The one that the mesh of this lab trusts, with the key from its Secret.
    pub fn of_the_mesh(lab: &Lab) -> anyhow::Result<Self> {
        let secret: k8s_openapi::api::core::v1::Secret =
            lab.cluster().get(crate::cluster::Kind::Secret, "ambit-system", "ambit-ca")?;
        let data = secret.data.unwrap_or_default();
        let text = |key: &str| -> anyhow::Result<String> {
            let bytes = data.get(key).with_context(|| format!("the CA's Secret has no {key}"))?;
            Ok(String::from_utf8(bytes.0.clone())?)
        };
        let key = KeyPair::from_pem(&text("ca-key.pem")?)?;
        let pem = text("ca-cert.pem")?;
        let certificate = CertificateDer::from(pem::parse(&pem)?.into_contents());
        Ok(Self { issuer: Issuer::from_ca_cert_pem(&pem, key)?, certificate })
    }

    /// Make it the mesh's, with the Secret that a user brings.
    pub fn install(&self, lab: &Lab) -> anyhow::Result<()> {
        let (certificate, key) = (self.pem(), self.issuer.key().serialize_pem());
        let files = serde_json::json!({
            "ca-cert.pem": certificate, "ca-key.pem": key, "cert-chain.pem": "", "root-cert.pem": certificate,
        });
        let metadata = serde_json::json!({ "name": "cacerts", "namespace": "ambit-system" });
        let secret = serde_json::json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": files,
        });
        lab.apply(&secret.to_string())
    }

    /// Its certificate, as PEM.
    #[must_use]
    pub fn pem(&self) -> String {
        pem_of("CERTIFICATE", &self.certificate)
    }

    /// A certificate for a SPIFFE URI.
    pub fn issue(&self, uri: &str) -> anyhow::Result<Credentials> {
        self.issue_with(uri, |_| {})
    }

    /// One that ran out yesterday.
    pub fn issue_expired(&self, uri: &str) -> anyhow::Result<Credentials> {
        self.issue_with(uri, |parameters| {
            parameters.not_before = rcgen::date_time_ymd(2020, 1, 1);
            parameters.not_after = rcgen::date_time_ymd(2020, 1, 2);
        })
    }

    fn issue_with(
        &self,
        uri: &str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> anyhow::Result<Credentials> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut parameters = CertificateParams::default();
        parameters.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
        parameters.extended_key_usages =
            vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth, rcgen::ExtendedKeyUsagePurpose::ServerAuth];
        change(&mut parameters);
        let leaf = parameters.signed_by(&key, &self.issuer)?;
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(|error| anyhow::anyhow!("{error}"))?;
        Ok(Credentials { chain: vec![leaf.der().clone(), self.certificate.clone()], key })
    }
}

impl Credentials {
    /// Leaf and issuer, as PEM.
    #[must_use]
    pub fn chain_pem(&self) -> String {
        self.chain.iter().map(|certificate| pem_of("CERTIFICATE", certificate)).collect()
    }

    /// The private key, as PEM.
    #[must_use]
    pub fn key_pem(&self) -> String {
        pem_of("PRIVATE KEY", self.key.secret_der())
    }
}

fn pem_of(tag: &str, der: &[u8]) -> String {
    pem::encode(&pem::Pem::new(tag, der))
}

/// CONNECT to `authority` through the HBONE port of `server`, from the network of `client`.
pub fn connect(
    lab: &Lab,
    client: &PodRef<'_>,
    server: SocketAddr,
    authority: &str,
    credentials: &Credentials,
) -> anyhow::Result<Outcome> {
    connect_with(lab, client, server, authority, &[], credentials)
}

/// The same with headers.
pub fn connect_with(
    lab: &Lab,
    client: &PodRef<'_>,
    server: SocketAddr,
    authority: &str,
    headers: &[(&str, &str)],
    credentials: &Credentials,
) -> anyhow::Result<Outcome> {
    let netns = client.live()?.netns().context("the client has no network")?;
    let socket = netns.run(|| Ok(std::net::TcpStream::connect_timeout(&server, Duration::from_secs(5))?))?;
    socket.set_nonblocking(true)?;
    lab.block_on(async {
        let stream = TcpStream::from_std(socket)?;
        let exchange = exchange(stream, authority, headers, credentials);
        match tokio::time::timeout(Duration::from_secs(10), exchange).await {
            Ok(Ok(status)) => Ok(Outcome::Status(status)),
            Ok(Err(error)) => Ok(Outcome::Refused(format!("{error:#}"))),
            Err(_) => anyhow::bail!("{server} neither answered nor refused within 10 s"),
        }
    })
}

/// TLS with whoever is at the other end, as whom the credentials say.
pub async fn tls(stream: TcpStream, credentials: &Credentials) -> anyhow::Result<TlsStream<TcpStream>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone(provider)))
        .with_client_auth_cert(credentials.chain.clone(), credentials.key.clone_key())?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.enable_sni = false;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let name = ServerName::try_from("ambit.invalid")?;
    connector.connect(name, stream).await.context("TLS")
}

async fn exchange(
    stream: TcpStream,
    authority: &str,
    headers: &[(&str, &str)],
    credentials: &Credentials,
) -> anyhow::Result<u16> {
    let tls = tls(stream, credentials).await?;
    let (mut sender, connection) = h2::client::handshake(tls).await.context("HTTP/2")?;
    let driver = tokio::spawn(connection);
    let mut request = http::Request::connect(authority);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(())?;
    let answer = async {
        std::future::poll_fn(|context| sender.poll_ready(context)).await?;
        let (response, _stream) = sender.send_request(request, false)?;
        anyhow::Ok(response.await?.status().as_u16())
    };
    let answer = answer.await;
    driver.abort();
    // The connection's own error says more than "broken": it has the server's alert.
    match (answer, driver.await) {
        (Ok(status), _) => Ok(status),
        (Err(_), Ok(Err(error))) => Err(error.into()),
        (Err(error), _) => Err(error),
    }
}

/// Accepts every server.
#[derive(Debug)]
struct Anyone(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
