//! AuthorizationPolicy: who may connect to whom. Istio's reach: with a selector the pods of its namespace that have those
//! labels, without one all of its namespace, and in the root namespace those of every namespace.
//!
//! A policy with `targetRefs` is about a waypoint, and none of a proxy's business at layer 4.

mod read;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use mesh_core::proto::security as wire;

use super::event::{Custom, Kind, ObjectName};
use super::pod::Labels;
use super::{Changes, Config, Index, PolicyKey, Problem};

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

/// All of them, by namespace.
#[derive(Debug, Default)]
pub(super) struct AuthorizationPolicies(HashMap<Arc<str>, BTreeMap<Arc<str>, AuthorizationPolicy>>);

impl AuthorizationPolicies {
    pub(super) fn names(&self) -> impl Iterator<Item = ObjectName> + '_ {
        let named = |(namespace, all): (&Arc<str>, &BTreeMap<Arc<str>, _>)| {
            all.keys().map(|name| ObjectName::new(namespace, name)).collect::<Vec<_>>()
        };
        self.0.iter().flat_map(named)
    }

    /// As the proxies get it; none when it is not theirs to enforce.
    pub(super) fn resource(&self, name: &ObjectName) -> Option<wire::Authorization> {
        self.0.get(&name.namespace)?.get(&name.name)?.enforced.as_deref().cloned()
    }

    /// Those that select a workload by its labels.
    pub(super) fn selecting(&self, config: &Config, namespace: &str, labels: &Labels) -> Vec<PolicyKey> {
        let of = |(namespace, all): (&Arc<str>, &BTreeMap<Arc<str>, AuthorizationPolicy>)| {
            let selecting = all.iter().filter(|(_, policy)| policy.selects(labels));
            let named = selecting.map(|(name, _)| {
                PolicyKey::Authorization(ObjectName { namespace: namespace.clone(), name: name.clone() })
            });
            named.collect::<Vec<_>>()
        };
        self.in_reach(config, namespace).flat_map(of).collect()
    }

    /// Those that are about a workload without selecting it.
    pub(super) fn at_large(&self, config: &Config, namespace: &str) -> Vec<wire::Authorization> {
        let all = self.in_reach(config, namespace).flat_map(|(_, all)| all.values());
        let all = all.filter(|policy| !policy.is_selecting());
        all.filter_map(|policy| policy.enforced.as_deref().cloned()).collect()
    }

    /// A workload's own namespace, and the root namespace.
    fn in_reach(
        &self,
        config: &Config,
        namespace: &str,
    ) -> impl Iterator<Item = (&Arc<str>, &BTreeMap<Arc<str>, AuthorizationPolicy>)> {
        BTreeSet::from([config.root_namespace.clone(), namespace.to_owned()])
            .into_iter()
            .filter_map(|namespace| self.0.get_key_value(namespace.as_str()))
    }

    fn put(&mut self, name: &ObjectName, policy: AuthorizationPolicy) -> Option<AuthorizationPolicy> {
        self.0.entry(name.namespace.clone()).or_default().insert(name.name.clone(), policy)
    }

    fn remove(&mut self, name: &ObjectName) -> Option<AuthorizationPolicy> {
        let all = self.0.get_mut(&name.namespace)?;
        let removed = all.remove(&name.name);
        if all.is_empty() {
            self.0.remove(&name.namespace);
        }
        removed
    }
}

impl Index {
    pub(super) fn apply_authorization_policy(
        &mut self,
        name: &ObjectName,
        object: &Custom,
        changes: &mut Changes,
    ) {
        let (policy, faults) = read::read(&self.config.root_namespace, name, object);
        let kind = Kind::AuthorizationPolicy;
        let told = (policy.enforced.is_some() || !faults.is_empty()).then(|| faults.clone());
        self.note(kind, name, object, told, changes);
        changes.problems.extend(faults.into_iter().map(|reason| Problem {
            kind,
            name: name.clone(),
            reason,
        }));
        let old = self.authorization_policies.put(name, policy.clone());
        if old.as_ref() != Some(&policy) {
            old.iter()
                .chain([&policy])
                .for_each(|policy| self.touch_authorization_policy(name, policy, changes));
        }
    }

    /// What was known of it stays; else everything is denied that it may be about.
    pub(super) fn unreadable_authorization_policy(&mut self, name: &ObjectName, changes: &mut Changes) {
        if self.authorization_policies.0.get(&name.namespace).is_some_and(|all| all.contains_key(&name.name))
        {
            return;
        }
        let policy = read::unreadable(&self.config.root_namespace, name);
        self.touch_authorization_policy(name, &policy, changes);
        self.authorization_policies.put(name, policy);
    }

    pub(super) fn delete_authorization_policy(&mut self, name: &ObjectName, changes: &mut Changes) {
        if let Some(policy) = self.authorization_policies.remove(name) {
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
