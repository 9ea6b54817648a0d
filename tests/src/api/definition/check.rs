//! What is wrong with a CustomResourceDefinition. Pure.
//! Reference: `k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation/validation.go`.

use serde_json::Value;

use super::super::meta::{items, name, text};
use super::super::structure::Schema;
use super::super::structure::check::Faults;
use super::super::{jsonpath, validate};
use super::{expressions, structural};

/// The faults of a definition that takes the place of `old`, if any.
pub(in super::super) fn faults(definition: &Value, old: Option<&Value>) -> Faults {
    let mut faults = Vec::new();
    let spec = &definition["spec"];
    let mut say = |field: &str, why: &str| faults.push((field.to_owned(), why.to_owned()));
    for field in ["/group", "/scope", "/names/kind", "/names/plural"] {
        if text(spec, field).is_empty() {
            say(&format!("spec{}", field.replace('/', ".")), "Required value");
        }
    }
    let scope = text(spec, "/scope");
    if !["", "Cluster", "Namespaced"].contains(&scope) {
        let why = format!("Unsupported value: {scope:?}: supported values: \"Cluster\", \"Namespaced\"");
        say("spec.scope", &why);
    }
    let group = text(spec, "/group");
    let is_domain = group.contains('.') && group.split('.').all(validate::is_dns_label);
    if !group.is_empty() && !is_domain {
        say("spec.group", &format!("Invalid value: {group:?}: should be a domain with at least one dot"));
    }
    for field in ["plural", "singular", "kind", "listKind"] {
        let word = text(spec, &format!("/names/{field}")).to_lowercase();
        if !word.is_empty() && !validate::is_dns_label(&word) {
            let why = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-'";
            say(&format!("spec.names.{field}"), &format!("Invalid value: {word:?}: {why}"));
        }
    }
    let wanted = format!("{}.{group}", text(spec, "/names/plural"));
    if name(definition) != wanted {
        let why =
            format!("Invalid value: {:?}: must be spec.names.plural+\".\"+spec.group", name(definition));
        say("metadata.name", &why);
    }
    if spec["preserveUnknownFields"] == true {
        let why = "Invalid value: true: cannot set to true, set x-kubernetes-preserve-unknown-fields to true in \
                   spec.versions[*].schema instead";
        say("spec.preserveUnknownFields", why);
    }
    let strategy = text(spec, "/conversion/strategy");
    if !["", "None"].contains(&strategy) {
        let why = format!(
            "Unsupported value: {strategy:?}: supported values: \"None\" (the lab calls no webhooks)"
        );
        say("spec.conversion.strategy", &why);
    }
    versions(spec, &mut faults);
    if let Some(old) = old {
        changes(definition, old, &mut faults);
    }
    faults
}

fn versions(spec: &Value, faults: &mut Faults) {
    let all: Vec<&Value> = items(spec, "/versions").collect();
    if all.iter().filter(|version| version["storage"] == true).count() != 1 {
        let why = "Invalid value: must have exactly one version marked as storage version";
        faults.push(("spec.versions".into(), why.into()));
    }
    for (index, version) in all.iter().enumerate() {
        let path = format!("spec.versions[{index}]");
        let name = text(version, "/name");
        if !validate::is_dns_label(name) {
            faults
                .push((format!("{path}.name"), format!("Invalid value: {name:?}: must be a DNS-1035 label")));
        }
        if all[..index].iter().any(|other| text(other, "/name") == name) {
            let why = "Invalid value: must contain unique version names";
            faults.push(("spec.versions".into(), why.into()));
        }
        schema(version, &format!("{path}.schema.openAPIV3Schema"), faults);
        columns(version, &path, faults);
        scale(version, &path, faults);
    }
}

fn schema(version: &Value, path: &str, faults: &mut Faults) {
    let Some(source) = version.pointer("/schema/openAPIV3Schema").filter(|schema| schema.is_object()) else {
        return faults.push((path.to_owned(), "Required value: schemas are required".to_owned()));
    };
    match Schema::parse(source) {
        Ok(parsed) => {
            let found = structural::check(&parsed, path);
            // Of types that make no sense nothing can be said.
            let rules = if found.is_empty() { expressions::check(&parsed, path) } else { Vec::new() };
            faults.extend(found.into_iter().chain(rules));
        }
        Err(why) => faults.push((path.to_owned(), format!("Invalid value: {why}"))),
    }
    faults.extend(structural::check_metadata(source, path));
}

