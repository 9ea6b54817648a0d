//! Keeps the authority in step with its Secret, the serving certificate fresh, and the published roots true.
//!
//! **Invariant:** a change of roots without overlap is not followed while this process lives: certificates of either
//! side would be refused by the other, for as long as they last.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use mesh_core::certs::health::{self, Alarm};
use mesh_core::readiness::Gate;
use rustls::crypto::aws_lc_rs::sign::any_ecdsa_type;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::ca::authority::{Authority, InvalidAuthority, Life, Material};
use crate::ca::cluster::{ClusterError, Store};
use crate::ca::issue::IssueError;
use crate::ca::metrics::Metrics;
use crate::ca::roots::{self, RootsError};

/// What serves at the moment.
pub struct Current {
    /// Signs.
    pub authority: Authority,
    /// Our own certificate.
    pub serving: Arc<CertifiedKey>,
    renew_serving_at: SystemTime,
    material: Material,
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
    /// It changed to something that shares no root with what serves.
    #[error(
        "Secret {0} shares no root with the one in use, which stays in use. Add the old root to root-cert.pem until \
         every certificate was renewed; or accept broken connections, and restart every ambit-ca"
    )]
    NoOverlap(&'static str),
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
    gate: Gate,
    metrics: Metrics,
    alarm: Mutex<Alarm>,
    current: watch::Sender<Option<Arc<Current>>>,
}

impl<S: Store> Keeper<S> {
    /// `names` are what the CA's clients call it.
    pub fn new(store: S, trust_domain: String, names: Vec<String>, gate: Gate, metrics: Metrics) -> Self {
        let (alarm, current) = (Mutex::default(), watch::channel(None).0);
        Self { store, trust_domain, names, gate, metrics, alarm, current }
    }

    /// Follows what serves.
    pub fn watch(&self) -> CurrentWatch {
        self.current.subscribe()
    }

    /// Keeps for ever.
    pub async fn run(self) {
        let mut last_error = None;
        loop {
            let result = self.round(SystemTime::now()).await;
            let pause = if result.is_ok() { PERIOD } else { RETRY };
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
        let before = self.current.borrow().clone();
        let loaded = self.read(before.as_deref(), now).await;
        // Renewed also while the API server is away.
        let current = match (loaded, before) {
            (Ok(Some(new)), _) => Ok(new),
            (Ok(None), Some(before)) => self.renew(before, now),
            (Err(error), Some(before)) => self.renew(before, now).and(Err(error)),
            (Ok(None), None) => return Ok(()),
            (Err(error), None) => Err(error),
        }?;
        if let Some(warning) = self.warning(&current.authority, now) {
            warn!("{warning}");
        }
        roots::publish(&self.store, &current.authority.roots()).await?;
        self.gate.open();
        Ok(())
    }

    /// What is to be said of the certificates that only the user can renew: once at 50, 25 and 10 percent of each life.
    fn warning(&self, authority: &Authority, now: SystemTime) -> Option<String> {
        let lowest = |life: &&Life| health::reached(life.from, life.until, now).unwrap_or(100);
        let life = authority.lives().iter().min_by_key(lowest)?;
        let reached = health::reached(life.from, life.until, now);
        let due = self.alarm.lock().unwrap_or_else(PoisonError::into_inner).due(reached)?;
        let days = life.until.duration_since(now).unwrap_or_default().as_secs() / 86_400;
        let what = if life.is_root { "the root" } else { "the CA's certificate" };
        Some(format!(
            "{what} {} has no more than {due} percent of its life left, {days} days: replace the CA Secret in time",
            life.subject
        ))
    }

    /// `None`: nothing changed.
    async fn read(
        &self,
        before: Option<&Current>,
        now: SystemTime,
    ) -> Result<Option<Arc<Current>>, KeepError> {
        let (secret, material) = roots::load(&self.store, &self.trust_domain, now).await?;
        if before.is_some_and(|before| before.material == material) {
            return Ok(None);
        }
        let authority =
            Authority::new(&material, now).map_err(|source| KeepError::Invalid { secret, source })?;
        if before.is_some_and(|before| !before.authority.overlaps(&authority)) {
            return Err(KeepError::NoOverlap(secret));
        }
        info!(secret, "signing with the key of this Secret");
        self.serve(authority, material, now).map(Some)
    }

    fn renew(&self, before: Arc<Current>, now: SystemTime) -> Result<Arc<Current>, KeepError> {
        if now < before.renew_serving_at {
            return Ok(before);
        }
        let secret = "in use";
        let authority =
            Authority::new(&before.material, now).map_err(|source| KeepError::Invalid { secret, source })?;
        self.serve(authority, before.material.clone(), now)
    }

    fn serve(
        &self,
        authority: Authority,
        material: Material,
        now: SystemTime,
    ) -> Result<Arc<Current>, KeepError> {
        let serving = authority.serving(&self.names, now)?;
        let key = any_ecdsa_type(&PrivatePkcs8KeyDer::from(serving.key).into())?;
        let chain = serving.chain.into_iter().map(CertificateDer::from).collect();
        self.metrics.authority(&authority);
        let current = Arc::new(Current {
            authority,
            serving: Arc::new(CertifiedKey::new(chain, key)),
            renew_serving_at: serving.renew_at,
            material,
        });
        self.current.send_replace(Some(Arc::clone(&current)));
        Ok(current)
    }
}

/// How soon a changed Secret is noticed.
const PERIOD: Duration = Duration::from_secs(30);
/// How soon after a failure.
const RETRY: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests;
