//! One Pod per node that the template's nodeSelector admits; pods of an older template are replaced.

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Node, Pod};
use serde_json::json;

use super::{
    State, Write, create, delete, fingerprint, finished, leaving, pod, ready, schedule, status, text,
};
use crate::cluster::Kind;

/// Which template a pod was made from, as in Kubernetes.
const REVISION: &str = "controller-revision-hash";

pub(super) fn plan(state: &State) -> Vec<Write> {
    state.daemon_sets.iter().filter(|set| !leaving(&set.metadata)).flat_map(|set| one(state, set)).collect()
}

fn one(state: &State, set: &DaemonSet) -> Vec<Write> {
    let Some(spec) = &set.spec else { return Vec::new() };
    let revision = fingerprint(&spec.template);
    let pods: Vec<&Pod> = state.pods_of(set.metadata.uid.as_deref()).collect();
    let mut writes = Vec::new();
    let mut wanted = 0;
    for node in &state.nodes {
        let template = spec.template.spec.as_ref();
        let selector = template.and_then(|spec| spec.node_selector.as_ref());
        let here: Vec<&&Pod> = pods.iter().filter(|pod| on(pod, node)).collect();
        if !schedule::admits(node, selector) {
            writes.extend(here.iter().map(|pod| delete(Kind::Pod, &pod.metadata)));
            continue;
        }
        wanted += 1;
        if here.is_empty() {
            let mut pod = pod(("apps/v1", "DaemonSet", &set.metadata), &spec.template);
            pod.metadata.labels.get_or_insert_default().insert(REVISION.to_owned(), revision.clone());
            pod.spec.get_or_insert_default().node_name.clone_from(&node.metadata.name);
            writes.extend(create(Kind::Pod, &pod));
        }
        let outdated = |pod: &Pod| {
            let labels = pod.metadata.labels.as_ref();
            finished(pod) || labels.and_then(|labels| labels.get(REVISION)) != Some(&revision)
        };
        writes.extend(
            here.iter()
                .filter(|pod| !leaving(&pod.metadata) && outdated(pod))
                .map(|pod| delete(Kind::Pod, &pod.metadata)),
        );
    }
    writes.extend(counts(set, &pods, wanted));
    writes
}

fn counts(set: &DaemonSet, pods: &[&Pod], wanted: usize) -> Option<Write> {
    let live: Vec<&&Pod> = pods.iter().filter(|pod| !leaving(&pod.metadata)).collect();
    let ready = live.iter().filter(|pod| ready(pod)).count();
    let wanted = json!({
        "desiredNumberScheduled": wanted,
        "currentNumberScheduled": live.len(),
        "updatedNumberScheduled": live.len(),
        "numberReady": ready,
        "numberAvailable": ready,
        "numberMisscheduled": 0,
        "observedGeneration": set.metadata.generation.unwrap_or_default(),
    });
    status(Kind::DaemonSet, &set.metadata, set.status.as_ref(), wanted)
}

fn on(pod: &Pod, node: &Node) -> bool {
    let name = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
    name == Some(text(node.metadata.name.as_ref()))
}
