//! Addresses of endpoints that are known by a host name, looked up with the node's resolver.
//!
//! The resolver does not tell how long an answer is good for, so each is used for a few seconds; an older one is better
//! than none.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

/// An answer is used for so long.
const FRESH: Duration = Duration::from_secs(5);
/// And for so long where the resolver has none.
const STALE: Duration = Duration::from_secs(600);
/// Time for the resolver.
const DEADLINE: Duration = Duration::from_secs(5);
/// Names that are remembered.
const MOST: usize = 1024;
/// Look-ups at once: each has a thread for as long as the resolver takes, which may be longer than anybody waits.
const AT_ONCE: usize = 128;
/// Of them those of one namespace's pods, so that slow names of one are nobody else's trouble.
const AT_ONCE_OF_NAMESPACE: usize = 16;

/// Addresses of one name, never none.
pub type Addresses = Arc<[IpAddr]>;

/// Looks a name up; may block.
pub type Resolve = dyn Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync;

/// Asks the node's resolver.
///
/// # Errors
/// When it knows no address, or does not answer.
pub fn of_node(name: &str) -> io::Result<Vec<IpAddr>> {
    Ok((name, 0).to_socket_addrs()?.map(|found| found.ip().to_canonical()).collect())
}

/// What was found; clones are the same.
#[derive(Clone)]
pub struct Hosts {
    resolve: Arc<Resolve>,
    known: Arc<Mutex<HashMap<String, Arc<Host>>>>,
    places: Arc<Semaphore>,
    of_namespace: Arc<Mutex<HashMap<Arc<str>, Arc<Semaphore>>>>,
}

impl Default for Hosts {
    fn default() -> Self {
        Self::new(Arc::new(of_node))
    }
}

/// One name: who finds it being looked up waits for that.
#[derive(Debug, Default)]
struct Host {
    found: Mutex<Option<Found>>,
    looking: tokio::sync::Mutex<Failed>,
}

/// The last look-up that came to nothing: when, and of what.
type Failed = Option<(Instant, String)>;

#[derive(Clone, Debug)]
struct Found {
    addresses: Addresses,
    /// When the resolver said so.
    said: Instant,
    /// When it was asked last, with or without an answer.
    asked: Instant,
}

impl Host {
    fn found(&self) -> Option<Found> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn fresh(&self) -> Option<Addresses> {
        self.found().filter(|found| found.asked.elapsed() < FRESH).map(|found| found.addresses)
    }
}

impl Hosts {
    /// Nothing was looked up yet.
    pub fn new(resolve: Arc<Resolve>) -> Self {
        let places = Arc::new(Semaphore::new(AT_ONCE));
        Self { resolve, known: Arc::default(), places, of_namespace: Arc::default() }
    }

    /// What was found lately.
    pub fn get(&self, name: &str) -> Option<Addresses> {
        let host = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()?;
        host.fresh()
    }

    /// Looks a name up for a pod of `namespace`, unless that was done lately.
    ///
    /// # Errors
    /// When the resolver knows no address, and has known none for a while.
    pub async fn look_up(&self, name: &str, namespace: &Arc<str>) -> io::Result<Addresses> {
        let (host, came) = (self.host(name), Instant::now());
        let mut failed = host.looking.lock().await;
        if let Some(fresh) = host.fresh() {
            return Ok(fresh);
        }
        // Whoever waited for it has its outcome, or a resolver that is slow to fail would be waited for one by one.
        if let Some((_, reason)) = failed.as_ref().filter(|(at, _)| *at >= came) {
            return Err(io::Error::other(reason.clone()));
        }
        let answer = self.resolve(name, namespace).await;
        let now = Instant::now();
        let old = || host.found().filter(|found| found.said.elapsed() < STALE);
        let found = match (answer, old()) {
            (Ok(addresses), _) => Found { addresses, said: now, asked: now },
            (Err(_), Some(old)) => Found { asked: now, ..old },
            (Err(error), None) => {
                *failed = Some((now, error.to_string()));
                return Err(error);
            }
        };
        *host.found.lock().unwrap_or_else(PoisonError::into_inner) = Some(found.clone());
        Ok(found.addresses)
    }

