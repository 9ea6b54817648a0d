//! How fast one client may cost the process what only a handshake or a refused request costs: work that the client pays
//! little for, and gets nothing by.
//!
//! **Invariant:** a client that is too fast waits by itself. What is remembered of a client is forgotten when it has kept
//! quiet for as long as would make no difference.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh_core::hbone::allowance::Allowance;

/// Handshakes of one client with all pods of this node, at once and a second; each takes about a millisecond. A tunnel
/// has room for a hundred connections, and all clients behind one gateway are one.
const HANDSHAKES: (u32, u32) = (500, 100);
/// Requests of one client that it gives up before they are answered, or that make no sense.
const WASTED: (u32, u32) = (1000, 100);
/// A client whose tunnel was ended for abuse shakes hands again after so long, and after that much at most.
const FINE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(8));
/// Clients before those are looked for that can be forgotten.
const MANY: usize = 1024;

/// The process's; clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    clients: Arc<Mutex<Clients>>,
}

#[derive(Debug, Default)]
struct Clients {
    by_address: HashMap<IpAddr, OfClient>,
    /// How many there were when they were last gone through.
    before: usize,
}

/// One client's.
#[derive(Clone, Debug)]
pub struct OfClient {
    /// TLS handshakes.
    pub handshakes: Allowance,
    /// Requests that come to nothing by the client's doing.
    pub wasted: Allowance,
}

impl Default for OfClient {
    fn default() -> Self {
        Self {
            handshakes: Allowance::new(HANDSHAKES.0, HANDSHAKES.1),
            wasted: Allowance::new(WASTED.0, WASTED.1),
        }
    }
}

impl Pace {
    /// What `client` may do; the same for all that ask.
    pub fn of(&self, client: IpAddr) -> OfClient {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let found = clients.by_address.entry(client).or_default().clone();
        if clients.by_address.len() > MANY.max(2 * clients.before) {
            clients.by_address.retain(|at, of| *at == client || !of.is_whole());
            clients.before = clients.by_address.len();
        }
        found
    }
}

impl OfClient {
    /// Waits until the client may shake hands once more.
    pub async fn handshake(&self) {
        while let Err(later) = self.handshakes.take(1) {
            tokio::time::sleep(later).await;
        }
    }

    /// A tunnel of the client's was abused: what it would do in the next one can wait.
    pub fn fine(&self) {
        self.handshakes.fine(FINE.0, FINE.1);
    }

    fn is_whole(&self) -> bool {
        self.handshakes.is_whole() && self.wasted.is_whole()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(number: u32) -> IpAddr {
        IpAddr::from(number.to_be_bytes())
    }

    #[test]
    fn a_client_uses_up_its_own_only() {
        let pace = Pace::default();
        pace.of(client(1)).handshakes.take(HANDSHAKES.0).unwrap();
        assert!(pace.of(client(1)).handshakes.take(HANDSHAKES.0).is_err());
        assert!(pace.of(client(2)).handshakes.take(HANDSHAKES.0).is_ok());
    }

    #[test]
    fn who_is_fined_waits_wherever_it_comes_next() {
        let pace = Pace::default();
        pace.of(client(1)).fine();
        assert!(pace.of(client(1)).handshakes.take(1).is_err());
        assert!(pace.of(client(2)).handshakes.take(1).is_ok());
    }

    #[test]
    fn only_those_who_did_much_are_remembered() {
        let pace = Pace::default();
        pace.of(client(1)).wasted.take(WASTED.0).unwrap();
        for number in 2..20_000 {
            pace.of(client(number));
        }
        let clients = pace.clients.lock().unwrap();
        assert!(clients.by_address.len() <= 2 * MANY, "{}", clients.by_address.len());
        assert!(clients.by_address.contains_key(&client(1)));
    }
}
