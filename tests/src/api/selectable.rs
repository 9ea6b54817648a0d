//! The fields that objects can be selected by: few, and by kind. Pure.
//! Reference: `AddFieldLabelConversionFunc` in `k8s.io/kubernetes/pkg/apis/*/v1/conversion.go`; kubernetes.io, "Field
//! Selectors".

use super::convert::EVENTS;
use super::events;
use super::kinds::Kind;
use super::select::Selector;
use super::status::Status;

impl Selector {
    /// The selector for stored objects of a kind, or 400 if they cannot be selected by one of its fields.
    pub(super) fn of_kind(mut self, kind: &Kind) -> Result<Self, Status> {
        for field in &mut self.fields {
            // Events are stored as the core group has them.
            if kind.group == EVENTS {
                field.path = events::path_in_core(&field.path);
            }
            let common = ["metadata.name", "metadata.namespace"].contains(&field.path.as_str());
            if !common && !kind.selectable.contains(&field.path) && !is_known(kind, &field.path) {
                return Err(Status::bad_request(format!("field label not supported: {}", field.path)));
            }
        }
        Ok(self)
    }
}

fn is_known(kind: &Kind, path: &str) -> bool {
    let known = match (kind.group.as_str(), kind.kind.as_str()) {
        ("", "Pod") => {
            "spec.nodeName spec.restartPolicy spec.schedulerName spec.serviceAccountName spec.hostNetwork status.phase \
             status.podIP status.nominatedNodeName"
        }
        ("", "Node") => "spec.unschedulable",
        ("", "Namespace") => "status.phase",
        ("", "Secret") => "type",
        ("", "Service") => "spec.clusterIP spec.type",
        ("" | EVENTS, "Event") => {
            "involvedObject.kind involvedObject.namespace involvedObject.name involvedObject.uid \
             involvedObject.apiVersion involvedObject.resourceVersion involvedObject.fieldPath reason \
             reportingComponent source type"
        }
        ("apps", "ReplicaSet") => "status.replicas",
        ("batch", "Job") => "status.successful",
        _ => "",
    };
    known.split_whitespace().any(|known| known == path)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::api::kinds::Kinds;
    use crate::api::select::Selector;

    #[test]
    fn each_kind_has_its_fields() {
        let kinds = Kinds::new();
        for (kind, selector, expect) in [
            ("pods", "spec.nodeName=a,status.phase!=Failed", true),
            ("pods", "metadata.name=a,metadata.namespace=b", true),
            ("pods", "spec.priority=1", false),
            ("configmaps", "metadata.name=a", true),
            ("configmaps", "data.a=b", false),
            ("nodes", "spec.unschedulable=false", true),
            ("nodes", "spec.nodeName=a", false),
            ("secrets", "type=Opaque", true),
            ("events", "involvedObject.uid=a", true),
            ("events", "regarding.uid=a", false),
            ("events.events.k8s.io", "regarding.uid=a", true),
        ] {
            let kind = kinds.named(kind).unwrap();
            let found = Selector::fields(selector).unwrap().of_kind(&kind);
            assert_eq!(found.is_ok(), expect, "{} {selector}", kind.kind);
            assert!(found.is_ok() || found.unwrap_err().message.starts_with("field label not supported: "));
        }
    }

    #[test]
    fn events_are_found_by_the_names_of_either_group() {
        let event = json!({"involvedObject": {"name": "p"}, "reportingComponent": "c"});
        let kind = Kinds::new().named("events.events.k8s.io").unwrap();
        let selector = Selector::fields("regarding.name=p,reportingController=c").unwrap();
        assert!(!selector.matches(&event));
        assert!(selector.of_kind(&kind).unwrap().matches(&event));
    }
}
