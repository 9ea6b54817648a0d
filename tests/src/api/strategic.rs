//! Strategic merge patch: lists that have a merge key merge item by item, others are replaced.
//! Source of the keys: the `patchMergeKey` tags of k8s.io/api; of the directives (`$patch`, `$retainKeys`,
//! `$deleteFromPrimitiveList/…`, `$setElementOrder/…`): Kubernetes' `strategic-merge-patch.md`.

use serde_json::{Map, Value};

use super::meta;
use super::status::Status;

/// Merges `patch` into `target`.
pub(super) fn merge(target: &mut Value, patch: &Value) -> Result<(), Status> {
    let Value::Object(patch) = patch else {
        return Err(Status::bad_request("a strategic merge patch is an object"));
    };
    merge_map(meta::map(target), patch, "")
}

/// `parent` is the name of the field that holds `target`; it tells a container's ports from a service's.
fn merge_map(
    target: &mut Map<String, Value>,
    patch: &Map<String, Value>,
    parent: &str,
) -> Result<(), Status> {
    match patch.get("$patch").and_then(Value::as_str) {
        Some("replace") => {
            target.clear();
            target.extend(without_directives(patch));
            return Ok(());
        }
        Some("delete") => {
            target.clear();
            return Ok(());
        }
        Some("merge") | None => {}
        Some(other) => return Err(Status::bad_request(format!("unknown patch directive {other:?}"))),
    }
    if let Some(kept) = patch.get("$retainKeys").and_then(Value::as_array) {
        target.retain(|key, _| kept.iter().any(|kept| kept == key));
    }
    for (key, value) in patch {
        if let Some(field) = key.strip_prefix("$deleteFromPrimitiveList/") {
            let gone = value.as_array().map_or(&[][..], Vec::as_slice);
            if let Some(list) = target.get_mut(field).and_then(Value::as_array_mut) {
                list.retain(|item| !gone.contains(item));
            }
        }
    }
    for (key, value) in patch.iter().filter(|(key, _)| !key.starts_with('$')) {
        match value {
            Value::Null => drop(target.remove(key)),
            Value::Object(value) => {
                let slot = target.entry(key).or_insert(Value::Null);
                merge_map(meta::map(slot), value, key)?;
            }
            Value::Array(items) => {
                let slot = target.entry(key).or_insert_with(|| Value::Array(Vec::new()));
                let order = patch.get(&format!("$setElementOrder/{key}")).and_then(Value::as_array);
                merge_list(slot, items, (key, parent), order)?;
            }
            scalar => drop(target.insert(key.clone(), scalar.clone())),
        }
    }
    Ok(())
}

fn merge_list(
    target: &mut Value,
    patch: &[Value],
    (field, parent): (&str, &str),
    order: Option<&Vec<Value>>,
) -> Result<(), Status> {
    let Some(list) = target.as_array_mut() else {
        *target = Value::Array(patch.to_vec());
        return Ok(());
    };
    match merge_key(field, parent, patch) {
        Merge::Replace => *list = patch.to_vec(),
        Merge::Set => {
            let new: Vec<Value> = patch.iter().filter(|item| !list.contains(item)).cloned().collect();
            list.extend(new);
            sort_by_order(list, order, |item| Some(item));
        }
        Merge::By(key) => {
            merge_items(list, patch, key, field)?;
            sort_by_order(list, order, |item| item.get(key));
        }
    }
    Ok(())
}

