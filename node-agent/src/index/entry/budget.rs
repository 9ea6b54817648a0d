//! What entries may cost the proxies, each of which keeps every resource: so many bytes for one object, for all of a
//! namespace, and for being an endpoint of services.
//!
//! An object is small where it names many things, and what it is made into is their product: every endpoint names each
//! port of each host. **Invariant:** what is left out depends on the objects alone, never on the order in which they
//! came, so that all agents leave out the same.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::mem;
use std::sync::Arc;

use mesh_core::proto::workload as proto;

use super::super::event::ObjectName;
use super::read::{Endpoint, ServiceEntry};

/// Of the services of one ServiceEntry, and as much again of the endpoints that it lists.
const MOST_OF_OBJECT: usize = 512 << 10;
/// Of all ServiceEntries of a namespace.
pub(super) const MOST_OF_NAMESPACE: usize = 16 << 20;
/// Of one workload, for the services of entries that it is an endpoint of.
pub(super) const MOST_OF_WORKLOAD: usize = 16 << 10;
/// However many workloads there are: a few services.
const LEAST_OF_WORKLOAD: usize = 256;
/// Of the names that a service's endpoints may prove.
const MOST_OF_IDENTITIES: usize = 16 << 10;

/// A resource's own: its lengths, numbers, timestamps and the mesh's names.
const RESOURCE: usize = 256;
/// One port with its numbers and lengths.
const PORT: usize = 14;
/// The lengths around a text in a list or map.
const TEXT: usize = 12;
/// An address with its prefix length.
const ADDRESS: usize = 30;

/// Cuts its lists until it costs no more than an object may, says so, and notes what is left.
pub(super) fn bound(name: &ObjectName, entry: &mut ServiceEntry, faults: &mut Vec<String>) {
    let mut identities = MOST_OF_IDENTITIES;
    cut(&mut entry.identities, "spec.subjectAltNames", &mut identities, faults, |name| name.len() + TEXT);
    let fixed = RESOURCE + name.name.len() + 2 * name.namespace.len();
    let service = fixed
        + entry.addresses.len() * ADDRESS
        + entry.ports.len() * PORT
        + entry.identities.iter().map(|name| name.len() + TEXT).sum::<usize>();
    let ports = entry.ports.len();
    let of_endpoint = |host: &str| name.namespace.len() + host.len() + TEXT + ports * PORT;
    let mut hosts = mem::take(&mut entry.hosts);
    if entry.selector.is_some() {
        let mut allowance = MOST_OF_WORKLOAD;
        cut(&mut hosts, "spec.hosts", &mut allowance, faults, |host| of_endpoint(host));
    }
    let mut left = MOST_OF_OBJECT;
    let is_endpoint = entry.is_its_own_endpoint();
    let itself = |host: &str| if is_endpoint { workload(name, host) + of_endpoint(host) } else { 0 };
    cut(&mut hosts, "spec.hosts", &mut left, faults, |host| service + 2 * host.len() + itself(host));
    entry.hosts = hosts;
    entry.cost = MOST_OF_OBJECT - left;
    let services: usize = entry.hosts.iter().map(|host| of_endpoint(host)).sum();
    let mut left = MOST_OF_OBJECT;
    cut(&mut entry.endpoints, "spec.endpoints", &mut left, faults, |endpoint| {
        workload(name, &endpoint.place.to_string()) + texts(endpoint) + services
    });
    entry.cost += MOST_OF_OBJECT - left;
}

/// Without its services.
fn workload(name: &ObjectName, place: &str) -> usize {
    RESOURCE + 2 * name.namespace.len() + 4 * name.name.len() + 2 * place.len()
}

fn texts(endpoint: &Endpoint) -> usize {
    let locality = endpoint.locality.iter().map(|all| all.region.len() + all.zone.len() + all.subzone.len());
    let labels = endpoint.labels.values().map(String::len);
    endpoint.network.len() + endpoint.service_account.len() + locality.chain(labels).sum::<usize>()
}

/// Keeps the first of them that `left` is enough for.
fn cut<T>(
    all: &mut Vec<T>,
    field: &str,
    left: &mut usize,
    faults: &mut Vec<String>,
    cost: impl Fn(&T) -> usize,
) {
    let fits = |one: &&T| left.checked_sub(cost(one)).map(|rest| *left = rest).is_some();
    let used = all.iter().take_while(fits).count();
    if used < all.len() {
        let count = all.len();
        faults.push(format!("of the {count} {field} {used} are used: more would cost every proxy too much"));
        all.truncate(used);
    }
}

/// The first of these services that a workload may be an endpoint of.
pub(super) fn within(
    allowance: usize,
    services: impl Iterator<Item = (String, proto::PortList)>,
) -> BTreeMap<String, proto::PortList> {
    let mut left = allowance;
    let mut fits = |key: &str, ports: &proto::PortList| {
        let rest = left.checked_sub(key.len() + TEXT + ports.ports.len() * PORT);
        rest.map(|rest| left = rest).is_some()
    };
    services.take_while(|(key, ports)| fits(key, ports)).collect()
}

/// What each of so many WorkloadEntries of a namespace may cost for its services. Changes with every doubling alone.
pub(super) fn allowance(count: usize) -> usize {
    (MOST_OF_NAMESPACE / count.next_power_of_two()).clamp(LEAST_OF_WORKLOAD, MOST_OF_WORKLOAD)
}

/// Which ServiceEntries are left out because others of their namespace, the older first, have used it up.
#[derive(Debug, Default)]
pub(super) struct Budget(HashMap<Arc<str>, Account>);

/// Of one namespace.
#[derive(Debug, Default)]
struct Account {
    /// By age.
    costs: BTreeMap<(i64, Arc<str>), usize>,
    total: usize,
    left_out: BTreeSet<Arc<str>>,
}

impl Budget {
    /// Whether it is not in force.
    pub(super) fn leaves_out(&self, name: &ObjectName) -> bool {
        self.0.get(&name.namespace).is_some_and(|account| account.left_out.contains(&name.name))
    }

    /// An entry in place of another; returns those of which it is no longer so, or only now, that they are left out.
    /// Takes time in proportion to the namespace's entries while they cost too much, else none.
    pub(super) fn set(
        &mut self,
        name: &ObjectName,
        old: Option<&ServiceEntry>,
        new: Option<&ServiceEntry>,
    ) -> Vec<Arc<str>> {
        let account = self.0.entry(name.namespace.clone()).or_default();
        let key = |entry: &ServiceEntry| (entry.created, name.name.clone());
        account.total -= old.and_then(|old| account.costs.remove(&key(old))).unwrap_or_default();
        if let Some(new) = new {
            account.costs.insert(key(new), new.cost);
            account.total += new.cost;
        }
        let before = mem::take(&mut account.left_out);
        if account.total > MOST_OF_NAMESPACE {
            let mut left = MOST_OF_NAMESPACE;
            let costs = account.costs.iter();
            let too_much =
                costs.filter(|(_, cost)| left.checked_sub(**cost).map(|rest| left = rest).is_none());
            account.left_out = too_much.map(|((_, name), _)| name.clone()).collect();
        }
        let changed = before.symmetric_difference(&account.left_out).cloned().collect();
        if account.costs.is_empty() {
            self.0.remove(&name.namespace);
        }
        changed
    }
}

/// What its status says then.
pub(super) const LEFT_OUT: &str = "the entry is not in force: with it the ServiceEntries of its namespace would cost every \
                                   proxy too much, and others are older";
