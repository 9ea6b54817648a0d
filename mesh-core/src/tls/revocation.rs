//! Which certificates are revoked, as of now: asked in each handshake, and again about live connections when the lists
//! change.

pub mod file;

use std::sync::Arc;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

use super::CertificateFault;
use super::crl::{Facts, Lists, Revoked};

/// Our end of a connection, as Istio's label `reporter` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reporter {
    /// We dialled; the server's certificate is asked about.
    Source,
    /// We accepted; the client's certificate is asked about.
    Destination,
}

/// All families; clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    rejections: Family<ReporterLabels, Counter>,
    untracked: Family<ReporterLabels, Counter>,
    lists: Gauge,
    failures: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReporterLabels {
    reporter: &'static str,
}

impl From<Reporter> for ReporterLabels {
    fn from(reporter: Reporter) -> Self {
        let reporter = match reporter {
            Reporter::Source => "source",
            Reporter::Destination => "destination",
        };
        Self { reporter }
    }
}

impl Metrics {
    /// Registers all families, the first two as Istio's ztunnel names them.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let istio = registry.sub_registry_with_prefix("istio_crl");
        istio.register(
            "policy_rejections",
            "Handshakes refused, and tunnels cut, because a certificate of the peer is revoked",
            metrics.rejections.clone(),
        );
        istio.register(
            "untracked_connections",
            "Tunnels that changed revocation lists could not be applied to",
            metrics.untracked.clone(),
        );
        let own = registry.sub_registry_with_prefix("ambit_crl");
        own.register("lists", "Certificate revocation lists in force", metrics.lists.clone());
        own.register(
            "load_failures",
            "Changes of the file with revocation lists that could not be used: the lists before them stay in force",
            metrics.failures.clone(),
        );
        for reporter in [Reporter::Source, Reporter::Destination] {
            drop(metrics.rejections.get_or_create(&reporter.into()));
            drop(metrics.untracked.get_or_create(&reporter.into()));
        }
        metrics
    }
}

/// The lists in force; clones are the same. The default has none and never will.
///
/// **Invariant:** fails closed: where lists are configured, nobody is believed before it is known what they are.
#[derive(Clone, Debug, Default)]
pub struct Revocations(Option<Arc<Inner>>);

#[derive(Debug)]
struct Inner {
    /// None: what they are has never been known.
    lists: watch::Sender<Known>,
    /// Why the newest form of the file is not in force.
    error: watch::Sender<Option<String>>,
    metrics: Metrics,
}

type Known = Option<Arc<Lists>>;

/// What is in force, for `/config_dump`.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Each list.
    pub lists: Vec<Facts>,
    /// Why the newest form of the file is not in force.
    pub error: Option<String>,
}

impl Revocations {
    /// Nobody is believed until [`Revocations::replace`] says which lists there are.
    pub fn new(metrics: Metrics) -> Self {
        let (lists, error) = (watch::Sender::default(), watch::Sender::default());
        Self(Some(Arc::new(Inner { lists, error, metrics })))
    }

    /// Whether there may ever be lists.
    pub fn are_configured(&self) -> bool {
        self.0.is_some()
    }

    /// Whether there are lists now, or may be, so that certificates have to be asked about.
    pub fn are_in_force(&self) -> bool {
        self.0.as_ref().is_some_and(|inner| may_revoke(&inner.lists.borrow()))
    }

    /// Completes when this is so; never where lists are not configured.
    pub async fn in_force(&self) {
        self.when(may_revoke).await;
    }

    /// Completes when it is known which lists there are, if only that there are none; never where none are configured.
    pub async fn known(&self) {
        self.when(Option::is_some).await;
    }

    /// Whether nobody is believed, since it is not known who is revoked.
    pub(super) fn are_unknown(&self) -> bool {
        self.0.as_ref().is_some_and(|inner| inner.lists.borrow().is_none())
    }

    async fn when(&self, is_so: impl FnMut(&Known) -> bool) {
        let Some(inner) = &self.0 else { return std::future::pending().await };
        let mut lists = inner.lists.subscribe();
        // The sender is ours.
        let _ = lists.wait_for(is_so).await;
    }

    /// Puts other lists in force: who is revoked by them is cut.
    pub fn replace(&self, lists: Lists) {
        let Some(inner) = &self.0 else { return };
        inner.metrics.lists.set(i64::try_from(lists.facts().count()).unwrap_or(i64::MAX));
        inner.error.send_replace(None);
        inner.lists.send_replace(Some(Arc::new(lists)));
    }

    /// Notes that what was to be put in force cannot be.
    pub fn failed(&self, error: String) {
        let Some(inner) = &self.0 else { return };
        inner.metrics.failures.inc();
        inner.error.send_replace(Some(error));
    }

    /// What is in force; None where there are never lists.
    pub fn status(&self) -> Option<Status> {
        let inner = self.0.as_ref()?;
        let lists = inner.lists.borrow().iter().flat_map(|lists| lists.facts().cloned()).collect();
        Some(Status { lists, error: inner.error.borrow().clone() })
    }

    /// Asks about a chain that was verified to lead to `roots`.
    pub(super) fn check(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        roots: &RootCertStore,
        reporter: Reporter,
    ) -> Result<(), CertificateFault> {
        let Some(inner) = &self.0 else { return Ok(()) };
        let Some(lists) = inner.lists.borrow().clone() else {
            return Err(CertificateFault::RevocationUnknown);
        };
        let chain = std::iter::once(leaf).chain(intermediates).map(AsRef::as_ref);
        let Some(Revoked { serial, issuer }) = lists.revoked(chain, roots) else { return Ok(()) };
        inner.metrics.rejections.get_or_create(&reporter.into()).inc();
        tracing::warn!(serial, issuer, ?reporter, "a certificate that the peer presents is revoked");
        Err(CertificateFault::Revoked)
    }

    /// What a live connection's peer proved itself with; None where nothing can change that.
    pub(crate) fn presented(
        &self,
        chain: Option<&[CertificateDer<'static>]>,
        roots: &Arc<RootCertStore>,
        reporter: Reporter,
    ) -> Option<Presented> {
        let inner = self.0.as_ref()?;
        let Some([leaf, intermediates @ ..]) = chain else {
            inner.metrics.untracked.get_or_create(&reporter.into()).inc();
            return None;
        };
        let chain = (leaf.clone(), intermediates.to_vec());
        Some(Presented { revocations: self.clone(), chain, roots: roots.clone(), reporter })
    }
}

fn may_revoke(lists: &Known) -> bool {
    lists.as_ref().is_none_or(|lists| lists.facts().next().is_some())
}

/// What a live connection's peer proved itself with. Only revocation is asked about again: validity was right when it
/// mattered.
#[derive(Clone, Debug)]
pub struct Presented {
    revocations: Revocations,
    /// Leaf and intermediates.
    chain: (CertificateDer<'static>, Vec<CertificateDer<'static>>),
    roots: Arc<RootCertStore>,
    reporter: Reporter,
}

/// Completes when a certificate that the peer has presented is revoked; never without any.
pub async fn revoked(presented: Option<Presented>) -> CertificateFault {
    let Some(Presented { revocations, chain, roots, reporter }) = presented else {
        return std::future::pending().await;
    };
    let Some(mut changes) = revocations.0.as_ref().map(|inner| inner.lists.subscribe()) else {
        return std::future::pending().await;
    };
    loop {
        // Also at first: they may have changed since the handshake.
        changes.mark_unchanged();
        if let Err(fault) = revocations.check(&chain.0, &chain.1, &roots, reporter) {
            return fault;
        }
        if changes.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}
