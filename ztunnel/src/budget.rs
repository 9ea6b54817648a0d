//! What one pod may have of the proxy, over all its listeners: connections, memory for what they hold, and unfinished
//! handshakes with strangers.
//!
//! Memory is divided among the connections that are there: few may hold much, many little (`hbone::window`).
//!
//! **Invariant:** who has proved nothing takes nothing away from those who have: handshakes are counted apart, and what
//! comes in the clear gets at most half of the connections. Neither does who has proved an identity, but may not be
//! allowed anything: tunnels get at most half as well. Both together get three quarters: there is room for the pod's own
//! connections, and for those in the tunnels. No client gets all that is for its kind.

mod clients;
mod handshakes;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use mesh_core::hbone::window::{LARGEST, SMALLEST, Window};
use tokio::sync::watch;

use self::clients::{Clients, Full};
pub use self::handshakes::Handshake;
use self::handshakes::Handshakes;

/// Limits of each pod.
#[derive(Clone, Copy, Debug, clap::Args)]
#[group(skip)]
pub struct Config {
    /// Connections that one pod may have at once, opened by it and to it; a tunnel and each connection in it count as
    /// one. At most half of them in the clear from outside the mesh, a quarter those of one client; at most half tunnels,
    /// an eighth those of one client; and at most three quarters both of these. More are refused (POD_LIMIT)
    #[arg(long, env = "ZTUNNEL_MAX_POD_CONNECTIONS", default_value_t = 4096, value_parser = positive)]
    pub max_pod_connections: usize,
    /// TLS handshakes with one pod that may be unfinished at once; for more, the oldest of the busiest client is closed
    #[arg(long, env = "ZTUNNEL_MAX_POD_HANDSHAKES", default_value_t = 256, value_parser = positive)]
    pub max_pod_handshakes: usize,
    /// MiB that one pod's connections may hold of bytes received in tunnels and not taken yet; what is gathered to be
    /// sent may be about as much again
    #[arg(long, env = "ZTUNNEL_POD_MEMORY_MIB", default_value_t = 256, value_parser = positive)]
    pub pod_memory_mib: usize,
    /// DNS queries that are read of one pod in a second; more wait in its socket, which drops what it has no room for
    #[arg(long, env = "ZTUNNEL_MAX_POD_DNS_QUERIES", default_value_t = 5000, value_parser = positive)]
    pub max_pod_dns_queries: usize,
}

fn positive(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|number: &usize| *number > 0)
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
    /// Those for one such client are.
    #[error(
        "the client is outside the mesh and has {0} connections to the pod, which is its limit (a quarter of \
         --max-pod-connections)"
    )]
    ClearOfClient(usize),
    /// Those for tunnels are.
    #[error("the pod's clients have {0} tunnels, which is their limit (half of --max-pod-connections)")]
    Tunnels(usize),
    /// Those for one client's tunnels are.
    #[error("the client has {0} tunnels to the pod, which is its limit (an eighth of --max-pod-connections)")]
    TunnelsOfClient(usize),
    /// Those for tunnels and for clients outside the mesh together are.
    #[error(
        "the pod's clients have {0} tunnels and connections in the clear, which is their limit (three quarters of \
         --max-pod-connections)"
    )]
    Unproved(usize),
}

/// One pod's.
#[derive(Debug)]
pub struct Budget {
    shared: Arc<Shared>,
    handshakes: Arc<Handshakes>,
}

/// What its connections share.
#[derive(Debug)]
struct Shared {
    connections: Places,
    /// Of `clear` and `tunnels`.
    unproved: Places,
    clear: Clients,
    tunnels: Clients,
    /// Bytes, divided evenly among the connections.
    memory: usize,
    window: watch::Sender<u32>,
}

/// A place for one connection, freed on drop.
#[derive(Debug)]
pub struct Share {
    shared: Arc<Shared>,
    kind: Kind,
}

/// What else a connection has a place of.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Proved,
    /// Of this client.
    Clear(IpAddr),
    /// The same.
    Tunnel(IpAddr),
}

impl Budget {
    /// Nothing is taken.
    pub fn new(limits: Config) -> Self {
        let all = limits.max_pod_connections;
        let half = all.div_ceil(2);
        let shared = Shared {
            connections: Places::new(all),
            unproved: Places::new(all - all / 4),
            clear: Clients::new(half, all / 4),
            tunnels: Clients::new(half, all / 8),
            memory: limits.pod_memory_mib.saturating_mul(1 << 20),
            window: watch::Sender::new(LARGEST),
        };
        Self { shared: Arc::new(shared), handshakes: Handshakes::new(limits.max_pod_handshakes) }
    }

