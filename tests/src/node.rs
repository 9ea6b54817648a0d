//! One node: a network namespace on the fabric, a root file system of its own, a cgroup subtree that looks to its
//! processes like the whole hierarchy.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use nix::mount::MsFlags;
use nix::sched::CloneFlags;
use serde_json::json;

use crate::cgroup;
use crate::cni;
use crate::fabric::{self, Fabric};
use crate::netns::Netns;
use crate::rootfs;
use crate::run::Run;
use crate::sandbox::{Plan, Step};
use crate::shell;
use crate::stack::{Family, Stack};

/// Debian's containernetworking-plugins.
const CNI_PLUGINS: &str = "/usr/lib/cni";

/// A node of the lab, without the processes on it.
#[derive(Debug)]
pub struct Node {
    name: String,
    index: u8,
    stack: Stack,
    netns: Netns,
    mounts: OwnedFd,
    directory: PathBuf,
    cgroup: PathBuf,
}

impl Node {
    /// Make node `index`, counted from 1, and join it to the fabric.
    pub fn create(run: &Run, fabric: &Fabric, index: u8) -> anyhow::Result<Self> {
        let name = format!("n{index}");
        let netns = Netns::create(&run.netns(&name))?;
        fabric.join(&netns, index)?;
        let directory = run.directory().join(&name);
        let cgroup = run.cgroup().join(&name);
        for part in ["kubelet", "kubepods"] {
            fs::create_dir_all(cgroup.join(part)).with_context(|| format!("make cgroups of {name}"))?;
        }
        prepare(&directory, fabric.stack(), index)
            .with_context(|| format!("make {}", directory.display()))?;
        let mounts =
            mount(&netns, &directory, &cgroup).with_context(|| format!("mount the root of {name}"))?;
        Ok(Self { name, index, stack: fabric.stack(), netns, mounts, directory, cgroup })
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    #[must_use]
    pub fn index(&self) -> u8 {
        self.index
    }

    /// The families of its addresses and of its pods'.
    #[must_use]
    pub fn stack(&self) -> Stack {
        self.stack
    }

    /// Its primary address.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        fabric::node_address(self.stack.primary(), self.index)
    }

    /// One of each of its families, the primary one first.
    #[must_use]
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.stack.families().iter().map(|family| fabric::node_address(*family, self.index)).collect()
    }

    /// All addresses of its interfaces, more than those that the cluster knows it by.
    pub fn interface_addresses(&self) -> anyhow::Result<BTreeSet<IpAddr>> {
        let text = shell::run("ip", ["-n", self.netns.name(), "-j", "addr"])?;
        let links: serde_json::Value = serde_json::from_str(&text).context("parse the node's addresses")?;
        let infos = links.as_array().into_iter().flatten().filter_map(|link| link["addr_info"].as_array());
        Ok(infos.flatten().filter_map(|info| info["local"].as_str()?.parse().ok()).collect())
    }

    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The root of the node's cgroups as the host sees it.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Where the host finds a file of the node below /run, /var, /etc/cni or /opt/cni.
    #[must_use]
    pub fn path(&self, in_node: &str) -> PathBuf {
        let path = in_node.strip_prefix("/var/run").map_or(in_node.to_owned(), |rest| format!("/run{rest}"));
        self.directory.join(path.trim_start_matches('/'))
    }

    /// The first steps of a process on this node: its cgroup, given below the node's, and the node's mounts.
    pub fn plan(&self, cgroup: &str) -> anyhow::Result<Plan> {
        // Else a process would bring back what the end of the run has removed.
        anyhow::ensure!(self.cgroup.join("kubepods").exists(), "the lab has ended");
        let mut plan = Plan::new();
        plan.step(Step::Cgroup(cgroup::procs(&self.cgroup.join(cgroup))?));
        plan.step(Step::Enter(self.mounts()?, CloneFlags::CLONE_NEWNS));
        Ok(plan)
    }

    /// The mount namespace, for [`Step::Enter`].
    pub fn mounts(&self) -> anyhow::Result<OwnedFd> {
        Ok(self.mounts.try_clone()?)
    }

    /// Run `work` on a thread of its own with the node's mounts.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        let mounts = self.mounts()?;
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                let mut plan = Plan::new();
                // setns into a mount namespace needs file system attributes of the thread's own.
                plan.step(Step::Unshare(CloneFlags::CLONE_FS));
                plan.step(Step::Enter(mounts, CloneFlags::CLONE_NEWNS));
                plan.run()?;
                work()
            });
            inside.join().map_err(|_| anyhow::anyhow!("a thread on node {} panicked", self.name))?
        })
    }

    /// A program as the kubelet would run it: in the node's network, mounts and the kubelet's cgroup.
    pub fn command(&self, program: &str) -> anyhow::Result<Command> {
        let mut plan = self.plan("kubelet")?;
        plan.step(Step::Enter(self.netns.descriptor()?, CloneFlags::CLONE_NEWNET));
        let mut command = Command::new(program);
        command.env_clear().env("PATH", rootfs::PATH);
        plan.apply(&mut command);
        Ok(command)
    }
}

