//! Wiring: which parts there are, and what they hand each other.
//!
//! **Invariant:** whatever ends the agent, capture and the CNI plugin stay in place.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use mesh_core::identity::{Identity, TrustDomain};
use mesh_core::readiness::Readiness;
use mesh_core::{pod_link, status};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::config::Config;
use crate::datapath::{self, Datapath};
use crate::enrol::steps::{FindNetns, Hands};
use crate::parts::Parts;
use crate::{
    ca, cluster, cni, drops, enrol, metrics, model, netns_of_pod, notices, older, pods, upkeep, verdicts,
    watch, xds,
};

/// Runs the agent of a node until SIGTERM.
///
/// # Errors
/// When a part cannot start, or fails.
#[tokio::main]
pub async fn run(config: Config) -> anyhow::Result<()> {
    info!(?config, version = env!("CARGO_PKG_VERSION"), "node-agent starts");
    let mut parts = Parts::default();
    start(config, &mut parts).await?;
    parts.run().await
}

/// Takes the CNI plugin off the node. Without it there, a pod of a node whose agent is gone could not start.
///
/// # Errors
/// When a file cannot be read or written.
pub fn uninstall(config: &cni::install::Config) -> anyhow::Result<()> {
    cni::install::Installer::remove_from(config)?;
    info!(configuration = %config.cni_conf_dir.display(), "mesh-cni is off this node; its pods start without the mesh");
    Ok(())
}

/// Runs the certificate authority until SIGTERM.
///
/// # Errors
/// When it cannot start, or fails.
#[tokio::main]
pub async fn run_ca(config: ca::Config) -> anyhow::Result<()> {
    let mut parts = Parts::default();
    parts.try_spawn("certificate authority", ca::run(config, cluster::connect().await?, parts.shutdown()));
    parts.run().await
}

async fn start(config: Config, parts: &mut Parts) -> anyhow::Result<()> {
    let readiness = Readiness::new();
    let (synced, open) = (readiness.gate("watches"), readiness.gate("datapath"));
    let pinned = readiness.gate("pins");
    let chained = config.cni.cni_install.then(|| readiness.gate("cni"));
    // First of all: another agent may be running on this node.
    let status_socket = status::bind(config.status_address)?;
    let (kernel, flag_map) = open_datapath(&config).await?;
    open.open();
    let sockets = Sockets::bind(&config)?;

    let client = cluster::connect().await?;
    let (publisher, feed) = xds::server::feed();
    let (writer, reader) = model::model(config.index());
    let (told, noticed) = notices::queue();
    let served = pods::Pods::telling(told, &config.protocol);
    let proc = config.proc.clone();
    let find: FindNetns = Arc::new(move |uid, cookie| {
        let wanted = |found: &netns_of_pod::PodNetns| {
            cookie.is_none_or(|cookie| datapath::has_cookie(found.netns.as_fd(), cookie))
        };
        netns_of_pod::find(&proc, uid, wanted).map(|found| found.netns)
    });
    let hands = Hands {
        cluster: Arc::new(cluster::ApiServer::new(client.clone())),
        pods: served.clone(),
        kernel: kernel.clone(),
        find,
    };
    let (enrolment, desk) = enrol::enrolment(hands, reader.clone(), config.leave_grace);
    let (dropped, resets) = (drops::Counts::default(), older::Resets::default());
    let sources = metrics::Sources {
        feed: feed.clone(),
        pods: served.clone(),
        enrolment: enrolment.counts(),
        datapath: dropped.clone(),
        older: resets.clone(),
    };

    let api = cluster::ApiServer::new(client.clone());
    let stop = parts.shutdown();
    let status = handlers(readiness, kernel.clone(), sources);
    parts.spawn("status", status::serve(status_socket, status, stop.clone().cancelled_owned()));
    parts.spawn("model", writer.run(watch::ApiServer::new(&client), publisher, synced, stop.clone()));
    parts.spawn("xDS over TCP", remote_xds(&config, client.clone(), feed.clone(), stop.clone())?);
    parts.try_spawn("xDS", xds::server::serve(sockets.xds, feed, stop.clone()));
    parts.spawn("pod protocol", served.serve(sockets.pods, flag_map, stop.clone()));
    parts.spawn("enrolment", enrolment.run(stop.clone()));
    parts.spawn("upkeep", upkeep::run(kernel.clone(), upkeep::PERIOD, pinned, stop.clone()));
    parts.spawn("verdicts", verdicts::run(reader.clone(), api.clone(), stop.clone()));
    parts.spawn("Events", notices::run(noticed, api, stop.clone()));
    parts.spawn("older connections", older::run(reader, kernel.clone(), resets, stop.clone()));
    parts.spawn("drops", drops::run(kernel.clone(), dropped, stop.clone()));
    parts.spawn("kubelet", enrol::kernel::follow_kubelet(kernel, stop.clone()));
    parts.spawn("CNI server", cni::server::serve_bound(sockets.cni, Arc::new(desk), stop.clone()));
    if let Some(chained) = chained {
        let keeper = cni::install::keep(installer(&config)?, cni::install::PERIOD, chained, stop);
        parts.spawn("CNI installation", keeper);
    }
    Ok(())
}

