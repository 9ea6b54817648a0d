//! Policies by their namespace, which says whom they can be about.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;

use super::event::ObjectName;

/// All objects of one kind.
pub(super) struct ByNamespace<T>(HashMap<Arc<str>, BTreeMap<Arc<str>, T>>);

impl<T> ByNamespace<T> {
    pub(super) fn names(&self) -> Vec<ObjectName> {
        let named = |(namespace, all): (&Arc<str>, &BTreeMap<Arc<str>, T>)| {
            let name = |name: &Arc<str>| ObjectName { namespace: namespace.clone(), name: name.clone() };
            all.keys().map(name).collect::<Vec<_>>()
        };
        self.0.iter().flat_map(named).collect()
    }

    pub(super) fn get(&self, name: &ObjectName) -> Option<&T> {
        self.0.get(&name.namespace)?.get(&name.name)
    }

    /// Those of one namespace with their names, by name.
    pub(super) fn of(&self, namespace: &str) -> impl Iterator<Item = (&Arc<str>, &T)> {
        self.0.get(namespace).into_iter().flatten()
    }

    /// What was there before.
    pub(super) fn put(&mut self, name: &ObjectName, one: T) -> Option<T> {
        self.0.entry(name.namespace.clone()).or_default().insert(name.name.clone(), one)
    }

    pub(super) fn remove(&mut self, name: &ObjectName) -> Option<T> {
        let all = self.0.get_mut(&name.namespace)?;
        let removed = all.remove(&name.name);
        if all.is_empty() {
            self.0.remove(&name.namespace);
        }
        removed
    }
}

impl<T> Default for ByNamespace<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<T: fmt::Debug> fmt::Debug for ByNamespace<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
