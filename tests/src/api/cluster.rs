//! The rules of create, replace, patch and delete that hold for every kind: names, versions, generations,
//! finalizers. What differs by kind is in `defaults`, `admission` and `validate`; what follows from a deletion
//! is in `cascade`.
//! **Invariant:** an object is stored only after it was defaulted and validated, and never without name and uid.

mod object;

use std::sync::Arc;

use serde_json::{Value, json};

use super::kinds::{Kind, Kinds};
use super::managed::Writer;
use super::patch::{Patch, PatchKind};
use super::status::Status;
use super::store::Store;
use super::{bootstrap, convert, defaults, meta, schema, validate};
use crate::stack::Stack;
use object::{check_preconditions, generation_changes, set_metadata, status, whole};

/// The state of the cluster.
pub(super) struct Cluster {
    pub(super) store: Store,
    pub(super) kinds: Kinds,
    /// Where the search for a free service address goes on, as offset in the ranges.
    pub(super) next_service: u16,
    /// The families of its Services.
    pub(super) stack: Stack,
    /// The CA that pods get to verify the API server, in PEM.
    pub(super) ca_pem: String,
}

/// Which part of an object a write may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// All but the status, where status is a subresource.
    Whole,
    /// Only the status.
    Status,
    /// The number of replicas, by way of the subresource `scale`.
    Scale,
}

impl Part {
    /// The subresource by which it is written; empty for the object itself.
    pub(super) fn subresource(self) -> &'static str {
        match self {
            Self::Whole => "",
            Self::Status => "status",
            Self::Scale => "scale",
        }
    }
}

/// How to write.
#[derive(Clone, Debug, Default)]
pub(super) struct Write {
    /// Check and answer, but store nothing.
    pub(super) dry_run: bool,
    /// Refuse fields the kind does not have.
    pub(super) strict: bool,
    /// Who writes, for `metadata.managedFields`.
    pub(super) manager: String,
    /// Server-side apply may take fields of other managers.
    pub(super) force: bool,
    /// The object comes from server-side apply, so its managers are those it says.
    pub(super) applied: bool,
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
    /// Go only after the dependents that block it.
    pub(super) foreground: bool,
    /// Check and answer, but delete nothing.
    pub(super) dry_run: bool,
}

impl Cluster {
    /// An empty cluster with the objects every cluster has.
    pub(super) fn new(ca_pem: String, stack: Stack) -> Result<Self, Status> {
        let mut cluster = Self { store: Store::new(), kinds: Kinds::new(), next_service: 256, stack, ca_pem };
        for object in bootstrap::objects(stack) {
            let kind = cluster.kinds.of_object(&object).ok_or_else(Status::unknown_path)?;
            let namespace = meta::namespace(&object).to_owned();
            cluster.create(&kind, &namespace, object, Write::default())?;
        }
        Ok(cluster)
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
        check_type(kind, &mut object)?;
        schema::check(kind, &mut object, write.strict)?;
        let said = meta::metadata(&mut object).remove("managedFields");
        set_metadata(kind, namespace, &mut object)?;
        let keeps_status = kind.kind == "Node" && kind.custom.is_none();
        if kind.status && !keeps_status {
            meta::map(&mut object).remove("status");
        }
        defaults::apply(kind, &mut object);
        let managed = managed_fields(kind, Part::Whole, &write, (&Value::Null, &object), said);
        set_managed_fields(&mut object, managed);
        defaults::on_create(kind, &mut object);
        self.check_namespace(kind, &object)?;
        self.check_definition(kind)?;
        self.admit(kind, &mut object)?;
        validate::check(kind, &object, None)?;
        let name = meta::name(&object);
        if self.store.get(&kind.resource(), namespace, name).is_some() {
            return Err(Status::already_exists(&kind.plural, &kind.group, name));
        }
        convert::to_storage(kind, &mut object);
        if write.dry_run {
            return Ok(Arc::new(object));
        }
        let stored = self.store.put(&kind.resource(), object);
        self.created(kind, &stored);
        Ok(stored)
    }

