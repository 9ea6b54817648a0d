//! ServiceEntry and WorkloadEntry: services that Kubernetes does not have, and endpoints that are no pods. As istiod joins
//! them for ambient proxies.
//!
//! Each host of a ServiceEntry is a service of its namespace. Its endpoints are those that it lists, each a workload of
//! its own, or the pods and WorkloadEntries of the namespace that it selects. A Service selects WorkloadEntries, too.

mod allocate;
mod budget;
mod claims;
mod hosts;
mod read;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use mesh_core::proto::workload as proto;

use self::allocate::Allocator;
use self::claims::{Claimed, Turn};
pub(super) use self::hosts::EXHAUSTED;
use self::hosts::Said;
use self::read::{Endpoint, Place, Port, ServiceEntry, WorkloadEntry};
use super::by_namespace::ByNamespace;
use super::event::{Custom, Kind, ObjectName};
use super::pod::{Labels, Pod, canonical, selects};
use super::wds::{bytes, status, wire_port};
use super::{Changes, Config, Index, Key, Problem};

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Entries {
    services: Claimed<ServiceEntry>,
    workloads: Claimed<WorkloadEntry>,
    /// Who names a host, by namespace and host, the oldest first.
    of_host: HashMap<ObjectName, BTreeSet<(i64, ObjectName)>>,
    /// What the ServiceEntries' status says of addresses.
    said: HashMap<ObjectName, Said>,
    allocator: Allocator,
    /// What Kubernetes' Services select.
    selectors: ByNamespace<Labels>,
}

impl Entries {
    pub(super) fn service_names(&self) -> Vec<ObjectName> {
        self.services.names()
    }

    pub(super) fn workload_names(&self) -> Vec<ObjectName> {
        self.workloads.names()
    }

    /// ServiceEntries of the namespace that select these labels.
    fn selecting<'a>(
        &'a self,
        namespace: &'a str,
        labels: &'a Labels,
    ) -> impl Iterator<Item = &'a ServiceEntry> {
        let all = self.services.of(namespace).map(|(_, entry)| entry);
        all.filter(move |entry| entry.selector.as_ref().is_some_and(|selector| selects(selector, labels)))
    }
}

/// Addresses of the endpoints that a ServiceEntry lists; one that looks its hosts up has these.
fn listed(entry: &ServiceEntry) -> Vec<String> {
    if entry.is_its_own_endpoint {
        return entry.hosts.iter().filter(|host| !host.starts_with('*')).cloned().collect();
    }
    entry.endpoints.iter().map(|endpoint| endpoint.place.to_string()).collect()
}

