//! Which packets may leave a pod.
//!
//! **Invariant:** data of a TCP connection leaves only from a socket that user space or the iterator flagged; a mark
//! on the packet or the socket means nothing, since CAP_NET_RAW sets it.

use crate::Address;
use crate::event::Counter;
use crate::packet::{ACK, Packet, RST, SYN};
use crate::{SOCKET_OLDER, SOCKET_PROBED, SOCKET_PROXY, SOCKET_TUNNEL};

/// The packet's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sender {
    /// What kind of socket it is.
    pub kind: Kind,
    /// Its value in `SKPROXY`, of a handshake its listener's; 0: none. A plain number: LLVM reads the content of an
    /// Option that is none, which the verifier refuses.
    pub flag: u32,
}

/// Kinds of sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// None: forwarded, or the kernel's SYN cookie (its SYN-ACK belongs to no socket, tcp_make_synack()).
    None,
    /// A connection or a raw socket.
    Socket,
    /// A handshake (TCP_NEW_SYN_RECV).
    Handshake,
    /// A connection in TIME_WAIT; the kernel attaches these since 6.13.
    TimeWait,
}

impl Kind {
    /// One with this value in `SKPROXY`.
    #[inline(always)]
    pub const fn flagged(self, flag: u32) -> Sender {
        Sender { kind: self, flag }
    }
}

/// What becomes of the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It leaves.
    Pass,
    /// It leaves, and is counted.
    PassCounted(Counter),
    /// It does not.
    Drop(Counter),
}

impl Verdict {
    /// In [`pack`](Self::pack): the packet is dropped.
    pub const DROP: u32 = 1 << 9;
    /// In [`pack`](Self::pack): it is counted.
    pub const COUNTED: u32 = 1 << 8;

    /// All of it in one number, the counter's index in the last byte.
    #[inline(always)]
    pub const fn pack(self) -> u32 {
        match self {
            Self::Pass => 0,
            Self::PassCounted(counter) => Self::COUNTED | counter as u32,
            Self::Drop(counter) => Self::DROP | Self::COUNTED | counter as u32,
        }
    }

    /// The index of the counter in a packed verdict.
    #[inline(always)]
    pub const fn counter(packed: u32) -> u32 {
        packed & 0xff
    }
}

/// Decides. Three kinds of segment pass without a flagged socket, none of them with data: resets (the kernel answers
/// for ports and connections that nobody has), the SYN-ACK of a SYN cookie, and what TIME_WAIT repeats. A raw socket
/// can send a bare reset too, which tells its peer nothing but the numbers in a header. The app's end of a probe may have
/// gone by when the last it said comes to the node, and no longer tell whose it was: without data that passes, too.
#[inline(always)]
pub fn judge(packet: &Packet, sender: Sender) -> Verdict {
    let &Packet::Tcp { flags, data, .. } = packet else { return Verdict::Pass };
    match (sender.kind, sender.flag) {
        (Kind::Socket | Kind::Handshake, SOCKET_PROXY) => Verdict::Pass,
        (Kind::Socket, SOCKET_TUNNEL) => Verdict::Pass,
        (Kind::Socket, SOCKET_OLDER) => Verdict::PassCounted(Counter::GuardOlder),
        _ if !data && flags & RST != 0 => Verdict::Pass,
        (Kind::None, _) if !data && flags & (SYN | ACK) == SYN | ACK => Verdict::Pass,
        (Kind::TimeWait, _) | (Kind::Socket, SOCKET_PROBED) if !data && flags & SYN == 0 => Verdict::Pass,
        (Kind::None, _) => Verdict::Drop(Counter::GuardNoSocket),
        (Kind::Socket, _) => Verdict::Drop(Counter::GuardApp),
        (Kind::Handshake, _) => Verdict::Drop(Counter::GuardAppListener),
        (Kind::TimeWait, _) => Verdict::Drop(Counter::GuardTimeWait),
    }
}

