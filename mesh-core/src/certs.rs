//! Workload certificates: one per identity however many ask, renewed in the background, its key never written down.
//!
//! `schedule` says when to renew and when to try again, `fetch` asks the certificate authority; here is the state
//! between the two.
//!
//! **Invariant:** [`Certificates::get`] never returns a certificate that has expired.

pub mod fetch;
pub mod health;
pub mod roots;
pub mod schedule;

mod workload;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use tokio::sync::{Notify, Semaphore, watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

pub use self::fetch::{CaClient, CaConfig, FetchError};
pub use self::health::Health;
use self::roots::Bundle;
pub use self::roots::Roots;
pub use self::workload::{InvalidCert, WorkloadCert};
use crate::identity::Identity;
use crate::tls::revocation::Revocations;

/// Requests to the certificate authority that run at once.
pub const CONCURRENT_FETCHES: usize = 8;

/// Where certificates come from.
pub trait FetchCert: Send + Sync + 'static {
    /// A new certificate for `identity`, with a new key. Bounds its own time.
    fn fetch<'a>(&'a self, identity: &'a Identity) -> BoxFuture<'a, Result<WorkloadCert, FetchError>>;
}

/// Why there is no certificate to use.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CertError {
    /// There never was one.
    #[error("no certificate for {identity}: {source}")]
    Unavailable {
        /// Whose.
        identity: Identity,
        /// What the last attempt met.
        source: FetchError,
    },
    /// There was one, and it could not be renewed in time.
    #[error("the certificate for {identity} has expired and is not renewed: {source}")]
    Expired {
        /// Whose.
        identity: Identity,
        /// What the last attempt met.
        source: FetchError,
    },
    /// The identity was forgotten while the caller waited.
    #[error("the certificate for {0} is no longer kept here: its last pod has left")]
    Forgotten(Identity),
}

/// All certificates of this process. Clones are the same set; renewal ends with the last of them.
#[derive(Clone)]
pub struct Certificates {
    inner: Arc<Inner>,
}

/// Without what is in it.
impl std::fmt::Debug for Certificates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certificates").finish_non_exhaustive()
    }
}

struct Inner {
    entries: Mutex<HashMap<Identity, Entry>>,
    fetch: Arc<dyn FetchCert>,
    revocations: Revocations,
    roots: Roots,
    places: Arc<Semaphore>,
    failures: Arc<AtomicU64>,
    renewals: TaskTracker,
    stop: CancellationToken,
    _stop_on_drop: DropGuard,
}

/// One identity: its renewal task runs for as long as this exists.
struct Entry {
    state: watch::Receiver<State>,
    ask_again: Arc<Notify>,
    _stop_on_drop: DropGuard,
}

#[derive(Clone, Default)]
struct State {
    cert: Option<Arc<WorkloadCert>>,
    /// Of the last attempt, if it failed.
    error: Option<FetchError>,
}

/// What is known of one identity, for `/config_dump` and metrics.
#[derive(Clone, Debug, serde::Serialize)]
pub struct CertStatus {
    /// SPIFFE URI.
    pub identity: String,
    /// "available", "renewal failing", "unavailable" or "initializing".
    pub state: &'static str,
    /// Serial number of the leaf, hexadecimal.
    pub serial: Option<String>,
    /// Seconds since the epoch.
    pub not_before: Option<u64>,
    /// Seconds since the epoch.
    pub not_after: Option<u64>,
    /// PEM, leaf first.
    pub chain: Option<String>,
    /// PEM.
    pub roots: Option<String>,
    /// Of the last attempt, if it failed.
    pub error: Option<String>,
}

/// A certificate whose renewal fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Late {
    /// Whose.
    pub identity: Identity,
    /// Of its life, no more than this is left: 50, 25 or 10.
    pub percent: u8,
    /// When it ends.
    pub until: SystemTime,
    /// Of the last attempt.
    pub error: String,
}

impl Certificates {
    /// Nothing is fetched before it is asked for. Peers whose certificates are revoked are not believed, those with the
    /// roots of a file are.
    pub fn new(fetch: Arc<dyn FetchCert>, revocations: Revocations, roots: Roots) -> Self {
        let stop = CancellationToken::new();
        let inner = Inner {
            entries: Mutex::default(),
            fetch,
            revocations,
            roots,
            places: Arc::new(Semaphore::new(CONCURRENT_FETCHES)),
            failures: Arc::default(),
            renewals: TaskTracker::new(),
            _stop_on_drop: stop.clone().drop_guard(),
            stop,
        };
        Self { inner: Arc::new(inner) }
    }

