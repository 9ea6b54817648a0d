//! What is known of one pod on its node while it is there.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use nix::sched::CloneFlags;
use tokio::sync::watch;

use super::users::Users;
use crate::cgroup;
use crate::netns::Netns;
use crate::node::Node;
use crate::sandbox::{Capabilities, Plan, Step};

/// A pod on a node.
#[derive(Debug)]
pub struct Live {
    node: Arc<Node>,
    uid: String,
    started: Timestamp,
    pod: Mutex<Pod>,
    state: Mutex<State>,
    changed: watch::Sender<()>,
    stop: watch::Sender<Option<Duration>>,
    held: watch::Sender<bool>,
}

/// What changes while it lives.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) network: Option<Network>,
    pub(super) containers: BTreeMap<String, Container>,
    pub(super) initialized: bool,
    /// Its containers have ended for good; its sidecars are not started again.
    pub(super) finishing: bool,
    /// Set once all containers have ended for good.
    pub(super) phase: Option<&'static str>,
    pub(super) published: serde_json::Value,
}

/// The sandbox's network.
#[derive(Clone, Debug)]
pub(super) struct Network {
    pub(super) netns: Arc<Netns>,
    /// Where they are not the host's.
    pub(super) users: Option<Arc<Users>>,
    pub(super) addresses: Vec<IpAddr>,
    /// How long the mesh's plugin took.
    pub(super) enrolment: Option<Duration>,
}

/// One container, from its first attempt to start.
#[derive(Clone, Debug, Default)]
pub(super) struct Container {
    pub(super) init: bool,
    /// Hexadecimal, the name of its cgroup; of the last attempt.
    pub(super) id: String,
    pub(super) pid: Option<i32>,
    pub(super) since: Option<Timestamp>,
    /// It runs, and its startup probe has succeeded if it has one.
    pub(super) started: bool,
    pub(super) ready: bool,
    pub(super) restarts: i32,
    pub(super) exit: Option<i32>,
    /// Why it does not run, e.g. `CrashLoopBackOff`.
    pub(super) waiting: Option<(String, String)>,
    pub(super) environment: BTreeMap<String, String>,
    pub(super) credentials: Option<Credentials>,
}

/// What its processes may do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Credentials {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) capabilities: Capabilities,
    pub(super) no_new_privileges: bool,
}

impl Credentials {
    pub(super) fn limit(self, plan: &mut Plan) {
        let Self { uid, gid, capabilities, no_new_privileges } = self;
        plan.step(Step::Credentials { uid, gid, capabilities });
        if no_new_privileges {
            plan.step(Step::NoNewPrivileges);
        }
    }
}

impl Live {
    pub(super) fn new(node: Arc<Node>, pod: Pod) -> Self {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        Self {
            node,
            uid,
            started: Timestamp::now(),
            pod: Mutex::new(pod),
            state: Mutex::default(),
            changed: watch::Sender::new(()),
            stop: watch::Sender::new(None),
            held: watch::Sender::new(false),
        }
    }

    #[must_use]
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    #[must_use]
    pub fn uid(&self) -> &str {
        &self.uid
    }

    /// The Pod as last seen.
    #[must_use]
    pub fn pod(&self) -> Pod {
        self.pod.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// `namespace/name`.
    #[must_use]
    pub fn full_name(&self) -> String {
        let meta = &self.pod.lock().unwrap_or_else(PoisonError::into_inner).metadata;
        format!(
            "{}/{}",
            meta.namespace.as_deref().unwrap_or_default(),
            meta.name.as_deref().unwrap_or_default()
        )
    }

    /// How long the mesh's CNI plugin took to enrol it; none: there is no such plugin, or no sandbox yet.
    #[must_use]
    pub fn enrolment(&self) -> Option<Duration> {
        self.state().network.as_ref().and_then(|network| network.enrolment)
    }

    /// The pod's own addresses, the primary one first; none before it has a sandbox.
    #[must_use]
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.state().network.as_ref().map(|network| network.addresses.clone()).unwrap_or_default()
    }

    pub(super) fn users(&self) -> Option<Arc<Users>> {
        self.state().network.as_ref()?.users.clone()
    }

    #[must_use]
    pub fn netns(&self) -> Option<Arc<Netns>> {
        Some(self.state().network.as_ref()?.netns.clone())
    }

    /// The process id of a container's first process, while it runs. Without a name, of the first container.
    #[must_use]
    pub fn pid(&self, container: Option<&str>) -> Option<i32> {
        let name = self.container_name(container)?;
        self.state().containers.get(&name)?.pid
    }