    /// Replaces the part `part` of an object.
    pub(super) fn replace(
        &mut self,
        kind: &Kind,
        place: (&str, &str),
        part: Part,
        mut object: Value,
        write: Write,
    ) -> Result<Arc<Value>, Status> {
        let old = self.get(kind, place.0, place.1)?;
        check_type(kind, &mut object)?;
        schema::check(kind, &mut object, write.strict)?;
        check_preconditions(kind, place, &old, &object)?;
        let said = meta::metadata(&mut object).remove("managedFields");
        let mut new = match part {
            Part::Whole | Part::Scale => whole(kind, &old, object),
            Part::Status => status(kind, &old, object),
        };
        defaults::apply(kind, &mut new);
        // What the server adds is nobody's.
        let managed = managed_fields(kind, part, &write, (&old, &new), said);
        set_managed_fields(&mut new, managed);
        if part != Part::Status {
            self.admit_change(kind, &old, &mut new)?;
        }
        validate::check(kind, &new, Some(&old))?;
        if kind.generation && generation_changes(kind, &old, &new) {
            let generation = old["metadata"]["generation"].as_u64().unwrap_or(0);
            new["metadata"]["generation"] = (generation + 1).into();
        }
        convert::to_storage(kind, &mut new);
        if *old == new {
            return Ok(old);
        }
        if write.dry_run {
            return Ok(Arc::new(new));
        }
        let stored = self.store.put(&kind.resource(), new);
        self.replaced(kind, &stored);
        Ok(stored)
    }

    /// Applies a patch; only server-side apply creates what is not there.
    pub(super) fn patch(
        &mut self,
        kind: &Kind,
        place: (&str, &str),
        part: Part,
        patch: &Patch,
        mut write: Write,
    ) -> Result<Arc<Value>, Status> {
        let old = self.get(kind, place.0, place.1);
        if patch.kind == PatchKind::Apply {
            write.applied = true;
            let writer = Writer { kind, name: &write.manager, part, force: write.force };
            let live = match old {
                Err(missing) if missing.is_not_found() && part == Part::Whole => None,
                found => Some(convert::serve(kind, &*found?)),
            };
            let mut config = patch.body.clone();
            check_type(kind, &mut config)?;
            schema::check(kind, &mut config, write.strict)?;
            let mut new = writer.apply(live.as_ref(), &config)?;
            meta::default(&mut new["metadata"], "name", place.1);
            return match live {
                Some(_) => self.replace(kind, place, part, new, write),
                None => self.create(kind, place.0, new, write),
            };
        }
        let old = old?;
        let new = patch.apply(&convert::serve(kind, &old), kind.custom.is_some())?;
        self.replace(kind, place, part, new, write)
    }
}

/// `metadata.managedFields` after a write from the first object to the second, which said this of it itself.
fn managed_fields(
    kind: &Kind,
    part: Part,
    write: &Write,
    (old, new): (&Value, &Value),
    said: Option<Value>,
) -> Value {
    if write.applied {
        return said.unwrap_or(Value::Null);
    }
    let name = if write.manager.is_empty() { "unknown" } else { &write.manager };
    let writer = Writer { kind, name, part, force: false };
    let old = if old.is_null() { Value::Null } else { convert::serve(kind, old) };
    writer.update(&old, new, said.as_ref())
}

fn set_managed_fields(object: &mut Value, managed: Value) {
    let metadata = meta::metadata(object);
    match managed.as_array() {
        Some(entries) if !entries.is_empty() => drop(metadata.insert("managedFields".to_owned(), managed)),
        _ => drop(metadata.remove("managedFields")),
    }
}

/// The object's type is the path's; what it leaves out is filled in.
fn check_type(kind: &Kind, object: &mut Value) -> Result<(), Status> {
    if !object.is_object() {
        return Err(Status::bad_request("the body is no JSON object"));
    }
    meta::default(object, "apiVersion", kind.api_version());
    meta::default(object, "kind", kind.kind.clone());
    let (version, name) = (meta::text(object, "/apiVersion"), meta::text(object, "/kind"));
    if version != kind.api_version() {
        return Err(Status::bad_request(format!(
            "the API version in the data ({version}) does not match the expected API version ({})",
            kind.api_version()
        )));
    }
    if name != kind.kind {
        return Err(Status::bad_request(format!(
            "the kind in the data ({name}) does not match the expected kind ({})",
            kind.kind
        )));
    }
    Ok(())
}

/// A `Status` that tells success, as for a deletion.
pub(super) fn success(kind: &Kind, object: &Value) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
        "details": {
            "name": meta::name(object), "group": kind.group, "kind": kind.plural, "uid": meta::uid(object),
        },
    })
}
