//! Asks policy about a connection to a pod, and again whenever the answer may have changed.
//!
//! **Invariant:** a permit hears of every change since before it was given, so that no connection slips in between a
//! decision and the change that would have made it another.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use mesh_core::authz::{self, Connection, Decision, Denial};
use mesh_core::store::{Changes, Reader};
use mesh_core::workload::{Workload, WorkloadUid};
use tokio::sync::watch;

use crate::proxy::Pod;
use crate::reason::{Cause, Phase, ProxyError, Side};

/// The pods of this process whose policies may change; clones are the same.
#[derive(Clone, Debug, Default)]
pub struct PolicyChanges(Arc<Mutex<HashMap<WorkloadUid, Weak<watch::Sender<()>>>>>);

impl PolicyChanges {
    /// What a pod hears of; forgotten when the last one of the pod is dropped.
    pub fn of(&self, uid: &WorkloadUid) -> Arc<watch::Sender<()>> {
        let mut pods = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pods.retain(|_, pod| pod.strong_count() > 0);
        let known = pods.get(uid).and_then(Weak::upgrade);
        known.unwrap_or_else(|| {
            let pod = Arc::new(watch::Sender::new(()));
            pods.insert(uid.clone(), Arc::downgrade(&pod));
            pod
        })
    }

    /// Tells the pods concerned.
    pub fn tell(&self, changes: &Changes) {
        let pods = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let tell = |pod: &Weak<watch::Sender<()>>| pod.upgrade().iter().for_each(|pod| pod.send_replace(()));
        if changes.policies {
            pods.values().for_each(tell);
        } else {
            changes.workloads.iter().filter_map(|uid| pods.get(uid)).for_each(tell);
        }
    }
}

/// A connection that policy allows, until it does not any more.
pub struct Permit {
    pod: Arc<Pod>,
    connection: Connection,
    changes: watch::Receiver<()>,
}

impl Permit {
    /// Asks policy whether a connection to the pod may be.
    ///
    /// # Errors
    /// When it may not.
    pub fn ask(pod: &Arc<Pod>, connection: Connection) -> Result<Self, ProxyError> {
        let permit = Self { pod: pod.clone(), connection, changes: pod.policy.subscribe() };
        match permit.decide() {
            Decision::Allow => Ok(permit),
            Decision::Deny(denial) => {
                Err(ProxyError::new(Phase::Authorize, Side::Downstream, Cause::Denied(denial)))
            }
        }
    }

    /// Why policies on trial would deny it.
    pub fn rehearse(&self) -> Option<Box<Denial>> {
        let applying = self.pod.proxy.mesh.policies_of(&self.pod.workload());
        authz::rehearse(&applying, &self.connection).map(Box::new)
    }

    fn decide(&self) -> Decision {
        decide(&self.pod.proxy.mesh, &self.pod.workload(), &self.connection)
    }
}

/// Completes when policy does not allow the connection any more; never without a permit, which was not needed then.
pub async fn revoked(permit: Option<&Permit>) -> Denial {
    let Some(permit) = permit else { return std::future::pending().await };
    let mut changes = permit.changes.clone();
    // The pod has the sender, and the permit the pod.
    while changes.changed().await.is_ok() {
        if let Decision::Deny(denial) = permit.decide() {
            return denial;
        }
    }
    std::future::pending().await
}

/// Decides with the policies that are known to select the pod.
fn decide(mesh: &Reader, destination: &Workload, connection: &Connection) -> Decision {
    let uid = destination.uid.as_str();
    // What the agent said when it added the pod may be out of date by now.
    if mesh.workload(uid).is_none()
        && let Some(refused) = mesh.refused(uid)
    {
        return Decision::Deny(Denial::UnknownSelection { reason: refused.reason.clone() });
    }
    authz::decide(&mesh.policies_of(destination), connection)
}