impl Place {
    /// What [`Display`](std::fmt::Display) wrote.
    fn read(text: &str) -> Self {
        text.parse().map_or_else(|_| Self::Name(text.to_owned()), Self::Address)
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Address(ip) => ip.fmt(f),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl Index {
    pub(super) fn apply_service_entry(&mut self, name: &ObjectName, object: &Custom, changes: &mut Changes) {
        let (entry, faults) = read::service_entry(&self.config, name, object);
        self.note(Kind::ServiceEntry, name, object, faults, changes);
        self.entries.said.insert(name.clone(), Said::read(object));
        let turns = self.entries.services.put(name, Some(entry));
        self.turn_service_entries(turns, changes);
    }

    pub(super) fn delete_service_entry(&mut self, name: &ObjectName, changes: &mut Changes) {
        self.readings.remove(&(Kind::ServiceEntry, name.clone()));
        self.entries.said.remove(name);
        let turns = self.entries.services.put(name, None);
        self.turn_service_entries(turns, changes);
    }

    /// An entry is another, or gone: others may be left out then, or no longer.
    fn turn_service_entries(&mut self, turns: Vec<Turn<ServiceEntry>>, changes: &mut Changes) {
        self.note_left_out(Kind::ServiceEntry, &turns, changes);
        for Turn { name, old, new, .. } in turns.iter().filter(|turn| turn.old != turn.new) {
            old.iter().for_each(|old| self.unlink_hosts(name, old));
            new.iter().for_each(|new| self.link_hosts(name, new));
            for entry in old.iter().chain(new) {
                self.touch_service_entry(name, entry, changes);
            }
        }
        self.turn_addresses(&turns, changes);
    }

    /// For their status, each; the log has the first and how many more.
    fn note_left_out<T>(&mut self, kind: Kind, turns: &[Turn<T>], changes: &mut Changes) {
        let mut left_out = Vec::new();
        for Turn { name, left_out: is_left_out, .. } in turns {
            let is_news = self.amend(kind, name, is_left_out.then_some(budget::LEFT_OUT), changes);
            left_out.extend((is_news && *is_left_out).then(|| name.clone()));
        }
        let more = left_out.len().saturating_sub(1);
        let reason = match more {
            0 => budget::LEFT_OUT.to_owned(),
            more => format!("{}; from now on so it is with {more} more", budget::LEFT_OUT),
        };
        let first = left_out.into_iter().next();
        changes.problems.extend(first.map(|name| Problem { kind, name, skipped: false, reason }));
    }

    /// Its services, and all that is or was an endpoint of them.
    fn touch_service_entry(&self, name: &ObjectName, entry: &ServiceEntry, changes: &mut Changes) {
        changes.keys.extend(entry.hosts.iter().map(|host| Key::Host(host_key(name, host))));
        let listed = listed(entry).into_iter().map(|place| Key::Listed(name.clone(), place.into()));
        changes.keys.extend(listed);
        let Some(selector) = &entry.selector else { return };
        let pods = self.pods_of_namespace.get(&name.namespace).into_iter().flatten();
        for pod in pods.filter_map(|pod| self.pods.get(pod)).filter(|pod| selects(selector, &pod.labels)) {
            self.touch_pod(pod, changes);
        }
        self.touch_selected_entries(&name.namespace, selector, changes);
    }

    fn touch_selected_entries(&self, namespace: &Arc<str>, selector: &Labels, changes: &mut Changes) {
        let all = self.entries.workloads.of(namespace);
        let selected = all.filter(|(_, entry)| selects(selector, &entry.endpoint.labels));
        let key = |name: &Arc<str>| ObjectName { namespace: namespace.clone(), name: name.clone() };
        changes.keys.extend(selected.map(|(name, _)| Key::WorkloadEntry(key(name))));
    }

    /// Whether a Service selected something else until now.
    pub(super) fn is_other_selector(&self, name: &ObjectName, selector: Option<&Labels>) -> bool {
        self.entries.selectors.get(name) != selector.filter(|selector| !selector.is_empty())
    }

    /// A Service selects this now, or is gone; its ports may have changed.
    pub(super) fn service_selects(
        &mut self,
        name: &ObjectName,
        selector: Option<Labels>,
        changes: &mut Changes,
    ) {
        let old = match selector.clone().filter(|selector| !selector.is_empty()) {
            Some(selector) => self.entries.selectors.put(name, selector),
            None => self.entries.selectors.remove(name),
        };
        for selector in old.iter().chain(&selector) {
            self.touch_selected_entries(&name.namespace, selector, changes);
        }
    }

    pub(super) fn apply_workload_entry(&mut self, name: &ObjectName, object: &Custom, changes: &mut Changes) {
        let (entry, faults) = read::workload_entry(name, object);
        self.note(Kind::WorkloadEntry, name, object, faults, changes);
        let turns = self.entries.workloads.put(name, entry);
        self.turn_workload_entries(&turns, changes);
    }

    pub(super) fn delete_workload_entry(&mut self, name: &ObjectName, changes: &mut Changes) {
        self.readings.remove(&(Kind::WorkloadEntry, name.clone()));
        let turns = self.entries.workloads.put(name, None);
        self.turn_workload_entries(&turns, changes);
    }

    fn turn_workload_entries(&mut self, turns: &[Turn<WorkloadEntry>], changes: &mut Changes) {
        self.note_left_out(Kind::WorkloadEntry, turns, changes);
        let turned = turns.iter().filter(|turn| turn.old != turn.new);
        changes.keys.extend(turned.map(|turn| Key::WorkloadEntry(turn.name.clone())));
    }

    /// An endpoint that a ServiceEntry lists.
    pub(super) fn listed_workload(&self, name: &ObjectName, place: &str) -> Option<proto::Workload> {
        let entry = self.entries.services.get(name)?;
        let uid = listed_uid(&self.config, name, place);
        let wanted = Place::read(place);
        let found = entry.endpoints.iter().find(|endpoint| endpoint.place == wanted);
        let Some(endpoint) = found else {
            // The host itself, and of this host alone.
            listed(entry).into_iter().find(|host| host == place)?;
            let services = [(host_name(name, place), ports(&entry.ports, &NO_PORTS))].into();
            return Some(self.entry_workload(uid, name, &Endpoint::named(place), services));
        };
        let services = services_of(name, [entry].into_iter(), &endpoint.ports).collect();
        Some(self.entry_workload(uid, name, endpoint, services))
    }

    /// A WorkloadEntry: an endpoint of what selects it.
    pub(super) fn workload_entry(&self, name: &ObjectName) -> Option<proto::Workload> {
        let endpoint = &self.entries.workloads.get(name)?.endpoint;
        let (services, _) = self.services_of_workload_entry(name, endpoint);
        Some(self.entry_workload(workload_entry_uid(&self.config, name), name, endpoint, services))
    }

    /// Kubernetes' own first: no ServiceEntry takes an endpoint away from them.
    fn services_of_workload_entry(
        &self,
        name: &ObjectName,
        endpoint: &Endpoint,
    ) -> (BTreeMap<String, proto::PortList>, bool) {
        let entries = self.entries.selecting(&name.namespace, &endpoint.labels);
        let services = self.services_selecting(name, endpoint);
        budget::within(
            budget::MOST_OF_WORKLOAD_ENTRY,
            services.chain(services_of(name, entries, &endpoint.ports)),
        )
    }

    /// Says of what was touched whether it is an endpoint of fewer services than select it: of the first, and how many
    /// more.
    pub(super) fn tell_crowded(&self, changes: &mut Changes) {
        let mut crowded = changes.keys.iter().filter_map(|key| {
            let (kind, name, (_, all)) = match key {
                Key::Pod(name) => (Kind::Pod, name, self.services_of_entries(self.pods.get(name)?)),
                Key::WorkloadEntry(name) => {
                    let endpoint = &self.entries.workloads.get(name)?.endpoint;
                    (Kind::WorkloadEntry, name, self.services_of_workload_entry(name, endpoint))
                }
                _ => return None,
            };
            (!all).then(|| (kind, name.clone()))
        });
        let Some((kind, name)) = crowded.next() else { return };
        let more = crowded.count();
        let reason = format!(
            "it is no endpoint of some of the services that select it: so many would cost every proxy too much. So it is \
             with {more} more"
        );
        changes.problems.push(Problem { kind, name, skipped: false, reason });
    }

    /// Kubernetes' Services that select a WorkloadEntry.
    fn services_selecting<'a>(
        &'a self,
        name: &'a ObjectName,
        endpoint: &'a Endpoint,
    ) -> impl Iterator<Item = (String, proto::PortList)> + 'a {
        let all = self.entries.selectors.of(&name.namespace);
        let selecting = all.filter(|(_, selector)| selects(selector, &endpoint.labels));
        selecting.filter_map(move |(service, _)| {
            let service = ObjectName { namespace: name.namespace.clone(), name: service.clone() };
            let known = self.services.get(&service)?;
            let ports = known.ports.iter().filter_map(|port| {
                let own = endpoint.ports.get(&port.name).copied();
                let target = own.or(Some(port.target).filter(|target| *target > 0))?;
                Some(wire_port(port.number, target, port.protocol))
            });
            let key = super::wds::service_key(&self.config, &service);
            Some((key, proto::PortList { ports: ports.collect() }))
        })
    }

