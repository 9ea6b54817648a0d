//! Which listener a new connection in an enrolled pod's network namespace meets.

use crate::event::Counter;
use crate::{Address, DNS_PORT, HBONE_PORT, SocketKind, refuse};

/// What the sk_lookup hook knows: the addresses are the packet's, "local" is its destination.
#[derive(Clone, Copy, Debug)]
pub struct Lookup {
    /// The slot of the pod whose network namespace this is. A constant of each pod's program: on lo the connection of
    /// a pod to its neighbour and that of a proxy to the pod on a neighbour's behalf have the same two addresses the
    /// other way round, and sk_lookup has no helper that tells the network namespace.
    pub slot: u32,
    /// Whether the packet is IPv4.
    pub v4: bool,
    /// Whether the packet came in on lo. A packet over lo to one of the pod's own addresses comes in, for the kernel,
    /// on the interface that has the address, unless its sender is bound to lo.
    pub on_lo: bool,
    /// Destination address of the packet.
    pub local: Address,
    /// Destination port, host byte order.
    pub local_port: u16,
    /// Source address of the packet.
    pub remote: Address,
    /// Slot of the pod on this node that has `local`.
    pub local_slot: Option<u32>,
    /// Slot of the pod on this node that has `remote`.
    pub remote_slot: Option<u32>,
    /// Whether the kubelet opened this connection, to this pod and to a port that its probes name.
    pub probed: bool,
    /// What was found out of this connection at the pod's ingress, an answer of `refuse`. A plain number: LLVM reads the
    /// content of an Option that is none, which the verifier refuses.
    pub asked: u32,
}

/// What to do with the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Steer {
    /// The kernel's own lookup: the app's listener, or a refusal.
    Pass,
    /// The same for the kubelet.
    Probe,
    /// A refusal: nobody listens.
    Refuse,
    /// The listener at this index of `LISTEN`.
    To(u32),
    /// Nobody: not ours and not the app's.
    Drop(Counter),
}

/// Chooses. The program runs in enrolled network namespaces only, so every address is the pod's own, loopback, or
/// one that the pod should not be reachable by.
#[inline(always)]
pub fn steer(lookup: &Lookup) -> Steer {
    let to_self = lookup.local_slot == Some(lookup.slot);
    let from_self = lookup.remote_slot == Some(lookup.slot);
    // A pod dials its own link-local address from that address; a neighbour that forges it gets no answer.
    let own_link = lookup.local.is_link_local() && lookup.remote == lookup.local;
    // Of what comes in on lo nobody asks.
    let question = lookup.asked == refuse::ASKING && !lookup.on_lo;
    if lookup.local.is_loopback() || own_link || question {
        return Steer::Pass;
    }
    match (lookup.on_lo, to_self) {
        // The proxy to the app: the one sender to the pod's address that is bound to lo.
        (true, true) => Steer::Pass,
        (true, false) if from_self => Steer::To(outbound(lookup)),
        // The pod dials itself. From outside such a source is a martian.
        (false, true) if from_self || lookup.remote.is_loopback() => Steer::Pass,
        (false, true) if lookup.probed => Steer::Probe,
        (false, true) if lookup.asked == refuse::NOBODY && lookup.local_port != HBONE_PORT => Steer::Refuse,
        (false, true) => Steer::To(inbound(lookup)),
        _ => Steer::Drop(Counter::SteerForeign),
    }
}

/// What the sk_lookup hook knows of a datagram.
#[derive(Clone, Copy, Debug)]
pub struct Datagram {
    /// As of [`Lookup`].
    pub slot: u32,
    /// Whether the packet is IPv4.
    pub v4: bool,
    /// Destination address of the packet.
    pub local: Address,
    /// Slot of the pod on this node that has `local`.
    pub local_slot: Option<u32>,
}

/// Whether a datagram may be a query that the pod's rules turned back to lo; what is to be looked up costs something.
#[inline(always)]
pub fn may_be_query(on_lo: bool, local_port: u16) -> bool {
    on_lo && local_port == DNS_PORT
}

/// Chooses for one that may be. Whatever address the application has bound, on lo it is the pod's.
#[inline(always)]
pub fn steer_query(datagram: &Datagram) -> Steer {
    // The pod's own server.
    if datagram.local.is_loopback() || datagram.local_slot == Some(datagram.slot) {
        return Steer::Pass;
    }
    Steer::To(kind(datagram.v4, SocketKind::Dns4, SocketKind::Dns6).index(datagram.slot))
}

