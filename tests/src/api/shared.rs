//! What every connection and in-process client shares: the cluster's state behind one lock, the signal that it
//! changed, and the knobs with which tests make the server slow or unavailable.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch::{Receiver, Sender};

use super::cluster::Cluster;
use super::{Asked, Availability, LogSource};

/// State and knobs of one server.
pub(super) struct Shared {
    cluster: Mutex<Cluster>,
    changed: Sender<u64>,
    pub(super) delays: Sender<Delays>,
    pub(super) availability: Sender<Availability>,
    /// Counts calls to close all watches.
    pub(super) closed_watches: Sender<u64>,
    logs: Mutex<Option<Arc<LogSource>>>,
    /// By user: what was asked for, and whether it was granted.
    asked: Mutex<HashMap<String, BTreeSet<Asked>>>,
}

impl Shared {
    pub(super) fn new(cluster: Cluster) -> Self {
        Self {
            changed: Sender::new(cluster.store.version()),
            cluster: Mutex::new(cluster),
            delays: Sender::new(Delays::default()),
            availability: Sender::new(Availability::Up),
            closed_watches: Sender::new(0),
            logs: Mutex::new(None),
            asked: Mutex::default(),
        }
    }

    /// The state, locked. No caller holds it across an await.
    pub(super) fn cluster(&self) -> MutexGuard<'_, Cluster> {
        self.cluster.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and wakes the watches.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Cluster) -> T) -> T {
        let mut cluster = self.cluster();
        let result = change(&mut cluster);
        let version = cluster.store.version();
        drop(cluster);
        self.changed.send_if_modified(|seen| std::mem::replace(seen, version.max(*seen)) < version);
        result
    }

    /// Notes what a user asked for.
    pub(super) fn note(&self, user: &str, asked: Asked) {
        let mut all = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(user.to_owned()).or_default().insert(asked);
    }

    /// What a user has asked for.
    pub(super) fn asked(&self, user: &str) -> BTreeSet<Asked> {
        let all = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(user).cloned().unwrap_or_default()
    }

    /// What answers requests for logs, if anything.
    pub(super) fn logs(&self) -> Option<Arc<LogSource>> {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_logs(&self, source: Arc<LogSource>) {
        *self.logs.lock().unwrap_or_else(PoisonError::into_inner) = Some(source);
    }

    /// Wakes when the state has changed.
    pub(super) fn changed(&self) -> Receiver<u64> {
        self.changed.subscribe()
    }
}

/// The injected watch delays.
#[derive(Clone, Debug, Default)]
pub(super) struct Delays(Vec<Delay>);

#[derive(Clone, Debug)]
struct Delay {
    resource: Option<String>,
    user: Option<String>,
    by: Duration,
}

impl Delays {
    /// Sets the delay for exactly this resource and user; zero removes it.
    pub(super) fn set(&mut self, resource: Option<&str>, user: Option<&str>, by: Duration) {
        self.0.retain(|delay| delay.resource.as_deref() != resource || delay.user.as_deref() != user);
        if !by.is_zero() {
            self.0.push(Delay { resource: resource.map(str::to_owned), user: user.map(str::to_owned), by });
        }
    }

    /// The longest delay that applies.
    pub(super) fn of(&self, resource: &str, user: &str) -> Duration {
        self.0
            .iter()
            .filter(|delay| delay.resource.as_deref().is_none_or(|wanted| wanted == resource))
            .filter(|delay| delay.user.as_deref().is_none_or(|wanted| wanted == user))
            .map(|delay| delay.by)
            .max()
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::Delays;

    #[test]
    fn the_longest_matching_delay_wins() {
        let mut delays = Delays::default();
        let seconds = Duration::from_secs;
        delays.set(None, None, seconds(1));
        delays.set(Some("pods"), None, seconds(3));
        delays.set(None, Some("agent"), seconds(2));
        for (resource, user, expect) in
            [("pods", "agent", 3), ("nodes", "agent", 2), ("nodes", "other", 1), ("pods", "other", 3)]
        {
            assert_eq!(delays.of(resource, user), seconds(expect), "{resource} {user}");
        }
        delays.set(Some("pods"), None, Duration::ZERO);
        assert_eq!(delays.of("pods", "other"), seconds(1));
    }
}
