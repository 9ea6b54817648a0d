//! Keeps the authority in step with its Secret, the serving certificate fresh, and the published roots true.
//!
//! **Invariant:** what all replicas do is in the API server before one of them does it, and is changed by whoever saw it
//! last (compare and swap).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use mesh_core::certs::health::{self, Alarm};
use mesh_core::readiness::Gate;
use rustls::crypto::aws_lc_rs::sign::any_ecdsa_type;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use tokio::sync::watch;
use tracing::{debug, error, info, warn};

use crate::ca::authority::{Authority, InvalidAuthority, Life};
use crate::ca::cluster::{ClusterError, Expiry, Store};
use crate::ca::issue::{IssueError, Times};
use crate::ca::metrics::Metrics;
use crate::ca::roots::{self, RootsError, STATE_SECRET};
use crate::ca::rotation::{Phase, State, Wanted};

/// What serves at the moment.
pub struct Current {
    /// Signs.
    pub authority: Authority,
    /// Our own certificate.
    pub serving: Arc<CertifiedKey>,
    renew_serving_at: SystemTime,
    state: State,
}

/// Sees what serves; `None` before the first Secret was read.
pub type CurrentWatch = watch::Receiver<Option<Arc<Current>>>;

/// Why a round did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// No files.
    #[error(transparent)]
    Roots(#[from] RootsError),
    /// The files are no authority.
    #[error("Secret {secret}: {source}")]
    Invalid {
        /// Which Secret.
        secret: &'static str,
        /// What is wrong with it.
        source: InvalidAuthority,
    },
    /// Other replicas were quicker, each time.
    #[error("Secret {STATE_SECRET} changes each time that it is to be written")]
    Contended,
    /// Our own certificate.
    #[error("cannot issue the serving certificate: {0}")]
    Serving(#[from] IssueError),
    /// A key that rustls does not take.
    #[error("cannot use the serving certificate: {0}")]
    Tls(#[from] rustls::Error),
    /// The ConfigMap.
    #[error(transparent)]
    Publish(#[from] ClusterError),
}

/// Does the keeping.
pub struct Keeper<S> {
    store: S,
    trust_domain: String,
    names: Vec<String>,
    times: Times,
    gate: Gate,
    metrics: Metrics,
    said: Mutex<HashMap<Whose, Said>>,
    current: watch::Sender<Option<Arc<Current>>>,
}

/// A certificate that the user has to renew: its subject and its end.
type Whose = (String, SystemTime);

/// What was said of how old a certificate is.
#[derive(Clone, Copy, Debug, Default)]
struct Said {
    in_the_log: Alarm,
    as_an_event: Alarm,
}

/// The user's Secret, read and checked.
struct Source {
    secret: &'static str,
    wanted: Wanted,
    lives: Vec<Life>,
}

impl<S: Store> Keeper<S> {
    /// `names` are what the CA's clients call it.
    pub fn new(store: S, trust_domain: String, names: Vec<String>, gate: Gate, metrics: Metrics) -> Self {
        let (said, current) = (Mutex::default(), watch::channel(None).0);
        Self { store, trust_domain, names, times: Times::default(), gate, metrics, said, current }
    }

    /// The same, for certificates that live as long as this says.
    #[must_use]
    pub fn with_times(self, times: Times) -> Self {
        Self { times, ..self }
    }

    /// Follows what serves.
    pub fn watch(&self) -> CurrentWatch {
        self.current.subscribe()
    }

    /// Keeps for ever.
    pub async fn run(self) {
        let mut last_error = None;
        // What lives for seconds only has to be looked after more often.
        let period = ((self.times.lifetime + self.times.skew) / 20).clamp(PERIOD / 100, PERIOD);
        loop {
            let result = self.round(SystemTime::now()).await;
            let pause = if result.is_ok() { period } else { period.min(RETRY) };
            let text = result.err().map(|error| error.to_string());
            if text != last_error {
                match &text {
                    Some(text) => error!("{text}"),
                    None => info!("the CA's Secret and its published roots are as they should be"),
                }
                last_error = text;
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Looks once, and does what there is to do.
    ///
    /// # Errors
    /// What kept it from being as it should be; what served before goes on serving.
    pub async fn round(&self, now: SystemTime) -> Result<(), KeepError> {
        let source = self.source(now).await;
        let before = self.current.borrow().clone();
        let kept = self.keep(before.as_ref(), source.as_ref().ok(), now).await;
        // Renewed also while the API server is away.
        if let (Err(_), Some(before)) = (&kept, before)
            && now >= before.renew_serving_at
        {
            self.serve(before.state.clone(), now)?;
        }
        // Also where the Secret is no use: it signs with what it signed with before.
        if kept.is_ok() && self.current.borrow().is_some() {
            self.gate.open();
        }
        let Source { secret, lives, .. } = source?;
        kept?;
        self.tell_of_age(secret, &lives, now).await;
        Ok(())
    }

    /// What the user's Secret asks for.
    async fn source(&self, now: SystemTime) -> Result<Source, KeepError> {
        let roots::Source { secret, material, at_once } =
            roots::load(&self.store, &self.trust_domain, now).await?;
        let authority =
            Authority::new(&material, now).map_err(|source| KeepError::Invalid { secret, source })?;
        let lives = authority.lives().to_vec();
        Ok(Source { secret, wanted: Wanted { candidate: authority.candidate(material), at_once }, lives })
    }

    /// Goes on from what all replicas do. A Secret that is no use changes nothing, but what was begun goes on.
    async fn keep(
        &self,
        before: Option<&Arc<Current>>,
        source: Option<&Source>,
        now: SystemTime,
    ) -> Result<(), KeepError> {
        let published = roots::published(&self.store).await?;
        let wanted = source.map(|source| &source.wanted);
        let said = published.as_deref().unwrap_or_default();
        let Some(state) = self.settle(before, wanted, said, now).await? else { return Ok(()) };
        let current = match before {
            Some(before) if before.state == state && now < before.renew_serving_at => before.clone(),
            _ => self.serve(state, now)?,
        };
        Ok(roots::publish(&self.store, published.as_deref(), &current.state.trusted()).await?)
    }

    /// Agrees with the other replicas on what to do; `None`: there is no key yet, and none to be had.
    async fn settle(
        &self,
        before: Option<&Arc<Current>>,
        wanted: Option<&Wanted>,
        published: &str,
        now: SystemTime,
    ) -> Result<Option<State>, KeepError> {
        for _ in 0..ATTEMPTS {
            let Some((state, version)) = roots::state(&self.store).await? else {
                // Who deletes it does not end a rotation that we know of.
                let begun = before.map(|before| before.state.clone());
                let first = || wanted.map(|wanted| State::new(&wanted.candidate, self.times));
                let Some(state) = begun.or_else(first) else { return Ok(None) };
                roots::settle(&self.store, &state, None).await?;
                continue;
            };
            let signing = Authority::new(&state.signing, now);
            let signing = match signing {
                Ok(authority) => Some(authority.candidate(state.signing.clone())),
                Err(InvalidAuthority::Expired(_)) => None,
                Err(source) => return Err(KeepError::Invalid { secret: STATE_SECRET, source }),
            };
            let next = state.next(signing.as_ref(), wanted, published, now, self.times);
            if next == state || roots::settle(&self.store, &next, Some(&version)).await? {
                return Ok(Some(next));
            }
        }
        Err(KeepError::Contended)
    }

    /// Of the certificates that only the user can renew: once at 50, 25 and 10 percent of each life.
    async fn tell_of_age(&self, secret: &'static str, lives: &[Life], now: SystemTime) {
        let whose = |life: &Life| (life.subject.clone(), life.until);
        self.said().retain(|said, _| lives.iter().any(|life| whose(life) == *said));
        for life in lives {
            let before = self.said().get(&whose(life)).copied().unwrap_or_default();
            let (mut said, reached) = (before, health::reached(life.from, life.until, now));
            let is_new = said.in_the_log.due(reached).is_some();
            if let Some(percent) = said.as_an_event.due(reached) {
                let expiry = expiry(secret, life, percent, now);
                if is_new {
                    warn!("{}", expiry.message);
                }
                if let Err(error) = self.store.tell(&expiry).await {
                    said.as_an_event = before.as_an_event;
                    match is_new {
                        true => warn!("there is no Event of this yet: {error}"),
                        false => debug!("still no Event of {}'s age: {error}", life.subject),
                    }
                }
            }
            self.said().insert(whose(life), said);
        }
    }

    fn said(&self) -> MutexGuard<'_, HashMap<Whose, Said>> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Signs with the state's key from now on.
    fn serve(&self, state: State, now: SystemTime) -> Result<Arc<Current>, KeepError> {
        let invalid = |source| KeepError::Invalid { secret: STATE_SECRET, source };
        let authority = Authority::new(&state.signing, now).map_err(invalid)?;
        let authority = authority.trusting(&state.record.roots).with_times(self.times);
        let serving = authority.serving(&self.names, now)?;
        let key = any_ecdsa_type(&PrivatePkcs8KeyDer::from(serving.key).into())?;
        let chain = serving.chain.into_iter().map(CertificateDer::from).collect();
        self.metrics.authority(&authority);
        self.metrics.rotation(&state);
        if self.current.borrow().as_ref().is_none_or(|current| current.state != state) {
            tell(&state);
        }
        let current = Arc::new(Current {
            authority,
            serving: Arc::new(CertifiedKey::new(chain, key)),
            renew_serving_at: serving.renew_at,
            state,
        });
        self.current.send_replace(Some(Arc::clone(&current)));
        Ok(current)
    }
}

fn expiry(secret: &'static str, life: &Life, percent: u8, now: SystemTime) -> Expiry {
    let days = life.until.duration_since(now).unwrap_or_default().as_secs() / 86_400;
    let what = if life.is_root { "the root" } else { "the CA's certificate" };
    let message = format!(
        "{what} {} has no more than {percent} percent of its life left, {days} days: replace the CA Secret in time",
        life.subject
    );
    Expiry { secret, subject: life.subject.clone(), percent, until: life.until, message }
}

/// Says where a rotation stands.
fn tell(state: &State) {
    let (phase, until) = state.phase();
    let left = until.map(|until| until.duration_since(SystemTime::now()).unwrap_or_default());
    let left = left.map_or_else(String::new, |left| format!(" within {} s", left.as_secs()));
    let roots = state.record.roots.len();
    let rotation = phase.name();
    match phase {
        Phase::Steady => info!(rotation, roots, "signing with the key of the CA's Secret"),
        Phase::Overlap => info!(
            rotation,
            roots,
            "the CA's Secret has another key: its root is trusted, and it signs once everybody knows{left}"
        ),
        Phase::Retiring => info!(
            rotation,
            roots,
            "signing with the new key; the old root goes when all that it vouches for has expired{left}"
        ),
    }
}

/// How soon a changed Secret is noticed.
const PERIOD: Duration = Duration::from_secs(30);
/// How soon after a failure.
const RETRY: Duration = Duration::from_secs(1);
/// That others are quicker.
const ATTEMPTS: usize = 5;

#[cfg(test)]
mod tests;
