//! What a client may choose from, in the order of what suits it, ready to be drawn from in O(1).

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;

use super::draw::Draw;
use super::{Endpoint, PickError, Picked};
use crate::addr::Network;
use crate::service::{Families, Mode, Scope, Service, ServicePort};
use crate::workload::{Locality, Workload, WorkloadUid};

/// Places whose choices are kept for one port; a proxy has one, or a few while its pods are new.
const MOST_PLACES: usize = 16;

/// The endpoints of a service for one port and the clients of one place.
#[derive(Debug)]
pub(super) struct Choice {
    endpoints: Arc<Vec<Arc<Endpoint>>>,
    /// The best ones first; none is empty.
    tiers: Box<[Tier]>,
    /// Of a service with affinity only.
    by_uid: HashMap<WorkloadUid, Member>,
}

/// Endpoints that suit equally well.
#[derive(Debug)]
struct Tier {
    members: Vec<Member>,
    /// None: all have the same capacity.
    draw: Option<Draw>,
}

/// Number of the endpoint, and its target port.
type Member = (usize, u16);

impl Choice {
    /// Looks at all endpoints.
    pub(super) fn prepare(
        endpoints: &Arc<Vec<Arc<Endpoint>>>,
        service: &Service,
        port: ServicePort,
        dialled_v6: bool,
        client: &Workload,
    ) -> Result<Self, PickError> {
        if endpoints.is_empty() {
            return Err(PickError::NoneReady);
        }
        let wish = Wish { service, dialled_v6, client };
        let targets = endpoints.iter().map(|endpoint| endpoint.target_port(port)).enumerate();
        let members: Vec<Member> = targets.filter_map(|(number, target)| Some((number, target?))).collect();
        if members.is_empty() {
            return Err(PickError::NoTargetPort(port.port));
        }
        let mut tiers: BTreeMap<Reverse<Rank>, Vec<Member>> = BTreeMap::new();
        for member in members {
            let Some(rank) = wish.rank(&endpoints[member.0]) else { continue };
            tiers.entry(Reverse(rank)).or_default().push(member);
        }
        if tiers.is_empty() {
            let widest = service.balancing.scopes.last().copied().unwrap_or(Scope::Node);
            return Err(PickError::NoneNear(widest));
        }
        let named = |member: &Member| (endpoints[member.0].workload.uid.clone(), *member);
        let remembers = service.affinity.is_some();
        Ok(Self {
            by_uid: tiers.values().flatten().filter(|_| remembers).map(named).collect(),
            tiers: tiers.into_values().map(|members| Tier::new(endpoints, members)).collect(),
            endpoints: endpoints.clone(),
        })
    }

    /// One that was not `tried`, of the best tier that has one, in proportion to their capacities.
    pub(super) fn draw(&self, random: u64, tried: &[WorkloadUid]) -> Option<Picked> {
        let is_new = |member: &Member| !tried.contains(&self.endpoints[member.0].workload.uid);
        let found = self.tiers.iter().find_map(|tier| tier.draw(random, tried.len(), is_new));
        found.map(|member| self.picked(member))
    }

    pub(super) fn named(&self, uid: &WorkloadUid) -> Option<Picked> {
        self.by_uid.get(uid).map(|member| self.picked(*member))
    }

    fn picked(&self, (number, target): Member) -> Picked {
        (self.endpoints[number].clone(), target)
    }
}

impl Tier {
    fn new(endpoints: &[Arc<Endpoint>], members: Vec<Member>) -> Self {
        let capacities: Vec<u32> = members.iter().map(|(i, _)| endpoints[*i].workload.capacity).collect();
        Self { draw: Draw::prepare(&capacities), members }
    }

    /// The one that is drawn or, where it is refused, which so many may be, one of the next.
    fn draw(&self, random: u64, refused: usize, is_good: impl Fn(&Member) -> bool) -> Option<Member> {
        let count = self.members.len();
        let drawn = match &self.draw {
            Some(draw) => draw.draw(random),
            None => (random % count as u64) as usize,
        };
        (0..=refused.min(count - 1)).map(|step| self.members[(drawn + step) % count]).find(is_good)
    }
}

/// How well an endpoint suits a client, the worst first. What the client cannot reach is worse than what is far away.
type Rank = (bool, usize, Fit);

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

/// What a client wants of an endpoint.
struct Wish<'a> {
    service: &'a Service,
    dialled_v6: bool,
    client: &'a Workload,
}

