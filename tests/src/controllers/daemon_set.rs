//! One Pod per node that the template's nodeSelector admits; pods of an older template are replaced: at once, or with
//! `maxSurge` once the new one beside it is ready. While a deleted pod has not ended, no other is made for its place.

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
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
    let current = |pod: &Pod| {
        let labels = pod.metadata.labels.as_ref();
        labels.and_then(|labels| labels.get(REVISION)) == Some(&revision)
    };
    let mut surge = max_surge(set, state.nodes.len());
    let surges = surge > 0;
    let mut writes = Vec::new();
    let mut seen = Seen::default();
    for node in &state.nodes {
        let template = spec.template.spec.as_ref();
        let selector = template.and_then(|spec| spec.node_selector.as_ref());
        let here: Vec<&&Pod> = pods.iter().filter(|pod| on(pod, node)).collect();
        if !schedule::admits(node, selector) {
            writes.extend(here.iter().map(|pod| delete(Kind::Pod, &pod.metadata)));
            continue;
        }
        let make = || {
            let mut pod = pod(("apps/v1", "DaemonSet", &set.metadata), &spec.template);
            pod.metadata.labels.get_or_insert_default().insert(REVISION.to_owned(), revision.clone());
            pod.spec.get_or_insert_default().node_name.clone_from(&node.metadata.name);
            create(Kind::Pod, &pod)
        };
        if here.is_empty() {
            writes.extend(make());
        }
        let live = here.iter().copied().copied().filter(|pod| !leaving(&pod.metadata));
        let (ended, live): (Vec<&Pod>, Vec<&Pod>) = live.partition(|pod| finished(pod));
        let (new, old): (Vec<&Pod>, Vec<&Pod>) = live.iter().copied().partition(|pod| current(pod));
        seen.node(&live, !new.is_empty());
        writes.extend(ended.iter().map(|pod| delete(Kind::Pod, &pod.metadata)));
        if !surges || new.iter().any(|pod| ready(pod)) {
            writes.extend(old.iter().map(|pod| delete(Kind::Pod, &pod.metadata)));
        } else if !old.is_empty() && surge > 0 {
            surge -= 1;
            writes.extend(new.is_empty().then(make).flatten());
        }
    }
    writes.extend(seen.status(set));
    writes
}

/// How many nodes at a time may have two; a share is rounded up.
fn max_surge(set: &DaemonSet, nodes: usize) -> usize {
    let strategy = set.spec.as_ref().and_then(|spec| spec.update_strategy.as_ref());
    match strategy
        .and_then(|strategy| strategy.rolling_update.as_ref())
        .and_then(|how| how.max_surge.as_ref())
    {
        Some(IntOrString::Int(count)) => usize::try_from(*count).unwrap_or(0),
        Some(IntOrString::String(share)) => {
            let percent = share.trim_end_matches('%').parse().unwrap_or(0);
            (nodes * percent).div_ceil(100)
        }
        None => 0,
    }
}

/// What the nodes have that it wants a pod on.
#[derive(Debug, Default)]
struct Seen {
    wanted: usize,
    scheduled: usize,
    updated: usize,
    ready: usize,
}

impl Seen {
    fn node(&mut self, live: &[&Pod], updated: bool) {
        self.wanted += 1;
        self.scheduled += usize::from(!live.is_empty());
        self.updated += usize::from(updated);
        self.ready += usize::from(live.iter().any(|pod| ready(pod)));
    }

    fn status(&self, set: &DaemonSet) -> Option<Write> {
        let wanted = json!({
            "desiredNumberScheduled": self.wanted,
            "currentNumberScheduled": self.scheduled,
            "updatedNumberScheduled": self.updated,
            "numberReady": self.ready,
            "numberAvailable": self.ready,
            "numberMisscheduled": 0,
            "observedGeneration": set.metadata.generation.unwrap_or_default(),
        });
        status(Kind::DaemonSet, &set.metadata, set.status.as_ref(), wanted)
    }
}

fn on(pod: &Pod, node: &Node) -> bool {
    let name = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
    name == Some(text(node.metadata.name.as_ref()))
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    /// One node with these pods of the set: name, of this template, ready, leaving. What is made and what is deleted.
    fn step(surge: u8, pods: &[(&str, bool, bool, bool)]) -> Vec<String> {
        let set: DaemonSet = serde_json::from_value(json!({
            "metadata": { "name": "set", "namespace": "ns", "uid": "u" },
            "spec": {
                "selector": {}, "template": {},
                "updateStrategy": { "rollingUpdate": { "maxSurge": surge } },
            },
        }))
        .unwrap();
        let revision = fingerprint(&set.spec.as_ref().unwrap().template);
        let pod = |&(name, current, ready, leaving): &(&str, bool, bool, bool)| -> Pod {
            let time = leaving.then_some("2026-01-01T00:00:00Z");
            let hash = if current { &revision } else { "other" };
            let ready = if ready { "True" } else { "False" };
            serde_json::from_value(json!({
                "metadata": {
                    "name": name, "namespace": "ns", "labels": { REVISION: hash }, "deletionTimestamp": time,
                    "ownerReferences": [{
                        "apiVersion": "apps/v1", "kind": "DaemonSet", "name": "set", "uid": "u", "controller": true,
                    }],
                },
                "spec": { "nodeName": "n1", "containers": [] },
                "status": { "conditions": [{ "type": "Ready", "status": ready }] },
            }))
            .unwrap()
        };
        let node = serde_json::from_value(json!({ "metadata": { "name": "n1" } })).unwrap();
        let state = State { nodes: vec![node], pods: pods.iter().map(pod).collect(), ..State::default() };
        let told = |write: Write| match write {
            Write::Create(_, pod) => Some(format!("make on {}", pod["spec"]["nodeName"].as_str()?)),
            Write::Delete { name, .. } => Some(format!("delete {name}")),
            _ => None,
        };
        one(&state, &set).into_iter().filter_map(told).collect()
    }

    #[test]
    fn a_pod_of_an_older_template_is_replaced() {
        let none: [&str; 0] = [];
        assert_eq!(step(0, &[]), ["make on n1"]);
        assert_eq!(step(0, &[("a", true, true, false)]), none);
        assert_eq!(step(0, &[("a", false, true, false)]), ["delete a"]);
        assert_eq!(step(0, &[("a", false, true, true)]), none, "its place is not free yet");
    }

    #[test]
    fn with_surge_the_new_one_is_ready_before_the_old_one_goes() {
        let none: [&str; 0] = [];
        let old = ("old", false, true, false);
        assert_eq!(step(1, &[old]), ["make on n1"]);
        assert_eq!(step(1, &[old, ("new", true, false, false)]), none);
        assert_eq!(step(1, &[old, ("new", true, true, false)]), ["delete old"]);
        // The next one does not wait until the last but one has ended.
        assert_eq!(step(1, &[("gone", false, true, true), old]), ["make on n1"]);
        assert_eq!(step(1, &[("gone", false, true, true)]), none);
    }

    #[test]
    fn a_share_of_the_nodes_is_rounded_up() {
        let set = |surge: Value| {
            let strategy = json!({ "rollingUpdate": { "maxSurge": surge } });
            serde_json::from_value(
                json!({ "spec": { "selector": {}, "template": {}, "updateStrategy": strategy } }),
            )
            .unwrap()
        };
        for (surge, nodes, expect) in
            [(json!(1), 9, 1), (json!("10%"), 2, 1), (json!("50%"), 9, 5), (json!("0%"), 9, 0)]
        {
            assert_eq!(max_surge(&set(surge.clone()), nodes), expect, "{surge} of {nodes}");
        }
    }
}
