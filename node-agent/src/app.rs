//! Wiring: which parts there are, and what they hand each other.
//!
//! **Invariant:** a part that ends by itself ends the agent, with an error; SIGTERM ends it without one. In either
//! case capture and the CNI plugin stay in place.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use mesh_core::readiness::Readiness;
use mesh_core::{drain, pod_link, status};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::config::Config;
use crate::datapath::{self, Datapath};
use crate::enrol::steps::{FindNetns, Hands};
use crate::{ca, cluster, cni, enrol, metrics, model, netns_of_pod, pods, watch, xds};

/// Runs the agent of a node until SIGTERM.
///
/// # Errors
/// When a part cannot start, or fails.
#[tokio::main]
pub async fn run(config: Config) -> anyhow::Result<()> {
    let terminated = drain::terminated().context("cannot handle signals")?;
    info!(?config, version = env!("CARGO_PKG_VERSION"), "node-agent starts");
    let shutdown = CancellationToken::new();
    let mut parts = JoinSet::new();
    start(&config, &mut parts, &shutdown).await?;
    let result = tokio::select! {
        signal = terminated => {
            info!(signal, "stopping; pods that are in the mesh stay in it");
            Ok(())
        }
        Some(ended) = parts.join_next() => bail_on(ended),
    };
    shutdown.cancel();
    let rest = async { while parts.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(STOP_DEADLINE, rest).await;
    result
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
    let terminated = drain::terminated().context("cannot handle signals")?;
    let shutdown = CancellationToken::new();
    let stop = shutdown.clone();
    let client = cluster::connect().await?;
    let ca = ca::run(config, client, shutdown);
    tokio::pin!(ca);
    tokio::select! {
        signal = terminated => {
            info!(signal, "stopping");
            stop.cancel();
            ca.await
        }
        ended = &mut ca => ended,
    }
}

type Parts = JoinSet<(&'static str, anyhow::Result<()>)>;

async fn start(config: &Config, parts: &mut Parts, shutdown: &CancellationToken) -> anyhow::Result<()> {
    let readiness = Readiness::new();
    let (synced, captures) = (readiness.gate("watches"), readiness.gate("datapath"));
    std::fs::create_dir_all(&config.run_dir)
        .with_context(|| format!("cannot make {}", config.run_dir.display()))?;
    let (publisher, feed) = xds::server::feed();
    let (writer, reader) = model::model(config.index());
    let served = pods::Pods::new();
    let status_listener = status::bind(config.status_address).await?;

    let settings = datapath::Config { proc: config.proc.clone(), ..config.datapath.clone() };
    let datapath = tokio::task::spawn_blocking(move || Datapath::open(&settings)).await??;
    let flag_map = datapath.skproxy_map().as_fd().try_clone_to_owned()?;
    let kernel = enrol::kernel::spawn(datapath)?;
    captures.open();

    let client = cluster::connect().await?;
    let proc = config.proc.clone();
    let find: FindNetns = Arc::new(move |uid| netns_of_pod::find(&proc, uid).map(|found| found.netns));
    let alive = kernel.clone();
    let hands = Hands {
        cluster: Arc::new(cluster::ApiServer::new(client.clone())),
        pods: served.clone(),
        kernel,
        find,
    };
    let (enrolment, desk) = enrol::enrolment(hands, reader, config.index(), config.leave_grace);
    let sources =
        metrics::Sources { feed: feed.clone(), pods: served.clone(), enrolment: enrolment.counts() };
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

    let stop = || shutdown.clone();
    part(
        parts,
        "status server",
        status::serve(status_listener, handlers, shutdown.clone().cancelled_owned()),
    );
    part(parts, "model", writer.run(watch::ApiServer::new(&client), publisher, synced, stop()));
    let xds = xds::server::serve(xds_socket, feed, stop());
    parts.spawn(async move { ("xDS server", xds.await.map_err(Into::into)) });
    part(parts, "pod protocol", served.serve(pods_socket, flag_map, stop()));
    part(parts, "enrolment", enrolment.run(stop()));
    part(parts, "CNI server", cni::server::serve_bound(cni_socket, Arc::new(desk), stop()));
    if config.cni.cni_install {
        let binary = cni::install::bundled_binary().context("mesh-cni is not beside node-agent")?;
        let installer =
            cni::install::Installer::new(&config.cni, binary, &cni_path, config.unasked_namespaces());
        part(parts, "CNI installation", cni::install::keep(installer, |_| {}, stop()));
    }
    Ok(())
}

fn part(parts: &mut Parts, name: &'static str, run: impl Future<Output = ()> + Send + 'static) {
    parts.spawn(async move {
        run.await;
        (name, Ok(()))
    });
}

fn bail_on(ended: Result<(&'static str, anyhow::Result<()>), tokio::task::JoinError>) -> anyhow::Result<()> {
    let (name, result) = ended.context("a part of the agent died")?;
    result.context(name)?;
    bail!("{name} ended by itself")
}

/// For steps under way and open streams.
const STOP_DEADLINE: Duration = Duration::from_secs(10);
