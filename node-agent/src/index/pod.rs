//! Pods: the facts that workloads and membership are made of.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as api;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use mesh_core::proto::workload::WorkloadType;

use super::event::ObjectName;
use super::membership::{Mode, is_sandbox, other_mesh};
use super::probes;
use super::{Changes, Index, Invalid, Key, address};

/// The annotation that says a pod's capture is in place, so that others may send it HBONE (Istio's name).
pub const REDIRECTION_ANNOTATION: &str = "ambient.istio.io/redirection";
/// Its value then.
pub const REDIRECTION_ENABLED: &str = "enabled";
/// The annotation that says whether the pod's DNS queries are captured (Istio's name), "true" or "false".
const DNS_CAPTURE_ANNOTATION: &str = "ambient.istio.io/dns-capture";
/// The conditions in which the agent says something of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Condition {
    /// Why a pod that asked for the mesh is not in it.
    Enrolled,
    /// Whether the capture of one that is in it was found whole.
    Captured,
}

impl Condition {
    /// Its `type`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Enrolled => "ambit.io/enrolled",
            Self::Captured => "ambit.io/captured",
        }
    }
}

/// What the model keeps of a Pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pod {
    pub(super) name: ObjectName,
    /// Of the object; others refer to it.
    pub(super) uid: String,
    /// What the runtime calls the pod, see [`runtime_uid`].
    pub(super) runtime_uid: String,
    pub(super) node: Option<Arc<str>>,
    pub(super) service_account: String,
    /// In the order of the status: the primary one first.
    pub(super) addresses: Vec<IpAddr>,
    pub(super) host_network: bool,
    /// See [`probes::ports`].
    pub(super) probe_ports: BTreeSet<u16>,
    /// Whether its DNS is captured, by annotation.
    pub(super) dns_capture: Option<bool>,
    /// Succeeded or Failed: its address may belong to another pod by now.
    pub(super) finished: bool,
    /// Being deleted.
    pub(super) terminating: bool,
    /// Its condition `Ready`.
    pub(super) ready: bool,
    /// Capture is in place, by annotation.
    pub(super) captured: bool,
    pub(super) mode: Option<Mode>,
    pub(super) other_mesh: Option<&'static str>,
    /// Its RuntimeClass, if that is a sandbox.
    pub(super) sandbox: Option<String>,
    /// The condition of ours that its status has: whether enrolled, and the reason.
    pub(super) reported: Option<Reported>,
    /// The other one: whether its capture was found whole.
    pub(super) proved: Option<Reported>,
    pub(super) owner: Owner,
    pub(super) canonical_name: String,
    pub(super) canonical_revision: String,
    pub(super) labels: Arc<Labels>,
}

/// What selectors look at; shared by pods that have the same ones, as those of a ReplicaSet do.
pub(super) type Labels = BTreeMap<String, String>;

/// No labels select nothing, as in Services.
pub(super) fn selects(selector: &Labels, labels: &Labels) -> bool {
    !selector.is_empty() && selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// Our condition in a pod's status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reported {
    /// Its `status`, "True" or "False".
    pub status: String,
    /// Its `reason`.
    pub reason: String,
    /// Its `message`.
    pub message: String,
}

impl Reported {
    /// What makes a condition another one. Messages of failures change with every attempt.
    pub fn gist(&self) -> String {
        let Self { status, reason, message } = self;
        if status == "True" { format!("{status} {reason} {message}") } else { format!("{status} {reason}") }
    }
}

/// What made the pod, in the words of WDS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) kind: WorkloadType,
    pub(super) name: String,
}

