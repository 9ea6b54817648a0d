//! The endpoints of a service and the choice of one.
//!
//! A choice is O(1), by the endpoints' capacities, unless the service asks for locality, or its endpoints are of
//! different IP families: then every endpoint has to be looked at.

mod draw;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;

use self::draw::Draw;
use crate::addr::OrigDst;
use crate::service::{Families, Mode, Scope, Service, ServicePort};
use crate::workload::{Health, Workload, WorkloadUid};

/// A workload in its role as a part of one service.
#[derive(Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Who serves.
    pub workload: Arc<Workload>,
    /// `(service port, target port)` where the endpoint has its own.
    pub ports: Box<[(u16, u16)]>,
}

impl Endpoint {
    /// The port on the endpoint for a port of the service: its own entry, else the service's target.
    pub fn target_port(&self, port: ServicePort) -> Option<u16> {
        let own = self.ports.iter().find(|(service_port, _)| *service_port == port.port);
        own.map(|(_, target)| *target).or(port.target)
    }

    /// Where to dial it for a client that dialled `dialled`: that address if it is its own, else its first of that
    /// family, else its first; only of `families`.
    pub fn address(&self, dialled: IpAddr, families: Families) -> Option<IpAddr> {
        let own = &self.workload.addresses;
        if own.contains(&dialled) {
            return Some(dialled);
        }
        let mut allowed = own.iter().copied().filter(|ip| families.allows(*ip));
        let first = allowed.clone().next();
        allowed.find(|ip| same_family(*ip, dialled)).or(first)
    }

    /// How well its address suits a client that dialled `dialled`.
    fn fit(&self, dialled: IpAddr, families: Families) -> Fit {
        match self.address(dialled, families) {
            None => Fit::NoAddress,
            Some(ip) if same_family(ip, dialled) => Fit::Dialled,
            Some(_) => Fit::Other,
        }
    }

    /// Whether it has an address of a family that the client has, too; of a client without addresses nothing is known.
    fn reachable(&self, client: &Workload, families: Families) -> bool {
        let shared = |ip: &IpAddr| client.addresses.iter().any(|own| same_family(*own, *ip));
        client.addresses.is_empty()
            || self.workload.addresses.iter().any(|ip| families.allows(*ip) && shared(ip))
    }

    fn usable(&self) -> bool {
        self.workload.capacity > 0
            && !(self.workload.addresses.is_empty()
                && self.workload.hostname.is_empty()
                && self.workload.network_gateway.is_none())
    }
}

/// What the best address of an endpoint is like, the worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fit {
    /// None of the service's families.
    NoAddress,
    /// Of the other family.
    Other,
    /// Of the family that was dialled.
    Dialled,
}

/// A service with its endpoints, which change without it.
#[derive(Debug)]
pub struct ServiceEntry {
    /// The service itself.
    pub service: Arc<Service>,
    ready: ArcSwap<Ready>,
}

/// What may be chosen.
#[derive(Debug, Default)]
struct Ready {
    endpoints: Arc<Vec<Arc<Endpoint>>>,
    /// None: all have the same capacity.
    draw: Option<Draw>,
}

/// Why no endpoint can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PickError {
    /// The service does not list the port.
    #[error("the service has no port {0}")]
    NoSuchPort(u16),
    /// No endpoint is ready (or, where locality is strict, near enough).
    #[error("no endpoint of the service is ready")]
    NoneReady,
    /// There are some, but none resolves the named target port.
    #[error("no endpoint of the service has a target for port {0}")]
    NoTargetPort(u16),
}

impl ServiceEntry {
    pub(super) fn new(service: Service, members: &Members) -> Self {
        let entry = Self { service: Arc::new(service), ready: ArcSwap::default() };
        entry.publish(members);
        entry
    }

    pub(super) fn publish(&self, members: &Members) {
        let endpoints = members.ready(self.service.balancing.allow_unhealthy);
        let capacities: Vec<u32> = endpoints.iter().map(|endpoint| endpoint.workload.capacity).collect();
        let draw = Draw::prepare(&capacities);
        self.ready.store(Arc::new(Ready { endpoints: Arc::new(endpoints), draw }));
    }

    /// What may be chosen now.
    pub fn endpoints(&self) -> Arc<Vec<Arc<Endpoint>>> {
        self.ready.load().endpoints.clone()
    }

    /// Whether the workload serves this service (ready or not is not asked).
    pub fn has_member(&self, workload: &Workload) -> bool {
        workload.services.iter().any(|membership| membership.service == self.service.key)
    }

    /// Chooses an endpoint for a client that dialled `dst`, and its target port. Of equal ones, those that have an
    /// address of the family of `dst` come first. `random` is any number; each value of it is as good as another.
    ///
    /// # Errors
    /// When the port is not one of the service's, or nothing is ready.
    pub fn pick(
        &self,
        client: &Workload,
        dst: OrigDst,
        random: usize,
    ) -> Result<(Arc<Endpoint>, u16), PickError> {
        let port = self.service.port(dst.port()).ok_or(PickError::NoSuchPort(dst.port()))?;
        let ready = self.ready.load();
        if ready.endpoints.is_empty() {
            return Err(PickError::NoneReady);
        }
        let picked = match self.service.balancing.mode {
            Mode::Any | Mode::Passthrough => self.pick_any(&ready, port, dst.ip(), random),
            Mode::Strict | Mode::Failover => {
                self.pick_near(&ready.endpoints, port, client, dst.ip(), random)?
            }
        };
        picked.ok_or(PickError::NoTargetPort(port.port))
    }

