//! The mesh as known to this process: one [`Writer`], many [`Reader`]s that never wait for it.
//!
//! Readers look into sharded snapshots; a change copies the shards it touches (about 1/1024 of a map) and the
//! endpoint list of the services concerned, never the mesh. Nothing is visible before [`Writer::commit`].
//! **Invariant:** entries are complete on their own; a reader may see one change of a batch before another, never
//! half of one.

mod endpoints;
mod policies;
mod reader;
mod refused;
mod sharded;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arc_swap::ArcSwap;
use ipnet::IpNet;

pub use endpoints::{Directory, Endpoint, Here, PickError, Picked, ServiceEntry};
pub use policies::ChangedPolicies;
pub use refused::{Claims, Refused};
use sharded::{Shards, ShardsWriter};

use crate::addr::{Network, NetworkAddress};
use crate::identity::Identity;
use crate::service::{Service, ServiceName, Vip};
use crate::workload::{Tunnel, Workload, WorkloadUid};

/// What an address belongs to.
#[derive(Clone, Debug)]
pub enum Found {
    /// A workload of that address.
    Workload(Arc<Workload>),
    /// A service with that virtual address.
    Service(Arc<ServiceEntry>),
    /// A resource that could not be taken over: nothing may be sent there.
    Refused(Arc<Refused>),
}

/// How much is known, for status pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Size {
    pub workloads: usize,
    pub services: usize,
    pub authorizations: usize,
    /// Workloads and services that were refused.
    pub refused: usize,
    /// Those of them that have addresses which could not be read, and no earlier good form.
    pub unreadable: usize,
    /// Policies that were refused and deny therefore.
    pub refused_authorizations: usize,
}

/// What a commit changed that policy depends on: connections that were allowed may not be any more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Policies.
    pub policies: ChangedPolicies,
    /// Workloads that are subject to other policies than before, or are gone: what stands in for one that is gone, such
    /// as what the agent said of a pod, may be subject to others.
    pub workloads: Vec<WorkloadUid>,
}

type Entries = Arc<[Arc<ServiceEntry>]>;

/// The maps that readers see.
#[derive(Debug, Default)]
struct Published {
    by_uid: Shards<WorkloadUid, Arc<Workload>>,
    by_address: Shards<NetworkAddress, Arc<Workload>>,
    by_vip: Shards<NetworkAddress, Entries>,
    by_prefix: Shards<(Network, IpNet), Entries>,
    /// Prefix lengths in use, longest first; never shrinks.
    prefix_lengths: ArcSwap<Vec<u8>>,
    by_hostname: Shards<Arc<str>, Entries>,
    policies: policies::Published,
    refused: refused::Published,
    workloads: AtomicUsize,
    services: AtomicUsize,
}

/// A view of the mesh; clones are cheap, lookups are lock-free and O(1).
#[derive(Clone, Debug, Default)]
pub struct Reader {
    published: Arc<Published>,
}

/// The one that changes it. Not `Clone`.
#[derive(Debug)]
pub struct Writer {
    published: Arc<Published>,
    by_uid: ShardsWriter<WorkloadUid, Arc<Workload>>,
    by_address: ShardsWriter<NetworkAddress, Arc<Workload>>,
    by_vip: ShardsWriter<NetworkAddress, Entries>,
    by_prefix: ShardsWriter<(Network, IpNet), Entries>,
    by_hostname: ShardsWriter<Arc<str>, Entries>,
    /// Workloads that claim an address which another one has.
    outranked: HashMap<NetworkAddress, Vec<Arc<Workload>>>,
    services: HashMap<ServiceName, Arc<ServiceEntry>>,
    /// Endpoints of every service named by a workload, whether or not the service is known yet.
    members: HashMap<ServiceName, endpoints::Members>,
    changed_members: HashSet<ServiceName>,
    policies: policies::Book,
    refused: refused::Book,
    changes: Changes,
}

/// An empty mesh.
pub fn new() -> (Writer, Reader) {
    let reader = Reader::default();
    (Writer::new(reader.published.clone()), reader)
}

