//! Proofs of pods' capture, carried out beside the steps: on threads of their own, so many at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tokio::time::Instant;
use tracing::{info, warn};

use super::{Ended, Enrolment, now};
use crate::causes::chain;
use crate::cluster::Cluster;
use crate::datapath::{Flaw, Proof};

impl<C: Cluster> Enrolment<C> {
    /// Begins to prove the capture of those pods of which that is due; when the next ones will be.
    pub(super) fn begin_proofs(&mut self) -> Option<Instant> {
        let (due, wake) = self.table.to_prove(now());
        if !due.is_empty() {
            let kernel = self.hands.kernel.clone();
            self.tasks.spawn(async move {
                let uids = due.clone();
                let proofs = kernel.run(move |kernel| kernel.survey(&uids)).await;
                Ended::Surveyed(due, proofs.unwrap_or_default())
            });
        }
        wake.map(Instant::from_std)
    }

    /// Carries out proofs, so many at a time.
    pub(super) fn prove(&mut self, due: BTreeSet<String>, mut proofs: BTreeMap<String, Proof>) {
        for uid in due {
            let Some(proof) = proofs.remove(&uid) else {
                self.table.proved(&uid, None, now());
                continue;
            };
            let (provers, pods) = (Arc::clone(&self.provers), self.hands.pods.clone());
            self.tasks.spawn(async move {
                let _place = provers.acquire().await;
                let answers = pods.is_connected();
                let found = tokio::task::spawn_blocking(move || proof(answers)).await;
                let found =
                    found.map_err(|lost| lost.to_string()).and_then(|found| found.map_err(|e| chain(&e)));
                let found = found.inspect_err(|error| warn!(uid, "cannot look into the pod: {error}"));
                Ended::Proved(uid, found.ok())
            });
        }
    }

    /// A proof has ended.
    pub(super) fn found(&mut self, uid: &str, found: Option<Vec<Flaw>>) {
        match self.table.proved(uid, found, now()).as_deref() {
            None => {}
            Some("") => info!(uid, "the pod's capture is whole"),
            Some(flaws) => warn!(uid, "the pod's capture is not whole: {flaws}"),
        }
    }
}

/// Proofs at a time. Each is a thread that sleeps where something does not answer.
pub(super) const PROVERS: usize = 8;