    fn entry_workload(
        &self,
        uid: String,
        name: &ObjectName,
        endpoint: &Endpoint,
        services: BTreeMap<String, proto::PortList>,
    ) -> proto::Workload {
        let (addresses, hostname) = match &endpoint.place {
            Place::Address(ip) => (vec![bytes(ip)], String::new()),
            Place::Name(host) => (Vec::new(), host.clone()),
        };
        let tunnel =
            if endpoint.captured { proto::TunnelProtocol::Hbone } else { proto::TunnelProtocol::None };
        let (canonical_name, canonical_revision) = canonical(&endpoint.labels, &name.name);
        proto::Workload {
            uid,
            name: name.name.to_string(),
            namespace: name.namespace.to_string(),
            addresses,
            hostname,
            network: endpoint.network.clone(),
            tunnel_protocol: tunnel.into(),
            trust_domain: self.config.trust_domain.clone(),
            cluster_id: self.config.cluster_id.clone(),
            service_account: endpoint.service_account.clone(),
            canonical_name,
            canonical_revision,
            workload_type: proto::WorkloadType::Pod.into(),
            workload_name: name.name.to_string(),
            status: status(endpoint.healthy).into(),
            services,
            locality: endpoint.locality.clone(),
            capacity: (endpoint.weight > 0).then_some(endpoint.weight),
            ..Default::default()
        }
    }

