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
use tracing::{debug, warn};

use super::bpf::{self, Extent, Hook, Target};
use super::hook::Chosen;
use super::load::Programs;
use super::pins::Pins;
use super::pod::{Failed, Pod, step};
use super::rules::{self, Interface, MAX_INTERFACES, kernel, peer, talk, unless};
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
            // Also where another version captures it: that one's guard stays, on all that it had.
            if found.more && !self.captured() {
                let error = format!("it has more than {MAX_INTERFACES} interfaces");
                return Err(io::Error::new(io::ErrorKind::QuotaExceeded, error));
            }
            interfaces = found.seen;
            let attached = attach::guard(&directory, guards.programs, guards.hook, &interfaces);
            let pinned = guards.pins.pod_links(&maps::uid(&self.record))?;
            attach::prune(&directory, &pinned).and(attached)
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
        let found = netns::here_or_within(guards.node, || {
            let ends = ends(netns.as_fd(), interfaces)?;
            for End { index, xdp } in ends.iter().copied() {
                let pin = directory.join(pin(index));
                if xdp.is_some() {
                    attach::detach(&pin)?;
                    continue;
                }
                let attached = attach::ensure(&pin, program, Target::Interface(index), Hook::TcxIngress);
                unless(attached.map(drop), libc::ENODEV)?;
            }
            Ok(ends)
        })?;
        for end in found.iter().filter(|end| end.xdp.is_some() && !self.ends.contains(end)) {
            warn!(pod = uid, end = end.index, "not guarded on the node: its link has an XDP program there");
        }
        self.ends = found;
        debug!(pod = uid, ends = ?self.ends, "guarded on the node");
        Ok(())
    }
}

/// The node's end of a pod's link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct End {
    /// Its index there.
    pub index: u32,
    /// The XDP program that takes packets from it, 0 for several: they may lose their sockets by that, and the guard would
    /// drop what is the proxy's. So it is not guarded.
    pub xdp: Option<u32>,
}

impl Datapath {
    /// What of the ends of pods' links on the node is not as it has to be, in words.
    ///
    /// # Errors
    /// When netlink fails.
    pub(super) fn wrong_ends<'a>(
        &self,
        uids: impl IntoIterator<Item = &'a String>,
    ) -> io::Result<BTreeMap<&'a str, Vec<String>>> {
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
            let links = links(pods.iter().flat_map(|(_, pod)| &pod.ends).map(|end| end.index))?;
            let wrong = |end: &End| match (end.xdp, xdp(links.get(&end.index)?)) {
                (None, Some(_)) => Some("has got an XDP program, by which packets lose their sockets"),
                (_, None) => is_open(end.index).then_some("is not guarded"),
                (Some(_), Some(_)) => None,
            };
            let told = |end: &End| {
                Some(format!("the node's end of its link, interface {} there, {}", end.index, wrong(end)?))
            };
            Ok(pods.iter().map(|(uid, pod)| (*uid, pod.ends.iter().filter_map(told).collect())).collect())
        })
    }

    /// Puts the guards at the ends of a pod's links before programs of others that have come since.
    pub(super) fn ends_first(&self, directory: &Path, ends: &[End]) -> io::Result<()> {
        let first = |end: &End| {
            let pin = directory.join(pin(end.index));
            attach::make_first(&pin, &self.programs.guard_node, end.index, Hook::TcxIngress)
        };
        let mut guarded = ends.iter().filter(|end| end.xdp.is_none());
        netns::here_or_within(self.node.as_fd(), || guarded.try_for_each(first))
    }
}

fn pin(end: u32) -> String {
    attach::interface_pin(program::GUARD_NODE, end)
}

/// The other ends of a pod's interfaces in the calling thread's network namespace: those that have theirs in the pod's.
///
/// # Errors
/// When netlink fails.
fn ends(netns: BorrowedFd<'_>, interfaces: &[Interface]) -> io::Result<Vec<End>> {
    talk(async |handle| {
        let (mut found, mut number) = (Vec::new(), None);
        for (index, end) in interfaces.iter().filter_map(|one| Some((one.index, one.peer?))) {
            let Some(link) = link(&handle, end).await? else { continue };
            // After the first link: the kernel gives the pod's namespace its number, once, when it is asked about one.
            if number.is_none() {
                number = number_of(&handle, netns).await?;
            }
            if number.is_some_and(|netns| peer(&link) == Some((index, netns))) {
                found.push(End { index: end, xdp: xdp(&link) });
            }
        }
        Ok(found)
    })
}

/// Those of these interfaces of the calling thread's network namespace that are there.
///
/// # Errors
/// When netlink fails.
pub(super) fn links(indices: impl IntoIterator<Item = u32>) -> io::Result<BTreeMap<u32, LinkMessage>> {
    talk(async |handle| {
        let mut found = BTreeMap::new();
        for index in indices {
            found.extend(link(&handle, index).await?.map(|link| (index, link)));
        }
        Ok(found)
    })
}

async fn link(handle: &Handle, index: u32) -> io::Result<Option<LinkMessage>> {
    match handle.link().get().match_index(index).execute().try_next().await.map_err(kernel) {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        link => link,
    }
}

fn of_xdp(attribute: &LinkAttribute) -> &[LinkXdp] {
    if let LinkAttribute::Xdp(all) = attribute { all } else { &[] }
}

/// The XDP program on an interface; 0 for several.
fn xdp(link: &LinkMessage) -> Option<u32> {
    let all = || link.attributes.iter().flat_map(of_xdp);
    let attached = |one: &LinkXdp| matches!(one, LinkXdp::Attached(how) if *how != XdpAttached::None);
    let id = |one: &LinkXdp| if let LinkXdp::ProgId(id) = one { Some(*id) } else { None };
    all().any(attached).then(|| all().find_map(id).unwrap_or_default())
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
