//! Bearer tokens and the users they stand for: fixed tokens of tests, and JWTs of service accounts that are
//! bound to audiences, a time, and the pod they were made for.
//! **Invariant:** a token of a service account is good only while that account and that pod exist (same uids).

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use rcgen::{KeyPair, PKCS_ED25519, SigningKey};
use serde_json::{Value, json};

use super::cluster::Cluster;
use super::meta;
use super::status::Status;

/// The audience of the API server itself, also the issuer's name.
pub(super) const API_AUDIENCE: &str = "https://kubernetes.default.svc.cluster.local";

/// Who a request comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct User {
    pub(super) name: String,
    pub(super) uid: String,
    pub(super) groups: Vec<String>,
    pub(super) extra: BTreeMap<String, Vec<String>>,
}

impl User {
    /// A user of these groups and of those that all authenticated users are in.
    pub(super) fn new(name: &str, groups: &[&str]) -> Self {
        let groups = groups.iter().copied().chain(["system:authenticated"]).map(str::to_owned).collect();
        Self { name: name.to_owned(), groups, ..Self::default() }
    }

    /// Whoever sends no credential.
    pub(super) fn anonymous() -> Self {
        Self {
            name: "system:anonymous".to_owned(),
            groups: vec!["system:unauthenticated".to_owned()],
            ..Self::default()
        }
    }

    pub(super) fn service_account(namespace: &str, name: &str, uid: &str) -> Self {
        let groups = ["system:serviceaccounts", &format!("system:serviceaccounts:{namespace}")];
        let mut user = Self::new(&format!("system:serviceaccount:{namespace}:{name}"), &groups);
        user.uid = uid.to_owned();
        user
    }

    /// `UserInfo` of the authentication API.
    pub(super) fn to_json(&self) -> Value {
        let mut user = json!({"username": self.name, "groups": self.groups});
        if !self.uid.is_empty() {
            user["uid"] = self.uid.clone().into();
        }
        if !self.extra.is_empty() {
            user["extra"] = json!(self.extra);
        }
        user
    }
}

/// Issues and checks tokens.
pub(super) struct Tokens {
    key: KeyPair,
    fixed: Mutex<HashMap<String, User>>,
}

/// What a service account token is to be good for.
pub(super) struct Grant<'a> {
    pub(super) namespace: &'a str,
    pub(super) account: &'a str,
    /// Name and, if known, uid of the pod it is bound to.
    pub(super) pod: Option<(&'a str, Option<&'a str>)>,
    /// Empty means the API server's own.
    pub(super) audiences: Vec<String>,
    pub(super) lifetime: Duration,
}

impl Tokens {
    pub(super) fn new() -> Result<Self, rcgen::Error> {
        Ok(Self { key: KeyPair::generate_for(&PKCS_ED25519)?, fixed: Mutex::new(HashMap::new()) })
    }

    /// A new opaque token for `user`, good as long as the server.
    pub(super) fn fix(&self, user: User) -> String {
        let token = meta::random_suffix(40);
        self.fixed.lock().unwrap_or_else(PoisonError::into_inner).insert(token.clone(), user);
        token
    }

    /// A token and when it expires.
    pub(super) fn issue(&self, cluster: &Cluster, grant: Grant<'_>) -> Result<(String, Timestamp), Status> {
        let Grant { namespace, account, .. } = grant;
        let found = cluster
            .store
            .get("serviceaccounts", namespace, account)
            .ok_or_else(|| Status::not_found("serviceaccounts", "", account))?;
        let mut bound =
            json!({"namespace": namespace, "serviceaccount": {"name": account, "uid": meta::uid(found)}});
        if let Some((name, uid)) = grant.pod {
            bind_to_pod(cluster, &mut bound, (namespace, account), (name, uid))?;
        }
        let audiences =
            if grant.audiences.is_empty() { vec![API_AUDIENCE.to_owned()] } else { grant.audiences };
        let now = Timestamp::now();
        let lifetime = i64::try_from(grant.lifetime.as_secs()).unwrap_or(i64::MAX);
        let expires =
            Timestamp::from_second(now.as_second().saturating_add(lifetime)).unwrap_or(Timestamp::MAX);
        let claims = json!({
            "iss": API_AUDIENCE, "aud": audiences, "sub": format!("system:serviceaccount:{namespace}:{account}"),
            "iat": now.as_second(), "nbf": now.as_second(), "exp": expires.as_second(),
            "jti": meta::new_uid(), "kubernetes.io": bound,
        });
        Ok((self.sign(&claims)?, expires))
    }

