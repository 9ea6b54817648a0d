//! Single requests to the API server: what enrolment reads and writes of one pod.
//!
//! Writes name the pod's UID, so that they can never meet another pod of the same name: the API server answers 409.

use std::future::Future;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, EventSource, Namespace, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::Client;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::causes::chain;
use crate::index::event::ObjectName;
use crate::index::pod::{Condition, REDIRECTION_ANNOTATION, REDIRECTION_ENABLED, Reported, is_manifest_hash};
use crate::index::verdict::{self, Verdict};
use crate::notices::Notice;

/// A client as the surroundings say: KUBECONFIG, or the service account of the pod this runs in.
///
/// # Errors
/// When there is neither.
pub async fn connect() -> Result<Client, ConnectError> {
    Client::try_default().await.map_err(|error| ConnectError(chain(&error)))
}

/// The API server cannot be found.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot set up a client of the API server: {0}; set KUBECONFIG, or run in a pod with a service account"
)]
pub struct ConnectError(String);

/// What enrolment needs of the API server; a test has its own.
pub trait Cluster: Send + Sync + 'static {
    /// A pod and its namespace as they are now; none when either does not exist.
    fn pod(
        &self,
        name: &ObjectName,
    ) -> impl Future<Output = Result<Option<(Pod, Namespace)>, ClusterError>> + Send;

    /// A namespace as it is now; none when it does not exist.
    fn namespace(&self, name: &str) -> impl Future<Output = Result<Option<Namespace>, ClusterError>> + Send;

    /// Says on the pod that its traffic is captured, or takes that back.
    fn annotate(
        &self,
        name: &ObjectName,
        uid: &str,
        captured: bool,
    ) -> impl Future<Output = Result<(), ClusterError>> + Send;

    /// Sets a condition of ours in the pod's status, or removes it.
    fn report(
        &self,
        name: &ObjectName,
        uid: &str,
        condition: Condition,
        reported: Option<&Reported>,
    ) -> impl Future<Output = Result<(), ClusterError>> + Send;
}

/// Why a request came to nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClusterError {
    /// There is no such pod (any more).
    #[error("the pod no longer exists")]
    Gone,
    /// The API server refused; asking again will not help before something is changed.
    #[error("the API server refused to {act}: {reason}")]
    Refused {
        /// What was asked.
        act: &'static str,
        /// What it said.
        reason: String,
    },
    /// No answer that helps, now.
    #[error("cannot {act}: {reason}; is the API server reachable from this node?")]
    Unreachable {
        /// What was asked.
        act: &'static str,
        /// What went wrong.
        reason: String,
    },
}

/// The API server.
#[derive(Clone)]
pub struct ApiServer(Client);

impl ApiServer {
    /// Asks with this client.
    pub fn new(client: Client) -> Self {
        Self(client)
    }

    /// Sets the conditions of a policy as it was read.
    ///
    /// # Errors
    /// [`ClusterError::Gone`] also when the policy has changed since.
    pub async fn judge(&self, verdict: &Verdict) -> Result<(), ClusterError> {
        let now = k8s_openapi::jiff::Timestamp::now().strftime(TIME).to_string();
        let mut conditions = verdict.conditions.clone();
        let new = |one: &&mut Value| one["type"] == verdict::CONDITION && one["lastTransitionTime"].is_null();
        for condition in conditions.iter_mut().filter(new) {
            condition["lastTransitionTime"] = now.clone().into();
        }
        let mut status = json!({"conditions": conditions});
        if let Some(addresses) = &verdict.addresses {
            // Of a merge patch null takes the field away.
            status["addresses"] = if addresses.is_empty() { Value::Null } else { addresses.clone().into() };
        }
        let patch = json!({"metadata": {"resourceVersion": verdict.resource_version}, "status": status});
        let (group, version) = verdict.api_version.split_once('/').unwrap_or_default();
        let kind = GroupVersionKind::gvk(group, version, &format!("{:?}", verdict.kind));
        let resource = ApiResource::from_gvk(&kind);
        let api = Api::<DynamicObject>::namespaced_with(self.0.clone(), &verdict.name.namespace, &resource);
        let (parameters, patch) = (PatchParams::default(), Patch::Merge(&patch));
        let request = api.patch_status(&verdict.name.name, &parameters, &patch);
        one("set the policy's status", request).await.map(drop)
    }

