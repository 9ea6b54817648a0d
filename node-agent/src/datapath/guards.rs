//! The guard on the interfaces of a pod, and on the node at the other ends of its links.
//!
//! Inside the pod it drops before anything leaves, and its sender is told; but a packet socket can leave traffic control
//! out there, and who administers the pod's network can have packets changed after it. Nothing inside reaches the other
//! ends. **Invariant:** an interface of the node is touched only if the kernel says, from there, that its other end is in
//! the pod.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use futures_util::{StreamExt, TryStreamExt};
use mesh_ebpf_abi::program;
use rtnetlink::Handle;
use rtnetlink::packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage, LinkXdp, XdpAttached};
use rtnetlink::packet_route::nsid::{NsidAttribute, NsidMessage};
use tracing::debug;

use super::bpf::{self, Extent, Hook, Target};
use super::hook::Chosen;
use super::load::Programs;
use super::pins::Pins;
use super::pod::{Failed, Pod, step};
use super::rules::{self, Interface, MAX_INTERFACES, kernel, peer, talk};
use super::upkeep::Watch;
use super::{Datapath, attach, maps, netns};

/// What pods are guarded with.
pub(super) struct Guards<'a> {
    /// Where it is pinned.
    pub pins: &'a Pins,
    /// The programs.
    pub programs: &'a Programs,
    /// How they are attached.
    pub hook: Chosen,
    /// The node's network namespace.
    pub node: BorrowedFd<'a>,
}

impl<'a> Guards<'a> {
    /// Of the parts of a datapath.
    pub(super) fn of(pins: &'a Pins, programs: &'a Programs, hook: Chosen, node: &'a OwnedFd) -> Self {
        Self { pins, programs, hook, node: node.as_fd() }
    }
}

impl Pod {
    /// Attaches the guard where it is missing.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn guard(&mut self, guards: &Guards<'_>) -> Result<(), Failed> {
        let netns = step("enter its network namespace", self.netns())?;
        let guarded = netns::within(netns.as_fd(), || Ok(self.guard_inside(guards)));
        let (interfaces, inside) = step("enter its network namespace", guarded)?;
        inside.and(self.guard_ends(guards, &interfaces))
    }

    /// Inside of the pod, in the calling thread's network namespace. Its interfaces, also where one could not be guarded.
    pub(super) fn guard_inside(&mut self, guards: &Guards<'_>) -> (Vec<Interface>, Result<(), Failed>) {
        let directory = guards.pins.pod(&maps::uid(&self.record));
        self.filtered |= guards.hook == Chosen::Clsact;
        let mut interfaces = Vec::new();
        let mut attach = || {
            if self.pending.watch.is_none() {
                // Before the interfaces are listed, so that none is missed.
                self.pending.watch = Some(Watch::open(guards.hook)?);
            }
            let found = rules::interfaces()?;
            if found.more && !self.captured() && !self.taken_over {
                let error = format!("it has more than {MAX_INTERFACES} interfaces");
                return Err(io::Error::new(io::ErrorKind::QuotaExceeded, error));
            }
            interfaces = found.seen;
            attach::guard(&directory, guards.programs, guards.hook, &interfaces)?;
            let pinned = guards.pins.pod_links(&maps::uid(&self.record))?;
            attach::prune(&directory, &pinned, (!found.more).then_some(&interfaces))
        };
        let result = step("attach the guard", attach());
        self.pending.unguarded = result.is_err();
        (interfaces, result)
    }

    /// On the node, at the other ends of these interfaces of the pod.
    ///
    /// # Errors
    /// As there.
    pub(super) fn guard_ends(&mut self, guards: &Guards<'_>, interfaces: &[Interface]) -> Result<(), Failed> {
        let result = step("attach the guard on the node", self.attach_ends(guards, interfaces));
        self.pending.unguarded |= result.is_err();
        result
    }

    fn attach_ends(&mut self, guards: &Guards<'_>, interfaces: &[Interface]) -> io::Result<()> {
        // A filter there would be in the place that others' have, and outlive what its pin tells of.
        if guards.hook != Chosen::Tcx || interfaces.iter().all(|interface| interface.peer.is_none()) {
            self.ends.clear();
            return Ok(());
        }
        let (netns, uid) = (self.netns()?, maps::uid(&self.record));
        let directory = guards.pins.pod(&uid);
        let program = guards.programs.guard_node.as_fd();
        self.ends = netns::here_or_within(guards.node, || {
            let ends = ends(netns.as_fd(), interfaces)?;
            for end in &ends {
                let pin = directory.join(pin(*end));
                attach::ensure(&pin, program, Target::Interface(*end), Hook::TcxIngress)?;
            }
            Ok(ends)
        })?;
        debug!(pod = uid, ends = ?self.ends, "guarded on the node");
        Ok(())
    }
}

