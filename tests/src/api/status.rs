//! The Kubernetes `Status` object as an error: HTTP code, machine-readable reason and message for people.
//! Messages follow the wording of the real API server, since `kubectl` and client libraries show or match it.

use serde_json::{Value, json};

/// A refusal, as a Kubernetes client sees it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Status {
    /// HTTP status code.
    pub code: u16,
    /// Reason such as `NotFound`, from `metav1.StatusReason`.
    pub reason: &'static str,
    /// What is wrong, for people.
    pub message: String,
    /// `details` of the Status object, or null.
    pub details: Value,
}

impl Status {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), details: Value::Null }
    }

    fn about(mut self, resource: &str, group: &str, name: &str) -> Self {
        self.details = json!({"name": name, "group": group, "kind": resource});
        self
    }

    /// 404: no object of this name. `resource` is the plural, `group` empty for the core group.
    pub fn not_found(resource: &str, group: &str, name: &str) -> Self {
        let message = format!("{} \"{name}\" not found", qualified(resource, group));
        Self::new(404, "NotFound", message).about(resource, group, name)
    }

    /// 404: the path names no known resource.
    pub fn unknown_path() -> Self {
        Self::new(404, "NotFound", "the server could not find the requested resource")
    }

    /// 409: an object of this name is there already.
    pub fn already_exists(resource: &str, group: &str, name: &str) -> Self {
        let message = format!("{} \"{name}\" already exists", qualified(resource, group));
        Self::new(409, "AlreadyExists", message).about(resource, group, name)
    }

    /// 409: the object changed meanwhile, or a precondition does not hold.
    pub fn conflict(resource: &str, group: &str, name: &str, why: &str) -> Self {
        let message =
            format!("Operation cannot be fulfilled on {} \"{name}\": {why}", qualified(resource, group));
        Self::new(409, "Conflict", message).about(resource, group, name)
    }

    /// 409: server-side apply would change fields of other managers; a cause for each.
    pub fn apply_conflict(message: String, causes: Vec<Value>) -> Self {
        let mut status = Self::new(409, "Conflict", message);
        status.details = json!({"causes": causes});
        status
    }

    /// 422: the object breaks rules; each cause is (field path, what is wrong with it).
    pub fn invalid(kind: &str, group: &str, name: &str, causes: &[(String, String)]) -> Self {
        let told: Vec<String> = causes.iter().map(|(field, why)| format!("{field}: {why}")).collect();
        let told = if told.len() == 1 { told.concat() } else { format!("[{}]", told.join(", ")) };
        let subject = if group.is_empty() { kind.to_owned() } else { format!("{kind}.{group}") };
        let mut status = Self::new(422, "Invalid", format!("{subject} \"{name}\" is invalid: {told}"));
        let causes: Vec<Value> = causes
            .iter()
            .map(|(field, why)| json!({"reason": cause(why), "message": why, "field": field}))
            .collect();
        status.details = json!({"name": name, "group": group, "kind": kind, "causes": causes});
        status
    }

    /// 400: the request cannot be understood.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    /// 401: no or a wrong credential.
    pub fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized")
    }

    /// 403 with the whole message given.
    pub fn forbidden(resource: &str, group: &str, name: &str, why: &str) -> Self {
        let subject = if name.is_empty() {
            qualified(resource, group)
        } else {
            format!("{} \"{name}\"", qualified(resource, group))
        };
        Self::new(403, "Forbidden", format!("{subject} is forbidden: {why}")).about(resource, group, name)
    }

    /// 403: nothing can be made in a namespace that is going away. Controllers look for the cause.
    pub fn terminating(resource: &str, group: &str, name: &str, namespace: &str) -> Self {
        let why =
            format!("unable to create new content in namespace {namespace} because it is being terminated");
        let mut status = Self::forbidden(resource, group, name, &why);
        status.details["causes"] = json!([{
            "reason": "NamespaceTerminating", "message": format!("namespace {namespace} is being terminated"),
            "field": "metadata.namespace",
        }]);
        status
    }

    /// 403 for a path outside the resources.
    pub fn forbidden_path(user: &str, verb: &str, path: &str) -> Self {
        let why = format!("forbidden: User \"{user}\" cannot {verb} path \"{path}\"");
        Self::new(403, "Forbidden", why)
    }

    /// 405: the resource has no such verb.
    pub fn method_not_allowed() -> Self {
        let message = "the server does not allow this method on the requested resource";
        Self::new(405, "MethodNotAllowed", message)
    }

    /// 410: the version asked for is no longer in the history.
    pub fn gone(asked: u64, oldest: u64) -> Self {
        Self::new(410, "Expired", format!("too old resource version: {asked} ({oldest})"))
    }

    /// 410: a list was to go on at a version that is no longer in the history.
    pub fn page_expired() -> Self {
        let message = "The provided continue parameter is too old to display a consistent list result. You can start \
                       a new list without the continue parameter.";
        Self::new(410, "Expired", message)
    }

    /// 413: the body is too large.
    pub fn too_large(limit: usize) -> Self {
        Self::new(413, "RequestEntityTooLarge", format!("the request body is larger than {limit} bytes"))
    }

    /// 415: the body's type is not one this server reads.
    pub fn unsupported_media(got: &str, supported: &str) -> Self {
        let message = format!(
            "the body of the request was in an unknown format - accepted media types include: {supported}, got {got}"
        );
        Self::new(415, "UnsupportedMediaType", message)
    }

    /// 415 for a protobuf body that could not be decoded.
    pub fn protobuf(why: &str) -> Self {
        let message = format!(
            "{why}: send JSON, for example with `kubectl create … --dry-run=client -o yaml | kubectl apply -f -`"
        );
        Self::new(415, "UnsupportedMediaType", message)
    }

    /// 500: the server is at fault.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(500, "InternalError", message)
    }

    /// 501: real servers do this, the lab's does not.
    pub fn not_supported(what: &str) -> Self {
        Self::new(501, "NotImplemented", format!("{what} is not supported by the lab's API server"))
    }

    /// 503 or another code chosen by the test that rehearses an outage.
    pub fn unavailable(code: u16) -> Self {
        Self::new(code, "ServiceUnavailable", "the API server is unavailable, as the lab was told to make it")
    }

    /// Whether the object asked for does not exist.
    pub fn is_not_found(&self) -> bool {
        self.code == 404
    }

    /// Whether the object changed meanwhile (not: exists already).
    pub fn is_conflict(&self) -> bool {
        self.reason == "Conflict"
    }

    /// Whether an object of this name is there already.
    pub fn is_already_exists(&self) -> bool {
        self.reason == "AlreadyExists"
    }

    /// The object sent to clients.
    pub fn to_json(&self) -> Value {
        let mut object = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "code": self.code,
        });
        if !self.details.is_null() {
            object["details"] = self.details.clone();
        }
        object
    }
}

