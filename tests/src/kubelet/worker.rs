//! The life of one pod on its node, top to bottom: sandbox, volumes, init containers, containers, end.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt as _, join_all};
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use k8s_openapi::api::core::v1::{ConfigMap, Container, Pod, Secret};
use nix::sys::signal::Signal;

use super::container::{self, Restart};
use super::env::{Lookup, Place};
use super::live::Live;
use super::sandbox::{self, Sandbox};
use super::{Kubelet, status, volumes};
use crate::cgroup;
use crate::cluster::Kind;

/// How long to wait before a sandbox or a volume is tried again: doubled each time up to the limit.
const RETRY: Duration = Duration::from_millis(100);
const RETRY_LIMIT: Duration = Duration::from_secs(2);
/// How often files made of ConfigMaps and Secrets are compared with them.
const REFRESH: Duration = Duration::from_secs(5);

/// Those that run, each to its last exit code.
type Sidecars<'a> = FuturesUnordered<BoxFuture<'a, i32>>;

/// What the parts of a pod's life share.
pub(super) struct Worker {
    pub(super) kubelet: Arc<Kubelet>,
    pub(super) live: Arc<Live>,
    volumes: Mutex<BTreeMap<String, PathBuf>>,
    sandbox: Arc<tokio::sync::Mutex<Option<Sandbox>>>,
}

/// Serve the pod until it is gone.
pub(super) async fn run(kubelet: Arc<Kubelet>, live: Arc<Live>) {
    let worker = Worker { kubelet, live, volumes: Mutex::default(), sandbox: Arc::default() };
    let grace = tokio::select! {
        grace = worker.live.stopped() => grace,
        () = worker.live() => return,
    };
    worker.end(grace).await;
    let pod = worker.live.pod();
    let (namespace, name) =
        (pod.metadata.namespace.unwrap_or_default(), pod.metadata.name.unwrap_or_default());
    // Another pod may have the name by now, after a forced deletion.
    let cluster = &worker.kubelet.cluster;
    let now: Option<Pod> = cluster.get(Kind::Pod, &namespace, &name).ok();
    if now.is_some_and(|now| now.metadata.uid.as_deref() == Some(worker.live.uid()))
        && let Err(error) = cluster.delete(Kind::Pod, &namespace, &name, Some(Duration::ZERO))
    {
        tracing::warn!("{error:#}");
    }
    worker.kubelet.forget(&worker.live);
}

impl Worker {
    /// Never returns: a pod whose containers have ended stays until somebody deletes it.
    async fn live(&self) {
        self.publish();
        self.make_sandbox().await;
        self.publish();
        self.make_volumes().await;
        let spec = self.live.pod().spec.unwrap_or_default();
        let restart = match spec.restart_policy.as_deref() {
            Some("Never") => Restart::Never,
            Some("OnFailure") => Restart::OnFailure,
            _ => Restart::Always,
        };
        let refresh = self.refresh();
        let containers = async {
            let inits = spec.init_containers.unwrap_or_default();
            let mut sidecars = FuturesUnordered::new();
            let failed = self.initialize(&inits, restart, &mut sidecars).await;
            let codes = if failed {
                vec![1]
            } else {
                let mains = spec.containers.iter().map(|one| container::supervise(self, one, restart));
                beside(&mut sidecars, join_all(mains)).await
            };
            let grace = spec.termination_grace_period_seconds.unwrap_or(30).unsigned_abs();
            self.end_sidecars(&inits, sidecars, Duration::from_secs(grace)).await;
            let phase = if codes.iter().all(|code| *code == 0) { "Succeeded" } else { "Failed" };
            self.live.state().phase = Some(phase);
        };
        tokio::select! {
            () = containers => {}
            () = refresh => {}
        }
        // As a kubelet does: what has ended needs no network, and its address may go to another pod.
        self.remove_sandbox().await;
        self.publish();
        std::future::pending().await
    }

