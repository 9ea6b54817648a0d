//! What the CNI plugin is answered: is the pod of the mesh, and if so, is it enrolled now.
//!
//! The watch may be behind, by seconds: a pod that the model does not have, with the UID that the runtime starts, is
//! asked for at the API server, and so is the namespace before a pod is left out for its sake. **Invariant:** a pod whose membership cannot be found out does not start.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tracing::info;

use super::Request;
use crate::cluster::{self, Cluster};
use crate::cni::plugin;
use crate::cni::server::{AddError, AddRequest, Attachment, DelRequest, Enroller};
use crate::index::event::ObjectName;
use crate::index::local::LocalPod;
use crate::index::membership::Membership;
use crate::model::Reader;

/// Answers the CNI plugin.
pub struct Desk<C> {
    pub(super) requests: mpsc::Sender<Request>,
    pub(super) model: Reader,
    pub(super) cluster: Arc<C>,
}

impl<C: Cluster> Desk<C> {
    /// The pod that the runtime is about to start.
    async fn resolve(&self, request: &AddRequest) -> Result<LocalPod, AddError> {
        let name = ObjectName::new(&request.namespace, &request.name);
        // Without a UID from the runtime, the model's pod may be an earlier one of the same name.
        let known = self.model.pod(&name).filter(|pod| request.uid.as_ref() == Some(&pod.uid));
        match known {
            Some(pod) if pod.membership == Membership::NotAsked && pod.inherits => {
                return self.in_namespace_now(pod).await;
            }
            Some(pod) => return Ok(pod),
            None => {}
        }
        let answer =
            self.cluster.pod(&name).await.map_err(|error| AddError::Unavailable(error.to_string()))?;
        let Some((pod, namespace)) = answer else {
            return Err(AddError::Unavailable(format!(
                "the API server does not have pod {name}, or not its namespace; it may be deleted by now"
            )));
        };
        let pod = self.model.read_pod(&pod, &namespace).map_err(|bad| AddError::Refused(bad.to_string()))?;
        match &request.uid {
            Some(uid) if *uid != pod.uid => Err(AddError::Unavailable(format!(
                "the runtime starts pod {name} with UID {uid}, the API server has it with UID {}: one of both is behind",
                pod.uid
            ))),
            _ => Ok(pod),
        }
    }

    /// A pod that its namespace keeps out, as far as the model knows. Pods and namespaces come by watches of their own:
    /// the namespace's label may be older than the pod, and yet to come.
    async fn in_namespace_now(&self, pod: LocalPod) -> Result<LocalPod, AddError> {
        let namespace = self.cluster.namespace(&pod.name.namespace).await;
        let namespace = namespace.map_err(|error| AddError::Unavailable(error.to_string()))?;
        let now = namespace.and_then(|namespace| self.model.pod_in(&pod.name, &namespace));
        now.filter(|now| now.uid == pod.uid).ok_or_else(|| {
            AddError::Unavailable(format!("pod {} or its namespace has just been deleted", pod.name))
        })
    }

    pub(super) async fn ask<T>(
        &self,
        patience: Duration,
        request: impl FnOnce(oneshot::Sender<T>) -> Request,
    ) -> Result<T, AddError> {
        let stopping = || AddError::Unavailable("the agent is stopping".to_owned());
        let answer = async {
            let (reply, answer) = oneshot::channel();
            self.requests.send(request(reply)).await.map_err(|_| stopping())?;
            answer.await.map_err(|_| stopping())
        };
        tokio::time::timeout(patience, answer).await.unwrap_or_else(|_| {
            Err(AddError::Unavailable(format!(
                "the agent did not get to it within {} s; see the log of node-agent on this node for what holds it up",
                patience.as_secs()
            )))
        })
    }
}

impl<C: Cluster> Enroller for Desk<C> {
    async fn add(&self, request: AddRequest) -> Result<(), AddError> {
        let pod = self.resolve(&request).await?;
        match &pod.membership {
            Membership::Member => {}
            Membership::NotAsked => return Ok(()),
            Membership::Refused(refusal) => {
                info!(pod = %pod.name, "pod starts outside the mesh: {refusal}");
                return Ok(());
            }
        }
        if request.addresses.is_empty() {
            return Err(AddError::Refused(
                "the CNI plugins before mesh-cni gave the pod no address; is mesh-cni the last in the list?"
                    .to_owned(),
            ));
        }
        let netns = open_netns(&request.netns_path)?;
        let container = request.attachment.container_id;
        let addresses = request.addresses;
        self.ask(ADD_PATIENCE, |reply| Request::Add {
            pod: Box::new(pod),
            netns,
            addresses,
            container,
            reply,
        })
        .await?
    }

    async fn del(&self, request: DelRequest) {
        let name = ObjectName::new(&request.namespace, &request.name);
        let container = request.attachment.container_id;
        // Without an answer in time it is carried out all the same, or the next agent sweeps.
        let _ =
            self.ask(SHORT_PATIENCE, |reply| Request::Del { uid: request.uid, name, container, reply }).await;
    }

    async fn check(&self, request: AddRequest) -> Result<(), AddError> {
        let pod = self.resolve(&request).await?;
        if pod.membership != Membership::Member {
            return Ok(());
        }
        let uid = pod.uid;
        match self.ask(ADD_PATIENCE, |reply| Request::Check { uid, reply }).await? {
            true => Ok(()),
            false => Err(AddError::Refused("the pod should be in the mesh and is not enrolled".to_owned())),
        }
    }

    /// Always able: a runtime that is told otherwise takes the whole node for not ready, and a ztunnel that is away
    /// for a moment, or is yet to be started on this node, is no reason for that.
    async fn status(&self) -> Result<(), AddError> {
        Ok(())
    }

    async fn gc(&self, valid: Vec<Attachment>) {
        let containers: BTreeSet<String> =
            valid.into_iter().map(|attachment| attachment.container_id).collect();
        let _ = self.ask(SHORT_PATIENCE, |reply| Request::Gc { containers, reply }).await;
    }
}

/// For enrolment to carry out an ADD: the plugin is to hear why there was none before it gives up by itself.
const ADD_PATIENCE: Duration = Duration::from_secs(14);
/// For what the plugin waits a shorter time for.
const SHORT_PATIENCE: Duration = Duration::from_secs(4);
const _: () = assert!(
    ADD_PATIENCE.as_secs() + cluster::DEADLINE.as_secs() < plugin::ADD_DEADLINE.as_secs()
        && SHORT_PATIENCE.as_secs() < plugin::SHORT_DEADLINE.as_secs()
);

fn open_netns(path: &str) -> Result<OwnedFd, AddError> {
    match File::open(path) {
        Ok(file) => Ok(file.into()),
        Err(error) => Err(AddError::Refused(format!(
            "cannot open the pod's network namespace {path}: {error}; does the agent's pod mount the directory of it?"
        ))),
    }
}
