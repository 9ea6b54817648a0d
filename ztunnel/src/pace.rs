//! How fast one client may cost the process what it pays little for itself: handshakes, requests that come to nothing, and
//! frames, however small.
//!
//! **Invariant:** a client that is too fast waits by itself. What is remembered of a client is forgotten when it has kept
//! quiet for as long as would make no difference.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mesh_core::allowance::Allowance;
use mesh_core::hbone::Pacer;

use crate::metrics::Seconds;

/// Handshakes of one client with all pods of this node, at once and a second; each takes about a millisecond. A tunnel
/// has room for a hundred connections, and all clients behind one gateway are one.
const HANDSHAKES: (u32, u32) = (500, 100);
/// Requests of one client that make no sense, or that it gives up before anybody has looked at them: more end its tunnel.
const WASTED: (u32, u32) = (1000, 100);
/// Requests that it gives up later, before they are answered: more hold up its others.
const GIVEN_UP: (u32, u32) = (1000, 500);
/// Requests that are refused: more wait for their answer.
const REFUSED: (u32, u32) = (1000, 500);
/// A client whose tunnel was ended for abuse shakes hands again after so long, and twice as long each time up to so much.
const FINE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(8));
/// After so long without, the first fine is the next one.
const FORGIVEN: Duration = Duration::from_secs(60);
/// How often it is told that a client is read more slowly.
const TOLD_EVERY: Duration = Duration::from_secs(60);
/// Clients before those are looked for that can be forgotten.
const MANY: usize = 1024;

/// Limits of each client.
#[derive(Clone, Copy, Debug, clap::Args)]
#[group(skip)]
pub struct Config {
    /// HTTP/2 frames that are read of one client in a second, over all its tunnels to this node's pods, and a quarter as
    /// many at once; more wait. What is sent in large frames does not count. 0: 12,500 for each thread that carries connections
    #[arg(long, env = "ZTUNNEL_MAX_CLIENT_FRAMES", default_value_t = 0)]
    pub max_client_frames: u32,
}

/// Frames a second that leave a thread half of its time for others.
const FRAMES_OF_A_THREAD: u32 = 12_500;

impl Config {
    /// Frames a second of one client, where so many threads carry connections.
    pub fn frames(self, threads: usize) -> u32 {
        let by_threads = u32::try_from(threads).unwrap_or(u32::MAX).saturating_mul(FRAMES_OF_A_THREAD);
        if self.max_client_frames > 0 { self.max_client_frames } else { by_threads.max(1) }
    }
}

/// The process's; clones are the same.
#[derive(Clone, Debug)]
pub struct Pace {
    frames: u32,
    slowed: Seconds,
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
    /// Requests that make no sense or are given up at once.
    pub wasted: Allowance,
    /// Requests that are given up before they are answered.
    pub given_up: Allowance,
    /// Requests that are refused.
    pub refused: Allowance,
    /// Frames in its tunnels.
    pub frames: Paced,
    fines: Arc<Mutex<Fines>>,
}

/// How long the last one was, and when.
#[derive(Debug, Default)]
struct Fines(Option<(Duration, Instant)>);

impl Pace {
    /// Nobody has come yet. Of each client so many frames are read in a second; for how long more have waited is counted.
    pub fn new(frames: u32, slowed: Seconds) -> Self {
        Self { frames, slowed, clients: Arc::default() }
    }

    /// What `client` may do; the same for all that ask.
    pub fn of(&self, client: IpAddr) -> OfClient {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let found = clients.by_address.entry(client).or_insert_with(|| OfClient::new(client, self)).clone();
        if clients.by_address.len() > MANY.max(2 * clients.before) {
            clients.by_address.retain(|at, of| *at == client || !of.is_whole());
            clients.before = clients.by_address.len();
        }
        found
    }
}

impl OfClient {
    fn new(client: IpAddr, Pace { frames, slowed, .. }: &Pace) -> Self {
        let allowance = Allowance::new((frames / 4).max(1), *frames);
        Self {
            handshakes: Allowance::new(HANDSHAKES.0, HANDSHAKES.1),
            wasted: Allowance::new(WASTED.0, WASTED.1),
            given_up: Allowance::new(GIVEN_UP.0, GIVEN_UP.1),
            refused: Allowance::new(REFUSED.0, REFUSED.1),
            frames: Paced { client, allowance, slowed: slowed.clone(), told: Arc::default() },
            fines: Arc::default(),
        }
    }

    /// Waits until the client may shake hands once more.
    pub async fn handshake(&self) {
        while let Err(later) = self.handshakes.take(1) {
            tokio::time::sleep(later).await;
        }
    }

    /// A tunnel of the client's was abused: what it would do in the next one can wait.
    pub fn fine(&self) {
        let next = self.fines().next(Instant::now());
        self.handshakes.fine(next, FINE.1);
    }