    /// The user of a token, and those of `audiences` it is good for; at least one.
    pub(super) fn check(
        &self,
        cluster: &Cluster,
        token: &str,
        audiences: &[String],
    ) -> Result<(User, Vec<String>), &'static str> {
        let fixed = self.fixed.lock().unwrap_or_else(PoisonError::into_inner).get(token).cloned();
        let (user, good_for) = match fixed {
            Some(user) => (user, vec![API_AUDIENCE.to_owned()]),
            None => {
                let claims = self.verify(token).ok_or("the token is malformed or was not issued here")?;
                let good_for =
                    meta::items(&claims, "/aud").filter_map(Value::as_str).map(str::to_owned).collect();
                (account_of(cluster, &claims)?, good_for)
            }
        };
        let matched: Vec<String> =
            audiences.iter().filter(|wanted| good_for.contains(wanted)).cloned().collect();
        if matched.is_empty() {
            return Err("the token is not for this audience");
        }
        Ok((user, matched))
    }

    fn sign(&self, claims: &Value) -> Result<String, Status> {
        let header = json!({"alg": "EdDSA", "typ": "JWT", "kid": "lab"});
        let signed =
            format!("{}.{}", encode(header.to_string().as_bytes()), encode(claims.to_string().as_bytes()));
        let signature =
            self.key.sign(signed.as_bytes()).map_err(|error| Status::internal(error.to_string()))?;
        Ok(format!("{signed}.{}", encode(&signature)))
    }

    /// The claims of a token that this server signed. Ed25519 is deterministic, so signing again verifies.
    fn verify(&self, token: &str) -> Option<Value> {
        let (signed, signature) = token.rsplit_once('.')?;
        if self.key.sign(signed.as_bytes()).ok().map(|again| encode(&again))? != signature {
            return None;
        }
        let (_, claims) = signed.split_once('.')?;
        serde_json::from_slice(&decode(claims)?).ok()
    }
}

/// Adds the pod and its node to what a token is bound to.
fn bind_to_pod(
    cluster: &Cluster,
    bound: &mut Value,
    (namespace, account): (&str, &str),
    (name, uid): (&str, Option<&str>),
) -> Result<(), Status> {
    let pod =
        cluster.store.get("pods", namespace, name).ok_or_else(|| Status::not_found("pods", "", name))?;
    let found = meta::uid(pod);
    if let Some(uid) = uid
        && uid != found
    {
        let why = format!(
            "the UID in the bound object reference ({uid}) does not match the UID in record ({found})"
        );
        return Err(Status::conflict("serviceaccounts/token", "", account, &why));
    }
    if meta::text(pod, "/spec/serviceAccountName") != account {
        let message =
            format!("cannot bind token for serviceaccount {account:?} to pod running with another one");
        return Err(Status::bad_request(message));
    }
    bound["pod"] = json!({"name": name, "uid": found});
    let node = meta::text(pod, "/spec/nodeName");
    if !node.is_empty() {
        let uid = cluster.store.get("nodes", "", node).map(|node| meta::uid(node)).unwrap_or_default();
        bound["node"] = json!({"name": node, "uid": uid});
    }
    Ok(())
}

/// The service account in verified claims, if it and what the token is bound to still exist.
fn account_of(cluster: &Cluster, claims: &Value) -> Result<User, &'static str> {
    let now = Timestamp::now().as_second();
    if claims["exp"].as_i64().is_none_or(|expires| expires <= now) {
        return Err("the token has expired");
    }
    let bound = &claims["kubernetes.io"];
    let (namespace, name) = (meta::text(bound, "/namespace"), meta::text(bound, "/serviceaccount/name"));
    let uid = meta::text(bound, "/serviceaccount/uid");
    let is = |resource: &str, namespace: &str, object: &Value| {
        let found = cluster.store.get(resource, namespace, meta::text(object, "/name"));
        found.is_some_and(|found| meta::uid(found) == meta::text(object, "/uid"))
    };
    if !is("serviceaccounts", namespace, &bound["serviceaccount"]) {
        return Err("the token's service account no longer exists");
    }
    let mut user = User::service_account(namespace, name, uid);
    let pod = &bound["pod"];
    if pod.is_object() {
        if !is("pods", namespace, pod) {
            return Err("the pod that the token is bound to no longer exists");
        }
        for (object, field, key) in [
            ("pod", "name", "pod-name"),
            ("pod", "uid", "pod-uid"),
            ("node", "name", "node-name"),
            ("node", "uid", "node-uid"),
        ] {
            if let Some(value) = bound[object][field].as_str().filter(|value| !value.is_empty()) {
                user.extra.insert(format!("authentication.kubernetes.io/{key}"), vec![value.to_owned()]);
            }
        }
    }
    let id = format!("JTI={}", meta::text(claims, "/jti"));
    user.extra.insert("authentication.kubernetes.io/credential-id".to_owned(), vec![id]);
    Ok(user)
}