    /// The certificate of `identity`; waits only for the first one.
    ///
    /// # Errors
    /// When the last attempt to get one failed, at once: the next attempt is under way, and a caller that waited for
    /// it would hold a connection open meanwhile.
    pub async fn get(&self, identity: &Identity) -> Result<Arc<WorkloadCert>, CertError> {
        let (mut state, ask_again) = self.entry(identity);
        let known = state.wait_for(|state| state.cert.is_some() || state.error.is_some()).await;
        let known = known.map_err(|_| CertError::Forgotten(identity.clone()))?.clone();
        let now = SystemTime::now();
        let identity = identity.clone();
        match known {
            State { cert: Some(cert), .. } if now < cert.not_after() => Ok(cert),
            State { cert, error } => {
                ask_again.notify_one();
                let source = error.unwrap_or(FetchError::Pending);
                Err(match cert {
                    Some(_) => CertError::Expired { identity, source },
                    None => CertError::Unavailable { identity, source },
                })
            }
        }
    }

    /// The certificate of `identity` if it is here and good, at once.
    pub fn current(&self, identity: &Identity) -> Option<Arc<WorkloadCert>> {
        let cert = self.entry(identity).0.borrow().cert.clone();
        cert.filter(|cert| SystemTime::now() < cert.not_after())
    }

    /// Starts to fetch the certificate of `identity`, unless it is here.
    pub fn prefetch(&self, identity: &Identity) {
        self.entry(identity);
    }

    /// Drops the certificate of `identity` and stops renewing it; connections that use it live on.
    pub fn forget(&self, identity: &Identity) {
        self.lock().remove(identity);
    }

    /// What is known, ordered by identity.
    pub fn status(&self) -> Vec<CertStatus> {
        let entries = self.lock();
        let mut all: Vec<_> =
            entries.iter().map(|(identity, entry)| status(identity, &entry.state.borrow())).collect();
        drop(entries);
        all.sort_by(|a, b| a.identity.cmp(&b.identity));
        all
    }

    /// How well they are kept fresh.
    pub fn health(&self, now: SystemTime) -> Health {
        let mut health =
            Health { failures: self.inner.failures.load(Ordering::Relaxed), ..Health::default() };
        for entry in self.lock().values() {
            let state = entry.state.borrow();
            let life = state.cert.as_ref().map(|cert| (cert.not_before(), cert.not_after()));
            health.count(life, state.error.is_some(), now);
        }
        health
    }