impl Wish<'_> {
    /// None: not this one.
    fn rank(&self, endpoint: &Endpoint) -> Option<Rank> {
        let Service { balancing, families, .. } = self.service;
        let fit = self.fit(endpoint, *families);
        // There is no way yet into another network.
        let here = endpoint.workload.network == self.client.network;
        if !prefers_places(self.service) {
            return Some((here, 0, fit));
        }
        let matches = |scope: &&Scope| same(**scope, self.client, &endpoint.workload);
        let near = balancing.scopes.iter().take_while(matches).count();
        let far = balancing.mode == Mode::Strict && near < balancing.scopes.len();
        (!far).then(|| (here && self.reachable(endpoint, *families), near, fit))
    }

    fn fit(&self, endpoint: &Endpoint, families: Families) -> Fit {
        if is_a_name(endpoint) {
            return Fit::Dialled;
        }
        let allowed = endpoint.workload.addresses.iter().filter(|ip| families.allows(**ip));
        let fit = |ip: &IpAddr| if ip.is_ipv6() == self.dialled_v6 { Fit::Dialled } else { Fit::Other };
        allowed.map(fit).max().unwrap_or(Fit::NoAddress)
    }

    /// Whether it has an address of a family that the client has, too; of a client without addresses nothing is known.
    fn reachable(&self, endpoint: &Endpoint, families: Families) -> bool {
        let own = Has::of(self.client);
        let shared = |ip: &IpAddr| if ip.is_ipv4() { own.v4 } else { own.v6 };
        own == Has::default()
            || is_a_name(endpoint)
            || endpoint.workload.addresses.iter().any(|ip| families.allows(*ip) && shared(ip))
    }
}

/// A host name may lead to addresses of either family.
fn is_a_name(endpoint: &Endpoint) -> bool {
    endpoint.workload.addresses.is_empty() && !endpoint.workload.hostname.is_empty()
}

fn prefers_places(service: &Service) -> bool {
    matches!(service.balancing.mode, Mode::Strict | Mode::Failover)
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

/// The families of a client's addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Has {
    v4: bool,
    v6: bool,
}

impl Has {
    fn of(client: &Workload) -> Self {
        let any = |v4: bool| client.addresses.iter().any(|ip| ip.is_ipv4() == v4);
        Self { v4: any(true), v6: any(false) }
    }
}

/// All of a client that a choice depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    has: Has,
    locality: Locality,
    node: Arc<str>,
    cluster: Arc<str>,
    network: Network,
}

impl Place {
    fn of(client: &Workload) -> Self {
        Self {
            has: Has::of(client),
            locality: client.locality.clone(),
            node: client.node.clone(),
            cluster: client.cluster.clone(),
            network: client.network.clone(),
        }
    }

    fn is_of(&self, client: &Workload) -> bool {
        let Self { has, locality, node, cluster, network } = self;
        *has == Has::of(client)
            && *node == client.node
            && *locality == client.locality
            && *cluster == client.cluster
            && *network == client.network
    }
}

type Outcome = Result<Arc<Choice>, PickError>;

/// Choices by port and whether an IPv6 address was dialled; of a network's clients where their place does not matter.
#[derive(Debug, Default)]
pub(super) struct Prepared(ArcSwap<ByPort>);

type ByPort = HashMap<(u16, bool), Vec<(Whose, Outcome)>>;

/// The clients that a choice is for.
#[derive(Clone, Debug)]
enum Whose {
    /// All of a network.
    Network(Network),
    /// Those of a place.
    Place(Place),
}

impl Whose {
    fn are_of(&self, client: &Workload) -> bool {
        match self {
            Self::Network(network) => *network == client.network,
            Self::Place(place) => place.is_of(client),
        }
    }
}

impl Prepared {
    /// What was prepared, else what `prepare` makes. Two who come at the same time may both make it.
    pub(super) fn get(
        &self,
        service: &Service,
        port: ServicePort,
        dialled_v6: bool,
        client: &Workload,
        prepare: impl FnOnce() -> Result<Choice, PickError>,
    ) -> Outcome {
        let asked = (port.port, dialled_v6);
        let is_it = |(whose, _): &&(Whose, Outcome)| whose.are_of(client);
        if let Some((_, known)) = self.0.load().get(&asked).and_then(|all| all.iter().find(is_it)) {
            return known.clone();
        }
        let outcome = prepare().map(Arc::new);
        let whose = match prefers_places(service) {
            true => Whose::Place(Place::of(client)),
            false => Whose::Network(client.network.clone()),
        };
        let entry = (whose, outcome.clone());
        self.0.rcu(|known| {
            let mut known = HashMap::clone(known);
            let places = known.entry(asked).or_default();
            if places.len() >= MOST_PLACES {
                places.clear();
            }
            places.push(entry.clone());
            known
        });
        outcome
    }
}
