//! What hosts of ServiceEntries are, and their addresses: those that the oldest entry that names them says, or that are
//! made up for it by [`super::allocate`] and stand in its status.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_core::proto::workload as proto;
use serde_json::{Value, json};

use super::super::event::{Custom, Kind, ObjectName};
use super::super::wds::{bytes, wire_port};
use super::super::{Changes, Index, Key, Problem};
use super::allocate::{Reserved, Touched, Wish};
use super::claims::Turn;
use super::host_key;
use super::read::{MadeUp, ServiceEntry};

/// Values of one host in a status that are looked at, of each IP family: some writer may give it more than one.
const MOST_OF_FAMILY: usize = 4;
/// The longest text of an address (RFC 4291 2.2), IPv4-mapped.
const LONGEST_ADDRESS: usize = 45;

/// What `status.addresses` of an entry says.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Said {
    /// By host, in lower case, of those that the entry names.
    of_host: BTreeMap<String, Vec<SaidAddress>>,
    /// There are others, too: of no host of it, more than are looked at, or no addresses.
    has_others: bool,
}

#[derive(Debug, PartialEq)]
struct SaidAddress {
    /// As it stands there.
    host: String,
    value: String,
    ip: Option<IpAddr>,
}

impl Said {
    pub(super) fn read(object: &Custom) -> Self {
        let hosts = object.spec["hosts"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let hosts: HashSet<String> = hosts.map(str::to_ascii_lowercase).collect();
        let mut said = Self::default();
        for address in object.status["addresses"].as_array().into_iter().flatten() {
            let text = |field: &str| address[field].as_str().unwrap_or_default().to_owned();
            let (host, value) = (text("host"), text("value"));
            let key = host.to_ascii_lowercase();
            if !hosts.contains(&key) || value.len() > LONGEST_ADDRESS {
                said.has_others = true;
                continue;
            }
            let ip = value.parse().ok().map(|ip: IpAddr| ip.to_canonical());
            let all = said.of_host.entry(key).or_default();
            let family = |ip: Option<IpAddr>| ip.map(|ip| ip.is_ipv4());
            match all.iter().filter(|one| family(one.ip) == family(ip)).count() < MOST_OF_FAMILY {
                true => all.push(SaidAddress { host, value, ip }),
                false => said.has_others = true,
            }
        }
        said
    }

    fn addresses(&self, host: &str) -> Vec<IpAddr> {
        let said = self.of_host.get(host).into_iter().flatten().filter_map(|said| said.ip);
        said.collect::<BTreeSet<_>>().into_iter().collect()
    }
}

impl SaidAddress {
    fn value(&self) -> Value {
        json!({"host": self.host, "value": self.value})
    }
}

impl Index {
    /// The service of a host, as the oldest ServiceEntry of those that name it says.
    pub(in super::super) fn host_service(&self, host: &ObjectName) -> Option<proto::Service> {
        let (name, entry) = self.entry_of_host(host)?;
        let visibility = match entry.own_namespace_only {
            true => proto::Visibility::Namespace,
            false => proto::Visibility::Public,
        };
        let address = |(ip, length): (IpAddr, Option<u8>)| proto::NetworkAddress {
            address: bytes(&ip),
            length: length.map(u32::from),
            ..Default::default()
        };
        let made_up = self.entries.allocator.in_force(host).map(|ip| (ip, None));
        Some(proto::Service {
            name: name.name.to_string(),
            namespace: name.namespace.to_string(),
            hostname: host.name.to_string(),
            addresses: entry.addresses.iter().copied().chain(made_up).map(address).collect(),
            ports: entry
                .ports
                .iter()
                .map(|port| wire_port(port.number, port.target, port.protocol))
                .collect(),
            subject_alt_names: entry.identities.clone(),
            created: entry.created.try_into().unwrap_or_default(),
            load_balancing: entry.balancing.clone(),
            visibility: visibility.into(),
            ..Default::default()
        })
    }

    fn entry_of_host(&self, host: &ObjectName) -> Option<(&ObjectName, &ServiceEntry)> {
        let (_, name) = self.entries.of_host.get(host)?.first()?;
        Some((name, self.entries.services.get(name)?))
    }

    pub(super) fn link_hosts(&mut self, name: &ObjectName, entry: &ServiceEntry) {
        for host in &entry.hosts {
            let names = self.entries.of_host.entry(host_key(name, host)).or_default();
            names.insert((entry.created, name.clone()));
        }
    }

    pub(super) fn unlink_hosts(&mut self, name: &ObjectName, entry: &ServiceEntry) {
        for host in &entry.hosts {
            let key = host_key(name, host);
            if let Some(names) = self.entries.of_host.get_mut(&key) {
                names.remove(&(entry.created, name.clone()));
                if names.is_empty() {
                    self.entries.of_host.remove(&key);
                }
            }
        }
    }

