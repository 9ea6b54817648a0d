//! Types of fields: an object of a built-in kind is decoded as its k8s-openapi type and encoded again. What does
//! not decode is refused; what is lost on the way is a field that the kind does not have, and is dropped.
//! For custom resources the definition's schema says which fields there are.

use k8s_openapi::schemars::JsonSchema;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::kinds::Kind;
use super::status::Status;
use super::structure::below;
use super::types::{self, Visit};

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
    } else if let Some(decoded) = types::of(kind, RoundTrip(object)) {
        drop_lost(object, &decoded.map_err(wrong)?, "", &mut unknown);
    }
    if !strict || unknown.is_empty() {
        return Ok(());
    }
    unknown.sort();
    let told: Vec<String> = unknown.iter().map(|field| format!("unknown field \"{field}\"")).collect();
    Err(wrong(format!("strict decoding error: {}", told.join(", "))))
}

/// The object as its type sees it.
struct RoundTrip<'a>(&'a Value);

impl Visit for RoundTrip<'_> {
    type Output = Result<Value, String>;
    fn visit<T: DeserializeOwned + Serialize + JsonSchema>(self) -> Self::Output {
        let typed = T::deserialize(self.0).map_err(|error| error.to_string())?;
        serde_json::to_value(typed).map_err(|error| error.to_string())
    }
}

/// Drops fields of `given` that `decoded` does not have, and lists their paths; what has two forms gets its own. Null and absent are the same.
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
        // A quantity may be given as a number, and is a text.
        (given @ Value::Number(_), Value::String(_)) => given.clone_from(decoded),
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
        let mut cpu = pod.clone();
        check(&Kinds::new().of_object(&pod).unwrap(), &mut cpu, false).unwrap();
        assert_eq!(cpu["spec"]["containers"][0]["resources"]["limits"]["cpu"], "1");
        let mut lenient = pod.clone();
        check(&Kinds::new().of_object(&pod).unwrap(), &mut lenient, false).unwrap();
        assert_eq!(lenient["spec"]["containers"][0].get("imagee"), None);
        pod["spec"]["containers"][0]["ports"] = json!("80");
        assert!(refusal(&pod).contains("cannot be handled as a Pod"), "{}", refusal(&pod));
        pod["metadata"] = json!("a");
        assert!(refusal(&pod).contains("metadata"), "{}", refusal(&pod));
    }
}
