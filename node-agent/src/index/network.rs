//! Network policies, as far as the mesh has to know of them: which pods of this node none can apply to. A connection
//! between two such pods needs not pass the network, where the CNI would enforce them.
//!
//! **Invariant:** in doubt one applies: before the policies are listed, where one cannot be read, and wherever the CNI
//! brings kinds of its own, which are not understood here.

use std::collections::HashMap;
use std::sync::Arc;

use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};

use super::event::ObjectName;
use super::pod::{Labels, Pod};
use super::{Changes, Index, Key};

/// API groups whose kinds restrict what may reach a pod, beside those of Kubernetes: Cilium, Calico (with and without its
/// API server), Antrea, OVN-Kubernetes, Kube-OVN, the AWS VPC CNI, GKE, NSX, and the cluster-wide policies of SIG Network.
const POLICY_GROUPS: [&str; 10] = [
    "cilium.io",
    "crd.projectcalico.org",
    "projectcalico.org",
    "crd.antrea.io",
    "k8s.ovn.org",
    "kubeovn.io",
    "networking.k8s.aws",
    "networking.gke.io",
    "crd.nsx.vmware.com",
    "policy.networking.k8s.io",
];

/// What is known of them.
#[derive(Debug, Default)]
pub(super) struct Network {
    policies: HashMap<Arc<str>, HashMap<Arc<str>, Selected>>,
    listed: bool,
    /// Whether the API server serves kinds that are not understood here; none: not known yet.
    foreign: Option<bool>,
}

/// The pods of its namespace that a policy applies to.
#[derive(Clone, Debug, PartialEq)]
enum Selected {
    /// All; also where it cannot be read.
    All,
    By(LabelSelector),
}

impl Network {
    /// Whether none can apply to the pod.
    pub(super) fn leaves_alone(&self, pod: &Pod) -> bool {
        let policies = || self.policies.get(&pod.name.namespace).into_iter().flat_map(HashMap::values);
        self.listed && self.foreign == Some(false) && !policies().any(|policy| policy.selects(&pod.labels))
    }

    pub(super) fn names(&self) -> Vec<ObjectName> {
        let of = |(namespace, policies): (&Arc<str>, &HashMap<Arc<str>, Selected>)| {
            policies.keys().map(|name| ObjectName::new(namespace, name)).collect::<Vec<_>>()
        };
        self.policies.iter().flat_map(of).collect()
    }
}

impl Selected {
    fn selects(&self, labels: &Labels) -> bool {
        match self {
            Self::All => true,
            Self::By(selector) => {
                let equal = |(key, value): (&String, &String)| labels.get(key) == Some(value);
                selector.match_labels.iter().flatten().all(equal)
                    && selector.match_expressions.iter().flatten().all(|one| meets(one, labels))
            }
        }
    }
}

fn meets(requirement: &LabelSelectorRequirement, labels: &Labels) -> bool {
    let value = labels.get(&requirement.key);
    let listed = |value: &String| requirement.values.iter().flatten().any(|one| one == value);
    match requirement.operator.as_str() {
        "In" => value.is_some_and(listed),
        "NotIn" => !value.is_some_and(listed),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        // Of a later Kubernetes.
        _ => true,
    }
}

impl Index {
    pub(super) fn apply_network_policy(
        &mut self,
        name: &ObjectName,
        policy: &NetworkPolicy,
        changes: &mut Changes,
    ) {
        let selector = policy.spec.as_ref().and_then(|spec| spec.pod_selector.clone());
        self.put_policy(name, selector.map_or(Selected::All, Selected::By), changes);
    }

    /// One that cannot be read may be about any pod.
    pub(super) fn unreadable_network_policy(&mut self, name: &ObjectName, changes: &mut Changes) {
        self.put_policy(name, Selected::All, changes);
    }

    fn put_policy(&mut self, name: &ObjectName, selected: Selected, changes: &mut Changes) {
        let policies = self.network.policies.entry(name.namespace.clone()).or_default();
        if policies.get(&name.name) != Some(&selected) {
            policies.insert(name.name.clone(), selected);
            self.touch_shortcuts(Some(&name.namespace), changes);
        }
    }

    pub(super) fn delete_network_policy(&mut self, name: &ObjectName, changes: &mut Changes) {
        let Some(policies) = self.network.policies.get_mut(&name.namespace) else { return };
        policies.remove(&name.name);
        if policies.is_empty() {
            self.network.policies.remove(&name.namespace);
        }
        self.touch_shortcuts(Some(&name.namespace), changes);
    }

    /// All network policies are known.
    pub(super) fn network_policies_listed(&mut self, changes: &mut Changes) {
        if !std::mem::replace(&mut self.network.listed, true) {
            self.touch_shortcuts(None, changes);
        }
    }

    /// These API groups are served.
    pub(super) fn api_groups(&mut self, groups: &[String], changes: &mut Changes) {
        let foreign = groups.iter().any(|group| POLICY_GROUPS.contains(&group.as_str()));
        if self.network.foreign.replace(foreign) != Some(foreign) {
            self.touch_shortcuts(None, changes);
        }
    }

    /// This node's pods may or may not skip the network now: those of a namespace, or all.
    fn touch_shortcuts(&self, namespace: Option<&Arc<str>>, changes: &mut Changes) {
        let pods = self.pods_of_node.get(self.config.node_name.as_str()).into_iter().flatten();
        let concerned = pods.filter(|pod| namespace.is_none_or(|namespace| pod.namespace == *namespace));
        changes.keys.extend(concerned.map(|pod| Key::Pod(pod.clone())));
    }
}
