//! Which source ports the proxy may use towards a pod's application.
//!
//! The proxy connects to the application from the client's address. In the pod's network namespace that connection
//! has the address pair of a connection of the client itself: with the client's own port the kernel would find the
//! proxy's accepted socket instead of the application. So the proxy chooses the port, from a range that clients
//! rarely use, and never one that is in use between the same two ends.
//!
//! The same towards the network, for what the application opens and the proxy passes on in the clear: the application's
//! socket is bound to lo by capture and the proxy's is not, so the kernel would let both have one pair.
//!
//! **Invariant:** a pair is in the table for as long as its [`Tuple`] lives.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_core::addr::{ClientAddr, Target};

/// Below Linux's default range of local ports (32768 to 60999), above most servers.
const PORTS: RangeInclusive<u16> = 10_000..=32_767;

/// Ports tried before giving up: with fewer than 20,000 in use the chance to find none is negligible.
const TRIES: u32 = 64;

/// From one port to the next that is tried: far, since a client's own ports may be a block (those that a translator of
/// addresses gives to one host are), and without a divisor of the range's size, so that none is tried twice.
const STRIDE: u32 = 7_919;

/// The live connections of one pod that arrived in the clear, and those that the proxy opened to its application.
/// Clones are the same table.
#[derive(Clone, Debug, Default)]
pub struct Tuples {
    live: Arc<Live>,
}

#[derive(Debug, Default)]
struct Live {
    hasher: RandomState,
    /// Hashes of client's and pod's end, which are a quarter of their size, and how many there are of each. That two
    /// pairs have the same one is next to impossible, and would only make a port look taken that is not.
    // Held for a hash map operation; one pod's new connections are its only users.
    pairs: Mutex<HashMap<u64, u32>>,
}

/// One connection in the table.
#[derive(Debug)]
pub struct Tuple {
    pair: u64,
    live: Arc<Live>,
}

impl Tuples {
    /// Notes a connection that was accepted.
    pub fn accepted(&self, client: ClientAddr, local: Target) -> Tuple {
        let pair = self.live.hash(client.get(), local.get());
        // Counted: the client may use a port again before the end of its last connection is noticed.
        *self.live.pairs().entry(pair).or_default() += 1;
        Tuple { pair, live: self.live.clone() }
    }

    /// A free port to connect from `client`'s address to `target`; `random` is where the search starts. None: none of
    /// those that were tried is free.
    pub fn choose(&self, client: ClientAddr, target: Target, random: u16) -> Option<(ClientAddr, Tuple)> {
        let mut pairs = self.live.pairs();
        for port in ports(random) {
            let from = SocketAddr::new(client.ip(), port);
            let pair = self.live.hash(from, target.get());
            if port != client.port() && !pairs.contains_key(&pair) {
                pairs.insert(pair, 1);
                return Some((from.into(), Tuple { pair, live: self.live.clone() }));
            }
        }
        None
    }
}

/// What is tried, in order.
fn ports(random: u16) -> impl Iterator<Item = u16> {
    let (first, size) = (*PORTS.start(), PORTS.len() as u32);
    (0..TRIES).map(move |step| first + ((u32::from(random) + step * STRIDE) % size) as u16)
}

impl Live {
    fn hash(&self, client: SocketAddr, pod: SocketAddr) -> u64 {
        self.hasher.hash_one((client, pod))
    }

    fn pairs(&self) -> MutexGuard<'_, HashMap<u64, u32>> {
        self.pairs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Tuple {
    fn drop(&mut self) {
        let mut pairs = self.live.pairs();
        if let Some(count) = pairs.get_mut(&self.pair) {
            *count -= 1;
            if *count == 0 {
                pairs.remove(&self.pair);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(port: u16) -> ClientAddr {
        SocketAddr::from(([10, 0, 0, 1], port)).into()
    }

    fn target(port: u16) -> Target {
        SocketAddr::from(([10, 0, 0, 2], port)).into()
    }

    /// The nth port that is tried for this number.
    fn tried(random: u16, nth: usize) -> u16 {
        ports(random).nth(nth).unwrap()
    }

    #[test]
    fn never_the_clients_port_nor_one_in_use() {
        let tuples = Tuples::default();
        let accepted = tuples.accepted(client(tried(0, 1)), target(80));
        let (from, first) = tuples.choose(client(tried(0, 0)), target(80), 0).unwrap();
        assert_eq!(from, client(tried(0, 2)), "the first is the client's, the second is in use");
        let (from, _second) = tuples.choose(client(9), target(80), tried(0, 2) - tried(0, 0)).unwrap();
        assert_eq!(from, client(tried(0, 3)));
        let (from, _other) = tuples.choose(client(9), target(81), tried(0, 2) - tried(0, 0)).unwrap();
        assert_eq!(from, client(tried(0, 2)), "another target is another connection");
        drop((accepted, first));
        let (from, _) = tuples.choose(client(9), target(80), tried(0, 1) - tried(0, 0)).unwrap();
        assert_eq!(from, client(tried(0, 1)), "given back");
    }

    #[test]
    fn stays_in_the_range_and_gives_up() {
        let tuples = Tuples::default();
        let kept: Vec<_> =
            (0..TRIES).filter_map(|_| tuples.choose(client(9), target(80), u16::MAX)).collect();
        let all: std::collections::BTreeSet<u16> = kept.iter().map(|(from, _)| from.port()).collect();
        assert!(all.len() == TRIES as usize && all.iter().all(|port| PORTS.contains(port)), "{all:?}");
        assert!(tuples.choose(client(9), target(80), u16::MAX).is_none());
        drop(kept);
        assert!(tuples.live.pairs().is_empty());
    }

    #[test]
    fn a_client_that_has_a_block_of_ports_leaves_some() {
        let tuples = Tuples::default();
        let block: Vec<_> =
            (0..2_000).map(|n| tuples.accepted(client(PORTS.start() + n), target(80))).collect();
        for random in 0..2_000 {
            tuples.choose(client(9), target(80), random).expect("there is a free port");
        }
        drop(block);
    }

    #[test]
    fn a_port_that_was_used_twice_is_free_after_both() {
        let tuples = Tuples::default();
        let old = tuples.accepted(client(10_000), target(80));
        let new = tuples.accepted(client(10_000), target(80));
        drop(old);
        let (from, _) = tuples.choose(client(9), target(80), 0).unwrap();
        assert_eq!(from.port(), tried(0, 1));
        drop(new);
    }
}
