//! Binds pods to nodes: nodeSelector, then the node with the fewest pods of the same owner, then with the fewest.
//! Resources, taints and affinities are not looked at.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Node, Pod};

use super::{State, Write, controller, finished, leaving, text};

pub(super) fn plan(state: &State) -> Vec<Write> {
    let mut placed: Vec<(&Pod, String)> = Vec::new();
    let mut writes = Vec::new();
    for pod in &state.pods {
        let Some(spec) = &pod.spec else { continue };
        if spec.node_name.is_some() || leaving(&pod.metadata) || finished(pod) {
            continue;
        }
        let admitted = state.nodes.iter().filter(|node| admits(node, spec.node_selector.as_ref()));
        let best = admitted.min_by_key(|node| {
            let name = text(node.metadata.name.as_ref());
            let bound = state.pods.iter().filter(|other| bound_to(other, name));
            let here: Vec<&Pod> =
                bound.chain(placed.iter().filter(|(_, at)| at == name).map(|(other, _)| *other)).collect();
            let siblings = here.iter().filter(|other| siblings(other, pod)).count();
            (siblings, here.len(), name.to_owned())
        });
        if let Some(node) = best {
            let node = text(node.metadata.name.as_ref()).to_owned();
            placed.push((pod, node.clone()));
            writes.push(Write::Bind {
                namespace: text(pod.metadata.namespace.as_ref()).to_owned(),
                name: text(pod.metadata.name.as_ref()).to_owned(),
                node,
            });
        }
    }
    writes
}

/// Whether the node has every label that is asked for.
pub(super) fn admits(node: &Node, selector: Option<&BTreeMap<String, String>>) -> bool {
    let labels = node.metadata.labels.as_ref();
    selector.is_none_or(|selector| {
        selector.iter().all(|(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value))
    })
}

fn bound_to(pod: &Pod, node: &str) -> bool {
    pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(node) && !finished(pod)
}

fn siblings(a: &Pod, b: &Pod) -> bool {
    let owner = controller(&a.metadata);
    let app = |pod: &Pod| pod.metadata.labels.as_ref().and_then(|labels| labels.get("app").cloned());
    (owner.is_some() && owner == controller(&b.metadata))
        || (a.metadata.namespace == b.metadata.namespace && app(a).is_some() && app(a) == app(b))
}
