//! The network between the nodes: one router namespace with a link to each node and to a host outside the cluster.
//!
//! Addresses: node `i` is 172.30.i.2 behind 172.30.i.1, its pods are 10.244.i.0/24, the API server and the cluster's
//! DNS are at 172.30.0.1, the outside host is 203.0.113.10.

use std::net::Ipv4Addr;

use crate::netns::Netns;
use crate::run::Run;

/// Where the API server and the DNS server of the cluster listen, in the router's namespace.
pub const CONTROL: Ipv4Addr = Ipv4Addr::new(172, 30, 0, 1);
/// The host outside the cluster.
pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// The name that the cluster's DNS has for it.
pub const OUTSIDE_NAME: &str = "outside.example";
/// The Services' addresses.
pub const SERVICE_CIDR: &str = "10.96.0.0/16";

/// Address of node `index`, counted from 1.
#[must_use]
pub fn node_address(index: u8) -> Ipv4Addr {
    Ipv4Addr::new(172, 30, index, 2)
}

/// The subnet of the pods of node `index`.
#[must_use]
pub fn pod_cidr(index: u8) -> String {
    format!("10.244.{index}.0/24")
}

/// The router and the outside host; nodes are joined one by one.
#[derive(Debug)]
pub struct Fabric {
    pub router: Netns,
    pub outside: Netns,
}

impl Fabric {
    pub fn create(run: &Run) -> anyhow::Result<Self> {
        let router = Netns::create(&run.netns("fabric"))?;
        let outside = Netns::create(&run.netns("outside"))?;
        router.sysctl("ipv4/ip_forward", "1")?;
        router.ip(&format!(
            "address add {CONTROL}/32 dev lo\n\
             link add outside type veth peer name eth0 netns {}\n\
             address add 203.0.113.1/24 dev outside\n\
             link set outside up\n",
            outside.name()
        ))?;
        outside.ip(&format!(
            "address add {OUTSIDE}/24 dev eth0\n\
             link set eth0 up\n\
             route add default via 203.0.113.1\n"
        ))?;
        Ok(Self { router, outside })
    }

    /// Link a node's namespace to the router, and route its pods to it.
    pub fn join(&self, node: &Netns, index: u8) -> anyhow::Result<()> {
        let address = node_address(index);
        self.router.ip(&format!(
            "link add n{index} type veth peer name eth0 netns {}\n\
             address add 172.30.{index}.1/24 dev n{index}\n\
             link set n{index} up\n\
             route add {} via {address}\n",
            node.name(),
            pod_cidr(index),
        ))?;
        node.ip(&format!(
            "address add {address}/24 dev eth0\n\
             link set eth0 up\n\
             route add default via 172.30.{index}.1\n"
        ))?;
        node.sysctl("ipv4/ip_forward", "1")?;
        // As kubeadm asks for: pods of one node that talk through a Service's address meet kube-proxy's rules.
        if let Err(error) = node.sysctl("bridge/bridge-nf-call-iptables", "1") {
            tracing::warn!(
                "pods of one node cannot use Services among themselves: modprobe br_netfilter: {error:#}"
            );
        }
        Ok(())
    }
}