    /// Those that are not renewed in time.
    pub fn late(&self, now: SystemTime) -> Vec<Late> {
        let entries = self.lock();
        let late = entries.iter().filter_map(|(identity, entry)| {
            let state = entry.state.borrow();
            let (cert, error) = (state.cert.as_ref()?, state.error.as_ref()?);
            let percent = health::reached(cert.not_before(), cert.not_after(), now)?;
            let (until, error) = (cert.not_after(), error.to_string());
            Some(Late { identity: identity.clone(), percent, until, error })
        });
        late.collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Identity, Entry>> {
        self.inner.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entry(&self, identity: &Identity) -> (watch::Receiver<State>, Arc<Notify>) {
        let mut entries = self.lock();
        let entry = entries.entry(identity.clone()).or_insert_with(|| self.inner.start(identity.clone()));
        (entry.state.clone(), entry.ask_again.clone())
    }
}

impl Inner {
    fn start(&self, identity: Identity) -> Entry {
        let (sender, state) = watch::channel(State::default());
        let ask_again = Arc::new(Notify::new());
        let stop = self.stop.child_token();
        let renewal = Renewal {
            identity,
            fetch: self.fetch.clone(),
            revocations: self.revocations.clone(),
            roots: self.roots.watch(),
            places: self.places.clone(),
            failures: self.failures.clone(),
            state: sender,
            ask_again: ask_again.clone(),
        };
        self.renewals.spawn(stop.clone().run_until_cancelled_owned(renewal.run()));
        Entry { state, ask_again, _stop_on_drop: stop.drop_guard() }
    }
}

/// Keeps one identity's certificate fresh until it is dropped.
struct Renewal {
    identity: Identity,
    fetch: Arc<dyn FetchCert>,
    revocations: Revocations,
    roots: watch::Receiver<Arc<Bundle>>,
    places: Arc<Semaphore>,
    failures: Arc<AtomicU64>,
    state: watch::Sender<State>,
    ask_again: Arc<Notify>,
}

impl Renewal {
    async fn run(mut self) {
        let mut failures = 0;
        loop {
            match self.attempt().await {
                Ok(cert) => match self.hold(&cert).await {
                    Ended::Due => failures = 0,
                    Ended::Distrusted => {
                        let pause = schedule::retry_after(failures, rand::random());
                        tracing::warn!(identity = %self.identity, renewed_in = ?pause, "the root of the certificate is trusted no more");
                        failures += 1;
                        self.pause(pause).await;
                    }
                },
                Err(error) => {
                    let pause = schedule::retry_after(failures, rand::random());
                    tracing::warn!(identity = %self.identity, %error, retry_in = ?pause, "no certificate");
                    failures += 1;
                    self.failures.fetch_add(1, Ordering::Relaxed);
                    self.state.send_modify(|state| state.error = Some(error));
                    self.pause(pause).await;
                }
            }
        }
    }

    /// Serves with it, and with the mesh's roots as they change, for as long as it is good.
    async fn hold(&mut self, cert: &WorkloadCert) -> Ended {
        let at = schedule::renew_at(cert.not_before(), cert.not_after(), rand::random());
        let due = sleep_until(at);
        tokio::pin!(due);
        loop {
            let bundle = self.roots.borrow_and_update().clone();
            let (cert, taken) = match cert.trusting(&bundle) {
                Ok(trusting) => trusting,
                Err(error) => {
                    // The roots that it came with may be what the file took away.
                    tracing::error!(identity = %self.identity, %error, "the mesh's roots cannot be used");
                    self.state.send_replace(State { cert: None, error: Some(error.into()) });
                    return Ended::Distrusted;
                }
            };
            self.state.send_replace(State { cert: Some(Arc::new(cert)), error: None });
            if !taken {
                return Ended::Distrusted;
            }
            tokio::select! {
                () = &mut due => return Ended::Due,
                Ok(()) = self.roots.changed() => {}
            }
        }
    }

    async fn attempt(&self) -> Result<WorkloadCert, FetchError> {
        let _place = self.places.acquire().await;
        let cert = self.fetch.fetch(&self.identity).await?.checking(&self.revocations)?;
        tracing::debug!(identity = %self.identity, serial = cert.serial(), "certificate fetched");
        Ok(cert)
    }

    /// Somebody who needs the certificate now shortens the wait, down to the first step.
    async fn pause(&self, pause: Duration) {
        tokio::time::sleep(schedule::FIRST_RETRY.min(pause)).await;
        let rest = pause.saturating_sub(schedule::FIRST_RETRY);
        let _ = tokio::time::timeout(rest, self.ask_again.notified()).await;
    }
}

/// Why there is to be another certificate.
enum Ended {
    /// Half of its life is over.
    Due,
    /// Peers that trust the mesh's roots of now refuse it.
    Distrusted,
}

/// By the wall clock, which certificates go by: it may be set, and it runs while the machine sleeps.
async fn sleep_until(at: SystemTime) {
    const LOOK_AGAIN: Duration = Duration::from_secs(60);
    // A certificate that is due at once must not be asked for in a tight loop.
    tokio::time::sleep(schedule::FIRST_RETRY).await;
    while let Ok(left) = at.duration_since(SystemTime::now()) {
        tokio::time::sleep(left.min(LOOK_AGAIN)).await;
    }
}

fn status(identity: &Identity, state: &State) -> CertStatus {
    let name = match (&state.cert, &state.error) {
        (Some(_), None) => "available",
        (Some(_), Some(_)) => "renewal failing",
        (None, Some(_)) => "unavailable",
        (None, None) => "initializing",
    };
    let cert = state.cert.as_deref();
    CertStatus {
        identity: identity.to_string(),
        state: name,
        serial: cert.map(|cert| cert.serial().to_owned()),
        not_before: cert.map(|cert| seconds(cert.not_before())),
        not_after: cert.map(|cert| seconds(cert.not_after())),
        chain: cert.map(WorkloadCert::chain_pem),
        roots: cert.map(WorkloadCert::roots_pem),
        error: state.error.as_ref().map(ToString::to_string),
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests;
