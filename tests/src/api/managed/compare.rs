//! Which fields a value has, and in which two values differ. Pure.
//! Reference: `sigs.k8s.io/structured-merge-diff/typed` (`tofieldset.go`, `compare.go`). Null and absent are the same.

use std::collections::BTreeSet;

use serde_json::Value;

use super::fields::Fields;
use super::shape::{Form, Shape};

/// What a change does to fields.
#[derive(Debug, Default)]
pub(super) struct Comparison {
    /// Fields that are new or have another value.
    pub(super) changed: Fields,
    pub(super) removed: Fields,
}

/// The fields that a configuration names: its leaves, and the items of its lists.
pub(super) fn named(shape: Shape<'_>, value: &Value) -> Fields {
    let mut fields = Fields::default();
    name(shape, value, &mut Vec::new(), &mut fields);
    fields
}

fn name(shape: Shape<'_>, value: &Value, path: &mut Vec<String>, fields: &mut Fields) {
    match (shape.form(value), value) {
        (Form::Fields, Value::Object(map)) if !map.is_empty() => {
            for (key, value) in map.iter().filter(|(_, value)| !value.is_null()) {
                path.push(format!("f:{key}"));
                name(shape.field(key), value, path, fields);
                path.pop();
            }
        }
        (Form::Items(elements), Value::Array(items)) => {
            for (element, item) in elements.into_iter().zip(items) {
                path.push(element);
                if item.is_object() {
                    name(shape.item(), item, path, fields);
                }
                fields.insert(path);
                path.pop();
            }
        }
        _ => fields.insert(path),
    }
}

/// The change from `old` to `new`.
pub(super) fn compare(shape: Shape<'_>, old: &Value, new: &Value) -> Comparison {
    let mut comparison = Comparison::default();
    step(shape, Some(old), Some(new), &mut Vec::new(), &mut comparison);
    comparison
}

fn step(
    shape: Shape<'_>,
    old: Option<&Value>,
    new: Option<&Value>,
    path: &mut Vec<String>,
    comparison: &mut Comparison,
) {
    let old = old.filter(|value| !value.is_null());
    let new = new.filter(|value| !value.is_null());
    match (old, new) {
        (None, None) => return,
        (None, Some(new)) if !shape.is_given(new) => comparison.changed.insert(path),
        (Some(old), None) if !shape.is_given(old) => comparison.removed.insert(path),
        _ => {}
    }
    let form = |value: Option<&Value>| value.map(|value| shape.form(value));
    match (form(old), form(new)) {
        (Some(Form::Fields) | None, Some(Form::Fields) | None) => {
            for key in keys(old).chain(keys(new)).collect::<BTreeSet<&String>>() {
                path.push(format!("f:{key}"));
                let at = |value: Option<&Value>| value.and_then(|value| value.get(key)).cloned();
                step(shape.field(key), at(old).as_ref(), at(new).as_ref(), path, comparison);
                path.pop();
            }
        }
        (before @ (Some(Form::Items(_)) | None), after @ (Some(Form::Items(_)) | None)) => {
            let before = items(before, old);
            let after = items(after, new);
            for element in before.iter().chain(&after).map(|(element, _)| element).collect::<BTreeSet<_>>() {
                let at = |items: &[(String, Value)]| {
                    items.iter().find(|(found, _)| found == element).map(|(_, item)| item.clone())
                };
                path.push(element.clone());
                step(shape.item(), at(&before).as_ref(), at(&after).as_ref(), path, comparison);
                path.pop();
            }
        }
        _ if old.is_some() && new.is_some() && old != new => comparison.changed.insert(path),
        _ => {}
    }
}

fn keys(value: Option<&Value>) -> impl Iterator<Item = &String> {
    value.and_then(Value::as_object).into_iter().flat_map(serde_json::Map::keys)
}

fn items(form: Option<Form>, value: Option<&Value>) -> Vec<(String, Value)> {
    match (form, value) {
        (Some(Form::Items(elements)), Some(Value::Array(items))) => {
            elements.into_iter().zip(items.iter().cloned()).collect()
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{compare, named};
    use crate::api::managed::shape::Shape;
    use crate::api::structure::Schema;

    fn deployment(replicas: Value, containers: Value) -> Value {
        json!({"metadata": {"labels": {"a": "1"}}, "spec": {
            "replicas": replicas, "selector": {"matchLabels": {"a": "1"}}, "template": {"spec": {"containers": containers}},
        }})
    }

    #[test]
    fn a_configuration_names_its_leaves() {
        let value = deployment(
            json!(2),
            json!([{"name": "c", "args": ["x"], "ports": [{"containerPort": 80}], "resources": {}}]),
        );
        let container = r#".spec.template.spec.containers[name="c"]"#;
        let port = format!(r#"{container}.ports[containerPort=80,protocol="TCP"]"#);
        assert_eq!(
            named(Shape::of(None), &value).paths(),
            [
                ".metadata.labels.a".to_owned(),
                ".spec.replicas".to_owned(),
                ".spec.selector".to_owned(),
                container.to_owned(),
                format!("{container}.args"),
                format!("{container}.name"),
                port.clone(),
                format!("{port}.containerPort"),
                format!("{container}.resources"),
            ]
        );
    }

    #[test]
    fn changes() {
        let shape = Shape::of(None);
        let old = deployment(json!(2), json!([{"name": "c", "image": "a"}, {"name": "d"}]));
        let new = deployment(json!(3), json!([{"name": "e"}, {"name": "c", "image": "b", "tty": true}]));
        let changes = compare(shape, &old, &new);
        let at = |rest: &str| format!(".spec.template.spec.containers{rest}");
        assert_eq!(
            changes.changed.paths(),
            [
                ".spec.replicas".to_owned(),
                at(r#"[name="c"].image"#),
                at(r#"[name="c"].tty"#),
                at(r#"[name="e"]"#),
                at(r#"[name="e"].name"#)
            ]
        );
        assert_eq!(changes.removed.paths(), [at(r#"[name="d"]"#), at(r#"[name="d"].name"#)]);
        let created = compare(shape, &json!({}), &deployment(json!(null), json!([])));
        assert_eq!(created.changed.paths(), [".metadata.labels", ".metadata.labels.a", ".spec.selector"]);
    }

    #[test]
    fn custom_resources_are_as_their_schema_says() {
        let schema = Schema::parse(&json!({"type": "object", "properties": {"spec": {"type": "object", "properties": {
            "map": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"], "items": {
                "type": "object", "properties": {"k": {"type": "integer"}, "v": {"type": "string"}},
            }},
            "set": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}},
            "list": {"type": "array", "items": {"type": "string"}},
            "one": {"type": "object", "x-kubernetes-map-type": "atomic", "additionalProperties": {"type": "string"}},
            "open": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
        }}}}))
        .unwrap();
        let value = json!({"spec": {
            "map": [{"k": 1, "v": "x"}], "set": ["a"], "list": ["a"], "one": {"a": "b"}, "open": {"a": {"b": [{"name": 1}]}},
        }});
        assert_eq!(
            named(Shape::of(Some(&schema)), &value).paths(),
            [
                ".spec.list",
                ".spec.map[k=1]",
                ".spec.map[k=1].k",
                ".spec.map[k=1].v",
                ".spec.one",
                ".spec.open.a.b",
                ".spec.set[=\"a\"]"
            ]
        );
    }
}
