//! The resources as they are now, encoded once for all clients, each with a version.
//!
//! A version is a digest of the resource's bytes, so it means the same to an agent that was restarted: a proxy that
//! reconnects is sent only what differs. **Invariant:** one writer; a name is in the snapshot or it does not exist.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hasher};
use std::sync::Arc;

use bytes::Bytes;
use mesh_core::proto::security::{Authorization, Scope};
use mesh_core::proto::workload::{Address, address};
use mesh_core::proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use prost::Message;

/// Types of resource that are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Type {
    /// Workloads and services.
    Address,
    /// L4 policies.
    Authorization,
}

impl Type {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Address, Self::Authorization];

    /// Its type URL.
    pub fn url(self) -> &'static str {
        match self {
            Self::Address => ADDRESS_TYPE,
            Self::Authorization => AUTHORIZATION_TYPE,
        }
    }

    /// The type with this URL.
    pub fn of(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|r#type| r#type.url() == url)
    }
}

/// Digest of a resource's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version(u64);

impl Version {
    fn of(bytes: &[u8]) -> Self {
        let mut hasher = DefaultHasher::new();
        hasher.write(bytes);
        Self(hasher.finish())
    }

    /// As it travels.
    pub fn text(self) -> String {
        format!("{:016x}", self.0)
    }

    /// Back from the client; none when it is not one of ours.
    pub fn parse(text: &str) -> Option<Self> {
        u64::from_str_radix(text, 16).ok().map(Self)
    }
}

/// One resource.
#[derive(Clone, Debug)]
pub struct Resource {
    /// Its version.
    pub version: Version,
    /// The encoded message, shared with every client that is sent it.
    pub bytes: Bytes,
    /// See [`Served::is_named`].
    pub named: bool,
    /// See [`Served::namespace`].
    pub namespace: Name,
}

/// What can be served.
pub trait Served: Message {
    /// Whose it is.
    fn namespace(&self) -> &str;

    /// It is about those resources alone that name it.
    fn is_named(&self) -> bool {
        false
    }
}

impl Served for Address {
    fn namespace(&self) -> &str {
        match &self.r#type {
            Some(address::Type::Workload(workload)) => &workload.namespace,
            Some(address::Type::Service(service)) => &service.namespace,
            None => "",
        }
    }
}

impl Served for Authorization {
    fn namespace(&self) -> &str {
        &self.namespace
    }

    fn is_named(&self) -> bool {
        self.scope() == Scope::WorkloadSelector
    }
}

/// Name of a resource; shared, since every session remembers it.
pub type Name = Arc<str>;

/// All resources.
#[derive(Debug, Default)]
pub struct Snapshot {
    addresses: HashMap<Name, Resource>,
    authorizations: HashMap<Name, Resource>,
    /// Each once, however many resources it has.
    namespaces: HashSet<Name>,
}

impl Snapshot {
    /// Sets or removes a resource; the name comes back when that made a difference.
    pub fn put(&mut self, r#type: Type, name: &str, resource: Option<&impl Served>) -> Option<Name> {
        let Some(message) = resource else {
            return self.resources_mut(r#type).remove_entry(name).map(|(name, _)| name);
        };
        let bytes = Bytes::from(message.encode_to_vec());
        let namespace = self.namespace(message.namespace());
        let resource = Resource { version: Version::of(&bytes), bytes, named: message.is_named(), namespace };
        let resources = self.resources_mut(r#type);
        let name = match resources.get_key_value(name) {
            Some((_, known)) if known.version == resource.version => return None,
            Some((known, _)) => Name::clone(known),
            None => Name::from(name),
        };
        resources.insert(Name::clone(&name), resource);
        Some(name)
    }

    /// The resource of that name.
    pub fn find(&self, r#type: Type, name: &str) -> Option<&Resource> {
        self.resources(r#type).get(name)
    }

    /// The same with its name.
    pub fn find_entry(&self, r#type: Type, name: &str) -> Option<(&Name, &Resource)> {
        self.resources(r#type).get_key_value(name)
    }

    /// All resources of a type by name.
    pub fn all(&self, r#type: Type) -> impl Iterator<Item = (&Name, &Resource)> {
        self.resources(r#type).iter()
    }

    /// How many there are of a type.
    pub fn count(&self, r#type: Type) -> usize {
        self.resources(r#type).len()
    }

    fn namespace(&mut self, name: &str) -> Name {
        if let Some(known) = self.namespaces.get(name) {
            return Name::clone(known);
        }
        let name = Name::from(name);
        self.namespaces.insert(Name::clone(&name));
        name
    }

    fn resources(&self, r#type: Type) -> &HashMap<Name, Resource> {
        match r#type {
            Type::Address => &self.addresses,
            Type::Authorization => &self.authorizations,
        }
    }

    fn resources_mut(&mut self, r#type: Type) -> &mut HashMap<Name, Resource> {
        match r#type {
            Type::Address => &mut self.addresses,
            Type::Authorization => &mut self.authorizations,
        }
    }
}
