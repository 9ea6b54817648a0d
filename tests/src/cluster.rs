//! The lab's own view of its API server: typed objects, in process, never delayed and never unavailable. What the
//! kubelets, controllers and tests use; the daemons and `kubectl` speak HTTPS.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::api::{ApiServer, Client, PatchKind, Selector};
use crate::controllers::Write;

/// The kinds the lab works with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    ConfigMap,
    DaemonSet,
    Deployment,
    EndpointSlice,
    Event,
    Job,
    Namespace,
    Node,
    Pod,
    ReplicaSet,
    Secret,
    Service,
}

impl Kind {
    fn resource(self) -> &'static str {
        match self {
            Self::ConfigMap => "configmaps",
            Self::DaemonSet => "daemonsets.apps",
            Self::Deployment => "deployments.apps",
            Self::EndpointSlice => "endpointslices.discovery.k8s.io",
            Self::Event => "events",
            Self::Job => "jobs.batch",
            Self::Namespace => "namespaces",
            Self::Node => "nodes",
            Self::Pod => "pods",
            Self::ReplicaSet => "replicasets.apps",
            Self::Secret => "secrets",
            Self::Service => "services",
        }
    }
}

/// Access to all objects.
pub struct Cluster {
    server: Arc<ApiServer>,
    client: Client,
}

impl Cluster {
    #[must_use]
    pub fn new(server: Arc<ApiServer>) -> Self {
        Self { client: server.client(), server }
    }

    /// Wakes after any change of any object.
    #[must_use]
    pub fn changed(&self) -> tokio::sync::watch::Receiver<u64> {
        self.client.changed()
    }

    /// All objects of a kind; those that do not parse are skipped, and told.
    #[must_use]
    pub fn list<T: DeserializeOwned>(&self, kind: Kind) -> Vec<T> {
        let items = match self.client.list(kind.resource(), None, &Selector::default()) {
            Ok(list) => list.items,
            Err(error) => {
                tracing::warn!("list {}: {error}", kind.resource());
                return Vec::new();
            }
        };
        items
            .iter()
            .filter_map(|item| typed(kind, item).map_err(|error| tracing::warn!("{error:#}")).ok())
            .collect()
    }

    pub fn get<T: DeserializeOwned>(&self, kind: Kind, namespace: &str, name: &str) -> anyhow::Result<T> {
        let item = self
            .client
            .get(kind.resource(), namespace, name)
            .with_context(|| format!("get {} {namespace}/{name}", kind.resource()))?;
        typed(kind, &item)
    }

    /// Create any object.
    pub fn create(&self, object: Value) -> anyhow::Result<()> {
        let what = format!("create {} {}", object["kind"], object["metadata"]["name"]);
        self.client.create(object).context(what).map(drop)
    }

    /// Create it, unless something of that name is there.
    pub fn ensure(&self, object: Value) -> anyhow::Result<()> {
        let what = format!("create {} {}", object["kind"], object["metadata"]["name"]);
        match self.client.create(object) {
            Err(status) if status.is_already_exists() => Ok(()),
            other => other.context(what).map(drop),
        }
    }

    pub fn node_status(&self, name: &str, status: &Value) -> anyhow::Result<()> {
        let patch = json!({ "status": status });
        let result = self.client.patch_status(Kind::Node.resource(), "", name, PatchKind::Merge, patch);
        result.with_context(|| format!("write the status of node {name}")).map(drop)
    }

    /// The DaemonSets or Deployments of a namespace that lack ready pods, or were not looked at yet.
    #[must_use]
    pub fn unready_workloads(&self, kind: &str, namespace: &str) -> Vec<String> {
        let list = self.client.list(kind, Some(namespace), &Selector::default());
        let items = list.map(|list| list.items).unwrap_or_default();
        let number = |item: &Value, path: &str| item.pointer(path).and_then(Value::as_i64);
        items
            .iter()
            .filter_map(|item| {
                let wanted =
                    number(item, "/status/desiredNumberScheduled").or(number(item, "/spec/replicas"));
                let ready = number(item, "/status/numberReady").or(number(item, "/status/readyReplicas"));
                let observed = number(item, "/status/observedGeneration");
                let current = observed.is_some() && observed == number(item, "/metadata/generation");
                let name = item["metadata"]["name"].as_str().unwrap_or_default();
                let (wanted, ready) = (wanted.unwrap_or(1), ready.unwrap_or(0));
                (!current || ready < wanted).then(|| format!("{kind} {name}: {ready} of {wanted} ready"))
            })
            .collect()
    }

