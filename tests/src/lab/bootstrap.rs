//! What a cluster has from the beginning: its nodes, the Services of the API server and of DNS.

use std::sync::Arc;

use serde_json::json;

use crate::api::LogSource;
use crate::cluster::Cluster;
use crate::kubelet::{self, Kubelet};
use crate::node::Node;
use crate::stack::{Family, Stack};
use crate::{dns, fabric};

/// Services that lead to the lab's own servers: the API server's in the cluster's primary family, as it is in a real
/// one, that of DNS in all.
pub(super) fn services(cluster: &Cluster, stack: Stack) -> anyhow::Result<()> {
    // The API server itself made the Service `kubernetes`.
    let https = json!([{ "name": "https", "port": 6443, "protocol": "TCP" }]);
    cluster.ensure(slice("default", "kubernetes", "kubernetes", stack.primary(), &https))?;
    let ports = json!([
        { "name": "dns", "port": 53, "protocol": "UDP" },
        { "name": "dns-tcp", "port": 53, "protocol": "TCP" },
    ]);
    let addresses: Vec<_> = stack.families().iter().map(|family| dns::service(*family)).collect();
    cluster.ensure(json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": "kube-dns", "namespace": "kube-system" },
        "spec": {
            "clusterIP": addresses[0], "clusterIPs": addresses, "ipFamilyPolicy": "PreferDualStack", "ports": ports,
        },
    }))?;
    for family in stack.families() {
        let name = format!("kube-dns-{}", family.as_str().to_ascii_lowercase());
        cluster.ensure(slice("kube-system", "kube-dns", &name, *family, &ports))?;
    }
    Ok(())
}

/// That says where in the fabric a Service's server is.
fn slice(
    namespace: &str,
    service: &str,
    name: &str,
    family: Family,
    ports: &serde_json::Value,
) -> serde_json::Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": name, "namespace": namespace, "labels": { "kubernetes.io/service-name": service },
        },
        "addressType": family.as_str(),
        "endpoints": [{ "addresses": [fabric::control(family)], "conditions": { "ready": true } }],
        "ports": ports,
    })
}

pub(super) fn node(cluster: &Cluster, node: &Node) -> anyhow::Result<()> {
    let name = node.name();
    let families = node.stack().families().iter();
    let cidrs: Vec<String> = families.map(|family| fabric::pod_cidr(*family, node.index())).collect();
    let internal = node.addresses().into_iter().map(|ip| json!({ "type": "InternalIP", "address": ip }));
    let hostname = json!({ "type": "Hostname", "address": name });
    let addresses: Vec<_> = internal.chain([hostname]).collect();
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
        "spec": { "podCIDR": cidrs[0], "podCIDRs": cidrs },
    }))?;
    cluster.node_status(
        name,
        &json!({
            "addresses": addresses,
            "conditions": [{ "type": "Ready", "status": "True", "reason": "KubeletReady" }],
            "daemonEndpoints": { "kubeletEndpoint": { "Port": kubelet::PORT } },
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
