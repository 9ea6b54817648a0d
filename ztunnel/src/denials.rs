//! Connections that policy denied, for the node agent, which makes Events of them.
//!
//! **Invariant:** told at most once in a while for each client, pod and policy, and whoever dials in vain costs no more
//! than a place in a table of fixed size.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mesh_core::proto::pods::Denied;
use mesh_core::proto::pods::from_ztunnel::Message;
use tokio::sync::mpsc;

/// Before the same is told again. An Event is forgotten an hour after it was made.
const AGAIN: Duration = Duration::from_secs(600);
/// So many are remembered, and more are not told: the log has each.
const MOST: usize = 1024;
/// That wait for an agent.
const WAITING: usize = 64;

/// Where they are told; clones are the same.
#[derive(Clone, Debug)]
pub struct Denials {
    told: Arc<Mutex<Told>>,
    sender: mpsc::Sender<Message>,
}

/// For what the agent is to be told without being asked, and what waits to be.
pub fn queue() -> (mpsc::Sender<Message>, mpsc::Receiver<Message>) {
    mpsc::channel(WAITING)
}

impl Denials {
    /// By way of this queue.
    pub fn new(sender: mpsc::Sender<Message>) -> Self {
        Self { told: Arc::default(), sender }
    }

    /// Tells of one, unless it was told of the same lately.
    pub fn tell(&self, denied: Denied) {
        let key = [&*denied.uid, &*denied.client, &*denied.policy].map(Box::from);
        let is_new = self.told.lock().unwrap_or_else(PoisonError::into_inner).is_new(key, Instant::now());
        if is_new {
            // Where the agent is away for long the newest ones are lost.
            let _ = self.sender.try_send(Message::Denied(denied));
        }
    }
}

/// Pod, client and policy.
type Key = [Box<str>; 3];

#[derive(Debug, Default)]
struct Told(HashMap<Key, Instant>);

impl Told {
    fn is_new(&mut self, key: Key, now: Instant) -> bool {
        let lately = |at: &Instant| now.saturating_duration_since(*at) < AGAIN;
        if self.0.get(&key).is_some_and(lately) {
            return false;
        }
        if self.0.len() >= MOST {
            self.0.retain(|_, at| lately(at));
        }
        let room = self.0.len() < MOST;
        if room {
            self.0.insert(key, now);
        }
        room
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(client: usize, policy: &str) -> Key {
        ["pod".into(), client.to_string().into(), policy.into()]
    }

    #[test]
    fn once_in_a_while_for_each_client_and_policy() {
        let (mut told, now) = (Told::default(), Instant::now());
        assert!(told.is_new(key(1, "shop/a"), now));
        assert!(!told.is_new(key(1, "shop/a"), now + AGAIN / 2));
        assert!(told.is_new(key(2, "shop/a"), now) && told.is_new(key(1, "shop/b"), now));
        assert!(told.is_new(key(1, "shop/a"), now + AGAIN));
    }

    #[test]
    fn so_many_and_no_more() {
        let (mut told, now) = (Told::default(), Instant::now());
        let new = (0..2 * MOST).filter(|client| told.is_new(key(*client, "shop/a"), now)).count();
        assert_eq!((new, told.0.len()), (MOST, MOST));
        assert!(told.is_new(key(2 * MOST, "shop/a"), now + AGAIN), "there is room again");
    }
}
