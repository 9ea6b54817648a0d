//! What is wrong with the metadata of an object. Pure.
//! Reference: `k8s.io/apimachinery/pkg/api/validation/objectmeta.go`.

use serde_json::Value;

use super::super::kinds::Kind;
use super::super::meta::{is_terminating, items, name, text};
use super::Faults;

/// What is wrong with the metadata of an object that takes the place of `old`, if any.
pub(super) fn faults(kind: &Kind, object: &Value, old: Option<&Value>, faults: &mut Faults) {
    let name = name(object);
    if name.is_empty() {
        faults.push(("metadata.name".into(), "Required value: name or generateName is required".into()));
    } else if let Err(why) = check_name(kind, name) {
        faults.push(("metadata.name".into(), format!("Invalid value: \"{name}\": {why}")));
    }
    let labels = object["metadata"]["labels"].as_object().into_iter().flatten();
    for (key, value) in labels {
        let value = value.as_str().unwrap_or_default();
        if !is_qualified(key) {
            let why = "name part must consist of alphanumeric characters, '-', '_' or '.'";
            faults.push(("metadata.labels".into(), format!("Invalid value: \"{key}\": {why}")));
        }
        if !value.is_empty() && !is_label_value(value) {
            let why = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', \
                       and must start and end with an alphanumeric character";
            faults.push(("metadata.labels".into(), format!("Invalid value: \"{value}\": {why}")));
        }
    }
    owners(object, faults);
    if let Some(old) = old.filter(|old| is_terminating(old)) {
        let had: Vec<&Value> = items(old, "/metadata/finalizers").collect();
        let new: Vec<&Value> =
            items(object, "/metadata/finalizers").filter(|name| !had.contains(name)).collect();
        if !new.is_empty() {
            let new: Vec<String> = new.into_iter().map(Value::to_string).collect();
            let why = "no new finalizers can be added if the object is being deleted, found new finalizers";
            faults.push((
                "metadata.finalizers".into(),
                format!("Forbidden: {why} []string{{{}}}", new.join(", ")),
            ));
        }
    }
}

fn owners(object: &Value, faults: &mut Faults) {
    let mut controllers = Vec::new();
    for (index, owner) in items(object, "/metadata/ownerReferences").enumerate() {
        for (field, word) in [("apiVersion", "version"), ("kind", "kind"), ("name", "name"), ("uid", "uid")] {
            if text(owner, &format!("/{field}")).is_empty() {
                let field = format!("metadata.ownerReferences[{index}].{field}");
                faults.push((field, format!("Invalid value: \"\": {word} must not be empty")));
            }
        }
        if owner["controller"] == true {
            controllers.push(text(owner, "/name"));
        }
    }
    if let [first, second, ..] = controllers[..] {
        let why = format!(
            "Only one reference can have Controller set to true. Found \"true\" in references for {first} and {second}"
        );
        faults.push(("metadata.ownerReferences".into(), format!("Invalid value: {why}")));
    }
}

fn check_name(kind: &Kind, name: &str) -> Result<(), &'static str> {
    if kind.group.starts_with("rbac.") {
        let bad = name == "." || name == ".." || name.contains(['/', '%']);
        return if bad { Err("may not contain '/' or '%'") } else { Ok(()) };
    }
    let label = matches!(kind.kind.as_str(), "Namespace" | "Service") && kind.custom.is_none();
    let (limit, parts): (usize, Vec<&str>) =
        if label { (63, vec![name]) } else { (253, name.split('.').collect()) };
    if name.len() > limit {
        return Err(if label {
            "must be no more than 63 characters"
        } else {
            "must be no more than 253 characters"
        });
    }
    if parts.into_iter().all(is_dns_label) {
        return Ok(());
    }
    Err(if label {
        "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and \
         end with an alphanumeric character"
    } else {
        "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must \
         start and end with an alphanumeric character"
    })
}

pub(in super::super) fn is_dns_label(label: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    !label.is_empty() && label.bytes().all(inner) && !label.starts_with('-') && !label.ends_with('-')
}

fn is_label_value(value: &str) -> bool {
    let ends = |letter: char| letter.is_ascii_alphanumeric();
    value.len() <= 63
        && value.chars().all(|letter| letter.is_ascii_alphanumeric() || "-_.".contains(letter))
        && value.starts_with(ends)
        && value.ends_with(ends)
}

/// `name` or `prefix.example.com/name`.
fn is_qualified(key: &str) -> bool {
    match key.split_once('/') {
        Some((prefix, name)) => prefix.split('.').all(is_dns_label) && is_label_value(name),
        None => is_label_value(key),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::faults;
    use crate::api::kinds::Kinds;

    fn check(object: &Value, old: Option<&Value>, expect: &[&str]) {
        let kind = Kinds::new().named("configmaps").unwrap();
        let mut found = Vec::new();
        faults(&kind, object, old, &mut found);
        let found: Vec<&str> = found.iter().map(|(field, _)| field.as_str()).collect();
        assert_eq!(found, expect, "{object}");
    }

    #[test]
    fn owners_are_named_in_full_and_one_controls() {
        let owner = |name: &str, controller: bool| json!({"apiVersion": "v1", "kind": "Pod", "name": name, "uid": "u", "controller": controller});
        let with = |owners: Value| json!({"metadata": {"name": "a", "ownerReferences": owners}});
        check(&with(json!([owner("a", true), owner("b", false)])), None, &[]);
        check(&with(json!([owner("a", true), owner("b", true)])), None, &["metadata.ownerReferences"]);
        check(
            &with(json!([owner("a", true), {"kind": "Pod", "name": "b"}])),
            None,
            &["metadata.ownerReferences[1].apiVersion", "metadata.ownerReferences[1].uid"],
        );
    }

    #[test]
    fn what_is_being_deleted_is_held_by_nothing_new() {
        let with = |finalizers: &[&str], deleted: bool| {
            let time = deleted.then_some("2025-01-01T00:00:00Z");
            json!({"metadata": {"name": "a", "finalizers": finalizers, "deletionTimestamp": time}})
        };
        let expect = ["metadata.finalizers"];
        check(&with(&["x", "y"], true), Some(&with(&["x"], true)), &expect);
        check(&with(&[], true), Some(&with(&["x"], true)), &[]);
        check(&with(&["x"], true), Some(&with(&["x"], true)), &[]);
        check(&with(&["x", "y"], false), Some(&with(&["x"], false)), &[]);
    }
}