impl Datapath {
    /// Those of the pods' links whose ends on the node, by their indices there, are not guarded as they have to be.
    pub(super) fn open_ends<'a>(
        &self,
        uids: impl IntoIterator<Item = &'a String>,
    ) -> io::Result<BTreeMap<&'a str, Vec<u32>>> {
        let pods = uids.into_iter().filter_map(|uid| Some((uid.as_str(), self.pods.get(uid)?)));
        let pods: Vec<_> = pods.filter(|(_, pod)| !pod.ends.is_empty()).collect();
        if pods.is_empty() {
            return Ok(BTreeMap::new());
        }
        let ours = bpf::tag(self.programs.guard_node.as_fd())?;
        let is_open = |end: u32| match bpf::query(Target::Interface(end), Hook::TcxIngress, Extent::Attached)
        {
            Ok(order) => !order.first().is_some_and(|id| {
                bpf::program(*id).and_then(|one| bpf::tag(one.as_fd())).is_ok_and(|tag| tag == ours)
            }),
            // It is gone, and its other end with it.
            Err(error) => error.raw_os_error() != Some(libc::ENODEV),
        };
        netns::here_or_within(self.node.as_fd(), || {
            let open = |pod: &Pod| pod.ends.iter().copied().filter(|end| is_open(*end)).collect();
            Ok(pods.iter().map(|(uid, pod)| (*uid, open(pod))).collect())
        })
    }

    /// Puts the guards at the ends of a pod's links before programs of others that have come since.
    pub(super) fn ends_first(&self, directory: &Path, ends: &[u32]) -> io::Result<()> {
        let first = |end: &u32| {
            attach::make_first(&directory.join(pin(*end)), &self.programs.guard_node, *end, Hook::TcxIngress)
        };
        netns::here_or_within(self.node.as_fd(), || ends.iter().try_for_each(first))
    }
}

fn pin(end: u32) -> String {
    attach::interface_pin(program::GUARD_NODE, end)
}

/// The other ends of a pod's interfaces in the calling thread's network namespace: those that have theirs in the pod's,
/// and that no XDP program takes packets from, which may lose their sockets by that.
///
/// # Errors
/// When netlink fails.
fn ends(netns: BorrowedFd<'_>, interfaces: &[Interface]) -> io::Result<Vec<u32>> {
    talk(async |handle| {
        let (mut found, mut number) = (Vec::new(), None);
        for (index, end) in interfaces.iter().filter_map(|one| Some((one.index, one.peer?))) {
            let link = match handle.link().get().match_index(end).execute().try_next().await.map_err(kernel) {
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => continue,
                link => link?,
            };
            // After the first link: the kernel gives the pod's namespace its number, once, when it is asked about one.
            if number.is_none() {
                number = number_of(&handle, netns).await?;
            }
            let is_other_end =
                |link: &LinkMessage| number.is_some_and(|netns| peer(link) == Some((index, netns)));
            if link.is_some_and(|link| is_other_end(&link) && !has_xdp(&link)) {
                found.push(end);
            }
        }
        Ok(found)
    })
}

fn has_xdp(link: &LinkMessage) -> bool {
    let attached = |one: &LinkXdp| matches!(one, LinkXdp::Attached(how) if *how != XdpAttached::None);
    link.attributes.iter().any(|one| matches!(one, LinkAttribute::Xdp(all) if all.iter().any(attached)))
}

/// The number that another network namespace has in the calling thread's (RTM_GETNSID).
async fn number_of(handle: &Handle, netns: BorrowedFd<'_>) -> io::Result<Option<i32>> {
    let mut question = NsidMessage::default();
    question.attributes.push(NsidAttribute::Fd(netns.as_raw_fd() as u32));
    let mut question = NetlinkMessage::from(RouteNetlinkMessage::GetNsId(question));
    question.header.flags = NLM_F_REQUEST;
    let mut answers = handle.clone().request(question).map_err(kernel)?;
    while let Some(answer) = answers.next().await {
        match answer.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNsId(answer)) => {
                let assigned = |one: &NsidAttribute| match one {
                    NsidAttribute::Id(id) => Some(*id).filter(|id| *id >= 0),
                    _ => None,
                };
                return Ok(answer.attributes.iter().find_map(assigned));
            }
            NetlinkPayload::Error(error) => return Err(error.to_io()),
            _ => {}
        }
    }
    Ok(None)
}