impl Writer {
    fn new(published: Arc<Published>) -> Self {
        Self {
            by_uid: ShardsWriter::new(&published.by_uid),
            by_address: ShardsWriter::new(&published.by_address),
            by_vip: ShardsWriter::new(&published.by_vip),
            by_prefix: ShardsWriter::new(&published.by_prefix),
            by_hostname: ShardsWriter::new(&published.by_hostname),
            policies: policies::Book::new(&published.policies),
            refused: refused::Book::new(&published.refused),
            published,
            outranked: HashMap::new(),
            services: HashMap::new(),
            members: HashMap::new(),
            changed_members: HashSet::new(),
            changes: Changes::default(),
        }
    }

    /// Adds a workload or replaces the one with its uid.
    pub fn put_workload(&mut self, workload: Workload) {
        let workload = Arc::new(workload);
        let old = self.by_uid.get(&workload.uid);
        if old.as_ref().is_some_and(|old| **old == *workload) {
            return;
        }
        let subject = match &old {
            Some(old) => judged(old) != judged(&workload),
            // Until now what the agent said of it counted.
            None => true,
        };
        if subject {
            self.changes.workloads.push(workload.uid.clone());
        }
        if let Some(old) = old {
            self.unindex_workload(&old, Some(&workload));
        }
        if !workload.host_network {
            for &address in &workload.addresses {
                self.claim(NetworkAddress::new(workload.network.clone(), address), &workload);
            }
        }
        for membership in &workload.services {
            let members = self.members.entry(membership.service.clone()).or_default();
            members.put(Arc::new(Endpoint { workload: workload.clone(), ports: membership.ports.clone() }));
            self.changed_members.insert(membership.service.clone());
        }
        self.by_uid.insert(workload.uid.clone(), workload);
    }

    /// Forgets a workload. False if there was none of that name.
    pub fn remove_workload(&mut self, uid: &str) -> bool {
        let Some(old) = self.by_uid.remove(uid) else { return false };
        self.unindex_workload(&old, None);
        self.changes.workloads.push(old.uid.clone());
        true
    }

    /// Adds a service or replaces the one with its key.
    pub fn put_service(&mut self, service: Service) {
        let key = service.key.clone();
        if let Some(old) = self.services.get(&key).cloned() {
            if *old.service == service {
                return;
            }
            self.unindex_service(&old);
        }
        let members = self.members.entry(key.clone()).or_default();
        let entry = Arc::new(ServiceEntry::new(service, members));
        for vip in &entry.service.vips {
            match vip {
                Vip::Address(address) => self.by_vip.update(address, |entries| with(entries, &entry)),
                Vip::Prefix(network, prefix) => {
                    self.note_prefix_length(prefix.prefix_len());
                    self.by_prefix.update(&(network.clone(), *prefix), |entries| with(entries, &entry));
                }
            }
        }
        self.by_hostname.update(&key.hostname.clone(), |entries| with(entries, &entry));
        self.services.insert(key, entry);
    }

    /// Forgets a service; its endpoints are kept for the case that it comes back. False if there was none.
    pub fn remove_service(&mut self, key: &ServiceName) -> bool {
        let Some(old) = self.services.remove(key) else { return false };
        self.unindex_service(&old);
        if self.members.get(key).is_some_and(endpoints::Members::is_empty) {
            self.members.remove(key);
        }
        true
    }

    /// Makes everything since the last commit visible, and says what of it policy depends on.
    pub fn commit(&mut self) -> Changes {
        for key in std::mem::take(&mut self.changed_members) {
            let Some(members) = self.members.get_mut(&key) else { continue };
            match self.services.get(&key) {
                Some(entry) => entry.publish(members),
                None if members.is_empty() => {
                    self.members.remove(&key);
                }
                None => {}
            }
        }
        let published = &self.published;
        self.by_uid.commit(&published.by_uid);
        self.by_address.commit(&published.by_address);
        self.by_vip.commit(&published.by_vip);
        self.by_prefix.commit(&published.by_prefix);
        self.by_hostname.commit(&published.by_hostname);
        self.policies.commit(&published.policies);
        self.refused.commit(&published.refused);
        published.workloads.store(self.by_uid.len(), Ordering::Relaxed);
        published.services.store(self.services.len(), Ordering::Relaxed);
        std::mem::take(&mut self.changes)
    }

