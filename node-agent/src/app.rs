//! Wiring: which parts there are, and what they hand each other.
//!
//! **Invariant:** whatever ends the agent, capture and the CNI plugin stay in place.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use mesh_core::readiness::Readiness;
use mesh_core::{pod_link, status};
use tracing::info;

use crate::config::Config;
use crate::datapath::Datapath;
use crate::enrol::steps::{FindNetns, Hands};
use crate::parts::Parts;
use crate::{ca, cluster, cni, drops, enrol, metrics, model, netns_of_pod, pods, watch, xds};

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
    std::fs::create_dir_all(&config.run_dir).with_context(|| config.run_dir.display().to_string())?;
    let status_socket = status::bind(config.status_address).await?;

    let settings = config.datapath();
    let datapath = tokio::task::spawn_blocking(move || Datapath::open(&settings)).await??;
    let flag_map = datapath.skproxy_map().try_clone_to_owned()?;
    let kernel = enrol::kernel::spawn(datapath)?;
    open.open();

    let client = cluster::connect().await?;
    let (publisher, feed) = xds::server::feed();
    let (writer, reader) = model::model(config.index());
    let served = pods::Pods::new();
    let proc = config.proc.clone();
    let find: FindNetns = Arc::new(move |uid| netns_of_pod::find(&proc, uid).map(|found| found.netns));
    let alive = kernel.clone();
    let hands = Hands {
        cluster: Arc::new(cluster::ApiServer::new(client.clone())),
        pods: served.clone(),
        kernel: kernel.clone(),
        find,
    };
    let (enrolment, desk) = enrol::enrolment(hands, reader, config.index(), config.leave_grace);
    let dropped = drops::Counts::default();
    let sources = metrics::Sources {
        feed: feed.clone(),
        pods: served.clone(),
        enrolment: enrolment.counts(),
        datapath: dropped.clone(),
    };
    let handlers = status::Handlers::new()
        .readiness(readiness)
        .get("/healthz/live", move |_| match alive.check(Instant::now()) {
            Ok(()) => status::text(http::StatusCode::OK, "live\n"),
            Err(unwell) => status::text(http::StatusCode::INTERNAL_SERVER_ERROR, format!("{unwell}\n")),
        })
        .get("/metrics", move |_| status::text(http::StatusCode::OK, sources.text()));
    let xds_socket = xds::server::bind(&config.run_dir.join("xds.sock"))?;
    let pods_socket = pod_link::Listener::bind(&config.run_dir.join("pods.sock")).context("pods.sock")?;
    let cni_path = config.run_dir.join("cni.sock");
    let cni_socket = cni::server::bind(&cni_path)?;

    let stop = parts.shutdown();
    parts.spawn("status", status::serve(status_socket, handlers, stop.clone().cancelled_owned()));
    parts.spawn("model", writer.run(watch::ApiServer::new(&client), publisher, synced, stop.clone()));
    parts.try_spawn("xDS", xds::server::serve(xds_socket, feed, stop.clone()));
    parts.spawn("pod protocol", served.serve(pods_socket, flag_map, stop.clone()));
    parts.spawn("enrolment", enrolment.run(stop.clone()));
    parts.spawn("drops", drops::run(kernel, dropped, stop.clone()));
    parts.spawn("CNI server", cni::server::serve_bound(cni_socket, Arc::new(desk), stop.clone()));
    if config.cni.cni_install {
        let binary = cni::install::bundled_binary().context("mesh-cni is not beside node-agent")?;
        let excluded = config.unasked_namespaces();
        let installer = cni::install::Installer::new(&config.cni, binary, &cni_path, excluded);
        parts.spawn("CNI installation", cni::install::keep(installer, |_| {}, stop));
    }
    Ok(())
}
