//! Canaries: what the agent sends inside a pod to prove that it is captured, and how everybody knows them.
//!
//! They go to, or come from, an address that nobody's packets have (documentation only: RFC 5737, RFC 3849).
//! **Invariant:** nothing opens for them. The proxy answers with a word and closes, whoever asks; the guard drops them, and
//! what is sent to them before a connection stands, and keeps it to itself.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::Address;

/// Of IPv4 canaries.
pub const V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// Of IPv6 canaries.
pub const V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
/// Port that those over TCP go to, where it is not HBONE's.
pub const PORT: u16 = 15001;
/// What the proxy answers over TCP. Over UDP it is the question.
pub const ANSWER: [u8; 5] = *b"ambit";

const FOUR: Address = Address::from_v4_word(0xc000_0201_u32.to_be());
const SIX: Address = Address::from_v6_words([0x2001_0db8_u32.to_be(), 0, 0, 1_u32.to_be()]);

/// The address for canaries of one family.
pub const fn ip(v4: bool) -> IpAddr {
    if v4 { IpAddr::V4(V4) } else { IpAddr::V6(V6) }
}

/// Whether an address is theirs.
#[inline(always)]
pub fn is_canary(address: &Address) -> bool {
    *address == FOUR || *address == SIX
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_and_user_space_mean_the_same() {
        for v4 in [true, false] {
            assert!(is_canary(&Address::from(ip(v4))));
        }
        assert!(!is_canary(&Address::from(IpAddr::from([192, 0, 2, 2]))));
        assert!(!is_canary(&Address::from(IpAddr::from([1, 2, 0, 192]))));
    }
}
