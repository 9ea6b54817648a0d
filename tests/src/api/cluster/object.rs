//! What a write makes of an object: its metadata, the parts that may change, and what the write was based on. Pure.
//! Reference: `k8s.io/apiserver/pkg/registry/rest/{create,update}.go`.

use serde_json::Value;

use super::super::kinds::Kind;
use super::super::meta;
use super::super::status::Status;

/// What the server decides about a new object's metadata.
pub(super) fn set_metadata(kind: &Kind, namespace: &str, object: &mut Value) -> Result<(), Status> {
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
pub(super) fn check_preconditions(
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
    if based_on.is_empty() && kind.versioned() {
        let fault = (
            "metadata.resourceVersion".to_owned(),
            "Invalid value: 0: must be specified for an update".to_owned(),
        );
        return Err(Status::invalid(&kind.kind, &kind.group, name, &[fault]));
    }
    if !based_on.is_empty() && based_on != meta::text(old, "/metadata/resourceVersion") {
        return conflict(
            "the object has been modified; please apply your changes to the latest version and try again",
        );
    }
    Ok(())
}

/// The new object with what only the server may change taken from the old one.
pub(super) fn whole(kind: &Kind, old: &Value, mut new: Value) -> Value {
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
pub(super) fn status(kind: &Kind, old: &Value, mut object: Value) -> Value {
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
pub(super) fn generation_changes(kind: &Kind, old: &Value, new: &Value) -> bool {
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
