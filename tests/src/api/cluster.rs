//! The rules of create, replace, patch and delete that hold for every kind: names, versions, generations,
//! finalizers. What differs by kind is in `defaults`, `admission` and `validate`; what follows from a deletion
//! is in `cascade`.
//! **Invariant:** an object is stored only after it was defaulted and validated, and never without name and uid.

use std::sync::Arc;

use serde_json::{Value, json};

use super::kinds::{Kind, Kinds};
use super::managed::Writer;
use super::patch::{Patch, PatchKind};
use super::status::Status;
use super::store::Store;
use super::{bootstrap, convert, defaults, meta, schema, validate};
use crate::stack::Stack;

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
        if kind.status && kind.kind != "Node" {
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
            Part::Whole => whole(kind, &old, object),
            Part::Status => status(kind, &old, object),
        };
        defaults::apply(kind, &mut new);
        // What the server adds is nobody's.
        let managed = managed_fields(kind, part, &write, (&old, &new), said);
        set_managed_fields(&mut new, managed);
        if part == Part::Whole {
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
            meta::metadata(&mut new).insert("name".into(), place.1.into());
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

/// What the server decides about a new object's metadata.
fn set_metadata(kind: &Kind, namespace: &str, object: &mut Value) -> Result<(), Status> {
    let metadata = meta::metadata(object);
    let field = |name: &str| metadata.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    if !field("resourceVersion").is_empty() {
        return Err(Status::bad_request("resourceVersion should not be set on objects to be created"));
    }
    let said = field("namespace");
    if kind.namespaced && !said.is_empty() && said != namespace {
        return Err(Status::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    if field("name").is_empty() && !field("generateName").is_empty() {
        let name = format!("{}{}", field("generateName"), meta::random_suffix(5));
        metadata.insert("name".into(), name.into());
    }
    for dropped in ["resourceVersion", "selfLink", "deletionTimestamp", "namespace"] {
        metadata.remove(dropped);
    }
    metadata.remove("deletionGracePeriodSeconds");
    metadata.remove("generation");
    if kind.namespaced {
        metadata.insert("namespace".into(), namespace.into());
    }
    if kind.generation {
        metadata.insert("generation".into(), 1.into());
    }
    metadata.insert("uid".into(), meta::new_uid().into());
    metadata.insert("creationTimestamp".into(), meta::now().into());
    Ok(())
}

/// The new object names the one in the path and is based on the version stored now.
fn check_preconditions(
    kind: &Kind,
    (namespace, name): (&str, &str),
    old: &Value,
    new: &Value,
) -> Result<(), Status> {
    let said = meta::name(new);
    if !said.is_empty() && said != name {
        return Err(Status::bad_request(format!(
            "the name of the object ({said}) does not match the name on the URL ({name})"
        )));
    }
    let said = meta::namespace(new);
    if kind.namespaced && !said.is_empty() && said != namespace {
        return Err(Status::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    let conflict = |why: &str| Err(Status::conflict(&kind.plural, &kind.group, name, why));
    if !meta::uid(new).is_empty() && meta::uid(new) != meta::uid(old) {
        return conflict(&format!(
            "Precondition failed: UID in precondition: {}, UID in object meta: {}",
            meta::uid(new),
            meta::uid(old)
        ));
    }
    let based_on = meta::text(new, "/metadata/resourceVersion");
    if !based_on.is_empty() && based_on != meta::text(old, "/metadata/resourceVersion") {
        return conflict(
            "the object has been modified; please apply your changes to the latest version and try again",
        );
    }
    Ok(())
}

/// The new object with what only the server may change taken from the old one.
fn whole(kind: &Kind, old: &Value, mut new: Value) -> Value {
    const SERVERS: &[&str] = &[
        "name",
        "namespace",
        "uid",
        "resourceVersion",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
        "generateName",
    ];
    let metadata = meta::metadata(&mut new);
    for field in SERVERS {
        match old["metadata"].get(*field) {
            Some(value) => metadata.insert((*field).to_owned(), value.clone()),
            None => metadata.remove(*field),
        };
    }
    if kind.kind == "Service" && meta::text(&new, "/spec/clusterIP").is_empty() && new["spec"].is_object() {
        for field in ["clusterIP", "clusterIPs"] {
            new["spec"][field] = old["spec"][field].clone();
        }
    }
    if kind.status {
        match old.get("status") {
            Some(status) => new["status"] = status.clone(),
            None => drop(meta::map(&mut new).remove("status")),
        }
    }
    new
}

/// The old object with the new one's status. In the core group the labels and annotations are the new ones as well, as
/// in the strategies of the real server (`podStatusStrategy.PrepareForUpdate` and its like reset the spec alone).
fn status(kind: &Kind, old: &Value, mut object: Value) -> Value {
    let mut new = old.clone();
    match object.get_mut("status") {
        Some(status) => new["status"] = status.take(),
        None => drop(meta::map(&mut new).remove("status")),
    }
    if kind.group.is_empty() {
        let said = meta::metadata(&mut object);
        for field in ["labels", "annotations"] {
            match said.remove(field) {
                Some(value) => meta::metadata(&mut new).insert(field.to_owned(), value),
                None => meta::metadata(&mut new).remove(field),
            };
        }
    }
    new
}

/// Whether anything changed that counts as a new wish of the user.
fn generation_changes(kind: &Kind, old: &Value, new: &Value) -> bool {
    let wish = |object: &Value| {
        let mut wish = object.clone();
        let fields = meta::map(&mut wish);
        fields.remove("metadata");
        fields.remove("apiVersion");
        if kind.status {
            fields.remove("status");
        }
        wish
    };
    wish(old) != wish(new)
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
