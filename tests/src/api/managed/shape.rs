//! What a value is for ownership: one thing that has one owner, or parts that have owners of their own. Pure.
//! For custom resources the schema tells; for built-in kinds the names of a field and of what it is in do. Sources: the
//! `+listType`, `+listMapKey`, `+structType` and `+mapType` markers of `k8s.io/api`.

use serde_json::{Map, Value};

use super::super::structure::{ListType, MapType, Schema};

/// Where in an object a value is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Shape<'a> {
    /// In a built-in kind: the field, and the field that it is in.
    Known {
        field: &'a str,
        parent: &'a str,
    },
    /// A whole custom resource.
    Resource(&'a Schema),
    Schema(&'a Schema),
    /// Where the schema says nothing: objects have parts, lists have none.
    Open,
}

/// How a value is owned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// As one.
    Whole,
    /// Field by field.
    Fields,
    /// Item by item: the element that names each item of the list.
    Items(Vec<String>),
}

impl<'a> Shape<'a> {
    /// A whole object of a kind with this schema, or of a built-in kind.
    pub(super) fn of(schema: Option<&'a Schema>) -> Self {
        schema.map_or(Self::Known { field: "", parent: "" }, Self::Resource)
    }

    pub(super) fn field<'b>(self, name: &'b str) -> Shape<'b>
    where
        'a: 'b,
    {
        match self {
            Self::Known { field, .. } => Shape::Known { field: name, parent: field },
            Self::Resource(_) if ["apiVersion", "kind", "metadata"].contains(&name) => {
                Shape::Known { field: name, parent: "" }
            }
            Self::Resource(schema) | Self::Schema(schema) => {
                schema.property(name).map_or(Shape::Open, Shape::Schema)
            }
            Self::Open => Shape::Open,
        }
    }

    pub(super) fn item(self) -> Self {
        match self {
            Self::Schema(schema) => schema.items.as_deref().map_or(Self::Open, Self::Schema),
            other => other,
        }
    }

    pub(super) fn form(self, value: &Value) -> Form {
        match value {
            Value::Object(_) if self.is_atomic() => Form::Whole,
            Value::Object(_) => Form::Fields,
            Value::Array(items) => {
                let list = self.list();
                let named: Option<Vec<String>> = items.iter().map(|item| list.element(item)).collect();
                match (list, named) {
                    (List::Whole, _) | (_, None) => Form::Whole,
                    (_, Some(named)) => Form::Items(named),
                }
            }
            _ => Form::Whole,
        }
    }

    /// Whether every object of the kind has this, if only empty, so that nobody put it there. A scalar, such as the
    /// entry `status` of a ConfigMap, is somebody's whatever its name.
    pub(super) fn is_given(self, value: &Value) -> bool {
        const GIVEN: [&str; 8] =
            ["", "metadata", "spec", "status", "strategy", "template", "updateStrategy", "jobTemplate"];
        match self {
            Self::Known { field, .. } => match value {
                Value::Object(_) => GIVEN.contains(&field),
                Value::Array(_) => field == "containers",
                _ => false,
            },
            Self::Resource(_) => true,
            Self::Schema(_) | Self::Open => false,
        }
    }

    fn is_atomic(self) -> bool {
        match self {
            Self::Known { field, parent } => is_atomic_struct(field, parent),
            Self::Schema(schema) => schema.map_type == MapType::Atomic,
            Self::Resource(_) | Self::Open => false,
        }
    }

    fn list(self) -> List {
        let by = |keys: &[&str]| List::By(keys.iter().map(|key| ((*key).to_owned(), None)).collect());
        match self {
            Self::Known { field, parent } => match known_keys(field, parent) {
                [] if is_known_set(field, parent) => List::Set,
                [] => List::Whole,
                [port, "protocol"] => {
                    List::By(vec![((*port).to_owned(), None), ("protocol".to_owned(), Some("TCP".into()))])
                }
                keys => by(keys),
            },
            Self::Schema(schema) => match schema.list_type {
                ListType::Atomic => List::Whole,
                ListType::Set => List::Set,
                ListType::Map => {
                    let items = schema.items.as_deref();
                    let default = |key: &String| items?.properties.get(key)?.default.clone();
                    List::By(schema.list_map_keys.iter().map(|key| (key.clone(), default(key))).collect())
                }
            },
            Self::Resource(_) | Self::Open => List::Whole,
        }
    }
}

/// How a list's items are told apart.
enum List {
    /// They are not.
    Whole,
    /// By what they are.
    Set,
    /// By these fields, or their defaults.
    By(Vec<(String, Option<Value>)>),
}

