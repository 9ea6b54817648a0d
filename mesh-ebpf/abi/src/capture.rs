//! Which connect() calls are captured.

use crate::{Address, SOCKET_PROXY};

/// IPPROTO_TCP.
const TCP: u32 = 6;
/// IPPROTO_MPTCP: its first subflow is an ordinary TCP connection.
const MPTCP: u32 = 262;

/// What the connect hook knows of a call in an enrolled pod.
#[derive(Clone, Copy, Debug)]
pub struct Connect {
    /// Protocol of the socket.
    pub protocol: u32,
    /// Where it wants to go.
    pub destination: Address,
    /// The socket's value in `SKPROXY`.
    pub flag: Option<u32>,
    /// The caller's slot.
    pub slot: u32,
    /// Slot of the pod on this node that has the destination, if any.
    pub destination_slot: Option<u32>,
}

/// Whether to bind the socket to lo. What stays inside the pod is none of the proxy's business, and its own
/// connections must get out; everything else, IPv4 in this version, is captured. An IPv6 destination is left alone
/// here, and what comes of it is the guard's to drop.
#[inline(always)]
pub fn captured(call: &Connect) -> bool {
    let tcp = call.protocol == TCP || call.protocol == MPTCP;
    let inside = call.destination.is_loopback()
        || call.destination.is_unspecified()
        || call.destination_slot == Some(call.slot);
    tcp && !inside && call.flag != Some(SOCKET_PROXY) && call.destination.is_v4()
}

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;
    use crate::SOCKET_OLDER;

    fn call(destination: &str) -> Connect {
        let destination = Address::from(destination.parse::<IpAddr>().unwrap());
        Connect { protocol: TCP, destination, flag: None, slot: 3, destination_slot: None }
    }

    #[test]
    fn destinations() {
        for (destination, expected) in [
            ("10.96.0.7", true),
            ("1.1.1.1", true),
            ("169.254.20.10", true),
            ("::ffff:10.96.0.7", true),
            ("127.0.0.1", false),
            ("127.8.0.1", false),
            ("::ffff:127.0.0.1", false),
            ("0.0.0.0", false),
            ("::1", false),
            ("::", false),
            ("fd00::1", false),
        ] {
            assert_eq!(captured(&call(destination)), expected, "{destination}");
        }
    }

    #[test]
    fn own_address_is_not_captured_another_pods_is() {
        assert!(!captured(&Connect { destination_slot: Some(3), ..call("10.1.0.3") }));
        assert!(captured(&Connect { destination_slot: Some(4), ..call("10.1.0.4") }));
        assert!(!captured(&Connect { slot: 0, destination_slot: Some(0), ..call("10.1.0.3") }));
    }

    #[test]
    fn only_the_proxys_flag_excuses() {
        assert!(!captured(&Connect { flag: Some(SOCKET_PROXY), ..call("10.1.0.4") }));
        assert!(captured(&Connect { flag: Some(SOCKET_OLDER), ..call("10.1.0.4") }));
    }

    #[test]
    fn only_tcp() {
        assert!(captured(&Connect { protocol: MPTCP, ..call("10.1.0.4") }));
        for protocol in [0, 17, 132] {
            assert!(!captured(&Connect { protocol, ..call("10.1.0.4") }), "{protocol}");
        }
    }
}