    /// Makes an Event on a pod. There is one of each key, until the API server forgets it.
    ///
    /// # Errors
    /// [`ClusterError::Gone`] when there is one, or no such namespace.
    pub async fn tell(&self, notice: &Notice) -> Result<(), ClusterError> {
        let Notice { pod, uid, is_warning, reason, key, message } = notice;
        let now = Time(k8s_openapi::jiff::Timestamp::now());
        let own = hash(std::iter::once(uid).chain(key));
        let event = Event {
            metadata: ObjectMeta {
                name: Some(format!("{}.{own:016x}", pod.name)),
                namespace: Some(pod.namespace.to_string()),
                ..ObjectMeta::default()
            },
            involved_object: ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Pod".to_owned()),
                namespace: Some(pod.namespace.to_string()),
                name: Some(pod.name.to_string()),
                uid: Some(uid.clone()),
                ..ObjectReference::default()
            },
            type_: Some(if *is_warning { "Warning" } else { "Normal" }.to_owned()),
            reason: Some((*reason).to_owned()),
            message: Some(message.clone()),
            source: Some(EventSource { component: Some("ztunnel".to_owned()), host: None }),
            count: Some(1),
            first_timestamp: Some(now.clone()),
            last_timestamp: Some(now),
            ..Event::default()
        };
        let events = Api::<Event>::namespaced(self.0.clone(), &pod.namespace);
        one("write an Event", events.create(&PostParams::default(), &event)).await.map(drop)
    }

    fn pods(&self, name: &ObjectName) -> Api<Pod> {
        Api::namespaced(self.0.clone(), &name.namespace)
    }
}

impl Cluster for ApiServer {
    async fn pod(&self, name: &ObjectName) -> Result<Option<(Pod, Namespace)>, ClusterError> {
        let pods = self.pods(name);
        let pod = one("get the pod", pods.get_opt(&name.name));
        let (pod, namespace) = tokio::try_join!(pod, self.namespace(&name.namespace))?;
        Ok(pod.zip(namespace))
    }

    async fn namespace(&self, name: &str) -> Result<Option<Namespace>, ClusterError> {
        one("get the namespace", Api::<Namespace>::all(self.0.clone()).get_opt(name)).await
    }

    async fn annotate(&self, name: &ObjectName, uid: &str, captured: bool) -> Result<(), ClusterError> {
        let value = if captured { json!(REDIRECTION_ENABLED) } else { Value::Null };
        let patch =
            json!({"metadata": {"uid": precondition(uid), "annotations": {REDIRECTION_ANNOTATION: value}}});
        let (pods, parameters) = (self.pods(name), PatchParams::default());
        // By way of the status, where the API server takes annotations as well and nothing of the spec: leave to patch
        // pods themselves would let whoever holds this agent's token change every pod's image.
        one("annotate the pod", pods.patch_status(&name.name, &parameters, &Patch::Merge(patch)))
            .await
            .map(drop)
    }

    async fn report(
        &self,
        name: &ObjectName,
        uid: &str,
        condition: Condition,
        reported: Option<&Reported>,
    ) -> Result<(), ClusterError> {
        let condition = match reported {
            Some(reported) => json!({
                "type": condition.name(),
                "status": reported.status,
                "reason": reported.reason,
                "message": reported.message,
                "lastTransitionTime": k8s_openapi::jiff::Timestamp::now().strftime(TIME).to_string(),
            }),
            None => json!({"type": condition.name(), "$patch": "delete"}),
        };
        let patch = json!({"metadata": {"uid": precondition(uid)}, "status": {"conditions": [condition]}});
        let (pods, parameters) = (self.pods(name), PatchParams::default());
        one("set the pod's status", pods.patch_status(&name.name, &parameters, &Patch::Strategic(patch)))
            .await
            .map(drop)
    }
}

/// The same in every agent of one build: names an Event.
pub(crate) fn hash<'a>(parts: impl IntoIterator<Item = &'a String>) -> u64 {
    // FNV-1a, since std promises no hash from one process to the next.
    let bytes = parts.into_iter().flat_map(|part| part.bytes().chain([0xff]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The UID that the object must have for a patch to be applied; null leaves it as it is. That of a static pod's object
/// is not known here, and its name is its node's own.
fn precondition(uid: &str) -> Option<&str> {
    (!is_manifest_hash(uid)).then_some(uid)
}

/// One request with a deadline; a watch may wait for ever, this may not.
async fn one<T: DeserializeOwned>(
    act: &'static str,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, ClusterError> {
    match tokio::time::timeout(DEADLINE, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(kube::Error::Api(status))) => Err(match status.code {
            // 409: the name belongs to another pod by now, see the UID in each patch.
            404 | 409 => ClusterError::Gone,
            429 | 500.. => ClusterError::Unreachable { act, reason: status.message.clone() },
            _ => ClusterError::Refused { act, reason: status.message.clone() },
        }),
        Ok(Err(error)) => Err(ClusterError::Unreachable { act, reason: chain(&error) }),
        Err(_) => Err(ClusterError::Unreachable {
            act,
            reason: format!("no answer within {} s", DEADLINE.as_secs()),
        }),
    }
}

/// As in all objects.
const TIME: &str = "%Y-%m-%dT%H:%M:%SZ";

/// For one request.
pub(crate) const DEADLINE: Duration = Duration::from_secs(5);

#[cfg(test)]
pub(crate) mod fake_api;
#[cfg(test)]
mod tests;
