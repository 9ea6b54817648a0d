//! The mesh model: joins what the API server says into workloads and services.
//!
//! An event in, the keys of what may have changed out; the resources themselves are built when asked for, so that
//! only the facts they are made of are kept. Order of events does not matter, only the last of each object.
//! **Invariant:** synchronous, one writer, no logging, no clock; the cost of an event is in proportion to what it
//! touches, never to the size of the cluster.

mod authorization_policy;
mod by_namespace;
mod entry;
pub mod event;
pub mod local;
pub mod membership;
mod namespace;
mod network;
mod node;
mod peer_authentication;
pub mod pod;
mod policies;
mod probes;
mod relist;
mod service;
mod slice;
pub mod verdict;
mod wds;

#[cfg(test)]
pub(crate) mod tests;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_core::proto::security::Authorization;
use mesh_core::proto::workload as proto;

use event::{Event, Kind, Object, ObjectName};
use relist::Relist;

/// Who and where this agent is, as far as the model depends on it.
#[derive(Clone, Debug)]
pub struct Config {
    /// First part of every workload's uid.
    pub cluster_id: String,
    /// Trust domain of the workloads.
    pub trust_domain: String,
    /// Suffix of the services' host names.
    pub cluster_domain: String,
    /// The node whose pods are local.
    pub node_name: String,
    /// Namespace of the mesh itself.
    pub system_namespace: String,
    /// Namespace whose policies are about all of the mesh.
    pub root_namespace: String,
    /// Whether pods' DNS queries are captured where the pod does not say.
    pub dns_capture: bool,
    /// Further namespaces whose pods are never enrolled.
    pub excluded_namespaces: HashSet<String>,
}

/// Names one resource that the proxies may be told of.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    /// The workload of a pod.
    Pod(ObjectName),
    /// The workload of an EndpointSlice's endpoint that is no pod, for example the API server's.
    Endpoint(ObjectName, IpAddr),
    /// A service.
    Service(ObjectName),
    /// The service of a host that ServiceEntries of a namespace name.
    Host(ObjectName),
    /// The workload of an endpoint that a ServiceEntry lists, by its address or host name.
    Listed(ObjectName, Arc<str>),
    /// The workload of a WorkloadEntry.
    WorkloadEntry(ObjectName),
}

/// Names one L4 policy that the proxies may be told of.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PolicyKey {
    /// Nothing but mutual TLS, for the workloads that name it.
    Strict,
    /// What a PeerAuthentication says of single ports.
    Ports(ObjectName),
    /// An AuthorizationPolicy.
    Authorization(ObjectName),
}

/// What is wrong with an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Its kind.
    pub kind: Kind,
    /// Its name.
    pub name: ObjectName,
    /// The object is not used as it is now, and what was known of it before stays. Else the reason says what becomes of
    /// the part that is wrong.
    pub skipped: bool,
    /// What is wrong with it.
    pub reason: String,
}

/// What an event did to the model.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Resources to build anew; some may turn out as they were.
    pub keys: BTreeSet<Key>,
    /// The same for policies.
    pub policies: BTreeSet<PolicyKey>,
    /// Something changed that decides which of this node's pods are in the mesh, or what may reach them.
    pub local: bool,
    /// The status of a policy is to be written.
    pub verdicts: bool,
    /// What is wrong with objects.
    pub problems: Vec<Problem>,
}

/// The model.
#[derive(Debug)]
pub struct Index {
    config: Config,
    relist: Relist,
    namespaces: HashMap<Arc<str>, namespace::Namespace>,
    nodes: HashMap<Arc<str>, node::Node>,
    pods: HashMap<ObjectName, pod::Pod>,
    pods_of_node: HashMap<Arc<str>, BTreeSet<ObjectName>>,
    pods_of_namespace: HashMap<Arc<str>, BTreeSet<ObjectName>>,
    labels: HashSet<Arc<pod::Labels>>,
    services: HashMap<ObjectName, service::Service>,
    slices: slice::Slices,
    network: network::Network,
    peer_authentications: peer_authentication::PeerAuthentications,
    authorization_policies: authorization_policy::AuthorizationPolicies,
    entries: entry::Entries,
    /// Of objects whose status says what became of them.
    readings: HashMap<(Kind, ObjectName), verdict::Reading>,
}