fn columns(version: &Value, path: &str, faults: &mut Faults) {
    for (index, column) in items(version, "/additionalPrinterColumns").enumerate() {
        let path = format!("{path}.additionalPrinterColumns[{index}]");
        for field in ["name", "type", "jsonPath"] {
            if text(column, &format!("/{field}")).is_empty() {
                faults.push((format!("{path}.{field}"), "Required value".to_owned()));
            }
        }
        let kind = text(column, "/type");
        if !["", "integer", "number", "string", "boolean", "date"].contains(&kind) {
            let supported = "boolean,date,integer,number,string";
            faults.push((
                format!("{path}.type"),
                format!("Invalid value: {kind:?}: must be one of {supported}"),
            ));
        }
        let written = text(column, "/jsonPath");
        if let Err(why) = jsonpath::Path::parse(written)
            && !written.is_empty()
        {
            faults.push((format!("{path}.jsonPath"), format!("Invalid value: {written:?}: {why}")));
        }
    }
}

fn scale(version: &Value, path: &str, faults: &mut Faults) {
    let Some(scale) = version.pointer("/subresources/scale").filter(|scale| scale.is_object()) else {
        return;
    };
    for (field, start) in [("specReplicasPath", ".spec."), ("statusReplicasPath", ".status.")] {
        let written = text(scale, &format!("/{field}"));
        if !written.starts_with(start) {
            let why = format!(
                "Invalid value: {written:?}: should be a json path under {}",
                &start[..start.len() - 1]
            );
            faults.push((format!("{path}.subresources.scale.{field}"), why));
        }
    }
}

/// What may not change once the definition is there.
fn changes(new: &Value, old: &Value, faults: &mut Faults) {
    for pointer in ["/spec/group", "/spec/scope", "/spec/names/plural", "/spec/names/kind"] {
        if old.pointer(pointer) != new.pointer(pointer) {
            let field = pointer[1..].replace('/', ".");
            faults.push((field, format!("Invalid value: {:?}: field is immutable", text(new, pointer))));
        }
    }
    let has = |wanted: &Value| items(new, "/spec/versions").any(|version| version["name"] == *wanted);
    for (index, stored) in items(new, "/status/storedVersions").enumerate().filter(|(_, stored)| !has(stored))
    {
        let why = format!("Invalid value: {stored}: must appear in spec.versions");
        faults.push((format!("status.storedVersions[{index}]"), why));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::faults;

    fn definition() -> Value {
        json!({
            "metadata": {"name": "things.x.io"},
            "spec": {
                "group": "x.io", "scope": "Namespaced", "names": {"kind": "Thing", "plural": "things"},
                "versions": [{
                    "name": "v1", "served": true, "storage": true,
                    "schema": {"openAPIV3Schema": {"type": "object"}},
                }],
            },
        })
    }

    #[test]
    fn each_fault_is_told_at_its_field() {
        assert_eq!(faults(&definition(), None), []);
        for (pointer, value, field) in [
            ("/metadata/name", json!("thing.x.io"), "metadata.name"),
            ("/spec/group", json!("x"), "spec.group"),
            ("/spec/scope", json!("Global"), "spec.scope"),
            ("/spec/names/kind", json!(""), "spec.names.kind"),
            ("/spec/preserveUnknownFields", json!(true), "spec.preserveUnknownFields"),
            ("/spec/conversion", json!({"strategy": "Webhook"}), "spec.conversion.strategy"),
            ("/spec/versions/0/storage", json!(false), "spec.versions"),
            ("/spec/versions/0/name", json!("V 1"), "spec.versions[0].name"),
            ("/spec/versions/0/schema", json!({}), "spec.versions[0].schema.openAPIV3Schema"),
            (
                "/spec/versions/0/schema/openAPIV3Schema",
                json!({"type": "object", "properties": {"a": {}}}),
                "spec.versions[0].schema.openAPIV3Schema.properties[a].type",
            ),
            (
                "/spec/versions/0/additionalPrinterColumns",
                json!([{"name": "A", "type": "string", "jsonPath": "spec"}]),
                "spec.versions[0].additionalPrinterColumns[0].jsonPath",
            ),
            (
                "/spec/versions/0/subresources",
                json!({"scale": {"specReplicasPath": ".spec.n", "statusReplicasPath": ".n"}}),
                "spec.versions[0].subresources.scale.statusReplicasPath",
            ),
        ] {
            let mut broken = definition();
            let (parent, last) = pointer.rsplit_once('/').unwrap();
            broken.pointer_mut(parent).unwrap()[last] = value;
            let found = faults(&broken, None);
            assert!(found.iter().any(|(at, _)| at == field), "{pointer}: {found:?}");
        }
    }

    #[test]
    fn some_changes_are_refused() {
        let old = definition();
        for (pointer, value, field) in [
            ("/spec/scope", json!("Cluster"), "spec.scope"),
            ("/spec/names/kind", json!("Other"), "spec.names.kind"),
            ("/status", json!({"storedVersions": ["v0", "v1"]}), "status.storedVersions[0]"),
        ] {
            let mut new = definition();
            let (parent, last) = pointer.rsplit_once('/').unwrap();
            new.pointer_mut(parent).unwrap()[last] = value;
            let found = faults(&new, Some(&old));
            assert_eq!(found.iter().map(|(at, _)| at.as_str()).collect::<Vec<_>>(), [field]);
        }
    }
}
