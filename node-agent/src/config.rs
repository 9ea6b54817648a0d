//! Settings of `node-agent run`: those of the whole, and each part's own.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::{cni, datapath, index, xds};

/// Every setting can be given as a flag or as its environment variable.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
pub struct Config {
    /// Name of the Node object of the machine this runs on
    #[arg(long, env = "NODE_NAME")]
    pub node_name: String,
    /// Name of this cluster, the first part of every workload's uid
    #[arg(long, env = "CLUSTER_ID", default_value = "Kubernetes")]
    pub cluster_id: String,
    /// Trust domain of the workloads' SPIFFE identities
    #[arg(long, env = "TRUST_DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,
    /// DNS suffix of the cluster's services
    #[arg(long, env = "CLUSTER_DOMAIN", default_value = "cluster.local")]
    pub cluster_domain: String,
    /// Namespace that the mesh itself runs in; its pods are never enrolled
    #[arg(long, env = "POD_NAMESPACE", default_value = "ambit-system")]
    pub system_namespace: String,
    /// Namespace whose policies are about all of the mesh; ztunnel's has to be the same
    #[arg(long, env = "AMBIT_ROOT_NAMESPACE", default_value = "istio-system")]
    pub root_namespace: String,
    /// Namespaces whose pods are never enrolled, comma separated
    #[arg(long, env = "AMBIT_EXCLUDE_NAMESPACES", default_value = "kube-system", value_delimiter = ',')]
    pub exclude_namespaces: Vec<String>,
    /// Directory of the sockets for ztunnel and the CNI plugin
    #[arg(long, env = "AMBIT_RUN_DIR", default_value = "/run/ambit")]
    pub run_dir: PathBuf,
    /// Where the /proc that shows the host's processes is mounted
    #[arg(long, env = "AMBIT_PROC", default_value = "/proc")]
    pub proc: PathBuf,
    /// Where readiness, liveness and metrics are served
    #[arg(long, env = "AMBIT_STATUS_ADDRESS", default_value = "[::]:15014")]
    pub status_address: SocketAddr,
    /// Whether pods' DNS queries are answered by their proxy; a pod's annotation `ambient.istio.io/dns-capture` goes before
    #[arg(long, env = "AMBIT_DNS_CAPTURE", default_value_t = true, action = clap::ArgAction::Set)]
    pub dns_capture: bool,
    /// How long a pod that leaves the mesh stays captured after its annotation is withdrawn, in seconds: nodes that
    /// hear of it later than this meanwhile fail to reach the pod
    #[arg(long, env = "AMBIT_LEAVE_GRACE", default_value = "5s", value_parser = seconds)]
    pub leave_grace: Duration,
    /// The pod protocol.
    #[command(flatten)]
    pub protocol: mesh_core::pod_protocol::Config,
    /// The eBPF datapath.
    #[command(flatten)]
    pub datapath: datapath::Config,
    /// xDS for proxies on the network.
    #[command(flatten)]
    pub xds: xds::remote::Config,
    /// The CNI plugin's installation.
    #[command(flatten)]
    pub cni: cni::install::Config,
}

impl Config {
    /// What the model depends on.
    pub fn index(&self) -> index::Config {
        index::Config {
            cluster_id: self.cluster_id.clone(),
            trust_domain: self.trust_domain.clone(),
            cluster_domain: self.cluster_domain.clone(),
            node_name: self.node_name.clone(),
            system_namespace: self.system_namespace.clone(),
            root_namespace: self.root_namespace.clone(),
            dns_capture: self.dns_capture,
            excluded_namespaces: self.exclude_namespaces.iter().cloned().collect(),
        }
    }

    /// The datapath's settings, with what it shares with the rest.
    pub fn datapath(&self) -> datapath::Config {
        datapath::Config { proc: self.proc.clone(), ..self.datapath.clone() }
    }

    /// Where the CNI plugin finds the agent.
    pub fn cni_socket(&self) -> PathBuf {
        self.run_dir.join("cni.sock")
    }

    /// Namespaces whose pods start without asking the agent: the mesh's own, and the excluded ones.
    pub fn unasked_namespaces(&self) -> Vec<String> {
        let mut namespaces = self.exclude_namespaces.clone();
        if !namespaces.contains(&self.system_namespace) {
            namespaces.push(self.system_namespace.clone());
        }
        namespaces.retain(|namespace| !namespace.is_empty());
        namespaces
    }
}

/// "5" or "5s".
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    let number = text.strip_suffix('s').unwrap_or(text);
    let number = number.parse().map(Duration::from_secs);
    number.map_err(|_| format!("{text:?} is no number of seconds, e.g. 5 or 5s"))
}

/// The same, no less than one and no more than the other.
pub(crate) fn seconds_within(text: &str, least: Duration, most: Duration) -> Result<Duration, String> {
    let found = seconds(text)?;
    match (least..=most).contains(&found) {
        true => Ok(found),
        false => Err(format!("{text:?} is not from {} s to {} s", least.as_secs(), most.as_secs())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_with_and_without_unit() {
        for (text, expect) in [("5s", Some(5)), ("0", Some(0)), ("5m", None), ("-1", None), ("", None)] {
            assert_eq!(seconds(text).ok(), expect.map(Duration::from_secs), "{text:?}");
        }
    }
}
