//! Wires the parts: configuration in, a running proxy, a clean end.

use std::sync::Arc;
use std::time::SystemTime;

use anyhow::Context;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use mesh_core::addr::Network;
use mesh_core::certs::{CaClient, Certificates, FetchCert, Roots};
use mesh_core::drain;
use mesh_core::proto::discovery::Node;
use mesh_core::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use mesh_core::readiness::Readiness;
use mesh_core::status::{self, Handlers};
use mesh_core::store::{self, Changes};
use mesh_core::telemetry;
use mesh_core::tls::revocation::{Revocations, file};
use mesh_core::xds::{self, mesh::Mesh, stream::Session};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::config::Config;
use crate::connections::Connections;
use crate::denials::{self, Denials};
use crate::descriptors::Descriptors;
use crate::dns::names::Zone;
use crate::dump;
use crate::expiry;
use crate::hosts::{self, Hosts, Resolve};
use crate::metrics::Metrics;
use crate::neighbours::Neighbours;
use crate::pace::Pace;
use crate::pods::{self, OpenPod, Pods};
use crate::policy::PolicyChanges;
use crate::proxy::Proxy;
use crate::sockets::{self, FlagMap, PodSockets, Sockets};

/// What the process takes from the world around it; tests bring their own.
pub struct Surroundings {
    /// Signs certificates.
    pub authority: Arc<dyn FetchCert>,
    /// Opens sockets in pods.
    pub open_pod: Arc<OpenPod>,
    /// How many its connections may have.
    pub descriptors: Descriptors,
    /// Looks up host names of endpoints.
    pub resolve: Arc<Resolve>,
    /// What the process logs.
    pub levels: telemetry::Levels,
}

impl Surroundings {
    /// A real certificate authority and real network namespaces.
    ///
    /// # Errors
    /// When /proc is not mounted.
    pub fn real(config: &Config, levels: telemetry::Levels) -> anyhow::Result<Self> {
        let own = sockets::own_netns().context("opening this process's network namespace in /proc")?;
        let open_pod = move |netns, flags: FlagMap| -> Arc<dyn Sockets> {
            Arc::new(PodSockets::new(netns, own.clone(), flags))
        };
        let authority = CaClient::new(config.ca.clone(), config.cluster_id.clone());
        let descriptors = Descriptors::of_process();
        let (authority, open_pod, resolve) =
            (Arc::new(authority), Arc::new(open_pod), Arc::new(hosts::of_node));
        Ok(Self { authority, open_pod, descriptors, resolve, levels })
    }
}

/// Runs until `shutdown` completes, then drains.
///
/// # Errors
/// When a status port is taken.
pub async fn run(
    config: Config,
    surroundings: Surroundings,
    shutdown: impl Future<Output = &'static str>,
) -> anyhow::Result<()> {
    let (writer, mesh) = store::new();
    let (to_agent, to_tell) = denials::queue();
    let denials = Denials::new(to_agent.clone());
    let metrics = Metrics::new(&surroundings.descriptors);
    let readiness = Readiness::new();
    let (revocations, follow_file) = revocations(&config, &metrics, &readiness).await;
    let (roots, follow_roots) = Roots::follow_if(config.ca.mesh_roots.as_deref()).await;
    let pace = Pace::new(config.pace.frames(config.worker_threads()), metrics.slowed.clone());
    let proxy = Arc::new(Proxy {
        mesh,
        certificates: Certificates::new(surroundings.authority, revocations.clone(), roots),
        revocations,
        metrics,
        connections: Connections::default(),
        hosts: Hosts::new(surroundings.resolve),
        policy: PolicyChanges::default(),
        denials,
        limits: config.budget,
        descriptors: surroundings.descriptors,
        pace,
        neighbours: Neighbours::default(),
        pool_idle: config.pool_idle,
        same_node_mtls: config.same_node_mtls,
        zone: Zone::from(config.cluster_domain.as_str()),
    });
    let (mesh_known, known) = watch::channel(false);
    let pods = Pods::new(proxy.clone(), surroundings.open_pod, known);
    let (xds_gate, pods_gate) = (readiness.gate("xds"), readiness.gate("pods"));
    let mut servers = serve_status(&config, surroundings.levels, &proxy, &pods.listing(), &readiness).await?;

    servers.spawn(follow_file);
    servers.spawn(follow_roots);
    servers.spawn(expiry::run(proxy.certificates.clone(), to_agent));
    // Policies first: a workload that names one that is not known lets nobody in.
    let session = Session::new(node(&config), &[AUTHORIZATION_TYPE, ADDRESS_TYPE]);
    let xds_socket = config.run_dir.join("xds.sock");
    let xds_metrics = proxy.metrics.xds.clone();
    let (policy, mesh, counted) = (proxy.policy.clone(), proxy.mesh.clone(), proxy.metrics.policies.clone());
    let tell = move |changes: &Changes| {
        policy.tell(changes, &mesh);
        let gone = changes.policies.named().filter(|policy| !mesh.has_authorization(policy));
        gone.for_each(|policy| counted.forget(policy));
    };
    let handler = Mesh::new(writer, &config.root_namespace, tell);
    servers.spawn(async move {
        let complete = || {
            mesh_known.send_replace(true);
            xds_gate.open();
        };
        let never = xds::client::run(&xds_socket, session, handler, &xds_metrics, complete).await;
        match never {}
    });
    let (drain, watch) = drain::new();
    let follow = pods::link::Follow {
        socket: config.run_dir.join(PODS_SOCKET),
        network: Network::from(config.network.as_str()),
        ready: pods_gate,
        drain: watch,
        deadline: config.drain_deadline,
        versions: config.protocol.versions(),
    };
    let following = tokio::spawn(pods::link::run(pods, follow, to_tell));
    tracing::info!(node = %config.node_name, run_dir = %config.run_dir.display(), "ztunnel is up");

    let signal = shutdown.await;
    tracing::info!(signal, deadline = ?config.drain_deadline, "draining: new connections are for a successor, open ones may end");
    drain.start();
    let pods = following.await.context("the task that follows the node agent failed")?;
    pods.stop().await;
    servers.shutdown().await;
    tracing::info!("bye");
    Ok(())
}