    /// The one that is drawn, if it resolves the port and fits: nearly always.
    fn pick_any(
        &self,
        ready: &Ready,
        port: ServicePort,
        dialled: IpAddr,
        random: usize,
    ) -> Option<(Arc<Endpoint>, u16)> {
        let families = self.service.families;
        let drawn = match &ready.draw {
            Some(draw) => draw.draw(random as u64),
            None => random % ready.endpoints.len(),
        };
        let drawn = ready.endpoints.get(drawn).filter(|drawn| drawn.fit(dialled, families) == Fit::Dialled);
        if let Some(drawn) = drawn
            && let Some(target) = drawn.target_port(port)
        {
            return Some((drawn.clone(), target));
        }
        // Drawn anew among the rest: whoever comes next in the list would get this one's share beside its own.
        let (_, endpoint, target) =
            best(&ready.endpoints, port, mixed(random as u64), |endpoint| endpoint.fit(dialled, families))?;
        Some((endpoint.clone(), target))
    }

    /// What the client cannot reach is worse than what is far away.
    fn pick_near(
        &self,
        endpoints: &[Arc<Endpoint>],
        port: ServicePort,
        client: &Workload,
        dialled: IpAddr,
        random: usize,
    ) -> Result<Option<(Arc<Endpoint>, u16)>, PickError> {
        let Service { balancing, families, .. } = &*self.service;
        let near = |endpoint: &Endpoint| {
            balancing.scopes.iter().take_while(|scope| same(**scope, client, &endpoint.workload)).count()
        };
        let found = best(endpoints, port, random as u64, |endpoint| {
            (endpoint.reachable(client, *families), near(endpoint), endpoint.fit(dialled, *families))
        });
        let Some(((_, near, _), endpoint, target)) = found else { return Ok(None) };
        if balancing.mode == Mode::Strict && near < balancing.scopes.len() {
            return Err(PickError::NoneReady);
        }
        Ok(Some((endpoint.clone(), target)))
    }
}

/// Of the endpoints that resolve the port those of the highest rank, and of these one in proportion to its capacity;
/// looks at all of them.
fn best<Rank: Ord>(
    endpoints: &[Arc<Endpoint>],
    port: ServicePort,
    random: u64,
    rank: impl Fn(&Endpoint) -> Rank,
) -> Option<(Rank, &Arc<Endpoint>, u16)> {
    let candidates = || {
        let target = |endpoint: &Arc<Endpoint>| endpoint.target_port(port);
        endpoints.iter().filter_map(move |endpoint| Some((endpoint, target(endpoint)?)))
    };
    let highest = candidates().map(|(endpoint, _)| rank(endpoint)).max()?;
    let equal = || candidates().filter(|(endpoint, _)| rank(endpoint) == highest);
    let capacity = |endpoint: &Endpoint| u64::from(endpoint.workload.capacity);
    let total: u64 = equal().map(|(endpoint, _)| capacity(endpoint)).sum();
    let mut left = random % total.max(1);
    let (endpoint, target) = equal().find(|(endpoint, _)| {
        let found = left < capacity(endpoint);
        left = left.saturating_sub(capacity(endpoint));
        found
    })?;
    Some((highest, endpoint, target))
}

/// Another number, which shows nothing of what was drawn with this one (the finalizer of SplitMix64).
fn mixed(random: u64) -> u64 {
    let random = (random ^ (random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let random = (random ^ (random >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    random ^ (random >> 31)
}

fn same_family(a: IpAddr, b: IpAddr) -> bool {
    a.is_ipv4() == b.is_ipv4()
}

/// Whether two workloads are in the same place; two unknown places are the same.
fn same(scope: Scope, a: &Workload, b: &Workload) -> bool {
    match scope {
        Scope::Region => a.locality.region == b.locality.region,
        Scope::Zone => a.locality.zone == b.locality.zone,
        Scope::Subzone => a.locality.subzone == b.locality.subzone,
        Scope::Node => a.node == b.node,
        Scope::Cluster => a.cluster == b.cluster,
        Scope::Network => a.network == b.network,
    }
}

/// The writer's list of a service's endpoints, ready or not.
#[derive(Debug, Default)]
pub(super) struct Members {
    by_uid: HashMap<WorkloadUid, Arc<Endpoint>>,
}

impl Members {
    pub(super) fn put(&mut self, endpoint: Arc<Endpoint>) {
        self.by_uid.insert(endpoint.workload.uid.clone(), endpoint);
    }

    pub(super) fn remove(&mut self, uid: &WorkloadUid) {
        self.by_uid.remove(uid);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_uid.is_empty()
    }

    fn ready(&self, allow_unhealthy: bool) -> Vec<Arc<Endpoint>> {
        self.by_uid
            .values()
            .filter(|endpoint| allow_unhealthy || endpoint.workload.health == Health::Healthy)
            .filter(|endpoint| endpoint.usable())
            .cloned()
            .collect()
    }
}
