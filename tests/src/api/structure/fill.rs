//! Defaulting: a property that is missing, or null where null is no value, gets its default; then what is below it.

use serde_json::Value;

use super::Schema;

/// Sets the defaults below `value`.
pub(in super::super) fn fill(schema: &Schema, value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|name, value| {
                !value.is_null() || schema.property(name).is_none_or(|schema| schema.nullable)
            });
            for (name, schema) in &schema.properties {
                if let Some(default) = &schema.default {
                    fields.entry(name).or_insert_with(|| default.clone());
                }
            }
            for (name, value) in fields {
                if let Some(schema) = schema.property(name) {
                    fill(schema, value);
                }
            }
        }
        Value::Array(items) => {
            let Some(schema) = &schema.items else { return };
            for item in items {
                if let Some(default) = schema.default.as_ref().filter(|_| item.is_null() && !schema.nullable)
                {
                    *item = default.clone();
                }
                fill(schema, item);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::fill;
    use crate::api::structure::Schema;

    #[test]
    fn defaults() {
        let schema = Schema::parse(&json!({"type": "object", "properties": {
            "a": {"type": "string", "default": "x"},
            "n": {"type": "string", "nullable": true, "default": "x"},
            "o": {"type": "object", "default": {}, "properties": {"p": {"type": "integer", "default": 1}}},
            "l": {"type": "array", "items": {"type": "object", "properties": {"q": {"type": "boolean", "default": true}}}},
            "none": {"type": "object", "properties": {"p": {"type": "integer", "default": 1}}},
        }}))
        .unwrap();
        for (value, expect) in [
            (json!({}), json!({"a": "x", "n": "x", "o": {"p": 1}})),
            (json!({"a": null, "n": null, "o": {"p": 2}}), json!({"a": "x", "n": null, "o": {"p": 2}})),
            (
                json!({"a": "y", "n": "y", "l": [{}, {"q": false}], "none": {}}),
                json!({"a": "y", "n": "y", "o": {"p": 1}, "l": [{"q": true}, {"q": false}], "none": {"p": 1}}),
            ),
        ] {
            let mut filled = value.clone();
            fill(&schema, &mut filled);
            assert_eq!(filled, expect, "{value}");
        }
    }
}
