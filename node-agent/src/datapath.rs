//! The eBPF datapath as the rest of the agent sees it: load once, enrol pods, let them go.
//!
//! A pod is enrolled in two steps, so that it is never half captured: `prepare` makes everything its proxy needs and
//! changes nothing for the pod's traffic, `capture` switches the kernel hooks on. Everything is pinned in bpffs, so
//! capture outlives the agent, and the next agent finds its pods by `surviving`.
//!
//! **Invariant:** a failed step undoes itself; a pod is either untouched or captured (fail closed), nothing between.
//! All calls are synchronous: run them on one blocking thread.

use std::net::IpAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;

/// Where the datapath lives on this node, and the numbers it uses inside the pods.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
pub struct Config {
    /// Mount point of the bpf file system that pins are kept in.
    #[arg(long, env = "AMBIT_BPFFS", default_value = "/sys/fs/bpf")]
    pub bpffs: PathBuf,
    /// Cgroup (version 2) whose processes' connections are captured; found from the mounts when not given.
    #[arg(long, env = "AMBIT_CGROUP_ROOT")]
    pub cgroup_root: Option<PathBuf>,
}

/// A pod to enrol.
#[derive(Debug)]
pub struct PodSpec {
    /// Kubernetes pod UID; also the name of the directory of its pins.
    pub uid: String,
    /// The pod's network namespace.
    pub netns: OwnedFd,
    /// Its addresses, the primary one first.
    pub addresses: Vec<IpAddr>,
}

/// A pod that an earlier agent enrolled and that still has its pins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survivor {
    /// Kubernetes pod UID.
    pub uid: String,
    /// The addresses it was enrolled with.
    pub addresses: Vec<IpAddr>,
    /// Its number in the maps (see `mesh_ebpf_abi`).
    pub slot: u32,
}

/// The sockets that the kernel steers a pod's connections to, opened inside its network namespace.
#[derive(Debug)]
pub struct Listeners {
    /// Connections that the pod opens.
    pub outbound_v4: OwnedFd,
    /// Connections to the pod that are not HBONE.
    pub inbound_v4: OwnedFd,
    /// Connections to the pod on port 15008.
    pub hbone_v4: OwnedFd,
    /// Like `outbound_v4`; absent where the pod has no IPv6.
    pub outbound_v6: Option<OwnedFd>,
    /// Like `inbound_v4`; absent where the pod has no IPv6.
    pub inbound_v6: Option<OwnedFd>,
    /// Like `hbone_v4`; absent where the pod has no IPv6.
    pub hbone_v6: Option<OwnedFd>,
}

impl Listeners {
    /// The same sockets once more, for another process.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        let optional = |fd: &Option<OwnedFd>| fd.as_ref().map(OwnedFd::try_clone).transpose();
        Ok(Self {
            outbound_v4: self.outbound_v4.try_clone()?,
            inbound_v4: self.inbound_v4.try_clone()?,
            hbone_v4: self.hbone_v4.try_clone()?,
            outbound_v6: optional(&self.outbound_v6)?,
            inbound_v6: optional(&self.inbound_v6)?,
            hbone_v6: optional(&self.hbone_v6)?,
        })
    }
}

/// Why the datapath cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// The agent was built without `cargo xtask ebpf`.
    #[error(
        "this agent was built without its eBPF programs; build them with `cargo xtask ebpf` and build again"
    )]
    NoObject,
}

/// Why a pod could not be enrolled, captured or let go.
#[derive(Debug, thiserror::Error)]
#[error("pod {uid}: {step}")]
pub struct PodError {
    /// The pod.
    pub uid: String,
    /// What was being done, for example "add ip rule".
    pub step: String,
    /// What the kernel answered.
    pub source: std::io::Error,
}

/// The loaded programs and the pods they capture.
#[derive(Debug)]
pub struct Datapath {
    skproxy: OwnedFd,
}

impl Datapath {
    /// Loads the programs, or takes over what an earlier agent pinned: nothing captured is disturbed by this.
    ///
    /// # Errors
    /// When the kernel lacks a feature, bpffs or the cgroup is not there, or a program is refused.
    pub fn open(config: &Config) -> Result<Self, DatapathError> {
        let _ = config;
        Err(DatapathError::NoObject)
    }

    /// The map in which a proxy flags its own sockets (`mesh_ebpf_abi::SKPROXY`).
    pub fn skproxy_map(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.skproxy.as_fd()
    }

    /// The pods that are captured: after `open` the ones an earlier agent left.
    pub fn surviving(&self) -> Vec<Survivor> {
        Vec::new()
    }

    /// Makes routes, rules and listeners in the pod's network namespace; nothing is captured yet.
    /// `kept` are the pod's listeners where a proxy still has them; without, new ones are opened. For a pod that is
    /// already captured this only fills its slots again, which takes effect at once.
    ///
    /// # Errors
    /// When a step fails; the earlier ones are undone.
    pub fn prepare(&mut self, pod: &PodSpec, kept: Option<Listeners>) -> Result<Listeners, PodError> {
        let _ = kept;
        Err(PodError {
            uid: pod.uid.clone(),
            step: "prepare".to_owned(),
            source: std::io::ErrorKind::Unsupported.into(),
        })
    }

    /// Switches capture on for a prepared pod: from now on its new TCP connections meet the proxy, its older ones
    /// live on, and everything else that is TCP is dropped.
    ///
    /// # Errors
    /// When a hook cannot be attached; the pod is then as it was.
    pub fn capture(&mut self, uid: &str) -> Result<(), PodError> {
        Err(PodError {
            uid: uid.to_owned(),
            step: "capture".to_owned(),
            source: std::io::ErrorKind::Unsupported.into(),
        })
    }

    /// Switches capture off and restores what was there; works for a pod whose network namespace is gone, and does
    /// nothing for an unknown one.
    ///
    /// # Errors
    /// When something of the pod could not be removed; it is then no longer captured all the same.
    pub fn leave(&mut self, uid: &str) -> Result<(), PodError> {
        let _ = uid;
        Ok(())
    }
}
