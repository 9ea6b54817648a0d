//! EndpointSlices: which pods and which other addresses are behind a service, on which ports, and ready or not.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use k8s_openapi::api::discovery::v1 as api;

use super::event::ObjectName;
use super::{Changes, Index, Invalid, Key, address, port};

/// What the model keeps of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Slice {
    pub(super) service: ObjectName,
    /// Name of the service's port, and where these endpoints have it.
    pub(super) ports: Vec<(String, u16)>,
    pub(super) endpoints: Vec<Endpoint>,
}

/// One endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Endpoint {
    pub(super) target: Target,
    pub(super) ready: bool,
    /// Being ended, and serving still.
    pub(super) draining: bool,
    pub(super) node: String,
}

/// What an endpoint is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// A pod, of this UID where the slice says it: names are used again.
    Pod(ObjectName, Option<String>),
    /// Something that is not known to be a pod.
    Addresses(Vec<IpAddr>),
}

impl Slice {
    /// None for a slice of no service, or of host names.
    fn read(name: &ObjectName, object: &api::EndpointSlice) -> Result<Option<Self>, Invalid> {
        let labels = object.metadata.labels.as_ref();
        let Some(service) = labels.and_then(|labels| labels.get("kubernetes.io/service-name")) else {
            return Ok(None);
        };
        if object.address_type == "FQDN" {
            return Ok(None);
        }
        let tcp =
            |port: &&api::EndpointPort| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP");
        let ports = object.ports.iter().flatten().filter(tcp).filter_map(|object| {
            let name = object.name.clone().unwrap_or_default();
            Some(port("ports.port", object.port?).map(|number| (name, number)))
        });
        Ok(Some(Self {
            service: ObjectName::new(&name.namespace, service),
            ports: ports.collect::<Result<_, _>>()?,
            endpoints: object
                .endpoints
                .iter()
                .map(|endpoint| Endpoint::read(&name.namespace, endpoint))
                .collect::<Result<_, _>>()?,
        }))
    }

    fn keys<'a>(&'a self, name: &'a ObjectName) -> impl Iterator<Item = Key> + 'a {
        self.endpoints.iter().flat_map(|endpoint| endpoint.keys(name))
    }
}

impl Endpoint {
    fn read(namespace: &str, object: &api::Endpoint) -> Result<Self, Invalid> {
        // Of pods those of its own namespace alone: whoever writes slices makes no other's pod a part of a service. What
        // else is named is an address, which is a workload of the slice's own namespace, and found by it by nobody.
        let pod = object.target_ref.as_ref().filter(|target| {
            let own = target.namespace.as_deref().is_none_or(|of| of == namespace);
            own && target.kind.as_deref() == Some("Pod")
        });
        let target = match pod.and_then(|pod| pod.name.as_deref().map(|name| (pod, name))) {
            Some((pod, name)) => Target::Pod(ObjectName::new(namespace, name), pod.uid.clone()),
            None => Target::Addresses(
                object
                    .addresses
                    .iter()
                    .map(|ip| address("endpoints.addresses", ip))
                    .collect::<Result<_, _>>()?,
            ),
        };
        let conditions = object.conditions.clone().unwrap_or_default();
        // Absent means unknown: to be taken as ready, as serving if it is ready, and as not terminating (API reference of
        // EndpointConditions).
        let ready = conditions.ready.unwrap_or(true);
        let serving = conditions.serving.unwrap_or(ready);
        Ok(Self {
            target,
            ready,
            draining: !ready && serving && conditions.terminating.unwrap_or_default(),
            node: object.node_name.clone().unwrap_or_default(),
        })
    }

    fn is_on(&self, node: &str) -> bool {
        matches!(self.target, Target::Addresses(_)) && self.node == node
    }

    fn keys(&self, slice: &ObjectName) -> Vec<Key> {
        match &self.target {
            Target::Pod(pod, _) => vec![Key::Pod(pod.clone())],
            Target::Addresses(all) => all.iter().map(|ip| Key::Endpoint(slice.clone(), *ip)).collect(),
        }
    }
}

/// All slices, found by name, service, pod, or the node of an endpoint that is no pod.
#[derive(Debug, Default)]
pub(super) struct Slices {
    by_name: HashMap<ObjectName, Slice>,
    of_service: HashMap<ObjectName, BTreeSet<ObjectName>>,
    of_pod: HashMap<ObjectName, BTreeSet<ObjectName>>,
    of_node: HashMap<ObjectName, BTreeSet<ObjectName>>,
}

impl Slices {
    pub(super) fn names(&self) -> impl Iterator<Item = &ObjectName> {
        self.by_name.keys()
    }

    pub(super) fn find(&self, name: &ObjectName) -> Option<&Slice> {
        self.by_name.get(name)
    }

