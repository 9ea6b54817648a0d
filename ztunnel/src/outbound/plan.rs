//! What to do with a connection that a pod opens: a decision over a snapshot, no I/O (`wire.md`-compatible with
//! Istio's ztunnel).
//!
//! **Invariant:** what must not be skipped is never skipped: where a waypoint or a gateway has to be passed, which
//! this version cannot, the answer is a refusal, not another way.

use std::net::IpAddr;
use std::sync::Arc;

use mesh_core::addr::{HBONE_PORT, NetworkAddress, NextHop, OrigDst, Target};
use mesh_core::identity::Identity;
use mesh_core::service::{Families, Gateway, Mode, Service};
use mesh_core::store::{Endpoint, Found, PickError, Picked, Reader, ServiceEntry};
use mesh_core::workload::{Tunnel, Workload, WorkloadUid};

/// Addresses of one host that are tried.
const MOST_ADDRESSES: usize = 8;

/// Where a connection goes.
#[derive(Debug, Clone)]
pub struct Plan {
    /// How.
    pub route: Route,
    /// What it finally has to reach.
    pub target: Target,
    /// The same at other addresses of the endpoint's that the client can go to, in the order in which to try them.
    pub others: Vec<Target>,
    /// Who that is, if it is in the mesh.
    pub destination: Option<Arc<Workload>>,
    /// The endpoint of the service that was chosen.
    pub endpoint: Option<WorkloadUid>,
    /// The service that was meant.
    pub service: Option<Arc<ServiceEntry>>,
}

/// What decides among the endpoints of a service.
pub struct Choose<'a> {
    /// Any number.
    pub random: usize,
    /// Those that did not answer.
    pub tried: &'a [WorkloadUid],
    /// Addresses of a host name, if it was looked up already.
    pub looked_up: &'a dyn Fn(&str) -> Option<Arc<[IpAddr]>>,
    /// The endpoint that the client's last connection to the service and port had, if that is to count.
    pub remembered: &'a dyn Fn(&Service, u16) -> Option<WorkloadUid>,
}

/// How to reach the target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// CONNECT over mutual TLS.
    Hbone {
        /// Where the tunnel ends.
        next_hop: NextHop,
        /// Who its end may be; one of them has to be proved.
        expected: Vec<Identity>,
        /// Both are on one node, and no network policy has a say: without the network, if one process serves both.
        near: bool,
    },
    /// As it is, from the pod's network namespace.
    Plain,
    /// The pod's own application, without leaving the pod.
    Own,
}

impl Plan {
    /// Whether the service has another endpoint for the client than those that were tried.
    pub fn has_another(&self, source: &Workload, dst: OrigDst, tried: &[WorkloadUid]) -> bool {
        let chosen = self.service.as_ref().filter(|_| self.endpoint.is_some());
        chosen.is_some_and(|service| service.pick_other(source, dst, 0, tried).is_some())
    }
}

/// Why there is no way.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A tunnel port on loopback: only a loop ends there.
    #[error("{0} is the tunnel's own port on loopback")]
    Recursive(OrigDst),
    /// The address is of a resource that could not be taken over.
    #[error("{dst} belongs to {resource}, of which only an invalid form is known: {reason}")]
    InvalidResource {
        /// As dialled.
        dst: OrigDst,
        /// Its name in xDS.
        resource: Arc<str>,
        /// What is wrong with it.
        reason: Arc<str>,
    },
    /// The destination's traffic has to pass a waypoint.
    #[error("traffic to {destination} has to pass the waypoint {waypoint}, which is not supported yet")]
    Waypoint {
        /// Service or workload.
        destination: String,
        /// Its waypoint.
        waypoint: String,
    },
    /// The endpoint is behind another network's gateway.
    #[error(
        "endpoint {endpoint} is in network {network:?}, and gateways to other networks are not supported yet"
    )]
    OtherNetwork {
        /// Uid of the workload.
        endpoint: String,
        /// Its network.
        network: String,
    },
    /// The service has nothing to offer.
    #[error("service {service}: {cause}")]
    NoEndpoint {
        /// `namespace/hostname`.
        service: String,
        /// Why.
        cause: PickError,
    },
    /// The endpoint has no address of a family that may be used.
    #[error("endpoint {endpoint} has no IP address that may be dialled")]
    NoAddress {
        /// Uid of the workload.
        endpoint: String,
    },
    /// The endpoint has a host name, which is to be looked up first.
    #[error("the host name {0} of the endpoint is not looked up yet")]
    Unresolved(Arc<str>),
}