    /// The services of ServiceEntries that select a pod, and whether these are all.
    pub(super) fn services_of_entries(&self, pod: &Pod) -> (BTreeMap<String, proto::PortList>, bool) {
        let selecting = self.entries.selecting(&pod.name.namespace, &pod.labels);
        budget::within(budget::MOST_OF_POD, services_of(&pod.name, selecting, &NO_PORTS))
    }
}

/// What an endpoint with ports of its own is a part of: each host of these.
fn services_of<'a>(
    name: &'a ObjectName,
    entries: impl Iterator<Item = &'a ServiceEntry>,
    own: &'a BTreeMap<String, u16>,
) -> impl Iterator<Item = (String, proto::PortList)> {
    entries.flat_map(move |entry| {
        let ports = ports(&entry.ports, own);
        entry.hosts.iter().map(move |host| (host_name(name, host), ports.clone()))
    })
}

static NO_PORTS: BTreeMap<String, u16> = BTreeMap::new();

/// Where an endpoint has the ports of a ServiceEntry.
fn ports(ports: &[Port], own: &BTreeMap<String, u16>) -> proto::PortList {
    let port = |port: &Port| {
        wire_port(port.number, own.get(&port.name).copied().unwrap_or(port.target), port.protocol)
    };
    proto::PortList { ports: ports.iter().map(port).collect() }
}

fn host_key(entry: &ObjectName, host: &str) -> ObjectName {
    ObjectName { namespace: entry.namespace.clone(), name: host.into() }
}

/// The name of a host's service in xDS, and in workloads.
pub(super) fn host_name(entry: &ObjectName, host: &str) -> String {
    format!("{}/{host}", entry.namespace)
}

/// uid of the workload of an endpoint that a ServiceEntry lists.
pub(super) fn listed_uid(config: &Config, entry: &ObjectName, place: &str) -> String {
    format!(
        "{}/networking.istio.io/ServiceEntry/{}/{}/{place}",
        config.cluster_id, entry.namespace, entry.name
    )
}

/// uid of a WorkloadEntry's workload.
pub(super) fn workload_entry_uid(config: &Config, entry: &ObjectName) -> String {
    format!("{}/networking.istio.io/WorkloadEntry/{}/{}", config.cluster_id, entry.namespace, entry.name)
}