    /// The slices that name this pod.
    pub(super) fn of_pod(&self, pod: &ObjectName) -> impl Iterator<Item = &Slice> {
        self.of_pod.get(pod).into_iter().flatten().filter_map(|name| self.by_name.get(name))
    }

    /// The workloads behind this service.
    pub(super) fn endpoints_of_service(&self, service: &ObjectName) -> impl Iterator<Item = Key> {
        let names = self.of_service.get(service).into_iter().flatten();
        names
            .filter_map(|name| self.by_name.get(name).map(|slice| (name, slice)))
            .flat_map(|(name, slice)| slice.keys(name))
    }

    /// What is behind the services on this node and is no pod.
    pub(super) fn addresses_of_node(&self, node: &ObjectName) -> impl Iterator<Item = Key> {
        let names = self.of_node.get(node).into_iter().flatten();
        let slices = names.filter_map(|name| self.by_name.get(name).map(|slice| (name, slice)));
        slices.flat_map(|(name, slice)| {
            let here = slice.endpoints.iter().filter(|endpoint| endpoint.is_on(&node.name));
            here.flat_map(move |endpoint| endpoint.keys(name))
        })
    }

    fn insert(&mut self, name: &ObjectName, slice: Slice) -> Option<Slice> {
        let before = self.remove(name);
        self.of_service.entry(slice.service.clone()).or_default().insert(name.clone());
        for node in nodes(&slice) {
            self.of_node.entry(node).or_default().insert(name.clone());
        }
        for pod in pods(&slice) {
            self.of_pod.entry(pod.clone()).or_default().insert(name.clone());
        }
        self.by_name.insert(name.clone(), slice);
        before
    }

    fn remove(&mut self, name: &ObjectName) -> Option<Slice> {
        let slice = self.by_name.remove(name)?;
        unlink(&mut self.of_service, &slice.service, name);
        for node in nodes(&slice) {
            unlink(&mut self.of_node, &node, name);
        }
        for pod in pods(&slice) {
            unlink(&mut self.of_pod, pod, name);
        }
        Some(slice)
    }
}

fn pods(slice: &Slice) -> impl Iterator<Item = &ObjectName> {
    slice.endpoints.iter().filter_map(|endpoint| match &endpoint.target {
        Target::Pod(name, _) => Some(name),
        Target::Addresses(_) => None,
    })
}

/// The nodes of endpoints that are no pods: pods say themselves where they are.
fn nodes(slice: &Slice) -> BTreeSet<ObjectName> {
    let placed = slice.endpoints.iter().filter(|endpoint| !endpoint.node.is_empty());
    let addresses = placed.filter(|endpoint| endpoint.is_on(&endpoint.node));
    addresses.map(|endpoint| ObjectName::new("", &endpoint.node)).collect()
}

fn unlink(links: &mut HashMap<ObjectName, BTreeSet<ObjectName>>, from: &ObjectName, to: &ObjectName) {
    if let Some(names) = links.get_mut(from) {
        names.remove(to);
        if names.is_empty() {
            links.remove(from);
        }
    }
}

impl Index {
    pub(super) fn apply_slice(
        &mut self,
        name: &ObjectName,
        object: &api::EndpointSlice,
        changes: &mut Changes,
    ) -> Result<(), Invalid> {
        let Some(slice) = Slice::read(name, object)? else {
            self.delete_slice(name, changes);
            return Ok(());
        };
        let after = slice.clone();
        let before = self.slices.insert(name, slice);
        changes.keys.extend(difference(name, before.as_ref(), &after));
        Ok(())
    }

    pub(super) fn delete_slice(&mut self, name: &ObjectName, changes: &mut Changes) {
        if let Some(slice) = self.slices.remove(name) {
            changes.keys.extend(slice.keys(name));
        }
    }
}

/// The endpoints that two versions of a slice do not agree on: one pod that becomes ready touches one workload.
fn difference(name: &ObjectName, before: Option<&Slice>, after: &Slice) -> Vec<Key> {
    match before {
        Some(before) if before.ports == after.ports && before.service == after.service => {
            let old: HashMap<_, _> = by_key(name, before);
            let new: HashMap<_, _> = by_key(name, after);
            let changed =
                new.iter().filter(|(key, endpoint)| old.get(*key) != Some(*endpoint)).map(|(key, _)| key);
            let gone = old.keys().filter(|key| !new.contains_key(*key));
            changed.chain(gone).cloned().collect()
        }
        before => before.into_iter().flat_map(|before| before.keys(name)).chain(after.keys(name)).collect(),
    }
}

fn by_key<'a>(name: &ObjectName, slice: &'a Slice) -> HashMap<Key, &'a Endpoint> {
    slice
        .endpoints
        .iter()
        .flat_map(|endpoint| endpoint.keys(name).into_iter().map(move |key| (key, endpoint)))
        .collect()
}
