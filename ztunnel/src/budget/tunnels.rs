//! Tunnels to a pod: few for each client, so that no client takes all.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::Exhausted;

/// At least so many for one client, if there are any: while its proxy or its certificate is replaced, or a tunnel is
/// full, it has more than one.
const LEAST_OF_CLIENT: usize = 4;

/// Those that are open, by client.
#[derive(Debug)]
pub(super) struct Tunnels {
    most: usize,
    most_of_client: usize,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    all: usize,
    by_client: HashMap<IpAddr, usize>,
}

impl Tunnels {
    pub(super) fn new(most: usize, most_of_client: usize) -> Self {
        let most_of_client = most_of_client.max(LEAST_OF_CLIENT).min(most);
        Self { most, most_of_client, open: Mutex::default() }
    }

    pub(super) fn take(&self, client: IpAddr) -> Result<(), Exhausted> {
        let mut open = self.lock();
        if open.by_client.get(&client).is_some_and(|tunnels| *tunnels >= self.most_of_client) {
            return Err(Exhausted::Client(self.most_of_client));
        }
        if open.all >= self.most {
            return Err(Exhausted::Tunnels(self.most));
        }
        open.all += 1;
        *open.by_client.entry(client).or_default() += 1;
        Ok(())
    }

    pub(super) fn give_back(&self, client: IpAddr) {
        let mut open = self.lock();
        open.all -= 1;
        if let Some(tunnels) = open.by_client.get_mut(&client) {
            *tunnels -= 1;
            if *tunnels == 0 {
                open.by_client.remove(&client);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
