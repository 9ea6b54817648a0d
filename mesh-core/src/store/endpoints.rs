//! The endpoints of a service and the choice of one.
//!
//! A choice is O(1) in their number, and takes no lock: what a client may choose from is prepared for the first one of
//! its place ([`choice`]), and holds until the endpoints change. The clients of a proxy are of one node.

mod choice;
mod directory;
mod draw;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;

use self::choice::{Choice, Prepared};
pub use self::directory::{Directory, Here};
use crate::addr::OrigDst;
use crate::service::{Families, Scope, Service, ServicePort};
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

    /// Another of its addresses, of the other family than `first`, for the case that this one does not answer.
    pub fn other_address(&self, first: IpAddr, families: Families) -> Option<IpAddr> {
        let mut others = self.workload.addresses.iter().copied();
        others.find(|ip| families.allows(*ip) && !same_family(*ip, first))
    }

    fn usable(&self) -> bool {
        self.workload.capacity > 0
            && !(self.workload.addresses.is_empty()
                && self.workload.hostname.is_empty()
                && self.workload.network_gateway.is_none())
    }
}

/// A service with its endpoints, which change without it.
#[derive(Debug)]
pub struct ServiceEntry {
    /// The service itself.
    pub service: Arc<Service>,
    known: ArcSwap<Known>,
}

/// What may be chosen.
#[derive(Debug, Default)]
struct Known {
    ready: Arc<Vec<Arc<Endpoint>>>,
    /// Where nothing else is ready.
    draining: Arc<Vec<Arc<Endpoint>>>,
    prepared: Prepared,
    directory: OnceLock<Arc<Directory>>,
}

/// An endpoint and its target port.
pub type Picked = (Arc<Endpoint>, u16);

/// Why no endpoint can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PickError {
    /// The service does not list the port.
    #[error("the service has no port {0}")]
    NoSuchPort(u16),
    /// No endpoint is ready.
    #[error("no endpoint of the service is ready")]
    NoneReady,
    /// No endpoint is where its traffic has to stay (`internalTrafficPolicy: Local`).
    #[error(
        "no endpoint of the service is ready in the client's {}, which its traffic has to stay in",
        .0.as_str()
    )]
    NoneNear(Scope),
    /// There are some, but none resolves the named target port.
    #[error("no endpoint of the service has a target for port {0}")]
    NoTargetPort(u16),
}

impl ServiceEntry {
    pub(super) fn new(service: Service, members: &Members) -> Self {
        let entry = Self { service: Arc::new(service), known: ArcSwap::default() };
        entry.publish(members);
        entry
    }

    pub(super) fn publish(&self, members: &Members) {
        let ready = |endpoint: &Endpoint| {
            self.service.balancing.allow_unhealthy || endpoint.workload.health == Health::Healthy
        };
        let draining = |endpoint: &Endpoint| endpoint.workload.health == Health::Draining;
        self.known.store(Arc::new(Known {
            ready: Arc::new(members.usable(ready)),
            draining: Arc::new(members.usable(draining)),
            prepared: Prepared::default(),
            directory: OnceLock::new(),
        }));
    }

    /// What is ready now.
    pub fn endpoints(&self) -> Arc<Vec<Arc<Endpoint>>> {
        self.known.load().ready.clone()
    }

    /// The same by names and addresses.
    pub fn directory(&self) -> Arc<Directory> {
        let known = self.known.load();
        known.directory.get_or_init(|| Arc::new(Directory::new(&self.service, &known.ready))).clone()
    }

    /// Whether the workload serves this service (ready or not is not asked).
    pub fn has_member(&self, workload: &Workload) -> bool {
        workload.services.iter().any(|membership| membership.service == self.service.key)
    }

    /// Chooses an endpoint for a client that dialled `dst`. Of equal ones, those that have an address of the family of
    /// `dst` come first. `random` is any number; each value of it is as good as another.
    ///
    /// # Errors
    /// When the port is not one of the service's, or nothing is ready.
    pub fn pick(&self, client: &Workload, dst: OrigDst, random: usize) -> Result<Picked, PickError> {
        let choice = self.choice(client, dst)?;
        choice.draw(random as u64, &[]).ok_or(PickError::NoneReady)
    }

    /// The same where some have been `tried` already, which should be few; None: there is no other.
    pub fn pick_other(
        &self,
        client: &Workload,
        dst: OrigDst,
        random: usize,
        tried: &[WorkloadUid],
    ) -> Option<Picked> {
        self.choice(client, dst).ok()?.draw(random as u64, tried)
    }

    /// The endpoint with this name, if it still is one that the client may get. Only of a service with affinity.
    pub fn keep(&self, client: &Workload, dst: OrigDst, uid: &WorkloadUid) -> Option<Picked> {
        self.choice(client, dst).ok()?.named(uid)
    }

    fn choice(&self, client: &Workload, dst: OrigDst) -> Result<Arc<Choice>, PickError> {
        let port = self.service.port(dst.port()).ok_or(PickError::NoSuchPort(dst.port()))?;
        let known = self.known.load();
        known.prepared.get(&self.service, port, dst.ip().is_ipv6(), client, || {
            let from =
                |endpoints| Choice::prepare(endpoints, &self.service, port, dst.ip().is_ipv6(), client);
            from(&known.ready).or_else(|error| from(&known.draining).map_err(|_| error))
        })
    }
}

fn same_family(a: IpAddr, b: IpAddr) -> bool {
    a.is_ipv4() == b.is_ipv4()
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

    fn usable(&self, wanted: impl Fn(&Endpoint) -> bool) -> Vec<Arc<Endpoint>> {
        let all = self.by_uid.values();
        all.filter(|endpoint| endpoint.usable() && wanted(endpoint)).cloned().collect()
    }
}
