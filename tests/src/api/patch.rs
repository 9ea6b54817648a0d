//! Patches: JSON merge (RFC 7386), JSON patch (RFC 6902) and, in `strategic`, Kubernetes' own strategic merge.
//! Pure functions on JSON values; all that a client can get wrong is an error, never a panic.

use serde_json::Value;

use super::status::Status;
use super::strategic;

/// How a patch is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PatchKind {
    /// RFC 7386: objects merge, null removes, lists are replaced.
    Merge,
    /// As merge, but known lists merge by key; built-in kinds only.
    Strategic,
    /// RFC 6902: a list of operations.
    Json,
    /// Server-side apply: creates, merges, and removes what the same manager no longer applies.
    Apply,
}

/// A patch as sent.
#[derive(Clone, Debug)]
pub(super) struct Patch {
    pub(super) kind: PatchKind,
    pub(super) body: Value,
}

impl Patch {
    /// The object with the patch applied.
    pub(super) fn apply(&self, object: &Value, custom: bool) -> Result<Value, Status> {
        let mut patched = object.clone();
        match self.kind {
            PatchKind::Merge => merge(&mut patched, &self.body),
            PatchKind::Strategic if custom => {
                let supported = "application/json-patch+json, application/merge-patch+json, \
                                 application/apply-patch+yaml";
                return Err(Status::unsupported_media("application/strategic-merge-patch+json", supported));
            }
            PatchKind::Strategic => strategic::merge(&mut patched, &self.body)?,
            PatchKind::Apply => return Err(Status::not_supported("server-side apply of this subresource")),
            PatchKind::Json => json_patch(&mut patched, &self.body)?,
        }
        Ok(patched)
    }
}

/// RFC 7386.
pub(super) fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    let target = super::meta::map(target);
    for (key, value) in patch {
        if value.is_null() {
            target.remove(key);
        } else {
            merge(target.entry(key).or_insert(Value::Null), value);
        }
    }
}

/// RFC 6902.
fn json_patch(target: &mut Value, patch: &Value) -> Result<(), Status> {
    let operations = patch.as_array().ok_or_else(|| Status::bad_request("a JSON patch is a list"))?;
    for operation in operations {
        json_operation(target, operation).map_err(|why| {
            let mut status = Status::invalid("", "", "", &[]);
            status.message = format!("the server rejected our request due to an error in our request: {why}");
            status
        })?;
    }
    Ok(())
}

fn json_operation(target: &mut Value, operation: &Value) -> Result<(), String> {
    let field =
        |name: &str| operation[name].as_str().ok_or_else(|| format!("operation without {name}: {operation}"));
    let value =
        || operation.get("value").cloned().ok_or_else(|| format!("operation without value: {operation}"));
    let path = field("path")?;
    let found = |target: &Value, path: &str| {
        target.pointer(path).cloned().ok_or_else(|| format!("nothing at {path:?}"))
    };
    match field("op")? {
        "add" => add(target, path, value()?),
        "remove" => remove(target, path).map(drop),
        "replace" => {
            let slot = target.pointer_mut(path).ok_or_else(|| format!("nothing at {path:?}"))?;
            *slot = value()?;
            Ok(())
        }
        "move" => {
            let moved = remove(target, field("from")?)?;
            add(target, path, moved)
        }
        "copy" => {
            let copied = found(target, field("from")?)?;
            add(target, path, copied)
        }
        "test" if found(target, path)? == value()? => Ok(()),
        "test" => Err(format!("testing path {path:?} failed: its value differs")),
        other => Err(format!("unknown operation {other:?}")),
    }
}

/// The parent of a JSON pointer and its last token, unescaped.
fn parent<'a>(target: &'a mut Value, path: &str) -> Result<(&'a mut Value, String), String> {
    let (parent, last) = path.rsplit_once('/').ok_or_else(|| format!("{path:?} is no JSON pointer"))?;
    let holder = target.pointer_mut(parent).ok_or_else(|| format!("nothing at {parent:?}"))?;
    Ok((holder, last.replace("~1", "/").replace("~0", "~")))
}