    /// A place for a connection of the pod's own, or for one that policy allows.
    ///
    /// # Errors
    /// When all are taken.
    pub fn connection(&self) -> Result<Share, Exhausted> {
        self.share(Kind::Proved)
    }

    /// A place for `client`, which has proved nothing.
    ///
    /// # Errors
    /// When all are taken, half of them by such clients, or a quarter by this one.
    pub fn clear(&self, client: IpAddr) -> Result<Share, Exhausted> {
        self.shared.clear.take(client).map_err(|full| match full {
            Full::All(most) => Exhausted::Clear(most),
            Full::OfClient(most) => Exhausted::ClearOfClient(most),
        })?;
        self.unproved(Kind::Clear(client))
    }

    /// A place for a tunnel of `client`, which has proved who it is; whether policy allows it anything is asked for each
    /// connection in the tunnel only.
    ///
    /// # Errors
    /// When all are taken, half of them by tunnels, or an eighth by this client's.
    pub fn tunnel(&self, client: IpAddr) -> Result<Share, Exhausted> {
        self.shared.tunnels.take(client).map_err(|full| match full {
            Full::All(most) => Exhausted::Tunnels(most),
            Full::OfClient(most) => Exhausted::TunnelsOfClient(most),
        })?;
        self.unproved(Kind::Tunnel(client))
    }

    /// With a place of its kind taken already.
    fn unproved(&self, kind: Kind) -> Result<Share, Exhausted> {
        if !self.shared.unproved.take() {
            self.shared.give_back_of_client(kind);
            return Err(Exhausted::Unproved(self.shared.unproved.most));
        }
        self.share(kind)
    }

    /// With all places but its own taken already.
    fn share(&self, kind: Kind) -> Result<Share, Exhausted> {
        if !self.shared.connections.take() {
            self.shared.give_back(kind);
            return Err(Exhausted::Connections(self.shared.connections.most));
        }
        self.shared.divide();
        Ok(Share { shared: self.shared.clone(), kind })
    }

    /// What one connection may hold, as of any time.
    pub fn window(&self) -> Window {
        Window::following(self.shared.window.subscribe())
    }

    /// A place for a handshake with `client`; there is always one, at the cost of another.
    pub fn handshake(&self, client: IpAddr) -> Handshake {
        self.handshakes.begin(client)
    }
}

impl Shared {
    fn give_back(&self, kind: Kind) {
        if !matches!(kind, Kind::Proved) {
            self.unproved.give_back();
        }
        self.give_back_of_client(kind);
    }

    fn give_back_of_client(&self, kind: Kind) {
        match kind {
            Kind::Proved => {}
            Kind::Clear(client) => self.clear.give_back(client),
            Kind::Tunnel(client) => self.tunnels.give_back(client),
        }
    }

