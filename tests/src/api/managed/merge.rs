//! Merging a configuration into an object, and removing what a configuration no longer names. Pure.
//! Reference: `sigs.k8s.io/structured-merge-diff/typed` (`merge.go`, `remove.go`).

use serde_json::Value;

use super::fields::Fields;
use super::shape::{Form, Shape};

/// Merges `config` into `live`: objects field by field, lists item by item where items have names.
pub(super) fn merge(shape: Shape<'_>, live: &mut Value, config: &Value) {
    match (shape.form(live), shape.form(config)) {
        (Form::Fields, Form::Fields) => {
            let (Value::Object(live), Value::Object(config)) = (live, config) else { return };
            for (key, value) in config.iter().filter(|(_, value)| !value.is_null()) {
                merge(shape.field(key), live.entry(key).or_insert(Value::Null), value);
            }
        }
        (Form::Items(old), Form::Items(new)) => {
            let (Value::Array(live_items), Value::Array(config)) = (&*live, config) else { return };
            let old: Vec<(&String, &Value)> = old.iter().zip(live_items).collect();
            let merged = in_order(shape.item(), &old, &new.iter().zip(config).collect::<Vec<_>>());
            *live = merged.into();
        }
        _ => *live = config.clone(),
    }
}

/// The configuration's items in its order; others stay before the item that they were before.
fn in_order(shape: Shape<'_>, old: &[(&String, &Value)], new: &[(&String, &Value)]) -> Vec<Value> {
    let mut merged = Vec::with_capacity(old.len() + new.len());
    let mut left = old.iter().peekable();
    for (element, item) in new {
        while let Some((_, kept)) =
            left.next_if(|(found, _)| !new.iter().any(|(element, _)| element == found))
        {
            merged.push((*kept).clone());
        }
        let mut value =
            old.iter().find(|(found, _)| found == element).map_or(Value::Null, |(_, item)| (*item).clone());
        merge(shape, &mut value, item);
        merged.push(value);
        left.next_if(|(found, _)| new.iter().any(|(element, _)| element == found));
    }
    let rest = left.filter(|(found, _)| !new.iter().any(|(element, _)| element == found));
    merged.extend(rest.map(|(_, item)| (*item).clone()));
    merged
}

/// Removes the fields of `gone` from `value`, except where something at or below a field is in `kept`.
pub(super) fn remove(shape: Shape<'_>, value: &mut Value, gone: &Fields, kept: Option<&Fields>) {
    let doomed = |element: &str| {
        let gone = gone.child(element)?;
        Some((gone, kept.and_then(|kept| kept.child(element)).filter(|kept| !kept.is_empty())))
    };
    match (shape.form(value), value) {
        (Form::Fields, Value::Object(map)) => map.retain(|key, value| {
            let Some((gone, kept)) = doomed(&format!("f:{key}")) else { return true };
            survives(shape.field(key), value, gone, kept)
        }),
        (Form::Items(elements), Value::Array(items)) => {
            let mut elements = elements.iter();
            items.retain_mut(|item| {
                let Some((gone, kept)) = elements.next().and_then(|element| doomed(element)) else {
                    return true;
                };
                survives(shape.item(), item, gone, kept)
            });
        }
        _ => {}
    }
}

fn survives(shape: Shape<'_>, value: &mut Value, gone: &Fields, kept: Option<&Fields>) -> bool {
    if gone.owned && kept.is_none() {
        return false;
    }
    remove(shape, value, gone, kept);
    let empty = match value {
        Value::Object(map) => map.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => false,
    };
    !empty || kept.is_some()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{merge, remove};
    use crate::api::managed::compare::named;
    use crate::api::managed::fields::Fields;
    use crate::api::managed::shape::Shape;

    fn spec(containers: &Value) -> Value {
        json!({"spec": {"containers": containers}})
    }

    #[test]
    fn lists_with_keys_merge_item_by_item() {
        for (live, config, expect) in [
            (
                json!([{"name": "a", "image": "1"}, {"name": "b"}]),
                json!([{"name": "b", "image": "2"}, {"name": "c"}]),
                json!([{"name": "a", "image": "1"}, {"name": "b", "image": "2"}, {"name": "c"}]),
            ),
            (
                json!([{"name": "a"}, {"name": "x"}, {"name": "b"}, {"name": "y"}]),
                json!([{"name": "b"}, {"name": "a"}]),
                json!([{"name": "b"}, {"name": "x"}, {"name": "a"}, {"name": "y"}]),
            ),
            (
                json!([{"name": "a", "args": ["1", "2"]}]),
                json!([{"name": "a", "args": ["3"]}]),
                json!([{"name": "a", "args": ["3"]}]),
            ),
        ] {
            let mut merged = spec(&live);
            merge(Shape::of(None), &mut merged, &spec(&config));
            assert_eq!(merged, spec(&expect), "{config} into {live}");
        }
    }

    #[test]
    fn what_nobody_else_has_goes() {
        let shape = Shape::of(None);
        let live = json!({
            "metadata": {"labels": {"a": "1", "b": "2"}, "annotations": {"x": "y"}},
            "spec": {"containers": [{"name": "c", "image": "i", "tty": true}, {"name": "d"}]},
        });
        let mine = json!({
            "metadata": {"labels": {"a": "1"}, "annotations": {"x": "y"}},
            "spec": {"containers": [{"name": "c", "image": "i"}, {"name": "d"}]},
        });
        let others = Fields::parse(&json!({
            "f:metadata": {"f:labels": {"f:b": {}}},
            "f:spec": {"f:containers": {"k:{\"name\":\"c\"}": {"f:tty": {}}}},
        }));
        let mut left = live;
        remove(shape, &mut left, &named(shape, &mine), Some(&others));
        assert_eq!(
            left,
            json!({"metadata": {"labels": {"b": "2"}}, "spec": {"containers": [{"tty": true}]}})
        );
    }
}