fn add(target: &mut Value, path: &str, value: Value) -> Result<(), String> {
    if path.is_empty() {
        *target = value;
        return Ok(());
    }
    let (holder, key) = parent(target, path)?;
    match holder {
        Value::Object(map) => {
            map.insert(key, value);
            Ok(())
        }
        Value::Array(list) => {
            let index = if key == "-" { list.len() } else { position(&key)? };
            if index > list.len() {
                return Err(format!("index {index} is beyond the list at {path:?}"));
            }
            list.insert(index, value);
            Ok(())
        }
        _ => Err(format!("{path:?} lies in neither object nor list")),
    }
}

fn remove(target: &mut Value, path: &str) -> Result<Value, String> {
    let (holder, key) = parent(target, path)?;
    let removed = match holder {
        Value::Object(map) => map.remove(&key),
        Value::Array(list) => {
            let index = position(&key)?;
            (index < list.len()).then(|| list.remove(index))
        }
        _ => None,
    };
    removed.ok_or_else(|| format!("nothing at {path:?}"))
}

fn position(key: &str) -> Result<usize, String> {
    key.parse().map_err(|_| format!("{key:?} is no list index"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{Patch, PatchKind};

    fn check(kind: PatchKind, object: &Value, body: Value, expect: Result<Value, &str>) {
        let got = Patch { kind, body: body.clone() }.apply(object, false);
        match (got, expect) {
            (Ok(got), Ok(expect)) => assert_eq!(got, expect, "{body}"),
            (Err(got), Err(expect)) => assert!(got.message.contains(expect), "{body}: {got}"),
            (got, expect) => panic!("{body}: got {got:?}, expected {expect:?}"),
        }
    }

    #[test]
    fn merge_patches() {
        let object = json!({"a": {"b": 1, "c": [1, 2]}, "d": "x"});
        for (patch, expect) in [
            (json!({"a": {"b": 2}}), json!({"a": {"b": 2, "c": [1, 2]}, "d": "x"})),
            (json!({"a": {"c": [3]}}), json!({"a": {"b": 1, "c": [3]}, "d": "x"})),
            (json!({"a": null}), json!({"d": "x"})),
            (json!({"e": {"f": null, "g": 1}}), json!({"a": {"b": 1, "c": [1, 2]}, "d": "x", "e": {"g": 1}})),
        ] {
            check(PatchKind::Merge, &object, patch, Ok(expect));
        }
    }

    #[test]
    fn json_patches() {
        let object = json!({"l": [1, 2], "m": {"a/b": 1}});
        for (patch, expect) in [
            (
                json!([{"op": "add", "path": "/l/-", "value": 3}]),
                Ok(json!({"l": [1, 2, 3], "m": {"a/b": 1}})),
            ),
            (
                json!([{"op": "add", "path": "/l/0", "value": 0}]),
                Ok(json!({"l": [0, 1, 2], "m": {"a/b": 1}})),
            ),
            (json!([{"op": "remove", "path": "/m/a~1b"}]), Ok(json!({"l": [1, 2], "m": {}}))),
            (
                json!([{"op": "replace", "path": "/l/1", "value": 9}]),
                Ok(json!({"l": [1, 9], "m": {"a/b": 1}})),
            ),
            (json!([{"op": "move", "from": "/l", "path": "/n"}]), Ok(json!({"n": [1, 2], "m": {"a/b": 1}}))),
            (
                json!([{"op": "copy", "from": "/l/0", "path": "/m/c"}]),
                Ok(json!({"l": [1, 2], "m": {"a/b": 1, "c": 1}})),
            ),
            (json!([{"op": "test", "path": "/l/0", "value": 1}]), Ok(object.clone())),
            (json!([{"op": "test", "path": "/l/0", "value": 2}]), Err("differs")),
            (json!([{"op": "remove", "path": "/x"}]), Err("nothing at")),
            (json!([{"op": "add", "path": "/l/7", "value": 1}]), Err("beyond")),
            (json!([{"op": "add", "path": "/x/y", "value": 1}]), Err("nothing at")),
            (json!([{"op": "fly", "path": "/x"}]), Err("unknown operation")),
            (json!([{"path": "/x"}]), Err("without op")),
            (json!({}), Err("is a list")),
        ] {
            check(PatchKind::Json, &object, patch, expect);
        }
    }

    #[test]
    fn custom_resources_have_no_strategic_merge() {
        let patch = Patch { kind: PatchKind::Strategic, body: json!({}) };
        assert_eq!(patch.apply(&json!({}), true).unwrap_err().code, 415);
    }
}