impl Index {
    /// An empty model.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            relist: Relist::default(),
            namespaces: HashMap::new(),
            nodes: HashMap::new(),
            pods: HashMap::new(),
            pods_of_node: HashMap::new(),
            pods_of_namespace: HashMap::new(),
            labels: HashSet::new(),
            services: HashMap::new(),
            slices: slice::Slices::default(),
            network: network::Network::default(),
            peer_authentications: Default::default(),
            authorization_policies: Default::default(),
            entries: entry::Entries::default(),
            readings: HashMap::new(),
        }
    }

    /// Takes one event in.
    pub fn handle(&mut self, event: Event) -> Changes {
        let mut changes = Changes::default();
        match event {
            Event::Restarted(kind) => self.relist.start(kind),
            Event::Applied(object) => {
                self.apply(&object, &mut changes);
                self.tell_crowded(&mut changes);
            }
            Event::Deleted(kind, name) => self.delete(kind, &name, &mut changes),
            Event::Unreadable { kind, name, reason } => {
                self.relist.saw(kind, &name);
                let consequence = match kind {
                    Kind::AuthorizationPolicy => self.unreadable_authorization_policy(&name, &mut changes),
                    Kind::PeerAuthentication => self.unreadable_peer_authentication(&name, &mut changes),
                    _ => None,
                };
                if kind == Kind::NetworkPolicy {
                    self.unreadable_network_policy(&name, &mut changes);
                }
                let skipped = consequence.is_none();
                let reason =
                    consequence.map_or(reason.clone(), |consequence| format!("{reason}: {consequence}"));
                changes.problems.push(Problem { kind, name, skipped, reason });
            }
            Event::ApiGroups(groups) => self.api_groups(&groups, &mut changes),
            Event::Listed(kind) => {
                if kind == Kind::NetworkPolicy {
                    self.network_policies_listed(&mut changes);
                }
                if kind == Kind::PeerAuthentication {
                    changes.policies.insert(PolicyKey::Strict);
                }
                let Some(seen) = self.relist.finish(kind) else { return changes };
                for name in self.names(kind).into_iter().filter(|name| !seen.contains(name)) {
                    self.delete(kind, &name, &mut changes);
                }
            }
        }
        changes
    }

    /// Whether every kind was listed once: before that, an absent object says nothing.
    pub fn is_synced(&self) -> bool {
        self.relist.is_complete()
    }

    /// The name of a resource in xDS.
    pub fn resource_name(&self, key: &Key) -> String {
        match key {
            Key::Pod(name) => wds::pod_uid(&self.config, name),
            Key::Endpoint(slice, address) => wds::endpoint_uid(&self.config, slice, *address),
            Key::Service(name) => wds::service_key(&self.config, name),
            Key::Host(host) => entry::host_name(host, &host.name),
            Key::Listed(name, place) => entry::listed_uid(&self.config, name, place),
            Key::WorkloadEntry(name) => entry::workload_entry_uid(&self.config, name),
        }
    }

    /// The resource as the proxies see it now; none when there is no such thing (any more).
    pub fn resource(&self, key: &Key) -> Option<proto::Address> {
        use proto::address::Type;
        let resource = match key {
            Key::Pod(name) => Type::Workload(self.pod_workload(name)?),
            Key::Endpoint(slice, address) => Type::Workload(self.endpoint_workload(slice, *address)?),
            Key::Service(name) => Type::Service(self.service(name)?),
            Key::Host(host) => Type::Service(self.host_service(host)?),
            Key::Listed(name, place) => Type::Workload(self.listed_workload(name, place)?),
            Key::WorkloadEntry(name) => Type::Workload(self.workload_entry(name)?),
        };
        Some(proto::Address { r#type: Some(resource) })
    }

    /// A policy's name in xDS.
    pub fn policy_name(&self, key: &PolicyKey) -> String {
        match key {
            PolicyKey::Strict => peer_authentication::strict_name(&self.config.root_namespace),
            PolicyKey::Ports(name) => peer_authentication::ports_name(name),
            PolicyKey::Authorization(name) => name.to_string(),
        }
    }

    /// What it says; none when there is no such thing (any more).
    pub fn policy(&self, key: &PolicyKey) -> Option<Arc<Authorization>> {
        match key {
            PolicyKey::Strict => Some(Arc::new(peer_authentication::strict(&self.config.root_namespace))),
            PolicyKey::Ports(name) => self.peer_authentications.ports(&self.config, name).map(Arc::new),
            PolicyKey::Authorization(name) => self.authorization_policies.resource(name),
        }
    }

    fn apply(&mut self, object: &Object, changes: &mut Changes) {
        let (kind, name) = (object.kind(), object.name());
        self.relist.saw(kind, &name);
        let applied = match object {
            Object::Namespace(object) => {
                self.apply_namespace(&name, object, changes);
                Ok(())
            }
            Object::Node(object) => {
                self.apply_node(&name, object, changes);
                Ok(())
            }
            Object::Pod(object) => self.apply_pod(&name, object, changes),
            Object::Service(object) => self.apply_service(&name, object, changes),
            Object::EndpointSlice(object) => self.apply_slice(&name, object, changes),
            Object::NetworkPolicy(object) => {
                self.apply_network_policy(&name, object, changes);
                Ok(())
            }
            Object::PeerAuthentication(object) => {
                self.apply_peer_authentication(&name, object, changes);
                Ok(())
            }
            Object::AuthorizationPolicy(object) => {
                self.apply_authorization_policy(&name, object, changes);
                Ok(())
            }
            Object::ServiceEntry(object) => {
                self.apply_service_entry(&name, object, changes);
                Ok(())
            }
            Object::WorkloadEntry(object) => {
                self.apply_workload_entry(&name, object, changes);
                Ok(())
            }
        };
        if let Err(invalid) = applied {
            changes.problems.push(Problem { kind, name, skipped: true, reason: invalid.to_string() });
        }
    }

    fn delete(&mut self, kind: Kind, name: &ObjectName, changes: &mut Changes) {
        match kind {
            Kind::Namespace => self.delete_namespace(name, changes),
            Kind::Node => self.delete_node(name, changes),
            Kind::Pod => self.delete_pod(name, changes),
            Kind::Service => self.delete_service(name, changes),
            Kind::EndpointSlice => self.delete_slice(name, changes),
            Kind::NetworkPolicy => self.delete_network_policy(name, changes),
            Kind::PeerAuthentication => self.delete_peer_authentication(name, changes),
            Kind::AuthorizationPolicy => self.delete_authorization_policy(name, changes),
            Kind::ServiceEntry => self.delete_service_entry(name, changes),
            Kind::WorkloadEntry => self.delete_workload_entry(name, changes),
        }
    }

    /// Every object of a kind: used at the end of a relist, which itself is as large as the answer.
    fn names(&self, kind: Kind) -> Vec<ObjectName> {
        match kind {
            Kind::Namespace => self.namespaces.keys().map(ObjectName::cluster_wide).collect(),
            Kind::Node => self.nodes.keys().map(ObjectName::cluster_wide).collect(),
            Kind::Pod => self.pods.keys().cloned().collect(),
            Kind::Service => self.services.keys().cloned().collect(),
            Kind::EndpointSlice => self.slices.names().cloned().collect(),
            Kind::NetworkPolicy => self.network.names(),
            Kind::PeerAuthentication => self.peer_authentications.names(),
            Kind::AuthorizationPolicy => self.authorization_policies.names(),
            Kind::ServiceEntry => self.entries.service_names(),
            Kind::WorkloadEntry => self.entries.workload_names(),
        }
    }
}

/// A value in an object that the model cannot use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// Not an IP address.
    #[error("{field} has {value:?}, which is not an IP address")]
    Address {
        /// Where in the object.
        field: &'static str,
        /// What is there.
        value: String,
    },
    /// Not a TCP port.
    #[error("{field} has {value}, which is not a port number from 1 to 65535")]
    Port {
        /// Where in the object.
        field: &'static str,
        /// What is there.
        value: i32,
    },
}

fn address(field: &'static str, value: &str) -> Result<IpAddr, Invalid> {
    value.parse().map_err(|_| Invalid::Address { field, value: value.to_owned() })
}

fn port(field: &'static str, value: i32) -> Result<u16, Invalid> {
    match u16::try_from(value) {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(Invalid::Port { field, value }),
    }
}
