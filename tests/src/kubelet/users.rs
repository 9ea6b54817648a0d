//! Users of a pod's own (`hostUsers: false`): a user namespace whose ids are nobody's on the host, and a network namespace
//! that belongs to it. Made before the network is, as container runtimes do.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Context as _;
use nix::mount::MsFlags;
use nix::sched::CloneFlags;

use crate::netns::Netns;
use crate::node::Node;
use crate::sandbox::Step;

/// Ids of each pod.
const IDS: u32 = 65_536;
/// Pods so far.
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A user namespace held open.
#[derive(Debug)]
pub(super) struct Users(OwnedFd);

impl Users {
    /// For a process that becomes one of its users; after every namespace that belongs to the host's users.
    pub(super) fn step(&self) -> anyhow::Result<Step> {
        Ok(Step::Enter(self.0.try_clone()?, CloneFlags::CLONE_NEWUSER))
    }
}

/// Makes both; the network namespace is mounted at `path` on the node.
pub(super) fn with_netns(node: &Node, name: &str, path: &Path) -> anyhow::Result<(Users, Netns)> {
    let process = Process::start(node)?;
    process.map_ids().context("map the pod's users")?;
    let users = File::open(process.namespace("user")).context("open the user namespace")?;
    let (netns, name, path) = (process.namespace("net"), name.to_owned(), path.to_owned());
    let netns = node.inside(move || mount(&netns, &name, &path))?;
    Ok((Users(users.into()), netns))
}

/// A process that has both until somebody else does. A thread cannot make a user namespace in a process of several.
struct Process(Child);

impl Process {
    fn start(node: &Node) -> anyhow::Result<Self> {
        let mut plan = node.plan("kubelet")?;
        plan.step(Step::Unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET));
        let mut command = Command::new("/usr/bin/sleep");
        command.arg("infinity").env_clear();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        plan.apply(&mut command);
        Ok(Self(command.spawn().context("make a user namespace")?))
    }

    fn namespace(&self, kind: &str) -> String {
        format!("/proc/{}/ns/{kind}", self.0.id())
    }

    fn map_ids(&self) -> std::io::Result<()> {
        // Ids of pods long gone may come back.
        let first = (1 + NUMBER.fetch_add(1, Ordering::Relaxed) % 30_000) * IDS;
        for map in ["uid_map", "gid_map"] {
            std::fs::write(format!("/proc/{}/{map}", self.0.id()), format!("0 {first} {IDS}"))?;
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Dead already is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Mounts a network namespace at `path` and opens it there, so that it stays when its process ends.
pub(super) fn mount(netns: &str, name: &str, path: &Path) -> anyhow::Result<Netns> {
    File::create(path).with_context(|| format!("make {}", path.display()))?;
    nix::mount::mount(Some(netns), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("mount the network namespace at {}", path.display()))?;
    Netns::open(name, path)
}
