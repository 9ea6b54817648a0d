//! What one pod may have of the proxy, over all its listeners: connections, memory for what they hold, and unfinished
//! handshakes with strangers.
//!
//! Memory is divided among the connections that are there: few may hold much, many little (`hbone::window`).
//!
//! **Invariant:** who has proved nothing takes nothing away from those who have: handshakes are counted apart, and what
//! comes in the clear gets at most half of the connections.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_core::hbone::window::{LARGEST, SMALLEST, Window};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};

/// Limits of each pod.
#[derive(Clone, Copy, Debug, clap::Args)]
#[group(skip)]
pub struct Config {
    /// Connections that one pod may have at once, opened by it and to it; a tunnel and each connection in it count as
    /// one. At most half of them in the clear from outside the mesh. More are refused (POD_LIMIT)
    #[arg(long, env = "ZTUNNEL_MAX_POD_CONNECTIONS", default_value_t = 4096, value_parser = positive)]
    pub max_pod_connections: usize,
    /// TLS handshakes with one pod that may be unfinished at once; for more, the oldest of the busiest client is closed
    #[arg(long, env = "ZTUNNEL_MAX_POD_HANDSHAKES", default_value_t = 256, value_parser = positive)]
    pub max_pod_handshakes: usize,
    /// MiB that one pod's connections may hold of bytes received in tunnels and not taken yet; what is gathered to be
    /// sent may be about as much again
    #[arg(long, env = "ZTUNNEL_POD_MEMORY_MIB", default_value_t = 256, value_parser = positive)]
    pub pod_memory_mib: usize,
}

fn positive(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|number| (1..=Semaphore::MAX_PERMITS).contains(number))
        .ok_or_else(|| format!("{text:?} is no number from 1 up"))
}

/// Why a pod gets no further connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Exhausted {
    /// All are taken.
    #[error("the pod has {0} connections, which is its limit (--max-pod-connections)")]
    Connections(usize),
    /// Those for clients outside the mesh are.
    #[error(
        "{0} clients outside the mesh are connected to the pod, which is their limit (half of --max-pod-connections)"
    )]
    Clear(usize),
}

/// One pod's.
#[derive(Debug)]
pub struct Budget {
    limits: Config,
    connections: Arc<Semaphore>,
    clear: Arc<Semaphore>,
    memory: Arc<Memory>,
    handshakes: Arc<Handshakes>,
}

/// A place for one connection, freed on drop.
#[derive(Debug)]
pub struct Share {
    _memory: Part,
    _connection: OwnedSemaphorePermit,
    _clear: Option<OwnedSemaphorePermit>,
}

impl Budget {
    /// Nothing is taken.
    pub fn new(limits: Config) -> Self {
        let places = |number| Arc::new(Semaphore::new(number));
        Self {
            limits,
            connections: places(limits.max_pod_connections),
            clear: places(limits.max_pod_connections.div_ceil(2)),
            memory: Arc::new(Memory::new(limits.pod_memory_mib << 20)),
            handshakes: Arc::new(Handshakes { max: limits.max_pod_handshakes, state: Mutex::default() }),
        }
    }

    /// A place for a connection of the pod's own, for a tunnel, or for a connection in one.
    ///
    /// # Errors
    /// When all are taken.
    pub fn connection(&self) -> Result<Share, Exhausted> {
        let taken = self.connections.clone().try_acquire_owned();
        let connection = taken.map_err(|_| Exhausted::Connections(self.limits.max_pod_connections))?;
        Ok(Share { _memory: self.memory.part(), _connection: connection, _clear: None })
    }

    /// A place for a client that has proved nothing.
    ///
    /// # Errors
    /// When all are taken, or half of them by such clients.
    pub fn clear(&self) -> Result<Share, Exhausted> {
        let taken = self.clear.clone().try_acquire_owned();
        let clear = taken.map_err(|_| Exhausted::Clear(self.limits.max_pod_connections.div_ceil(2)))?;
        Ok(Share { _clear: Some(clear), ..self.connection()? })
    }

    /// What one connection may hold, as of any time.
    pub fn window(&self) -> Window {
        Window::following(self.memory.window.subscribe())
    }

    /// A place for a handshake with `client`; there is always one, at the cost of another.
    pub fn handshake(&self, client: IpAddr) -> Handshake {
        self.handshakes.begin(client)
    }
}

/// Divided evenly among connections.
#[derive(Debug)]
struct Memory {
    bytes: usize,
    connections: AtomicUsize,
    window: watch::Sender<u32>,
}

impl Memory {
    fn new(bytes: usize) -> Self {
        Self { bytes, connections: AtomicUsize::new(0), window: watch::channel(LARGEST).0 }
    }