/// No plan for a connection.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{error}")]
pub struct Unplanned {
    /// Why.
    pub error: PlanError,
    /// Where it is the fault of the endpoint that was chosen: another one may be better.
    pub chosen: Option<Chosen>,
}

/// An endpoint of a service.
#[derive(Debug, Clone)]
pub struct Chosen {
    /// The service.
    pub service: Arc<ServiceEntry>,
    /// The endpoint.
    pub endpoint: Arc<Workload>,
}

impl From<PlanError> for Unplanned {
    fn from(error: PlanError) -> Self {
        Self { error, chosen: None }
    }
}

/// Plans the connection of `source` to `dst`.
///
/// # Errors
/// When the connection has to be refused.
pub fn outbound(
    mesh: &Reader,
    source: &Workload,
    dst: OrigDst,
    choose: &Choose<'_>,
) -> Result<Plan, Unplanned> {
    if dst.ip().is_loopback() && dst.port() == HBONE_PORT {
        return Err(PlanError::Recursive(dst).into());
    }
    let address = NetworkAddress::new(source.network.clone(), dst.ip());
    match mesh.find(&address, &source.namespace) {
        Some(Found::Service(service)) => to_service(mesh, source, service, dst, choose),
        Some(Found::Workload(workload)) => Ok(to_workload(source, workload, dst)?),
        // Not as if it were unknown: it may be of the mesh, and would be dialled in the clear.
        Some(Found::Refused(refused)) => Err(PlanError::InvalidResource {
            dst,
            resource: refused.name.clone(),
            reason: refused.reason.clone(),
        }
        .into()),
        None => Ok(plain(Target::from(dst.get()), None)),
    }
}

fn to_service(
    mesh: &Reader,
    source: &Workload,
    service: Arc<ServiceEntry>,
    dst: OrigDst,
    choose: &Choose<'_>,
) -> Result<Plan, Unplanned> {
    if let Some((waypoint, _)) = service.service.waypoints.first() {
        return Err(needs_waypoint(service.service.key.to_string(), waypoint).into());
    }
    if service.service.balancing.mode == Mode::Passthrough {
        let address = NetworkAddress::new(source.network.clone(), dst.ip());
        return match mesh.workload_at(&address).filter(|workload| workload.is_pod()) {
            // A pod that speaks HBONE is never dialled in the clear, other than by Istio's ztunnel.
            Some(pod) => Ok(Plan { service: Some(service), ..to_workload(source, pod, dst)? }),
            None => Ok(plain(Target::from(dst.get()), Some(service))),
        };
    }
    let (endpoint, port) = pick(source, &service, dst, choose)
        .map_err(|cause| PlanError::NoEndpoint { service: service.service.key.to_string(), cause })?;
    let its_fault = |error| {
        let chosen = Chosen { service: service.clone(), endpoint: endpoint.workload.clone() };
        Unplanned { error, chosen: Some(chosen) }
    };
    same_network(source, &endpoint.workload).map_err(its_fault)?;
    let (ip, others) =
        addresses(source, &endpoint, dst.ip(), service.service.families, choose).map_err(its_fault)?;
    let workload = who_is_at(mesh, &endpoint, ip);
    let mut expected = service.service.identities.to_vec();
    expected.push(workload.identity.clone());
    // Where somebody else is, other things may have to be proved.
    let same = |other: &IpAddr| who_is_at(mesh, &endpoint, *other).uid == workload.uid;
    let others = others.into_iter().filter(same).map(|other| Target::from((other, port))).collect();
    let uid = endpoint.workload.uid.clone();
    let direct = direct(source, workload.clone(), ip, port, expected, Some(service.clone()));
    Ok(Plan { others, endpoint: Some(uid), ..direct })
}

/// Where an endpoint is dialled, and where else if it does not answer there.
fn addresses(
    source: &Workload,
    endpoint: &Endpoint,
    dialled: IpAddr,
    families: Families,
    choose: &Choose<'_>,
) -> Result<(IpAddr, Vec<IpAddr>), PlanError> {
    let Workload { uid, addresses, hostname, .. } = &*endpoint.workload;
    let none = || PlanError::NoAddress { endpoint: uid.to_string() };
    if addresses.is_empty() && !hostname.is_empty() {
        let found = (choose.looked_up)(hostname).ok_or_else(|| PlanError::Unresolved(hostname.clone()))?;
        let usable = found.iter().copied().filter(|ip| has_family(source, *ip) && families.allows(*ip));
        let mut all = in_turn(usable, dialled, choose).into_iter();
        return Ok((all.next().ok_or_else(none)?, all.collect()));
    }
    let first = endpoint.address(dialled, families).ok_or_else(none)?;
    let other = endpoint.other_address(first, families).filter(|other| has_family(source, *other));
    Ok((first, other.into_iter().collect()))
}

