//! Asking the certificate authority: `istio.v1.auth.IstioCertificateService/CreateCertificate` over TLS.
//!
//! **Invariant:** keys are made here and stay here; only the signing request, which names nothing but the identity,
//! leaves the process. Root and token are files that are read again each time, because both are rotated under us.

use std::path::PathBuf;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use prost_types::{Struct, Value, value::Kind};
use rcgen::string::Ia5String;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request};

use super::FetchCert;
use super::workload::{InvalidCert, WorkloadCert};
use crate::identity::Identity;
use crate::proto::ca::IstioCertificateRequest;
use crate::proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;

/// Time for connecting, and again for the answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// What is asked for; the authority may give less.
const LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Where the certificate authority is and how to be believed by it.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
pub struct CaConfig {
    /// URL of the certificate authority
    #[arg(long, env = "CA_ADDRESS", default_value = "https://ambit-ca.ambit-system.svc:15012")]
    pub ca_address: String,
    /// PEM file with the root that the certificate authority's own certificate is verified with
    #[arg(long, env = "CA_ROOT_CA", default_value = "/var/run/secrets/ambit/root-cert.pem")]
    pub ca_root: PathBuf,
    /// PEM file with the roots of the mesh, as the certificate authority publishes them: peers are verified with what it
    /// has, as soon as it changes, besides the roots that come with each certificate
    #[arg(long, env = "MESH_ROOTS")]
    pub mesh_roots: Option<PathBuf>,
    /// File with the service account token that is shown to the certificate authority
    #[arg(long, env = "AUTH_TOKEN", default_value = "/var/run/secrets/tokens/istio-token")]
    pub token: PathBuf,
}

/// Why a fetch failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FetchError {
    /// A file that is needed cannot be read.
    #[error("cannot read {what} from {path}: {error}")]
    File {
        /// Its purpose.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// What is wrong.
        error: String,
    },
    /// The address is none.
    #[error(
        "{address:?} is no address of a certificate authority ({error}); it must be https://<host>:<port>"
    )]
    Address {
        /// What is configured.
        address: String,
        /// What is wrong.
        error: String,
    },
    /// It does not answer.
    #[error("the certificate authority at {address} cannot be reached: {error}")]
    Unreachable {
        /// Where.
        address: String,
        /// What happened.
        error: String,
    },
    /// It says no.
    #[error("the certificate authority refuses: {0}")]
    Refused(String),
    /// Its answer is of no use.
    #[error("the certificate authority answers with a certificate that cannot be used: {0}")]
    Invalid(#[from] InvalidCert),
    /// The answer has another layout than leaf, intermediates, roots.
    #[error(
        "the certificate authority's answer has {0} certificates, expected a leaf and its roots at least"
    )]
    Layout(usize),
    /// No key or signing request could be made.
    #[error("cannot make a key: {0}")]
    Key(String),
    /// No attempt has ended yet.
    #[error("it is being fetched, try again")]
    Pending,
}

/// The usual [`FetchCert`].
#[derive(Clone, Debug)]
pub struct CaClient {
    config: CaConfig,
    cluster_id: String,
}

impl CaClient {
    /// `cluster_id` is told to the authority, as Istio's clients do.
    pub fn new(config: CaConfig, cluster_id: String) -> Self {
        Self { config, cluster_id }
    }

