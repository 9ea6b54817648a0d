//! Namespaces: whether their pods ask for the mesh.

use k8s_openapi::api::core::v1 as api;

use super::event::ObjectName;
use super::membership::Mode;
use super::{Changes, Index};

/// What the model keeps of a Namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Namespace {
    /// What it asks for its pods.
    pub(super) mode: Option<Mode>,
}

impl Namespace {
    pub(super) fn read(object: &api::Namespace) -> Self {
        Self { mode: Mode::of(object.metadata.labels.as_ref()) }
    }
}

impl Index {
    pub(super) fn apply_namespace(
        &mut self,
        name: &ObjectName,
        object: &api::Namespace,
        changes: &mut Changes,
    ) {
        let namespace = Namespace::read(object);
        if self.namespaces.get(&name.name) != Some(&namespace) {
            self.namespaces.insert(name.name.clone(), namespace);
            changes.local = true;
        }
    }

    pub(super) fn delete_namespace(&mut self, name: &ObjectName, changes: &mut Changes) {
        changes.local |= self.namespaces.remove(&name.name).is_some();
    }
}