/// Serves proxies on the network under the agent's own identity.
fn remote_xds(
    config: &Config,
    client: kube::Client,
    feed: xds::server::Feed,
    stop: CancellationToken,
) -> anyhow::Result<impl Future<Output = ()> + Send + use<>> {
    let trust_domain = config.trust_domain.parse::<TrustDomain>().context("--trust-domain")?;
    let identity = Identity::new(trust_domain, &config.system_namespace, "node-agent")?;
    let rules = config.xds.rules(&config.node_name, &config.root_namespace, &config.system_namespace);
    let callers = ca::cluster::Cluster::new(client, config.system_namespace.clone());
    let strangers = xds::remote::Strangers::new(rules, callers);
    let (settings, cluster_id) = (config.xds.clone(), config.cluster_id.clone());
    Ok(xds::remote::run(settings, identity, cluster_id, strangers, feed, stop))
}

/// Where ztunnel and the CNI plugin find the agent; only once pods can be enrolled, they wait for answers from then on.
struct Sockets {
    xds: UnixListenerStream,
    pods: pod_link::Listener,
    cni: UnixListener,
}

impl Sockets {
    fn bind(config: &Config) -> anyhow::Result<Self> {
        let directory = &config.run_dir;
        std::fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
        Ok(Self {
            xds: xds::server::bind(&directory.join("xds.sock"))?,
            pods: pod_link::Listener::bind(&directory.join("pods.sock")).context("pods.sock")?,
            cni: cni::server::bind(&config.cni_socket())?,
        })
    }
}

/// The datapath's thread, and the map in which ztunnel flags its sockets.
async fn open_datapath(config: &Config) -> anyhow::Result<(enrol::kernel::Handle, OwnedFd)> {
    let settings = config.datapath();
    let datapath = tokio::task::spawn_blocking(move || Datapath::open(&settings)).await??;
    let flag_map = datapath.skproxy_map().try_clone_to_owned()?;
    Ok((enrol::kernel::spawn(datapath)?, flag_map))
}

/// What the agent tells of itself.
fn handlers(
    readiness: Readiness,
    kernel: enrol::kernel::Handle,
    sources: metrics::Sources,
) -> status::Handlers {
    status::Handlers::new()
        .readiness(readiness)
        .liveness_of(move || kernel.check(Instant::now()))
        .get("/metrics", move |_| status::text(http::StatusCode::OK, sources.text()))
}

fn installer(config: &Config) -> anyhow::Result<cni::install::Installer> {
    let binary = cni::install::bundled_binary().context("mesh-cni is not beside node-agent")?;
    let (socket, excluded) = (config.cni_socket(), config.unasked_namespaces());
    Ok(cni::install::Installer::new(&config.cni, binary, &socket, excluded))
}
