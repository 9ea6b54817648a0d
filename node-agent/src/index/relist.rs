//! Which objects a list has named so far, per kind.
//!
//! **Invariant:** nothing is deleted by a list that did not complete.

use std::collections::{HashMap, HashSet};

use super::event::{Kind, ObjectName};

/// Lists under way and lists completed.
#[derive(Debug, Default)]
pub(super) struct Relist {
    open: HashMap<Kind, HashSet<ObjectName>>,
    completed: HashSet<Kind>,
}

impl Relist {
    /// A list begins, perhaps in place of one that broke off.
    pub(super) fn start(&mut self, kind: Kind) {
        self.open.insert(kind, HashSet::new());
    }

    /// An object exists.
    pub(super) fn saw(&mut self, kind: Kind, name: &ObjectName) {
        if let Some(seen) = self.open.get_mut(&kind) {
            seen.insert(name.clone());
        }
    }

    /// The list is complete: all that exists of the kind; none if no list had begun.
    pub(super) fn finish(&mut self, kind: Kind) -> Option<HashSet<ObjectName>> {
        self.completed.insert(kind);
        self.open.remove(&kind)
    }

    /// Whether the kind was listed at least once.
    pub(super) fn is_known(&self, kind: Kind) -> bool {
        self.completed.contains(&kind)
    }

    /// Whether every kind was that has to be.
    pub(super) fn is_complete(&self) -> bool {
        Kind::ALL.into_iter().all(|kind| self.is_known(kind))
    }
}
