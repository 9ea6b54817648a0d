//! Delta xDS for proxies that are not this node's ztunnel: over TLS on TCP, to whoever shows a token.
//!
//! The certificate is the agent's own from the mesh's CA, which puts the name of the agent's Service into it. Nothing
//! else of the agent depends on this: without a certificate, or where the port is taken, the rest goes on.
//! **Invariant:** no stream begins before the API server has said whose the token is.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use http::Extensions;
use mesh_core::backoff::Backoff;
use mesh_core::certs::{CaClient, CaConfig, Certificates, Roots};
use mesh_core::identity::Identity;
use mesh_core::status;
use mesh_core::tls::revocation::Revocations;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;
use tonic::transport::Server;
use tonic::{Code, Status};
use tracing::{info, warn};

use super::admission::{Kind, Refusal, Rules, Seat, Seats};
use super::server::{Admission, Admitted, Feed, serve_to};
use crate::ca::attest::{self, Caller, ServiceAccount};
use crate::ca::cluster::{Callers, ClusterError};
use crate::ca::lifetime::{Bounds, InWork};
use crate::ca::listen::{self, Origin};
use crate::ca::server::bearer;

/// Settings of the server.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
pub struct Config {
    /// Where configuration is served to proxies that are not this node's ztunnel, over TLS; "off": nowhere
    #[arg(long, env = "AMBIT_XDS_ADDRESS", default_value = "[::]:15012")]
    pub xds_address: Address,
    /// Service accounts, as <namespace>/<name> and comma separated, whose proxies are told everything by the agent of
    /// their node; others are told what is of their own namespace
    #[arg(long, env = "AMBIT_XDS_PROXIES", default_value = "")]
    pub xds_proxies: Accounts,
    /// The CA.
    #[command(flatten)]
    pub ca: CaConfig,
}

/// Where to listen, if at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address(Option<SocketAddr>);

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self(None)),
            text => text
                .parse()
                .map(|address| Self(Some(address)))
                .map_err(|_| format!("{text:?} is no address with a port, e.g. [::]:15012, and not \"off\"")),
        }
    }
}

/// Service accounts, none for an empty text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accounts(BTreeSet<ServiceAccount>);

impl FromStr for Accounts {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = text.split(',').map(str::trim).filter(|name| !name.is_empty());
        names.map(str::parse).collect::<Result<_, _>>().map(Self)
    }
}

impl Config {
    /// Who is told what; ztunnel is a proxy in any case.
    pub fn rules(&self, node: &str, root_namespace: &str, system_namespace: &str) -> Rules {
        let ztunnel = ServiceAccount { namespace: system_namespace.to_owned(), name: "ztunnel".to_owned() };
        let proxies: BTreeSet<_> = self.xds_proxies.0.iter().cloned().chain([ztunnel]).collect();
        Rules { node: node.to_owned(), root_namespace: root_namespace.to_owned(), proxies }
    }
}

/// Listens as soon as it can, and serves until `shutdown`.
pub async fn run<C: Callers>(
    config: Config,
    identity: Identity,
    cluster_id: String,
    admission: Strangers<C>,
    feed: Feed,
    shutdown: CancellationToken,
) {
    let Address(Some(address)) = config.xds_address else { return shutdown.cancelled().await };
    let (roots, follow_roots) = Roots::follow_if(config.ca.mesh_roots.as_deref()).await;
    let authority = Arc::new(CaClient::new(config.ca, cluster_id));
    let certificates = Certificates::new(authority, Revocations::default(), roots);
    let serving = serve_at(address, certificates, identity, admission, feed, shutdown.clone());
    let ((), ()) = tokio::join!(serving, shutdown.run_until_cancelled(follow_roots).map(drop));
}

async fn serve_at<C: Callers>(
    address: SocketAddr,
    certificates: Certificates,
    identity: Identity,
    admission: Strangers<C>,
    feed: Feed,
    shutdown: CancellationToken,
) {
    let listening = async {
        // A connection that is refused says more to a proxy than a handshake without a certificate.
        while certificates.get(&identity).await.is_err() {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        bind(address).await
    };
    let Some(listener) = shutdown.run_until_cancelled(listening).await else { return };
    info!(%address, "serving xDS to proxies with a token");
    if let Err(error) = serve(listener, certificates, identity, admission, feed, shutdown.clone()).await {
        warn!("xDS over TCP has ended: {error}");
    }
    shutdown.cancelled().await;
}

/// Whoever has the port may give it up: an agent before this, for one.
async fn bind(address: SocketAddr) -> TcpListener {
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
    loop {
        match status::bind(address) {
            Ok(listener) => return listener,
            Err(error) => warn!("no xDS for proxies of others: {error:#}"),
        }
        tokio::time::sleep(backoff.delay()).await;
    }
}

/// Serves on a listener as `identity`.
///
/// # Errors
/// When the TLS settings or the transport fail as a whole.
pub async fn serve<C: Callers>(
    listener: TcpListener,
    certificates: Certificates,
    identity: Identity,
    admission: Strangers<C>,
    feed: Feed,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let bounds = Bounds::default();
    let tls = listen::tls_config(Arc::new(Own { certificates, identity }))?;
    let server =
        Server::builder().max_concurrent_streams(MAX_STREAMS_OF_CONNECTION).max_connection_age(bounds.age);
    let incoming = listen::accept(listener, tls, bounds);
    Ok(serve_to(server, incoming, feed, admission, MAX_REQUEST, shutdown).await?)
}

/// The agent's certificate of the moment; no handshake succeeds before there is one.
#[derive(Debug)]
struct Own {
    certificates: Certificates,
    identity: Identity,
}

impl ResolvesServerCert for Own {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.certificates.current(&self.identity)?.resolver().resolve(hello)
    }
}

