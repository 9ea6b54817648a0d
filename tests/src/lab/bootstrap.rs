//! What a cluster has from the beginning: its nodes, the Services of the API server and of DNS.

use std::sync::Arc;

use serde_json::json;

use crate::api::LogSource;
use crate::cluster::Cluster;
use crate::kubelet::Kubelet;
use crate::node::Node;
use crate::{dns, fabric};

/// Services that lead to the lab's own servers.
pub(super) fn services(cluster: &Cluster) -> anyhow::Result<()> {
    let control = fabric::CONTROL.to_string();
    // The API server itself made the Service `kubernetes`.
    cluster.ensure(slice(
        "default",
        "kubernetes",
        &control,
        &json!([{ "name": "https", "port": 6443, "protocol": "TCP" }]),
    ))?;
    cluster.ensure(json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": "kube-dns", "namespace": "kube-system" },
        "spec": {
            "clusterIP": dns::SERVICE.to_string(),
            "ports": [
                { "name": "dns", "port": 53, "protocol": "UDP" },
                { "name": "dns-tcp", "port": 53, "protocol": "TCP" },
            ],
        },
    }))?;
    let ports = json!([
        { "name": "dns", "port": 53, "protocol": "UDP" },
        { "name": "dns-tcp", "port": 53, "protocol": "TCP" },
    ]);
    cluster.ensure(slice("kube-system", "kube-dns", &control, &ports))
}

fn slice(namespace: &str, service: &str, address: &str, ports: &serde_json::Value) -> serde_json::Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": service, "namespace": namespace, "labels": { "kubernetes.io/service-name": service },
        },
        "addressType": "IPv4",
        "endpoints": [{ "addresses": [address], "conditions": { "ready": true } }],
        "ports": ports,
    })
}

pub(super) fn node(cluster: &Cluster, node: &Node) -> anyhow::Result<()> {
    let (name, cidr) = (node.name(), fabric::pod_cidr(node.index()));
    cluster.create(json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {
            "name": name,
            "labels": {
                "kubernetes.io/hostname": name,
                "kubernetes.io/os": "linux",
                "topology.kubernetes.io/region": "lab",
                "topology.kubernetes.io/zone": format!("zone-{}", node.index()),
            },
        },
        "spec": { "podCIDR": cidr, "podCIDRs": [cidr] },
    }))?;
    cluster.node_status(
        name,
        &json!({
            "addresses": [
                { "type": "InternalIP", "address": node.address().to_string() },
                { "type": "Hostname", "address": name },
            ],
            "conditions": [{ "type": "Ready", "status": "True", "reason": "KubeletReady" }],
            "nodeInfo": {
                "architecture": std::env::consts::ARCH, "operatingSystem": "linux", "kubeletVersion": "v1.34.0",
                "bootID": "", "containerRuntimeVersion": "ambit-lab://1", "kernelVersion": "", "kubeProxyVersion": "",
                "machineID": "", "osImage": "ambit-lab", "systemUUID": "",
            },
        }),
    )
}

/// What `kubectl logs` prints.
pub(super) fn logs(kubelets: &[Arc<Kubelet>]) -> Arc<LogSource> {
    let kubelets = kubelets.to_vec();
    Arc::new(move |namespace: &str, name: &str, container: Option<&str>| {
        let wanted = format!("{namespace}/{name}");
        let live = kubelets
            .iter()
            .find_map(|kubelet| kubelet.pods().values().find(|live| live.full_name() == wanted).cloned())?;
        std::fs::read(live.log_path(container)?).ok()
    })
}