    async fn create(&self, identity: &Identity) -> Result<WorkloadCert, FetchError> {
        let request = SigningRequest::new(identity)?;
        let token = self.read("the service account token", &self.config.token).await?;
        let mut client = IstioCertificateServiceClient::new(self.connect().await?);
        let mut message = Request::new(IstioCertificateRequest {
            csr: request.csr,
            validity_duration: i64::try_from(LIFETIME.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(impersonate(identity)),
        });
        let metadata = message.metadata_mut();
        metadata.insert("authorization", header("token", &format!("Bearer {}", token.trim()))?);
        metadata.insert("clusterid", header("cluster id", &self.cluster_id)?);
        let response = client.create_certificate(message).await.map_err(|status| self.refused(&status))?;
        let (chain, roots) = split(&response.into_inner().cert_chain)?;
        Ok(WorkloadCert::new(identity.clone(), request.key, chain, roots)?)
    }

    async fn connect(&self) -> Result<Channel, FetchError> {
        let address = &self.config.ca_address;
        let bad_address = |error: String| FetchError::Address { address: address.clone(), error };
        if !address.starts_with("https://") {
            return Err(bad_address("not https".into()));
        }
        let root = self.read("the certificate authority's root", &self.config.ca_root).await?;
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(root));
        let endpoint = Endpoint::from_shared(address.clone())
            .and_then(|endpoint| endpoint.connect_timeout(TIMEOUT).timeout(TIMEOUT).tls_config(tls))
            .map_err(|error| bad_address(chain_of(&error)))?;
        let unreachable = |error: String| FetchError::Unreachable { address: address.clone(), error };
        // The endpoint's own timeout is for TCP only.
        match tokio::time::timeout(2 * TIMEOUT, endpoint.connect()).await {
            Ok(connected) => connected.map_err(|error| unreachable(chain_of(&error))),
            Err(_) => Err(unreachable("no TLS handshake within 20 s".into())),
        }
    }

    async fn read(&self, what: &'static str, path: &PathBuf) -> Result<String, FetchError> {
        tokio::fs::read_to_string(path).await.map_err(|error| FetchError::File {
            what,
            path: path.clone(),
            error: error.to_string(),
        })
    }

    fn refused(&self, status: &tonic::Status) -> FetchError {
        match status.code() {
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => FetchError::Unreachable {
                address: self.config.ca_address.clone(),
                error: status.message().to_owned(),
            },
            code => FetchError::Refused(format!("{code:?}: {}", status.message())),
        }
    }
}

impl FetchCert for CaClient {
    fn fetch<'a>(&'a self, identity: &'a Identity) -> BoxFuture<'a, Result<WorkloadCert, FetchError>> {
        self.create(identity).boxed()
    }
}

/// A new key with a request to sign it.
struct SigningRequest {
    key: PrivateKeyDer<'static>,
    csr: String,
}

impl SigningRequest {
    fn new(identity: &Identity) -> Result<Self, FetchError> {
        let failed = |error: rcgen::Error| FetchError::Key(error.to_string());
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names =
            vec![SanType::URI(Ia5String::try_from(identity.to_string()).map_err(failed)?)];
        let csr = params.serialize_request(&key).and_then(|csr| csr.pem()).map_err(failed)?;
        Ok(Self { key: PrivatePkcs8KeyDer::from(key.serialize_der()).into(), csr })
    }
}

/// Whose certificate is asked for, when the caller's token is another's.
fn impersonate(identity: &Identity) -> Struct {
    let value = Value { kind: Some(Kind::StringValue(identity.to_string())) };
    Struct { fields: [("ImpersonatedIdentity".to_owned(), value)].into() }
}

fn header(what: &'static str, value: &str) -> Result<MetadataValue<Ascii>, FetchError> {
    // Not the value: it may be the token.
    value.parse().map_err(|_| FetchError::Key(format!("the {what} has characters that no header may have")))
}

type Certs = Vec<CertificateDer<'static>>;

/// The first is the leaf, the last holds the roots, those between are intermediates.
fn split(answer: &[String]) -> Result<(Certs, Certs), FetchError> {
    let [chain @ .., roots] = answer else { return Err(FetchError::Layout(0)) };
    if chain.is_empty() {
        return Err(FetchError::Layout(answer.len()));
    }
    let mut certs = Vec::new();
    for pem in chain {
        certs.extend(parse(pem)?);
    }
    Ok((certs, parse(roots)?))
}

fn parse(pem: &str) -> Result<Certs, InvalidCert> {
    let certificates: Result<Certs, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    certificates.map_err(|error| InvalidCert::Malformed(error.to_string()))
}

/// tonic's own text says only "transport error"; the causes below it say what happened.
fn chain_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