/// Clients that come over the network.
#[derive(Debug)]
pub struct Strangers<C> {
    rules: Rules,
    callers: C,
    seats: Seats,
    reviews: Semaphore,
}

/// What a stream holds.
#[derive(Debug)]
pub struct Place {
    _seat: Seat,
    /// Its connection is not idle.
    _in_work: Option<InWork>,
}

#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(transparent)]
    Token(#[from] attest::Refusal),
    #[error(transparent)]
    Account(#[from] Refusal),
    #[error("the caller cannot be checked now: {0}")]
    Cluster(#[from] ClusterError),
}

impl Refused {
    fn code(&self) -> Code {
        match self {
            Self::Token(_) => Code::Unauthenticated,
            Self::Account(Refusal::Elsewhere { .. }) => Code::PermissionDenied,
            Self::Account(Refusal::TooMany(_) | Refusal::Namespace(_) | Refusal::Full) => {
                Code::ResourceExhausted
            }
            Self::Cluster(_) => Code::Unavailable,
        }
    }
}

impl<C: Callers> Strangers<C> {
    /// Asks `callers` who they are.
    pub fn new(rules: Rules, callers: C) -> Self {
        Self { rules, callers, seats: Seats::default(), reviews: Semaphore::new(MAX_REVIEWS) }
    }

    async fn decide(
        &self,
        metadata: &MetadataMap,
    ) -> Result<(ServiceAccount, super::scope::Scope, Seat), Refused> {
        let token = bearer(metadata).ok_or(attest::Refusal::NoToken)?;
        let place = self.reviews.acquire().await;
        let caller = Caller::from_review(&self.callers.review(token).await?)?;
        let (kind, node) = match self.rules.is_proxy(&caller.account) {
            true => (Kind::Proxy, self.node_of(&caller).await?),
            false => (Kind::Other, None),
        };
        drop(place);
        let scope = self.rules.scope(&caller.account, node.as_deref())?;
        let seat = self.seats.take(&caller.account, kind)?;
        Ok((caller.account, scope, seat))
    }

    /// Tokens of clusters before 1.30 name the pod, and not where it is.
    async fn node_of(&self, caller: &Caller) -> Result<Option<String>, ClusterError> {
        if let Some(node) = caller.node() {
            return Ok(Some(node.to_owned()));
        }
        let Some((name, uid)) = caller.pod() else { return Ok(None) };
        let pod = self.callers.pod(&caller.account.namespace, name).await?;
        Ok(pod.filter(|pod| pod.uid == uid && !pod.node.is_empty()).map(|pod| pod.node))
    }
}

impl<C: Callers> Admission for Strangers<C> {
    type Place = Place;

    async fn admit(
        &self,
        metadata: &MetadataMap,
        connection: &Extensions,
    ) -> Result<Admitted<Place>, Status> {
        let origin = connection.get::<Origin>();
        let in_work = origin.map(|origin| origin.requests.begin());
        match self.decide(metadata).await {
            Ok((account, scope, seat)) => Ok(Admitted {
                who: account.to_string(),
                scope,
                place: Place { _seat: seat, _in_work: in_work },
                until: Some(tokio::time::Instant::now() + STREAM_AGE),
            }),
            Err(refused) => {
                warn!(peer = ?origin.map(|origin| origin.peer), "refused an xDS stream: {refused}");
                Err(Status::new(refused.code(), refused.to_string()))
            }
        }
    }
}

/// A client that comes back names all that it holds: room for some 8,000 names. So much each stream may have the agent
/// keep while a request is on its way.
const MAX_REQUEST: usize = 1 << 20;
/// One is enough for delta xDS, which has all types on one stream.
const MAX_STREAMS_OF_CONNECTION: u32 = 8;
/// Tokens that the API server is asked about at once; more wait.
const MAX_REVIEWS: usize = 8;
/// Then a client comes again, with a token that is still good. Less than a connection may last.
const STREAM_AGE: Duration = Duration::from_secs(25 * 60);

#[cfg(test)]
mod tests;