    fn fines(&self) -> MutexGuard<'_, Fines> {
        self.fines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_whole(&self) -> bool {
        let Self { handshakes, wasted, given_up, refused, frames, .. } = self;
        let whole =
            [handshakes, wasted, given_up, refused, &frames.allowance].into_iter().all(Allowance::is_whole);
        whole && self.fines().are_forgiven(Instant::now())
    }
}

/// Frames of one client. Nobody has to guess why it is slow: it is counted, and told now and then.
#[derive(Clone, Debug)]
pub struct Paced {
    client: IpAddr,
    allowance: Allowance,
    slowed: Seconds,
    told: Arc<Mutex<Option<Instant>>>,
}

impl Pacer for Paced {
    fn charge(&self, frames: u32) -> Option<Duration> {
        let wait = self.allowance.charge(frames)?;
        self.slowed.inc_by(wait.as_secs_f64());
        if self.is_to_be_told() {
            tracing::warn!(
                client = %self.client,
                "sends more small frames than are read of one client: its tunnels wait (--max-client-frames)"
            );
        }
        Some(wait)
    }
}

impl Paced {
    fn is_to_be_told(&self) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let due = told.is_none_or(|at| at.elapsed() >= TOLD_EVERY);
        if due {
            *told = Some(Instant::now());
        }
        due
    }
}

impl Fines {
    fn are_forgiven(&self, now: Instant) -> bool {
        self.0.is_none_or(|(last, at)| now.saturating_duration_since(at) >= last + FORGIVEN)
    }

    fn next(&mut self, now: Instant) -> Duration {
        let again = self.0.filter(|_| !self.are_forgiven(now));
        let fine = again.map_or(FINE.0, |(last, _)| (2 * last).min(FINE.1));
        self.0 = Some((fine, now));
        fine
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace() -> Pace {
        Pace::new(1, Seconds::default())
    }

    fn client(number: u32) -> IpAddr {
        IpAddr::from(number.to_be_bytes())
    }

    #[test]
    fn frames_by_threads_unless_told() {
        let frames = |max_client_frames, threads| Config { max_client_frames }.frames(threads);
        assert_eq!([frames(0, 2), frames(0, 16), frames(7, 16)], [25_000, 200_000, 7]);
    }

    #[test]
    fn a_client_uses_up_its_own_only() {
        let pace = pace();
        pace.of(client(1)).handshakes.take(HANDSHAKES.0).unwrap();
        assert!(pace.of(client(1)).handshakes.take(HANDSHAKES.0).is_err());
        assert!(pace.of(client(2)).handshakes.take(HANDSHAKES.0).is_ok());
    }

    #[test]
    fn who_is_fined_waits_wherever_it_comes_next() {
        let pace = pace();
        pace.of(client(1)).fine();
        assert!(pace.of(client(1)).handshakes.take(1).is_err());
        assert!(pace.of(client(2)).handshakes.take(1).is_ok());
    }

    #[test]
    fn for_how_long_a_client_waits_is_counted() {
        let pace = pace();
        let [ours, others] = [1, 2].map(|number| pace.of(client(number)).frames);
        assert_eq!((ours.charge(1), pace.slowed.get()), (None, 0.0));
        let waits = [ours.charge(2), pace.of(client(1)).frames.charge(1)].map(Option::unwrap);
        assert_eq!(pace.slowed.get(), waits.iter().map(Duration::as_secs_f64).sum::<f64>());
        assert_eq!(others.charge(1), None);
    }

    /// Also where each fine is over before the next one.
    #[test]
    fn who_is_fined_again_waits_longer_until_it_is_forgiven() {
        let (mut fines, mut now) = (Fines::default(), Instant::now());
        for seconds in [1, 2, 4, 8, 8] {
            assert_eq!(fines.next(now), Duration::from_secs(seconds));
            now += Duration::from_secs(seconds) + FORGIVEN / 2;
            assert!(!fines.are_forgiven(now));
        }
        now += FORGIVEN / 2;
        assert!(fines.are_forgiven(now));
        assert_eq!(fines.next(now), FINE.0);
        let pace = pace();
        for _ in 0..2 {
            pace.of(client(1)).fine();
        }
        let wait = pace.of(client(1)).handshakes.take(1).unwrap_err();
        assert!(wait > 2 * FINE.0, "{wait:?}");
    }

    #[test]
    fn only_those_who_did_much_are_remembered() {
        let pace = pace();
        pace.of(client(1)).wasted.take(WASTED.0).unwrap();
        for number in 2..20_000 {
            pace.of(client(number));
        }
        let clients = pace.clients.lock().unwrap();
        assert!(clients.by_address.len() <= 2 * MANY, "{}", clients.by_address.len());
        assert!(clients.by_address.contains_key(&client(1)));
    }
}
