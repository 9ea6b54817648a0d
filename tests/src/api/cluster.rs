//! The rules of create, replace, patch and delete that hold for every kind: names, versions, generations,
//! finalizers and graceful deletion. What differs by kind is in `defaults`, `admission` and `validate`.
//! **Invariant:** an object is stored only after it was defaulted and validated, and never without name and uid.

use std::sync::Arc;

use serde_json::{Value, json};

use super::json;
use super::kinds::Kind;
use super::kinds::Kinds;
use super::patch::Patch;
use super::status::Status;
use super::store::Store;

/// The state of the cluster.
pub(super) struct Cluster {
    pub(super) store: Store,
    pub(super) kinds: Kinds,
}

/// Which part of an object a write may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// All but the status, where status is a subresource.
    Whole,
    /// Only the status.
    Status,
}

/// How to write.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Write {
    /// Check and answer, but store nothing.
    pub(super) dry_run: bool,
    /// Refuse fields the kind does not have.
    pub(super) strict: bool,
}

/// `metav1.DeleteOptions`.
#[derive(Clone, Debug, Default)]
pub(super) struct Deletion {
    /// In seconds; none takes the object's own.
    pub(super) grace: Option<u64>,
    /// Only if the object has this uid.
    pub(super) uid: Option<String>,
    /// Only if the object is at this version.
    pub(super) version: Option<String>,
    /// Leave dependents alone and drop their owner reference.
    pub(super) orphan: bool,
    /// Check and answer, but delete nothing.
    pub(super) dry_run: bool,
}

impl Cluster {
    pub(super) fn new() -> Self {
        Self { store: Store::new(), kinds: Kinds::new() }
    }

    pub(super) fn get(&self, kind: &Kind, namespace: &str, name: &str) -> Result<Arc<Value>, Status> {
        self.store
            .get(&kind.resource(), namespace, name)
            .cloned()
            .ok_or_else(|| Status::not_found(&kind.plural, &kind.group, name))
    }

    pub(super) fn create(
        &mut self,
        kind: &Kind,
        namespace: &str,
        mut object: Value,
        write: Write,
    ) -> Result<Arc<Value>, Status> {
        json::map(&mut object["metadata"]).insert("uid".into(), json::new_uid().into());
        if kind.namespaced {
            object["metadata"]["namespace"] = json!(namespace);
        }
        if self.store.get(&kind.resource(), namespace, json::name(&object)).is_some() {
            return Err(Status::already_exists(&kind.plural, &kind.group, json::name(&object)));
        }
        if write.dry_run {
            return Ok(Arc::new(object));
        }
        Ok(self.store.put(&kind.resource(), object))
    }

    pub(super) fn replace(
        &mut self,
        kind: &Kind,
        (namespace, name): (&str, &str),
        part: Part,
        object: Value,
        _write: Write,
    ) -> Result<Arc<Value>, Status> {
        let old = self.get(kind, namespace, name)?;
        let mut new = object;
        if part == Part::Status {
            let status = new["status"].take();
            new = (*old).clone();
            new["status"] = status;
        }
        Ok(self.store.put(&kind.resource(), new))
    }

    pub(super) fn patch(
        &mut self,
        kind: &Kind,
        (namespace, name): (&str, &str),
        part: Part,
        patch: &Patch,
        write: Write,
    ) -> Result<Arc<Value>, Status> {
        let old = self.get(kind, namespace, name)?;
        let new = patch.apply(&old, kind.custom)?;
        self.replace(kind, (namespace, name), part, new, write)
    }

    pub(super) fn delete(
        &mut self,
        kind: &Kind,
        namespace: &str,
        name: &str,
        _deletion: &Deletion,
    ) -> Result<Arc<Value>, Status> {
        self.store
            .remove(&kind.resource(), namespace, name)
            .ok_or_else(|| Status::not_found(&kind.plural, &kind.group, name))
    }
}