    /// How often a container was started again.
    #[must_use]
    pub fn restarts(&self, container: Option<&str>) -> i32 {
        let name = self.container_name(container);
        let state = self.state();
        name.and_then(|name| state.containers.get(&name)).map_or(0, |container| container.restarts)
    }

    /// Where a container's output is kept, of all its runs.
    #[must_use]
    pub fn log_path(&self, container: Option<&str>) -> Option<PathBuf> {
        let name = self.container_name(container)?;
        Some(self.log_directory().join(format!("{name}.log")))
    }

    /// A program inside a running container: its root, network, cgroup, user and variables.
    pub fn command(&self, container: Option<&str>, program: &str) -> anyhow::Result<Command> {
        let name = self.container_name(container).context("the pod has no such container")?;
        let (container, network) = {
            let state = self.state();
            (state.containers.get(&name).cloned(), state.network.clone())
        };
        let container = container.with_context(|| format!("container {name} was not started yet"))?;
        let pid = container.pid.with_context(|| format!("container {name} does not run"))?;
        let network = network.context("the pod has no network")?;
        let mounts =
            std::fs::File::open(format!("/proc/{pid}/ns/mnt")).context("open its mount namespace")?;
        let mut plan = Plan::new();
        plan.step(Step::Cgroup(cgroup::procs(&self.cgroup().join(&container.id))?));
        plan.step(Step::Enter(mounts.into(), CloneFlags::CLONE_NEWNS));
        plan.step(Step::Enter(network.netns.descriptor()?, CloneFlags::CLONE_NEWNET));
        if let Some(users) = &network.users {
            plan.step(users.step()?);
        }
        if let Some(credentials) = container.credentials {
            credentials.limit(&mut plan);
        }
        let mut command = Command::new(program);
        command.env_clear().envs(&container.environment);
        plan.apply(&mut command);
        Ok(command)
    }

    /// A process of the node in the pod's network namespace, as the kubelet's port-forward is.
    pub fn command_of_node(&self, program: &str) -> anyhow::Result<Command> {
        let netns = self.netns().context("the pod has no network")?;
        let mut plan = self.node.plan("kubelet")?;
        plan.step(Step::Enter(netns.descriptor()?, CloneFlags::CLONE_NEWNET));
        let mut command = Command::new(program);
        command.env_clear().env("PATH", crate::rootfs::PATH);
        plan.apply(&mut command);
        Ok(command)
    }

    /// The pod's cgroup as the host sees it (cgroupfs layout).
    #[must_use]
    pub fn cgroup(&self) -> PathBuf {
        self.node.cgroup().join("kubepods").join(format!("pod{}", self.uid))
    }

    pub(super) fn log_directory(&self) -> PathBuf {
        let name = self.full_name().replace('/', "_");
        self.node.path("/var/log/pods").join(format!("{name}_{}", self.uid))
    }

    pub(super) fn started(&self) -> Timestamp {
        self.started
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn change(&self, container: &str, change: impl FnOnce(&mut Container)) {
        change(self.state().containers.entry(container.to_owned()).or_default());
        self.changed.send_replace(());
    }

    /// Resolves when this holds for a container.
    pub(super) async fn until(&self, container: &str, holds: impl Fn(&Container) -> bool) {
        let mut changed = self.changed.subscribe();
        while !self.state().containers.get(container).is_some_and(&holds) {
            // The sender is this one's own, so it is there.
            let _ = changed.changed().await;
        }
    }

    pub(super) fn update(&self, pod: Pod) {
        *self.pod.lock().unwrap_or_else(PoisonError::into_inner) = pod;
    }

    /// End it within `grace`; a shorter grace than before counts.
    pub(super) fn stop(&self, grace: Duration) {
        self.stop.send_if_modified(|now| {
            let sooner = now.is_none_or(|now| grace < now);
            if sooner {
                *now = Some(grace);
            }
            sooner
        });
    }

    /// While it is held, a container of it that ends is not started again.
    pub fn hold(&self, held: bool) {
        self.held.send_replace(held);
    }

    /// Resolves when it is not held.
    pub(super) async fn released(&self) {
        // The sender is this one's own, so it is there.
        let _ = self.held.subscribe().wait_for(|held| !held).await;
    }

    /// Resolves when it has to end.
    pub(super) async fn stopped(&self) -> Duration {
        let mut stop = self.stop.subscribe();
        let grace = stop.wait_for(Option::is_some).await.map(|grace| *grace);
        grace.ok().flatten().unwrap_or_default()
    }

    fn container_name(&self, given: Option<&str>) -> Option<String> {
        if let Some(name) = given {
            return Some(name.to_owned());
        }
        let pod = self.pod.lock().unwrap_or_else(PoisonError::into_inner);
        Some(pod.spec.as_ref()?.containers.first()?.name.clone())
    }
}
