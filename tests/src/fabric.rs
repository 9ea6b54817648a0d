//! The network between the nodes: one router namespace with a link to each node and to a host outside the cluster.
//!
//! Addresses: node `i` is 172.30.i.2 behind 172.30.i.1, its pods are 10.244.i.0/24, the API server and the cluster's
//! DNS are at 172.30.0.1, the outside host is 203.0.113.10. In IPv6: fd00:30:i::2 behind fd00:30:i::1,
//! fd00:244:i::/64, fd00:30::1 and 2001:db8:113::10. A second network, for pods that ask for it, is 10.245.i.0/24 and
//! fd00:245:i::/64.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::netns::Netns;
use crate::run::Run;
use crate::stack::{Family, Stack};

/// The name that the cluster's DNS has for the host outside the cluster.
pub const OUTSIDE_NAME: &str = "outside.example";

/// Where the API server and the DNS server of the cluster listen, in the router's namespace.
#[must_use]
pub fn control(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(172, 30, 0, 1).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x30, 0, 0, 0, 0, 0, 1).into(),
    }
}

/// The host outside the cluster.
#[must_use]
pub fn outside(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(203, 0, 113, 10).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, 0x10).into(),
    }
}

/// The Services' addresses: the first of the range and how many bits of it are fixed.
#[must_use]
pub fn service_range(family: Family) -> (IpAddr, u8) {
    match family {
        Family::V4 => (Ipv4Addr::new(10, 96, 0, 0).into(), 16),
        Family::V6 => (Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 0).into(), 112),
    }
}

/// The Service address with this number; numbers below 256 are given to those who ask for them.
#[must_use]
pub fn service_address(family: Family, number: u16) -> IpAddr {
    match service_range(family).0 {
        IpAddr::V4(first) => Ipv4Addr::from_bits(first.to_bits() + u32::from(number)).into(),
        IpAddr::V6(first) => Ipv6Addr::from_bits(first.to_bits() + u128::from(number)).into(),
    }
}

/// Address of node `index`, counted from 1.
#[must_use]
pub fn node_address(family: Family, index: u8) -> IpAddr {
    link_address(family, index, 2)
}

/// The subnet of the pods of node `index`.
#[must_use]
pub fn pod_cidr(family: Family, index: u8) -> String {
    match family {
        Family::V4 => format!("10.244.{index}.0/24"),
        Family::V6 => format!("fd00:244:{index}::/64"),
    }
}

/// The subnet of node `index` in the second network, of which the whole is [`second_network`].
#[must_use]
pub fn second_cidr(family: Family, index: u8) -> String {
    match family {
        Family::V4 => format!("10.245.{index}.0/24"),
        Family::V6 => format!("fd00:245:{index}::/64"),
    }
}

#[must_use]
pub fn second_network(family: Family) -> &'static str {
    match family {
        Family::V4 => "10.245.0.0/16",
        Family::V6 => "fd00:245::/32",
    }
}

/// An end of the link between the router (1) and a node (2).
fn link_address(family: Family, index: u8, end: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(172, 30, index, end).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x30, index.into(), 0, 0, 0, 0, end.into()).into(),
    }
}

/// Prefix length of a link, `ip`'s option for the family, and what an address may have to be usable at once: nobody
/// else can have it, so there is nothing to wait for.
fn notation(family: Family) -> (u8, &'static str) {
    match family {
        Family::V4 => (24, ""),
        Family::V6 => (64, " nodad"),
    }
}

/// The router and the outside host; nodes are joined one by one.
#[derive(Debug)]
pub struct Fabric {
    pub router: Netns,
    pub outside: Netns,
    stack: Stack,
}

impl Fabric {
    pub fn create(run: &Run, stack: Stack) -> anyhow::Result<Self> {
        let router = Netns::create(&run.netns("fabric"))?;
        let outside = Netns::create(&run.netns("outside"))?;
        prepare(&router, stack)?;
        prepare(&outside, stack)?;
        let mut at_router = format!(
            "link add outside type veth peer name eth0 netns {}\n\
             link set outside up\n",
            outside.name()
        );
        let mut at_outside = "link set eth0 up\n".to_owned();
        for family in stack.families().iter().copied() {
            let (length, flags) = notation(family);
            let (control, whole) = (control(family), if family == Family::V4 { 32 } else { 128 });
            let gateway = match family {
                Family::V4 => "203.0.113.1",
                Family::V6 => "2001:db8:113::1",
            };
            at_router.push_str(&format!(
                "address add {control}/{whole} dev lo{flags}\n\
                 address add {gateway}/{length} dev outside{flags}\n"
            ));
            at_outside.push_str(&format!(
                "address add {}/{length} dev eth0{flags}\n\
                 route add default via {gateway}\n",
                self::outside(family)
            ));
        }
        router.ip(&at_router)?;
        outside.ip(&at_outside)?;
        Ok(Self { router, outside, stack })
    }

    /// The families that the fabric routes.
    #[must_use]
    pub fn stack(&self) -> Stack {
        self.stack
    }

    /// Link a node's namespace to the router, and route its pods to it.
    pub fn join(&self, node: &Netns, index: u8) -> anyhow::Result<()> {
        prepare(node, self.stack)?;
        let mut at_router = format!(
            "link add n{index} type veth peer name eth0 netns {}\n\
             link set n{index} up\n",
            node.name()
        );
        let mut at_node = "link set eth0 up\n".to_owned();
        for family in self.stack.families().iter().copied() {
            let (length, flags) = notation(family);
            let (gateway, address) = (link_address(family, index, 1), node_address(family, index));
            at_router.push_str(&format!(
                "address add {gateway}/{length} dev n{index}{flags}\n\
                 route add {} via {address}\n\
                 route add {} via {address}\n",
                pod_cidr(family, index),
                second_cidr(family, index),
            ));
            at_node.push_str(&format!(
                "address add {address}/{length} dev eth0{flags}\n\
                 route add default via {gateway}\n"
            ));
        }
        self.router.ip(&at_router)?;
        node.ip(&at_node)?;
        for family in self.stack.families() {
            let tables = if *family == Family::V4 { "iptables" } else { "ip6tables" };
            // As kubeadm asks for: pods of one node that talk through a Service's address meet kube-proxy's rules.
            if let Err(error) = node.sysctl(&format!("bridge/bridge-nf-call-{tables}"), "1") {
                tracing::warn!(
                    "pods of one node cannot use Services among themselves: modprobe br_netfilter: {error:#}"
                );
            }
        }
        Ok(())
    }
}

/// Let a namespace forward, and use its addresses at once, those of interfaces to come included.
fn prepare(netns: &Netns, stack: Stack) -> anyhow::Result<()> {
    netns.sysctl("ipv4/ip_forward", "1")?;
    without_v6(netns, stack);
    if stack.has(Family::V6) {
        netns.sysctl("ipv6/conf/default/accept_dad", "0")?;
        netns.sysctl("ipv6/conf/all/forwarding", "1")?;
    }
    Ok(())
}

/// Where there is to be no IPv6 there are no link-local addresses either, nor `::1`.
pub(crate) fn without_v6(netns: &Netns, stack: Stack) {
    if !stack.has(Family::V6) {
        // A kernel without IPv6 has no such setting, and needs none.
        let _ = netns.sysctl("ipv6/conf/all/disable_ipv6", "1");
    }
}
