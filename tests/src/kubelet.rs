//! The part of a kubelet that a node of the lab needs: it turns the pods bound to the node into processes, in a
//! sandbox made by CNI plugins, keeps them running, probes them, reports their status and ends them.
//!
//! Level triggered: on any change the node's pods are compared with the workers there are.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;

use crate::cluster::{Cluster, Kind};
use crate::node::Node;
use crate::rootfs::BINARIES;
use crate::sandbox::Capabilities;

mod container;
pub mod env;
mod live;
mod probe;
mod sandbox;
mod status;
mod users;
mod volumes;
mod worker;

pub use live::Live;

/// Where a kubelet serves its API.
pub const PORT: u16 = 10250;

/// One node's kubelet.
pub struct Kubelet {
    node: Arc<Node>,
    cluster: Arc<Cluster>,
    /// All that this machine can give to a container.
    capabilities: Capabilities,
    pods: Mutex<BTreeMap<String, Arc<Live>>>,
}

impl Kubelet {
    pub fn new(node: Arc<Node>, cluster: Arc<Cluster>) -> anyhow::Result<Self> {
        Ok(Self { node, cluster, capabilities: Capabilities::own()?, pods: Mutex::default() })
    }

    #[must_use]
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// The pods on this node, by uid.
    pub fn pods(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Live>>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serve the node for ever.
    pub async fn run(self: Arc<Self>) {
        // The mesh knows a kubelet by its port.
        let _server = self.serve().inspect_err(|error| tracing::warn!("the kubelet's server: {error:#}"));
        let mut changed = self.cluster.changed();
        loop {
            self.compare();
            if changed.changed().await.is_err() {
                return;
            }
        }
    }

    /// A process in the kubelet's cgroup that listens where a kubelet does.
    fn serve(&self) -> anyhow::Result<tokio::process::Child> {
        let mut command = self.node.command(&format!("{BINARIES}/ambit-example"))?;
        command.args(["serve", "--name=kubelet", &format!("--listen=0.0.0.0:{PORT}")]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(tokio::process::Command::from(command).kill_on_drop(true).spawn()?)
    }

    /// Start what is new, stop what is leaving or gone.
    fn compare(self: &Arc<Self>) {
        // Before the look at what is wanted: who forgets a pod has deleted it, which that look would not have seen yet.
        let mut pods = self.pods();
        let mut wanted: BTreeMap<String, Pod> = self
            .cluster
            .list::<Pod>(Kind::Pod)
            .into_iter()
            .filter(|pod| {
                pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(self.node.name())
            })
            .filter_map(|pod| Some((pod.metadata.uid.clone()?, pod)))
            .collect();
        for (uid, live) in pods.iter() {
            match wanted.remove(uid) {
                None => live.stop(Duration::ZERO),
                Some(pod) if pod.metadata.deletion_timestamp.is_some() => {
                    let seconds = pod.metadata.deletion_grace_period_seconds.unwrap_or(30);
                    live.stop(Duration::from_secs(seconds.unsigned_abs()));
                }
                Some(pod) => live.update(pod),
            }
        }
        for (uid, pod) in wanted {
            let live = Arc::new(Live::new(self.node.clone(), pod));
            if live.pod().metadata.deletion_timestamp.is_some() {
                live.stop(Duration::ZERO);
            }
            pods.insert(uid, live.clone());
            tokio::spawn(worker::run(self.clone(), live));
        }
    }

    fn forget(&self, live: &Live) {
        self.pods().remove(live.uid());
    }
}