impl List {
    /// The name of an item within its list; none if it has no key.
    fn element(&self, item: &Value) -> Option<String> {
        match self {
            Self::Whole => None,
            Self::Set => Some(format!("v:{item}")),
            Self::By(keys) => {
                let part = |(key, default): &(String, Option<Value>)| {
                    let value = item.get(key).filter(|value| !value.is_null()).cloned();
                    Some((key.clone(), value.or_else(|| default.clone())?))
                };
                let parts: Map<String, Value> = keys.iter().filter_map(part).collect();
                (!parts.is_empty()).then(|| format!("k:{}", Value::from(parts)))
            }
        }
    }
}

fn is_known_set(field: &str, parent: &str) -> bool {
    matches!((field, parent), ("finalizers", "metadata") | ("podCIDRs", "spec"))
}

/// The keys of a built-in kind's list; none if its items have none.
fn known_keys(field: &str, parent: &str) -> &'static [&'static str] {
    match (field, parent) {
        ("ownerReferences", "metadata") => &["uid"],
        ("containers" | "initContainers" | "ephemeralContainers", "spec") => &["name"],
        ("volumes" | "imagePullSecrets" | "schedulingGates" | "resourceClaims", "spec") => &["name"],
        ("env", _) | ("claims", "resources") | ("secrets", "") => &["name"],
        ("x-kubernetes-validations", _) => &["rule"],
        ("volumeMounts", _) => &["mountPath"],
        ("volumeDevices", _) => &["devicePath"],
        ("hostAliases", "spec") | ("podIPs" | "hostIPs", "status") => &["ip"],
        ("topologySpreadConstraints", "spec") => &["topologyKey", "whenUnsatisfiable"],
        ("ports", "containers" | "initContainers" | "ephemeralContainers") => &["containerPort", "protocol"],
        ("ports", "spec") => &["port", "protocol"],
        ("conditions" | "addresses", "status") => &["type"],
        _ => &[],
    }
}

/// Whether an object of a built-in kind has one owner: a selector of any sort, a reference to something else.
fn is_atomic_struct(field: &str, parent: &str) -> bool {
    matches!(
        (field, parent),
        ("selector" | "labelSelector" | "namespaceSelector" | "podSelector" | "nodeSelector", _)
            | ("requiredDuringSchedulingIgnoredDuringExecution", "nodeAffinity")
            | ("configMapKeyRef" | "secretKeyRef" | "fileKeyRef" | "fieldRef" | "resourceFieldRef", _)
            | ("secretRef" | "nodePublishSecretRef" | "roleRef", _)
            | ("involvedObject" | "regarding" | "related" | "targetRef", _)
            | ("ownerReferences", "metadata")
            | ("imagePullSecrets", "spec")
            | ("secrets", "")
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::Shape;
    use crate::api::managed::compare::{compare, named};

    /// The fields that a write of `value` to a built-in kind makes somebody's.
    fn check(value: &serde_json::Value, expect: &[&str]) {
        assert_eq!(named(Shape::of(None), value).paths(), expect, "{value}");
    }

    #[test]
    fn some_objects_have_one_owner() {
        let selector = json!({"matchLabels": {"a": "b"}, "matchExpressions": []});
        check(
            &json!({"spec": {"podSelector": selector, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": {}}]}]}}),
            &[".spec.ingress", ".spec.podSelector", ".spec.policyTypes"],
        );
        check(&json!({"spec": {"selector": {"app": "a"}}}), &[".spec.selector"]);
        check(&json!({"roleRef": {"kind": "Role", "name": "a"}}), &[".roleRef"]);
        check(
            &json!({"metadata": {"ownerReferences": [{"uid": "u", "name": "n"}]}}),
            &[".metadata.ownerReferences[uid=\"u\"]"],
        );
        check(
            &json!({"spec": {
                "nodeSelector": {"a": "b"},
                "affinity": {
                    "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}},
                    "podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": "k"}]},
                },
            }}),
            &[
                ".spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution",
                ".spec.affinity.podAffinity.requiredDuringSchedulingIgnoredDuringExecution",
                ".spec.nodeSelector",
            ],
        );
        check(
            &json!({"endpoints": [{"addresses": ["a"]}], "ports": [{"port": 1}]}),
            &[".endpoints", ".ports"],
        );
    }

    #[test]
    fn an_entry_may_have_any_name() {
        let names = json!({"data": {"spec": "x", "status": "x", "template": "x", "metadata": "x"}});
        let changes = compare(Shape::of(None), &json!({"data": {}}), &names);
        assert_eq!(
            changes.changed.paths(),
            [".data.metadata", ".data.spec", ".data.status", ".data.template"]
        );
        let changes = compare(Shape::of(None), &names, &json!({"data": {}}));
        assert_eq!(
            changes.removed.paths(),
            [".data.metadata", ".data.spec", ".data.status", ".data.template"]
        );
    }
}
