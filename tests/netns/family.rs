//! What differs between IPv4 and IPv6, so that a test is written once and run over both.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use anyhow::{Context as _, Result};
use node_agent::datapath::Listeners;
use socket2::{Domain, Socket};

use crate::world::World;

/// The family that a test's connections are of. Its pods always have addresses of both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    /// The one or the other.
    pub(crate) fn pick<T>(self, v4: T, v6: T) -> T {
        match self {
            Self::V4 => v4,
            Self::V6 => v6,
        }
    }

    pub(crate) fn domain(self) -> Domain {
        self.pick(Domain::IPV4, Domain::IPV6)
    }

    /// 0.0.0.0 or ::.
    pub(crate) fn anywhere(self, port: u16) -> SocketAddr {
        SocketAddr::new(self.pick(IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)), port)
    }

    /// Where its settings are below /proc/sys/net.
    pub(crate) fn sysctl(self, name: &str) -> String {
        format!("{}/{name}", self.pick("ipv4", "ipv6"))
    }

    pub(crate) fn outbound(self, listeners: &Listeners) -> &OwnedFd {
        self.pick(Some(&listeners.outbound_v4), listeners.outbound_v6.as_ref()).expect("an outbound listener")
    }

    pub(crate) fn inbound(self, listeners: &Listeners) -> &OwnedFd {
        self.pick(Some(&listeners.inbound_v4), listeners.inbound_v6.as_ref()).expect("an inbound listener")
    }

    pub(crate) fn hbone(self, listeners: &Listeners) -> &OwnedFd {
        self.pick(Some(&listeners.hbone_v4), listeners.hbone_v6.as_ref()).expect("an HBONE listener")
    }
}

/// All of a pod's listeners.
pub(crate) fn all(listeners: &Listeners) -> impl Iterator<Item = &OwnedFd> {
    let v6 = [&listeners.outbound_v6, &listeners.inbound_v6, &listeners.hbone_v6];
    [&listeners.outbound_v4, &listeners.inbound_v4, &listeners.hbone_v4]
        .into_iter()
        .chain(v6.into_iter().flatten())
}

/// Lets a socket have addresses that are not its pod's.
pub(crate) fn transparent(socket: &Socket, family: Domain) -> Result<()> {
    let set =
        if family == Domain::IPV4 { Socket::set_ip_transparent_v4 } else { Socket::set_ip_transparent_v6 };
    set(socket, true).context("IP_TRANSPARENT")
}

/// Runs a test over IPv4, then over IPv6, each in a world of its own.
pub(crate) fn over_both(test: impl Fn(&World) -> Result<()>) -> Result<()> {
    for family in [Family::V4, Family::V6] {
        test(&World::of(family)?).with_context(|| format!("over {family:?}"))?;
    }
    Ok(())
}