#[inline(always)]
fn outbound(lookup: &Lookup) -> u32 {
    kind(lookup.v4, SocketKind::Outbound4, SocketKind::Outbound6).index(lookup.slot)
}

#[inline(always)]
fn inbound(lookup: &Lookup) -> u32 {
    let kind = if lookup.local_port == HBONE_PORT {
        kind(lookup.v4, SocketKind::Hbone4, SocketKind::Hbone6)
    } else {
        kind(lookup.v4, SocketKind::Inbound4, SocketKind::Inbound6)
    };
    kind.index(lookup.slot)
}

#[inline(always)]
fn kind(v4: bool, four: SocketKind, six: SocketKind) -> SocketKind {
    if v4 { four } else { six }
}

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;

    const POD: &str = "10.1.0.3";
    const OTHER: &str = "10.1.0.4";
    const OUTSIDE: &str = "10.2.0.9";

    const POD6: &str = "fd00:1::3";
    const OTHER6: &str = "fd00:1::4";
    const OUTSIDE6: &str = "fd00:2::9";

    fn slot(text: &str) -> Option<u32> {
        match text {
            POD | POD6 => Some(3),
            OTHER | OTHER6 => Some(4),
            _ => None,
        }
    }

    fn lookup(on_lo: bool, remote: &str, local: &str, local_port: u16) -> Lookup {
        let address = |text: &str| Address::from(text.parse::<IpAddr>().unwrap());
        let (local_slot, remote_slot) = (slot(local), slot(remote));
        let v4 = !local.contains(':');
        Lookup {
            slot: 3,
            v4,
            on_lo,
            local: address(local),
            local_port,
            remote: address(remote),
            local_slot,
            remote_slot,
            probed: false,
            asked: refuse::UNKNOWN,
        }
    }

    #[test]
    fn every_way_in() {
        let (lo, eth0) = (true, false);
        let dropped = Steer::Drop(Counter::SteerForeign);
        for (why, on_lo, remote, local, port, expected) in [
            ("captured", lo, POD, OUTSIDE, 80, Steer::To(3 * 8 + 2)),
            ("captured, to another pod of the node", lo, POD, OTHER, 80, Steer::To(3 * 8 + 2)),
            ("captured, HBONE's port is the app's too", lo, POD, OUTSIDE, 15008, Steer::To(3 * 8 + 2)),
            ("the proxy to the app", lo, OUTSIDE, POD, 80, Steer::Pass),
            ("the proxy to the app, for another pod of the node", lo, OTHER, POD, 80, Steer::Pass),
            ("the proxy to the app, for the pod itself", lo, POD, POD, 80, Steer::Pass),
            ("localhost", lo, "127.0.0.1", "127.0.0.1", 80, Steer::Pass),
            ("localhost from the pod's address", lo, POD, "127.0.0.1", 80, Steer::Pass),
            ("localhost v6", lo, "::1", "::1", 80, Steer::Pass),
            ("nobody's connection on lo", lo, OUTSIDE, "10.9.9.9", 80, dropped),
            ("another pod's connection on lo", lo, OTHER, OUTSIDE, 80, dropped),
            ("plaintext", eth0, OUTSIDE, POD, 80, Steer::To(3 * 8)),
            ("plaintext from a pod of this node", eth0, OTHER, POD, 80, Steer::To(3 * 8)),
            ("HBONE", eth0, OUTSIDE, POD, 15008, Steer::To(3 * 8 + 4)),
            ("the pod dials itself", eth0, POD, POD, 80, Steer::Pass),
            ("the pod dials its HBONE port", eth0, POD, POD, 15008, Steer::Pass),
            ("the pod dials itself from localhost", eth0, "127.0.0.1", POD, 80, Steer::Pass),
            ("another pod's address", eth0, OUTSIDE, OTHER, 80, dropped),
            ("an address that is not enrolled", eth0, OUTSIDE, "10.1.0.99", 80, dropped),
            ("IPv6 that is not enrolled", eth0, "fd00::9", "fd00::3", 80, dropped),
            ("captured, IPv6", lo, POD6, OUTSIDE6, 80, Steer::To(3 * 8 + 3)),
            ("captured, to another pod of the node, IPv6", lo, POD6, OTHER6, 80, Steer::To(3 * 8 + 3)),
            ("the proxy to the app, IPv6", lo, OUTSIDE6, POD6, 80, Steer::Pass),
            ("the proxy to the app, for another pod of the node, IPv6", lo, OTHER6, POD6, 80, Steer::Pass),
            ("plaintext, IPv6", eth0, OUTSIDE6, POD6, 80, Steer::To(3 * 8 + 1)),
            ("plaintext from the link, IPv6", eth0, "fe80::9", POD6, 80, Steer::To(3 * 8 + 1)),
            ("HBONE, IPv6", eth0, OUTSIDE6, POD6, 15008, Steer::To(3 * 8 + 5)),
            ("the pod dials itself, IPv6", eth0, POD6, POD6, 80, Steer::Pass),
            ("another pod's address, IPv6", eth0, OUTSIDE6, OTHER6, 80, dropped),
            ("link-local", eth0, "fe80::9", "fe80::3", 80, dropped),
            ("the pod dials itself, link-local", eth0, "fe80::3", "fe80::3", 80, Steer::Pass),
        ] {
            assert_eq!(steer(&lookup(on_lo, remote, local, port)), expected, "{why}");
        }
    }

    #[test]
    fn queries_to_others_meet_the_dns_proxy() {
        let (lo, eth0) = (true, false);
        for (why, on_lo, local, port, expected) in [
            ("a query", lo, OUTSIDE, 53, Steer::To(3 * 8 + 6)),
            ("to a pod of this node", lo, OTHER, 53, Steer::To(3 * 8 + 6)),
            ("IPv6", lo, OUTSIDE6, 53, Steer::To(3 * 8 + 7)),
            ("another port", lo, OUTSIDE, 54, Steer::Pass),
            ("to the pod's own server", lo, POD, 53, Steer::Pass),
            ("to the pod's own server on localhost", lo, "127.0.0.53", 53, Steer::Pass),
            ("to the pod's own server on localhost, IPv6", lo, "::1", 53, Steer::Pass),
            ("from the network", eth0, POD, 53, Steer::Pass),
            ("for somebody else", eth0, OUTSIDE, 53, Steer::Pass),
        ] {
            let Lookup { slot, v4, local, local_slot, .. } = lookup(on_lo, POD, local, port);
            let datagram = Datagram { slot, v4, local, local_slot };
            let met = if may_be_query(on_lo, port) { steer_query(&datagram) } else { Steer::Pass };
            assert_eq!(met, expected, "{why}");
        }
    }

    #[test]
    fn what_was_found_out_counts_for_plaintext_only() {
        use crate::refuse::{ASKING, NOBODY, SOMEBODY};
        let asked = |answer, on_lo, remote, local, port| {
            steer(&Lookup { asked: answer, ..lookup(on_lo, remote, local, port) })
        };
        for (why, met, expected) in [
            ("the question itself", asked(ASKING, false, OUTSIDE, POD, 80), Steer::Pass),
            ("nobody listens", asked(NOBODY, false, OUTSIDE, POD, 80), Steer::Refuse),
            ("somebody does", asked(SOMEBODY, false, OUTSIDE, POD, 80), Steer::To(3 * 8)),
            ("HBONE's port is the proxy's", asked(NOBODY, false, OUTSIDE, POD, 15008), Steer::To(3 * 8 + 4)),
            ("a question about another pod's address", asked(ASKING, false, OUTSIDE, OTHER, 80), Steer::Pass),
            ("on lo there is no question", asked(ASKING, true, POD, OUTSIDE, 80), Steer::To(3 * 8 + 2)),
        ] {
            assert_eq!(met, expected, "{why}");
        }
    }

    #[test]
    fn a_probe_passes_to_the_pods_own_address_only() {
        let probed = |on_lo, remote, local| Lookup { probed: true, ..lookup(on_lo, remote, local, 80) };
        for (why, lookup, expected) in [
            ("a probe", probed(false, OUTSIDE, POD), Steer::Probe),
            ("on lo it is the pod's own", probed(true, POD, OUTSIDE), Steer::To(3 * 8 + 2)),
            ("another pod's address", probed(false, OUTSIDE, OTHER), Steer::Drop(Counter::SteerForeign)),
        ] {
            assert_eq!(steer(&lookup), expected, "{why}");
        }
    }
}
