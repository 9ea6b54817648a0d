//! The connections that are open now, for the configuration dump.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

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
}

impl Connections {
    /// Adds a connection.
    pub fn open(&self, entry: Entry) -> Place {
        let id = self.inner.next.fetch_add(1, Ordering::Relaxed);
        let entry = Arc::new(entry);
        self.inner.shard(id).lock().unwrap_or_else(PoisonError::into_inner).insert(id, entry.clone());
        Place { id, entry, inner: self.inner.clone() }
    }

    /// All of them, oldest first.
    pub fn dump(&self) -> Vec<Dump> {
        let mut all = Vec::new();
        for shard in &self.inner.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            all.extend(shard.iter().map(|(id, entry)| (*id, dump(entry))));
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

fn dump(entry: &Entry) -> Dump {
    Dump {
        direction: entry.direction.as_str(),
        source: entry.source,
        destination: entry.destination,
        pod: entry.pod.to_string(),
        seconds: entry.opened.elapsed().as_secs(),
        bytes_from_client: entry.traffic.from(Side::Downstream),
        bytes_to_client: entry.traffic.from(Side::Upstream),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
                counters: Metrics::new().open(&Facts::new(Direction::Outbound).labels("-")),
                window: Window::default(),
            })
        };
        let (first, second) = (open(1), open(2));
        let ports = || connections.dump().iter().map(|dump| dump.source.port()).collect::<Vec<_>>();
        assert_eq!(ports(), [1, 2]);
        drop(first);
        assert_eq!(ports(), [2]);
        drop(second);
        assert!(ports().is_empty());
    }
}
