//! Which connect() calls are captured.

use crate::{Address, FAMILY_V4, FAMILY_V6, SOCKET_PROXY};

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
    /// Families of the pod's addresses, as in `NetnsConfig`.
    pub families: u32,
    /// Slot of the pod on this node that has the destination, if any.
    pub destination_slot: Option<u32>,
}

/// What becomes of the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// The kernel's as if there were no mesh.
    Leave,
    /// Its socket is bound to lo.
    Capture,
    /// Refused at once with ENETUNREACH.
    Unreachable,
}

/// Decides. What stays inside the pod or on its link is none of the proxy's business, and the proxy's own connections
/// must get out; everything else is captured. Where the pod has no address of the destination's family, there is
/// neither a source for the connection nor a listener that it could meet, so it is refused like in a pod that has no
/// route of the family, which is what it mostly is.
#[inline(always)]
pub fn decide(call: &Connect) -> Call {
    let tcp = call.protocol == TCP || call.protocol == MPTCP;
    let inside = call.destination.is_loopback()
        || call.destination.is_unspecified()
        || call.destination.is_link_local()
        || call.destination.is_multicast()
        || call.destination_slot == Some(call.slot);
    if !tcp || inside || call.flag == Some(SOCKET_PROXY) {
        return Call::Leave;
    }
    let family = if call.destination.is_v4() { FAMILY_V4 } else { FAMILY_V6 };
    if call.families & family == 0 { Call::Unreachable } else { Call::Capture }
}

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;
    use crate::{SOCKET_OLDER, SOCKET_TUNNEL};

    fn call(destination: &str) -> Connect {
        let destination = Address::from(destination.parse::<IpAddr>().unwrap());
        let families = FAMILY_V4 | FAMILY_V6;
        Connect { protocol: TCP, destination, flag: None, slot: 3, families, destination_slot: None }
    }

    #[test]
    fn destinations() {
        for (destination, captured) in [
            ("10.96.0.7", true),
            ("1.1.1.1", true),
            ("169.254.20.10", true),
            ("::ffff:10.96.0.7", true),
            ("fd00:10:96::7", true),
            ("2001:db8::1", true),
            ("64:ff9b::101:101", true),
            ("::2", true),
            ("127.0.0.1", false),
            ("127.8.0.1", false),
            ("::ffff:127.0.0.1", false),
            ("0.0.0.0", false),
            ("::ffff:0.0.0.0", false),
            ("::1", false),
            ("::", false),
            ("fe80::1", false),
            ("febf::1", false),
            ("ff02::1", false),
            ("224.0.0.1", false),
        ] {
            let expected = if captured { Call::Capture } else { Call::Leave };
            assert_eq!(decide(&call(destination)), expected, "{destination}");
        }
    }

    #[test]
    fn a_family_that_the_pod_does_not_have_is_unreachable() {
        const V4: &str = "10.96.0.7";
        const MAPPED: &str = "::ffff:10.96.0.7";
        const V6: &str = "fd00::7";
        for (families, destination, expected) in [
            (FAMILY_V4, V4, Call::Capture),
            (FAMILY_V4, MAPPED, Call::Capture),
            (FAMILY_V4, V6, Call::Unreachable),
            (FAMILY_V6, V6, Call::Capture),
            (FAMILY_V6, V4, Call::Unreachable),
            (FAMILY_V6, MAPPED, Call::Unreachable),
            (FAMILY_V6, "127.0.0.1", Call::Leave),
            (FAMILY_V4, "::1", Call::Leave),
            (FAMILY_V4, "fe80::1", Call::Leave),
            (0, V4, Call::Unreachable),
        ] {
            assert_eq!(
                decide(&Connect { families, ..call(destination) }),
                expected,
                "{families} {destination}"
            );
        }
        let proxy = Connect { families: FAMILY_V4, flag: Some(SOCKET_PROXY), ..call(V6) };
        assert_eq!(decide(&proxy), Call::Leave);
    }

    #[test]
    fn own_address_is_not_captured_another_pods_is() {
        for own in ["10.1.0.3", "fd00:10:1::3"] {
            let to = |destination_slot, slot| Connect { destination_slot, slot, ..call(own) };
            assert_eq!(decide(&to(Some(3), 3)), Call::Leave);
            assert_eq!(decide(&to(Some(4), 3)), Call::Capture);
            assert_eq!(decide(&to(Some(0), 0)), Call::Leave);
        }
    }

    #[test]
    fn only_the_proxys_flag_excuses() {
        for destination in ["10.1.0.4", "fd00:10:1::4"] {
            let flagged = |flag| decide(&Connect { flag: Some(flag), ..call(destination) });
            assert_eq!(flagged(SOCKET_PROXY), Call::Leave);
            assert_eq!(flagged(SOCKET_OLDER), Call::Capture);
            assert_eq!(flagged(SOCKET_TUNNEL), Call::Capture);
        }
    }

    #[test]
    fn only_tcp() {
        for destination in ["10.1.0.4", "fd00:10:1::4"] {
            assert_eq!(decide(&Connect { protocol: MPTCP, ..call(destination) }), Call::Capture);
            for protocol in [0, 17, 132] {
                let families = FAMILY_V4;
                assert_eq!(
                    decide(&Connect { protocol, families, ..call(destination) }),
                    Call::Leave,
                    "{protocol}"
                );
            }
        }
    }
}
