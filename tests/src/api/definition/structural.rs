//! Whether a schema is structural, and its defaults are values of it. Pure.
//! Reference: `k8s.io/apiextensions-apiserver/pkg/apiserver/schema/{validation,complete}.go`.

use serde_json::Value;

use super::super::structure::check::{Faults, faults};
use super::super::structure::{Additional, ListType, Schema, Type, prune};

/// The faults of `schema`, which is at `path` of the definition.
pub(super) fn check(schema: &Schema, path: &str) -> Faults {
    let mut found = Vec::new();
    if schema.kind.is_some_and(|kind| kind != Type::Object) {
        let kind = schema.kind.map_or("", Type::name);
        let why = format!("Invalid value: \"{kind}\": must be object at the root");
        found.push((format!("{path}.type"), why));
    }
    node(schema, path, "at the root", &mut found);
    found
}

/// A node that says what a value is made of.
fn node(schema: &Schema, path: &str, place: &str, found: &mut Faults) {
    let mut required =
        |field: &str, why: String| found.push((format!("{path}.{field}"), format!("Required value: {why}")));
    if schema.kind.is_none() && !schema.int_or_string && !schema.preserve_unknown {
        required("type", format!("must not be empty {place}"));
    }
    if schema.kind == Some(Type::Array) && schema.items.is_none() {
        required("items", "must be specified".to_owned());
    }
    if schema.list_type == ListType::Map && schema.list_map_keys.is_empty() {
        required(
            "x-kubernetes-list-map-keys",
            "must not be empty if x-kubernetes-list-type is map".to_owned(),
        );
    }
    if schema.embedded && schema.kind != Some(Type::Object) {
        required("type", "must be object if x-kubernetes-embedded-resource is true".to_owned());
    }
    forbidden(schema, path, found);
    keys(schema, path, found);
    default(schema, path, found);
    for (name, property) in &schema.properties {
        node(property, &format!("{path}.properties[{name}]"), "for specified object fields", found);
    }
    if let Some(Additional::Schema(additional)) = &schema.additional_properties {
        node(additional, &format!("{path}.additionalProperties"), "for specified object fields", found);
    }
    if let Some(items) = &schema.items {
        node(items, &format!("{path}.items"), "for specified array items", found);
    }
    for (field, schemas) in lists(schema) {
        for (index, junction) in schemas.iter().enumerate() {
            values(junction, schema, &format!("{path}.{field}[{index}]"), schema.int_or_string, found);
        }
    }
    if let Some(not) = &schema.not {
        values(not, schema, &format!("{path}.not"), false, found);
    }
}

