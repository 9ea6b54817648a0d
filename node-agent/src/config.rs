//! Settings of `node-agent run`, each with its environment variable.

use std::net::SocketAddr;
use std::path::PathBuf;

/// Who and where this agent is.
#[derive(Clone, Debug, clap::Args)]
pub struct Config {
    /// Name of the Node object of the machine this runs on.
    #[arg(long, env = "NODE_NAME")]
    pub node_name: String,
    /// Name of this cluster, the first part of every workload's uid.
    #[arg(long, env = "CLUSTER_ID", default_value = "Kubernetes")]
    pub cluster_id: String,
    /// Trust domain of the workloads' SPIFFE identities.
    #[arg(long, env = "TRUST_DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,
    /// DNS suffix of the cluster's services.
    #[arg(long, env = "CLUSTER_DOMAIN", default_value = "cluster.local")]
    pub cluster_domain: String,
    /// Namespace that the mesh itself runs in; its pods are never enrolled.
    #[arg(long, env = "POD_NAMESPACE", default_value = "ambit-system")]
    pub system_namespace: String,
    /// Directory of the sockets for ztunnel and the CNI plugin.
    #[arg(long, env = "AMBIT_RUN_DIR", default_value = "/run/ambit")]
    pub run_dir: PathBuf,
    /// Where /proc of the host's process namespace is mounted.
    #[arg(long, env = "AMBIT_PROC", default_value = "/proc")]
    pub proc: PathBuf,
    /// Namespaces whose pods are never enrolled, comma separated.
    #[arg(long, env = "AMBIT_EXCLUDE_NAMESPACES", default_value = "kube-system", value_delimiter = ',')]
    pub exclude_namespaces: Vec<String>,
    /// Where readiness, liveness and metrics are served.
    #[arg(long, env = "AMBIT_STATUS_ADDRESS", default_value = "0.0.0.0:15014")]
    pub status_address: SocketAddr,
}
