//! Policies by what they are about, so that a decision costs what selects its destination, however many there are.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::sharded::{Shards, ShardsWriter};
use super::{Reader, Writer};
use crate::authz::{Applying, Authorization, Rules, Scope};
use crate::workload::Workload;

/// Whom a policy is about without naming it: the workloads of a namespace, or all (None).
type Area = Option<Arc<str>>;
type Policies = Arc<[Arc<Authorization>]>;

/// The readers' side.
#[derive(Debug, Default)]
pub(super) struct Published {
    by_key: Shards<Arc<str>, Arc<Authorization>>,
    by_area: Shards<Area, Policies>,
    count: AtomicUsize,
    refused: AtomicUsize,
}

impl Published {
    pub(super) fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    pub(super) fn refused(&self) -> usize {
        self.refused.load(Ordering::Relaxed)
    }
}

/// The writer's side.
#[derive(Debug)]
pub(super) struct Book {
    by_key: ShardsWriter<Arc<str>, Arc<Authorization>>,
    by_area: ShardsWriter<Area, Policies>,
    refused: usize,
}

impl Book {
    pub(super) fn new(published: &Published) -> Self {
        Self {
            by_key: ShardsWriter::new(&published.by_key),
            by_area: ShardsWriter::new(&published.by_area),
            refused: 0,
        }
    }

    pub(super) fn commit(&mut self, published: &Published) {
        self.by_key.commit(&published.by_key);
        self.by_area.commit(&published.by_area);
        published.count.store(self.by_key.len(), Ordering::Relaxed);
        published.refused.store(self.refused, Ordering::Relaxed);
    }

    fn put(&mut self, policy: Arc<Authorization>) {
        if let Some(area) = area(&policy) {
            self.by_area.update(&area, |all| {
                Some(all.iter().flat_map(|all| all.iter()).chain([&policy]).cloned().collect())
            });
        }
        self.refused += usize::from(is_refused(&policy));
        self.by_key.insert(policy.key.clone(), policy);
    }

    fn remove(&mut self, key: &str) -> bool {
        let Some(policy) = self.by_key.remove(key) else { return false };
        self.refused -= usize::from(is_refused(&policy));
        if let Some(area) = area(&policy) {
            self.by_area.update(&area, |all| {
                let rest: Policies = all?.iter().filter(|other| *other.key != *key).cloned().collect();
                (!rest.is_empty()).then_some(rest)
            });
        }
        true
    }
}

fn is_refused(policy: &Authorization) -> bool {
    matches!(policy.rules, Rules::Refused(_))
}

fn area(policy: &Authorization) -> Option<Area> {
    match policy.scope {
        Scope::Global => Some(None),
        Scope::Namespace | Scope::Unreadable => Some(Some(policy.namespace.clone())),
        Scope::Selected => None,
    }
}

/// Policies that changed, by whom they are or were about: nobody else has to be judged anew.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChangedPolicies {
    areas: HashSet<Area>,
    keys: HashSet<Arc<str>>,
}

impl ChangedPolicies {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Whether one of them is, or was, about the workload.
    pub fn concern(&self, workload: &Workload) -> bool {
        self.areas.iter().any(|area| area.as_ref().is_none_or(|of| *of == workload.namespace))
            || workload.authorization_policies.iter().any(|name| self.keys.contains(name))
    }

    /// Their names, whether they are still there or not.
    pub fn named(&self) -> impl Iterator<Item = &str> {
        self.keys.iter().map(|key| &**key)
    }

    fn note(&mut self, policy: &Authorization) {
        self.areas.extend(area(policy));
        self.keys.insert(policy.key.clone());
    }
}

impl Writer {
    /// Adds a policy or replaces the one of that name.
    pub fn put_authorization(&mut self, policy: Authorization) {
        if let Some(old) = self.policies.by_key.get(&*policy.key) {
            if *old == policy {
                return;
            }
            self.changes.policies.note(&old);
        }
        self.changes.policies.note(&policy);
        self.policies.remove(&policy.key);
        self.policies.put(Arc::new(policy));
    }

    /// Forgets a policy. False if there was none.
    pub fn remove_authorization(&mut self, key: &str) -> bool {
        let Some(old) = self.policies.by_key.get(key) else { return false };
        self.changes.policies.note(&old);
        self.policies.remove(key)
    }

    /// The policy of that name as it will be at the next commit.
    pub fn authorization(&self, key: &str) -> Option<Arc<Authorization>> {
        self.policies.by_key.get(key)
    }
}

impl Reader {
    /// The policies that are about a workload.
    pub fn policies_of(&self, workload: &Workload) -> Applying {
        let published = &self.published.policies;
        let mut applying = Applying::default();
        for area in [None, Some(workload.namespace.clone())] {
            applying.policies.extend(published.by_area.get(&area).iter().flat_map(|all| all.iter().cloned()));
        }
        for name in &workload.authorization_policies {
            match published.by_key.get(&**name) {
                Some(policy) => applying.policies.push(policy),
                None => applying.unknown = Some(name.clone()),
            }
        }
        applying
    }

    /// Whether there is a policy of that name.
    pub fn has_authorization(&self, key: &str) -> bool {
        self.published.policies.by_key.get(key).is_some()
    }

    /// Every policy, for the configuration dump; takes time in proportion to their number.
    pub fn authorizations(&self) -> Vec<Arc<Authorization>> {
        self.published.policies.by_key.values()
    }
}
