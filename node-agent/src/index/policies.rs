//! Which policies a pod is subject to, of whatever kind.

use std::sync::Arc;

use mesh_core::proto::security::Authorization;

use super::pod::Labels;
use super::{Index, PolicyKey};

impl Index {
    /// The names in xDS of the policies that a pod's workload names: those that select it.
    pub(super) fn policies_of(&self, namespace: &str, labels: &Labels) -> Vec<String> {
        self.selecting(namespace, labels).map(|key| self.policy_name(&key)).collect()
    }

    /// What all policies say that a pod is subject to, those that are about all of its namespace or mesh, too.
    pub(super) fn policy_bodies(&self, namespace: &str, labels: &Labels) -> Vec<Arc<Authorization>> {
        let selecting = self.selecting(namespace, labels).filter_map(|key| self.policy(&key));
        selecting.chain(self.authorization_policies.at_large(&self.config, namespace)).collect()
    }

    fn selecting(&self, namespace: &str, labels: &Labels) -> impl Iterator<Item = PolicyKey> {
        let mutual_tls = self.peer_authentications.of(&self.config, namespace, labels);
        let authorization = self.authorization_policies.selecting(&self.config, namespace, labels);
        mutual_tls.into_iter().chain(authorization)
    }
}
