//! Handshakes that are not finished, of clients that have proved nothing yet: there is always a place, at the cost of
//! another.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// Unfinished handshakes, the oldest first.
#[derive(Debug)]
pub(super) struct Handshakes {
    max: usize,
    state: Mutex<Unfinished>,
}

#[derive(Debug, Default)]
struct Unfinished {
    next: u64,
    queue: VecDeque<Entry>,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    client: IpAddr,
    give_way: oneshot::Sender<()>,
}

/// A handshake's place, freed on drop.
#[derive(Debug)]
pub struct Handshake {
    id: u64,
    told: oneshot::Receiver<()>,
    all: Arc<Handshakes>,
}

impl Handshake {
    /// Completes when another has got the place.
    pub async fn gave_way(&mut self) {
        // An error: nobody is left who could tell.
        if (&mut self.told).await.is_err() {
            std::future::pending().await
        }
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        let mut state = self.all.lock();
        if let Ok(place) = state.queue.binary_search_by_key(&self.id, |entry| entry.id) {
            state.queue.remove(place);
        }
    }
}

impl Handshakes {
    pub(super) fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { max, state: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Unfinished> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a handshake with `client`; the oldest of the busiest client's gives way when there is none.
    pub(super) fn begin(self: &Arc<Self>, client: IpAddr) -> Handshake {
        let mut state = self.lock();
        if state.queue.len() >= self.max
            && let Some(entry) = state.victim(client).and_then(|place| state.queue.remove(place))
        {
            // It may have ended in this moment.
            let _ = entry.give_way.send(());
        }
        let (give_way, told) = oneshot::channel();
        let id = state.next;
        state.next += 1;
        state.queue.push_back(Entry { id, client, give_way });
        Handshake { id, told, all: self.clone() }
    }
}

impl Unfinished {
    /// The oldest of the client that has most with the newcomer: a flood from one address displaces itself only.
    fn victim(&self, newcomer: IpAddr) -> Option<usize> {
        let mut counts = HashMap::from([(newcomer, 1)]);
        for entry in &self.queue {
            *counts.entry(entry.client).or_insert(0) += 1;
        }
        let most = self.queue.iter().map(|entry| counts[&entry.client]).max()?;
        self.queue.iter().position(|entry| counts[&entry.client] == most)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn client(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    #[test]
    fn the_oldest_handshake_of_the_busiest_client_gives_way() {
        let handshakes = Handshakes::new(4);
        let gave_way = |handshake: &mut Handshake| handshake.gave_way().now_or_never().is_some();
        let mut honest = handshakes.begin(client(1));
        let mut flood: Vec<_> = (0..100).map(|_| handshakes.begin(client(2))).collect();
        let displaced: Vec<bool> = flood.iter_mut().map(gave_way).collect();
        assert!(displaced[..97].iter().all(|gone| *gone) && !displaced[97..].iter().any(|gone| *gone));
        assert!(!gave_way(&mut honest));
        let mut late = handshakes.begin(client(3));
        assert!(gave_way(&mut flood[97]), "also for a newcomer from elsewhere");
        assert!(!gave_way(&mut honest) && !gave_way(&mut late));
        drop(flood);
        assert_eq!(handshakes.lock().queue.len(), 2, "given back");
    }

    #[test]
    fn among_equals_the_oldest_gives_way() {
        let handshakes = Handshakes::new(3);
        let mut all: Vec<_> = (0..5).map(|last| handshakes.begin(client(last))).collect();
        let displaced: Vec<bool> =
            all.iter_mut().map(|handshake| handshake.gave_way().now_or_never().is_some()).collect();
        assert_eq!(displaced, [true, true, false, false, false]);
    }
}
