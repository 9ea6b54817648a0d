//! Sets of fields as `FieldsV1` writes them: a tree of `f:name`, `k:{"key":"value"}` and `v:"item"`, where `.` stands
//! for the node itself. Pure. Reference: `sigs.k8s.io/structured-merge-diff/fieldpath`.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

/// A set of fields at and below one node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Fields {
    pub(super) owned: bool,
    pub(super) below: BTreeMap<String, Fields>,
}

impl Fields {
    /// Reads `fieldsV1`.
    pub(super) fn parse(fields: &Value) -> Self {
        let mut read = Self::default();
        for (element, below) in fields.as_object().into_iter().flatten() {
            if element == "." {
                read.owned = true;
            } else {
                let mut below = Self::parse(below);
                below.owned |= below.below.is_empty();
                read.below.insert(element.clone(), below);
            }
        }
        read
    }

    /// Writes `fieldsV1`.
    pub(super) fn to_json(&self) -> Value {
        let mut written = Map::new();
        for (element, below) in self.below.iter().filter(|(_, below)| !below.is_empty()) {
            let mut value = below.to_json();
            if below.owned && !below.below.is_empty() {
                value["."] = json!({});
            }
            written.insert(element.clone(), value);
        }
        written.into()
    }

    pub(super) fn is_empty(&self) -> bool {
        !self.owned && self.below.values().all(Self::is_empty)
    }

    /// Adds the node at `path`.
    pub(super) fn insert(&mut self, path: &[String]) {
        let node = path.iter().fold(self, |node, element| node.below.entry(element.clone()).or_default());
        node.owned = true;
    }

    pub(super) fn child(&self, element: &str) -> Option<&Self> {
        self.below.get(element)
    }

    /// What is in either.
    pub(super) fn union(&self, other: &Self) -> Self {
        let mut all = self.clone();
        all.owned |= other.owned;
        for (element, theirs) in &other.below {
            let ours = all.below.entry(element.clone()).or_default();
            *ours = ours.union(theirs);
        }
        all
    }

    /// What is in this set and not in the other.
    pub(super) fn without(&self, other: &Self) -> Self {
        self.filtered(other, |ours, theirs| ours && !theirs)
    }

    /// What is in both.
    pub(super) fn intersection(&self, other: &Self) -> Self {
        self.filtered(other, |ours, theirs| ours && theirs)
    }

    fn filtered(&self, other: &Self, keep: fn(bool, bool) -> bool) -> Self {
        let none = Self::default();
        let below = self.below.iter().map(|(element, ours)| {
            (element.clone(), ours.filtered(other.child(element).unwrap_or(&none), keep))
        });
        let below = below.filter(|(_, fields)| !fields.is_empty()).collect();
        Self { owned: keep(self.owned, other.owned), below }
    }

    /// Each field of the set as people read it: `.spec.containers[name="web"].image`.
    pub(super) fn paths(&self) -> Vec<String> {
        let mut paths = Vec::new();
        self.list("", &mut paths);
        paths
    }

    fn list(&self, path: &str, paths: &mut Vec<String>) {
        if self.owned {
            paths.push(path.to_owned());
        }
        for (element, below) in &self.below {
            below.list(&format!("{path}{}", readable(element)), paths);
        }
    }
}

fn readable(element: &str) -> String {
    let (kind, rest) = element.split_once(':').unwrap_or(("f", element));
    match kind {
        "k" => {
            let keys: Map<String, Value> = serde_json::from_str(rest).unwrap_or_default();
            let keys: Vec<String> = keys.iter().map(|(key, value)| format!("{key}={value}")).collect();
            format!("[{}]", keys.join(","))
        }
        "v" => format!("[={rest}]"),
        "i" => format!("[{rest}]"),
        _ => format!(".{rest}"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::Fields;

    #[test]
    fn written_as_read() {
        let written = json!({
            "f:metadata": {"f:labels": {".": {}, "f:a": {}}, "f:finalizers": {"v:\"x\"": {}}},
            "f:spec": {"f:containers": {"k:{\"name\":\"c\"}": {".": {}, "f:image": {}}}, "f:replicas": {}},
        });
        let fields = Fields::parse(&written);
        assert_eq!(fields.to_json(), written);
        assert_eq!(
            fields.paths(),
            [
                ".metadata.finalizers[=\"x\"]",
                ".metadata.labels",
                ".metadata.labels.a",
                ".spec.containers[name=\"c\"]",
                ".spec.containers[name=\"c\"].image",
                ".spec.replicas",
            ]
        );
    }

    #[test]
    fn algebra() {
        let a = Fields::parse(&json!({"f:x": {".": {}, "f:y": {}}, "f:z": {}}));
        let b = Fields::parse(&json!({"f:x": {"f:y": {}}, "f:w": {}}));
        assert_eq!(a.union(&b).paths(), [".w", ".x", ".x.y", ".z"]);
        assert_eq!(a.without(&b).paths(), [".x", ".z"]);
        assert_eq!(a.intersection(&b).paths(), [".x.y"]);
        assert!(a.without(&a).is_empty() && !a.is_empty());
    }
}
