//! What a client may be told: of all resources, those that are its business.

use super::snapshot::{Name, Resource, Snapshot, Type};

/// Which resources a client may be told of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Scope {
    /// All of them, as this node's ztunnel.
    #[default]
    Everything,
    /// The workloads, services and policies of one namespace, and the policies of the root namespace, which may be about
    /// its workloads, too.
    Namespace {
        /// The client's own.
        own: Name,
        /// Whose policies are about all of the mesh.
        root: Name,
    },
}

impl Scope {
    /// Whether a resource is within.
    pub fn sees(&self, r#type: Type, resource: &Resource) -> bool {
        match self {
            Self::Everything => true,
            Self::Namespace { own, root } => {
                resource.namespace == *own || r#type == Type::Authorization && resource.namespace == *root
            }
        }
    }
}

/// The resources as a client sees them.
#[derive(Clone, Copy, Debug)]
pub(super) struct View<'a> {
    pub(super) snapshot: &'a Snapshot,
    pub(super) scope: &'a Scope,
}

impl<'a> View<'a> {
    /// The resource of that name, unless it is none of the client's business.
    pub(super) fn find(self, r#type: Type, name: &str) -> Option<&'a Resource> {
        self.snapshot.find(r#type, name).filter(|resource| self.scope.sees(r#type, resource))
    }

    /// A name that a resource has, shared with all that know it.
    pub(super) fn name(self, r#type: Type, name: &str) -> Option<&'a Name> {
        let (name, resource) = self.snapshot.find_entry(r#type, name)?;
        self.scope.sees(r#type, resource).then_some(name)
    }

    /// Names of all resources of a type.
    pub(super) fn names(self, r#type: Type) -> impl Iterator<Item = &'a Name> {
        let seen = move |resource: &Resource| self.scope.sees(r#type, resource);
        self.snapshot.all(r#type).filter(move |(_, resource)| seen(resource)).map(|(name, _)| name)
    }
}