/// The lists of certificates that are revoked, and what keeps them as their file has them. Not ready before they are
/// known: nobody is believed until then.
async fn revocations(
    config: &Config,
    metrics: &Metrics,
    readiness: &Readiness,
) -> (Revocations, impl Future<Output = ()> + Send + 'static) {
    let following = match &config.crl_path {
        Some(path) => {
            let revocations = Revocations::new(metrics.crl.clone());
            Some((file::load(&revocations, path).await, revocations))
        }
        None => None,
    };
    let revocations = following.as_ref().map(|(_, revocations)| revocations.clone()).unwrap_or_default();
    let gate = following.is_some().then(|| readiness.gate("crl"));
    if let (Some(gate), Some(error)) = (&gate, revocations.status().and_then(|status| status.error)) {
        gate.close(error);
    }
    let follow = async {
        if let (Some((follow, revocations)), Some(gate)) = (following, gate) {
            let open = async {
                revocations.known().await;
                gate.open();
            };
            tokio::join!(follow.run(&revocations), open);
        }
    };
    (revocations, follow)
}

/// Name of the pod protocol's socket in the run directory.
const PODS_SOCKET: &str = "pods.sock";

/// Admin, metrics and readiness, each on its own address.
async fn serve_status(
    config: &Config,
    levels: telemetry::Levels,
    proxy: &Arc<Proxy>,
    pods: &pods::Listing,
    readiness: &Readiness,
) -> anyhow::Result<JoinSet<()>> {
    let (metrics, mesh, certificates) =
        (proxy.metrics.clone(), proxy.mesh.clone(), proxy.certificates.clone());
    let scrape = move |_: &Request<()>| {
        let now = SystemTime::now();
        metrics.observe(&mesh.size());
        metrics.certificates.observe(&certificates.health(now), now);
        answer("application/openmetrics-text; version=1.0.0; charset=utf-8", metrics.encode())
    };
    let (proxy, pods) = (proxy.clone(), pods.clone());
    let dumped = config.clone();
    let dump = move |_: &Request<()>| answer("application/json", dump::render(&dumped, &proxy, &pods));
    let places = [
        (
            config.admin_address,
            Handlers::new().get("/config_dump", dump).post("/logging", move |asked| levels.answer(asked)),
        ),
        (
            config.metrics_address,
            Handlers::new().get("/metrics", scrape.clone()).get("/stats/prometheus", scrape),
        ),
        (config.readiness_address, Handlers::new().readiness(readiness.clone()).liveness()),
    ];
    let mut servers = JoinSet::new();
    for (address, handlers) in places {
        let listener = status::bind(address)?;
        servers.spawn(status::serve(listener, handlers, std::future::pending()));
    }
    Ok(servers)
}

fn answer(content_type: &'static str, body: String) -> Response<Bytes> {
    let mut response = Response::new(Bytes::from(body));
    *response.status_mut() = StatusCode::OK;
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    response
}

/// Who we are to the agent, as Istio's control plane expects it.
fn node(config: &Config) -> Node {
    Node {
        id: format!("ztunnel~1.1.1.1~{}~svc.cluster.local", config.node_name),
        cluster: config.cluster_id.clone(),
        ..Node::default()
    }
}
