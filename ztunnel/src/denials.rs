//! Connections that policy denied, for the node agent, which makes Events of them.
//!
//! **Invariant:** told at most once in a while for each client, pod and policy, and whoever dials in vain costs no more
//! than a place in a table of fixed size: its namespace's own, so that what is refused elsewhere is told all the same.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mesh_core::proto::pods::Denied;
use mesh_core::proto::pods::from_ztunnel::Message;
use tokio::sync::mpsc;

/// Before the same is told again. An Event is forgotten an hour after it was made.
const AGAIN: Duration = Duration::from_secs(600);
/// So many are remembered of one namespace's pods, and more are not told: the log has each.
const MOST: usize = 128;
/// That wait for an agent.
const WAITING: usize = 256;
/// Of them those of one namespace's pods.
const WAITING_OF_NAMESPACE: usize = 8;

/// Where they are told; clones are the same.
#[derive(Clone, Debug)]
pub struct Denials {
    told: Arc<Mutex<Told>>,
    sender: mpsc::Sender<Waiting>,
}

/// What the agent is to be told without being asked.
#[derive(Debug)]
pub struct Waiting {
    /// That is said.
    pub message: Message,
    /// A refusal's place among those of its namespace.
    _place: Option<Arc<()>>,
}

impl From<Message> for Waiting {
    fn from(message: Message) -> Self {
        Self { message, _place: None }
    }
}

/// For what the agent is to be told without being asked, and what waits to be.
pub fn queue() -> (mpsc::Sender<Waiting>, mpsc::Receiver<Waiting>) {
    mpsc::channel(WAITING)
}

impl Denials {
    /// By way of this queue.
    pub fn new(sender: mpsc::Sender<Waiting>) -> Self {
        Self { told: Arc::default(), sender }
    }

    /// Tells of one that was to reach a pod of `namespace`, unless it was told of the same lately.
    pub fn tell(&self, namespace: &Arc<str>, denied: Denied) {
        self.tell_at(namespace, denied, Instant::now());
    }

    fn tell_at(&self, namespace: &Arc<str>, denied: Denied, now: Instant) {
        let key = [&*denied.uid, &*denied.client, &*denied.policy].map(Box::from);
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let own = told.of(namespace, now);
        if !own.is_new(&key, now) || Arc::strong_count(&own.places) > WAITING_OF_NAMESPACE {
            return;
        }
        // Where the agent is away for long the newest ones are lost, until they happen again.
        let waiting = Waiting { message: Message::Denied(denied), _place: Some(own.places.clone()) };
        if self.sender.try_send(waiting).is_ok() {
            own.at.insert(key, now);
        }
    }
}

/// Pod, client and policy.
type Key = [Box<str>; 3];

/// By the pod's namespace.
#[derive(Debug, Default)]
struct Told(HashMap<Arc<str>, OfNamespace>);

#[derive(Debug, Default)]
struct OfNamespace {
    at: HashMap<Key, Instant>,
    /// One more than wait for an agent.
    places: Arc<()>,
}

impl Told {
    fn of(&mut self, namespace: &Arc<str>, now: Instant) -> &mut OfNamespace {
        if !self.0.contains_key(namespace) {
            // Whose pods are gone from the node is forgotten.
            self.0.retain(|_, of| {
                of.forget(now);
                !of.at.is_empty()
            });
        }
        self.0.entry(namespace.clone()).or_default()
    }
}

impl OfNamespace {
    /// Whether it is to be told, and can be remembered.
    fn is_new(&mut self, key: &Key, now: Instant) -> bool {
        if self.at.get(key).is_some_and(|at| lately(*at, now)) {
            return false;
        }
        if self.at.len() >= MOST {
            self.forget(now);
        }
        self.at.len() < MOST
    }

    fn forget(&mut self, now: Instant) {
        self.at.retain(|_, at| lately(*at, now));
    }
}

fn lately(at: Instant, now: Instant) -> bool {
    now.saturating_duration_since(at) < AGAIN
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denied(client: usize, policy: &str) -> Denied {
        Denied { uid: "pod".into(), client: client.to_string(), policy: policy.into(), ..Default::default() }
    }

    fn both() -> (Denials, mpsc::Receiver<Waiting>) {
        let (sender, receiver) = queue();
        (Denials::new(sender), receiver)
    }

    fn refusal(waiting: Waiting) -> Denied {
        match waiting.message {
            Message::Denied(denied) => denied,
            other => panic!("{other:?} is no refusal"),
        }
    }

    /// How many are told of these, where the agent takes each at once.
    fn told(
        (denials, waiting): &mut (Denials, mpsc::Receiver<Waiting>),
        namespace: &str,
        clients: std::ops::Range<usize>,
        now: Instant,
    ) -> usize {
        let tell = |client| {
            denials.tell_at(&namespace.into(), denied(client, "shop/a"), now);
            usize::from(waiting.try_recv().is_ok())
        };
        clients.map(tell).sum()
    }

    #[test]
    fn once_in_a_while_for_each_client_and_policy() {
        let (mut both, now) = (both(), Instant::now());
        assert_eq!(told(&mut both, "shop", 0..2, now), 2);
        assert_eq!(told(&mut both, "shop", 0..2, now + AGAIN / 2), 0);
        both.0.tell_at(&"shop".into(), denied(1, "shop/b"), now);
        assert_eq!(refusal(both.1.try_recv().unwrap()).policy, "shop/b");
        assert_eq!(told(&mut both, "shop", 0..2, now + AGAIN), 2);
    }

    #[test]
    fn so_many_of_one_namespace_and_no_more() {
        let (mut both, now) = (both(), Instant::now());
        assert_eq!(told(&mut both, "shop", 0..2 * MOST, now), MOST);
        assert_eq!(told(&mut both, "bank", 0..3, now), 3, "another one's are told");
        assert_eq!(told(&mut both, "shop", 2 * MOST..2 * MOST + 1, now + AGAIN), 1, "there is room again");
        assert_eq!(told(&mut both, "pay", 0..1, now + 2 * AGAIN), 1);
        assert_eq!(both.0.told.lock().unwrap().0.len(), 1, "the others are forgotten");
    }

    /// While no agent takes any.
    #[test]
    fn what_could_not_be_told_is_told_later_and_one_namespace_takes_no_other_s_place() {
        let ((denials, mut waiting), now) = (both(), Instant::now());
        for client in 0..2 * WAITING_OF_NAMESPACE {
            denials.tell_at(&"shop".into(), denied(client, "shop/a"), now);
        }
        denials.tell_at(&"bank".into(), denied(0, "bank/a"), now);
        let mut drain = || {
            let mut all = Vec::new();
            while let Ok(one) = waiting.try_recv() {
                all.push(refusal(one).client);
            }
            all
        };
        assert_eq!(drain().len(), WAITING_OF_NAMESPACE + 1);
        let last = 2 * WAITING_OF_NAMESPACE - 1;
        denials.tell_at(&"shop".into(), denied(last, "shop/a"), now);
        assert_eq!(drain(), [last.to_string()], "it was not told yet");
    }
}