    /// What becomes of the addresses of entries that may be others now, and what their status is to say of it.
    pub(super) fn turn_addresses(&mut self, turns: &[Turn<ServiceEntry>], changes: &mut Changes) {
        let was_exhausted = self.entries.allocator.is_exhausted();
        let mut touched = Touched::default();
        for Turn { name, old, new, .. } in turns {
            fn reserved(entry: &Option<Arc<ServiceEntry>>) -> Reserved<'_> {
                let Some(entry) = entry.as_deref() else { return Reserved::default() };
                let ServiceEntry { created, own_namespace_only, ref reserved, .. } = *entry;
                Reserved { created, own_namespace_only, addresses: reserved }
            }
            self.entries.allocator.reserve(name, reserved(old), reserved(new), &mut touched);
            for host in old.iter().chain(new).flat_map(|entry| &entry.hosts) {
                let host = host_key(name, host);
                let wish = self.wish(&host);
                self.entries.allocator.set(&host, wish, &mut touched);
            }
            touched.entries.insert(name.clone());
        }
        changes.keys.extend(touched.hosts.into_iter().map(Key::Host));
        for name in &touched.entries {
            let addresses = self.status_addresses(name);
            let exhausted = self.is_waiting(name);
            self.amend_addresses(name, addresses, exhausted, changes);
        }
        let is_news = self.entries.allocator.is_exhausted() && !was_exhausted;
        let news = touched.entries.into_iter().find(|name| is_news && self.is_waiting(name));
        let problem = |name| Problem {
            kind: Kind::ServiceEntry,
            name,
            skipped: false,
            reason: format!("{EXHAUSTED}. So it is with others until some are free"),
        };
        changes.problems.extend(news.map(problem));
    }

    /// None: no addresses are made up for it.
    fn wish(&self, host: &ObjectName) -> Option<Wish> {
        let (name, entry) = self.entry_of_host(host)?;
        let is_one = entry.made_up == MadeUp::Wanted && !host.name.starts_with('*');
        let said = || self.entries.said.get(name).map(|said| said.addresses(&host.name)).unwrap_or_default();
        is_one.then(|| Wish { created: entry.created, entry: name.clone(), said: said() })
    }

    fn is_waiting(&self, name: &ObjectName) -> bool {
        let allocator = &self.entries.allocator;
        allocator.is_exhausted() && self.hosts_of(name).iter().any(|host| allocator.is_waiting(host))
    }

    /// The hosts of which an entry says what they are.
    fn hosts_of(&self, name: &ObjectName) -> Vec<ObjectName> {
        let hosts = self.entries.services.get(name).into_iter().flat_map(|entry| &entry.hosts);
        let hosts = hosts.map(|host| host_key(name, host));
        hosts.filter(|host| self.entry_of_host(host).is_some_and(|(entry, _)| entry == name)).collect()
    }

    /// What `status.addresses` is to say; none: what it says. What another writer has put there for the entry's own hosts
    /// stays, in force or not, unless it is an older one's.
    fn status_addresses(&self, name: &ObjectName) -> Option<Vec<Value>> {
        // One that is left out may come back.
        let entry = self.entries.services.get(name)?;
        let said = self.entries.said.get(name)?;
        match entry.made_up {
            MadeUp::Wanted => {}
            MadeUp::NotOurs => return None,
            MadeUp::Unwanted => {
                let is_empty = said.of_host.is_empty() && !said.has_others;
                return (!is_empty).then(Vec::new);
            }
        }
        let own: BTreeSet<ObjectName> = self.hosts_of(name).into_iter().collect();
        let (mut all, mut changed) = (Vec::new(), said.has_others);
        let others = said.of_host.keys().map(|host| host_key(name, host)).filter(|host| !own.contains(host));
        for host in own.iter().cloned().chain(others) {
            let in_force: HashSet<IpAddr> = self.entries.allocator.in_force(&host).collect();
            let is_wished = own.contains(&host) && !host.name.starts_with('*');
            for said in said.of_host.get(&*host.name).into_iter().flatten() {
                match said.ip {
                    Some(ip) if is_wished && !in_force.contains(&ip) => changed = true,
                    _ => all.push(said.value()),
                }
            }
            for ip in self.entries.allocator.proposed(&host) {
                changed = true;
                all.push(json!({"host": *host.name, "value": ip.to_string()}));
            }
        }
        changed.then_some(all)
    }
}

/// What the status of an entry says of which a host has no address.
pub(in super::super) const EXHAUSTED: &str =
    "no address is free for a host of spec.hosts: all of 240.240.0.0/16 are taken";
