//! The steps carried out: what is done to one pod, in which order, and what is undone when it fails.
//!
//! **Invariant:** a pod is captured only after a proxy has said that it serves it; a pod that was captured before
//! stays so whatever fails, since giving it up would send its traffic in the clear.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::kernel::{Dead, Handle, Kernel};
use super::plan::{Outcome, Step};
use crate::causes::chain;
use crate::cluster::{Cluster, ClusterError};
use crate::datapath::{Part, PodError, PodSpec};
use crate::index::local::{LocalPod, with_addresses};
use crate::index::pod::Condition;
use crate::netns_of_pod::NotFound;
use crate::pods::{Pods, ServeError, Served};

/// Finds the network namespace of a running pod by its UID, rather the one with this cookie than another.
pub type FindNetns = Arc<dyn Fn(&str, Option<u64>) -> Result<OwnedFd, NotFound> + Send + Sync>;

/// All that steps act on.
pub struct Hands<C> {
    /// The API server.
    pub cluster: Arc<C>,
    /// ztunnel.
    pub pods: Pods,
    /// The datapath.
    pub kernel: Handle,
    /// See [`FindNetns`].
    pub find: FindNetns,
}

impl<C> Clone for Hands<C> {
    fn clone(&self) -> Self {
        Self {
            cluster: Arc::clone(&self.cluster),
            pods: self.pods.clone(),
            kernel: self.kernel.clone(),
            find: Arc::clone(&self.find),
        }
    }
}

