//! What the CA counts.

use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::ca::authority::Authority;
use crate::ca::rotation::{Phase, State};

/// The CA's metric families. Clones count together.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    issued: Counter,
    refused: Family<Reason, Counter>,
    not_after: Gauge,
    root_not_after: Gauge,
    phase: Family<Rotation, Gauge>,
    phase_ends: Gauge,
    trusted: Gauge,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Rotation {
    phase: &'static str,
}

impl Metrics {
    /// Registers the families.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("ambit_ca_certificates_issued", "Certificates signed", metrics.issued.clone());
        registry.register(
            "ambit_ca_requests_refused",
            "Requests not signed, by reason",
            metrics.refused.clone(),
        );
        let help = "When the CA's own certificate expires, in seconds since 1970";
        registry.register("ambit_ca_not_after_timestamp_seconds", help, metrics.not_after.clone());
        let help = "When the first of the roots that the mesh trusts expires, in seconds since 1970";
        let root = metrics.root_not_after.clone();
        registry.register("ambit_ca_root_not_after_timestamp_seconds", help, root);
        let help = "Where the rotation of the signing key stands: 1 for the phase that it is in";
        registry.register("ambit_ca_rotation_phase", help, metrics.phase.clone());
        let help = "When that phase ends, in seconds since 1970; 0 if there is no rotation";
        let ends = metrics.phase_ends.clone();
        registry.register("ambit_ca_rotation_phase_ends_timestamp_seconds", help, ends);
        registry.register("ambit_ca_roots", "Roots that the mesh trusts", metrics.trusted.clone());
        metrics
    }

    pub(super) fn issued(&self) {
        self.issued.inc();
    }

    /// `reason` is from a closed list: a stranger cannot make up label values.
    pub(super) fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&Reason { reason }).inc();
    }

    pub(super) fn rotation(&self, state: &State) {
        let (current, ends) = state.phase();
        for phase in Phase::ALL {
            self.phase.get_or_create(&Rotation { phase: phase.name() }).set((phase == current).into());
        }
        self.phase_ends.set(ends.map_or(0, seconds));
        self.trusted.set(i64::try_from(state.record.roots.len()).unwrap_or(i64::MAX));
    }

    pub(super) fn authority(&self, authority: &Authority) {
        self.not_after.set(seconds(authority.not_after()));
        let roots = authority.lives().iter().filter(|life| life.is_root).map(|life| life.until);
        self.root_not_after.set(roots.min().map(seconds).unwrap_or_default());
    }
}

fn seconds(at: SystemTime) -> i64 {
    let seconds = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    i64::try_from(seconds).unwrap_or(i64::MAX)
}