impl Pod {
    pub(super) fn read(name: &ObjectName, object: &api::Pod) -> Result<Self, Invalid> {
        let meta = &object.metadata;
        let spec = object.spec.as_ref();
        let status = object.status.as_ref();
        let owner = owner(name, object);
        let labels = meta.labels.clone().unwrap_or_default();
        let (canonical_name, canonical_revision) = canonical(&labels, &owner.name);
        let containers = spec.into_iter().flat_map(|spec| {
            spec.containers.iter().chain(spec.init_containers.iter().flatten()).map(|c| c.name.as_str())
        });
        let phase = status.and_then(|status| status.phase.as_deref());
        Ok(Self {
            name: name.clone(),
            uid: meta.uid.clone().unwrap_or_default(),
            runtime_uid: runtime_uid(meta),
            node: spec
                .and_then(|spec| spec.node_name.as_deref())
                .filter(|node| !node.is_empty())
                .map(Into::into),
            service_account: spec
                .and_then(|spec| spec.service_account_name.clone())
                .filter(|name| !name.is_empty())
                .unwrap_or_else(|| "default".to_owned()),
            addresses: addresses(status)?,
            host_network: spec.and_then(|spec| spec.host_network).unwrap_or_default(),
            probe_ports: spec.map(probes::ports).unwrap_or_default(),
            dns_capture: meta
                .annotations
                .as_ref()
                .and_then(|all| all.get(DNS_CAPTURE_ANNOTATION)?.trim().to_ascii_lowercase().parse().ok()),
            finished: matches!(phase, Some("Succeeded" | "Failed")),
            terminating: meta.deletion_timestamp.is_some(),
            ready: condition(status, "Ready").is_some_and(|condition| condition.status == "True"),
            captured: label_is(meta.annotations.as_ref(), REDIRECTION_ANNOTATION, REDIRECTION_ENABLED),
            mode: Mode::of(meta.labels.as_ref()),
            other_mesh: other_mesh(meta.annotations.as_ref(), containers),
            sandbox: spec.and_then(|spec| spec.runtime_class_name.clone()).filter(|class| is_sandbox(class)),
            reported: reported(status, Condition::Enrolled),
            proved: reported(status, Condition::Captured),
            canonical_name,
            canonical_revision,
            labels: Arc::new(labels),
            owner,
        })
    }
}

fn reported(status: Option<&api::PodStatus>, of: Condition) -> Option<Reported> {
    condition(status, of.name()).map(|condition| Reported {
        status: condition.status.clone(),
        reason: condition.reason.clone().unwrap_or_default(),
        message: condition.message.clone().unwrap_or_default(),
    })
}

/// Istio's canonical service and its revision.
pub(super) fn canonical(labels: &Labels, owner: &str) -> (String, String) {
    // Labels of other objects than Kubernetes' own may be longer.
    let short = |value: String| value.chars().take(63).collect::<String>();
    let first = |keys: &[&str]| keys.iter().find_map(|key| label(Some(labels), key)).map(short);
    let name = first(&["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"]);
    let revision = first(&["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"]);
    (name.unwrap_or_else(|| owner.to_owned()), revision.unwrap_or_else(|| "latest".to_owned()))
}

/// Kubelets start a pod of their manifest directory under a hash of its manifest, and then make an object that mirrors
/// it, which gets a UID of its own. The hash is the pod's UID for the runtime and in its cgroups.
fn runtime_uid(meta: &ObjectMeta) -> String {
    let annotation = |key: &str| meta.annotations.as_ref().and_then(|annotations| annotations.get(key));
    let hash = annotation("kubernetes.io/config.hash").filter(|hash| is_manifest_hash(hash));
    // A hash cannot be the UID of a pod that the API server made: nobody takes another pod's place with it.
    match hash.filter(|hash| annotation("kubernetes.io/config.mirror") == Some(hash)) {
        Some(hash) => hash.clone(),
        None => meta.uid.clone().unwrap_or_default(),
    }
}

/// Whether a pod's runtime UID is a hash, and so not its object's UID.
pub fn is_manifest_hash(uid: &str) -> bool {
    uid.len() == 32 && uid.bytes().all(|c| c.is_ascii_hexdigit())
}

/// Istio's rules (`GetWorkloadMetaFromPod`): a ReplicaSet stands for its Deployment, a Job of a CronJob for that.
fn owner(name: &ObjectName, object: &api::Pod) -> Owner {
    let owners = object.metadata.owner_references.iter().flatten();
    let Some(controller) = owners.into_iter().find(|owner| owner.controller == Some(true)) else {
        return Owner { kind: WorkloadType::Pod, name: name.name.to_string() };
    };
    let (kind, name) = match controller.kind.as_str() {
        "ReplicaSet" => {
            let hash = label(object.metadata.labels.as_ref(), "pod-template-hash");
            let deployment = hash.and_then(|hash| without_suffix(&controller.name, &hash).map(str::to_owned));
            match deployment.or_else(|| without_generated_hash(&controller.name).map(str::to_owned)) {
                Some(deployment) => (WorkloadType::Deployment, deployment),
                None => (WorkloadType::Pod, controller.name.clone()),
            }
        }
        "Job" => match without_schedule(&controller.name) {
            Some(cron_job) => (WorkloadType::Cronjob, cron_job.to_owned()),
            None => (WorkloadType::Job, controller.name.clone()),
        },
        _ => (WorkloadType::Pod, controller.name.clone()),
    };
    Owner { kind, name }
}

