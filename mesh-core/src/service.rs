//! What a virtual address or a hostname stands for: the domain form of `istio.workload.Service`.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use crate::addr::{Network, NetworkAddress};
use crate::identity::Identity;

/// Namespace and hostname of a service: its key, printed as WDS names it, `namespace/hostname`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceName {
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// e.g. `web.shop.svc.cluster.local`.
    pub hostname: Arc<str>,
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}

/// A service: addresses and ports that stand for a set of endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Key of the service.
    pub key: ServiceName,
    /// Kubernetes name, e.g. `web`.
    pub name: Arc<str>,
    /// Virtual addresses, one network each.
    pub vips: Box<[Vip]>,
    /// Ports that it has; others are refused.
    pub ports: Box<[ServicePort]>,
    /// Those of them that have names.
    pub port_names: Box<[(Arc<str>, u16)]>,
    /// Identities that its endpoints may prove besides their own.
    pub identities: Box<[Identity]>,
    /// The L7 proxies that have to be passed, with their share; empty: none.
    pub waypoints: Box<[(Gateway, u32)]>,
    /// Which endpoints to prefer.
    pub balancing: Balancing,
    /// Which of an endpoint's addresses may be used.
    pub families: Families,
    /// The one that wins when several services claim a hostname or address, e.g. a Kubernetes Service.
    pub canonical: bool,
    /// Seconds since 1970, 0 where it is unknown: of several that claim a hostname or address the oldest is preferred, so
    /// that nobody comes in between who is known by it and its clients.
    pub created: u64,
    /// Only clients of its own namespace see it.
    pub namespace_only: bool,
    /// A client keeps its endpoint until it has made no connection for so long; None: each connection is chosen anew.
    pub affinity: Option<Duration>,
}

/// A virtual address or a whole prefix of them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Vip {
    /// One address.
    Address(NetworkAddress),
    /// Every address of the prefix.
    Prefix(Network, IpNet),
}

/// A port of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// As dialled.
    pub port: u16,
    /// On the endpoints; None: a named port that each endpoint resolves by itself.
    pub target: Option<u16>,
}

impl Service {
    /// The port entry for a port's name.
    pub fn named_port(&self, name: &str) -> Option<ServicePort> {
        let (_, port) = self.port_names.iter().find(|(known, _)| **known == *name)?;
        self.port(*port)
    }

    /// The port entry for a dialled port.
    pub fn port(&self, port: u16) -> Option<ServicePort> {
        self.ports.iter().copied().find(|entry| entry.port == port)
    }
}

/// Waypoint or network gateway: who it is and the port that it speaks HBONE on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gateway {
    /// Where it is found.
    pub destination: GatewayDestination,
    /// As its service or workload names it.
    pub hbone_port: u16,
}

/// How a gateway is named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GatewayDestination {
    /// A service or workload by name.
    Hostname(ServiceName),
    /// A service or workload by address.
    Address(NetworkAddress),
}

impl fmt::Display for GatewayDestination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hostname(name) => name.fmt(f),
            Self::Address(address) => address.fmt(f),
        }
    }
}

/// How an endpoint is chosen (wire name `LoadBalancing`).
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Balancing {
    /// What the preference does.
    pub mode: Mode,
    /// What has to be equal at both ends, most significant first.
    pub scopes: Box<[Scope]>,
    /// Use endpoints that are not ready too (`publishNotReadyAddresses`).
    pub allow_unhealthy: bool,
}

/// What becomes of endpoints that do not match the scopes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Mode {
    /// Scopes do not matter.
    #[default]
    Any,
    /// Only endpoints that match all scopes.
    Strict,
    /// Those that match most of the leading scopes.
    Failover,
    /// No choice at all: the address that was dialled.
    Passthrough,
}

/// A property of a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Scope {
    Region,
    Zone,
    Subzone,
    Node,
    Cluster,
    Network,
}

impl Scope {
    /// In a sentence.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Region => "region",
            Self::Zone => "zone",
            Self::Subzone => "subzone",
            Self::Node => "node",
            Self::Cluster => "cluster",
            Self::Network => "network",
        }
    }
}

/// IP families of a service's endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Families {
    #[default]
    Any,
    V4Only,
    V6Only,
}

impl Families {
    /// Whether an address of an endpoint may be dialled.
    pub fn allows(self, ip: std::net::IpAddr) -> bool {
        match self {
            Self::Any => true,
            Self::V4Only => ip.is_ipv4(),
            Self::V6Only => ip.is_ipv6(),
        }
    }
}
