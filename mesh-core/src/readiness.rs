//! Ready or not: named gates, each opened by the part that knows.
//!
//! **Invariant:** a gate exists from the moment that it is asked for, so a part that dies before it is ready leaves
//! the process not ready, and says which part that was, and why where the part has told.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

/// All gates of one process. Clones are the same set.
#[derive(Clone, Debug)]
pub struct Readiness {
    gates: Arc<Mutex<BTreeMap<&'static str, State>>>,
    changed: Arc<watch::Sender<()>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Open,
    /// With what the part says about it, which may be nothing.
    Closed(String),
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
        self.set(name, State::Closed(String::new()));
        Gate { name, readiness: self.clone() }
    }

    /// The closed gates, each as `name` or `name (reason)`; none means ready.
    pub fn pending(&self) -> Vec<String> {
        let gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        let closed = gates.iter().filter_map(|(name, state)| match state {
            State::Open => None,
            State::Closed(reason) if reason.is_empty() => Some((*name).to_owned()),
            State::Closed(reason) => Some(format!("{name} ({reason})")),
        });
        closed.collect()
    }

    /// Waits until no gate is closed.
    pub async fn ready(&self) {
        self.until(<[String]>::is_empty).await;
    }

    /// Waits until this is so of the closed gates (as of [`Self::pending`]), asked again whenever a part has its say.
    pub async fn until(&self, mut met: impl FnMut(&[String]) -> bool) {
        let mut changed = self.changed.subscribe();
        while !met(&self.pending()) {
            // We hold a sender, so the channel cannot close.
            let _ = changed.changed().await;
        }
    }

    fn set(&self, name: &'static str, state: State) {
        self.gates.lock().unwrap_or_else(PoisonError::into_inner).insert(name, state);
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
        self.readiness.set(self.name, State::Open);
    }

    /// This part cannot, for now; `reason` is for people.
    pub fn close(&self, reason: impl Into<String>) {
        self.readiness.set(self.name, State::Closed(reason.into()));
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
        let waiting = tokio::spawn({
            let readiness = readiness.clone();
            async move { readiness.until(|pending| pending == ["xds (the agent is away)"]).await }
        });
        tokio::task::yield_now().await;
        xds.close("the agent is away");
        waiting.await.unwrap();
        assert_eq!(readiness.pending(), ["xds (the agent is away)"]);
        xds.close("");
        assert_eq!(readiness.pending(), ["xds"]);
    }
}
