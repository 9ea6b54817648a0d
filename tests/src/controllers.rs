//! The controllers a cluster has and the lab needs: DaemonSets, Deployments and ReplicaSets, Jobs, the scheduler and
//! EndpointSlices. What lost its owner is removed by the API server.
//!
//! Each is a pure function from what the API server holds to the writes that bring it nearer to what was asked for.
//! **Invariant:** a pass reads one consistent state after all writes of the pass before, so nothing is made twice.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Node, Pod, PodTemplateSpec, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use k8s_openapi::jiff::Timestamp;
use serde_json::Value;

use crate::cluster::{Cluster, Kind};

pub mod daemon_set;
pub mod deployment;
pub mod endpoints;
pub mod job;
pub mod schedule;

/// What the controllers look at.
#[derive(Debug, Default)]
pub struct State {
    pub now: Timestamp,
    pub nodes: Vec<Node>,
    pub pods: Vec<Pod>,
    pub services: Vec<Service>,
    pub slices: Vec<EndpointSlice>,
    pub daemon_sets: Vec<DaemonSet>,
    pub deployments: Vec<Deployment>,
    pub replica_sets: Vec<ReplicaSet>,
    pub jobs: Vec<Job>,
}

/// One request to the API server.
#[derive(Debug, PartialEq)]
pub enum Write {
    Create(Kind, Value),
    Replace(Kind, Value),
    Delete {
        kind: Kind,
        namespace: String,
        name: String,
    },
    /// Merge patch of the status.
    Status {
        kind: Kind,
        namespace: String,
        name: String,
        status: Value,
    },
    Bind {
        namespace: String,
        name: String,
        node: String,
    },
}

/// Run all controllers for ever.
pub async fn run(cluster: Arc<Cluster>) {
    let mut changed = cluster.changed();
    loop {
        for write in plan(&State::read(&cluster)) {
            if let Err(error) = cluster.write(&write) {
                // The next pass sees why, e.g. an object that was deleted meanwhile.
                tracing::debug!("controllers: {error:#}");
            }
        }
        if changed.changed().await.is_err() {
            return;
        }
    }
}

fn plan(state: &State) -> Vec<Write> {
    let mut writes = daemon_set::plan(state);
    writes.extend(deployment::plan(state));
    writes.extend(job::plan(state));
    writes.extend(schedule::plan(state));
    writes.extend(endpoints::plan(state));
    writes
}

impl State {
    fn read(cluster: &Cluster) -> Self {
        Self {
            now: Timestamp::now(),
            nodes: cluster.list(Kind::Node),
            pods: cluster.list(Kind::Pod),
            services: cluster.list(Kind::Service),
            slices: cluster.list(Kind::EndpointSlice),
            daemon_sets: cluster.list(Kind::DaemonSet),
            deployments: cluster.list(Kind::Deployment),
            replica_sets: cluster.list(Kind::ReplicaSet),
            jobs: cluster.list(Kind::Job),
        }
    }

    /// Pods whose controller has this uid, those that are being deleted included.
    fn pods_of<'a>(&'a self, uid: Option<&'a str>) -> impl Iterator<Item = &'a Pod> {
        self.pods.iter().filter(move |pod| uid.is_some() && controller(&pod.metadata) == uid)
    }
}

/// The uid of the controlling owner.
fn controller(meta: &ObjectMeta) -> Option<&str> {
    let owners = meta.owner_references.iter().flatten();
    owners.filter(|owner| owner.controller == Some(true)).map(|owner| owner.uid.as_str()).next()
}

/// Whether someone asked for its deletion.
fn leaving(meta: &ObjectMeta) -> bool {
    meta.deletion_timestamp.is_some()
}

fn text(value: Option<&String>) -> &str {
    value.map_or("", String::as_str)
}

/// A child of `owner` made from its template: the metadata that both Pods and ReplicaSets get.
fn child(owner: (&str, &str, &ObjectMeta), template: &ObjectMeta, name: String) -> ObjectMeta {
    let (api_version, kind, meta) = owner;
    ObjectMeta {
        name: Some(name),
        namespace: meta.namespace.clone(),
        labels: template.labels.clone(),
        annotations: template.annotations.clone(),
        owner_references: Some(vec![OwnerReference {
            api_version: api_version.to_owned(),
            kind: kind.to_owned(),
            name: text(meta.name.as_ref()).to_owned(),
            uid: text(meta.uid.as_ref()).to_owned(),
            controller: Some(true),
            block_owner_deletion: Some(true),
        }]),
        ..ObjectMeta::default()
    }
}

/// A Pod from a template, not bound to a node unless the template says so.
fn pod(owner: (&str, &str, &ObjectMeta), template: &PodTemplateSpec) -> Pod {
    let empty = ObjectMeta::default();
    let name = format!("{}-{:05x}", text(owner.2.name.as_ref()), rand::random::<u32>() & 0xf_ffff);
    Pod {
        metadata: child(owner, template.metadata.as_ref().unwrap_or(&empty), name),
        spec: template.spec.clone(),
        status: None,
    }
}

/// FNV-1a: the same for the same template in every run, unlike the standard library's hashers.
fn fingerprint(value: &impl serde::Serialize) -> String {
    let text = serde_json::to_string(value).unwrap_or_default();
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{:08x}", hash & 0xffff_ffff)
}

fn create(kind: Kind, object: &impl serde::Serialize) -> Option<Write> {
    Some(Write::Create(kind, serde_json::to_value(object).ok()?))
}

fn delete(kind: Kind, meta: &ObjectMeta) -> Write {
    Write::Delete {
        kind,
        namespace: text(meta.namespace.as_ref()).to_owned(),
        name: text(meta.name.as_ref()).to_owned(),
    }
}

/// A write of the status, unless it is that already.
fn status<S: serde::Serialize>(
    kind: Kind,
    meta: &ObjectMeta,
    now: Option<&S>,
    wanted: Value,
) -> Option<Write> {
    let now = now.and_then(|status| serde_json::to_value(status).ok()).unwrap_or(Value::Null);
    let same = wanted.as_object()?.iter().all(|(key, value)| {
        // Go's omitempty: an absent number is zero.
        now.get(key).map_or(value == &Value::from(0), |now| now == value)
    });
    (!same).then(|| Write::Status {
        kind,
        namespace: text(meta.namespace.as_ref()).to_owned(),
        name: text(meta.name.as_ref()).to_owned(),
        status: wanted,
    })
}

/// Whether the condition `Ready` is `True`.
fn ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.filter(|condition| condition.type_ == "Ready").any(|condition| condition.status == "True")
}

/// Whether it has come to its end, in success or failure.
fn finished(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}
