//! The certificate authority role, `node-agent ca`.
//!
//! It runs as ordinary pods of the mesh's own namespace, and it alone holds the signing key. `attest` decides who may
//! have which identity, `issue` signs, `roots` and `keeper` own the key's home in the API server, `rotation` decides when
//! another key signs, `server` speaks gRPC.
//!
//! **Invariant:** no private key, and no caller's token, ever reaches a log or an error text.

pub mod attest;
pub mod authority;
pub mod cluster;
pub mod csr;
pub mod issue;
pub mod keeper;
pub mod lifetime;
pub mod listen;
pub mod metrics;
pub mod roots;
pub mod rotation;
pub mod server;

#[cfg(test)]
pub(crate) mod fakes;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use futures_util::Stream;
use http::Request;
use mesh_core::identity::TrustDomain;
use mesh_core::readiness::Readiness;
use mesh_core::status::{self, Handlers};
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tower::Service;
use tower::layer::layer_fn;
use tracing::info;

use crate::ca::attest::{Rules, ServiceAccount};
use crate::ca::cluster::{Callers, Cluster};
use crate::ca::issue::Times;
use crate::ca::keeper::Keeper;
use crate::ca::lifetime::Bounds;
use crate::ca::listen::Origin;
use crate::ca::metrics::Metrics;
use crate::ca::server::CertificateService;

/// Settings of `node-agent ca`.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
pub struct Config {
    /// Where certificates are asked for, over TLS.
    #[arg(long, env = "AMBIT_CA_LISTEN", default_value = "[::]:15012")]
    pub listen: SocketAddr,
    /// Namespace of the mesh itself: of the CA's Secret, its ConfigMap, and the ztunnel ServiceAccount.
    #[arg(long, env = "POD_NAMESPACE", default_value = "ambit-system")]
    pub system_namespace: String,
    /// Trust domain of the SPIFFE identities.
    #[arg(long, env = "TRUST_DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,
    /// DNS suffix of the cluster's services.
    #[arg(long, env = "CLUSTER_DOMAIN", default_value = "cluster.local")]
    pub cluster_domain: String,
    /// Where readiness, liveness and metrics are served.
    #[arg(long, env = "AMBIT_STATUS_ADDRESS", default_value = "[::]:15014")]
    pub status_address: SocketAddr,
    /// What is signed.
    #[command(flatten)]
    pub times: Times,
}

/// Runs until `shutdown`; requests under way are answered first.
///
/// # Errors
/// When a setting is wrong, an address is taken, or a part ends by itself.
pub async fn run(config: Config, client: kube::Client, shutdown: CancellationToken) -> anyhow::Result<()> {
    let rules = config.rules()?;
    let status_listener = status::bind(config.status_address)?;
    let listener = status::bind(config.listen)?;

    let readiness = Readiness::new();
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let cluster = Cluster::new(client, config.system_namespace.clone());
    let gate = readiness.gate("ca secret");
    let keeper =
        Keeper::new(cluster.clone(), config.trust_domain.clone(), config.names(), gate, metrics.clone())
            .with_times(config.times);
    let current = keeper.watch();
    let service = CertificateService::new(cluster, rules, current.clone(), metrics);
    info!(listen = %config.listen, status = %config.status_address, trust_domain = config.trust_domain, "CA started");

    let bounds = Bounds::default();
    let incoming = listen::accept(listener, listen::tls_config(Arc::new(listen::Own(current)))?, bounds);
    let metrics = mesh_core::metrics::handler(Arc::new(registry));
    let handlers = Handlers::new().readiness(readiness).liveness().get("/metrics", metrics);
    tokio::select! {
        () = keeper.run() => anyhow::bail!("the keeper of the CA's Secret ended"),
        () = status::serve(status_listener, handlers, std::future::pending()) => anyhow::bail!("the status server ended"),
        served = serve(service, incoming, bounds.age, shutdown) => served.context("the certificate service failed"),
    }
}

/// Serves certificates on connections whose TLS handshake is done; a client whose connection is of that `age` is told
/// to go (GOAWAY).
///
/// # Errors
/// When the server fails as a whole.
pub async fn serve<C: Callers>(
    service: CertificateService<C>,
    incoming: impl Stream<Item = std::io::Result<listen::Connection>>,
    age: Duration,
    shutdown: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let cut = shutdown.clone();
    let server = Server::builder()
        .timeout(REQUEST_DEADLINE)
        .max_concurrent_streams(MAX_STREAMS)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .max_connection_age(age)
        .layer(layer_fn(counted))
        .add_service(service.into_server())
        .serve_with_incoming_shutdown(incoming, shutdown.cancelled_owned());
    // Clients keep their connection open; the ones that do not close it on GOAWAY are cut.
    tokio::select! {
        served = server => served,
        () = async { cut.cancelled().await; tokio::time::sleep(REQUEST_DEADLINE).await } => Ok(()),
    }
}

/// Tells a connection of its requests: from their first header to the answer's.
fn counted<S, T>(
    service: S,
) -> impl Service<Request<T>, Response = S::Response, Error = S::Error, Future: Send> + Clone
where
    S: Service<Request<T>, Future: Send> + Clone,
{
    tower::service_fn(move |request: Request<T>| {
        let in_work = request.extensions().get::<Origin>().map(|origin| origin.requests.begin());
        let answer = service.clone().call(request);
        async move {
            let _in_work = in_work;
            answer.await
        }
    })
}

impl Config {
    fn rules(&self) -> anyhow::Result<Rules> {
        let trust_domain = self.trust_domain.parse::<TrustDomain>().context("--trust-domain")?;
        let ztunnel = ServiceAccount { namespace: self.system_namespace.clone(), name: "ztunnel".to_owned() };
        let agent = ServiceAccount { name: "node-agent".to_owned(), ..ztunnel.clone() };
        Ok(Rules { trust_domain, ztunnel, agent, agent_names: self.names_of("node-agent") })
    }

    /// The names of a Service of the mesh.
    fn names_of(&self, service: &str) -> Vec<String> {
        let name = format!("{service}.{}.svc", self.system_namespace);
        vec![format!("{name}.{}", self.cluster_domain), name]
    }

    /// What clients call the CA, and what its serving certificate therefore says.
    fn names(&self) -> Vec<String> {
        let mut names = self.names_of("ambit-ca");
        names.push("localhost".to_owned());
        names
    }
}

/// For one request, including what is asked of the API server for it.
const REQUEST_DEADLINE: Duration = Duration::from_secs(30);
/// A ztunnel has eight requests under way.
const MAX_STREAMS: u32 = 64;
/// Finds dead peers.
const KEEPALIVE: Duration = Duration::from_secs(30);
