//! What entries may cost the proxies, each of which keeps every resource: so many bytes for one object, for all of a
//! namespace, and for being an endpoint of services.
//!
//! An object is small where it names many things, and what it is made into is their product: every endpoint names each
//! port of each host. Which objects of a namespace are in force is up to [`super::claims`].

use std::collections::BTreeMap;
use std::mem;

use mesh_core::proto::workload as proto;

use super::super::event::ObjectName;
use super::super::pod::Labels;
use super::claims::{Claim, Claimant};
use super::read::{Endpoint, MadeUp, ServiceEntry, WorkloadEntry};

/// Of the services of one ServiceEntry, and as much again of the endpoints that it lists.
const MOST_OF_OBJECT: usize = 512 << 10;
/// Of all ServiceEntries of a namespace, and as much again of all WorkloadEntries.
pub(super) const MOST_OF_NAMESPACE: usize = 16 << 20;
/// Of one pod, for the services of entries that it is an endpoint of.
pub(super) const MOST_OF_POD: usize = 16 << 10;
/// The same of a WorkloadEntry, for Kubernetes' Services as well; each is counted as if it had so many.
pub(super) const MOST_OF_WORKLOAD_ENTRY: usize = 2 << 10;
/// What an object is counted as at least: each is looked at when others of its namespace change.
const LEAST_OF_OBJECT: usize = 4 << 10;
/// The same of a ServiceEntry that selects, which is looked at for each endpoint.
const LEAST_OF_SELECTOR: usize = 32 << 10;
/// Of the labels of a WorkloadEntry.
const MOST_OF_LABELS: usize = 16 << 10;
/// Of the names that a service's endpoints may prove.
const MOST_OF_IDENTITIES: usize = 16 << 10;

/// Of a label's key: a prefix, a slash and a name, as Kubernetes has it.
const LONGEST_KEY: usize = 253 + 1 + 63;
/// Of its value.
const LONGEST_VALUE: usize = 63;

/// A resource's own: its lengths, numbers, timestamps and the mesh's names.
const RESOURCE: usize = 256;
/// One port with its numbers and lengths.
const PORT: usize = 14;
/// The lengths around a text in a list or map.
const TEXT: usize = 12;
/// An address of the ranges that addresses are made up from, which are everybody's: lest one namespace take them all.
const MADE_UP: usize = 1 << 10;
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
        let mut allowance = MOST_OF_POD;
        cut(&mut hosts, "spec.hosts", &mut allowance, faults, |host| of_endpoint(host));
    }
    let mut left = MOST_OF_OBJECT;
    let is_endpoint = entry.is_its_own_endpoint;
    let itself = |host: &str| if is_endpoint { workload(name, host) + of_endpoint(host) } else { 0 };
    cut(&mut hosts, "spec.hosts", &mut left, faults, |host| service + 2 * host.len() + itself(host));
    entry.hosts = hosts;
    let is_made_up = |host: &&String| entry.made_up == MadeUp::Wanted && !host.starts_with('*');
    let made_up = entry.hosts.iter().filter(is_made_up).count() + entry.reserved.len();
    entry.cost = MOST_OF_OBJECT - left + made_up * MADE_UP;
    let services: usize = entry.hosts.iter().map(|host| of_endpoint(host)).sum();
    let mut left = MOST_OF_OBJECT;
    cut(&mut entry.endpoints, "spec.endpoints", &mut left, faults, |endpoint| {
        workload(name, &endpoint.place.to_string()) + texts(endpoint) + services
    });
    entry.cost += MOST_OF_OBJECT - left;
}

/// Cuts the labels of a WorkloadEntry, says so, and returns what it costs with all of its services.
pub(super) fn bound_workload(name: &ObjectName, endpoint: &mut Endpoint, faults: &mut Vec<String>) -> usize {
    let mut labels: Vec<(String, String)> = mem::take(&mut endpoint.labels).into_iter().collect();
    let mut left = MOST_OF_LABELS;
    cut(&mut labels, "labels", &mut left, faults, |(key, value)| key.len() + value.len() + TEXT);
    endpoint.labels = labels.into_iter().collect();
    workload(name, &endpoint.place.to_string()) + texts(endpoint) + MOST_OF_WORKLOAD_ENTRY
}

/// Those that could be an object's, whose lengths the API server has seen to: no others can be selected.
pub(super) fn labels(all: &Labels, address: &str, faults: &mut Vec<String>) -> Labels {
    let mut labels = all.clone();
    labels.retain(|key, value| key.len() <= LONGEST_KEY && value.len() <= LONGEST_VALUE);
    let count = all.len() - labels.len();
    if count > 0 {
        faults.push(format!(
            "{count} labels of the endpoint {address:?} are left out: no value is longer than {LONGEST_VALUE} bytes, no \
             key than {LONGEST_KEY}"
        ));
    }
    labels
}

/// Without its services.
fn workload(name: &ObjectName, place: &str) -> usize {
    RESOURCE + 2 * name.namespace.len() + 4 * name.name.len() + 2 * place.len()
}

fn texts(endpoint: &Endpoint) -> usize {
    let locality = endpoint.locality.iter().map(|all| all.region.len() + all.zone.len() + all.subzone.len());
    let labels = endpoint.labels.iter().map(|(key, value)| key.len() + value.len());
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

/// The first of these services that a workload may be an endpoint of, and whether that is all of them.
pub(super) fn within(
    allowance: usize,
    services: impl Iterator<Item = (String, proto::PortList)>,
) -> (BTreeMap<String, proto::PortList>, bool) {
    let (mut left, mut found) = (allowance, BTreeMap::new());
    for (key, ports) in services {
        let Some(rest) = left.checked_sub(key.len() + TEXT + ports.ports.len() * PORT) else {
            return (found, false);
        };
        left = rest;
        found.insert(key, ports);
    }
    (found, true)
}

/// What an entry's status says that is not in force for this.
pub(super) const LEFT_OUT: &str = "the entry is not in force: with it the entries of its kind and namespace would cost every \
                                   proxy too much, and others are older";

impl Claimant for ServiceEntry {
    fn claim(&self) -> Claim {
        let least = if self.selector.is_some() { LEAST_OF_SELECTOR } else { LEAST_OF_OBJECT };
        Claim { created: self.created, cost: self.cost.max(least) }
    }
}

impl Claimant for WorkloadEntry {
    fn claim(&self) -> Claim {
        Claim { created: self.created, cost: self.cost.max(LEAST_OF_OBJECT) }
    }
}