/// base64url without padding (RFC 7515).
fn encode(bytes: &[u8]) -> String {
    meta::base64(bytes).trim_end_matches('=').replace('+', "-").replace('/', "_")
}

fn decode(text: &str) -> Option<Vec<u8>> {
    let mut padded = text.replace('-', "+").replace('_', "/");
    while !padded.len().is_multiple_of(4) {
        padded.push('=');
    }
    meta::from_base64(&padded)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::{API_AUDIENCE, Grant, Tokens, User, decode, encode};
    use crate::api::cluster::{Cluster, Deletion, Write};
    use crate::api::meta;
    use crate::stack::Stack;

    fn grant<'a>(pod: Option<(&'a str, Option<&'a str>)>, audience: &str, seconds: u64) -> Grant<'a> {
        let audiences = if audience.is_empty() { Vec::new() } else { vec![audience.to_owned()] };
        let lifetime = Duration::from_secs(seconds);
        Grant { namespace: "default", account: "default", pod, audiences, lifetime }
    }

    fn cluster_with_pod() -> Cluster {
        let mut cluster = Cluster::new(String::new(), Stack::V4).unwrap();
        let kind = cluster.kinds.named("pods").unwrap();
        let pod = json!({"metadata": {"name": "a"}, "spec": {
            "nodeName": "node1", "terminationGracePeriodSeconds": 0, "containers": [{"name": "c", "image": "i"}],
        }});
        cluster.create(&kind, "default", pod, Write::default()).unwrap();
        cluster
    }

    #[test]
    fn tokens_are_bound_to_audience_time_and_pod() {
        let mut cluster = cluster_with_pod();
        let tokens = Tokens::new().unwrap();
        let (token, _) = tokens.issue(&cluster, grant(Some(("a", None)), "istio-ca", 60)).unwrap();
        let wanted = ["istio-ca".to_owned()];
        let (user, audiences) = tokens.check(&cluster, &token, &wanted).unwrap();
        assert_eq!(
            (user.name.as_str(), audiences),
            ("system:serviceaccount:default:default", wanted.to_vec())
        );
        assert_eq!(user.extra["authentication.kubernetes.io/pod-name"], ["a"]);
        assert_eq!(user.extra["authentication.kubernetes.io/node-name"], ["node1"]);
        let api = [API_AUDIENCE.to_owned()];
        assert!(tokens.check(&cluster, &token, &api).unwrap_err().contains("audience"));
        let forged = format!("{}x", &token[..token.len() - 1]);
        assert!(tokens.check(&cluster, &forged, &wanted).unwrap_err().contains("malformed"));
        let (expired, _) = tokens.issue(&cluster, grant(None, "", 0)).unwrap();
        assert!(tokens.check(&cluster, &expired, &api).unwrap_err().contains("expired"));
        let kind = cluster.kinds.named("pods").unwrap();
        cluster.delete(&kind, "default", "a", &Deletion::default()).unwrap();
        assert!(tokens.check(&cluster, &token, &wanted).unwrap_err().contains("pod"));
    }

    #[test]
    fn requests_for_the_wrong_pod_are_refused() {
        let cluster = cluster_with_pod();
        let tokens = Tokens::new().unwrap();
        for (pod, expect) in [(("b", None), 404), (("a", Some("not-its-uid")), 409)] {
            assert_eq!(tokens.issue(&cluster, grant(Some(pod), "", 60)).unwrap_err().code, expect);
        }
        let mut other = grant(None, "", 60);
        other.account = "nobody";
        assert_eq!(tokens.issue(&cluster, other).unwrap_err().code, 404);
    }

    #[test]
    fn fixed_tokens_and_encoding() {
        let cluster = Cluster::new(String::new(), Stack::V4).unwrap();
        let tokens = Tokens::new().unwrap();
        let token = tokens.fix(User::new("jo", &["x"]));
        let api = [API_AUDIENCE.to_owned()];
        assert_eq!(tokens.check(&cluster, &token, &api).unwrap().0.groups, ["x", "system:authenticated"]);
        assert_eq!(encode(&[251, 255, 254]), "-__-");
        assert_eq!(decode("-__-"), Some(vec![251, 255, 254]));
        assert_eq!(decode(&encode(b"a")), Some(b"a".to_vec()));
        assert_eq!(meta::from_base64("!"), None);
    }
}
