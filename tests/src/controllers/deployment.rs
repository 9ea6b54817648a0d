//! Deployments own one ReplicaSet per template; the newest has the replicas, older ones go once it is ready.
//! ReplicaSets own Pods.

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet, ReplicaSetSpec};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::json;

use super::{
    State, Write, child, controller, create, delete, fingerprint, finished, leaving, pod, ready, status, text,
};
use crate::cluster::Kind;

/// As in Kubernetes: keeps the pods of two templates apart.
const TEMPLATE: &str = "pod-template-hash";

pub(super) fn plan(state: &State) -> Vec<Write> {
    let deployments = state.deployments.iter().filter(|deployment| !leaving(&deployment.metadata));
    let sets = state.replica_sets.iter().filter(|set| !leaving(&set.metadata));
    deployments
        .flat_map(|deployment| one_deployment(state, deployment))
        .chain(sets.flat_map(|set| one_set(state, set)))
        .collect()
}

fn one_deployment(state: &State, deployment: &Deployment) -> Vec<Write> {
    let Some(spec) = &deployment.spec else { return Vec::new() };
    let hash = fingerprint(&spec.template);
    let replicas = spec.replicas.unwrap_or(1);
    let name = format!("{}-{hash}", text(deployment.metadata.name.as_ref()));
    let uid = deployment.metadata.uid.as_deref();
    let owned: Vec<&ReplicaSet> =
        state.replica_sets.iter().filter(|set| uid.is_some() && controller(&set.metadata) == uid).collect();
    let mut writes = Vec::new();
    match owned.iter().find(|set| set.metadata.name.as_ref() == Some(&name)) {
        None => writes.extend(create(Kind::ReplicaSet, &replica_set(deployment, &hash, name))),
        Some(current) => {
            let now = current.spec.as_ref().and_then(|spec| spec.replicas);
            if now != Some(replicas) {
                let mut scaled = (*current).clone();
                scaled.spec.get_or_insert_default().replicas = Some(replicas);
                writes.extend(
                    serde_json::to_value(&scaled).ok().map(|set| Write::Replace(Kind::ReplicaSet, set)),
                );
            }
            let available = state.pods_of(current.metadata.uid.as_deref()).filter(|pod| ready(pod)).count();
            if available >= usize::try_from(replicas).unwrap_or(0) {
                let old = owned.iter().filter(|set| set.metadata.uid != current.metadata.uid);
                writes.extend(old.map(|set| delete(Kind::ReplicaSet, &set.metadata)));
            }
        }
    }
    let pods: Vec<&Pod> = owned.iter().flat_map(|set| state.pods_of(set.metadata.uid.as_deref())).collect();
    writes.extend(counts(Kind::Deployment, &deployment.metadata, deployment.status.as_ref(), &pods));
    writes
}

fn replica_set(deployment: &Deployment, hash: &str, name: String) -> ReplicaSet {
    let spec = deployment.spec.clone().unwrap_or_default();
    let mut template = spec.template;
    let labels = template.metadata.get_or_insert_default().labels.get_or_insert_default();
    labels.insert(TEMPLATE.to_owned(), hash.to_owned());
    let mut selector = spec.selector;
    selector.match_labels.get_or_insert_default().insert(TEMPLATE.to_owned(), hash.to_owned());
    let empty = ObjectMeta::default();
    ReplicaSet {
        metadata: child(
            ("apps/v1", "Deployment", &deployment.metadata),
            template.metadata.as_ref().unwrap_or(&empty),
            name,
        ),
        spec: Some(ReplicaSetSpec {
            replicas: Some(spec.replicas.unwrap_or(1)),
            selector,
            template: Some(template),
            ..ReplicaSetSpec::default()
        }),
        status: None,
    }
}

fn one_set(state: &State, set: &ReplicaSet) -> Vec<Write> {
    let Some(spec) = &set.spec else { return Vec::new() };
    let Some(template) = &spec.template else { return Vec::new() };
    let wanted = usize::try_from(spec.replicas.unwrap_or(1)).unwrap_or(0);
    let pods: Vec<&Pod> = state.pods_of(set.metadata.uid.as_deref()).collect();
    let mut live: Vec<&Pod> =
        pods.iter().copied().filter(|pod| !leaving(&pod.metadata) && !finished(pod)).collect();
    let mut writes = Vec::new();
    for _ in live.len()..wanted {
        writes.extend(create(Kind::Pod, &pod(("apps/v1", "ReplicaSet", &set.metadata), template)));
    }
    // Those that serve nobody go first.
    live.sort_by_key(|pod| !ready(pod));
    writes.extend(live.iter().skip(wanted).map(|pod| delete(Kind::Pod, &pod.metadata)));
    writes.extend(counts(Kind::ReplicaSet, &set.metadata, set.status.as_ref(), &pods));
    writes
}

fn counts<S: serde::Serialize>(
    kind: Kind,
    meta: &ObjectMeta,
    now: Option<&S>,
    pods: &[&Pod],
) -> Option<Write> {
    let live: Vec<&&Pod> = pods.iter().filter(|pod| !leaving(&pod.metadata) && !finished(pod)).collect();
    let ready = live.iter().filter(|pod| ready(pod)).count();
    let mut wanted = json!({
        "replicas": live.len(),
        "readyReplicas": ready,
        "availableReplicas": ready,
        "observedGeneration": meta.generation.unwrap_or_default(),
    });
    if kind == Kind::Deployment {
        wanted["updatedReplicas"] = json!(live.len());
    }
    status(kind, meta, now, wanted)
}
