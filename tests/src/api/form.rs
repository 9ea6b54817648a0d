//! In which form a client wants objects: whole, as rows of a table, or their metadata alone. Pure.
//! Reference: kubernetes.io, "Kubernetes API Concepts", "Alternate representations of resources".

use serde_json::{Value, json};

use super::kinds::Kind;
use super::table::{self, Include};

const META: &str = "meta.k8s.io/v1";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Whole,
    Table(Include),
    Metadata,
}

impl Form {
    /// The first of the forms in an `Accept` header that there is here; `include` is the parameter `includeObject`.
    pub(super) fn parse(accept: &str, include: &str) -> Self {
        let known = accept.split(',').find_map(|range| {
            let mut parameters = range.split(';').map(str::trim);
            let json = ["application/json", "application/*", "*/*"].contains(&parameters.next()?);
            let value = |name: &str| parameters.clone().find_map(|given| given.strip_prefix(name));
            let of_meta = value("g=") == Some("meta.k8s.io") && value("v=") == Some("v1");
            match value("as=") {
                _ if !json => None,
                None => Some(Self::Whole),
                Some("Table") if of_meta => Some(Self::Table(Include::parse(include))),
                Some("PartialObjectMetadata" | "PartialObjectMetadataList") if of_meta => {
                    Some(Self::Metadata)
                }
                Some(_) => None,
            }
        });
        known.unwrap_or(Self::Whole)
    }

    /// One object in this form.
    pub(super) fn one(self, kind: &Kind, object: Value) -> Value {
        match self {
            Self::Whole => object,
            Self::Table(include) => {
                let metadata = json!({"resourceVersion": object["metadata"]["resourceVersion"]});
                table::table(kind, &[object], &metadata, include)
            }
            Self::Metadata => partial(&object),
        }
    }

    /// A list of objects in this form, with the list's own metadata.
    pub(super) fn list(self, kind: &Kind, objects: Vec<Value>, metadata: &Value) -> Value {
        let list = |version: &str, kind: &str, items: Vec<Value>| {
            let kind = format!("{kind}List");
            json!({"kind": kind, "apiVersion": version, "metadata": metadata, "items": items})
        };
        match self {
            Self::Whole => list(&kind.api_version(), &kind.kind, objects),
            Self::Table(include) => table::table(kind, &objects, metadata, include),
            Self::Metadata => list(META, "PartialObjectMetadata", objects.iter().map(partial).collect()),
        }
    }
}

/// An object without all but its metadata.
pub(super) fn partial(object: &Value) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": META, "metadata": object["metadata"]})
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::Form;
    use crate::api::kinds::Kinds;
    use crate::api::table::Include;

    #[test]
    fn the_first_form_that_is_known() {
        let table = Form::Table(Include::None);
        for (accept, expect) in [
            ("application/json;as=Table;v=v1;g=meta.k8s.io,application/json", table),
            ("application/json; as=Table; g=meta.k8s.io; v=v1", table),
            ("application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json", Form::Whole),
            ("application/vnd.kubernetes.protobuf,application/json", Form::Whole),
            ("application/vnd.kubernetes.protobuf;as=Table;v=v1;g=meta.k8s.io", Form::Whole),
            ("application/json,application/json;as=Table;v=v1;g=meta.k8s.io", Form::Whole),
            ("application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1", Form::Metadata),
            ("application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1", Form::Metadata),
            ("application/json;as=PartialObjectMetadata;g=other.io;v=v1", Form::Whole),
            ("", Form::Whole),
        ] {
            assert_eq!(Form::parse(accept, "None"), expect, "{accept}");
        }
    }

    #[test]
    fn metadata_alone() {
        let kind = Kinds::new().named("pods").unwrap();
        let pod = json!({"kind": "Pod", "metadata": {"name": "a"}, "spec": {}});
        let expect = json!({
            "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": {"name": "a"},
        });
        assert_eq!(Form::Metadata.one(&kind, pod.clone()), expect);
        let list = Form::Metadata.list(&kind, vec![pod], &json!({"resourceVersion": "7"}));
        assert_eq!(
            list,
            json!({
                "kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1",
                "metadata": {"resourceVersion": "7"}, "items": [expect],
            })
        );
    }
}
