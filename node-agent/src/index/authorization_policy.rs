//! AuthorizationPolicy: who may connect to whom. Istio's reach: with a selector the pods of its namespace that have those
//! labels, without one all of its namespace, and in the root namespace those of every namespace.
//!
//! A policy with `targetRefs` is for a waypoint to enforce, and none of a proxy's business at layer 4: its status says
//! that nobody does, as there are no waypoints.

mod read;

use std::collections::BTreeSet;
use std::sync::Arc;

use mesh_core::proto::security as wire;

use super::by_namespace::ByNamespace;
use super::event::{Custom, Kind, ObjectName};
use super::pod::Labels;
use super::{Changes, Config, Index, PolicyKey};

/// What the model keeps of one.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct AuthorizationPolicy {
    /// Empty: all of the namespace.
    selector: Labels,
    /// None: nothing that is decided at layer 4.
    enforced: Option<Arc<wire::Authorization>>,
}

impl AuthorizationPolicy {
    /// What names it in the workloads' lists, rather than being about all of a namespace or mesh.
    fn selects(&self, labels: &Labels) -> bool {
        self.is_selecting() && self.selector.iter().all(|(key, value)| labels.get(key) == Some(value))
    }

    fn is_selecting(&self) -> bool {
        self.enforced.is_some() && !self.selector.is_empty()
    }
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct AuthorizationPolicies(ByNamespace<AuthorizationPolicy>);

impl AuthorizationPolicies {
    pub(super) fn names(&self) -> Vec<ObjectName> {
        self.0.names()
    }

    /// As the proxies get it; none when it is not theirs to enforce.
    pub(super) fn resource(&self, name: &ObjectName) -> Option<Arc<wire::Authorization>> {
        self.0.get(name)?.enforced.clone()
    }

    /// Those that select a workload by its labels.
    pub(super) fn selecting(&self, config: &Config, namespace: &str, labels: &Labels) -> Vec<PolicyKey> {
        let of = |namespace: &str| {
            let selecting = self.0.of(namespace).filter(|(_, policy)| policy.selects(labels));
            let named = selecting.map(|(name, _)| PolicyKey::Authorization(ObjectName::new(namespace, name)));
            named.collect::<Vec<_>>()
        };
        in_reach(config, namespace).flat_map(of).collect()
    }

    /// Those that are about a workload without selecting it.
    pub(super) fn at_large(&self, config: &Config, namespace: &str) -> Vec<Arc<wire::Authorization>> {
        let all = in_reach(config, namespace).flat_map(|namespace| self.0.of(namespace));
        let at_large = all.filter(|(_, policy)| !policy.is_selecting());
        at_large.filter_map(|(_, policy)| policy.enforced.clone()).collect()
    }
}

/// The root namespace, and a workload's own.
fn in_reach<'a>(config: &'a Config, namespace: &'a str) -> impl Iterator<Item = &'a str> {
    let own = Some(namespace).filter(|namespace| *namespace != config.root_namespace);
    std::iter::once(config.root_namespace.as_str()).chain(own)
}

impl Index {
    pub(super) fn apply_authorization_policy(
        &mut self,
        name: &ObjectName,
        object: &Custom,
        changes: &mut Changes,
    ) {
        let (policy, faults) = read::read(&self.config, name, object);
        self.note(Kind::AuthorizationPolicy, name, object, faults, changes);
        let old = self.authorization_policies.0.put(name, policy.clone());
        if old.as_ref() != Some(&policy) {
            for policy in old.iter().chain([&policy]) {
                self.touch_authorization_policy(name, policy, changes);
            }
        }
    }

    /// What was known of it stays; else everything is denied that it may be about, which is said.
    pub(super) fn unreadable_authorization_policy(
        &mut self,
        name: &ObjectName,
        changes: &mut Changes,
    ) -> Option<&'static str> {
        if self.authorization_policies.0.get(name).is_some() {
            return None;
        }
        let policy = read::unreadable(&self.config.root_namespace, name);
        self.touch_authorization_policy(name, &policy, changes);
        self.authorization_policies.0.put(name, policy);
        Some("everything that it may be about is denied")
    }

    pub(super) fn delete_authorization_policy(&mut self, name: &ObjectName, changes: &mut Changes) {
        self.readings.remove(&(Kind::AuthorizationPolicy, name.clone()));
        if let Some(policy) = self.authorization_policies.0.remove(name) {
            self.touch_authorization_policy(name, &policy, changes);
        }
    }

    /// Whatever it is or was about: the lists of the workloads that it selects, and the connections of all others that
    /// are older than their enrolment.
    fn touch_authorization_policy(
        &self,
        name: &ObjectName,
        policy: &AuthorizationPolicy,
        changes: &mut Changes,
    ) {
        changes.policies.insert(PolicyKey::Authorization(name.clone()));
        if !policy.is_selecting() {
            changes.local |= policy.enforced.is_some();
            return;
        }
        let mut touch = |pods: &BTreeSet<ObjectName>| {
            let pods = pods.iter().filter_map(|pod| self.pods.get(pod));
            pods.filter(|pod| policy.selects(&pod.labels)).for_each(|pod| self.touch_pod(pod, changes));
        };
        if *name.namespace == *self.config.root_namespace {
            self.pods_of_namespace.values().for_each(touch);
        } else if let Some(pods) = self.pods_of_namespace.get(&name.namespace) {
            touch(pods);
        }
    }
}