    fn host(&self, name: &str) -> Arc<Host> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MOST && !known.contains_key(name) {
            known.retain(|_, host| host.fresh().is_some());
        }
        if known.len() >= MOST && !known.contains_key(name) {
            // What is remembered of others' names is not given up for it.
            return Arc::default();
        }
        known.entry(name.to_owned()).or_default().clone()
    }

    async fn resolve(&self, name: &str, namespace: &Arc<str>) -> io::Result<Addresses> {
        let late = || io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {DEADLINE:?}"));
        let answer = async {
            let closed = |_| io::Error::other("the proxy ends");
            let own = self.places_of(namespace).acquire_owned().await.map_err(closed)?;
            let place = self.places.clone().acquire_owned().await.map_err(closed)?;
            let (name, resolve) = (name.to_owned(), self.resolve.clone());
            let looking = tokio::task::spawn_blocking(move || {
                // Given back when the thread is free again, not when nobody waits for it any more.
                let _places = (own, place);
                resolve(&name)
            });
            looking.await.map_err(io::Error::other)?
        };
        let answer = tokio::time::timeout(DEADLINE, answer).await.map_err(|_| late())?;
        distinct(answer?)
    }

    fn places_of(&self, namespace: &Arc<str>) -> Arc<Semaphore> {
        let mut all = self.of_namespace.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, places| Arc::strong_count(places) > 1);
        let new = || Arc::new(Semaphore::new(AT_ONCE_OF_NAMESPACE));
        all.entry(namespace.clone()).or_insert_with(new).clone()
    }
}

fn distinct(mut addresses: Vec<IpAddr>) -> io::Result<Addresses> {
    addresses.sort_unstable();
    addresses.dedup();
    if addresses.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "it has no address"));
    }
    Ok(addresses.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Longer than a name may be, so that nobody has to be asked.
    fn none() -> String {
        "x".repeat(300)
    }

    #[tokio::test]
    async fn what_was_found_is_used_and_what_has_no_address_is_told() {
        let hosts = Hosts::default();
        assert_eq!(hosts.get("localhost"), None);
        let found = hosts.look_up("localhost", &"shop".into()).await.unwrap();
        assert!(found.iter().all(IpAddr::is_loopback), "{found:?}");
        assert_eq!(hosts.get("localhost"), Some(found));
        hosts.look_up(&none(), &"shop".into()).await.unwrap_err();
        assert_eq!(hosts.get(&none()), None);
    }

    #[tokio::test]
    async fn who_waits_for_a_look_up_that_fails_does_not_begin_another() {
        let hosts = Hosts::default();
        let host = hosts.host("localhost");
        let mut looking = host.looking.lock().await;
        let shop = "shop".into();
        let waiting = hosts.look_up("localhost", &shop);
        tokio::pin!(waiting);
        assert!(futures_util::poll!(&mut waiting).is_pending());
        *looking = Some((Instant::now(), "no server answers".to_owned()));
        drop(looking);
        assert_eq!(waiting.await.unwrap_err().to_string(), "no server answers");
        hosts.look_up("localhost", &"shop".into()).await.expect("who comes later tries again");
    }

    #[tokio::test]
    async fn slow_names_of_one_namespace_leave_room_for_others() {
        let hosts = Hosts::default();
        let (shop, bank) = ("shop".into(), "bank".into());
        let taken = hosts.places_of(&shop).acquire_many_owned(AT_ONCE_OF_NAMESPACE as u32).await.unwrap();
        let waiting = hosts.resolve("localhost", &shop);
        tokio::pin!(waiting);
        assert!(futures_util::poll!(&mut waiting).is_pending());
        hosts.resolve("localhost", &bank).await.unwrap();
        assert!(futures_util::poll!(&mut waiting).is_pending(), "its places are taken");
        drop(taken);
        waiting.await.unwrap();
        assert_eq!(hosts.places.available_permits(), AT_ONCE);
    }

    #[tokio::test]
    async fn many_names_push_nobody_out() {
        let hosts = Hosts::default();
        let shop = "shop".into();
        let now = Instant::now();
        let found = Found { addresses: Arc::new([[192, 0, 2, 1].into()]), said: now, asked: now };
        for number in 0..MOST {
            *hosts.host(&format!("{number}.example")).found.lock().unwrap() = Some(found.clone());
        }
        hosts.look_up("localhost", &shop).await.unwrap();
        assert_eq!((hosts.get("0.example"), hosts.get("localhost")), (Some(found.addresses), None));
    }

    #[tokio::test]
    async fn an_old_answer_is_better_than_none() {
        let hosts = Hosts::default();
        let old: Addresses = [IpAddr::from([192, 0, 2, 1])].into();
        let ago = |seconds| Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
        let known = |seconds| {
            let found = Found { addresses: old.clone(), said: ago(seconds), asked: ago(seconds) };
            *hosts.host(&none()).found.lock().unwrap() = Some(found);
        };
        known(60);
        assert_eq!(hosts.get(&none()), None);
        assert_eq!(hosts.look_up(&none(), &"shop".into()).await.unwrap(), old);
        assert_eq!(hosts.get(&none()), Some(old.clone()), "the resolver is not asked again at once");
        known(3600);
        hosts.look_up(&none(), &"shop".into()).await.unwrap_err();
    }
}
