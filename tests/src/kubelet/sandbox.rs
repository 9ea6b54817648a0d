//! A pod's sandbox: its network namespace, attached by the node's CNI plugins, and the process that stands for it.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::Context as _;
use nix::sched::CloneFlags;

use super::live::{Live, Network};
use super::users::{self, Users};
use crate::cni::{self, Attachment};
use crate::fabric;
use crate::netns::Netns;
use crate::sandbox::{Capabilities, Step};

/// A sandbox that exists; [`Sandbox::remove`] takes it down.
#[derive(Debug)]
pub(super) struct Sandbox {
    attachment: Option<Attachment>,
    pub(super) network: Network,
}

/// Make it: the namespace first, then the network, then the process, as containerd does.
pub(super) fn create(live: &Live) -> anyhow::Result<Sandbox> {
    let pod = live.pod();
    let node = live.node();
    let id = hexadecimal();
    // Its parent is gone when the lab has ended.
    match fs::create_dir(live.cgroup()) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(error).context("make the pod's cgroup");
        }
        _ => {}
    }
    if pod.spec.as_ref().and_then(|spec| spec.host_network) == Some(true) {
        let netns = Netns::open(node.name(), &PathBuf::from(crate::netns::NAMED).join(node.netns().name()))?;
        let addresses = node.addresses();
        let network = Network { netns: Arc::new(netns), users: None, addresses, enrolment: None };
        return Ok(Sandbox { attachment: None, network });
    }
    let address = pod.metadata.annotations.as_ref().and_then(|annotations| annotations.get(cni::ADDRESS));
    let attachment = Attachment {
        families: Attachment::families(pod.metadata.annotations.as_ref()),
        further: Attachment::further(pod.metadata.annotations.as_ref()),
        namespace: pod.metadata.namespace.unwrap_or_default(),
        name: pod.metadata.name.unwrap_or_default(),
        uid: live.uid().to_owned(),
        netns: PathBuf::from(format!("/var/run/netns/cni-{}", &id[..16])),
        container_id: id,
        address: address.map(|text| text.parse()).transpose().context(cni::ADDRESS)?,
    };
    let own_users = pod.spec.as_ref().and_then(|spec| spec.host_users) == Some(false);
    let (users, netns) = namespaces(live, &attachment, own_users)?;
    let (users, netns) = (users.map(Arc::new), Arc::new(netns));
    fabric::without_v6(&netns, node.stack());
    let attached = cni::add(node, &attachment).and_then(|added| {
        pause(live, &attachment, &netns, users.as_deref())?;
        Ok(added)
    });
    match attached {
        Ok(cni::Added { addresses, enrolment }) => {
            let network = Network { netns, users, addresses, enrolment };
            Ok(Sandbox { attachment: Some(attachment), network })
        }
        Err(error) => {
            remove(live, &attachment);
            Err(error)
        }
    }
}

impl Sandbox {
    /// Undo it. Errors are only told: there is nobody who could do better.
    pub(super) fn remove(&self, live: &Live) {
        if let Some(attachment) = &self.attachment {
            remove(live, attachment);
        }
    }
}

fn remove(live: &Live, attachment: &Attachment) {
    if let Err(error) = cni::delete(live.node(), attachment) {
        tracing::warn!("{}: {error:#}", live.full_name());
    }
    crate::cgroup::remove_tree(&live.cgroup().join(&attachment.container_id));
    let path = attachment.netns.clone();
    let unmounted = live.node().inside(move || {
        nix::mount::umount2(&path, nix::mount::MntFlags::MNT_DETACH)?;
        fs::remove_file(&path)?;
        Ok(())
    });
    if let Err(error) = unmounted {
        tracing::warn!(
            "{}: network namespace {} stays: {error:#}",
            live.full_name(),
            attachment.netns.display()
        );
    }
}

/// A new network namespace, mounted where the node's processes find it; where the pod has users of its own, theirs.
fn namespaces(
    live: &Live,
    attachment: &Attachment,
    own_users: bool,
) -> anyhow::Result<(Option<Users>, Netns)> {
    let (path, name) = (attachment.netns.clone(), format!("pod {}", live.full_name()));
    if own_users {
        let (users, netns) = users::with_netns(live.node(), &name, &path)?;
        return Ok((Some(users), netns));
    }
    let netns = live.node().inside(move || {
        nix::sched::unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace")?;
        users::mount("/proc/thread-self/ns/net", &name, &path)
    })?;
    Ok((None, netns))
}

/// The process in whose cgroup an agent finds the sandbox, as the pause container of a runtime.
fn pause(live: &Live, attachment: &Attachment, netns: &Netns, users: Option<&Users>) -> anyhow::Result<()> {
    let mut plan = live.node().plan(&format!("kubepods/pod{}/{}", live.uid(), attachment.container_id))?;
    plan.step(Step::Enter(netns.descriptor()?, CloneFlags::CLONE_NEWNET));
    if let Some(users) = users {
        let capabilities = Capabilities::container_default();
        plan.step(users.step()?).step(Step::Credentials { uid: 0, gid: 0, capabilities });
    }
    let mut command = Command::new("/usr/bin/sleep");
    command.arg("infinity").env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    plan.apply(&mut command);
    // tokio reaps it when it is killed with its cgroup.
    let child = tokio::process::Command::from(command).spawn().context("start the sandbox's process")?;
    drop(child);
    Ok(())
}

/// 64 hexadecimal digits, as container ids are.
pub(super) fn hexadecimal() -> String {
    let bytes: [u8; 32] = rand::random();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
