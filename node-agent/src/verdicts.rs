//! Writes into each policy's status what became of it.
//!
//! Every agent comes to the same verdicts, and whichever writes first does it for all: each waits for a random time that
//! grows with the cluster, and then writes only what nobody has written. No agent leads, none can be missing.

use std::time::Duration;

use rand::seq::SliceRandom as _;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::cluster::{ApiServer, ClusterError};
use crate::model::Reader;

/// For each node of the cluster, so that few agents write at the same time.
const SPREAD: Duration = Duration::from_millis(20);
/// However large the cluster is.
const MAX_SPREAD: Duration = Duration::from_secs(30);
/// Pause before what failed is tried again.
const AGAIN: Duration = Duration::from_secs(30);

/// Writes until `shutdown`.
pub async fn run(mut model: Reader, cluster: ApiServer, shutdown: CancellationToken) {
    let mut failing = false;
    // How many agents there are is known then.
    while !model.is_synced() {
        tokio::select! {
            () = shutdown.cancelled() => return,
            changed = model.changed() => if changed.is_err() { return },
        }
    }
    loop {
        let spread = SPREAD.saturating_mul(model.node_count().try_into().unwrap_or(u32::MAX)).min(MAX_SPREAD);
        let pause = async {
            tokio::time::sleep(spread.mul_f32(rand::random_range(0.0..1.0))).await;
            write(&model, &cluster, &mut failing).await
        };
        let written = tokio::select! {
            () = shutdown.cancelled() => return,
            written = pause => written,
        };
        tokio::select! {
            () = shutdown.cancelled() => return,
            changed = model.verdicts_changed() => if changed.is_err() { return },
            () = tokio::time::sleep(AGAIN), if !written => {}
        }
    }
}

/// Whether all that was to be written is: what cannot be keeps nothing else from being written.
async fn write(model: &Reader, cluster: &ApiServer, failing: &mut bool) -> bool {
    let mut failed = None;
    let mut unsaid = model.unsaid();
    // Of many, each agent begins elsewhere, and leaves out what others have written meanwhile.
    unsaid.shuffle(&mut rand::rng());
    for policy in unsaid {
        let Some(verdict) = model.verdict(&policy) else { continue };
        match cluster.judge(&verdict).await {
            // Another agent was faster, or the policy has changed: the watch will tell.
            Ok(()) | Err(ClusterError::Gone) => {}
            // There is no use in asking on.
            Err(error @ ClusterError::Unreachable { .. }) => {
                failed = Some((verdict, error));
                break;
            }
            Err(error) => failed = Some((verdict, error)),
        }
    }
    let before = std::mem::replace(failing, failed.is_some());
    match &failed {
        Some((verdict, error)) if before => {
            debug!(kind = ?verdict.kind, name = %verdict.name, "still cannot write a status: {error}");
        }
        Some((verdict, error)) => {
            warn!(kind = ?verdict.kind, name = %verdict.name, "cannot write a status, will retry: {error}");
        }
        None => {}
    }
    failed.is_none()
}
