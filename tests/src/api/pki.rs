//! The cluster's certificate authority: the server's certificate, client certificates, and the TLS settings.
//! A client may show a certificate of this CA: its common name is the user, its organizations are the groups.

use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::token::User;

/// Names and addresses the server is always known by.
const NAMES: [&str; 8] = [
    "localhost",
    "127.0.0.1",
    "10.96.0.1",
    "fd00:96::1",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
];

pub(super) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// A client's certificate and key, in PEM.
pub(super) struct ClientPem {
    pub(super) certificate: String,
    pub(super) key: String,
}

impl Authority {
    pub(super) fn new() -> anyhow::Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::CommonName, "kubernetes");
        Ok(Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate()?)? })
    }

    pub(super) fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// rcgen writes one organization, so one group.
    pub(super) fn client(&self, user: &str, group: &str) -> anyhow::Result<ClientPem> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, user);
        params.distinguished_name.push(DnType::OrganizationName, group);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(ClientPem { certificate, key: key.serialize_pem() })
    }

    /// Serves HTTP/2 and HTTP/1.1, asks clients for a certificate and takes them without.
    pub(super) fn server_config(&self, sans: Vec<String>) -> anyhow::Result<ServerConfig> {
        let mut names = sans;
        names.extend(NAMES.map(str::to_owned));
        names.sort();
        names.dedup();
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name.push(DnType::CommonName, "kube-apiserver");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate()?;
        let certificate: CertificateDer<'static> = params.signed_by(&key, &self.issuer)?.into();
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());

        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone())?;
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .allow_unauthenticated()
            .build()?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![certificate], key)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }
}

/// The user a verified client certificate stands for.
pub(super) fn user_of(certificate: &CertificateDer<'_>) -> Option<User> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let name = parsed.subject().iter_common_name().next()?.as_str().ok()?;
    let groups: Vec<&str> =
        parsed.subject().iter_organization().filter_map(|group| group.as_str().ok()).collect();
    Some(User::new(name, &groups))
}

#[cfg(test)]
mod tests {
    use super::{Authority, user_of};

    #[test]
    fn a_client_certificate_names_user_and_group() {
        let client = Authority::new().unwrap().client("jo", "a").unwrap();
        let der = pem::parse(client.certificate).unwrap().into_contents();
        let user = user_of(&der.into()).unwrap();
        assert_eq!(
            (user.name.as_str(), user.groups),
            ("jo", vec!["a".into(), "system:authenticated".into()])
        );
    }
}
