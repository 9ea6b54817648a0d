//! What runs at an address: the domain form of `istio.workload.Workload`.
//!
//! Strings that many workloads have in common are shared (`Arc<str>`): a workload costs what is its own.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use crate::addr::Network;
use crate::identity::Identity;
use crate::service::{Gateway, ServiceName};

/// Unique name of a workload in the mesh: WDS resource name, for pods `<cluster>//Pod/<namespace>/<name>`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkloadUid(Arc<str>);

impl WorkloadUid {
    /// The name as on the wire.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name, shared.
    pub fn shared(&self) -> Arc<str> {
        self.0.clone()
    }
}

impl From<&str> for WorkloadUid {
    fn from(uid: &str) -> Self {
        Self(uid.into())
    }
}

impl fmt::Display for WorkloadUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::borrow::Borrow<str> for WorkloadUid {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// One pod, virtual machine or external endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Key of the workload.
    pub uid: WorkloadUid,
    /// Name of the pod or entry.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Never IPv4-mapped; the first is the primary one.
    pub addresses: Box<[IpAddr]>,
    /// Where the addresses are valid.
    pub network: Network,
    /// How peers have to reach it.
    pub tunnel: Tunnel,
    /// What it must prove to be.
    pub identity: Identity,
    /// The L7 proxy that has to be passed when the workload is addressed directly.
    pub waypoint: Option<Gateway>,
    /// Kubernetes node, or empty.
    pub node: Arc<str>,
    /// `Istio` canonical service name, the `*_app` label.
    pub canonical_name: Arc<str>,
    /// Canonical revision, the `*_version` label.
    pub canonical_revision: Arc<str>,
    /// Name of the owner, e.g. of the Deployment.
    pub workload_name: Arc<str>,
    /// Kind of the owner.
    pub workload_type: WorkloadType,
    /// `<namespace>/<name>` of the policies whose selector matches.
    pub authorization_policies: Box<[Arc<str>]>,
    /// May traffic be sent to it.
    pub health: Health,
    /// Cluster id, e.g. `Kubernetes`.
    pub cluster: Arc<str>,
    /// Set when it is only reachable through another network's gateway.
    pub network_gateway: Option<Gateway>,
    /// DNS name to dial when there is no address, or empty.
    pub hostname: Arc<str>,
    /// Services that it is an endpoint of.
    pub services: Box<[Membership]>,
    /// How the tunnel ends in front of the application.
    pub application_tunnel: Option<ApplicationTunnel>,
    /// Where it runs.
    pub locality: Locality,
    /// Host network pods share the node's address, which is therefore no key to them.
    pub host_network: bool,
    /// Relative share of its services' connections; 0: none.
    pub capacity: u32,
    /// No network policy can apply to it, so that its connections on its node need not pass the network.
    pub shortcut: bool,
}

/// How a workload takes connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tunnel {
    /// As they are.
    Plain,
    /// CONNECT over mutual TLS on port 15008.
    Hbone,
}

/// Owner kind; in logs and baggage the lower-case name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names say it")]
pub enum WorkloadType {
    Deployment,
    CronJob,
    Pod,
    Job,
}

impl WorkloadType {
    /// The name as used in baggage keys (`k8s.<name>.name`).
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::CronJob => "cronjob",
            Self::Pod => "pod",
            Self::Job => "job",
        }
    }
}

/// What the control plane says about an endpoint's readiness.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Health {
    /// It is.
    Healthy,
    /// It is not.
    Unhealthy,
    /// It is being ended and still serves: where nothing else does.
    Draining,
}

/// Membership in a service and the ports this endpoint serves it on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// The service.
    pub service: ServiceName,
    /// `(service port, target port)`.
    pub ports: Box<[(u16, u16)]>,
}

/// A proxy in the pod that wants the tunnel's traffic on a port of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApplicationTunnel {
    /// A PROXY protocol v2 header is to be written first.
    pub proxy_protocol: bool,
    /// None: the port of the authority.
    pub port: Option<u16>,
}

/// Region, zone and sub-zone; empty where unknown.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Locality {
    /// e.g. `eu-west-1`.
    pub region: Arc<str>,
    /// e.g. `eu-west-1b`.
    pub zone: Arc<str>,
    /// Rack or the like.
    pub subzone: Arc<str>,
}

impl Workload {
    /// Whether both are one pod. One that was made anew under its old name has the same uid here, and another address.
    pub fn is_same_pod(&self, other: &Self) -> bool {
        self.identity == other.identity && self.addresses.iter().any(|own| other.addresses.contains(own))
    }

    /// Whether `uid` has the form of a Kubernetes pod's: such a workload wins an address that two claim.
    pub fn is_pod(&self) -> bool {
        self.uid.as_str().contains("//Pod/")
    }
}