    /// Divides the memory among the connections that there are now.
    fn divide(&self) {
        let new = |current| window(self.memory, self.connections.taken(), current);
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

impl Drop for Share {
    fn drop(&mut self) {
        self.shared.give_back(self.kind);
        self.shared.connections.give_back();
        self.shared.divide();
    }
}

/// So many, and no more.
#[derive(Debug)]
struct Places {
    most: usize,
    taken: AtomicUsize,
}

impl Places {
    fn new(most: usize) -> Self {
        Self { most, taken: AtomicUsize::new(0) }
    }

    fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    fn take(&self) -> bool {
        let more = |taken| (taken < self.most).then_some(taken + 1);
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    fn give_back(&self) {
        self.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Each connection's window, a power of two. It shrinks at once but grows late, since every change is told to every peer.
fn window(bytes: usize, connections: usize, current: u32) -> u32 {
    let even = bytes / connections.max(1);
    let fits = 1 << even.max(1).ilog2().min(LARGEST.ilog2());
    if fits < current || even >= 4 * current as usize { fits.max(SMALLEST) } else { current }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: Config =
        Config { max_pod_connections: 1, max_pod_handshakes: 1, pod_memory_mib: 4, max_pod_dns_queries: 1 };

    fn budget(connections: usize) -> Budget {
        Budget::new(Config { max_pod_connections: connections, ..SMALL })
    }

    fn client(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    #[test]
    fn connections_are_limited_and_given_back() {
        let budget = budget(3);
        let mut taken: Vec<_> = (0..3).map(|_| budget.connection().unwrap()).collect();
        assert_eq!(budget.connection().unwrap_err(), Exhausted::Connections(3));
        for _ in 0..3 {
            assert_eq!(budget.clear(client(1)).unwrap_err(), Exhausted::Connections(3));
        }
        taken.pop();
        budget.connection().unwrap();
        drop(taken);
        let clear = || budget.clear(client(1));
        let _clear = [clear().unwrap(), clear().expect("a refusal takes no place")];
    }

    #[test]
    fn what_comes_in_the_clear_leaves_half() {
        let budget = budget(32);
        let clear = |last: u8| budget.clear(client(last));
        let first: Vec<_> = (0..8).map(|_| clear(1).unwrap()).collect();
        assert_eq!(clear(1).unwrap_err(), Exhausted::ClearOfClient(8));
        let _second: Vec<_> = (0..8).map(|_| clear(2).unwrap()).collect();
        assert_eq!(clear(3).unwrap_err(), Exhausted::Clear(16));
        let _others: Vec<_> = (0..16).map(|_| budget.connection().unwrap()).collect();
        drop(first);
        let _again = clear(3).unwrap();
        self::budget(1).clear(client(1)).expect("half of one is one");
    }

    #[test]
    fn strangers_of_both_kinds_leave_a_quarter() {
        let budget = budget(32);
        let mut strangers: Vec<Share> = (0..16).map(|last| budget.clear(client(last)).unwrap()).collect();
        strangers.extend((0..8).map(|last| budget.tunnel(client(last)).unwrap()));
        for _ in 0..9 {
            assert_eq!(budget.tunnel(client(9)).unwrap_err(), Exhausted::Unproved(24));
        }
        let _own: Vec<_> = (0..8).map(|_| budget.connection().unwrap()).collect();
        assert_eq!(budget.connection().unwrap_err(), Exhausted::Connections(32));
        strangers.pop();
        let _tunnel = budget.tunnel(client(9)).expect("a refusal takes no place");
    }

    #[test]
    fn tunnels_leave_half_and_no_client_has_them_all() {
        let budget = budget(64);
        let of = |last: u8, tunnels: usize| (0..tunnels).map(move |_| client(last)).collect::<Vec<_>>();
        let take = |clients: Vec<IpAddr>| -> Vec<Share> {
            clients.into_iter().map(|client| budget.tunnel(client).unwrap()).collect()
        };
        let first = take(of(1, 8));
        assert_eq!(budget.tunnel(client(1)).unwrap_err(), Exhausted::TunnelsOfClient(8));
        let mut others = take([of(2, 8), of(3, 8), of(4, 8)].concat());
        assert_eq!(budget.tunnel(client(5)).unwrap_err(), Exhausted::Tunnels(32));
        let connections: Vec<_> = (0..32).map(|_| budget.connection().unwrap()).collect();
        others.pop();
        let _again = budget.connection().unwrap();
        assert_eq!(budget.tunnel(client(4)).unwrap_err(), Exhausted::Connections(64));
        drop((first, others, connections));
        let _all_again = take(of(4, 8));
    }

    #[test]
    fn a_client_of_a_small_pod_has_room_for_tunnels_that_follow_each_other() {
        let budget = budget(16);
        let _tunnels: Vec<_> = (0..4).map(|_| budget.tunnel(client(1)).unwrap()).collect();
        assert_eq!(budget.tunnel(client(1)).unwrap_err(), Exhausted::TunnelsOfClient(4));
        let budget = self::budget(2);
        let _only = budget.tunnel(client(1)).unwrap();
        assert_eq!(budget.tunnel(client(1)).unwrap_err(), Exhausted::TunnelsOfClient(1));
    }

    #[test]
    fn memory_without_end_is_the_largest_window() {
        let most = Config { pod_memory_mib: 1 << 44, ..SMALL };
        let budget = Budget::new(most);
        let _one = budget.connection().unwrap();
        assert_eq!(budget.window().now(), LARGEST);
    }

    #[test]
    fn memory_is_divided() {
        let budget = budget(1000);
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
}
