//! The connections that are open now, for the configuration dump.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use mesh_core::copy::{Meter, Side, Traffic};
use mesh_core::hbone::window::Window;
use serde::Serialize;

use crate::metrics::Counters;
use crate::report::Direction;

/// Locks of the table: openings and closings of different connections rarely meet.
const SHARDS: usize = 16;

/// One open connection.
#[derive(Debug)]
pub struct Entry {
    /// Which proxy role carries it.
    pub direction: Direction,
    /// Who connected.
    pub source: SocketAddr,
    /// What it reaches.
    pub destination: Option<SocketAddr>,
    /// Uid of the pod that is served.
    pub pod: Arc<str>,
    /// Since when.
    pub opened: Instant,
    /// Its bytes.
    pub traffic: Traffic,
    /// The series that they count in.
    pub counters: Counters,
    /// What it may hold.
    pub window: Window,
}

impl Meter for Entry {
    fn carried(&self, side: Side, bytes: u64) {
        self.traffic.carried(side, bytes);
        match side {
            Side::Downstream => self.counters.received.inc_by(bytes),
            Side::Upstream => self.counters.sent.inc_by(bytes),
        };
    }

    fn most_at_once(&self) -> usize {
        self.window.gathered()
    }
}

/// The table; clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Connections {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: AtomicU64,
    shards: [Mutex<HashMap<u64, Arc<Entry>>>; SHARDS],
    draining: OnceLock<Draining>,
}

/// The connections may end by themselves until they are cut.
#[derive(Debug)]
struct Draining {
    since: SystemTime,
    deadline: SystemTime,
}

/// A place in the table, freed on drop.
#[derive(Debug)]
pub struct Place {
    id: u64,
    entry: Arc<Entry>,
    inner: Arc<Inner>,
}

impl Place {
    /// The connection.
    pub fn entry(&self) -> &Entry {
        &self.entry
    }
}

/// A connection in the dump.
#[derive(Debug, Serialize)]
pub struct Dump {
    direction: &'static str,
    source: SocketAddr,
    destination: Option<SocketAddr>,
    pod: String,
    seconds: u64,
    bytes_from_client: u64,
    bytes_to_client: u64,
    #[serde(flatten)]
    state: State,
}

/// Whether a connection may go on for as long as it likes. Times in seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum State {
    /// It may.
    Open,
    /// It is cut when the process, which was told to end, has waited long enough.
    Draining {
        /// When the process was told.
        since: u64,
        /// When it is cut.
        deadline: u64,
    },
}

impl Connections {
    /// Adds a connection.
    pub fn open(&self, entry: Entry) -> Place {
        let id = self.inner.next.fetch_add(1, Ordering::Relaxed);
        let entry = Arc::new(entry);
        self.inner.shard(id).lock().unwrap_or_else(PoisonError::into_inner).insert(id, entry.clone());
        Place { id, entry, inner: self.inner.clone() }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.inner.shards.iter().all(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner).is_empty())
    }

    /// From now on they have until `deadline` to end.
    pub fn drain(&self, deadline: Duration) {
        let since = SystemTime::now();
        // Nobody is told twice.
        let _ = self.inner.draining.set(Draining { since, deadline: since + deadline });
    }

    /// What becomes of them.
    pub fn state(&self) -> State {
        let seconds =
            |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        self.inner.draining.get().map_or(State::Open, |draining| State::Draining {
            since: seconds(draining.since),
            deadline: seconds(draining.deadline),
        })
    }

    /// All of them, oldest first.
    pub fn dump(&self) -> Vec<Dump> {
        let (mut all, state) = (Vec::new(), self.state());
        for shard in &self.inner.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            all.extend(shard.iter().map(|(id, entry)| (*id, dump(entry, state))));
        }
        all.sort_by_key(|(id, _)| *id);
        all.into_iter().map(|(_, dump)| dump).collect()
    }
}

impl Inner {
    fn shard(&self, id: u64) -> &Mutex<HashMap<u64, Arc<Entry>>> {
        &self.shards[id as usize % SHARDS]
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.inner.shard(self.id).lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

fn dump(entry: &Entry, state: State) -> Dump {
    Dump {
        direction: entry.direction.as_str(),
        source: entry.source,
        destination: entry.destination,
        pod: entry.pod.to_string(),
        seconds: entry.opened.elapsed().as_secs(),
        bytes_from_client: entry.traffic.from(Side::Downstream),
        bytes_to_client: entry.traffic.from(Side::Upstream),
        state,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptors::Descriptors;
    use crate::metrics::Metrics;
    use crate::report::Facts;

    #[test]
    fn holds_what_is_open() {
        let connections = Connections::default();
        let open = |port| {
            connections.open(Entry {
                direction: Direction::Outbound,
                source: ([10, 0, 0, 1], port).into(),
                destination: None,
                pod: "uid".into(),
                opened: Instant::now(),
                traffic: Traffic::default(),
                counters: Metrics::new(&Descriptors::without_limit())
                    .open(&Facts::new(Direction::Outbound).labels("-")),
                window: Window::default(),
            })
        };
        let (first, second) = (open(1), open(2));
        let ports = || connections.dump().iter().map(|dump| dump.source.port()).collect::<Vec<_>>();
        assert_eq!(ports(), [1, 2]);
        drop(first);
        assert_eq!(ports(), [2]);
        assert!(!connections.is_empty());
        drop(second);
        assert!(ports().is_empty() && connections.is_empty());
    }

    #[test]
    fn says_since_when_it_drains_and_until_when() {
        let connections = Connections::default();
        let told = |connections: &Connections| serde_json::to_value(connections.state()).unwrap();
        assert_eq!(told(&connections), serde_json::json!({ "state": "open" }));
        connections.drain(Duration::from_secs(3600));
        let first = told(&connections);
        assert_eq!(first["state"], "draining");
        assert_eq!(first["deadline"].as_u64().unwrap(), first["since"].as_u64().unwrap() + 3600);
        connections.drain(Duration::from_secs(5));
        assert_eq!(told(&connections), first);
    }
}
