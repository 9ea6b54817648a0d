//! Connections of the node's kubelet to its pods: which of them pass by the proxy, and what answers them.
//!
//! The kubelet's side records each connection before its SYN leaves, so that a connection is known by where it was
//! made, never by its source address alone: masqueraded traffic has the same.
//! **Invariant:** only what the pod's own probes and lifecycle hooks name is opened by a record.

use core::mem::{align_of, offset_of, size_of};

use crate::packet::{ACK, SYN};
use crate::{Address, SOCKET_PROBED};

/// Key of `PROBE`: the two ends of a connection as its SYN has them.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tuple {
    /// Who opened it.
    pub source: Address,
    /// Whom to.
    pub destination: Address,
    /// Host byte order.
    pub source_port: u16,
    /// Host byte order.
    pub destination_port: u16,
}

/// Key of `PROBEPORT`: a port that probes or lifecycle hooks of a pod name.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProbePort {
    /// The pod's slot.
    pub slot: u32,
    /// Host byte order.
    pub port: u16,
    /// Zero.
    pub padding: u16,
}

impl ProbePort {
    /// A pod's port.
    #[inline(always)]
    pub const fn new(slot: u32, port: u16) -> Self {
        Self { slot, port, padding: 0 }
    }
}

const _: () = {
    assert!(size_of::<Tuple>() == 36 && align_of::<Tuple>() == 4);
    assert!(offset_of!(Tuple, source_port) == 32);
    assert!(size_of::<ProbePort>() == 8 && align_of::<ProbePort>() == 4);
};

/// Who sends a packet that is not the proxy's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answerer {
    /// A handshake (TCP_NEW_SYN_RECV).
    Handshake,
    /// A socket.
    Socket {
        /// It is a TCP socket, not a raw or packet one that can say anything in its packets.
        tcp: bool,
        /// It accepted the connection that the packet is of, going by the packet's own bytes.
        accepted: bool,
        /// Its value in `SKPROXY`.
        flag: Option<u32>,
    },
}

/// Whether a packet answers the kubelet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// No.
    No,
    /// Yes.
    Yes,
    /// Yes, and its socket is the app's end of the recorded connection: to be flagged, since the record goes when the
    /// kubelet's end closes, and the app's FIN may come later.
    First,
}

/// Decides. `flags` and `data` are the segment's; `recorded` says whether its connection, the peer as source, is in
/// `PROBE`, and not as [`NO_PROBE`].
///
/// Neither mark nor ownership counts, only what cannot be forged from inside the pod: a TCP socket that has the two
/// ends of a connection that the kubelet opened. A raw socket that repeats them is none.
#[inline(always)]
pub fn answer(flags: u8, data: bool, answerer: &Answerer, recorded: bool) -> Answer {
    match answerer {
        Answerer::Handshake if recorded && !data && flags & (SYN | ACK) == SYN | ACK => Answer::Yes,
        Answerer::Socket { tcp: true, accepted: true, flag } => match (flag, recorded) {
            (Some(SOCKET_PROBED), _) => Answer::Yes,
            (None, true) => Answer::First,
            _ => Answer::No,
        },
        _ => Answer::No,
    }
}

/// Value in `PROBE` of a connection that is not the kubelet's, though it looks so, and whose socket could not be flagged.
pub const NO_PROBE: u32 = u32::MAX;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SOCKET_OLDER;
    use crate::packet::RST;

    #[test]
    fn answers() {
        const RECORDED: bool = true;
        const DATA: bool = true;
        let socket = |flag| Answerer::Socket { tcp: true, accepted: true, flag };
        let raw = |flag| Answerer::Socket { tcp: false, accepted: true, flag };
        let elsewhere = |flag| Answerer::Socket { tcp: true, accepted: false, flag };
        let probed = Some(SOCKET_PROBED);
        let older = Some(SOCKET_OLDER);
        for (why, answerer, flags, data, recorded, expected) in [
            ("SYN-ACK", Answerer::Handshake, SYN | ACK, !DATA, RECORDED, Answer::Yes),
            ("SYN-ACK to others", Answerer::Handshake, SYN | ACK, !DATA, !RECORDED, Answer::No),
            ("SYN-ACK with data", Answerer::Handshake, SYN | ACK, DATA, RECORDED, Answer::No),
            ("a handshake's reset", Answerer::Handshake, RST, !DATA, RECORDED, Answer::No),
            ("first data", socket(None), ACK, DATA, RECORDED, Answer::First),
            ("later data", socket(probed), ACK, DATA, RECORDED, Answer::Yes),
            ("after the kubelet's end is closed", socket(probed), ACK, !DATA, !RECORDED, Answer::Yes),
            ("data to others", socket(None), ACK, DATA, !RECORDED, Answer::No),
            ("a raw socket that repeats the ends", raw(None), ACK, DATA, RECORDED, Answer::No),
            ("a raw socket that was flagged", raw(probed), ACK, DATA, RECORDED, Answer::No),
            ("another connection's socket", elsewhere(None), ACK, DATA, RECORDED, Answer::No),
            ("a probed socket's packet sent elsewhere", elsewhere(probed), ACK, DATA, RECORDED, Answer::No),
            ("another flag", socket(older), ACK, DATA, RECORDED, Answer::No),
        ] {
            assert_eq!(answer(flags, data, &answerer, recorded), expected, "{why}");
        }
    }
}
