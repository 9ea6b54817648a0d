//! Asks policy about a connection to a pod, and again whenever the answer may have changed.
//!
//! **Invariant:** a permit hears of every change since before it was given, so that no connection slips in between a
//! decision and the change that would have made it another.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use mesh_core::authz::{self, Applying, Audited, Connection, Decision, Denial};
use mesh_core::store::{Changes, Reader};
use mesh_core::workload::{Workload, WorkloadUid};
use tokio::sync::watch;

use crate::proxy::Pod;
use crate::reason::{Cause, Phase, ProxyError, Side};

/// What is known of one pod, with what selects it; changes when policy has to be asked again. It outlives what the mesh
/// tells: a pod that is gone from there has the policies that it had, until its last connection ends.
pub(crate) type Known = watch::Sender<Arc<Workload>>;

/// The pods of this process whose policies may change; clones are the same.
#[derive(Clone, Debug, Default)]
pub struct PolicyChanges(Arc<Mutex<HashMap<WorkloadUid, Weak<Known>>>>);

impl PolicyChanges {
    /// What is known of a pod, at first what the agent says of it; forgotten when the last one of the pod is dropped.
    pub(crate) fn of(&self, described: &Arc<Workload>, mesh: &Reader) -> Arc<Known> {
        let mut pods = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pods.retain(|_, pod| pod.strong_count() > 0);
        let known = pods.get(&described.uid).and_then(Weak::upgrade);
        let pod = known.filter(|known| known.borrow().is_same_pod(described)).unwrap_or_else(|| {
            let pod = Arc::new(Known::new(described.clone()));
            pods.insert(described.uid.clone(), Arc::downgrade(&pod));
            pod
        });
        learn(&pod, mesh);
        pod
    }

    /// Tells the pods concerned, and no others: each decides anew about all of its connections.
    pub fn tell(&self, changes: &Changes, mesh: &Reader) {
        let pods = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for pod in changes.workloads.iter().filter_map(|uid| pods.get(uid)?.upgrade()) {
            learn(&pod, mesh);
        }
        if changes.policies.is_empty() {
            return;
        }
        for pod in pods.values().filter_map(Weak::upgrade) {
            // What is known of it by now, or the policy would be looked for among those that it had.
            let concerned = changes.policies.concern(&pod.borrow());
            if concerned {
                learn(&pod, mesh);
            }
        }
    }
}

/// What the mesh knows counts, if it is about this pod.
fn learn(pod: &Known, mesh: &Reader) {
    pod.send_modify(|known| {
        let told = mesh.workload(known.uid.as_str()).filter(|told| told.is_same_pod(known));
        *known = told.unwrap_or_else(|| known.clone());
    });
}

/// What policies say of a connection beside whether it may be.
#[derive(Debug, Default)]
pub struct Remarks {
    /// Why those that are on trial would deny it.
    pub dry_run: Option<Box<Denial>>,
    /// It is to be noted, by each of these.
    pub audit: Vec<Audited>,
}

/// A connection that policy allows, until it does not any more.
pub struct Permit {
    pod: Arc<Pod>,
    connection: Connection,
    changes: watch::Receiver<Arc<Workload>>,
}

impl Permit {
    /// Asks policy whether a connection to the pod may be. What else policies say of it is noted in `remarks`.
    ///
    /// # Errors
    /// When it may not.
    pub fn ask(pod: &Arc<Pod>, connection: Connection, remarks: &mut Remarks) -> Result<Self, ProxyError> {
        let permit = Self { pod: pod.clone(), connection, changes: pod.known.subscribe() };
        let denied = |denial| ProxyError::new(Phase::Authorize, Side::Downstream, Cause::Denied(denial));
        let applying = permit.applying().map_err(denied)?;
        remarks.audit = authz::audited(&applying, &permit.connection);
        let decision = authz::decide(&applying, &permit.connection);
        remarks.dry_run = match &decision {
            Decision::Allow => authz::rehearse(&applying, &permit.connection),
            // Not who else does not allow it: that it is refused is no news.
            Decision::Deny(_) => authz::rehearse_denials(&applying, &permit.connection),
        }
        .map(Box::new);
        match decision {
            Decision::Allow => Ok(permit),
            Decision::Deny(denial) => Err(denied(denial)),
        }
    }