fn lists(schema: &Schema) -> [(&'static str, &[Schema]); 3] {
    [("allOf", &schema.all_of), ("anyOf", &schema.any_of), ("oneOf", &schema.one_of)]
}

fn forbidden(schema: &Schema, path: &str, found: &mut Faults) {
    let mut forbid =
        |field: &str, why: &str| found.push((format!("{path}.{field}"), format!("Forbidden: {why}")));
    if !schema.properties.is_empty() && matches!(schema.additional_properties, Some(Additional::Schema(_))) {
        forbid("additionalProperties", "additionalProperties and properties are mutual exclusive");
    }
    if matches!(schema.additional_properties, Some(Additional::Any(false))) {
        forbid("additionalProperties", "must not be used");
    }
    if schema.int_or_string && schema.kind.is_some() {
        forbid("type", "must be empty if x-kubernetes-int-or-string is true");
    }
    if schema.list_type != ListType::Atomic && schema.kind != Some(Type::Array) {
        forbid("x-kubernetes-list-type", "must be array if x-kubernetes-list-type is specified");
    }
}

/// The keys of a list of type map are required of its items, or have a default.
fn keys(schema: &Schema, path: &str, found: &mut Faults) {
    let Some(items) = &schema.items else { return };
    for key in &schema.list_map_keys {
        let property = items.properties.get(key);
        let filled = property.is_some_and(|property| property.default.is_some());
        if property.is_none() || !filled && !items.required.contains(key) {
            let why = "Required value: this property is in x-kubernetes-list-map-keys, so it must have a default or \
                       be a required property";
            let field = if property.is_none() { "items.properties" } else { "items.required" };
            found.push((format!("{path}.{field}[{key}]"), why.to_owned()));
        }
    }
}

fn default(schema: &Schema, path: &str, found: &mut Faults) {
    let Some(default) = &schema.default else { return };
    let field = format!("{path}.default");
    let mut pruned = serde_json::json!({"default": default});
    let holder = Schema { properties: [("default".to_owned(), schema.clone())].into(), ..Schema::default() };
    for dropped in prune::object(&holder, &mut pruned) {
        let dropped = dropped.trim_start_matches("default").trim_start_matches('.');
        found.push((
            field.clone(),
            format!("Invalid value: {default}: must not have unknown field {dropped:?}"),
        ));
    }
    found.extend(faults(schema, default, None, &field));
}

/// A node that only checks values: `outer` says what they are made of.
fn values(schema: &Schema, outer: &Schema, path: &str, typed: bool, found: &mut Faults) {
    let mut forbid = |field: &str| {
        found.push((format!("{path}.{field}"), "Forbidden: must be empty to be structural".to_owned()));
    };
    // The one form with types: what x-kubernetes-int-or-string stands for.
    if schema.kind.is_some() && !(typed && matches!(schema.kind, Some(Type::Integer | Type::String))) {
        forbid("type");
    }
    for (field, set) in [
        ("default", schema.default.is_some()),
        ("nullable", schema.nullable),
        ("additionalProperties", schema.additional_properties.is_some()),
        ("x-kubernetes-preserve-unknown-fields", schema.preserve_unknown),
        ("x-kubernetes-int-or-string", schema.int_or_string),
        ("x-kubernetes-embedded-resource", schema.embedded),
        ("x-kubernetes-validations", !schema.rules.is_empty()),
        ("x-kubernetes-list-type", schema.list_type != ListType::Atomic),
    ] {
        if set {
            forbid(field);
        }
    }
    let mut incomplete = |field: String| {
        let why = format!("Required value: because it is defined in {field}");
        found.push((field, why));
    };
    let mut below = Vec::new();
    for (name, property) in &schema.properties {
        let field = format!("{path}.properties[{name}]");
        match outer.property(name) {
            Some(outer) => below.push((property, outer, field)),
            None if outer.is_open() => below.push((property, outer, field)),
            None => incomplete(field),
        }
    }
    if let Some(items) = &schema.items {
        let field = format!("{path}.items");
        match &outer.items {
            Some(outer) => below.push((items, outer, field)),
            None => incomplete(field),
        }
    }
    for (field, schemas) in lists(schema) {
        for (index, junction) in schemas.iter().enumerate() {
            below.push((junction, outer, format!("{path}.{field}[{index}]")));
        }
    }
    if let Some(not) = &schema.not {
        below.push((not, outer, format!("{path}.not")));
    }
    for (schema, outer, path) in below {
        values(schema, outer, &path, typed, found);
    }
}

/// A root may restrict the name of its objects and nothing else of their metadata.
pub(super) fn check_metadata(source: &Value, path: &str) -> Faults {
    let properties = source.pointer("/properties/metadata/properties").and_then(Value::as_object);
    let strange = properties
        .into_iter()
        .flatten()
        .filter(|(name, _)| !["name", "generateName"].contains(&name.as_str()));
    strange
        .map(|(name, _)| {
            let why = "Forbidden: must not specify anything other than name and generateName, but metadata is \
                       implicitly specified";
            (format!("{path}.properties[metadata].properties[{name}]"), why.to_owned())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{check, check_metadata};
    use crate::api::structure::Schema;

    fn told(schema: &Value) -> Vec<String> {
        let schema = Schema::parse(schema).unwrap();
        check(&schema, "s").into_iter().map(|(field, why)| format!("{field}: {why}")).collect()
    }

    #[test]
    fn structural_schemas_pass() {
        let schema = json!({"type": "object", "properties": {
            "spec": {
                "type": "object", "required": ["a"],
                "properties": {
                    "a": {"type": "string", "default": "x", "enum": ["x", "y"]},
                    "port": {"x-kubernetes-int-or-string": true, "anyOf": [{"type": "integer"}, {"type": "string"}]},
                    "any": {"x-kubernetes-preserve-unknown-fields": true},
                    "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                },
                "oneOf": [{"required": ["a"]}, {"properties": {"a": {"maxLength": 3}}, "not": {"required": ["b"]}}],
            },
        }});
        assert_eq!(told(&schema), [""; 0]);
    }

    #[test]
    fn others_are_refused() {
        let list = |items: Value| {
            json!({"type": "object", "properties": {"l": {
                "type": "array", "items": items, "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"],
            }}})
        };
        for (schema, expect) in [
            (json!({"type": "string"}), "s.type: Invalid value: \"string\": must be object at the root"),
            (json!({}), "s.type: Required value: must not be empty at the root"),
            (
                json!({"type": "object", "properties": {"a": {"description": "x"}}}),
                "s.properties[a].type: Required value: must not be empty for specified object fields",
            ),
            (
                json!({"type": "object", "properties": {"a": {"type": "array"}}}),
                "s.properties[a].items: Required value: must be specified",
            ),
            (
                json!({"type": "object", "properties": {"a": {"type": "string", "default": 1}}}),
                "s.properties[a].default: Invalid value: \"integer\": s.properties[a].default in body must be of type string: \"integer\"",
            ),
            (
                json!({"type": "object", "properties": {"a": {"type": "object", "default": {"b": 1}}}}),
                "s.properties[a].default: Invalid value: {\"b\":1}: must not have unknown field \"b\"",
            ),
            (
                json!({"type": "object", "anyOf": [{"properties": {"b": {}}}]}),
                "s.anyOf[0].properties[b]: Required value: because it is defined in s.anyOf[0].properties[b]",
            ),
            (
                json!({"type": "object", "anyOf": [{"type": "object"}]}),
                "s.anyOf[0].type: Forbidden: must be empty to be structural",
            ),
            (
                json!({"type": "object", "additionalProperties": false}),
                "s.additionalProperties: Forbidden: must not be used",
            ),
            (
                list(json!({"type": "object", "properties": {"k": {"type": "string"}}})),
                "s.properties[l].items.required[k]: Required value: this property is in x-kubernetes-list-map-keys, \
                 so it must have a default or be a required property",
            ),
        ] {
            assert_eq!(told(&schema), [expect], "{schema}");
        }
        let metadata = json!({"properties": {"metadata": {"properties": {"name": {}, "labels": {}}}}});
        assert_eq!(check_metadata(&metadata, "s")[0].0, "s.properties[metadata].properties[labels]");
    }

    #[test]
    fn some_cannot_even_be_read() {
        for schema in [json!({"type": "thing"}), json!({"pattern": "("}), json!({"items": [{}]})] {
            assert!(Schema::parse(&schema).is_err(), "{schema}");
        }
    }
}
