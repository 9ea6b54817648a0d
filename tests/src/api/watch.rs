//! A watch: the changes of one resource after a version, as one client may see them.
//! The selector decides per change whether an object appeared, changed or went away for this client.
//! **Invariant:** an event is handed out before `last` moves past it, so a cancelled `next` loses nothing.

use std::collections::VecDeque;
use std::sync::Arc;

use serde_json::Value;
use tokio::sync::watch::Receiver;
use tokio::time::sleep_until;

use super::kinds::Kind;
use super::meta;
use super::select::Selector;
use super::shared::Shared;
use super::status::Status;
use super::store::Change;

/// What happened to an object, for a watcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// It is there, or is selected from now on.
    Added,
    /// It changed.
    Modified,
    /// It is gone, or is no longer selected.
    Deleted,
}

impl EventKind {
    /// The `type` of the event on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Added => "ADDED",
            Self::Modified => "MODIFIED",
            Self::Deleted => "DELETED",
        }
    }
}

/// One event of a watch.
#[derive(Clone, Debug)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// The object after it; for a deletion its last state, for one that is no longer selected the last that was.
    pub object: Arc<Value>,
}

/// A stream of events; see [`super::Client::watch`].
pub struct Watch {
    shared: Arc<Shared>,
    changed: Receiver<u64>,
    scope: Scope,
    initial: VecDeque<Arc<Value>>,
    last: u64,
}

/// What a watch is about and for whom.
#[derive(Clone, Debug)]
pub(super) struct Scope {
    pub(super) kind: Arc<Kind>,
    pub(super) namespace: Option<String>,
    pub(super) selector: Selector,
    /// Whose watch delay applies; none for in-process clients, which are never delayed.
    pub(super) user: Option<String>,
}

impl Watch {
    /// From a version, or from the present state (told as `Added` events) when `after` is none.
    pub(super) fn new(shared: Arc<Shared>, scope: Scope, after: Option<u64>) -> Self {
        let changed = shared.changed();
        let (initial, last) = match after {
            Some(version) => (VecDeque::new(), version),
            None => {
                let cluster = shared.cluster();
                let objects = cluster.store.list(&scope.kind.resource(), scope.namespace.as_deref());
                let selected = objects.filter(|object| scope.selector.matches(object)).cloned().collect();
                (selected, cluster.store.version())
            }
        };
        Self { shared, changed, scope, initial, last }
    }

    /// How many events of the present state are still to come.
    pub(super) fn initial_left(&self) -> usize {
        self.initial.len()
    }

    /// The version up to which this watch has told everything.
    pub(super) fn version(&self) -> u64 {
        self.last
    }

    /// The next event. Fails with 410 Gone when the history no longer reaches back far enough, with 404 once the kind
    /// is no longer served. Cancel-safe.
    pub async fn next(&mut self) -> Result<Event, Status> {
        if let Some(object) = self.initial.pop_front() {
            return Ok(Event { kind: EventKind::Added, object });
        }
        loop {
            self.changed.borrow_and_update();
            let (change, seen, served) = {
                let cluster = self.shared.cluster();
                let (change, seen) = cluster.store.next_change(&self.scope.kind.resource(), self.last)?;
                (change, seen, cluster.kinds.serves(&self.scope.kind))
            };
            let Some(change) = change else {
                if !served {
                    return Err(Status::unknown_path());
                }
                self.last = seen;
                if self.changed.changed().await.is_err() {
                    return Err(Status::unavailable(503));
                }
                continue;
            };
            self.wait_until_due(&change).await;
            self.last = seen;
            if let Some(event) = self.scope.event(&change) {
                return Ok(event);
            }
        }
    }

    /// Waits out the injected delay, looking again whenever the rules change.
    async fn wait_until_due(&self, change: &Change) {
        let Some(user) = &self.scope.user else { return };
        let mut rules = self.shared.delays.subscribe();
        loop {
            let due = change.at + rules.borrow_and_update().of(&self.scope.kind.resource(), user);
            tokio::select! {
                () = sleep_until(due) => return,
                changed = rules.changed() => if changed.is_err() { return },
            }
        }
    }
}

impl Scope {
    fn sees(&self, object: &Value) -> bool {
        self.namespace.as_deref().is_none_or(|namespace| namespace == meta::namespace(object))
            && self.selector.matches(object)
    }

    fn event(&self, change: &Change) -> Option<Event> {
        let before = change.previous.as_ref().is_some_and(|previous| self.sees(previous));
        let after = !change.deleted && self.sees(&change.object);
        let kind = match (before, after) {
            (false, false) => return None,
            (false, true) => EventKind::Added,
            (true, true) => EventKind::Modified,
            (true, false) => EventKind::Deleted,
        };
        let object = match &change.previous {
            // What the client saw of it last: what it became is not the client's to see.
            Some(previous) if kind == EventKind::Deleted && !change.deleted => {
                let mut last = (**previous).clone();
                last["metadata"]["resourceVersion"] = change.version.to_string().into();
                Arc::new(last)
            }
            _ => change.object.clone(),
        };
        Some(Event { kind, object })
    }
}
