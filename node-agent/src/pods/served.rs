//! What a proxy needs to serve one pod: the description, and descriptors in the order the protocol names them.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use mesh_core::proto::pods as proto;
use nix::sys::stat::fstat;

use crate::datapath::Listeners;

/// A pod with the agent's copies of its descriptors.
#[derive(Debug)]
pub struct Served {
    pod: proto::Pod,
    netns: OwnedFd,
    listeners: Listeners,
    sockets: Sockets,
}

/// Identity of a pod's listeners: two descriptors of one socket have the same inode (sockfs numbers each socket).
#[derive(Clone, Debug, PartialEq, Eq)]
struct Sockets(Vec<(proto::Fd, u64)>);

/// Descriptors that do not make up a pod.
#[derive(Debug, thiserror::Error)]
pub enum InvalidDescriptors {
    /// The message names another number than came.
    #[error("the message names {named} descriptors, {came} came")]
    Count {
        /// In its `fds`.
        named: usize,
        /// Beside it.
        came: usize,
    },
    /// One is missing that every pod has.
    #[error("{0:?} is missing")]
    Missing(proto::Fd),
    /// The message has no pod.
    #[error("the message has no pod")]
    NoPod,
    /// A descriptor cannot be examined.
    #[error("cannot examine a descriptor: {0}")]
    Stat(#[from] io::Error),
}

impl Served {
    /// A pod whose listeners the agent has.
    ///
    /// # Errors
    /// When a descriptor cannot be examined.
    pub fn new(pod: proto::Pod, netns: OwnedFd, listeners: Listeners) -> io::Result<Self> {
        let sockets = Sockets::of(&listeners)?;
        Ok(Self { pod, netns, listeners, sockets })
    }

    /// A pod that a proxy reports.
    ///
    /// # Errors
    /// When the descriptors are not those of a pod.
    pub(super) fn held(held: proto::Held, descriptors: Vec<OwnedFd>) -> Result<Self, InvalidDescriptors> {
        let pod = held.pod.ok_or(InvalidDescriptors::NoPod)?;
        if held.fds.len() != descriptors.len() {
            return Err(InvalidDescriptors::Count { named: held.fds.len(), came: descriptors.len() });
        }
        let mut named: BTreeMap<i32, OwnedFd> = held.fds.into_iter().zip(descriptors).collect();
        let mut optional = |fd: proto::Fd| named.remove(&i32::from(fd));
        let mut needed = |fd| optional(fd).ok_or(InvalidDescriptors::Missing(fd));
        let netns = needed(proto::Fd::Netns)?;
        let (outbound_v4, inbound_v4, hbone_v4) =
            (needed(proto::Fd::OutboundV4)?, needed(proto::Fd::InboundV4)?, needed(proto::Fd::HboneV4)?);
        let listeners = Listeners {
            outbound_v4,
            inbound_v4,
            hbone_v4,
            outbound_v6: optional(proto::Fd::OutboundV6),
            inbound_v6: optional(proto::Fd::InboundV6),
            hbone_v6: optional(proto::Fd::HboneV6),
            dns_v4: optional(proto::Fd::DnsV4),
            dns_v6: optional(proto::Fd::DnsV6),
        };
        Ok(Self::new(pod, netns, listeners)?)
    }

    /// The description.
    pub fn pod(&self) -> &proto::Pod {
        &self.pod
    }

    /// Its listeners.
    pub fn listeners(&self) -> &Listeners {
        &self.listeners
    }

    /// Whether both have the same listening sockets.
    pub(super) fn same_sockets(&self, other: &Self) -> bool {
        self.sockets == other.sockets
    }

    /// Everything in the order that goes on the wire.
    pub(super) fn descriptors(&self) -> Vec<(proto::Fd, BorrowedFd<'_>)> {
        let mut all = vec![(proto::Fd::Netns, self.netns.as_fd())];
        all.extend(listeners(&self.listeners));
        all
    }
}

impl Sockets {
    fn of(all: &Listeners) -> io::Result<Self> {
        listeners(all).map(|(name, fd)| Ok((name, fstat(fd)?.st_ino))).collect::<io::Result<_>>().map(Self)
    }
}

fn listeners(all: &Listeners) -> impl Iterator<Item = (proto::Fd, BorrowedFd<'_>)> {
    let present = [
        (proto::Fd::OutboundV4, Some(&all.outbound_v4)),
        (proto::Fd::OutboundV6, all.outbound_v6.as_ref()),
        (proto::Fd::InboundV4, Some(&all.inbound_v4)),
        (proto::Fd::InboundV6, all.inbound_v6.as_ref()),
        (proto::Fd::HboneV4, Some(&all.hbone_v4)),
        (proto::Fd::HboneV6, all.hbone_v6.as_ref()),
        (proto::Fd::DnsV4, all.dns_v4.as_ref()),
        (proto::Fd::DnsV6, all.dns_v6.as_ref()),
    ];
    present.into_iter().filter_map(|(name, fd)| fd.map(|fd| (name, fd.as_fd())))
}