/// Why a pod was not enrolled.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// Its namespace was not found.
    #[error(transparent)]
    Netns(#[from] NotFound),
    /// The kernel refused.
    #[error(transparent)]
    Kernel(#[from] PodError),
    /// ztunnel does not serve it.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The datapath is gone.
    #[error(transparent)]
    Dead(#[from] Dead),
    /// Descriptors ran out.
    #[error("file descriptors: {0}")]
    Descriptors(#[from] std::io::Error),
}

impl<C: Cluster> Hands<C> {
    /// Carries out one step; errors are in the outcome and in the log.
    pub async fn carry_out(&self, uid: &str, step: &Step) -> Outcome {
        match step {
            Step::Enrol(pod) => self.enrol_running(pod).await,
            Step::Release => released(self.release(uid).await),
            Step::Sweep => self.sweep(uid).await,
            Step::Annotate(name, captured) => {
                let annotated = self.cluster.annotate(name, uid, *captured).await;
                self.patched(&format!("cannot say on pod {name} whether its traffic is captured"), annotated)
            }
            Step::Repair(parts) => self.repair(uid, parts).await,
            Step::Report(name, condition, reported) => {
                let refused = reported.as_ref().filter(|_| *condition == Condition::Enrolled);
                if let Some(refused) = refused.filter(|refused| refused.status != "True") {
                    info!(pod = %name, reason = refused.reason, "pod is not in the mesh: {}", refused.message);
                }
                // Only information: it must not hold up the pod's other steps.
                if let Err(error) = self.cluster.report(name, uid, *condition, reported.as_ref()).await {
                    warn!(pod = %name, "cannot set the pod's status: {error}");
                }
                Outcome::Done
            }
        }
    }

    /// Enrols a pod whose namespace is known: prepare, have it served, capture.
    ///
    /// # Errors
    /// When a step fails; the pod is then not captured, unless it was before.
    pub async fn enrol(
        &self,
        pod: &LocalPod,
        netns: OwnedFd,
        addresses: Vec<IpAddr>,
    ) -> Result<(), EnrolError> {
        let description = with_addresses(&pod.description, &addresses);
        let kept = self.pods.listeners(&pod.uid)?;
        let spec = PodSpec {
            uid: pod.uid.clone(),
            netns: netns.try_clone()?,
            addresses,
            probe_ports: pod.probe_ports.clone(),
            dns: pod.dns,
        };
        let listeners = self.kernel.run(move |kernel| kernel.prepare(&spec, kept)).await??;
        let served = Served::new(description, netns, listeners)?;
        self.pods.add(served).await?;
        let uid = pod.uid.clone();
        self.kernel.run(move |kernel| kernel.capture(&uid)).await??;
        Ok(())
    }

    /// Puts back what a captured pod has lost. It stays captured whatever fails.
    async fn repair(&self, uid: &str, parts: &BTreeSet<Part>) -> Outcome {
        match self.put_back(uid, parts).await {
            Ok(()) => {
                let parts: Vec<_> = parts.iter().map(|part| part.name()).collect();
                info!(uid, "put back of the pod's capture: {}", parts.join(", "));
                Outcome::Done
            }
            Err(error) => {
                let error = chain(&error);
                warn!(uid, "cannot put back what the pod's capture has lost, will try again: {error}");
                Outcome::Failed { error, early: false }
            }
        }
    }

    async fn put_back(&self, uid: &str, parts: &BTreeSet<Part>) -> Result<(), EnrolError> {
        let kept = self.pods.listeners(uid)?;
        let (owned, guard) = (uid.to_owned(), parts.contains(&Part::Guard));
        let again = move |kernel: &mut dyn Kernel| -> Result<_, EnrolError> {
            let spec = kernel.spec(&owned)?;
            let listeners = kernel.prepare(&spec, kept)?;
            kernel.capture(&owned)?;
            if guard {
                kernel.guard_again(&owned)?;
            }
            Ok((spec.netns, listeners))
        };
        let (netns, listeners) = self.kernel.run(again).await??;
        // New ones, where the old ones were of no use any more.
        if let Some(pod) = self.pods.description(uid) {
            self.pods.add(Served::new(pod, netns, listeners)?).await?;
        }
        Ok(())
    }

    /// Gives a pod back to itself, or forgets a dead one.
    ///
    /// # Errors
    /// When it stays captured: why.
    pub async fn release(&self, uid: &str) -> Result<(), String> {
        self.pods.remove(uid).await;
        // Of one that an earlier agent captured the datapath does not know where it is.
        let found = self.find(uid).await;
        let owned = uid.to_owned();
        let release = move |kernel: &mut dyn Kernel| match found {
            Ok(netns) => kernel.clear(&owned, Some(netns)),
            Err(EnrolError::Netns(NotFound::NoProcess { .. })) => kernel.clear(&owned, None),
            Err(_) => kernel.leave(&owned),
        };
        match self.kernel.run(release).await {
            Ok(Ok(())) => info!(uid, "pod released"),
            Ok(Err(error)) if self.survives(uid).await => {
                warn!(uid, "the pod cannot be released, will try again: {}", chain(&error));
                return Err(chain(&error));
            }
            Ok(Err(error)) => {
                warn!(uid, "pod released, but something of it could not be removed: {}", chain(&error))
            }
            Err(dead) => {
                warn!(uid, "{dead}");
                return Err(dead.to_string());
            }
        }
        Ok(())
    }

    /// Forgets a pod whose sandbox the runtime takes down. Where it is not certain that this is the sandbox that the pod
    /// runs in now, only when no process is left; else the pod stays as it is, to be swept. Whether it was released.
    pub async fn detach(&self, uid: &str, certain: bool) -> bool {
        let gone =
            || async { matches!(self.find(uid).await, Err(EnrolError::Netns(NotFound::NoProcess { .. }))) };
        let patience = Instant::now() + DEL_PATIENCE;
        while !certain && !gone().await {
            if Instant::now() >= patience {
                info!(uid, "CNI DEL of a sandbox of the pod, which has processes: it stays captured");
                return false;
            }
            tokio::time::sleep(DEL_PAUSE).await;
        }
        self.release(uid).await.is_ok()
    }

    /// Forgets a pod that seems to be gone, once no process of it is left to speak in the clear.
    async fn sweep(&self, uid: &str) -> Outcome {
        match self.find(uid).await {
            Err(EnrolError::Netns(NotFound::NoProcess { .. })) => released(self.release(uid).await),
            Ok(_) => {
                debug!(uid, "the pod seems to be gone, its processes are not: it stays captured");
                Outcome::Failed { error: "processes of it are left".to_owned(), early: true }
            }
            Err(error) => {
                debug!(uid, "cannot tell whether the pod is gone, it stays captured: {}", chain(&error));
                Outcome::Failed { error: chain(&error), early: true }
            }
        }
    }

    async fn enrol_running(&self, pod: &LocalPod) -> Outcome {
        let netns = match self.find(&pod.uid).await {
            Ok(netns) => netns,
            Err(error) => {
                let early = matches!(error, EnrolError::Netns(NotFound::NoProcess { .. }));
                return failed(pod, &error, early);
            }
        };
        let survived = self.survives(&pod.uid).await;
        if survived && !self.pods.is_connected() {
            // The ztunnel that has its listeners may only be late; new ones would cut off whoever is in the old ones.
            return failed(pod, &ServeError::NoProxy.into(), false);
        }
        match self.enrol(pod, netns, pod.addresses.clone()).await {
            Ok(()) => {
                info!(pod = %pod.name, uid = pod.uid, taken_over = survived, "pod enrolled");
                Outcome::Done
            }
            Err(error) => {
                if !survived {
                    self.undo(&pod.uid).await;
                }
                failed(pod, &error, false)
            }
        }
    }

    async fn find(&self, uid: &str) -> Result<OwnedFd, EnrolError> {
        let (find, owned) = (Arc::clone(&self.find), uid.to_owned());
        // A process of the pod can be in a network namespace of its own making.
        let survivors = self.kernel.run(|kernel| kernel.surviving()).await?;
        let captured = survivors.into_iter().find(|pod| pod.uid == uid).and_then(|pod| pod.netns_cookie);
        Ok(tokio::task::spawn_blocking(move || find(&owned, captured)).await.map_err(|_| Dead)??)
    }

    /// Whether the pod is captured already; before it is enrolled, by an earlier agent.
    async fn survives(&self, uid: &str) -> bool {
        let uid = uid.to_owned();
        let captured =
            self.kernel.run(move |kernel| kernel.surviving().iter().any(|pod| pod.uid == uid)).await;
        captured.unwrap_or(true)
    }

    /// After a failed enrolment: nobody is to serve the pod, nothing is to be left in its namespace.
    pub async fn undo(&self, uid: &str) {
        self.pods.remove(uid).await;
        let uid = uid.to_owned();
        if let Ok(Err(error)) = self.kernel.run(move |kernel| kernel.leave(&uid)).await {
            warn!("after a failed enrolment: {}", chain(&error));
        }
    }

    /// Removes what an earlier agent left in pods that it had begun to enrol. They are not captured: whether they are to
    /// be is decided anew.
    pub async fn clear_unfinished(&self) {
        let unfinished = self.kernel.run(|kernel| kernel.unfinished()).await.unwrap_or_default();
        for uid in unfinished {
            let netns = match self.find(&uid).await {
                Ok(netns) => Some(netns),
                Err(EnrolError::Netns(NotFound::NoProcess { .. })) => None,
                Err(error) => {
                    warn!(uid, "cannot clear what is left of an enrolment: {}", chain(&error));
                    continue;
                }
            };
            let owned = uid.clone();
            match self.kernel.run(move |kernel| kernel.clear(&owned, netns)).await {
                Ok(Ok(())) => {
                    info!(uid, "an earlier agent did not finish the pod's enrolment; it is as before")
                }
                Ok(Err(error)) => warn!(uid, "cannot clear what is left of an enrolment: {}", chain(&error)),
                Err(dead) => warn!(uid, "{dead}"),
            }
        }
    }

    fn patched(&self, what: &str, result: Result<(), ClusterError>) -> Outcome {
        match result {
            // Nothing to say it on: the pod's end is noticed elsewhere.
            Ok(()) | Err(ClusterError::Gone) => Outcome::Done,
            Err(error) => {
                warn!("{what}, will try again: {error}");
                Outcome::Failed { error: error.to_string(), early: false }
            }
        }
    }
}

fn released(result: Result<(), String>) -> Outcome {
    result.map_or_else(|error| Outcome::Failed { error, early: false }, |()| Outcome::Done)
}

/// How long a DEL waits for the pod's processes to be gone; the runtime has ended them before it asks.
const DEL_PATIENCE: Duration = Duration::from_secs(1);
const DEL_PAUSE: Duration = Duration::from_millis(100);

fn failed(pod: &LocalPod, error: &EnrolError, early: bool) -> Outcome {
    let error = chain(error);
    if !early {
        warn!(pod = %pod.name, uid = pod.uid, "cannot enrol the pod, will try again: {error}");
    }
    Outcome::Failed { error, early }
}