    fn decide(&self) -> Decision {
        match self.applying() {
            Ok(applying) => authz::decide(&applying, &self.connection),
            Err(denial) => Decision::Deny(denial),
        }
    }

    /// The policies that are known to select the pod.
    fn applying(&self) -> Result<Applying, Denial> {
        let (mesh, destination) = (&self.pod.proxy.mesh, self.pod.workload());
        let uid = destination.uid.as_str();
        // What the agent said when it added the pod may be out of date by now.
        if mesh.workload(uid).is_none()
            && let Some(refused) = mesh.refused(uid)
        {
            return Err(Denial::UnknownSelection { reason: refused.reason.clone() });
        }
        Ok(mesh.policies_of(&destination))
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

#[cfg(test)]
mod tests {
    use mesh_core::convert::{self, Names};
    use mesh_core::proto::workload as wire;
    use mesh_core::store;

    use super::*;

    fn pod(last: u8, policy: &str) -> Workload {
        let message = wire::Workload {
            uid: "c//Pod/shop/db-0".to_owned(),
            name: "db-0".to_owned(),
            namespace: "shop".to_owned(),
            service_account: "db".to_owned(),
            addresses: vec![vec![10, 244, 1, last]],
            authorization_policies: vec![policy.to_owned()],
            ..Default::default()
        };
        convert::workload::convert(&message, &mut Names::default()).unwrap()
    }

    /// A tenant that changes a policy of its own all the time costs the node's other pods nothing.
    #[test]
    fn only_those_whom_a_changed_policy_may_concern_decide_anew() {
        let policy = |key: &str, scope: authz::Scope| {
            let (namespace, _) = key.split_once('/').unwrap();
            let (key, namespace) = (key.into(), namespace.into());
            authz::Authorization {
                key,
                namespace,
                scope,
                dry_run: false,
                rules: authz::Rules::Deny([].into()),
            }
        };
        let (mut writer, mesh) = store::new();
        let all = PolicyChanges::default();
        let bank = Workload { uid: "c//Pod/bank/b-0".into(), namespace: "bank".into(), ..pod(2, "bank/p") };
        let pods = [pod(1, "shop/p"), bank].map(|pod| all.of(&Arc::new(pod), &mesh));
        for (key, scope, expected) in [
            ("shop/p", authz::Scope::Selected, [true, false]),
            ("shop/other", authz::Scope::Selected, [false, false]),
            ("bank/all", authz::Scope::Namespace, [false, true]),
            ("root/all", authz::Scope::Global, [true, true]),
        ] {
            let mut changes = pods.each_ref().map(|pod| pod.subscribe());
            writer.put_authorization(policy(key, scope));
            all.tell(&writer.commit(), &mesh);
            assert_eq!(changes.each_mut().map(|of| of.has_changed().unwrap()), expected, "{key}");
        }
    }

    /// As of a StatefulSet: made anew under its name, which the mesh still tells the old one's policies of.
    #[test]
    fn what_was_known_of_the_last_pod_of_a_name_is_not_said_of_the_next() {
        let (mut writer, mesh) = store::new();
        writer.put_workload(pod(1, "shop/old"));
        writer.commit();
        let all = PolicyChanges::default();
        let first = all.of(&Arc::new(pod(1, "shop/older")), &mesh);
        assert_eq!(*first.borrow().authorization_policies, ["shop/old".into()]);
        let second = all.of(&Arc::new(pod(2, "shop/new")), &mesh);
        assert_eq!(*second.borrow().authorization_policies, ["shop/new".into()]);
        writer.put_workload(pod(2, "shop/newer"));
        all.tell(&writer.commit(), &mesh);
        assert_eq!(*second.borrow().authorization_policies, ["shop/newer".into()]);
    }
}