/// The node's own directories and files.
fn prepare(directory: &Path, stack: Stack, index: u8) -> std::io::Result<()> {
    for part in [
        "root",
        "run/netns",
        "run/ambit",
        "var/lib",
        "var/log/pods",
        "var/tmp",
        "etc/cni/net.d",
        "etc/cni/networks.d",
        "opt/cni/bin",
    ] {
        fs::create_dir_all(directory.join(part))?;
    }
    std::os::unix::fs::symlink("/run", directory.join("var/run"))?;
    for plugin in ["bridge", "host-local", "loopback"] {
        let target = directory.join("opt/cni/bin").join(plugin);
        std::os::unix::fs::symlink(Path::new(CNI_PLUGINS).join(plugin), target)?;
    }
    let default = |family| if family == Family::V4 { "0.0.0.0/0" } else { "::/0" };
    let first = network(stack, "lab", "cni0", |family| (fabric::pod_cidr(family, index), default(family)));
    let second = network(stack, cni::SECOND, "cni1", |family| {
        (fabric::second_cidr(family, index), fabric::second_network(family))
    });
    fs::write(directory.join("etc/cni/net.d/10-lab.conflist"), format!("{first:#}"))?;
    fs::write(directory.join(format!("etc/cni/networks.d/{}.conflist", cni::SECOND)), format!("{second:#}"))?;
    fs::write(directory.join("resolv.conf"), format!("nameserver {}\n", fabric::control(stack.primary())))?;
    fs::write(directory.join("hosts"), "127.0.0.1 localhost\n::1 localhost\n")
}

/// A bridge with addresses of each family: `of` says from which subnet, and what is routed by it.
fn network(
    stack: Stack,
    name: &str,
    bridge: &str,
    of: impl Fn(Family) -> (String, &'static str),
) -> serde_json::Value {
    let families: Vec<_> = stack.families().iter().map(|family| of(*family)).collect();
    let ranges: Vec<_> = families.iter().map(|(subnet, _)| json!([{ "subnet": subnet }])).collect();
    let routes: Vec<_> = families.iter().map(|(_, to)| json!({ "dst": to })).collect();
    json!({
        "cniVersion": "1.0.0",
        "name": name,
        "plugins": [{
            "type": "bridge",
            "bridge": bridge,
            "isGateway": true,
            "hairpinMode": true,
            "ipam": { "type": "host-local", "ranges": ranges, "routes": routes },
        }],
    })
}

/// Make the node's mount namespace on a thread of its own and hold it open.
fn mount(netns: &Netns, directory: &Path, cgroup: &Path) -> anyhow::Result<OwnedFd> {
    let root = directory.join("root");
    let mut plan = Plan::new();
    plan.step(Step::Unshare(CloneFlags::CLONE_NEWNS));
    // Nothing of the lab reaches the host, nothing of the host comes later.
    plan.propagation(Path::new("/"), MsFlags::MS_PRIVATE);
    rootfs::base(&mut plan, &root, &rootfs::built_binaries()?);
    for part in ["run", "var", "etc/cni", "opt/cni"] {
        plan.directories(&root, Path::new(part));
        plan.bind(&directory.join(part), &root.join(part), false);
    }
    for file in ["resolv.conf", "hosts"] {
        let target = Path::new("etc").join(file);
        rootfs::mount_point(&mut plan, &root, &target, false);
        plan.bind(&directory.join(file), &root.join(target), true);
    }
    plan.directories(&root, Path::new("sys"));
    plan.filesystem("sysfs", &root.join("sys"), None);
    plan.bind(cgroup, &root.join("sys/fs/cgroup"), false);
    plan.filesystem("bpf", &root.join("sys/fs/bpf"), Some("mode=700"));
    plan.step(Step::Root(crate::sandbox::c_path(&root)));
    // Containers follow the node's later mounts where their volumes ask for it.
    plan.propagation(Path::new("/"), MsFlags::MS_SHARED);
    netns.run(|| {
        plan.run()?;
        Ok(File::open("/proc/thread-self/ns/mnt").context("open the mount namespace")?.into())
    })
}