fn merge_items(list: &mut Vec<Value>, patch: &[Value], key: &str, field: &str) -> Result<(), Status> {
    if patch.iter().any(|item| item["$patch"] == "replace") {
        list.clear();
    }
    for item in patch {
        let Value::Object(fields) = item else {
            return Err(Status::bad_request(format!("an item of {field} in the patch is no object")));
        };
        if item["$patch"] == "replace" && fields.len() == 1 {
            continue;
        }
        let wanted = fields.get(key).ok_or_else(|| {
            Status::bad_request(format!("map: {item} does not contain declared merge key: {key}"))
        })?;
        let found = list.iter().position(|existing| existing.get(key) == Some(wanted));
        match (found, item["$patch"].as_str()) {
            (Some(index), Some("delete")) => drop(list.remove(index)),
            (None, Some("delete")) => {}
            (Some(index), _) => merge_map(meta::map(&mut list[index]), fields, field)?,
            (None, _) => {
                let mut new = Map::new();
                merge_map(&mut new, &without_directives(fields), field)?;
                list.push(Value::Object(new));
            }
        }
    }
    Ok(())
}

fn without_directives(patch: &Map<String, Value>) -> Map<String, Value> {
    patch
        .iter()
        .filter(|(key, _)| *key != "$patch")
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

/// Puts the items named in `order` into that order; others stay behind the item they follow.
fn sort_by_order(list: &mut Vec<Value>, order: Option<&Vec<Value>>, key: impl Fn(&Value) -> Option<&Value>) {
    let Some(order) = order else { return };
    // An order entry is the key's value, or an object with just the key.
    let rank = |item: &Value| {
        order.iter().position(|wanted| key(wanted).unwrap_or(wanted) == key(item).unwrap_or(item))
    };
    let mut last = 0;
    let mut ranked: Vec<(usize, Value)> = Vec::with_capacity(list.len());
    for item in list.drain(..) {
        last = rank(&item).unwrap_or(last);
        ranked.push((last, item));
    }
    ranked.sort_by_key(|(rank, _)| *rank);
    list.extend(ranked.into_iter().map(|(_, item)| item));
}

enum Merge {
    /// The patch's list takes the place of the old.
    Replace,
    /// A set of scalars.
    Set,
    /// Items with the same value of this field are the same item.
    By(&'static str),
}

fn merge_key(field: &str, parent: &str, patch: &[Value]) -> Merge {
    match (field, parent) {
        ("finalizers", "metadata") | ("podCIDRs", "spec") => Merge::Set,
        ("ownerReferences", _) => Merge::By("uid"),
        ("containers" | "initContainers" | "ephemeralContainers" | "volumes" | "env", _) => Merge::By("name"),
        ("imagePullSecrets" | "resourceClaims" | "schedulingGates", "spec") | ("secrets", "") => {
            Merge::By("name")
        }
        ("volumeMounts", _) => Merge::By("mountPath"),
        ("volumeDevices", _) => Merge::By("devicePath"),
        ("ports", "containers" | "initContainers" | "ephemeralContainers") => Merge::By("containerPort"),
        // A service's ports; an endpoint slice's and an endpoints subset's are replaced.
        ("ports", "spec") => Merge::By("port"),
        ("conditions" | "addresses", "status") if patch.iter().all(Value::is_object) => Merge::By("type"),
        ("hostAliases" | "podIPs" | "hostIPs", _) => Merge::By("ip"),
        ("topologySpreadConstraints", _) => Merge::By("topologyKey"),
        _ => Merge::Replace,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::merge;

    fn check(object: Value, patch: &Value, expect: &Value) {
        let mut merged = object;
        merge(&mut merged, patch).unwrap();
        assert_eq!(merged, *expect, "{patch}");
    }

    fn pod(containers: &Value) -> Value {
        json!({"spec": {"containers": containers}})
    }

    #[test]
    fn maps_merge_and_null_removes() {
        check(
            json!({"metadata": {"labels": {"a": "1", "b": "2"}}}),
            &json!({"metadata": {"labels": {"a": null, "c": "3"}}}),
            &json!({"metadata": {"labels": {"b": "2", "c": "3"}}}),
        );
        check(
            json!({"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}}),
            &json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}}),
            &json!({"spec": {"strategy": {"type": "Recreate"}}}),
        );
        check(
            json!({"data": {"a": "1"}}),
            &json!({"data": {"$patch": "replace", "b": "2"}}),
            &json!({"data": {"b": "2"}}),
        );
    }

    #[test]
    fn keyed_lists_merge_item_by_item() {
        let old = json!([
            {"name": "a", "image": "x:1", "env": [{"name": "E", "value": "1"}], "ports": [{"containerPort": 80}]},
            {"name": "b", "image": "y:1"},
        ]);
        check(
            pod(&old),
            &pod(&json!([{"name": "a", "image": "x:2", "env": [{"name": "F", "value": "2"}]}])),
            &pod(&json!([
                {"name": "a", "image": "x:2", "ports": [{"containerPort": 80}],
                 "env": [{"name": "E", "value": "1"}, {"name": "F", "value": "2"}]},
                {"name": "b", "image": "y:1"},
            ])),
        );
        check(
            pod(&old),
            &pod(&json!([{"name": "a", "$patch": "delete"}, {"name": "c", "image": "z", "args": null}])),
            &pod(&json!([{"name": "b", "image": "y:1"}, {"name": "c", "image": "z"}])),
        );
        check(pod(&old), &pod(&json!([{"$patch": "replace"}, {"name": "c"}])), &pod(&json!([{"name": "c"}])));
    }

    #[test]
    fn order_and_sets() {
        check(
            pod(&json!([{"name": "a"}, {"name": "b"}])),
            &json!({"spec": {
                "$setElementOrder/containers": [{"name": "c"}, {"name": "b"}, {"name": "a"}],
                "containers": [{"name": "c"}],
            }}),
            &pod(&json!([{"name": "c"}, {"name": "b"}, {"name": "a"}])),
        );
        check(
            json!({"metadata": {"finalizers": ["a", "b"]}}),
            &json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"], "finalizers": ["c"]}}),
            &json!({"metadata": {"finalizers": ["b", "c"]}}),
        );
    }

    #[test]
    fn lists_without_key_are_replaced() {
        check(
            json!({"rules": [{"verbs": ["get"]}], "spec": {"tolerations": [{"key": "a"}]}}),
            &json!({"rules": [{"verbs": ["list"]}], "spec": {"tolerations": [{"operator": "Exists"}]}}),
            &json!({"rules": [{"verbs": ["list"]}], "spec": {"tolerations": [{"operator": "Exists"}]}}),
        );
        // A service account's, unlike a pod's.
        check(
            json!({"secrets": [{"name": "a"}], "imagePullSecrets": [{"name": "a"}]}),
            &json!({"secrets": [{"name": "b"}], "imagePullSecrets": [{"name": "b"}]}),
            &json!({"secrets": [{"name": "a"}, {"name": "b"}], "imagePullSecrets": [{"name": "b"}]}),
        );
        check(
            json!({"spec": {"imagePullSecrets": [{"name": "a"}], "schedulingGates": [{"name": "a"}]}}),
            &json!({"spec": {"imagePullSecrets": [{"name": "b"}], "schedulingGates": [{"name": "b"}]}}),
            &json!({"spec": {"imagePullSecrets": [{"name": "a"}, {"name": "b"}],
                             "schedulingGates": [{"name": "a"}, {"name": "b"}]}}),
        );
        check(
            json!({"status": {"conditions": [{"type": "Ready", "status": "False"}, {"type": "X"}]}}),
            &json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}}),
            &json!({"status": {"conditions": [{"type": "Ready", "status": "True"}, {"type": "X"}]}}),
        );
    }

    #[test]
    fn malformed_patches_are_refused() {
        for patch in [
            json!([]),
            json!({"spec": {"containers": [{"image": "no name"}]}}),
            json!({"spec": {"containers": ["x"]}}),
            json!({"spec": {"$patch": "fly"}}),
        ] {
            let mut object = pod(&json!([{"name": "a"}]));
            assert_eq!(merge(&mut object, &patch).unwrap_err().code, 400, "{patch}");
        }
    }
}
