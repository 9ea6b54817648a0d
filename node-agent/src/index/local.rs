//! The pods of this node as enrolment sees them.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as api;
use mesh_core::pod_link::MAX_MESSAGE;
use mesh_core::proto::pods as proto;
use mesh_core::proto::security::Authorization;
use prost::Message as _;

use super::event::{Kind, ObjectName};
use super::membership::{Membership, membership};
use super::namespace::Namespace;
use super::pod::{Pod, Reported};
use super::{Config, Index, Invalid, wds};

/// Stands for the policies of a pod while the agent has yet to list them, or where they are too many for one message of
/// the pod protocol: the model tells all of them. No object can have this name.
const NOT_LISTED: &str = "not_listed_yet";
/// A message with a description has room for its number and its descriptors besides.
const LONGEST_DESCRIPTION: usize = MAX_MESSAGE - 256;

/// A pod of this node.
#[derive(Clone, Debug, PartialEq)]
pub struct LocalPod {
    /// Its name.
    pub name: ObjectName,
    /// Its UID as the runtime and the cgroups have it; for a static pod that is not its object's.
    pub uid: String,
    /// Whether it belongs in the mesh.
    pub membership: Membership,
    /// It says nothing of the mesh itself: its namespace's word counts.
    pub inherits: bool,
    /// From its status: empty until the kubelet has reported them.
    pub addresses: Vec<IpAddr>,
    /// The ports that its probes and lifecycle hooks name: the kubelet reaches them directly.
    pub probe_ports: BTreeSet<u16>,
    /// Whether its DNS queries are captured, once it is enrolled.
    pub dns: bool,
    /// Its traffic is said to be captured (annotation).
    pub annotated: bool,
    /// Succeeded or Failed.
    pub finished: bool,
    /// Being deleted.
    pub terminating: bool,
    /// Our condition in its status.
    pub reported: Option<Reported>,
    /// The other one: whether its capture was found whole.
    pub proved: Option<Reported>,
    /// What its proxy has to know of it, with the addresses above.
    pub description: proto::Pod,
}

impl Index {
    /// The pods of this node, in no order.
    pub fn local_pods(&self) -> Vec<LocalPod> {
        let names = self.pods_of_node.get(self.config.node_name.as_str()).into_iter().flatten();
        names.filter_map(|name| self.pods.get(name)).map(|pod| self.local(pod)).collect()
    }

    /// What the policies say that a pod is subject to, by the protocol's names.
    pub fn policies(&self, name: &ObjectName) -> Vec<Arc<Authorization>> {
        self.pods.get(name).map(|pod| self.policy_bodies(&name.namespace, &pod.labels)).unwrap_or_default()
    }

    /// One pod of any node, when it is known and so is its namespace.
    pub fn pod(&self, name: &ObjectName) -> Option<LocalPod> {
        self.namespaces.get(&name.namespace)?;
        self.pods.get(name).map(|pod| self.local(pod))
    }

    /// One pod that is known, in a namespace as it was fetched.
    pub fn pod_in(&self, name: &ObjectName, namespace: &api::Namespace) -> Option<LocalPod> {
        self.pods.get(name).map(|pod| self.local_in(pod, Some(&Namespace::read(namespace))))
    }

    /// The same answer for objects that were fetched, for when the watch is behind.
    ///
    /// # Errors
    /// When the pod cannot be used.
    pub fn read_pod(&self, pod: &api::Pod, namespace: &api::Namespace) -> Result<LocalPod, Invalid> {
        let name = super::event::Object::Pod(Box::new(pod.clone())).name();
        let pod = Pod::read(&name, pod)?;
        Ok(self.local_in(&pod, Some(&Namespace::read(namespace))))
    }

    fn local(&self, pod: &Pod) -> LocalPod {
        self.local_in(pod, self.namespaces.get(&pod.name.namespace))
    }

    fn local_in(&self, pod: &Pod, namespace: Option<&Namespace>) -> LocalPod {
        let listed = |kind| self.relist.is_known(kind);
        // In doubt nobody gets in, until the proxy hears from the model: it denies for a policy it does not know.
        let in_doubt = || vec![format!("{}/{NOT_LISTED}", self.config.root_namespace)];
        let policies = if listed(Kind::PeerAuthentication) && listed(Kind::AuthorizationPolicy) {
            self.policies_of(&pod.name.namespace, &pod.labels)
        } else {
            in_doubt()
        };
        let mut local = local(&self.config, pod, namespace, policies);
        if local.description.encoded_len() > LONGEST_DESCRIPTION {
            local.description.authorization_policies = in_doubt();
        }
        local
    }
}

fn local(config: &Config, pod: &Pod, namespace: Option<&Namespace>, policies: Vec<String>) -> LocalPod {
    LocalPod {
        name: pod.name.clone(),
        uid: pod.runtime_uid.clone(),
        membership: membership(config, pod, namespace),
        inherits: pod.mode.is_none(),
        addresses: pod.addresses.clone(),
        probe_ports: pod.probe_ports.clone(),
        dns: pod.dns_capture.unwrap_or(config.dns_capture),
        annotated: pod.captured,
        finished: pod.finished,
        terminating: pod.terminating,
        reported: pod.reported.clone(),
        proved: pod.proved.clone(),
        description: proto::Pod {
            uid: pod.runtime_uid.clone(),
            namespace: pod.name.namespace.to_string(),
            name: pod.name.name.to_string(),
            service_account: pod.service_account.clone(),
            addresses: pod.addresses.iter().map(wds::bytes).collect(),
            workload_uid: wds::pod_uid(config, &pod.name),
            trust_domain: config.trust_domain.clone(),
            node: config.node_name.clone(),
            cluster_id: config.cluster_id.clone(),
            workload_name: pod.owner.name.clone(),
            workload_type: pod.owner.kind.into(),
            canonical_name: pod.canonical_name.clone(),
            canonical_revision: pod.canonical_revision.clone(),
            authorization_policies: policies,
        },
    }
}

/// The description of a pod with addresses that its status does not have yet.
pub fn with_addresses(description: &proto::Pod, addresses: &[IpAddr]) -> proto::Pod {
    proto::Pod { addresses: addresses.iter().map(wds::bytes).collect(), ..description.clone() }
}
