//! The schemas of the built-in kinds, as k8s-openapi has them.

use std::sync::LazyLock;

use k8s_openapi::schemars::generate::SchemaSettings;
use k8s_openapi::schemars::{JsonSchema, SchemaGenerator};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};

use super::super::kinds::{Kind, Kinds};
use super::super::types::{self, Visit};

/// Where a document has its schemas.
const PLACE: &str = "#/components/schemas/";

/// All schemas by their names, such as `io.k8s.api.core.v1.Pod`.
static SCHEMAS: LazyLock<Map<String, Value>> = LazyLock::new(|| {
    let mut generator = SchemaSettings::openapi3().into_generator();
    for kind in Kinds::new().all() {
        types::of(kind, Add(&mut generator));
    }
    let mut schemas = generator.take_definitions(true);
    for schema in schemas.values_mut() {
        wrap_references(schema);
    }
    schemas
});

struct Add<'a>(&'a mut SchemaGenerator);

impl Visit for Add<'_> {
    type Output = ();
    fn visit<T: DeserializeOwned + Serialize + JsonSchema>(self) {
        self.0.subschema_for::<T>();
    }
}

struct Name;

impl Visit for Name {
    type Output = String;
    fn visit<T: DeserializeOwned + Serialize + JsonSchema>(self) -> String {
        T::schema_name().into_owned()
    }
}

/// Adds the schema of a built-in kind, and all that it refers to.
pub(super) fn add(kind: &Kind, version_kind: &Value, schemas: &mut Map<String, Value>) {
    let Some(name) = types::of(kind, Name) else { return };
    add_named(&name, schemas);
    if let Some(schema) = schemas.get_mut(&name) {
        schema["x-kubernetes-group-version-kind"] = json!([version_kind]);
    }
}

/// Adds a schema by its name, and all that it refers to.
pub(super) fn add_named(name: &str, schemas: &mut Map<String, Value>) {
    let Some(schema) = SCHEMAS.get(name).filter(|_| !schemas.contains_key(name)) else { return };
    schemas.insert(name.to_owned(), schema.clone());
    for name in references(schema) {
        add_named(name, schemas);
    }
}

fn references(schema: &Value) -> Vec<&str> {
    match schema {
        Value::Object(fields) => {
            let own = fields.get("$ref").and_then(Value::as_str).and_then(|place| place.strip_prefix(PLACE));
            own.into_iter().chain(fields.values().flat_map(references)).collect()
        }
        Value::Array(items) => items.iter().flat_map(references).collect(),
        _ => Vec::new(),
    }
}

/// OpenAPI 3.0 ignores what stands beside `$ref`, such as a description; so a reference with company goes into `allOf`.
fn wrap_references(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            // A property may be named so as well.
            let refers = fields.get("$ref").is_some_and(Value::is_string);
            if refers
                && fields.len() > 1
                && let Some(place) = fields.remove("$ref")
            {
                fields.insert("allOf".to_owned(), json!([{"$ref": place}]));
            }
            fields.values_mut().for_each(wrap_references);
        }
        Value::Array(items) => items.iter_mut().for_each(wrap_references),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use super::add;
    use crate::api::kinds::Kinds;

    #[test]
    fn every_kind_has_a_schema_and_no_reference_leads_nowhere() {
        for kind in Kinds::new().all() {
            let mut schemas = Map::new();
            add(kind, &json!({"kind": kind.kind}), &mut schemas);
            let own: Vec<_> = schemas
                .values()
                .filter(|schema| !schema["x-kubernetes-group-version-kind"].is_null())
                .collect();
            assert_eq!(own.len(), 1, "{}", kind.kind);
            let named = schemas.values().flat_map(super::references).collect::<Vec<_>>();
            assert!(named.iter().all(|name| schemas.contains_key(*name)), "{}", kind.kind);
        }
    }
}