    /// Removes what `old` has and `new` (its successor, if any) has not.
    fn unindex_workload(&mut self, old: &Arc<Workload>, new: Option<&Workload>) {
        if !old.host_network {
            for &address in &old.addresses {
                self.release(NetworkAddress::new(old.network.clone(), address), &old.uid);
            }
        }
        let kept: HashSet<&ServiceName> =
            new.iter().flat_map(|new| new.services.iter()).map(|membership| &membership.service).collect();
        for membership in old.services.iter().filter(|membership| !kept.contains(&membership.service)) {
            if let Some(members) = self.members.get_mut(&membership.service) {
                members.remove(&old.uid);
                self.changed_members.insert(membership.service.clone());
            }
        }
    }

    /// Gives an address to a workload unless one that ranks higher has it.
    fn claim(&mut self, address: NetworkAddress, workload: &Arc<Workload>) {
        let loser = match self.by_address.get(&address) {
            Some(holder) if rank(&holder) > rank(workload) => workload.clone(),
            Some(holder) => {
                self.by_address.insert(address.clone(), workload.clone());
                holder
            }
            None => {
                self.by_address.insert(address, workload.clone());
                return;
            }
        };
        self.outranked.entry(address).or_default().push(loser);
    }

    /// Takes an address from a workload and gives it to the best of those that were outranked.
    fn release(&mut self, address: NetworkAddress, uid: &WorkloadUid) {
        let waiting = self.outranked.get_mut(&address);
        if self.by_address.get(&address).is_some_and(|holder| holder.uid != *uid) {
            if let Some(waiting) = waiting {
                waiting.retain(|other| other.uid != *uid);
            }
        } else {
            let heir = waiting.and_then(|waiting| {
                let best = (0..waiting.len()).max_by_key(|&i| rank(&waiting[i]))?;
                Some(waiting.swap_remove(best))
            });
            match heir {
                Some(heir) => self.by_address.insert(address.clone(), heir),
                None => drop(self.by_address.remove(&address)),
            }
        }
        if self.outranked.get(&address).is_some_and(Vec::is_empty) {
            self.outranked.remove(&address);
        }
    }

    fn unindex_service(&mut self, old: &Arc<ServiceEntry>) {
        for vip in &old.service.vips {
            match vip {
                Vip::Address(address) => self.by_vip.update(address, |entries| without(entries, old)),
                Vip::Prefix(network, prefix) => {
                    self.by_prefix.update(&(network.clone(), *prefix), |entries| without(entries, old));
                }
            }
        }
        self.by_hostname.update(&old.service.key.hostname, |entries| without(entries, old));
    }

    fn note_prefix_length(&self, length: u8) {
        let known = self.published.prefix_lengths.load_full();
        if let Err(position) = known.binary_search_by(|other| length.cmp(other)) {
            let mut lengths = (*known).clone();
            lengths.insert(position, length);
            self.published.prefix_lengths.store(Arc::new(lengths));
        }
    }
}

/// What of a workload says which policies are about it, and whether it is still the same one.
fn judged(workload: &Workload) -> (&Identity, &str, &[Arc<str>]) {
    (&workload.identity, &workload.namespace, &workload.authorization_policies)
}

/// Of two workloads with one address the pod wins, then the one that speaks HBONE (as in Istio's ztunnel), then the
/// later one: stale objects are older.
fn rank(workload: &Workload) -> (bool, bool) {
    (workload.is_pod(), workload.tunnel == Tunnel::Hbone)
}

/// In an order that no later change of one of them alters, the same at every node.
fn with(entries: Option<&Entries>, entry: &Arc<ServiceEntry>) -> Option<Entries> {
    let mut all: Vec<_> = entries.iter().flat_map(|entries| entries.iter()).chain([entry]).cloned().collect();
    all.sort_by(|a, b| age(&a.service).cmp(&age(&b.service)));
    Some(all.into())
}

fn age(service: &Service) -> (u64, &ServiceName) {
    (service.created, &service.key)
}

fn without(entries: Option<&Entries>, entry: &Arc<ServiceEntry>) -> Option<Entries> {
    let rest: Entries = entries?.iter().filter(|other| !Arc::ptr_eq(other, entry)).cloned().collect();
    (!rest.is_empty()).then_some(rest)
}
