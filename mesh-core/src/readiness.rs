//! Ready or not: named gates, each opened by the part that knows.
//!
//! **Invariant:** a gate exists from the moment that it is asked for, so a part that dies before it is ready leaves
//! the process not ready, and says which part that was.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

/// All gates of one process. Clones are the same set.
#[derive(Clone, Debug)]
pub struct Readiness {
    gates: Arc<Mutex<BTreeMap<&'static str, bool>>>,
    changed: Arc<watch::Sender<()>>,
}

/// One part's say.
#[derive(Clone, Debug)]
pub struct Gate {
    name: &'static str,
    readiness: Readiness,
}

impl Readiness {
    /// Without gates, hence ready: make the gates before you serve the answer.
    pub fn new() -> Self {
        Self { gates: Arc::default(), changed: Arc::new(watch::channel(()).0) }
    }

    /// A closed gate; names are unique in a process.
    pub fn gate(&self, name: &'static str) -> Gate {
        self.set(name, false);
        Gate { name, readiness: self.clone() }
    }

    /// Names of the closed gates; none means ready.
    pub fn pending(&self) -> Vec<&'static str> {
        let gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        gates.iter().filter(|(_, open)| !**open).map(|(name, _)| *name).collect()
    }

    /// Waits until no gate is closed.
    pub async fn ready(&self) {
        let mut changed = self.changed.subscribe();
        while !self.pending().is_empty() {
            // We hold a sender, so the channel cannot close.
            let _ = changed.changed().await;
        }
    }

    fn set(&self, name: &'static str, open: bool) {
        self.gates.lock().unwrap_or_else(PoisonError::into_inner).insert(name, open);
        self.changed.send_replace(());
    }
}

impl Default for Readiness {
    fn default() -> Self {
        Self::new()
    }
}

impl Gate {
    /// This part can do its work.
    pub fn open(&self) {
        self.readiness.set(self.name, true);
    }

    /// This part cannot, for now.
    pub fn close(&self) {
        self.readiness.set(self.name, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn is_ready_when_every_gate_is_open() {
        let readiness = Readiness::new();
        let (xds, pods) = (readiness.gate("xds"), readiness.gate("pods"));
        assert_eq!(readiness.pending(), ["pods", "xds"]);
        pods.open();
        drop(pods);
        assert_eq!(readiness.pending(), ["xds"]);
        let waiting = tokio::spawn({
            let readiness = readiness.clone();
            async move { readiness.ready().await }
        });
        xds.open();
        waiting.await.unwrap();
        xds.close();
        assert_eq!(readiness.pending(), ["xds"]);
    }
}