fn without_suffix<'a>(name: &'a str, suffix: &str) -> Option<&'a str> {
    name.strip_suffix(suffix)?.strip_suffix('-').filter(|rest| !rest.is_empty())
}

/// The Deployment controller appends a hash of these letters (apimachinery `rand.SafeEncodeString`).
fn without_generated_hash(name: &str) -> Option<&str> {
    let (deployment, hash) = name.rsplit_once('-')?;
    let safe = |c: u8| b"bcdfghjklmnpqrstvwxz2456789".contains(&c);
    (!deployment.is_empty() && (5..=10).contains(&hash.len()) && hash.bytes().all(safe)).then_some(deployment)
}

/// The CronJob controller appends the scheduled time in minutes since 1970 (8 digits until the year 2160).
fn without_schedule(name: &str) -> Option<&str> {
    let (cron_job, time) = name.rsplit_once('-')?;
    let scheduled = (8..=10).contains(&time.len()) && time.bytes().all(|c| c.is_ascii_digit());
    (scheduled && !cron_job.is_empty()).then_some(cron_job)
}

fn addresses(status: Option<&api::PodStatus>) -> Result<Vec<IpAddr>, Invalid> {
    let Some(status) = status else { return Ok(Vec::new()) };
    let all = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str());
    let one = status.pod_ip.as_deref().filter(|_| status.pod_ips.iter().flatten().next().is_none());
    all.chain(one).filter(|ip| !ip.is_empty()).map(|ip| address("status.podIPs", ip)).collect()
}

fn condition<'a>(status: Option<&'a api::PodStatus>, name: &str) -> Option<&'a api::PodCondition> {
    status?.conditions.iter().flatten().find(|condition| condition.type_ == name)
}

fn label(labels: Option<&BTreeMap<String, String>>, key: &str) -> Option<String> {
    labels?.get(key).filter(|value| !value.is_empty()).cloned()
}

fn label_is(labels: Option<&BTreeMap<String, String>>, key: &str, value: &str) -> bool {
    labels.and_then(|labels| labels.get(key)).is_some_and(|found| found == value)
}

impl Index {
    pub(super) fn apply_pod(
        &mut self,
        name: &ObjectName,
        object: &api::Pod,
        changes: &mut Changes,
    ) -> Result<(), Invalid> {
        let mut pod = Pod::read(name, object)?;
        if self.pods.get(name) == Some(&pod) {
            return Ok(());
        }
        self.delete_pod(name, changes);
        match self.labels.get(&pod.labels) {
            Some(shared) => pod.labels = Arc::clone(shared),
            None => {
                self.labels.insert(Arc::clone(&pod.labels));
            }
        }
        self.pods_of_namespace.entry(name.namespace.clone()).or_default().insert(name.clone());
        self.touch_pod(&pod, changes);
        if let Some(node) = &pod.node {
            self.pods_of_node.entry(node.clone()).or_default().insert(name.clone());
        }
        self.pods.insert(name.clone(), pod);
        Ok(())
    }

    pub(super) fn delete_pod(&mut self, name: &ObjectName, changes: &mut Changes) {
        let Some(pod) = self.pods.remove(name) else { return };
        self.touch_pod(&pod, changes);
        // One is the set's own.
        if Arc::strong_count(&pod.labels) <= 2 {
            self.labels.remove(&pod.labels);
        }
        forget(&mut self.pods_of_namespace, &name.namespace, name);
        if let Some(node) = &pod.node {
            forget(&mut self.pods_of_node, node, name);
        }
    }

    pub(super) fn touch_pod(&self, pod: &Pod, changes: &mut Changes) {
        changes.keys.insert(Key::Pod(pod.name.clone()));
        changes.local |= pod.node.as_deref() == Some(&*self.config.node_name);
    }
}

/// Takes a pod out of the set of its node or namespace.
fn forget(sets: &mut HashMap<Arc<str>, BTreeSet<ObjectName>>, set: &Arc<str>, pod: &ObjectName) {
    if let Some(pods) = sets.get_mut(set) {
        pods.remove(pod);
        if pods.is_empty() {
            sets.remove(set);
        }
    }
}