/// Whether a packet that [`judge`] drops may leave all the same: between two link-local addresses it reaches the pod's
/// link and no further, and the connect hook leaves such connections to the kernel.
#[inline(always)]
pub fn stays_on_link(source: &Address, destination: &Address) -> bool {
    source.is_link_local() && destination.is_link_local()
}

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;

    #[test]
    fn only_between_link_local_addresses() {
        let address = |text: &str| Address::from(text.parse::<IpAddr>().unwrap());
        for (source, destination, expected) in [
            ("fe80::3", "fe80::9", true),
            ("fd00::3", "fe80::9", false),
            ("fe80::3", "fd00::9", false),
            ("169.254.0.3", "169.254.0.9", false),
            ("::", "::", false),
        ] {
            assert_eq!(
                stays_on_link(&address(source), &address(destination)),
                expected,
                "{source} {destination}"
            );
        }
    }

    #[test]
    fn verdicts_in_one_number() {
        assert_eq!(Verdict::Pass.pack(), 0);
        for counter in Counter::ALL {
            let (pass, drop) = (Verdict::PassCounted(counter).pack(), Verdict::Drop(counter).pack());
            assert_eq!((Verdict::counter(pass), Verdict::counter(drop)), (counter as u32, counter as u32));
            let both = |packed| (packed & Verdict::COUNTED != 0, packed & Verdict::DROP != 0);
            assert_eq!((both(pass), both(drop)), ((true, false), (true, true)));
        }
    }

    #[test]
    fn verdicts() {
        const DATA: bool = true;
        const BARE: bool = false;
        let drop = Verdict::Drop;
        for (why, sender, flags, data, expected) in [
            ("the proxy's data", Kind::Socket.flagged(SOCKET_PROXY), ACK, DATA, Verdict::Pass),
            ("the proxy's SYN", Kind::Socket.flagged(SOCKET_PROXY), SYN, BARE, Verdict::Pass),
            ("the proxy's fragment", Kind::Socket.flagged(SOCKET_PROXY), 0, DATA, Verdict::Pass),
            ("the proxy's SYN-ACK", Kind::Handshake.flagged(SOCKET_PROXY), SYN | ACK, BARE, Verdict::Pass),
            (
                "an older connection",
                Kind::Socket.flagged(SOCKET_OLDER),
                ACK,
                DATA,
                Verdict::PassCounted(Counter::GuardOlder),
            ),
            ("a tunnel's data", Kind::Socket.flagged(SOCKET_TUNNEL), ACK, DATA, Verdict::Pass),
            (
                "a tunnel that listens",
                Kind::Handshake.flagged(SOCKET_TUNNEL),
                SYN | ACK,
                BARE,
                drop(Counter::GuardAppListener),
            ),
            ("an app's data", Kind::Socket.flagged(0), ACK, DATA, drop(Counter::GuardApp)),
            ("an app's SYN", Kind::Socket.flagged(0), SYN, BARE, drop(Counter::GuardApp)),
            ("a flag of another meaning", Kind::Socket.flagged(9), ACK, DATA, drop(Counter::GuardApp)),
            (
                "an app's listener",
                Kind::Handshake.flagged(0),
                SYN | ACK,
                BARE,
                drop(Counter::GuardAppListener),
            ),
            (
                "an older listener",
                Kind::Handshake.flagged(SOCKET_OLDER),
                SYN | ACK,
                BARE,
                drop(Counter::GuardAppListener),
            ),
            ("the kernel's reset", Kind::None.flagged(0), RST | ACK, BARE, Verdict::Pass),
            ("the control socket's reset", Kind::Socket.flagged(0), RST, BARE, Verdict::Pass),
            ("a reset with data", Kind::Socket.flagged(0), RST, DATA, drop(Counter::GuardApp)),
            ("a SYN cookie", Kind::None.flagged(0), SYN | ACK, BARE, Verdict::Pass),
            ("a SYN cookie with data", Kind::None.flagged(0), SYN | ACK, DATA, drop(Counter::GuardNoSocket)),
            ("forwarded SYN", Kind::None.flagged(0), SYN, BARE, drop(Counter::GuardNoSocket)),
            ("forwarded ACK", Kind::None.flagged(0), ACK, BARE, drop(Counter::GuardNoSocket)),
            ("a raw SYN-ACK", Kind::Socket.flagged(0), SYN | ACK, BARE, drop(Counter::GuardApp)),
            ("a probe's farewell", Kind::Socket.flagged(SOCKET_PROBED), ACK, BARE, Verdict::Pass),
            ("a probe's data", Kind::Socket.flagged(SOCKET_PROBED), ACK, DATA, drop(Counter::GuardApp)),
            ("a probe that dials", Kind::Socket.flagged(SOCKET_PROBED), SYN, BARE, drop(Counter::GuardApp)),
            ("TIME_WAIT", Kind::TimeWait.flagged(0), ACK, BARE, Verdict::Pass),
            ("TIME_WAIT with data", Kind::TimeWait.flagged(0), ACK, DATA, drop(Counter::GuardTimeWait)),
            ("a fragment", Kind::None.flagged(0), 0, DATA, drop(Counter::GuardNoSocket)),
        ] {
            assert_eq!(judge(&Packet::Tcp { flags, data, ip: 14, tcp: 34 }, sender), expected, "{why}");
        }
    }

    #[test]
    fn what_is_not_tcp_passes() {
        for sender in [
            Kind::None.flagged(0),
            Kind::Socket.flagged(0),
            Kind::Handshake.flagged(0),
            Kind::TimeWait.flagged(0),
        ] {
            assert_eq!(judge(&Packet::Other, sender), Verdict::Pass);
        }
    }
}
