//! Nodes: where in the world their pods are.

use k8s_openapi::api::core::v1 as api;
use mesh_core::proto::workload as proto;

use super::event::ObjectName;
use super::{Changes, Index, Key};

/// What the model keeps of a Node.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Node {
    /// From its well-known labels.
    pub(super) locality: proto::Locality,
}

impl Node {
    fn read(object: &api::Node) -> Self {
        let label = |key: &str| {
            object.metadata.labels.as_ref().and_then(|labels| labels.get(key)).cloned().unwrap_or_default()
        };
        Self {
            locality: proto::Locality {
                region: label("topology.kubernetes.io/region"),
                zone: label("topology.kubernetes.io/zone"),
                subzone: label("topology.istio.io/subzone"),
            },
        }
    }
}

impl Index {
    /// Where a node is, as far as its labels say.
    pub(super) fn locality(&self, node: &str) -> Option<proto::Locality> {
        let locality = &self.nodes.get(node)?.locality;
        (*locality != proto::Locality::default()).then(|| locality.clone())
    }

    pub(super) fn apply_node(&mut self, name: &ObjectName, object: &api::Node, changes: &mut Changes) {
        let node = Node::read(object);
        let before = self.nodes.insert(name.name.clone(), node.clone()).unwrap_or_default();
        if before != node {
            self.touch_node(name, changes);
        }
    }

    pub(super) fn delete_node(&mut self, name: &ObjectName, changes: &mut Changes) {
        if self.nodes.remove(&name.name).is_some_and(|node| node != Node::default()) {
            self.touch_node(name, changes);
        }
    }

    /// What runs there is somewhere else now.
    fn touch_node(&self, node: &ObjectName, changes: &mut Changes) {
        let pods = self.pods_of_node.get(&node.name).into_iter().flatten();
        changes.keys.extend(pods.cloned().map(Key::Pod));
        changes.keys.extend(self.slices.addresses_of_node(node));
    }
}