    fn part(self: &Arc<Self>) -> Part {
        self.connections.fetch_add(1, Ordering::Relaxed);
        self.divide();
        Part(self.clone())
    }

    fn divide(&self) {
        let new = |current| window(self.bytes, self.connections.load(Ordering::Relaxed), current);
        let current = *self.window.borrow();
        if new(current) != current {
            // Others may have come and gone in between.
            self.window.send_if_modified(|current| {
                let before = std::mem::replace(current, new(*current));
                before != *current
            });
        }
    }
}

/// One connection's.
#[derive(Debug)]
struct Part(Arc<Memory>);

impl Drop for Part {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
        self.0.divide();
    }
}

/// Each connection's window, a power of two. It shrinks at once but grows late, since every change is told to every peer.
fn window(bytes: usize, connections: usize, current: u32) -> u32 {
    let even = bytes / connections.max(1);
    let fits = 1 << even.max(1).ilog2().min(LARGEST.ilog2());
    if fits < current || even >= 4 * current as usize { fits.max(SMALLEST) } else { current }
}

/// Unfinished handshakes, the oldest first.
#[derive(Debug)]
struct Handshakes {
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
    fn lock(&self) -> MutexGuard<'_, Unfinished> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(self: &Arc<Self>, client: IpAddr) -> Handshake {
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

    fn budget(connections: usize, handshakes: usize) -> Budget {
        Budget::new(Config {
            max_pod_connections: connections,
            max_pod_handshakes: handshakes,
            pod_memory_mib: 4,
        })
    }

    fn client(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    #[test]
    fn connections_are_limited_and_given_back() {
        let budget = budget(3, 1);
        let mut taken: Vec<_> = (0..3).map(|_| budget.connection().unwrap()).collect();
        assert_eq!(budget.connection().unwrap_err(), Exhausted::Connections(3));
        assert_eq!(budget.clear().unwrap_err(), Exhausted::Connections(3));
        taken.pop();
        budget.connection().unwrap();
    }

    #[test]
    fn what_comes_in_the_clear_leaves_half() {
        let budget = budget(4, 1);
        let clear: Vec<_> = (0..2).map(|_| budget.clear().unwrap()).collect();
        assert_eq!(budget.clear().unwrap_err(), Exhausted::Clear(2));
        let _others: Vec<_> = (0..2).map(|_| budget.connection().unwrap()).collect();
        drop(clear);
        let _again = budget.clear().unwrap();
        self::budget(1, 1).clear().expect("half of one is one");
    }

    #[test]
    fn memory_is_divided() {
        let budget = budget(1000, 1);
        let window = budget.window();
        let mut shares = Vec::new();
        for (connections, expected) in [
            (1, 1 << 20),
            (4, 1 << 20),
            (5, 512 << 10),
            (9, 256 << 10),
            (100, 32 << 10),
            (1000, 32 << 10),
            // 4 MiB are divided: 32 parts of 128 KiB are four times of what each had.
            (33, 32 << 10),
            (32, 128 << 10),
            (9, 128 << 10),
            (8, 512 << 10),
            (1, 1 << 20),
        ] {
            shares.truncate(connections);
            while shares.len() < connections {
                shares.push(budget.connection().unwrap());
            }
            assert_eq!(window.now(), expected, "{connections} connections");
        }
    }

    #[test]
    fn the_oldest_handshake_of_the_busiest_client_gives_way() {
        let budget = budget(1, 4);
        let gave_way = |handshake: &mut Handshake| handshake.gave_way().now_or_never().is_some();
        let mut honest = budget.handshake(client(1));
        let mut flood: Vec<_> = (0..100).map(|_| budget.handshake(client(2))).collect();
        let displaced: Vec<bool> = flood.iter_mut().map(gave_way).collect();
        assert!(displaced[..97].iter().all(|gone| *gone) && !displaced[97..].iter().any(|gone| *gone));
        assert!(!gave_way(&mut honest));
        let mut late = budget.handshake(client(3));
        assert!(gave_way(&mut flood[97]), "also for a newcomer from elsewhere");
        assert!(!gave_way(&mut honest) && !gave_way(&mut late));
        drop(flood);
        assert_eq!(budget.handshakes.lock().queue.len(), 2, "given back");
    }

    #[test]
    fn among_equals_the_oldest_gives_way() {
        let budget = budget(1, 3);
        let mut all: Vec<_> = (0..5).map(|last| budget.handshake(client(last))).collect();
        let displaced: Vec<bool> =
            all.iter_mut().map(|handshake| handshake.gave_way().now_or_never().is_some()).collect();
        assert_eq!(displaced, [true, true, false, false, false]);
    }
}
