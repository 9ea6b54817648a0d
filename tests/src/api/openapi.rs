//! OpenAPI v3, one document per group and version: what `kubectl explain` reads, and the PATCH operations by which
//! `kubectl` sees that this server validates fields itself.

mod builtin;

use serde_json::{Map, Value, json};

use super::discovery::of_version;
use super::kinds::{Kind, Kinds};

const OBJECT_META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta";

/// Where each group's document is.
pub(super) fn index(kinds: &Kinds) -> Value {
    let mut paths = Map::new();
    for kind in kinds.all() {
        let start = if kind.group.is_empty() { "api" } else { "apis" };
        let path = format!("{start}/{}", kind.api_version());
        let url = format!("/openapi/v3/{path}");
        paths.insert(path, json!({"serverRelativeURL": url}));
    }
    json!({"paths": paths})
}

/// The document of one version of a group; none if it has no kinds.
pub(super) fn group(kinds: &Kinds, group: &str, version: &str) -> Option<Value> {
    let served = of_version(kinds, group, version);
    if served.is_empty() {
        return None;
    }
    let mut paths = Map::new();
    let mut schemas = Map::new();
    for kind in served {
        let start = if group.is_empty() { "/api" } else { "/apis" };
        let scope = if kind.namespaced { "/namespaces/{namespace}" } else { "" };
        let path = format!("{start}/{}{scope}/{}/{{name}}", kind.api_version(), kind.plural);
        if !kind.review {
            paths.insert(path, json!({"patch": patch(kind)}));
        }
        match &kind.custom {
            Some(custom) => {
                schemas.insert(schema_name(kind), custom_schema(kind, &custom.source));
                builtin::add_named(OBJECT_META, &mut schemas);
            }
            None => builtin::add(kind, &version_kind(kind), &mut schemas),
        }
    }
    let info = json!({"title": "Kubernetes", "version": "v1.33.0"});
    Some(json!({"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": schemas}}))
}

/// The parameter `fieldValidation` tells `kubectl` to leave validation to us.
fn patch(kind: &Kind) -> Value {
    let parameters: Vec<Value> = ["dryRun", "fieldManager", "fieldValidation"]
        .iter()
        .map(|name| json!({"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": true}}))
        .collect();
    json!({
        "operationId": format!("patch{}{}", if kind.namespaced { "Namespaced" } else { "" }, kind.kind),
        "parameters": parameters,
        "responses": {"200": {"description": "OK"}},
        "x-kubernetes-action": "patch",
        "x-kubernetes-group-version-kind": version_kind(kind),
    })
}

fn version_kind(kind: &Kind) -> Value {
    json!({"group": kind.group, "version": kind.version, "kind": kind.kind})
}

/// The name of a kind's schema, its group's domain reversed: `io.example.v1.Thing`.
fn schema_name(kind: &Kind) -> String {
    let domain: Vec<&str> = kind.group.rsplit('.').collect();
    format!("{}.{}.{}", domain.join("."), kind.version, kind.kind)
}

/// A definition's schema, with the fields that every object has.
fn custom_schema(kind: &Kind, source: &Value) -> Value {
    let mut schema = source.clone();
    let properties = &mut schema["properties"];
    for (name, about) in [
        ("apiVersion", "The versioned schema of this representation of an object."),
        ("kind", "The REST resource that this object represents."),
    ] {
        if properties[name].is_null() {
            properties[name] = json!({"type": "string", "description": about});
        }
    }
    let reference = format!("#/components/schemas/{OBJECT_META}");
    properties["metadata"] =
        json!({"allOf": [{"$ref": reference}], "description": "Standard object's metadata."});
    schema["x-kubernetes-group-version-kind"] = json!([version_kind(kind)]);
    schema
}
