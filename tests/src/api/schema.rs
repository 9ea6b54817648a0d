//! Types of fields: an object of a built-in kind is decoded as its k8s-openapi type and encoded again. What does
//! not decode is refused; what is lost on the way is a field that the kind does not have, and is dropped.
//! For custom resources the definition's schema says which fields there are.

use k8s_openapi::api;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::kinds::Kind;
use super::status::Status;
use super::structure::below;

/// Refuses an object with fields of wrong types. Unknown fields are dropped, or refused if `strict`.
pub(super) fn check(kind: &Kind, object: &mut Value, strict: bool) -> Result<(), Status> {
    let wrong = |why: String| {
        Status::bad_request(format!(
            "{} in version \"{}\" cannot be handled as a {}: {why}",
            kind.kind, kind.version, kind.kind
        ))
    };
    if !object["metadata"].is_object() && !object["metadata"].is_null() {
        return Err(wrong("metadata is no object".to_owned()));
    }
    let mut unknown = Vec::new();
    if let Some(custom) = &kind.custom {
        unknown = custom.prune(object).map_err(wrong)?;
    } else if let Some(decoded) = round_trip(kind, object) {
        drop_lost(object, &decoded.map_err(wrong)?, "", &mut unknown);
    }
    if !strict || unknown.is_empty() {
        return Ok(());
    }
    unknown.sort();
    let told: Vec<String> = unknown.iter().map(|field| format!("unknown field \"{field}\"")).collect();
    Err(wrong(format!("strict decoding error: {}", told.join(", "))))
}

/// The object as its type sees it; none when the kind has no type.
fn round_trip(kind: &Kind, object: &Value) -> Option<Result<Value, String>> {
    Some(match (kind.group.as_str(), kind.kind.as_str()) {
        ("", "Namespace") => again::<api::core::v1::Namespace>(object),
        ("", "Node") => again::<api::core::v1::Node>(object),
        ("", "Pod") => again::<api::core::v1::Pod>(object),
        ("", "Service") => again::<api::core::v1::Service>(object),
        ("", "Endpoints") => again::<api::core::v1::Endpoints>(object),
        ("", "ServiceAccount") => again::<api::core::v1::ServiceAccount>(object),
        ("", "Secret") => again::<api::core::v1::Secret>(object),
        ("", "ConfigMap") => again::<api::core::v1::ConfigMap>(object),
        ("", "Event") => again::<api::core::v1::Event>(object),
        ("events.k8s.io", "Event") => again::<api::events::v1::Event>(object),
        (_, "EndpointSlice") => again::<api::discovery::v1::EndpointSlice>(object),
        (_, "NetworkPolicy") => again::<api::networking::v1::NetworkPolicy>(object),
        (_, "Deployment") => again::<api::apps::v1::Deployment>(object),
        (_, "ReplicaSet") => again::<api::apps::v1::ReplicaSet>(object),
        (_, "DaemonSet") => again::<api::apps::v1::DaemonSet>(object),
        (_, "Job") => again::<api::batch::v1::Job>(object),
        (_, "CronJob") => again::<api::batch::v1::CronJob>(object),
        (_, "Role") => again::<api::rbac::v1::Role>(object),
        (_, "RoleBinding") => again::<api::rbac::v1::RoleBinding>(object),
        (_, "ClusterRole") => again::<api::rbac::v1::ClusterRole>(object),
        (_, "ClusterRoleBinding") => again::<api::rbac::v1::ClusterRoleBinding>(object),
        (_, "Lease") => again::<api::coordination::v1::Lease>(object),
        (_, "CustomResourceDefinition") => again::<apiextensions::v1::CustomResourceDefinition>(object),
        _ => return None,
    })
}

fn again<T: DeserializeOwned + Serialize>(object: &Value) -> Result<Value, String> {
    let typed = T::deserialize(object).map_err(|error| error.to_string())?;
    serde_json::to_value(typed).map_err(|error| error.to_string())
}

/// Drops fields of `given` that `decoded` does not have, and lists their paths. Null and absent are the same.
fn drop_lost(given: &mut Value, decoded: &Value, path: &str, lost: &mut Vec<String>) {
    match (given, decoded) {
        (Value::Object(given), Value::Object(decoded)) => given.retain(|key, value| {
            let below = below(path, key);
            match decoded.get(key) {
                Some(kept) => drop_lost(value, kept, &below, lost),
                None if value.is_null() => {}
                None => {
                    lost.push(below);
                    return false;
                }
            }
            true
        }),
        (Value::Array(given), Value::Array(decoded)) => {
            for (index, (value, kept)) in given.iter_mut().zip(decoded).enumerate() {
                drop_lost(value, kept, &format!("{path}[{index}]"), lost);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::check;
    use crate::api::kinds::Kinds;

    fn refusal(object: &Value) -> String {
        let kind = Kinds::new().of_object(object).unwrap();
        check(&kind, &mut object.clone(), true).map_or_else(|status| status.message, |()| String::new())
    }

    #[test]
    fn unknown_and_mistyped_fields_are_told() {
        let mut pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "creationTimestamp": null},
            "spec": {"containers": [{
                "name": "c", "image": "i", "resources": {"limits": {"cpu": 1}},
                "ports": [{"containerPort": 80}],
                "livenessProbe": {"httpGet": {"port": "http"}},
            }]},
            "status": {},
        });
        assert_eq!(refusal(&pod), "");
        pod["spec"]["containers"][0]["imagee"] = "x".into();
        assert!(refusal(&pod).contains("unknown field \"spec.containers[0].imagee\""), "{}", refusal(&pod));
        let mut lenient = pod.clone();
        check(&Kinds::new().of_object(&pod).unwrap(), &mut lenient, false).unwrap();
        assert_eq!(lenient["spec"]["containers"][0].get("imagee"), None);
        pod["spec"]["containers"][0]["ports"] = json!("80");
        assert!(refusal(&pod).contains("cannot be handled as a Pod"), "{}", refusal(&pod));
        pod["metadata"] = json!("a");
        assert!(refusal(&pod).contains("metadata"), "{}", refusal(&pod));
    }
}
