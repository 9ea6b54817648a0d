//! Answers CreateCertificate: authenticates, decides, signs, and says why not.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_core::identity::Identity;
use mesh_core::proto::ca::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use mesh_core::proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use prost_types::value::Kind;
use tokio::sync::Semaphore;
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Response, Status};
use tracing::{info, warn};

use crate::ca::attest::{Caller, Fact, Facts, Refusal, Rules, Verdict, attest, server_names};
use crate::ca::cluster::{Callers, ClusterError};
use crate::ca::csr::{InvalidCsr, SigningRequest};
use crate::ca::issue::{IssueError, Issued};
use crate::ca::keeper::CurrentWatch;
use crate::ca::listen::Origin;
use crate::ca::metrics::Metrics;

/// Longest request message: a CSR of the greatest length, and room for the rest.
const MAX_MESSAGE: usize = 64 * 1024;
/// Requests in work at once; more wait.
const MAX_REQUESTS: usize = 64;
/// The decision asks for three facts at most.
const MAX_FACTS: usize = 4;
/// Istio's name for the identity asked for, in the request's metadata.
const IMPERSONATED: &str = "ImpersonatedIdentity";

/// The service.
pub struct CertificateService<C> {
    callers: C,
    rules: Rules,
    current: CurrentWatch,
    metrics: Metrics,
    slots: Arc<Semaphore>,
}

/// Why a request got no certificate.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(transparent)]
    Caller(#[from] Refusal),
    #[error(transparent)]
    Csr(#[from] InvalidCsr),
    #[error(transparent)]
    Issue(#[from] IssueError),
    #[error("the caller cannot be checked now: {0}")]
    Cluster(#[from] ClusterError),
    #[error("the CA has no key yet: it cannot read its Secret")]
    NoAuthority,
}

impl<C: Callers> CertificateService<C> {
    /// With the key that `current` shows.
    pub fn new(callers: C, rules: Rules, current: CurrentWatch, metrics: Metrics) -> Self {
        Self { callers, rules, current, metrics, slots: Arc::new(Semaphore::new(MAX_REQUESTS)) }
    }

    /// As a gRPC service.
    pub fn into_server(self) -> IstioCertificateServiceServer<Self> {
        IstioCertificateServiceServer::new(self).max_decoding_message_size(MAX_MESSAGE)
    }

    async fn certify(&self, request: &Request<IstioCertificateRequest>) -> Result<Issued, Refused> {
        let caller = self.authenticate(request).await?;
        let message = request.get_ref();
        let asked = impersonated(message)?;
        let identity = self.entitle(&caller, asked.as_ref()).await?;
        let csr = SigningRequest::from_pem(&message.csr)?;
        csr.check_names(&identity)?;
        let validity = Duration::from_secs(message.validity_duration.try_into().unwrap_or(0));
        let current = self.current.borrow().clone().ok_or(Refused::NoAuthority)?;
        let names = server_names(&self.rules, &caller.account, &identity);
        let issued =
            current.authority.issue_named(&csr.key, &identity, names, validity, SystemTime::now())?;
        info!(%identity, caller = %caller.account, "issued a certificate");
        Ok(issued)
    }

    async fn authenticate(&self, request: &Request<IstioCertificateRequest>) -> Result<Caller, Refused> {
        let token = bearer(request.metadata()).ok_or(Refusal::NoToken)?;
        let review = self.callers.review(token).await?;
        Ok(Caller::from_review(&review)?)
    }

    async fn entitle(&self, caller: &Caller, asked: Option<&Identity>) -> Result<Identity, Refused> {
        let mut facts = Facts::default();
        for _ in 0..MAX_FACTS {
            match attest(&self.rules, caller, asked, &facts) {
                Verdict::Issue(identity) => return Ok(identity),
                Verdict::Refuse(refusal) => return Err(refusal.into()),
                Verdict::Need(Fact::CallerPod { namespace, name }) => {
                    facts.caller_pod = Some(self.callers.pod(&namespace, &name).await?);
                }
                Verdict::Need(Fact::Pods { node, namespace, freshness }) => {
                    let pods = self.callers.pods(&node, &namespace, freshness).await?;
                    facts.pods = Some((freshness, pods));
                }
            }
        }
        Err(Refusal::NoNode(caller.account.to_string()).into())
    }
}

#[tonic::async_trait]
impl<C: Callers> IstioCertificateService for CertificateService<C> {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let slot = self.slots.acquire().await;
        let result = self.certify(&request).await;
        drop(slot);
        match result {
            Ok(issued) => {
                self.metrics.issued();
                Ok(Response::new(IstioCertificateResponse { cert_chain: issued.cert_chain }))
            }
            Err(refused) => {
                self.metrics.refused(refused.reason());
                let peer = request.extensions().get::<Origin>().map(|origin| origin.peer);
                warn!(?peer, reason = refused.reason(), "refused a certificate: {refused}");
                Err(Status::new(refused.code(), refused.to_string()))
            }
        }
    }
}

impl Refused {
    fn reason(&self) -> &'static str {
        match self {
            Self::Caller(refusal) => refusal.reason(),
            Self::Csr(invalid) => invalid.reason(),
            Self::Issue(_) => "signing_failed",
            Self::Cluster(_) => "api_unreachable",
            Self::NoAuthority => "no_key",
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::Caller(refusal) if refusal.is_unauthenticated() => Code::Unauthenticated,
            Self::Caller(Refusal::Malformed(_)) | Self::Csr(_) => Code::InvalidArgument,
            Self::Caller(_) => Code::PermissionDenied,
            Self::Issue(IssueError::Expired) => Code::FailedPrecondition,
            Self::Issue(IssueError::Sign(_)) => Code::Internal,
            Self::Cluster(_) | Self::NoAuthority => Code::Unavailable,
        }
    }
}

/// The token of `authorization: Bearer <token>`.
pub(crate) fn bearer(metadata: &MetadataMap) -> Option<&str> {
    let value = metadata.get("authorization")?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

fn impersonated(message: &IstioCertificateRequest) -> Result<Option<Identity>, Refusal> {
    let field = message.metadata.as_ref().and_then(|metadata| metadata.fields.get(IMPERSONATED));
    match field.and_then(|value| value.kind.as_ref()) {
        None => Ok(None),
        Some(Kind::StringValue(text)) => Ok(Some(text.parse::<Identity>()?)),
        Some(_) => Ok(Some("".parse::<Identity>()?)),
    }
}

#[cfg(test)]
mod tests;