/// The machine-readable reason (`metav1.CauseType`) of a fault, which its words start with.
fn cause(why: &str) -> &'static str {
    match why.split(':').next().unwrap_or_default() {
        "Required value" => "FieldValueRequired",
        "Duplicate value" => "FieldValueDuplicate",
        "Unsupported value" => "FieldValueNotSupported",
        "Forbidden" => "FieldValueForbidden",
        "Not found" => "FieldValueNotFound",
        "Too long" => "FieldValueTooLong",
        "Too many" => "FieldValueTooMany",
        _ => "FieldValueInvalid",
    }
}

/// `deployments.apps`, or `pods` in the core group.
fn qualified(resource: &str, group: &str) -> String {
    if group.is_empty() { resource.to_owned() } else { format!("{resource}.{group}") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::Status;

    #[test]
    fn causes_have_reasons() {
        let faults =
            ["Required value", "Required value: why", "Invalid value: 1: why", "Too many: 3: at most 2"];
        let faults = faults.map(|why| ("f".to_owned(), why.to_owned()));
        let status = Status::invalid("Pod", "", "p", &faults).to_json();
        let reasons: Vec<_> =
            status["details"]["causes"].as_array().unwrap().iter().map(|cause| &cause["reason"]).collect();
        let (required, invalid) = (json!("FieldValueRequired"), json!("FieldValueInvalid"));
        assert_eq!(reasons, [&required, &required, &invalid, &json!("FieldValueTooMany")]);
    }
}
