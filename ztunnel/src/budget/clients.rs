//! Places that strangers may take: few for each client, so that none takes all.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// At least so many for one client, if there are any: while its proxy or its certificate is replaced, or a tunnel is
/// full, it has more than one.
const LEAST_OF_CLIENT: usize = 4;

/// Those that are taken, by client. A client is in the map for as long as it has a place.
#[derive(Debug)]
pub(super) struct Clients {
    most: usize,
    most_of_client: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_client: HashMap<IpAddr, usize>,
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Full {
    /// All are taken: so many.
    All(usize),
    /// This client has as many as one may have.
    OfClient(usize),
}

impl Clients {
    pub(super) fn new(most: usize, most_of_client: usize) -> Self {
        let most_of_client = most_of_client.max(LEAST_OF_CLIENT).min(most);
        Self { most, most_of_client, taken: Mutex::default() }
    }

    pub(super) fn take(&self, client: IpAddr) -> Result<(), Full> {
        let mut taken = self.lock();
        if taken.by_client.get(&client).is_some_and(|own| *own >= self.most_of_client) {
            return Err(Full::OfClient(self.most_of_client));
        }
        if taken.all >= self.most {
            return Err(Full::All(self.most));
        }
        taken.all += 1;
        *taken.by_client.entry(client).or_default() += 1;
        Ok(())
    }

    pub(super) fn give_back(&self, client: IpAddr) {
        let mut taken = self.lock();
        taken.all -= 1;
        if let Some(own) = taken.by_client.get_mut(&client) {
            *own -= 1;
            if *own == 0 {
                taken.by_client.remove(&client);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
