//! Connections that are older than their pod's enrolment, when policy denies them.
//!
//! They never met the proxy, which asks policy about all others. They are plaintext, whoever the client is.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mesh_core::authz::{self, Applying, Connection, Decision};
use mesh_core::convert::{self, Names};
use mesh_core::proto::security::Authorization;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::causes::chain;
use crate::datapath::Reset;
use crate::enrol::kernel::Handle;
use crate::index::local::LocalPod;
use crate::model::Reader;

/// How many were reset since the start.
#[derive(Clone, Debug, Default)]
pub struct Resets(Arc<AtomicU64>);

impl Resets {
    /// The number.
    pub fn read(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What was last done for each pod, by UID.
type Done = HashMap<String, Outcome>;

/// With these policies.
#[derive(Debug)]
struct Outcome {
    policies: Vec<Arc<Authorization>>,
    failed: bool,
    /// There may be more to come.
    more: bool,
}

/// Pause before a pod is looked at again that is not done.
const AGAIN: Duration = Duration::from_secs(1);

/// Looks after this node's pods until `shutdown`.
pub async fn run(mut model: Reader, kernel: Handle, resets: Resets, shutdown: CancellationToken) {
    let mut done = Done::new();
    loop {
        // Of policies that are half listed the next one may allow what this one denies.
        if model.is_synced() {
            look(&model, &kernel, &resets, &mut done).await;
        }
        let again = done.values().any(|outcome| outcome.failed || outcome.more);
        tokio::select! {
            () = shutdown.cancelled() => return,
            changed = model.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(AGAIN), if again => {}
        }
    }
}

async fn look(model: &Reader, kernel: &Handle, resets: &Resets, done: &mut Done) {
    // Only a pod that is said to be captured is, and only then its older connections are known.
    let pods: Vec<LocalPod> = model.local_pods().into_iter().filter(|pod| pod.annotated).collect();
    done.retain(|uid, _| pods.iter().any(|pod| pod.uid == *uid));
    for pod in pods {
        let policies = model.policies(&pod.name);
        let last = done.get(&pod.uid);
        if last.is_some_and(|last| !last.failed && !last.more && last.policies == policies) {
            continue;
        }
        let reset = reset(kernel, &pod.uid, &policies).await;
        let (failed, more) = (reset.is_err(), reset.as_ref().is_ok_and(|reset| reset.more));
        match reset {
            Ok(Reset { count: 0, .. }) => {}
            Ok(Reset { count, .. }) => {
                info!(pod = %pod.name, count, "policy denies connections that are older than enrolment: reset");
                resets.0.fetch_add(count as u64, Ordering::Relaxed);
            }
            Err(_) if last.is_some_and(|last| last.failed) => {}
            Err(error) => warn!(
                pod = %pod.name,
                "connections that are older than enrolment cannot be reset, will retry; policy may deny them: {error}"
            ),
        }
        done.insert(pod.uid, Outcome { policies, failed, more });
    }
}

/// Resets what the policies deny.
async fn reset(kernel: &Handle, uid: &str, policies: &[Arc<Authorization>]) -> Result<Reset, String> {
    if policies.is_empty() {
        return Ok(Reset { count: 0, more: false });
    }
    let mut names = Names::default();
    let policies = policies.iter().map(|policy| convert::authz::convert(policy, &mut names).map(Arc::new));
    let policies = policies.collect::<Result<_, _>>().map_err(|error| error.to_string())?;
    let applying = Applying { policies, unknown: None };
    let denies = move |application: SocketAddr, client: SocketAddr| {
        let connection = Connection { peer: None, client: client.into(), target: application.into() };
        authz::decide(&applying, &connection) != Decision::Allow
    };
    let uid = uid.to_owned();
    let done = kernel.run(move |kernel| kernel.reset_older(&uid, &denies)).await;
    done.map_err(|dead| dead.to_string())?.map_err(|error| chain(&error))
}

#[cfg(test)]
mod tests;
