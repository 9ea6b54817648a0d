//! Pruning: a property that the schema does not specify is dropped, unless the schema says that unknown ones stay.

use serde_json::Value;

use super::{Schema, below};

/// What each object has, whatever its schema says.
const OBJECT: [&str; 3] = ["apiVersion", "kind", "metadata"];

/// Drops what is not specified from a whole object; the paths of what was dropped.
pub(in super::super) fn object(schema: &Schema, object: &mut Value) -> Vec<String> {
    let mut dropped = Vec::new();
    prune(schema, object, true, "", &mut dropped);
    dropped
}

fn prune(schema: &Schema, value: &mut Value, resource: bool, path: &str, dropped: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            let open = schema.is_open();
            fields.retain(|name, value| {
                if resource && OBJECT.contains(&name.as_str()) {
                    return true;
                }
                let path = below(path, name);
                if let Some(schema) = schema.property(name) {
                    prune(schema, value, schema.embedded, &path, dropped);
                    return true;
                }
                if !open {
                    dropped.push(path);
                }
                open
            });
        }
        Value::Array(items) => {
            let Some(schema) = &schema.items else { return };
            for (index, item) in items.iter_mut().enumerate() {
                prune(schema, item, schema.embedded, &format!("{path}[{index}]"), dropped);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::object;
    use crate::api::structure::Schema;

    #[test]
    fn what_is_not_specified_goes() {
        let schema = Schema::parse(&json!({"type": "object", "properties": {
            "spec": {"type": "object", "properties": {
                "list": {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "string"}}}},
                "map": {"type": "object", "additionalProperties": {"type": "object", "properties": {"a": {}}}},
                "open": {"type": "object", "x-kubernetes-preserve-unknown-fields": true, "properties": {
                    "closed": {"type": "object"},
                }},
                "resource": {"type": "object", "x-kubernetes-embedded-resource": true},
            }},
        }}))
        .unwrap();
        let mut value = json!({
            "apiVersion": "v1", "kind": "A", "metadata": {"name": "a"}, "status": {},
            "spec": {
                "list": [{"a": "1", "b": "2"}], "map": {"k": {"a": 1, "b": 2}},
                "open": {"x": {"y": 1}, "closed": {"z": 1}},
                "resource": {"apiVersion": "v1", "kind": "B", "metadata": {}, "spec": {}},
                "no": 1,
            },
        });
        let dropped = object(&schema, &mut value);
        assert_eq!(
            dropped,
            [
                "spec.list[0].b",
                "spec.map.k.b",
                "spec.no",
                "spec.open.closed.z",
                "spec.resource.spec",
                "status"
            ]
        );
        assert_eq!(
            value,
            json!({
                "apiVersion": "v1", "kind": "A", "metadata": {"name": "a"},
                "spec": {
                    "list": [{"a": "1"}], "map": {"k": {"a": 1}}, "open": {"x": {"y": 1}, "closed": {}},
                    "resource": {"apiVersion": "v1", "kind": "B", "metadata": {}},
                },
            })
        );
    }
}