    /// What was told about the pods of a namespace, oldest first.
    #[must_use]
    pub fn events(&self, namespace: &str) -> Vec<String> {
        let list = self.client.list(Kind::Event.resource(), Some(namespace), &Selector::default());
        let mut events: Vec<(String, String)> = list
            .map(|list| list.items)
            .unwrap_or_default()
            .iter()
            .map(|event| {
                let text =
                    |path: &str| event.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
                let line =
                    format!("{} {}: {}", text("/involvedObject/name"), text("/reason"), text("/message"));
                (text("/lastTimestamp"), line)
            })
            .collect();
        events.sort();
        events.into_iter().map(|(_, line)| line).collect()
    }

    /// Strategic merge patch of a pod's status: conditions of other owners stay.
    pub fn pod_status(&self, namespace: &str, name: &str, status: &Value) -> anyhow::Result<()> {
        let patch = json!({ "status": status });
        let result =
            self.client.patch_status(Kind::Pod.resource(), namespace, name, PatchKind::Strategic, patch);
        result.with_context(|| format!("write the status of pod {namespace}/{name}")).map(drop)
    }

    /// Merge patch of an object.
    pub fn patch(&self, kind: Kind, namespace: &str, name: &str, patch: Value) -> anyhow::Result<()> {
        self.client
            .patch(kind.resource(), namespace, name, PatchKind::Merge, patch)
            .with_context(|| format!("patch {} {namespace}/{name}", kind.resource()))
            .map(drop)
    }

    pub fn delete(
        &self,
        kind: Kind,
        namespace: &str,
        name: &str,
        grace: Option<Duration>,
    ) -> anyhow::Result<()> {
        self.client
            .delete(kind.resource(), namespace, name, grace)
            .with_context(|| format!("delete {} {namespace}/{name}", kind.resource()))
            .map(drop)
    }

    /// Do one write of a controller.
    pub fn write(&self, write: &Write) -> anyhow::Result<()> {
        tracing::debug!("{write:?}");
        match write {
            Write::Create(_, object) => self.create(object.clone()),
            Write::Replace(kind, object) => self
                .client
                .update(object.clone())
                .with_context(|| format!("update {} {}", kind.resource(), object["metadata"]["name"]))
                .map(drop),
            Write::Delete { kind, namespace, name } => self.delete(*kind, namespace, name, None),
            Write::Status { kind, namespace, name, status } => self
                .client
                .patch_status(kind.resource(), namespace, name, PatchKind::Merge, json!({ "status": status }))
                .with_context(|| format!("write the status of {} {namespace}/{name}", kind.resource()))
                .map(drop),
            Write::Bind { namespace, name, node } => {
                self.patch(Kind::Pod, namespace, name, json!({ "spec": { "nodeName": node } }))
            }
        }
    }

    /// A token as TokenRequest issues it, bound to the pod.
    pub fn token(
        &self,
        namespace: &str,
        account: &str,
        pod: &str,
        audience: Option<&str>,
        lifetime: Duration,
    ) -> anyhow::Result<String> {
        let audiences: Vec<&str> = audience.into_iter().collect();
        self.server
            .service_account_token(namespace, account, Some(pod), &audiences, lifetime)
            .with_context(|| format!("token of service account {namespace}/{account}"))
    }

    /// Tell something about a pod where `kubectl get events` finds it.
    pub fn event(&self, node: &str, pod: &k8s_openapi::api::core::v1::Pod, reason: &str, message: &str) {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        let now = k8s_openapi::jiff::Timestamp::now().to_string();
        let event = json!({
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": { "name": format!("{name}.{:012x}", rand::random::<u64>() >> 16), "namespace": namespace },
            "involvedObject": {
                "apiVersion": "v1", "kind": "Pod", "namespace": namespace, "name": name, "uid": pod.metadata.uid,
            },
            "reason": reason,
            "message": message,
            "type": if reason.starts_with("Failed") || reason == "BackOff" { "Warning" } else { "Normal" },
            "source": { "component": "kubelet", "host": node },
            "reportingComponent": "kubelet",
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        });
        if let Err(error) = self.create(event) {
            tracing::debug!("event of pod {namespace}/{name}: {error:#}");
        }
    }
}

fn typed<T: DeserializeOwned>(kind: Kind, item: &Value) -> anyhow::Result<T> {
    T::deserialize(item).with_context(|| {
        format!("{} {}/{}", kind.resource(), item["metadata"]["namespace"], item["metadata"]["name"])
    })
}