    /// Each in its place: one that goes on beside the others has to have started before the next begins. Whether one
    /// failed for good.
    async fn initialize<'a>(
        &'a self,
        inits: &'a [Container],
        restart: Restart,
        sidecars: &mut Sidecars<'a>,
    ) -> bool {
        for init in inits {
            self.live.change(&init.name, |state| state.init = true);
            if status::is_sidecar(init) {
                sidecars.push(container::supervise(self, init, Restart::Always).boxed());
                beside(sidecars, self.live.until(&init.name, |state| state.started)).await;
                continue;
            }
            let again = if restart == Restart::Never { Restart::Never } else { Restart::OnFailure };
            if beside(sidecars, container::supervise(self, init, again)).await != 0 {
                return true;
            }
        }
        self.live.state().initialized = true;
        self.publish();
        false
    }

    /// When the containers have ended: the last one first, SIGTERM to each and SIGKILL to what is left after `grace`.
    async fn end_sidecars(&self, inits: &[Container], mut sidecars: Sidecars<'_>, grace: Duration) {
        self.live.state().finishing = true;
        for sidecar in inits.iter().filter(|init| status::is_sidecar(init)).rev() {
            let pid = self.live.state().containers.get(&sidecar.name).and_then(|state| state.pid);
            let Some(pid) = pid else { continue };
            // Gone already is as good.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGTERM);
            let mut gone = std::pin::pin!(self.live.until(&sidecar.name, |state| state.pid.is_none()));
            if tokio::time::timeout(grace, beside(&mut sidecars, &mut gone)).await.is_err() {
                container::kill(self, sidecar).await;
                beside(&mut sidecars, gone).await;
            }
        }
    }

    async fn make_sandbox(&self) {
        let mut pause = RETRY;
        loop {
            let (live, slot) = (self.live.clone(), self.sandbox.clone());
            // The slot stays locked while plugins run, so that the end of the pod waits for them.
            let made = tokio::task::spawn_blocking(move || {
                let mut slot = slot.blocking_lock();
                let sandbox = sandbox::create(&live)?;
                live.state().network = Some(sandbox.network.clone());
                *slot = Some(sandbox);
                anyhow::Ok(())
            });
            match made.await {
                Ok(Ok(())) => return,
                Ok(Err(error)) => self.event("FailedCreatePodSandBox", &format!("{error:#}")),
                Err(panic) => self.event("FailedCreatePodSandBox", &panic.to_string()),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_LIMIT);
        }
    }

    async fn remove_sandbox(&self) {
        let (live, slot) = (self.live.clone(), self.sandbox.clone());
        let removed = tokio::task::spawn_blocking(move || {
            if let Some(sandbox) = slot.blocking_lock().take() {
                sandbox.remove(&live);
            }
        });
        let _ = removed.await;
    }

    async fn make_volumes(&self) {
        let mut pause = RETRY;
        let mut told = String::new();
        loop {
            let pod = self.live.pod();
            match volumes::prepare(self.live.node(), &self.kubelet.cluster, &pod, &self.place()) {
                Ok(volumes) => {
                    *self.volumes.lock().unwrap_or_else(PoisonError::into_inner) = volumes;
                    return;
                }
                Err(error) => {
                    let message = format!("{error:#}");
                    if message != told {
                        self.event("FailedMount", &message);
                        told = message;
                    }
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_LIMIT);
        }
    }

    async fn refresh(&self) {
        loop {
            tokio::time::sleep(REFRESH).await;
            let pod = self.live.pod();
            let done = volumes::refresh(self.live.node(), &self.kubelet.cluster, &pod, &self.place());
            if let Err(error) = done {
                self.event("FailedMount", &format!("{error:#}"));
            }
        }
    }

    /// SIGTERM to each container, SIGKILL to what is left after `grace`, then the sandbox.
    async fn end(&self, grace: Duration) {
        let pids: Vec<i32> = self.live.state().containers.values().filter_map(|state| state.pid).collect();
        for pid in &pids {
            // Gone already is as good.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid), Signal::SIGTERM);
        }
        let deadline = tokio::time::Instant::now() + grace;
        let alive = || pids.iter().any(|pid| PathBuf::from(format!("/proc/{pid}/exe")).exists());
        while alive() && tokio::time::Instant::now() < deadline {
            // Whoever waited for them is gone: their end shows in /proc only.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.remove_sandbox().await;
        let cgroup = self.live.cgroup();
        let _ = tokio::task::spawn_blocking(move || cgroup::remove_tree(&cgroup)).await;
        let directory = self.live.node().path(&format!("/var/lib/kubelet/pods/{}", self.live.uid()));
        let _ = std::fs::remove_dir_all(directory);
    }

    /// Write the pod's status, if it changed.
    pub(super) fn publish(&self) {
        let (pod, place) = (self.live.pod(), self.place());
        let status = {
            let mut state = self.live.state();
            let status = status::of(&pod, &state, &place, self.live.started());
            if state.published == status {
                return;
            }
            state.published = status.clone();
            status
        };
        let (namespace, name) =
            (pod.metadata.namespace.unwrap_or_default(), pod.metadata.name.unwrap_or_default());
        if let Err(error) = self.kubelet.cluster.pod_status(&namespace, &name, &status) {
            tracing::debug!("{error:#}");
        }
    }

    pub(super) fn event(&self, reason: &str, message: &str) {
        tracing::debug!("{}: {reason}: {message}", self.live.full_name());
        self.kubelet.cluster.event(self.live.node().name(), &self.live.pod(), reason, message);
    }

    pub(super) fn place(&self) -> Place {
        Place { pod_ips: self.live.addresses(), host_ips: self.live.node().addresses() }
    }

    /// Where a volume is on the node.
    pub(super) fn volume(&self, name: &str) -> Option<PathBuf> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    fn namespace(&self) -> String {
        self.live.pod().metadata.namespace.unwrap_or_default()
    }
}

/// Goes on with the sidecars until the work is done.
async fn beside<T>(sidecars: &mut Sidecars<'_>, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            Some(_) = sidecars.next() => {}
        }
    }
}

impl Lookup for Worker {
    fn config_map(&self, name: &str, key: &str) -> Option<String> {
        let map: ConfigMap = self.kubelet.cluster.get(Kind::ConfigMap, &self.namespace(), name).ok()?;
        map.data?.get(key).cloned()
    }

    fn secret(&self, name: &str, key: &str) -> Option<String> {
        let secret: Secret = self.kubelet.cluster.get(Kind::Secret, &self.namespace(), name).ok()?;
        String::from_utf8(secret.data?.get(key)?.0.clone()).ok()
    }
}
