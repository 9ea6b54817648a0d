//! The one writer of the index: takes events in, publishes what changed, tells enrolment when local pods did.
//!
//! **Invariant:** the lock is held for one event or one question, never across an await.

use std::sync::{Arc, PoisonError, RwLock};

use k8s_openapi::api::core::v1::{Namespace, Pod};
use mesh_core::proto::security::Authorization;
use mesh_core::readiness::Gate;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::index::event::{Kind, ObjectName};
use crate::index::local::LocalPod;
use crate::index::verdict::Verdict;
use crate::index::{Changes, Config, Index, Invalid};
use crate::watch::Source;
use crate::xds::server::Publisher;

/// Feeds the index.
#[derive(Debug)]
pub struct Writer {
    index: Arc<RwLock<Index>>,
    state: watch::Sender<State>,
    verdicts: watch::Sender<Verdicts>,
}

/// Asks the index.
#[derive(Clone, Debug)]
pub struct Reader {
    index: Arc<RwLock<Index>>,
    state: watch::Receiver<State>,
    verdicts: watch::Receiver<Verdicts>,
}

/// What a reader waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct State {
    synced: bool,
    /// Counts the changes that concern local pods.
    local: u64,
}

/// Counts how often a policy's status was to be written; apart, so that nobody else is woken.
type Verdicts = u64;

/// A new pair over an empty index.
pub fn model(config: Config) -> (Writer, Reader) {
    let index = Arc::new(RwLock::new(Index::new(config)));
    let (state, states) = watch::channel(State::default());
    let (told, verdicts) = watch::channel(Verdicts::default());
    (Writer { index: Arc::clone(&index), state, verdicts: told }, Reader { index, state: states, verdicts })
}

impl Writer {
    /// Takes events in until there are no more, or `shutdown`.
    pub async fn run(
        self,
        mut source: impl Source,
        publisher: Publisher,
        synced: Gate,
        shutdown: CancellationToken,
    ) {
        let mut is_synced = false;
        loop {
            let event = tokio::select! {
                () = shutdown.cancelled() => return,
                event = source.next() => event,
            };
            let Some(event) = event else { return };
            let changes = {
                let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
                index.handle(event)
            };
            self.publish(&changes, &publisher);
            if !is_synced && self.read(Index::is_synced) {
                is_synced = true;
                info!("everything is listed; serving it from now on");
                publisher.complete();
                synced.open();
                self.state.send_modify(|state| state.synced = true);
            }
            if changes.verdicts {
                self.verdicts.send_modify(|count| *count += 1);
            }
            if changes.local {
                self.state.send_modify(|state| state.local += 1);
            }
        }
    }

    fn publish(&self, changes: &Changes, publisher: &Publisher) {
        for problem in &changes.problems {
            let consequence =
                if problem.skipped { "skipped, what was known of it stays in use: " } else { "" };
            warn!(kind = ?problem.kind, name = %problem.name, "bad object: {consequence}{}", problem.reason);
        }
        let (resources, policies): (Vec<_>, Vec<_>) = self.read(|index| {
            let resource = |key| (index.resource_name(key), index.resource(key));
            let policy = |key| (index.policy_name(key), index.policy(key));
            (changes.keys.iter().map(resource).collect(), changes.policies.iter().map(policy).collect())
        });
        publisher.publish(resources, policies);
    }

    fn read<T>(&self, question: impl FnOnce(&Index) -> T) -> T {
        question(&self.index.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Reader {
    /// Whether everything was listed once.
    pub fn is_synced(&self) -> bool {
        self.state.borrow().synced
    }

    /// Waits for a change that concerns local pods. Ends with the writer.
    pub async fn changed(&mut self) -> Result<(), watch::error::RecvError> {
        self.state.changed().await
    }

    /// Waits until a policy's status is to be written. Ends with the writer.
    pub async fn verdicts_changed(&mut self) -> Result<(), watch::error::RecvError> {
        self.verdicts.changed().await
    }

    /// The policies whose status is to be written.
    pub fn unsaid(&self) -> Vec<(Kind, ObjectName)> {
        self.index.read().unwrap_or_else(PoisonError::into_inner).unsaid()
    }

    /// What is to be written into the status of a policy, as of now.
    pub fn verdict(&self, policy: &(Kind, ObjectName)) -> Option<Verdict> {
        self.index.read().unwrap_or_else(PoisonError::into_inner).verdict(policy)
    }

    /// How many nodes there are.
    pub fn node_count(&self) -> usize {
        self.index.read().unwrap_or_else(PoisonError::into_inner).node_count()
    }

    /// The pods of this node.
    pub fn local_pods(&self) -> Vec<LocalPod> {
        self.index.read().unwrap_or_else(PoisonError::into_inner).local_pods()
    }

    /// The policies that a pod is subject to.
    pub fn policies(&self, name: &ObjectName) -> Vec<Arc<Authorization>> {
        self.index.read().unwrap_or_else(PoisonError::into_inner).policies(name)
    }

    /// One pod, when it and its namespace are known.
    pub fn pod(&self, name: &ObjectName) -> Option<LocalPod> {
        self.index.read().unwrap_or_else(PoisonError::into_inner).pod(name)
    }

    /// A pod and its namespace as they were fetched.
    ///
    /// # Errors
    /// When the pod cannot be used.
    pub fn read_pod(&self, pod: &Pod, namespace: &Namespace) -> Result<LocalPod, Invalid> {
        self.index.read().unwrap_or_else(PoisonError::into_inner).read_pod(pod, namespace)
    }

    /// One pod that is known, in a namespace as it was fetched.
    pub fn pod_in(&self, name: &ObjectName, namespace: &Namespace) -> Option<LocalPod> {
        self.index.read().unwrap_or_else(PoisonError::into_inner).pod_in(name, namespace)
    }
}
