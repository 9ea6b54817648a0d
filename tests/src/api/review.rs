//! Requests that are questions: TokenRequest, TokenReview, access reviews. Nothing is stored; the answer is the
//! object sent, with its status filled in.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::cluster::Cluster;
use super::kinds::Kind;
use super::meta::{items, map, text};
use super::rbac::Attributes;
use super::status::Status;
use super::token::{API_AUDIENCE, Grant, Tokens, User};

/// Least lifetime of a requested token in seconds, as in the real server.
const LEAST_LIFETIME: u64 = 600;

/// `POST …/serviceaccounts/<account>/token`.
pub(super) fn token_request(
    cluster: &Cluster,
    tokens: &Tokens,
    namespace: &str,
    account: &str,
    mut request: Value,
) -> Result<Value, Status> {
    let seconds = request.pointer("/spec/expirationSeconds").and_then(Value::as_u64).unwrap_or(3600);
    if seconds < LEAST_LIFETIME {
        let why = format!("Invalid value: {seconds}: may not specify a duration less than 10 minutes");
        let causes = [("spec.expirationSeconds".to_owned(), why)];
        return Err(Status::invalid("TokenRequest", "authentication.k8s.io", "", &causes));
    }
    let bound = request.pointer("/spec/boundObjectRef").cloned().unwrap_or(Value::Null);
    let pod = match text(&bound, "/kind") {
        "Pod" => {
            let uid = text(&bound, "/uid");
            Some((text(&bound, "/name"), (!uid.is_empty()).then_some(uid)))
        }
        "" => None,
        other => return Err(Status::bad_request(format!("cannot bind token to object of kind {other:?}"))),
    };
    let audiences = items(&request, "/spec/audiences").filter_map(Value::as_str).map(str::to_owned).collect();
    let lifetime = Duration::from_secs(seconds);
    let (token, expires) = tokens.issue(cluster, Grant { namespace, account, pod, audiences, lifetime })?;
    complete(&mut request, "authentication.k8s.io/v1", "TokenRequest");
    map(&mut request)
        .insert("status".into(), json!({"token": token, "expirationTimestamp": expires.to_string()}));
    Ok(request)
}

/// Answers a review of `kind` that `user` sent.
pub(super) fn review(
    cluster: &Cluster,
    tokens: &Tokens,
    user: &User,
    kind: &Arc<Kind>,
    mut review: Value,
) -> Result<Value, Status> {
    if !review.is_object() {
        return Err(Status::bad_request("the body is no JSON object"));
    }
    let status = match kind.kind.as_str() {
        "TokenReview" => token_review(cluster, tokens, &review),
        "SelfSubjectReview" => json!({"userInfo": user.to_json()}),
        "SelfSubjectAccessReview" => access(cluster, user, &review),
        "SelfSubjectRulesReview" => cluster.rights(user, text(&review, "/spec/namespace")),
        "SubjectAccessReview" => {
            let groups: Vec<&str> = items(&review, "/spec/groups").filter_map(Value::as_str).collect();
            access(cluster, &User::new(text(&review, "/spec/user"), &groups), &review)
        }
        other => return Err(Status::not_supported(other)),
    };
    complete(&mut review, &kind.api_version(), &kind.kind);
    map(&mut review).insert("status".into(), status);
    Ok(review)
}

fn token_review(cluster: &Cluster, tokens: &Tokens, review: &Value) -> Value {
    let mut audiences: Vec<String> =
        items(review, "/spec/audiences").filter_map(Value::as_str).map(str::to_owned).collect();
    if audiences.is_empty() {
        audiences.push(API_AUDIENCE.to_owned());
    }
    match tokens.check(cluster, text(review, "/spec/token"), &audiences) {
        Ok((user, matched)) => json!({"authenticated": true, "user": user.to_json(), "audiences": matched}),
        Err(why) => json!({"authenticated": false, "user": {}, "error": why}),
    }
}

fn access(cluster: &Cluster, user: &User, review: &Value) -> Value {
    let wanted = |field: &str| text(review, &format!("/spec/resourceAttributes/{field}")).to_owned();
    let attributes = match review.pointer("/spec/nonResourceAttributes") {
        Some(asked) if asked.is_object() => Attributes {
            verb: text(asked, "/verb").to_owned(),
            path: Some(text(asked, "/path").to_owned()),
            ..Attributes::default()
        },
        _ => Attributes {
            verb: wanted("verb"),
            group: wanted("group"),
            resource: wanted("resource"),
            subresource: wanted("subresource"),
            namespace: wanted("namespace"),
            name: wanted("name"),
            path: None,
        },
    };
    json!({"allowed": cluster.allows(user, &attributes)})
}

fn complete(object: &mut Value, api_version: &str, kind: &str) {
    let fields = map(object);
    fields.insert("apiVersion".into(), api_version.into());
    fields.insert("kind".into(), kind.into());
    let metadata = map(fields.entry("metadata").or_insert(Value::Null));
    metadata.insert("creationTimestamp".into(), Value::Null);
}
