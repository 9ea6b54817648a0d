//! Which packets may leave a pod.
//!
//! **Invariant:** data of a TCP connection leaves only from a socket that user space or the iterator flagged; a mark
//! on the packet or the socket means nothing, since CAP_NET_RAW sets it.

use crate::Address;
use crate::event::Counter;
use crate::packet::{ACK, Packet, RST, SYN};
use crate::{SOCKET_OLDER, SOCKET_PROXY};

/// The packet's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// None: forwarded, or the kernel's SYN cookie (its SYN-ACK belongs to no socket, tcp_make_synack()).
    None,
    /// A connection or a raw socket, and its value in `SKPROXY`.
    Socket(Option<u32>),
    /// A handshake (TCP_NEW_SYN_RECV), and its listener's value in `SKPROXY`.
    Handshake(Option<u32>),
    /// A connection in TIME_WAIT; the kernel attaches these since 6.13.
    TimeWait,
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

/// Decides. Three kinds of segment pass without a flagged socket, none of them with data: resets (the kernel answers
/// for ports and connections that nobody has), the SYN-ACK of a SYN cookie, and what TIME_WAIT repeats. A raw socket
/// can send a bare reset too, which tells its peer nothing but the numbers in a header.
#[inline(always)]
pub fn judge(packet: &Packet, sender: Sender) -> Verdict {
    let &Packet::Tcp { flags, data, .. } = packet else { return Verdict::Pass };
    match sender {
        Sender::Socket(Some(SOCKET_PROXY)) | Sender::Handshake(Some(SOCKET_PROXY)) => Verdict::Pass,
        Sender::Socket(Some(SOCKET_OLDER)) => Verdict::PassCounted(Counter::GuardOlder),
        _ if !data && flags & RST != 0 => Verdict::Pass,
        Sender::None if !data && flags & (SYN | ACK) == SYN | ACK => Verdict::Pass,
        Sender::TimeWait if !data && flags & SYN == 0 => Verdict::Pass,
        Sender::None => Verdict::Drop(Counter::GuardNoSocket),
        Sender::Socket(_) => Verdict::Drop(Counter::GuardApp),
        Sender::Handshake(_) => Verdict::Drop(Counter::GuardAppListener),
        Sender::TimeWait => Verdict::Drop(Counter::GuardTimeWait),
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
    fn verdicts() {
        const DATA: bool = true;
        const BARE: bool = false;
        let proxy = Some(SOCKET_PROXY);
        let drop = Verdict::Drop;
        for (why, sender, flags, data, expected) in [
            ("the proxy's data", Sender::Socket(proxy), ACK, DATA, Verdict::Pass),
            ("the proxy's SYN", Sender::Socket(proxy), SYN, BARE, Verdict::Pass),
            ("the proxy's fragment", Sender::Socket(proxy), 0, DATA, Verdict::Pass),
            ("the proxy's SYN-ACK", Sender::Handshake(proxy), SYN | ACK, BARE, Verdict::Pass),
            (
                "an older connection",
                Sender::Socket(Some(SOCKET_OLDER)),
                ACK,
                DATA,
                Verdict::PassCounted(Counter::GuardOlder),
            ),
            ("an app's data", Sender::Socket(None), ACK, DATA, drop(Counter::GuardApp)),
            ("an app's SYN", Sender::Socket(None), SYN, BARE, drop(Counter::GuardApp)),
            ("a flag of another meaning", Sender::Socket(Some(9)), ACK, DATA, drop(Counter::GuardApp)),
            ("an app's listener", Sender::Handshake(None), SYN | ACK, BARE, drop(Counter::GuardAppListener)),
            (
                "an older listener",
                Sender::Handshake(Some(SOCKET_OLDER)),
                SYN | ACK,
                BARE,
                drop(Counter::GuardAppListener),
            ),
            ("the kernel's reset", Sender::None, RST | ACK, BARE, Verdict::Pass),
            ("the control socket's reset", Sender::Socket(None), RST, BARE, Verdict::Pass),
            ("a reset with data", Sender::Socket(None), RST, DATA, drop(Counter::GuardApp)),
            ("a SYN cookie", Sender::None, SYN | ACK, BARE, Verdict::Pass),
            ("a SYN cookie with data", Sender::None, SYN | ACK, DATA, drop(Counter::GuardNoSocket)),
            ("forwarded SYN", Sender::None, SYN, BARE, drop(Counter::GuardNoSocket)),
            ("forwarded ACK", Sender::None, ACK, BARE, drop(Counter::GuardNoSocket)),
            ("a raw SYN-ACK", Sender::Socket(None), SYN | ACK, BARE, drop(Counter::GuardApp)),
            ("TIME_WAIT", Sender::TimeWait, ACK, BARE, Verdict::Pass),
            ("TIME_WAIT with data", Sender::TimeWait, ACK, DATA, drop(Counter::GuardTimeWait)),
            ("a fragment", Sender::None, 0, DATA, drop(Counter::GuardNoSocket)),
        ] {
            assert_eq!(judge(&Packet::Tcp { flags, data, ip: 14, tcp: 34 }, sender), expected, "{why}");
        }
    }

    #[test]
    fn what_is_not_tcp_passes() {
        for sender in [Sender::None, Sender::Socket(None), Sender::Handshake(None), Sender::TimeWait] {
            assert_eq!(judge(&Packet::Other, sender), Verdict::Pass);
        }
    }
}
