//! Policies by what they are about, so that a decision costs what selects its destination, however many there are.

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

impl Writer {
    /// Adds a policy or replaces the one of that name.
    pub fn put_authorization(&mut self, policy: Authorization) {
        self.policies.remove(&policy.key);
        self.policies.put(Arc::new(policy));
        self.changes.policies = true;
    }

    /// Forgets a policy. False if there was none.
    pub fn remove_authorization(&mut self, key: &str) -> bool {
        let known = self.policies.remove(key);
        self.changes.policies |= known;
        known
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

    /// Every policy, for the configuration dump; takes time in proportion to their number.
    pub fn authorizations(&self) -> Vec<Arc<Authorization>> {
        self.published.policies.by_key.values()
    }
}
