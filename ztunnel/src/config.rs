//! The command line: every flag has an environment equivalent, so that a manifest can set either.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use mesh_core::certs::CaConfig;
use mesh_core::identity::TrustDomain;
use mesh_core::pod_protocol;
use mesh_core::telemetry;

use crate::{budget, pace};

/// Carries the TCP connections of this node's pods to their peers over HBONE, with mutual TLS.
///
/// Which pods there are, and their sockets, comes from the node agent over <run dir>/pods.sock; what the mesh looks
/// like, over <run dir>/xds.sock; certificates from the certificate authority.
#[derive(Debug, Clone, clap::Parser)]
#[command(name = "ztunnel", version, max_term_width = 110)]
pub struct Config {
    /// Name of the Kubernetes node that this ztunnel runs on
    #[arg(long, env = "NODE_NAME")]
    pub node_name: String,
    /// Id of the cluster, as in metrics and workload names
    #[arg(long, env = "CLUSTER_ID", default_value = "Kubernetes")]
    pub cluster_id: String,
    /// Trust domain of the mesh's identities
    #[arg(long, env = "TRUST_DOMAIN", default_value = "cluster.local")]
    pub trust_domain: TrustDomain,
    /// DNS suffix of the cluster's services
    #[arg(long, env = "CLUSTER_DOMAIN", default_value = "cluster.local")]
    pub cluster_domain: String,
    /// Id of the network whose addresses this node can reach directly
    #[arg(long, env = "NETWORK", default_value = "")]
    pub network: String,
    /// Namespace whose policies may be about all of the mesh
    #[arg(long, env = "AMBIT_ROOT_NAMESPACE", default_value = "istio-system")]
    pub root_namespace: String,
    /// Directory with the node agent's sockets
    #[arg(long, env = "AMBIT_RUN_DIR", default_value = "/run/ambit")]
    pub run_dir: PathBuf,
    #[command(flatten)]
    #[allow(missing_docs, reason = "a doc comment would replace the help's introduction")]
    pub ca: CaConfig,
    /// File with certificate revocation lists: PEM, one after the other, or one as DER. Changes are taken over within
    /// two seconds, for open connections as well; without the file nobody is revoked, and while the first one cannot be
    /// read nobody is believed
    #[arg(long, env = "CRL_PATH")]
    pub crl_path: Option<PathBuf>,
    /// Configuration dump; keep it on loopback
    #[arg(long, env = "AMBIT_ADMIN_ADDRESS", default_value = "127.0.0.1:15000")]
    pub admin_address: SocketAddr,
    /// Prometheus metrics
    #[arg(long, env = "AMBIT_METRICS_ADDRESS", default_value = "[::]:15020")]
    pub metrics_address: SocketAddr,
    /// Readiness, /healthz/ready
    #[arg(long, env = "AMBIT_READINESS_ADDRESS", default_value = "[::]:15021")]
    pub readiness_address: SocketAddr,
    /// After SIGTERM, how many seconds connections may go on before they are cut
    #[arg(long, env = "CONNECTION_TERMINATION_DEADLINE", default_value = "3600", value_parser = seconds)]
    pub drain_deadline: Duration,
    /// A tunnel that nobody has used for this many seconds is closed
    #[arg(long, env = "POOL_UNUSED_RELEASE_TIMEOUT", default_value = "300", value_parser = seconds)]
    pub pool_idle: Duration,
    /// Threads that carry connections; 0: a quarter of the processors, but two at least
    #[arg(long, env = "ZTUNNEL_WORKER_THREADS", default_value_t = 0)]
    pub threads: usize,
    /// Carry connections between two pods of this node over mutual TLS, too, although no byte of theirs leaves the node
    #[arg(long, env = "ZTUNNEL_SAME_NODE_MTLS", value_parser = clap::builder::BoolishValueParser::new())]
    pub same_node_mtls: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "a doc comment would replace the help's introduction")]
    pub protocol: pod_protocol::Config,
    #[command(flatten)]
    #[allow(missing_docs, reason = "a doc comment would replace the help's introduction")]
    pub budget: budget::Config,
    #[command(flatten)]
    #[allow(missing_docs, reason = "a doc comment would replace the help's introduction")]
    pub pace: pace::Config,
    #[command(flatten)]
    #[allow(missing_docs, reason = "a doc comment would replace the help's introduction")]
    pub telemetry: telemetry::Config,
}

impl Config {
    /// Threads of the runtime.
    pub fn worker_threads(&self) -> usize {
        let processors = std::thread::available_parallelism().map_or(2, std::num::NonZeroUsize::get);
        if self.threads > 0 { self.threads } else { (processors / 4).max(2) }
    }
}

/// "5" or "5s".
fn seconds(text: &str) -> Result<Duration, String> {
    let number = text.strip_suffix('s').unwrap_or(text);
    // More than a year is a slip, and may be more than a clock can say.
    let sensible = number.parse().ok().filter(|seconds| *seconds <= 366 * 24 * 3600);
    sensible
        .map(Duration::from_secs)
        .ok_or_else(|| format!("{text:?} is no number of seconds, up to a year, e.g. 5 or 5s"))
}
