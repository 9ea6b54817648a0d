//! How well the pods' certificates are kept fresh, all together.

use std::sync::atomic::Ordering;
use std::time::SystemTime;

use mesh_core::certs::Health;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// All families; clones are the same.
#[derive(Clone, Debug)]
pub struct Certificates {
    states: Family<Labels, Gauge>,
    soonest: Gauge,
    failures: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    state: &'static str,
}

impl Certificates {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let metrics =
            Self { states: Family::default(), soonest: Gauge::default(), failures: Counter::default() };
        registry.register(
            "ambit_certificates",
            "Identities of pods by what there is for them: a certificate that is fresh, one whose renewal is failing, \
             or none that is valid (missing)",
            metrics.states.clone(),
        );
        registry.register(
            "ambit_certificate_expiry_seconds",
            "Time until the first of the pods' certificates expires; negative after that. Renewed ones have half of \
             their life left",
            metrics.soonest.clone(),
        );
        registry.register(
            "ambit_certificate_renewal_failures",
            "Attempts to get a certificate that failed",
            metrics.failures.clone(),
        );
        metrics
    }

    /// Takes over how it is at `now`.
    pub fn observe(&self, health: &Health, now: SystemTime) {
        let count = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        for (state, number) in
            [("fresh", health.fresh), ("failing", health.failing), ("missing", health.missing)]
        {
            self.states.get_or_create(&Labels { state }).set(count(number));
        }
        let seconds = |left: std::time::Duration| i64::try_from(left.as_secs()).unwrap_or(i64::MAX);
        let left = health.soonest.map(|soonest| match soonest.duration_since(now) {
            Ok(left) => seconds(left),
            Err(since) => -seconds(since.duration()),
        });
        self.soonest.set(left.unwrap_or_default());
        // It only grows.
        self.failures.inner().store(health.failures, Ordering::Relaxed);
    }
}