fn pick(
    source: &Workload,
    service: &ServiceEntry,
    dst: OrigDst,
    choose: &Choose<'_>,
) -> Result<Picked, PickError> {
    if !choose.tried.is_empty() {
        let other = service.pick_other(source, dst, choose.random, choose.tried);
        return other.ok_or(PickError::NoneReady);
    }
    let remembered = (choose.remembered)(&service.service, dst.port());
    match remembered.and_then(|uid| service.keep(source, dst, &uid)) {
        Some(kept) => Ok(kept),
        None => service.pick(source, dst, choose.random),
    }
}

/// A host's addresses in the order in which to try them: of the dialled family and of the other one in turn (RFC 8305,
/// section 4), beginning with another one each time.
fn in_turn(addresses: impl Iterator<Item = IpAddr>, dialled: IpAddr, choose: &Choose<'_>) -> Vec<IpAddr> {
    let (mut same, mut other): (Vec<_>, Vec<_>) = addresses.partition(|ip| ip.is_ipv4() == dialled.is_ipv4());
    for all in [&mut same, &mut other] {
        // What of the number chose the endpoint is used up.
        let first = (choose.random >> 32) % all.len().max(1);
        all.rotate_left(first);
    }
    let turns = 0..same.len().max(other.len());
    let ordered = turns.flat_map(|turn| [same.get(turn), other.get(turn)]).flatten();
    ordered.take(MOST_ADDRESSES).copied().collect()
}

/// An endpoint of which only an address is known, as in a slice or a ServiceEntry that somebody wrote, is the pod that
/// has the address, or who of its own namespace claims to have it.
fn who_is_at(mesh: &Reader, endpoint: &Endpoint, ip: IpAddr) -> Arc<Workload> {
    let named = &endpoint.workload;
    let only_an_address = !named.is_pod() && named.tunnel == Tunnel::Plain;
    let known = || mesh.workload_at(&NetworkAddress::new(named.network.clone(), ip));
    let credible = |found: &Arc<Workload>| found.is_pod() || found.namespace == named.namespace;
    only_an_address.then(known).flatten().filter(credible).unwrap_or_else(|| named.clone())
}

fn has_family(source: &Workload, ip: IpAddr) -> bool {
    source.addresses.iter().any(|own| own.is_ipv4() == ip.is_ipv4())
}

fn to_workload(source: &Workload, workload: Arc<Workload>, dst: OrigDst) -> Result<Plan, PlanError> {
    same_network(source, &workload)?;
    if let Some(waypoint) = &workload.waypoint {
        return Err(needs_waypoint(workload.uid.to_string(), waypoint));
    }
    let expected = vec![workload.identity.clone()];
    Ok(direct(source, workload, dst.ip(), dst.port(), expected, None))
}

/// By what the endpoint speaks; what is in the same pod needs no network.
fn direct(
    source: &Workload,
    destination: Arc<Workload>,
    ip: IpAddr,
    port: u16,
    expected: Vec<Identity>,
    service: Option<Arc<ServiceEntry>>,
) -> Plan {
    let route = match destination.tunnel {
        _ if destination.uid == source.uid => Route::Own,
        Tunnel::Hbone => Route::Hbone {
            next_hop: NextHop::from((ip, HBONE_PORT)),
            expected,
            near: is_near(source, &destination),
        },
        Tunnel::Plain => Route::Plain,
    };
    let target = Target::from((ip, port));
    Plan { route, target, others: Vec::new(), destination: Some(destination), endpoint: None, service }
}

fn is_near(source: &Workload, destination: &Workload) -> bool {
    source.shortcut && destination.shortcut && source.node == destination.node && !source.node.is_empty()
}

fn plain(target: Target, service: Option<Arc<ServiceEntry>>) -> Plan {
    Plan { route: Route::Plain, target, others: Vec::new(), destination: None, endpoint: None, service }
}

fn same_network(source: &Workload, endpoint: &Workload) -> Result<(), PlanError> {
    if endpoint.network == source.network {
        return Ok(());
    }
    let network = endpoint.network.to_string();
    Err(PlanError::OtherNetwork { endpoint: endpoint.uid.to_string(), network })
}

fn needs_waypoint(destination: String, waypoint: &Gateway) -> PlanError {
    PlanError::Waypoint { destination, waypoint: waypoint.destination.to_string() }
}

#[cfg(test)]
mod tests;
